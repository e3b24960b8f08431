"""The step tables of kernels/comm/protocol.py, over all interleavings: data, liveness, faults; and what each feature is there for."""
import ctypes
import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_checker import Model, Violation, explore
from ranks import run

from interlace.kernels.comm import SymmHeap, all_gather, all_reduce, all_to_all, protocol, reduce_scatter
from interlace.kernels.comm.heap import LIB
from interlace.kernels.comm.protocol import TABLES, Control, Step, buffer_of, heap

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
WRAP = 3                                                              # bits of an epoch: it wraps every 8 calls


@pytest.fixture(autouse=True)
def one_pad(monkeypatch):
    """A pad has a fixed number of flags a source; the tables, which know one call, take its number of items for it."""
    monkeypatch.setattr(protocol, "flag_word", lambda stage, source, item, world, flags: (stage * world + source) * 4 + item)


def kernel(table, world, items=1, period=2, c=protocol.FULL, then=(), edit=lambda rank, epoch, call: call, **options):
    """The model of a kernel's table. then: (table, items) of the calls that follow on the same pad, in turns; edit: what a control changes."""
    arguments = {k: options.pop(k) for k in ("programs", "pushers", "tiles") if k in options}
    turns = [(table, items), *then]

    def calls(rank, epoch):
        name, n = turns[epoch % len(turns)]
        return edit(rank, epoch, TABLES[name](rank, world, epoch, n, c=c, **arguments))
    return Model(calls, world, period, **{"wrap": WRAP, "timeouts": "deaths" in options or "giveups" in options, **options})


def on_cpu(world, buffers=2, period=2, agreed=lambda epoch: True, edit=lambda rank, epoch, call: call, **options):
    """The model of the heap's collectives on the CPU."""
    return Model(lambda rank, epoch: edit(rank, epoch, heap(rank, world, epoch, buffers, agreed(epoch))), world, period, kernels=False,
                 **{"wrap": WRAP, **options})


def wake_up(world, checked=True, **options):
    """wait_long() and signal() of csrc/runtime/heap.cpp: a waiter announces itself, sleeps unless the flag is there, and looks again."""
    def calls(rank, epoch):
        steps = [Step("signal", rank), Step("wake", rank)]
        for q in range(world):
            if q != rank:
                asleep = [Step("sleep", q, source=q)] if checked else [Step("look", q, source=q), Step("doze", q, source=q)]
                steps += [Step("awaits", q, source=q), *asleep, Step("woken", q, source=q), Step("leaves", q, source=q), Step("wait", q, source=q)]
        return [[tuple(steps)]]
    return Model(calls, world, kernels=False, **options)


def changed(do, **new):
    """An edit: every step of that kind, also inside a `last`, with other fields."""
    def of(step):
        step = dataclasses.replace(step, steps=tuple(map(of, step.steps)))
        return dataclasses.replace(step, **{k: v(step) if callable(v) else v for k, v in new.items()}) if step.do == do else step
    return lambda rank, epoch, call: [[tuple(map(of, program)) for program in k] for k in call]


def one_call_less(rank, epoch, call):
    """Rank 1 makes 5 calls where the others make 6. Which one it left out, flags cannot tell."""
    return [] if rank == 1 and epoch == 5 else call


def consumers_first(rank, epoch, call):
    return [k[::-1] for k in call]


def silent(rank, epoch, call):
    """Rank 0 has no rows, and neither signals nor is waited for."""
    return [[tuple(s for s in program if s.item == -1 or s.source != 0) for program in k] for k in call]


def chain(world, items=1, always=True, c=protocol.FULL, **options):
    """rs_residual_norm that sends its rows on, into the pad of the next all-gather, which then sends nothing; not always: every other one does."""
    def calls(rank, epoch):
        push, take = TABLES["scatter"](rank, world, epoch, items, c=c)
        sends = always or epoch % 2 == 0
        onward = [s for item in range(items) for s in protocol._send(
            rank, [q for q in range(world) if q != rank], epoch, c, area="next", slot=protocol.part_slot(rank, item, items),
            word=protocol.flag_word(0, rank, item, world, items), source=rank, item=item)] if sends else []
        onward = [dataclasses.replace(s, slot=s.slot + 100) if s.do == "signal" else s for s in onward]
        after = TABLES["gather"](rank, world, epoch, items, pushers=0 if sends else 1, c=c)
        for edit in (changed("write", area="next"), changed("read", area="next"), *(changed(do, slot=lambda s: s.slot + 100) for do in ("signal", "wait"))):
            after = edit(rank, epoch, after)
        return [push, [(*take[0][:-1], *onward, take[0][-1])], *after]
    return Model(calls, world, epoch_word=False, **{"wrap": WRAP, **options})


# ---- what holds: name, model, fewest states -------------------------------------------------------------------

MIXED = (("one_shot", 1), ("two_shot", 2), ("two_shot", 1))            # every order of the two, and of few and many items
HOLDS = {
    "heap, 2 ranks": (lambda: on_cpu(2, weak=True), 100),
    "heap, 3 ranks": (lambda: on_cpu(3, weak=True), 1000),
    "heap, 4 ranks": (lambda: on_cpu(4), 5000),
    "heap, 2 ranks, calls that do not match": (lambda: on_cpu(2, period=6, agreed=lambda e: e % 3 > 0, weak=True), 100),
    "heap, 3 ranks, calls that do not match": (lambda: on_cpu(3, period=6, agreed=lambda e: e % 3 > 0, weak=True), 1000),
    "heap, 2 ranks, sleep and wake-up": (lambda: wake_up(2, weak=True), 1000),
    "heap, 3 ranks, sleep and wake-up": (lambda: wake_up(3), 10000),
    "heap, 2 ranks, one dies": (lambda: on_cpu(2, deaths=1, weak=True), 300),
    "heap, 3 ranks, two die": (lambda: on_cpu(3, deaths=2, weak=True), 5000),
    "heap, 3 ranks, any two waits run out": (lambda: on_cpu(3, giveups=2, weak=True), 3000),
    "heap, 3 ranks, the last call left out by one": (lambda: on_cpu(3, period=6, cyclic=False, edit=one_call_less, timeouts=True, weak=True), 1000),
    "one_shot, 2 ranks": (lambda: kernel("one_shot", 2, weak=True), 300),
    "one_shot, 3 ranks": (lambda: kernel("one_shot", 3, weak=True), 5000),
    "one_shot, 2 ranks, 2 programs": (lambda: kernel("one_shot", 2, 2, programs=2), 5000),
    "two_shot, 2 ranks, 2 items": (lambda: kernel("two_shot", 2, 2, weak=True), 500),
    "two_shot, 3 ranks, 2 items": (lambda: kernel("two_shot", 3, 2, weak=True), 5000),
    "two_shot, 2 ranks, 2 programs": (lambda: kernel("two_shot", 2, 2, programs=2, weak=True), 3000),
    "one_shot and two_shot in turns, 2 ranks": (lambda: kernel("one_shot", 2, 2, 4, then=MIXED, weak=True), 1000),
    "one_shot and two_shot in turns, 3 ranks": (lambda: kernel("one_shot", 3, 2, 4, then=MIXED), 10000),
    "gather, 2 ranks": (lambda: kernel("gather", 2, weak=True), 3000),
    "gather, 3 ranks": (lambda: kernel("gather", 3, epoch_word=False, weak=True), 10000),
    "gather, 2 ranks, 1 and 2 items in turns": (lambda: kernel("gather", 2, then=[("gather", 2)], epoch_word=False, weak=True), 500),
    "scatter, 2 ranks": (lambda: kernel("scatter", 2, weak=True), 500),
    "scatter, 3 ranks": (lambda: kernel("scatter", 3, weak=True), 10000),
    "scatter, 2 ranks, 2 programs, 2 tiles": (lambda: kernel("scatter", 2, programs=2, tiles=2, epoch_word=False, weak=True), 5000),
    "scatter, 2 ranks, 1 and 2 items in turns": (lambda: kernel("scatter", 2, then=[("scatter", 2)], weak=True), 500),
    "gather, 2 ranks, one program at a time": (lambda: kernel("gather", 2, slots=1, weak=True), 500),
    "gather, 2 ranks, 2 + 2 programs in 2 slots": (lambda: kernel("gather", 2, 2, pushers=2, programs=2, slots=2, epoch_word=False, weak=True), 5000),
    "one_shot, 2 ranks, one program at a time": (lambda: kernel("one_shot", 2, 2, programs=2, slots=1, weak=True), 500),
    **{f"{name}, 2 ranks, {text}": (partial(kernel, name, 2, weak=True, **fault), 100) for name in TABLES for text, fault in (
        ("one dies", {"deaths": 1}), ("any two waits run out", {"giveups": 2}),
        ("the last call left out by one", {"edit": one_call_less, "period": 6, "cyclic": False, "timeouts": True}))},
    "scatter that feeds a gather, 2 ranks": (lambda: chain(2, weak=True), 500),
    "scatter that feeds a gather, 3 ranks": (lambda: chain(3, weak=True), 5000),
    "scatter that feeds every other gather, 2 ranks": (lambda: chain(2, always=False, weak=True), 500),
    "scatter that feeds a gather, 2 ranks, any two waits run out": (lambda: chain(2, giveups=2, timeouts=True, weak=True), 500),
    "one_shot, 2 ranks, 2 programs, any two waits run out": (lambda: kernel("one_shot", 2, 2, programs=2, giveups=2, epoch_word=False), 1000),
    "two_shot, 2 ranks, 2 programs, any two waits run out": (lambda: kernel("two_shot", 2, 2, programs=2, giveups=2, epoch_word=False, weak=True), 1000),
    "one_shot, 3 ranks, one dies": (lambda: kernel("one_shot", 3, deaths=1, weak=True), 5000),
    "two_shot, 3 ranks, one dies": (lambda: kernel("two_shot", 3, 2, deaths=1, weak=True), 5000),
}

# ---- what each feature is for: the feature taken away -> the violation ----------------------------------------

OFF = {"weak": True}
CONTROLS = {
    "heap, 1 buffer": (lambda: on_cpu(2, buffers=1), "wrong data"),
    "heap, no release": (lambda: on_cpu(2, weak=True, relaxed=("signal",)), "wrong data"),
    "heap, no acquire": (lambda: on_cpu(2, weak=True, relaxed=("wait",)), "wrong data"),
    "heap, flags by ==": (lambda: on_cpu(2, compare="=="), "deadlock"),
    "heap, flags by unsigned >=": (lambda: on_cpu(2, period=8, compare="unsigned"), "wrong data"),
    "heap, sleep without a second look": (lambda: wake_up(2, checked=False), "deadlock"),
    "heap, wake-up not sequentially consistent": (lambda: wake_up(2, weak=True, relaxed=("wake",)), "deadlock"),
    "heap, sleep not sequentially consistent": (lambda: wake_up(2, weak=True, relaxed=("sleep",)), "deadlock"),
    "one_shot, 1 buffer": (lambda: kernel("one_shot", 2, c=Control(buffers=1)), "wrong data"),
    "two_shot and one_shot in turns, 1 buffer": (lambda: kernel("one_shot", 2, then=[("two_shot", 2)], c=Control(buffers=1)), "wrong data"),
    "gather, 1 buffer": (lambda: kernel("gather", 2, c=Control(buffers=1)), "wrong data"),
    "scatter, 1 buffer": (lambda: kernel("scatter", 2, c=Control(buffers=1)), "wrong data"),
    **{f"{name}, {text}": (partial(kernel, name, 2, **OFF, **off), "wrong data") for name in TABLES for text, off in (
        ("no acquire", {"relaxed": ("wait",)}), ("no dependence of loads on the wait", {"token": False}))},
    **{f"{name}, {text}": (partial(kernel, name, 2, **OFF, **off), "wrong data") for name in ("one_shot", "two_shot", "gather") for text, off in (
        ("no barrier", {"c": Control(barrier=False)}), ("no release", {"relaxed": ("signal",)}))},
    "scatter, no barrier": (lambda: kernel("scatter", 2, programs=2, tiles=2, epoch_word=False, c=Control(barrier=False), **OFF), "wrong data"),
    "scatter, counter not acq_rel": (lambda: kernel("scatter", 2, programs=2, tiles=2, epoch_word=False, relaxed=("last",), **OFF), "wrong data"),
    **{f"{name}, flags by unsigned >=": (partial(kernel, name, 2, period=8, compare="unsigned"), "wrong data") for name in TABLES},
    **{f"{name}, flags by ==": (partial(kernel, name, 2, compare="=="), "deadlock") for name in ("one_shot", "gather", "scatter")},
    **{f"{name}, on after a wait that ran out": (partial(kernel, name, 2, giveups=1, expiry="goes on"), "wrong data") for name in TABLES},
    **{f"{name}, waits without end, one dies": (partial(kernel, name, 2, deaths=1, timeouts=False), "deadlock") for name in TABLES},
    "scatter that feeds a gather, no barrier": (lambda: chain(2, c=Control(barrier=False), weak=True), "wrong data"),
    "scatter that feeds a gather, no release": (lambda: chain(2, relaxed=("signal",), weak=True), "wrong data"),
    "gather, consumers first, one program at a time": (lambda: kernel("gather", 2, slots=1, edit=consumers_first), "deadlock"),
    "gather, consumers first, 2 + 2 programs in 2 slots": (
        lambda: kernel("gather", 2, 2, pushers=2, programs=2, slots=2, epoch_word=False, edit=consumers_first), "deadlock"),
    "gather, a rank without rows is silent": (lambda: kernel("gather", 2, edit=silent), "wrong data"),
    "gather, the first program bumps the epoch": (lambda: kernel("gather", 2, edit=changed("last", of=1)), "wrong data"),
}

# ---- designs not taken, and what could be spared ----------------------------------------------------------------------------------------


def pull(world, after):
    """Read from the others between barriers of set and reset flags; one buffer."""
    def meet(rank, stage):
        return [Step(do, *((q, "", 0, stage * world + rank) if do == "put" else (rank, "", 0, stage * world + q)), source=q)
                for do in ("put", "take") for q in range(world) if q != rank]

    def calls(rank, epoch):
        return [[(Step("write", rank, "part", source=rank), *meet(rank, 0), *(Step("read", q, "part", source=q) for q in range(world) if q != rank),
                  *(meet(rank, 1) if after else ()))]]
    return Model(calls, world, kernels=False)


def sentinel(world, buffers):
    """Data that is its own flag: push, poll until it is no longer empty, empty the buffer of the call before."""
    def calls(rank, epoch):
        others = [q for q in range(world) if q != rank]
        return [[(*(Step("write", q, "part", epoch % buffers, rank, rank) for q in others), *(Step("poll", rank, "part", epoch % buffers, q, q) for q in others),
                  *(Step("clear", rank, "part", (epoch - 1) % buffers, q, q) for q in others))]]
    return Model(calls, world, 6, kernels=False)


def ring(world, buffers):
    """Reduce-scatter around a ring: each hop has a slot and a flag."""
    def calls(rank, epoch):
        after, before = (rank + 1) % world, (rank - 1) % world
        return [[tuple(s for hop in range(world - 1) for s in (
            Step("write", after, "part", epoch % buffers, hop, rank), Step("signal", after, slot=hop),
            Step("wait", rank, slot=hop, source=before), Step("read", rank, "part", epoch % buffers, hop, before)))]]
    return Model(calls, world, kernels=False)


def flags_by_parity(rank, epoch, call):
    return changed("signal", slot=lambda s: 2 * s.slot + epoch % 2)(rank, epoch, changed("wait", slot=lambda s: 2 * s.slot + epoch % 2)(rank, epoch, call))


OTHERS = {
    "two_shot alone, 1 buffer": (lambda: kernel("two_shot", 2, 2, c=Control(buffers=1)), ""),
    "scatter that feeds a gather alone, 1 buffer": (lambda: chain(2, c=Control(buffers=1)), ""),
    "push, flags by == in two sets": (lambda: kernel("one_shot", 2, compare="==", edit=flags_by_parity), ""),
    "push, flags by == in two sets, 3 ranks": (lambda: kernel("one_shot", 3, compare="==", edit=flags_by_parity), ""),
    "pull, set and reset flags, a barrier before the read": (lambda: pull(2, False), "wrong data"),
    "pull, a barrier before and after the read": (lambda: pull(2, True), ""),
    "pull, a barrier before and after the read, 3 ranks": (lambda: pull(3, True), ""),
    "sentinel, 2 buffers": (lambda: sentinel(2, 2), "deadlock"),
    "sentinel, 3 buffers": (lambda: sentinel(2, 3), ""),
    "sentinel, 3 buffers, 3 ranks": (lambda: sentinel(3, 3), ""),
    "ring, 1 buffer, 3 ranks": (lambda: ring(3, 1), "wrong data"),
    "ring, 2 buffers, 3 ranks": (lambda: ring(3, 2), ""),
    "ring, 2 buffers, 4 ranks": (lambda: ring(4, 2), ""),
}

# ---- tests ----------------------------------------------------------------------------------------------------


def row(name, model, result):
    """The line of docs/protocol.md."""
    verdict = f"{result.violation} after {len(result.trace)} step{'s' * (len(result.trace) > 1)}" if result.violation else "holds"
    return f"| {name} | {'weak' if model.weak else 'program'} | {result.states} | {verdict} |"


def checked(name, make):
    """The result of a model, which docs/protocol.md must tell."""
    model = make()
    result = explore(model)
    line = row(name, model, result)
    assert line in PAGE.read_text(), f"docs/protocol.md lacks\n{line}\nmake it anew: python tests/test_protocol.py\n{result}"
    return result


@pytest.mark.parametrize("name", HOLDS)
def test_holds(name):
    make, floor = HOLDS[name]
    result = checked(name, make)
    assert not result.violation, f"{name}: {result}"
    assert result.states >= floor, f"{name}: only {result.states} states were met"


@pytest.mark.parametrize("name", CONTROLS)
def test_each_feature_is_needed(name):
    make, violation = CONTROLS[name]
    result = checked(name, make)
    assert result.violation == violation and result.trace, f"{name}: should end in {violation!r}: {result}"


@pytest.mark.parametrize("name", OTHERS)
def test_designs_not_taken(name):
    make, violation = OTHERS[name]
    result = checked(name, make)
    assert result.violation == violation and result.states > 20, f"{name}: should end in {violation!r}: {result}"


def test_every_table_has_every_control():
    """A new table needs its row in each of the lists."""
    for name in TABLES:
        held = [n for n in HOLDS if n.startswith(name)]
        assert any("3 ranks" in n for n in held) and any("dies" in n for n in held) and any("left out" in n for n in held), name
        for feature in ("1 buffer", "no barrier", "no release", "no acquire", "no dependence"):
            assert any(name in n and feature in n for n in CONTROLS) or (name, feature) == ("scatter", "no release"), (name, feature)


# ---- the table of the CPU heap is what csrc/runtime does ------------------------------------------------------

TRACED = [("write", "part"), ("write", "call"), ("signal", None), ("wait", None), ("read", "call"), ("read", "part")]


def replay(world, traces, buffers=2):
    """The steps of all ranks in the order of time, as a path of the table: each is allowed by the ones before. Raises ValueError or Violation."""
    model = Model(lambda rank, epoch: heap(rank, world, epoch, buffers), world, kernels=False, weak=True, merge=False)
    keys = {i: key for key, i in model.ids.items()}
    places = [{(i * 2 // len(program), m.do, keys[m.cells[0]][2] if m.do in ("write", "read") else None, keys[m.cells[0]][1]): i
               for i, m in enumerate(program)} for program in model.programs]
    n, steps = len(model.programs[0]), []
    for rank, rows in enumerate(traces):
        for ns, step, tick, at, buffer in rows:
            do, area = TRACED[step]
            steps.append((ns, rank, tick // 2 * n + places[rank][tick % 2, do, area, at], buffer, f"rank {rank}: {do} {area} of {at}, tick {tick}"))
    taken, done, memory = {(rank, i) for _, rank, i, *_ in steps}, set(), model.start[0]
    for _, rank, i, buffer, text in sorted(steps):
        m, back = model.programs[rank][i % n], i // n * 2 * 64
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
    LIB.interlace_heap_trace.restype, LIB.interlace_heap_trace.argtypes = None, (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64)
    LIB.interlace_heap_trace(heap.handle, rows, room)
    calls(rank, world, heap)
    LIB.interlace_heap_trace(heap.handle, None, 0)
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


if __name__ == "__main__":                                            # the tables of docs/protocol.md, made anew
    protocol.flag_word = lambda stage, source, item, world, flags: (stage * world + source) * 4 + item
    page = PAGE.read_text()
    for title, models in (("holds", HOLDS), ("controls", CONTROLS), ("others", OTHERS)):
        lines = [row(name, model := make(), explore(model)) for name, (make, _) in models.items()]
        page = re.sub(rf"(<!-- {title} -->\n(?:\|.*\n){{2}})(?:\|.*\n)*", lambda m, lines=lines: m[1] + "\n".join(lines) + "\n", page)
    PAGE.write_text(page)
