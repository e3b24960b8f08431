"""Whether an attention block may be split into heads: its parts, run apart on a probe, must add up to the whole.

The layout of a fused query_key_value is not written on it: [q | k | v] and q, k, v head by head have the same shape, and a wrong cut
runs. A forward may count on the width of all heads. So each rank's part is made in this process, the forward run with stand-ins for
what its model passes, and the sum compared.
"""
from __future__ import annotations

import copy
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.mesh import Axis
from ..parallel.tensor_parallel import head_piece

__all__ = ["LocalConfig", "OwnHeads", "adds_up", "is_linear"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LocalConfig:
    """A model's config as one attention block sees it: with its rank's numbers of heads, all else as it stands there."""

    def __init__(self, config: Any, **own: Any):
        vars(self).update(_config=config, _own=own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):                                     # what copy and pickle ask of an empty instance
            raise AttributeError(name)
        own = vars(self)["_own"]
        return own[name] if name in own else getattr(vars(self)["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


class OwnHeads:
    """Stands before an attention block that is handed a bias of every head (alibi, or a mask made of it): its rank's heads of it."""

    _interlace_heads: tuple[int, int, int]                            # of all ranks, the first here, the number here

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        how = self._interlace_heads
        args = tuple(_own(a, *how) for a in args)
        return super().forward(*args, **{k: _own(v, *how) for k, v in kwargs.items()})  # type: ignore[misc]


def _own(x: Any, heads: int, first: int, count: int) -> Any:
    """[B, H, ..., S] or [B H, 1, S] with all H heads: those of this rank. Anything else, [B, 1, S, S] and [B, S, D] too, as it is."""
    if not torch.is_tensor(x) or heads == 1:
        return x
    if x.dim() == 4 and x.shape[1] == heads:
        return x.narrow(1, first, count)
    if x.dim() == 3 and x.shape[1] == 1 and x.shape[0] % heads == 0 and x.shape[0]:
        return x.unflatten(0, (-1, heads)).narrow(1, first, count).flatten(0, 1)
    return x


def is_linear(m: Any) -> bool:
    """nn.Linear, or a subclass that computes the same by a forward of its own, as a probe shows."""
    if type(m) is nn.Linear:
        return True
    if not isinstance(m, nn.Linear) or set(dict(m.named_parameters())) - {"weight", "bias"} or "forward" in vars(m):
        return False
    g = torch.Generator().manual_seed(8)
    small = _quiet(m, weight=torch.randn(3, 4, generator=g), bias=None if m.bias is None else torch.randn(3, generator=g))
    x = torch.randn(2, 4, generator=g)
    try:
        with torch.no_grad():
            return bool(torch.allclose(small(x), nn.functional.linear(x, small.weight, small.bias), rtol=1e-5, atol=1e-6))
    except Exception:
        return False


def _quiet(m: Any, **params: Tensor | None) -> Any:
    """A copy without hooks, with these parameters in place of its own, none of which takes part in autograd."""
    probe = copy.copy(m)
    vars(probe).update({name: OrderedDict() for name in HOOKS}, training=False)
    probe.__dict__["_parameters"] = {n: None if p is None else nn.Parameter(p, requires_grad=False)
                                     for n, p in ({**m._parameters, **params}).items()}
    return probe


# ---- the probe ---------------------------------------------------------------------------------------------------


def adds_up(m: Any, children: dict[str, Any], found: Any, size: int, numbers: Callable[[Axis], dict[str, Any]],
            left_out: Collection[str]) -> bool | None:
    """Whether `size` parts of an attention block's heads add up to the whole; None where it does not run on a probe.

    found: its projections (structure.Heads); numbers(axis): the attributes of a rank's part; left_out: norms over all heads."""
    try:
        whole = _wide(m, children)
        whole._modules |= {n: nn.Identity() for n in left_out}
        one = whole._modules[next(iter(found.columns))]
        width = one.in_features if isinstance(one, nn.Linear) else one.weight.shape[0]
    except Exception:
        return None
    for kwargs in _arguments(m, width, found.heads):
        with torch.no_grad():
            try:
                want = _first(type(m).forward(whole, **kwargs))
            except Exception:
                continue
            if not torch.is_tensor(want) or not want.isfinite().all() or not want.any():
                continue
            try:
                total = sum(_first(_part(whole, found, Axis("tp", size, r), numbers, kwargs)) for r in range(size))
            except Exception:
                return False                                          # its forward counts on sizes that a part has not
        return bool(total.shape == want.shape and (total - want).abs().max() <= 1e-3 * want.abs().max())
    return None


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _wide(m: Any, children: dict[str, Any]) -> Any:
    """The block on the CPU in fp32 or more, without hooks; random weights where it is on meta."""
    g = torch.Generator().manual_seed(9)

    def wide(p: Tensor | None) -> Tensor | None:
        if p is None:
            return None
        if p.is_meta:
            return torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5
        return p.detach().to("cpu", torch.promote_types(p.dtype, torch.float32))
    probe = _quiet(m, **{n: wide(p) for n, p in m._parameters.items()})
    probe.__dict__["_modules"] = {n: _quiet(c, **{k: wide(p) for k, p in c._parameters.items()}) for n, c in children.items()}
    probe.__dict__["_buffers"] = {n: b if b is None or b.is_meta else b.to("cpu") for n, b in m._buffers.items()}
    if "config" in vars(m):
        vars(probe)["config"] = LocalConfig(m.config, _attn_implementation="sdpa")
    return probe


def _part(whole: Any, found: Any, axis: Axis, numbers: Callable[[Axis], dict[str, Any]], kwargs: dict[str, Any]) -> Any:
    """What one rank's heads give."""
    own = {n: p.chunk(axis.size)[axis.rank] for n, p in whole._parameters.items() if p is not None}
    part, modules = _quiet(whole, **own), dict(whole._modules)
    for n, layout in found.columns.items():
        child, at, rows = modules[n], 0, []
        turned = child.weight if isinstance(child, nn.Linear) else child.weight.t()
        for features, heads in layout.values():
            piece = head_piece("", (features, turned.shape[1]), heads, axis, 0)
            rows.append(slice(at + piece.start, at + piece.start + piece.length))
            at += features
        weight = torch.cat([turned[r] for r in rows])
        modules[n] = _quiet(child, weight=weight if isinstance(child, nn.Linear) else weight.t(),
                            bias=None if child.bias is None else torch.cat([child.bias[r] for r in rows]))
        if not isinstance(child, nn.Linear):
            modules[n].nf = len(weight)
    last = modules[found.row]
    bias = None if last.bias is None else last.bias * float(axis.rank == 0)
    modules[found.row] = _quiet(last, weight=last.weight.chunk(axis.size, int(isinstance(last, nn.Linear)))[axis.rank], bias=bias)
    part.__dict__["_modules"] = modules
    new = numbers(axis)
    if isinstance(local := new.get("config"), LocalConfig):
        new["config"] = LocalConfig(whole.config, **vars(local)["_own"])
    vars(part).update(new)
    how = found.heads, axis.rank * found.heads // axis.size, found.heads // axis.size
    return type(whole).forward(part, **{k: _own(v, *how) for k, v in kwargs.items()})


def _arguments(m: Any, width: int, heads: int) -> Iterator[dict[str, Any]]:
    """Keyword arguments for a forward, of B = 2 and S = 5; how many features rotary tables turn is guessed."""
    signature = list(inspect.signature(type(m).forward).parameters.values())[1:]
    names = [p.name for p in signature]
    needed = [p.name for p in signature if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    like = next(p for p in m.parameters())
    dtype, g = torch.promote_types(like.dtype, torch.float32), torch.Generator().manual_seed(10)
    x = torch.randn(2, 5, width, generator=g).to(dtype)
    mask = torch.full((5, 5), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(2, 1, 5, 5)
    known = {"residual": torch.zeros_like(x), "alibi": torch.randn(2 * heads, 1, 5, generator=g).to(dtype), "attention_mask": mask,
             "position_ids": torch.arange(5).expand(2, 5), "cache_position": torch.arange(5)}
    head = getattr(m, "head_dim", getattr(m, "head_size", 0))
    turned = [getattr(m, n, None) for n in ("rotary_ndims", "rotary_dim", "qk_rope_head_dim")] + [head, head // 2]
    tables = [(a.cos(), a.sin()) for r in dict.fromkeys(turned) if isinstance(r, int) and r > 0
              for a in [torch.randn(1, 5, r, generator=g).to(dtype).expand(2, -1, -1)]]
    for table, with_alibi in itertools.product(tables if "position_embeddings" in names else [None], (True, False)):
        given = dict.fromkeys(needed) | {k: v for k, v in known.items() if k in names and (k != "alibi" or with_alibi)}
        yield given | {names[0]: x} | ({"position_embeddings": table} if table else {})

