"""Who writes, signals, waits and reads what: the step tables of the overlapped kernels, and the index functions they are built from.

The functions below the line are compiled into the Triton kernels (signals.py) as they stand, and called here as Python: table and
kernel cannot disagree about a slot, a flag word, a buffer or an order. tests/test_protocol.py executes the tables.

A table describes ONE call of one rank:  table(rank, world, epoch, ...) -> [kernel, ...], a kernel = [program, ...], a program =
(Step, ...). What runs when:
    * A rank makes its calls in order, epoch e = 1, 2, 3 ... (any int32 start; it wraps), each call's kernels in order. A kernel
      starts when every program of the rank's previous kernel has ended (one stream), and never waits for other ranks to start.
    * The programs of one kernel run concurrently on a GPU, in any interleaving; the interpreter runs them one after the other in list
      order, so no program may wait for a later one of its own rank: the checker should run both modes.
    * The steps of one program run in order.
Memory, per rank: data cells (area, buffer, slot), flag words, all written by any rank, and words of the rank's own: counters, `epoch`.
Steps:
    write    data cell (area, buffer, slot) of rank `at` := the value (source, item, e). source: who the data is from ("sum" for a
             reduced item, which has read all W parts); it is one of the program's pending stores until a barrier
    barrier  the program's threads meet: a later signal or count of the program covers all earlier writes of it. Without one, a
             write may land after the signal that follows it
    signal   flag `slot` of rank `at` := e. release at system scope where `ordered`; else earlier writes may land after it
    wait     until flag `slot` of this rank (at == rank) is >= e, by signed 32-bit difference. acquire at system scope where
             `ordered`; else a later read may be served from before it. Bounded: on expiry the program writes
             (op, epoch, source, slot, got) to the error word and takes no data; it sends and signals nothing more, the rank's other
             programs from their next wait on, and its later calls neither, until Pad.reset()
    read     data cell of this rank; it must hold (source, item, e), nothing older, nothing newer, nothing half written
    last     arrive at counter `slot` (acq_rel, device scope): whoever arrives as number `of` sets it to 0 and runs `steps`
    bump     the rank's epoch word := e: the next call is e + 1

Why two buffers and one wait are enough. Rank r writes into q's buffer e & 1 again in call e + 2. Its call e + 1 has then ended, in which it
waited for a flag e + 1 that q sent, or (two_shot) that an owner sent after it had waited for q's. q sends e + 1 only in its call
e + 1, when its call e, and all reads of it, had ended. So every rank must hear from every rank in every call, also from one that
has no rows: blocks are counted by the largest share, and empty ones are signalled and waited for like the others.

Flag words are [stage][source][item] with a fixed number of items per source: a word has one writer ever, so it never goes back,
whatever the shapes of the calls before.
"""
from dataclasses import dataclass

from ..dispatch import tl  # noqa: F401  (the interpreter looks for it beside what it runs)

__all__ = ["TABLES", "Control", "Step", "fetch", "gather", "heap", "multicast", "one_shot", "scatter", "two_shot"]


@dataclass(frozen=True)
class Step:
    do: str                                                           # write barrier signal wait read last bump
    at: int = -1                                                      # the rank whose memory it touches
    area: str = ""                                                    # write, read: "part" or "sum"
    buffer: int = 0
    slot: int = 0                                                     # data slot, flag word, or counter
    source: int | str = -1                                            # whose data: a rank, or "sum"
    item: int = -1
    ordered: bool = True                                              # signal: release; wait: acquire
    of: int = 0                                                       # last: arrivals
    steps: "tuple[Step, ...]" = ()                                    # last: what the last arriver does


@dataclass(frozen=True)
class Control:
    """The negative controls: what a test switches off and must then see fail."""
    buffers: int = 2
    barrier: bool = True
    ordered: bool = True


Program = tuple[Step, ...]
Call = list[list[Program]]
FULL = Control()

# ---- index functions: Python here, compiled in signals.py -----------------------------------------------------


def buffer_of(epoch, buffers):
    return epoch & (buffers - 1)


def flag_word(stage, source, item, world, flags):
    """flags: words per source and stage, fixed for a pad."""
    return (stage * world + source) * flags + item


def peer_of(rank, i, world):
    """The i-th rank after this one: i = 0 is itself."""
    return (rank + i) % world


def before(rank, i, world):
    """The i-th rank before this one: whose rows arrive i-th when all push to `peer_of(rank, 1)` first."""
    return (rank + world - i) % world


def owner_of(item, world):
    return item % world


def part_slot(source, item, items):
    """one_shot, gather, scatter: every source has a place for every item."""
    return source * items + item


def owned_slot(source, item, items, world):
    """two_shot: an owner keeps only its own items, item // world-th among them."""
    return source * ((items + world - 1) // world) + item // world


def first_row(rank, rows, world):
    """The first of a rank's rows, and for rank = world the number of all: shares differ by one at most."""
    return rank * (rows // world) + (rank if rank < rows % world else rows % world)


def blocks_of(rows, world, block):
    """Row blocks of every rank, by the largest share."""
    return ((rows + world - 1) // world + block - 1) // block


# ---- pieces ---------------------------------------------------------------------------------------------------


def _send(rank: int, to: list[int], epoch: int, c: Control, *, area: str, slot: int, word: int, source: int | str, item: int,
          home: bool = False) -> list[Step]:
    """Write to every rank of `to`, one barrier, signal every one of them. home: write to this rank alone, they come and read."""
    b = buffer_of(epoch, c.buffers)
    return [*(Step("write", q, area, b, slot, source, item) for q in ([rank] if home else to)), *([Step("barrier")] if c.barrier else []),
            *(Step("signal", q, slot=word, ordered=c.ordered) for q in to)]


def _sum(rank: int, world: int, epoch: int, c: Control, item: int, slots: list[int], flags: int, home: bool = False) -> list[Step]:
    """Wait for the parts of all ranks, then read them in rank order. home: each at its own rank."""
    b = buffer_of(epoch, c.buffers)
    return [*(Step("wait", rank, slot=flag_word(0, s, item, world, flags), source=s, item=item, ordered=c.ordered) for s in range(world)),
            *(Step("read", s if home else rank, "part", b, slots[s], s, item) for s in range(world))]


def _finish(kernel: list[list[Step]]) -> list[Program]:
    """Counter 0: the last program of a call's last kernel bumps the epoch."""
    return [(*steps, Step("last", of=len(kernel), steps=(Step("bump"),))) for steps in kernel]


def _ring(rank: int, world: int) -> list[int]:
    return [peer_of(rank, i, world) for i in range(world)]


# ---- the tables -----------------------------------------------------------------------------------------------


def one_shot(rank: int, world: int, epoch: int, items: int, programs: int = 1, c: Control = FULL) -> Call:
    """all_reduce, gemm_ar: program p takes items p, p + programs, ...; it sends an item's part to everyone, and sums the item before."""
    kernel = []
    for p in range(programs):
        steps: list[Step] = []
        mine = list(range(p, items, programs))
        for before_, item in zip([None, *mine], [*mine, None]):
            if item is not None:
                steps += _send(rank, _ring(rank, world), epoch, c, area="part", slot=part_slot(rank, item, items),
                               word=flag_word(0, rank, item, world, items), source=rank, item=item)
            if before_ is not None:
                steps += _sum(rank, world, epoch, c, before_, [part_slot(s, before_, items) for s in range(world)], items)
        kernel.append(steps)
    return [_finish(kernel)]


def two_shot(rank: int, world: int, epoch: int, items: int, programs: int = 1, c: Control = FULL, home: bool = False) -> Call:
    """all_reduce, gemm_ar: an item's parts go to its owner, who sends the sum to all. Program p: item k out, item k - 1 summed where
    owned, item k - 2 taken in (an owner takes its own in from its own "sum" area too). home: parts stay where they are made."""
    slot = lambda source, item: item if home else owned_slot(source, item, items, world)              # noqa: E731
    kernel = []
    for p in range(programs):
        steps: list[Step] = []
        mine = list(range(p, items, programs))
        for k in range(len(mine) + 2):
            if k < len(mine):
                steps += _send(rank, [owner_of(mine[k], world)], epoch, c, area="part", slot=slot(rank, mine[k]),
                               word=flag_word(0, rank, mine[k], world, items), source=rank, item=mine[k], home=home)
            if 1 <= k <= len(mine) and owner_of(item := mine[k - 1], world) == rank:
                steps += _sum(rank, world, epoch, c, item, [slot(s, item) for s in range(world)], items, home)
                steps += _send(rank, _ring(rank, world), epoch, c, area="sum", slot=item, word=flag_word(1, rank, item, world, items),
                               source="sum", item=item)
            if k >= 2:
                item, b = mine[k - 2], buffer_of(epoch, c.buffers)
                owner = owner_of(item, world)
                steps += [Step("wait", rank, slot=flag_word(1, owner, item, world, items), source=owner, item=item, ordered=c.ordered),
                          Step("read", rank, "sum", b, item, "sum", item)]
        kernel.append(steps)
    return [_finish(kernel)]


def multicast(rank: int, world: int, epoch: int, items: int, programs: int = 1, c: Control = FULL) -> Call:
    """multicast_ar (csrc/cuda): two_shot whose parts stay at home: the owner reads those of all ranks in one load, through the switch."""
    return two_shot(rank, world, epoch, items, programs, c, home=True)


def gather(rank: int, world: int, epoch: int, items: int, pushers: int = 1, programs: int = 1, c: Control = FULL) -> Call:
    """all_gather, ag_gemm: the first `pushers` programs send this rank's `items` row blocks to the next rank, the one after it, ...;
    the other `programs` take blocks in: own rows in place, then those of the rank before, and so on."""
    push = [(i, item) for i in range(1, world) for item in range(items)]
    take = [(i, item) for i in range(world) for item in range(items)]
    kernel: list[list[Step]] = []
    for p in range(pushers):
        kernel.append([s for i, item in push[p::pushers]
                       for s in _send(rank, [peer_of(rank, i, world)], epoch, c, area="part", slot=part_slot(rank, item, items),
                                      word=flag_word(0, rank, item, world, items), source=rank, item=item)])
    for p in range(programs):
        steps = []
        for i, item in take[p::programs]:
            if i:
                s = before(rank, i, world)
                steps += [Step("wait", rank, slot=flag_word(0, s, item, world, items), source=s, item=item, ordered=c.ordered),
                          Step("read", rank, "part", buffer_of(epoch, c.buffers), part_slot(s, item, items), s, item)]
        kernel.append(steps)
    return [_finish(kernel)]


def scatter(rank: int, world: int, epoch: int, items: int, tiles: int = 1, programs: int = 1, c: Control = FULL) -> Call:
    """reduce_scatter, gemm_rs, rs_residual_norm: every rank owns `items` row blocks of `tiles` tiles. Kernel 1 sends the tiles of the
    next rank's blocks, then of the one after it, own last; the last of a block's tiles to be done signals its owner. Kernel 2 sums
    the own blocks."""
    sent = [(peer_of(rank, i + 1, world), item, tile) for i in range(world) for item in range(items) for tile in range(tiles)]
    push: list[Program] = []
    for p in range(programs):
        steps: list[Step] = []
        for owner, item, tile in sent[p::programs]:
            signal = (*([Step("barrier")] if c.barrier else []),
                      Step("signal", owner, slot=flag_word(0, rank, item, world, items), ordered=c.ordered))
            steps += [Step("write", owner, "part", buffer_of(epoch, c.buffers), part_slot(rank, item, items) * tiles + tile, rank, item),
                      *([Step("barrier")] if c.barrier else []),
                      Step("last", slot=1 + owner * items + item, of=tiles, steps=signal)]
        push.append(tuple(steps))
    take: list[list[Step]] = []
    for p in range(programs):
        steps, b = [], buffer_of(epoch, c.buffers)
        for item in range(p, items, programs):
            steps += [Step("wait", rank, slot=flag_word(0, s, item, world, items), source=s, item=item, ordered=c.ordered)
                      for s in range(world)]
            steps += [Step("read", rank, "part", b, part_slot(s, item, items) * tiles + t, s, item)
                      for s in range(world) for t in range(tiles)]
        take.append(steps)
    return [push, _finish(take)]


def fetch(rank: int, world: int, epoch: int, items: int, programs: int = 1, c: Control = FULL) -> Call:
    """dispatch, combine: kernel 1 copies what others may want into this rank's own buffer, the last of its programs signals all. Kernel 2:
    every program waits for all ranks, then reads what it wants where it lies."""
    b, word = buffer_of(epoch, c.buffers), lambda source: flag_word(0, source, 0, world, items)
    barrier = [Step("barrier")] if c.barrier else []
    signals = (*barrier, *(Step("signal", q, slot=word(rank), ordered=c.ordered) for q in _ring(rank, world)))
    stage = [(*(Step("write", rank, "part", b, item, rank, item) for item in range(p, items, programs)), *barrier,
              Step("last", slot=1, of=programs, steps=signals)) for p in range(programs)]
    sources = [before(rank, i, world) for i in range(world)]
    take = [[*(Step("wait", rank, slot=word(s), source=s, item=0, ordered=c.ordered) for s in sources),
             *(Step("read", s, "part", b, item, s, item) for s in sources for item in range(p, items, programs))] for p in range(programs)]
    return [stage, _finish(take)]


def heap(rank: int, world: int, epoch: int, buffers: int = 2, agreed: bool = True) -> Call:
    """The collectives of the CPU heap, one tick of them (csrc/runtime/heap.h): each rank writes at home, the others come and read. One
    thread, no kernel boundary: steps of the next tick may overtake these. Area "call": what was called, compared in the first
    tick; where it differs, on every rank then, no data is read. The trace of a real collective is a path of this table: a test."""
    b, others = buffer_of(epoch, buffers), _ring(rank, world)[1:]
    return [[(Step("write", rank, "part", b, 0, rank, 0), Step("write", rank, "call", buffer_of(epoch, 2), 0, rank, 1),
              Step("signal", rank), *(Step("wait", q, source=q) for q in others),
              *(Step("read", q, "call", buffer_of(epoch, 2), 0, q, 1) for q in others),
              *(Step("read", q, "part", b, 0, q, 0) for q in others if agreed))]]


TABLES = {"one_shot": one_shot, "two_shot": two_shot, "gather": gather, "scatter": scatter, "multicast": multicast, "fetch": fetch}
