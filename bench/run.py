"""One process of a bench: builds every case, measures it, writes its rows. `command.py` starts these."""
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import roofs
from .cases import Case, Make, Ways
from .harness import OUT_OF_MEMORY, SCHEMA, failure, measure, together
from .provenance import provenance
from .rows import append

__all__ = ["build", "load", "measure_roofs", "ops"]


def load(op: str) -> Any:
    """The module of a bench: has cases(sweep, world) and ways(case, make)."""
    return importlib.import_module(f"{__package__}.bench_{op}")


def build(op: str, case: Case, device: str, group: dist.ProcessGroup | None, seed: int, quick: bool) -> Ways:
    return load(op).ways(case, Make(case, device, seed, group, quick))


def ops(names: list[str], folder: str, run: str, device: str, sweep: str, explain: bool = False, seed: int = 0,
        kept: str = "") -> int:
    """Rows of the benches `names` on this world, to `folder`. Target of the launcher; returns 0."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    world, first = (dist.get_world_size(group), dist.get_rank(group) == 0) if group is not None else (1, True)
    where = Path(folder)
    found = roofs.load(where, Path(kept)) if kept else roofs.load(where)
    stamp = provenance(seed)
    for op in names:
        for case in load(op).cases(sweep, world):
            rows = one(op, case, device, group, seed, sweep.startswith("quick"), roofs.limits(found))
            if first:
                append(where, op, rows, run, stamp)
                _say(op, case, rows, explain)
    return 0


def one(op: str, case: Case, device: str, group: dist.ProcessGroup | None, seed: int, quick: bool, roof: Any) -> list[dict[str, Any]]:
    """Rows of a case; where it cannot even be built, one row that says why."""
    made, why = None, ""
    try:
        made = build(op, case, device, group, seed, quick)
    except Exception as e:
        why = failure(e)
    if why := together(why, group):
        made = None
    if made is None:
        return [{"schema": SCHEMA, "op": op, "case": case.key(), "device": device, "seed": seed, "way": "interlace", "failed": why}]
    return measure(op, case, made, device=device, budget=0.35 if quick else 2.0, rounds=(9, 60 if quick else 200), group=group,
                   roof=roof, seed=seed)


def _say(op: str, case: Case, rows: Iterable[dict[str, Any]], explain: bool) -> None:
    ours = next((r for r in rows if r["way"] == "interlace"), None)
    if explain and ours is not None and ours.get("path"):
        print(f"{op}  {case}\n    {ours['path']}", flush=True)
    elif sys.stderr.isatty():
        print(f"\r\x1b[K{op}  {case}", end="", file=sys.stderr, flush=True)
    for r in rows:
        if "failed" in r and OUT_OF_MEMORY in r["failed"]:
            print(f"\n{op}  {case}: {r['way']}: {r['failed']}", file=sys.stderr, flush=True)


def measure_roofs(folder: str, device: str, quick: bool) -> int:
    """Target of the launcher: the roofs of one process, or of the link between several; added to what is there."""
    where = Path(folder)
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    if group is None:
        roofs.save(where, roofs.load(where), quick=quick, **roofs.on_one(device, quick))
        return 0
    between = roofs.between_ranks(group, device, quick)
    if dist.get_rank(group) == 0:
        found = roofs.load(where)
        roofs.save(where, found, **{k: {**found.get(k, {}), **v} for k, v in between.items()})
    return 0


def cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
