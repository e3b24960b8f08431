"""One process of a bench: builds every case, measures it, writes its rows. `command.py` starts these."""
import gc
import importlib
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import roofs
from .cases import Case, Make, Ways
from .harness import OUT_OF_MEMORY, SCHEMA, failure, measure, together
from .provenance import provenance
from .rows import append, measured, read

__all__ = ["build", "free_memory", "load", "measure_roofs", "ops", "pace", "stamped"]



@dataclass(frozen=True)
class Pace:
    """How long a sweep times a case: seconds and rounds (least, most) of a sitting, and how many sittings."""
    budget: float
    rounds: tuple[int, int]
    sittings: int = 1


def pace(sweep: str) -> Pace:
    return {"quick": Pace(0.17, (5, 30), 2), "quick-cuda": Pace(0.35, (5, 60))}.get(sweep, Pace(1.5, (9, 100)))


def load(op: str) -> Any:
    """The module of a bench: has cases(sweep, world) and ways(case, make)."""
    return importlib.import_module(f"{__package__}.bench_{op}")


def build(op: str, case: Case, device: str, group: dist.ProcessGroup | None, seed: int, quick: bool) -> Ways:
    return load(op).ways(case, Make(case, device, seed, group, quick))


def stamped(seed: int, sweep: str, device: str) -> dict[str, Any]:
    return {**provenance(seed), "sweep": sweep, "device": device}


def ops(names: list[str], folder: str, run: str, device: str, sweep: str, explain: bool = False, seed: int = 0,
        kept: str = "", only: list[dict[str, Any]] | None = None, seconds: float = math.inf, sitting: int = 1) -> int:
    """Rows of the benches `names` on this world, to `folder`, of cases that `run` has none of yet. only: of these cases.
    seconds: shared among the ops; one whose share is over leaves out the rest of its cases. sitting: 2 adds to the rows of 1, which are
    there. Target of the launcher; returns 0."""
    start = time.monotonic()
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    world, first = (dist.get_world_size(group), dist.get_rank(group) == 0) if group is not None else (1, True)
    where = Path(folder)
    found = roofs.load(where, Path(kept)) if kept else roofs.load(where)
    stamp = stamped(seed, sweep, device)
    with _bounded_memory(world if device == "cpu" else 0), _little_garbage():
        for i, op in enumerate(names):
            done = measured(where, op, run, sitting)                  # before any rank writes: the next case waits for all of them
            before = read(where, op, run) if sitting > 1 else []
            cases = [c for c in load(op).cases(sweep, world) if c.key() not in done and (only is None or c.key() in only)
                     and (sitting == 1 or any(r["case"] == c.key() for r in before))]
            now = time.monotonic()
            end = now + (seconds - (now - start)) / (len(names) - i)
            for at, case in enumerate(_by_turns(cases) if seconds < math.inf else cases):
                if seconds < math.inf and first_says(at > 0 and time.monotonic() > end, group):
                    if first:
                        print(f"bench: {op}: its share of --seconds is over, {len(cases) - at} of {len(cases)} cases are left out",
                              file=sys.stderr, flush=True)
                    break
                rows = one(op, case, device, group, seed, sweep, roofs.limits(found),
                           {r["way"]: r for r in before if r["case"] == case.key()})
                if first:
                    append(where, op, rows, run, stamp)
                    _say(op, case, rows, explain and sitting == 1)
    return 0


@contextmanager
def _little_garbage() -> Iterator[None]:
    """Before every case garbage is collected (clocks.py): without what is here already, torch's modules above all, 0.1 s less of each."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _by_turns(cases: list[Case]) -> list[Case]:
    """A case of every function and pass before the second of any: what is left out is then a shape."""
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for case in cases:
        turns.append(seen[case.call, case.direction])
        seen[case.call, case.direction] += 1
    return [cases[i] for i in sorted(range(len(cases)), key=turns.__getitem__)]


def first_says(what: bool, group: dist.ProcessGroup | None) -> bool:
    """Rank 0's answer, on all ranks: their clocks differ."""
    if group is None:
        return what
    told = torch.tensor([int(what)])
    dist.broadcast(told, 0, group)
    return bool(told.item())


def free_memory() -> int:
    """Bytes that can be had without swapping, of the machine or of the container; 0 where the system does not tell."""
    def number(path: str, word: str = "") -> int:
        try:
            return int(next(ln for ln in Path(path).read_text().splitlines() if ln.startswith(word)).split()[-1 if not word else 1])
        except (OSError, ValueError, StopIteration):                  # no such file, or "max"
            return 0
    free = number("/proc/meminfo", "MemAvailable:") << 10
    most, used = number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current")
    return min(free, max(0, most - used)) if most and free else free


@contextmanager
def _bounded_memory(ranks: int) -> Iterator[None]:
    """A shape that does not fit raises, and has a row; else Linux would hand out what it has not and kill the sweep for it. 0: off."""
    free = free_memory()
    try:
        import resource
        before = resource.getrlimit(resource.RLIMIT_DATA)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except (ImportError, OSError, IndexError, ValueError):
        free = 0
    if not free or not ranks:
        yield
        return
    most = used + int(0.9 * free / ranks)
    resource.setrlimit(resource.RLIMIT_DATA, (most if before[0] < 0 else min(most, before[0]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def one(op: str, case: Case, device: str, group: dist.ProcessGroup | None, seed: int, sweep: str, roof: Any,
        earlier: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a case; where it cannot even be built, one row that says why."""
    made, why = None, ""
    try:
        made = build(op, case, device, group, seed, sweep.startswith("quick"))
    except Exception as e:
        why = failure(e)
    if why := together(why, group):
        made = None
    if made is None and earlier:
        if group is None or dist.get_rank(group) == 0:
            print(f"\nbench: {op}: {case}: no second sitting, the first's figures stand: {why}", file=sys.stderr, flush=True)
        return []
    if made is None:
        return [{"schema": SCHEMA, "op": op, "case": case.key(), "device": device, "seed": seed, "way": "interlace", "failed": why}]
    how = pace(sweep)
    return measure(op, case, made, device=device, budget=how.budget, rounds=how.rounds, group=group, roof=roof, seed=seed, earlier=earlier)


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
