"""gemm: the matrix product every communication op is built on, where torch's own is slow on this CPU.

    gemm(a, b, out=None) = a @ b        a [M, K], b [K, N] (any strides) -> [M, N]
    b = ready(b)                        the same b for many products: whatever is done to it, once

    fp32        ours on AMD from 32 rows on: 100 GFLOP/s where torch's (MKL) has 85 (Zen 4, one thread, M 2048, K = N = 1024), 92 for 79
                at M 64 with b ready; torch's on other CPUs. From K = 8192 on in pieces of 2048: their packed b stays in cache (84 -> 92)
    bf16, fp16  torch's where the CPU has instructions for them. Without, it runs at 1 to 17 GFLOP/s: there the sums are made in fp32, by
                our kernel, which widens as it packs, or where that is not built by torch's, in blocks whose fp32 copies stay in cache

Numerics  fp32 accumulation, one rounding; ours cuts every sum at 128 terms, and a row's result does not depend on the other rows
Source    register tiles over packed panels: Goto and van de Geijn, doi:10.1145/1356052.1356053; csrc/cpu/gemm.h
"""
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..autocast import lowered
from ..dispatch import TILES, define, multiplies, traced, transformed

__all__ = ["FLOATS", "check_gemm", "flat", "gemm", "pays", "ready", "slow", "torch_keeps"]

_FAST = {torch.bfloat16: multiplies("bf16"), torch.float16: multiplies("fp16")}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 1 << 20                                                       # bytes of the fp32 copies of a block of rows
DEEP, PIECE = 8192, 2048                                              # an inner dimension that is cut, and into what
SIDE, WORK = 512, 1 << 27                                             # a layer's least features and rows * features * features, fp32
_kept = threading.local()                                             # autograd's threads have their own


def _amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_AMD = _amd()

define("gemm(Tensor a, Tensor b, Tensor(a!) out) -> ()", lambda a, b, out: out.copy_(torch.mm(a, b)) and None, lambda a, b, out: None)
define("gemm_pack(Tensor b, Tensor(a!) packed) -> ()", lambda b, packed: packed[:b.numel()].copy_(b.flatten()) and None,
       lambda b, packed: None)
define("gemm_packed(Tensor a, Tensor packed, Tensor(a!) out) -> ()",
       lambda a, packed, out: out.copy_(torch.mm(a, packed[:a.shape[1] * out.shape[1]].view(-1, out.shape[1]).to(a.dtype))) and None,
       lambda a, packed, out: None)


class Ready(NamedTuple):
    """A b for many products: packed, or as torch multiplies it fastest."""
    b: Tensor
    packed: Tensor | None


_PLAIN = (Tensor, torch.nn.Parameter)


def _ours(a: Tensor, b: Tensor) -> bool:
    """True where our kernel multiplies. A tracer, and a graph, see torch's product."""
    if not TILES or dispatch._REFERENCE_ONLY or not (slow(a) or (_AMD and a.dtype == torch.float32 and a.is_cpu and a.shape[0] >= 32)):
        return False
    return (a.dtype == b.dtype and type(a) in _PLAIN and type(b) in _PLAIN and a.numel() > 0 < b.numel()
            and not torch.compiler.is_compiling() and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)))


def torch_keeps(w: Tensor) -> str:
    """Why torch's product is no slower in a layer of weight w (two features' dimensions), whatever its input; "" where `pays` decides."""
    if w.device.type not in ("cpu", "meta") or (w.is_meta and torch.cuda.is_available()):
        return f"on {w.device.type} tensors torch's own is as fast"
    if w.dtype not in (torch.float32, *_FAST):
        return f"{w.dtype} has no product of ours"
    if not TILES:
        return "the C++ product is not there"
    if w.dtype != torch.float32:
        return f"this CPU has instructions for {w.dtype}" if _FAST[w.dtype] else ""
    return "in fp32 torch's own is as fast on this CPU" if not _AMD else f"fewer than {SIDE} features" if min(w.shape) < SIDE else ""


def pays(x: Tensor, w: Tensor) -> bool:
    """Whether x [..., K] times w (N by K, or K by N) and the two gradients are faster through `gemm`: its autograd node costs 70 us of
    Python, and packing w costs as much as 30 rows. Measured on Zen 4: at M = K = N = 512 1.03x of torch, 0.98x at M = 256, 1.07x at
    M = 128 and K = N = 1024; fp16 0.9x at K = N = 64 and 16 rows, 1.5x at 32."""
    rows = x.numel() // max(1, x.shape[-1])
    work = rows * w.numel()
    if rows < 16 or work < (1 << 17) or x.dtype != w.dtype or not x.is_cpu or torch_keeps(w):
        return False
    if x.dtype == torch.float32 and (rows < 32 or work < WORK):
        return False
    return (type(x) in _PLAIN and type(w) in _PLAIN and not dispatch._REFERENCE_ONLY and not traced()
            and not torch.is_autocast_enabled("cpu") and not transformed())


def slow(x: Tensor) -> bool:
    """True where a product in x's type goes through fp32."""
    return x.device.type == "cpu" and not _FAST.get(x.dtype, True)


def ready(b: Tensor) -> Ready:
    """b as `gemm` takes it, for a b that many blocks are multiplied with."""
    if not _ours(b, b):
        return Ready(b.float() if slow(b) else b, None)
    packed = torch.empty(b.shape[0] * -(-b.shape[1] // 64) * 64)
    torch.ops.interlace.gemm_pack(b, packed)
    return Ready(b, packed)


def _workspace(n: int) -> Tensor:
    if getattr(_kept, "room", None) is None or _kept.room.numel() < n:
        _kept.room = torch.empty(n, dtype=torch.float32)
    return _kept.room


def gemm(a: Tensor, b: Tensor | Ready, out: Tensor | None = None) -> Tensor:
    b, packed = b if isinstance(b, Ready) else (b, None)
    if _ours(a, b) and (out is None or out.stride(1) == 1):
        y = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
        if packed is not None:
            torch.ops.interlace.gemm_packed(a, packed, y)
        elif a.shape[1] >= DEEP and a.dtype == torch.float32:
            part = torch.empty_like(y)
            for k in range(0, a.shape[1], PIECE):
                torch.ops.interlace.gemm(a[:, k:k + PIECE], b[k:k + PIECE], part if k else y)
                if k:
                    y += part
        else:
            torch.ops.interlace.gemm(a, b, y)
        return y
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


def check_gemm(op: str, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] and w [N, K] as they are multiplied: of one floating dtype, autocast's within a region, and device. Raises: ValueError."""
    x, w = lowered(x), lowered(w)
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"{op}: w must be [N, {x.shape[-1] if x.dim() else '?'}], N by the last dimension of x, "
                         f"got {list(w.shape)}; w is stored as in nn.Linear")
    if x.dtype != w.dtype or x.device != w.device:
        raise ValueError(f"{op}: x and w must have one dtype and device, got {x.dtype} on {x.device} and {w.dtype} on "
                         f"{w.device}; cast or move one of them")
    if x.dtype not in FLOATS:                                         # integers would wrap in silence
        raise ValueError(f"{op}: x and w must be float32, float64, bfloat16 or float16, got {x.dtype}; cast them")
    return x, w
