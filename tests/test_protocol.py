"""The step tables of kernels/comm/protocol.py, over all interleavings: data, liveness, faults; and what each feature is there for."""
import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
from model_checker import Model, explore

from interlace.kernels.comm import protocol
from interlace.kernels.comm.protocol import TABLES, Control, Step, heap

PAGE = Path(__file__).parents[1] / "docs" / "protocol.md"
WRAP = 3                                                              # bits of an epoch: it wraps every 8 calls


@pytest.fixture(autouse=True)
def one_pad(monkeypatch):
    """A pad has a fixed number of flags a source; the tables, which know one call, take its number of items for it."""
    monkeypatch.setattr(protocol, "flag_word", lambda stage, source, item, world, flags: (stage * world + source) * 4 + item)


def kernel(table, world, items=1, period=2, c=protocol.FULL, then=(), edit=lambda rank, epoch, call: call, **options):
    """A kernel's table. then: (table, items) of the calls that follow on the same pad, in turns; edit: what a control changes."""
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
    waits = ("awaits", *(("sleep",) if checked else ("look", "doze")), "woken", "leaves", "wait")

    def calls(rank, epoch):
        return [[(Step("signal", rank), Step("wake", rank), *(Step(do, q, source=q) for q in range(world) if q != rank for do in waits))]]
    return Model(calls, world, kernels=False, **options)


def changed(do, **new):
    """An edit: every step of that kind, also inside a `last`, with other fields."""
    def of(step):
        step = dataclasses.replace(step, steps=tuple(map(of, step.steps)))
        return dataclasses.replace(step, **{k: v(step) if callable(v) else v for k, v in new.items()}) if step.do == do else step
    return lambda rank, epoch, call: [[tuple(map(of, program)) for program in k] for k in call]


def in_one_piece(rank, epoch, call):
    """The cells of 2 items of 2 ranks as they lie in a buffer: sums behind the parts, where one_shot has parts too."""
    for do in ("write", "read"):
        call = changed(do, area="part", slot=lambda s: s.slot + 2 * (s.area == "sum"))(rank, epoch, call)
    return call


def one_call_less(rank, epoch, call):
    """Rank 1 makes 5 calls where the others make 6. Which one it left out, flags cannot tell."""
    return [] if rank == 1 and epoch == 5 else call


def consumers_first(rank, epoch, call):
    return [k[::-1] for k in call]


def silent(rank, epoch, call):
    """Rank 0 has no rows, and neither signals nor is waited for."""
    return [[tuple(s for s in program if s.item == -1 or s.source != 0) for program in k] for k in call]


@dataclasses.dataclass(frozen=True)
class Late(Step):
    late: int = 1                                                     # a step of the tick before


def walk(world, halves=2, ticks="open walk walk walk tick open walk tick", **options):
    """A fused op on the CPU heap, between plain collectives: it opens with a tick without data, then writes a tick before it waits for
    the last one, in halves of the two buffers (csrc/runtime/heap.h)."""
    kinds = ticks.split()

    def calls(rank, epoch):
        kind, before, after = (kinds[(epoch + d) % len(kinds)] for d in (0, -1, 1))
        others = [q for q in range(world) if q != rank]
        place = lambda e, kind: range(2) if kind == "tick" else [e // 2 % halves]                     # noqa: E731

        def take(step, e):
            return [*(step("wait", q, source=q) for q in others),
                    *(step("read", q, "part", e % 2, h, q, 0) for q in others for h in place(e, kind) if kind != "open")]
        writes = [Step("write", rank, "part", epoch % 2, h, rank, 0) for h in place(epoch, kind) if kind != "open"]
        early = take(Late, epoch - 1) if kind == before == "walk" else []
        return [[(*writes, *early, Step("signal", rank), *(take(Step, epoch) if kind != "walk" or after != "walk" else ()))]]
    return Model(calls, world, len(kinds), kernels=False, **{"wrap": WRAP, **options})


def chain(world, items=1, always=True, c=protocol.FULL, **options):
    """rs_residual_norm that sends its rows on, into the pad of the next all-gather, which then sends nothing; or in every other call."""
    def calls(rank, epoch):
        push, take = TABLES["scatter"](rank, world, epoch, items, c=c)
        sends, others = always or epoch % 2 == 0, [q for q in range(world) if q != rank]
        onward = [s for item in range(items) for s in protocol._send(
            rank, others, epoch, c, area="next", slot=protocol.part_slot(rank, item, items),
            word=100 + protocol.flag_word(0, rank, item, world, items), source=rank, item=item)] if sends else []
        after = TABLES["gather"](rank, world, epoch, items, pushers=0 if sends else 1, c=c)
        for do, new in (("write", {"area": "next"}), ("read", {"area": "next"}), ("signal", {"slot": lambda s: s.slot + 100}),
                        ("wait", {"slot": lambda s: s.slot + 100})):
            after = changed(do, **new)(rank, epoch, after)
        return [push, [(*take[0][:-1], *onward, take[0][-1])], *after]
    return Model(calls, world, epoch_word=False, **{"wrap": WRAP, **options})


# ---- what holds: name, model, fewest states -------------------------------------------------------------------

MIXED = (("one_shot", 1), ("two_shot", 2), ("two_shot", 1))            # every order of the two, and of few and many items
LEFT_OUT = {"period": 6, "cyclic": False, "timeouts": True}
WEAK = {"weak": True}
SMALL = {"epoch_word": False}                                          # that is a matter of one rank: rows without it are of the rest
SLOTS = {"pushers": 2, "programs": 2, "slots": 2, **SMALL}
TILES = {"programs": 2, "tiles": 2, **SMALL}
COUNTED = {"scatter": TILES, "fetch": {"items": 2, "programs": 2, **SMALL}}   # the last program signals for all
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
    "heap, 3 ranks, the last call left out by one": (lambda: on_cpu(3, edit=one_call_less, **LEFT_OUT, weak=True), 1000),
    "heap, 2 ranks, fused ops among others": (lambda: walk(2, weak=True), 1000),
    "heap, 3 ranks, fused ops among others": (lambda: walk(3, weak=True), 2000),
    "heap, 3 ranks, fused ops among others, one dies": (lambda: walk(3, deaths=1), 5000),
    "one_shot, 2 ranks": (lambda: kernel("one_shot", 2, weak=True), 300),
    "one_shot, 3 ranks": (lambda: kernel("one_shot", 3, weak=True), 5000),
    "one_shot, 2 ranks, 2 programs": (lambda: kernel("one_shot", 2, 2, programs=2), 5000),
    "two_shot, 2 ranks, 2 items": (lambda: kernel("two_shot", 2, 2, weak=True), 500),
    "two_shot, 3 ranks, 2 items": (lambda: kernel("two_shot", 3, 2, weak=True), 5000),
    "two_shot, 2 ranks, 2 programs": (lambda: kernel("two_shot", 2, 2, programs=2, weak=True), 3000),
    "multicast, 2 ranks, 2 items": (lambda: kernel("multicast", 2, 2, weak=True), 500),
    "multicast, 3 ranks, 2 items": (lambda: kernel("multicast", 3, 2, weak=True), 5000),
    "multicast, 2 ranks, 2 programs": (lambda: kernel("multicast", 2, 2, programs=2, weak=True), 3000),
    "multicast, one_shot and two_shot in turns, 2 ranks": (
        lambda: kernel("multicast", 2, 2, 6, then=[("one_shot", 2), ("two_shot", 2)], edit=in_one_piece, weak=True), 1000),
    "one_shot and two_shot in turns, 2 ranks": (lambda: kernel("one_shot", 2, 2, 4, then=MIXED, weak=True), 1000),
    "one_shot and two_shot in turns, 3 ranks": (lambda: kernel("one_shot", 3, 2, 4, then=MIXED), 10000),
    "gather, 2 ranks": (lambda: kernel("gather", 2, weak=True), 3000),
    "gather, 3 ranks": (lambda: kernel("gather", 3, epoch_word=False, weak=True), 10000),
    "gather, 2 ranks, 1 and 2 items in turns": (lambda: kernel("gather", 2, then=[("gather", 2)], epoch_word=False, weak=True), 500),
    "scatter, 2 ranks": (lambda: kernel("scatter", 2, weak=True), 500),
    "scatter, 3 ranks": (lambda: kernel("scatter", 3, weak=True), 10000),
    "scatter, 2 ranks, 2 programs, 2 tiles": (lambda: kernel("scatter", 2, **TILES, weak=True), 5000),
    "scatter, 2 ranks, 1 and 2 items in turns": (lambda: kernel("scatter", 2, then=[("scatter", 2)], weak=True), 500),
    "fetch, 2 ranks": (lambda: kernel("fetch", 2, weak=True), 300),
    "fetch, 3 ranks": (lambda: kernel("fetch", 3, weak=True), 3000),
    "fetch, 2 ranks, 2 programs, 2 items": (lambda: kernel("fetch", 2, 2, programs=2, **SMALL, weak=True), 3000),
    "gather, 2 ranks, one program at a time": (lambda: kernel("gather", 2, slots=1, weak=True), 500),
    "gather, 2 ranks, 2 + 2 programs in 2 slots": (lambda: kernel("gather", 2, 2, **SLOTS, weak=True), 5000),
    "one_shot, 2 ranks, one program at a time": (lambda: kernel("one_shot", 2, 2, programs=2, slots=1, weak=True), 500),
    **{f"{name}, 2 ranks, {text}": (partial(kernel, name, 2, weak=True, **fault), 100) for name in TABLES for text, fault in (
        ("one dies", {"deaths": 1}), ("any two waits run out", {"giveups": 2}),
        ("the last call left out by one", {"edit": one_call_less, **LEFT_OUT}))},
    "scatter that feeds a gather, 2 ranks": (lambda: chain(2, weak=True), 500),
    "scatter that feeds a gather, 3 ranks": (lambda: chain(3, weak=True), 5000),
    "scatter that feeds every other gather, 2 ranks": (lambda: chain(2, always=False, weak=True), 500),
    "scatter that feeds a gather, 2 ranks, any two waits run out": (lambda: chain(2, giveups=2, timeouts=True, weak=True), 500),
    "one_shot, 2 ranks, 2 programs, any two waits run out": (lambda: kernel("one_shot", 2, 2, programs=2, giveups=2, **SMALL), 1000),
    "two_shot, 2 ranks, 2 programs, any two waits run out": (lambda: kernel("two_shot", 2, 2, programs=2, giveups=2, **SMALL), 1000),
    "one_shot, 3 ranks, one dies": (lambda: kernel("one_shot", 3, deaths=1, weak=True), 5000),
    "two_shot, 3 ranks, one dies": (lambda: kernel("two_shot", 3, 2, deaths=1, weak=True), 5000),
}

# ---- what each feature is for: the feature taken away -> the violation ----------------------------------------

CONTROLS = {
    "heap, 1 buffer": (lambda: on_cpu(2, buffers=1), "wrong data"),
    "heap, no release": (lambda: on_cpu(2, weak=True, relaxed=("signal",)), "wrong data"),
    "heap, no acquire": (lambda: on_cpu(2, weak=True, relaxed=("wait",)), "wrong data"),
    "heap, fused op without halves": (lambda: walk(2, halves=1), "wrong data"),
    "heap, fused op without its opening tick": (lambda: walk(2, ticks="walk walk walk tick"), "wrong data"),
    "heap, flags by ==": (lambda: on_cpu(2, compare="=="), "deadlock"),
    "heap, flags by unsigned >=": (lambda: on_cpu(2, period=8, compare="unsigned"), "wrong data"),
    "heap, sleep without a second look": (lambda: wake_up(2, checked=False), "deadlock"),
    "heap, wake-up not sequentially consistent": (lambda: wake_up(2, weak=True, relaxed=("wake",)), "deadlock"),
    "heap, sleep not sequentially consistent": (lambda: wake_up(2, weak=True, relaxed=("sleep",)), "deadlock"),
    "one_shot, 1 buffer": (lambda: kernel("one_shot", 2, c=Control(buffers=1)), "wrong data"),
    "two_shot and one_shot in turns, 1 buffer": (lambda: kernel("one_shot", 2, then=[("two_shot", 2)], c=Control(buffers=1)), "wrong data"),
    "multicast and one_shot in turns, 1 buffer": (
        lambda: kernel("multicast", 2, 2, then=[("one_shot", 2)], c=Control(buffers=1), edit=in_one_piece), "wrong data"),
    "gather, 1 buffer": (lambda: kernel("gather", 2, c=Control(buffers=1)), "wrong data"),
    "scatter, 1 buffer": (lambda: kernel("scatter", 2, c=Control(buffers=1)), "wrong data"),
    "fetch, 1 buffer": (lambda: kernel("fetch", 2, c=Control(buffers=1)), "wrong data"),
    **{f"{name}, {text}": (partial(kernel, name, 2, **WEAK, **off), "wrong data") for name in TABLES for text, off in (
        ("no acquire", {"relaxed": ("wait",)}), ("no dependence of loads on the wait", {"token": False}))},
    **{f"{name}, {text}": (partial(kernel, name, 2, **WEAK, **off), "wrong data") for name in TABLES if name not in COUNTED
       for text, off in (
        ("no barrier", {"c": Control(barrier=False)}), ("no release", {"relaxed": ("signal",)}))},
    **{f"{name}, no barrier": (partial(kernel, name, 2, **more, **WEAK, c=Control(barrier=False)), "wrong data")
       for name, more in COUNTED.items()},
    **{f"{name}, counter not acq_rel": (partial(kernel, name, 2, **more, **WEAK, relaxed=("last",)), "wrong data")
       for name, more in COUNTED.items()},
    **{f"{name}, flags by unsigned >=": (partial(kernel, name, 2, period=8, compare="unsigned"), "wrong data") for name in TABLES},
    **{f"{name}, flags by ==": (partial(kernel, name, 2, compare="=="), "deadlock") for name in ("one_shot", "gather", "scatter")},
    **{f"{name}, on after a wait that ran out": (partial(kernel, name, 2, giveups=1, expiry="goes on"), "wrong data") for name in TABLES},
    **{f"{name}, waits without end, one dies": (partial(kernel, name, 2, deaths=1, timeouts=False), "deadlock") for name in TABLES},
    "scatter that feeds a gather, no barrier": (lambda: chain(2, c=Control(barrier=False), weak=True), "wrong data"),
    "scatter that feeds a gather, no release": (lambda: chain(2, relaxed=("signal",), weak=True), "wrong data"),
    "gather, consumers first, one program at a time": (lambda: kernel("gather", 2, slots=1, edit=consumers_first), "deadlock"),
    "gather, consumers first, 2 + 2 programs in 2 slots": (
        lambda: kernel("gather", 2, 2, **SLOTS, edit=consumers_first), "deadlock"),
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
        reads = [Step("read", q, "part", source=q) for q in range(world) if q != rank]
        return [[(Step("write", rank, "part", source=rank), *meet(rank, 0), *reads, *(meet(rank, 1) if after else ()))]]
    return Model(calls, world, kernels=False)


def sentinel(world, buffers):
    """Data that is its own flag: push, poll until it is no longer empty, empty the buffer of the call before."""
    def calls(rank, epoch):
        others = [q for q in range(world) if q != rank]
        return [[(*(Step("write", q, "part", epoch % buffers, rank, rank) for q in others),
                  *(Step("poll", rank, "part", epoch % buffers, q, q) for q in others),
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
    for do in ("signal", "wait"):
        call = changed(do, slot=lambda s: 2 * s.slot + epoch % 2)(rank, epoch, call)
    return call


OTHERS = {
    "multicast alone, 1 buffer": (lambda: kernel("multicast", 2, 2, c=Control(buffers=1)), ""),
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


def test_reductions_change_no_verdict(monkeypatch):
    """Without them there are more states, and the same violations."""
    small = {n: v for n, v in {**CONTROLS, **HOLDS}.items() if not re.search("2 programs|3 ranks|4 ranks", n)}
    small = {n: v for n, v in small.items() if n.startswith(("heap", "two_shot", "one_shot")) or (n in CONTROLS and "scatter" not in n)}
    with_them = {name: explore(make()) for name, (make, _) in small.items()}
    monkeypatch.setattr(Model, "reduce", False)
    more = 0
    for name, (make, _) in small.items():
        result = explore(make())
        assert result.violation == with_them[name].violation, f"{name}: {result}"
        more += result.states > with_them[name].states
    assert more > len(small) / 2


def test_every_table_has_every_control():
    """A new table needs its row in each of the lists."""
    for name in TABLES:
        held = [n for n in HOLDS if n.startswith(name)]
        assert any("3 ranks" in n for n in held) and any("dies" in n for n in held) and any("left out" in n for n in held), name
        for feature in ("1 buffer", "no barrier", "no release", "no acquire", "no dependence"):
            assert any(name in n and feature in n for n in CONTROLS) or (name in COUNTED and feature == "no release"), (name, feature)


if __name__ == "__main__":                                            # the tables of docs/protocol.md, made anew
    protocol.flag_word = lambda stage, source, item, world, flags: (stage * world + source) * 4 + item
    page = PAGE.read_text()
    for title, models in (("holds", HOLDS), ("controls", CONTROLS), ("others", OTHERS)):
        lines = [row(name, model := make(), explore(model)) for name, (make, _) in models.items()]
        page = re.sub(rf"(<!-- {title} -->\n(?:\|.*\n){{2}})(?:\|.*\n)*", lambda m, lines=lines: m[1] + "\n".join(lines) + "\n", page)
    PAGE.write_text(page)
