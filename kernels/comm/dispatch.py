"""dispatch: token rows to the ranks that hold their experts, in expert order        combine: its transpose, a sum per token

Shapes    x, o, residual [T, H] (T may differ per rank)   ids, probs [T, K]   rows, y [R, H]   W ranks, E / W experts each
Formulae  rows[r] = x of the token whose slot has row r, in the order (expert, source rank, token, k); padding rows are zero
          o[t] = sum_p (sum_k y_p[row_p(t, k)]) + residual[t]: over the token's rows on rank p, then over the ranks in order
Backward  of dispatch: combine without a residual;  of combine: dispatch, and dresidual = do;  of plan.probs: the way back
Plan      one all-gather of the ids, after which every rank knows all rows: nothing else is exchanged, no rank waits for counts
Bytes     a rank, b = T * H * itemsize: dispatch b staged once however many experts want a row, R * H * itemsize written;
          combine at most (W - 1) T * H partial sums staged (fp32 for 16-bit types; a token with no row on a rank costs nothing)
          On CUDA over symmetric memory: triton_moe.py, where combine reads the rows themselves and adds them over k in order
Numerics  dispatch bit-exact; combine in fp32 (fp64 for fp64), fixed order, one rounding; both bitwise repeatable
Source    dispatch and combine of DeepEP; alignment and orders of `route_plan`
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import INTERPRET, once
from ..permute import permute, slots_of
from ..route_plan import RoutePlan, route_plan
from ..unpermute import unpermute
from . import overlap
from .collectives import Group, _code, _heap, _rank, _torch_group, all_gather, group_size, reduce_scatter
from .heap import CODES, LIB, CollectiveMismatch

__all__ = ["DispatchPlan", "combine", "combine_ref", "dispatch", "dispatch_plan", "dispatch_ref"]

# ---- plan -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DispatchPlan:
    """Where the tokens of all ranks of `group` go. Tensors on the device of the ids, never read by the host with max_rows."""

    group: Group
    experts: int                                                      # E of the whole group
    tokens: int                                                       # T of this rank
    ids: Tensor                                                       # int32 [W * most, K] of all ranks, -1 past a rank's T
    route: RoutePlan                                                  # over ids, of this rank's experts alone
    static: bool                                                      # shapes do not depend on the ids: max_rows was given
    align: int
    capacity: int | None

    @property
    def size(self) -> int:
        """W."""
        return group_size(self.group)

    @property
    def most(self) -> int:
        """The largest T of a rank, or max_tokens."""
        return self.ids.shape[0] // self.size

    @property
    def rows(self) -> int:
        """R, the rows of this rank's expert-ordered buffer."""
        return self.route.rows

    @functools.cached_property
    def largest(self) -> int:
        """R of the rank that has most rows, the same on every rank. Without max_rows the host reads the device."""
        if self.static:
            return self.rows
        counts = self.load if self.capacity is None else self.load.clamp(max=self.capacity)
        return int((-(-counts // self.align) * self.align).view(self.size, -1).sum(1).max())

    @property
    def counts(self) -> Tensor:
        """int32 [E/W]: rows of each expert here."""
        return self.route.counts

    @property
    def offsets(self) -> Tensor:
        """int32 [E/W + 1]: first row of each expert here, a multiple of align."""
        return self.route.offsets

    @property
    def dropped(self) -> Tensor:
        """int64 [] slots of all ranks that asked for an expert here and got no row: over its capacity, or past max_rows."""
        return self.route.routed.sum() - self.route.counts.sum()

    @functools.cached_property
    def load(self) -> Tensor:
        """int64 [E]: slots of all ranks that asked for each expert of the group. The same on every rank."""
        asked = torch.where(_valid(self.ids, self.experts), self.ids, self.experts).flatten().long()
        return asked.new_zeros(self.experts + 1).scatter_add_(0, asked, torch.ones_like(asked))[:-1]

    def probs(self, p: Tensor) -> Tensor:
        """p [T, K] of this rank's tokens -> the probs of the rows here [R], 0 on padding. Differentiable."""
        if p.shape != (self.tokens, self.ids.shape[1]) or not p.is_floating_point():
            raise ValueError(f"dispatch: probs must be floating {[self.tokens, self.ids.shape[1]]}, one for each slot of the plan, "
                             f"got {p.dtype} {list(p.shape)}")
        return _Probs.apply(p, self)

    @functools.cached_property
    def wire(self) -> _Wire:
        """The maps of torch.distributed's all-to-all."""
        return _wire(self)


@dataclass(frozen=True)
class _Wire:
    """Rows as all-to-all carries them: each token once to each rank that it asks for, in the order (rank, token)."""

    send: RoutePlan                                                   # this rank's tokens, ranks for experts
    here: RoutePlan                                                   # the received rows to and from the expert-ordered buffer
    there: list[int]                                                  # rows sent to each rank
    back: list[int]                                                   # rows received from each rank


def _valid(ids: Tensor, E: int) -> Tensor:
    return (ids >= 0) & (ids < E)


def _wire(plan: DispatchPlan) -> _Wire:
    W, route, K, rank = plan.size, plan.route, plan.ids.shape[1], _rank(plan.group)
    target = torch.arange(W, dtype=torch.int32, device=plan.ids.device)
    if plan.static:                                                   # every token to every rank: no count depends on the ids
        send = route_plan(target.expand(plan.tokens, W), W, capacity=plan.most, pad_to_capacity=True)
        return _Wire(send, route, [plan.most] * W, [plan.most] * W)
    owner = plan.ids.div(plan.experts // W, rounding_mode="floor")    # -1 stays -1
    asked = (owner[:, None, :] == target[None, :, None]).any(2)       # [W * most, W]
    mine = asked[rank * plan.most:rank * plan.most + plan.tokens]
    send = route_plan(torch.where(mine, target, -1), W)
    there, back = send.counts.tolist(), asked[:, rank].view(W, -1).sum(1).tolist()
    token = asked[:, rank].nonzero().flatten()                        # received rows, in order
    place = asked[:, rank].cumsum(0) - 1
    slot = route.slot_of_row
    moved = place[(slot // max(K, 1)).clamp(min=0)] * K + slot % max(K, 1) if len(place) else slot
    here = replace(route, row_of_slot=route.row_of_slot[token], slot_of_row=torch.where(slot < 0, -1, moved).int())
    return _Wire(replace(send, slot_of_row=send.slot_of_row[:sum(there)]), here, there, back)


# ---- reference ------------------------------------------------------------------------------------------------


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    pg, size = _torch_group(x, group)
    if size == 1:
        return x
    y = x.new_empty(sum(receive), x.shape[1])
    dist.all_to_all_single(y.view(torch.uint8), x.contiguous().view(torch.uint8), receive, send, pg)   # bytes: gloo knows few types
    return y


def _permute(x: Tensor, plan: RoutePlan) -> Tensor:
    y = permute(x, plan)
    assert isinstance(y, Tensor)                                      # a pair only with probs
    return y


def dispatch_ref(x: Tensor, plan: DispatchPlan) -> Tensor:
    """`dispatch` by permute, the all-to-all of torch.distributed, permute. No autograd."""
    wire = plan.wire
    with torch.no_grad():
        return _permute(_exchange(_permute(x, wire.send), wire.there, wire.back, plan.group), wire.here)


def combine_ref(y: Tensor, plan: DispatchPlan, residual: Tensor | None = None) -> Tensor:
    """`combine` by unpermute, the all-to-all of torch.distributed, unpermute. No autograd."""
    wire, acc = plan.wire, torch.float64 if y.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        back = _exchange(unpermute(y.to(acc), wire.here), wire.back, wire.there, plan.group)
        return unpermute(back, wire.send, residual=None if residual is None else residual.to(acc)).to(y.dtype)


# ---- ops ------------------------------------------------------------------------------------------------------


def _dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    if plan.size == 1:
        return _permute(x, plan.route)
    heap = _heap(x, plan.group)
    if (heap is None or INTERPRET) and (rows := overlap.dispatched(x, plan)) is not None:
        return rows
    if heap is None:
        return dispatch_ref(x, plan)
    x, y, route = x.contiguous(), x.new_empty(plan.rows, x.shape[1]), plan.route
    if rc := LIB.interlace_dispatch(heap.handle, x.data_ptr(), y.data_ptr(), plan.ids.data_ptr(), route.row_of_slot.data_ptr(),
                                    route.slot_of_row.data_ptr(), plan.tokens, plan.most, plan.ids.shape[1],
                                    plan.experts // heap.size, plan.rows, x.shape[1], x.element_size(), _code(x)):
        heap.fail(rc)
    return y


def _combine(y: Tensor, plan: DispatchPlan, residual: Tensor | None = None) -> Tensor:
    if plan.size == 1:
        return unpermute(y, plan.route, residual=residual)
    heap, code = _heap(y, plan.group), CODES.get(y.dtype)
    if (heap is None or INTERPRET) and (sums := overlap.combined(y, plan, residual)) is not None:
        return sums
    if heap is None or code is None:
        return combine_ref(y, plan, residual)
    y, o = y.contiguous(), y.new_empty(plan.tokens, y.shape[1])
    residual = None if residual is None else residual.contiguous()
    if rc := LIB.interlace_combine(heap.handle, y.data_ptr(), o.data_ptr(), None if residual is None else residual.data_ptr(),
                                   plan.ids.data_ptr(), plan.route.row_of_slot.data_ptr(), plan.tokens, plan.most,
                                   plan.ids.shape[1], plan.experts // heap.size, y.shape[1], code):
        heap.fail(rc)
    return o


# ---- autograd -------------------------------------------------------------------------------------------------


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, plan):
        ctx.plan = plan
        return _dispatch(x, plan)

    @staticmethod
    @once("dispatch")
    def backward(ctx, dy):
        return _combine(dy, ctx.plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, residual, plan):
        ctx.plan = plan
        return _combine(y, plan, residual)

    @staticmethod
    @once("combine")
    def backward(ctx, do):
        dy = _dispatch(do, ctx.plan) if ctx.needs_input_grad[0] else None
        return dy, do if ctx.needs_input_grad[1] else None, None


class _Probs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, plan):
        ctx.plan = plan
        every = all_gather(_padded(p.detach(), plan.most, 0), plan.group).flatten()
        slot = plan.route.slot_of_row
        return torch.cat([every, every.new_zeros(1)])[torch.where(slot < 0, every.numel(), slot).long()]

    @staticmethod
    @once("dispatch")
    def backward(ctx, d):
        plan = ctx.plan
        mine = reduce_scatter(slots_of(d, plan.route.row_of_slot), plan.group)   # one term: a slot has its row on one rank
        return mine[:plan.tokens], None


# ---- public ---------------------------------------------------------------------------------------------------


def _padded(x: Tensor, most: int, value: int) -> Tensor:
    if x.shape[0] == most:
        return x.contiguous()
    out = x.new_full((most, *x.shape[1:]), value)
    out[:x.shape[0]] = x
    return out


def _agree(call: dict[str, int], device: torch.device, group: Group) -> list[dict[str, int]]:
    """What every rank calls dispatch_plan with; CollectiveMismatch on all of them where more than the tokens differ."""
    mine = torch.tensor([list(call.values())], device=device)
    every = [dict(zip(call, row)) for row in all_gather(mine, group).tolist()]
    for name in call:
        values = [c[name] for c in every]
        if name != "tokens" and len(set(values)) > 1:
            odd = next(r for r, v in enumerate(values) if v != values[0])
            raise CollectiveMismatch(f"dispatch_plan: {name} must be the same on all ranks of the group, got {values[0]} on rank 0 "
                                     f"and {values[odd]} on rank {odd}")
    return every


def _bounded(plan: RoutePlan, R: int) -> RoutePlan:
    """The plan with R rows: those past it are dropped, those it has not are padding."""
    slot = plan.slot_of_row
    return replace(
        plan, counts=torch.minimum(plan.counts, (R - plan.offsets[:-1]).clamp(min=0)), offsets=plan.offsets.clamp(max=R),
        row_of_slot=torch.where(plan.row_of_slot < R, plan.row_of_slot, -1),
        slot_of_row=slot[:R] if len(slot) >= R else torch.cat([slot, slot.new_full((R - len(slot),), -1)]))


def _check(ids: Tensor, E: int, size: int, align: int, max_rows: int | None, max_tokens: int | None) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"dispatch_plan: ids must be integers [T, K], got {ids.dtype} {list(ids.shape)}")
    if E < 1 or E % size:
        near = sorted({max(size, E // size * size), (E // size + 1) * size})
        raise ValueError(f"dispatch_plan: num_experts must be divisible by the {size} ranks of the group, got {E}; "
                         f"use {' or '.join(map(str, near))} experts, or another group")
    if max_rows is not None and (max_rows < 0 or align < 1 or max_rows % align):
        raise ValueError(f"dispatch_plan: max_rows must be a multiple of align = {align} and at least 0, got {max_rows}")
    if max_tokens is not None and ids.shape[0] > max_tokens:
        raise ValueError(f"dispatch_plan: ids must have at most max_tokens = {max_tokens} rows, got {ids.shape[0]}")


def dispatch_plan(ids: Tensor, num_experts: int, group: Group, align: int = 1, *, capacity: int | None = None,
                  drop: str = "position", probs: Tensor | None = None, max_rows: int | None = None,
                  max_tokens: int | None = None) -> DispatchPlan:
    """Exchange the expert ids of a batch over `group`; rank q owns experts [q E / W, (q + 1) E / W). Collective.

    Args: ids int [T, K], -1 for no expert, T any on each rank; group  process group, SymmHeap, or None for one rank; align: every
      expert's rows start at a multiple of it; capacity: most rows of an expert over all ranks, `drop` and `probs` [T, K] as in
      `route_plan`, earlier ranks first; max_rows: R itself, rows past it are dropped and counted in plan.dropped (without it R is
      read from the device); max_tokens: a bound on T on all ranks, which saves the exchange of the T's.
    Returns: DispatchPlan. With max_rows and max_tokens no shape depends on the ids and the host reads nothing (CUDA graphs).
    Raises: ValueError for bad arguments and, on CPU on every rank, ids out of range of any rank (elsewhere, and under torch.compile,
      they are dropped);
      CollectiveMismatch on every rank where K, num_experts or another argument differs.
    """
    size = group_size(group)
    _check(ids, num_experts, size, align, max_rows, max_tokens)
    (T, K), per, none = ids.shape, num_experts // size, -1
    most = max_tokens
    if most is None:
        call = {"tokens": T, "K": K, "num_experts": num_experts, "align": align, "capacity": none if capacity is None else capacity,
                "by_probs": int(drop == "probs"), "max_rows": none if max_rows is None else max_rows}
        most = max(c["tokens"] for c in _agree(call, ids.device, group)) if size > 1 else T
    small = ids.detach().clamp(-2, num_experts).to(torch.int32)       # out of range stays out of range
    every = all_gather(_padded(small, most, -1), group) if size > 1 else small
    if every.device.type == "cpu" and every.numel() and not torch.compiler.is_compiling():
        low, high = every.aminmax()
        if low < -1 or high >= num_experts:
            wrong = (every < -1) | (every >= num_experts)
            raise ValueError(f"dispatch_plan: ids must be in [0, {num_experts}) or -1, got {int(wrong.sum())} others, the first on rank "
                             f"{int(wrong.any(1).nonzero()[0]) // most} of the group; use -1 to drop a slot")
    if drop == "probs" and capacity is not None and probs is not None and size > 1:
        probs = all_gather(_padded(probs.detach(), most, 0), group)
    mine = (every - _rank(group) * per).clamp_(-1, per)
    route = route_plan(mine.masked_fill_(mine == per, -1), per, align, capacity, drop, probs)
    if max_rows is None:
        route = replace(route, slot_of_row=route.slot_of_row[:int(route.offsets[-1])])
    else:
        route = _bounded(route, max_rows)
    return DispatchPlan(group, num_experts, T, every, route, max_rows is not None, align, capacity)


def dispatch(x: Tensor, plan: DispatchPlan) -> Tensor:
    """The rows that this rank's experts take, from the tokens of all ranks. Collective; differentiable.

    Args: x [T, H], of one H and dtype on all ranks. Returns: rows [R, H] in the order of plan.offsets, padding rows zero.
    Raises: ValueError where x and plan disagree; CollectiveMismatch on every rank where H or dtype differs; PeerDied, TimeoutError.
    """
    if x.ndim != 2 or x.shape[0] != plan.tokens or not x.is_floating_point():
        raise ValueError(f"dispatch: x must be floating [T, H] with the plan's T = {plan.tokens}, got {x.dtype} {list(x.shape)}")
    return _Dispatch.apply(x, plan)


def combine(y: Tensor, plan: DispatchPlan, residual: Tensor | None = None) -> Tensor:
    """Sum each token's rows, which may lie on several ranks, and bring the sum back to it. Collective; differentiable.

    Args: y [R, H] rows in the plan's order, weighted already; residual [T, H] of y's dtype, added last.
    Returns: o [T, H], zero (or the residual) where a token has no row. Raises: as `dispatch`.
    """
    if y.ndim != 2 or y.shape[0] != plan.rows or not y.is_floating_point():
        raise ValueError(f"combine: y must be floating [R, H] with the plan's R = {plan.rows}, got {y.dtype} {list(y.shape)}")
    if residual is not None and (residual.shape != (plan.tokens, y.shape[1]) or residual.dtype != y.dtype):
        raise ValueError(f"combine: residual must be {[plan.tokens, y.shape[1]]} {y.dtype} like y, got {residual.dtype} "
                         f"{list(residual.shape)}")
    return _Combine.apply(y, residual, plan)
