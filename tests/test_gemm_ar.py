"""gemm_ar and copy_gemm on real ranks: against one process in fp64, every rank bitwise alike, no worse than eager + collective."""
import pytest
import torch
import torch.distributed as dist
from budget import DTYPES
from ranks import run

from interlace.kernels.comm import SymmHeap, ag_gemm, all_reduce, copy_gemm, gemm_ar, gemm_ar_ref, gemm_rs, heap_of

SHAPES = [(5, 3, 7), (64, 96, 40), (2, 1, 1), (0, 4, 6), (700, 33, 900)]   # M, K per rank, N; the last is over a heap slot


def _data(rank, world, shape):
    M, K, N = shape
    g = torch.Generator().manual_seed(7)
    xs, ws, dy = (torch.randn(world, M, K, generator=g), torch.randn(world, N, K, generator=g), torch.randn(M, N, generator=g))
    return xs, ws, dy


def _forward_backward(fn, x, w, dy, group):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fn(x, w, group)
    y.backward(dy.to(y.dtype))
    return [t.detach() for t in (y, x.grad, w.grad)]


def _gemm_ar(rank, world, shape, dtype):
    xs, ws, dy = (t.to(dtype) for t in _data(rank, world, shape))
    group = dist.group.WORLD
    truth = [sum(x.double() @ w.double().t() for x, w in zip(xs, ws)),
             dy.double() @ ws[rank].double(), dy.double().t() @ xs[rank].double()]
    got = _forward_backward(gemm_ar, xs[rank], ws[rank], dy, group)
    x, w = xs[rank].clone().requires_grad_(), ws[rank].clone().requires_grad_()
    part = x @ w.t()
    part.backward(dy)
    eager = [all_reduce(part.detach(), group), x.grad, w.grad]
    for name, t, e, g in zip(("y", "dx", "dw"), truth, eager, got):
        if t.numel():
            allowed = (e.double() - t).abs().max() + torch.finfo(dtype).eps * t.abs().max()
            assert (g.double() - t).abs().max() <= allowed, f"{name} {dtype}: {(g.double() - t).abs().max()} > {allowed}"
    every = [torch.empty_like(got[0]) for _ in range(world)]
    dist.all_gather(every, got[0])
    assert all(torch.equal(every[0], e) for e in every), "ranks differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_gemm_ar(world, shape, dtype):
    run(world, _gemm_ar, world, shape, dtype)


def _copy_gemm(rank, world):
    xs, ws, dy = (t.double() for t in _data(rank, world, (12, 8, 10)))
    group, x = dist.group.WORLD, xs[0]
    got = _forward_backward(copy_gemm, x, ws[rank], dy, group)
    torch.testing.assert_close(got[0], x @ ws[rank].t())
    torch.testing.assert_close(got[1], sum(dy @ w for w in ws))       # every rank's upstream gradient is the same dy here
    torch.testing.assert_close(got[2], dy.t() @ x)


def test_copy_gemm():
    run(3, _copy_gemm, 3)


def _staged(rank):
    """The product is written into the heap, once where it fits a slot and block by block where it does not."""
    group, asked, stage = dist.group.WORLD, [], SymmHeap.stage
    heap = heap_of(group)
    assert heap is not None, "these tests are meant to run over the heap"

    def counted(self, shape, dtype):
        asked.append(stage(self, shape, dtype))
        return asked[-1]
    SymmHeap.stage = counted
    try:
        for shape, blocks in (((64, 96, 40), 1), ((700, 33, 900), 2)):
            xs, ws, _ = _data(rank, 2, shape)
            asked.clear()
            got = gemm_ar(xs[rank], ws[rank], group)
            assert len(asked) == blocks and all(t is not None for t in asked), f"{shape}: staged {len(asked)} blocks"
            torch.testing.assert_close(got, gemm_ar_ref(xs[rank], ws[rank], group))
    finally:
        SymmHeap.stage = stage


def test_goes_over_the_heap():
    run(2, _staged)


def test_one_rank_is_a_linear():
    x, w = torch.randn(2, 3, 8), torch.randn(5, 8)
    assert torch.equal(gemm_ar(x, w), torch.nn.functional.linear(x, w))


def test_misuse():
    with pytest.raises(ValueError, match=r"gemm_ar: w must be \[N, 8\]"):
        gemm_ar(torch.randn(2, 8), torch.randn(8, 5))
    with pytest.raises(ValueError, match="one dtype and device"):
        copy_gemm(torch.randn(2, 8), torch.randn(5, 8, dtype=torch.float64))
    for op in (gemm_ar, copy_gemm, gemm_rs, ag_gemm):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn):
            with pytest.raises(ValueError, match=rf"{op.__name__}: x and w must be float32, .*, got {dtype}; cast them"):
                op(torch.ones(2, 8).to(dtype), torch.ones(5, 8).to(dtype))
