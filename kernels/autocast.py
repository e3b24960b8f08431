"""autocast: what torch.autocast does to the tensors of an op, done for ops it does not know. A kernel takes one dtype; in an autocast
region a 16-bit activation meets fp32 weights.

    lowered    products, attention    each tensor in the region's dtype, as F.linear takes it; float64 stays
    widened    norms, residual sums   mixed dtypes in fp32; on CUDA a norm of 16 bits too, as its F.layer_norm

The casts are torch's own, so a gradient has the dtype of its tensor, and ranks send the region's dtype. Outside a region nothing is cast.
"""
import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["biased", "lowered", "narrowed", "undisturbed", "widened"]

_CASTS = {torch.float32, torch.bfloat16, torch.float16}


def _on(x: Tensor) -> bool:
    if not torch._C._is_any_autocast_enabled():                       # a third of what the other two take, in every call
        return False
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def lowered(x: Tensor) -> Tensor:
    """x as a matrix product takes it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _on(x) and x.dtype in _CASTS else x


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    """A product and the bias that it lacks: in an autocast region not promoted to the bias's dtype."""
    return y if bias is None else y + lowered(bias)


def widened(*tensors: Tensor | None) -> list[Any] | None:
    """The tensors as a norm over the first takes them, None where it takes them as they are."""
    x = tensors[0]
    if x is None or not _on(x):
        return None
    dtypes = {t.dtype for t in tensors if t is not None}
    if not dtypes <= _CASTS or (len(dtypes) == 1 and (x.dtype == torch.float32 or not x.is_cuda)):
        return None
    return [None if t is None else t.float() for t in tensors]


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """What a norm over `widened` tensors returns for an input of dtype: on CUDA fp32, elsewhere the input's own."""
    return y if y.is_cuda else y.to(dtype)


def undisturbed(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast of what is computed from x within."""
    return torch.autocast(x.device.type, enabled=False) if _on(x) else contextlib.nullcontext()
