"""rs_residual_norm: h = reduce_scatter(partial, dim 0) + residual;  y = norm(h).  RMSNorm, or LayerNorm when a bias is given

Shapes    partial [S, ..., D]    residual, h, y [S/t, ..., D]    weight, bias [D]
Backward  g = d(norm)/dh * dy + dh;  dresidual = g;  dpartial = all_gather(g);  dweight, dbias are sums over this rank's rows
Bytes     one reduce-scatter of S * D * itemsize, then 4 S/t D * itemsize in the norm     FLOPs  about 5 S/t D: bandwidth-bound
Numerics  sum in rank order with fp32 accumulation, rounded once to the type; then as rms_norm and layer_norm
Source    the residual stream of sequence parallelism, arXiv:2205.05198
"""
import torch
from torch import Tensor

from ..layer_norm import add_layer_norm, add_layer_norm_ref
from ..rms_norm import add_rms_norm, add_rms_norm_ref
from .collectives import Group, all_gather, group_size, reduce_scatter

# ---- reference ------------------------------------------------------------------------------------------------


def rs_residual_norm_ref(partial: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, group: Group = None, *,
                         bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = _ReduceScatter.apply(partial, group)
    return add_rms_norm_ref(x, residual, weight, eps) if bias is None else add_layer_norm_ref(x, residual, weight, bias, eps)


# ---- autograd -------------------------------------------------------------------------------------------------


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial, group):
        ctx.group = group
        return reduce_scatter(partial, group)

    @staticmethod
    def backward(ctx, dx):
        return all_gather(dx, ctx.group), None


# ---- public ---------------------------------------------------------------------------------------------------


def rs_residual_norm(partial: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, group: Group = None, *,
                     bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum the ranks' partial products, keep this rank's rows, add the residual, normalise.

    Args: partial [S, ..., D], residual [S/t, ..., D] of one dtype, weight [D]; bias [D] makes it a LayerNorm; `group` a
    process group, a SymmHeap, or None (one rank). Returns: (h, y), both [S/t, ..., D]. Raises: ValueError on shapes."""
    t = group_size(group)
    if partial.shape[1:] != residual.shape[1:] or partial.shape[0] != t * residual.shape[0]:
        raise ValueError(f"rs_residual_norm: partial must have {t} times (the group's size) the rows of residual, "
                         f"got {list(partial.shape)} and {list(residual.shape)}")
    x = _ReduceScatter.apply(partial, group)
    return add_rms_norm(x, residual, weight, eps) if bias is None else add_layer_norm(x, residual, weight, bias, eps)
