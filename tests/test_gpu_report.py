"""The runner of the GPU report, with stand-ins for its parts: what is cut short leaves what it had, and says so."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from interlace import cli
from interlace.bench import gpu_report


def run(tmp_path, seconds, *programs):
    return gpu_report.run_part(seconds, [[sys.executable, "-c", p] for p in programs], tmp_path / "part.log")


def test_parts_are_ok_or_failed(tmp_path):
    assert run(tmp_path, 60, "print('one')", "print('two')")[0] == "ok"
    text = (tmp_path / "part.log").read_text()
    assert "one" in text and "two" in text and text.count("$ ") == 2
    assert run(tmp_path, 60, "raise SystemExit(3)", "print('still')")[0] == "failed"
    assert "still" in (tmp_path / "part.log").read_text()
    assert gpu_report.run_part(9, [["/no/such/program"]], tmp_path / "part.log")[0] == "failed"


def test_a_part_that_is_cut_short_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "MEASURED", tmp_path / "measured")
    program = (f"import os, time; os.mkdir({str(tmp_path / 'measured')!r}); "
               f"open({str(tmp_path / 'measured' / 'rows.jsonl')!r}, 'w').write('row'); print('begun', flush=True); time.sleep(60)")
    verdict, took = run(tmp_path, 3, program)
    assert verdict == "cut short" and took < 20
    assert "begun" in (tmp_path / "part.log").read_text()
    with tarfile.open(tmp_path / "bench.tar.gz") as tar:
        assert "bench/rows.jsonl" in tar.getnames()


def test_time_fits_and_parts_name_real_things():
    parts = gpu_report.commands()
    afterwards = sum(seconds for seconds, _ in gpu_report.AFTERWARDS.values())
    assert sum(seconds for seconds, _ in parts.values()) - parts["build"][0] + afterwards <= gpu_report.TOTAL - 40   # s of a build
    assert gpu_report.TOTAL < 540
    assert parts["build"][0] * gpu_report.shares(parts, gpu_report.TOTAL) > 120
    for _, todo in parts.values():
        for command in todo:
            if "interlace" in command:                                # the flags are ours
                cli._parser().parse_args(command[3:])


def test_the_sanitizers_cases_are_tests():
    """One name that is none, and pytest would run nothing."""
    files = sorted({name.split("::")[0] for name in gpu_report.SMALL})
    done = subprocess.run([*gpu_report.PYTEST, "-o", "addopts=", "--collect-only", "-q", *files], cwd=gpu_report.ROOT, capture_output=True,
                          text=True)
    assert {*gpu_report.SMALL} <= {*done.stdout.splitlines()}, done.stderr
    assert len({*gpu_report.SMALL}) == len(gpu_report.SMALL) <= 15, "a second each, and the imports, in 37 s"


def test_a_command_that_has_less_time_plans_with_it(tmp_path):
    out, told = tmp_path / "out", tmp_path / "told"
    out.mkdir()
    program = f"import sys; open({str(told)!r}, 'w').write(sys.argv[2])"
    parts = {"doctor": (100.0, [[sys.executable, "-c", program, "--seconds", "80"]])}
    assert gpu_report.report(out, [], parts, time.monotonic() + 50) == 0
    assert 38 <= float(told.read_text()) <= 40


@pytest.mark.parametrize("left, wanted", [(525, 1.0), (10000, 1.0), (242.5, 0.5), (-30, 0.05)])
def test_a_slow_build_leaves_every_part_less(left, wanted):
    others = {name: part for name, part in gpu_report.commands().items() if name != "build"}
    assert gpu_report.shares(others, left) == pytest.approx(wanted)


def test_a_part_comes_after_the_build(tmp_path, monkeypatch, capsys):
    """One part alone is built first too; a build that fails is said, and the part runs all the same."""
    program = lambda text: [[sys.executable, "-c", text]]  # noqa: E731
    monkeypatch.setattr(gpu_report, "commands", lambda: {
        "build": (60, program("raise SystemExit('no compiler')")), "doctor": (60, program("print('well')")), "tests": (60, program("1"))})
    monkeypatch.setattr(gpu_report, "MEASURED", tmp_path / "measured")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(tmp_path / "out"), "--part", "doctor"])
    assert gpu_report.main() == 1
    said = [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["gpu-report: build: failed", "gpu-report: doctor: ok"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"build.log", "doctor.log", "report.md"}
    assert "no compiler" in (tmp_path / "out" / "build.log").read_text()


def test_every_command_has_its_share(tmp_path):
    """The first of two hangs: the second runs all the same. And it may sum up when it is stopped."""
    program = ("import time\ntry:\n    print('begun', flush=True); time.sleep(60)\n"
               "except KeyboardInterrupt:\n    print('summed up')")
    verdict, took = run(tmp_path, 24, program, "print('second')")
    text = (tmp_path / "part.log").read_text()
    assert verdict == "cut short" and took < 50 and "second" in text and "... cut short after 12 s" in text
    assert "summed up" in text or "begun" not in text, "a loaded machine may not even begin it"


def test_children_of_a_command_die_with_it(tmp_path):
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); print(p.pid)"
    assert run(tmp_path, 60, child)[0] == "ok"
    pid = int((tmp_path / "part.log").read_text().split()[-1])
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if "Z" in pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]:
                return                                                # dead, not yet collected by init
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("it lives")


def test_files_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "LARGEST", 5000)
    measured = tmp_path / "measured"
    (measured / "plots").mkdir(parents=True)
    monkeypatch.setattr(gpu_report, "MEASURED", measured)
    (measured / "roofs.json").write_text("{}")
    (measured / "rope.jsonl").write_text("row")
    (measured / "plots" / "rope.png").write_bytes(os.urandom(9000))
    out = tmp_path / "out"
    out.mkdir()
    assert gpu_report.run_part(60, [[sys.executable, "-c", "print('first'); print('x' * 20000); print('last')"]], out / "a.log")[0] == "ok"
    text = (out / "a.log").read_text()
    assert "first" in text and "last" in text and "bytes left out" in text and len(text) <= 5000
    with tarfile.open(out / "bench.tar.gz") as tar:
        assert {*tar.getnames()} == {"bench", "bench/roofs.json", "bench/rope.jsonl"}
    (measured / "rope.jsonl").write_text(os.urandom(9000).hex())
    gpu_report.pack(out)
    with tarfile.open(out / "bench.tar.gz") as tar:
        assert {*tar.getnames()} == {"bench", "bench/roofs.json"}


def test_a_machine_that_refuses_the_sanitizer(tmp_path):
    assert run(tmp_path, 60, "print('Error: Device not supported'); raise SystemExit(1)")[0] == "cannot run on this machine"


def test_nothing_is_written_to_home(tmp_path):
    shown = "import os; print([os.environ[n] for n in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR', 'XDG_CACHE_HOME', 'MPLCONFIGDIR')])"
    assert run(tmp_path, 60, shown)[0] == "ok"
    assert (tmp_path / "part.log").read_text().count(str(gpu_report.ROOT / "build" / "cache")) == 4


def report(*words, **env):
    return subprocess.run([sys.executable, "-m", "interlace.bench.gpu_report", *words], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **env})


def test_an_unknown_part():
    done = report("--part", "nonsense")
    assert done.returncode == 2 and "must be one of build, doctor, tests, bench, sanitizer, got nonsense" in done.stderr


def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    """And which commands it would run; nothing is run, nothing is written. Without torch too."""
    done = report("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "runs on a machine with one NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
    assert "missing here: a CUDA device" in done.stdout and "--tool racecheck" in done.stdout and "-m gpu" in done.stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')")
    done = report("--part", "doctor", "--dry-run", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 2 and "a CUDA build of torch: this is none" in done.stdout and "--tool" not in done.stdout
    assert "Traceback" not in done.stderr, done.stderr


def test_table_and_plots_come_from_the_rows(tmp_path, monkeypatch, capsys):
    """A bench that is killed at its limit: the rows it wrote still become a table and plots, in the log and in the archive."""
    measured, out = tmp_path / "measured", tmp_path / "out"
    shutil.copytree(gpu_report.ROOT / "bench" / "results" / "amd-epyc-2c-avx512", measured)
    rows = (measured / "rope.jsonl").read_text().splitlines()
    last = {**json.loads(rows[-1]), "run": "99991231T000000-1"}
    (measured / "rope.jsonl").write_text("\n".join([*rows, json.dumps(last), json.dumps(last)[:90]]))   # killed amid a line
    monkeypatch.setattr(gpu_report, "MEASURED", measured)
    monkeypatch.setattr(gpu_report, "AFTERWARDS", {"bench": (60, [*gpu_report.AFTERWARDS["bench"][1][:-1], str(measured)])})
    slow = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    monkeypatch.setattr(gpu_report, "commands", lambda: {"bench": (8, [slow])})
    monkeypatch.setattr(gpu_report.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a card")
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--out", str(out)])
    assert gpu_report.main() == 1
    log = (out / "bench.log").read_text()
    assert "begun" in log and "best peer" in log and "1 rows; 2 plots" in log and "| bench | cut short |" in (out / "report.md").read_text()
    with tarfile.open(out / "bench.tar.gz") as tar:
        assert {"bench/rope.jsonl", "bench/plots/rope.png", "bench/plots/rope.svg"} <= {*tar.getnames()}
    assert len([*out.iterdir()]) <= 8
