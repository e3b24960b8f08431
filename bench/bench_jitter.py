"""jitter, the noise on a router's input, against torch's own numbers. `interlace bench jitter`

Ways draw different noise, so each is held against its own truth: x times the noise that its y shows, all of which must lie
within eps of 1, and dy times the same. torch draws anew at each call: it is not repeatable, and its row says so.
"""
from functools import partial

import torch
from torch import Tensor

from ..kernels import jitter
from .cases import Case, Make, Way, Ways, grid, rows
from .harness import seeds

EPS = 0.01
cases = grid(("jitter",), rows("hidden"))


def ways(case: Case, make: Make) -> Ways:
    N, D = case.shape["N"], case.shape["D"]
    x, size = make.randn(N, D), make.dtype.itemsize

    def truth(got: tuple[Tensor, ...]) -> list[Tensor]:
        full = [x.detach(), *seeds(got[:1], case)][:len(got)]
        noise = (got[0].double() / x.detach().double()).nan_to_num(1.0).clamp(1 - EPS, 1 + EPS)
        return [f.double() * noise for f in full]

    way = partial(Way, truth=truth)
    eager = lambda x: x * torch.empty_like(x).uniform_(1 - EPS, 1 + EPS)  # noqa: E731
    made = make.compiled(eager)
    return Ways((x,), eager, way(lambda x: jitter(x, EPS, 1)), {
        "torch eager": way(eager), "torch.compile": made if isinstance(made, str) else way(made)},
        nbytes=(2 * N * D * size, 2 * N * D * size), flops=(15 * N * D, 15 * N * D))
