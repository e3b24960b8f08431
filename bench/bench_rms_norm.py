"""rms_norm and add_rms_norm against torch's own and Liger's. `interlace bench rms_norm`"""
import torch.nn.functional as F
from torch import Tensor

from ..kernels import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from .cases import Case, Make, Ways, grid, rows
from .peers import liger, transformer_engine

EPS = 1e-6
cases = grid(("rms_norm", "add_rms_norm"), rows("hidden"))


def torch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def torch_add(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return h, torch_norm(h, w)


def ways(case: Case, make: Make) -> Ways:
    N, D = case.shape["N"], case.shape["D"]
    x, w, size = make.randn(N, D), make.randn(D), make.dtype.itemsize
    if case.call == "rms_norm":
        return Ways((x, w), rms_norm_ref, rms_norm, {
            "torch eager": torch_norm, "torch.compile": make.compiled(torch_norm),
            "liger": liger("LigerRMSNormFunction", make.device, lambda f: lambda x, w: f.apply(x, w, EPS, 0.0, "llama", False)),
            "transformer_engine": transformer_engine("RMSNorm", D, EPS, make.device, make.dtype)},
            nbytes=(2 * N * D * size, 3 * N * D * size), flops=(4 * N * D, 8 * N * D), graph=True)
    return Ways((x, make.randn(N, D), w), add_rms_norm_ref, add_rms_norm, {
        "torch eager": torch_add, "torch.compile": make.compiled(torch_add),
        "liger": liger("LigerFusedAddRMSNormFunction", make.device,
                       lambda f: lambda x, r, w: f.apply(x, r, w, EPS, 0.0, "llama", False)[::-1])},
        nbytes=(4 * N * D * size, 4 * N * D * size), flops=(5 * N * D, 9 * N * D), graph=True)
