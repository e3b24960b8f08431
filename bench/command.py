"""`interlace bench`: check the request, start what measures, show what came. Without torch until there is something to measure."""
import argparse
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ..launch import launch, launched_by_torchrun
from ..parallel.errors import UserError
from .ops import OPS, pick

__all__ = ["main"]

AGAIN = "rows measured so far are kept; the same command with --resume goes on"
PREPARING, COMPILING = 0.3, 8.0                                       # seconds a case besides its timing: fp64; torch.compile
HERE = Path(__file__).resolve().parent


def default_folder() -> Path:
    """bench/results/<machine> of a source tree; an installed package writes where the user is."""
    from .provenance import machine
    top = HERE if (HERE.parent / "pyproject.toml").exists() else Path("interlace-bench")
    return top / "results" / machine()


def writable(folder: Path, who: str) -> Path:
    """The folder, made and tried. Raises: UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise UserError(f"{who}: --out must be a folder that can be written, got {folder}: {e.strerror or e}; choose another") from None
    return folder


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 1 when ours is wrong, failed at a case for want of anything but memory or a package, or got slower than --against
    allows."""
    if args.list:
        for name, (ranks, what) in OPS.items():
            print(f"{name:<20} {what}" + {"many": "  (several ranks)", "both": "  (one and several ranks)"}.get(ranks, ""))
        return 0
    names = pick(args.ops)
    if launched_by_torchrun():
        raise UserError("bench: must be one process, got torchrun's; it starts its own ranks: interlace bench --nproc N")
    if args.threshold < 1:
        raise UserError(f"bench: --threshold must be >= 1, the time now over the time then, got {args.threshold}")
    if args.seconds is not None and not args.seconds > 0:
        raise UserError(f"bench: --seconds must be > 0, got {args.seconds}")
    world = ranks_of(args)
    from .report import WRONG
    from .rows import read_old
    old = read_old(Path(args.against)) if args.against else None
    folder = writable(Path(args.out) if args.out else default_folder(), "bench")
    run = _run(args, names, folder)
    _warn_of_load()
    try:
        status = _roofs(args, names, folder, world) or _measure(args, names, folder, world, run)
    except KeyboardInterrupt:
        print(f"\ninterlace: interrupted; {AGAIN}", file=sys.stderr, flush=True)
        status = 130
    finally:
        rows = _report(names, folder, run, args)
    ours = [r for r in rows if r["way"].startswith("interlace")]
    excused = ("out of memory", "NotImplementedError")                # too large for this machine, not for this machine
    bad = any(not any(e in r["failed"] for e in excused) if "failed" in r else not r["error"] <= WRONG for r in ours)
    return status or max(int(bad), _compare(rows, old, args.threshold) if old is not None else 0)


def _sweep(args: argparse.Namespace) -> str:
    return str({"cpu": "quick", "cuda": "quick-cuda"}[args.device] if args.quick else args.device)


def _run(args: argparse.Namespace, names: list[str], folder: Path) -> str:
    """The name of this run: a new one, or of the one that --resume goes on with."""
    from .rows import unfinished
    from .run import stamped
    old = unfinished(folder, names, stamped(args.seed, _sweep(args), args.device)) if args.resume else ""
    if args.resume:
        _say(f"goes on with run {old}" if old else f"there is nothing to go on with in {folder}; starts anew")
    return old or f"{datetime.now():%Y%m%dT%H%M%S.%f}-{os.getpid()}"  # to the microsecond: a run goes on with rows of its name


def ranks_of(args: argparse.Namespace) -> int:
    """Ranks of the benches that need several; fills in args.device."""
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"bench: --nproc must be >= 1, got {args.nproc}")
    from .run import cuda_devices
    gpus = cuda_devices()
    if args.device is None:
        args.device = "cuda" if gpus else "cpu"
    if args.device == "cuda" and not gpus:
        import torch
        raise UserError(f"bench: --device cuda needs an NVIDIA GPU that torch {torch.__version__} can use, got none; use --device cpu")
    if args.device == "cuda" and (args.nproc or 1) > gpus:
        raise UserError(f"bench: --nproc must be <= the {gpus} GPUs of this machine, got {args.nproc}; use --device cpu")
    return args.nproc or (min(2, gpus) if args.device == "cuda" else 2)


def _warn_of_load() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.25 * cores:
        print(f"bench: this machine is under load ({load:.1f} on {cores} cores): rows taken while others work are marked `loaded`",
              file=sys.stderr, flush=True)


def _plan(names: list[str], world: int, device: str) -> list[tuple[int, list[str]]]:
    """(ranks, benches) of every launch: one process first."""
    alone = [n for n in names if OPS[n][0] != "many" and not (device == "cuda" and n == "train_step")]
    together = [n for n in names if OPS[n][0] != "one" and world > 1 and not (device == "cuda" and n == "train_step")]
    for n in names:
        if n not in alone and n not in together:
            why = "runs on CPU ranks only; use --device cpu" if n == "train_step" else "needs several ranks: --nproc 2, and as many GPUs"
            print(f"bench: {n} is left out: it {why}", file=sys.stderr, flush=True)
    return [(w, ns) for w, ns in ((1, alone), (world, together)) if ns]


def _measure(args: argparse.Namespace, names: list[str], folder: Path, world: int, run: str) -> int:
    """One launch for all ops of a world and sitting with --quick; else an op at a time, in processes of their own where it has ranks."""
    from .rows import measured
    from .run import load, pace
    sweep = _sweep(args)
    job: dict[str, Any] = {"folder": str(folder), "run": run, "device": args.device, "sweep": sweep,
                           "explain": args.explain, "seed": args.seed, "kept": str(default_folder())}
    plan = _plan(names, world, args.device)
    if not args.quick:
        plan = [(ranks, [name]) for ranks, of in plan for name in of]
    every = [(ranks, of, sitting) for sitting in range(1, pace(sweep).sittings + 1) for ranks, of in plan]
    todo = [[case for name in of for had in [measured(folder, name, run, sitting)] for case in load(name).cases(sweep, ranks)
             if case.key() not in had] for ranks, of, sitting in every]
    left = list(map(len, todo))
    if args.seconds is None:
        _say_how_long([case for cases in todo[:len(plan)] for case in cases], sum(len(of) for _, of in plan), sweep)
    start, whole, worst = time.monotonic(), sum(left), 0
    for i, (ranks, of, sitting) in enumerate(every):
        if args.seconds is not None:                                  # what is left, by ops
            job["seconds"] = (args.seconds - (time.monotonic() - start)) * len(of) / sum(len(names) for _, names, _ in every[i:])
        if left[i] and (status := launch(ranks, "interlace.bench.run:ops", {"names": of, "sitting": sitting, **job}, again=AGAIN)):
            worst = max(worst, status)
            if status >= 128:                                         # Ctrl-C; after any other end the next op is measured
                break
        done, rest = sum(left[:i + 1]), sum(left[i + 1:])
        if rest and left[i] and not args.quick and args.seconds is None:
            _say(f"{of[0]}: {left[i]} cases; {done} of {whole} done, about {_words((time.monotonic() - start) / done * rest)} left")
    return worst


def _say(text: str) -> None:
    print("\r\x1b[K" * sys.stderr.isatty() + f"bench: {text}", file=sys.stderr, flush=True)


def _words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _estimate(cases: list[Any], sweep: str) -> float:
    """Seconds on an idle machine."""
    from .run import pace
    how = pace(sweep)
    compiled = 0 if sweep.startswith("quick") else sum(case.compiled for case in cases)
    return len(cases) * (how.budget * how.sittings + PREPARING) + COMPILING * compiled


def _say_how_long(cases: list[Any], ops: int, sweep: str) -> None:
    seconds = _estimate(cases, sweep)
    if seconds > 60:
        _say(f"{len(cases)} cases of {ops} ops, about {_words(seconds)} on an idle machine; rows are kept as they come, and after Ctrl-C "
             "the same command with --resume goes on")


def _roofs(args: argparse.Namespace, names: list[str], folder: Path, world: int) -> int:
    """Measure the roofs that are asked for, or needed and not kept."""
    from . import roofs
    found = {} if args.roofs else roofs.load(folder, default_folder())
    job = {"folder": str(folder), "device": args.device, "quick": args.quick}
    fresh = not roofs.usable(found, args.quick)
    if fresh and (status := launch(1, "interlace.bench.run:measure_roofs", job, again=AGAIN)):
        return status
    many = world > 1 and any(OPS[n][0] != "one" for n in names)
    if many and (fresh or str(world) not in found.get("link", {})):
        return launch(world, "interlace.bench.run:measure_roofs", job, again=AGAIN)
    return 0


def _report(names: list[str], folder: Path, run: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    from .report import footnotes, plots, table
    from .rows import read
    rows = [row for name in names for row in read(folder, name, run)]
    if not rows:
        return rows
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    table(rows)
    for line in footnotes(rows):
        print(line)
    print(f"{len(rows)} rows in {folder}", flush=True)
    if sys.exc_info()[0] is None and args.out:
        print(f"{len(plots(rows, folder / 'plots'))} plots in {folder / 'plots'}", flush=True)
    return rows


def _compare(rows: list[dict[str, Any]], old: dict, threshold: float) -> int:
    from .rows import agreement, changes
    slower, matched = changes(rows, old, threshold)
    if not matched and not slower:
        raise UserError("bench: --against must hold the same ops and cases as this run, got none in common; "
                        "take the file of the same op, and --quick or not as then")
    print(f"\nagainst the older file: {len(matched)} cases")
    for line in matched:
        print(f"    {line}")
    both, known, lies = agreement(rows, old)
    print(f"{both - known - len(lies)} of {both} ratios agree within 10%; of the others {known} are marked noisy or loaded")
    for line in lies:
        print(f"NOT MARKED: {line}")
    for line in slower:
        print(f"SLOWER by more than {threshold}: {line}")
    return int(bool(slower))
