"""The timeline of a pipeline schedule, before anything runs: which rank does what when, and the share that is bubble.

The order of each rank's actions is torch.distributed.pipelining's own; when they happen follows from what they wait for, with a
forward of a stage taking 1, the input's and the weights' gradients 1 each, and messages nothing.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..parallel.errors import UserError
from ..parallel.layout import SCHEDULES, Layout, stages_of_rank
from .config import Config, ModelConfig

LENGTH = {"F": 1, "B": 2, "I": 1, "W": 1}
WORDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#f58518", "W": "#54a24b"}
MEANING = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradients of the weights"}


@dataclass(frozen=True)
class Slot:
    """What a rank does from `start` to `stop`: kind F, B, I or W of a micro-batch in a stage."""
    kind: str
    stage: int
    microbatch: int
    start: int
    stop: int


def timeline(m: ModelConfig, microbatches: int) -> list[list[Slot]]:
    """The slots of each pp rank, in order."""
    pp = m.pipeline_model_parallel_size
    last, queues = pp * m.chunks - 1, _orders(m, microbatches)
    done: dict[tuple[str, int, int], int] = {}                        # (F or I, stage, micro-batch) -> when it ended
    rows: list[list[Slot]] = [[] for _ in range(pp)]
    while any(queues):
        moved = False
        for queue, row in zip(queues, rows):
            while queue:
                kind, stage, i = queue[0]
                if kind == "F":
                    needs = [("F", stage - 1, i)] if stage else []
                else:
                    needs = [("F", stage, i)] + ([("I", stage + 1, i)] if kind in "BI" and stage < last else [])
                if any(n not in done for n in needs):
                    break
                start = max([row[-1].stop if row else 0, *(done[n] for n in needs)])
                row.append(Slot(kind, stage, i, start, start + LENGTH[kind]))
                if kind != "W":
                    done["F" if kind == "F" else "I", stage, i] = row[-1].stop
                queue.pop(0)
                moved = True
        if not moved:
            raise AssertionError(f"the order of {m.schedule} waits for itself")
    return rows


def _orders(m: ModelConfig, microbatches: int) -> list[list[tuple[str, int, int]]]:
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    how, pp, n = SCHEDULES[m.schedule], m.pipeline_model_parallel_size, microbatches
    if not how.chunked:                                               # torch's own table of 1F1B is one micro-batch off on the last rank
        warm = [n if m.schedule == "gpipe" else min(n, pp - rank - 1) for rank in range(pp)]
        return [[("F", r, i) for i in range(w)] + [(k, r, i + w if k == "F" else i) for i in range(n - w) for k in "FB"]
                + [("B", r, i) for i in range(n - w, n)] for r, w in enumerate(warm)]
    every = get_schedule_ops(getattr(schedules, how.torch_name), pp, n, m.chunks)
    orders = []
    for rank, actions in enumerate(every):
        mine = stages_of_rank(m, rank)
        order: list[tuple[str, int, int]] = []
        for a in (a for a in actions if a is not None):
            kind = WORDS.get(a.computation_type.name)
            if kind is not None:                                      # the rest is DistributedDataParallel's, and costs nothing here
                assert a.stage_index in mine and a.microbatch_index is not None
                order.append((kind, a.stage_index, a.microbatch_index))
        orders.append(order)
    return orders


def in_flight(m: ModelConfig, microbatches: int, rank: int) -> list[dict[int, int]]:
    """{stage: micro-batches whose forward has run and whose backward has not} of a pp rank, each time a backward is about to begin.
    Without torch: tests/test_schedule.py holds it against `timeline`.

    1F1B keeps min(n, p - r), GPipe n. Interleaved: a rank runs (v - 1) * round + 2 (p - 1 - r) forwards before its first pair (zero
    bubble: p - 1 - r of them), in rounds of about p micro-batches a chunk. ZBV: on the way out 2 p - 1 - r, on the way back r + 1."""
    n, pp, v = microbatches, m.pipeline_model_parallel_size, m.chunks
    how, mine = SCHEDULES[m.schedule], stages_of_rank(m, rank)
    if not how.chunked:
        return [{rank: n if m.schedule == "gpipe" else min(n, pp - rank)}]
    if how.v_shaped:
        return [{mine[0]: min(n, 2 * pp - 1 - rank), mine[1]: min(n, rank + 1)}]
    size = n // max(1, n // pp)                                       # micro-batches of a round
    first = min(n * v, (v - 1) * size + (1 if how.split_backward else 2) * (pp - 1 - rank) + 1)
    order = [mine[k // size % v] for k in range(n * v)]               # of forwards; backwards: the chunks from the last
    live = dict.fromkeys(mine, 0)
    seen = []
    for k in range(n * v):
        for i in order[(0 if k == 0 else first + k - 1):first + k]:
            live[i] += 1
        seen.append(dict(live))
        live[mine[v - 1 - k // size % v]] -= 1
    return seen


def deferred_at_once(m: ModelConfig, microbatches: int, rank: int) -> int:
    """The most backwards of a pp rank that have done I and not W: 0 where the schedule does not split them."""
    if not SCHEDULES[m.schedule].split_backward:
        return 0
    return min(2 * rank + 1, microbatches) if SCHEDULES[m.schedule].v_shaped else min(rank + 1, microbatches * m.chunks)


def bubble(rows: list[list[Slot]]) -> float:
    """The share of the ranks' time in which they wait."""
    end = max(row[-1].stop for row in rows)
    return 1 - sum(s.stop - s.start for row in rows for s in row) / (end * len(rows))


def text(m: ModelConfig, microbatches: int, width: int = 160) -> str:
    """One line a rank: the micro-batch's number where a slot starts, F in digits, B I W marked."""
    rows = timeline(m, microbatches)
    end = max(row[-1].stop for row in rows)
    cell = max(2, len(str(microbatches - 1)) + 1)
    shown = end if 10 + end * cell <= width else (width - 14) // cell
    lines = [f"schedule: {m.schedule}, {len(rows)} ranks x {m.chunks} stages, {microbatches} micro-batches, bubble {bubble(rows):.1%}",
             "          (forward 1 long, each half of a backward 1; 3: forward of micro-batch 3, B3 its backward, I3 and W3 the halves)"]
    for rank, row in enumerate(rows):
        cells = ["." * cell] * end
        for s in row:
            cells[s.start] = f"{s.kind if s.kind != 'F' else ' '}{s.microbatch}".rjust(cell)
            for k in range(s.start + 1, s.stop):
                cells[k] = "-" * cell
        lines.append(f"  rank {rank:<3}" + "".join(cells[:shown]) + ("" if shown == end else " ..."))
    return "\n".join(lines)


def show(config: Config, world: int, png: str = "") -> str:
    """The text of `interlace explain --schedule`; draws `png` where it names a file. Raises: UserError without a pipeline, and where
    the picture cannot be drawn."""
    layout, m = Layout.from_config(config, world), config.model
    if layout.pp == 1:
        raise UserError("--schedule needs pipeline_model_parallel_size > 1 (without stages nothing is scheduled), got 1; add pp=2")
    n = m.global_batch_size // (m.micro_batch_size * layout.dp)
    said = text(m, n)
    if not png:
        return said
    try:
        draw(m, n, Path(png))
    except OSError as e:
        raise UserError(f"--schedule must be a file that can be written, got {png}: {e.strerror or e}; choose another") from None
    except ValueError as e:                                           # matplotlib knows the format by the name's end
        raise UserError(f"--schedule must name a picture such as pipeline.png, got {png}: {str(e).splitlines()[0]}") from None
    return f"{said}\nwritten to {png}"


def draw(m: ModelConfig, microbatches: int, path: Path) -> None:
    """The timeline as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = timeline(m, microbatches)
    end = max(row[-1].stop for row in rows)
    fig, ax = plt.subplots(figsize=(min(24, 2 + 0.28 * end), 1.2 + 0.5 * len(rows)))
    seen: dict[str, Any] = {}
    for rank, row in enumerate(rows):
        for s in row:
            shade = 1 - 0.55 * (stages_of_rank(m, rank).index(s.stage) / max(1, m.chunks))     # later chunks are paler
            bar = ax.barh(rank, s.stop - s.start, left=s.start, color=COLOURS[s.kind], alpha=shade, edgecolor="white", linewidth=0.5)
            seen.setdefault(s.kind, bar)
            ax.text((s.start + s.stop) / 2, rank, str(s.microbatch), ha="center", va="center", fontsize=7)
    ax.set_yticks(range(len(rows)), [f"rank {r}" for r in range(len(rows))])
    ax.invert_yaxis()
    ax.set_xlim(0, end)
    ax.set_xlabel("time, in forwards of a stage")
    ax.set_title(f"{m.schedule}: {microbatches} micro-batches, bubble {bubble(rows):.1%}", fontsize=10)
    ax.legend(seen.values(), [MEANING[k] for k in seen], fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncol=len(seen))
    fig.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(fig)
