"""gemm_rs and ag_gemm on real ranks: against one process in fp64, no worse than eager + collective."""
import pytest
import torch
import torch.distributed as dist
from budget import DTYPES
from ranks import run

from interlace.kernels.comm import ag_gemm, all_gather, gemm_rs, reduce_scatter

SHAPES = [(6, 2, 3, 7), (12, 1, 96, 40), (0, 3, 4, 6), (600, 2, 33, 450)]  # S, B, K, N; the last product is over a heap slot


def _check(names, truth, eager, got, dtype):
    for name, t, e, g in zip(names, truth, eager, got):
        assert g.shape == t.shape, f"{name}: {list(g.shape)}, want {list(t.shape)}"
        if t.numel():
            allowed = (e.double() - t).abs().max() + torch.finfo(dtype).eps * t.abs().max()
            assert (g.double() - t).abs().max() <= allowed, f"{name} {dtype}: {(g.double() - t).abs().max()} > {allowed}"


def _gemm_rs(rank, world, shape, dtype):
    S, B, K, N = shape
    g = torch.Generator().manual_seed(5)
    xs, ws = torch.randn(world, S, B, K, generator=g).to(dtype), torch.randn(world, N, K, generator=g).to(dtype)
    dys = torch.randn(S, B, N, generator=g).to(dtype)
    x, w = xs[rank].clone().requires_grad_(), ws[rank].clone().requires_grad_()
    y = gemm_rs(x, w, dist.group.WORLD)
    y.backward(dys.chunk(world)[rank] if S else dys)
    full = sum(x.double() @ w.double().t() for x, w in zip(xs, ws))
    flat, flat_dy = xs[rank].double().reshape(-1, K), dys.double().reshape(-1, N)
    truth = [full.chunk(world)[rank] if S else full, dys.double() @ ws[rank].double(), flat_dy.t() @ flat]
    eager = [reduce_scatter(xs[rank] @ ws[rank].t(), dist.group.WORLD), dys @ ws[rank], dys.reshape(-1, N).t() @ xs[rank].reshape(-1, K)]
    _check(("y", "dx", "dw"), truth, eager, [y.detach(), x.grad, w.grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_gemm_rs(world, shape, dtype):
    run(world, _gemm_rs, world, shape, dtype)


def _ag_gemm(rank, world, shape, dtype):
    S, B, K, N = shape
    g = torch.Generator().manual_seed(6)
    full, ws = torch.randn(S, B, K, generator=g).to(dtype), torch.randn(world, N, K, generator=g).to(dtype)
    dys = torch.randn(world, S, B, N, generator=g).to(dtype)
    mine = full.chunk(world)[rank] if S else full
    x, w = mine.clone().requires_grad_(), ws[rank].clone().requires_grad_()
    y = ag_gemm(x, w, dist.group.WORLD)
    y.backward(dys[rank])
    dx = sum(dy.double() @ w.double() for dy, w in zip(dys, ws))
    truth = [full.double() @ ws[rank].double().t(), dx.chunk(world)[rank] if S else dx,
             dys[rank].double().reshape(-1, N).t() @ full.double().reshape(-1, K)]
    eager = [all_gather(mine, dist.group.WORLD) @ ws[rank].t(), reduce_scatter(dys[rank] @ ws[rank], dist.group.WORLD),
             dys[rank].reshape(-1, N).t() @ full.reshape(-1, K)]
    _check(("y", "dx", "dw"), truth, eager, [y.detach(), x.grad, w.grad], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_ag_gemm(world, shape, dtype):
    run(world, _ag_gemm, world, shape, dtype)


def _indivisible(rank):
    with pytest.raises(ValueError, match="divisible by the 2 ranks"):
        gemm_rs(torch.randn(3, 1, 4), torch.randn(5, 4), dist.group.WORLD)


def test_misuse():
    run(2, _indivisible)
    with pytest.raises(ValueError, match=r"ag_gemm: w must be \[N, 4\]"):
        ag_gemm(torch.randn(3, 4), torch.randn(4, 5))
