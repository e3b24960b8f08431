"""gemm: the matrix product every communication op is built on, where the type is one this CPU is slow in.

    gemm(a, b, out=None) = a @ b        a [M, K], b [K, N] (any strides) -> [M, N]

A CPU without bf16 instructions runs torch's own bf16 product at 1 to 17 GFLOP/s against 70 to 90 in fp32, and fp16 no
faster: there the operands go through fp32, which also keeps the partial sums in fp32.
"""
import torch
from torch import Tensor

from ..dispatch import cpu_flags

_FAST = {torch.bfloat16: bool(cpu_flags() & {"avx512_bf16", "amx_bf16"}), torch.float16: bool(cpu_flags() & {"avx512_fp16", "amx_fp16"})}


def gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if a.device.type == "cpu" and not _FAST.get(a.dtype, True):
        y = torch.mm(a.float(), b.float())
        return y.to(a.dtype) if out is None else out.copy_(y)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def check_gemm(op: str, x: Tensor, w: Tensor) -> None:
    """x [..., K] and w [N, K], one dtype and device. Raises: ValueError."""
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"{op}: w must be [N, {x.shape[-1] if x.dim() else '?'}], N by the last dimension of x, "
                         f"got {list(w.shape)}; w is stored as in nn.Linear")
    if x.dtype != w.dtype or x.device != w.device:
        raise ValueError(f"{op}: x and w must have one dtype and device, got {x.dtype} on {x.device} and {w.dtype} on "
                         f"{w.device}; cast or move one of them")
