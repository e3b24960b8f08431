"""Fused kernels inside a module of stacked experts, called with (tokens, chosen experts, their weights): recognised by a probe.

    gate_up_proj [E, 2F, H], down_proj [E, H, F]: sum of w * down(silu(gate) * up)                 route_plan, expert_mlp
    gate_up_proj [E, H, 2F] of pairs (gate, up), down_proj [E, F, H], both with a bias, gate and   route_plan, grouped_gemm,
      up clamped: sum of w * down((up + 1) * gate * sigmoid(alpha * gate)), as in gpt-oss            clamped_swiglu, unpermute

An expert id of E means none, as in transformers.
"""
from __future__ import annotations

import copy
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import clamped_swiglu, clamped_swiglu_ref, expert_mlp, grouped_gemm, permute, route_plan, unpermute
from ..kernels.autocast import lowered
from .fused import Change, Fused, _alike

__all__ = ["COUNTS", "recognise_experts", "two_experts"]

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")    # attributes that hold the number of experts
STACKED = {"gate_up_proj", "down_proj"}
BIASED = STACKED | {"gate_up_proj_bias", "down_proj_bias"}


class Experts(Fused):
    """route_plan and expert_mlp over all experts at once."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x, w13, w2 = (lowered(t) for t in (hidden_states, self.gate_up_proj, self.down_proj))
        if x.dim() != 2 or not _alike(x, w13, w2):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        ids = top_k_index.where(top_k_index < len(w13), -1)
        return expert_mlp(x, w13, w2, route_plan(ids, len(w13)), top_k_weights).to(hidden_states.dtype)


class ClampedExperts(Fused):
    """Both products over all experts at once, from the weights as they lie; w and the first bias enter with the activation. A token's
    second biases are its weights [E] times all biases: one more addend where its rows are summed."""

    gate_up_proj_bias: Tensor
    down_proj_bias: Tensor

    def forward(self, hidden_states, router_indices=None, routing_weights=None):
        x, w13, w2, b13, b2 = (lowered(t) for t in (hidden_states, self.gate_up_proj, self.down_proj, self.gate_up_proj_bias,
                                                    self.down_proj_bias))
        if x.dim() != 2 or not _alike(x, w13, w2, b13, b2):
            return super().forward(hidden_states, router_indices, routing_weights)
        E, weights = len(w13), routing_weights.to(torch.promote_types(x.dtype, torch.float32))
        there = router_indices < E
        plan = route_plan(router_indices.where(there, -1), E)
        z = grouped_gemm(x, w13, plan.offsets, plan, transposed=True)
        a = clamped_swiglu(z, b13, plan.offsets, permute(x[:, :0], plan, weights)[1], *self._interlace.clamp)
        y = grouped_gemm(a, w2, plan.offsets, transposed=True)
        spread = weights.new_zeros(len(x), E + 1).scatter_add(1, router_indices.where(there, E).long(), weights)[:, :E]
        return unpermute(y, plan, shared=spread.to(x.dtype) @ b2).to(hidden_states.dtype)


def recognise_experts(module: nn.Module) -> tuple[type, Change] | str | None:
    """(class to put in front, the change), or why experts are left as they are, or None for what is no stack of experts."""
    params = dict(module.named_parameters(recurse=False))
    if not set(params) >= STACKED or any(p.dim() != 3 for n, p in params.items() if n in STACKED):
        return None
    if "forward" in vars(module):
        return "its forward was overridden on the instance"
    if set(params) not in (STACKED, BIASED):
        return f"experts with {', '.join(sorted(set(params) - STACKED))} have no kernel"
    if params["down_proj"].is_meta:
        module = two_experts(module)
    probe: Any = copy.copy(module)
    g = torch.Generator().manual_seed(4)
    own = {n: p.detach() for n, p in module.named_parameters(recurse=False)}
    own |= {n: torch.randn(p.shape, generator=g).to(p) for n, p in own.items() if n not in STACKED}   # fresh: zeros
    probe.__dict__["_parameters"] = {n: nn.Parameter(p, requires_grad=False) for n, p in own.items()}
    w13, w2 = own["gate_up_proj"], own["down_proj"]
    if w13.shape[1:] == (2 * w2.shape[2], w2.shape[1]) and len(own) == 2:
        return _plain(module, probe, w13, w2, g)
    if w13.shape[1:] == (w2.shape[2], 2 * w2.shape[1]) and len(own) == 4:
        return _clamped(module, probe, own, g)
    return "experts with biases, or stored transposed, but not both, have no kernel"


def _plain(module: nn.Module, probe: Any, w13: Tensor, w2: Tensor, g: torch.Generator) -> tuple[type, Change] | str:
    x = torch.randn(2, w2.shape[1], generator=g).to(w2)
    ids = torch.tensor([0, len(w2) - 1], device=w2.device)
    gate, up = torch.einsum("th,tfh->tf", x, w13[ids]).chunk(2, -1)
    want = torch.einsum("tf,thf->th", F.silu(gate) * up, w2[ids])
    return _differs(type(module), probe, x, ids, want, "down(silu(gate(x)) * up(x))") or (Experts, Change(type(module), "expert_mlp"))


def _clamped(module: nn.Module, probe: Any, own: dict[str, Tensor], g: torch.Generator) -> tuple[type, Change] | str:
    """alpha and the limit are two numbers of the module's: small values tell one alpha from another, large ones the limit."""
    w13, w2, b13, b2 = (own[n] for n in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"))
    ids = torch.tensor([0, len(w2) - 1], device=w2.device)
    x = torch.randn(2, w2.shape[2], generator=g).to(w2)
    largest = torch.einsum("th,thf->tf", x, w13[ids]).abs().max().clamp(min=1e-30)
    why = "it has no two numbers that could be alpha and the limit of clamped_swiglu"
    for alpha, limit in permutations((v for v in vars(module).values() if isinstance(v, float) and v > 0), 2):
        for reach in (1.0, 3 * limit):
            rows = x * (reach / largest)
            act = clamped_swiglu_ref(torch.einsum("th,thf->tf", rows, w13[ids]) + b13[ids], alpha=alpha, limit=limit)
            why = _differs(type(module), probe, rows, ids, torch.einsum("tf,tfh->th", act, w2[ids]) + b2[ids],
                           "down((up + 1) * gate * sigmoid(alpha * gate)), clamped,")
            if why:
                break
        else:
            return ClampedExperts, Change(type(module), "clamped_swiglu", clamp=(alpha, limit))
    return why


def _differs(original: Any, probe: Any, x: Tensor, ids: Tensor, want: Tensor, formula: str) -> str:
    weights = torch.tensor([[0.5], [0.25]]).to(x)
    try:
        with torch.no_grad():
            got = original.forward(probe, x, ids[:, None], weights)
    except Exception as e:
        return f"its forward does not run on a probe: {type(e).__name__}"
    want = want * weights
    if not want.any():
        return "its weights are zero, so that a probe tells nothing: load them first"
    tolerance = 0.05 if x.dtype in (torch.bfloat16, torch.float16) else 1e-3
    close = torch.is_tensor(got) and got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())
    return "" if close else f"its forward is not the weighted sum of {formula} on a probe"


def two_experts(module: nn.Module) -> Any:
    """A copy of an experts module on the CPU, in fp32, with two random experts: what one on meta computes."""
    probe: Any = copy.copy(module)
    g = torch.Generator().manual_seed(2)
    probe.__dict__["_parameters"] = {n: nn.Parameter(torch.randn(2, *p.shape[1:], generator=g) * 0.1, requires_grad=False)
                                     for n, p in module.named_parameters(recurse=False)}
    vars(probe).update({a: 2 for a in COUNTS if a in vars(module)})
    return probe
