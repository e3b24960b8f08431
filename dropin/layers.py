"""Which modules of somebody else's model are split, and how: by the user's plan, or by structure.

    recognised                                              split                                            where
    attention: its projections and a head_dim               whole heads a rank; fewer key / value heads      structure.py
                                                            than ranks: each on several
    gate_proj, up_proj, down_proj (or gate_up_proj)         features of the hidden layer
    c_fc, c_proj; up_proj, down_proj; fc1, fc2              the same
    the model's input embedding and output head             rows of the vocabulary, logits gathered
    3-d gate_up_proj and down_proj of experts               experts                                          experts.py
    with sequence_parallel: the list of decoder layers      tokens between its layers                        sequence.py
    with pp: the list of decoder layers                     layers, in stages                                pipeline.py
    a plan's linear layers and embeddings                   "column", "row", "gather" (column, output gathered), "vocab"
"""
from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..parallel.errors import nearest, raise_problems
from ..parallel.mesh import Axis, Mesh
from .experts import check_experts, spread_experts
from .pipeline import plan_stages
from .sequence import split_sequence
from .split import STYLES, TRANSPOSED, Plan, Split, alike, check_tied, gather, split_all, transposed, whole_all
from .structure import ATTENTION, FORWARD, split_attention, split_mlp, split_vocabulary, table_options

__all__ = ["STYLES", "Plan", "Split", "gather", "make_plan", "split_all", "whole_all"]


def make_plan(model: nn.Module, chosen: list[tuple[str, nn.Module]], mesh: Mesh, plan: str | Mapping[str, str] | None,
              strict: bool, sequence_parallel: bool = False, chunks: int = 1) -> Plan:
    """What to split, checked as a whole. Raises: ValueError with every problem."""
    out, tp = Plan(), mesh.tp
    out.problems += check_experts(mesh)
    if sequence_parallel and plan != "auto":
        out.problems.append(f"sequence_parallel=True needs plan='auto', got {plan!r}; what holds tokens is known by structure alone")
    if mesh.pp.size > 1 and plan != "auto":
        out.problems.append(f"mesh.pp of size {mesh.pp.size} needs plan='auto', got {plan!r}; the decoder's layers are found by structure")
    if chunks < 1 or (chunks > 1 and mesh.pp.size == 1):
        out.problems.append(f"virtual_pipeline_model_parallel_size needs mesh.pp > 1 and at least 1 stage a rank, got {chunks} and a "
                            f"pp of {mesh.pp.size}; leave it out")
    if isinstance(plan, Mapping):
        _by_user(out, chosen, plan, tp, strict)
        if mesh.ep.size > 1:
            out.problems.append(f"a plan of your own knows no experts, got mesh.ep of size {mesh.ep.size}; use plan='auto' or ep=1")
    elif plan == "auto":
        if mesh.pp.size > 1 and chunks > 0:
            plan_stages(out, model, chosen, mesh.pp, chunks)
        if (tp.size > 1 or mesh.ep.size > 1) and not out.problems:
            _by_structure(out, model, chosen, mesh)
            spread = any(s.style == "experts" for _, s in out.splits.values()) or any("_interlace_spread" in vars(m) for _, m in chosen)
            if mesh.ep.size > 1 and not spread and not out.problems:
                out.problems.append(f"mesh.ep of size {mesh.ep.size} needs experts stacked in one module (gate_up_proj, down_proj; in "
                                    "transformers since 5), got none; use ep=1")
            if sequence_parallel and tp.size > 1:
                split_sequence(out, model, chosen, tp)
    elif plan is not None:
        out.problems.append(f"plan must be 'auto', None or {{pattern: style}}, got {plan!r}")
    if tp.size == 1:                                                  # a layer of one rank is the layer it was
        asked = ["the plan"] * isinstance(plan, Mapping) + ["sequence_parallel"] * sequence_parallel
        out.notes += [f"{what} splits nothing: mesh.tp has one rank" for what in asked]
        out.splits = {n: s for n, s in out.splits.items() if s[1].style in ("experts", "stages")}
    for name, (m, _) in out.splits.items():
        if getattr(m, "parametrizations", None):
            out.problems.append(f"{name}: a parametrized layer cannot be split, got {type(m).__name__}; leave it out with skip")
    check_tied(out, model)
    raise_problems("replace_", alike(out.problems))
    return out


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
            _one(out, name, m, style, tp)
    if unmatched and (strict or len(unmatched) == len(plan)):
        out.problems += unmatched
    out.notes += unmatched


def _one(out: Plan, name: str, m: Any, style: str, tp: Axis) -> None:
    want = STYLES[style][0]
    other = style in TRANSPOSED and type(m) is not want and transposed(m)
    if "_interlace_split" in vars(m):
        return                                                        # replaced before
    if type(m) is not want and not other:
        out.problems.append(f"{name}: style {style!r} needs {want.__name__}, got {type(m).__name__}; leave it out of the plan")
        return
    rows, columns = ("in_features", "out_features") if not other else (m.weight.shape[0], m.weight.shape[1])
    features = {"column": columns, "row": rows}.get(style)
    number = getattr(m, features) if isinstance(features, str) else features
    if number is not None and number % tp.size:
        what = features if isinstance(features, str) else "its features"
        out.problems.append(f"{name}: {what} must be divisible by tp={tp.size}, got {number}; use another tp")
    elif style == "vocab" and table_options(m):
        out.problems.append(f"{name}: {table_options(m)}")
    else:
        out.add(name, m, style, tp)


def _by_structure(out: Plan, model: Any, chosen: list[tuple[str, nn.Module]], mesh: Mesh) -> None:
    tp = mesh.tp
    for name, m in chosen:
        children = dict(m.named_children())
        if any("_interlace_split" in vars(x) for x in (m, *children.values())):
            continue                                                  # replaced before
        if isinstance(getattr(m, "down_proj", None), nn.Parameter):
            why = spread_experts(out, name, m, mesh)
        elif tp.size == 1:
            continue
        elif ATTENTION & set(children):
            why = split_attention(out, name, m, children, tp)
        elif FORWARD & set(children):
            why = split_mlp(out, name, m, children, tp)
        elif hasattr(m, "head_dim") and any(isinstance(c, nn.Linear) for c in children.values()):
            why = "its projections are none of those known: whole on every rank"
        else:
            continue
        if why:
            out.left[name] = why
    if tp.size > 1:
        split_vocabulary(out, model, {id(m): n for n, m in chosen}, tp)
