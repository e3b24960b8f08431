"""The loss of a foreign model over logits that stay split over the vocabulary: gather_logits=False.

    head -> logits [B, S, V/t] of this rank -> whatever the model does to them element by element -> loss_function -> loss

In training, where labels are given, the head's output is not gathered: no rank holds [B, S, V]. The model's own forward hands the
part to `loss_function`, and returns it as `logits`. In eval mode, or without labels (generate), logits are whole as ever.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.autocast import biased
from ..kernels.comm import copy_gemm
from ..parallel.collectives import stack_from
from ..parallel.errors import raise_problems
from ..parallel.mesh import Axis
from ..parallel.tensor_parallel import GatheredLinear, vocab_parallel_cross_entropy
from . import fused
from .fused import CausalLoss
from .split import Plan, Split

__all__ = ["ParallelCausalLoss", "SplitHead", "split_logits", "whole_outputs"]


class SplitHead(GatheredLinear):
    """A GatheredLinear whose output stays this rank's columns, padding included, while `local` is set."""

    local = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.local:
            return super().forward(x)
        return biased(copy_gemm(x, self.weight, self.tp.group), self.bias)


class ParallelCausalLoss(CausalLoss):
    """CausalLoss for whole logits; for a rank's columns, the loss from the maxima and sums of all ranks."""

    def __init__(self, original: Callable, head: Any):
        super().__init__(original)
        self.head = head

    def __call__(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
        if not getattr(self.head, "local", False):                    # or the model is whole for a while: verify
            return super().__call__(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if fused.stock() or kwargs.get("weight") is not None or kwargs.get("label_smoothing"):
            return self.original(_whole(logits, self.head), labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
        targets = targets.reshape(-1).to(logits.device)
        loss = vocab_parallel_cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, self.head.tp, num_embeddings=vocab_size,
                                            ignore_index=ignore_index).sum()
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / count


def split_logits(out: Plan, model: Any, loss: CausalLoss | None, tp: Axis) -> CausalLoss | None:
    """Change a plan's head to one that need not gather; returns the loss to stand in for the model's. Raises: ValueError."""
    if tp.size == 1 or isinstance(getattr(model, "loss_function", None), ParallelCausalLoss):
        return loss
    found = next((s for s in out.splits.values() if s[1].style == "gather"), None)
    if found is None:
        out.problems.append("gather_logits=False needs an output head that is split over tp, got none; leave it out")
    if loss is None:
        out.problems.append("gather_logits=False needs a model whose loss_function is the mean cross entropy of the next token, and the "
                            "kernel cross_entropy, got none; leave it out")
    raise_problems("replace_", out.problems)
    assert found is not None and loss is not None
    head, how = found
    how.layer, how.make, how.attributes = SplitHead, partial(SplitHead.from_torch, tp=tp), {"local": False}
    out.splits[""] = model, Split("loss", watch=partial(_switch, head))
    return ParallelCausalLoss(loss.original, head)


def _switch(head: Any, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    head.local = model.training and kwargs.get("labels") is not None


def _whole(part: Tensor, head: Any) -> Tensor:
    return stack_from(part, head.tp).movedim(0, -2).flatten(-2)[..., :head.out_features]


def whole_outputs(model: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs to compare with those of the whole model: logits that stayed split are gathered."""
    head: Any = getattr(getattr(model, "loss_function", None), "head", None)
    if not getattr(head, "local", False):
        return tensors
    return [_whole(t, head) if t.dim() and t.shape[-1] == len(head.weight) else t for t in tensors]
