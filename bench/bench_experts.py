"""expert_mlp against a loop over experts, and against sort, grouped_mm and index_add. `interlace bench experts`"""
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import expert_mlp
from .bench_grouped_gemm import absent, grouped_mm, routing, shapes
from .cases import Case, Make, Way, Ways, grid

cases = grid(("expert_mlp",), shapes, too_long="float32")             # 69 TFLOP a call, without tensor cores


def ways(case: Case, make: Make) -> Ways:
    T, H, K, E, I = (case.shape[k] for k in "THKEI")
    plan, size, R = routing(case, make), make.dtype.itemsize, T * K
    slot, at = plan.slot_of_row.long(), plan.offsets.tolist()
    probs = make.randn(T, K, grad=False).float().softmax(-1).requires_grad_()

    def loop(x: Tensor, w13: Tensor, w2: Tensor, p: Tensor) -> Tensor:
        """As the models of Hugging Face's transformers do it."""
        o = torch.zeros_like(x)
        for e, (a, b) in enumerate(pairwise(at)):
            if a < b:
                gate, up = F.linear(x[slot[a:b] // K], w13[e]).chunk(2, -1)
                y = F.linear(F.silu(gate) * up, w2[e]) * p.flatten()[slot[a:b], None]
                o.index_add_(0, slot[a:b] // K, y.to(x.dtype))
        return o

    def grouped(x: Tensor, w13: Tensor, w2: Tensor, p: Tensor) -> Tensor:
        gate, up = grouped_mm(x[slot // K], w13, plan.offsets).chunk(2, -1)
        y = grouped_mm(F.silu(gate) * up, w2, plan.offsets) * p.flatten()[slot, None]
        return torch.zeros_like(x).index_add(0, slot // K, y.to(x.dtype))

    inputs = (make.randn(T, H), make.randn(E, 2 * I, H, scale=H**-0.5), make.randn(E, H, I, scale=I**-0.5), probs)
    once, flops = (2 * T * H + 3 * E * H * I + 5 * R * I + R * H) * size, 6 * R * H * I
    return Ways(inputs, loop, lambda x, a, b, p: expert_mlp(x, a, b, plan, p),
                {"torch eager": loop, "sort + F.grouped_mm": absent(size, H, I, 2 * I) or Way(grouped, exact=loop)},
                nbytes=(once, 2 * once), flops=(flops, 2 * flops), extra={"largest": max(b - a for a, b in pairwise(at))})
