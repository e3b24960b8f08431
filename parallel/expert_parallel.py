"""Mixture of experts over the ep axis: the router, the experts of this rank, and the layer that joins them.   e = ep.size

    x -> router -> ids, probs -> dispatch (rows to the ranks of their experts) -> experts -> combine (sums back to their tokens)

Shapes  x [S/t, B, D] under sequence parallelism, else [S, B, D] on every tp rank; then the layer itself gives each rank its part of
        the tokens and joins the parts after: no token is computed twice. T = S/t * B tokens of a rank, K experts a token.
        weights: up [E/e, 2F, D] (gate and up), down [E/e, D, F], of experts ep.rank * E/e ...
Comm    ep axis, a rank and layer: T * min(K, e) (e-1)/e rows of D out and as many back at most, the same again backward; over tp
        without sequence parallelism an all-gather of the output, T (t-1) rows of D
Losses  what balances the experts is a mean over the tokens of a micro-batch, on all tp ranks, so every layout has the same. It
        enters the backward at the layer's output, times `loss_scale`; the layer's output is not changed by it.
With ep.size 1 no row travels: `expert_mlp` gathers on load, and sums.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import aux_loss, expert_mlp, forced_balance, route_plan, router, update_expert_bias, z_loss
from ..kernels.comm import all_gather, all_reduce, combine, dispatch, dispatch_plan
from ..kernels.router import Routing
from .collectives import scatter_to, stack_from
from .mesh import Axis, Mesh
from .sharding import Piece, init_parameters, replicated, set_pieces

__all__ = ["Experts", "MoELayer", "RouterOptions", "Statistics", "TopKRouter", "take_statistics", "update_expert_biases"]


@dataclass(frozen=True)
class RouterOptions:
    """How tokens choose: Megatron's moe_* words. Formulae: kernels/router.py."""
    topk: int = 2
    score_function: str = "softmax"
    pre_softmax: bool = False
    norm_topk_prob: bool | None = None
    num_groups: int | None = None
    group_topk: int | None = None
    scaling_factor: float = 1.0
    expert_bias: bool = False                                         # balance by a bias on the choice, moved after each step
    load_balancing: str = "aux_loss"                                  # aux_loss | seq_aux_loss | none
    aux_loss_coeff: float = 1e-2
    z_loss_coeff: float = 0.0
    force_load_balancing: bool = False
    capacity_factor: float | None = None                              # most tokens of an expert over T K / E; None: all stay
    drop_policy: str = "probs"                                        # probs | position


class TopKRouter(nn.Module):
    """logits = x @ weight.T in fp32 (fp64 for fp64): x [T, D] -> Routing. weight [E, D], the same on every rank.

    partial: ranks of tp see different tokens, so their gradients are parts of a sum."""

    def __init__(self, hidden_size: int, num_experts: int, options: RouterOptions, *, tp: Axis, partial: bool = False,
                 init_std: float = 0.02, dtype: torch.dtype | None = None):
        super().__init__()
        self.options, self.num_experts = options, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype))
        set_pieces(self.weight, replicated((num_experts, hidden_size), tp, partial), std=init_std)
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(num_experts) if options.expert_bias else None)
        init_parameters(self, seed=0)

    def forward(self, x: Tensor, sequences: int = 1, ids: Tensor | None = None) -> Routing:
        o, wide = self.options, torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = F.linear(x.to(wide), self.weight.to(wide))
        return router(logits, o.topk, score_function=o.score_function, pre_softmax=o.pre_softmax, norm_topk_prob=o.norm_topk_prob,
                      expert_bias=self.expert_bias, num_groups=o.num_groups, group_topk=o.group_topk,
                      scaling_factor=o.scaling_factor, sequences=sequences, ids=ids)


class _Stacked(nn.Module):
    """One weight matrix of every expert of this rank, [E/e, rows, columns], made of named parts stacked along the rows."""

    def __init__(self, parts: tuple[str, ...], rows: int, columns: int, experts: range, *, init_std: float, dtype: torch.dtype | None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(experts), len(parts) * rows, columns, dtype=dtype))
        self.weight.expert = True  # type: ignore[attr-defined]       # its gradient is summed over edp, not dp
        set_pieces(self.weight, *(Piece(f"{e}.{part}", (rows, columns), 0, 0, rows, i * rows, expert=e - experts.start)
                                  for e in experts for i, part in enumerate(parts)), std=init_std)


class Experts(nn.Module):
    """The MLPs of this rank's experts; parameters are named experts.<e>.{gate_proj, up_proj, down_proj}.weight."""

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, *, ep: Axis, activation: str = "swiglu", init_std: float = 0.02,
                 output_std: float = 0.02, dtype: torch.dtype | None = None):
        super().__init__()
        if num_experts % ep.size:
            raise ValueError(f"Experts: num_experts must be divisible by {ep.name}={ep.size}, got {num_experts}; use another number")
        n = num_experts // ep.size
        here, parts = range(ep.rank * n, (ep.rank + 1) * n), ("gate_proj", "up_proj") if activation == "swiglu" else ("up_proj",)
        self.activation = activation
        self.up = _Stacked(parts, ffn_size, hidden_size, here, init_std=init_std, dtype=dtype)
        self.down = _Stacked(("down_proj",), hidden_size, ffn_size, here, init_std=output_std, dtype=dtype)


class _WithLosses(torch.autograd.Function):
    """o -> o; its backward lets the losses in, and counts what the layer saw: once a micro-batch, also under recompute."""

    @staticmethod
    def forward(ctx, o, losses, layer, counts, dropped):
        ctx.layer, ctx.seen = layer, (counts, dropped, losses.detach())
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        ctx.layer.count(*ctx.seen)
        losses = ctx.seen[2]
        return do, torch.full_like(losses, ctx.layer.loss_scale), None, None, None


class MoELayer(nn.Module):
    """A mixture of experts in place of an MLP: [S(/t), B, D] -> [S(/t), B, D].

    Args:
        hidden_size, ffn_size of one expert, num_experts, options. mesh: its tp and ep axes. sequence_parallel: x is this rank's part.
        shared: an MLP that every token goes through, added; shared_gate: times sigmoid(x @ gate).
    loss_scale: of the balancing losses in the backward, 1 / micro-batches of a step.
    Raises: ValueError where the sequence does not divide over tp.
    """

    tokens_per_expert: Tensor                                         # what the layer saw: see Statistics
    dropped: Tensor
    losses: Tensor

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, options: RouterOptions, mesh: Mesh | None = None, *,
                 sequence_parallel: bool = False, shared: nn.Module | None = None, shared_gate: bool = False,
                 activation: str = "swiglu", init_std: float = 0.02, output_std: float = 0.02, dtype: torch.dtype | None = None):
        super().__init__()
        mesh = mesh or Mesh()
        self.tp, self.ep, self.options, self.num_experts, self.loss_scale = mesh.tp, mesh.ep, options, num_experts, 1.0
        self.split = mesh.tp.size > 1 and not sequence_parallel       # every tp rank has all tokens: each takes a part
        self.gate = TopKRouter(hidden_size, num_experts, options, tp=mesh.tp, partial=mesh.tp.size > 1, init_std=init_std, dtype=dtype)
        self.experts = Experts(hidden_size, ffn_size, num_experts, ep=mesh.ep, activation=activation, init_std=init_std,
                               output_std=output_std, dtype=dtype)
        self.shared_expert = shared
        self.shared_expert_gate: nn.Linear | None = None
        if shared is not None and shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, dtype=dtype)
            gate: Any = self.shared_expert_gate.weight
            set_pieces(gate, replicated((1, hidden_size), mesh.tp, sequence_parallel), std=init_std)
        for name, kind in (("tokens_per_expert", torch.int64), ("losses", torch.float64), ("dropped", torch.int64)):
            shape = {"tokens_per_expert": (num_experts,), "losses": (2,), "dropped": (1,)}[name]
            self.register_buffer(name, torch.zeros(shape, dtype=kind), persistent=False)
        init_parameters(self, seed=0)

    def forward(self, x: Tensor) -> Tensor:
        mine = scatter_to(x, self.tp) if self.split else x
        o = self.routed(mine)
        if self.split:
            o = stack_from(o, self.tp).flatten(0, 1)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            o = o + (shared if self.shared_expert_gate is None else shared * torch.sigmoid(self.shared_expert_gate(x)))
        return o

    def routed(self, x: Tensor) -> Tensor:
        """This rank's tokens [S/t, B, D] through their experts."""
        (S, B, D), K, t = x.shape, self.options.topk, self.tp.size
        flat = x.reshape(-1, D)
        forced = None
        if self.options.force_load_balancing:
            forced = forced_balance(S * B * t, K, self.num_experts, x.device).chunk(t)[self.tp.rank]
        routing = self.gate(flat, max(B, 1), forced)
        ids = self._within_capacity(routing)
        e = self.experts
        if self.ep.size == 1:
            plan = route_plan(ids, self.num_experts)
            o = expert_mlp(flat, e.up.weight, e.down.weight, plan, routing.probs, activation=e.activation)
        else:
            far = dispatch_plan(ids, self.num_experts, self.ep.group, max_tokens=S * B)
            rows = dispatch(flat, far)
            y = expert_mlp(rows, e.up.weight, e.down.weight, far.offsets, far.probs(routing.probs), activation=e.activation)
            o = combine(y, far)
        losses = self.balancing_losses(routing, S * t, B)
        if torch.is_grad_enabled():
            dropped = (routing.ids >= 0).sum() - (ids >= 0).sum()
            o = _WithLosses.apply(o, losses, self, routing.counts, dropped)
        return o.view(S, B, D)

    def _within_capacity(self, routing: Routing) -> Tensor:
        """ids, -1 for what its expert has no room for. The micro-batch decides as a whole: the tokens of all tp ranks."""
        o, ids = self.options, routing.ids
        if o.capacity_factor is None:
            return ids
        every, probs = (ids, routing.probs.detach()) if self.tp.size == 1 else (
            all_gather(ids, self.tp.group), all_gather(routing.probs.detach(), self.tp.group))
        capacity = math.ceil(every.numel() / self.num_experts * o.capacity_factor)
        plan = route_plan(every, self.num_experts, capacity=capacity, drop=o.drop_policy, probs=probs)
        kept = plan.row_of_slot[self.tp.rank * ids.shape[0]:][:ids.shape[0]] >= 0
        return torch.where(kept, ids, -1)

    def balancing_losses(self, routing: Routing, sequence: int, samples: int) -> Tensor:
        """[2] this rank's part of the load-balancing loss and of the z-loss; over tp they add up to the micro-batch's."""
        o, none = self.options, routing.lse.new_zeros(())
        aux = z = none
        if o.load_balancing != "none" and o.aux_loss_coeff:
            counts = routing.counts if self.tp.size == 1 else all_reduce(routing.counts, self.tp.group)
            each = o.load_balancing == "seq_aux_loss"
            aux = aux_loss(routing.score_sums, counts, o.topk, o.aux_loss_coeff, per_sequence=each,
                           tokens=sequence if each else sequence * samples)
        if o.z_loss_coeff:
            z = z_loss(routing.lse, o.z_loss_coeff, tokens=sequence * samples)
        return torch.stack([aux, z])

    def count(self, counts: Tensor, dropped: Tensor, losses: Tensor) -> None:
        self.tokens_per_expert += counts.sum(0)
        self.dropped += dropped
        self.losses += losses * self.loss_scale


@dataclass
class Statistics:
    """What a layer saw since it was last asked, over all ranks: tokens [E] that chose each expert, slots dropped, and the mean
    losses [2]: load balancing, z."""
    tokens: Tensor
    dropped: Tensor
    losses: Tensor

    @property
    def imbalance(self) -> float:
        """The busiest expert's load over the mean load."""
        return (self.tokens.max() / self.tokens.double().mean().clamp(min=1)).item()


@torch.no_grad()
def take_statistics(model: nn.Module, mesh: Mesh) -> dict[str, Statistics]:
    """{layer's name: its Statistics} of this rank's stages, from which they start anew. Collective over tp and dp."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}
    if not found:
        return {}
    flat = torch.stack([torch.cat([m.tokens_per_expert.double(), m.dropped.double(), m.losses]) for m in found.values()])
    for axis in (mesh.tp, mesh.dp):
        flat = all_reduce(flat, axis.group) if axis.size > 1 else flat
    for m in found.values():
        for seen in (m.tokens_per_expert, m.dropped, m.losses):
            seen.zero_()
    return {name: Statistics(row[:-3].long(), row[-3].long(), row[-2:] / mesh.dp.size) for name, row in zip(found, flat)}


@torch.no_grad()
def update_expert_biases(model: nn.Module, seen: dict[str, Statistics], rate: float) -> None:
    """After a step: move the bias of every router that has one towards an even load, by what all ranks saw in it."""
    for name, m in model.named_modules():
        if isinstance(m, MoELayer) and m.gate.expert_bias is not None:
            update_expert_bias(m.gate.expert_bias, seen[name].tokens, rate)
