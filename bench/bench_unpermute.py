"""unpermute with probs against weighted index_add, F.embedding_bag and Megatron-Core's. `interlace bench unpermute`"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import route_plan, unpermute
from .bench_permute import routing_map, shapes
from .cases import Case, Make, Way, Ways, grid
from .peers import megatron

cases = grid(("unpermute",), shapes)


def ways(case: Case, make: Make) -> Ways:
    T, H, K, E = (case.shape[k] for k in "THKE")
    ids = make.randn(T, E, grad=False).topk(K).indices
    plan = route_plan(ids, E)
    row, slot, size = plan.row_of_slot.long(), plan.slot_of_row.long(), make.dtype.itemsize
    probs = make.randn(T, K, grad=False).softmax(-1).requires_grad_()

    def eager(y: Tensor, p: Tensor) -> Tensor:
        return y.new_zeros(T, H).index_add(0, slot // K, y * p.flatten()[slot][:, None].to(y.dtype))

    def bag(y: Tensor, p: Tensor) -> Tensor:
        return F.embedding_bag(row, y, mode="sum", per_sample_weights=p.to(y.dtype))

    y = make.randn(T * K, H)

    def megatrons(m: Any) -> Way:                                     # its probabilities are [T, E]
        chosen = routing_map(ids, E)
        fused = make.device == "cuda" and bool(m.HAVE_TE and m.fused_permute)
        plan = m.permute(y.detach()[:T], chosen, num_out_tokens=T * K, fused=fused)[2]
        wide = torch.zeros(T, E, dtype=probs.dtype, device=probs.device).scatter(1, ids, probs.detach()).requires_grad_()
        return Way(lambda y, p: m.unpermute(y, plan, torch.Size((T, H)), p, chosen, fused), (y, wide),
                   exact=lambda y, p: eager(y, p.gather(1, ids)))

    return Ways((y, probs), eager, lambda y, p: unpermute(y, plan, p), {
        "torch eager": eager, "F.embedding_bag": bag, "torch.compile": make.compiled(eager),
        "megatron": megatron("transformer.moe.moe_utils", megatrons)},
                nbytes=((1 + K) * T * H * size, (1 + 2 * K) * T * H * size), flops=(2 * K * T * H, 3 * K * T * H))
