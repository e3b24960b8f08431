"""Column- and row-parallel linear, vocabulary-parallel embedding and cross entropy (arXiv:1909.08053).   t = tp.size

    column  A = [A_1 | ... | A_t]     Y_i = X A_i          fwd no comm  (sp: all-gather X)          bwd all-reduce dX  (sp: reduce-scatter)
    row     A = [A_1 ; ... ; A_t]     Y = sum_i X_i A_i    fwd all-reduce Y  (sp: reduce-scatter)   bwd no comm  (sp: all-gather dY)

Shapes  column: x [S, B, D_in] (sp: [S/t, B, D_in]) -> [S, B, D_out/t], weight [D_out/t, D_in]
        row:    x [S, B, D_in/t] -> [S, B, D_out] (sp: [S/t, B, D_out]), weight [D_out, D_in/t]
Comm    a rank moves 2 (t-1)/t * S B D * itemsize for an all-reduce, half of it for an all-gather or a reduce-scatter; with sp an
        all-reduce becomes one of each: the same bytes, 1/t of the activations between layers
On a one-rank axis each layer is its own dense reference.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import cross_entropy
from ..kernels.autocast import biased
from ..kernels.comm import ag_gemm, copy_gemm, gemm_ar, gemm_rs
from ..kernels.dispatch import traced
from . import deferred
from .collectives import reduce_from, reduce_scatter_to, stack_from
from .mesh import Axis
from .sharding import Described, Piece, complete_gradient, init_parameters, padded, pieces_of, replicated, set_pieces, split


class ColumnParallelLinear(Described):
    """y = x @ weight.T + bias, the output features split over tp.

    Args:
        in_features, out_features: of the whole layer. tp: the axis.
        parts: several layers of one input fused into one product: {name: (features, heads)}, in place of out_features.
            Whole heads go to each rank; a part with fewer heads than ranks is replicated evenly (key / value heads, GQA).
        sequence_parallel: x is this rank's part of the sequence (dim 0), gathered before the product.
    Raises: ValueError when the features do not divide over tp, or out_features and parts are both given, or neither.
    """

    deferred: deferred.Deferred | None = None                         # of a zero-bubble pipeline

    def __init__(self, in_features: int, out_features: int | None = None, *, tp: Axis, bias: bool = False, sequence_parallel: bool = False,
                 parts: dict[str, tuple[int, int]] | None = None, init_std: float = 0.02, dtype: torch.dtype | None = None,
                 device: torch.device | str | None = None):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        if parts and out_features is None:
            fused = parts
        elif out_features is not None and not parts:
            fused = {"": (out_features, out_features)}
        else:
            raise ValueError("ColumnParallelLinear: exactly one of out_features and parts must be given, got "
                             f"out_features={out_features} and parts={parts}; parts hold the features of each layer, and replace their sum")
        pieces, at = [], 0
        for name, (features, heads) in fused.items():
            pieces.append(head_piece(name, (features, in_features), heads, tp, at))
            at += pieces[-1].length
        self.weight = nn.Parameter(torch.empty(at, in_features, dtype=dtype, device=device))        # [D_out/t, D_in]
        set_pieces(self.weight, *pieces, std=init_std)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(at, dtype=dtype, device=device))                   # [D_out/t]
            set_pieces(self.bias, *(Piece(p.name, p.shape[:1], 0, p.start, p.length, p.at, p.copies, p.partial) for p in pieces))
        self.sizes = [p.length for p in pieces]
        init_parameters(self)

    @classmethod
    def from_torch(cls, module: nn.Linear, tp: Axis, *, parts: dict[str, tuple[int, int]] | None = None,
                   sequence_parallel: bool = False) -> ColumnParallelLinear:
        """This rank's part of a whole linear layer: its rows are copied, its gradients come out complete."""
        if parts and (total := sum(features for features, _ in parts.values())) != module.out_features:
            raise ValueError(f"ColumnParallelLinear: parts must add up to the {module.out_features} output features of the layer, "
                             f"got {total}; name all its parts")
        layer = cls(module.in_features, None if parts else module.out_features, tp=tp, parts=parts, bias=module.bias is not None,
                    sequence_parallel=sequence_parallel, dtype=module.weight.dtype, device="meta")
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:                           # [S(/t), B, D_in] -> [S, B, D_out/t]
        y = deferred.linear(ag_gemm if self.sequence_parallel else copy_gemm, x, self.weight, self.tp.group, self.deferred,
                            gather_x=self.sequence_parallel)
        return biased(y, self.bias)


class RowParallelLinear(Described):
    """y = x @ weight.T + bias, the input features split over tp; the bias is added once, after the sum.

    Args: as ColumnParallelLinear; with sequence_parallel the output is this rank's part of the sequence.
    Raises: ValueError when in_features does not divide over tp.
    """

    deferred: deferred.Deferred | None = None                         # of a zero-bubble pipeline

    def __init__(self, in_features: int, out_features: int, *, tp: Axis, bias: bool = False, sequence_parallel: bool = False,
                 init_std: float = 0.02, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        piece = split("", (out_features, in_features), 1, tp)
        self.weight = nn.Parameter(torch.empty(out_features, piece.length, dtype=dtype, device=device))   # [D_out, D_in/t]
        set_pieces(self.weight, piece, std=init_std)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device))               # [D_out]
            set_pieces(self.bias, replicated((out_features,), tp, partial=self.sequence_parallel))
        init_parameters(self)

    @classmethod
    def from_torch(cls, module: nn.Linear, tp: Axis, *, sequence_parallel: bool = False) -> RowParallelLinear:
        """This rank's part of a whole linear layer: its columns are copied; the bias is whole on every rank."""
        layer = cls(module.in_features, module.out_features, tp=tp, bias=module.bias is not None, sequence_parallel=sequence_parallel,
                    dtype=module.weight.dtype, device="meta")
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:                           # [S, B, D_in/t] -> [S(/t), B, D_out]
        y = deferred.linear(gemm_rs if self.sequence_parallel else gemm_ar, x, self.weight, self.tp.group, self.deferred,
                            gather_dy=self.sequence_parallel)
        return biased(y, self.bias)

    def partial(self, x: Tensor) -> Tensor:
        """This rank's term of the sum, bias left out, for an op that reduces: [S, B, D_in/t] -> [S, B, D_out]."""
        return deferred.linear(copy_gemm, x, self.weight, None, self.deferred)


class VocabParallelEmbedding(Described):
    """Rows of the table split over tp: a rank looks up the ids it holds, the sum over ranks completes them.

    Args: num_embeddings of the whole table; rows: rows a rank holds (default: split evenly, rounded up), padding included.
    Shapes: ids [S, B] -> [S, B, D] (sp: [S/t, B, D]). weight [rows, D].
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, tp: Axis, rows: int | None = None, sequence_parallel: bool = False,
                 init_std: float = 0.02, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.tp, self.sequence_parallel = tp, sequence_parallel and tp.size > 1
        rows = rows or -(-num_embeddings // tp.size)
        if rows * tp.size < num_embeddings:
            raise ValueError(f"VocabParallelEmbedding: rows * {tp.name} must cover the {num_embeddings} embeddings, "
                             f"got {rows} * {tp.size}; use rows >= {-(-num_embeddings // tp.size)}")
        self.first, self.num_embeddings = tp.rank * rows, num_embeddings
        self.weight = nn.Parameter(torch.zeros(rows, embedding_dim, dtype=dtype, device=device))         # [V/t, D]
        set_pieces(self.weight, padded("", (num_embeddings, embedding_dim), tp, rows), std=init_std)
        init_parameters(self)

    @classmethod
    def from_torch(cls, module: nn.Embedding, tp: Axis, *, sequence_parallel: bool = False) -> VocabParallelEmbedding:
        """This rank's rows of a whole table. Raises: ValueError for options of nn.Embedding that have no parallel form."""
        if module.padding_idx is not None or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            raise ValueError("VocabParallelEmbedding: padding_idx, max_norm, scale_grad_by_freq and sparse must be unset, got "
                             f"{module.padding_idx}, {module.max_norm}, {module.scale_grad_by_freq}, {module.sparse}; keep it whole")
        layer = cls(module.num_embeddings, module.embedding_dim, tp=tp, sequence_parallel=sequence_parallel, dtype=module.weight.dtype,
                    device="meta")
        return take_part(layer, module, tp)

    def forward(self, ids: Tensor) -> Tensor:
        check_ids("VocabParallelEmbedding: ids", ids, self.num_embeddings)
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.first
        here = (local >= 0) & (local < self.weight.shape[0])
        y = F.embedding(local.where(here, 0), self.weight) * here.unsqueeze(-1)
        return (reduce_scatter_to if self.sequence_parallel else reduce_from)(y, self.tp)


class GatheredLinear(Described):
    """A linear layer split over its output features, whose output is gathered: x [..., D_in] -> [..., D_out], equal on every rank.

    For heads of models that compute their loss on whole logits; every rank must compute the same from them. The features need not
    divide: the last ranks hold padding, cut off after the gather. One all-gather forward, one all-reduce of dx backward.
    """

    def __init__(self, in_features: int, out_features: int, *, tp: Axis, bias: bool = False, init_std: float = 0.02,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.tp, self.out_features, rows = tp, out_features, -(-out_features // tp.size)
        self.weight = nn.Parameter(torch.zeros(rows, in_features, dtype=dtype, device=device))           # [D_out/t, D_in]
        set_pieces(self.weight, padded("", (out_features, in_features), tp, rows), std=init_std)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows, dtype=dtype, device=device))
            set_pieces(self.bias, padded("", (out_features,), tp, rows))
        init_parameters(self)

    @classmethod
    def from_torch(cls, module: nn.Linear, tp: Axis) -> GatheredLinear:
        """This rank's rows of a whole linear layer."""
        layer = cls(module.in_features, module.out_features, tp=tp, bias=module.bias is not None, dtype=module.weight.dtype, device="meta")
        return take_part(layer, module, tp)

    def forward(self, x: Tensor) -> Tensor:
        y = biased(copy_gemm(x, self.weight, self.tp.group), self.bias)
        return stack_from(y, self.tp).movedim(0, -2).flatten(-2)[..., :self.out_features]


class ParallelHead(Described):
    """Logits of this rank's part of the vocabulary: x [S(/t), B, D] -> [S, B, V/t]. The weight may be the embedding's (tied)."""

    deferred: deferred.Deferred | None = None                         # of a zero-bubble pipeline

    def __init__(self, embedding: VocabParallelEmbedding, *, tied: bool, init_std: float = 0.02):
        super().__init__()
        self.tp, self.sequence_parallel = embedding.tp, embedding.sequence_parallel
        self.weight = embedding.weight
        self.tied_to = (embedding, embedding.weight) if tied else ()  # in a tuple: neither is its submodule or parameter
        if not tied:
            self.weight = nn.Parameter(torch.zeros_like(embedding.weight))
            set_pieces(self.weight, *pieces_of(embedding.weight), std=init_std)
            init_parameters(self)

    def _known(self) -> dict[str, dict[str, Any]]:
        if self.tied_to and self._parameters.get("weight") is not self.tied_to[1]:
            self.tied_to = ()                                         # untied by hand
        return super()._known()

    def _tell(self, known: dict[str, dict[str, Any]]) -> None:
        """The embedding was made, and so changed, before the head: where torch gave each a parameter of its own, they share it again."""
        if self.tied_to:
            embedding = self.tied_to[0]
            self._parameters["weight"] = embedding.weight
            self.tied_to = embedding, embedding.weight
        super()._tell(known)

    def forward(self, x: Tensor) -> Tensor:
        return deferred.linear(ag_gemm if self.sequence_parallel else copy_gemm, x, self.weight, self.tp.group, self.deferred,
                               gather_x=self.sequence_parallel)


def calls_of(model: nn.Module) -> dict[tuple[str, int, int, bool], list[str]]:
    """The layers of `model` behind each call of a fused op, for `paths_taken`: (op, columns, K, gathered too) -> names, those of numbered
    layers once. In the backward a column-parallel layer sums dx, and a row-parallel one with sp gathers dy: "dx of <name>"."""
    calls: dict[tuple[str, int, int, bool], list[str]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, (ColumnParallelLinear, RowParallelLinear, GatheredLinear, ParallelHead)) or layer.tp.size == 1:
            continue
        (n, k), sp, name = layer.weight.shape, getattr(layer, "sequence_parallel", False), re.sub(r"\b\d+\b", "*", name)
        if isinstance(layer, RowParallelLinear):
            made = {("gemm_rs" if sp else "gemm_ar", n, k, False): name} | ({("ag_gemm", n, k, True): f"dx of {name}"} if sp else {})
        else:
            made = {("gemm_rs" if sp else "gemm_ar", k, n, False): f"dx of {name}"} | ({("ag_gemm", k, n, False): name} if sp else {})
        for call, caller in made.items():
            if caller not in calls.setdefault(call, []):
                calls[call].append(caller)
    return calls


Layer = TypeVar("Layer", bound=nn.Module)


def take_part(layer: Layer, module: nn.Module, tp: Axis) -> Layer:
    """Fill a parallel layer that was made on meta with its part of a whole one's parameters, and complete their gradients."""
    for name, empty in list(layer.named_parameters(recurse=False)):
        full = getattr(module, name)
        local = torch.zeros(empty.shape, dtype=full.dtype, device=full.device)
        copy_part(pieces_of(empty), full.detach(), local)
        param = nn.Parameter(local, requires_grad=full.requires_grad)
        set_pieces(param, *pieces_of(empty), fill=None)
        setattr(layer, name, param)
        complete_gradient(param, tp)
    return layer


def copy_part(pieces: Sequence[Piece], full: Tensor, local: Tensor) -> None:
    """Copy into `local` its pieces of a whole parameter, in which the global tensors of several pieces follow one another."""
    at = 0
    for piece in pieces:
        whole = full.narrow(piece.dim, at, piece.shape[piece.dim])
        piece.local(local).copy_(piece.of(whole))
        at += piece.shape[piece.dim]


def head_piece(name: str, shape: tuple[int, ...], heads: int, tp: Axis, at: int) -> Piece:
    """Rows of whole heads for this rank: heads / t of them, or one of them on t / heads neighbouring ranks."""
    if heads % tp.size == 0:
        return split(name, shape, 0, tp, at)
    if tp.size % heads:
        raise ValueError(f"{name or 'ColumnParallelLinear'}: the {heads} heads (or features) must be a multiple or a divisor of "
                         f"{tp.name}={tp.size}; use another number of ranks")
    copies, rows = tp.size // heads, shape[0] // heads
    return Piece(name, shape, 0, tp.rank // copies * rows, rows, at, copies, copies > 1)


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, tp: Axis, *, num_embeddings: int | None = None,
                                 ignore_index: int = -100) -> Tensor:
    """Cross entropy of logits split over the vocabulary, which are never gathered: one all-gather of 3 numbers a row.

    Args: logits [..., V/t] of this rank; targets [...] global ids; num_embeddings: real size of the vocabulary, padding past
    it is masked (default: all columns). Returns: loss [...] in fp32 (fp64 for fp64), 0 where targets == ignore_index.
    Raises: ValueError on CPU for targets outside the vocabulary.
    """
    V = logits.shape[-1]
    first, whole = tp.rank * V, V * tp.size if num_embeddings is None else num_embeddings
    check_ids("vocab_parallel_cross_entropy: targets", targets, whole, ignore_index)
    valid = max(0, min(V, whole - first))
    gather = None if tp.size == 1 else (lambda stats: stack_from(stats, tp))
    loss = cross_entropy(logits.reshape(-1, V), targets.reshape(-1), first=first, valid=valid, gather=gather, ignore_index=ignore_index)
    return loss.view(targets.shape)


def check_ids(what: str, ids: Tensor, below: int, ignore_index: int | None = None) -> None:
    """On CPU, ids outside [0, below) raise ValueError: no rank holds their row, so they would count as zeros. Elsewhere the host waits for
    no tensor."""
    if not ids.is_cpu or not ids.numel() or traced():
        return
    kept = ids if ignore_index is None else ids.masked_fill(ids == ignore_index, 0)
    low, high = (int(x) for x in kept.aminmax())
    if low < 0 or high >= below:
        or_else = "" if ignore_index is None else f" or {ignore_index}, which counts as none"
        raise ValueError(f"{what} must be in [0, {below}), the vocabulary{or_else}, got {low if low < 0 else high}")


__all__ = ["ColumnParallelLinear", "GatheredLinear", "ParallelHead", "RowParallelLinear", "VocabParallelEmbedding",
           "calls_of", "vocab_parallel_cross_entropy"]
