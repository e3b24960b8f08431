"""What replace_ did, and what verify found, as objects that print as tables."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Report", "Row", "Verification", "table"]


@dataclass(frozen=True)
class Row:
    """One module. `new` is "" where nothing changed, and `why` says why not."""
    name: str
    old: str
    new: str = ""
    kernel: str = ""
    sharding: str = ""
    why: str = ""


@dataclass
class Report:
    """rows: every module that was replaced, was replaced before, or looked as if it could be; notes: about the whole model."""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def replaced(self) -> list[Row]:
        """The rows of what this call changed (or would have, in a dry run)."""
        return [r for r in self.rows if r.new]

    @property
    def left(self) -> list[Row]:
        """The rows of what stayed as it was."""
        return [r for r in self.rows if not r.new]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        groups: dict[tuple, list[Row]] = {}
        for r in self.rows:                                           # layers.0.mlp, layers.1.mlp, ...: one line
            key = (re.sub(r"\b\d+\b", "*", r.name), r.old, r.new, r.kernel, r.sharding, r.why)
            groups.setdefault(key, []).append(r)
        lines = [(rows[0].name if len(rows) == 1 else f"{key[0]} x{len(rows)}", *key[1:]) for key, rows in groups.items()]
        head = f"{len(self.replaced)} modules {'would be ' if self.dry_run else ''}replaced, {len(self.left)} left"
        return "\n".join([head, table(("name", "class", "new class", "kernel", "sharding", "why not"), lines),
                          *(f"note: {n}" for n in self.notes)])


@dataclass
class Verification:
    """errors: {"output ..." or a parameter's name: largest difference over the largest value}, against the original modules."""
    errors: dict[str, float]
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(e <= self.tolerance for e in self.errors.values())

    def __str__(self) -> str:
        worst = sorted(self.errors.items(), key=lambda kv: -kv[1])[:10]
        head = f"{'equal' if self.ok else 'NOT EQUAL'} within {self.tolerance:.1e}: {len(self.errors)} tensors, the worst first"
        return "\n".join([head, table(("tensor", "error", ""), [(n, f"{e:.2e}", "" if e <= self.tolerance else "<--") for n, e in worst])])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns padded to their widest cell; columns that are empty throughout are left out."""
    keep = [i for i in range(len(head)) if any(r[i] for r in rows)]
    cells = [[str(r[i]) for i in keep] for r in (head, *rows)]
    width = [max(len(c[i]) for c in cells) for i in range(len(keep))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, width)).rstrip() for row in cells)
