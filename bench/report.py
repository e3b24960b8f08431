"""Rows made readable: one table, losses shown like wins, and plots of time and of percent of the roof against size.

`python -m interlace.bench.report FOLDER` makes them of the newest run in a folder of rows, whatever became of the run.
"""
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .harness import BOUNDS

__all__ = ["WRONG", "footnotes", "plots", "table"]

WRONG = 0.5                                                           # an error of half the largest value is no rounding

Row = dict[str, Any]
HEAD = ("op", "case", "ours us", "best peer", "peer us", "ratio", "error", "same bits", "% of roof", "overlap", "")


def _cases(rows: list[Row]) -> dict[tuple, list[Row]]:
    cases: dict[tuple, list[Row]] = defaultdict(list)
    for r in rows:
        cases[(r["op"], *r["case"].items())].append(r)
    return cases


def _words(case: dict[str, Any]) -> str:
    skip = {"call", "dtype", "pass", "world"}
    short = {"float32": "fp32", "bfloat16": "bf16"}
    sizes = " ".join(str(v) if k == "name" else f"{k}{v}" for k, v in case.items() if k not in skip)
    return f"{case['call']} {sizes} {short.get(case['dtype'], case['dtype'])} {case['pass']}" + f" x{case['world']}" * (case["world"] > 1)


def _line(rows: list[Row]) -> tuple[str, ...]:
    ours = next((r for r in rows if r["way"] == "interlace"), rows[0])
    peers = [r for r in rows if "p50_us" in r and r["way"] not in BOUNDS and not r["way"].startswith("interlace")]
    best = min(peers, key=lambda r: r["p50_us"], default=None)
    start, theirs = (ours["op"], _words(ours["case"])), (best["way"], f"{best['p50_us']:.1f}") if best else ("none", "")
    if "p50_us" not in ours:
        return (*start, ours["failed"], *theirs, "", "", "", "", "", "failed")
    mark = " ".join(w for w, on in (("noisy", ours["noisy"] or (best or ours)["noisy"]), ("loaded", ours["loaded"])) if on)
    ratio = f"{best['ratio']:.2f}" if best else ""
    roof = f"{ours['roof_percent']:.0f} {ours['roof']}" if ours["roof_percent"] else ""
    hidden = f"{ours['overlap']:.2f}" if ours["overlap"] is not None else ""
    same = "yes" if ours["repeatable"] else "no"
    return (*start, f"{ours['p50_us']:.1f}", *theirs, ratio, f"{ours['error']:.1e}", same, roof, hidden, mark)


def table(rows: list[Row]) -> None:
    """Ratio: the best peer's time over ours, above 1 ours is faster."""
    lines = [_line(r) for r in _cases(rows).values()]
    if not sys.stdout.isatty():
        width = [max(len(line[i]) for line in (HEAD, *lines)) for i in range(len(HEAD))]
        for line in (HEAD, *lines):
            print("  ".join(text.ljust(w) for text, w in zip(line, width)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    t = Table(*HEAD, box=None, header_style="bold")
    for line in lines:
        ratio = float(line[5] or 1)
        style = "yellow" if line[-1] else "green" if ratio > 1.05 else "red" if ratio < 0.95 else None
        t.add_row(*line, style=style)
    Console().print(t)


def footnotes(rows: list[Row]) -> list[str]:
    """What the table must not hide: peers that are absent and why, ways that failed, errors larger than torch's."""
    absent: dict[str, list[str]] = defaultdict(list)
    for r in rows:
        for name, why in r.get("absent", {}).items():
            if r["op"] not in absent[f"{name}: {why}"]:
                absent[f"{name}: {why}"].append(r["op"])
    lines = [f"absent: {what} ({', '.join(ops)})" for what, ops in absent.items()]
    lines += [f"failed: {r['op']} {_words(r['case'])}, {r['way']}: {r['failed']}" for r in rows if "failed" in r]
    for case in _cases(rows).values():
        by = {r["way"]: r for r in case if "error" in r}
        mine, eager = by.get("interlace"), next((r for w, r in by.items() if w.startswith("torch ")), None)
        if mine and not mine["error"] <= WRONG:
            lines.append(f"WRONG: {mine['op']} {_words(mine['case'])}: ours errs by {mine['error']:.1e} of the largest value")
        elif mine and eager and mine["error"] > 2 * eager["error"] + 1e-6:
            lines.append(f"error: {mine['op']} {_words(mine['case'])}: ours {mine['error']:.1e}, {eager['way']} {eager['error']:.1e}")
    return lines


def plots(rows: list[Row], folder: Path) -> list[Path]:
    """<op>.png and <op>.svg: a column of panels per function, type and pass; [] where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("bench: no plots, matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return []
    matplotlib.use("agg")
    from matplotlib.figure import Figure
    made: list[Path] = []
    for op in dict.fromkeys(r["op"] for r in rows):
        groups: dict[str, list[Row]] = defaultdict(list)
        for r in rows:
            if r["op"] == op and "p50_us" in r:
                groups[f"{r['case']['call']} {r['case']['dtype']} {r['case']['pass']}"].append(r)
        if not groups:
            continue
        figure = Figure(figsize=(4.2 * len(groups), 6), layout="constrained")
        axes = figure.subplots(2, len(groups), squeeze=False)
        for column, (title, of) in enumerate(groups.items()):
            _panel(axes[0][column], axes[1][column], title, of)
        axes[0][0].legend(fontsize=7)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            made.append(folder / f"{op}.{kind}")
            figure.savefig(made[-1], dpi=80)
    return made


def _panel(top: Any, bottom: Any, title: str, rows: list[Row]) -> None:
    for way in dict.fromkeys(r["way"] for r in rows):
        mine = sorted((r for r in rows if r["way"] == way), key=lambda r: (r["bytes"] or r["flops"]))
        x = [r["bytes"] or r["flops"] or 1 for r in mine]
        style = ":" if way in BOUNDS else "-"
        top.plot(x, [r["p50_us"] for r in mine], style, marker=".", label=way)
        top.fill_between(x, [r["p20_us"] for r in mine], [r["p80_us"] for r in mine], alpha=0.15)
        bottom.plot(x, [r["roof_percent"] if r["roof_percent"] is not None else float("nan") for r in mine], style, marker=".")
    top.set(xscale="log", yscale="log", title=title, ylabel="us, p50 and p20 to p80")
    top.title.set_fontsize(8)
    bottom.set(xscale="log", xlabel="bytes" if rows[0]["bytes"] else "FLOPs", ylabel="% of this machine's roof")


def main(folder: Path) -> int:
    from .rows import read_newest
    rows = read_newest(folder)
    if not rows:
        print(f"bench: there are no rows in {folder}", file=sys.stderr)
        return 2
    table(rows)
    for line in footnotes(rows):
        print(line)
    print(f"{len(rows)} rows; {len(plots(rows, folder / 'plots'))} plots in {folder / 'plots'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
