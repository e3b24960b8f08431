"""The runner of the GPU report, with stand-ins for its parts: what is cut short leaves what it had, and says so."""
import os
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
