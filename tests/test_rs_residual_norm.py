"""rs_residual_norm on real ranks against one process in fp64: RMSNorm and LayerNorm, both outputs, every gradient."""
import pytest
import torch
import torch.distributed as dist
from budget import DTYPES
from ranks import run

from interlace.kernels.comm import rs_residual_norm, rs_residual_norm_ref


def _grads(fn, partial, residual, weight, bias, dh, dy, group):
    leaves = [t.clone().requires_grad_() for t in (partial, residual, weight, *([] if bias is None else [bias]))]
    h, y = fn(*leaves[:3], 1e-5, group, bias=leaves[3] if bias is not None else None)
    torch.autograd.backward((h, y), (dh, dy))
    return [h.detach(), y.detach(), *(t.grad for t in leaves)]


def _check(rank, world, shape, dtype, with_bias):
    S, B, D = shape
    g = torch.Generator().manual_seed(3)
    partial, residual = torch.randn(world, S, B, D, generator=g).to(dtype), torch.randn(S, B, D, generator=g).to(dtype)
    weight, dh, dy = (torch.randn(*s, generator=g).to(dtype) for s in ((D,), (S, B, D), (S, B, D)))
    bias = torch.randn(D, generator=g).to(dtype) if with_bias else None
    mine = lambda t: t.chunk(world)[rank]  # noqa: E731
    dbl = lambda t: None if t is None else t.double()  # noqa: E731
    args = (partial[rank], mine(residual), weight, bias, mine(dh), mine(dy))
    got = _grads(rs_residual_norm, *args, dist.group.WORLD)
    eager = _grads(rs_residual_norm_ref, *args, dist.group.WORLD)
    whole = _grads(rs_residual_norm_ref, partial.double().sum(0), *map(dbl, (residual, weight, bias, dh, dy)), None)
    rows = _grads(rs_residual_norm_ref, mine(partial.double().sum(0)), *map(dbl, (mine(residual), weight, bias, mine(dh), mine(dy))), None)
    truth = [mine(whole[0]), mine(whole[1]), whole[2], mine(whole[3]), *rows[4:]]   # dpartial is whole; dweight is of my rows
    for i, (t, e, v) in enumerate(zip(truth, eager, got, strict=True)):
        allowed = (e.double() - t).abs().max() + 2 * torch.finfo(dtype).eps * t.abs().max()
        assert (v.double() - t).abs().max() <= allowed, f"output {i} {dtype}: {(v.double() - t).abs().max()} > {allowed}"


@pytest.mark.parametrize("with_bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 2, 7), (12, 3, 64)], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_matches_one_process(world, shape, dtype, with_bias):
    run(world, _check, world, shape, dtype, with_bias)


def test_misuse():
    with pytest.raises(ValueError, match="1 times"):
        rs_residual_norm(torch.randn(4, 2, 8), torch.randn(2, 2, 8), torch.randn(8))
