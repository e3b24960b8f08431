"""rope on a slice of a fused qkv buffer against rotate_half in torch, Megatron-Core's and Liger's. `interlace bench rope`"""
from types import SimpleNamespace

import torch
from torch import Tensor

from ..kernels import rope, rope_tables
from .cases import MODELS, Case, Make, Way, Ways, grid
from .peers import liger, megatron


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    if sweep == "quick":
        return {"small": {"S": 128, "B": 2, "H": 8, "Dh": 64}, "odd": {"S": 111, "B": 3, "H": 5, "Dh": 36}}
    S, part = (4096, 1) if sweep == "cuda" else (512, 8)
    return {**{name: {"S": S, "B": 2, "H": m.heads // part, "Dh": m.head_dim} for name, m in MODELS.items()},
            "odd": {"S": 333, "B": 3, "H": 5, "Dh": 36}}


cases = grid(("rope",), shapes)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def torch_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def ways(case: Case, make: Make) -> Ways:
    S, B, H, Dh = (case.shape[k] for k in ("S", "B", "H", "Dh"))
    buffer = make.randn(S, B, H, 3 * Dh, grad=False)                  # each head holds its q, k and v
    x = buffer[..., :Dh].detach().requires_grad_()

    def tables(dtype: torch.dtype, full: bool) -> tuple[Tensor, ...]:
        cos, sin = rope_tables(torch.arange(S, device=make.device), Dh, dtype=torch.float64)
        both = tuple(torch.cat((t, t), -1)[:, None, None] if full else t for t in (cos, sin))
        return tuple(t.to(dtype) for t in both)

    half, full, exact = tables(torch.float32, False), tables(make.dtype, True), tables(torch.float64, True)

    def theirs(f):                                                    # rotates q and k, [B, H, S, Dh], in place
        def run(x: Tensor) -> Tensor:
            q = x.permute(1, 2, 0, 3).contiguous()
            return f.apply(q, q[:, :1], full[0].view(1, S, Dh), full[1].view(1, S, Dh))[0].permute(2, 0, 1, 3)
        return run

    def megatrons(m):                                                 # takes angles: their cosines are part of each call
        angles = torch.cat([torch.atan2(half[1], half[0])] * 2, -1)[:, None, None]
        fused = make.device == "cuda" and m.fused_apply_rotary_pos_emb is not None
        config = SimpleNamespace(apply_rope_fusion=fused, rotary_interleaved=False, multi_latent_attention=False, mrope_section=None)
        return lambda x: m.apply_rotary_pos_emb(x, angles, config, cp_group=make)

    n, size = S * B * H * Dh, make.dtype.itemsize
    cost = (2 * n * size + 4 * S * Dh,) * 2
    eager = lambda x: torch_rope(x, *full)  # noqa: E731
    return Ways((x,), lambda x: torch_rope(x, *exact), Way(lambda x: rope(x, half[0], half[1])), {
        "torch eager": eager, "torch.compile": make.compiled(eager), "liger": liger("LigerRopeFunction", make.device, theirs),
        "megatron": megatron("models.common.embeddings.rope_utils", megatrons)},
        nbytes=cost, flops=(3 * n, 3 * n), graph=True)
