"""The walk of the fused ops over the heap: every interleaving of its steps, real ranks with NaN and delays, bad input, death."""
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
from ranks import run

from interlace.kernels.comm import CollectiveMismatch, SymmHeap, ag_gemm, all_reduce, gemm_ar, gemm_rs
from interlace.kernels.comm.heap import LIB
from interlace.kernels.comm.walk import Walk, block_rows, gathered_product, summed_product

# ---- the protocol: a rank's steps as a table, all interleavings -----------------------------------------------


def _steps(ops, halves=True, opening=True):
    """(step, tick, places) of one rank. ops: "plain", or the number of blocks of a walk. csrc/runtime/heap.h has the argument."""
    steps, t = [], 0

    def places(t, walked):
        return {(t & 1, t >> 1 & 1)} if walked and halves else {(t & 1, 0), (t & 1, 1)}

    for op in ops:
        if op == "plain":
            t += 1
            steps += [(kind, t, places(t, False)) for kind in ("write", "signal", "wait", "read")]
            continue
        if opening:
            t += 1
            steps += [("signal", t, set()), ("wait", t, set())]
        for k in range(op):
            t += 1
            steps.append(("write", t, places(t, True)))
            if k:
                steps += [("wait", t - 1, set()), ("read", t - 1, places(t - 1, True))]
            steps.append(("signal", t, set()))
        steps += [("wait", t, set()), ("read", t, places(t, True))]
    return steps


def _explore(world, steps):
    """States in which a rank reads a place that its owner is writing for, or has written for, a later tick; and deadlocks."""
    signalled, bad, seen, todo = [0], [], {(0,) * world}, [(0,) * world]
    for kind, t, _ in steps:
        signalled.append(t if kind == "signal" else signalled[-1])
    while todo:
        at = todo.pop()
        moves = []
        for r, i in enumerate(at):
            if i == len(steps):
                continue
            kind, t, where = steps[i]
            if kind == "read":
                bad += [at for q, j in enumerate(at) if q != r
                        and any(k == "write" and u > t and w & where for k, u, w in steps[:j + 1])]
            if kind != "wait" or all(signalled[j] >= t for j in at):
                moves.append((*at[:r], i + 1, *at[r + 1:]))
        bad += [at] if not moves and any(i < len(steps) for i in at) else []
        todo += [m for m in moves if m not in seen]
        seen.update(moves)
    return bad


@pytest.mark.parametrize("world", [2, 3])
def test_every_interleaving(world):
    steps = _steps(["plain", 4, "plain", 1, 2, "plain"] if world == 2 else ["plain", 3, "plain"])
    assert not _explore(world, steps)


def test_negative_controls():
    """Without the halves, and without the opening tick, the same explorer finds a torn read."""
    assert _explore(2, _steps(["plain", 4], halves=False))
    assert _explore(2, _steps(["plain", 2, "plain"], opening=False))


# ---- real ranks -----------------------------------------------------------------------------------------------


def _blocks(rank, world, dtype, delay):
    """Three rounds with fresh data, other collectives in between; NaN wherever nothing was written."""
    heap = SymmHeap(dist.group.WORLD, 16384)
    LIB.interlace_heap_test(heap.handle, 1, delay if rank == 0 else 0)
    g = torch.Generator().manual_seed(11)
    for M, K, N in ((37 * world, 5, 33), (2 * world, 3, 7), (64 * world, 16, 20)):
        whole = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        xs, ws = whole(world, M, K), whole(world, N, K)
        m = M // world
        eager = sum((x @ w.t()).double() for x, w in zip(xs, ws))
        truth = sum(x.double() @ w.double().t() for x, w in zip(xs, ws))
        allowed = (eager - truth).abs().max() + 2 * torch.finfo(dtype).eps * truth.abs().max()
        y = summed_product("gemm_ar", xs[rank], ws[rank].t(), heap, 0, M)
        assert (y.double() - truth).abs().max() <= allowed
        every = [torch.empty_like(y) for _ in range(world)]
        dist.all_gather(every, y)
        assert all(torch.equal(e, y) for e in every), "ranks differ"
        assert torch.equal(y, summed_product("gemm_ar", xs[rank], ws[rank].t(), heap, 0, M)), "runs differ"
        assert all_reduce(torch.ones(3), heap).eq(world).all()
        part = summed_product("gemm_rs", xs[rank], ws[rank].t(), heap, rank * m, (rank + 1) * m)
        assert torch.equal(part, y[rank * m:(rank + 1) * m])
        x = xs[0, :m * world]
        got = gathered_product(x[rank * m:(rank + 1) * m].contiguous(), ws[rank].t(), heap)
        torch.testing.assert_close(got.double(), x.double() @ ws[rank].double().t(), rtol=4 * torch.finfo(dtype).eps,
                                   atol=8 * torch.finfo(dtype).eps * K)
    heap.close()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_blocks(world, dtype):
    run(world, _blocks, world, dtype, 0 if dtype != torch.float32 else 2000)


def _race(rank, world):
    """One place instead of four: with a rank that dawdles before it reads, sums go wrong."""
    heap = SymmHeap(dist.group.WORLD, 16384, _buffers=1)
    LIB.interlace_heap_test(heap.handle, 1, 3000 if rank == 0 else 0)
    a, b = torch.full((400, 1), rank + 1.0), torch.ones(1, 16)
    y = summed_product("gemm_ar", a * torch.arange(400.)[:, None], b, heap, 0, 400)
    truth = sum(r + 1 for r in range(world)) * torch.arange(400.)[:, None].expand(400, 16)
    assert rank or not torch.equal(y, truth), "one place was enough"
    heap.close()


def test_places_are_needed():
    run(2, _race, 2)


def test_block_rows():
    assert block_rows(2048, 4096, 2 << 20) == 256
    assert block_rows(300, 4096, 2 << 20) == 150                      # even blocks, no crumb
    assert block_rows(5, 4096, 4096) == 0                             # not one row fits: no walk


# ---- bad input ------------------------------------------------------------------------------------------------


def _mismatch(rank, world):
    heap, group = SymmHeap(dist.group.WORLD, 1 << 18, name="tp"), dist.group.WORLD
    odd = rank == world - 1
    r = lambda *s, **kw: torch.randn(*s, **kw)  # noqa: E731
    big, cols = 400 * world, 256 if odd else 200                                              # over a slot: these walk
    calls = [("gemm_ar", lambda: gemm_ar(r(big, 64), r(208 if odd else 200, 64), heap), f"{big} rows of 208", f"{big} rows of 200"),
             ("gemm_ar", lambda: gemm_ar(r(4, 8), r(7 if odd else 6, 8), heap), "4 rows of 7", "4 rows of 6"),
             ("gemm_ar", lambda: gemm_ar(r(big if odd else 4, 64), r(200, 64), heap), f"{big} rows", "4 rows"),
             ("gemm_ar", lambda: gemm_ar(r(big, 64, dtype=torch.float64 if odd else torch.float32),
                                         r(200, 64, dtype=torch.float64 if odd else torch.float32), heap), "float64", "float32"),
             ("gemm_rs", lambda: (gemm_rs if odd else gemm_ar)(r(big, 64), r(200, 64), heap), "gemm_rs", "gemm_ar"),
             ("ag_gemm", lambda: ag_gemm(r(400, cols), r(9, cols), heap), "400 rows of 256", "400 rows of 200"),
             ("ag_gemm", lambda: ag_gemm(r(400, 200), r(9, 200), heap, regather=odd),
              "80000 x float32, in blocks", r"80000 x float32\)"),
             ("gemm_ar", lambda: gemm_ar(r(9, 5 if odd else 4), r(7, 5 if odd else 4), heap), "9 rows of 7, K 5", "9 rows of 7, K 4"),
             ("gemm_ar", lambda: all_reduce(r(4), heap) if odd else gemm_ar(r(2, 2), r(2, 2), heap), "all_reduce", "gemm_ar"),
             ("gemm_ar", lambda: gemm_ar(r(2, 4), r(2, 4), heap) if odd else gemm_ar(r(4, 2), r(1, 2), heap), "2 rows of 2", "4 rows of 1")]
    for i, (_, call, theirs, mine) in enumerate(calls):
        with pytest.raises(CollectiveMismatch) as e:
            call()
        text = str(e.value)
        assert re.search(theirs, text) and re.search(mine, text) and re.search(r"in epoch \d+;", text), (i, text)
        assert f"rank {rank} of group 'tp'" in text, (i, text)
        got = gemm_ar(torch.ones(big, 1), torch.full((200, 1), float(rank)), heap)
        assert got.eq(sum(range(world))).all(), "the heap must stay usable"
    heap.close()
    from interlace.kernels.comm.agree import agree
    agree("gemm_ar", group, rows=4, cols=5, dtype=torch.float32)
    with pytest.raises(CollectiveMismatch, match=r"gemm_ar: rank \d of group .* called gemm_ar\(cols=[56].*but rank \d called gemm_ar\("):
        agree("gemm_ar", group, rows=4, cols=6 if odd else 5, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="gemm_ar: the group must serve the device of x, meta"):
        gemm_ar(r(2, 2, device="meta"), r(2, 2, device="meta"), group)
    for call in (lambda: gemm_ar(r(2, 2), r(2, 2), -100), lambda: gemm_rs(r(2, 2), r(2, 2), -100), lambda: all_reduce(r(2), -100)):
        with pytest.raises(ValueError, match="group must be a torch process group, a SymmHeap or None, got -100; is this rank a member"):
            call()


@pytest.mark.parametrize("world", [2, 3])
def test_mismatch(world):
    run(world, _mismatch, world)


def _empty(rank, world):
    group = dist.group.WORLD
    for M, K, N in ((0, 3, 4), (2 * world, 0, 4), (2 * world, 3, 0), (0, 0, 0)):
        for heap in (group, SymmHeap(group, 4096)):
            whole, w, part = torch.ones(M, K, requires_grad=True), torch.ones(N, K, requires_grad=True), torch.ones(M // world, K)
            for fn, x, shape in ((gemm_ar, whole, (M, N)), (gemm_rs, whole, (M // world, N)), (ag_gemm, part, (M, N))):
                y = fn(x, w, heap)
                assert y.shape == shape and y.eq(K * (1 if fn is ag_gemm else world)).all(), (fn, M, K, N)
                y.sum().backward()


def test_nothing_to_do():
    run(2, _empty, 2)


def _late(rank):
    """A peer that never comes; a walk that breaks off in the middle tells the others at once."""
    heap = SymmHeap(dist.group.WORLD, 16384, timeout=0.4, name="tp")
    if rank == 0:
        with pytest.raises(TimeoutError, match=r"gemm_ar: no signal from rank 1 .* of group 'tp' in 0.4 s.*epoch 1"):
            gemm_ar(torch.ones(4, 2), torch.ones(3, 2), heap)
    dist.barrier()
    heap = SymmHeap(dist.group.WORLD, 16384, timeout=30, name="tp")
    a = torch.ones(400, 1)
    if rank == 0:
        with pytest.raises(ZeroDivisionError), Walk(heap, "gemm_ar", 400, 16, 1, a.dtype):
            raise ZeroDivisionError
        with pytest.raises(RuntimeError, match="out of use after a fused op that broke off"):
            all_reduce(a, heap)
    else:
        with pytest.raises(RuntimeError, match=r"gemm_ar: rank 0 .* of group 'tp' gave up after an error of its own; waited for epoch 2"):
            summed_product("gemm_ar", a, torch.ones(1, 16), heap, 0, 400)


def test_late_and_broken_off():
    run(2, _late)


VICTIM = """
    import os, signal, sys, time, torch, torch.distributed as dist
    from interlace.kernels.comm import PeerDied, SymmHeap
    from interlace.kernels.comm import walk
    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    heap, plain, calls = SymmHeap(dist.group.WORLD, 16384, name="tp"), walk.gemm, 0
    def gemm(*args, **kwargs):
        global calls
        calls += 1
        if rank == 1 and calls == 5:
            open(path + ".time", "w").write(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    walk.gemm = gemm
    try:
        walk.summed_product("gemm_rs", torch.ones(1000, 1), torch.ones(1, 16), heap, 500 * rank, 500 * rank + 500)
    except PeerDied as e:
        print(time.time() - float(open(path + ".time").read()), e, flush=True)
        os._exit(0)
"""


def test_a_rank_killed_between_blocks(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(VICTIM), str(r), str(tmp_path / "store")],
                              stdout=subprocess.PIPE, text=True) for r in range(2)]
    try:
        text, _ = ranks[0].communicate(timeout=300)
        assert ranks[0].returncode == 0, text
        seconds, message = text.split(" ", 1)
        assert float(seconds) < 5, text
        assert f"gemm_rs: rank 1 (global rank 1, pid {ranks[1].pid}) of group 'tp' died; waited for epoch 6" in message, text
    finally:
        for p in ranks:
            p.kill()
            p.wait()
