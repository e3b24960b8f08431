"""gelu, exact and tanh, against torch's own and the composition Hugging Face calls `gelu_new`. `interlace bench gelu`"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import gelu, gelu_ref
from .cases import Case, Make, Ways, grid, rows

cases = grid(("gelu", "gelu tanh"), rows("ffn"))


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def ways(case: Case, make: Make) -> Ways:
    N, D, form = case.shape["N"], case.shape["D"], "tanh" if case.call.endswith("tanh") else "none"
    eager, size = partial(F.gelu, approximate=form), make.dtype.itemsize
    return Ways((make.randn(N, D),), partial(gelu_ref, approximate=form), lambda x: gelu(x, form), {
        "torch eager": eager, **({"gelu_new": gelu_new} if form == "tanh" else {}), "torch.compile": make.compiled(eager)},
        nbytes=(2 * N * D * size, 3 * N * D * size), flops=(11 * N * D, 16 * N * D), graph=True)
