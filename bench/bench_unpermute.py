"""unpermute with probs against weighted index_add and F.embedding_bag. `interlace bench unpermute`"""
import torch.nn.functional as F
from torch import Tensor

from ..kernels import route_plan, unpermute
from .bench_permute import shapes
from .cases import Case, Make, Ways, grid

cases = grid(("unpermute",), shapes)


def ways(case: Case, make: Make) -> Ways:
    T, H, K, E = (case.shape[k] for k in "THKE")
    plan = route_plan(make.randn(T, E, grad=False).topk(K).indices, E)
    row, slot, size = plan.row_of_slot.long(), plan.slot_of_row.long(), make.dtype.itemsize
    probs = make.randn(T, K, grad=False).softmax(-1).requires_grad_()

    def eager(y: Tensor, p: Tensor) -> Tensor:
        return y.new_zeros(T, H).index_add(0, slot // K, y * p.flatten()[slot][:, None].to(y.dtype))

    def bag(y: Tensor, p: Tensor) -> Tensor:
        return F.embedding_bag(row, y, mode="sum", per_sample_weights=p.to(y.dtype))

    return Ways((make.randn(T * K, H), probs), eager, lambda y, p: unpermute(y, plan, p),
                {"torch eager": eager, "F.embedding_bag": bag, "torch.compile": make.compiled(eager)},
                nbytes=((1 + K) * T * H * size, (1 + 2 * K) * T * H * size), flops=(2 * K * T * H, 3 * K * T * H))
