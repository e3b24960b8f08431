"""Which path a communication op takes here, and why: `interlace bench --explain`. Tells what kernels/comm/ does; chooses nothing."""
import torch
import torch.distributed as dist

from ..kernels.comm import heap_of
from ..kernels.comm.heap import WHY_NOT

__all__ = ["path"]

STAGES = ("gemm_ar", "gemm_rs")                                       # forward; of their duals the backward
DUALS = {"copy_gemm": "gemm_ar", "ag_gemm": "gemm_rs"}


def path(op: str, group: dist.ProcessGroup | None, device: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """shape: of the tensor that is reduced, gathered or scattered, on one rank."""
    if group is None or dist.get_world_size(group) == 1:
        return "one rank: nothing is communicated"
    if device != "cpu":
        return "torch.distributed: there is no heap for CUDA tensors yet"
    heap = heap_of(group)
    if heap is None:
        return f"torch.distributed: no shared memory among these ranks{f' ({WHY_NOT})' if WHY_NOT else ''}"
    n = dtype.itemsize
    for size in shape:
        n *= size
    room, row = heap.nbytes, n // max(1, shape[0])
    what = f"{n} bytes against {room} of a buffer"
    fused = DUALS.get(op, op)
    side = " in the backward" if op in DUALS else ""
    if fused == "gemm_ar":
        if row > room:
            return f"heap, chunked{side}: not even one row of the product fits ({row} bytes against {room})"
        blocks = -(-shape[0] // max(1, room // max(1, row)))
        return f"heap, staged{side}: the GEMM writes into the buffer, in {blocks} block{'s' * (blocks > 1)} of rows ({what})"
    if fused == "gemm_rs":
        return (f"heap, staged{side}: the GEMM writes the product into the buffer ({what})" if n <= room else
                f"heap, chunked{side}: the product does not fit and is copied in ({what})")
    return f"heap, {'in one piece' if n <= room else 'chunked'}: {what}"
