"""RoPE inside attention that somebody else wrote: which function of its file turns q and k, and the same by the kernel."""
from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import rope


def turning(original: Callable[..., Any], allowed: Callable[[], bool]) -> Callable[..., Any]:
    """original(q, k, cos, sin), q and k [B, H, S, Dh], tables [B or 1, S, 2d] whose halves repeat, by the kernel where it serves and is
    allowed."""
    @functools.wraps(original)
    def turned(q, k, cos, sin, *args, **kwargs):
        if args or kwargs or not allowed() or not _turns(q, cos, sin) or not _turns(k, cos, sin):
            return original(q, k, cos, sin, *args, **kwargs)
        d, wide = cos.shape[-1] // 2, torch.float64 if q.dtype == torch.float64 else torch.float32
        cos, sin = (t[..., :d].transpose(0, 1).to(wide).expand(-1, q.shape[0], -1) for t in (cos, sin))
        return tuple(rope(x.permute(2, 0, 1, 3), cos, sin).permute(1, 2, 0, 3) for x in (q, k))
    return turned


def _turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, x.shape[0]) or cos.shape[1] != x.shape[2]:
        return False
    if cos.shape[-1] % 2 or cos.shape[-1] > x.shape[-1] or cos.device != x.device or cos.requires_grad or not x.is_floating_point():
        return False
    if x.is_cuda or torch.compiler.is_compiling():                    # no wait for a GPU: `verify` shows tables that are no rotation
        return True
    return all(torch.equal(*t.chunk(2, -1)) for t in (cos, sin))


@functools.cache
def rotary_call(cls: type) -> str | None:
    """The name by which cls.forward calls a function that turns q and k by rotate-half tables, as a probe shows."""
    forward = inspect.getattr_static(cls, "forward", None)
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    g = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 4, 3, 8, generator=g), torch.randn(2, 2, 3, 8, generator=g)
    angle = torch.randn(2, 3, 4, generator=g).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if not isinstance(function, types.FunctionType) or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
            continue
        try:
            got = function(q, k, cos, sin)
        except Exception:
            continue
        want = [x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None] for x in (q, k)]
        same = isinstance(got, tuple) and len(got) == 2 and all(y.shape == w.shape for y, w in zip(got, want))
        if same and all(torch.allclose(y, w, atol=1e-5) for y, w in zip(got, want)):
            return name
    return None
