"""What a run tells: metrics.jsonl for programs, a progress bar for a person, loss.png for both."""
from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

__all__ = ["MetricsLog", "Progress", "plot_loss", "read_metrics"]


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that a crash cut short is left out."""
    path, rows = Path(out) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class MetricsLog:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is written."""

    def __init__(self, out: str | Path, step: int = 0):
        """step: the step that the run resumes from; later lines, of an earlier try, are dropped."""
        path = Path(out) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rows = [r for r in read_metrics(out) if r.get("step", 0) <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(r) + "\n" for r in rows))
            temporary.replace(path)                                   # a crash leaves the old file or the new one
        self._file = open(path, "a")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Progress:
    """A bar on a terminal with loss, tokens/s and time left; elsewhere one plain line every `every` steps."""

    def __init__(self, out: str | Path, step: int, max_steps: int, *, every: int = 1, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._every, self._first, self._max = max(1, every), step, max_steps
        self._start, self._bar = time.monotonic(), None
        if self._file.isatty():
            self._bar = self._make_bar()
            self._task = self._bar.add_task(str(out), total=max_steps, completed=step, text="starting")
            self._bar.start()

    def _make_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
        return Bar(TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[text]}"),
                   console=Console(file=self._file), refresh_per_second=4)

    def update(self, row: dict[str, Any]) -> None:
        """After each step, with the row of metrics.jsonl: step, loss, tokens_per_second are shown."""
        step = row["step"]
        done = step - self._first
        left = _clock((time.monotonic() - self._start) / done * (self._max - step)) if done > 0 else "-"
        if self._bar is not None:
            text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  {left} left"
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._every == 0 or step == self._max:
            norm = f"  grad_norm {row['grad_norm']:.3f}" if row.get("grad_norm") is not None else ""
            print(f"step {step}/{self._max}  loss {row['loss']:.4f}{norm}  {row['tokens_per_second']:,.0f} tokens/s  "
                  f"{left} left", file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02d}:{int(seconds) % 60:02d}" if hours else f"{minutes}:{int(seconds) % 60:02d}"


def plot_loss(out: str | Path, *, file: TextIO | None = None) -> Path | None:
    """metrics.jsonl -> loss.png in `out`. Returns its path; without matplotlib None, and says how to get it."""
    rows = [r for r in read_metrics(out) if "loss" in r]
    if not rows:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("interlace: no loss.png without matplotlib: pip install matplotlib", file=file or sys.stderr, flush=True)
        return None
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth = _smooth(losses)
    axes.plot(steps, losses, color="#9db7d5", linewidth=0.8, marker="." if len(rows) < 3 else None, label="each step")
    axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label="running mean")
    axes.set(xlabel="step", ylabel="loss (nats per token)",
             title=f"{os.fsencode(Path(out).name).decode(errors='replace')}: {losses[0]:.3f} to {smooth[-1]:.3f}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path = Path(out) / "loss.png"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _smooth(values: list[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the run, unbiased from the first value on."""
    out, total, weight, keep = [], 0.0, 0.0, max(0.0, 1 - 20 / len(values))
    for v in values:
        total, weight = keep * total + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
