"""At an op's first use with some sizes: which path it takes (kept, for a run to tell), and whether all ranks mean the same.

Over the heap every call carries op, dtype, rows and columns with its first signal (csrc/runtime/heap.h), so a mismatch is found
at every call, before anything is read. torch.distributed has no such word: there `agree` exchanges it once for each new case.
"""
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import INTERPRET
from .choose import Path, choose
from .heap import CODES, CollectiveMismatch, SymmHeap, heap_of, meet
from .machine import Machine
from .pad import pad_machine, pad_multicast, pad_room
from .registry import Group, group_size

__all__ = ["agree", "check_device", "choose_path", "forget_paths", "path_line", "paths_taken"]

_agreed: set[tuple] = set()
_taken: dict[tuple, Path] = {}


@functools.cache
def _choose(op: str, rows: int, cols: int, inner: int, dtype: torch.dtype, world: int, device: str, slot: int, whole: bool,
            multicast: bool = False, machine: Machine | None = None) -> Path:
    """choose, once for each case of this process, and kept for `paths_taken`."""
    path = choose(op, rows, cols, inner, dtype.itemsize, world, device, slot, whole, multicast, machine)
    _taken[op, rows, cols, inner, whole, dtype, world] = path
    return path


def choose_path(op: str, rows: int, cols: int, inner: int, x: Tensor, group: Group, whole: bool = False) -> tuple[Path, Any]:
    """The path of `op` over x's type and device, as choose.choose, and the SymmHeap where it goes over one, else None."""
    if group is None:
        return _choose(op, rows, cols, inner, x.dtype, 1, "cpu", 0, False), None
    if not x.is_cpu:
        check_device(op, x, group)
    if (INTERPRET or not x.is_cpu) and (room := pad_room(x, group)):
        return _choose(op, rows, cols, inner, x.dtype, group_size(group), "cuda", room, whole, pad_multicast(x, group),
                       pad_machine(x, group)), None
    heap = heap_of(group) if x.is_cpu and x.dtype in CODES else None
    world = heap.size if heap is not None else group_size(group)
    device = "cpu" if heap is not None else x.device.type
    path = _choose(op, rows, cols, inner, x.dtype, world, device, heap.nbytes if heap is not None else 0, whole,
                   machine=heap.machine if heap is not None else None)
    return path, heap if path.name.startswith("heap") else None


def paths_taken(callers: Mapping[tuple[str, int, int, bool], Iterable[str]] | None = None) -> list[str]:
    """A line for every op that has paths to choose from, size and type this process has run over more than one rank: which, and why.

    Since `forget_paths`. callers: who makes a call of (op, columns, K, whether it gathers x too), to stand before it."""
    return [path_line(op, rows, cols, inner, whole, dtype, world, path, (callers or {}).get((op, cols, inner, whole), ()))
            for (op, rows, cols, inner, whole, dtype, world), path in _taken.items() if world > 1]


def path_line(op: str, rows: int, cols: int, inner: int, whole: bool, dtype: torch.dtype, world: int, path: Path,
              callers: Iterable[str]) -> str:
    who = ", ".join(callers)
    return (f"{who}{': ' if who else ''}{op} [{rows} x {cols}, K {inner}, {str(dtype)[6:]}, {world} ranks"
            f"{', and the gathered x' * whole}] {path}")


def forget_paths() -> None:
    """`paths_taken` begins anew: a second run in one process tells its own paths."""
    _choose.cache_clear()
    _taken.clear()


def agree(op: str, group: Group, **what: Any) -> None:
    """Every rank of `group` calls `op` with the same `what`; checked once for each. Where the heap is not there to see it.

    Raises: CollectiveMismatch, on every rank; ValueError where x is on a device the group does not serve."""
    if isinstance(group, SymmHeap):
        group = group.group
    assert group is not None
    key = (group.group_name, op, *what.items())
    if key in _agreed:
        return
    mine = (op, *((k, str(v)) for k, v in sorted(what.items())))
    for rank, other in enumerate(meet(mine, group, op, "agree")):
        if other != mine:
            tell = lambda call: f"{call[0]}({', '.join(f'{k}={v}' for k, v in call[1:])})"  # noqa: E731
            raise CollectiveMismatch(f"{op}: rank {dist.get_rank(group)} of group '{group.group_name}' called {tell(mine)}, but rank "
                                     f"{rank} called {tell(other)}; every rank must make the same call")
    _agreed.add(key)


def check_device(op: str, x: Tensor, group: Group) -> None:
    """Raises: ValueError where the group has no backend for x's device."""
    if isinstance(group, SymmHeap):
        group = group.group
    if group is not None and x.device.type not in (kinds := [d.type for d in group._device_types]):
        raise ValueError(f"{op}: the group must serve the device of x, {x.device}, got group '{group.group_name}' for "
                         f"{', '.join(kinds)}; move x, or make the group with a backend for {x.device.type}")
