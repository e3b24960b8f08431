"""A step of AdamW over a GPT's parameters, alone and with the gradient clip, against torch.optim.AdamW. `interlace bench adamw`

Float32 parameters; bfloat16: fp32 masters are stepped and copied into bf16 parameters. Each sample is a step of the same run.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import adamw
from .cases import Case, Make, Way, Ways, grid

HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY, CLIP = 0.1, 1 - 2**-12                                          # peers clip the same gradients again and again, in place


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    """L layers of D with ffn 4 D, and a vocabulary of 32 D."""
    sizes = {"quick": {"small": (2, 128)}, "cuda": {"gpt 336M": (24, 1024)}}.get(sweep, {"gpt 5M": (4, 256), "gpt 34M": (8, 512)})
    return {name: {"L": L, "D": D} for name, (L, D) in {**sizes, "odd": (1, 333)}.items()}


cases = grid(("adamw", "adamw clip"), shapes, passes=("fwd",))


def parameters(make: Make, L: int, D: int) -> list[Tensor]:
    """fp32, each a tensor of its own; norms are not decayed."""
    layer = [(D,), (3 * D, D), (D, D), (D,), (4 * D, D), (D, 4 * D)]
    return [make.randn(*shape, grad=False).float() for shape in [(32 * D, D), *layer * L, (D,)]]


def ways(case: Case, make: Make) -> Ways:
    weights, half = parameters(make, case.shape["L"], case.shape["D"]), make.dtype if make.dtype != torch.float32 else None
    grads = [make.randn(*w.shape, grad=False).float() for w in weights]
    decays, scale = [DECAY * (w.dim() > 1) for w in weights], CLIP if "clip" in case.call else 1.0

    def made(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        copies = [w.to(half) for w in weights] if half else []
        return [w.to(dtype, copy=True) for w in weights], copies, [g.to(dtype, copy=True) for g in grads]

    def ours() -> Callable[[], tuple[Tensor, ...]]:
        mine, copies, gs = made()
        moments, steps = [[torch.zeros_like(w) for w in mine] for _ in range(2)], [0]

        def run() -> tuple[Tensor, ...]:
            steps[0] += 1
            adamw(mine, gs, *moments, step=steps[0], weight_decay=decays, scale=scale, copies=copies, **HYPER)
            return tuple(mine)
        return run

    def theirs(dtype: torch.dtype = torch.float32, **how: Any) -> Callable[[], tuple[Tensor, ...]]:
        mine, copies, gs = made(dtype)
        groups = [{"params": [w for w, d in zip(mine, decays) if d == decay], "weight_decay": decay} for decay in (0.0, DECAY)]
        opt = torch.optim.AdamW(groups, **HYPER, **how)
        for w, g in zip(mine, gs):
            w.grad = g

        def run() -> tuple[Tensor, ...]:
            if scale != 1:
                torch._foreach_mul_(gs, scale)
            opt.step()
            if copies:
                torch._foreach_copy_(copies, mine)
            return tuple(mine)
        return run

    true, n = theirs(torch.float64)(), sum(w.numel() for w in weights)
    known = lambda got: true  # noqa: E731
    return Ways((), lambda: true, Way(truth=known, fresh=ours), {
        "torch eager": Way(truth=known, fresh=theirs), "torch foreach": Way(truth=known, fresh=lambda: theirs(foreach=True)),
        "torch fused": Way(truth=known, fresh=lambda: theirs(fused=True))},
        nbytes=((30 if half else 28) * n, 0), flops=(15 * n, 0), cold=True)
