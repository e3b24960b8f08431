"""Tensor parallelism inside modules that somebody else wrote: what is split and how, in place, and back.

    recognised                                              split
    q_proj, k_proj, v_proj, o_proj and a head_dim           whole heads a rank; fewer key / value heads than ranks: each on several
    gate_proj, up_proj, down_proj (or gate_up_proj)         features of the hidden layer
    the model's input embedding and output head             rows of the vocabulary, logits gathered
    a plan's linear layers and embeddings                   "column", "row", "gather" (column, output gathered), "vocab"

A module keeps its identity, name, hooks and Parameter objects: it is given the class of the parallel layer, and its parameters' data
become this rank's part. Everything else is whole on every rank and sees whole activations, so its gradients need no communication.
"""
from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.comm import all_gather
from ..parallel.errors import nearest, raise_problems
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import pieces_of, replicated, set_pieces
from ..parallel.tensor_parallel import (
    ColumnParallelLinear,
    GatheredLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    complete_gradient,
    copy_part,
)
from .replace_kernels import _close, gated_probe

STYLES: dict[str, tuple[type, Any]] = {"column": (nn.Linear, ColumnParallelLinear), "row": (nn.Linear, RowParallelLinear),
                                       "gather": (nn.Linear, GatheredLinear), "vocab": (nn.Embedding, VocabParallelEmbedding)}
MISSING = object()
Made = Callable[[nn.Module], nn.Module]


@dataclass
class Split:
    """How one module is changed: the layer made from it (None: attributes only), attributes, parameters whose gradients are parts."""
    style: str
    make: Made | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    original: type = nn.Module
    before: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    splits: dict[str, tuple[nn.Module, Split]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)                # name -> why it is whole on every rank
    partial: list[nn.Parameter] = field(default_factory=list)         # whole, but each rank's gradient is of its own heads
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, module: nn.Module, style: str, tp: Axis, **how: Any) -> None:
        self.splits[name] = module, Split(style, partial(STYLES[style][1].from_torch, tp=tp, **how))


def check_mesh(mesh: Mesh) -> list[str]:
    return [f"mesh.{a.name} must have size 1, got {a.size}; replace_ knows tensor parallelism, with data parallelism around it"
            for a in (mesh.pp, mesh.ep) if a.size > 1]


def make_plan(model: nn.Module, chosen: list[tuple[str, nn.Module]], mesh: Mesh, plan: str | Mapping[str, str] | None,
              strict: bool) -> Plan:
    """What to split, checked as a whole. Raises: ValueError with every problem."""
    out, tp = Plan(problems=check_mesh(mesh)), mesh.tp
    if isinstance(plan, Mapping):
        _by_user(out, chosen, plan, tp, strict)
    elif plan == "auto":
        if tp.size > 1:
            _by_structure(out, model, chosen, tp)
    elif plan is not None:
        out.problems.append(f"plan must be 'auto', None or {{pattern: style}}, got {plan!r}")
    if tp.size == 1:
        out.splits.clear()                                            # a layer of one rank is the layer it was
    for name, (m, _) in out.splits.items():
        if getattr(m, "parametrizations", None):
            out.problems.append(f"{name}: a parametrized layer cannot be split, got {type(m).__name__}; leave it out with skip")
    raise_problems("replace_", out.problems)
    return out


# ---- by the user's plan ------------------------------------------------------------------------------------------


def _by_user(out: Plan, chosen: list[tuple[str, nn.Module]], plan: Mapping[str, str], tp: Axis, strict: bool) -> None:
    unmatched = []
    for pattern, style in plan.items():
        if style not in STYLES:
            near = nearest(str(style), STYLES)
            out.problems.append(f"plan[{pattern!r}] must be one of {', '.join(STYLES)}, got {style!r}"
                                + (f"; did you mean {near!r}?" if near else ""))
            continue
        found = [(n, m) for n, m in chosen if fnmatch.fnmatchcase(n, pattern)]
        if not found:
            near = nearest(pattern, (n for n, _ in chosen))
            unmatched.append(f"the plan's {pattern!r} must match a module, got none" + (f"; the nearest name is {near!r}" if near else ""))
        for name, m in found:
            want, layer = STYLES[style]
            if type(m) is layer:
                continue                                              # replaced before
            if type(m) is not want:
                out.problems.append(f"{name}: style {style!r} needs {want.__name__}, got {type(m).__name__}; leave it out of the plan")
                continue
            features = {"column": "out_features", "row": "in_features"}.get(style)
            if features and getattr(m, features) % tp.size:
                out.problems.append(f"{name}: {features} must be divisible by tp={tp.size}, got {getattr(m, features)}; use another tp")
            elif style == "vocab" and _options(m):
                out.problems.append(f"{name}: {_options(m)}")
            else:
                out.add(name, m, style, tp)
    if unmatched and (strict or len(unmatched) == len(plan)):
        out.problems += unmatched
    out.notes += unmatched


def _options(m: Any) -> str:
    used = [o for o in ("padding_idx", "max_norm") if getattr(m, o) is not None]
    used += [o for o in ("scale_grad_by_freq", "sparse") if getattr(m, o)]
    return f"an embedding with {', '.join(used)} cannot be split" if used else ""


# ---- by structure ------------------------------------------------------------------------------------------------


def _by_structure(out: Plan, model: Any, chosen: list[tuple[str, nn.Module]], tp: Axis) -> None:
    for name, m in chosen:
        children = dict(m.named_children())
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(children) or "qkv_proj" in children or "c_attn" in children:
            why = _attention(out, name, m, children, tp)
        elif "down_proj" in children:
            why = _mlp(out, name, m, children, tp)
        elif isinstance(getattr(m, "down_proj", None), nn.Parameter):
            why = "experts are whole on every rank: expert parallelism is not built in here yet"
        elif "c_fc" in children:
            why = "its layers are no nn.Linear (Conv1D): whole on every rank"
        else:
            continue
        if why:
            out.left[name] = why
    _vocabulary(out, model, {id(m): n for n, m in chosen}, tp)


def _attention(out: Plan, name: str, m: Any, children: dict[str, nn.Module], tp: Axis) -> str:
    """Add an attention block to the plan, or say why it stays whole."""
    four: list[Any] = [children.get(n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if any(type(c) is ColumnParallelLinear for c in four):
        return ""
    if any(type(c) is not nn.Linear for c in four):
        return "query, key, value and output are no four nn.Linear: whole on every rank"
    q, k, v, o = four
    dh = getattr(m, "head_dim", 0)
    if not isinstance(dh, int) or dh < 1 or any(c.out_features % dh for c in (q, k, v)) or o.in_features != q.out_features:
        return "its head_dim does not fit its projections: whole on every rank"
    norms = [c for n, c in children.items() if n not in ("q_proj", "k_proj", "v_proj", "o_proj")]
    weights = [p for c in norms for p in c.parameters()]
    if any(p.shape != (dh,) for p in weights):
        return "a norm over all heads cannot be computed from some of them: whole on every rank"
    if list(m.parameters(recurse=False)) or list(m.buffers()):
        return "parameters of its own, such as attention sinks, belong to heads: whole on every rank"
    heads, kv = q.out_features // dh, k.out_features // dh
    if v.out_features != k.out_features or heads % kv:
        return "its key and value heads do not fit: whole on every rank"
    legal = [t for t in range(1, heads + 1) if heads % t == 0 and (kv % t == 0 or t % kv == 0)]
    if tp.size not in legal:
        out.problems.append(f"{name}: {heads} heads over {kv} key / value heads cannot be split over tp={tp.size}, got one that does not "
                            f"divide; use tp in {legal}")
        return ""
    out.add(f"{name}.q_proj", q, "column", tp, parts={"": (q.out_features, heads)})
    for n, c in (("k_proj", k), ("v_proj", v)):
        out.add(f"{name}.{n}", c, "column", tp, parts={"": (c.out_features, kv)})
    out.add(f"{name}.o_proj", o, "row", tp)
    out.partial += weights
    mine, mine_kv = heads // tp.size, max(1, kv // tp.size)
    new = {"num_key_value_groups": mine // mine_kv, "num_heads": mine, "num_attention_heads": mine, "num_key_value_heads": mine_kv}
    out.splits[name] = m, Split("heads", attributes={a: n for a, n in new.items() if a in vars(m)})
    if getattr(m, "attention_dropout", 0):
        out.notes.append(f"{name}: its dropout in training draws other masks than on one rank")
    return ""


def _mlp(out: Plan, name: str, m: Any, children: dict[str, nn.Module], tp: Axis) -> str:
    found = gated_probe(m)
    if found is None or isinstance(found, str):
        return found or "its layers have other names than gate_proj, up_proj, down_proj: whole on every rank"
    named = [n for n in ("gate_proj", "up_proj", "gate_up_proj") if n in children]
    if any(type(children[n]) is ColumnParallelLinear for n in named):
        return ""
    if any(type(children[n]) is not nn.Linear for n in (*named, "down_proj")):
        return "its layers are no nn.Linear: whole on every rank"
    probe, x, gate, up = found
    act = next((a for n in ("act_fn", "activation_fn", "act", "activation") if callable(a := getattr(m, n, None))), nn.functional.silu)
    with torch.no_grad():
        try:
            same = _close(type(m).forward(probe, x), probe.down_proj(act(gate) * up))
            same = same and _close(act(gate)[..., :5], act(gate[..., :5]))   # elementwise
        except Exception:
            same = False
    if not same:
        return "its forward is not down(act(gate(x)) * up(x)) on a probe: whole on every rank"
    width = m.down_proj.in_features
    if width % tp.size:
        out.problems.append(f"{name}: its features must be divisible by tp={tp.size}, got {width}; use another tp")
        return ""
    for n in named:
        c: Any = children[n]
        out.add(f"{name}.{n}", c, "column", tp, parts={"gate": (width, width), "up": (width, width)} if n == "gate_up_proj" else None)
    out.add(f"{name}.down_proj", m.down_proj, "row", tp)
    return ""


def _vocabulary(out: Plan, model: Any, names: dict[int, str], tp: Axis) -> None:
    """The input embedding and the output head, as transformers' models name them."""
    found: list[Any] = [getattr(model, f"get_{w}_embeddings", lambda: None)() for w in ("input", "output")]
    embed, head = found
    whole = False                                                     # tied to a table that is not split
    if id(embed) in names and not isinstance(embed, VocabParallelEmbedding):
        name = names[id(embed)]
        if type(embed) is not nn.Embedding or _options(embed):
            whole = head is not None and head.weight is embed.weight
            out.left[name] = (_options(embed) if type(embed) is nn.Embedding else "it is no plain nn.Embedding") + ": whole on every rank"
        else:
            out.add(name, embed, "vocab", tp)
    if id(head) in names and not isinstance(head, GatheredLinear):
        tied = embed is not None and head.weight is embed.weight
        if type(head) is not nn.Linear or whole or (tied and id(embed) not in names):
            out.left[names[id(head)]] = "tied to a table that is whole on every rank, or no nn.Linear"
        else:
            out.add(names[id(head)], head, "gather", tp)


# ---- in place, and back ------------------------------------------------------------------------------------------


def split_all(model: Any, splits: list[tuple[Any, Split]], partial_: list[nn.Parameter], tp: Axis) -> None:
    """Make every layer first, since tied parameters are read twice; then put them in place."""
    layers = [how.make(module) if how.make is not None else None for module, how in splits]
    for (module, how), layer in zip(splits, layers):
        _split(module, how, layer, tp)
    names = {n for n, p in model.named_parameters() if not hasattr(p, "pieces") and p.dim()}
    for name, p in model.named_parameters():
        if name in names:                                             # for grad_norm and checkpoints: whole on every rank
            set_pieces(p, replicated(tuple(p.shape), tp, any(p is q for q in partial_)))
            complete_gradient(p, tp)
    model._interlace_whole = getattr(model, "_interlace_whole", set()) | names
    model._interlace_tp = tp


@torch.no_grad()
def _split(module: Any, how: Split, layer: nn.Module | None, tp: Axis) -> None:
    """Give a module the class, the attributes and the parameters of its part."""
    how.original, new = type(module), dict(how.attributes)
    if layer is not None:
        new |= {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training"}
        for name, p in module.named_parameters(recurse=False):
            if hasattr(p, "pieces"):                                  # tied: split already
                continue
            mine: Any = getattr(layer, name)
            grad, p.grad = p.grad, None
            _swap(p, mine.data)
            if grad is not None:
                p.grad = torch.zeros_like(mine)
                copy_part(mine.pieces, grad, p.grad)
            set_pieces(p, *(mine.completed[1] if hasattr(mine, "completed") else mine.pieces))
            complete_gradient(p, tp)
        module.__class__ = type(layer)
    how.before = {k: vars(module).get(k, MISSING) for k in new}
    vars(module).update(new)
    module._interlace_split = how


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
    for p in module.parameters(recurse=False):
        if how.make is not None and hasattr(p, "pieces"):
            full, grad = gather(p, p.data, tp), None if p.grad is None else gather(p, p.grad, tp)
            p.grad = None
            _swap(p, full)
            p.grad = grad
            _forget(p)
    module.__class__ = how.original
    for k, v in how.before.items():
        if v is MISSING:
            del vars(module)[k]
        else:
            vars(module)[k] = v
    del module._interlace_split


def gather(param: Tensor, local: Tensor, tp: Axis) -> Tensor:
    """The whole tensor of which `local` is this rank's part, as the pieces of `param` say: bits are copied, nothing is added."""
    parts = []
    for piece in pieces_of(param):
        d = piece.dim
        if piece.length == piece.shape[d] and piece.copies == tp.size:
            parts.append(piece.local(local))
            continue
        rows = local.shape[d] if len(pieces_of(param)) == 1 else piece.length      # with padding, if any
        mine = local.narrow(d, piece.at, rows).movedim(d, 0).contiguous()
        every = all_gather(mine, tp.group).view(tp.size, *mine.shape)[::piece.copies].flatten(0, 1)
        parts.append(every[:piece.shape[d]].movedim(0, d))
    return torch.cat(parts, pieces_of(param)[0].dim).contiguous()


def _swap(p: nn.Parameter, data: Tensor) -> None:
    """p.data = data. By way of another dtype: only that makes autograd forget the shape, which a graph still alive keeps."""
    p.data = torch.empty(0, dtype=torch.float16 if p.dtype != torch.float16 else torch.float32, device=p.device)
    p.data = data


def _forget(p: Any) -> None:
    for name in ("pieces", "init_std", "init_fill"):
        if hasattr(p, name):
            delattr(p, name)
    if hasattr(p, "completed"):
        p.completed[0].remove()
        del p.completed
