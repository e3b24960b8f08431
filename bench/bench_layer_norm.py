"""layer_norm and add_layer_norm against torch's own and Liger's. `interlace bench layer_norm`"""
import torch.nn.functional as F
from torch import Tensor

from ..kernels import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref
from .cases import Case, Make, Ways, grid, rows
from .peers import liger, transformer_engine

EPS = 1e-5
cases = grid(("layer_norm", "add_layer_norm"), rows("hidden"))


def torch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, b, EPS)


def torch_add(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return h, torch_norm(h, w, b)


def ways(case: Case, make: Make) -> Ways:
    N, D = case.shape["N"], case.shape["D"]
    x, w, b, size = make.randn(N, D), make.randn(D), make.randn(D), make.dtype.itemsize
    if case.call == "layer_norm":
        return Ways((x, w, b), layer_norm_ref, layer_norm, {
            "torch eager": torch_norm, "torch.compile": make.compiled(torch_norm),
            "liger": liger("LigerLayerNormFunction", make.device, lambda f: lambda x, w, b: f.apply(x, w, b, EPS)),
            "transformer_engine": transformer_engine("LayerNorm", D, EPS, make.device, make.dtype)},
            nbytes=(2 * N * D * size, 3 * N * D * size), flops=(6 * N * D, 11 * N * D), graph=True)
    return Ways((x, make.randn(N, D), w, b), add_layer_norm_ref, add_layer_norm, {
        "torch eager": torch_add, "torch.compile": make.compiled(torch_add)},
        nbytes=(4 * N * D * size, 4 * N * D * size), flops=(7 * N * D, 12 * N * D), graph=True)
