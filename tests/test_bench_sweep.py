"""A sweep that takes hours: it ends, goes on after Ctrl-C, finds every way the same caches; and README's table is made of its rows."""
import contextlib
import pathlib
import signal
import statistics
import time

import pytest
import torch

from interlace import cli
from interlace.bench import clocks, command, harness, readme, report, roofs, rows
from interlace.bench import run as bench_run
from interlace.bench.cases import Case, Make, Way, Ways
from interlace.bench.ops import OPS
from interlace.bench.provenance import machine, provenance

ROOT = pathlib.Path(__file__).parents[1]
CASE = Case("double", "tiny", {"N": 8}, direction="fwd+bwd")


def double(x):
    return x * 2


def tiny(ours=double, **peers):
    x = torch.randn(8, requires_grad=True)
    return Ways((x,), double, ours, {"torch eager": double, **peers})


def measured(ways, case=CASE, **options):
    return {r["way"]: r for r in harness.measure("double", case, ways, **{"budget": 0.01, **options})}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench.run(*words): the bench of one tiny op, through the command line, into tmp_path."""
    class Bench:
        cases = staticmethod(lambda sweep, world: [CASE])
        ways = staticmethod(lambda case, make: tiny())
        run = staticmethod(lambda *words: cli.main(["bench", "swiglu", "--device", "cpu", "--out", str(tmp_path), *words]))
    monkeypatch.setattr(bench_run, "load", lambda op: Bench)
    monkeypatch.setattr(roofs, "on_one", lambda *_: {"copy": {"1": {"1000": 1.0}}, "gemm": {"1": {"float32": 1.0}}})
    monkeypatch.setattr(command, "default_folder", lambda: tmp_path)
    monkeypatch.setattr(report, "plots", lambda *_: [])
    return Bench


def test_a_compile_that_does_not_end(monkeypatch):
    """It is given up at its limit, whatever it catches on its way; ours, and a peer as slow, are not."""
    def endless(x):
        while True:
            with contextlib.suppress(Exception):                      # as torch.compile does
                time.sleep(0.05)
    slow = []
    monkeypatch.setattr(harness, "COMPILE", 0.3)
    found = measured(tiny(lambda x: (slow or (time.sleep(0.5), slow.append(1)), x * 2)[1], **{"torch.compile": endless}))
    assert found["torch.compile"]["failed"].startswith("gave up after 0 s") and found["interlace"]["p50_us"] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_every_way_finds_the_same_caches(monkeypatch):
    """Before a sample the way itself has run, untimed; of a cold case nobody has, and the caches were streamed through."""
    ran = []
    way = lambda name: lambda x: (ran.append(name), x * 2)[1]  # noqa: E731
    monkeypatch.setattr(clocks.Clock, "sample", lambda self, fn, inner=1: (ran.append("timed"), fn(), 1e-4)[2])
    monkeypatch.setattr(clocks.Clock, "junk", type("", (), {"sum": lambda self: ran.append("flushed")})())
    for cold in (False, True):
        ran.clear()
        ways = Ways((torch.randn(8),), double, way("ours"), {"torch eager": way("torch"), "peer": way("peer")}, cold=cold)
        row = measured(ways, Case("double", "tiny", {"N": 8}, direction="fwd"), rounds=(9, 9))["interlace"]
        samples = [tuple(ran[i:i + 3]) for i in range(len(ran) - 3 * 27, len(ran), 3)]
        assert {*samples} == {("flushed" if cold else name, "timed", name) for name in ("ours", "torch", "peer")}
        assert row["cold"] is cold and len(row["samples_us"]) == 9


def test_two_places_in_memory_that_differ_are_noise():
    """A cold way is made twice and timed in turn: what differs between the two may differ between two runs."""
    made, case = [], Case("double", "tiny", {"N": 8}, direction="fwd")

    def fresh(slow):
        def make():
            made.append(slow * (len(made) % 2))
            wait = 2e-3 + made[-1]
            return lambda: (time.sleep(wait), torch.ones(8))[1]
        return Way(truth=lambda got: [torch.ones(8)], fresh=make)
    for slow in (0.0, 2e-2):
        made.clear()
        found = measured(Ways((), double, fresh(0.0), {"torch eager": fresh(slow)}, cold=True), case, rounds=(12, 12))
        assert len(found["torch eager"]["samples_us"]) == 12 and made == [0, 0, 0, slow]
        if slow:
            one, other = (statistics.median(found["torch eager"]["samples_us"][i::2]) for i in (0, 1))
            assert found["torch eager"]["noisy"] and max(one, other) > 1.5 * min(one, other)
    places = []
    x = torch.randn(8)
    measured(Ways((x,), double, lambda t: (places.append(t.data_ptr()), t * 2)[1], {}, cold=True), case, rounds=(9, 9))
    assert len({*places[-8:]}) == 2 and places[-2:] == places[-4:-2], "inputs in two places, in turn"


def test_two_sittings(monkeypatch):
    """The rows of the second hold the samples of the first too; a way that failed is not tried again. Two that are quiet and disagree are
    noise, however many samples each has: what a single sitting cannot see."""
    case, seconds, last = Case("double", "tiny", {"N": 8}, direction="fwd"), {"ours": 1e-3, "torch": 2e-3}, [""]

    def way(name):
        return lambda x: (last.__setitem__(0, name), x * 2)[1]

    def fails(x):
        raise ValueError("no")
    monkeypatch.setattr(clocks.Clock, "sample", lambda self, fn, inner=1: (fn(), seconds[last[0]])[1])
    ways = Ways((torch.randn(8),), double, way("ours"), {"torch eager": way("torch"), "peer": fails})
    first = measured(ways, case, rounds=(6, 6))
    assert {row.get("n") for row in first.values()} == {6, None} and first["torch eager"]["sitting"] == 1
    for torchs, ratio, noisy in ((2e-3, 2.0, False), (2.3e-3, 2.3, True)):
        seconds["torch"] = torchs
        second = measured(ways, case, rounds=(9, 9), earlier=first)
        assert {*second} == {"interlace", "torch eager"}, "one that failed is not tried again, and its row stays"
        row = second["torch eager"]
        assert (row["sitting"], row["n"], row["noisy"]) == (2, 15, noisy) and abs(row["ratio"] - ratio) < 1e-6
        assert row["samples_us"] == [2000.0] * 6 + [torchs * 1e6] * 9 and (row["error"], row["repeatable"]) == (0.0, True)
    loaded = {name: {**row, "busy_cores": 9.0} for name, row in first.items()}
    assert measured(ways, case, earlier=loaded)["interlace"]["loaded"], "as the first was"


def test_a_sweep_ends_in_time():
    """By its own estimate: all on a CPU under an hour, --quick under three minutes. torch.compile once for a function and type."""
    worlds = {"one": (1,), "many": (2,), "both": (1, 2)}
    for sweep, most in (("cpu", 3600), ("quick", 180)):
        every = [c for op, (ranks, _) in OPS.items() for w in worlds[ranks] for c in bench_run.load(op).cases(sweep, w)]
        assert command._estimate(every, sweep) < most
        tried = [(c.call, c.dtype, c.world) for c in every if c.compiled]
        assert tried and len({*tried}) == len(tried)
    case = next(c for c in bench_run.load("swiglu").cases("cpu", 1) if not c.compiled)
    assert "at one shape of a function" in bench_run.load("swiglu").ways(case, Make(case, "cpu")).absent()["torch.compile"]


def test_cache_bytes():
    assert 1 << 18 <= clocks.cache_bytes() <= 1 << 33


def test_memory_is_bounded():
    """A shape that Linux would promise and then kill for is an error, and the limit goes when the sweep ends."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bench_run._bounded_memory(1):
        with pytest.raises((RuntimeError, MemoryError)) as e:
            torch.empty(bench_run.free_memory() // 4)
        assert harness.failure(e.value).startswith("out of memory")
        torch.ones(1 << 20)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with bench_run._bounded_memory(0):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_resume(bench, tmp_path, capsys, monkeypatch):
    """Ctrl-C after the first case, and in the second sitting: kept, its run is gone on with, and what was measured is not measured
    again. Other code: refused."""
    every, made = [CASE, Case("double", "other", {"N": 8})], []
    bench.cases = staticmethod(lambda sweep, world: every)

    def ways(case, make):
        made.append(case.name)
        if len(made) in (2, 4):
            raise KeyboardInterrupt
        return tiny()
    bench.ways = staticmethod(ways)
    assert bench.run("--quick") == 130
    out, err = capsys.readouterr()
    assert "the same command with --resume goes on" in err and "double tiny" in out
    path = tmp_path / "swiglu.jsonl"
    path.write_text(path.read_text() + '{"half a')                    # killed amid a line
    assert bench.run("--quick", "--resume") == 130 and "4 rows" in capsys.readouterr().out, "in the second sitting: the first's are kept"
    assert bench.run("--quick", "--resume") == 0 and made == ["tiny", "other", "other", "tiny", "tiny", "other"]
    out, err = capsys.readouterr()
    assert "goes on with run" in err and "double tiny" in out and "double other" in out and "4 rows" in out
    assert all(row["sitting"] == 2 and row["n"] == len(row["samples_us"]) >= 10 for row in rows.read(tmp_path, "swiglu", "")), "of both"
    assert bench.run("--resume") == 0 and "nothing to go on with" in capsys.readouterr().err, "another sweep"
    monkeypatch.setattr(bench_run, "provenance", lambda seed=0: {**provenance(seed), "commit": "123"})
    assert bench.run("--quick", "--resume") == 2 and "this is commit 123" in capsys.readouterr().err


def test_what_cannot_be_built_twice(bench, tmp_path, capsys):
    """A case that failed is not built again in the second sitting; one that then fails keeps the figures of the first."""
    bench.cases = staticmethod(lambda sweep, world: [CASE, Case("double", "other", {"N": 8})])
    made, fails = [], {0, 2}

    def ways(case, make):
        made.append(case.name)
        if len(made) - 1 in fails:
            raise MemoryError("out of memory")
        return tiny()
    bench.ways = staticmethod(ways)
    assert bench.run("--quick") == 0 and made == ["tiny", "other", "other"]
    assert "no second sitting, the first's figures stand: out of memory" in capsys.readouterr().err
    found = {(r["case"]["name"], r["way"]): r for r in rows.read(tmp_path, "swiglu", "")}
    assert "out of memory" in found["tiny", "interlace"]["failed"] and len(found) == 3
    assert all(found["other", way]["sitting"] == 1 and found["other", way]["p50_us"] > 0 for way in ("interlace", "torch eager"))
    assert bench.run("--quick", "--resume") == 0 and made == ["tiny", "other", "other", "other"], "that case is tried again"
    assert all(r["sitting"] == 2 for r in rows.read(tmp_path, "swiglu", "") if "p50_us" in r)


def test_seconds_are_shared(bench, capsys):
    """A case of every function and pass comes first; what is left out is said. Time that is over still buys one case."""
    shapes = [Case(call, name, {"N": 8}, direction=d) for call in ("a", "b") for name in ("s", "t") for d in ("fwd", "bwd")]
    bench.cases = staticmethod(lambda sweep, world: shapes)
    assert [(c.call, c.name, c.direction) for c in bench_run._by_turns(shapes)][:4] == [
        ("a", "s", "fwd"), ("a", "s", "bwd"), ("b", "s", "fwd"), ("b", "s", "bwd")]
    assert bench.run("--quick", "--seconds", "1e-9") == 0
    out, err = capsys.readouterr()
    assert "swiglu: its share of --seconds is over, 7 of 8 cases are left out" in err and "2 rows in" in out
    assert bench.run("--quick", "--seconds", "600", "--resume") == 0 and "16 rows in" in capsys.readouterr().out
    assert bench.run("--seconds", "0") == 2 and "--seconds must be > 0" in capsys.readouterr().err


def test_one_op_that_dies_does_not_end_the_sweep(monkeypatch, tmp_path, capsys):
    """Without --quick an op at a time: after one whose ranks died the next is measured; after Ctrl-C none is."""
    launched = []
    for status in (1, 130):
        launched.clear()
        monkeypatch.setattr(command, "launch", lambda ranks, target, job, status=status, **_: (
            launched.append((ranks, *job["names"])), status)[1])
        args = cli._parser().parse_args(["bench", "--device", "cpu"])
        assert command._measure(args, ["rope", "gemm_ar", "dispatch"], tmp_path, 2, "r") == status
        assert launched == [(1, "rope"), (2, "gemm_ar"), (2, "dispatch")][:3 if status == 1 else 1]
    err = capsys.readouterr().err
    assert "with --resume goes on" in err and "gemm_ar: 120 cases; " in err and " left" in err


# ---- README's table -------------------------------------------------------------------------------------------


def test_every_row_of_the_readme_has_its_figures():
    """And every figure names cases of a bench."""
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and line.count(" | ") >= 3]
    for line in table[1:]:
        assert sum(line.startswith(f"| {start}") for start in readme.CELLS) == 1, line
    for cell in readme.CELLS.values():
        for figure in readme.figures(cell):
            bench, _, world, _, found = readme.cases(figure)
            assert bench in OPS and all(c.world == world for c in found)
    with pytest.raises(ValueError, match="must name cases of a bench"):
        readme.cases("cpu/rope/rope/no-model/torch eager")


def test_readme_is_made_of_the_rows(monkeypatch, tmp_path, capsys):
    """Figures come from the newest rows, losses are bold, doubts marked; a cell without rows stays; no row of a cell: refused."""
    monkeypatch.setattr(readme, "CELLS", {"`rope`": "{quick/rope/rope/small/torch eager} of theirs",
                                          "`swiglu`": "{quick/swiglu/swiglu/small+odd/torch eager} of theirs",
                                          "`gelu`": "{quick/gelu/gelu/small/torch eager/fwd}"})
    page = tmp_path / "README.md"
    page.write_text("with torch 1.0, 1 May 2001\n| `rope` | a | by hand |\n| `swiglu` | b | by hand |\n| `gelu` | c | by hand |\n")
    for run, by in (("1", 9.0), ("2", 1.0)):
        for figure in ("quick/rope/rope/small/torch eager", "quick/swiglu/swiglu/small+odd/torch eager"):
            bench, _, _, way, found = readme.cases(figure)
            for case, ratio in zip(found, (0.5, 12.34, 2.0, 3.0)):
                made = [{"schema": harness.SCHEMA, "op": bench, "way": w, "case": case.key(), "device": "cpu", "ratio": by * r,
                         "p50_us": 1.0, "noisy": False, "loaded": bench == "swiglu"} for w, r in (("interlace", 1.0), (way, ratio))]
                rows.append(tmp_path, bench, made, run, {})
    monkeypatch.setattr(command, "default_folder", lambda: tmp_path)
    assert readme.main(["--check"], page) == 1 and "by hand" in page.read_text()
    assert readme.main([], page) == 0
    first, rope, swiglu, gelu, _ = page.read_text().split("\n")
    assert rope == "| `rope` | a | **0.50x** / 12x of theirs |" and swiglu == "| `swiglu` | b | **0.50x** to 12x? of theirs |"
    assert gelu == "| `gelu` | c | by hand |" and "kept as it is, `gelu`: no rows of quick/gelu" in capsys.readouterr().out
    assert first.startswith(f"with torch {'.'.join(torch.__version__.split('.')[:2])}, ") and not first.endswith("2001")
    assert readme.main(["--check"], page) == 0
    page.write_text("| `rope` | a | by hand |\n")
    assert readme.main([], page) == 2 and "one row of the table must begin with `swiglu`, got 0" in capsys.readouterr().err


def test_readme_measures_its_own_cases(monkeypatch, tmp_path):
    jobs = []
    monkeypatch.setattr(readme, "launch", lambda world, target, job, again: (jobs.append((world, job)), 0)[1])
    assert readme.measure(["gemm_ar", "train_step"], tmp_path) == 0
    assert [(w, j["names"], j["sweep"], len(j["only"])) for w, j in jobs] == [
        (1, ["train_step"], "cpu", 1), (2, ["gemm_ar"], "cpu", 2), (2, ["gemm_ar"], "quick", 2), (2, ["train_step"], "cpu", 5),
        (2, ["gemm_ar"], "quick", 2)]
    assert [j["sitting"] for _, j in jobs] == [1, 1, 1, 1, 2], "a sweep between the two"
    assert len({j["run"] for _, j in jobs}) == 1


def test_rows_of_a_cpu_that_onednn_holds_back_are_another_machines(monkeypatch):
    free = machine.__wrapped__()
    monkeypatch.setattr("interlace.bench.provenance.ONEDNN_ISA", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.__wrapped__() == free + "-onednn-avx2" * (not torch.cuda.is_available())
    assert provenance()["environment"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
