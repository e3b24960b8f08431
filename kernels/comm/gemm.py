"""gemm: the matrix product every communication op is built on, where the type is one this CPU is slow in.

    gemm(a, b, out=None) = a @ b        a [M, K], b [K, N] (any strides) -> [M, N]

A CPU without bf16 instructions runs torch's own bf16 product at 1 to 17 GFLOP/s against 70 to 90 in fp32, and fp16 no
faster: there the operands go through fp32, which also keeps the partial sums in fp32. b is widened once, a and the product in
blocks of rows whose fp32 copies stay in cache, in memory that is kept from call to call.
"""
import threading

import torch
from torch import Tensor

from ..dispatch import cpu_flags

__all__ = ["check_gemm", "flat", "gemm", "slow", "wide"]

_FAST = {torch.bfloat16: bool(cpu_flags() & {"avx512_bf16", "amx_bf16"}), torch.float16: bool(cpu_flags() & {"avx512_fp16", "amx_fp16"})}
BLOCK = 1 << 20                                                       # bytes of the fp32 copies of a block of rows
_kept = threading.local()                                             # autograd's threads have their own


def slow(x: Tensor) -> bool:
    """True where a product in x's type goes through fp32."""
    return x.device.type == "cpu" and not _FAST.get(x.dtype, True)


def wide(b: Tensor) -> Tensor:
    """b as `gemm` takes it: in fp32 where it would be widened at every call. For a b that many blocks are multiplied with."""
    return b.float() if slow(b) else b


def _workspace(n: int) -> Tensor:
    if getattr(_kept, "room", None) is None or _kept.room.numel() < n:
        _kept.room = torch.empty(n, dtype=torch.float32)
    return _kept.room


def gemm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if not slow(a):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    (M, K), N = a.shape, b.shape[1]
    y = a.new_empty(M, N) if out is None else out
    if torch.compiler.is_compiling() or type(a) is not Tensor:       # a tracer sees the product, not the blocks
        return y.copy_(torch.mm(a.float(), b.float()))
    b, step = b.float(), max(64, BLOCK // (4 * max(1, K + N)))
    room = _workspace(min(M, step) * (K + N))
    for i in range(0, M, step):
        n = min(step, M - i)
        rows, part = room[:n * K].view(n, K), room[n * K:n * (K + N)].view(n, N)
        y[i:i + n].copy_(torch.mm(rows.copy_(a[i:i + n]), b, out=part))
    return y


def flat(x: Tensor) -> Tensor:
    """[..., K] -> [M, K]"""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def check_gemm(op: str, x: Tensor, w: Tensor) -> None:
    """x [..., K] and w [N, K], one dtype and device. Raises: ValueError."""
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"{op}: w must be [N, {x.shape[-1] if x.dim() else '?'}], N by the last dimension of x, "
                         f"got {list(w.shape)}; w is stored as in nn.Linear")
    if x.dtype != w.dtype or x.device != w.device:
        raise ValueError(f"{op}: x and w must have one dtype and device, got {x.dtype} on {x.device} and {w.dtype} on "
                         f"{w.device}; cast or move one of them")
