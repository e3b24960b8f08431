"""dispatch and combine on 2, 3 and 4 ranks against one process that holds all tokens: route_plan, permute, unpermute."""
import os
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import close, run

from interlace.kernels import permute, route_plan, unpermute
from interlace.kernels.comm import (
    CollectiveMismatch,
    PeerDied,
    SymmHeap,
    combine,
    combine_ref,
    dispatch,
    dispatch_plan,
    dispatch_ref,
)
from interlace.kernels.comm.heap import LIB, _heaps

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Whole:
    """The batch of all ranks, in rank order, and what one process makes of it."""

    def __init__(self, world, T, K, E, H, dtype=torch.float32, seed=0, routing="random", align=1, whole_numbers=False):
        g = torch.Generator().manual_seed(seed)
        self.T, self.world, self.E, self.per, self.H, self.dtype = T, world, E, E // world, H, dtype
        N = sum(T)
        ids = torch.rand(N, E, generator=g).argsort(1)[:, :K] if K <= E else torch.randint(E, (N, K), generator=g)
        if routing == "one":                                          # all tokens, every choice, to one expert: most ranks get no row
            ids = torch.full_like(ids, E - 1)
        elif routing == "dropped":
            ids = ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.4, -1)
        elif routing == "none":
            ids = torch.full_like(ids, -1)
        elif routing == "repeated":                                   # an expert twice for one token
            ids = ids[:, :1].expand(N, K).contiguous()
        self.ids, self.align = ids, align
        plan = route_plan(ids, E, align)
        self.R = int(plan.offsets[-1])
        self.plan = replace(plan, slot_of_row=plan.slot_of_row[:self.R])

        def draw(*shape):
            t = torch.randn(shape, generator=g, dtype=torch.float64)
            return (t * 4).round() if whole_numbers else t.to(dtype).double()

        self.x, self.residual, self.do = draw(N, H), draw(N, H), draw(N, H)
        self.y, self.dy, self.p, self.dp = draw(self.R, H), draw(self.R, H), draw(N, K), draw(self.R)

    def tokens(self, rank):
        return slice(sum(self.T[:rank]), sum(self.T[:rank + 1]))

    def rows(self, rank):
        return slice(*(int(self.plan.offsets[i * self.per]) for i in (rank, rank + 1)))

    def mine(self, rank, *names):
        return [getattr(self, n)[self.tokens(rank) if n in ("x", "residual", "do", "p", "ids") else self.rows(rank)].to(
            self.dtype if n != "ids" else torch.int64) for n in names]


def _groups():
    """The ways to run: a heap where all fits a slot, small ones in many chunks, poisoned; and torch.distributed."""
    for nbytes, chunk in ((1 << 20, 1 << 20), (4096, 4096), (16384, 1024)):
        heap = SymmHeap(dist.group.WORLD, nbytes)
        LIB.interlace_heap_test(heap.handle, 1, 0)                    # NaN wherever nothing was written yet
        LIB.interlace_heap_tune(heap.handle, -1, -1, chunk, -1)
        yield heap
        heap.close()
    group = dist.new_group(list(range(dist.get_world_size())))
    _heaps[id(group)] = None
    yield group


def shapes(world):
    some = [5, 0, 9, 3][:world]
    yield dict(T=[7] * world, K=2, E=2 * world, H=8)
    yield dict(T=some, K=3, E=4 * world, H=13, routing="dropped")
    yield dict(T=some, K=2, E=world, H=33, align=4)                   # one expert a rank
    yield dict(T=[31] * world, K=world, E=world, H=70, routing="one")
    yield dict(T=some, K=2, E=2 * world, H=5, routing="none")
    yield dict(T=[0] * world, K=2, E=2 * world, H=5)
    yield dict(T=[6] * world, K=4, E=2 * world, H=1, routing="repeated")
    yield dict(T=[64, 0, 17, 130][:world], K=4, E=4 * world, H=300, align=8)


def check(rank, whole, group):
    """Everything of one batch over one group, bit for bit where it is moved or whole numbers are summed."""
    x, y, residual, p, ids = whole.mine(rank, "x", "y", "residual", "p", "ids")
    do, dy, dp = whole.mine(rank, "do", "dy", "dp")
    for t in (x, y, residual, p):
        t.requires_grad_()
    plan = dispatch_plan(ids, whole.E, group, whole.align)
    first, last = rank * whole.per, (rank + 1) * whole.per
    assert torch.equal(plan.counts, whole.plan.counts[first:last])
    assert torch.equal(plan.offsets, whole.plan.offsets[first:last + 1] - whole.plan.offsets[first])
    assert torch.equal(plan.load, whole.plan.routed.long()) and plan.dropped == 0
    rows, probs = permute(whole.x, whole.plan, whole.p)
    got, moved = dispatch(x, plan), plan.probs(p)
    assert got.dtype == x.dtype and torch.equal(got.double(), rows[whole.rows(rank)])
    assert torch.equal(moved.double(), probs[whole.rows(rank)])
    o = combine(y, plan, residual)
    torch.autograd.backward([got, moved, o], [dy, dp, do])
    exact_o = unpermute(whole.y, whole.plan, residual=whole.residual)[whole.tokens(rank)]
    exact_dx = unpermute(whole.dy, whole.plan)[whole.tokens(rank)]
    tolerance = 1e-12 if whole.dtype == torch.float64 else 0.0
    torch.testing.assert_close(o.double(), exact_o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact_dx, rtol=tolerance, atol=tolerance)
    assert torch.equal(y.grad.double(), permute(whole.do, whole.plan)[whole.rows(rank)])
    assert torch.equal(residual.grad, do)
    row = whole.plan.row_of_slot[whole.tokens(rank)]
    assert torch.equal(p.grad.double(), torch.where(row < 0, 0, whole.dp[row.clamp(min=0)]) if whole.R else torch.zeros_like(whole.p)[:len(p)])
    with torch.no_grad():
        again = combine(y, plan, residual), dispatch(x, plan)
        for a, b, c in zip(again, (o, got), (combine_ref(y, plan, residual), dispatch_ref(x, plan)), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c), "not the same bits twice, or not those of torch.distributed"
        plain = combine(y, plan)
    torch.testing.assert_close(plain.double(), unpermute(whole.y, whole.plan)[whole.tokens(rank)], rtol=tolerance, atol=tolerance)


def _exact(rank, world):
    for group in _groups():
        for seed, shape in enumerate(shapes(world)):
            for dtype in DTYPES:
                check(rank, Whole(world, dtype=dtype, seed=seed, whole_numbers=dtype != torch.float64, **shape), group)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_like_one_process(world):
    run(world, _exact, world)
