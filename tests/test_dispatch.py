"""dispatch and combine on 2, 3 and 4 ranks against one process that holds all tokens: route_plan, permute, unpermute."""
import subprocess
import sys
import textwrap
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from interlace.kernels import dispatch as launchers
from interlace.kernels import permute, route_plan, unpermute
from interlace.kernels.comm import (
    CollectiveMismatch,
    SymmHeap,
    combine,
    combine_ref,
    dispatch,
    dispatch_plan,
    dispatch_ref,
)
from interlace.kernels.comm.heap import LIB, keep_heap
from interlace.kernels.dispatch import INTERPRET, stand_ins, traced

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
    for nbytes, chunk, dawdle in ((1 << 20, 1 << 20, 0), (4096, 4096, 50), (16384, 1024, 0)):
        heap = SymmHeap(dist.group.WORLD, nbytes)
        LIB.interlace_heap_test(heap.handle, 1, dawdle)               # NaN wherever nothing was written yet; late readers
        LIB.interlace_heap_tune(heap.handle, -1, -1, chunk, -1)
        yield heap
        heap.close()
    group = dist.new_group(list(range(dist.get_world_size())))
    keep_heap(group, None)
    yield group


def shapes(world):
    some = [5, 0, 9, 3][:world]
    yield {"T": [7] * world, "K": 2, "E": 2 * world, "H": 8}
    yield {"T": some, "K": 3, "E": 4 * world, "H": 13, "routing": "dropped"}
    yield {"T": some, "K": 2, "E": world, "H": 33, "align": 4}                   # one expert a rank
    yield {"T": [31] * world, "K": world, "E": world, "H": 70, "routing": "one"}
    yield {"T": some, "K": 2, "E": 2 * world, "H": 5, "routing": "none"}
    yield {"T": [0] * world, "K": 2, "E": 2 * world, "H": 5}
    yield {"T": [6] * world, "K": 4, "E": 2 * world, "H": 1, "routing": "repeated"}
    yield {"T": [24, 0, 7, 40][:world], "K": 4, "E": 4 * world, "H": 300, "align": 8}


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
    assert plan.largest == max(whole.rows(r).stop - whole.rows(r).start for r in range(whole.world))
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
    assert torch.equal(p.grad.double(), torch.cat([whole.dp, torch.zeros(1)])[torch.where(row < 0, whole.R, row)])
    with torch.no_grad():
        again = combine(y, plan, residual), dispatch(x, plan)
        for a, b, c in zip(again, (o, got), (combine_ref(y, plan, residual), dispatch_ref(x, plan)), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c), "not the same bits twice, or not those of torch.distributed"
        plain = combine(y, plan)
    torch.testing.assert_close(plain.double(), unpermute(whole.y, whole.plan)[whole.tokens(rank)], rtol=tolerance, atol=tolerance)


def _exact(rank, world):
    for i, group in enumerate(_groups()):
        dtypes = DTYPES if i == 0 else [torch.float64, torch.bfloat16]
        for seed, shape in enumerate(shapes(world)):
            for dtype in dtypes:
                check(rank, Whole(world, dtype=dtype, seed=seed, whole_numbers=dtype != torch.float64, **shape), group)


def _error_rule(rank, world, dtypes=(torch.float32, torch.bfloat16, torch.float16), H=96):
    """Against fp64, o and dx may err no more than torch's index_add of the same rows in the same type."""
    for seed, dtype in enumerate(dtypes):
        whole = Whole(world, [40] * world, K=6, E=2 * world, H=H, dtype=dtype, seed=seed)
        (x, y, residual, ids, dy), tokens = whole.mine(rank, "x", "y", "residual", "ids", "dy"), whole.tokens(rank)
        token = whole.plan.slot_of_row // 6
        plan = dispatch_plan(ids, whole.E, dist.group.WORLD)
        x.requires_grad_()
        dispatch(x, plan).backward(dy)
        for rows, add, got in ((whole.y, whole.residual, combine(y, plan, residual)), (whole.dy, 0 * whole.x, x.grad)):
            truth = (unpermute(rows, whole.plan) + add)[tokens]
            eager = torch.zeros_like(whole.x, dtype=dtype).index_add_(0, token, rows.to(dtype)) + add.to(dtype)
            theirs, ours = ((t.double() - truth).abs() for t in (eager[tokens], got))
            unit = torch.finfo(dtype).eps
            assert (ours <= unit / 2 * truth.abs() + 2**-21 * unpermute(rows.abs(), whole.plan)[tokens]).all()
            assert ours.max() <= theirs.max() + 2**-21 and ours.mean() <= theirs.mean() + 2**-24


def _capacity(rank, world):
    """Dropped by the rules of one process over the whole batch, earlier ranks first; a dropped token's sum is what is left."""
    for i, (drop, align) in enumerate((("position", 1), ("probs", 4))):
        whole = Whole(world, [9, 0, 17, 5][:world], K=3, E=2 * world, H=10, dtype=torch.float64, seed=i)
        (x, p, ids), first = whole.mine(rank, "x", "p", "ids"), rank * whole.per
        want = route_plan(whole.ids, whole.E, align, capacity=4, drop=drop, probs=whole.p)
        for group in (dist.group.WORLD, *list(_groups())[-1:]):
            plan = dispatch_plan(ids, whole.E, group, align, capacity=4, drop=drop, probs=p)
            mine = slice(*want.offsets[[first, first + whole.per]].tolist())
            assert torch.equal(plan.counts, want.counts[first:first + whole.per])
            assert plan.dropped == (want.routed - want.counts)[first:first + whole.per].sum()
            assert plan.largest == want.offsets[::whole.per].diff().max()
            rows = dispatch(x, plan)
            assert torch.equal(rows, permute(whole.x, want)[mine])
            back = unpermute(permute(whole.x, want), want)[whole.tokens(rank)]
            torch.testing.assert_close(combine(rows, plan), back, rtol=1e-12, atol=1e-12)


def _static(rank, world):
    """max_rows: the first rows of the buffer, or all of them and zeros; what does not fit is dropped and counted."""
    whole = Whole(world, [9, 0, 17, 5][:world], K=3, E=2 * world, H=10, dtype=torch.float64)
    (x, y, p, ids, do), R = whole.mine(rank, "x", "y", "p", "ids", "do"), whole.rows(rank).stop - whole.rows(rank).start
    rows, moved = permute(whole.x, whole.plan, whole.p)
    for group in (dist.group.WORLD, *list(_groups())[-1:]):
        for bound, most in ((0, None), (7, None), (7, 17), (40, 20)):
            plan = dispatch_plan(ids, whole.E, group, max_rows=bound, max_tokens=most)
            n = min(bound, R)
            assert plan.rows == plan.largest == bound and plan.dropped == R - n and plan.counts.sum() == n and plan.offsets[-1] == n
            short, every = whole.plan.row_of_slot.clone(), [0] * world
            dist.all_gather_object(every, n)
            for r, kept in enumerate(every):
                short[(short >= whole.rows(r).start + kept) & (short < whole.rows(r).stop)] = -1
            left = replace(whole.plan, row_of_slot=short)             # what one process would have, without the dropped
            x.grad, padded = None, torch.cat([y, y.new_full((40, whole.H), float("nan"))])[:bound].requires_grad_()
            got, probs, o = dispatch(x.requires_grad_(), plan), plan.probs(p), combine(padded, plan)
            torch.autograd.backward([got, o], [torch.cat([y, y.new_zeros(40, whole.H)])[:bound], do])
            for whole_rows, here in ((rows, got), (moved, probs), (permute(whole.do, whole.plan), padded.grad)):
                assert torch.equal(here[:n], whole_rows[whole.rows(rank)][:n]) and here[n:].eq(0).all()
            for sums in (o, x.grad):
                torch.testing.assert_close(sums, unpermute(whole.y, left)[whole.tokens(rank)], rtol=1e-12, atol=1e-12)


def _mismatch(rank, world):
    """Every rank is told, and the heap stays usable."""
    heap, odd = SymmHeap(dist.group.WORLD, 8192), rank == world - 1
    ids, x = torch.arange(2 * world).view(1, -1)[:, :2] + torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 5)
    plan, longer = (dispatch_plan(torch.cat([ids] * n), 2 * world, heap) for n in (1, 2))
    y = torch.ones(plan.rows, 5)
    calls = [(lambda: dispatch_plan(ids[:, :1] if odd else ids, 2 * world, heap), "K must be the same on all ranks"),
             (lambda: dispatch_plan(ids, (4 if odd else 2) * world, heap), "num_experts must be the same"),
             (lambda: dispatch_plan(ids, 2 * world, heap, 2 if odd else 1), "align must be the same"),
             (lambda: dispatch_plan(ids[:, :1] if odd else ids, 2 * world, heap, max_tokens=6), "every rank must make the same call"),
             (lambda: dispatch(x[:, :4] if odd else x, plan), r"dispatch\(4 x float32 a row, 6 tokens at most\)"),
             (lambda: dispatch(x.bfloat16() if odd else x, plan), "5 x bfloat16 a row"),
             (lambda: dispatch(torch.ones(12, 5), longer) if odd else dispatch(x, plan), "12 tokens at most"),
             (lambda: combine(y[:, :4] if odd else y, plan), r"combine\(4 x float32"),
             (lambda: combine(y, plan) if odd else dispatch(x, plan), r"combine\(5 x float32")]
    for call, text in calls:
        with pytest.raises(CollectiveMismatch, match=text):
            call()
        assert dispatch(x, plan).eq(1).all(), "the heap must stay usable"
    heap.close()


def _bad_input(rank, world):
    """A bad id of one rank is an error on all of them; bad arguments say what must hold."""
    group, ids, x = dist.group.WORLD, torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 6)
    plan = dispatch_plan(ids, world, group)
    for bad in (world, -2, 2**40):
        mine = ids.clone()
        if rank == 1:
            mine[2, 1] = bad
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {world}\) or -1, got 1 others, the first on rank 1"):
            dispatch_plan(mine, world, group)
    with pytest.raises(ValueError, match=rf"divisible by the {world} ranks of the group, got {world + 1}; use {world} or {2 * world}"):
        dispatch_plan(ids, world + 1, group)
    for call, text in ((lambda: dispatch_plan(ids.float(), world, group), r"ids must be integers \[T, K\]"),
                       (lambda: dispatch_plan(ids, world, group, max_tokens=3), "at most max_tokens = 3 rows, got 4"),
                       (lambda: dispatch_plan(ids, world, group, 4, max_rows=6), "max_rows must be a multiple of align = 4"),
                       (lambda: dispatch(x[:3], plan), "with the plan's T = 4"), (lambda: dispatch(x.long(), plan), "floating"),
                       (lambda: combine(torch.ones(plan.rows + 1, 6), plan), f"with the plan's R = {plan.rows}"),
                       (lambda: combine(torch.ones(plan.rows, 6), plan, x.double()), "residual must be"),
                       (lambda: plan.probs(torch.ones(4, 3)), r"probs must be floating \[4, 2\]")):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_like_one_process(world):
    run(world, _exact, world)


@pytest.mark.parametrize("test", [_error_rule, _capacity, _static, _mismatch, _bad_input], ids=lambda f: f.__name__)
@pytest.mark.parametrize("world", [2, 3])
def test_dispatch(test, world):
    run(world, test, world)


def _over_pads(rank, world):
    """The Triton kernels, interpreted, under the public ops."""
    from interlace.kernels.comm.pad import _pads
    for seed, shape in enumerate([*shapes(world)][1:4]):
        check(rank, Whole(world, dtype=(torch.float32, torch.bfloat16)[seed % 2], seed=seed, whole_numbers=True, **shape), dist.group.WORLD)
    _error_rule(rank, world, [torch.float16], 33)                     # interpreted, fp32 is cut to bfloat16, not rounded
    assert {"dispatch", "combine"} <= {op for _, op, *_ in _pads}, "the kernels should have run"
    _one_rank_alone(rank, world)


def _one_rank_alone(rank, world):
    """What is a rank's own affair changes no other's path: a mode that looks on, a residual."""
    whole = Whole(world, [6] * world, K=2, E=world, H=9, whole_numbers=True)
    x, y, residual, ids = whole.mine(rank, "x", "y", "residual", "ids")
    plan = dispatch_plan(ids, whole.E, dist.group.WORLD)
    rows = dispatch(x, plan)
    assert "largest" in vars(plan), "read before the experts run, not behind them"
    o = combine(y, plan)
    with FlopCounterMode(display=False) if rank == 0 else nullcontext():
        assert torch.equal(dispatch(x, plan), rows) and torch.equal(combine(y, plan), o)
    assert torch.equal(combine(y, plan, residual if rank == 0 else None), o + residual if rank == 0 else o)


@pytest.mark.skipif(not INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("world", [2, 3])
def test_dispatch_and_combine_kernel_matches(world):
    run(world, _over_pads, world)


def test_a_mode_that_looks_on_makes_no_stand_ins():
    with FlopCounterMode(display=False):
        assert traced() and not stand_ins()
    with FakeTensorMode():
        assert stand_ins()
    seen = []
    make_fx(lambda x: (seen.append(stand_ins()), x + 1)[1])(torch.ones(2))
    assert seen == [True] and not stand_ins()


def test_a_kernel_runs_on_the_gpu_of_its_tensors(monkeypatch):
    """Of a model spread over several GPUs in one process; a list of tensors too."""
    current = [0]

    @contextmanager
    def device(there):
        current.append(there.index)
        yield
        current.pop()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    ops = {}
    recorder = SimpleNamespace(define=lambda schema: None, impl=lambda name, launch, key: ops.update({key: launch}))
    monkeypatch.setattr(launchers, "LIB", recorder)
    monkeypatch.setattr(torch.library, "register_fake", lambda *args, **kwargs: None)
    launchers.define("probe(Tensor x) -> Tensor", lambda *args: current[-1], lambda *args: None)
    ran = ops["CUDA"]
    with FakeTensorMode():
        x, y, on_cpu = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1"), torch.empty(2)
    assert [ran(x), ran(y, x), ran(2.0, None, on_cpu, [y]), ran([], on_cpu), ran()] == [0, 1, 1, 0, 0] and current == [0]


def test_one_rank_is_permute_and_unpermute():
    whole = Whole(1, [33], K=3, E=5, H=20, routing="dropped", align=4, whole_numbers=True)
    check(0, whole, None)


VICTIM = """
    import os, signal, sys, torch, torch.distributed as dist
    from interlace.kernels.comm import PeerDied, SymmHeap, combine, dispatch, dispatch_plan
    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    heap = SymmHeap(dist.group.WORLD, name="ep")
    plan = dispatch_plan(torch.arange(4096).view(2048, 2) % 4, 4, heap)
    x = torch.ones(2048, 512)
    for i in range(10**9):
        if rank == 1 and i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            x = combine(dispatch(x, plan), plan) / 2
        except PeerDied as e:
            print(e, flush=True)
            os._exit(0)
"""


def test_killed_rank_is_noticed_and_named(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(VICTIM), str(r), str(tmp_path / "store")],
                              stdout=subprocess.PIPE, text=True) for r in range(2)]
    try:
        text, _ = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == 0 and f"dispatch: rank 1 (global rank 1, pid {ranks[1].pid}) of group 'ep' died" in text, text
    finally:
        for p in ranks:
            p.kill()
            p.wait()
