"""cross_entropy against torch's own, in the logits' type and in fp32, and Liger's. `interlace bench cross_entropy`"""
import torch.nn.functional as F
from torch import Tensor

from ..kernels import cross_entropy
from .cases import MODELS, Case, Make, Ways, grid
from .peers import liger


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    if sweep == "quick":
        return {"small": {"N": 64, "V": 8192}, "odd": {"N": 33, "V": 5003}}
    N, part = (4096, 1) if sweep == "cuda" else (256, 8)
    return {**{name: {"N": N, "V": m.vocab // part} for name, m in MODELS.items()}, "odd": {"N": 33, "V": 50257}}


cases = grid(("cross_entropy",), shapes)


def ways(case: Case, make: Make) -> Ways:
    N, V = case.shape["N"], case.shape["V"]
    targets, size = make.randint(V, N), make.dtype.itemsize

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x, targets, reduction="none")

    def eager_fp32(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), targets, reduction="none")

    return Ways((make.randn(N, V),), eager, lambda x: cross_entropy(x, targets), {
        "torch eager": eager, **({"torch eager in fp32": eager_fp32} if size < 4 else {}), "torch.compile": make.compiled(eager_fp32),
        "liger": liger("LigerCrossEntropyFunction", make.device,           # overwrites its logits: it gets a copy
                       lambda f: lambda x: f.apply(x.clone(), targets, None, -100, 0.0, 0.0, "none")[0])},
        nbytes=(N * V * size + 20 * N, 2 * N * V * size + 20 * N), flops=(4 * N * V, 3 * N * V), graph=True)
