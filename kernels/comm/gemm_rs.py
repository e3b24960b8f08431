"""gemm_rs: y = reduce_scatter(x @ w.T, dim 0)        ag_gemm: its dual, y = all_gather(x, dim 0) @ w.T

Shapes    gemm_rs: x [S, ..., K/t], w [N, K/t] -> y [S/t, ..., N]      ag_gemm: x [S/t, ..., K], w [N/t, K] -> y [S, ..., N/t]
Backward  gemm_rs: dyg = all_gather(dy); dx = dyg @ w, dw = dyg.T @ x
          ag_gemm: dx = gemm_rs(dy, w.T), dw = dy.T @ all_gather(x): x is gathered again rather than kept, t times smaller
Bytes     one reduce-scatter of M * N, or one all-gather of M * K, times itemsize (collectives.py)   FLOPs  2 M N K / t a pass
Numerics  the product in the type's own GEMM, then a sum in rank order with fp32 accumulation
Source    sequence parallelism, arXiv:2205.05198
"""
import torch
from torch import Tensor

from .collectives import Group, all_gather, group_size, reduce_scatter
from .gemm import check_gemm, gemm
from .heap import heap_of

# ---- reference ------------------------------------------------------------------------------------------------


def gemm_rs_ref(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return reduce_scatter(x @ w.t(), group)


def ag_gemm_ref(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return all_gather(x, group) @ w.t()


# ---- op -------------------------------------------------------------------------------------------------------


def scattered_product(a: Tensor, b: Tensor, group: Group) -> Tensor:
    """reduce_scatter(a @ b, dim 0) for 2-d a and b, staged in the heap where the product fits a slot."""
    if group is None:
        return gemm(a, b)
    heap = heap_of(group) if a.device.type == "cpu" else None
    if heap is None:
        return reduce_scatter(gemm(a, b), group)
    block = heap.stage((a.shape[0], b.shape[1]), a.dtype)
    return reduce_scatter(gemm(a, b, out=block), heap)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# ---- autograd -------------------------------------------------------------------------------------------------


class _GemmRS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, group):
        ctx.save_for_backward(x, w)
        ctx.group = group
        t = group_size(group)
        return scattered_product(_flat(x), w.t(), group).view(x.shape[0] // t, *x.shape[1:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dyg = all_gather(_flat(dy), ctx.group)
        return gemm(dyg, w).view_as(x), gemm(dyg.t(), _flat(x)), None


class _AgGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, group):
        ctx.save_for_backward(x, w)
        ctx.group = group
        t = group_size(group)
        return gemm(all_gather(_flat(x), group), w.t()).view(x.shape[0] * t, *x.shape[1:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = scattered_product(_flat(dy), w, ctx.group).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, gemm(_flat(dy).t(), all_gather(_flat(x), ctx.group)), None


# ---- public ---------------------------------------------------------------------------------------------------


def gemm_rs(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """reduce_scatter(x @ w.T) along dim 0 over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [S, ..., K/t], w [N, K/t] of one dtype, S divisible by the group's size. Returns: y [S/t, ..., N].
    Raises: ValueError on shapes or dtypes."""
    check_gemm("gemm_rs", x, w)
    if x.dim() < 2 or x.shape[0] % group_size(group):
        raise ValueError(f"gemm_rs: dim 0 of x must be divisible by the {group_size(group)} ranks of the group, "
                         f"got {list(x.shape)}; pad it")
    return _GemmRS.apply(x, w, group)


def ag_gemm(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """all_gather(x) along dim 0, times w.T, over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [S/t, ..., K], w [N/t, K] of one dtype. Returns: y [S, ..., N/t]. Raises: ValueError on shapes or dtypes."""
    check_gemm("ag_gemm", x, w)
    if x.dim() < 2:
        raise ValueError(f"ag_gemm: x must have a dim 0 to gather and a last dim, got {list(x.shape)}")
    return _AgGemm.apply(x, w, group)
