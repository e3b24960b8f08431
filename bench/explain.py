"""Which path a communication op takes here, and why: `interlace bench --explain`. The choice is kernels/comm/choose.py's."""
import torch
import torch.distributed as dist

from ..kernels.comm import heap_of
from ..kernels.comm.choose import choose
from ..kernels.comm.heap import WHY_NOT
from ..kernels.comm.pad import pad_machine, pad_multicast, pad_room

__all__ = ["path"]

DUALS = {"copy_gemm": "gemm_ar"}                                      # nothing is communicated in its forward


def path(op: str, group: dist.ProcessGroup | None, device: str, shape: tuple[int, int] | tuple[int], dtype: torch.dtype,
         inner: int | None = None) -> str:
    """shape: of the tensor that is reduced, gathered or scattered, on one rank. inner: of a fused op, as in `choose`."""
    if group is None or dist.get_world_size(group) == 1:
        return "one rank: nothing is communicated"
    heap = heap_of(group) if device == "cpu" else None
    x = torch.empty(0, dtype=dtype, device=device)
    room = heap.nbytes if heap is not None else pad_room(x, group) if device != "cpu" else 0
    multicast, machine = pad_multicast(x, group), heap.machine if heap is not None else pad_machine(x, group) if device != "cpu" else None
    if inner is not None or device != "cpu":
        rows, cols = shape if inner is not None else (torch.Size(shape).numel(), 1)   # type: ignore[misc]
        side = "; communicates in the backward" if op in DUALS else ""
        return str(choose(DUALS.get(op, op), rows, cols, inner or 0, dtype.itemsize, dist.get_world_size(group), device, room,
                          multicast=multicast, machine=machine)) + side
    if heap is None:
        return f"torch.distributed: no shared memory among these ranks{f' ({WHY_NOT})' if WHY_NOT else ''}"
    n = dtype.itemsize * torch.Size(shape).numel()
    return f"heap, {'in one piece' if n <= heap.nbytes else 'chunked'}: {n} bytes against {heap.nbytes} of a buffer"
