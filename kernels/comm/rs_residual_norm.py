"""rs_residual_norm: h = reduce_scatter(partial, dim 0) + residual;  y = norm(h).  RMSNorm, or LayerNorm when a bias is given

Shapes    partial [S, ..., D]    residual, h, y [S/t, ..., D]    weight, bias [D]
Backward  g = d(norm)/dh * dy + dh;  dresidual = g;  dpartial = all_gather(g);  dweight, dbias are sums over this rank's rows
Bytes     one reduce-scatter of S * D * itemsize, then 4 S/t D * itemsize in the norm     FLOPs  about 5 S/t D: bandwidth-bound
Numerics  sum in rank order, residual added, both in fp32, h rounded once to the type; then as rms_norm and layer_norm
Source    the residual stream of sequence parallelism, arXiv:2205.05198

Over the heap of a CPU group a row is summed, joined by the residual and normalised in one visit (csrc/cpu/rs_residual_norm.cpp):
the sum is never in memory by itself, 2 S/t D of traffic less. Else a reduce-scatter, rounded, then add_rms_norm or add_layer_norm.
"""
import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ..autocast import widened
from ..dispatch import CPP, INTERPRET, fused
from ..layer_norm import add_layer_norm, add_layer_norm_ref
from ..rms_norm import add_rms_norm, add_rms_norm_ref
from . import overlap
from .agree import agree, check_device
from .collectives import _gather, _heap, _reduce_scatter, reduce_scatter
from .gemm import FLOATS
from .heap import CODES, LIB, OPS, SymmHeap
from .registry import Group, group_size, register

_OPS = torch.ops.interlace
_WORLD = 64                                                           # the most ranks that csrc/cpu/rs_residual_norm.cpp takes

# ---- reference ------------------------------------------------------------------------------------------------


def rs_residual_norm_ref(partial: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, group: Group = None, *,
                         bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = reduce_scatter(partial, group)
    return add_rms_norm_ref(x, residual, weight, eps) if bias is None else add_layer_norm_ref(x, residual, weight, bias, eps)


# ---- op -------------------------------------------------------------------------------------------------------

if CPP and LIB is not None:
    _p, _i, _n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    _in_one_visit = ctypes.CDLL(str(Path(__file__).parents[1] / "_cpu.so")).interlace_rs_residual_norm
    _in_one_visit.restype, _in_one_visit.argtypes = _i, (_p, _p, _i, *[_p] * 8, _n, _n, ctypes.c_double, _i, _i)
    _scatter_rows = ctypes.cast(LIB.interlace_scatter_rows, _p).value


def _stat(x: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _fits(heap: SymmHeap | None, partial: Tensor) -> bool:
    """Whether rows go through the heap whole."""
    row = partial.shape[-1] * partial.itemsize
    return CPP and heap is not None and CODES.get(partial.dtype, 9) < 4 and 0 < row * heap.size <= heap.nbytes and heap.size <= _WORLD


def _over_heap(heap: SymmHeap, partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
               eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    partial, D = partial.contiguous(), partial.shape[-1]
    rows = residual.numel() // D
    h, y, rstd = torch.empty_like(residual), torch.empty_like(residual), _stat(residual, rows)
    mean = _stat(residual, 0 if bias is None else rows)
    if rc := _in_one_visit(_scatter_rows, heap.handle, OPS.index("rs_residual_norm"), partial.data_ptr(), residual.data_ptr(),
                           weight.data_ptr(), None if bias is None else bias.data_ptr(), h.data_ptr(), y.data_ptr(), mean.data_ptr(),
                           rstd.data_ptr(), rows, D, eps, CODES[partial.dtype], heap.size):
        heap.fail(rc)
    return h, y, mean, rstd


def _run(partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
         group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, y, and the statistics of the norm: mean (none in RMSNorm) and rstd."""
    residual, weight, bias = residual.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    if (done := overlap.scattered_norm(partial, residual, weight, bias, eps, group)) is not None:
        return done
    heap, rows, D = _heap(partial, group), partial.shape[:-1].numel(), partial.shape[-1]
    if _fits(heap, partial):
        return _over_heap(heap, partial, residual, weight, bias, eps)  # type: ignore[arg-type]
    if heap is not None and not INTERPRET:
        heap.serve("rs_residual_norm", rows, D, 0)
    elif heap is None and group_size(group) > 1:
        agree("rs_residual_norm", group, rows=rows, cols=D, dtype=partial.dtype)
    x = _reduce_scatter(partial, group)
    if bias is None:
        h, y, rstd = _OPS.add_rms_norm_fwd(x, residual, weight, eps)
        return h, y, rstd.new_empty(0), rstd
    return _OPS.add_layer_norm_fwd(x, residual, weight, bias, eps)


def _fake(partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
          world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = residual.shape[:-1].numel()
    return (partial.new_empty(residual.shape), partial.new_empty(residual.shape), _stat(residual, 0 if bias is None else rows),
            _stat(residual, rows))


# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    _, _, weight, bias, _, ctx.group = inputs
    h, _, mean, rstd = output
    ctx.bias = bias is not None
    ctx.save_for_backward(h, weight, mean, rstd)


def _backward(ctx, dh, dy, *_):
    h, w, mean, rstd = ctx.saved_tensors
    dh, dy, w, db = dh.contiguous(), dy.contiguous(), w.contiguous(), None
    if ctx.bias:
        g, dw, db = _OPS.layer_norm_bwd(dy, h, w, mean, rstd, dh, True)
    else:
        g, dw = _OPS.rms_norm_bwd(dy, h, w, rstd, dh)
    return _gather(g, ctx.group), g, dw, db, None, None


_rs_residual_norm = register(
    "rs_residual_norm(Tensor partial, Tensor residual, Tensor weight, Tensor? bias, float eps, str group) "
    "-> (Tensor, Tensor, Tensor, Tensor)", _run, _fake, _setup, _backward, keep=2)

# ---- public ---------------------------------------------------------------------------------------------------


def rs_residual_norm(partial: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, group: Group = None, *,
                     bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum the ranks' partial products, keep this rank's rows, add the residual, normalise.

    Args: partial [S, ..., D], residual [S/t, ..., D] of one dtype, weight [D]; bias [D] makes it a LayerNorm; `group` a
    process group, a SymmHeap, or None (one rank). Returns: (h, y), both [S/t, ..., D]. Raises: ValueError on shapes, dtypes."""
    t = group_size(group)
    if partial.dim() < 2 or partial.dtype not in FLOATS:
        raise ValueError("rs_residual_norm: partial must be [S, ..., D] of float32, float64, bfloat16 or float16, "
                         f"got {list(partial.shape)} of {partial.dtype}")
    if partial.shape[1:] != residual.shape[1:] or partial.shape[0] != t * residual.shape[0]:
        raise ValueError(f"rs_residual_norm: partial must have {t} times (the group's size) the rows of residual, "
                         f"got {list(partial.shape)} and {list(residual.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != partial.shape[-1:]:
            raise ValueError(f"rs_residual_norm: {name} must be {[*partial.shape[-1:]]}, the last dimension of partial, "
                             f"got {list(p.shape)}")
    if widened(partial, residual, weight, bias) is not None:          # what travels stays in 16 bits
        x = reduce_scatter(partial, group)
        return add_rms_norm(x, residual, weight, eps) if bias is None else add_layer_norm(x, residual, weight, bias, eps)
    if any(p is not None and (p.dtype != partial.dtype or p.device != partial.device) for p in (residual, weight, bias)):
        raise ValueError(f"rs_residual_norm: partial, residual, weight and bias must have one dtype and device, got {partial.dtype}, "
                         f"{residual.dtype}, {weight.dtype} and {bias.dtype if bias is not None else 'no bias'}; cast them")
    if partial.is_meta:
        check_device("rs_residual_norm", partial, group)
    if not fused(partial, residual, weight):
        return rs_residual_norm_ref(partial, residual, weight, eps, group, bias=bias)
    return _rs_residual_norm(partial, residual, weight, bias, eps, group)
