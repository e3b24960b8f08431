"""clamped_swiglu against gpt-oss's formula in torch. `interlace bench clamped_swiglu`"""
import torch
from torch import Tensor

from ..kernels import clamped_swiglu
from .cases import Case, Make, Ways, grid, rows

cases = grid(("clamped_swiglu",), rows("ffn", odd=511))               # D: width of the output


def ways(case: Case, make: Make) -> Ways:
    N, D, E, size = case.shape["N"], case.shape["D"], 8, make.dtype.itemsize
    offsets = torch.linspace(0, N, E + 1).int().to(make.device)
    expert = torch.arange(E, device=make.device).repeat_interleave(offsets.diff().long())

    def eager(z: Tensor, bias: Tensor, p: Tensor) -> Tensor:
        """As the model of Hugging Face's transformers does it, all experts at once."""
        z = z + bias[expert]
        gate, up = z[:, ::2].clamp(max=7.0), z[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702)) * p[:, None].to(z.dtype)
    probs = make.randn(N, grad=False).float().requires_grad_()
    return Ways((make.randn(N, 2 * D, scale=4.0), make.randn(E, 2 * D), probs), eager,
                lambda z, b, p: clamped_swiglu(z, b, offsets, p), {"torch eager": eager, "torch.compile": make.compiled(eager)},
                nbytes=(3 * N * D * size, 6 * N * D * size), flops=(9 * N * D, 18 * N * D))
