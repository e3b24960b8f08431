"""Attention that somebody else wrote: its rotation of q and k by rope, its causal scaled_dot_product_attention by attention.

The module keeps its forward. While that runs, torch's function is looked at, whoever calls it (transformers' registry of attention
functions, a plain module): causal, without mask and dropout, on the CPU, it is our kernel; anything else stays torch's.
"""
from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels import attention
from ..kernels.attention import ours
from ..kernels.autocast import lowered
from ..kernels.dispatch import TILES
from . import fused
from .rope import rotary_call, turning

__all__ = ["Attention", "recognise_attention"]

CALLS = {"scaled_dot_product_attention", "ALL_ATTENTION_FUNCTIONS"}   # names in a forward that end in torch's function
WORK = 1 << 22                                                        # B S S hidden: looking at a block's 25 calls costs 0.1 ms of Python


class Causal(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        looked = func is F.scaled_dot_product_attention and not torch.compiler.is_compiling()   # a compiled part has torch's
        if looked and (got := _attend(*args, **kwargs)) is not None:
            return got
        return func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
            scale: float | None = None, enable_gqa: bool = False) -> Tensor | None:
    """By our kernel, [B, heads, S, D] with the strides that torch's flash kernel leaves, [B, S, heads, D] in memory; None where that does
    not serve, or a context (sdpa_kernel) has switched flash kernels off."""
    given = query, key, value
    if is_causal is not True or attn_mask is not None or dropout_p or not torch.backends.cuda.flash_sdp_enabled():
        return None
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_nested or x.dim() != 4 for x in given) or key.shape != value.shape:
        return None
    (B, H, S, D), G = query.shape, key.shape[1]
    if key.shape != (B, G, S, D) or not G or (H % G if enable_gqa else H != G):
        return None
    q, k, v = (lowered(x).permute(2, 0, 1, 3) for x in given)
    if not q.dtype == k.dtype == v.dtype or not ours(q, k, v):
        return None
    return attention(q, k, v, scale).transpose(0, 1).contiguous().transpose(1, 2)   # the copy that a caller's reshape is then spared


class Attention(fused.Fused):
    """The module's own forward with the kernels that its Change names."""

    @classmethod
    def members(cls, original):
        name, forward = rotary_call(original), original.forward
        copied = forward
        if name is not None:
            world = {**forward.__globals__, name: turning(forward.__globals__[name], lambda: not fused.stock())}
            copied = types.FunctionType(forward.__code__, world, forward.__name__, forward.__defaults__, forward.__closure__)
            copied.__kwdefaults__ = forward.__kwdefaults__

        @functools.wraps(forward)
        def chosen(self, *args, **kwargs):
            if torch.compiler.is_compiling():                         # a compiler fuses the original, and cannot guard other globals
                return forward(self, *args, **kwargs)
            run = copied if "rope" in self._interlace.kernel else forward
            if "attention" not in self._interlace.kernel or fused.stock() or not _pays(*args, *kwargs.values()):
                return run(self, *args, **kwargs)
            with Causal():
                return run(self, *args, **kwargs)
        return {"forward": chosen}


def _pays(*inputs: Any) -> bool:
    """Whether one of a block's inputs [B, S, hidden] is on the CPU and long enough."""
    return any(isinstance(x, Tensor) and x.dim() == 3 and x.is_cpu and x.numel() * x.shape[1] >= WORK for x in inputs)


def recognise_attention(module: Any) -> tuple[type, fused.Change] | str | None:
    """(class to put in front, the change), or why not, or None for what neither turns q and k nor calls torch's attention."""
    cls: Any = type(module)
    names = ["rope"] * bool(rotary_call(cls))
    if TILES and calls(cls) and all(p.device.type in ("cpu", "meta") and p.dtype != torch.float64 for p in module.parameters()):
        names.append("attention")
    if names and "forward" in vars(module):
        return "its forward was overridden on the instance"
    return (Attention, fused.Change(cls, ", ".join(names))) if names else None


@functools.cache
def calls(cls: type) -> bool:
    """Whether the forward of cls, or a method of cls that it names, names torch's attention."""
    def names(method: Any) -> set[str]:
        return set(getattr(getattr(inspect.unwrap(method), "__code__", None), "co_names", ())) if callable(method) else set()
    named = names(getattr(cls, "forward", None))
    return bool(CALLS & named.union(*(names(inspect.getattr_static(cls, n, None)) for n in named)))
