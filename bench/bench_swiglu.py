"""swiglu against silu(gate) * up in torch, Megatron-Core's and Liger's. `interlace bench swiglu`"""
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..kernels import swiglu, swiglu_ref
from .cases import Case, Make, Ways, grid, rows
from .peers import liger, megatron

cases = grid(("swiglu",), rows("ffn", odd=511))                       # D: width of the output


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def megatron_swiglu(make: Make) -> Callable[[Tensor], Tensor] | str:
    """Its functions are compiled where they are defined."""
    left_out = make.compiled(torch_swiglu)
    return left_out if isinstance(left_out, str) else megatron("fusions.fused_bias_swiglu", lambda m: lambda x: m.bias_swiglu_impl(x, None))


def ways(case: Case, make: Make) -> Ways:
    N, D = case.shape["N"], case.shape["D"]
    size = make.dtype.itemsize
    return Ways((make.randn(N, 2 * D),), swiglu_ref, swiglu, {
        "torch eager": torch_swiglu, "torch.compile": make.compiled(torch_swiglu), "megatron, torch.compile": megatron_swiglu(make),
        "liger": liger("LigerSiLUMulFunction", make.device, lambda f: lambda x: f.apply(*(t.contiguous() for t in x.chunk(2, -1))))},
        nbytes=(3 * N * D * size, 5 * N * D * size), flops=(6 * N * D, 10 * N * D), graph=True)
