"""swiglu against silu(gate) * up in torch and Liger's. `interlace bench swiglu`"""
import torch.nn.functional as F
from torch import Tensor

from ..kernels import swiglu, swiglu_ref
from .cases import Case, Make, Ways, grid, rows
from .peers import liger

cases = grid(("swiglu",), rows("ffn", odd=511))                       # D: width of the output


def torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def ways(case: Case, make: Make) -> Ways:
    N, D = case.shape["N"], case.shape["D"]
    size = make.dtype.itemsize
    return Ways((make.randn(N, 2 * D),), swiglu_ref, swiglu, {
        "torch eager": torch_swiglu, "torch.compile": make.compiled(torch_swiglu),
        "liger": liger("LigerSiLUMulFunction", make.device, lambda f: lambda x: f.apply(*(t.contiguous() for t in x.chunk(2, -1))))},
        nbytes=(3 * N * D * size, 5 * N * D * size), flops=(6 * N * D, 10 * N * D))
