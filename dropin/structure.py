"""Attention, gated and plain feed-forward layers, embedding and head of a foreign model, found by their children and attributes.

    attention                               column, in whole heads                          row       whole on every rank
    q_proj, k_proj, v_proj, o_proj          q, k, v                                         o_proj    norms of one head
      (or dense, or out_proj)
    qkv_proj = [q | k | v], o_proj          each of the three                               o_proj
    c_attn = [q | k | v] (Conv1D), c_proj   each of the three                               c_proj
    query_key_value, dense                  each of the three, or (as c_attn may be) q, k   dense
                                            and v of a head side by side: whichever adds up
    q_proj or q_b_proj, kv_b_proj, o_proj   q, kv_b (latent attention)                      o_proj    q_a, kv_a and their norms

A rank's heads, run apart on a probe, must add up to the whole: heads.py.

A norm over all query or key heads is split with them and sums its squares over tp; a parameter with one number a head (sinks) is cut.
"""
from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..parallel.foreign import SharedTail, SplitRMSNorm
from ..parallel.mesh import Axis
from ..parallel.sharding import Piece, split
from .fused import Change, RMSNorm, _close, as_probe, gated_probe, recognise
from .heads import LocalConfig, OwnHeads, adds_up, is_linear
from .split import Plan, Split, transposed

__all__ = ["ATTENTION", "FORWARD", "split_attention", "split_mlp", "split_vocabulary", "table_options"]

WHOLE = ": whole on every rank"
PLAIN = (("c_fc", "c_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc_in", "fc_out"))   # no gate
FUSED = (("qkv_proj", "o_proj"), ("c_attn", "c_proj"), ("query_key_value", "dense"))
ATTENTION = {"q_proj", "q_b_proj", *(n for n, _ in FUSED)}            # children that tell an attention block
FORWARD = {"down_proj", "c_fc", "fc2", "dense_4h_to_h", "fc_out"}     # and a feed-forward one


@dataclass
class Heads:
    """The projections of an attention block. columns: child -> {part: (features, heads)}; width: of the output of all heads."""
    heads: int
    kv: int
    columns: dict[str, dict[str, tuple[int, int]]]
    row: str
    width: int
    tail: dict[str, int] = field(default_factory=dict)                # child -> its last outputs, which all heads read
    whole: tuple[str, ...] = ()                                       # children before the heads
    grouped: bool = False                                             # q, k and v of a head side by side: no key / value head twice
    widths: bool = False                                              # its forward reads the width of all heads: a rank's there too


def split_attention(out: Plan, name: str, m: Any, children: dict[str, Any], tp: Axis) -> str:
    """Add an attention block to the plan, or say why it stays whole."""
    found = next((h for look in (_four, _fused, _latent) if (h := look(m, children)) is not None), None)
    if found is None:
        return "its projections are none of those known" + WHOLE
    if isinstance(found, str):
        return found + WHOLE
    norms, why = _norms(m, children, found)
    if why:
        return why + WHOLE
    heads, kv = found.heads, found.kv
    if any(p.shape != (heads,) for p in m.parameters(recurse=False)):
        return "it has parameters of its own that are not one number a head" + WHOLE
    legal = [t for t in range(1, heads + 1) if heads % t == 0 and (kv % t == 0 or t % kv == 0)]
    if tp.size not in legal:
        out.problems.append(f"{name}: {heads} heads over {kv} key / value heads cannot be split over tp={tp.size}, got one that does not "
                            f"divide; use tp in {legal}")
        return ""
    proven, why = _proven(out, m, children, found, [n for n, (_, change) in norms.items() if change is not None], tp)
    if proven is None:
        return why + WHOLE
    found = proven
    for n, parts in found.columns.items():
        out.add(f"{name}.{n}", children[n], "column", tp, parts=parts)
    out.add(f"{name}.{found.row}", children[found.row], "row", tp)
    for n, tail in found.tail.items():
        out.put(f"{name}.{n}", children[n], "tail", SharedTail, tp, tail=tail)
    for n, (number, change) in norms.items():
        if change is None:
            out.partial += list(children[n].parameters())
        else:
            out.put(f"{name}.{n}", children[n], "heads", SplitRMSNorm, tp, heads=number, eps=change.eps, offset=change.offset)
    own: dict[str, tuple[Piece, ...]] = {n: (split("", tuple(p.shape), 0, tp),) for n, p in m.named_parameters(recurse=False)}
    attributes = _local_numbers(m, found, tp)
    wraps: tuple[type, ...] = ()
    if "alibi" in inspect.signature(type(m).forward).parameters:
        attributes["_interlace_heads"], wraps = (heads, tp.rank * heads // tp.size, heads // tp.size), (OwnHeads,)
    out.splits[name] = m, Split("heads", attributes=attributes, pieces=own, wraps=wraps)
    if any(getattr(d, "p", d) for d in (getattr(m, n, 0) for n in ("attention_dropout", "attn_dropout"))):
        out.notes.append(f"{name}: its dropout in training draws other masks than on one rank")
    return ""


def _proven(out: Plan, m: Any, children: dict[str, Any], found: Heads, norms: Collection[str], tp: Axis) -> tuple[Heads | None, str]:
    """`found` as its parts add up on a probe, or why not. Where none runs (a flash kernel, say), four plain projections are believed."""
    one, fused = next(iter(found.columns)), len(found.columns) == 1
    grouped: dict[str, dict[str, tuple[int, int]]] = {one: {"": (sum(f for f, _ in found.columns[one].values()), found.kv)}}
    ways = [{}, {"columns": grouped, "grouped": True}] if fused and found.kv % tp.size == 0 else [{}]
    key = type(m), tp.size, found.heads, found.kv, found.width, *(v for v in vars(m).values() if isinstance(v, bool))
    if key not in out.proofs:
        ways = [way | {"widths": widths} for widths in (False, True) for way in ways]
        told = []
        for way in ways:
            part = replace(found, **way)  # type: ignore[arg-type]
            told.append(adds_up(m, children, part, tp.size, partial(_local_numbers, m, part), norms))
            if told[-1]:
                out.proofs[key] = way, ""
                return part, ""
        unknown = told[0] is None and one != "query_key_value"
        out.proofs[key] = ({}, "") if unknown else (None, "its heads, run apart on a probe, do not add up to the whole"
                                                    if False in told else "its forward does not run on a probe")
    told_way, why = out.proofs[key]
    return (None if told_way is None else replace(found, **told_way)), why


def _linear(*layers: Any) -> bool:
    return all(is_linear(c) for c in layers)


def _four(m: Any, children: dict[str, Any]) -> Heads | str | None:
    row = next((n for n in ("o_proj", "dense", "out_proj") if n in children), "")
    if not {"q_proj", "k_proj", "v_proj"} <= set(children) or not row:
        return None
    q, k, v, o = (children[n] for n in ("q_proj", "k_proj", "v_proj", row))
    if not _linear(q, k, v, o):
        return "query, key, value and output are no four nn.Linear"
    dh = getattr(m, "head_dim", 0)
    if not isinstance(dh, int) or dh < 1 or any(c.out_features % dh for c in (q, k, v)) or o.in_features != q.out_features:
        return "its head_dim does not fit its projections"
    heads, kv = q.out_features // dh, k.out_features // dh
    if v.out_features != k.out_features or heads % kv:
        return "its key and value heads do not fit"
    columns = {n: {"": (c.out_features, h)} for n, c, h in (("q_proj", q, heads), ("k_proj", k, kv), ("v_proj", v, kv))}
    return Heads(heads, kv, columns, row, o.in_features)


def _fused(m: Any, children: dict[str, Any]) -> Heads | str | None:
    """[q | k | v] in one layer."""
    column, row = next(((c, r) for c, r in FUSED if {c, r} <= set(children)), ("", ""))
    if not column:
        return None
    if "q_attn" in children:
        return "it attends to another sequence"
    one, o, dh = children[column], children[row], getattr(m, "head_dim", getattr(m, "head_size", 0))
    if _linear(one, o):
        width, total = o.in_features, one.out_features
    elif transposed(one) and transposed(o):
        width, total = o.weight.shape[0], one.weight.shape[1]
    else:
        return "its projections are no nn.Linear and no Conv1D"
    if not isinstance(dh, int) or dh < 1 or width % dh or total <= width or (total - width) % (2 * dh):
        return "its head_dim does not fit its projections"
    heads, kv = width // dh, (total - width) // (2 * dh)
    if heads % kv:
        return "its key and value heads do not fit"
    return Heads(heads, kv, {column: {"q": (width, heads), "k": (kv * dh, kv), "v": (kv * dh, kv)}}, row, width)


def _latent(m: Any, children: dict[str, Any]) -> Heads | str | None:
    """Keys and values of all heads from one latent vector a token (DeepSeek), and a rotated part of the key that they share."""
    q = "q_b_proj" if "q_b_proj" in children else "q_proj"
    if not {q, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} <= set(children):
        return None
    qk, value, rope = (getattr(m, n, 0) for n in ("qk_head_dim", "v_head_dim", "qk_rope_head_dim"))
    every = [c for n, c in children.items() if "norm" not in n]
    if not _linear(*every) or not (qk and value and rope):
        return "its projections are no nn.Linear, or its head dims are not known"
    heads, features = children["o_proj"].in_features // value, children["kv_b_proj"].out_features
    latent = children["kv_b_proj"].in_features
    if children[q].out_features != heads * qk or features != heads * (qk - rope + value) or children["o_proj"].in_features % value:
        return "its head dims do not fit its projections"
    if children["kv_a_proj_with_mqa"].out_features != latent + rope:
        return "its latent vector does not fit its projections"
    columns = {q: {"": (heads * qk, heads)}, "kv_b_proj": {"": (features, heads)}}
    before = tuple(n for n in children if n not in (*columns, "o_proj"))
    return Heads(heads, heads, columns, "o_proj", heads * value, {"kv_a_proj_with_mqa": rope}, before)


def _norms(m: Any, children: dict[str, Any], found: Heads) -> tuple[dict[str, tuple[int, Change | None]], str]:
    """Children between the projections and the heads: name -> (heads, None for a norm of one head, else how it norms all of them)."""
    out: dict[str, tuple[int, Change | None]] = {}
    widths: dict[tuple[int, ...], int] = {}
    for parts in found.columns.values():
        widths |= {(features,): heads for features, heads in reversed(parts.values())}
    for n, c in children.items():
        if n in found.columns or n == found.row or n in found.whole:
            continue
        shapes = {tuple(p.shape) for p in c.parameters()}
        if not shapes:
            continue
        if shapes == {(getattr(m, "head_dim", 0),)} and found.heads > 1:
            out[n] = 0, None
        elif len(shapes) == 1 and (width := next(iter(shapes))) in widths:
            change = recognise(c)
            if not isinstance(change, tuple) or change[0] is not RMSNorm or change[1].eps is None:
                return {}, f"{n} norms all heads, and is no RMSNorm"
            out[n] = widths[width], change[1]
        else:
            return {}, f"{n} has parameters that belong neither to one head nor to all"
    return out, ""


def _local_numbers(m: Any, found: Heads, tp: Axis) -> dict[str, Any]:
    """The attributes of an attention block that count heads, and those its forward reads of the config."""
    mine, kv = found.heads // tp.size, max(1, found.kv // tp.size)
    numbers = {"num_key_value_groups": mine // kv, "num_heads": mine, "num_attention_heads": mine, "num_key_value_heads": kv,
               "num_kv_heads": kv, "split_size": found.width // tp.size}
    if found.widths:
        widths = dict.fromkeys(("hidden_size", "embed_dim", "inner_dim", "all_head_size"), found.width)
        dh = found.width // found.heads
        widths |= {"kv_heads": found.kv, "kv_dim": found.kv * dh}
        here = {"kv_heads": kv, "kv_dim": kv * dh}
        numbers |= {a: here.get(a, n // tp.size) for a, n in widths.items() if vars(m).get(a) == n}
    new: dict[str, Any] = {a: n for a, n in numbers.items() if a in vars(m)}
    code = getattr(inspect.unwrap(type(m).forward), "__code__", None)
    counts = {a: numbers[a] for a in ("num_attention_heads", "num_key_value_heads") if code is not None and a in code.co_names}
    if "config" in vars(m) and counts:
        new["config"] = LocalConfig(m.config, **counts)
    return new


# ---- feed-forward ------------------------------------------------------------------------------------------------


def split_mlp(out: Plan, name: str, m: Any, children: dict[str, Any], tp: Axis) -> str:
    pair = next((pair for pair in PLAIN if set(pair) <= set(children)), None)
    if pair is not None and "gate_proj" not in children:
        return _plain_mlp(out, name, m, pair, tp)
    found = gated_probe(m)
    if found is None or isinstance(found, str):
        return (found or "its layers have other names than gate_proj, up_proj, down_proj") + WHOLE
    named = [n for n in ("gate_proj", "up_proj", "gate_up_proj") if n in children]
    if not _linear(*(children[n] for n in (*named, "down_proj"))):
        return "its layers are no nn.Linear" + WHOLE
    probe, x, gate, up = found
    act = _activation(m) or nn.functional.silu
    with torch.no_grad():
        try:
            same = _close(type(m).forward(probe, x), probe.down_proj(act(gate) * up)) and _elementwise(act, gate)
        except Exception:
            same = False
    if not same:
        return "its forward is not down(act(gate(x)) * up(x)) on a probe" + WHOLE
    width = m.down_proj.in_features
    if width % tp.size:
        out.problems.append(f"{name}: its features must be divisible by tp={tp.size}, got {width}; use another tp")
        return ""
    for n in named:
        parts = {"gate": (width, width), "up": (width, width)} if n == "gate_up_proj" else None
        out.add(f"{name}.{n}", children[n], "column", tp, parts=parts)
    out.add(f"{name}.down_proj", m.down_proj, "row", tp)
    return ""


def _plain_mlp(out: Plan, name: str, m: Any, pair: tuple[str, str], tp: Axis) -> str:
    """last(act(first(x)))"""
    first, last = (getattr(m, n) for n in pair)
    if not (transposed(first) and transposed(last)) and not _linear(first, last):
        return f"{' and '.join(pair)} are no nn.Linear and no Conv1D" + WHOLE
    act = _activation(m)
    if act is None or {id(p) for p in m.parameters()} != {id(p) for p in (*first.parameters(), *last.parameters())}:
        return "its activation is not known, or it has other parameters" + WHOLE
    rows = int(transposed(first))                                     # the dim of the output features
    probe, one, two = copy.copy(m), first, last
    probe.__dict__["training"] = False
    if first.weight.is_meta:
        one, two = as_probe(first), as_probe(last)
        probe.__dict__["_modules"] = {**m._modules, pair[0]: one, pair[1]: two}
    x = torch.randn(2, 3, first.weight.shape[1 - rows], generator=torch.Generator().manual_seed(3)).to(one.weight)
    names = inspect.signature(type(m).forward).parameters             # a residual may be added at the end
    dropouts = [d for d in m.modules() if isinstance(d, nn.Dropout) and d.training]
    with torch.no_grad():
        for d in dropouts:
            d.training = False
        try:
            rest = {"residual": torch.zeros(2, 3, *two(act(one(x))).shape[2:]).to(x)} if "residual" in names else {}
            same = torch.allclose(type(m).forward(probe, x, **rest), two(act(one(x))), rtol=1e-2, atol=1e-3) and _elementwise(act, one(x))
        except Exception:
            same = False
        for d in dropouts:
            d.training = True
    if not same:
        return f"its forward is not {pair[1]}(act({pair[0]}(x))) on a probe" + WHOLE
    width = first.weight.shape[rows]
    if width % tp.size:
        out.problems.append(f"{name}: its features must be divisible by tp={tp.size}, got {width}; use another tp")
        return ""
    out.add(f"{name}.{pair[0]}", first, "column", tp)
    out.add(f"{name}.{pair[1]}", last, "row", tp)
    return ""


def _activation(m: Any) -> Callable | None:
    return next((a for n in ("act_fn", "activation_fn", "act", "activation", "gelu_impl") if callable(a := getattr(m, n, None))), None)


def _elementwise(act: Callable, x: torch.Tensor) -> bool:
    return _close(act(x)[..., :5], act(x[..., :5]).float())


# ---- vocabulary --------------------------------------------------------------------------------------------------


def table_options(m: Any) -> str:
    used = [o for o in ("padding_idx", "max_norm") if getattr(m, o) is not None]
    used += [o for o in ("scale_grad_by_freq", "sparse") if getattr(m, o)]
    return f"an embedding with {', '.join(used)} cannot be split" if used else ""


def split_vocabulary(out: Plan, model: Any, names: dict[int, str], tp: Axis) -> None:
    """The input embedding and the output head, as transformers' models name them."""
    found: list[Any] = []
    for which in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{which}_embeddings", lambda: None)())
        except NotImplementedError:                                   # transformers, of a model with two of them (CLIP)
            found.append(None)
    embed, head = found
    whole = False                                                     # tied to a table that is not split
    if id(embed) in names and "_interlace_split" not in vars(embed):
        name = names[id(embed)]
        if type(embed) is not nn.Embedding or table_options(embed):
            whole = head is not None and head.weight is embed.weight
            out.left[name] = (table_options(embed) if type(embed) is nn.Embedding else "it is no plain nn.Embedding") + WHOLE
        else:
            out.add(name, embed, "vocab", tp)
    if id(head) in names and "_interlace_split" not in vars(head):
        tied = embed is not None and head.weight is embed.weight
        if type(head) is not nn.Linear or whole or (tied and id(embed) not in names):
            out.left[names[id(head)]] = "tied to a table that is whole on every rank, or no nn.Linear"
        else:
            out.add(names[id(head)], head, "gather", tp)
