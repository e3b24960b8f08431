"""Traces: times summed up right, every rank on one clock, waiting measured where it is planted, and what is cut short kept."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run

from interlace import cli
from interlace.bench import trace as bench_trace
from interlace.bench.ops import OPS
from interlace.kernels.comm import all_reduce, heap, heap_of
from interlace.models import profile
from interlace.models.config import load_config
from interlace.models.profile import KINDS, Profile, kind, merge, sets, shares
from interlace.models.train import Run, train
from interlace.parallel.errors import RunError

TINY = ["model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=32", "model.micro_batch_size=2",
        "model.global_batch_size=4"]

# ---- arithmetic -----------------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)).map(lambda t: (t[0], t[0] + t[1])), max_size=8)


def ticks(parts):
    return {i for begin, end in parts for i in range(begin, end)}


@given(spans, spans)
def test_intervals(a, b):
    a, b = profile.union(a), profile.union(b)
    assert all(x[1] < y[0] for x, y in itertools.pairwise(a)) and all(x[0] < x[1] for x in a)
    assert ticks(profile.minus(a, b)) == ticks(a) - ticks(b)
    assert ticks(profile.both(a, b)) == ticks(a) & ticks(b)
    assert profile.length(a) == len(ticks(a))


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(KINDS), st.integers(0, 40), st.integers(0, 9)), max_size=12), spans)
def test_sums_to_one(events, windows):
    """Against a count of ticks: in a lane the earlier of KINDS counts, between lanes compute does."""
    events, windows = [(lane, k, t, t + d) for lane, k, t, d in events], profile.union(windows)
    at = {}
    for lane, k, begin, end in sorted(events, key=lambda e: KINDS.index(e[1]), reverse=True):
        at.update({(lane, t): k for t in range(begin, end)})
    by = {k: {t for (_, t), what in at.items() if what == k} & ticks(windows) for k in KINDS}
    found = sets(events, windows)
    assert {k: ticks(found[k]) for k in KINDS} == by
    s, total = shares(found, windows), len(ticks(windows))
    moves = by["communication"] | by["waiting"]
    assert s["hidden"] == (len(moves & by["compute"]) / len(moves) if moves else None)
    if total:
        assert sum(s[k] for k in ("compute", "communication", "waiting", "other")) == pytest.approx(1)
        assert s["compute"] == pytest.approx(len(by["compute"]) / total)
        assert s["communication"] == pytest.approx(len(by["communication"] - by["compute"]) / total)
        assert s["waiting"] == pytest.approx(len(by["waiting"] - by["compute"] - by["communication"]) / total)


@pytest.mark.parametrize("events, wanted", [
    ([("a", "compute", 0, 6), ("a", "communication", 6, 10)], (.6, .4, 0, 0, 0)),                     # one after the other
    ([("a", "compute", 0, 8), ("b", "communication", 2, 6)], (.8, 0, 0, .2, 1)),                      # all hidden
    ([("a", "compute", 0, 4), ("b", "communication", 2, 10)], (.4, .6, 0, 0, .25)),                   # a quarter hidden
    ([("a", "compute", 0, 10), ("a", "communication", 2, 8), ("a", "waiting", 3, 6)], (.4, .3, .3, 0, 0)),   # nested in one thread
    ([("a", "compute", 1, 2), ("a", "compute", 1, 2), ("a", "waiting", 4, 6)], (.1, 0, .2, .7, 0)),   # gaps, and a pair
    ([("a", "communication", -5, 2), ("a", "compute", 9, 99)], (.1, .2, 0, .7, 0)),                   # over the window's edges
    ([("a", "waiting", 0, 10), ("b", "communication", 0, 5), ("c", "compute", 0, 1)], (.1, .4, .5, 0, .1)),
    ([("a", "compute", 0, 3)], (.3, 0, 0, .7, None)), ([], (0, 0, 0, 1, None))])
def test_shares(events, wanted):
    s = shares(sets(events, [(0, 10)]), [(0, 10)])
    assert [s[k] for k in ("compute", "communication", "waiting", "other", "hidden")] == pytest.approx(list(wanted), nan_ok=True)


@pytest.mark.parametrize("category, name, wanted", [
    ("cpu_op", "aten::mm", "compute"), ("cpu_op", "interlace::rms_norm", "compute"), ("cpu_op", "_GemmAR", None),
    ("cpu_op", "autograd::engine::evaluate_function: MmBackward0", None), ("cpu_op", "c10d::allreduce_", "communication"),
    ("user_annotation", "gloo:all_reduce", "communication"), ("user_annotation", "interlace: training step #3", None),
    ("communication", "all_reduce", "communication"), ("waiting", "wait for rank 1", "waiting"),
    ("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"), ("kernel", "sm90_xmma_gemm_bf16", "compute"),
    ("kernel", "void at::native::reduce_kernel<512>", "compute"), ("kernel", "two_shot_all_reduce_kernel", "communication"),
    ("kernel", "symm_mem::barrier_kernel", "waiting"), ("gpu_memcpy", "Memcpy PtoP (Device -> Device)", "communication"),
    ("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", "compute"), ("cuda_runtime", "cudaLaunchKernel", None)])
def test_kinds(category, name, wanted):
    assert kind({"ph": "X", "cat": category, "name": name}) == wanted


# ---- merging --------------------------------------------------------------------------------------------------


def part(rank, base, *events):
    usual = {"ph": "X", "pid": 100 + rank, "tid": 100 + rank, "cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 1.0}
    made = [{**usual, **e} for e in events]
    return {"rank": rank, "pid": 100 + rank, "host": "here", "base": base, "events": made, "lost": 0}


def test_merge_is_on_one_clock():
    """The same instant, told from two bases, in ranks whose threads and streams have the same numbers."""
    base = 1_790_857_026_000_000_000
    one = part(0, base, {"ts": 4505562300262.125}, {"pid": 0, "tid": 7, "cat": "kernel", "name": "gemm", "ts": 4505562300263.125},
               {"pid": 0, "tid": 100, "cat": "kernel", "name": "ncclDevKernel", "ts": 4505562300264.0},
               {"ph": "s", "id": 5, "cat": "ac2g", "name": "ac2g", "ts": 4505562300262.2})
    two = part(1, base + 1_000_000, {"ts": 4505562299262.125}, {"ph": "s", "id": 5, "cat": "ac2g", "name": "ac2g", "ts": 4505562299262.5})
    made = merge([one, two])["traceEvents"]
    assert {e["pid"] for e in made} == {0, 1}
    assert [e["ts"] for e in made if e["name"] == "aten::mm"] == [0.0, 0.0]
    ids = [e["id"] for e in made if e["ph"] == "s"]
    assert len({*ids}) == 2, "arrows of two ranks must not meet"
    tracks = {e["tid"]: e["args"]["name"] for e in made if e["name"] == "thread_name" and e["pid"] == 0}
    assert sorted(tracks.values()) == ["GPU 0, stream 100", "GPU 0, stream 7", "main thread"]


def test_a_device_counts_alone():
    """The host's launches are not compute where a GPU works; streams overlap."""
    window = {"cat": "user_annotation", "name": "interlace: x #1", "ts": 0.0, "dur": 10.0}
    gemm = {"pid": 0, "tid": 7, "cat": "kernel", "name": "gemm", "ts": 2.0, "dur": 4.0}
    gather = {"pid": 0, "tid": 20, "cat": "kernel", "name": "ncclDevKernel_AllGather", "ts": 4.0, "dur": 4.0}
    trace = merge([part(0, 0, window, {"ts": 0.0, "dur": 10.0}, gemm, gather)])
    s = profile.summarise(trace)["x"][0]
    assert (s["compute"], s["communication"], s["other"], s["hidden"], s["n"]) == pytest.approx((.4, .2, .4, .5, 1))


# ---- the heap's spans -----------------------------------------------------------------------------------------


def _spans(rank):
    group, x = dist.group.WORLD, torch.ones(1 << 20)
    heap.record(False)
    heap.record(True)
    heap.record(False)
    all_reduce(x, group)
    assert heap.recorded() == ([], 0), "nothing is kept while no profile is on"
    heap.record(True)
    begin = time.time_ns()
    y = all_reduce(x, group)
    heap_of(group).barrier()
    end = time.time_ns()
    heap.record(False)
    found, lost = heap.recorded()
    calls = [s for s in found if s.peer < 0]
    assert y[0] == 2 and lost == 0
    assert [(heap.OPS[s.op], s.bytes) for s in calls] == [("all_reduce", 4 << 20), ("barrier", 0)]
    for s in found:
        assert begin <= s.begin <= s.end <= end and s.thread == os.getpid()
        assert s.group.decode() == heap_of(group).name[:35]
        if s.peer >= 0:
            assert s.peer == 1 - rank and any(c.begin <= s.begin and s.end <= c.end and c.op == s.op for c in calls)


def test_spans():
    run(2, _spans)


def _straggler(rank, folder):
    group, x = dist.group.WORLD, torch.ones(1000)
    all_reduce(x, group)
    p = Profile(folder, "planted", rank, 2)
    p.start()
    heap_of(group).barrier()
    for _ in range(2):
        with p.window("late"):
            (x @ x).item()
            if rank == 1:
                time.sleep(0.3)
            all_reduce(x, group)
    p.stop()
    p.close()


def valid(path, world):
    """The Chrome trace at `path`: every rank a process, complete events with finite times, one track a thread."""
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert names == {r: f"rank {r}" for r in range(world)}
    threads = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    for e in events:
        assert e["ph"] in "XMsf" and isinstance(e["pid"], int) and e["pid"] < world and isinstance(e["name"], str)
        if e["ph"] == "X":
            assert e["ts"] >= 0 and e["dur"] >= 0 and (e["pid"], e["tid"]) in threads
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0
    return trace, events


def test_a_planted_straggler_shows(tmp_path):
    run(2, _straggler, tmp_path)
    trace, events = valid(tmp_path / "planted.json", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"planted.json", "planted.png"}, "the parts are gone"
    assert (tmp_path / "planted.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    waited = {r: s["waiting"] * s["us"] * 1e-6 for r, s in profile.summarise(trace)["late"].items()}
    assert waited[0] > 0.4 and waited[1] < waited[0] - 0.2, "two sleeps of 0.3 s, seen by the other rank"
    of = lambda r, name: sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["pid"] == r and e["name"] == name)  # noqa: E731
    late = of(1, "all_reduce")[-2:]
    for (begin, end), (_, found) in zip(late, [w for w in of(0, "wait for rank 1") if w[1] - w[0] > 1e5]):
        assert begin <= found <= end + 1e5, "rank 0 goes on when rank 1 has come: one clock"
    for r in range(2):                                                # torch's clock and the heap's: each call inside its window
        windows = profile.union(w for i in (1, 2) for w in of(r, f"interlace: late #{i}"))
        calls = of(r, "all_reduce")
        assert len(calls) == 2 and all(any(a <= b and d <= e for a, e in windows) for b, d in calls)


# ---- interlace train --profile --------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(400)))
    return [f"data.paths=[{path}]"]


def _train(rank, overrides, out, steps):
    assert train(load_config(None, overrides), out, profile=steps) == 0


@pytest.mark.parametrize("steps, max_steps, wanted", [(2, 6, 2), (9, 4, 2), (1, 1, 1)])
def test_train(tmp_path, text, steps, max_steps, wanted):
    """The first two steps are left out where there are more; a trace does not change what is learned."""
    ranks = 2 if max_steps > 1 else 1
    words = [*TINY, *text, f"trainer.max_steps={max_steps}", f"tp={ranks}"]
    run(ranks, _train, words, tmp_path / "a", steps)
    run(ranks, _train, words, tmp_path / "b", 0)
    trace, _ = valid(tmp_path / "a/trace.json", ranks)
    found = profile.summarise(trace)["training step"]
    assert {r: s["n"] for r, s in found.items()} == dict.fromkeys(range(ranks), wanted)
    assert all(s["compute"] > 0 and (s["hidden"] is None) == (ranks == 1) for s in found.values())
    a, b = ([json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "ab")
    assert a == b and not (tmp_path / "b/trace.json").exists()


def test_ctrl_c_keeps_the_steps(tmp_path, text):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "interlace", "train", "--out", str(out), "--profile", "100000", "tp=2", *TINY, *text,
               "trainer.max_steps=100000"]
    proc = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while time.monotonic() < end and proc.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 6:
            break
        time.sleep(0.05)
    proc.send_signal(signal.SIGINT)
    told, err = proc.communicate(timeout=300)
    assert proc.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert "cut short; what was recorded is" in told
    trace, _ = valid(out / "trace.json", 2)
    found = profile.summarise(trace)["training step"]
    assert all(s["n"] >= 1 for s in found.values()) and trace["otherData"]["cut short"]
    assert trace["otherData"]["command"].startswith("interlace train --out")


def test_a_full_disk(tmp_path, text, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(profile, "_write", full)
    with pytest.raises(RunError, match="--out must be writable during a run, got No space left"):
        train(load_config(None, [*TINY, *text, "trainer.max_steps=3"]), tmp_path / "run", profile=1)


def test_without_matplotlib(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    Run(load_config(None, [*TINY, *text, "trainer.max_steps=2"]), tmp_path / "run").train(profile=1)
    told = capsys.readouterr()
    valid(tmp_path / "run/trace.json", 1)
    assert "no trace.png without matplotlib" in told.err and "trace.png" not in told.out


# ---- interlace bench trace ------------------------------------------------------------------------------------


def test_bench_trace(tmp_path):
    command = [sys.executable, "-m", "interlace", "bench", "trace", "gemm_ar", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "% of communication hidden" in done.stdout and done.stderr == "", done.stdout + done.stderr
    trace, events = valid(tmp_path / "gemm_ar.json", 2)
    found = profile.summarise(trace)
    assert [label.split()[0] for label in found] == ["gemm_ar", "copy_gemm"]
    assert all(s["n"] == bench_trace.CALLS and s["compute"] > 0 for of in found.values() for s in of.values())
    names = {e["name"] for e in events}
    assert "gemm_ar" in names and names & {"aten::mm", "interlace::gemm", "interlace::gemm_packed"} and (tmp_path / "gemm_ar.png").exists()
    assert trace["otherData"]["command"].startswith("interlace bench trace gemm_ar --quick")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_case(op):
    world = 1 if OPS[op][0] == "one" else 2
    for sweep, device in (("quick", "cpu"), ("quick-cuda", "cuda")):
        found = bench_trace.chosen(op, sweep, world, device)
        assert found and len({c.call for c in found}) == len(found)


def test_an_interrupted_or_failing_case_keeps_the_others(tmp_path, monkeypatch, capsys):
    one = bench_trace._one

    def second(p, name, case, *rest):
        if case.call == "add_rms_norm":
            raise KeyboardInterrupt
        return one(p, name, case, *rest)
    monkeypatch.setattr(bench_trace, "_one", second)
    with pytest.raises(KeyboardInterrupt):
        bench_trace.trace("rms_norm", str(tmp_path), "cpu", "quick", 0)
    trace, _ = valid(tmp_path / "rms_norm.json", 1)
    assert [label.split()[0] for label in profile.summarise(trace)] == ["rms_norm"]

    def first(p, name, case, *rest):
        return "out of memory: x" if case.call == "rms_norm" else one(p, name, case, *rest)
    monkeypatch.setattr(bench_trace, "_one", first)
    assert bench_trace.trace("rms_norm", str(tmp_path), "cpu", "quick", 0) == 1
    assert "failed: rms_norm" in capsys.readouterr().out
    trace, _ = valid(tmp_path / "rms_norm.json", 1)
    assert [label.split()[0] for label in profile.summarise(trace)] == ["add_rms_norm"]


@pytest.mark.parametrize("words, wanted", [
    (["bench", "trace"], "must be given an op, got none"), (["bench", "trace", "gem_ar"], "did you mean gemm_ar"),
    (["bench", "trace", "gemm_ar", "--against", "x"], "--against must be left out"),
    (["bench", "trace", "gemm_ar", "--nproc", "0"], "--nproc must be >= 1"),
    (["bench", "trace", "gemm_ar", "--out", "/dev/null/x"], "--out must be a folder that can be written, got /dev/null/x"),
    (["train", "--profile", "0"], "--profile must be >= 1, the steps to trace, got 0"),
    (["train", "--profile", "-3"], "--profile must be >= 1"), (["train", "--profil", "2", "tp=3"], "num_attention_heads"),
    (["train", "--proflie"], "did you mean --profile?")])
def test_mistakes(capsys, words, wanted):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert wanted in err and out == "" and "Traceback" not in err
