"""Where a step's time goes: one trace of all ranks on one clock, and their compute, communication and waiting summed up.

    profile = Profile(folder, "trace", rank, world, skip=2, steps=3)      profile.step() after every step, profile.close() at the end
    profile = Profile(folder, "gemm_ar", rank, world)                     start(), with window(label): ..., stop(), close()

Leaves <name>.json (Chrome trace: ui.perfetto.dev, chrome://tracing; every rank is a process) and <name>.png, and prints shares.
Events   torch.profiler's, and the heap's: every collective over shared memory and every wait in it (csrc/runtime/spans.cpp)
Clock    both tell CLOCK_REALTIME, one for all processes of a host; torch as microseconds from `baseTimeNanoseconds`. Ranks of
         several hosts are as far apart as their clocks.
Kinds    waiting        from the first look at a signal that has not come to the look that finds it
         communication  a collective without its waits; of gloo and NCCL, which do not tell them apart, all of it
         compute        a torch or interlace op; on CUDA, where only what the device did counts, any other kernel or copy
         other          none of them: Python between ops, an idle device
Shares   of the time inside the windows: of kinds that run at once (threads, streams) compute counts first, then communication,
         so they sum to 1. hidden: the part of communication and waiting during which the rank computed.
Cost     none while no profile is on. With one, about 1 us an op (torch) and 1 us a collective (4 bytes: 1.7 us become 2.7).
"""
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ..kernels.comm import heap

__all__ = ["KINDS", "Profile", "kind", "merge", "sets", "shares"]

Event = dict[str, Any]
Parts = list[tuple[float, float]]                                     # disjoint, in order
KINDS = ("waiting", "communication", "compute")                       # of two that nest in one thread or stream the earlier counts
WINDOW = "interlace: "                                                # begins the name of what is summed up, " #i" ends it
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
MOVES = re.compile(r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|multimem|memcpy ptop", re.IGNORECASE)
WAITS = re.compile(r"wait_signal|wait_value|barrier", re.IGNORECASE)
PATIENCE, AT_THE_END = 60.0, 10.0                                     # seconds for the parts of other ranks; when ranks are stopped


# ---- arithmetic of times --------------------------------------------------------------------------------------


def union(spans: Iterable[tuple[float, float]]) -> Parts:
    out: Parts = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(out[-1][1], end)
        elif begin < end:
            out.append((begin, end))
    return out


def minus(a: Parts, b: Parts) -> Parts:
    out, i = [], 0
    for begin, end in a:
        while i < len(b) and b[i][1] <= begin:
            i += 1
        j = i
        while j < len(b) and b[j][0] < end:
            if begin < b[j][0]:
                out.append((begin, b[j][0]))
            begin = b[j][1]
            j += 1
        if begin < end:
            out.append((begin, end))
    return out


def both(a: Parts, b: Parts) -> Parts:
    return minus(a, minus(a, b))


def length(a: Parts) -> float:
    return sum(end - begin for begin, end in a)


def sets(spans: Iterable[tuple[Any, str, float, float]], windows: Parts) -> dict[str, Parts]:
    """(thread or stream, kind, begin, end) of one rank -> kind: when any of its threads and streams was at it, in the windows."""
    lanes: dict[Any, dict[str, list[tuple[float, float]]]] = {}
    for lane, what, begin, end in spans:
        lanes.setdefault(lane, {k: [] for k in KINDS})[what].append((begin, end))
    found: dict[str, Parts] = {k: [] for k in KINDS}
    for lane in lanes.values():
        taken: Parts = []
        for k in KINDS:
            found[k] += minus(union(lane[k]), taken)
            taken = union(taken + lane[k])
    return {k: both(union(found[k]), windows) for k in KINDS}


def shares(found: dict[str, Parts], windows: Parts) -> dict[str, Any]:
    """The shares of the module's docstring, of what `sets` found. hidden: None where nothing was communicated."""
    compute, total = found["compute"], length(windows)
    moves = union(found["communication"] + found["waiting"])
    exposed = {"compute": length(compute), "communication": length(minus(found["communication"], compute)),
               "waiting": length(minus(minus(found["waiting"], compute), found["communication"]))}
    out: dict[str, Any] = {k: seconds / total if total else 0.0 for k, seconds in exposed.items()}
    out["other"] = max(0.0, 1 - sum(out.values())) if total else 0.0
    return {**out, "hidden": length(both(moves, compute)) / length(moves) if moves else None, "us": total}


# ---- events ---------------------------------------------------------------------------------------------------


def kind(event: Event) -> str | None:
    """Of an event of a trace, one of KINDS; None for a range that only encloses others."""
    name, category = event["name"], event.get("cat")
    if category in KINDS:
        return category
    if category in DEVICE:
        return "waiting" if WAITS.search(name) and "nccl" not in name.lower() else "communication" if MOVES.search(name) else "compute"
    if name.startswith(("gloo:", "nccl:", "c10d::", "_c10d_functional::")):
        return "communication"
    return "compute" if category == "cpu_op" and "::" in name and not name.startswith(("autograd::", "profiler::")) else None


def spans_of(events: list[Event]) -> Iterator[tuple[Any, str, float, float]]:
    """What `sets` takes; where a device worked, the host only feeds it and does not count."""
    device = any(e.get("cat") in DEVICE for e in events)
    for e in events:
        what = kind(e) if e["ph"] == "X" and (not device or e["cat"] in DEVICE or e["cat"] in ("waiting", "communication")) else None
        if what:
            yield e.get("args", {}).get("thread", e["tid"]), what, e["ts"], e["ts"] + e["dur"]


def windows_of(events: list[Event]) -> dict[str, Parts]:
    """label -> its windows."""
    found: dict[str, Parts] = {}
    for e in sorted((e for e in events if e["name"].startswith(WINDOW) and e.get("cat") == "user_annotation"), key=lambda e: e["ts"]):
        label = e["name"].removeprefix(WINDOW).rsplit(" #", 1)[0]
        found.setdefault(label, []).append((e["ts"], e["ts"] + e["dur"]))
    return found


def heap_events(found: list[heap.Span], base: int) -> list[Event]:
    """The heaps' spans as events, on a track of their own below that of the thread they ran in."""
    out = []
    for s in found:
        waits = s.peer >= 0
        out.append({"ph": "X", "cat": "waiting" if waits else "communication", "pid": "heap", "tid": s.thread,
                    "name": f"wait for rank {s.peer}" if waits else heap.OPS[s.op], "ts": (s.begin - base) / 1e3,
                    "dur": (s.end - s.begin) / 1e3, "args": {"thread": s.thread, "group": s.group.decode(errors="replace"),
                                                             **({} if waits else {"bytes": s.bytes})}})
    return out


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of the ranks as one Chrome trace: pid is the rank, microseconds from the first event of all."""
    ahead = [(p["base"] - parts[0]["base"]) / 1e3 for p in parts]     # exact: nanoseconds since 1970 are too many for a float
    start = min(shift + e["ts"] for shift, p in zip(ahead, parts) for e in p["events"])
    out: list[Event] = []
    for shift, p in zip(ahead, parts):
        rank: int = p["rank"]
        tracks: dict[tuple[Any, Any], tuple[int, int]] = {}            # (pid, tid) there -> tid here, place
        for e in sorted(p["events"], key=lambda e: e["ts"]):
            host = e["pid"] == p["pid"]
            where = e["tid"] if host else (1 << 24) + len(tracks)     # a stream may have the number of a thread
            tid = tracks.setdefault((e["pid"], e["tid"]), (where, len(tracks)))[0]
            out.append({**e, "pid": rank, "tid": tid, "ts": round(e["ts"] + shift - start, 3),
                        **({"id": rank << 32 | int(e["id"])} if "id" in e else {})})
        out.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        out.append({"ph": "M", "name": "process_labels", "pid": rank, "args": {"labels": f"pid {p['pid']} on {p['host']}"}})
        out.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for (pid, thread), (tid, i) in tracks.items():
            name = (f"shared memory, called by thread {thread}" if pid == "heap" else
                    ("main thread" if thread == pid else f"thread {thread}") if pid == p["pid"] else f"GPU {pid}, stream {thread}")
            out.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}})
            out.append({"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": tid, "args": {"sort_index": i}})
    return {"displayTimeUnit": "ms", "traceEvents": out}


# ---- recording ------------------------------------------------------------------------------------------------


class Profile:
    """The profile of this rank. folder: of the results, one for all ranks. skip, steps: steps to let pass, the last of them with
    the profiler on, and to record; counted by `step`. Ctrl-C and SIGTERM keep the windows that were whole, if `close` is called in
    a finally."""

    def __init__(self, folder: Path, name: str, rank: int = 0, world: int = 1, *, skip: int = 0, steps: int = 0):
        self.folder, self.name, self.rank, self.world = folder, name, rank, world
        self.skip, self.steps, self.count, self.closed = skip, steps, 0, False
        self.part: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "host": os.uname().nodename, "base": 0, "events": [], "lost": 0}
        self.prof: Any = None
        self.open: Any = nullcontext()
        self.unfinished = ""                                          # the window that is open
        self._path(rank).unlink(missing_ok=True)
        self.handler = None
        if world > 1 and threading.current_thread() is threading.main_thread():
            self.handler = signal.signal(signal.SIGTERM, _stop)
        if steps:
            self._turn()

    def _path(self, rank: int) -> Path:
        return self.folder / f".{self.name}-rank-{rank}.json"

    def start(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        heap.record(True)
        self.prof = torch.profiler.profile(activities=activities)
        self.prof.start()

    def stop(self) -> None:
        """Take over what was recorded since start()."""
        if self.prof is None:
            return
        prof, self.prof = self.prof, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        prof.stop()
        heap.record(False)
        with tempfile.TemporaryDirectory() as folder:
            prof.export_chrome_trace(f"{folder}/trace.json")
            found = json.loads(Path(folder, "trace.json").read_text())
        base, (spans, lost) = found.get("baseTimeNanoseconds", 0), heap.recorded()
        events = [e for e in found["traceEvents"] if e["ph"] in "Xsf" and e.get("cat") != "Trace" and e["name"] != self.unfinished]
        for e in events:
            if e.get("cat") in ("cpu_op", "user_annotation"):
                e.pop("args", None)                                   # half of the file, and only ids
        events += heap_events(spans, base)
        inside = [w for many in windows_of(events).values() for w in many]
        if inside:
            first, last = min(w[0] for w in inside), max(w[1] for w in inside)
            shift = (base - (self.part["base"] or base)) / 1e3
            self.part["base"] = self.part["base"] or base
            self.part["events"] += [{**e, "ts": e["ts"] + shift} for e in events if e["ts"] + e.get("dur", 0) >= first and e["ts"] <= last]
        self.part["lost"] += lost

    @contextmanager
    def window(self, label: str) -> Iterator[None]:
        """What is summed up under `label`."""
        self.count += 1
        self.unfinished = f"{WINDOW}{label} #{self.count}"
        with record_function(self.unfinished):
            yield
        self.unfinished = ""

    def step(self) -> None:
        """One more step is done."""
        self.open.__exit__(None, None, None)
        self.open, self.unfinished = nullcontext(), ""
        self.count += 1
        self._turn()

    def _turn(self) -> None:
        if self.count == max(self.skip - 1, 0):
            self.start()
        if self.count == self.skip + self.steps:
            self.close()
        elif self.count >= self.skip and self.prof is not None:
            self.unfinished = f"{WINDOW}training step #{self.count + 1}"
            self.open = record_function(self.unfinished)
            self.open.__enter__()

    def close(self) -> None:
        """Write this rank's part; rank 0 waits for the others' and makes one trace, one picture and one table of them."""
        if self.closed:
            return
        self.closed, early = True, sys.exc_info()[0] is not None
        if self.handler is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)             # one more would lose what there is
        self.open.__exit__(None, None, None)
        self.stop()
        _write(self._path(self.rank), json.dumps(self.part))
        if self.rank == 0:
            self._merge(early)
        if self.handler is not None and not early:
            signal.signal(signal.SIGTERM, self.handler)

    def _merge(self, early: bool) -> None:
        end, parts = time.monotonic() + (AT_THE_END if early else PATIENCE), []
        for r in range(self.world):
            while not self._path(r).exists() and time.monotonic() < end:
                time.sleep(0.02)
            if self._path(r).exists():
                parts.append(json.loads(self._path(r).read_text()))
                self._path(r).unlink()
            else:
                print(f"interlace: rank {r} left no trace", file=sys.stderr, flush=True)
        parts = [p for p in parts if p["events"]]
        if not parts:
            print("interlace: no trace: nothing was recorded yet", file=sys.stderr, flush=True)
            return
        trace = merge(parts)
        summary = summarise(trace)
        trace["otherData"] = {"torch": torch.__version__, "command": shlex.join(["interlace", *sys.argv[1:]]), "cut short": early,
                              "shares": {f"{label}, rank {r}": s for label, of in summary.items() for r, s in of.items()}}
        _write(self.folder / f"{self.name}.json", json.dumps(trace))
        made = draw(trace, summary, self.folder / f"{self.name}.png")
        for line in table(summary):
            print(line)
        for p in parts:
            if p["lost"]:
                print(f"rank {p['rank']}: {p['lost']} spans of collectives found no room; profile fewer steps")
        print(f"{'cut short; what was recorded is' if early else 'made'}: {self.folder / self.name}.json (open it in ui.perfetto.dev)"
              + f", {self.folder / self.name}.png" * made, flush=True)


def _stop(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)                                       # whole or not at all
    finally:
        temporary.unlink(missing_ok=True)


# ---- results --------------------------------------------------------------------------------------------------


def by_rank(trace: dict[str, Any]) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for e in trace["traceEvents"]:
        if e["ph"] != "M":
            found.setdefault(e["pid"], []).append(e)
    return dict(sorted(found.items()))


def summarise(trace: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """label -> rank -> shares, and the number of windows."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for rank, events in by_rank(trace).items():
        spans = list(spans_of(events))
        for label, windows in windows_of(events).items():
            found.setdefault(label, {})[rank] = {**shares(sets(spans, union(windows)), union(windows)), "n": len(windows)}
    return found


def table(summary: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    lines = []
    for label, ranks in summary.items():
        lines.append(label)
        for r, s in ranks.items():
            lines.append(f"    rank {r}  {s['us'] / s['n'] / 1e3:9.3f} ms x {s['n']}   " + "   ".join(
                f"{k} {100 * s[k]:.1f}%" for k in ("compute", "communication", "waiting", "other")) + f"   {_hidden(s)}")
    return lines


def _hidden(s: dict[str, Any]) -> str:
    return "no communication" if s["hidden"] is None else f"{100 * s['hidden']:.0f}% of communication hidden"


def draw(trace: dict[str, Any], summary: dict[str, dict[int, dict[str, Any]]], path: Path) -> bool:
    """Of every label the window of median length, a band of three rows a rank. False without matplotlib, which it says."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"interlace: no {path.name} without matplotlib: pip install matplotlib", file=sys.stderr, flush=True)
        return False
    colors = {"compute": "#1f4e8c", "communication": "#e08a1e", "waiting": "#c23b3b"}
    world = max(len(ranks) for ranks in summary.values())
    figure = Figure(figsize=(11, (0.6 + 0.55 * world) * len(summary) + 0.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    events = by_rank(trace)
    for axes, (label, ranks) in zip(figure.subplots(len(summary), 1, squeeze=False)[:, 0], summary.items()):
        every = {r: windows_of(events[r])[label] for r in ranks}
        took = [max(end for _, end in ws) - min(begin for begin, _ in ws) for ws in zip(*every.values())]
        which = sorted(range(len(took)), key=took.__getitem__)[len(took) // 2]
        shown = {r: ws[which] for r, ws in every.items()}
        start = min(w[0] for w in shown.values())
        for i, (r, s) in enumerate(ranks.items()):
            found = sets(spans_of(events[r]), [shown[r]])
            for row, (k, color) in enumerate(colors.items()):
                axes.broken_barh([((b - start) / 1e3, (e - b) / 1e3) for b, e in found[k]], (4 * i + row, 0.9), color=color,
                                 label=k if i == 0 else None, linewidth=0)
            text = ", ".join(f"{k} {100 * s[k]:.0f}%" for k in (*colors, "other"))
            axes.text(1.01, 4 * i + 1.4, f"{text.replace(', waiting', ',' + chr(10) + 'waiting')}\n{_hidden(s)}", va="center",
                      fontsize=7, transform=axes.get_yaxis_transform())
        axes.set(yticks=[4 * i + 1.4 for i in range(len(ranks))], yticklabels=[f"rank {r}" for r in ranks],
                 ylim=(4 * len(ranks) - 0.6, -0.5), xlim=(0, (max(w[1] for w in shown.values()) - start) / 1e3), xlabel="ms")
        axes.set_title(f"{label}: number {which + 1} of {len(took)}; shares of all", fontsize=8, loc="left")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path)
    return True
