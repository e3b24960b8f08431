"""Weight gradients that are computed later than the input's: what lets a zero-bubble pipeline schedule split the backward.

    I   dx = dy w     at once, so that the stage before can go on
    W   dw = dy^T x   when the schedule has nothing better to do: `take` hands out what one micro-batch left behind

The gradient arrives at the parameter as autograd would bring it: summed into .grad, hooks run.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.autocast import lowered
from ..kernels.comm import all_gather, gemm
from ..kernels.comm.collectives import Group
from ..kernels.dispatch import once

__all__ = ["Deferred", "linear"]


class Deferred:
    """Closures in the order of the backward."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def take(self) -> Callable[[], None]:
        todo, self.waiting = self.waiting, []

        def run() -> None:
            for compute in todo:
                compute()
        return run


class _Later(torch.autograd.Function):
    """y -> y; its backward leaves dw to `deferred`."""

    @staticmethod
    def forward(ctx, y, x, rest):
        ctx.save_for_backward(x)
        ctx.rest = rest                                               # not saved: recompute hands out a detached copy of a saved weight
        return y.view_as(y)

    @staticmethod
    @once("linear")
    def backward(ctx, dy):
        x, = ctx.saved_tensors
        weight, gather_x, gather_dy, deferred = ctx.rest

        def compute() -> None:
            dyf, xf = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            dyf = dyf if gather_dy is None else all_gather(dyf, gather_dy)
            xf = xf if gather_x is None else all_gather(xf, gather_x)
            weight.backward(gemm(dyf.t(), xf).to(weight.dtype))
        deferred.waiting.append(compute)
        return dy, None, None


def linear(op: Callable[..., Tensor], x: Tensor, weight: nn.Parameter, group: Group, deferred: Deferred | None, *,
           gather_x: bool = False, gather_dy: bool = False) -> Tensor:
    """op(x, weight, group), its weight gradient left to `deferred` where there is one. gather_x, gather_dy: which of the two is
    split over the rows of the product that gives it."""
    if deferred is None or not (torch.is_grad_enabled() and weight.requires_grad and x.requires_grad):
        return op(x, weight, group)
    x = lowered(x)                                                    # dw is dy^T times what was multiplied
    y = op(x, weight.detach(), group)                                 # the weight stays out of the graph: its hooks run with W alone
    return _Later.apply(y, x.detach(), (weight, group if gather_x else None, group if gather_dy else None, deferred))
