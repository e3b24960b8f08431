"""Linear layers of somebody else's model by our product, on a CPU where torch's is slower.

    nn.Linear                       copy_gemm on one rank: the op of ColumnParallelLinear, forward and both gradients
    x @ weight + bias (Conv1D)      the same; the gradient comes out in the layout of the weight

The weight's device and dtype decide what is replaced (`torch_keeps`), the input what runs (`pays`): few rows (generate), small
layers, autocast, another dtype, torch.compile and torch.func take the layer's own forward. Both: kernels/comm/gemm.py
"""
from __future__ import annotations

from typing import Any

from torch import nn

from ..kernels.comm import copy_gemm
from ..kernels.comm.gemm import pays, torch_keeps
from . import fused
from .fused import Change, Fused
from .split import transposed

__all__ = ["recognise_product"]


class Linear(Fused):
    """x @ weight.T + bias by copy_gemm where it pays."""

    bias: Any

    def forward(self, input):
        if fused.stock() or not pays(input, self.weight):
            return super().forward(input)
        y = copy_gemm(input, self.weight)
        return y if self.bias is None else y + self.bias


class Conv1D(Fused):
    """x @ weight + bias by copy_gemm where it pays."""

    bias: Any

    def forward(self, x):
        if fused.stock() or not pays(x, self.weight):
            return super().forward(x)
        return copy_gemm(x, self.weight.t()) + self.bias


def recognise_product(module: Any) -> tuple[type, Change] | str | None:
    """(class to put in front, the change), or why torch's product stays, or None for what is no linear layer."""
    if not isinstance(module, nn.Linear) and not transposed(module):
        return None
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} is a class of its own"
    if "forward" in vars(module):
        return "their forward was overridden on the instance"
    if module._parameters.get("weight") is None:
        return "their weight is computed, no parameter"
    return torch_keeps(module.weight) or (Linear if isinstance(module, nn.Linear) else Conv1D, Change(type(module), "gemm"))
