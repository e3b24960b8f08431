"""The step table of the CPU heap is what csrc/runtime does: traced steps of real collectives are paths of it, and bent ones are not."""
import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_checker import TAGS, Model, Violation
from ranks import run

from interlace.kernels.comm import SymmHeap, all_gather, all_reduce, all_to_all, reduce_scatter
from interlace.kernels.comm.heap import LIB
from interlace.kernels.comm.protocol import heap

TRACED = [("write", "part"), ("write", "call"), ("signal", None), ("wait", None), ("read", "call"), ("read", "part")]


def replay(world, traces, buffers=2):
    """The steps of all ranks in the order of time, as a path of the table, in its weak order: each is allowed by those before it.

    Raises: ValueError, and Violation where a read finds what it should not."""
    model = Model(lambda rank, epoch: heap(rank, world, epoch, buffers), world, kernels=False, weak=True, reduce=False)
    keys = {i: key for key, i in model.ids.items()}
    places = [{(i * 2 // len(program), m.do, keys[m.cells[0]][2] if m.do in ("write", "read") else None, keys[m.cells[0]][1]): i
               for i, m in enumerate(program)} for program in model.programs]
    n, steps = len(model.programs[0]), []
    for rank, rows in enumerate(traces):
        for ns, step, tick, at, buffer in rows:
            do, area = TRACED[step]
            text = f"rank {rank}: {do} {area or 'flag'} of {at}, tick {tick}"
            steps.append((ns, rank, tick // 2 * n + places[rank][tick % 2, do, area, at], buffer, text))
    taken, done, memory = {(rank, i) for _, rank, i, *_ in steps}, set(), model.start[0]
    for _, rank, i, buffer, text in sorted(steps):
        m, back = model.programs[rank][i % n], i // n * 2 * TAGS
        if any((rank, i - d) in taken - done for d in model.blockers[rank][i % n]):
            raise ValueError(f"{text}: before a step that the table puts first")
        if m.do in ("write", "read") and keys[m.cells[0]][3] != buffer:
            raise ValueError(f"{text}: in buffer {buffer}")
        memory, _ = model.perform(m, back, memory)
        if memory is None:
            raise ValueError(f"{text}: the table must wait here")
        done.add((rank, i))
    return len(steps)


def _calls(rank, world, heap):
    """Every collective, in one chunk and in several, one-shot and two-shot, staged; each rank dawdles in its own way."""
    x = torch.arange(9000.0)
    LIB.interlace_heap_tune(heap.handle, -1, -1, 16384, 1 << 60)
    for i in range(2):
        LIB.interlace_heap_test(heap.handle, 1, (0, 400)[(i + rank) % 2])
        for two_shot in (1 << 60, 0):
            LIB.interlace_heap_tune(heap.handle, -1, -1, -1, two_shot)
            assert all_reduce(x, heap).eq(x * world).all()
            staged = heap.stage((100,), torch.float32)
            assert all_reduce(staged.fill_(i), heap).eq(i * world).all()
        all_gather(x, heap)
        reduce_scatter(x, heap)
        all_to_all(x, heap)
        heap.barrier()


def _traced(rank, world, buffers, calls):
    """The rows of every rank, on every rank."""
    heap, room = SymmHeap(dist.group.WORLD, 65536, _buffers=buffers), 20000
    rows = (ctypes.c_int64 * (1 + 5 * room))()
    trace = LIB.interlace_heap_trace
    trace.restype, trace.argtypes = None, (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)
    trace(heap.handle, rows, room)
    calls(rank, world, heap)
    trace(heap.handle, None, 0)
    heap.close()
    assert 0 < rows[0] < room
    every = [None] * world
    dist.all_gather_object(every, [tuple(rows[1 + 5 * i:6 + 5 * i]) for i in range(rows[0])])
    return every


def _is_a_path(rank, world):
    traces = _traced(rank, world, 2, _calls)
    if rank:
        return
    assert replay(world, traces) > 300
    for rows in traces:                                               # one signal and one wait per tick, for each other rank
        ticks = [t for _, step, t, _, _ in rows if step == 2]
        assert ticks == list(range(1, len(ticks) + 1)) and len(ticks) > 30
        assert sorted(t for _, step, t, _, _ in rows if step == 3) == sorted(ticks * (world - 1))
    mine = traces[0]                                                  # and a trace that is none is refused
    read = next(i for i, row in enumerate(mine) if row[1] == 5)
    tick, first = mine[read][2], min(rows[0][0] for rows in traces)
    at = {step: next(i for i, row in enumerate(mine) if row[1] == step and row[2] == tick) for step in (0, 2, 3)}
    for i, time, text in ((at[0], mine[at[2]][0] + 1, "before a step that the table puts first"), (read, mine[at[3]][0] - 1, "puts first"),
                          (at[3], first - 1, "puts first|must wait here"), (at[2], mine[-1][0] + 1, "puts first|must wait here")):
        bent = list(mine)
        bent[i] = (time, *mine[i][1:])
        with pytest.raises(ValueError, match=text):
            replay(world, [bent, *traces[1:]])
    flipped = [(*row[:4], 1 - row[4]) if row[1] == 5 else row for row in mine]
    with pytest.raises(ValueError, match="in buffer"):
        replay(world, [flipped, *traces[1:]])


def _races(rank, world, heap):
    LIB.interlace_heap_test(heap.handle, 1, 3000 if rank == 0 else 0)
    for i in range(5):
        all_reduce(torch.full((1000,), float(i)), heap)


def _one_buffer(rank, world):
    traces = _traced(rank, world, 1, _races)
    if rank == 0:
        with pytest.raises(Violation, match=r"read part.* finds epoch"):
            replay(world, traces, buffers=1)


@pytest.mark.parametrize("world", [2, 3])
def test_heap_runs_along_its_table(world):
    run(world, _is_a_path, world)


def test_heap_with_one_buffer_runs_into_the_violation():
    run(2, _one_buffer, 2)


def test_trace_speaks_of_the_same_steps():
    text = (Path(__file__).parents[1] / "csrc" / "runtime" / "heap.h").read_text()
    assert re.search(r"enum Step : int64_t \{ WRITE, DESCRIBE, SIGNAL, WAIT, COMPARE, READ \}", text)
    assert re.search(r"int buffers = 2;", text) and "Desc desc[2];" in text
