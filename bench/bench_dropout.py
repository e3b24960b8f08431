"""dropout, of a whole tensor and of a shard, against torch's own. `interlace bench dropout`

Ways drop different elements, so each is held against its own truth: x and dy over 1 - p in fp64 where its y is not zero,
and zero elsewhere. F.dropout draws anew at each call: it is not repeatable, and its row says so.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import dropout
from .cases import Case, Make, Way, Ways, grid, rows
from .harness import seeds

P = 0.1
cases = grid(("dropout", "dropout of a shard"), rows("hidden"))


def ways(case: Case, make: Make) -> Ways:
    N, D = case.shape["N"], case.shape["D"]
    x, size = make.randn(N, D), make.dtype.itemsize
    strides = (3 * D, 1) if "shard" in case.call else None           # x as a shard of a tensor three times as wide

    def truth(got: tuple[Tensor, ...]) -> list[Tensor]:
        full = [x.detach(), *seeds(got[:1], case)][:len(got)]
        return [torch.where(got[0] != 0, f.double() / (1 - P), 0.0) for f in full]

    way = partial(Way, truth=truth)
    eager = lambda x: F.dropout(x, P)  # noqa: E731
    made = make.compiled(eager)
    return Ways((x,), eager, way(lambda x: dropout(x, P, 1, strides=strides)), {
        "torch eager": way(eager), "torch.compile": made if isinstance(made, str) else way(made)},
        nbytes=(2 * N * D * size, 2 * N * D * size), flops=(12 * N * D, 12 * N * D))
