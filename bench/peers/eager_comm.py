"""What a model written in torch does: the collective of torch.distributed after or before a plain GEMM. Truth and peer of ours."""
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.comm.collectives import gather_into, scatter_into

__all__ = ["Collectives"]


class _Linear(torch.autograd.Function):
    """A linear map on one tensor, with its transpose as its gradient."""

    @staticmethod
    def forward(ctx, x, there, back):               
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, dy):                          
        return ctx.back(dy.contiguous()), None, None


class Collectives:
    """Differentiable collectives over `group` in torch.distributed's own; over a group of one rank nothing moves."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self.size = group, dist.get_world_size(group) if group is not None else 1

    def all_reduce(self, x: Tensor) -> Tensor:
        y = x.clone()
        if self.size > 1:
            dist.all_reduce(y, group=self.group)
        return y

    def all_gather(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        if self.size > 1:
            gather_into(y, x.contiguous(), self.group)
        else:
            y.copy_(x)
        return y

    def reduce_scatter(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        if self.size > 1:
            scatter_into(y, x.contiguous(), group=self.group)
        else:
            y.copy_(x)
        return y

    def all_to_all(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        if self.size > 1:
            dist.all_to_all_single(y, x.contiguous(), group=self.group)
        else:
            y.copy_(x)
        return y

    # ---- with gradients: reduce and copy_to are each other's, so are gather and scatter
    def reduce(self, x: Tensor) -> Tensor:
        return linear(x, self.all_reduce, torch.clone)

    def copy_to(self, x: Tensor) -> Tensor:
        return linear(x, lambda t: t.view_as(t), self.all_reduce)

    def gather(self, x: Tensor) -> Tensor:
        return linear(x, self.all_gather, self.reduce_scatter)

    def scatter(self, x: Tensor) -> Tensor:
        return linear(x, self.reduce_scatter, self.all_gather)


def linear(x: Tensor, there: Any, back: Any) -> Tensor:
    return _Linear.apply(x, there, back)
