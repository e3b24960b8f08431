"""grouped_gemm over rows in expert order, against a loop of matmuls, torch's grouped_mm and Triton's own kernels.
`interlace bench grouped_gemm`"""
import importlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import RoutePlan, grouped_gemm, route_plan
from .cases import Case, Make, Way, Ways, grid
from .peers import triton_kernels


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    """T tokens of H, each to K of E experts of inner width I; zipf=1: expert e is asked for in proportion to 1 / (e + 1)."""
    odd = {"T": 77, "H": 129, "I": 65, "K": 3, "E": 13, "zipf": 1}
    if sweep == "quick":
        return {"small": {"T": 128, "H": 256, "I": 128, "K": 2, "E": 8, "zipf": 0}, "odd": odd}
    T, part = (32768, 1) if sweep == "cuda" else (512, 2)
    few = {"T": 4 * T, "H": 4096 // part // part, "I": 14336 // part // 14, "K": 2, "E": 8} if part > 1 else {
        "T": T, "H": 4096, "I": 14336, "K": 2, "E": 8}
    many = {"T": T, "H": 2048 // part, "I": 768 // part, "K": 8, "E": 64 if part > 1 else 128}
    return {"mixtral": {**few, "zipf": 0}, "mixtral zipf": {**few, "zipf": 1}, "qwen3-30b": {**many, "zipf": 0},
            "qwen3-30b zipf": {**many, "zipf": 1}, "odd": odd}


cases = grid(("grouped_gemm",), shapes, too_long="float32")           # 46 TFLOP a call, without tensor cores


def routing(case: Case, make: Make) -> RoutePlan:
    T, K, E = (case.shape[k] for k in "TKE")
    noise = make.randn(T, E, grad=False).float()
    if case.shape["zipf"]:                                            # Gumbel-top-k draws without replacement by these odds
        odds = -torch.arange(1, E + 1, device=noise.device, dtype=torch.float32).log()
        noise = odds - (-torch.special.ndtr(noise).clamp(1e-6, 1 - 1e-6).log()).log()
    return route_plan(noise.topk(K).indices, E)


def grouped_mm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(-1, -2), offs=offsets[1:])


def absent(size: int, *widths: int) -> str:
    """Why torch's grouped_mm cannot run, or nothing."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no F.grouped_mm"
    return "F.grouped_mm wants rows of whole 16 bytes" if any(w * size % 16 for w in widths) else ""


def ragged_matmul(case: Case, device: str, counts: Tensor) -> Any:
    """triton_kernels' matmul: forward only."""
    def build(m: Any) -> Callable[[Tensor, Tensor], Tensor]:
        tensors = importlib.import_module("triton_kernels.tensor_details.ragged_tensor")
        ragged = tensors.make_ragged_tensor_metadata(counts, case.shape["T"] * case.shape["K"])
        return lambda x, w: m.matmul(x.detach(), w.detach().mT, None, a_ragged_metadata=ragged)
    return triton_kernels("matmul", device, build) if case.direction == "fwd" else "triton_kernels.matmul has no backward"


def ways(case: Case, make: Make) -> Ways:
    T, H, K, E, I = (case.shape[k] for k in "THKEI")
    plan, size, R, N = routing(case, make), make.dtype.itemsize, T * K, 2 * I
    at = plan.offsets.tolist()                                        # the peers' own: they need the sizes on the host

    def loop(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([x[a:b] @ w[e].t() for e, (a, b) in enumerate(pairwise(at))])

    once, flops = (R * H + E * N * H + R * N) * size, 2 * R * N * H
    theirs = ragged_matmul(case, make.device, plan.counts.int())
    return Ways((make.randn(R, H), make.randn(E, N, H, scale=H**-0.5)), loop, lambda x, w: grouped_gemm(x, w, plan.offsets), {
        "torch eager": loop, "F.grouped_mm": absent(size, H, N) or Way(lambda x, w: grouped_mm(x, w, plan.offsets), exact=loop),
        "triton_kernels": theirs if isinstance(theirs, str) else Way(theirs, exact=loop)},
                nbytes=(once, 2 * once), flops=(flops, 2 * flops), extra={"largest": max(b - a for a, b in pairwise(at))})
