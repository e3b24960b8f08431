"""route_plan against argsort + inverse + bincount, the composition that models use today. `interlace bench route_plan`"""
import torch
from torch import Tensor

from ..kernels import route_plan
from .cases import Case, Make, Ways, grid


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    if sweep == "quick":
        return {"small": {"T": 1024, "K": 2, "E": 8}, "odd": {"T": 333, "K": 3, "E": 13}}
    T = 16384 if sweep == "cuda" else 2048
    return {"mixtral": {"T": 4 * T, "K": 2, "E": 8}, "qwen3-30b": {"T": T, "K": 8, "E": 128}, "fine": {"T": T, "K": 8, "E": 64},
            "odd": {"T": 333, "K": 3, "E": 13}}


cases = grid(("route_plan",), shapes, passes=("fwd",), dtypes=("float32",))


def sort_plan(ids: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row of slot, slot of row, rows per expert)."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=ids.device)
    return row, order, torch.bincount(flat, minlength=E)


def ways(case: Case, make: Make) -> Ways:
    T, K, E = (case.shape[k] for k in "TKE")
    ids = make.randn(T, E, grad=False).topk(K).indices                # K different experts a token

    def ours(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan = route_plan(ids, E)
        return plan.row_of_slot.flatten(), plan.slot_of_row, plan.counts

    def composed(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return sort_plan(ids, E)

    return Ways((ids,), composed, ours, {"torch eager": composed}, nbytes=(20 * T * K, 0))
