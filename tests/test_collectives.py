"""Collectives over the heap against float64 sums, on 2, 3 and 4 ranks; and the fallback to torch.distributed."""
import random
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run

from interlace.kernels.comm import SymmHeap, all_gather, all_reduce, all_to_all, heap_of, reduce_scatter
from interlace.kernels.comm.heap import LIB

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 3, 63, 64, 1000, 4097, 70001]                         # rows; nothing, one, odd, a line, over a 16 KB slot


def _data(rank, n, dtype, seed=0):
    g = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    return (x * 100).to(dtype) if dtype.is_floating_point else (x * 1000).to(dtype)


def _heaps(**slots):
    """Small slots: the same lengths go through in one chunk and in many, one-shot and two-shot."""
    for nbytes, two_shot in ((1 << 20, 1 << 60), (16384, 1 << 60), (16384, 0), (1 << 20, 0)):
        heap = SymmHeap(dist.group.WORLD, nbytes)
        LIB.interlace_heap_test(heap.handle, 1, 0)                    # NaN wherever nothing was written yet
        LIB.interlace_heap_tune(heap.handle, -1, -1, 16384, two_shot)
        yield heap
        heap.close()


def _truth(world, n, dtype, seed, op="sum"):
    """Sum in rank order in the accumulation type, one rounding: what the heap promises bit for bit."""
    acc = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = _data(0, n, dtype, seed).to(acc)
    for r in range(1, world):
        x = _data(r, n, dtype, seed).to(acc)
        total = torch.maximum(total, x) if op == "max" else total + x
    return total.to(dtype)


def _all_reduce(rank, world):
    for heap in _heaps():
        for seed, n in enumerate(SIZES):
            for dtype in [*FLOATS, torch.int64, torch.int32]:
                for op in ("sum", "max"):
                    x = _data(rank, n, dtype, seed)
                    want, kept = _truth(world, n, dtype, seed, op), x.clone()
                    got = all_reduce(x, heap, op=op)
                    assert torch.equal(x, kept) and got is not x
                    assert torch.equal(got, want), (n, dtype, op)
                    if dtype.is_floating_point and op == "sum" and n:
                        exact = sum(_data(r, n, dtype, seed).double() for r in range(world))
                        assert (got.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
                    assert all_reduce(x, heap, op=op, out=x) is x and torch.equal(x, want), "in place"
                    staged = heap.stage((n,), dtype)
                    assert (staged is None) == (n * dtype.itemsize > heap.nbytes)
                    if staged is not None:
                        staged.copy_(kept)
                        assert torch.equal(all_reduce(staged, heap, op=op), want), "staged"


def _others(rank, world):
    for heap in _heaps():
        for seed, rows in enumerate(SIZES[:-1]):
            for dtype in [*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64]:
                n = rows * world
                every = [_data(r, n, dtype if dtype not in (torch.uint8, torch.bool) else torch.float32, seed).to(dtype)
                         for r in range(world)]
                x = every[rank].view(rows * world, 1)
                assert torch.equal(all_gather(x, heap), torch.cat(every).view(-1, 1))
                want = torch.cat([e[rows * rank:rows * (rank + 1)] for e in every]).view(-1, 1)
                assert torch.equal(all_to_all(x, heap), want)
                if dtype in FLOATS:
                    want = _truth(world, n, dtype, seed)[rows * rank:rows * (rank + 1)].view(-1, 1)
                    assert torch.equal(reduce_scatter(x, heap), want)
                for fn in (all_gather, all_to_all, reduce_scatter):
                    if (fn is not reduce_scatter or dtype in FLOATS) and (staged := heap.stage(x.shape, dtype)) is not None:
                        staged.copy_(x)
                        want = fn(x.clone(), None) if world == 1 else fn(staged, heap)
                        assert torch.equal(fn(x, heap), want), "staged"


def _storm(rank, world, nbytes):
    """Many calls of every kind, fresh data in each, random pauses: a late or an early reader meets NaN or an old epoch."""
    heap, pauses, shapes = SymmHeap(dist.group.WORLD, nbytes), random.Random(rank), random.Random(7)
    LIB.interlace_heap_test(heap.handle, 1, 0)
    for i in range(150):
        n, kind, dtype = shapes.randrange(1, 3000), shapes.randrange(4), FLOATS[shapes.randrange(4)]
        if pauses.random() < 0.3:
            time.sleep(pauses.random() * 0.004)
        LIB.interlace_heap_test(heap.handle, 1, pauses.choice([0, 0, 0, 500]))
        every = [_data(r, n * world, dtype, i) for r in range(world)]
        x, mine, total = every[rank], slice(rank * n, (rank + 1) * n), _truth(world, n * world, dtype, i)
        if kind == 0:
            assert torch.equal(all_reduce(x, heap), total), i
        elif kind == 1:
            assert torch.equal(reduce_scatter(x, heap), total[mine]), i
        elif kind == 2:
            assert torch.equal(all_gather(x, heap), torch.cat(every)), i
        else:
            assert torch.equal(all_to_all(x, heap), torch.cat([e[mine] for e in every])), i
    heap.close()


def _bits(rank, world):
    """Bitwise the same on every rank, in both algorithms, in a second run."""
    x = torch.randn(5003, generator=torch.Generator().manual_seed(rank)) * 10.0 ** torch.arange(5003).remainder(7).sub(3)
    for dtype in FLOATS:
        results = [all_reduce(x.to(dtype), heap) for heap in _heaps() for _ in range(2)]
        assert all(torch.equal(r, results[0]) for r in results)
        for other in all_gather(results[0], dist.group.WORLD).view(world, -1):
            assert torch.equal(other, results[0])


def _group(rank, world):
    """A plain process group: its heap is made once; layouts, errors."""
    group = dist.group.WORLD
    heap = heap_of(group)
    assert isinstance(heap, SymmHeap) and heap_of(group) is heap and heap_of(heap) is heap and heap.size == world
    x = torch.arange(24.0).view(4, 6).t() + rank                      # not contiguous
    assert torch.equal(all_reduce(x, group), sum(x - rank + r for r in range(world)))
    assert torch.equal(all_gather(x, group), torch.cat([x - rank + r for r in range(world)]))
    nan = torch.full((3,), float("nan") if rank == 1 else 1.0)
    assert all_reduce(nan, group, op="max").isnan().all() and all_reduce(nan, group).isnan().all()
    out = torch.empty(5)
    assert all_reduce(torch.ones(5), group, out=out) is out and out.eq(world).all()
    with pytest.raises(ValueError, match="out must be a contiguous"):
        all_reduce(torch.ones(5), group, out=torch.empty(6))
    with pytest.raises(ValueError, match="op must be 'sum' or 'max'"):
        all_reduce(x, group, op="mean")
    for fn in (reduce_scatter, all_to_all):
        with pytest.raises(ValueError, match=f"divisible by the {world} ranks"):
            fn(torch.ones(world + 1, 4), group)
    with pytest.raises(ValueError, match="scalar"):
        all_gather(torch.tensor(1.0), group)
    assert all_reduce(torch.tensor(2.0), group) == 2.0 * world and all_reduce(torch.tensor(2.0), group).dim() == 0
    kept = heap.stage((8,), torch.float32)
    heap.barrier()
    with pytest.raises(RuntimeError, match=r"stage it again"):
        all_reduce(kept, group)
    heap.barrier()


def _fallback(rank, world):
    """Without a heap the same functions go through torch.distributed; uint8 sums do so in any case."""
    from interlace.kernels.comm import heap as module
    group = dist.new_group(list(range(world)))
    module.keep_heap(group, None)
    x = torch.arange(12.0).view(12, 1) + rank
    every = [x - rank + r for r in range(world)]
    part = slice(rank * 12 // world, (rank + 1) * 12 // world)
    for g in (group, dist.group.WORLD):
        kept = x.clone()
        assert torch.equal(all_reduce(x, g), sum(every)) and torch.equal(x, kept)
        assert torch.equal(all_reduce(x, g, op="max"), every[-1])
        assert torch.equal(all_gather(x, g), torch.cat(every))
        assert torch.equal(reduce_scatter(x, g), sum(every)[part])
        assert torch.equal(all_to_all(x, g), torch.cat([e[part] for e in every]))
        assert all_reduce(torch.ones(3, dtype=torch.uint8), g).eq(world).all()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("check", [_all_reduce, _others, _bits, _group, _fallback], ids=lambda f: f.__name__)
def test_collectives(check, world):
    run(world, check, world)


@pytest.mark.parametrize("nbytes", [4096, 1 << 20])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_many_calls_with_random_delays(world, nbytes):
    run(world, _storm, world, nbytes)


def _shared_memory(rank, world):
    """out may share with x what is this rank's part, and nothing else: half of a sum would be summed again."""
    group, whole = dist.group.WORLD, torch.arange(8 * world + 3.0)
    n = 4 * world
    x, part = whole[:n], slice(4 * rank, 4 * rank + 4)
    for call, given, out in ((all_reduce, x, whole[3:n + 3]), (all_to_all, x, whole[1:n + 1]), (all_gather, whole[:4], whole[3:n + 3]),
                             (reduce_scatter, x, whole[n - 2:n + 2])):
        with pytest.raises(ValueError, match="memory of its own"):
            call(given, group, out=out)
    want = x * world
    assert torch.equal(all_reduce(x.clone(), group, out=whole[n:2 * n]), want)
    y = x.clone()
    assert torch.equal(reduce_scatter(y, group, out=y[part]), want[part])
    assert torch.equal(all_gather(y[part], group, out=y), want)
    assert torch.equal(all_to_all(y, group, out=y), want[part].repeat(world))


@pytest.mark.parametrize("world", [2, 3])
def test_memory_that_is_shared(world):
    run(world, _shared_memory, world)


def test_one_rank_copies():
    x = torch.randn(4, 3)
    for fn in (all_reduce, all_gather, reduce_scatter, all_to_all):
        y = fn(x, None)
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert all_reduce(x, None, out=x) is x
