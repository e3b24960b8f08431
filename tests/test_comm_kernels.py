"""The overlapped Triton kernels, interpreted: several processes over POSIX shared memory, with fresh data in every call, NaN in every
buffer that nobody should read, and random stalls; then each without its second buffer; then against the step tables.

Values are small integers: every partial sum is exact, so any order of events that is right gives the same bits."""
import pytest
import torch
import torch.distributed as dist
from ranks import run

from interlace.kernels import dispatch
from interlace.kernels.comm import CollectiveMismatch, ag_gemm, all_reduce, gemm_ar, gemm_rs, protocol, reset_pads

pytestmark = pytest.mark.skipif(not dispatch.INTERPRET, reason="needs TRITON_INTERPRET=1")
if dispatch.INTERPRET:
    from interpreted import DONE, recorded, stalls

    from interlace.kernels.comm import heap, triton_ag, triton_ar, triton_moe, triton_rs
    from interlace.kernels.comm import pad as pad_module
    from interlace.kernels.comm.pad import Pad, pad_of
    from interlace.kernels.comm.protocol import first_row
    from interlace.kernels.comm.tile import Tiles

WORLDS = [2, 3, pytest.param(4, marks=pytest.mark.slow)]
SHAPES = [(37, 23, 19), (16, 16, 40), (2, 17, 33)]                    # ragged; whole tiles; fewer rows than ranks
WIDE = [(6, 130, 5)]                                                  # over 5 to 8 ranks: 9 tiles of everybody's rows; some have none
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
START = 2**31 - 3                                                     # epochs wrap in the third call


def ints(generator, dtype, *shape):
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def product(x, w):
    return x.double() @ w.double().t()


def poison(pad):
    """Nobody writes into the buffer of the call that has just ended before this rank has signalled the next one."""
    pad.buffer(int(pad.local[0]) & 1).fill_(0xff)


def make(world, op, sizes, start=START, **more):
    pad = Pad(dist.group.WORLD, op, max(s[0] for s in sizes), max(s[1] for s in sizes), start=start, **more)
    pad.buffer(0).fill_(0xff)
    pad.buffer(1).fill_(0xff)
    dist.barrier()
    return pad


def calls(seed, world):
    """(dtype, shape, generator) of each call: types and shapes change from call to call on one pad."""
    g = torch.Generator().manual_seed(seed)
    return [(DTYPES[(world + i) % 3], shape, g) for i, shape in enumerate(SHAPES if world < 5 else WIDE)]


# ---- right, whatever the timing -------------------------------------------------------------------------------


def _all_reduce(rank, world, two_shot):
    new = lambda dt, *s: torch.empty(*s, dtype=dt)                    # noqa: E731
    sizes = [triton_ar.needs(new(dt, M, K), w, world, two_shot)
             for dt in DTYPES for M, N, K in SHAPES + WIDE for w in (new(dt, N, K), None)]
    pad = make(world, "gemm_ar", sizes)
    with stalls(rank):
        for dt, (M, N, K), g in calls(0, world):
            xs, ws = ([ints(g, dt, *s) for _ in range(world)] for s in ((M, K), (N, K)))
            y = triton_ar.launch(pad, xs[rank], ws[rank], two_shot=two_shot)
            poison(pad)
            assert torch.equal(y, sum(product(x, w) for x, w in zip(xs, ws)).to(dt)), f"gemm_ar {dt} {M} {N} {K}"
            y = triton_ar.launch(pad, xs[rank], two_shot=two_shot)
            poison(pad)
            assert torch.equal(y, sum(x.float() for x in xs).to(dt)), f"all_reduce {dt} {M} {K}"


@pytest.mark.parametrize("two_shot", [False, True], ids=["one_shot", "two_shot"])
@pytest.mark.parametrize("world", WORLDS)
def test_all_reduce_and_gemm_ar_interpret(world, two_shot):
    run(world, _all_reduce, world, two_shot)


def _ag_gemm(rank, world):
    pad = make(world, "ag_gemm", [triton_ag.needs(M, K, dt, world) for dt in DTYPES for M, N, K in SHAPES + WIDE])
    with stalls(rank):
        for dt, (M, N, K), g in calls(1, world):
            x, w = ints(g, dt, M, K), [ints(g, dt, N, K) for _ in range(world)][rank]
            mine = x[first_row(rank, M, world):first_row(rank + 1, M, world)].clone()
            y = triton_ag.launch(pad, mine, M, w.t().contiguous().t() if M == 16 else w)   # either layout of w
            poison(pad)
            assert torch.equal(y, product(x, w).to(dt)), f"ag_gemm {dt} {M} {N} {K}"
            y = triton_ag.launch(pad, mine, M)
            poison(pad)
            assert torch.equal(y, x), f"all_gather {dt} {M} {K}"


@pytest.mark.parametrize("world", WORLDS)
def test_all_gather_and_ag_gemm_interpret(world):
    run(world, _ag_gemm, world)


def _gemm_rs(rank, world):
    pad = make(world, "gemm_rs", [triton_rs.needs(M, N, dt, world, w) for dt in DTYPES for M, N, K in SHAPES + WIDE for w in (True, False)])
    with stalls(rank):
        for dt, (M, N, K), g in calls(2, world):
            xs, ws, ps = ([ints(g, dt, *s) for _ in range(world)] for s in ((M, K), (N, K), (M, N)))
            mine = slice(first_row(rank, M, world), first_row(rank + 1, M, world))
            triton_rs.push(pad, xs[rank], ws[rank])
            y, = triton_rs.take(pad, M, N, dt, True)
            poison(pad)
            assert torch.equal(y, sum(product(x, w) for x, w in zip(xs, ws)).to(dt)[mine]), f"gemm_rs {dt} {M} {N} {K}"
            triton_rs.push(pad, ps[rank])
            y, = triton_rs.take(pad, M, N, dt, False)
            poison(pad)
            assert torch.equal(y, sum(p.float() for p in ps).to(dt)[mine]), f"reduce_scatter {dt} {M} {N}"


@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter_and_gemm_rs_interpret(world):
    run(world, _gemm_rs, world)


def _rs_residual_norm(rank, world):
    pad = make(world, "rs_residual_norm", [triton_rs.needs(M, N, dt, world, False) for dt in DTYPES for M, N, K in SHAPES + WIDE])
    onward = make(world, "ag_gemm", [triton_ag.needs(M, N, dt, world) for dt in DTYPES for M, N, K in SHAPES + WIDE])
    with stalls(rank):
        for call, (dt, (M, N, K), g) in enumerate(calls(3, world), world):
            ps, residual, w, b = [ints(g, dt, M, N) for _ in range(world)], ints(g, dt, M, N), ints(g, dt, N), ints(g, dt, N)
            nxt = ints(g, dt, K, N)
            mine = slice(first_row(rank, M, world), first_row(rank + 1, M, world))
            triton_rs.push(pad, ps[rank])
            bias = b if call % 2 else None
            h, y, rstd, mean = triton_rs.take(pad, M, N, dt, False, residual[mine].clone(), w, bias, 1e-5, onward)
            poison(pad)
            total = sum(p.float() for p in ps) + residual.float()
            assert torch.equal(h, total.to(dt)[mine])
            hf = total.double()
            centred = hf - hf.mean(-1, keepdim=True) if call % 2 else hf
            want_rstd = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            want = centred * want_rstd * w.double() + (b.double() if call % 2 else 0)
            torch.testing.assert_close(rstd.double(), want_rstd[mine, 0], rtol=1e-5, atol=0)
            if call % 2:
                torch.testing.assert_close(mean.double(), hf.mean(-1)[mine], rtol=1e-5, atol=1e-6)
            eps = torch.finfo(dt).eps                                 # the interpreter truncates to bf16: one ulp
            torch.testing.assert_close(y.double(), want[mine], rtol=2 * eps, atol=8 * eps)
            z = triton_ag.launch(onward, y, M, nxt, pushed=True)      # y went out with the norm: nobody pushes
            poison(onward)
            every = [None] * world
            dist.all_gather_object(every, y)
            torch.testing.assert_close(z.double(), torch.cat(every).double() @ nxt.double().t(), rtol=4 * eps, atol=64 * eps)


@pytest.mark.parametrize("world", WORLDS)
def test_rs_residual_norm_interpret(world):
    run(world, _rs_residual_norm, world)


def _all_kernels(rank, world):
    for two_shot in (False, True):
        _all_reduce(rank, world, two_shot)
    for check in (_ag_gemm, _gemm_rs, _rs_residual_norm):
        check(rank, world)


@pytest.mark.parametrize("world", [5, 6, 7, 8])
def test_up_to_eight_ranks_interpret(world):
    run(world, _all_kernels, world)


# ---- the second buffer ----------------------------------------------------------------------------------------


def _one_tile(rank, protocol_, buffers, wrong):
    """Two ranks, one tile, four calls; rank 1 dawdles after each of its signals, so that rank 0 is a call ahead of its reads."""
    M, N, K, dt, world, g = 8, 16, 16, torch.float32, 2, torch.Generator().manual_seed(4)
    sizes = {"one_shot": lambda: triton_ar.needs(torch.empty(M, K), torch.empty(N, K), world, False),
             "gather": lambda: triton_ag.needs(M, K, dt, world), "scatter": lambda: triton_rs.needs(M, N, dt, world),
             "fetch": lambda: triton_moe.needs(M, K, dt)}
    slots = torch.arange(M * world, dtype=torch.int32)                # every rank wants every token
    pad, bad = make(world, "gemm_ar", [sizes[protocol_]()], start=0, polls=4000), 0
    with stalls(rank, after_signal=0.15 * rank):
        for _ in range(4):
            xs, ws = ([ints(g, dt, *s) for _ in range(world)] for s in ((M, K), (N, K)))
            total = sum(product(x, w) for x, w in zip(xs, ws))
            if protocol_ == "one_shot":
                bad += not torch.equal(triton_ar.launch(pad, xs[rank], ws[rank], BUFFERS=buffers), total)
            elif protocol_ == "gather":
                y = triton_ag.launch(pad, xs[0][4 * rank:4 * rank + 4].clone(), M, ws[rank], BUFFERS=buffers)
                bad += not torch.equal(y, product(xs[0], ws[rank]))
            elif protocol_ == "fetch":
                y = triton_moe.dispatch(pad, xs[rank], slots.view(-1, 1), slots, M, BUFFERS=buffers)
                bad += not torch.equal(y, torch.cat(xs))
            else:
                triton_rs.push(pad, xs[rank], ws[rank], BUFFERS=buffers)
                bad += not torch.equal(triton_rs.take(pad, M, N, dt, True, BUFFERS=buffers)[0], total[4 * rank:4 * rank + 4])
    every = [None] * world
    dist.all_gather_object(every, bad)
    assert bool(sum(every)) == wrong, f"{every} wrong results with {buffers} buffers"


@pytest.mark.parametrize("protocol_", ["one_shot", "gather", "scatter", "fetch"])
@pytest.mark.parametrize("buffers", [2, 1])
def test_second_buffer_is_needed_interpret(protocol_, buffers):
    run(2, _one_tile, protocol_, buffers, buffers == 1)


# ---- kernels do what the tables say ---------------------------------------------------------------------------


def _flat(kernels, dos=("write", "signal", "wait", "read")):
    """As the interpreter runs them: one program after the other."""
    arrived = {}

    def steps(program):
        for s in program:
            if s.do in dos:
                yield s.do, s.at, s.buffer if s.do in ("write", "read") else 0, (s.area, s.slot)
            elif s.do == "last":
                arrived[s.slot] = arrived.get(s.slot, 0) + 1
                if arrived[s.slot] == s.of:
                    yield from steps(s.steps)
    return [e for kernel in kernels for program in kernel for e in steps(program)]


def _compare(table, events, sums_at=0):
    """events know no areas: "sum" cells lie after the "part" cells."""
    want = [(do, at, buffer, slot + (sums_at if area == "sum" else 0)) for do, at, buffer, (area, slot) in _flat(table)]
    assert events == want


def _virtual(world, op, needs):
    pads = Pad.virtual(world, op, *needs, "cpu", start=0)
    for p in pads:
        p.memory[:p.data].view(torch.int32).fill_(DONE)
    return pads


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("two_shot", [False, True])
def test_all_reduce_kernel_interpret_follows_its_table(two_shot, rank):
    world, x, w = 3, torch.ones(64, 16), torch.ones(16, 16)           # four items
    items, t = triton_ar.needs(x, w, world, two_shot)[1], Tiles(16, 16, 32, 4, 1)
    pads = _virtual(world, "gemm_ar", triton_ar.needs(x, w, world, two_shot))
    with recorded(pads, t.BM * t.BN * 4) as events:
        triton_ar.launch(pads[rank], x, w, two_shot=two_shot, tiles=t)
    table = (protocol.two_shot if two_shot else protocol.one_shot)(rank, world, 1, items, programs=2)
    _compare(table, events, sums_at=world * -(-items // world))
    assert pads[rank].local[0] == 1 and not pads[rank].local[1:].any(), "the epoch is bumped, the counters are back at 0"


@pytest.mark.parametrize("rank", [0, 2])
def test_all_gather_kernel_interpret_follows_its_table(rank):
    world, M, K = 3, 96, 16                                           # two blocks a rank, one tile wide
    pads = _virtual(world, "ag_gemm", triton_ag.needs(M, K, torch.float32, world))
    with recorded(pads, 16 * K * 4) as events:
        triton_ag.launch(pads[rank], torch.ones(32, K), M, torch.ones(16, K))
    _compare(protocol.gather(rank, world, 1, 2, pushers=1, programs=2), events)


@pytest.mark.parametrize("rank", [0, 2])
def test_reduce_scatter_kernels_interpret_follow_their_table(rank):
    world, M, N = 3, 48, 32                                           # one block a rank, two tiles wide
    pads = _virtual(world, "gemm_rs", triton_rs.needs(M, N, torch.float32, world))
    with recorded(pads, 4) as events:
        triton_rs.push(pads[rank], torch.ones(M, 16), torch.ones(N, 16))
        sent = list(events)
        triton_rs.take(pads[rank], M, N, torch.float32, True)
    table = protocol.scatter(rank, world, 1, 1, tiles=2, programs=2)
    cell = lambda e: (*e[:3], e[3] // (16 * N) * 2 + e[3] % N // 16) if e[0] in ("write", "read") else e       # noqa: E731
    assert [cell(e) for e in sent] == [(*e[:3], e[3][1]) for e in _flat(table[:1])]
    taken = [cell(e) for e in events[len(sent):]]                     # row by row: a read begins in a row's first tile
    want = [(*e[:3], e[3][1] // 2 * 2) if e[0] == "read" else (*e[:3], e[3][1]) for e in _flat(table[1:])]
    assert taken[:world] == want[:world] and set(taken) == set(want)


# ---- bad input ------------------------------------------------------------------------------------------------


def _mismatch(rank):
    pad = make(2, "gemm_ar", [(1 << 16, 64)])
    with pytest.raises(CollectiveMismatch, match=r"gemm_ar: rank 0 of group .* called .*\[8, 16\].*, but rank 1 called .*\[8, 32\]"):
        triton_ar.launch(pad, torch.ones(8, 16 + 16 * rank))
    assert triton_ar.launch(pad, torch.ones(3, 5)).eq(2).all(), "the pad stays usable"
    with pytest.raises(CollectiveMismatch, match=r"rank 0 of group .* made the pad of .*1024.*but rank 1 made the pad of .*2048"):
        Pad(dist.group.WORLD, "gemm_ar", 1024 * (rank + 1), 8)


def test_calls_that_differ_interpret():
    run(2, _mismatch)


def _late(rank):
    pad = make(2, "all_reduce", [(1 << 16, 64)], start=0)
    x, enough = torch.ones(40, 10), pad.polls
    assert triton_ar.launch(pad, x).eq(2).all()
    if rank == 0:
        pad.polls = 300
        with stalls(0), pytest.raises(TimeoutError, match=r"all_reduce: no signal from rank 1 of group '.*' to rank 0 after 300 polls; "
                                      r"waited for epoch 2 in flag \d+, it had signalled 1"):
            triton_ar.launch(pad, x)
        with pytest.raises(TimeoutError, match="no signal from rank 1"):
            triton_ar.launch(pad, x)                                  # out of use until all reset it
    dist.barrier()
    pad.polls = enough
    pad.reset()
    assert triton_ar.launch(pad, x).eq(2).all()


def test_a_rank_that_does_not_come_interpret():
    run(2, _late)


def _call(pad, kind, rank, value):
    """(result, what it should be) of a call whose data is `value` at rank 0 and value + 1 at rank 1."""
    x, M = torch.full((40, 16), float(value + rank)), 40
    if kind in ("gather", "fetch"):
        mine, slots = x[:20].clone(), torch.arange(M, dtype=torch.int32)   # every rank wants every row
        got = triton_ag.launch(pad, mine, M) if kind == "gather" else triton_moe.dispatch(pad, mine, slots.view(-1, 1), slots, 20)
        return got, torch.full((40, 16), float(value)).add_((torch.arange(40) >= 20)[:, None])
    if kind == "scatter":
        triton_rs.push(pad, x)
        return triton_rs.take(pad, M, 16, x.dtype, False)[0], torch.full((20, 16), 2.0 * value + 1)
    return triton_ar.launch(pad, x, two_shot=kind == "two_shot"), torch.full((40, 16), 2.0 * value + 1)


def _late_and_wrong(rank, kind):
    """Rank 0's wait runs out in its second call; three more are queued ahead of its host's look. Then rank 1 makes its calls."""
    pad = make(2, "all_reduce", [(1 << 16, 64)], start=0)
    enough, seen = pad.polls, 0
    assert torch.equal(*_call(pad, kind, rank, 10))
    dist.barrier()
    if rank == 0:
        pad.polls, pad.check = 50, lambda: None
        for call in range(4):
            _call(pad, kind, rank, 20 + 10 * call)
        del pad.check
        with pytest.raises(TimeoutError, match=r"all_reduce: no signal from rank 1 of group '.*' to rank 0 .* waited for epoch 2 in flag"):
            pad.check()
    dist.barrier()
    if rank == 1:
        pad.polls = 50
        for call in range(4):
            try:
                assert torch.equal(*_call(pad, kind, rank, 20 + 10 * call)), f"wrong data without an error in call {call + 2}"
            except TimeoutError:
                seen += 1
        assert seen == (3 if kind in ("gather", "scatter", "fetch") else 4)   # these had sent all of a call before they waited
    dist.barrier()
    with pytest.raises(TimeoutError, match="no signal from rank"):    # a first call is collective: both ranks hear of it
        pad.agree("another call")
    pad.polls = enough
    pad.reset()
    for call in range(3):
        assert torch.equal(*_call(pad, kind, rank, 60 + 10 * call))


@pytest.mark.parametrize("kind", ["one_shot", "two_shot", "gather", "scatter", "fetch"])
def test_a_late_rank_gets_no_wrong_data_interpret(kind):
    run(2, _late_and_wrong, kind)


def _one_error(rank):
    """Only rank 0 has a wait that ran out, when both need a larger pad."""
    group, cpu = dist.group.WORLD, torch.device("cpu")
    pad = pad_of(group, "gemm_rs", 1 << 12, 8, cpu)
    if rank == 0:
        pad.error[0] = 1
    with pytest.raises(TimeoutError, match=r"no signal from rank 0 of group '.*' to rank 0"):
        pad_of(group, "gemm_rs", 1 << 14, 8, cpu)
    assert pad_of(group, "gemm_rs", 1 << 12, 8, cpu) is pad
    pad.reset()
    assert pad_of(group, "gemm_rs", 1 << 14, 8, cpu) is not pad


def test_all_ranks_hear_of_an_error_before_a_pad_grows_interpret():
    run(2, _one_error)


def _onward_twice(rank):
    """Rows sent onward must be taken: a second send would be of the same epoch, over rows that are still read."""
    M, N, dt = 8, 16, torch.float32
    pad = make(2, "rs_residual_norm", [triton_rs.needs(M, N, dt, 2, False)])
    onward = make(2, "all_gather", [triton_ag.needs(M, N, dt, 2)])
    x, residual, w = torch.ones(M, N), torch.zeros(M // 2, N), torch.ones(N)
    send = lambda to: (triton_rs.push(pad, x), triton_rs.take(pad, M, N, dt, False, residual, w, onward=to))[1]  # noqa: E731
    y = send(onward)[1]
    triton_rs.push(pad, x)
    with pytest.raises(ValueError, match=r"sent onward before must run first, got 8 x 16 torch.float32 not yet taken"):
        triton_rs.take(pad, M, N, dt, False, residual, w, onward=onward)
    triton_rs.take(pad, M, N, dt, False, residual, w)
    with pytest.raises(ValueError, match=r"a gather must take the rows that were sent onward to it, 8 x 16 torch.float32, got .*=False"):
        triton_ag.launch(onward, y, M)
    assert torch.equal(triton_ag.launch(onward, y, M, pushed=True), torch.cat([y, y]))
    with pytest.raises(ValueError, match=r"a gather must take the rows that were sent onward to it, none, got .* pushed=True"):
        triton_ag.launch(onward, y, M, pushed=True)
    assert torch.equal(triton_ag.launch(onward, y, M), torch.cat([y, y]))


KINDS = {
    "gemm_ar": (lambda rows, group: gemm_ar(torch.ones(rows, 16), torch.ones(16, 16), group), 32.0),
    "ag_gemm": (lambda rows, group: ag_gemm(torch.ones(rows, 16), torch.ones(16, 16), group), 16.0),
    "gemm_rs": (lambda rows, group: gemm_rs(torch.ones(rows, 16), torch.ones(16, 16), group), 32.0),
    "all_reduce": (lambda rows, group: all_reduce(torch.ones(rows, 16), group), 2.0),
}


def _grows_on_one_rank(rank, kind):
    """A user's ranks disagree on rows, and only rank 1 needs a larger pad: while rank 0 makes a call it has made before, which is no
    meeting, and while it makes another new one."""
    group, (call, value), patience = dist.new_group([0, 1]), KINDS[kind], heap.PATIENCE
    try:
        for _ in range(2):
            assert call(8, group).eq(value).all()
        heap.PATIENCE = 2.0
        mine = [p for k, p in pad_module._pads.items() if k[0] == id(group)]
        enough = [p.polls for p in mine]
        for p in mine:
            p.polls = 300
        late = r"no signal from rank 1" if rank == 0 else r"rank 0 of group '.*' (did not come to rank 1 in 2 s|gave up and resets)"
        with stalls(rank), pytest.raises(TimeoutError, match=f"{kind}: {late}.*Do all ranks make the same calls"):
            call(8 if rank == 0 else 64, group)
        heap.PATIENCE = patience
        for p, polls in zip(mine, enough):
            p.polls = polls
        reset_pads(group)
        assert call(8, group).eq(value).all() and call(16, group).eq(value).all(), "usable afterwards"
        with pytest.raises(CollectiveMismatch, match=f"{kind}: rank 0 of group .* rank 1 "):
            call(4 if rank == 0 else 128, group)
        assert call(8, group).eq(value).all() and call(256, group).eq(value).all(), "usable, and it grows on all"
    finally:
        heap.PATIENCE = patience


@pytest.mark.parametrize("kind", KINDS)
def test_a_pad_that_grows_on_one_rank_only_interpret(kind):
    run(2, _grows_on_one_rank, kind)


def test_rows_sent_onward_are_taken_once_interpret():
    run(2, _onward_twice)


def test_a_result_that_missed_a_part_is_nan_interpret():
    pads = Pad.virtual(2, "all_reduce", 1 << 14, 64, "cpu", polls=2)
    for call in (lambda: triton_ar.launch(pads[0], torch.ones(100)), lambda: triton_ar.launch(pads[0], torch.ones(100), two_shot=True)):
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda x, real=torch.empty_like, made=made: made.append(real(x)) or made[-1])
            with pytest.raises(TimeoutError, match="no signal from rank 1"):
                call()
        assert made[0].isnan().all()
        pads[0].reset()


def _registry(rank):
    a = pad_of(dist.group.WORLD, "gemm_ar", 1000, 8, torch.device("cpu"))
    assert pad_of(dist.group.WORLD, "gemm_ar", 500, 4, torch.device("cpu")) is a
    assert pad_of(dist.group.WORLD, "gemm_ar", 500, 4, torch.device("cpu"), slot=1) is not a, "two calls at one time: two slots"
    b = pad_of(dist.group.WORLD, "gemm_ar", 100_000, 4, torch.device("cpu"))
    assert b is not a and b.nbytes >= 100_000 and b.flags == 8
    with pytest.raises(ValueError, match=r"ag_gemm: rank \d must have its share of 8 rows over 2 ranks, got 3"):
        triton_ag.launch(Pad.virtual(2, "ag_gemm", 1 << 12, 8, "cpu")[rank], torch.ones(3, 4), 8)


def test_a_pad_too_small_interpret():
    small = Pad.virtual(2, "all_reduce", 256, 1, "cpu")[0]
    for call in (lambda: triton_ar.launch(small, torch.ones(1000)), lambda: triton_ag.launch(small, torch.ones(50, 8), 100),
                 lambda: triton_rs.push(small, torch.ones(100, 8))):
        with pytest.raises(ValueError, match=r"all_reduce: the pad of group 'virtual' must hold \d+ bytes and \d+ flags, got 256 and 1"):
            call()


def test_pads_are_kept_and_grow_interpret():
    run(2, _registry)
