"""Mixture of experts over the ep axis: the router, the experts of this rank, and the layer that joins them.   e = ep.size

    x -> router -> ids, probs -> dispatch (rows to the ranks of their experts) -> experts -> combine (sums back to their tokens)

Shapes  x [S/t, B, D] under sequence parallelism, else [S, B, D] on every tp rank; then the layer itself gives each rank its part of
        the tokens and joins the parts after: no token is computed twice. T = S/t * B tokens of a rank, K experts a token.
        weights: up [E/e, 2F, D] (gate and up), down [E/e, D, F], of experts ep.rank * E/e ...
Comm    ep axis, a rank and layer: T * min(K, e) (e-1)/e rows of D out and as many back at most, the same again backward; over tp
        without sequence parallelism an all-gather of the output, T (t-1) rows of D
Losses  what balances the experts is a mean over the tokens of a micro-batch, on all tp ranks, so every layout has the same. It
        enters the backward at the layer's output, times `loss_scale`; the layer's output is not changed by it.
        global_aux_loss weighs a micro-batch's scores by the load of all the step's micro-batches up to it, in their global order:
        Megatron's running mean as one rank has it, on every layout. It gathers the counts, E numbers, over dp.
Shapes of static capacity (pad_expert_input_to_capacity): every buffer's rows follow from the capacity, the host reads no tensor, so a
        CUDA graph can hold the layer. What the experts leave free stands at the buffer's end, where no product reads it.
With ep.size 1 no row travels: `expert_mlp` gathers on load, and sums.
"""
from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import aux_loss, expert_mlp, forced_balance, jitter, route_plan, router, router_ref, update_expert_bias, z_loss
from ..kernels.autocast import lowered, undisturbed
from ..kernels.comm import all_gather, all_reduce, combine, dispatch, dispatch_plan
from ..kernels.dispatch import once
from ..kernels.router import SCORES, Routing
from .collectives import scatter_to, stack_from
from .layout import balancing
from .mesh import Axis, Mesh
from .sharding import Described, Piece, init_parameters, replicated, set_pieces

__all__ = ["Experts", "MoELayer", "RouterOptions", "Statistics", "TopKRouter", "record_routing", "replay_routing", "take_statistics",
           "update_expert_biases"]


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
    load_balancing: str | tuple[str, ...] = "aux_loss"                # aux_loss | seq_aux_loss | global_aux_loss | none, or several
    aux_loss_coeff: float | tuple[float, ...] = 1e-2                  # of each
    z_loss_coeff: float = 0.0
    input_jitter_eps: float | None = None                             # in training the router sees x times 1 +- eps
    force_load_balancing: bool = False
    enable_routing_replay: bool = False                               # see record_routing; recompute takes the choices of the first pass
    capacity_factor: float | None = None                              # most tokens of an expert over T K / E; None: all stay
    drop_policy: str = "probs"                                        # probs | position
    pad_expert_input_to_capacity: bool = False                        # shapes follow from the capacity alone, no host sync

    def __post_init__(self) -> None:
        balancing(self.load_balancing, self.aux_loss_coeff)           # raises
        if self.score_function not in SCORES:
            raise ValueError(f"RouterOptions: score_function must be one of {', '.join(SCORES)}, got {self.score_function!r}")
        if self.norm_topk_prob is False and self.score_function == "softmax" and not self.pre_softmax:
            raise ValueError("RouterOptions: norm_topk_prob=False needs pre_softmax=True (softmax over the chosen experts sums to 1), got "
                             "False; set it")
        if (self.num_groups is None) != (self.group_topk is None):
            raise ValueError("RouterOptions: num_groups and group_topk go together (both or neither), got "
                             f"{self.num_groups} and {self.group_topk}")
        if not self.scaling_factor > 0:
            raise ValueError(f"RouterOptions: scaling_factor must be above 0, got {self.scaling_factor}; 1.0 is none")
        if not self.z_loss_coeff >= 0:
            raise ValueError(f"RouterOptions: z_loss_coeff must be >= 0, got {self.z_loss_coeff}; 0.0 is off")
        if self.drop_policy not in ("probs", "position"):
            raise ValueError(f"RouterOptions: drop_policy must be probs or position, got {self.drop_policy!r}")
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"RouterOptions: capacity_factor must be above 0, got {self.capacity_factor}; None drops nothing")
        if self.pad_expert_input_to_capacity and self.capacity_factor is None:
            raise ValueError("RouterOptions: pad_expert_input_to_capacity needs a capacity_factor, got None; 1.25 is usual")
        if self.input_jitter_eps is not None and not 0 < self.input_jitter_eps < 1:
            raise ValueError(f"RouterOptions: input_jitter_eps must be in (0, 1), got {self.input_jitter_eps}; None is no noise")

    @property
    def words(self) -> dict[str, Any]:
        """Those that `router` takes."""
        return {"topk": self.topk, "score_function": self.score_function, "pre_softmax": self.pre_softmax,
                "norm_topk_prob": self.norm_topk_prob, "num_groups": self.num_groups, "group_topk": self.group_topk,
                "scaling_factor": self.scaling_factor}


class TopKRouter(Described):
    """logits = x @ weight.T in fp32 (fp64 for fp64): x [T, D] -> Routing. weight [E, D], the same on every rank.

    partial: ranks of tp see different tokens, so their gradients are parts of a sum. expert_bias stays in fp32 whatever the weight's
    dtype: steps of 1e-3 around 1 are below what bf16 holds."""

    exact = ("expert_bias",)

    def __init__(self, hidden_size: int, num_experts: int, options: RouterOptions, *, tp: Axis, partial: bool = False,
                 init_std: float = 0.02, dtype: torch.dtype | None = None):
        super().__init__()
        router_ref(torch.empty(0, num_experts, device="cpu"), **options.words)   # raises what the first forward would
        self.tp, self.options, self.num_experts = tp, options, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype))
        set_pieces(self.weight, replicated((num_experts, hidden_size), tp, partial), std=init_std)
        self.expert_bias: Tensor | None
        self.register_buffer("expert_bias", torch.zeros(num_experts) if options.expert_bias else None)
        init_parameters(self)

    def forward(self, x: Tensor, sequences: int = 1, ids: Tensor | None = None) -> Routing:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with undisturbed(x):                                          # tokens choose by their fp32 scores in autocast too
            logits = F.linear(x.to(wide), self.weight.to(wide))
        return router(logits, **self.options.words, expert_bias=self.expert_bias, sequences=sequences, ids=ids)


class _Stacked(Described):
    """One weight matrix of every expert of this rank, [E/e, rows, columns], made of named parts stacked along the rows."""

    def __init__(self, parts: tuple[str, ...], rows: int, columns: int, experts: range, *, ep: Axis, init_std: float,
                 dtype: torch.dtype | None):
        super().__init__()
        self.ep = ep
        self.weight = nn.Parameter(torch.empty(len(experts), len(parts) * rows, columns, dtype=dtype))
        self.weight.expert = True  # type: ignore[attr-defined]       # its gradient is summed over edp, not dp
        set_pieces(self.weight, *(Piece(f"{e}.{part}", (rows, columns), 0, 0, rows, i * rows, expert=e - experts.start)
                                  for e in experts for i, part in enumerate(parts)), std=init_std)


class _SharedGate(Described, nn.Linear):
    """nn.Linear that keeps its pieces."""


class Experts(nn.Module):
    """The MLPs of this rank's experts; parameters are named experts.<e>.{gate_proj, up_proj, down_proj}.weight."""

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, *, ep: Axis, activation: str = "swiglu", init_std: float = 0.02,
                 output_std: float = 0.02, dtype: torch.dtype | None = None):
        super().__init__()
        if num_experts % ep.size:
            raise ValueError(f"Experts: num_experts must be divisible by {ep.name}={ep.size}, got {num_experts}; use another number")
        if activation not in ("swiglu", "gelu"):
            raise ValueError(f"Experts: activation must be swiglu or gelu, got {activation!r}")
        n = num_experts // ep.size
        here, parts = range(ep.rank * n, (ep.rank + 1) * n), ("gate_proj", "up_proj") if activation == "swiglu" else ("up_proj",)
        self.activation = activation
        self.up = _Stacked(parts, ffn_size, hidden_size, here, ep=ep, init_std=init_std, dtype=dtype)
        self.down = _Stacked(("down_proj",), hidden_size, ffn_size, here, ep=ep, init_std=output_std, dtype=dtype)


@dataclass(eq=False)
class _Flight:
    """What the first forward of a micro-batch leaves for its recompute; lives as long as the micro-batch's graph."""
    load: Tensor | None = None                                        # [E] of global_aux_loss
    ids: Tensor | None = None                                         # [T, K] with enable_routing_replay


class _WithLosses(torch.autograd.Function):
    """o -> o; its backward lets the losses in, and counts what the layer saw: once a micro-batch, also under recompute."""

    @staticmethod
    def forward(ctx, o, losses, layer, counts, dropped, flight):
        ctx.layer, ctx.seen, ctx.flight = layer, (counts, dropped, losses.detach()), flight
        return o.view_as(o)

    @staticmethod
    @once("MoELayer")
    def backward(ctx, do):
        ctx.layer.count(*ctx.seen)
        losses = ctx.seen[2]
        return do, torch.full_like(losses, ctx.layer.loss_scale), None, None, None, None


def place(of: str, first_sample: int | None, draws: bool) -> int:
    """first_sample, 0 where it was not given and does not matter. Raises: ValueError where it does."""
    if first_sample is None and draws:
        raise ValueError(f"{of}: first_sample must be given while dropout or jitter draws, for their masks go by it, got none: every step "
                         "would have the same ones; pass the number of the batch's first sample, step * batch size, or call eval()")
    return first_sample or 0


class MoELayer(Described):
    """A mixture of experts in place of an MLP: [S(/t), B, D] -> [S(/t), B, D].

    Args:
        hidden_size, ffn_size of one expert, num_experts, options. mesh: its tp and ep axes. sequence_parallel: x is this rank's part.
        shared: an MLP that every token goes through, added; shared_gate: times sigmoid(x @ gate). seed: of the router's noise.
    Forward: x, and first_sample, the place of x's first sample in the global order: noise, global_aux_loss and replay go by it.
    loss_scale: of the balancing losses in the backward, 1 / micro-batches of a step.
    Raises: ValueError where num_experts does not divide over ep or the options do not fit it; in a forward, where the sequence does not
      divide over tp.
    """

    exact = ("losses",)
    tokens_per_expert: Tensor                                         # what the layer saw: see Statistics
    dropped: Tensor
    losses: Tensor
    step_load: Tensor                                                 # [E] tokens of the step's micro-batches so far, on all ranks

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, options: RouterOptions, mesh: Mesh | None = None, *,
                 sequence_parallel: bool = False, shared: nn.Module | None = None, shared_gate: bool = False,
                 activation: str = "swiglu", init_std: float = 0.02, output_std: float = 0.02, dtype: torch.dtype | None = None,
                 seed: int = 0):
        super().__init__()
        if not 1 <= options.topk <= num_experts:
            raise ValueError(f"MoELayer: topk must be in [1, {num_experts}], the number of experts, got {options.topk}")
        if shared_gate and shared is None:
            raise ValueError("MoELayer: shared_gate needs a shared expert to weigh, got shared=None; give one")
        mesh = mesh or Mesh()
        self.tp, self.dp, self.ep, self.options, self.num_experts = mesh.tp, mesh.dp, mesh.ep, options, num_experts
        self.loss_scale, self.seed = 1.0, seed
        self.balancing = balancing(options.load_balancing, options.aux_loss_coeff)
        self.in_flight: weakref.WeakValueDictionary[int, _Flight] = weakref.WeakValueDictionary()     # by first_sample
        self.record: dict[int, Tensor] | None = None                  # of record_routing
        self.replay: dict[int, Tensor] | None = None
        self.split = mesh.tp.size > 1 and not sequence_parallel       # every tp rank has all tokens: each takes a part
        self.gate = TopKRouter(hidden_size, num_experts, options, tp=mesh.tp, partial=mesh.tp.size > 1, init_std=init_std, dtype=dtype)
        self.experts = Experts(hidden_size, ffn_size, num_experts, ep=mesh.ep, activation=activation, init_std=init_std,
                               output_std=output_std, dtype=dtype)
        self.shared_expert = shared
        self.shared_expert_gate: nn.Linear | None = None
        if shared is not None and shared_gate:
            self.shared_expert_gate = _SharedGate(hidden_size, 1, bias=False, dtype=dtype)
            gate: Any = self.shared_expert_gate.weight
            set_pieces(gate, replicated((1, hidden_size), mesh.tp, sequence_parallel), std=init_std)
        for name, size, kind in (("tokens_per_expert", num_experts, torch.int64), ("losses", 2, torch.float64),
                                 ("dropped", 1, torch.int64), ("step_load", num_experts, torch.int64)):
            self.register_buffer(name, torch.zeros(size, dtype=kind), persistent=False)
        init_parameters(self)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"in_flight": None}           # lives with this process's graphs, and cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"in_flight": weakref.WeakValueDictionary()})

    def forward(self, x: Tensor, first_sample: int | None = None) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"MoELayer: x must be [S, B, D], got {list(x.shape)}; of tokens [T, D] take x.unsqueeze(1)")
        first_sample = place("MoELayer", first_sample, self.training and bool(self.options.input_jitter_eps))
        mine = scatter_to(x, self.tp) if self.split else x
        o = self.routed(mine, first_sample)
        if self.split:
            o = stack_from(o, self.tp).flatten(0, 1)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            o = o + (shared if self.shared_expert_gate is None else shared * torch.sigmoid(self.shared_expert_gate(x)))
        return o

    def routed(self, x: Tensor, first_sample: int = 0) -> Tensor:
        """This rank's tokens [S/t, B, D] through their experts."""
        (S, B, D), t = x.shape, self.tp.size
        flat, flight = x.reshape(-1, D), self._flight(first_sample)
        routing = self.gate(self._noisy(x, first_sample).reshape(-1, D), max(B, 1), self._given(S, B, first_sample, flight))
        self._note(routing.ids, S, B, first_sample, flight)
        capacity = None
        if self.options.capacity_factor is not None:
            capacity = math.ceil(S * B * t * self.options.topk / self.num_experts * self.options.capacity_factor)
        ids = self._within_capacity(routing, capacity)
        e = self.experts
        if self.ep.size == 1:
            plan = route_plan(ids, self.num_experts, capacity=capacity)
            o = expert_mlp(flat, e.up.weight, e.down.weight, plan, routing.probs, activation=e.activation)
        else:
            far = dispatch_plan(ids, self.num_experts, self.ep.group, max_tokens=S * B, max_rows=self._static_rows(S * B, capacity))
            rows = dispatch(lowered(flat), far)
            y = expert_mlp(rows, e.up.weight, e.down.weight, far.offsets, far.probs(routing.probs), activation=e.activation)
            o = combine(y, far)
        if torch.is_grad_enabled():
            losses = self.balancing_losses(routing, S * t, B, flight)
            dropped = (routing.ids >= 0).sum() - (ids >= 0).sum()
            o = _WithLosses.apply(o, losses, self, routing.counts, dropped, flight)
        return o.view(S, B, D)

    def _flight(self, first_sample: int) -> _Flight:
        """Empty, but in the recompute of a micro-batch what its first forward left."""
        left = self.in_flight.get(first_sample) if self._keeps and torch._C._current_graph_task_id() != -1 else None   # in a backward
        flight = left or _Flight()
        self.in_flight[first_sample] = flight
        return flight

    @property
    def _keeps(self) -> bool:
        return self.options.enable_routing_replay or "global_aux_loss" in self.balancing

    def _noisy(self, x: Tensor, first_sample: int) -> Tensor:
        """x [S/t, B, D] as the router sees it: the noise is that of each element's place in the global [samples, S, D]."""
        eps, (S, _B, D), t = self.options.input_jitter_eps, x.shape, self.tp.size
        if eps is None or not self.training:
            return x
        return jitter(x, eps, self.seed, base=(first_sample * t + self.tp.rank) * S * D, strides=(D, S * t * D, 1))

    def _given(self, S: int, B: int, first_sample: int, flight: _Flight) -> Tensor | None:
        """Choices [T, K] that are not the router's own."""
        K, t = self.options.topk, self.tp.size
        if flight.ids is not None:
            return flight.ids
        if self.replay is not None:
            if first_sample not in self.replay or self.replay[first_sample].shape != (S * t, B, K):
                got = {first: list(ids.shape) for first, ids in self.replay.items()}
                raise ValueError(f"MoELayer: routes must hold ids {[S * t, B, K]} of the micro-batch that starts at sample "
                                 f"{first_sample}, got {got}")
            return self.replay[first_sample][self.tp.rank * S:][:S].reshape(-1, K)
        if self.options.force_load_balancing:
            return forced_balance(S * B * t, K, self.num_experts, self.gate.weight.device).chunk(t)[self.tp.rank]
        return None

    def _note(self, ids: Tensor, S: int, B: int, first_sample: int, flight: _Flight) -> None:
        if self.options.enable_routing_replay:
            first, flight.ids = flight.ids is None, ids
            if self.record is not None and first:
                every = all_gather(ids, self.tp.group) if self.tp.size > 1 else ids
                self.record[first_sample] = every.view(S * self.tp.size, B, ids.shape[1])

    def _within_capacity(self, routing: Routing, capacity: int | None) -> Tensor:
        """ids, -1 for what its expert has no room for. The micro-batch decides as a whole: the tokens of all tp ranks."""
        ids = routing.ids
        if capacity is None:
            return ids
        every, probs = (ids, routing.probs.detach()) if self.tp.size == 1 else (
            all_gather(ids, self.tp.group), all_gather(routing.probs.detach(), self.tp.group))
        plan = route_plan(every, self.num_experts, capacity=capacity, drop=self.options.drop_policy, probs=probs)
        kept = plan.row_of_slot[self.tp.rank * ids.shape[0]:][:ids.shape[0]] >= 0
        return torch.where(kept, ids, -1)

    def _static_rows(self, tokens: int, capacity: int | None) -> int | None:
        """Rows that this rank's experts can get at most from the ep ranks: `capacity` for each micro-batch that these hold parts of."""
        if not self.options.pad_expert_input_to_capacity or capacity is None:
            return None
        micro = len({rank // self.tp.size for rank in self.ep.ranks})  # tp ranks are neighbours
        return min(self.num_experts // self.ep.size * capacity * micro, self.ep.size * tokens * self.options.topk)

    def balancing_losses(self, routing: Routing, sequence: int, samples: int, flight: _Flight) -> Tensor:
        """[2] this rank's part of the load-balancing losses and of the z-loss; over tp they add up to the micro-batch's."""
        o, counts = self.options, routing.counts
        aux = z = routing.lse.new_zeros(())
        if self.balancing and self.tp.size > 1:
            counts = all_reduce(counts, self.tp.group)
        for kind, coeff in self.balancing.items():
            each, of = kind == "seq_aux_loss", counts
            if kind == "global_aux_loss":
                flight.load = self._load(counts) if flight.load is None else flight.load
                of = flight.load.view(1, -1)
            aux = aux + aux_loss(routing.score_sums, of, o.topk, coeff, per_sequence=each, tokens=sequence if each else sequence * samples)
        if o.z_loss_coeff:
            z = z_loss(routing.lse, o.z_loss_coeff, tokens=sequence * samples)
        return torch.stack([aux, z])

    def _load(self, counts: Tensor) -> Tensor:
        """int64 [E] the load of the step's micro-batches up to this one. dp ranks compute neighbours at the same time."""
        mine = counts.sum(0, keepdim=True)                            # [1, E]
        every = all_gather(mine, self.dp.group) if self.dp.size > 1 else mine
        load = self.step_load + every[:self.dp.rank + 1].sum(0)
        self.step_load += every.sum(0)
        return load

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
        for seen in (m.tokens_per_expert, m.dropped, m.losses, m.step_load):
            seen.zero_()
    return {name: Statistics(row[:-3].long(), row[-3].long(), row[-2:] / mesh.dp.size) for name, row in zip(found, flat)}


@torch.no_grad()
def update_expert_biases(model: nn.Module, seen: dict[str, Statistics], rate: float) -> None:
    """After a step: move the bias of every router that has one towards an even load, by what all ranks saw in it."""
    for name, m in model.named_modules():
        if isinstance(m, MoELayer) and m.gate.expert_bias is not None:
            update_expert_bias(m.gate.expert_bias, seen[name].tokens, rate)


# ---- replay ---------------------------------------------------------------------------------------------------


def _replayable(model: nn.Module) -> dict[str, MoELayer]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, MoELayer) and m.options.enable_routing_replay}
    if not found:
        raise ValueError("routing replay: the model must have layers with enable_routing_replay, got none; "
                         "set model.moe_enable_routing_replay=true")
    return found


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, dict[int, Tensor]]]:
    """Within it the layers note the choices of each micro-batch: {layer's name: {first_sample: ids int32 [S, B, K]}}, -1 for none.

    They are those of whole sequences, on every tp rank, so any layout can replay them; with dp and pp each rank notes what it sees.
    Raises: ValueError where no layer has enable_routing_replay."""
    layers = _replayable(model)
    routes: dict[str, dict[int, Tensor]] = {name: {} for name in layers}
    for name, layer in layers.items():
        layer.record = routes[name]
    try:
        yield routes
    finally:
        for layer in layers.values():
            layer.record = None


@contextlib.contextmanager
def replay_routing(model: nn.Module, routes: dict[str, dict[int, Tensor]]) -> Iterator[None]:
    """Within it the layers take the choices of `record_routing`, or of another program in that form (a reinforcement learner's rollout);
    probs are those of the layer's own scores, so gradients flow as if it had chosen them. Layers that routes do not name choose.

    Raises: ValueError where no layer has enable_routing_replay, routes name none of them, a layer misses a micro-batch, or its shape is
    another."""
    layers = _replayable(model)
    if routes and not routes.keys() & layers.keys():
        raise ValueError(f"routing replay: routes must name layers of this model, such as {next(iter(layers))}, got "
                         f"{', '.join(list(routes)[:3])}; record and replay on the same module, not once on a wrapper of it")
    for name, layer in layers.items():
        layer.replay = routes.get(name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.replay = None
