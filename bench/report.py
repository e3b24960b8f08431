"""Rows made readable: one table, losses shown like wins, and plots of time and of percent of the roof against size.

`python -m interlace.bench.report FOLDER` makes them of the newest run in a folder of rows, whatever became of the run.
"""
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .harness import BOUNDS, GRAPH

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
    peers = [r for r in rows if "p50_us" in r and r["way"] not in BOUNDS and not r["way"].startswith("interlace")
             and not r["way"].endswith(GRAPH)]                        # ours is not in one
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
    """<op>.png and <op>.svg: two panels per function, type and pass; [] where matplotlib is not installed."""
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
        figure, axes = _axes(Figure, len(groups))
        colours = {way: f"C{i}" for i, way in enumerate(dict.fromkeys(r["way"] for r in rows if r["op"] == op))}
        for (top, bottom), (title, of) in zip(axes, groups.items()):
            _panel(top, bottom, title, of, colours)
        ways = {label: line for top, _ in axes for line, label in zip(*top.get_legend_handles_labels())}
        figure.legend(ways.values(), ways, fontsize=8, ncols=min(6, len(ways)), loc="upper center")
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "svg"):
            made.append(folder / f"{op}.{kind}")
            figure.savefig(made[-1], dpi=90)
    return made


def _axes(figure: Any, panels: int) -> tuple[Any, list[tuple[Any, Any]]]:
    """A figure and its pairs of axes, time above percent, four pairs to a line."""
    across = min(4, panels)
    down = -(-panels // across)
    width, height = 4.2 * across, 0.8 + 5.5 * down                    # inches. No layout engine: it takes longer than all the drawing
    made = figure(figsize=(width, height))
    every = made.subplots(2 * down, across, squeeze=False)
    made.subplots_adjust(0.9 / width, 0.5 / height, 1 - 0.1 / width, 1 - 0.8 / height, wspace=0.33, hspace=0.35)
    pairs = [(every[2 * line][i], every[2 * line + 1][i]) for line in range(down) for i in range(across)]
    for top, bottom in pairs[panels:]:
        top.remove()
        bottom.remove()
    return made, pairs[:panels]


def _panel(top: Any, bottom: Any, title: str, rows: list[Row], colours: dict[str, str]) -> None:
    """A way has one colour in all panels. Size: FLOPs where there are many to a byte, as in a GEMM, whose shapes may share their bytes."""
    from matplotlib.ticker import LogLocator, NullFormatter
    by = "flops" if any(r["flops"] > 40 * r["bytes"] for r in rows) else "bytes"
    size = lambda r: r[by] or 1  # noqa: E731
    for way in dict.fromkeys(r["way"] for r in rows):
        mine = sorted((r for r in rows if r["way"] == way), key=size)
        x, style = [size(r) for r in mine], {"color": colours[way], "ls": ":" if way in BOUNDS else "-", "marker": "."}
        top.plot(x, [r["p50_us"] for r in mine], label=way, **style)
        top.fill_between(x, [r["p20_us"] for r in mine], [r["p80_us"] for r in mine], alpha=0.15, color=colours[way])
        bottom.plot(x, [r["roof_percent"] if r["roof_percent"] is not None else float("nan") for r in mine], **style)
        if way == "interlace":
            for r, at in zip(mine, x):
                bottom.annotate(r["case"]["name"], (at, r["roof_percent"] or 0), fontsize=5, rotation=60, alpha=0.7,
                                xytext=(0, 3), textcoords="offset points")
    top.set(xscale="log", yscale="log", title=title, ylabel="us, p50 and p20 to p80")
    top.title.set_fontsize(8)
    bottom.axhline(100, color="grey", lw=0.5)
    bottom.set(xscale="log", xlabel={"flops": "FLOPs"}.get(by, by), ylabel="% of this machine's roof")
    bottom.set_ylim(bottom=0)
    for panel in (top, bottom):
        panel.xaxis.set_major_locator(LogLocator(10, (1.0, 3.0), numticks=6))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(which="both", labelsize=7)
        panel.xaxis.label.set_fontsize(8)
        panel.yaxis.label.set_fontsize(8)


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
