"""Sequence parallelism of a foreign decoder: between its layers each rank of tp holds its part of the tokens.

    embedding -> h [B, S, D], equal on all ranks
    first layer of the list      scatter: [1, n, D]               n = ceil(B S / t) tokens of the flattened batch a rank
      norms, residuals, router   on this rank's tokens; their gradients are summed over tp in the backward
      attention, MLP             all-gather before, products without communication, reduce-scatter after their row layer
      experts                    on this rank's tokens: no gather at all
    last layer of the list       gather: [B, S, D], equal on all ranks -> norm, head, loss

With pipeline stages it is the first and the last layer of each stage.

Positions, masks and rotary tables are made of the whole input before the list and read by attention alone, which sees whole sequences:
nothing in a layer may depend on where its tokens stand, except attention. What is in a decoder layer is therefore checked child by child,
and its forward run on a few tokens with stand-ins for attention and MLP: in another order, and fewer of them.
"""
from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.foreign import (
    TokenRowLinear,
    TransposedRowLinear,
    TransposedTokenRowLinear,
    gather_tokens,
    join_tokens,
    scatter_tokens,
)
from ..parallel.mesh import Axis
from .experts import Spread
from .fused import LayerNorm, RMSNorm, as_probe, recognise
from .split import Plan, Split, refuse_records, transposed
from .structure import FORWARD

__all__ = ["split_sequence"]


@dataclass
class Region:
    """Where tokens are split. shape: [B, S] of the batch that is inside."""
    tp: Axis
    shape: tuple[int, ...] = ()

    def check(self, x: Tensor) -> None:
        n = -(-self.shape.numel() // self.tp.size) if self.shape else 0   # type: ignore[attr-defined]
        if x.shape[:-1].numel() != n:
            raise ValueError(f"sequence_parallel: a decoder layer must get the {n} tokens of its rank, got {list(x.shape)}; call the "
                             "layers through their model, and run the backward of a checkpointed forward before another forward")


class _InRegion:
    _interlace_region: Region


class ScatteredLayer(_InRegion):
    """The first decoder layer: the residual stream is split here."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        region = self._interlace_region
        region.shape = hidden_states.shape[:-1]
        return super().forward(scatter_tokens(hidden_states, region.tp).unsqueeze(0), *args, **kwargs)  # type: ignore[misc]


class JoinedLayer(_InRegion):
    """The last decoder layer: the residual stream is whole again after it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, region = super().forward(*args, **kwargs), self._interlace_region   # type: ignore[misc]
        first = out[0] if isinstance(out, tuple) else out
        region.check(first)
        whole = join_tokens(first, region.shape, region.tp)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole


class Gathering(_InRegion):
    """Attention or MLP: computes parts of its output from all tokens, which its row layer sums and scatters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        region = self._interlace_region
        x = args[0] if args else kwargs["hidden_states"]
        region.check(x)
        x = gather_tokens(x, region.shape, region.tp)
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})
        return super().forward(*args, **kwargs)                       # type: ignore[misc]


def split_sequence(out: Plan, model: nn.Module, chosen: list[tuple[str, nn.Module]], tp: Axis) -> None:
    """Turn the layers that a plan splits over features into layers over tokens, or add to its problems why not."""
    names = {id(m): n for n, m in chosen}
    if any("_interlace_region" in vars(m) for _, m in chosen):
        return                                                        # replaced before
    lists = [m for _, m in chosen if isinstance(m, nn.ModuleList) and _decoder(out, names, m)]
    if len(lists) != 1:
        out.problems.append(f"sequence_parallel=True needs one list of decoder layers whose attention is split over tp, got {len(lists)}"
                            + _whole_attention(out) + "; leave sequence_parallel out")
        return
    layers, before = lists[0], len(out.problems)
    region, silent = Region(tp), replace(tp, group=None)              # columns: the gather before them sums their dx
    for layer in layers:
        _check_layer(out, names, layer)
        apart = [n for n, m in layer.named_modules() if isinstance(m, nn.ModuleList) and any(
            f"{names.get(id(e))}.{k}" in out.splits for e in m for k, _ in e.named_children())]
        out.problems += [f"{names.get(id(layer), 'a layer')}.{n}: sequence_parallel=True needs experts stacked in one module (transformers "
                         "5), got one module each; leave sequence_parallel out" for n in apart]
    if len(out.problems) > before:
        return
    for layer in layers:
        for m in layer.modules():
            found = out.splits.get(names.get(id(m), ""))
            if found is not None:
                _over_tokens(out, names[id(m)], m, found[1], region, silent)
            elif FORWARD & {n for n, c in m.named_children() if names.get(id(c)) in out.splits}:
                out.splits[names[id(m)]] = m, Split("sequence", wraps=(Gathering,), attributes={"_interlace_region": region})
    for mine in [list(layers)] if out.stages is None else out.stages.mine:   # messages between stages hold all tokens
        wraps: dict[int, tuple[type, ...]] = {id(mine[0]): (ScatteredLayer,)}
        wraps[id(mine[-1])] = (*wraps.get(id(mine[-1]), ()), JoinedLayer)
        for layer in (mine[0], mine[-1]):
            out.splits[names[id(layer)]] = layer, Split("sequence", wraps=wraps[id(layer)], attributes={"_interlace_region": region})
    _sum_the_rest(out, layers)
    decoder = names[id(layers)].rpartition(".")[0]
    out.splits[decoder] = model.get_submodule(decoder), Split("sequence", watch=partial(refuse_records, "sequence_parallel"))
    if any(isinstance(m, nn.Dropout) and m.p for m in layers.modules()):
        out.notes.append("sequence_parallel: dropout in the layers draws other masks than on one rank")


def _decoder(out: Plan, names: dict[int, str], m: nn.ModuleList) -> bool:
    """Whether every element holds an attention block that is split."""
    attention = {n for n, (_, how) in out.splits.items() if how.style == "heads" and how.make is None}
    return len(m) > 0 and all(any(names.get(id(c)) in attention for c in layer.modules()) for layer in m)


def _whole_attention(out: Plan) -> str:
    return "".join(f"; {n}: {why}" for n, why in list(out.left.items())[:1])


def _check_layer(out: Plan, names: dict[int, str], layer: nn.Module) -> None:
    """Every child of a decoder layer must be a norm, split attention, a split MLP, a mixture of experts, or hold no parameters."""
    heavy, before = [], len(out.problems)
    rows = (m for k, (m, s) in out.splits.items() if s.style == "row" and k.startswith(names[id(layer)] + "."))
    width = next((m.get_parameter("weight").shape[int(transposed(m))] for m in rows), 0)   # of the hidden states
    if any(not p.dim() for p in layer.parameters()):
        out.problems.append(f"{names.get(id(layer), 'a layer')}: sequence_parallel=True knows no 0-d parameters; leave it out")
    for n, c in layer.named_children():
        name = names.get(id(c), n)
        split = [s[1] for k, s in out.splits.items() if k == name or k.startswith(name + ".")]
        if any(s.style in ("heads", "experts") and s.make is None for s in split) or any(s.style == "row" for s in split):
            heavy.append(n)
            continue
        if not any(True for _ in c.parameters()):
            continue
        found = recognise(c)
        if (isinstance(found, tuple) and found[0] in (RMSNorm, LayerNorm)) or isinstance(c, (nn.LayerNorm, nn.RMSNorm)):
            continue
        if any(isinstance(getattr(e, "down_proj", None), nn.Parameter) for e in c.modules()):
            heavy.append(n)                                           # whole experts work token by token as well
            continue
        if _alone(c, width):
            continue
        why = out.left.get(name, "it is no norm, attention, MLP or mixture of experts")
        out.problems.append(f"{name}: sequence_parallel=True must know that it works token by token, got {type(c).__name__} ({why}); "
                            "leave sequence_parallel out")
    if len(out.problems) == before and not _by_token(layer, heavy, width):
        out.problems.append(f"{names.get(id(layer), 'a layer')}: sequence_parallel=True needs a layer that works token by token around its "
                            f"attention and MLP, got {type(layer).__name__}, which does not on a probe; leave sequence_parallel out")


class _StandIn(nn.Module):
    """In place of attention or MLP: token by token, and with what their callers unpack."""

    def __init__(self, pair: bool, factor: float):
        super().__init__()
        self.pair, self.factor = pair, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return (x * self.factor, None) if self.pair else x * self.factor


def _by_token(layer: Any, heavy: list[str], width: int) -> bool:
    """Whether a decoder layer, its attention and MLP aside, works token by token. heavy: these children, attention and MLP alike."""
    needed = [p.name for p in list(inspect.signature(type(layer).forward).parameters.values())[2:]
              if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_p = next(layer.parameters())
    like = torch.empty(0) if any_p.is_meta else any_p                 # on meta: norms of random weights, on the CPU
    light = {n: as_probe(c) if any_p.is_meta and n not in heavy else c for n, c in layer.named_children()}
    for pairs in itertools.product((True, False), repeat=len(heavy)):  # which of them return a pair is not known
        probe = copy.copy(layer)
        stand_ins = {n: _StandIn(pair, 0.5 + i) for i, (n, pair) in enumerate(zip(heavy, pairs))}
        probe.__dict__["_modules"] = {**light, **stand_ins}
        probe.__dict__["training"] = False

        def run(x: Tensor, probe: Any = probe) -> Tensor:
            out = type(layer).forward(probe, x, **dict.fromkeys(needed))
            return out[0] if isinstance(out, tuple) else out
        try:
            if (result := _order_free(run, width, like)) is not None:
                return result
        except Exception:
            continue
    return False


@torch.no_grad()
def _order_free(run: Callable[[Tensor], Any], width: int, like: Tensor) -> bool | None:
    """Whether run, of a few tokens, gives the same for each in another order, and of fewer; None where it gives no hidden states."""
    x = torch.randn(1, 6, width, generator=torch.Generator().manual_seed(7)).to(like)
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=x.device)
    whole = run(x)
    if not torch.is_tensor(whole) or whole.shape != x.shape:
        return None
    same = lambda a, b: torch.allclose(a, b, rtol=1e-2, atol=1e-3)  # noqa: E731
    return bool(same(run(x[:, order]), whole[:, order]) and same(run(x[:, :2]), whole[:, :2]) and whole.isfinite().all())


def _alone(module: nn.Module, width: int) -> bool:
    """Whether a module without stand-ins works token by token: it may run on a rank's tokens as it is."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = False
        return bool(_order_free(lambda x: type(module).forward(module, x), width, next(module.parameters())))
    except Exception:
        return False
    finally:
        for m, was in modes:
            m.training = was


def _over_tokens(out: Plan, name: str, m: Any, how: Split, region: Region, silent: Axis) -> None:
    """One split module, changed for a region of split tokens."""
    if how.style == "column":
        how.attributes = how.attributes | {"tp": silent}
    elif how.style == "row":
        how.layer = TransposedTokenRowLinear if how.layer is TransposedRowLinear else TokenRowLinear
        how.make = partial(how.layer.from_torch, tp=region.tp)
    elif how.style == "tail":
        del out.splits[name]                                          # whole, its gradient a part: summed with the others
    elif how.style == "heads" and how.make is None:
        how.wraps, how.attributes = (*how.wraps, Gathering), how.attributes | {"_interlace_region": region}
    elif how.style == "experts":
        spread: Spread = how.attributes["_interlace_spread"]
        how.attributes = how.attributes | {"_interlace_spread": replace(spread, tp=Axis("tp"))}


def _sum_the_rest(out: Plan, layers: nn.ModuleList) -> None:
    """Parameters that stay whole saw this rank's tokens, or its heads: their gradients are parts."""
    cut = {id(p) for m, how in out.splits.values() for n, p in m.named_parameters(recurse=False) if how.make is not None or n in how.pieces}
    there = {id(p) for p in out.partial}
    out.partial += [p for p in layers.parameters() if id(p) not in cut | there]
