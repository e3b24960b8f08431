"""Parallel layers in place of modules that somebody else wrote, and back: how, not which.

A module keeps its identity, name, hooks and Parameter objects: it is given the class of the parallel layer, or a class in front of
its own, and its parameters' data become this rank's part. Everything else is whole on every rank and sees whole activations, so
that its gradients need no communication; where it does not (`Plan.partial`), its backward sums them.
"""
from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..kernels.comm import all_gather
from ..parallel.foreign import TransposedColumnLinear, TransposedRowLinear
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import Piece, complete_gradient, pieces_of, replicated, set_pieces
from ..parallel.tensor_parallel import (
    ColumnParallelLinear,
    GatheredLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_part,
)
from .fused import as_probe

__all__ = ["STYLES", "Plan", "Split", "alike", "check_mesh", "check_tied", "gather", "refuse_records", "split_all", "transposed",
           "whole_all"]

STYLES: dict[str, tuple[type, Any]] = {"column": (nn.Linear, ColumnParallelLinear), "row": (nn.Linear, RowParallelLinear),
                                       "gather": (nn.Linear, GatheredLinear), "vocab": (nn.Embedding, VocabParallelEmbedding)}
TRANSPOSED: dict[str, Any] = {"column": TransposedColumnLinear, "row": TransposedRowLinear}
MISSING = object()


@dataclass
class Split:
    """How one module is changed."""
    style: str
    layer: Any = None                                                 # the class of the parallel layer put in its place, or None
    make: Callable[[nn.Module], nn.Module] | None = None              # and how one is made of it
    attributes: dict[str, Any] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)   # its own parameters that are split, without a new layer
    complete: Callable[[Any], None] | None = None                     # what completes the gradients of `pieces`, and marks them
    wraps: tuple[type, ...] = ()                                      # classes put in front of the module's own
    watch: Callable[..., None] | None = None                          # called with what its forward gets: raises
    original: type = nn.Module
    before: dict[str, Any] = field(default_factory=dict)
    hook: Any = None

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """The copy's parameters would have neither the hooks that sum their gradients nor what tells their parts."""
        raise ValueError("copy.deepcopy: a model that replace_ split must not be copied, got one; restore_ it first, or build a second "
                         "model and replace_ that")


@dataclass
class Plan:
    splits: dict[str, tuple[nn.Module, Split]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)                # name -> why it is whole on every rank
    partial: list[nn.Parameter] = field(default_factory=list)         # whole, but each rank's gradient is of its own heads or tokens
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    proofs: dict[Any, tuple[dict | None, str]] = field(default_factory=dict)   # of attention blocks, one for all alike
    stages: Any = None                                                # of a pipeline: pipeline.py

    def add(self, name: str, module: nn.Module, style: str, tp: Axis, **how: Any) -> None:
        self.put(name, module, style, TRANSPOSED[style] if transposed(module) else STYLES[style][1], tp, **how)

    def put(self, name: str, module: nn.Module, style: str, layer: Any, tp: Axis, **how: Any) -> None:
        wraps = (Writable,) if style == "row" and getattr(module, "bias", None) is None else ()
        self.splits[name] = module, Split(style, layer, partial(layer.from_torch, tp=tp, **how), wraps=wraps)


class Writable:
    """Stands before a row layer without a bias, whose output may be written to like nn.Linear's: `out = mlp(x); out += attention(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)                                # type: ignore[misc]
        return y if torch.compiler.is_compiling() or not y.requires_grad else _Own.apply(y)


class _Own(torch.autograd.Function):
    """y -> y, no view of what another Function made: autograd refuses to write to one. The storage is the same."""

    @staticmethod
    def forward(ctx, y):
        return y.data

    @staticmethod
    def backward(ctx, dy):
        return dy


def alike(problems: list[str]) -> list[str]:
    """The same said of many layers, once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        name, colon, rest = problem.partition(": ")
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), colon + rest), []).append(problem)
    return [same[0] if len(same) == 1 else f"{name} ({len(same)} times){rest}" for (name, rest), same in groups.items()]


def check_mesh(mesh: Any) -> Mesh:
    if not isinstance(mesh, Mesh):
        raise ValueError(f"replace_: mesh must be an interlace.Mesh, got {type(mesh).__name__}; pass interlace.Mesh.build(interlace.Layout("
                         "world=..., tp=...)) on every rank")
    return mesh


def check_tied(out: Plan, model: nn.Module) -> None:
    """A Parameter of several modules has one part on a rank: all must be cut, and along one dim."""
    places: dict[Any, list[tuple[str, Any]]] = {}
    for name, m in model.named_modules():
        how = out.splits[name][1] if name in out.splits else None
        for n, p in m.named_parameters(recurse=False, remove_duplicate=False):
            split = how is not None and (how.make is not None or n in how.pieces)
            cut = (how.style == "row") != transposed(m) if split and how is not None and p.dim() > 1 else split
            places.setdefault(p, []).append((f"{name}: its {n}", cut if split else "whole"))
    for of in places.values():
        other = next((o for o in of if o[1] != of[0][1]), None)
        if other is not None:
            out.problems.append(f"{of[0][0]} must be cut in one way where it is tied, got one tied to {other[0].partition(':')[0]}, "
                                "which is not; leave both out with skip")


def transposed(m: Any) -> bool:
    """Whether a module computes x @ weight + bias, with weight [D_in, D_out]: by what it does, not by its name."""
    params = dict(m.named_parameters(recurse=False))
    if isinstance(m, nn.Linear) or set(params) != {"weight", "bias"} or list(m.children()):
        return False
    w, b = params["weight"], params["bias"]
    if w.dim() != 2 or b.shape != w.shape[1:] or "forward" in vars(m):
        return False
    if w.is_meta:
        m = as_probe(m)
        w, b = m.weight, m.bias
    with torch.no_grad():
        x = torch.randn(2, w.shape[0], generator=torch.Generator().manual_seed(6)).to(w)
        try:
            return bool(torch.allclose(type(m).forward(m, x), x @ w + b, rtol=1e-2, atol=1e-3))
        except Exception:
            return False


@functools.cache
def _in_front(kind: type, original: type) -> type:
    return type(f"{kind.__name__}{original.__name__}", (kind, original), {"__module__": original.__module__, "__doc__": kind.__doc__})


def refuse_records(what: str, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """A `watch`. What transformers records inside the layers is a part: a loss over it would be wrong, and nobody would know."""
    config = getattr(module, "config", None)
    for name in ("output_hidden_states", "output_router_logits"):
        given = kwargs.get(name)
        if given or (given is None and getattr(config, name, False)):
            raise ValueError(f"{what}: {name} must be unset, got {given or True}; the layers hold parts of what would be recorded: "
                             f"replace_ without {what} to record them")


# ---- in place ----------------------------------------------------------------------------------------------------


def split_all(model: Any, splits: list[tuple[Any, Split]], partial_: list[nn.Parameter], tp: Axis) -> None:
    """Make every layer first, since tied parameters are read twice, and anything that fails does so here; then put them in place."""
    made = [(how.make(module) if how.make is not None else None, {n: _part(getattr(module, n), cut) for n, cut in how.pieces.items()})
            for module, how in splits]
    for (module, how), (layer, parts) in zip(splits, made):
        _split(module, how, layer, parts, tp)
    names = {n for n, p in model.named_parameters() if not hasattr(p, "pieces") and p.dim()}
    for name, p in model.named_parameters():
        if name in names:                                             # for grad_norm and checkpoints: whole on every rank
            set_pieces(p, replicated(tuple(p.shape), tp, any(p is q for q in partial_)))
            complete_gradient(p, tp)
    model._interlace_whole = getattr(model, "_interlace_whole", set()) | names
    model._interlace_tp = tp


def _part(p: Any, pieces: tuple[Piece, ...]) -> Tensor:
    shape = list(p.shape)
    shape[pieces[0].dim] = sum(piece.length for piece in pieces)
    local = p.data.new_empty(shape)
    copy_part(pieces, p.data, local)
    return local


@torch.no_grad()
def _split(module: Any, how: Split, layer: nn.Module | None, parts: dict[str, Tensor], tp: Axis) -> None:
    """Give a module the class, the attributes and the parameters of its part."""
    how.original, new = type(module), dict(how.attributes)
    if layer is not None:
        new = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training"} | new
        for name, p in module.named_parameters(recurse=False):
            if not hasattr(p, "pieces"):                              # else it is tied, and split already
                mine: Any = getattr(layer, name)
                _cut(p, mine.data, mine.completed[1] if hasattr(mine, "completed") else mine.pieces)
                complete_gradient(p, tp)
        module.__class__ = type(layer)
    for name, pieces in how.pieces.items():
        p = getattr(module, name)
        _cut(p, parts[name], pieces)
        (how.complete or partial(complete_gradient, tp=tp))(p)
    for wrap in how.wraps:
        module.__class__ = _in_front(wrap, type(module))  # type: ignore[arg-type]
    if how.watch is not None:
        how.hook = module.register_forward_pre_hook(how.watch, with_kwargs=True)
    how.before = {k: vars(module).get(k, MISSING) for k in new}
    vars(module).update(new)
    module._interlace_split = how


def _cut(p: Any, local: Tensor, pieces: tuple[Piece, ...]) -> None:
    grad, p.grad = p.grad, None
    _swap(p, local)
    if grad is not None:
        p.grad = torch.zeros_like(local)
        copy_part(pieces, grad, p.grad)
    set_pieces(p, *pieces)


# ---- and back ----------------------------------------------------------------------------------------------------


def whole_all(model: Any) -> list[tuple[Any, Split]]:
    """Undo split_all: parameters and gradients are gathered. Collective over tp. Returns what to give to split_all again."""
    tp, splits = model._interlace_tp, []
    for module in model.modules():
        if "_interlace_split" in vars(module):
            splits.append((module, module._interlace_split))
            _whole(module, tp)
    for name, p in model.named_parameters():
        if name in model._interlace_whole:
            _forget(p)
    del model._interlace_tp, model._interlace_whole
    return splits


@torch.no_grad()
def _whole(module: Any, tp: Axis) -> None:
    how: Split = module._interlace_split
    for name, p in module.named_parameters(recurse=False):
        if (how.make is not None or name in how.pieces) and hasattr(p, "pieces"):
            full, grad = gather(p, p.data, tp), None if p.grad is None else gather(p, p.grad, tp)
            p.grad = None
            _swap(p, full)
            p.grad = grad
            _forget(p)
    module.__class__ = how.original
    if how.hook is not None:
        how.hook.remove()
    for k, v in how.before.items():
        if v is MISSING:
            del vars(module)[k]
        else:
            vars(module)[k] = v
    del module._interlace_split


def gather(param: Tensor, local: Tensor, tp: Axis) -> Tensor:
    """The whole tensor of which `local` is this rank's part, as the pieces of `param` say: bits are copied, nothing is added.
    Experts are gathered over the axis they are spread over, `param.axis`."""
    own: Axis | None = getattr(param, "axis", None)
    axis, parts = own or tp, []
    if not local.dim():                                               # one number, on every rank
        return local
    for piece in pieces_of(param):
        d, copies = piece.dim, 1 if own else piece.copies
        if piece.length == piece.shape[d] and copies == axis.size:
            parts.append(piece.local(local))
            continue
        rows = local.shape[d] if len(pieces_of(param)) == 1 else piece.length      # with padding, if any
        mine = local.narrow(d, piece.at, rows).movedim(d, 0).contiguous()
        every = all_gather(mine, axis.group).view(axis.size, *mine.shape)[::copies].flatten(0, 1)
        parts.append(every[:piece.shape[d]].movedim(0, d))
    return torch.cat(parts, pieces_of(param)[0].dim).contiguous()


def _swap(p: nn.Parameter, data: Tensor) -> None:
    """p.data = data. By way of another dtype: only that makes autograd forget the shape, which a graph still alive keeps."""
    p.data = torch.empty(0, dtype=torch.float16 if p.dtype != torch.float16 else torch.float32, device=p.device)
    p.data = data


def _forget(p: Any) -> None:
    for name in ("pieces", "init_std", "init_fill", "axis", "expert"):
        if hasattr(p, name):
            delattr(p, name)
    if hasattr(p, "completed"):
        p.completed[0].remove()
        del p.completed
