"""The communication ops as torch sees them: opcheck, torch.compile over real ranks, order kept, groups by name."""
import pytest
import torch
import torch.distributed as dist
from budget import DTYPES
from ranks import run
from torch.library import opcheck

from interlace.kernels.comm import (
    CollectiveMismatch,
    SymmHeap,
    ag_gemm,
    all_gather,
    all_reduce,
    all_to_all,
    copy_gemm,
    gemm_ar,
    gemm_rs,
    reduce_scatter,
    reset_pads,
    rs_residual_norm,
)
from interlace.kernels.comm.heap import keep_heap
from interlace.kernels.comm.registry import group_name, group_of, group_size

OPS = torch.ops.interlace


def _opcheck(rank, world):
    name = dist.group.WORLD.group_name
    r = lambda *shape: torch.randn(*shape, requires_grad=True)  # noqa: E731
    for op, args in ((OPS.all_reduce, (r(5), "sum")), (OPS.all_gather, (r(5, 2),)), (OPS.reduce_scatter, (r(2 * world, 3),)),
                     (OPS.all_to_all, (r(2 * world, 3),)), (OPS.gemm_ar, (r(4, 2, 8), r(6, 8))), (OPS.copy_gemm, (r(4, 2, 8), r(6, 8))),
                     (OPS.gemm_rs, (r(2 * world, 2, 8), r(6, 8))), (OPS.ag_gemm, (r(2, 2, 8), r(6, 8), True)),
                     (OPS.ag_gemm, (r(2, 2, 8), r(6, 8), False)),
                     (OPS.rs_residual_norm, (r(2 * world, 3, 8), r(2, 3, 8), r(8), None, 1e-5)),
                     (OPS.rs_residual_norm, (r(2 * world, 3, 8), r(2, 3, 8), r(8), r(8), 1e-5))):
        opcheck(op.default, (*args, name))


def test_opcheck():
    run(2, _opcheck, 2)


def _mlp(x, w1, w2, norm, group, sequence):
    """Column then row, with sequence parallelism and without; then the collectives one by one."""
    if sequence:
        a = torch.nn.functional.gelu(ag_gemm(x, w1, group, regather=False))
        h, y = rs_residual_norm(copy_gemm(a, w2, None), x, norm, 1e-5, group)
        y = ag_gemm(y, w1, group)
        return gemm_rs(y, w1.t().contiguous(), group) + h
    y = gemm_ar(torch.nn.functional.gelu(copy_gemm(x, w1, group)), w2, group)
    return y + all_to_all(reduce_scatter(all_gather(all_reduce(y, group), group), group), group)


def _compiled(rank, world, backend, by_hand):
    g = torch.Generator().manual_seed(rank)
    group = SymmHeap(dist.group.WORLD) if by_hand else dist.group.WORLD
    for sequence in (False, True):
        results = []
        for fn in (_mlp, torch.compile(_mlp, fullgraph=True, backend=backend)):
            g.manual_seed(rank)
            x, w1, w2 = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
                         for s in ((4 * world, 2, 16), (24, 16), (16, 24)))
            norm = torch.ones(16, dtype=torch.float64, requires_grad=True)
            y = fn(x, w1, w2, norm, group, sequence)
            y.square().mean().backward()
            results.append([y.detach(), *(t.grad for t in (x, w1, w2, norm) if t.grad is not None)])
        for e, c in zip(*results, strict=True):
            torch.testing.assert_close(c, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_hand", [False, True], ids=["group", "heap"])
def test_compiled_as_eager(by_hand):
    run(2, _compiled, 2, "aot_eager", by_hand)


@pytest.mark.slow
def test_inductor_as_eager():
    run(2, _compiled, 2, "inductor", False, timeout=400)


def _order(rank, world):
    """No pass may reorder two collectives or drop one whose result is not used: each takes the token of the one before."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs = []

    def keep(gm, inputs):
        graphs.append([str(n.args[1]) for n in gm.graph.nodes if "with_effects" in str(n.target)])
        return make_boxed_func(gm.forward)

    def two(x, group):
        gone = all_reduce(x, group)                                   # noqa: F841
        return all_gather(x * 2, group).sum() + all_reduce(x, group, op="max").detach().sum()
    x = torch.randn(4, requires_grad=True)
    torch.compile(two, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))(x, dist.group.WORLD).backward()
    named = [[n.split(".")[1] for n in g] for g in graphs]
    assert named == [["all_reduce", "all_gather", "all_reduce"], ["reduce_scatter"]], graphs


def test_order_is_kept():
    run(2, _order, 2)


def _gradients(rank, world):
    """Of the plain collectives, against one process: the sum over ranks of every rank's loss."""
    g = torch.Generator().manual_seed(0)
    xs, cs = torch.randn(world, 2 * world, 3, generator=g).double(), torch.randn(world, 2 * world * world, 3, generator=g).double()
    for fn, whole in ((all_reduce, lambda xs: [sum(xs)] * world), (all_gather, lambda xs: [torch.cat(xs)] * world),
                      (reduce_scatter, lambda xs: list(sum(xs).chunk(world))),
                      (all_to_all, lambda xs: [torch.cat([x.chunk(world)[r] for x in xs]) for r in range(world)])):
        every = [x.clone().requires_grad_() for x in xs]
        sum((y * c[:len(y)]).sum() for y, c in zip(whole(every), cs)).backward()
        x = xs[rank].clone().requires_grad_()
        y = fn(x, dist.group.WORLD)
        (y * cs[rank][:len(y)]).sum().backward()
        torch.testing.assert_close(x.grad, every[rank].grad)
    with pytest.raises(NotImplementedError, match="only op='sum' has a gradient"):
        all_reduce(x, dist.group.WORLD, op="max").sum().backward()


def test_gradients_of_the_collectives():
    run(3, _gradients, 3)


def _names(rank):
    heap = SymmHeap(dist.group.WORLD)
    for group in (None, heap, dist.group.WORLD):
        assert group_of(group_name(group)) is group
        assert group_size(group_name(group)) == (1 if group is None else 2)
    other = SymmHeap(dist.group.WORLD)
    assert other.group_name != heap.group_name


def test_groups_by_name():
    run(2, _names)


def _of_five_to_eight(rank, world):
    """Small integers, whose sums are exact: the bits of one process in float64, so the same on every rank. Fewer rows than ranks, none,
    and more than a slot takes."""
    group, g = dist.group.WORLD, torch.Generator().manual_seed(world)
    mine = lambda x: x[rank * len(x) // world:][:len(x) // world].clone()  # noqa: E731
    for dtype in DTYPES:
        ints = lambda *s: torch.randint(-3, 4, s, generator=g).to(dtype)  # noqa: B023, E731
        for rows, K, N in ((1, 3, 7), (0, 4, 6), (40, 33, 900)):
            M = rows * world
            xs, ws, x, residual = ints(world, M, K), ints(world, N, K), ints(M, K), ints(M, N)
            parts = [x.double() @ w.double().t() for x, w in zip(xs, ws)]
            total, weight = sum(parts), torch.ones(N, dtype=dtype)
            partial = parts[rank].to(dtype)
            for name, got, want in (
                    ("gemm_ar", gemm_ar(xs[rank], ws[rank], group), total), ("gemm_rs", gemm_rs(xs[rank], ws[rank], group), mine(total)),
                    ("gemm_ar, fewer rows", gemm_ar(xs[rank, :rows], ws[rank], group), total[:rows]),
                    ("ag_gemm", ag_gemm(mine(x), ws[rank], group), x.double() @ ws[rank].double().t()),
                    ("norm", rs_residual_norm(partial, mine(residual), weight, 1e-5, group)[0], mine(total + residual.double())),
                    ("all_reduce", all_reduce(partial, group), total), ("reduce_scatter", reduce_scatter(partial, group), mine(total)),
                    ("all_gather", all_gather(mine(x), group), x),
                    ("all_to_all", all_to_all(partial, group), torch.cat([mine(p) for p in parts]))):
                assert torch.equal(got, want.to(dtype)), f"{name} {dtype} {M} {K} {N}"


@pytest.mark.parametrize("world", [5, 6, 7, 8])
def test_five_to_eight_ranks(world):
    run(world, _of_five_to_eight, world)


# ---- the backward over torch.distributed ----------------------------------------------------------------------


def _far(world):
    """A group whose ranks share no memory, as on several hosts."""
    import warnings

    from interlace.kernels.comm import heap
    real, heap._host = heap._host, lambda: f"host{dist.get_rank()}"
    try:
        group = dist.new_group(list(range(world)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert heap.heap_of(group) is None
    finally:
        heap._host = real
    return group


def _differ(rank, world):
    """gloo would end the process, NCCL wait: every rank hears of it, and the group goes on."""
    group, x, w = _far(world), torch.ones(2 * world, 6), torch.ones(5, 6)
    norm = lambda rows: rs_residual_norm(x.new_ones(rows * world, 6), x.new_ones(rows, 6), x.new_ones(6), 1e-5, group)[0]  # noqa: E731
    calls = {"gemm_ar": lambda n: gemm_ar(x.new_ones(n, 6), w, group), "gemm_rs": lambda n: gemm_rs(x.new_ones(n * world, 6), w, group),
             "ag_gemm": lambda n: ag_gemm(x.new_ones(n, 6), w, group), "rs_residual_norm": norm,
             "all_reduce": lambda n: all_reduce(x.new_ones(n), group), "all_gather": lambda n: all_gather(x.new_ones(n), group),
             "reduce_scatter": lambda n: reduce_scatter(x.new_ones(n * world), group),
             "all_to_all": lambda n: all_to_all(x.new_ones(n * world), group)}
    want = {op: float(call(2).sum()) for op, call in calls.items()}
    for op, other in zip(calls, [*list(calls)[1:], *calls]):
        with pytest.raises(CollectiveMismatch, match=rf"{op}.*: rank {rank} of group .* called {op}.*, but rank . called {op}"):
            calls[op](3 + (rank == 1))
        mine = other if rank else op
        with pytest.raises(CollectiveMismatch, match=rf"{mine}.*: rank {rank} of group .* called {mine}"):
            calls[mine](7)
        assert float(calls[op](2).sum()) == want[op], f"{op}: the group must stay usable"
    with pytest.raises(ValueError, match="rs_residual_norm: the group must serve the device of x, meta"):
        rs_residual_norm(*(torch.ones(s, device="meta") for s in ((2 * world, 6), (2, 6), (6,))), 1e-5, group)


def test_calls_that_differ_over_torch_distributed():
    run(3, _differ, 3)


def _late(rank):
    """After a wait that ran out the heap of a group is out of use, and new after reset_pads."""
    group = dist.new_group([0, 1])
    keep_heap(group, SymmHeap(group, timeout=0.2))
    if rank == 0:
        for error, match in ((TimeoutError, "all_reduce: no signal from rank 1"), (RuntimeError, r"out of use .*; reset_pads\(\) of")):
            with pytest.raises(error, match=match):
                all_reduce(torch.ones(3), group)
    dist.barrier()
    reset_pads(group)
    assert all_reduce(torch.ones(3), group).eq(2).all() and gemm_ar(torch.ones(3, 2), torch.ones(5, 2), group).eq(4).all()


def test_a_heap_is_new_after_reset_pads():
    run(2, _late)


def test_misuse():
    for args in ((torch.ones(4),) * 3, (torch.tensor(1.0),) * 3, (torch.ones(2, 4).long(),) * 2 + (torch.ones(4).long(),)):
        with pytest.raises(ValueError, match=r"rs_residual_norm: partial must be \[S, ..., D\] of float32, .*, got \["):
            rs_residual_norm(*args)
    out = torch.ones(4, requires_grad=True)
    for op in (all_reduce, all_gather, reduce_scatter, all_to_all):
        for x, y in ((torch.ones(4), out), (out, torch.ones(4))):
            with pytest.raises(ValueError, match="x and out must not require a gradient"):
                op(x, None, out=y)
        with torch.no_grad():
            op(torch.ones(4), None, out=out)
    with pytest.raises(ValueError, match="SymmHeap: group must be a torch process group, got None"):
        SymmHeap(None)


def _beside(rank, world):
    """dw is computed between the begin of what it does not need and the wait for it; the same numbers as over shared memory."""
    import sys
    near, far, log = dist.group.WORLD, _far(world), []
    ar, rs, collectives = (sys.modules[f"interlace.kernels.comm.{name}"] for name in ("gemm_ar", "gemm_rs", "collectives"))

    def begin(real):
        def begun(op, x, group):
            y, wait = real(op, x, group)
            log.append(f"begin {op}")
            return y, lambda: (log.append(f"wait {op}"), wait())
        return begun

    def gemm(real):
        return lambda *a, **k: (log.append("gemm"), real(*a, **k))[1]
    g = torch.Generator().manual_seed(rank)
    new = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    want = {"copy_gemm": ["gemm", "begin all_reduce", "gemm", "wait all_reduce"],
            "ag_gemm": ["begin all_gather", "gemm", "begin reduce_scatter", "wait all_gather", "gemm", "wait reduce_scatter"],
            "ag_gemm, kept": ["gemm", "begin reduce_scatter", "gemm", "wait reduce_scatter"]}
    for name, fn in (("copy_gemm", copy_gemm), ("ag_gemm", ag_gemm), ("ag_gemm, kept", lambda *a: ag_gemm(*a, regather=False))):
        x, w, results = new(4, 2, 6), new(5, 6), []
        dy = new(4 if fn is copy_gemm else 4 * world, 2, 5)
        for group in (near, far):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = fn(*leaves, group)
            with pytest.MonkeyPatch.context() as patch:
                for module in (rs, collectives):
                    patch.setattr(module, "begin", begin(module.begin))
                for module in (ar, rs):
                    patch.setattr(module, "gemm", gemm(module.gemm))
                log.clear()
                y.backward(dy)
            results.append((y.detach(), *(t.grad for t in leaves)))
            assert group is near or log == want[name], (name, log)
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        torch.autograd.backward(fn(*leaves, far), dy, inputs=[leaves[0]])   # dx alone
        torch.testing.assert_close(leaves[0].grad, results[0][1])
    x, w = new(4 * world, 2, 6), new(5, 6)
    torch.testing.assert_close(gemm_rs(x, w, far), gemm_rs(x, w, near))
    torch.testing.assert_close(gemm_ar(x, w, far), gemm_ar(x, w, near))


@pytest.mark.parametrize("world", [2, 3])
def test_wgrad_runs_while_dgrad_is_communicated(world):
    run(world, _beside, world)


def test_collectives_of_two_streams_take_turns(monkeypatch):
    """A kernel over a pad has every SM while it waits for other ranks: nothing that waits for ranks may run beside it. What
    torch.distributed does on two streams may. A capture waits for nothing outside of it."""
    from interlace.kernels.comm import pad

    class Stream(str):
        device = torch.device("cuda", 0)

        def wait_stream(self, other):
            waits.append(f"{self} for {other}")
    main, side, waits, now = Stream("main"), Stream("side"), [], {}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.get("captured", False))
    monkeypatch.setattr(pad, "_spinning", {})
    monkeypatch.setattr(pad, "_others", {})

    def run(stream, spins):
        waits.clear()
        now["stream"] = stream
        pad.in_turn(torch.device("cuda"), spins)
        return list(waits)
    assert run(main, True) == [] == run(main, True)
    assert run(side, False) == ["side for main"] and run(main, False) == []
    assert run(main, True) == ["main for side"] and run(main, True) == [], "once is enough"
    assert run(side, True) == ["side for main"] and run(main, True) == ["main for side"]
    now["captured"] = True
    assert run(side, True) == [] and run(main, True) == ["main for side"]
    now["captured"] = False
    assert run(side, True) == []
    pad.in_turn(torch.device("cpu"), True)
