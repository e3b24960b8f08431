"""dispatch and combine, there and back with the plan, against torch over its all-to-all. `interlace bench dispatch --nproc 2`

The peer is what one writes with torch alone: argsort of the ids, index_select into expert order, all_to_all_single with splits,
index_select from (rank, expert) to (expert, rank) order; and the same backwards, with index_add at the end.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.comm import combine, dispatch, dispatch_plan
from .cases import Case, Make, Ways, grid
from .explain import path
from .peers.eager_comm import linear


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    """T tokens of H on each rank, each to K of E experts; E is rounded up to a multiple of the ranks."""
    if sweep == "quick":
        return {"small": {"T": 512, "H": 512, "K": 2, "E": 8}, "odd": {"T": 333, "H": 129, "K": 3, "E": 13}}
    T = 8192 if sweep == "cuda" else 2048
    return {"mixtral": {"T": 4 * T, "H": 1024, "K": 2, "E": 8}, "mixtral-2k": {"T": T, "H": 1024, "K": 2, "E": 8},
            "fine": {"T": T, "H": 1024, "K": 8, "E": 64}, "odd": {"T": 333, "H": 129, "K": 3, "E": 13}}


cases = grid(("dispatch",), shapes)


class Eager:
    """A batch's routing, as torch composes it."""

    def __init__(self, ids: Tensor, E: int, group: dist.ProcessGroup | None):
        self.group, self.tokens = group, ids.shape[0]
        self.size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        self.token = order // ids.shape[1]                            # of each row sent, in the order of experts
        counts = torch.bincount(flat, minlength=E)
        every = [torch.empty_like(counts) for _ in range(self.size)]
        if group is None:
            every = [counts]
        else:
            dist.all_gather(every, counts, group)
        mine = torch.stack(every).view(self.size, self.size, -1)[:, rank]   # [rank, my experts]
        self.there, self.back = counts.view(self.size, -1).sum(1).tolist(), mine.sum(1).tolist()
        expert = torch.arange(mine.shape[1], device=ids.device).repeat(self.size).repeat_interleave(mine.flatten())
        self.chunks = expert.argsort(stable=True)                     # rows as they come, in the order (expert, rank)
        self.unsort = self.chunks.argsort()

    def _exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        y = x.new_empty(sum(receive), x.shape[1])
        if self.group is None:
            return y.copy_(x)
        dist.all_to_all_single(y, x.contiguous(), receive, send, self.group)
        return y

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return linear(x, lambda t: self._exchange(t, send, receive), lambda g: self._exchange(g, receive, send))

    def dispatch(self, x: Tensor) -> Tensor:
        return self._all_to_all(x.index_select(0, self.token), self.there, self.back).index_select(0, self.chunks)

    def combine(self, y: Tensor) -> Tensor:
        back = self._all_to_all(y.index_select(0, self.unsort), self.back, self.there)
        return y.new_zeros(self.tokens, y.shape[1]).index_add(0, self.token, back)


def ways(case: Case, make: Make) -> Ways:
    T, H, K = (case.shape[k] for k in "THK")
    group, t, size = make.group, make.world, make.dtype.itemsize
    E = -(-case.shape["E"] // t) * t
    ids = make.randn(T, E, grad=False).topk(K).indices
    pairs = torch.stack([(ids // (E // t) == r).any(1) for r in range(t) if r != make.rank]).sum().item() if t > 1 else 0

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        routing = Eager(ids, E, group)
        rows = routing.dispatch(x)
        return rows, routing.combine(rows)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        plan = dispatch_plan(ids, E, group)
        rows = dispatch(x, plan)
        return rows, combine(rows, plan)

    moved = 2 * (1 + K) * T * H * size                                # x read, rows written, rows read, o written
    return Ways((make.randn(T, H),), eager, ours, {"torch eager": eager, "torch.compile": "not tried for communication ops"},
                nbytes=(moved, moved), flops=(K * T * H, K * T * H), link=(2 * pairs * H * size, 2 * pairs * H * size),
                path=path("dispatch", group, make.device, (T, H), make.dtype))
