"""The overlapped kernels on one GPU: ranks that are streams of this process, ranks that are processes, and a CUDA graph. Multicast, which
no GPU has with itself by another rank: on one GPU with one rank, and on as many as there are where a switch joins them."""
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run

from interlace.doctor import _multicast as multicast_here
from interlace.kernels import dispatch, route_plan
from interlace.kernels.comm import multicast_ar, triton_ag, triton_ar, triton_moe, triton_rs
from interlace.kernels.comm.pad import Pad
from interlace.kernels.comm.protocol import first_row

pytestmark = pytest.mark.gpu
# ruff: noqa: B023  (what on_all() is given runs at once)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WAIT = 90                                                             # seconds, of the 142 that all tests have in the GPU report
POLLS = 1 << 23                                                       # seconds, not minutes: a rank that cannot start fails its test alone
LATE = 1 << 20                                                        # an epoch no test reaches


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def ints(g, dtype, *shape):
    return torch.randint(-2, 3, shape, generator=g).to(dtype).cuda()


def product(x, w):
    return (x.double() @ w.double().t()).float()


def virtual(world, op, needs):
    streams = [torch.cuda.Stream() for _ in range(world)]
    for stream in streams:                                            # fill its share of the allocator: no cudaMalloc while others spin
        with torch.cuda.stream(stream):
            spare = [torch.empty(1 << 19, dtype=torch.uint8, device="cuda") for _ in range(16)], torch.empty(1 << 25, device="cuda")
            del spare
    return Pad.virtual(world, op, *needs, "cuda", polls=POLLS), streams


def load(kernel, *args, grid, warmup, **options):
    """In place of a launch: what it would run is compiled and on the GPU."""
    compiled = LAUNCH(kernel, *args, grid=grid, warmup=True, **options)
    compiled._init_handles()
    return compiled


LAUNCH = getattr(getattr(dispatch.triton, "JITFunction", None), "run", None)


def on_all(streams, fn, launches=True):
    """fn(rank) on the stream of each rank; nothing is waited for until all are launched. launches: of Triton kernels, which are first
    loaded for every rank: sizes differ among ranks, so do binaries, and loading one may wait for a GPU that idles, which it does not
    while a rank spins for one that is not launched. What fn does besides, it does twice."""
    if launches:
        with mock.patch.object(dispatch.triton.JITFunction, "run", load):
            for r, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    fn(r)
    torch.cuda.synchronize()
    results = []
    for r, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            results.append(fn(r))
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("two_shot", [False, True])
def test_gemm_ar(world, dtype, two_shot):
    M, N, K, g = 300, 520, 200, torch.Generator().manual_seed(0)
    like = torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype)
    pads, streams = virtual(world, "gemm_ar", triton_ar.needs(*like, world, two_shot))
    for _ in range(3):
        xs, ws = ([ints(g, dtype, *s) for _ in range(world)] for s in ((M, K), (N, K)))
        want = sum(product(x, w) for x, w in zip(xs, ws)).to(dtype)
        for y in on_all(streams, lambda r: triton_ar.launch(pads[r], xs[r], ws[r], two_shot=two_shot)):
            assert torch.equal(y, want)
        for pad in pads:
            pad.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3, 6, 8])
def test_ag_gemm_and_gemm_rs(world, dtype):
    M, N, K, g = 300, 520, 200, torch.Generator().manual_seed(1)
    gather, streams = virtual(world, "ag_gemm", triton_ag.needs(M, K, dtype, world))
    scatter, _ = virtual(world, "gemm_rs", triton_rs.needs(M, N, dtype, world))
    mine = [slice(first_row(r, M, world), first_row(r + 1, M, world)) for r in range(world)]
    for _ in range(3):
        x, xs, ws = ints(g, dtype, M, K), [ints(g, dtype, M, K) for _ in range(world)], [ints(g, dtype, N, K) for _ in range(world)]
        shards = [x[mine[r]].clone() for r in range(world)]
        for r, y in enumerate(on_all(streams, lambda r: triton_ag.launch(gather[r], shards[r], M, ws[r]))):
            assert torch.equal(y, product(x, ws[r]).to(dtype))
        total = sum(product(a, b) for a, b in zip(xs, ws)).to(dtype)

        def scattered(r):
            triton_rs.push(scatter[r], xs[r], ws[r])
            return triton_rs.take(scatter[r], M, N, dtype, True)[0]
        for r, y in enumerate(on_all(streams, scattered)):
            assert torch.equal(y, total[mine[r]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_rs_residual_norm_feeds_the_next_gather(dtype, bias):
    world, M, N, g = 3, 300, 520, torch.Generator().manual_seed(2)
    pads, streams = virtual(world, "rs_residual_norm", triton_rs.needs(M, N, dtype, world, False))
    onward, _ = virtual(world, "all_gather", triton_ag.needs(M, N, dtype, world))
    mine = [slice(first_row(r, M, world), first_row(r + 1, M, world)) for r in range(world)]
    for _ in range(3):
        ps, residual, w, b = [ints(g, dtype, M, N) for _ in range(world)], ints(g, dtype, M, N), ints(g, dtype, N), ints(g, dtype, N)
        h = sum(p.float() for p in ps) + residual.float()
        want = torch.nn.functional.layer_norm(h, (N,), w.float(), b.float(), 1e-5) if bias else (
            h * (h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.float())

        def step(r):
            triton_rs.push(pads[r], ps[r])
            h, y, *_ = triton_rs.take(pads[r], M, N, dtype, False, residual[mine[r]].clone(), w, b if bias else None, 1e-5, onward[r])
            return h, y, triton_ag.launch(onward[r], y, M, pushed=True)
        for r, (hr, yr, full) in enumerate(on_all(streams, step)):
            assert torch.equal(hr, h.to(dtype)[mine[r]]) and torch.equal(full[mine[r]], yr)
            torch.testing.assert_close(full.float(), want, rtol=torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", [1, 2, 3, 6, 8])
def test_dispatch_and_combine(world, dtype):
    """Every other rank has fewer tokens; some slots have no expert; experts are padded to 4 rows."""
    T, H, K, per, g = 50, 520, 3, 2, torch.Generator().manual_seed(6)
    n = [T - 7 * (r % 2) for r in range(world)]
    for _ in range(3):
        ids = torch.randint(-1, world * per, (world, T, K), generator=g, dtype=torch.int32)
        for r in range(world):
            ids[r, n[r]:] = -1
        ids = ids.view(-1, K)
        plans = [route_plan(torch.where(ids // per == r, ids - r * per, -1), per, align=4) for r in range(world)]
        slots = [p.slot_of_row[:int(p.offsets[-1])] for p in plans]
        x, residual, ys = ints(g, dtype, world * T, H), ints(g, dtype, world * T, H), [ints(g, dtype, len(s), H) for s in slots]
        mine = [slice(r * T, r * T + n[r]) for r in range(world)]
        maps = [(p.row_of_slot.cuda(), s.cuda()) for p, s in zip(plans, slots)]
        there, streams = virtual(world, "dispatch", triton_moe.needs(T, H, dtype))
        back, _ = virtual(world, "combine", triton_moe.needs(max(map(len, slots)), H, dtype, ids.numel()))
        shards, adds, where = [x[m].clone() for m in mine], [residual[m].clone() for m in mine], ids.cuda()
        for r, rows in enumerate(on_all(streams, lambda r: triton_moe.dispatch(there[r], shards[r], *maps[r], T))):
            assert torch.equal(rows, torch.where(maps[r][1][:, None] < 0, 0, x[maps[r][1].long() // K]))
        want = residual.float()
        for y, (row_of_slot, _) in zip(ys, maps):
            want += torch.cat([y, y.new_zeros(1, H)])[row_of_slot.long()].float().sum(1)
        for r, o in enumerate(on_all(streams, lambda r: triton_moe.combine(back[r], ys[r], adds[r], where, maps[r][0], n[r], world * per))):
            assert torch.equal(o, want[mine[r]].to(dtype))
        for pad in (*there, *back):
            pad.check()


def test_a_rank_that_does_not_come():
    pads = Pad.virtual(2, "all_reduce", 1 << 16, 64, "cuda", polls=1000)
    y = triton_ar.launch(pads[0], torch.ones(1000, device="cuda"))
    torch.cuda.synchronize()
    assert y.isnan().all()
    with pytest.raises(TimeoutError, match=r"all_reduce: no signal from rank 1 of .* after 1000 polls; waited for epoch 1 "):
        triton_ar.launch(pads[0], torch.ones(1000, device="cuda"))


def test_a_graph_replays():
    world, M, N, K, g = 2, 256, 256, 128, torch.Generator().manual_seed(3)
    dtype = torch.bfloat16
    pads, streams = virtual(world, "gemm_ar", triton_ar.needs(torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype), world, False))
    xs, ws = ([ints(g, dtype, *s) for _ in range(world)] for s in ((M, K), (N, K)))
    on_all(streams, lambda r: triton_ar.launch(pads[r], xs[r], ws[r]))
    graphs, ys = [torch.cuda.CUDAGraph() for _ in range(world)], []
    for r in range(world):
        with torch.cuda.graph(graphs[r], stream=streams[r]):
            ys.append(triton_ar.launch(pads[r], xs[r], ws[r]))
    for graph in graphs:                                              # a first replay loads the graph: alone, waiting for nobody
        for pad in pads:
            pad.memory[:pad.data].view(torch.int32).fill_(LATE)
        on_all(streams[:1], lambda _: graph.replay(), launches=False)
    for pad in pads:
        pad.reset()
    for _ in range(5):
        for x in (*xs, *ws):
            x.copy_(ints(g, dtype, *x.shape))
        on_all(streams, lambda r: graphs[r].replay(), launches=False)
        want = sum(product(x, w) for x, w in zip(xs, ws)).to(dtype)
        assert all(torch.equal(y, want) for y in ys)


def _processes(rank, world):
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    torch.cuda.set_device(0)
    M, N, K, g, dtype = 200, 264, 136, torch.Generator().manual_seed(4), torch.bfloat16
    device = torch.device("cuda", 0)
    sizes = [triton_ar.needs(torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype), world, two_shot) for two_shot in (False, True)]
    pad = Pad(dist.group.WORLD, "gemm_ar", *map(max, zip(*sizes)), device, polls=8 * POLLS)   # the other may still compile
    assert pad.share == world and pad.multicast == 0
    for e in range(3):
        xs, ws = ([ints(g, dtype, *s) for _ in range(world)] for s in ((M, K), (N, K)))
        y = triton_ar.launch(pad, xs[rank], ws[rank], two_shot=e == 1)
        assert torch.equal(y, sum(product(x, w) for x, w in zip(xs, ws)).to(dtype))
        pad.check()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_on_one_gpu(world):
    run(world, _processes, world, timeout=WAIT)


# ---- multicast ------------------------------------------------------------------------------------------------


def _multicast_pad(rank, world):
    """A pad for all the calls below; its multicast address is 0 where the driver or the topology has none."""
    torch.cuda.set_device(rank)
    x = torch.empty(3 << 20, dtype=torch.float32, device="meta")
    sizes = [multicast_ar.needs(x, world, two_shot) for two_shot in (False, True)] + [triton_ar.needs(x, None, world, False)]
    return Pad(dist.group.WORLD, "all_reduce", *map(max, zip(*sizes)), torch.device("cuda", rank))


def _has_address(rank, world, told):
    with open(f"{told}.{rank}", "w") as f:
        f.write(str(_multicast_pad(rank, world).multicast))


def _multicasts(rank, world):
    pad, g = _multicast_pad(rank, world), torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        for n in (1, 7, 8192, 100_003, 3 << 20):
            for call in range(4):                                     # both kinds on one pad, and the Triton kernel between them
                xs = [ints(g, dtype, n) for _ in range(world)]
                x, want = xs[rank].clone(), sum(x.float() for x in xs).to(dtype)
                y = triton_ar.launch(pad, x) if call == 2 else multicast_ar.launch(pad, x, x if call == 3 else None, two_shot=call % 2 == 1)
                assert torch.equal(y, want), f"{dtype} {n} call {call}"
                assert torch.equal(x, y if call == 3 else xs[rank]), "in place, or x is left alone"
        pad.check()
    for dtype in (torch.bfloat16, torch.float16):                     # the same bits everywhere, and no more error than eager's
        xs = [torch.randn(1 << 20, generator=g).to(dtype).cuda() for _ in range(world)]
        y, truth = multicast_ar.launch(pad, xs[rank], two_shot=True), sum(x.double() for x in xs)
        every = [None] * world
        dist.all_gather_object(every, y.cpu())
        assert all(torch.equal(y.cpu(), other) for other in every)
        eager = xs[0]
        for x in xs[1:]:
            eager = eager + x
        assert (y.double() - truth).norm() <= max((eager.double() - truth).norm().item(), torch.finfo(dtype).eps * truth.norm().item())
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(100_003, dtype=torch.bfloat16, device="cuda")
    multicast_ar.launch(pad, x, two_shot=True)
    with torch.cuda.graph(graph):
        y = multicast_ar.launch(pad, x, two_shot=True)
    for _ in range(3):                                                # an odd number: the parity of buffers is no constant of the graph
        xs = [ints(g, torch.bfloat16, x.numel()) for _ in range(world)]
        x.copy_(xs[rank])
        dist.barrier()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, sum(x.float() for x in xs).bfloat16())
    pad.check()


def _multicast_or_skip(world, folder):
    if not dispatch.CUDA:
        pytest.skip("csrc/cuda is not built: `interlace doctor` tells why")
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    if not all(multicast_here(torch, i) for i in range(world)):
        pytest.skip("these GPUs have no multicast")
    run(world, _has_address, world, folder / "address", timeout=WAIT)
    if any((folder / f"address.{r}").read_text() == "0" for r in range(world)):
        pytest.skip(f"the memory of {world} ranks has no multicast address here")


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_multicast(world, tmp_path):
    _multicast_or_skip(world, tmp_path)
    run(world, _multicasts, world, timeout=WAIT)


def test_a_gpu_without_multimem_refuses():
    if not dispatch.CUDA:
        pytest.skip("csrc/cuda is not built: `interlace doctor` tells why")
    pad, = Pad.virtual(1, "all_reduce", 1 << 16, 8, "cuda")
    pad.multicast = 16                                                # never read: refused before, or for the lack of an address
    x = torch.ones(8, device="cuda")
    if torch.cuda.get_device_capability() < (9, 0):
        with pytest.raises(RuntimeError, match=r"multimem instructions, compute capability 9.0 or more, got 8"):
            multicast_ar.launch(pad, x, two_shot=True)
    pad.multicast = 0
    with pytest.raises(ValueError, match="must have a multicast address, got none"):
        multicast_ar.launch(pad, x, two_shot=True)
