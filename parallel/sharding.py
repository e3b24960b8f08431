"""Which blocks of which global tensors stand in a local parameter. The one description that initial weights, gradient
reductions, the clip norm, checkpoints and `verify` all read.

    fused q, k, v of one rank, 2 query heads and 1 key / value head each:

        local  [q0 q1 | k0 | v0]      pieces  q_proj[0:2Dh] at 0,  k_proj[0:Dh] at 2Dh,  v_proj[0:Dh] at 3Dh

A piece held by several ranks says so (`copies`), and whether their gradients are equal or parts of a sum (`partial`).
"""
from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels import grad_square_sum
from ..kernels.comm import all_reduce
from .mesh import Axis, Mesh


@dataclass(frozen=True)
class Piece:
    """Rows (or columns: `dim`) start .. start + length of a global tensor, at position `at` of the local parameter."""
    name: str                                                         # last part of the module's name, or "" to keep it
    shape: tuple[int, ...]                                            # of the global tensor
    dim: int = 0
    start: int = 0
    length: int = 0
    at: int = 0
    copies: int = 1                                                   # tp ranks that hold this same block
    partial: bool = False                                             # their gradients are to be summed
    expert: int | None = None                                         # index into the first dim of a parameter that stacks experts

    def local(self, t: Tensor) -> Tensor:
        """The view of this piece in a tensor shaped like the local parameter."""
        if self.expert is not None:
            t = t[self.expert]
        return t.narrow(self.dim, self.at, self.length) if t.dim() else t

    def runs(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """[first, last) of each contiguous run of this piece in the flattened local parameter of `shape`."""
        base = 0
        if self.expert is not None:
            base, shape = self.expert * prod(shape[1:]), shape[1:]
        if not shape or self.length == shape[self.dim]:
            yield base, base + prod(shape)
            return
        inner = prod(shape[self.dim + 1:])
        for row in range(prod(shape[:self.dim])):
            first = base + (row * shape[self.dim] + self.at) * inner
            yield first, first + self.length * inner

    def of(self, full: Tensor) -> Tensor:
        """The view of this piece in the global tensor."""
        return full.narrow(self.dim, self.start, self.length) if full.dim() else full


def split(name: str, shape: tuple[int, ...], dim: int, tp: Axis, at: int = 0) -> Piece:
    """An even split of `dim` over tp. Raises: ValueError when it does not divide."""
    if shape[dim] % tp.size:
        raise ValueError(f"{name or 'weight'}: dim {dim} of {list(shape)} must be divisible by {tp.name}={tp.size}, "
                         f"got {shape[dim]}; use another size, or fewer ranks")
    n = shape[dim] // tp.size
    return Piece(name, shape, dim, tp.rank * n, n, at)


def padded(name: str, shape: tuple[int, ...], tp: Axis, rows: int) -> Piece:
    """`rows` rows of dim 0 a rank; the last ranks may hold fewer real ones (the rest is padding), or none."""
    start = min(tp.rank * rows, shape[0])
    return Piece(name, shape, 0, start, min(rows, shape[0] - start), 0)


def replicated(shape: tuple[int, ...], tp: Axis, partial: bool) -> Piece:
    return Piece("", shape, 0, 0, shape[0], 0, tp.size, partial and tp.size > 1)


def set_pieces(param: nn.Parameter, *pieces: Piece, std: float | None = None, fill: float | None = 0.0) -> None:
    """Describe a parameter: its pieces, and its initial value (normal of `std`, or the constant `fill`; both None: what it has)."""
    param.pieces, param.init_std, param.init_fill = pieces, std, fill  # type: ignore[attr-defined]


MARKS = ("pieces", "init_std", "init_fill", "expert", "stages")       # what is written on a parameter


class Described(nn.Module):
    """A layer whose parameters keep what is written on them (MARKS, and that their gradients are completed) where torch puts new ones in
    their place: to_empty, load_state_dict(assign=True), copy.deepcopy. A module of your own with set_pieces may derive from it."""

    described: tuple[str, ...] = ("weight", "bias")                   # its parameters that must have pieces
    exact: tuple[str, ...] = ()                                       # its floating buffers that keep their dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        known, buffers = self._known(), {name: self._buffers.get(name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, old in buffers.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self._tell(known)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        known = self._known()
        super()._load_from_state_dict(*args, **kwargs)
        self._tell(known)

    def __getstate__(self) -> dict[str, Any]:
        known = self._known()
        return {**super().__getstate__(), "_known": known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_known"})
        self._tell(state.get("_known", {}))

    def _known(self) -> dict[str, dict[str, Any]]:
        """{own parameter: its marks}. A completed gradient's hook stays behind: its pieces are given as they were before it."""
        known = {}
        for name, p in self._parameters.items():
            if p is not None and hasattr(p, "pieces"):
                known[name] = {mark: value for mark, value in vars(p).items() if mark in MARKS}
                if hasattr(p, "completed"):
                    known[name] |= {"pieces": p.completed[1], "completed": True}
        return known

    def _tell(self, known: dict[str, dict[str, Any]]) -> None:
        """Write on new parameters what was known of the old ones."""
        for name, marks in known.items():
            p: Any = self._parameters.get(name)
            if p is not None and not hasattr(p, "pieces"):
                vars(p).update({mark: value for mark, value in marks.items() if mark != "completed"})
                if "completed" in marks:
                    complete_gradient(p, self.tp)  # type: ignore[arg-type]

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
        if not recurse:
            _refuse_ddp(self, sys._getframe(1).f_locals.get("self"))
        return super().named_parameters(prefix, recurse, remove_duplicate)


def _refuse_ddp(layer: nn.Module, caller: Any) -> None:
    """torch's DistributedDataParallel sends the parameters of its group's first rank to all, silently, also over parts. Before that it
    asks each module for its own parameters: the one place where a layer can say that its ranks hold different ones."""
    if not isinstance(caller, nn.parallel.DistributedDataParallel):
        return
    taken = {id(p) for p in caller._module_parameters}                # all but those that the user has it ignore
    if not any(id(p) in taken for p in layer._parameters.values()):
        return
    name = next(n for n, m in caller.module.named_modules() if m is layer) or type(layer).__name__
    ranks = set(dist.get_process_group_ranks(caller.process_group))
    for axis in (vars(layer).get(of) for of in ("tp", "ep")):
        if isinstance(axis, Axis) and len(ranks & set(axis.ranks)) > 1:
            raise ValueError(f"DistributedDataParallel: its ranks must hold the same part of {name}, got a group across "
                             f"{axis.name}={axis.size}; use interlace.DistributedDataParallel(model, mesh), or pass "
                             "process_group=mesh.dp.group")


def named_pieces(model: nn.Module) -> Iterator[tuple[str, Piece, nn.Parameter]]:
    """(global name, piece, local parameter), each parameter once: a tied weight under its first name. Raises: ValueError where a layer's
    own parameter has lost its pieces: it would count as whole, and under another name."""
    for where, module in model.named_modules():
        for name in module.described if isinstance(module, Described) else ():
            if module._parameters.get(name) is not None and not hasattr(module._parameters[name], "pieces"):
                raise ValueError(f"{where or type(module).__name__}: its {name} must be described by pieces, got a parameter put there by "
                                 f"hand; copy values into the layer's own (torch.no_grad(): layer.{name}.copy_(...)), or call "
                                 "interlace.parallel.sharding.set_pieces on yours")
    for name, param in model.named_parameters():
        *path, leaf = name.split(".")
        for piece in pieces_of(param):
            yield ".".join([*path[:-1], piece.name, leaf] if piece.name else [*path, leaf]), piece, param


def pieces_of(param: Tensor) -> tuple[Piece, ...]:
    """A parameter's pieces; a plain torch parameter is whole on every rank."""
    return getattr(param, "pieces", (Piece("", tuple(param.shape), 0, 0, param.shape[0] if param.dim() else 1),))


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int | None = None) -> None:
    """Initial weights from the seed and each tensor's global name: the same numbers for every layout and dtype. Parameters without
    pieces, of a user's own module, and those of `from_torch` keep theirs. Raises: ValueError as named_pieces.

    seed None: drawn from torch's CPU generator, as nn.Linear draws its weights: for a layer on its own, whose tensors all layers of
    its class name alike. Ranks agree where they set torch.manual_seed alike, or not at all; on meta nothing is drawn."""
    if seed is None:
        if all(p.is_meta for p in model.parameters()):
            return
        seed = int(torch.randint(1 << 62, (), device="cpu"))
    for name, piece, param in named_pieces(model):
        if not hasattr(param, "pieces") or param.is_meta:
            continue
        std, fill, local = getattr(param, "init_std", None), getattr(param, "init_fill", None), piece.local(param)
        if piece is param.pieces[0] and (std is not None or fill is not None):
            param.zero_()                                             # padding, in no piece: 0 * nan would be nan
        if std is None:
            if fill is not None:
                local.fill_(fill)
            continue
        key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
        full = torch.empty(piece.shape, dtype=torch.float32).normal_(0.0, std, generator=torch.Generator().manual_seed(key))
        local.copy_(piece.of(full))


def whole(piece: Piece) -> Piece:
    """The one-process twin of a piece, to compare and to test."""
    return replace(piece, start=0, length=piece.shape[piece.dim], at=0, copies=1, partial=False, expert=None)


def complete_gradient(param: nn.Parameter, tp: Axis) -> None:
    """Have the backward itself sum what several ranks hold in parts (`Piece.partial`), and mark the pieces as complete.

    One all-reduce over tp of a buffer with a place for each distinct block. A training loop that calls `reduce_partial_grads` needs it
    not; a user's own loop does. `param.completed` keeps the hook's handle and the pieces as they were."""
    before = pieces_of(param)
    partial = [p for p in before if p.partial]
    param.pieces = tuple(replace(p, partial=False) for p in before)   # type: ignore[attr-defined]
    if not partial or not param.requires_grad:
        return

    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        for piece in partial:
            view, block = piece.local(grad), tp.rank // piece.copies
            blocks = view.new_zeros(tp.size // piece.copies, *view.shape)
            blocks[block] = view
            view.copy_(all_reduce(blocks, tp.group)[block])
        return grad
    param.completed = param.register_hook(hook), before  # type: ignore[attr-defined]


# ---- gradients: all below see a parameter's gradient as (place in the flattened parameter, 1-d part of it held here) --------

Parts = Callable[[nn.Parameter], Iterable[tuple[int, Tensor]]]


def own_grad(param: nn.Parameter) -> list[tuple[int, Tensor]]:
    """The gradient that autograd left, whole."""
    return [] if param.grad is None else [(0, param.grad.view(-1))]


def gradient_axis(param: Tensor, mesh: Mesh) -> tuple[Axis, float]:
    """(the axis a parameter's gradient is summed over, the factor that goes with the sum).

    The ranks of dp see different samples. A parameter marked `expert = True` gets the tokens of all ranks of ep in its own
    backward, so only its replicas, over edp, are left to sum. The loss is a mean over dp either way: 1 / dp, not 1 / edp."""
    return (mesh.edp if getattr(param, "expert", False) else mesh.dp), 1 / mesh.dp.size


def _views(piece: Piece, param: nn.Parameter, parts: Parts) -> Iterator[Tensor]:
    """What this rank holds of a piece's gradient."""
    for start, part in parts(param):
        for first, last in piece.runs(tuple(param.shape)):
            first, last = max(first - start, 0), min(last - start, part.numel())
            if first < last:
                yield part[first:last]


@torch.no_grad()
def reduce_partial_grads(model: nn.Module, tp: Axis, parts: Parts = own_grad) -> None:
    """Sum the gradients that tp ranks hold in parts (norms, biases under sequence parallelism; replicated key / value heads).

    One all-reduce for all of them: each piece stands at its own place in a buffer of distinct pieces, zero elsewhere."""
    if tp.size == 1:
        return
    todo = [(view, tp.size // piece.copies, tp.rank // piece.copies)  # copies are neighbours: rank // copies names the block
            for _, piece, p in named_pieces(model) if piece.partial for view in _views(piece, p, parts)]
    if not todo:
        return
    dtype = functools.reduce(torch.promote_types, (view.dtype for view, *_ in todo))   # a sum in the first one's would round the others
    flat = todo[0][0].new_zeros(sum(view.numel() * blocks for view, blocks, _ in todo), dtype=dtype)
    places, at = [], 0
    for view, blocks, block in todo:
        mine = at + block * view.numel()
        places.append(flat[mine:mine + view.numel()])
        places[-1].copy_(view)
        at += blocks * view.numel()
    all_reduce(flat, tp.group, out=flat)
    for (view, *_), place in zip(todo, places):
        view.copy_(place)


@torch.no_grad()
def reduce_tied_grads(model: nn.Module, mesh: Mesh) -> None:
    """Sum the gradient of an embedding that the first and the last stage hold, before any other reduction."""
    if mesh.embd.size > 1:
        for p in model.parameters():
            if getattr(p, "stages", 1) > 1:
                all_reduce(p.main_grad, mesh.embd.group, out=p.main_grad)  # type: ignore[attr-defined]


@torch.no_grad()
def grad_norm(model: nn.Module, mesh: Mesh, parts: Parts = own_grad, *, sharded: bool = False) -> Tensor:
    """The 2-norm of the whole model's gradient, every parameter counted once, summed in fp64 (0-d, fp64). Collective.

    What n ranks hold counts 1/n on each: n = copies over tp, times dp (experts: edp) unless `sharded`: there each holds another
    part; times the stages that hold it (`param.stages`: tied embeddings). A plain parameter, of a user's own module, is whole on
    every rank of tp, with the same gradient: tp copies."""
    grads: list[Tensor] = []
    factors: list[float] = []
    for _, piece, param in named_pieces(model):
        copies = piece.copies if hasattr(param, "pieces") or getattr(param, "expert", False) else mesh.tp.size
        holders = copies * getattr(param, "stages", 1) * (1 if sharded else gradient_axis(param, mesh)[0].size)
        views = list(_views(piece, param, parts))
        grads += views
        factors += [1 / holders] * len(views)
    total = grad_square_sum(grads, factors)
    for axis in (mesh.tp, mesh.dp, mesh.pp):                          # tp and dp: the ranks of a stage, experts' too
        if axis.size > 1:
            total = all_reduce(total, axis.group)
    return total.sqrt()[0]
