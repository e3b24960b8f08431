"""Experts of a foreign mixture of experts, spread over ranks: token rows travel to the ranks of their experts, sums travel back.

    router (whole on every rank) -> ids [T, K], weights [T, K] -> dispatch -> the module's own forward, on this rank's experts -> combine

Found by structure: a module with gate_up_proj [E, ...] and down_proj [E, ...], called with (tokens, ids, weights), of which the
sum over two halves of its experts equals the whole on a probe. What an expert computes (biases, clamps, interleaved or transposed
weights, a fused kernel) stays the module's own affair.

    axis    mesh.ep where it has ranks, else mesh.tp: every rank has whole experts, no expert is on all ranks
    tokens  ranks of tp hold the same ones: each takes its part of them before the dispatch, and the parts are joined after. With
            sequence parallelism they hold different ones already
    weights' gradients   complete where ep covers tp; over the ranks of dp that hold the same experts (edp) a parameter marked
            `expert` is summed by interlace's DistributedDataParallel; within tp the backward sums them
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.comm import all_reduce, combine, dispatch, dispatch_plan
from ..parallel.foreign import join_tokens, scatter_tokens
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import Piece, pieces_of, split
from .fused_experts import COUNTS, two_experts
from .split import Plan, Split

__all__ = ["SpreadExperts", "check_experts", "spread_experts"]


@dataclass(frozen=True)
class Spread:
    """experts: of all ranks, over axis; tp: the axis whose ranks hold the same tokens, of size 1 where none does."""
    experts: int
    axis: Axis
    tp: Axis


class SpreadExperts:
    """Stands before an experts module's class; its own forward sees the rows of this rank's experts, one expert a row."""

    _interlace_spread: Spread

    def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        how = self._interlace_spread
        E, axis, tp = how.experts, how.axis, how.tp
        x, tokens = hidden_states, hidden_states.shape[0]
        ids = ids.where((ids >= 0) & (ids < E), -1)                   # transformers says E for none
        if tp.size > 1:
            x, weights = scatter_tokens(x, tp), scatter_tokens(weights, tp)
            ids = F.pad(ids, (0, 0, 0, -tokens % tp.size), value=-1).chunk(tp.size)[tp.rank]
        plan = dispatch_plan(ids, E, axis.group)
        rows, probs = dispatch(x.contiguous(), plan), plan.probs(weights)
        mine = torch.arange(E // axis.size, device=ids.device).repeat_interleave(plan.counts.long(), output_size=len(rows))
        y = super().forward(rows, mine[:, None], probs[:, None])      # type: ignore[misc]
        if not len(rows) and torch.is_grad_enabled():                 # no rank's backward may lack the sum over its twins
            y = y + sum((p * 0).sum() for p in self.parameters())     # type: ignore[attr-defined]
        out = combine(y, plan)
        return out if tp.size == 1 else join_tokens(out, (tokens,), tp)


def check_experts(mesh: Mesh) -> list[str]:
    tp, ep = mesh.tp.size, mesh.ep.size
    if ep == 1 or tp % ep == 0 or ep % tp == 0:
        return []
    legal = [e for e in range(1, tp + 1) if tp % e == 0]
    return [f"mesh.ep and mesh.tp must be multiples of one another, got {ep} and {tp}; use ep in {legal}"]


def spread_experts(out: Plan, name: str, m: Any, mesh: Mesh) -> str:
    """Add an experts module to the plan, or say why it stays whole."""
    params = dict(m.named_parameters(recurse=False))
    E, axis = len(params["down_proj"]), mesh.ep if mesh.ep.size > 1 else mesh.tp
    why = _not_spread(m, params, E)
    if not why and E % axis.size:
        if mesh.ep.size > 1:
            legal = [e for e in range(1, E + 1) if E % e == 0]
            out.problems.append(f"{name}: its {E} experts must divide over ep={axis.size}; use ep in {legal}")
            return ""
        why = f"its {E} experts do not divide over tp={axis.size}"
    if why:
        if mesh.ep.size > 1:
            out.problems.append(f"{name}: its experts cannot be spread over ep={axis.size}, got a module of which {why}; use ep=1")
        return why + ": whole on every rank"
    twins = max(1, mesh.tp.size // axis.size)                         # ranks of tp that hold the same experts
    numbers: dict[str, Any] = {a: E // axis.size for a in COUNTS if vars(m).get(a) == E}
    numbers["_interlace_spread"] = Spread(E, axis, mesh.tp)
    pieces: dict[str, tuple[Piece, ...]] = {
        n: (replace(split("", tuple(p.shape), 0, axis), copies=twins),) for n, p in params.items()}
    out.splits[name] = m, Split("experts", attributes=numbers, pieces=pieces, wraps=(SpreadExperts,),
                                complete=partial(_complete, axis=axis, tp=mesh.tp))
    return ""


def _complete(param: Any, axis: Axis, tp: Axis) -> None:
    """Have the backward sum what ranks of tp with the same experts got from their tokens; mark what dp's ranks sum over edp."""
    param.axis, param.expert = axis, axis.size > tp.size
    if axis.size >= tp.size or not param.requires_grad:
        return

    def hook(grad: Tensor) -> Tensor:
        blocks = grad.new_zeros(axis.size, *grad.shape)
        blocks[axis.rank] = grad
        return all_reduce(blocks, tp.group)[axis.rank]
    param.completed = param.register_hook(hook), pieces_of(param)


def _not_spread(m: Any, params: dict[str, nn.Parameter], E: int) -> str:
    if "gate_up_proj" not in params or any(len(p) != E or p.dim() < 2 for p in params.values()) or E < 2:
        return "parameters are no stacks of experts"
    if list(m.children()) and any(list(c.parameters()) for c in m.children()):
        return "children have parameters"
    if params["down_proj"].is_meta:
        m, E = two_experts(m), 2
        params = dict(m.named_parameters(recurse=False))
    up, down = params["gate_up_proj"], params["down_proj"]
    hidden = up.shape[2] if up.shape[2] == down.shape[1] else up.shape[1]
    x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(4)).to(down)
    weights, first = torch.tensor([[0.5, 0.25], [0.75, 0.5]]).to(down), E // 2
    ids = torch.tensor([[0, E - 1]] * 2, device=down.device)
    try:
        with torch.no_grad():
            want = type(m).forward(m, x, ids, weights)
            low, high = (_half(m, params, at, n) for at, n in ((0, first), (first, E - first)))
            got = type(m).forward(low, x, ids[:, :1], weights[:, :1]) + type(m).forward(
                high, x, ids[:, 1:] - first, weights[:, 1:])
    except Exception as e:
        return f"the forward does not run on a probe: {type(e).__name__}"
    if not torch.is_tensor(want) or want.shape != x.shape or got.shape != x.shape or not want.any():
        return "a probe tells nothing: weights that are zero, or another output than one row a token"
    tolerance = 0.05 if down.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return "" if (got - want).abs().max() <= tolerance * want.abs().max() else "two halves do not add up to the whole on a probe"


def _half(m: Any, params: dict[str, nn.Parameter], at: int, n: int) -> Any:
    probe = copy.copy(m)
    probe.__dict__["_parameters"] = {k: nn.Parameter(p.detach()[at:at + n], requires_grad=False) for k, p in params.items()}
    vars(probe).update({a: n for a in COUNTS if a in vars(m)})
    return probe
