"""permute against index_select; the backward sums a token's K rows. `plan and permute` begins with what the router gave, which is
what Megatron-Core's permute does. `interlace bench permute`"""
import torch
from torch import Tensor

from ..kernels import permute, route_plan
from .bench_route_plan import sort_plan
from .cases import Case, Make, Ways, grid
from .peers import megatron


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    """T tokens of H, each to K of E experts."""
    if sweep == "quick":
        return {"small": {"T": 512, "H": 512, "K": 2, "E": 8}, "odd": {"T": 333, "H": 129, "K": 3, "E": 13}}
    T = 16384 if sweep == "cuda" else 2048
    return {"mixtral": {"T": 4 * T, "H": 1024, "K": 2, "E": 8}, "fine": {"T": T, "H": 1024, "K": 8, "E": 64},
            "qwen3-30b": {"T": T, "H": 2048, "K": 8, "E": 128}, "odd": {"T": 333, "H": 129, "K": 3, "E": 13}}


_alone, _with_plan = grid(("permute",), shapes), grid(("plan and permute",), shapes, passes=("fwd+bwd",))


def cases(sweep: str, world: int) -> list[Case]:
    return _alone(sweep, world) + _with_plan(sweep, world)


def routing_map(ids: Tensor, E: int) -> Tensor:
    """[T, E], as Megatron-Core's router gives it."""
    return torch.zeros(ids.shape[0], E, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)


def ways(case: Case, make: Make) -> Ways:
    T, H, K, E = (case.shape[k] for k in "THKE")
    ids = make.randn(T, E, grad=False).topk(K).indices
    plan = route_plan(ids, E)
    token, size = plan.slot_of_row.long() // K, make.dtype.itemsize
    cost = (1 + K) * T * H * size

    def eager(x: Tensor) -> Tensor:
        return x.index_select(0, token)

    if case.call == "permute":
        return Ways((make.randn(T, H),), eager, lambda x: permute(x, plan), {"torch eager": eager, "torch.compile": make.compiled(eager)},
                    nbytes=(cost, cost), flops=(0, K * T * H))
    chosen = routing_map(ids, E)
    return Ways((make.randn(T, H),), eager, lambda x: permute(x, route_plan(ids, E)), {
        "torch eager": lambda x: x.index_select(0, sort_plan(ids, E)[1] // K),
        "megatron": megatron("transformer.moe.moe_utils", lambda m: lambda x: m.permute(
            x, chosen, num_out_tokens=T * K, fused=make.device == "cuda" and bool(m.HAVE_TE and m.fused_permute))[0])},
        nbytes=(cost + 20 * T * K, cost), flops=(0, K * T * H))
