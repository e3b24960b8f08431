"""multicast_ar without a GPU: its very CUDA source between ranks that are threads here, under a race detector; against its step table; its
PTX; and each with the protocol's features switched off, which must be seen. What no machine without NVSwitch can show: the switch."""
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from interlace.kernels.comm import multicast_ar, overlap, protocol
from interlace.kernels.comm.choose import Path as Way
from interlace.kernels.comm.pad import Pad

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
OFF = {"": [], "no barrier": ["-DINTERLACE_BARRIER=0"], "no release, no acquire": ["-DINTERLACE_ORDERED=0"],
       "no fence": ["-DINTERLACE_FENCE=0"]}                           # of aliases, which a CPU has not: seen in the PTX alone
KINDS = {"one_shot": 0, "multicast": 1, "in turns": 2}


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    """on_cpu(words, off="") -> the finished process of tests/multicast_on_cpu.cpp, compiled with a race detector."""
    folder = tmp_path_factory.mktemp("multicast")
    cxx = shutil.which("g++") or pytest.skip("needs g++")

    @cache
    def built(off):
        out = folder / (off or "all").replace(" ", "_")
        flags = ["-std=c++20", "-O1", "-g", "-Wall", "-Werror", "-fsanitize=thread", *OFF[off], f"-I{CUDA}", f"-I{ROOT / 'tests'}"]
        done = subprocess.run([cxx, *flags, str(ROOT / "tests/multicast_on_cpu.cpp"), "-o", str(out)], capture_output=True, text=True)
        if "tsan" in done.stderr and "cannot find" in done.stderr:
            pytest.skip("needs the thread sanitizer of g++")
        assert not done.returncode, done.stderr[-3000:]
        return out

    def run(words, off=""):
        done = subprocess.run([built(off), *map(str, words)], capture_output=True, text=True, timeout=280,
                              env={"TSAN_OPTIONS": "exitcode=66 halt_on_error=1"})
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("the thread sanitizer does not run on this kernel")
        return done
    return run


# ---- the kernel between threads -------------------------------------------------------------------------------


@pytest.mark.parametrize("world, programs, dtype, n, kind", [
    (2, 2, "fp32", 20000, "in turns"), (3, 2, "bf16", 30001, "multicast"), (3, 1, "fp16", 9001, "one_shot"), (2, 1, "bf16", 5, "in turns"),
    pytest.param(4, 3, "fp32", 40003, "in turns", marks=pytest.mark.slow)])
def test_sums_are_right_and_nothing_races(on_cpu, world, programs, dtype, n, kind):
    """Fresh data in every call, NaN in every buffer nobody should read, ragged ends, epochs that wrap, results in place."""
    done = on_cpu(["run", world, programs, dtype, n, 4, 2**31 - 3, KINDS[kind]])
    assert done.stdout == "done\n" and not done.returncode, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("off", list(OFF)[1:3])
def test_a_race_is_found(on_cpu, off):
    done = on_cpu(["run", 2, 2, "fp32", 20000, 4, 0, KINDS["in turns"]], off)
    assert done.returncode == 66 and "data race" in done.stderr, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("kind", ["one_shot", "multicast"])
def test_a_late_rank_gets_no_wrong_data(on_cpu, kind):
    """Rank 0's waits run out three times before rank 1 comes: its results are NaN and said to be; rank 1's are right or NaN."""
    done = on_cpu(["late", 2, KINDS[kind]])
    assert done.stdout.splitlines() == ["rank 0: 0 wrong, 90000 of 90000 nan, error 1 epoch 1 source 1 got 0", "rank 1: 0 wrong, error 1",
                                        "done"], done.stdout + done.stderr[-3000:]


# ---- the kernel does what its table says ----------------------------------------------------------------------

ITEMS, PROGRAMS = 5, 2


def expected(table, world):
    """Per program, in order: what the block's threads do at once in rank order, which the table lists one after the other."""
    sums = ITEMS                                                      # "sum" cells follow the "part" cells of a buffer
    cell = lambda s: s.slot + (sums if s.area == "sum" else 0)        # noqa: E731
    kinds = ("write", "signal", "wait", "read")
    return [[(kinds.index(s.do), s.at, s.buffer if s.do in ("write", "read") else 0, cell(s)) for s in program if s.do in kinds]
            for (kernel,) in [table] for program in kernel]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["one_shot", "multicast"])
def test_the_kernel_follows_its_table(on_cpu, kind, rank):
    world, n = 3, ITEMS * multicast_ar.ITEM // 4 - 7
    done = on_cpu(["trace", world, rank, PROGRAMS, n, KINDS[kind]])
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines() if line != "done"]
    table = protocol.TABLES[kind](rank, world, 1, ITEMS, PROGRAMS)
    for program, want in enumerate(expected(table, world)):
        did = [line[1:] for line in lines if line[0] == program]
        # Threads take parts of a cell: reads and writes of one item mix. Their order within it says nothing, so each is a set.
        assert groups(did) == groups(want), f"program {program}"


def groups(steps):
    """Between signals and waits, which are in order, the cells that were read and written."""
    out, cells = [], set()
    for step in steps:
        if step[0] in (0, 3):
            cells.add(step)
        else:
            if cells:
                out.append(cells)
            cells = set()
            if out and isinstance(out[-1], list) and out[-1][0][0] == step[0]:
                out[-1] = sorted([*out[-1], step])
            else:
                out.append([step])
    return [*out, cells]


def test_what_a_pad_must_hold():
    for dtype, n, world in ((torch.float32, 1, 2), (torch.bfloat16, 8192, 8), (torch.bfloat16, 8193, 8)):
        items = -(-n * dtype.itemsize // 16384)
        x = torch.empty(n, dtype=dtype, device="meta")
        assert multicast_ar.needs(x, world, False) == (world * items * 16384, items)
        assert multicast_ar.needs(x, world, True) == (2 * items * 16384, items)
    assert f"CHUNK = 1 << {multicast_ar.ITEM.bit_length() - 1};" in (CUDA / "multicast_ar.cuh").read_text()


def test_the_op_and_its_fake():
    """Schema and fake are there wherever csrc/cuda is not; what only a GPU can compute refuses a CPU's tensors."""
    x, i = torch.empty(100, device="meta"), torch.empty(9, dtype=torch.int32, device="meta")
    op = torch.ops.interlace.multicast_ar
    assert op(x, x, i, i, i, 1, 0, 1, 0, 1, 1, 0, True, 1) is None
    assert {a.name for a in op.default._schema.arguments if a.alias_info and a.alias_info.is_write} == {"y", "local", "error"}
    x = torch.ones(8)
    with pytest.raises(NotImplementedError, match="multicast_ar"):
        op(x, x, x, x, x, 1, 0, 1, 0, 1, 1, 0, True, 1)


def test_a_pad_without_multicast_is_refused():
    pad = Pad.virtual(2, "all_reduce", 1 << 16, 8, "meta")[0]
    with pytest.raises(ValueError, match="all_reduce: the pad of group 'virtual' must have a multicast address, got none; use triton_ar"):
        multicast_ar.launch(pad, torch.empty(100, device="meta"), two_shot=True)


@pytest.mark.parametrize("name, two_shot", [("one-shot multicast", False), ("two-shot multicast", True)])
def test_the_path_leads_there(monkeypatch, name, two_shot):
    """gemm_ar reduces its product in place, all_reduce leaves x alone."""
    asked, called = [], []
    monkeypatch.setattr(overlap, "_pad", lambda op, needs, x, group: asked.append((op, needs)) or "pad")
    monkeypatch.setattr(overlap, "group_size", lambda group: 4)
    monkeypatch.setattr(multicast_ar, "launch", lambda pad, x, y=None, *, two_shot: called.append((x, y, two_shot)) or x)
    x, w, path = torch.randn(6, 5), torch.randn(7, 5), Way(name, 0.0, "")
    overlap.summed("gemm_ar", x, w, path, None)
    overlap.summed("all_reduce", x, None, path, None)
    (product, y, two), (same, none, _) = called
    assert torch.equal(product, x @ w.t()) and y is product and two == two_shot and same is x and none is None
    assert asked == [("gemm_ar", multicast_ar.needs(product, 4, two_shot)), ("all_reduce", multicast_ar.needs(x, 4, two_shot))]


# ---- what nvcc makes of it ------------------------------------------------------------------------------------


def setup_constants():
    names = {}
    for name in ("ARCHES", "TARGET", "NVCC_FLAGS"):
        exec(re.search(rf"^{name} = .*$", (ROOT / "setup.py").read_text(), re.M)[0], names)
    return names


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(arch, off="") -> the PTX; the first one compiles the object file too, for every target of setup.py, as an install does."""
    nvcc = shutil.which("nvcc") or pytest.skip("needs nvcc")
    constants, include = setup_constants(), Path(torch.__file__).parent / "include"

    @cache
    def build(off):
        folder = tmp_path_factory.mktemp("ptx")
        arches = ["90a"] if off else constants["ARCHES"]
        targets = [f for a in arches for f in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
        what = ["-ptx", "-o", str(folder / "out.ptx")] if off else ["-c", "-o", str(folder / "out.o")]
        done = subprocess.run([nvcc, *constants["NVCC_FLAGS"], *OFF[off], *targets, "-isystem", str(include), "--keep", "--keep-dir",
                               str(folder), *what, str(CUDA / "multicast_ar.cu")], capture_output=True, text=True)
        assert not done.returncode, done.stderr[-3000:]
        return {re.search(r"^\.target (\w+)", p.read_text(), re.M)[1]: p.read_text() for p in folder.glob("*.ptx")}
    return lambda arch, off="": build(off)[arch]


def kernels(ptx):
    """{(type, two_shot): the lines of that kernel}"""
    found = {}
    for body in re.findall(r"^\.visible \.entry .*?^}", ptx, re.M | re.S):
        mark = re.search(r"multicast_ar_kernelI(.+?)Lb([01])E", body)
        found[{"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}[mark[1]], mark[2] == "1"] = body.splitlines()
    assert len(found) == 6
    return found


def unreleased(lines):
    """Signals that are no release at system scope, or that no barrier of the block divides from its stores before."""
    bad, behind = 0, True
    for line in lines:
        if re.search(r"\bbar(rier)?\.(sync|red)", line):
            behind = True
        elif re.search(r"\bst\.(v4|global\.v4)|multimem\.st", line):
            behind = False
        elif re.search(r"\bst\.(release|relaxed)\.sys", line):
            bad += not behind or "release" not in line
    return bad


def unacquired(lines):
    """Flags that are looked at without acquire at system scope; and waits, which end in a barrier, without a proxy fence
    after the last look."""
    bad, looked = 0, False
    for line in lines:
        if re.search(r"\bld\.(acquire|relaxed)\.sys", line):
            bad, looked = bad + ("acquire" not in line), True
        elif "fence.proxy.alias" in line:
            looked = False
        elif looked and re.search(r"\bbar(rier)?(\.cta)?\.red", line):
            bad, looked = bad + 1, False
    assert any(re.search(r"\bld\.(acquire|relaxed)\.sys", line) for line in lines)
    return bad


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_signals_are_released_and_waits_acquire(compiled, arch):
    for (dtype, two_shot), lines in kernels(compiled(arch)).items():
        assert unreleased(lines) == 0 and unacquired(lines) == 0, (dtype, two_shot)
        text = "\n".join(lines)
        loads = re.findall(r"multimem\.ld_reduce\.relaxed\.sys\.global\.add\.(\S+)", text)
        assert set(loads) == ({{"f32": "v4.f32", "f16": "acc::f32.v4.f16x2", "bf16": "acc::f32.v4.bf16x2"}[dtype]} if two_shot else set())
        assert "multimem.st.relaxed.sys.global.v4.f32" in text and "ld.acquire.sys" in text


@pytest.mark.parametrize("off", list(OFF)[1:])
def test_what_is_switched_off_is_found(compiled, off):
    found = kernels(compiled("sm_90a", off))
    assert all(unreleased(lines) for lines in found.values()) == (off != "no fence")
    assert all(unacquired(lines) for lines in found.values()) == (off != "no barrier")


def test_a_gpu_without_multimem_is_refused(compiled):
    """The same source compiles for sm_80, without the instructions; the launcher refuses before they could be met."""
    for lines in kernels(compiled("sm_80")).values():
        assert not any("multimem" in line for line in lines) and any("trap" in line for line in lines)
    text = (CUDA / "multicast_ar.cu").read_text()
    assert text.index("major >= 9") < text.index("start<float>(call")
