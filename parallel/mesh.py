"""The process mesh: one frozen value naming every group a rank sits in. No module-level state, no environment reads.

    dense grid   arange(pp * dp * tp).view(pp, dp, tp)       tp innermost: neighbours on NVLink, or on one socket
    expert grid  arange(pp * edp * ep).view(pp, edp, ep)     the same ranks refolded: edp * ep = dp * tp within a stage
    axis "tp" of rank r = the ranks that differ from r only along tp

This is Megatron's order tp-cp-ep-dp-pp with cp = 1. `groups_of` and `rank_table` are integer arithmetic and need no
torch; `Mesh.build` is the one place that makes process groups.
"""
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

    from .layout import Layout

DENSE = ("pp", "dp", "tp")
EXPERT = ("pp", "edp", "ep")


@dataclass(frozen=True)
class Axis:
    """This rank's row of the mesh along one axis. `group` is None iff size == 1."""
    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self                                                   # a copied layer stands in the same group


def groups_of(sizes: dict[str, int], axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """All groups along `axes`: ranks that agree on every other coordinate, in order. sizes: outermost axis first."""
    strides = {a: math.prod(list(sizes.values())[i + 1:]) for i, a in enumerate(sizes)}
    fixed = [range(n) if a not in axes else (0,) for a, n in sizes.items()]
    moved = [range(n) if a in axes else (0,) for a, n in sizes.items()]
    flat = lambda at: sum(i * s for i, s in zip(at, strides.values()))  # noqa: E731
    offsets = [flat(m) for m in itertools.product(*moved)]
    return [tuple(flat(f) + o for o in offsets) for f in itertools.product(*fixed)]


def rank_table(layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    """Every group of every axis: {"tp": [(0, 1), ...], "dp", "pp", "ep", "edp", "mp", "embd"}.

    mp = tp x pp, one model copy (its grad norm); embd = first and last stage (tied embeddings)."""
    dense = dict(zip(DENSE, (layout.pp, layout.dp, layout.tp)))
    expert = dict(zip(EXPERT, (layout.pp, layout.dp * layout.tp // layout.ep, layout.ep)))
    table = {a: groups_of(dense, (a,)) for a in reversed(DENSE)}
    table |= {a: groups_of(expert, (a,)) for a in ("ep", "edp")}
    table["mp"] = groups_of(dense, ("pp", "tp"))
    table["embd"] = [(g[0], g[-1]) if len(g) > 1 else g for g in table["pp"]]
    return table


@dataclass(frozen=True)
class Mesh:
    """This rank's axes. `Mesh()` is the one-process mesh: no torch.distributed needed."""
    tp: Axis = Axis("tp")
    dp: Axis = Axis("dp")
    pp: Axis = Axis("pp")
    ep: Axis = Axis("ep")
    edp: Axis = Axis("edp")
    embd: Axis = Axis("embd")                                         # first and last stage; size 1 on the ranks between

    @classmethod
    def build(cls, layout: Layout) -> Mesh:
        """Make every group of `layout`; collective over all ranks. Its `sp` and `vpp` make no group: layers have `sequence_parallel=`.
        Raises: ValueError on another world size, and on sizes that do not divide it."""
        import torch.distributed as dist
        world = dist.get_world_size() if dist.is_initialized() else 1
        if layout.world != world:
            raise ValueError(f"Mesh: the layout must cover every rank, got {layout.world} ranks in the layout and "
                             f"{world} in the world; start {layout.world} ranks or change the sizes")
        small = [f"{name}={n}" for name, n in (("tp", layout.tp), ("pp", layout.pp), ("ep", layout.ep)) if n < 1]
        if small:
            raise ValueError(f"Mesh: the sizes of a layout must be >= 1, got {', '.join(small)}; 1 leaves an axis out")
        if not layout.whole:
            raise ValueError(f"Mesh: tp x pp must divide the {world} ranks, got {layout.tp} x {layout.pp}; "
                             f"start {layout.tp * layout.pp} ranks or a multiple, or change the sizes")
        if layout.dp * layout.tp % layout.ep:
            raise ValueError(f"Mesh: ep must divide the dp x tp = {layout.dp * layout.tp} ranks of a stage, got ep={layout.ep}")
        me = dist.get_rank() if world > 1 else 0

        def axis(name: str, rows: list[tuple[int, ...]]) -> Axis:
            mine = next((r for r in rows if me in r), (me,))
            group = None
            if any(len(r) > 1 for r in rows):                         # collective: ranks that are in none take part
                group, _ = dist.new_subgroups_by_enumeration([list(r) for r in rows])
            return Axis(name, len(mine), mine.index(me), mine, group if len(mine) > 1 else None)
        return cls(**{n: axis(n, rows) for n, rows in rank_table(layout).items() if n in cls.__dataclass_fields__})
