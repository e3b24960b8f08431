"""gemm_rs and its dual ag_gemm against torch: a GEMM and a collective, and on NVLink its symmetric-memory ops. `interlace bench gemm_rs`

Bounds: the same GEMMs with no communication, and our collectives of the same bytes with no GEMM.
"""
import torch
from torch import Tensor

from ..kernels.comm import ag_gemm, all_gather, gemm_rs, reduce_scatter
from .bench_gemm_ar import shapes as whole
from .cases import Case, Make, Way, Ways, grid
from .explain import path
from .peers.eager_comm import Collectives, linear


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    return {name: {**s, "M": -(-s["M"] // 8) * 8} for name, s in whole(sweep).items()}    # rows must split over the ranks


cases = grid(("gemm_rs", "ag_gemm"), shapes)


def _symm_mem(case: Case, make: Make):
    """torch's fused ops: forward only."""
    if make.device != "cuda":
        return "torch.ops.symm_mem needs CUDA ranks on NVLink"
    if case.direction != "fwd":
        return "torch.ops.symm_mem has no backward"
    assert make.group is not None
    name = make.group.group_name
    if case.call == "gemm_rs":
        return lambda x, w: torch.ops.symm_mem.fused_matmul_reduce_scatter(x, w.t(), "sum", 0, name)
    return lambda x, w: torch.ops.symm_mem.fused_all_gather_matmul(x, [w.t()], 0, name)[1][0]


def ways(case: Case, make: Make) -> Ways:
    M, t, size = case.shape["M"], make.world, make.dtype.itemsize
    first = case.call == "gemm_rs"
    full, cut = case.shape["N"], -(-case.shape["K"] // t)             # [full] is whole, [cut] is split over the ranks
    c, group = Collectives(make.group), make.group
    x = make.randn(M, cut) if first else make.randn(M // t, full)
    w = make.randn(*((full, cut) if first else (cut, full)), scale=full ** -0.5)
    gathered = make.randn(M, full)

    def eager(x: Tensor, w: Tensor) -> Tensor:
        return c.scatter(x @ w.t()) if first else c.gather(x) @ w.t()

    scatter, gather = lambda p: reduce_scatter(p, group), lambda p: all_gather(p, group)
    comm = (Way(lambda p: linear(p, scatter, gather), (gathered,)) if first else
            Way(lambda p: linear(p, gather, lambda d: (gather(p.detach()), scatter(d))[1]), (make.randn(M // t, full),)))
    alone = Way(lambda x, w: x @ w.t(), (x, w) if first else (gathered, w))
    once = (M * cut + full * cut + M * full) * size
    sent = M * full * size * (t - 1) // t
    ours = gemm_rs if first else ag_gemm
    return Ways((x, w), eager, lambda x, w: ours(x, w, group), {
        "torch eager": eager, "torch.compile": "not tried for communication ops",
        "torch symm_mem": _symm_mem(case, make)},
        nbytes=(once, 2 * once), flops=(2 * M * cut * full, 4 * M * cut * full), link=(sent, sent if first else 2 * sent),
        gemm=alone, comm=comm if t > 1 else None, path=path(case.call, group, make.device, (M if first else M // t, full), make.dtype, cut))
