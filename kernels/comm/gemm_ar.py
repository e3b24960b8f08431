"""gemm_ar: y = all_reduce(x @ w.T)        copy_gemm: its dual, y = x @ w.T with dx = all_reduce(dy @ w)

Shapes    gemm_ar: x [..., K/t], w [N, K/t] -> y [..., N], equal on all ranks
          copy_gemm: x [..., K] equal on all ranks, w [N/t, K] -> y [..., N/t]
Backward  gemm_ar: dx = dy @ w, dw = dy.T @ x, no communication     copy_gemm: dx = gemm_ar(dy, w.T), dw = dy.T @ x
Bytes     one all-reduce of M * N * itemsize (collectives.py)       FLOPs  2 M N K / t a pass
Numerics  the product in the type's own GEMM, then a sum in rank order with fp32 accumulation: bitwise equal on all ranks
Source    f and g of Megatron-LM, arXiv:1909.08053

On a CPU the product is written straight into this rank's slot of the heap, block by block, and reduced from there while
still in cache: no copy-in. There is no overlap on a CPU; the gain is the faster collective and the saved pass.
"""
import torch
from torch import Tensor

from .collectives import Group, all_reduce
from .gemm import check_gemm, gemm
from .heap import heap_of

# ---- reference ------------------------------------------------------------------------------------------------


def gemm_ar_ref(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return all_reduce(x @ w.t(), group)


# ---- op -------------------------------------------------------------------------------------------------------


def reduced_product(a: Tensor, b: Tensor, group: Group) -> Tensor:
    """all_reduce(a @ b) for 2-d a and b, staged in the heap where there is one."""
    if group is None:
        return gemm(a, b)
    heap = heap_of(group) if a.device.type == "cpu" else None
    if heap is None:
        return all_reduce(gemm(a, b), group)
    (M, _), (_, N) = a.shape, b.shape
    y = a.new_empty(M, N)
    step = heap.nbytes // max(1, N * a.element_size())              # rows that fit a slot
    if step == 0 or M == 0:
        return all_reduce(gemm(a, b), heap, out=y)
    for i in range(0, M, step):
        rows = a[i:i + step]
        block = heap.stage((rows.shape[0], N), a.dtype)
        all_reduce(gemm(rows, b, out=block), heap, out=y[i:i + step])
    return y


# ---- autograd -------------------------------------------------------------------------------------------------


class _GemmAR(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, group):
        ctx.save_for_backward(x, w)
        return reduced_product(x.reshape(-1, x.shape[-1]), w.t(), group).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        return gemm(dy2, w).view_as(x), gemm(dy2.t(), x.reshape(-1, x.shape[-1])), None


class _CopyGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, group):
        ctx.save_for_backward(x, w)
        ctx.group = group
        return gemm(x.reshape(-1, x.shape[-1]), w.t()).view(*x.shape[:-1], w.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dy2 = dy.reshape(-1, dy.shape[-1])
        dx = reduced_product(dy2, w, ctx.group).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, gemm(dy2.t(), x.reshape(-1, x.shape[-1])), None


# ---- public ---------------------------------------------------------------------------------------------------


def gemm_ar(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """all_reduce(x @ w.T) over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [..., K/t], w [N, K/t] of one dtype. Returns: y [..., N]. Raises: ValueError on shapes or dtypes."""
    check_gemm("gemm_ar", x, w)
    return _GemmAR.apply(x, w, group)


def copy_gemm(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """x @ w.T for an x that every rank holds; the backward sums dx over `group`.

    Args: x [..., K], w [N/t, K] of one dtype. Returns: y [..., N/t]. Raises: ValueError on shapes or dtypes."""
    check_gemm("copy_gemm", x, w)
    return _CopyGemm.apply(x, w, group)
