"""Collectives as autograd functions over one Axis. Each is the identity when axis.size == 1.

    function              forward                    backward
    copy_to               identity                   all-reduce          (Megatron's f)
    reduce_from           all-reduce                 identity            (Megatron's g)
    gather_from           all-gather dim 0           reduce-scatter      (into a sequence-parallel region's consumer)
    reduce_scatter_to     reduce-scatter dim 0       all-gather
    scatter_to            this rank's rows           all-gather
    stack_from            all-gather to [t, ...]     this rank's part    (for a consumer that is the same on every rank)

None of them reduces into a tensor it does not own.
"""
import torch
from torch import Tensor

from ..kernels.comm import all_gather, all_reduce, reduce_scatter
from ..kernels.dispatch import once
from .mesh import Axis


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once("copy_to")
    def backward(ctx, dy):
        return all_reduce(dy, ctx.axis.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis.group)

    @staticmethod
    @once("reduce_from")
    def backward(ctx, dy):
        return dy, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_gather(x, axis.group)

    @staticmethod
    @once("gather_from")
    def backward(ctx, dy):
        return reduce_scatter(dy, ctx.axis.group), None


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return reduce_scatter(x, axis.group)

    @staticmethod
    @once("reduce_scatter_to")
    def backward(ctx, dy):
        return all_gather(dy, ctx.axis.group), None


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.chunk(axis.size)[axis.rank].clone()

    @staticmethod
    @once("scatter_to")
    def backward(ctx, dy):
        return all_gather(dy, ctx.axis.group), None


class _StackFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_gather(x.unsqueeze(0), axis.group)

    @staticmethod
    @once("stack_from")
    def backward(ctx, dy):
        return dy[ctx.axis.rank], None


def _check(op: str, x: Tensor, axis: Axis) -> None:
    if x.shape[0] % axis.size:
        raise ValueError(f"{op}: dim 0 must be divisible by {axis.name}={axis.size}, got {list(x.shape)}; pad it")


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_from(x: Tensor, axis: Axis) -> Tensor:
    """[S/t, ...] -> [S, ...]"""
    return x if axis.size == 1 else _GatherFrom.apply(x, axis)


def reduce_scatter_to(x: Tensor, axis: Axis) -> Tensor:
    """[S, ...] -> [S/t, ...]. Raises: ValueError when t does not divide S."""
    _check("reduce_scatter_to", x, axis)
    return x if axis.size == 1 else _ReduceScatterTo.apply(x, axis)


def scatter_to(x: Tensor, axis: Axis) -> Tensor:
    """[S, ...] -> [S/t, ...]. Raises: ValueError when t does not divide S."""
    _check("scatter_to", x, axis)
    return x if axis.size == 1 else _ScatterTo.apply(x, axis)


def stack_from(x: Tensor, axis: Axis) -> Tensor:
    """[...] of every rank -> [t, ...], in rank order. Every rank must compute the same from it."""
    return x.unsqueeze(0) if axis.size == 1 else _StackFrom.apply(x, axis)
