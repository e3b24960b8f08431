"""create_graph=True: an op has a right second derivative, or says that it has none; what its kernels compute is no constant."""
import pytest
import torch
from ranks import run

from interlace.kernels import (
    add_layer_norm,
    add_rms_norm,
    clamped_swiglu,
    cross_entropy,
    dispatch,
    dropout,
    expert_mlp,
    gated,
    gelu,
    grouped_gemm,
    jitter,
    layer_norm,
    permute,
    rms_norm,
    rope,
    rope_tables,
    route_plan,
    router,
    swiglu,
    unpermute,
)
from interlace.kernels.comm import all_reduce, copy_gemm, gemm_ar, gemm_rs
from interlace.kernels.dispatch import CPP
from interlace.parallel.collectives import copy_to, gather_from, reduce_from, reduce_scatter_to, scatter_to, stack_from
from interlace.parallel.mesh import Axis

IDS = torch.tensor([[0, 3], [1, 2], [3, 1], [0, 2], [2, 3]])
PLAN = route_plan(IDS, 4)
TABLES = rope_tables(torch.arange(5), 6, dtype=torch.float64)
NONE = {
    "rms_norm": (rms_norm, (5, 8), (8,)), "add_rms_norm": (lambda *a: sum(add_rms_norm(*a)), (5, 8), (5, 8), (8,)),
    "layer_norm": (layer_norm, (5, 8), (8,), (8,)), "add_layer_norm": (lambda *a: sum(add_layer_norm(*a)), (5, 8), (5, 8), (8,), (8,)),
    "swiglu": (swiglu, (5, 8)), "swiglu with probs": (swiglu, (5, 8), (5,)), "gated": (gated, (5, 8), (5, 8)), "gelu": (gelu, (5, 8)),
    "clamped_swiglu": (lambda z, b, p: clamped_swiglu(z, b, PLAN.offsets, p), (10, 8), (4, 8), (10,)),
    "cross_entropy": (lambda x: cross_entropy(x, IDS[:, 0]), (5, 7)), "router": (lambda x: router(x, 2).probs, (5, 4)),
    "unpermute": (lambda y, p: unpermute(y, PLAN, p), (10, 3), (5, 2)),
    "grouped_gemm": (lambda x, w: grouped_gemm(x, w, PLAN.offsets), (10, 6), (4, 3, 6)),
    "expert_mlp": (lambda x, w, v, p: expert_mlp(x, w, v, PLAN, p), (5, 6), (4, 8, 6), (4, 6, 4), (5, 2)),
}
LINEAR = {
    "dropout": (lambda x: dropout(x, 0.3, 1), (5, 8)), "jitter": (lambda x: jitter(x, 0.3, 1), (5, 8)),
    "rope": (lambda x: rope(x, *TABLES), (5, 2, 3, 6)), "permute": (lambda x: permute(x, PLAN), (5, 3)),
    "copy_gemm": (copy_gemm, (5, 8), (4, 8)),
}


def _inputs(shapes):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.skipif(not CPP, reason="the references have second derivatives")
@pytest.mark.parametrize("name", NONE)
def test_none_is_refused(name):
    """Also of a sum, where the gradient that comes in is a constant: torch's once_differentiable lets it pass."""
    fn, *shapes = NONE[name]
    inputs = _inputs(shapes)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fn(*inputs).sum(), inputs, create_graph=True)
    assert all(g is not None for g in torch.autograd.grad(fn(*inputs).sum(), inputs))


@pytest.mark.parametrize("name", [n for n in (*NONE, *LINEAR) if n != "copy_gemm"])
def test_torch_func_has_both_by_the_reference(name, monkeypatch):
    fn, *shapes = (NONE | LINEAR)[name]
    inputs = _inputs(shapes)

    def loss(x):
        return fn(x, *inputs[1:]).square().sum()
    first = torch.func.grad(loss)
    second = torch.func.grad(lambda x: first(x).square().sum())(inputs[0].detach())
    torch.testing.assert_close(first(inputs[0].detach()), torch.autograd.grad(loss(inputs[0]), inputs[0])[0])
    monkeypatch.setattr(dispatch, "_REFERENCE_ONLY", True)
    g, = torch.autograd.grad(loss(inputs[0]), inputs[0], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(g.square().sum(), inputs[0])[0])


@pytest.mark.parametrize("name", LINEAR)
def test_linear_ops_have_one(name):
    fn, *shapes = LINEAR[name]
    assert torch.autograd.gradgradcheck(lambda *a: fn(*(x.square() for x in a)), _inputs(shapes))


def _over_ranks(rank):
    group = torch.distributed.group.WORLD
    axis, (x, w) = Axis("tp", 2, rank, (0, 1), group), _inputs([(4, 6), (4, 6)])
    for fn in copy_to, reduce_from, gather_from, reduce_scatter_to, scatter_to, stack_from:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(fn(x, axis).sum(), x, create_graph=True)
    for op in gemm_ar, copy_gemm, gemm_rs:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(op(x, w, group).sum(), x, create_graph=True)
    g, = torch.autograd.grad(all_reduce(x, group).square().sum(), x, create_graph=True)
    h, = torch.autograd.grad(g.sum(), x)                              # every rank has y = x0 + x1: g = 2 * 2 y, and two ranks sum it
    torch.testing.assert_close(h, torch.full_like(x, 8.0))


def test_over_ranks():
    run(2, _over_ranks)
