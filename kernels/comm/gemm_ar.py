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

from .collectives import all_reduce
from .gemm import check_gemm, gemm
from .heap import heap_of
from .registry import Group, register

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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gemm_ar_run(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return reduced_product(_flat(x), w.t(), group).view(*x.shape[:-1], w.shape[0])


def _copy_gemm_run(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return gemm(_flat(x), w.t()).view(*x.shape[:-1], w.shape[0])


# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    x, w, ctx.group = inputs
    ctx.save_for_backward(x, w)


def _gemm_ar_backward(ctx, dy):
    x, w = ctx.saved_tensors
    dx = gemm(_flat(dy), w).view(x.shape) if ctx.needs_input_grad[0] else None
    return dx, gemm(_flat(dy).t(), _flat(x)) if ctx.needs_input_grad[1] else None, None


def _copy_gemm_backward(ctx, dy):
    x, w = ctx.saved_tensors
    dx = _gemm_ar(dy, w.t(), ctx.group) if ctx.needs_input_grad[0] else None
    return dx, gemm(_flat(dy).t(), _flat(x)) if ctx.needs_input_grad[1] else None, None


def _fake(x: Tensor, w: Tensor, world: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


_gemm_ar = register("gemm_ar(Tensor x, Tensor w, str group) -> Tensor", _gemm_ar_run, _fake, _setup, _gemm_ar_backward)
_copy_gemm = register("copy_gemm(Tensor x, Tensor w, str group) -> Tensor", _copy_gemm_run, _fake, _setup, _copy_gemm_backward)

# ---- public ---------------------------------------------------------------------------------------------------


def gemm_ar(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """all_reduce(x @ w.T) over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [..., K/t], w [N, K/t] of one dtype. Returns: y [..., N]. Raises: ValueError on shapes or dtypes."""
    check_gemm("gemm_ar", x, w)
    return _gemm_ar(x, w, group)


def copy_gemm(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """x @ w.T for an x that every rank holds; the backward sums dx over `group`.

    Args: x [..., K], w [N/t, K] of one dtype. Returns: y [..., N/t]. Raises: ValueError on shapes or dtypes."""
    check_gemm("copy_gemm", x, w)
    return _copy_gemm(x, w, group)
