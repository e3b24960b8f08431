"""A training step of a model cut into pipeline stages, by a schedule of torch.distributed.pipelining: 1F1B keeps p - r micro-batches on
rank r, where the model's own call (GPipe) keeps all. With several stages a rank it is the interleaved 1F1B.

    loss = interlace.pipeline_step(model, batch, microbatches=8)      # forward and backward; p.grad is added to, as by loss.backward()
    optimizer.step()

    rank 0   F0 F1 F2 F3 B0 F4 B1 F5 ...      Each F is the model's own forward of one micro-batch: layers of stages before hand on what
    rank 1      F0 F1 F2 B0 F3 B1 ...         arrived, and after this stage's last layer it ends; the last stage's goes on to the loss.

Shapes  batch: what model(**batch) takes, the same on every rank of pp, B samples; h [B/m, S, D] between stages, its gradient back.
Numbers the loss is the mean over the labels of the whole batch: each micro-batch's sum over their count (`num_items_in_batch`).
Comm    each stage boundary m messages of h forward and back; one all-reduce over pp of the gradients outside the layers: the first
        stage has those of the embedding, the last those of the head, and every rank gets the sum.
"""
from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.comm import all_reduce
from ..parallel.data_parallel import DistributedDataParallel
from ..parallel.errors import raise_problems
from ..parallel.pipeline_parallel import Pipeline
from .fused import CausalLoss, recognise_loss
from .pipeline import EndOfStage, Passing, Stages, rows

__all__ = ["pipeline_step"]

SCHEDULES = ("1f1b", "gpipe", "interleaved_1f1b")


def pipeline_step(model: nn.Module, batch: Mapping[str, Any], *, microbatches: int | None = None, schedule: str | None = None) -> Tensor:
    """Forward and backward of one batch over the stages of `model`. Collective over pp (and over tp and ep within a stage).

    Args:
        model: cut by replace_ over a mesh with pp > 1, or interlace's DistributedDataParallel of one (call its finish() afterwards).
        batch: keyword arguments of the model's forward, with input_ids [B, S] and labels; use_cache is False unless given.
        microbatches: must divide B; default: the largest divisor of B up to 4 pp. With several stages a rank also a multiple of pp.
        schedule: "1f1b" (default) or "gpipe"; with several stages a rank "interleaved_1f1b".
    Returns: the loss of the whole batch, 0-d, on every rank. Raises: ValueError; nothing has run then.
    """
    ddp, whole = (model, model.module) if isinstance(model, DistributedDataParallel) else (None, model)
    stages: Stages | None = getattr(whole, "_interlace_stages_of", None)
    count, many = _check(whole, stages, batch, microbatches, schedule)
    assert stages is not None
    schedule = _schedule(stages, schedule)
    batch = {"use_cache": False, **batch}
    if "num_items_in_batch" not in batch:
        batch["num_items_in_batch"] = (batch["labels"][..., 1:] != -100).sum().clamp(min=1)
    if ddp is not None:
        ddp.ready()
    pipeline = _pipeline(whole, stages, batch, count, many, schedule)
    with _outside(whole, stages, ddp):
        return pipeline.step(batch["input_ids"], batch["labels"], torch.arange(many) * (count // many))


def _schedule(stages: Stages, given: str | None) -> str:
    return given or ("1f1b" if stages.count == stages.pp.size else "interleaved_1f1b")


def _check(model: Any, stages: Stages | None, batch: Mapping[str, Any], many: int | None, given: str | None) -> tuple[int, int]:
    """(B, micro-batches)"""
    if stages is None:
        raise ValueError(f"pipeline_step: model must be cut into stages, got {type(model).__name__} without; call replace_ over a mesh "
                         "with pp > 1 first")
    problems = [f"batch must have {k!r}, got {', '.join(map(repr, batch)) or 'nothing'}" for k in ("input_ids", "labels")
                if not torch.is_tensor(batch.get(k))]
    raise_problems("pipeline_step", problems)
    count, schedule = len(batch["input_ids"]), _schedule(stages, given)
    several = stages.count > stages.pp.size
    legal = [m for m in range(1, count + 1) if count % m == 0 and not (several and m % stages.pp.size)]
    if not legal:
        problems.append(f"the batch must have a multiple of pp={stages.pp.size} samples under {schedule}, got {count}")
        raise_problems("pipeline_step", problems)
    if many is None:
        many = max(m for m in legal if m <= 4 * stages.pp.size)
    if many not in legal:
        problems.append(f"microbatches must divide the {count} samples of the batch, got {many}; use one of {legal}")
    fitting = [s for s in SCHEDULES if s.startswith("interleaved") == several]
    if schedule not in fitting:
        problems.append(f"schedule must be one of {', '.join(fitting)} with {stages.count // stages.pp.size} stages a rank, "
                        f"got {schedule!r}")
    loss = getattr(model, "loss_function", None)
    takes = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values())
    if not (takes and (isinstance(loss, CausalLoss) or isinstance(recognise_loss(model), CausalLoss))):
        problems.append("the model's loss_function must be the mean cross entropy of the next token, and its forward hand on "
                        f"num_items_in_batch, got {type(model).__name__}; call model(**batch).loss.backward(), which is GPipe")
    raise_problems("pipeline_step", problems)
    return count, many


class _Stage(nn.Module):
    """A stage of this rank as torch's schedules call it: the micro-batch that begins at `first_sample`, h -> h, or the loss, [1]."""

    loss_scale = 1.0

    def __init__(self, model: Any, stages: Stages, batch: dict[str, Any], rows: int, count: int, number: int):
        super().__init__()
        self.number = number
        self.model, self.stages, self.batch, self.rows, self.count = model, stages, batch, rows, count

    def defer(self, deferred: Any) -> None:
        """Schedules that split the backward are not among SCHEDULES."""

    def run(self, first: int, passing: Passing) -> Any:
        """The model's forward of one micro-batch: what its last layer here gave, or the loss."""
        batch = rows(self.batch, slice(first, first + self.rows), self.count)
        self.stages.passing = passing
        try:
            return self.model(**batch).loss
        except EndOfStage as e:
            return e.args[0]
        finally:
            self.stages.passing = None

    def forward(self, x: Tensor, *, labels: Tensor, first_sample: Tensor) -> Tensor:
        out: Tensor = self.run(int(first_sample), Passing(x if self.number else None, self.number))
        if self.number < self.stages.count - 1:
            return out.contiguous()
        return out.to(torch.promote_types(out.dtype, torch.float32)).view(1)


def _pipeline(model: nn.Module, stages: Stages, batch: dict[str, Any], count: int, many: int, schedule: str) -> Pipeline:
    """torch's schedule for batches of these shapes, kept on the model's Stages."""
    ids = batch["input_ids"]
    key = schedule, many, tuple(ids.shape), torch.is_autocast_enabled(ids.device.type)
    if key not in stages.pipelines:
        made = {n: _Stage(model, stages, batch, count // many, count, n) for n in range(stages.pp.rank, stages.count, stages.pp.size)}
        with torch.no_grad():
            h = made[stages.pp.rank].run(0, Passing(None, probe=True))   # what enters the first layer
        wide = torch.promote_types(h.dtype, torch.float32)
        stages.pipelines[key] = Pipeline(
            dict(made), stages.pp, num_stages=stages.count, schedule=schedule, microbatches=many,
            ids_shape=(count // many, *ids.shape[1:]), shape=tuple(h.shape), dtype=h.dtype, loss_dtype=wide, device=h.device), made
    pipeline, made = stages.pipelines[key]
    for stage in made.values():
        stage.batch = batch
    return pipeline


@contextlib.contextmanager
def _outside(model: nn.Module, stages: Stages, ddp: DistributedDataParallel | None) -> Any:
    """Within: gradients of this step alone for what stands on every rank; after it, their sums over pp are added to what was there."""
    inside = {id(p) for p in stages.layers.parameters()}
    params: list[Any] = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    grads = (lambda p: p.main_grad if p in ddp.seen else None) if ddp is not None else (lambda p: p.grad)
    before = {p: g.clone() if ddp is not None else g for p in params if (g := grads(p)) is not None}
    for p in params:
        p.grad = None
        if ddp is not None:
            ddp.seen.discard(p)
    with ddp.no_sync() if ddp is not None else contextlib.nullcontext():
        yield
    with torch.no_grad():
        there = torch.tensor([float(grads(p) is not None) for p in params], device=params[0].device)
        todo = [p for p, n in zip(params, all_reduce(there, stages.pp.group).tolist()) if n]
        for dtype in dict.fromkeys(_like(p, ddp).dtype for p in todo):
            same = [p for p in todo if _like(p, ddp).dtype == dtype]
            mine = [torch.zeros_like(_like(p, ddp)) if (g := grads(p)) is None else g for p in same]
            total = all_reduce(torch.cat([g.reshape(-1) for g in mine]), stages.pp.group)
            for p, g in zip(same, total.split([g.numel() for g in mine])):
                g = g.view_as(p) + before.pop(p) if p in before else g.view_as(p)
                _put(p, g, ddp)
        for p, g in before.items():                                   # no stage has one of this step
            _put(p, g, ddp)


def _like(p: Any, ddp: DistributedDataParallel | None) -> Tensor:
    like: Tensor = p if ddp is None else p.main_grad
    return like


def _put(p: Any, grad: Tensor, ddp: DistributedDataParallel | None) -> None:
    if ddp is None:
        p.grad = grad.clone()
    else:
        p.main_grad.copy_(grad)
        ddp.seen.add(p)
