"""Pipeline parallelism over torch.distributed.pipelining: this rank's stages of the model, run by one of torch's schedules.

    4 stages, 1F1B, micro-batches 0 ..      rank 0   F0 F1 F2 F3 B0 F4 B1 F5 ...
                                            rank 1      F0 F1 F2 B0 F3 B1 ...
    bubble: (p - 1) / (m + p - 1) of the time with m micro-batches over p stages; 1/v of it with v chunks a rank (interleaved)

Shapes  ids, labels [m * B, S] -> stage 0 embeds; between stages h [S/t, B, D] travels point to point, and its gradient back;
        the last stage gives the loss of each micro-batch, 0-d. Every rank gets their mean.
Comm    a rank sends m * v * S/t B D * itemsize forward and as much backward, to one neighbour: the least of all axes
Zero bubble splits the backward: I gives the input's gradient and lets the next stage go on, W the weights' later. The linear
layers put their weight gradients into `Deferred` during I; W computes them. Nothing is computed twice.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as torch_schedules

from ..kernels.comm import all_reduce, heap_of
from .deferred import Deferred
from .layout import SCHEDULES
from .mesh import Axis

__all__ = ["Pipeline"]


class _Stage(PipelineStage):
    def _get_init_p2p_neighbors_ops(self):
        """Not to this rank itself, where a V puts two neighbours on it: torch up to 2.12 sends there too, and gloo has no such pair."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class Pipeline:
    """This rank's stages under one schedule.

    Args:
        stages: {stage number: module}, as layout.stages_of_rank numbers them; a module maps (ids or h), labels=, first_sample= to h,
            or to the scaled loss, [1], in the last stage; `defer` hands it the Deferred of a zero-bubble schedule, `loss_scale` 1 / m.
        pp: the axis. num_stages: over all ranks. schedule: a key of layout.SCHEDULES. microbatches: of one step on this rank.
        ids_shape [B, S] of a micro-batch; shape, dtype of h between stages; loss_dtype; device.
    """

    def __init__(self, stages: dict[int, Any], pp: Axis, *, num_stages: int, schedule: str, microbatches: int, ids_shape: tuple[int, int],
                 shape: tuple[int, ...], dtype: torch.dtype, loss_dtype: torch.dtype, device: torch.device):
        self.pp, self.device, self.loss_dtype, self.microbatches = pp, device, loss_dtype, microbatches
        self.first, self.last = 0 in stages, num_stages - 1 in stages
        if device.type == "cpu":                                      # made before the first message: torch's DETAIL debug mode counts
            assert pp.group is not None                               # messages as collectives, of which ranks have different numbers
            heap_of(pp.group)
        how = SCHEDULES[schedule]
        h = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        ids = torch.empty(ids_shape, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=True)
        made = []
        for i, module in sorted(stages.items()):
            later = Deferred() if how.split_backward else None
            stage = _Stage(module, i, num_stages, device, input_args=h if i else ids, group=pp.group,
                           output_args=loss if i == num_stages - 1 else h, dw_builder=later.take if later else None)
            made.append(stage)
            module.defer(later)
            module.loss_scale = 1 / microbatches
        kind: Any = getattr(torch_schedules, how.torch_name)
        self.schedule = kind(made if how.chunked else made[0], microbatches, loss_fn=lambda loss, _: loss.squeeze(0), scale_grads=False)

    def step(self, ids: Tensor, labels: Tensor, first_samples: Tensor) -> Tensor:
        """Forward and backward of all micro-batches: ids, labels [m * B, S], first_samples [m] on every rank. The gradients of the
        stages' loss are added to the parameters. Returns: the sum of the losses, on every rank (0-d)."""
        losses: list[Tensor] = []
        args = (ids,) if self.first else ()
        target = torch.zeros(self.microbatches, device=self.device) if self.last else None
        self.schedule.step(*args, target=target, losses=losses if self.last else None, labels=labels, first_sample=first_samples)
        total = torch.zeros(1, dtype=self.loss_dtype, device=self.device)
        for loss in losses:
            total += loss.detach()
        return all_reduce(total, self.pp.group)[0]
