"""A mixture of experts as one composes it with torch alone, over gloo: softmax and top-k, argsort, index_select, all_to_all_single
with splits read by the host, a loop over this rank's experts, and back with index_add. The experts of every rank are its own.
"""
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .eager_comm import linear
from .torch_tp import MLP, Config


class EagerMoE(nn.Module):
    """x [B, S, D] -> [B, S, D]. aux: the load-balancing loss of the last call (Switch), weighted."""

    def __init__(self, c: Config, experts: int, topk: int, coeff: float, group: dist.ProcessGroup | None):
        super().__init__()
        self.group, self.size, self.topk, self.coeff = group, 1 if group is None else dist.get_world_size(group), topk, coeff
        self.gate = nn.Linear(c.hidden, experts, bias=False)
        here = experts // self.size
        first = 0 if group is None else dist.get_rank(group) * here
        self.experts = nn.ModuleDict({str(e): MLP(c) for e in range(first, first + here)})
        self.aux = torch.zeros(())

    def _exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        if self.group is None:
            return x
        y = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(y, x.contiguous(), receive, send, self.group)
        return y

    def _all_to_all(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return linear(x, lambda t: self._exchange(t, send, receive), lambda g: self._exchange(g, receive, send))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)                                        # [T, D]
        (T, _), E = flat.shape, self.gate.out_features
        logits = self.gate(flat)
        scores = logits.softmax(-1)
        chosen, ids = logits.topk(self.topk)
        probs = chosen.softmax(-1).flatten()
        counts = torch.bincount(ids.flatten(), minlength=E)
        self.aux = self.coeff * E * (scores.mean(0) * counts).sum() / (T * self.topk)
        order = ids.flatten().argsort(stable=True)
        token = order // self.topk
        rows, weight = flat.index_select(0, token), probs.index_select(0, order)
        every = [torch.empty_like(counts) for _ in range(self.size)]
        if self.group is None:
            every = [counts]
        else:
            dist.all_gather(every, counts, self.group)
        rank = 0 if self.group is None else dist.get_rank(self.group)
        mine = torch.stack(every).view(self.size, self.size, -1)[:, rank]                  # [rank, my experts]
        there, back = counts.view(self.size, -1).sum(1).tolist(), mine.sum(1).tolist()
        expert = torch.arange(mine.shape[1]).repeat(self.size).repeat_interleave(mine.flatten())
        chunks = expert.argsort(stable=True)
        got = self._all_to_all(rows, there, back).index_select(0, chunks)
        parts = got.split(mine.sum(0).tolist())
        y = torch.cat([mlp(part) for mlp, part in zip(self.experts.values(), parts)])
        y = self._all_to_all(y.index_select(0, chunks.argsort()), back, there)
        return torch.zeros_like(flat).index_add(0, token, y * weight[:, None]).view_as(x)
