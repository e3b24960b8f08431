"""permute against index_select; the backward sums a token's K rows. `interlace bench permute`"""
from torch import Tensor

from ..kernels import permute, route_plan
from .cases import Case, Make, Ways, grid


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    """T tokens of H, each to K of E experts."""
    if sweep == "quick":
        return {"small": {"T": 512, "H": 512, "K": 2, "E": 8}, "odd": {"T": 333, "H": 129, "K": 3, "E": 13}}
    T = 16384 if sweep == "cuda" else 2048
    return {"mixtral": {"T": 4 * T, "H": 1024, "K": 2, "E": 8}, "fine": {"T": T, "H": 1024, "K": 8, "E": 64},
            "qwen3-30b": {"T": T, "H": 2048, "K": 8, "E": 128}, "odd": {"T": 333, "H": 129, "K": 3, "E": 13}}


cases = grid(("permute",), shapes)


def ways(case: Case, make: Make) -> Ways:
    T, H, K, E = (case.shape[k] for k in "THKE")
    plan = route_plan(make.randn(T, E, grad=False).topk(K).indices, E)
    token, size = plan.slot_of_row.long() // K, make.dtype.itemsize

    def eager(x: Tensor) -> Tensor:
        return x.index_select(0, token)

    return Ways((make.randn(T, H),), eager, lambda x: permute(x, plan), {"torch eager": eager, "torch.compile": make.compiled(eager)},
                nbytes=((1 + K) * T * H * size, (1 + K) * T * H * size), flops=(0, K * T * H))
