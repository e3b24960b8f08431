"""The memory order and the machinery of the overlapped kernels, read from their PTX without a GPU; every assertion with a control
that it must refuse: the same kernel with the feature switched off."""
import re

import pytest
import torch

from interlace.bench import static
from interlace.kernels import dispatch
from interlace.kernels.dispatch import tl, triton

pytestmark = pytest.mark.skipif(dispatch.INTERPRET or not hasattr(triton, "__version__"), reason="no Triton compiler in this mode")

from interlace.kernels.comm import triton_ag, triton_ar, triton_moe, triton_rs  # noqa: E402
from interlace.kernels.comm.pad import Pad  # noqa: E402
from interlace.kernels.comm.signals import cells, wait  # noqa: E402

W, M, N, K = 8, 8192, 8192, 3584                                      # Llama 70B's MLP over 8 ranks
ARCHES = ["sm_90", pytest.param("sm_100", marks=pytest.mark.slow)]


def pad(op):
    made = Pad.virtual(W, op, 1 << 20, 1 << 16, "meta")[W - 1]
    made.share = 1
    return made


def new(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


TOPK = 2


def slots():
    return new(torch.int32, W * M, TOPK)


def share():
    return M // W                                                     # of the last rank


LAUNCHES = {
    "gemm_ar one_shot": lambda dt, **c: triton_ar.launch(pad("gemm_ar"), new(dt, M, K), new(dt, N, K), **c),
    "gemm_ar two_shot": lambda dt, **c: triton_ar.launch(pad("gemm_ar"), new(dt, M, K), new(dt, N, K), two_shot=True, **c),
    "ag_gemm": lambda dt, **c: triton_ag.launch(pad("ag_gemm"), new(dt, share(), K), M, new(dt, N, K), **c),
    "gemm_rs push": lambda dt, **c: triton_rs.push(pad("gemm_rs"), new(dt, M, K), new(dt, N, K), **c),
    "gemm_rs take": lambda dt, **c: triton_rs.take(pad("gemm_rs"), M, N, dt, True, **c),
    "rs_residual_norm": lambda dt, **c: triton_rs.take(pad("rs_residual_norm"), M, N, dt, True, new(dt, share(), N), new(dt, N),
                                                       onward=pad("ag_gemm"), **c),
    "combine stage": lambda dt, **c: triton_moe._stage(pad("combine"), new(dt, M, N), slots(), W * M * TOPK, **c),
    "dispatch rows": lambda dt, **c: triton_moe._rows(pad("dispatch"), new(dt, 2 * M, N), slots(), new(torch.int32, 2 * M), M, **c),
    "combine sums": lambda dt, **c: triton_moe._sums(pad("combine"), new(dt, M, N), new(dt, M, N), slots(), 64, **c),
}
GEMMS = ["gemm_ar one_shot", "gemm_ar two_shot", "ag_gemm", "gemm_rs push"]
SIGNALS = [*GEMMS, "rs_residual_norm", "combine stage"]
WAITS = ["gemm_ar one_shot", "gemm_ar two_shot", "ag_gemm", "gemm_rs take", "rs_residual_norm", "dispatch rows", "combine sums"]


def compiled(name, arch="sm_90", **control):
    launch, = static._record(lambda dt: LAUNCHES[name](dt, **control), torch.bfloat16, 132)
    return build(launch.kernel, launch.signature, launch.constexprs, launch.attrs, launch.options, arch)


def build(kernel, signature, constexprs, attrs=None, options=None, arch="sm_90"):
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", int(arch[3:]), 32), options=options or {}).asm


# ---- what is read ---------------------------------------------------------------------------------------------

RELEASE = re.compile(r"\batom\.(?=[a-z_.0-9]*release)(?=[a-z_.0-9]*sys)(?=[a-z_.0-9]*exch)")
EXCHANGE = re.compile(r"\batom\.(?=[a-z_.0-9]*exch)")
ACQUIRE = re.compile(r"\b(?:ld|atom)\.(?=[a-z_.0-9]*acquire)(?=[a-z_.0-9]*sys)")
STORE = re.compile(r"\bst\.(?:[a-z_0-9:]+\.)*?global")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared")


def unreleased(ptx):
    """Signals (the only exchanges there are) that are no release at system scope, or that no barrier divides from the stores before."""
    bad, behind_barrier = 0, True
    for line in ptx.splitlines():
        if "bar.sync" in line:
            behind_barrier = True
        elif STORE.search(line):
            behind_barrier = False
        elif EXCHANGE.search(line):
            bad += not (behind_barrier and RELEASE.search(line))
    return bad


def barriers_before_signals(ttgir):
    """For every signal in the IR: is the operation of the program before it, addresses apart, a barrier of ours?"""
    found, recent = [], ""
    for line in ttgir.splitlines():
        if re.search(r"\b(?:ttg|gpu)\.(?:local_)?barrier", line):
            recent = "barrier"
        elif re.search(r"\btt\.(?:store|atomic_cas)|atomic_rmw (?!exch)", line):
            recent = "memory"
        elif "tt.atomic_rmw exch" in line:
            found.append(recent == "barrier")
    return found


def unacquired(ptx):
    """Why loads of data that was waited for may run ahead: no acquire, or a copy into shared memory stands before it."""
    acquires = [m.start() for m in ACQUIRE.finditer(ptx)]
    copies = [m.start() for m in COPY.finditer(ptx)]
    if not acquires:
        return "no acquire at system scope"
    return "a tile is loaded before its wait" if copies and min(copies) < max(acquires) else ""


# ---- signals and waits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", SIGNALS)
def test_signals_are_released_behind_a_barrier(name, arch):
    asm = compiled(name, arch)
    assert EXCHANGE.search(asm["ptx"]) and unreleased(asm["ptx"]) == 0
    before = barriers_before_signals(asm["ttgir"])
    assert before and all(before), "Triton up to 3.6 adds none of its own"
    assert "cp.async.bulk" not in asm["ptx"] and "tensormap" not in asm["ptx"], "no TMA store is ever signalled"


@pytest.mark.parametrize("control", [{"RELEASE": "relaxed", "BARRIER": False}, {"RELEASE": "relaxed"}], ids=str)
def test_unreleased_signals_are_found(control):
    assert unreleased(compiled("gemm_rs push", **control)["ptx"]) > 0


@pytest.mark.parametrize("name", ["gemm_ar one_shot", "gemm_rs push"])
def test_a_missing_barrier_is_found(name):
    assert not all(barriers_before_signals(compiled(name, BARRIER=False)["ttgir"]))


@pytest.mark.parametrize("name", WAITS)
def test_waits_acquire(name):
    asm = compiled(name)
    assert ACQUIRE.search(asm["ptx"]) and not re.search(r"\batom\.[a-z_.0-9]*acquire", asm["ptx"].replace("acq_rel", "")), "a load, no RMW"
    if name == "ag_gemm":                                             # the only one that multiplies what it has waited for
        assert unacquired(asm["ptx"]) == ""


@pytest.mark.parametrize("name", WAITS)
def test_a_missing_acquire_is_found(name):
    assert not ACQUIRE.search(compiled(name, ACQUIRE="relaxed")["ptx"])


def test_loads_that_run_ahead_of_a_wait_are_found():
    ptx = compiled("ag_gemm")["ptx"]
    assert unacquired(compiled("ag_gemm", ACQUIRE="relaxed")["ptx"]) == "no acquire at system scope"
    first = COPY.search(ptx)
    lines = ptx.splitlines()
    copy = lines.pop(ptx.count("\n", 0, first.start()))
    at = next(i for i, line in enumerate(lines) if ACQUIRE.search(line))
    assert unacquired("\n".join([*lines[:at], copy, *lines[at:]])) == "a tile is loaded before its wait", "as a pipeliner would move it"


@triton.jit
def _one_loop(y_ptr, w_ptr, peers_ptr, local_ptr, error_ptr, rank, epoch, limit, tiles, M, K, OURS: tl.constexpr, TOKEN: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Products of tiles that are waited for, tiles and K in one loop: the form in which a pipeliner may load a tile before its wait.
    TOKEN: what the wait returned goes into the mask of the loads. OURS: signals.wait, else a bare spin."""
    steps, i, j, k = tl.cdiv(K, BK), tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    x_ptr = cells(peers_ptr, rank, 4096, tl.bfloat16)
    acc, got, ok = tl.zeros([BM, BN], dtype=tl.float32), epoch, epoch == epoch
    for at in range(tiles * steps):
        tile, step = at // steps, at % steps
        if step == 0:
            if OURS:
                ok = wait(peers_ptr, local_ptr, error_ptr, rank, 0, tile, epoch, limit, 1, "acquire")
            else:
                flag = cells(peers_ptr, rank, 0, tl.int32) + tile
                got = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                while got < epoch:
                    got = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        end = tl.where(ok & (got >= epoch), M, 0) if TOKEN else M
        rows, ks = tile * BM + i, step * BK + k
        a = tl.load(x_ptr + rows[:, None] * K + ks[None, :], mask=(rows < end)[:, None], other=0.0)
        b = tl.load(w_ptr + ks[:, None] + j[None, :] * K, mask=(tile * BM + j < end)[None, :], other=0.0)
        acc = tl.dot(a, b, acc)
        if step == steps - 1:
            tl.store(y_ptr + rows[:, None] * BN + j[None, :], acc.to(tl.bfloat16), mask=(rows < M)[:, None])
            acc = tl.zeros([BM, BN], dtype=tl.float32)


def one_loop(**constants):
    constants = {"BM": 128, "BN": 128, "BK": 64, **constants}
    pointers = {"y_ptr": "*bf16", "w_ptr": "*bf16", "peers_ptr": "*i64", "local_ptr": "*i32", "error_ptr": "*i32"}
    names = [p.name for p in _one_loop.params]
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in "MK"}
    return build(_one_loop, signature, constants, attrs, {"num_warps": 8, "num_stages": 3})["ptx"]


def test_without_the_dependence_a_load_overtakes_its_wait():
    """The control of "what wait() returns goes into the mask of the loads it guards": left out, the pipeliner starts the first tiles' loads
    before anything was waited for. A wait of ours has a barrier in it besides, and over that nothing is pipelined."""
    first = lambda pattern, ptx: pattern.search(ptx).start()          # noqa: E731
    apart, bound = one_loop(OURS=False, TOKEN=False), one_loop(OURS=False, TOKEN=True)
    assert first(COPY, apart) < first(ACQUIRE, apart) and unacquired(apart) == "a tile is loaded before its wait"
    assert first(ACQUIRE, bound) < first(COPY, bound) and len(COPY.findall(bound)) > 4, "it is pipelined all the same"
    ours = one_loop(OURS=True, TOKEN=True)
    assert not COPY.search(ours) and first(ACQUIRE, ours) < first(re.compile(r"wgmma\.mma_async"), ours)


# ---- one answer for all threads -------------------------------------------------------------------------------

OWN_LOOK = re.compile(r"\bld\.volatile")


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_thread_looks_at_the_lock_for_itself(name):
    """Another program may set the error lock between the looks of two threads. If they then part ways, at a branch with a barrier in it,
    the kernel hangs or signals a tile that half of its threads did not store."""
    assert not OWN_LOOK.search(compiled(name)["ptx"])


@triton.jit
def _own_look(local_ptr, y_ptr):
    if tl.load(local_ptr + 2, volatile=True) == 0:
        tl.atomic_xchg(y_ptr, 1, sem="release", scope="sys")


def test_a_look_of_every_thread_is_found():
    ptx = build(_own_look, {"local_ptr": "*i32", "y_ptr": "*i32"}, {})["ptx"]
    assert OWN_LOOK.search(ptx) and "bar.sync" in ptx[OWN_LOOK.search(ptx).start():], "a branch of each thread's own, over a barrier"


# ---- speed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", GEMMS)
def test_gemms_use_tensor_cores(name, arch):
    assert re.search({"sm_90": r"\bwgmma\.mma_async", "sm_100": r"\btcgen05\.mma"}[arch], compiled(name, arch)["ptx"])
    assert "wgmma" not in compiled("gemm_rs take")["ptx"]


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("name", LAUNCHES)
def test_no_spills_and_wide_accesses(name, world, monkeypatch):
    monkeypatch.setattr("test_comm_ptx.W", world)
    for dtype in (torch.bfloat16, torch.float32):
        launch, = static._record(LAUNCHES[name], dtype, 132)
        made = static._compile(launch, "sm_90")
        assert made["spill"] == 0, f"{name} {dtype}: {made}"
        data = {int(k): n for k, n in made["accesses"].items() if int(k) > 8}      # pointers and flags are 4 and 8 bytes
        assert set(data) == {16} and "2" not in made["accesses"], f"{name} {dtype}: {made}"
