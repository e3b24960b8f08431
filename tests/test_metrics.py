import io
import json
import sys

import pytest

from interlace.models.metrics import MetricsLog, Progress, _clock, _smooth, plot_loss, read_metrics


def row(step, loss=2.0):
    return {"step": step, "loss": loss, "grad_norm": 1.5, "lr": 1e-3, "tokens_per_second": 1234.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rows_are_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "new")
    log.write(row(1))
    assert read_metrics(tmp_path / "new") == [row(1)]
    log.close()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(row(step, loss=1 / 3 + step))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')                                    # a crash in the middle of a line
    log = MetricsLog(tmp_path, step=3)
    log.write(row(4, loss=9.0))
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3, 4] and lines[3]["loss"] == 9.0 and lines[0]["loss"] == 1 / 3 + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    file = io.StringIO()
    progress = Progress(tmp_path, 0, 7, every=3, file=file)
    for step in range(1, 8):
        progress.update(row(step))
    progress.close()
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert "loss 2.0000" in lines[0] and "1,234 tokens/s" in lines[0] and lines[2].endswith("0:00 left")


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    file = Terminal()
    progress = Progress("runs/a", 2, 4, file=file)
    progress.update(row(3, loss=1.25))
    progress.close()
    progress.close()
    assert "loss 1.2500" in file.getvalue() and "3/4" in file.getvalue() and "1,234 tokens/s" in file.getvalue()
    assert "left" in file.getvalue() and file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_clock():
    assert [_clock(s) for s in (0, 59.9, 61, 3600 + 62)] == ["0:00", "0:59", "1:01", "1:01:02"]


def test_loss_png(tmp_path, monkeypatch):
    assert plot_loss(tmp_path) is None                                # nothing to draw
    log = MetricsLog(tmp_path)
    for step in range(1, 30):
        log.write(row(step, loss=5 / step))
    log.close()
    pytest.importorskip("matplotlib")
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = io.StringIO()
    assert plot_loss(tmp_path, file=file) is None and "pip install matplotlib" in file.getvalue()


def test_smooth_starts_at_the_first_value():
    assert _smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    assert _smooth([4.0, 2.0]) == [4.0, 2.0]                          # a short run is drawn as it is
    long = _smooth([float(i % 2) for i in range(2000)])
    assert long[0] == 0.0 and all(0.4 < v < 0.6 for v in long[100:])
