"""rs_residual_norm on real ranks against one process in fp64: RMSNorm and LayerNorm, both outputs, every gradient."""
import sys

import pytest
import torch
import torch.distributed as dist
from budget import DTYPES
from ranks import run

from interlace.kernels.comm import CollectiveMismatch, SymmHeap, reduce_scatter, rs_residual_norm, rs_residual_norm_ref
from interlace.kernels.comm.heap import LIB


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


def _bits(rank, world):
    """Over heaps that take all rows at once, a few, and not one: h is the sum in rank order, then the residual, rounded once."""
    from interlace.kernels.comm import rs_residual_norm as public
    module = sys.modules[public.__module__]
    for nbytes in (1 << 20, 4096, 1):
        heap = SymmHeap(dist.group.WORLD, nbytes)
        LIB.interlace_heap_test(heap.handle, 1, 300 * (rank == 0))    # NaN where nothing was written yet; rank 0 reads late
        for dtype in DTYPES:
            for rows, D in ((0, 8), (1, 1), (7, 33), (9, 260)):
                g = torch.Generator().manual_seed(rows)
                partial = torch.randn(world, world * rows, D, generator=g).to(dtype)
                residual, weight, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((world * rows, D), (D,), (D,)))
                mine = slice(rank * rows, (rank + 1) * rows)
                acc = dtype if dtype == torch.float64 else torch.float32
                total = partial[0, mine].to(acc)
                for r in range(1, world):
                    total = total + partial[r, mine].to(acc)
                whole = module._fits(heap, partial[0])
                assert whole == (module.CPP and D * dtype.itemsize * world <= heap.nbytes)
                want = (total + residual[mine].to(acc)).to(dtype) if whole else total.to(dtype) + residual[mine]
                for b in (None, bias):
                    h, y = rs_residual_norm(partial[rank], residual[mine], weight, 1e-5, heap, bias=b)
                    assert torch.equal(h, want), (dtype, rows, D, nbytes)
                    again = rs_residual_norm(heap.stage(partial[rank].shape, dtype).copy_(partial[rank]), residual[mine], weight, 1e-5,
                                             heap, bias=b) if partial[rank].nbytes <= heap.nbytes else (h, y)
                    assert torch.equal(again[0], h) and torch.equal(again[1], y), "staged"
        heap.close()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_sums_in_rank_order_whatever_the_heap(world):
    run(world, _bits, world)


def _mismatch(rank):
    heap = SymmHeap(dist.group.WORLD, 1 << 16, name="tp")
    call = lambda rows: rs_residual_norm(torch.ones(2 * rows, 8), torch.zeros(rows, 8), torch.ones(8), 1e-5, heap)    # noqa: E731
    mine, theirs = (rf"called rs_residual_norm\({n} rows of 8, " for n in (8 + 4 * rank, 12 - 4 * rank))
    with pytest.raises(CollectiveMismatch, match=f"rs_residual_norm: rank {rank} of group 'tp' {mine}.* {theirs}"):
        call(4 + 2 * rank)
    with pytest.raises(CollectiveMismatch, match=r"called rs_residual_norm\(8 rows of 8, 32 x float32\)"):
        reduce_scatter(torch.ones(8, 8), heap) if rank else call(4)
    assert call(4)[0].eq(2).all(), "the heap stays usable"
    heap.close()


def test_ranks_that_disagree():
    run(2, _mismatch)


def test_misuse():
    with pytest.raises(ValueError, match="1 times"):
        rs_residual_norm(torch.randn(4, 2, 8), torch.randn(2, 2, 8), torch.randn(8))
