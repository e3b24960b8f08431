"""gemm_ar and its dual copy_gemm against a GEMM, then torch.distributed's all-reduce. `interlace bench gemm_ar`

Bounds: the same GEMMs with no communication, and our all-reduce of the product with no GEMM. M tokens, K / t and N of this rank.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.comm import all_reduce, copy_gemm, gemm_ar
from .cases import MODELS, Case, Make, Way, Ways, grid
from .explain import path
from .peers.eager_comm import Collectives, linear


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    if sweep == "quick":
        return {"small": {"M": 256, "K": 512, "N": 512}, "odd": {"M": 99, "K": 202, "N": 333}}
    M, part = (8192, 1) if sweep == "cuda" else (512, 8)
    return {**{name: {"M": M, "K": m.ffn // part, "N": m.hidden // part} for name, m in MODELS.items()},
            "decode": {"M": 16, "K": 14336 // part, "N": 4096 // part},
            "large": {"M": 2048, "K": 2048, "N": 1024}, "small": {"M": 64, "K": 2048, "N": 1024}, "odd": {"M": 333, "K": 1022, "N": 777}}


cases = grid(("gemm_ar", "copy_gemm"), shapes)


def pipelined(case: Case, make: Make, c: Collectives):
    """What torch's async TP does, on any backend: chunks of rows, each reduced while the next is multiplied. Forward only."""
    if case.direction != "fwd" or make.world == 1:
        return "forward only, over more than one rank"

    def run(x: Tensor, w: Tensor) -> Tensor:
        y, waits = x.new_empty(x.shape[0], w.shape[0]), []
        for rows, out in zip(x.chunk(4), y.chunk(4)):
            torch.mm(rows, w.t(), out=out)
            waits.append(dist.all_reduce(out, group=c.group, async_op=True))
        for wait in waits:
            wait.wait()
        return y
    return lambda x, w: run(x.detach(), w.detach())


def ways(case: Case, make: Make) -> Ways:
    M, t, size = case.shape["M"], make.world, make.dtype.itemsize
    first = case.call == "gemm_ar"
    full, cut = case.shape["N"], -(-case.shape["K"] // t)             # [full] is whole, [cut] is split over the ranks
    c, group = Collectives(make.group), make.group
    x = make.randn(M, cut if first else full, same=not first)
    w = make.randn(*((full, cut) if first else (cut, full)), scale=full ** -0.5)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return c.reduce(x @ w.t()) if first else c.copy_to(x) @ w.t()

    reduce = lambda p: all_reduce(p, group)  # noqa: E731
    same = lambda p: p.view_as(p)  # noqa: E731
    moves = "fwd" if first else "bwd"
    comm = Way(lambda p: linear(p, *((reduce, same) if first else (same, reduce))), (make.randn(M, full),))
    once = (M * cut + full * cut + M * full) * size
    sent = 2 * M * full * size * (t - 1) // t
    ours = gemm_ar if first else copy_gemm
    return Ways((x, w), eager, lambda x, w: ours(x, w, group), {
        "torch eager": eager, "torch.compile": "not tried for communication ops",
        "torch, chunked async": pipelined(case, make, c) if first else "its forward communicates nothing"},
        nbytes=(once, 2 * once), flops=(2 * M * cut * full, 4 * M * cut * full), link=(sent, 0) if first else (0, sent),
        gemm=Way(lambda x, w: x @ w.t(), (x, w)), comm=comm if t > 1 else None, comm_in=(moves, "fwd+bwd"),
        path=path(case.call, group, make.device, (M, full), make.dtype, cut))
