"""attention on slices of a fused qkv buffer against torch's scaled_dot_product_attention. `interlace bench attention`"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention
from .cases import MODELS, Case, Make, Way, Ways, grid


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    if sweep.startswith("quick"):
        return {"small": {"S": 128, "B": 1, "H": 4, "G": 4, "D": 64}, "odd": {"S": 77, "B": 1, "H": 3, "G": 1, "D": 36}}
    return {**{name: {"S": 1024, "B": 1, "H": m.heads // 8, "G": max(1, m.kv_heads // 8), "D": m.head_dim} for name, m in MODELS.items()},
            "gpt": {"S": 256, "B": 4, "H": 4, "G": 4, "D": 64}, "llama": {"S": 512, "B": 1, "H": 8, "G": 8, "D": 64},
            "odd": {"S": 333, "B": 3, "H": 5, "G": 1, "D": 36}}


cases = grid(("attention",), shapes)


def ways(case: Case, make: Make) -> Ways:
    if make.device == "cuda":
        raise NotImplementedError("on CUDA attention is torch's own")
    S, B, H, G, D = (case.shape[k] for k in ("S", "B", "H", "G", "D"))
    buffer = make.randn(S, B, (H + 2 * G) * D, grad=False)
    inputs = tuple(x.view(S, B, -1, D).detach().requires_grad_() for x in buffer.split((H * D, G * D, G * D), -1))

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G).permute(2, 0, 1, 3)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:         # its flash kernel takes as many heads of k and v as of q
        return eager(q, *(x.repeat_interleave(H // G, 2) for x in (k, v)))

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, *(x.repeat_interleave(H // G, 2) for x in (k, v))))
        later = torch.ones(S, S, dtype=torch.bool).triu(1)
        return ((q @ k.mT * D**-0.5).masked_fill(later, float("-inf")).softmax(-1) @ v).permute(2, 0, 1, 3)

    size, work = make.dtype.itemsize, B * H * S * (S + 1) * D
    peers: dict[str, Callable[..., Any] | Way | str] = {"torch eager": Way(repeated if H != G else eager), "by hand": Way(formula),
                                   "torch.compile": "left out: it calls the same kernel"}
    if H != G:
        peers["enable_gqa"] = Way(eager)
    return Ways(inputs, formula, Way(attention), peers, flops=(2 * work, 5 * work),
                nbytes=((2 * H + 2 * G) * S * B * D * size, (4 * H + 4 * G) * S * B * D * size))
