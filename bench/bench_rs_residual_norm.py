"""rs_residual_norm with RMSNorm and with LayerNorm, against torch: reduce-scatter, add, norm; and against our reduce-scatter, then our
add_rms_norm or add_layer_norm. `interlace bench rs_residual_norm`

It has no GEMM: the bound is our reduce-scatter alone (with the all-gather of the backward).
"""
import torch.nn.functional as F
from torch import Tensor

from ..kernels import add_layer_norm, add_rms_norm
from ..kernels.comm import all_gather, reduce_scatter, rs_residual_norm
from .cases import Case, Make, Way, Ways, grid, rows
from .explain import path
from .peers.eager_comm import Collectives, linear

EPS = 1e-5


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    return {name: {"S": -(-s["N"] // 8) * 8, "D": s["D"]} for name, s in rows("hidden")(sweep).items()}


cases = grid(("rs_residual_rms_norm", "rs_residual_layer_norm"), shapes)


def ways(case: Case, make: Make) -> Ways:
    S, D, t, size = case.shape["S"], case.shape["D"], make.world, make.dtype.itemsize
    c, group = Collectives(make.group), make.group
    rms = case.call == "rs_residual_rms_norm"
    partial, residual, w = make.randn(S, D), make.randn(S // t, D), make.randn(D, same=True)
    inputs = (partial, residual, w) if rms else (partial, residual, w, make.randn(D, same=True))

    def eager(p: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = c.scatter(p) + r
        return h, F.rms_norm(h, (D,), w, EPS) if b is None else F.layer_norm(h, (D,), w, b, EPS)

    def ours(p: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rs_residual_norm(p, r, w, EPS, group, bias=b)

    def composed(p: Tensor, r: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = reduce_scatter(p, group)
        return add_rms_norm(x, r, w, EPS) if b is None else add_layer_norm(x, r, w, b, EPS)

    comm = Way(lambda p: linear(p, lambda q: reduce_scatter(q, group), lambda d: all_gather(d, group)), (make.randn(S, D),))
    sent, mine = S * D * size * (t - 1) // t, S // t * D
    return Ways(inputs, eager, ours, {
        "torch eager": eager, "interlace, two ops": composed, "torch.compile": "not tried for communication ops"},
        nbytes=((S * D + 3 * mine) * size, (S * D + 4 * mine) * size), flops=(6 * mine, 10 * mine), link=(sent, sent),
        comm=comm if t > 1 else None, path=path("rs_residual_norm", group, make.device, (S, D), make.dtype))
