"""`interlace bench`: check the request, start what measures, show what came. Without torch until there is something to measure."""
import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from ..launch import launch, launched_by_torchrun
from ..parallel.errors import UserError
from .ops import OPS, pick

__all__ = ["main"]

AGAIN = "rows measured so far are kept; run the same command again"
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
    """Exit status: 0; 1 when ours is wrong, failed at a case for want of anything but memory, or got slower than --against allows."""
    if args.list:
        for name, (ranks, what) in OPS.items():
            print(f"{name:<20} {what}" + {"many": "  (several ranks)", "both": "  (one and several ranks)"}.get(ranks, ""))
        return 0
    names = pick(args.ops)
    if launched_by_torchrun():
        raise UserError("bench: must be one process, got torchrun's; it starts its own ranks: interlace bench --nproc N")
    if args.threshold < 1:
        raise UserError(f"bench: --threshold must be >= 1, the time now over the time then, got {args.threshold}")
    world = ranks_of(args)
    from .report import WRONG
    from .rows import read_old
    old = read_old(Path(args.against)) if args.against else None
    folder = writable(Path(args.out) if args.out else default_folder(), "bench")
    run = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    _warn_of_load()
    try:
        status = _roofs(args, names, folder, world) or _measure(args, names, folder, world, run)
    finally:                                                          # Ctrl-C included
        rows = _report(names, folder, run, args)
    ours = [r for r in rows if r["way"].startswith("interlace")]
    bad = any("out of memory" not in r["failed"] if "failed" in r else not r["error"] <= WRONG for r in ours)
    return status or max(int(bad), _compare(rows, old, args.threshold) if old is not None else 0)


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
    sweep = {"cpu": "quick", "cuda": "quick-cuda"}[args.device] if args.quick else args.device
    job: dict[str, Any] = {"folder": str(folder), "run": run, "device": args.device, "sweep": sweep,
                           "explain": args.explain, "seed": args.seed, "kept": str(default_folder())}
    for ranks, of in _plan(names, world, args.device):
        if status := launch(ranks, "interlace.bench.run:ops", {"names": of, **job}, again=AGAIN):
            return status
    return 0


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
