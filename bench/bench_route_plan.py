"""route_plan against argsort + inverse + bincount. `python -m interlace.bench.bench_route_plan`"""
from functools import partial

import torch

from ..kernels import route_plan
from .harness import compare

SHAPES = [(8192, 2, 8), (2048, 8, 64)]


def sort_plan(ids: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row of slot, slot of row, rows per expert), as the torch compositions of today make them."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel())
    return row, order, torch.bincount(flat, minlength=E)


def main() -> None:
    for T, K, E in SHAPES:
        torch.manual_seed(0)
        ids = torch.rand(T, E).topk(K).indices                        # K different experts a token

        def ours(ids=ids, E=E):
            plan = route_plan(ids, E)
            return plan.row_of_slot.flatten(), plan.slot_of_row, plan.counts

        compare("route_plan", {"interlace": ours, "argsort+inverse+bincount": partial(sort_plan, ids, E)},
                truth=sort_plan(ids, E), case={"T": T, "K": K, "E": E}, nbytes=20 * T * K, inner=5)


if __name__ == "__main__":
    main()
