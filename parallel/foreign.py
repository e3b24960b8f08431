"""Layers that models written elsewhere need beside column and row: transposed weights, norms over heads, a whole layer whose last
outputs go to every head, and tokens of a batch-first residual stream split over ranks.     t = tp.size

    Transposed      weight [D_in, D_out], as GPT-2 stores it: column [..., D_in] -> [..., D_out/t], row [..., D_in/t] -> [..., D_out]
    SplitRMSNorm    y = x * rsqrt(sum over all ranks of x^2 / D + eps) * w of this rank's features; comm: 4 or 8 bytes a row
    SharedTail      y = x @ w.T + b; what split heads read of its last outputs is a part of their gradient: summed over tp
    tokens          [B, S, D] -> [1, ceil(B S / t), D] of this rank, in the order of the flattened batch, zero rows at the end; and back

Tokens, not positions, are what is split: every rank has the same number of them whatever the batch and the sequence are.
"""
from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.autocast import biased
from ..kernels.comm import copy_gemm, gemm_ar, gemm_rs
from .collectives import copy_to, gather_from, reduce_from, scatter_to, stack_from
from .mesh import Axis
from .sharding import Described, replicated, set_pieces, split
from .tensor_parallel import RowParallelLinear, head_piece, take_part

__all__ = ["SharedTail", "SplitRMSNorm", "TokenRowLinear", "TransposedColumnLinear", "TransposedRowLinear", "TransposedTokenRowLinear",
           "gather_tokens", "join_tokens", "scatter_tokens"]


class TransposedColumnLinear(Described):
    """y = x @ weight + bias with weight [D_in, D_out/t]: ColumnParallelLinear for layers that store their weight transposed."""

    weight: nn.Parameter
    bias: nn.Parameter
    tp: Axis
    nf: int

    @classmethod
    def from_torch(cls, module: nn.Module, tp: Axis, *, parts: dict[str, tuple[int, int]] | None = None) -> TransposedColumnLinear:
        """This rank's columns. parts: as in ColumnParallelLinear, in the order of the columns. Raises: ValueError."""
        layer, full, pieces, at = cls(), module.get_parameter("weight"), [], 0
        for name, (features, heads) in (parts or {"": (full.shape[1], full.shape[1])}).items():
            rows = head_piece(name, (features, full.shape[0]), heads, tp, at)
            pieces.append(replace(rows, shape=(full.shape[0], features), dim=1))
            at += rows.length
        layer.tp, layer.nf = tp, at
        layer.weight = nn.Parameter(torch.empty(full.shape[0], at, dtype=full.dtype, device="meta"))
        set_pieces(layer.weight, *pieces)
        layer.bias = nn.Parameter(torch.empty(at, dtype=full.dtype, device="meta"))
        set_pieces(layer.bias, *(replace(p, shape=p.shape[1:], dim=0) for p in pieces))
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:                           # [..., D_in] -> [..., D_out/t]
        return biased(copy_gemm(x, self.weight.t(), self.tp.group), self.bias)


class TransposedRowLinear(Described):
    """y = x @ weight + bias with weight [D_in/t, D_out], summed over tp; the bias is added once."""

    tokens = False                                                    # the output is this rank's tokens
    weight: nn.Parameter
    bias: nn.Parameter
    tp: Axis

    @classmethod
    def from_torch(cls, module: nn.Module, tp: Axis) -> TransposedRowLinear:
        """This rank's rows. Raises: ValueError where they do not divide over tp."""
        layer, full = cls(), module.get_parameter("weight")
        layer.tp, piece = tp, split("", tuple(full.shape), 0, tp)
        layer.weight = nn.Parameter(torch.empty(piece.length, full.shape[1], dtype=full.dtype, device="meta"))
        set_pieces(layer.weight, piece)
        layer.bias = nn.Parameter(torch.empty(full.shape[1], dtype=full.dtype, device="meta"))
        set_pieces(layer.bias, replicated(tuple(layer.bias.shape), tp, cls.tokens))
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:                           # [..., D_in/t] -> [..., D_out]
        return biased(gemm_ar(x, self.weight.t(), self.tp.group), self.bias)


class TransposedTokenRowLinear(TransposedRowLinear):
    """The same, its output this rank's tokens: [B, S, D_in/t] -> [1, n, D_out]."""

    tokens = True

    def forward(self, x: Tensor) -> Tensor:
        return biased(gemm_rs(_padded(x, self.tp), self.weight.t(), self.tp.group).unsqueeze(0), self.bias)


class TokenRowLinear(RowParallelLinear):
    """RowParallelLinear for a batch-first model, its output this rank's tokens: [B, S, D_in/t] -> [1, n, D_out]."""

    @classmethod
    def from_torch(cls, module: nn.Linear, tp: Axis, *, sequence_parallel: bool = True) -> TokenRowLinear:
        layer = super().from_torch(module, tp, sequence_parallel=sequence_parallel)
        assert isinstance(layer, cls)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return biased(gemm_rs(_padded(x, self.tp), self.weight, self.tp.group).unsqueeze(0), self.bias)


class SplitRMSNorm(Described):
    """RMSNorm over features that are split over tp (q and k norms over all heads): x [..., D/t] -> [..., D/t].

    y = xhat * (offset + w), xhat by the mean square over all D features, in fp32 (fp64 for fp64), one rounding. A feature that several
    ranks hold (fewer key heads than ranks) counts once."""

    weight: nn.Parameter
    tp: Axis
    eps: float
    offset: float
    copies: int
    width: int

    @classmethod
    def from_torch(cls, module: nn.Module, tp: Axis, *, heads: int, eps: float, offset: float = 0.0) -> SplitRMSNorm:
        layer, full = cls(), module.get_parameter("weight")
        piece = head_piece("", tuple(full.shape), heads, tp, 0)
        layer.tp, layer.eps, layer.offset, layer.copies, layer.width = tp, eps, offset, piece.copies, len(full)
        layer.weight = nn.Parameter(torch.empty(piece.length, dtype=full.dtype, device="meta"))
        set_pieces(layer.weight, piece)
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        total = wide.square().sum(-1, keepdim=True) / self.copies
        total = copy_to(reduce_from(total, self.tp), self.tp)        # every rank's output depends on every rank's sum
        return (wide * torch.rsqrt(total / self.width + self.eps) * (self.offset + self.weight.to(wide.dtype))).to(x.dtype)


class SharedTail(Described):
    """A whole linear layer whose last `tail` outputs are read by split heads: x [..., D_in] -> [..., D_out], equal on every rank."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    tp: Axis
    tail: int

    @classmethod
    def from_torch(cls, module: nn.Linear, tp: Axis, *, tail: int) -> SharedTail:
        layer = cls()
        layer.tp, layer.tail, layer.bias = tp, tail, None
        for name, p in module.named_parameters(recurse=False):
            empty = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))
            set_pieces(empty, replicated(tuple(p.shape), tp, False))
            setattr(layer, name, empty)
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:
        head, tail = F.linear(x, self.weight, self.bias).tensor_split([-self.tail], -1)
        return torch.cat((head, copy_to(tail, self.tp)), -1)


# ---- tokens ------------------------------------------------------------------------------------------------------


def _padded(x: Tensor, tp: Axis) -> Tensor:
    """[..., D] -> [n t, D], zero rows at the end."""
    x = x.reshape(-1, x.shape[-1])
    return F.pad(x, (0, 0, 0, -len(x) % tp.size))


def scatter_tokens(x: Tensor, tp: Axis) -> Tensor:
    """[..., D], equal on every rank -> [n, D], this rank's n = ceil(tokens / t) of them. Backward: all-gather."""
    return scatter_to(_padded(x, tp), tp)


def gather_tokens(x: Tensor, shape: tuple[int, ...], tp: Axis) -> Tensor:
    """[..., D] of this rank's n tokens -> [*shape, D] of all, for layers that compute parts. Backward: reduce-scatter."""
    return gather_from(x.reshape(-1, x.shape[-1]), tp)[:_count(shape)].view(*shape, x.shape[-1])


def join_tokens(x: Tensor, shape: tuple[int, ...], tp: Axis) -> Tensor:
    """The same, where every rank computes the same from the result. Backward: this rank's rows."""
    return stack_from(x.reshape(-1, x.shape[-1]), tp).flatten(0, 1)[:_count(shape)].view(*shape, x.shape[-1])


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
