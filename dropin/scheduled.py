"""A training step of a model cut into pipeline stages, by a schedule of torch.distributed.pipelining: 1F1B keeps p - r micro-batches on
rank r, where the model's own call (GPipe) keeps all.

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

SCHEDULES = ("1f1b", "gpipe")


def pipeline_step(model: nn.Module, batch: Mapping[str, Any], *, microbatches: int | None = None, schedule: str = "1f1b") -> Tensor:
    """Forward and backward of one batch over the stages of `model`. Collective over pp (and over tp and ep within a stage).

    Args:
        model: cut by replace_ over a mesh with pp > 1, or interlace's DistributedDataParallel of one (call its finish() afterwards).
        batch: keyword arguments of the model's forward, with input_ids [B, S] and labels; use_cache is False unless given.
        microbatches: must divide B; default: the largest divisor of B up to 4 pp. schedule: "1f1b" or "gpipe".
    Returns: the loss of the whole batch, 0-d, on every rank. Raises: ValueError; nothing has run then.
    """
    ddp, whole = (model, model.module) if isinstance(model, DistributedDataParallel) else (None, model)
    stages: Stages | None = getattr(whole, "_interlace_stages_of", None)
    count, many = _check(whole, stages, batch, microbatches, schedule)
    assert stages is not None
    batch = {"use_cache": False, **batch}
    if "num_items_in_batch" not in batch:
        batch["num_items_in_batch"] = (batch["labels"][..., 1:] != -100).sum().clamp(min=1)
    if ddp is not None:
        ddp.ready()
    stage = _Stage(whole, stages, batch, count // many, count)
    pipeline = _pipeline(stage, stages, batch, many, schedule)
    with _outside(whole, stages, ddp):
        return pipeline.step(batch["input_ids"], batch["labels"], torch.arange(many) * stage.rows)


def _check(model: Any, stages: Stages | None, batch: Mapping[str, Any], many: int | None, schedule: str) -> tuple[int, int]:
    """(B, micro-batches)"""
    if stages is None:
        raise ValueError(f"pipeline_step: model must be cut into stages, got {type(model).__name__} without; call replace_ over a mesh "
                         "with pp > 1 first")
    problems = [f"batch must have {k!r}, got {', '.join(map(repr, batch)) or 'nothing'}" for k in ("input_ids", "labels")
                if not torch.is_tensor(batch.get(k))]
    raise_problems("pipeline_step", problems)
    count = len(batch["input_ids"])
    legal = [m for m in range(1, count + 1) if count % m == 0]
    if many is None:
        many = max(m for m in legal if m <= 4 * stages.pp.size)
    if many not in legal:
        problems.append(f"microbatches must divide the {count} samples of the batch, got {many}; use one of {legal}")
    if schedule not in SCHEDULES:
        problems.append(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    loss = getattr(model, "loss_function", None)
    takes = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(model).forward).parameters.values())
    if not (takes and (isinstance(loss, CausalLoss) or isinstance(recognise_loss(model), CausalLoss))):
        problems.append("the model's loss_function must be the mean cross entropy of the next token, and its forward hand on "
                        f"num_items_in_batch, got {type(model).__name__}; call model(**batch).loss.backward(), which is GPipe")
    raise_problems("pipeline_step", problems)
    return count, many


class _Stage(nn.Module):
    """This rank's stage as torch's schedules call it: the micro-batch that begins at `first_sample`, h -> h, or the loss, [1]."""

    loss_scale = 1.0

    def __init__(self, model: Any, stages: Stages, batch: dict[str, Any], rows: int, count: int):
        super().__init__()
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
        out: Tensor = self.run(int(first_sample), Passing(None if self.stages.pp.rank == 0 else x))
        if self.stages.pp.rank < self.stages.pp.size - 1:
            return out.contiguous()
        return out.to(torch.promote_types(out.dtype, torch.float32)).view(1)


def _pipeline(stage: _Stage, stages: Stages, batch: dict[str, Any], many: int, schedule: str) -> Pipeline:
    """torch's schedule for batches of these shapes, kept on the model's Stages."""
    ids, h = batch["input_ids"], None
    key = schedule, many, tuple(ids.shape), torch.is_autocast_enabled(ids.device.type)
    if key not in stages.pipelines:
        with torch.no_grad():
            h = stage.run(0, Passing(None, probe=True))               # what enters the first layer
        wide = torch.promote_types(h.dtype, torch.float32)
        stages.pipelines[key] = Pipeline(
            {stages.pp.rank: stage}, stages.pp, num_stages=stages.pp.size, schedule=schedule, microbatches=many,
            ids_shape=(stage.rows, *ids.shape[1:]), shape=tuple(h.shape), dtype=h.dtype, loss_dtype=wide, device=h.device), stage
    pipeline, made = stages.pipelines[key]
    made.batch = batch
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
