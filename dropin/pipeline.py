"""Pipeline parallelism of a foreign decoder: its list of layers is cut into stages, one or several (virtual stages: stage s on rank
s % p) a rank of pp, and everything else is on all.

    embedding -> h [B, S, D], equal on all ranks                       backward: dh is broadcast from the first stage
    layers of stage 0 -> send | recv -> layers of stage 1 -> send | recv -> ...     micro-batch by micro-batch, GPipe's order
    last stage -> broadcast -> norm, head, loss, equal on all ranks    backward: the last stage's gradient goes on

The model's own loop calls the layers: those of other stages hand h on, those of this one note their arguments, and the last of them
runs all, a micro-batch after the other, while the next stage works on the one before. Autograd walks the same way back. Layers of other
stages hold no weights. The bubble is (p - 1) / (m + p - 1) of a step, with m = min(B, 4 p) micro-batches. 1F1B, which begins backwards
before all forwards are done, is pipeline_step: scheduled.py. With several stages a rank the model's own call runs one micro-batch through
all stages after the other: right, but without overlap; pipeline_step interleaves them.
"""
from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.comm import heap_of
from ..kernels.dispatch import once
from ..parallel.mesh import Axis
from .split import Plan, Split, _in_front, _swap, refuse_records
from .structure import ATTENTION

__all__ = ["EndOfStage", "Passing", "Stages", "cut_stages", "of_stage", "plan_stages", "rows", "stage_gradients", "whole_stages"]


@dataclass
class Passing:
    """One micro-batch on its way through a stage of this rank. arrived: what the stage before sent, None on the first."""
    arrived: Tensor | None
    stage: int = 0
    probe: bool = False                                               # end before the first layer, with what enters it


class EndOfStage(Exception):
    """A model's forward ends here, on a rank that has no more layers: its argument is what goes to the next stage."""


@dataclass
class Stages:
    """The cut of one model. stage: of each layer, which rank stage % pp holds; calls: stage -> (layer, args, kwargs) of this rank's
    layers in the forward that runs."""
    pp: Axis
    layers: nn.ModuleList
    stage: list[int]
    calls: dict[int, list[tuple[Any, tuple, dict[str, Any]]]] = field(default_factory=dict)
    away: dict[Any, tuple[torch.Size, bool]] = field(default_factory=dict)   # parameters of other stages: shape, requires_grad
    places: dict[Any, int] = field(default_factory=dict)              # parameter of a layer -> that layer
    passing: Passing | None = None                                    # of the micro-batch that scheduled.py runs
    pipelines: dict[Any, Any] = field(default_factory=dict)           # its schedules, by the shapes of a batch

    @property
    def owner(self) -> list[int]:
        """The rank of each layer."""
        return [s % self.pp.size for s in self.stage]

    @property
    def mine(self) -> list[list[nn.Module]]:
        """The layers of each of this rank's stages."""
        return [[layer for layer, s in zip(self.layers, self.stage) if s == n] for n in range(self.pp.rank, self.count, self.pp.size)]

    @property
    def count(self) -> int:
        return self.stage[-1] + 1


def _broadcast(x: Tensor, stage: int, pp: Axis) -> Tensor:
    """x of one stage on all: sends, since torch counts sends and collectives of a group as one sequence when it checks them."""
    x = x.contiguous()
    for r, rank in enumerate(pp.ranks):
        if r != stage and pp.rank == stage:
            dist.send(x, rank, group=pp.group)
        elif r == pp.rank and r != stage:
            dist.recv(x, pp.ranks[stage], group=pp.group)
    return x


# ---- autograd ----------------------------------------------------------------------------------------------------


class _Enter(torch.autograd.Function):
    """h -> h; every rank gets the gradient that the first stage has."""

    @staticmethod
    def forward(ctx, h, pp):
        ctx.pp = pp
        return h.view_as(h)

    @staticmethod
    @once("pipeline")
    def backward(ctx, dh):
        return _broadcast(dh, 0, ctx.pp), None


class _Receive(torch.autograd.Function):
    """The previous stage's output, shaped like h, which it stands for in the graph."""

    @staticmethod
    def forward(ctx, h, pp):
        ctx.pp, x = pp, torch.empty_like(h, memory_format=torch.contiguous_format)
        dist.recv(x, pp.ranks[pp.rank - 1], group=pp.group)
        return x

    @staticmethod
    @once("pipeline")
    def backward(ctx, dx):
        dist.send(dx.contiguous(), ctx.pp.ranks[ctx.pp.rank - 1], group=ctx.pp.group)
        return torch.zeros_like(dx), None


class _Send(torch.autograd.Function):
    """y -> the next stage. What it returns stands for y in the graph: [1]."""

    @staticmethod
    def forward(ctx, y, pp):
        ctx.pp, ctx.shape = pp, y.shape
        dist.send(y.contiguous(), pp.ranks[(pp.rank + 1) % pp.size], group=pp.group)
        return y.new_zeros(1)

    @staticmethod
    @once("pipeline")
    def backward(ctx, token):
        dy = token.new_empty(ctx.shape)
        dist.recv(dy, ctx.pp.ranks[(ctx.pp.rank + 1) % ctx.pp.size], group=ctx.pp.group)
        return dy, None


class _Leave(torch.autograd.Function):
    """The last stage's output on every rank. out: that output there; tokens: of `_Send`."""

    @staticmethod
    def forward(ctx, shape, pp, out, *tokens):
        ctx.last, ctx.tokens = out is not None, len(tokens)
        return _broadcast(tokens[0].new_empty(shape) if out is None else out, pp.size - 1, pp)

    @staticmethod
    @once("pipeline")
    def backward(ctx, dy):
        return None, None, dy if ctx.last else None, *(dy.new_zeros(1) for _ in range(ctx.tokens))


# ---- layers ------------------------------------------------------------------------------------------------------


class StagedLayer:
    """A decoder layer of a model whose layers stand on several ranks."""

    _interlace_stages: Stages
    _interlace_place: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        held, i = self._interlace_stages, self._interlace_place
        _check_call(self, args, kwargs)
        if held.passing is not None:
            return self._pass(hidden_states, held.passing, *args, **kwargs)
        if i == 0:
            held.calls.clear()
            if torch.is_grad_enabled() and not hidden_states.requires_grad:   # frozen embeddings: later stages still have gradients
                hidden_states = hidden_states.detach().requires_grad_()
            hidden_states = _Enter.apply(hidden_states, held.pp)
        if held.owner[i] == held.pp.rank:
            held.calls.setdefault(held.stage[i], []).append((super(), args, kwargs))
        if i + 1 < len(held.stage):
            return hidden_states
        calls, held.calls = held.calls, {}
        return _run(calls, held.count - 1, hidden_states, held.pp)

    def _pass(self, h: Tensor, on: Passing, *args: Any, **kwargs: Any) -> Tensor:
        """This layer for the one micro-batch that is on its way."""
        stage, i = self._interlace_stages.stage, self._interlace_place
        if on.probe:
            raise EndOfStage(h)
        if stage[i] != on.stage:
            return h
        if i == 0 or stage[i - 1] != on.stage:
            h = on.arrived if on.arrived is not None else h if h.requires_grad else h.detach().requires_grad_()
        out = super().forward(h, *args, **kwargs)                     # type: ignore[misc]
        h = out[0] if isinstance(out, tuple) else out
        if i + 1 < len(stage) and stage[i + 1] != on.stage:
            raise EndOfStage(h)
        return h


def _run(calls: dict[int, list[tuple[Any, tuple, dict[str, Any]]]], last: int, h: Tensor, pp: Axis) -> Tensor:
    """This rank's stages over every micro-batch, then the last stage's result."""
    outs: list[Tensor] = []
    tokens: list[Tensor] = []
    at = 0
    for entered in h.chunk(min(len(h), 4 * pp.size)):
        part, at = slice(at, at + len(entered)), at + len(entered)
        for stage, layers in calls.items():
            x = entered if stage == 0 else _Receive.apply(entered, pp)
            for layer, args, kwargs in layers:
                out = layer.forward(x, *rows(args, part, len(h)), **rows(kwargs, part, len(h)))
                x = out[0] if isinstance(out, tuple) else out
            (outs if stage == last else tokens).append(x if stage == last else _Send.apply(x, pp))
    return _Leave.apply(h.shape, pp, torch.cat(outs) if outs else None, *tokens)


def rows(value: Any, part: slice, batch: int) -> Any:
    """A micro-batch's part of an argument: rows of what has one for each sample."""
    if torch.is_tensor(value):
        return value[part] if value.dim() > 1 and value.shape[0] == batch and batch > 1 else value
    if isinstance(value, (tuple, list)):
        return type(value)(rows(v, part, batch) for v in value)
    return {k: rows(v, part, batch) for k, v in value.items()} if isinstance(value, dict) else value


def _check_call(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if any(hasattr(v, "get_seq_length") for v in (*args, *kwargs.values())):
        raise ValueError("pipeline stages: use_cache must be False, got a cache, of which every rank would fill its own layers' part; pass "
                         "use_cache=False, to generate() too (each token then runs the whole text), or call restore_ first")
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        raise ValueError("pipeline stages: gradient checkpointing must be off, got a layer that would send twice; disable it")


# ---- in place, and back ------------------------------------------------------------------------------------------


def plan_stages(out: Plan, model: nn.Module, chosen: list[tuple[str, nn.Module]], pp: Axis, chunks: int) -> None:
    """Find the list of decoder layers and cut it evenly into `chunks` stages a rank, or add to the plan's problems why not."""
    if any("_interlace_stages" in vars(m) for _, m in chosen):
        return                                                        # replaced before
    found = [(n, m) for n, m in chosen if isinstance(m, nn.ModuleList) and _is_decoder(m)]
    if len(found) != 1:
        out.problems.append(f"mesh.pp needs one list of decoder layers that return a tensor, got {len(found)}; use pp=1")
        return
    name, layers = found[0]
    stages = pp.size * chunks
    if len(layers) < stages:
        cut = f"pp={pp.size}" + (f" times vpp={chunks}" if chunks > 1 else "")
        out.problems.append(f"{name}: its {len(layers)} layers must be at least one for each of {cut} stages; use a smaller pp")
        return
    out.stages = Stages(pp, layers, [i * stages // len(layers) for i in range(len(layers))])
    decoder = name.rpartition(".")[0]
    out.splits[decoder] = model.get_submodule(decoder), Split("stages", watch=partial(refuse_records, "pipeline stages"))


def _is_decoder(m: nn.ModuleList) -> bool:
    """Layers of hidden states that hold attention, by their signature."""
    tensors = ("torch.Tensor", "torch.FloatTensor", "torch.FloatTensor'>")

    def fits(layer: nn.Module) -> bool:
        signature = inspect.signature(type(layer).forward)
        names = list(signature.parameters)
        returns = signature.return_annotation
        attention = any(ATTENTION & {n for n, _ in c.named_children()} for c in layer.modules())
        return len(names) > 1 and names[1] == "hidden_states" and attention and (returns is Tensor or str(returns).endswith(tensors))
    return len(m) > 0 and all(fits(layer) for layer in m)


@torch.no_grad()
def cut_stages(model: Any, stages: Stages) -> None:
    """Put the stages in place: other stages' layers lose their weights. The rest is on all ranks, with equal gradients."""
    inside = {id(p) for p in stages.layers.parameters()}
    if next(model.parameters()).device.type == "cpu" and stages.pp.group is not None:
        heap_of(stages.pp.group)                                      # made here, before sends: grad_norm sums over it
    for i, layer in enumerate(stages.layers):
        vars(layer).update(_interlace_stages=stages, _interlace_place=i)
        layer.__class__ = _in_front(StagedLayer, type(layer))         # type: ignore[arg-type]
        for p in layer.parameters() if stages.owner[i] != stages.pp.rank else ():
            if p.numel():
                stages.away[p], p.grad = (p.shape, p.requires_grad), None
                _swap(p, p.data.new_empty(0))
                p.requires_grad_(False)                               # neither an optimizer nor a reduction waits for it
    for p in model.parameters():
        if id(p) not in inside:
            p.stages = stages.pp.size                                 # for grad_norm: as many ranks hold it
    model._interlace_stages_of = stages


def of_stage(model: Any, p: Tensor) -> Tensor:
    """A parameter's data (this rank's part over tp) where another stage may hold it. Collective over pp for those of layers."""
    stages: Stages | None = getattr(model, "_interlace_stages_of", None)
    if stages is None:
        return p.data
    if not stages.places:
        stages.places.update({q: i for i, layer in enumerate(stages.layers) for q in layer.parameters()})
    if p not in stages.places:
        return p.data
    data = p.data.new_empty(stages.away[p][0]) if p in stages.away else p.data.clone()
    return _broadcast(data, stages.owner[stages.places[p]], stages.pp)


@torch.no_grad()
def stage_gradients(model: Any) -> dict[Any, Tensor]:
    """Gradients of the layers' parameters (this rank's part over tp), from their stages. Collective over pp."""
    stages, out = model._interlace_stages_of, {}
    for i, layer in enumerate(stages.layers):
        for p in layer.parameters():
            if _broadcast(torch.tensor(int(p.grad is not None), device=p.device), stages.owner[i], stages.pp):
                empty = p.data.new_empty(stages.away[p][0]) if p in stages.away else p.grad
                out[p] = _broadcast(empty, stages.owner[i], stages.pp)
    return out


@torch.no_grad()
def whole_stages(model: Any) -> Stages:
    """Undo cut_stages: weights and gradients come from their stages. Collective over pp."""
    stages, grads = model._interlace_stages_of, stage_gradients(model)
    for i, layer in enumerate(stages.layers):
        for p in layer.parameters():
            if p in stages.away:
                _swap(p, p.data.new_empty(stages.away[p][0]))
                p.requires_grad_(stages.away[p][1])
            p.data.copy_(_broadcast(p.data, stages.owner[i], stages.pp))
            p.grad = grads.get(p)
        layer.__class__ = type(layer).__bases__[1]
        del layer._interlace_stages, layer._interlace_place
    for p in model.parameters():
        if hasattr(p, "stages"):
            del p.stages
    stages.away.clear()
    stages.pipelines.clear()
    del model._interlace_stages_of
    return stages
