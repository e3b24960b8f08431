"""The kernels behind the public ops: which pad, which kernel. The ops ask here for tensors that `choose_path` gave one of KERNELS.

    CUDA tensors over symmetric memory, and CPU tensors under TRITON_INTERPRET=1; fp32, bf16 and fp16
"""
from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dispatch import INTERPRET, stand_ins
from . import multicast_ar, triton_ag, triton_ar, triton_moe, triton_rs
from .agree import choose_path
from .choose import KERNELS, MULTICAST, Path
from .gemm import gemm
from .heap import SymmHeap
from .pad import Pad, pad_of, pad_room
from .registry import Group, group_size

if TYPE_CHECKING:
    from .dispatch import DispatchPlan

__all__ = ["combined", "dispatched", "gathered", "gathered_product", "reduced", "scattered", "scattered_norm", "summed"]


def _pad(op: str, needs: tuple[int, int], x: Tensor, group: Group) -> Pad:
    assert group is not None
    return pad_of(group.group if isinstance(group, SymmHeap) else group, op, *needs, x.device)


def _served(op: str, rows: int, cols: int, x: Tensor, group: Group) -> Path | None:
    """The path of a collective by itself, where it is one of KERNELS."""
    if group is None or (x.is_cpu and not INTERPRET):
        return None
    path, _ = choose_path(op, rows, cols, 0, x, group)
    return path if path.name in KERNELS else None


def _width(n: int, last: int) -> int:
    """Columns in which n elements that lie in one piece are moved: their own rows, or the largest divisor up to 1024 of whole 16s."""
    if 64 <= last < n and n % last == 0:
        return last
    return next((w for w in range(min(n, 1024) // 16 * 16, 0, -16) if n % w == 0), gcd(n, 16))


def _room_for(n: int, width: int) -> int:
    """Elements that n of them take in a pad, whose tiles are 64 columns wide: an odd n has a width of 1."""
    return n * max(1, 64 // width)


def summed(op: str, x: Tensor, w: Tensor | None, path: Path, group: Group) -> Tensor:
    """all_reduce(x), or of x @ w.T."""
    x, two_shot = x.contiguous(), path.name.startswith("two-shot")
    if path.name in MULTICAST:
        if w is not None:
            x = gemm(x, w.t())
        pad = _pad(op, multicast_ar.needs(x, group_size(group), two_shot), x, group)
        return multicast_ar.launch(pad, x, x if w is not None else None, two_shot=two_shot)
    return triton_ar.launch(_pad(op, triton_ar.needs(x, w, group_size(group), two_shot), x, group), x, w, two_shot=two_shot)


def reduced(x: Tensor, group: Group) -> Tensor | None:
    """all_reduce(x), None where no kernel serves it."""
    path = _served("all_reduce", x.numel(), 1, x, group)
    return summed("all_reduce", x, None, path, group) if path else None


def gathered_product(x: Tensor, w: Tensor, group: Group) -> Tensor:
    """all_gather(x) @ w.T"""
    rows = x.shape[0] * group_size(group)
    pad = _pad("ag_gemm", triton_ag.needs(rows, x.shape[1], x.dtype, group_size(group)), x, group)
    return triton_ag.launch(pad, x.contiguous(), rows, w)


def gathered(x: Tensor, group: Group) -> Tensor | None:
    """all_gather(x) along dim 0, None where no kernel serves it."""
    width = _width(x.numel(), x.shape[-1])
    if not _served("all_gather", _room_for(x.numel(), width), 1, x, group):
        return None
    flat = x.reshape(-1, width)
    rows = flat.shape[0] * group_size(group)
    pad = _pad("all_gather", triton_ag.needs(rows, flat.shape[1], x.dtype, group_size(group)), x, group)
    return triton_ag.launch(pad, flat, rows).view(-1, *x.shape[1:])


def scattered(x: Tensor, w: Tensor | None, group: Group) -> Tensor | None:
    """reduce_scatter(x) along dim 0, None where no kernel serves it; or of x @ w.T for 2-d x and w, which choose_path has decided."""
    world, shape = group_size(group), x.shape
    op = "reduce_scatter" if w is None else "gemm_rs"
    if w is None:
        width = _width(x.numel() // world, x.shape[-1])
        if not _served(op, _room_for(x.numel(), width), 1, x, group):
            return None
        x = x.reshape(-1, width)
    rows, N = x.shape[0], x.shape[1] if w is None else w.shape[0]
    pad = _pad(op, triton_rs.needs(rows, N, x.dtype, world, w is not None), x, group)
    triton_rs.push(pad, x.contiguous(), w)
    y = triton_rs.take(pad, rows, N, x.dtype, w is not None)[0]
    return y.view(-1, *shape[1:]) if w is None else y


def scattered_norm(partial: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
                   group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """h, y, mean (none in RMSNorm), rstd of rs_residual_norm, None where no kernel serves it."""
    D = partial.shape[-1]
    rows = partial.shape[:-1].numel()
    if not _served("rs_residual_norm", rows, D, partial, group):
        return None
    pad = _pad("rs_residual_norm", triton_rs.needs(rows, D, partial.dtype, group_size(group), False), partial, group)
    triton_rs.push(pad, partial.reshape(rows, D).contiguous())
    h, y, rstd, mean = triton_rs.take(pad, rows, D, partial.dtype, False, residual, weight, bias, eps)
    return h.view(residual.shape), y.view(residual.shape), torch.empty_like(mean[:0]) if bias is None else mean, rstd


def _room(x: Tensor, plan: DispatchPlan) -> int:
    """Bytes that a pad of the plan's group may have; 0 under a tracer, which follows torch.distributed's all-to-all instead."""
    return 0 if plan.group is None or not plan.most or not x.shape[1] or stand_ins() else pad_room(x, plan.group)


def _rows_pad(op: str, rows: int, x: Tensor, plan: DispatchPlan, indices: int = 0) -> Pad | None:
    """The pad of a dispatch or combine whose ranks leave up to `rows` rows; None where none can be had, or it would be too large."""
    needs = triton_moe.needs(rows, x.shape[1], x.dtype, indices)
    return _pad(op, needs, x, plan.group) if 0 < 2 * needs[0] <= _room(x, plan) else None


def dispatched(x: Tensor, plan: DispatchPlan) -> Tensor | None:
    """dispatch(x), None where no kernel serves it."""
    pad = _rows_pad("dispatch", plan.most, x, plan)
    if pad is None:
        return None
    _ = plan.largest                                                  # combine's, read before the experts: behind them the GPU would idle
    return triton_moe.dispatch(pad, x.contiguous(), plan.route.row_of_slot, plan.route.slot_of_row, plan.most)


def combined(y: Tensor, plan: DispatchPlan, residual: Tensor | None) -> Tensor | None:
    """combine(y), None where no kernel serves it."""
    if not _room(y, plan):                                            # before `largest` reads the device
        return None
    step = 1 << max(0, plan.largest.bit_length() - 3)                 # the pad must not grow at every new maximum
    pad = _rows_pad("combine", -(-plan.largest // step) * step, y, plan, plan.ids.numel())
    if pad is None:
        return None
    residual = None if residual is None else residual.contiguous()
    return triton_moe.combine(pad, y.contiguous(), residual, plan.ids, plan.route.row_of_slot, plan.tokens, plan.experts)
