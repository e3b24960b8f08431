"""gemm_ar: y = all_reduce(x @ w.T)        copy_gemm: its dual, y = x @ w.T with dx = all_reduce(dy @ w)

Shapes    gemm_ar: x [..., K/t], w [N, K/t] -> y [..., N], equal on all ranks
          copy_gemm: x [..., K] equal on all ranks, w [N/t, K] -> y [..., N/t]
Backward  gemm_ar: dx = dy @ w, dw = dy.T @ x, no communication     copy_gemm: dx = gemm_ar(dy, w.T), dw = dy.T @ x
          copy_gemm over torch.distributed: dw is computed while dx is summed in the background. A kernel of ours has every SM
          to itself, and on a CPU's heap one core does both: there dw follows
Bytes     one all-reduce of M * N * itemsize (collectives.py)       FLOPs  2 M N K / t a pass
Numerics  the product in the type's own GEMM, then a sum in rank order with fp32 accumulation: bitwise equal on all ranks
Source    f and g of Megatron-LM, arXiv:1909.08053

On a CPU the product is written straight into this rank's slot of the heap, block by block, and reduced from there while
still in cache: no copy-in. There is no overlap on a CPU, in the backward neither: the gain is the faster collective and the
saved pass. Which path, and what it costs: choose.py.
"""
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import once, traced
from . import overlap
from .agree import agree, choose_path
from .choose import KERNELS
from .collectives import all_reduce, beside
from .gemm import check_gemm, flat, gemm, ready
from .registry import Group, group_of, group_size, register
from .walk import summed_product

# ---- reference ------------------------------------------------------------------------------------------------


def gemm_ar_ref(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return all_reduce(x @ w.t(), group)


# ---- op -------------------------------------------------------------------------------------------------------


def reduced_product(a: Tensor, b: Tensor, group: Group, meanwhile: Callable[[], object] | None = None) -> Tensor:
    """all_reduce(a @ b) for 2-d a and b, by the path that `choose` names. meanwhile: called where the sum is made in the background."""
    path, heap = choose_path("gemm_ar", a.shape[0], b.shape[1], a.shape[1], a, group)
    if path.name == "one rank":
        return gemm(a, b)
    if path.name in KERNELS:
        return overlap.summed("gemm_ar", a, b.t(), path, group)
    (M, K), N = a.shape, b.shape[1]
    if path.name == "heap, walked":
        return summed_product("gemm_ar", a, b, heap, 0, M)
    if path.name == "torch.distributed":
        agree("gemm_ar", group, rows=M, cols=N, inner=K, dtype=a.dtype)
        return beside("all_reduce", gemm(a, b), group, meanwhile)
    if path.name != "heap, staged":
        y = gemm(a, b)
        heap.serve("gemm_ar", M, N, K)
        return all_reduce(y, heap, out=y)
    step = heap.nbytes // max(1, N * a.element_size())               # rows that fit a slot
    y, packed = a.new_empty(M, N), ready(b) if step < M else b       # packed costs as much as 30 rows: of one product of 64, a third
    for i in range(0, max(M, 1), step):
        rows = a[i:i + step]
        block = gemm(rows, packed, out=heap.stage((rows.shape[0], N), a.dtype))
        heap.serve("gemm_ar", M, N, K)
        all_reduce(block, heap, out=y[i:i + step])
    return y


def _gemm_ar_run(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return reduced_product(flat(x), w.t(), group).view(*x.shape[:-1], w.shape[0])


def _copy_gemm_run(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return gemm(flat(x), w.t()).view(*x.shape[:-1], w.shape[0])


# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    x, w, ctx.group = inputs
    ctx.save_for_backward(x, w)


def _dw(dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """dy.T @ x, laid out as w is: a weight that is stored [K, N] gets its gradient without a transposition."""
    return gemm(flat(x).t(), flat(dy)).t() if w.stride(0) == 1 < w.stride(1) else gemm(flat(dy).t(), flat(x))


def _gemm_ar_backward(ctx, dy):
    x, w = ctx.saved_tensors
    dx = gemm(flat(dy), w).view(x.shape) if ctx.needs_input_grad[0] else None
    return dx, _dw(dy, x, w) if ctx.needs_input_grad[1] else None, None


def _copy_gemm_backward(ctx, dy):
    x, w = ctx.saved_tensors
    dw = functools.cache(lambda: _dw(dy, x, w) if ctx.needs_input_grad[1] else None)
    if not ctx.needs_input_grad[0]:
        return None, dw(), None
    if traced() or torch.is_grad_enabled():                           # to be recorded: as ops
        return _gemm_ar(dy, w.t(), ctx.group), dw(), None
    return reduced_product(flat(dy), w, group_of(ctx.group), dw).view(x.shape), dw(), None


def _copy_gemm_twice(ctx, dy):
    """On one rank the backward is made of products that have gradients; over ranks those would lack an all-reduce."""
    return (_copy_gemm_backward if group_size(ctx.group) == 1 else once("copy_gemm")(_copy_gemm_backward))(ctx, dy)


def _fake(x: Tensor, w: Tensor, world: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


_gemm_ar = register("gemm_ar(Tensor x, Tensor w, str group) -> Tensor", _gemm_ar_run, _fake, _setup, _gemm_ar_backward)
_copy_gemm = register("copy_gemm(Tensor x, Tensor w, str group) -> Tensor", _copy_gemm_run, _fake, _setup, _copy_gemm_twice,
                      linear=True)

# ---- public ---------------------------------------------------------------------------------------------------


def gemm_ar(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """all_reduce(x @ w.T) over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [..., K/t], w [N, K/t] of one dtype. Returns: y [..., N]. Raises: ValueError on shapes or dtypes."""
    x, w = check_gemm("gemm_ar", x, w)
    return _gemm_ar(x, w, group)


def copy_gemm(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """x @ w.T for an x that every rank holds; the backward sums dx over `group`.

    Args: x [..., K], w [N/t, K] of one dtype. Returns: y [..., N/t]. Raises: ValueError on shapes or dtypes."""
    x, w = check_gemm("copy_gemm", x, w)
    return _copy_gemm(x, w, group)
