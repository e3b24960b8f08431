"""The bench: what a row holds and cannot lack, what is kept when things go wrong, and that every op has one."""
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch

from interlace import cli
from interlace.bench import clocks, command, harness, report, roofs, rows
from interlace.bench import run as bench_run
from interlace.bench.cases import Case, Make, Way, Ways
from interlace.bench.ops import OPS, pick
from interlace.bench.peers import installed, liger
from interlace.bench.provenance import machine, provenance
from interlace.kernels import rms_norm_ref
from interlace.launch import launch
from interlace.parallel.errors import RunError, UserError

ROOT = pathlib.Path(__file__).parents[1]
CASE = Case("double", "tiny", {"N": 8}, direction="fwd+bwd")
FIGURES = {"p20_us", "p50_us", "p80_us", "n", "samples_us", "error", "repeatable", "roof", "roof_percent", "ratio", "noisy", "overlap"}
SHARED = {"schema", "op", "way", "case", "device", "seed", "bytes", "flops", "link_bytes", "path", "cold", "sitting", "busy_cores",
          "loaded"}


def double(x):
    return x * 2


def tiny(ours=double, **peers):
    x = torch.randn(8, requires_grad=True)
    return Ways((x,), double, ours, {"torch eager": double, **peers}, nbytes=(64, 96), flops=(8, 8))


def measured(ways, case=CASE, **options):
    return {r["way"]: r for r in harness.measure("double", case, ways, **{"budget": 0.01, **options})}


# ---- a row ----------------------------------------------------------------------------------------------------


def test_fields():
    row = measured(tiny())["interlace"]
    assert {*row} == SHARED | FIGURES | {"absent"}
    assert row["error"] == 0 and row["repeatable"] and row["n"] >= 9 and row["ratio"] == 1
    assert row["p20_us"] <= row["p50_us"] <= row["p80_us"] and (row["bytes"], row["flops"]) == (160, 16)
    assert row["case"] == {"call": "double", "name": "tiny", "N": 8, "dtype": "float32", "pass": "fwd+bwd", "world": 1}


@pytest.mark.parametrize("direction, nbytes", [("fwd", 64), ("bwd", 96), ("fwd+bwd", 160)])
def test_cost_is_that_of_the_pass(direction, nbytes):
    assert measured(tiny(), Case("double", "tiny", {"N": 8}, direction=direction))["interlace"]["bytes"] == nbytes


@pytest.mark.parametrize("wrong, least", [(lambda x: x * 2.5, 0.2), (lambda x: x * 2 / (x * 0), math.inf),
                                          (lambda x: (x * 2).detach() + 0 * x, 0.1)])
def test_a_wrong_kernel_shows(wrong, least, capsys):
    """A wrong value, a NaN or infinity, a right value with a wrong gradient."""
    found = measured(tiny(wrong))
    assert found["interlace"]["error"] >= least and found["torch eager"]["error"] == 0
    line, = (text for text in report.footnotes(list(found.values())) if not text.startswith("absent"))
    assert line.startswith("WRONG" if found["interlace"]["error"] > 0.5 else "error")


def test_no_row_without_an_error():
    with pytest.raises(TypeError):
        Ways((torch.ones(2),), ours=double, peers={})                 # no truth, no ways
    row = measured(tiny(lambda x: x[:4] * 2))["interlace"]            # not even the shape of the truth
    assert "must have the shape of the truth, [8], got [4]" in row["failed"] and "p50_us" not in row


def test_not_repeatable():
    assert not measured(tiny(lambda x: x * 2 + 1e-6 * torch.rand(8)))["interlace"]["repeatable"]


def test_into_one_buffer_is_compared_too():
    buffer, calls = torch.empty(8), []

    def drifts(x):
        calls.append(1)
        return torch.add(x.detach() * 2, 1e-3 * len(calls), out=buffer)
    assert not measured(tiny(drifts), Case("double", "tiny", {"N": 8}, direction="fwd"))["interlace"]["repeatable"]


def test_noisy():
    steady = [1.0 + 0.001 * (i % 3) for i in range(30)]
    assert not harness.noisy(steady, steady)
    assert harness.noisy([1.0, 1.5] * 15, steady)                     # wide
    drifting = [1.0] * 15 + [1.12] * 15
    assert harness.noisy(drifting, steady) and not harness.noisy(drifting, drifting[:15] + drifting[15:])
    assert harness.noisy([1.0, 1.12] * 15, [1.0] * 30), "every other round tells another story"
    few, many = [1.0, 1.05, 1.2, 1.0, 1.05, 1.2, 1.05, 1.0, 1.05], [1.0, 1.05, 1.2, 1.0, 1.05, 1.2, 1.05, 1.0, 1.05] * 6
    assert harness.noisy(few, [1.0] * 9) and not harness.noisy(many, [1.0] * 54), "the same scatter says more in more rounds"


def test_the_noise_mark_foresees_a_second_run():
    """Pairs of runs drawn from one distribution, at several scatters: hardly one differs by over 10% in its ratio unmarked."""
    draw, unmarked, marked = torch.Generator().manual_seed(0), 0, 0
    for i in range(600):
        n, sigma = (9, 20, 60)[i % 3], (0.02, 0.05, 0.1, 0.2)[i % 4]
        runs = [[(sigma * torch.randn((), generator=draw)).exp().item() for _ in range(n)] for _ in range(2)]
        a, b = (statistics.median(r) for r in runs)
        mark = any(harness.noisy(r, [1.0] * n) for r in runs)
        marked += mark
        unmarked += not mark and max(a / b, b / a) > 1.1
    assert unmarked <= 6 and 0.2 * 600 < marked < 0.7 * 600, (unmarked, marked)


def test_do_two_runs_agree():
    ours = {"op": "a", "way": "interlace", "device": "cpu", "case": {"N": 1}, "ratio": 1.0, "noisy": False, "loaded": False}
    peer = {**ours, "way": "torch eager", "ratio": 2.0}
    old = {rows.key(r): r for r in (ours, peer)}
    assert rows.agreement([ours, {**peer, "ratio": 2.15}], old) == (1, 0, [])
    assert rows.agreement([ours, {**peer, "ratio": 1.7}], old) == (1, 0, ["a  1, torch eager: 2.00, now 1.70"])
    for mark in ("noisy", "loaded"):
        assert rows.agreement([ours, {**peer, "ratio": 1.7, mark: True}], old) == (1, 1, [])
        assert rows.agreement([{**ours, mark: True}, {**peer, "ratio": 1.7}], old) == (1, 1, []), "ours is half of the ratio"
    assert rows.agreement([ours, {**peer, "case": {"N": 2}}], old)[0] == 0


def test_overlap():
    case = Case("op", "tiny", {"N": 8}, direction="fwd")
    wait = lambda ms: Way(lambda x: (time.sleep(ms * 1e-3), x * 2)[1])  # noqa: E731
    ways = Ways((torch.randn(8),), double, wait(6), {}, gemm=wait(5), comm=wait(4))
    found = measured(ways, case, rounds=(9, 9))
    assert found["interlace"]["overlap"] == pytest.approx((5 + 4 - 6) / 4, abs=0.5)
    assert found["gemm alone"]["overlap"] is None and found["gemm alone"]["error"] == 0


def test_roofs_bind():
    found = {"copy": {"1": {"1000": 10.0, "100000": 1.0}}, "gemm": {"1": {"float32": 100.0}}, "link": {"2": {"1000": 1.0}}}
    limit = roofs.limits(found)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert limit(CASE, 500, 10, 0) == (pytest.approx(50e-9), "memory")
        assert limit(CASE, 50000, 10, 0) == (pytest.approx(50e-6), "memory")
        assert limit(CASE, 500, 10**6, 0) == (pytest.approx(10e-6), "gemm")
        assert limit(Case("x", "x", {}, world=2), 500, 10, 900) == (pytest.approx(900e-9), "link")
        assert roofs.limits({})(CASE, 500, 10, 0) == (0.0, "")
    finally:
        torch.set_num_threads(threads)


def test_provenance():
    found = provenance(3)
    assert {"date", "hardware", "versions", "commit", "dirty", "clocks", "load", "seed", "threads", "command", "malloc_tuned"} <= {*found}
    assert found["seed"] == 3 and {"torch", "triton", "interlace", "python"} <= {*found["versions"]}
    json.dumps(found)


def test_provenance_of_a_rank_names_the_users_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/interlace", "bench", "a b", "--quick"])
    assert launch(2, "launch_targets:command", {"wanted": "interlace bench 'a b' --quick"}) == 0


def test_a_machine_under_load(monkeypatch, capsys):
    """Warned at the start, marked in the row: somebody else's process takes a core while we measure."""
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 1.0, 1.0))
    command._warn_of_load()
    assert f"under load (9.0 on {os.cpu_count()} cores)" in capsys.readouterr().err
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    command._warn_of_load()
    assert capsys.readouterr().err == ""
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        row = measured(tiny(), budget=1.0, rounds=(9, 2000))["interlace"]
    finally:
        hog.kill()
        hog.wait()
    assert row["loaded"] and row["busy_cores"] > 0.25


def test_harness_costs_less_than_1_percent():
    """At 100 us: a function that takes exactly that, timed by the harness and by itself."""
    own = []

    def spin():
        start = time.perf_counter()
        while (now := time.perf_counter()) - start < 100e-6:
            pass
        own.append(now - start)
    best = math.inf
    for _ in range(5):                                                # a neighbour can spoil a try
        own.clear()
        with clocks.clock("cpu") as c:
            times = [c.sample(spin, c.inner(100e-6)) for _ in range(100)]
        best = min(best, statistics.quantiles(times, n=10)[0] / statistics.quantiles(own, n=10)[0])
    assert best < 1.01


# ---- what goes wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_out_of_memory_is_a_row(fault):
    def fails(x):
        raise fault
    found = measured(tiny(fails))
    assert found["interlace"]["failed"].startswith("out of memory") and found["torch eager"]["p50_us"] > 0
    found = measured(tiny(peer=fails))
    assert found["peer"]["failed"].startswith("out of memory") and found["interlace"]["p50_us"] > 0


def test_the_sweep_goes_on(monkeypatch, tmp_path, capsys):
    """A shape that cannot even be built has a row; the next one is measured."""
    class Bench:
        @staticmethod
        def cases(sweep, world):
            return [Case("double", "huge", {"N": 1 << 60}), CASE]

        @staticmethod
        def ways(case, make):
            torch.empty(case.shape["N"])
            return tiny()
    monkeypatch.setattr(bench_run, "load", lambda op: Bench)
    assert bench_run.ops(["swiglu"], str(tmp_path), "r", "cpu", "quick") == 0
    huge, ours, eager = rows.read(tmp_path, "swiglu", "r")
    assert huge["failed"].startswith(("out of memory", "RuntimeError")) and ours["p50_us"] > 0 and eager["way"] == "torch eager"
    assert ours["provenance"]["versions"]["torch"] == torch.__version__ and ours["machine"] == machine()
    report.table([huge, ours, eager])
    assert "failed" in capsys.readouterr().out


def test_absent_peers_are_named(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "peer_that_breaks.py").write_text("raise OSError('libfoo.so: undefined symbol')")
    assert installed("no_such_peer", double, "no-such-peer", "cpu") == "not installed (pip install no-such-peer)"
    broken = installed("peer_that_breaks", double, "x", "cuda")
    assert broken == "does not import: OSError: libfoo.so: undefined symbol"
    assert installed("json", double, "x", "cpu") == "needs CUDA tensors"
    assert installed("json", lambda m: m.nope, "x", "cuda").startswith("cannot be used: AttributeError")
    assert isinstance(liger("LigerRMSNormFunction", "cpu", double), str)
    found = list(measured(tiny(broken=broken)).values())
    assert found[0]["absent"] == {"broken": broken} and f"absent: broken: {broken} (double)" in report.footnotes(found)


def test_a_full_disk_stops_with_words(monkeypatch, tmp_path):
    plain = pathlib.Path.open

    def full(self, mode="r", *args, **kwargs):
        if mode != "r":
            raise OSError(28, "No space left on device")
        return plain(self, mode, *args, **kwargs)
    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(RunError, match="--out must be writable during a run, got No space left on device"):
        rows.append(tmp_path, "rope", [{"op": "rope"}], "r", {})


@pytest.mark.parametrize("op", ["rms_norm", pytest.param("gemm_ar", id="gemm_ar, 2 ranks")])
def test_ctrl_c_keeps_the_rows(tmp_path, op):
    proc = subprocess.Popen([sys.executable, "-m", "interlace", "bench", op, "--quick", "--out", str(tmp_path)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))   # a shell's `&` ignores it
    end = time.monotonic() + 300
    while not (tmp_path / f"{op}.jsonl").exists() and proc.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    proc.send_signal(signal.SIGINT)
    out, err = proc.communicate(timeout=300)
    assert proc.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert "% of roof" in out and f"{op} small" in out
    for line in (tmp_path / f"{op}.jsonl").read_text().splitlines():
        assert json.loads(line)["op"] == op


# ---- the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, wanted", [
    (["rmsnorm"], "did you mean rms_norm"), (["rms_norm", "gem_ar"], "did you mean gemm_ar"), (["zzz"], "they are rms_norm, layer"),
    (["--threshold", "0.5"], "--threshold must be >= 1"), (["--nproc", "0"], "--nproc must be >= 1"),
    (["--against", "/nope.jsonl"], "cannot be read"), (["--quik"], "did you mean --quick?"),
    (["rope", "--out", "/dev/null/x"], "--out must be a folder that can be written, got /dev/null/x"),
    (["rope", "--out", "/proc/sys"], "--out must be a folder that can be written, got /proc/sys")])
def test_mistakes(capsys, words, wanted):
    assert cli.main(["bench", *words]) == 2
    out, err = capsys.readouterr()
    assert wanted in err and out == "" and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2 and "needs an NVIDIA GPU" in capsys.readouterr().err


def test_list_needs_no_torch():
    code = "import sys\nfrom interlace.cli import main\nassert main(['bench', '--list']) == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(OPS), done.stderr


def test_pick():
    assert pick([]) == list(OPS) and pick(["rope", "rope"]) == ["rope"]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """bench(*words): a bench of one tiny op, through the command line, into tmp_path."""
    class Bench:
        slow = 0.0

        @staticmethod
        def cases(sweep, world):
            return [CASE]

        @staticmethod
        def ways(case, make):
            return tiny(lambda x: (time.sleep(2e-4 + Bench.slow), x * 2)[1])
    monkeypatch.setattr(bench_run, "load", lambda op: Bench)
    monkeypatch.setattr(roofs, "on_one", lambda *_: {"copy": {"1": {"1000": 1.0}}, "gemm": {"1": {"float32": 1.0}}})
    monkeypatch.setattr(command, "default_folder", lambda: tmp_path)
    Bench.run = staticmethod(lambda *words: cli.main(["bench", "swiglu", "--device", "cpu", "--out", str(tmp_path), *words]))
    return Bench


def test_against(quick, tmp_path, capsys):
    path = tmp_path / "swiglu.jsonl"
    assert quick.run() == 0
    assert {p.suffix for p in (tmp_path / "plots").iterdir()} == {".png", ".svg"}
    assert quick.run("--against", str(path), "--threshold", "5") == 0 and "against the older file: 1 cases" in capsys.readouterr().out
    quick.slow = 0.02
    assert quick.run("--against", str(path)) == 1 and "SLOWER by more than 1.1" in capsys.readouterr().out


def test_two_runs_in_a_second_are_two_runs(quick, tmp_path, monkeypatch):
    """By a clock of seconds the second one found all its cases measured, and measured none."""
    second = type("Still", (), {name: staticmethod(getattr(time, name)) for name in ("monotonic", "time")})
    second.strftime = staticmethod(lambda *_: "20261123T000000")
    monkeypatch.setattr("interlace.bench.command.time", second)
    assert [quick.run(), quick.run()] == [0, 0]
    assert len({json.loads(line)["run"] for line in (tmp_path / "swiglu.jsonl").read_text().splitlines()}) == 2


@pytest.mark.parametrize("change, wanted", [
    ({"machine": "another"}, "was measured on another, this is"),
    ({"schema": 1}, f"is of version 1, this interlace writes {harness.SCHEMA}"),
    ({"p50_us": None}, ""), (None, "is not JSON")])
def test_against_refuses(quick, tmp_path, capsys, change, wanted):
    old = tmp_path / "old.jsonl"
    assert quick.run() == 0
    row = json.loads((tmp_path / "swiglu.jsonl").read_text().splitlines()[0])
    old.write_text("{not json" if change is None else json.dumps({**row, **change, "case": {**row["case"], "N": 9}}))
    capsys.readouterr()
    if wanted:
        with pytest.raises(UserError, match=wanted):
            rows.read_old(old)
    assert quick.run("--against", str(old)) == 2
    assert (wanted or "none in common") in capsys.readouterr().err


def test_a_torn_line_is_passed_over(quick, tmp_path, capsys):
    """A run that was killed amid a line: the rest of its file can still be compared with."""
    assert quick.run() == 0
    old = tmp_path / "old.jsonl"
    old.write_text((tmp_path / "swiglu.jsonl").read_text() + '{"op": "swi')
    capsys.readouterr()
    assert quick.run("--against", str(old), "--threshold", "1000") == 0
    out, err = capsys.readouterr()
    assert "against the older file: 1 cases" in out and f"{old}: passed over what is not JSON, line 3" in err


def test_what_is_not_for_this_machine_is_no_failure(quick):
    def absent(case, make):
        raise NotImplementedError("a bench of transformers: pip install transformers")
    quick.ways = staticmethod(absent)
    assert quick.run() == 0


def test_a_wrong_kernel_fails_the_command(quick, capsys):
    quick.ways = staticmethod(lambda case, make: tiny(lambda x: -x))
    assert quick.run() == 1 and "WRONG: swiglu double tiny N8" in capsys.readouterr().out


def test_under_torchrun(quick, capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert quick.run() == 2 and "starts its own ranks" in capsys.readouterr().err


def test_what_counts_as_slower():
    mine = {"op": "a", "way": "interlace", "device": "cpu", "case": {"N": 1}, "p50_us": 10.0, "noisy": False}
    eager = {**mine, "way": "torch eager"}
    old = {rows.key(r): r for r in (mine, eager)}
    now = lambda ours, theirs: [{**mine, "p50_us": ours}, {**eager, "p50_us": theirs}]  # noqa: E731
    assert rows.changes(now(12.0, 10.0), old, 1.1)[0]
    assert not rows.changes(now(12.0, 12.0), old, 1.1)[0], "the machine is slower, not the kernel"
    assert not rows.changes(now(9.0, 5.0), old, 1.1)[0], "torch is faster, the kernel is not slower"
    graph = {**eager, "way": "torch eager, CUDA graph", "p50_us": 1.0}
    assert rows.changes([*now(12.0, 10.0), graph], old, 1.1)[0], "against torch eager itself"
    failed = {k: v for k, v in mine.items() if k != "p50_us"}
    assert rows.changes([{**failed, "failed": "RuntimeError: x"}], old, 1.1)[0]
    assert not rows.changes([{**failed, "failed": "out of memory: x"}], old, 1.1)[0]


# ---- all of them ----------------------------------------------------------------------------------------------


def test_every_op_has_a_bench():
    assert {p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")} == {*OPS}
    helpers = {"__init__", "autocast", "chunks", "dispatch", "gemm", "heap", "agree", "choose", "machine", "overlap", "pad", "protocol",
               "registry", "signals", "tile", "walk", "triton_ag", "triton_ar", "triton_moe", "triton_rs",
               "multicast_ar"}   # no op of their own, or a path of one
    ops = {p.stem for p in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels/comm").glob("*.py")]} - helpers
    assert ops <= {*OPS}, f"without a bench: {sorted(ops - {*OPS})}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sweep", ["quick", "quick-cuda", "cpu", "cuda"])
def test_cases(op, sweep):
    worlds = {"one": (1,), "many": (2, 4)}.get(OPS[op][0], (1, 2))
    for world in worlds:
        found = bench_run.load(op).cases(sweep, world)
        keys = [json.dumps(c.key()) for c in found]
        assert found and len({*keys}) == len(keys) and all(c.world == world for c in found)
        plain = op not in ("train_step", "replace", "route_plan")     # a plan has no type, no gradient
        if op in ("grouped_gemm", "experts") and sweep == "quick-cuda":   # fp32 is minutes of tens of TFLOP without tensor cores
            assert {c.dtype for c in found} == {"bfloat16"}
        elif plain and (op, sweep) != ("collectives", "quick-cuda"):
            assert {c.dtype for c in found} == {"float32", "bfloat16"}
        if sweep == "quick-cuda" and any(c.dtype == "bfloat16" for c in found):
            assert bench_run._by_turns(found)[0].dtype == "bfloat16", "what a GPU is for is measured before time is over"
        if op not in ("train_step", "replace", "collectives", "route_plan", "adamw", "grad_norm"):
            assert {c.direction for c in found} == {"fwd", "bwd", "fwd+bwd"} and any(c.name == "odd" for c in found)


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op][0] == "one"])
def test_our_error_is_not_worse_than_torchs(op):
    """The quick cases, called and checked but not timed: all ways compute the same thing."""
    module = bench_run.load(op)
    for case in module.cases("quick", 1):
        ways = module.ways(case, Make(case, "cpu", quick=True))
        truth = {}
        found = {name: harness.prepare(way, ways, case, truth).error for name, way in ways.all().items()}
        assert found["interlace"] <= 2 * max(found["torch eager"], torch.finfo(getattr(torch, case.dtype)).eps), (str(case), found)
        assert all(e < 0.05 for e in found.values()), (str(case), found)


def test_a_way_with_the_reference_agrees():
    case = bench_run.load("rms_norm").cases("quick", 1)[0]
    ways = bench_run.load("rms_norm").ways(case, Make(case, "cpu", quick=True))
    assert harness.prepare(Way(rms_norm_ref), ways, case, {}).error < 1e-6


def test_ranks(tmp_path):
    """Two ranks: communication, its bounds, the path it took, and the roofs between them."""
    done = subprocess.run([sys.executable, "-m", "interlace", "bench", "gemm_ar", "--quick", "--roofs", "--explain", "--out", str(tmp_path),
                           "--device", "cpu"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / "gemm_ar.jsonl").read_text().splitlines()]
    assert {r["way"] for r in found} == {"interlace", "torch eager", "torch, chunked async", *harness.BOUNDS}
    assert not any("failed" in r for r in found)
    assert all(r["case"]["world"] == 2 for r in found) and any(r["overlap"] is not None for r in found)
    assert all(r["path"].startswith("heap, staged") for r in found) and "heap, staged" in done.stdout
    kept = json.loads((tmp_path / "roofs.json").read_text())
    assert kept["link"]["2"] and kept["signal_us"]["2"] > 0 and kept["copy"] and kept["provenance"]["command"]


def test_pytest_benchmark():
    """`pytest bench --benchmark-only`: a case of one op, and of one over ranks."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        pytest.skip("pytest-benchmark does not time under xdist")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "odd and float32 and (test_bench_rope or all_to_all)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
