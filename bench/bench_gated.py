"""gated, gate and up two tensors, against act(gate) * up in torch and Liger's. `interlace bench gated`"""
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ..kernels import gated, gated_ref
from .cases import Case, Make, Ways, grid, rows
from .peers import liger

TORCH: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
LIGER = {"silu": "LigerSiLUMulFunction", "gelu_tanh": "LigerGELUMulFunction"}
cases = grid(tuple(f"gated {name}" for name in TORCH), rows("ffn", odd=511))


def ways(case: Case, make: Make) -> Ways:
    N, D, name = case.shape["N"], case.shape["D"], case.call.split()[1]
    act, size = TORCH[name], make.dtype.itemsize
    eager = lambda gate, up: act(gate) * up  # noqa: E731
    return Ways((make.randn(N, D), make.randn(N, D)), partial(gated_ref, activation=name), lambda gate, up: gated(gate, up, name), {
        "torch eager": eager, "torch.compile": make.compiled(eager),
        **({"liger": liger(LIGER[name], make.device, lambda f: f.apply)} if name in LIGER else {})},
        nbytes=(3 * N * D * size, 5 * N * D * size), flops=(6 * N * D, 10 * N * D), graph=True)
