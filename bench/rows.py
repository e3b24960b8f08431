"""Rows on disk, JSON lines, and what an older file says about a newer one."""
import json
import sys
from pathlib import Path
from typing import Any

from ..parallel.errors import RunError, UserError
from .harness import OUT_OF_MEMORY, SCHEMA
from .provenance import machine

__all__ = ["agreement", "append", "changes", "key", "measured", "read", "read_newest", "read_old", "unfinished"]

Row = dict[str, Any]
NEEDED = ("op", "way", "case", "machine", "run")


def append(folder: Path, op: str, rows: list[Row], run: str, stamp: dict[str, Any]) -> None:
    """To <folder>/<op>.jsonl, whole lines at once: an interrupted run keeps what it had measured."""
    lines = [json.dumps({**row, "machine": machine(), "run": run, "provenance": stamp}) + "\n" for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{op}.jsonl"
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")   # killed amid a line
        with path.open("ab", buffering=0) as f:                       # one write: all rows of a case or none
            f.write(("\n" * torn + "".join(lines)).encode())
    except OSError as e:
        raise RunError(f"bench: --out must be writable during a run, got {e.strerror or e} in {folder}; the rows before are kept. "
                       "Free space, then run the same command again") from e


def read(folder: Path, op: str, run: str) -> list[Row]:
    """The rows of one run, or of all with this version's fields where run is "". Of a case of several sittings those of the last, which
    hold the samples of all."""
    path = folder / f"{op}.jsonl"
    if not path.exists():
        return []
    found: dict[Any, Row] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:                                            # a run that was killed amid a line
            continue
        if row.get("run") == run or (not run and row.get("schema") == SCHEMA):
            found[row["run"], key(row)] = row
    return list(found.values())


def read_newest(folder: Path) -> list[Row]:
    """All rows of the run that began last in `folder`."""
    every = [row for path in sorted(folder.glob("*.jsonl")) for row in read(folder, path.stem, "")]
    newest = max((row["run"] for row in every), default="")           # begins with the time it was started at
    return [row for row in every if row["run"] == newest]


def unfinished(folder: Path, ops: list[str], stamp: dict[str, Any]) -> str:
    """The run in `folder` that --resume goes on with: the newest over any of `ops` with this sweep, device and seed; "" where
    there is none. Raises: UserError where it was measured from other code, whose rows must not stand beside these."""
    same = ("sweep", "device", "seed")
    found = [r for op in ops for r in read(folder, op, "") if all(r["provenance"].get(k) == stamp[k] for k in same)]
    newest = max(found, key=lambda r: r["run"], default=None)
    if newest is None:
        return ""
    was = newest["provenance"]
    if (was["commit"], was["dirty"], was["versions"]) != (stamp["commit"], stamp["dirty"], stamp["versions"]):
        here, there = (f"commit {p['commit']}{' (dirty)' * bool(p['dirty'])}, torch {p['versions'].get('torch')}" for p in (stamp, was))
        raise UserError(f"bench: --resume must go on with the same code and versions, got a run of {there} where this is {here}; "
                        "leave --resume out")
    return str(newest["run"])


def measured(folder: Path, op: str, run: str, sitting: int = 1) -> list[dict[str, Any]]:
    """The cases of an op that a run has rows of, none with figures of earlier sittings alone: rows of a case are written at once, and a
    way that failed is not tried again."""
    found = read(folder, op, run)
    left = [r["case"] for r in found if "samples_us" in r and r.get("sitting", 1) < sitting]
    return [r["case"] for r in found if r["case"] not in left]


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return row["op"], row["way"], row.get("device"), *sorted(row["case"].items())


def read_old(path: Path) -> dict[tuple[Any, ...], Row]:
    """The newest row of every measurement in `path`, a file or a folder of them. Rows of other versions in it, and lines that are none
    (a run that was killed amid a line), are passed over; of the latter it warns.
    Raises: UserError where no row can be compared with those of today, or one is of another machine."""
    say = f"bench: --against must be a <op>.jsonl of this machine, written by interlace bench, or a folder of them, got {path}"
    try:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        lines = [(f"line {i}" + f" of {file.name}" * path.is_dir(), line) for file in files
                 for i, line in enumerate(file.read_text().splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{say}, which cannot be read: {e}") from None
    found: dict[tuple[Any, ...], Row] = {}
    other, broken = "", list[str]()
    for at, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            other, broken = f"{say}, whose {at} is not JSON", [*broken, at]
            continue
        if not isinstance(row, dict) or row.get("schema") != SCHEMA or any(n not in row for n in NEEDED):
            version = row.get("schema", 1) if isinstance(row, dict) else "?"
            other = f"{say}, whose {at} is of version {version}, this interlace writes {SCHEMA}: measure the old commit again"
            continue
        if row["machine"] != machine():
            raise UserError(f"{say}, whose {at} was measured on {row['machine']}, this is {machine()}: times of two machines "
                            "say nothing about the code")
        if "p50_us" in row:
            found[key(row)] = row
    if not found:
        raise UserError(other or f"{say}, which has no figures in it")
    if broken:
        print(f"bench: {path}: passed over what is not JSON, {', '.join(broken[:3])}" + f" and {len(broken) - 3} more" * (len(broken) > 3),
              file=sys.stderr)
    return found


def agreement(new: list[Row], old: dict[tuple[Any, ...], Row], within: float = 0.10) -> tuple[int, int, list[str]]:
    """Do two runs tell one story: (ratios to ours in both runs, those that differ by more than `within` in a row that carries a
    mark in either run, in words those that do and carry none)."""
    marked = {key(r)[:1] + key(r)[2:] for r in (*new, *old.values()) if r["way"] == "interlace" and (r.get("noisy") or r.get("loaded"))}
    both, known, lies = 0, 0, []
    for row in new:
        was = old.get(key(row))
        if row["way"] == "interlace" or was is None or not row.get("ratio") or not was.get("ratio"):
            continue
        both += 1
        by = max(row["ratio"] / was["ratio"], was["ratio"] / row["ratio"])
        if by > 1 + within:
            if key(row)[:1] + key(row)[2:] in marked or any(r["noisy"] or r["loaded"] for r in (row, was)):
                known += 1
            else:
                lies.append(f"{row['op']}  {' '.join(str(v) for v in row['case'].values())}, {row['way']}: {was['ratio']:.2f}, "
                            f"now {row['ratio']:.2f}")
    return both, known, lies


def changes(new: list[Row], old: dict[tuple[Any, ...], Row], threshold: float) -> tuple[list[str], list[str]]:
    """(what got slower past the threshold, everything that was matched), for our own ways, in words.

    Slower counts when the time grew and also the time relative to torch eager in the same rounds: the machine may have
    slowed, torch's code has not. An op that had figures and now fails is slower too, unless memory ran out."""
    eager = {key(r)[:1] + key(r)[2:]: r for r in new if r["way"] == "torch eager" and "p50_us" in r}
    eager_old = {k[:1] + k[2:]: r for k, r in old.items() if r["way"] == "torch eager"}
    slower, all_of_it = [], []
    for row in new:
        was = old.get(key(row))
        if was is None or not row["way"].startswith("interlace"):
            continue
        what = f"{row['op']}  {' '.join(str(v) for v in row['case'].values())}"
        if "p50_us" not in row:
            if not row["failed"].split(": ", 1)[-1].startswith(OUT_OF_MEMORY) and not row["failed"].startswith(OUT_OF_MEMORY):
                slower.append(f"{what}: fails now: {row['failed']}")
            continue
        by = row["p50_us"] / was["p50_us"]
        other, other_was = eager.get(key(row)[:1] + key(row)[2:]), eager_old.get(key(row)[:1] + key(row)[2:])
        relative = by * other_was["p50_us"] / other["p50_us"] if other and other_was else by
        doubt = " (noisy)" if row["noisy"] or was["noisy"] else ""
        line = f"{what}: {was['p50_us']:.1f} -> {row['p50_us']:.1f} us, {by:.2f}x, {relative:.2f}x against torch eager{doubt}"
        all_of_it.append(line)
        if min(by, relative) > threshold:
            slower.append(line)
    return slower, all_of_it
