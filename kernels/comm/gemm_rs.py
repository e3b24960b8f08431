"""gemm_rs: y = reduce_scatter(x @ w.T, dim 0)        ag_gemm: its dual, y = all_gather(x, dim 0) @ w.T

Shapes    gemm_rs: x [S, ..., K/t], w [N, K/t] -> y [S/t, ..., N]      ag_gemm: x [S/t, ..., K], w [N/t, K] -> y [S, ..., N/t]
Backward  gemm_rs: dyg = all_gather(dy); dx = dyg @ w, dw = dyg.T @ x
          ag_gemm: dx = gemm_rs(dy, w.T), dw = dy.T @ all_gather(x): x is gathered again rather than kept t times as
          large (regather=False keeps it). Over torch.distributed x comes in the background while dx is multiplied, and
          dw is computed while dx is scattered; else dw follows (gemm_ar.py says why)
Bytes     one reduce-scatter of M * N, or one all-gather of M * K, times itemsize (collectives.py)   FLOPs  2 M N K / t a pass
Numerics  the product in the type's own GEMM, then a sum in rank order with fp32 accumulation
Source    sequence parallelism, arXiv:2205.05198
"""
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import traced
from . import overlap
from .agree import agree, choose_path
from .choose import KERNELS
from .collectives import _gather, all_gather, begin, beside, reduce_scatter
from .gemm import check_gemm, flat, gemm
from .registry import Group, group_of, group_size, register
from .walk import gathered_product, summed_product

# ---- reference ------------------------------------------------------------------------------------------------


def gemm_rs_ref(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return reduce_scatter(x @ w.t(), group)


def ag_gemm_ref(x: Tensor, w: Tensor, group: Group) -> Tensor:
    return all_gather(x, group) @ w.t()


# ---- op -------------------------------------------------------------------------------------------------------


def scattered_product(a: Tensor, b: Tensor, group: Group, meanwhile: Callable[[], object] | None = None) -> Tensor:
    """reduce_scatter(a @ b, dim 0) for 2-d a and b, by the path that `choose` names. meanwhile: as in reduced_product."""
    (M, K), N = a.shape, b.shape[1]
    path, heap = choose_path("gemm_rs", M, N, K, a, group)
    if path.name == "one rank":
        return gemm(a, b)
    if path.name in KERNELS:
        return overlap.scattered(a, b.t(), group)                     # type: ignore[return-value]
    if path.name == "heap, walked":
        part = M // heap.size
        return summed_product("gemm_rs", a, b, heap, heap.rank * part, (heap.rank + 1) * part)
    if path.name == "torch.distributed":
        agree("gemm_rs", group, rows=M, cols=N, inner=K, dtype=a.dtype)
        return beside("reduce_scatter", gemm(a, b), group, meanwhile)
    y = gemm(a, b, out=heap.stage((M, N), a.dtype) if path.name == "heap, staged" else None)
    heap.serve("gemm_rs", M, N, K)
    return reduce_scatter(y, heap)


def _gemm_rs_run(x: Tensor, w: Tensor, group: Group) -> Tensor:
    t = group_size(group)
    return scattered_product(flat(x), w.t(), group).view(x.shape[0] // t, *x.shape[1:-1], w.shape[0])


def _ag_gemm_run(x: Tensor, w: Tensor, gathered: bool, group: Group) -> tuple[Tensor, Tensor]:
    """y, and the gathered x where it is wanted, which takes one piece of memory: no walk then."""
    rows, b, none = flat(x), w.t(), x.new_empty(0)
    (m, K), N = rows.shape, w.shape[0]
    path, heap = choose_path("ag_gemm", m, K, N, x, group, whole=gathered)
    shape = (x.shape[0] * group_size(group), *x.shape[1:-1], w.shape[0])
    if path.name == "heap, walked":
        return gathered_product(rows, b, heap).view(shape), none
    if path.name == "overlapped kernel":
        return overlap.gathered_product(rows, w, group).view(shape), none
    if path.name == "torch.distributed":
        agree("ag_gemm", group, rows=m, cols=K, inner=N, dtype=x.dtype)
        xs, wait = begin("all_gather", rows.contiguous(), group)
        wait()
    else:
        if heap is not None:
            heap.serve("ag_gemm", m, K, N)
        xs = all_gather(rows, heap or group)
    return gemm(xs, b).view(shape), xs if gathered else none


# ---- autograd -------------------------------------------------------------------------------------------------


def _gemm_rs_setup(ctx, inputs, output):
    x, w, ctx.group = inputs
    ctx.save_for_backward(x, w)


def _gemm_rs_backward(ctx, dy):
    x, w = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return _ag_gemm(dy, w.t(), False, ctx.group)[0], None, None
    dx, dyg = _ag_gemm(dy, w.t(), True, ctx.group)
    return dx, gemm(dyg.t(), flat(x)), None


def _ag_gemm_setup(ctx, inputs, output):
    x, w, ctx.kept, ctx.group = inputs
    ctx.set_materialize_grads(False)                                  # none ever comes for the gathered x
    ctx.save_for_backward(output[1] if ctx.kept else x, w)


def _ag_gemm_backward(ctx, dy, _):
    x, w = ctx.saved_tensors
    wants_x, wants_w = ctx.needs_input_grad[:2]
    if traced() or torch.is_grad_enabled():                           # to be recorded: as ops
        dx = _gemm_rs(dy, w.t(), ctx.group) if wants_x else None
        return dx, gemm(flat(dy).t(), x if ctx.kept else _gather(flat(x), ctx.group)) if wants_w else None, None, None
    group, rows, coming = group_of(ctx.group), flat(dy), None
    path, _ = choose_path("gemm_rs", rows.shape[0], w.shape[1], w.shape[0], dy, group)
    if path.name == "torch.distributed" and wants_w and not ctx.kept:
        coming = begin("all_gather", flat(x).contiguous(), group)

    @functools.cache
    def dw() -> Tensor | None:
        if not wants_w:
            return None
        whole = x if ctx.kept else _gather(flat(x), group) if coming is None else coming[0]
        if coming is not None:
            coming[1]()
        return gemm(rows.t(), whole)
    if not wants_x:
        return None, dw(), None, None
    dx = scattered_product(rows, w, group, dw)
    return dx.view(dy.shape[0] // group_size(group), *dy.shape[1:-1], w.shape[1]), dw(), None, None


def _fake_ag(x: Tensor, w: Tensor, gathered: bool, world: int) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0] * world, *x.shape[1:-1], w.shape[0])
    return y, x.new_empty(x.shape[:-1].numel() * world, x.shape[-1]) if gathered else x.new_empty(0)


_gemm_rs = register("gemm_rs(Tensor x, Tensor w, str group) -> Tensor", _gemm_rs_run,
                    lambda x, w, world: x.new_empty(x.shape[0] // world, *x.shape[1:-1], w.shape[0]),
                    _gemm_rs_setup, _gemm_rs_backward)
_ag_gemm = register("ag_gemm(Tensor x, Tensor w, bool gathered, str group) -> (Tensor, Tensor)", _ag_gemm_run, _fake_ag,
                    _ag_gemm_setup, _ag_gemm_backward, keep=2)

# ---- public ---------------------------------------------------------------------------------------------------


def gemm_rs(x: Tensor, w: Tensor, group: Group = None) -> Tensor:
    """reduce_scatter(x @ w.T) along dim 0 over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [S, ..., K/t], w [N, K/t] of one dtype, S divisible by the group's size. Returns: y [S/t, ..., N].
    Raises: ValueError on shapes or dtypes."""
    x, w = check_gemm("gemm_rs", x, w)
    if x.dim() < 2 or x.shape[0] % group_size(group):
        raise ValueError(f"gemm_rs: dim 0 of x must be divisible by the {group_size(group)} ranks of the group, "
                         f"got {list(x.shape)}; pad it")
    return _gemm_rs(x, w, group)


def ag_gemm(x: Tensor, w: Tensor, group: Group = None, *, regather: bool = True) -> Tensor:
    """all_gather(x) along dim 0, times w.T, over `group` (a process group, a SymmHeap, or None: one rank).

    Args: x [S/t, ..., K], w [N/t, K] of one dtype. regather: the backward gathers x again for dw, and 1/t of the bytes is kept
    until then; False keeps the gathered x. Returns: y [S, ..., N/t]. Raises: ValueError on shapes or dtypes."""
    x, w = check_gemm("ag_gemm", x, w)
    if x.dim() < 2:
        raise ValueError(f"ag_gemm: x must have a dim 0 to gather and a last dim, got {list(x.shape)}")
    return _ag_gemm(x, w, not regather, group)[0]
