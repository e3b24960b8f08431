"""A communication op as torch sees it: schema, fake, autograd, and a group that travels by name.

    call = register("gemm_ar(Tensor x, Tensor w, str group) -> Tensor", run, fake, setup, backward)
    y = call(x, w, group)              group: process group, SymmHeap or None

A schema cannot take a process group, so it takes the group's name, as torch's functional collectives do; "" is None. A
process group has its name from torch, which also finds it again; a SymmHeap made by hand is found in heap.by_hand.

    eager     call -> autograd.Function -> run(x, w, group): no dispatcher, no name (a Python kernel behind it costs 7 us a call)
    traced    call -> torch.ops.interlace.gemm_ar(x, w, name): fake and autograd from torch.library, one node in the graph

Order     ranks must meet in the same order. Every op is registered as an ordered effect: a compiled graph threads a token
          from each to the next, in forward and in backward, so that no pass reorders two of them or drops one.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed.distributed_c10d import _resolve_process_group

from ..dispatch import define, differentiable, traced
from .heap import SymmHeap, by_hand

__all__ = ["Group", "group_name", "group_of", "group_size", "register"]

Group = dist.ProcessGroup | SymmHeap | None

def group_of(group: Group | str) -> Group:
    """The group of a name."""
    if type(group) is not str:
        return group                                                  # type: ignore[return-value]
    return None if not group else by_hand.get(group) or _resolve_process_group(group)   # type: ignore[arg-type]


def group_name(group: Group | str) -> str:
    """What stands for `group` in a schema."""
    return "" if group is None else group if isinstance(group, str) else group.group_name


def group_size(group: Group | str) -> int:
    """The number of ranks of `group`: 1 for None."""
    group = group_of(group)
    return group.size if isinstance(group, SymmHeap) else 1 if group is None else dist.get_world_size(checked("group_size", group))


def checked(op: str, group: Any) -> Any:
    """group. Raises: ValueError where it is none: torch gives a rank that is no member of a new group an object that is no group."""
    if not traced() and not isinstance(group, (dist.ProcessGroup, SymmHeap, str, type(None))):   # a tracer has a stand-in
        raise ValueError(f"{op}: group must be a torch process group, a SymmHeap or None, got {group!r}; is this rank a member of it?")
    return group


def register(schema: str, run: Callable, fake: Callable, setup: Callable, backward: Callable, keep: int = 1,
             linear: bool = False) -> Callable:
    """Declare op `interlace::<schema>`, whose last argument is `str group`; returns what public functions call.

    run(*inputs, group) computes it on any device, group as in the public functions; fake(*inputs, world) makes its outputs.
    setup, backward, keep, linear: as in dispatch.differentiable. setup finds the group, or its name, in inputs[-1], and hands it on."""
    name = schema.split("(")[0]
    define(schema, lambda *a: run(*a[:-1], group_of(a[-1])), lambda *a: fake(*a[:-1], group_size(a[-1])), everywhere=True)
    _register_effectful_op(getattr(torch.ops.interlace, name).default, _EffectType.ORDERED)
    call = differentiable(name, setup, backward, keep, run, linear)

    def public(*inputs: Any) -> Any:
        group = checked(name, inputs[-1])
        return call(*inputs[:-1], group_name(group) if traced() else group_of(group))
    return public
