"""The norm of all gradients of a GPT, against torch's. `interlace bench grad_norm`"""
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..kernels import grad_norm
from .bench_adamw import parameters, shapes
from .cases import Case, Make, Ways, grid

cases = grid(("grad_norm",), shapes, passes=("fwd",))


def stacked(*grads: Tensor) -> Tensor:
    """As careful as ours: in fp64."""
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]).norm()


def ways(case: Case, make: Make) -> Ways:
    grads = [t.to(make.dtype) for t in parameters(make, case.shape["L"], case.shape["D"])]
    n = sum(g.numel() for g in grads)
    return Ways(tuple(grads), lambda *grads: get_total_norm(grads), lambda *grads: grad_norm(grads), {
        "torch eager": lambda *grads: get_total_norm(grads, foreach=False),
        "torch foreach": lambda *grads: get_total_norm(grads, foreach=True), "torch eager in fp64": stacked},
        nbytes=(n * make.dtype.itemsize, 0), flops=(2 * n, 0), cold=True)
