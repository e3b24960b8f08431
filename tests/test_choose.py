"""The rule that picks a path: pure, monotone, only paths that exist, and the path is the one that runs."""
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run
from torch import nn

from interlace.kernels.comm import SymmHeap, ag_gemm, gemm_ar, gemm_rs
from interlace.kernels.comm.agree import choose_path, forget_paths, paths_taken
from interlace.kernels.comm.choose import HOPPER, MULTICAST, PATHS, Machine, choose
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear, calls_of

OPS = ("gemm_ar", "gemm_rs", "ag_gemm", "rs_residual_norm")
SIZES = (0, 1, 7, 64, 1000, 2048, 100_000)
SLOT = 2 << 20


@pytest.mark.parametrize("op", OPS)
def test_only_paths_that_exist(op):
    for rows, cols, world, device, slot in itertools.product(SIZES, SIZES, (1, 2, 3, 8), ("cpu", "cuda"), (0, 4096, SLOT)):
        args = (op, rows, cols, 1024, 4, world, device, slot)
        path = choose(*args)
        assert path == choose(*args), "not pure"
        if world == 1:
            assert path.name == "one rank"
            continue
        assert path.name in PATHS[device] and path.seconds == min(t for _, t in path.others) >= 0
        assert slot or path.name == "torch.distributed"
        if path.name == "heap, staged":
            assert cols * 4 <= slot and (op == "gemm_ar" or rows * cols * 4 <= slot)
        if path.name == "heap, walked":
            assert slot // 2 // max(1, cols * 4) >= 64 and op != "rs_residual_norm"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("slot", [0, SLOT])
def test_more_costs_more(op, slot):
    """The predicted time grows with rows, columns and the inner dimension, and falls with the machine's speed."""
    for cols, inner, world in itertools.product((64, 1024, 8192), (64, 4096), (2, 4)):
        times = [choose(op, rows, cols, inner, 4, world, "cpu", slot).seconds for rows in (16, 64, 256, 1024, 4096, 16384)]
        assert times == sorted(times)
        fast = choose(op, 1024, cols, inner, 4, world, "cpu", slot, machine=Machine(flops=1e12))
        now, more = (choose(op, 1024, cols, k, 4, world, "cpu", slot) for k in (inner, 2 * inner))
        assert fast.seconds < now.seconds < more.seconds


def test_known_cases():
    assert choose("gemm_ar", 2048, 1024, 1024, 4, 2, "cpu", SLOT).name == "heap, walked"
    assert choose("gemm_rs", 2048, 1024, 1024, 4, 2, "cpu", SLOT).name == "heap, walked"
    assert choose("ag_gemm", 1024, 1024, 1024, 4, 2, "cpu", SLOT).name == "heap, walked"
    assert choose("ag_gemm", 1024, 1024, 1024, 4, 2, "cpu", SLOT, whole=True).name == "heap, copied"
    assert choose("gemm_ar", 64, 1024, 1024, 4, 2, "cpu", SLOT).name == "heap, staged"
    text = str(choose("gemm_ar", 64, 1024, 1024, 4, 2, "cpu", 0))
    assert text == "torch.distributed: these ranks share no memory"
    assert "predicted: heap, staged" in str(choose("gemm_ar", 64, 1024, 1024, 4, 2, "cpu", SLOT))


def test_multicast_is_chosen_where_it_exists_and_is_predicted_to_be_faster():
    """The rule in closed form: two-shot moves (1 + 1/W) b where tiles to their owners move 2 (W-1)/W b; copies in and out cost 4 b / H."""
    def pick(op, rows, cols, inner, world, multicast=True, room=1 << 30):
        return choose(op, rows, cols, inner, 2, world, "cuda", room, multicast=multicast)
    b = 8192 * 8192 * 2
    for world in (2, 3, 4, 6, 8):
        path, times = pick("all_reduce", 8192 * 8192, 1, 0, world), dict(pick("all_reduce", 8192 * 8192, 1, 0, world).others)
        assert times["two-shot multicast"] == pytest.approx((1 + 1 / world) * b / HOPPER.link + 2 * HOPPER.tick + 4 * b / HOPPER.bandwidth)
        assert path.name == ("two-shot multicast" if world >= 6 else "torch.distributed"), world
        assert not set(dict(pick("all_reduce", 8192 * 8192, 1, 0, world, multicast=False).others)) & set(MULTICAST)
        assert pick("all_reduce", 4096, 1, 0, world).name == "one-shot multicast", "the same seconds, and one store instead of W"
    assert pick("gemm_ar", 8192, 8192, 3584, 8).name == "two-shot kernel", "the product hides what is sent"
    assert pick("gemm_ar", 8192, 8192, 128, 8).name == "two-shot multicast", "there is no product to hide it behind"
    for op in ("gemm_rs", "ag_gemm", "rs_residual_norm", "reduce_scatter", "all_gather"):
        assert not set(dict(pick(op, 1024, 1024, 0 if op in ("reduce_scatter", "all_gather") else 512, 8).others)) & set(MULTICAST)
    assert pick("all_reduce", 8192 * 8192, 1, 0, 8, room=2 * b).name == "torch.distributed", "a pad that does not hold it"
    assert "the switch sums what the ranks hold" in str(pick("all_reduce", 8192 * 8192, 1, 0, 8))


def _runs(rank):
    """What choose says is what runs: seen by the epochs a call takes, which differ from path to path."""
    import ctypes

    from interlace.kernels.comm.heap import LIB
    heap = SymmHeap(dist.group.WORLD, SLOT)
    epoch = ctypes.c_uint32.from_address(LIB.interlace_heap_data(heap.handle) - 4096 + 128 * rank)
    whole, w = torch.randn(2048, 1024), torch.randn(1024, 1024)
    for fn, rows, name, ticks in ((gemm_ar, 2048, "heap, walked", 9), (gemm_rs, 2048, "heap, walked", 9),
                                  (ag_gemm, 1024, "heap, walked", 5),
                                  (gemm_ar, 64, "heap, staged", 2), (gemm_rs, 64, "heap, staged", 1)):
        op, x = fn.__name__, whole[:rows]
        assert choose_path(op, x.shape[0], 1024, 1024, x, heap)[0].name == name
        before = epoch.value
        fn(x, w, heap)
        assert epoch.value - before == ticks, (op, name, epoch.value - before)
        assert any(line.startswith(f"{op} [{x.shape[0]} x 1024, K 1024, float32, 2 ranks] {name}: ") for line in paths_taken())


def test_the_path_named_is_the_path_run():
    run(2, _runs)


def _callers(rank, sp):
    """Each layer by itself: what it calls is named after it, and nothing else is."""
    tp = Mesh.build(Layout(world=2, tp=2)).tp
    block = lambda: nn.ModuleDict({"up": ColumnParallelLinear(16, 48, tp=tp, sequence_parallel=sp),  # noqa: E731
                                   "down": RowParallelLinear(48, 16, tp=tp, sequence_parallel=sp)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": ColumnParallelLinear(16, 40, tp=tp, sequence_parallel=sp)})
    calls, rows = calls_of(model), 6 // (1 + sp)
    told = lambda: [line.split(": ")[0].split(", ") for line in paths_taken(calls)]  # noqa: E731
    for name, layer, x in (("layers.*.up", model["layers"][1]["up"], torch.ones(rows, 2, 16)),
                           ("layers.*.down", model["layers"][0]["down"], torch.ones(6, 2, 24)),
                           ("head", model["head"], torch.ones(rows, 2, 16))):
        column = "down" not in name
        forget_paths()
        y = layer(x.requires_grad_())
        forward = told()
        forget_paths()
        y.sum().backward()
        backward = told()
        assert len(forward) == (sp or not column) and len(backward) == (sp or column), (name, forward, backward)
        assert all(name in names for names in forward) and all(f"dx of {name}" in names for names in backward), (name, forward, backward)
    assert sorted(n for names in calls.values() for n in names) == sorted(
        ["dx of layers.*.up", "dx of head", "layers.*.down", *(["layers.*.up", "head", "dx of layers.*.down"] if sp else [])])
    assert not calls_of(ColumnParallelLinear(16, 48, tp=Axis("tp"))), "one rank calls no fused op"


@pytest.mark.parametrize("sp", [False, True], ids=["tp", "sp"])
def test_a_path_tells_the_layers_that_take_it(sp):
    run(2, _callers, sp)


# ---- the constants --------------------------------------------------------------------------------------------


def _roofs(folder, **change):
    import json

    from interlace.kernels.comm import machine
    found = {"quick": False, "loaded": False, "copy": {"1": {"65536": 40.0}}, "gemm": {"1": {"float32": 50.0, "bfloat16": 150.0}},
             "link": {"2": {"4096": 1.0, "1048576": 20.0}}, "provenance": {"hardware": machine._processor("cpu")}} | change
    folder.mkdir()
    (folder / "roofs.json").write_text(json.dumps(found))


def test_measured_roofs_are_used(tmp_path, monkeypatch):
    from interlace.kernels.comm import machine
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    here = machine.here.__wrapped__
    assert here("cpu", 2) == machine.CPU and not machine.CPU.measured
    _roofs(tmp_path / "a", quick=True)
    _roofs(tmp_path / "b", loaded=True)
    _roofs(tmp_path / "c", provenance={"hardware": machine._processor("cpu") | {"cores": 999}})
    _roofs(tmp_path / "d", gemm={})
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "roofs.json").write_text('{"quick": fal')
    assert here("cpu", 2) == machine.CPU, "of --quick, under load, of another machine, of another version, half written"
    _roofs(tmp_path / "D")
    got = here("cpu", 2)
    assert got.measured and got.flops == 50e9 and got.rate(2) == pytest.approx(150e9) and got.rate(8) == 50e9 and got.bandwidth == 20e9
    assert here("cpu", 3).bandwidth == machine.CPU.bandwidth, "no link was measured between three"
    args = ("gemm_ar", 2048, 1024, 1024, 4, 2, "cpu", SLOT)
    assert choose(*args, machine=got).seconds > choose(*args).seconds


def _one_machine(rank):
    """Ranks whose roofs differ (a file came between) choose with rank 0's."""
    from interlace.kernels.comm import agree, heap
    from interlace.kernels.comm.machine import Machine
    real, heap.here = heap.here, lambda device, world: Machine(flops=1e9 * (rank + 1))
    try:
        made = SymmHeap(dist.group.WORLD, SLOT)
    finally:
        heap.here = real
    assert made.machine == Machine(flops=1e9)
    x = torch.empty(2048, 1024)
    want = choose("gemm_ar", 2048, 1024, 1024, 4, 2, "cpu", SLOT, machine=made.machine)
    assert choose_path("gemm_ar", 2048, 1024, 1024, x, made)[0] == want
    agree._choose.cache_clear()


def test_all_ranks_take_one_machine():
    run(2, _one_machine)
