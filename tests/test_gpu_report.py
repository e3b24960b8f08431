"""The runner of the GPU report, with stand-ins for its parts: what is cut short leaves what it had, and says so."""
import json
import os
import shutil
import subprocess
import sys
import tarfile

import pytest

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
    assert sum(seconds for seconds, _ in parts.values()) <= 500      # under 9 minutes with the build
    for file in gpu_report.SMALL:
        assert (gpu_report.ROOT / file).exists()
    with pytest.raises(SystemExit) as wrong:
        sys.argv, kept = ["gpu_report", "--part", "nonsense"], sys.argv
        try:
            gpu_report.main()
        finally:
            sys.argv = kept
    assert wrong.value.code == 2


def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "interlace.bench.gpu_report"], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "needs a CUDA device" in done.stderr and "Traceback" not in done.stderr


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
    monkeypatch.setattr(gpu_report, "commands", lambda: {"bench": (2, [slow])})
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
