"""rs_residual_norm: h = reduce_scatter(partial, dim 0) + residual;  y = norm(h).  RMSNorm, or LayerNorm when a bias is given

Shapes    partial [S, ..., D]    residual, h, y [S/t, ..., D]    weight, bias [D]
Backward  g = d(norm)/dh * dy + dh;  dresidual = g;  dpartial = all_gather(g);  dweight, dbias are sums over this rank's rows
Bytes     one reduce-scatter of S * D * itemsize, then 4 S/t D * itemsize in the norm     FLOPs  about 5 S/t D: bandwidth-bound
Numerics  sum in rank order with fp32 accumulation, rounded once to the type; then as rms_norm and layer_norm
Source    the residual stream of sequence parallelism, arXiv:2205.05198
"""
import torch
from torch import Tensor

from ..dispatch import fused
from ..layer_norm import add_layer_norm_ref
from ..rms_norm import add_rms_norm_ref
from . import overlap
from .collectives import _gather, _reduce_scatter, reduce_scatter
from .registry import Group, group_size, register

_OPS = torch.ops.interlace

# ---- reference ------------------------------------------------------------------------------------------------


def rs_residual_norm_ref(partial: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, group: Group = None, *,
                         bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = reduce_scatter(partial, group)
    return add_rms_norm_ref(x, residual, weight, eps) if bias is None else add_layer_norm_ref(x, residual, weight, bias, eps)


# ---- op -------------------------------------------------------------------------------------------------------


def _run(partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
         group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, y, and the statistics of the norm: mean (none in RMSNorm) and rstd."""
    residual, weight, bias = residual.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    if (done := overlap.scattered_norm(partial, residual, weight, bias, eps, group)) is not None:
        return done
    x = _reduce_scatter(partial, group)
    if bias is None:
        h, y, rstd = _OPS.add_rms_norm_fwd(x, residual, weight, eps)
        return h, y, rstd.new_empty(0), rstd
    return _OPS.add_layer_norm_fwd(x, residual, weight, bias, eps)


def _fake(partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
          world: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if partial.dtype == torch.float64 else torch.float32
    rows = residual.shape[:-1].numel()
    mean, rstd = (partial.new_empty(n, dtype=dtype) for n in (0 if bias is None else rows, rows))
    return partial.new_empty(residual.shape), partial.new_empty(residual.shape), mean, rstd


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
    if partial.shape[1:] != residual.shape[1:] or partial.shape[0] != t * residual.shape[0]:
        raise ValueError(f"rs_residual_norm: partial must have {t} times (the group's size) the rows of residual, "
                         f"got {list(partial.shape)} and {list(residual.shape)}")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != partial.shape[-1:]:
            raise ValueError(f"rs_residual_norm: {name} must be {[*partial.shape[-1:]]}, the last dimension of partial, "
                             f"got {list(p.shape)}")
    if any(p is not None and (p.dtype != partial.dtype or p.device != partial.device) for p in (residual, weight, bias)):
        raise ValueError(f"rs_residual_norm: partial, residual, weight and bias must have one dtype and device, got {partial.dtype}, "
                         f"{residual.dtype}, {weight.dtype} and {bias.dtype if bias is not None else 'no bias'}; cast them")
    if not fused(partial, residual, weight):
        return rs_residual_norm_ref(partial, residual, weight, eps, group, bias=bias)
    return _rs_residual_norm(partial, residual, weight, bias, eps, group)
