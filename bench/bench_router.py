"""router with the sums its losses need, against the composition that models use today and Megatron-Core's. `interlace bench router`"""
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import router
from .cases import Case, Make, Way, Ways, grid
from .peers import megatron

OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3-30b": {"pre_softmax": True, "norm_topk_prob": True},
    "deepseek-v3": {"score_function": "sigmoid", "num_groups": 8, "group_topk": 4, "scaling_factor": 2.5},
}


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    if sweep == "quick":
        return {"mixtral": {"T": 512, "E": 8, "K": 2}, "odd": {"T": 333, "E": 60, "K": 4}}
    T = 16384 if sweep == "cuda" else 2048
    return {"mixtral": {"T": T, "E": 8, "K": 2}, "qwen3-30b": {"T": T, "E": 128, "K": 8}, "deepseek-v3": {"T": T, "E": 256, "K": 8},
            "odd": {"T": 333, "E": 60, "K": 4}}


cases = grid(("router",), shapes)


def composed(name: str, K: int, bias: Tensor | None, ids: Tensor | None = None):
    """logits -> probs, score sums, lse: Mixtral's, Qwen3's or DeepSeek-V3's routing, and what switch and z losses sum up."""
    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = logits if logits.dtype == torch.float64 else logits.float()
        scores = x.sigmoid() if name == "deepseek-v3" else x.softmax(-1)
        chosen = ids
        if chosen is None:
            by = scores.detach()
            if bias is not None:
                by = by + bias
                T, E = by.shape
                group = by.view(T, 8, E // 8).topk(2, dim=-1).values.sum(-1).topk(4, dim=-1).indices
                kept = torch.zeros(T, 8, dtype=torch.bool, device=by.device).scatter_(1, group, True)
                by = by.masked_fill(~kept.repeat_interleave(E // 8, 1), -torch.inf)
            chosen = by.topk(K, dim=-1).indices
        probs = scores.gather(1, chosen)
        probs = probs / probs.sum(-1, keepdim=True) * (2.5 if name == "deepseek-v3" else 1.0)
        normed = scores / scores.sum(-1, keepdim=True) if name == "deepseek-v3" else scores
        counts = F.one_hot(chosen, x.shape[1]).sum((0, 1))            # the aux loss's constant
        return probs, normed.sum(0) + 0 * counts, torch.logsumexp(x, -1)
    return run


def megatrons(name: str, K: int, bias: Tensor | None):
    """Its routing in fp32 and the scores of its losses. It gives the probabilities as [T, E]."""
    how = {} if bias is None else {**OPTIONS[name], "expert_bias": bias}

    def build(m: Any):
        def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = logits.float()
            probs, _ = m.topk_routing_with_score_function(x, K, **how)
            _, scores = m.compute_routing_scores_for_aux_loss(x, K, how.get("score_function", "softmax"))
            return probs, scores.sum(0), torch.logsumexp(x, -1)
        return run
    return build


def ways(case: Case, make: Make) -> Ways:
    T, E, K = (case.shape[k] for k in "TEK")
    bias = torch.linspace(-0.1, 0.1, E, device=make.device) if case.name == "deepseek-v3" else None
    options = OPTIONS.get(case.name, {}) | ({} if bias is None else {"expert_bias": bias})
    logits = make.randn(T, E)
    if logits.element_size() < 4:                                     # ties would go any way in torch.topk: exact in bf16, none equal
        order = torch.rand(T, E, generator=make.generators[1], device=make.device).argsort(1)
        logits = (order.float() / 128 - E / 256).to(make.dtype).requires_grad_()

    def ours(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = router(x, K, **options)
        return r.probs, r.score_sums[0], r.lse

    eager = composed(case.name, K, bias)
    ids = router(logits.detach(), K, **options).ids.long()
    exact = composed(case.name, K, bias, ids)

    def wide(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs, *sums = exact(x)
        return torch.zeros_like(x).scatter(1, ids, probs), *sums

    theirs = megatron("transformer.moe.moe_utils", megatrons(case.name, K, bias))
    size, few = make.dtype.itemsize, 8 * T * K + 4 * T
    return Ways((logits,), exact, ours, {
        "torch eager": Way(eager, exact=exact), "torch.compile": make.compiled(eager),
        "megatron": theirs if isinstance(theirs, str) else Way(theirs, exact=wide)},
                nbytes=(T * E * size + few, 2 * T * E * size + few), flops=((5 + 2 * K) * T * E, (10 + K) * T * E))
