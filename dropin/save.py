"""Saving a model that is split over tp. A rank holds parts under the whole model's names, so nothing may take them for the whole:

    model.save_pretrained(folder)            every rank calls; rank 0 writes what stock transformers loads
    interlace.whole_state_dict(model)        every rank calls; whole tensors on the CPU of the first rank
    model.state_dict()                       this rank's part, for load_state_dict here; torch.save of it raises
    model.load_state_dict(whole or part)     each rank takes its part of whole tensors
    torch's DistributedDataParallel, FSDP    refused where they would take parts for copies
    interlace.hf.Trainer                     the same with its optimizer's state: whole on disk, parts in a rank

All of it stands on the model's instance and goes with restore_. A gather holds one whole parameter on each rank; the first rank keeps
the whole model in host memory, as transformers does. A rank that calls alone is told so after WAIT seconds; it hangs nobody.
"""
from __future__ import annotations

import contextlib
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from datetime import timedelta
from types import MethodType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..parallel.errors import raise_problems
from ..parallel.mesh import Axis
from ..parallel.sharding import pieces_of
from ..parallel.tensor_parallel import copy_part
from .layers import gather
from .pipeline import of_stage

__all__ = ["guard", "parts_of_state", "together", "unguard", "unhidden", "whole_optimizer_state", "whole_state_dict"]

WAIT = 120                                                            # seconds that ranks may come apart to a collective call


MISSING = object()


class RefusesTrainer(int):
    """The tp size where transformers' Trainer looks for one, which it compares with 1 before anything is done."""

    def __gt__(self, other: Any) -> bool:
        raise ValueError(f"Trainer: a model split over tp={int(self)} must be trained by interlace.hf.Trainer, or a loop of your own, got "
                         "transformers' Trainer, which would take its parts for copies; or call interlace.restore_ first")


class RefusesCopies:
    """The names that torch's DistributedDataParallel shall leave out: none, and an error where its group has ranks with other parts.

    That is the first it asks of a model, before it writes one rank's parts over the others'; its group stands in it already."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)

    def __iter__(self) -> Iterator[str]:
        group = getattr(sys._getframe(1).f_locals.get("self"), "process_group", None)
        ranks = set() if group is None else set(dist.get_process_group_ranks(group))
        if wrong := [axis for axis in _axes(self.model()) if group is None or len(ranks & set(axis.ranks)) > 1]:
            named = ", ".join(f"{axis.name}={axis.size}" for axis in wrong)
            raise ValueError(f"DistributedDataParallel: its ranks must hold the same parts of the model, got a group across {named}; use "
                             "interlace.DistributedDataParallel(model, mesh), or pass process_group=mesh.dp.group")
        return iter(())


def _refuse_fsdp(model: Any, args: Any) -> None:
    """A hook before the forward: FSDP makes parameters of its own, which know nothing of the sums that parts need."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(
            getattr(m, "_is_fsdp_managed_module", False) for m in model.modules()):
        raise ValueError("FSDP: a model that replace_ split must not be sharded again, got one that is; use interlace."
                         "DistributedDataParallel(model, mesh, use_distributed_optimizer=True), whose optimizer's state is sharded over dp")


class Part:
    """Stands in the metadata of a state_dict that holds a rank's part, and refuses to be written."""

    def __init__(self, tp: Axis):
        self.tp = tp.rank, tp.size

    def __deepcopy__(self, memo: Any) -> Part:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError(f"state_dict: what is written must be the whole model, got the part of rank {self.tp[0]} of tp={self.tp[1]}; call "
                         "interlace.whole_state_dict(model) or model.save_pretrained(folder) on every rank, or restore_ first")


def guard(model: Any) -> None:
    """Put what this file says on a split model's instance."""
    if "_interlace_guard" in vars(model):
        return
    tp: Axis = model._interlace_tp

    def mark(module: nn.Module, state: dict, prefix: str, local_metadata: dict) -> None:
        local_metadata["interlace"] = Part(tp)
    handles = [model.register_state_dict_post_hook(mark), model.register_load_state_dict_pre_hook(_take_parts),
               model.register_forward_pre_hook(_refuse_fsdp)]
    added: dict[str, Any] = {"_ddp_params_and_buffers_to_ignore": RefusesCopies(model)}
    if hasattr(model, "save_pretrained"):
        added["save_pretrained"] = MethodType(_save_pretrained, model)
    if hasattr(model, "_tp_size"):
        added["_tp_size"] = RefusesTrainer(tp.size)
    model._interlace_guard = handles, {name: vars(model).get(name, MISSING) for name in added}
    vars(model).update(added)


def unguard(model: nn.Module) -> None:
    if "_interlace_guard" not in vars(model):
        return
    handles, before = vars(model).pop("_interlace_guard")
    for handle in handles:
        handle.remove()
    for name, value in before.items():
        if value is MISSING:
            del vars(model)[name]
        else:
            vars(model)[name] = value


def whole_shape(p: Tensor) -> tuple[int, ...]:
    """Of the tensor that `p` is this rank's part of: the global tensors of its pieces follow one another."""
    pieces = pieces_of(p)
    shape = list(pieces[0].shape)
    if shape:
        shape[pieces[0].dim] = sum(piece.shape[piece.dim] for piece in pieces)
    return tuple(shape)


def whole_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state_dict of the whole model, on the CPU of the first rank of tp; empty on the others. Tied names share a tensor.

    Every rank of tp calls it. A model that is not split gives its own state_dict. Raises: RuntimeError where a rank does not come."""
    tp: Axis | None = getattr(model, "_interlace_tp", None)
    if tp is None:
        return OrderedDict(model.state_dict())
    for axis in _axes(model):
        _meet(axis)
    whole: OrderedDict[str, Tensor] = OrderedDict()
    seen: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, t in model.state_dict(keep_vars=True).items():
            if id(t) not in seen:
                mine = of_stage(model, t)
                full = gather(t, mine, tp) if hasattr(t, "pieces") and t.dim() else mine
                seen[id(t)] = full.to("cpu", copy=True) if tp.rank == 0 else full[:0] if full.dim() else full
            whole[name] = seen[id(t)]
    return whole if tp.rank == 0 else OrderedDict()


# ---- an optimizer's state ----------------------------------------------------------------------------------------


def whole_optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """optimizer.state_dict() of the whole model, as an optimizer of one device has it, on the CPU of the first rank of tp; elsewhere its
    tensors are empty. What has the shape of its parameter is gathered like it, numbers stay.

    Every rank of tp calls it. Raises: ValueError for state of other shapes (Adafactor's rows and columns)."""
    tp: Axis = model._interlace_tp  # type: ignore[assignment]
    state = optimizer.state_dict()
    params = _in_order(optimizer)
    raise_problems("whole_optimizer_state", [
        f"a state must be one number, or have its parameter's shape {list(params[i].shape)}, got {list(v.shape)} for {key!r}; use an "
        "optimizer that works element by element" for i, of in state["state"].items() for key, v in of.items()
        if torch.is_tensor(v) and v.dim() and v.shape != params[i].shape][:1])
    for axis in _axes(model):
        _meet(axis)
    out: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for i, of in state["state"].items():
            out[i] = dict(of)
            for key, v in of.items():
                if torch.is_tensor(v) and v.dim():
                    full = gather(params[i], v, tp)
                    out[i][key] = full.to("cpu", copy=True) if tp.rank == 0 else full.new_empty(0)
    return state | {"state": out}


def parts_of_state(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A hook before optimizer.load_state_dict: this rank's parts of whole tensors."""
    params, mine = _in_order(optimizer), {}
    for i, of in state["state"].items():
        p = params.get(i)
        mine[i] = {k: _part_of(p, v) if p is not None and torch.is_tensor(v) else v for k, v in of.items()}
    return state | {"state": mine}


def _in_order(optimizer: Any) -> dict[int, Any]:
    """{number in a state_dict: parameter}"""
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))


def _part_of(p: Any, given: Tensor) -> Tensor:
    """This rank's part of a tensor like the whole of p; anything else as it is."""
    if not (hasattr(p, "pieces") and p.dim() and given.shape != p.shape and tuple(given.shape) == whole_shape(p)):
        return given
    local = torch.zeros(p.shape, dtype=given.dtype, device=given.device)
    if p.numel():                                                     # else it is of another pipeline stage
        copy_part(pieces_of(p), given, local)
    return local


def _meet(axis: Axis) -> None:
    """Wait for every rank of an axis, for a while."""
    if dist.get_backend(axis.group) != "gloo":                        # NCCL's watchdog ends a wait
        return
    try:
        dist.monitored_barrier(axis.group, timeout=timedelta(seconds=WAIT), wait_all_ranks=True)
    except RuntimeError as e:
        raise RuntimeError(f"save_pretrained, whole_state_dict: every rank of {axis.name} must call it, got some that did not in {WAIT} s; "
                           f"leave out `if rank == 0`. ({str(e).splitlines()[0]})") from None


@contextlib.contextmanager
def unhidden(model: Any) -> Iterator[None]:
    """transformers' own save_pretrained and words in place of the above."""
    hidden = {name: vars(model).pop(name) for name in ("save_pretrained", "_tp_size") if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(hidden)


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """What one rank does before any goes on; where it fails, all raise. The ranks wait as long as their backend does."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as e:
        error = e
    failed = torch.tensor([float(error is not None)], device=next(model.parameters()).device)
    for axis in _axes(model):
        dist.all_reduce(failed, group=axis.group)
    if error is not None:
        raise error
    if failed.item():
        raise RuntimeError("save_pretrained: the first rank must write the files, got an error there; see its message")


def _axes(model: Any) -> list[Axis]:
    """The axes of more than one rank that the model is split over: tp, that of its experts, pp."""
    found = {model._interlace_tp.ranks: model._interlace_tp} | {p.axis.ranks: p.axis for p in model.parameters() if hasattr(p, "axis")}
    if hasattr(model, "_interlace_stages_of"):
        found[model._interlace_stages_of.pp.ranks] = model._interlace_stages_of.pp
    return [axis for axis in found.values() if axis.size > 1]


def _save_pretrained(model: Any, save_directory: Any, is_main_process: bool = True, state_dict: dict | None = None, **kwargs: Any) -> None:
    """save_pretrained of the whole model: rank 0 of the world writes, all return when the files are there, or all raise."""
    if state_dict is not None:
        raise ValueError("save_pretrained: the state_dict of a split model must be gathered here, got one; leave it out")
    whole = whole_state_dict(model)
    with together(model), unhidden(model):
        if is_main_process and dist.get_rank() == 0:
            model.save_pretrained(save_directory, is_main_process=True, state_dict=whole, **kwargs)


def _take_parts(model: Any, state: dict, prefix: str, local_metadata: dict, *_: Any) -> None:
    """Cut whole tensors in a state_dict that is about to be loaded into a split model."""
    if local_metadata.get("assign_to_params_buffers"):
        raise ValueError("load_state_dict: a split model keeps its Parameter objects, got assign=True; leave it out")
    for name, p in model.named_parameters(remove_duplicate=False):
        if torch.is_tensor(given := state.get(prefix + name)):
            state[prefix + name] = _part_of(p, given)
