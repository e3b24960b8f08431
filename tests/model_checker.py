"""An explicit-state checker of signal protocols: every interleaving of every step of every process, breadth first.

    model = Model(lambda rank, epoch: one_shot(rank, 3, epoch, items=1), world=3, weak=True)    step tables of kernels/comm/protocol.py
    explore(model) -> states, and the shortest counterexample where there is one

A process is one program of a rank's kernel (or a rank, on the CPU); it makes its calls for ever. A data cell holds which part of
which epoch it was written with; a read demands exactly its own, anything else (older, newer, nothing) is a violation. A state is stored
relative to its slowest process, so that a protocol whose ranks stay close together has finitely many: the search then covers every
number of epochs, not the first few. (A search that does not stay finite ends at `limit`.)

Memory    strong: a program's steps in order. Weak: a step may overtake earlier ones of its program unless `keeps` says that the machine
          respects their order; a step once done is seen by all (multi-copy atomic).
Threads   of a program of a kernel: one signals and waits, another stores and loads; only a barrier, or the one inside a wait,
          orders the two. On the CPU there is one.
Faults    deaths: so many ranks stop for good, at any step. giveups: so many waits run out, at any moment. timeouts: a wait that can
          never be fulfilled runs out. A rank with a wait that ran out stops (expiry "stops") or, takes no data and "goes on".
Reduction adjacent stores of one program are one move, and so are adjacent loads: each touches its own cell, and they are under the same
          constraints. A step on cells that no other process touches is done at once.
"""
from collections import deque
from typing import NamedTuple

TAGS = 64                                                             # a cell holds epoch * TAGS + tag; the tag says which part
EMPTY, OLD = -10**6, -10**6 + 1                                       # never written; long overwritten or should have been
DEAD, GAVE_UP = -1, -2
WAITS = ("wait", "put", "take", "poll", "look", "sleep", "woken")


class Move(NamedTuple):
    """A step of a table, compiled."""
    do: str
    text: str
    cells: tuple[int, ...] = ()
    values: tuple[int, ...] = ()                                      # by cell, epochs counted from the start of the period
    ordered: bool = True                                              # release, acquire
    thread: int = 0
    barriers: int = 0                                                 # how many the program has before it
    peer: int = -1                                                    # whose signal is awaited
    of: int = 0                                                       # last: how many arrive, and
    skip: int = 0                                                     # how many moves are the last one's only


class Violation(Exception):
    pass


class Result(NamedTuple):
    states: int
    violation: str                                                    # "" | wrong data | deadlock
    trace: tuple[str, ...]                                            # the steps that lead there, as few as there can be

    def __str__(self) -> str:
        return f"{self.states} states: {self.violation or 'holds'}" + "".join(f"\n  {i + 1:3} {t}" for i, t in enumerate(self.trace))


def keeps(a: Move, b: Move, token: bool) -> bool:
    """Whether b, later in a program than a, is performed after a. token: what a wait returns goes into the loads it guards."""
    met = a.thread == b.thread or b.barriers > a.barriers
    if {a.do, b.do} & {"launch", "end"} or set(a.cells) & set(b.cells) or "fence" in (a.do, b.do):
        return True
    if b.do in ("signal", "last", "put", "clear") and b.ordered and met:  # a release
        return True
    if (a.do, b.do) in (("signal", "wake"), ("awaits", "sleep"), ("awaits", "look")):  # a store, then a load: only seq_cst keeps these
        return b.ordered
    if a.do in (*WAITS, "last"):
        if b.do != "read":                                            # no store before the branch on a wait is decided
            return met
        return met and a.ordered and (token or a.do == "last")        # an acquire, and nothing lifts the load above it
    return a.do == "read" and b.do == "write" and b.of == 1           # a sum is stored after its parts were loaded


class Model:
    """calls(rank, epoch) -> the kernels of a call, for epoch 0 .. period - 1; the table repeats with `period`, which is even.

    weak, token  the memory model.      relaxed  kinds of steps that lose their release or acquire: "signal", "wait", "last".
    kernels  False: a rank is a CPU process of one thread, which notices lost peers.      cyclic  False: one period only.
    compare  flags by ">=" of a signed difference, "unsigned" >=, or "=="; wrap: of so many bits, 0 for integers without end.
    slots  how many programs of a rank run at once, in order of launch; 0: all.
    """

    reduce = True                                                     # a test switches it off, and finds the same

    def __init__(self, calls, world, period=2, *, weak=False, token=True, relaxed=(), kernels=True, cyclic=True, compare=">=", wrap=0,
                 slots=0, deaths=0, giveups=0, timeouts=False, expiry="stops", epoch_word=True, reduce=None, limit=400_000):
        self.world, self.period, self.weak, self.relaxed = world, period, weak, relaxed
        self.kernels, self.cyclic, self.compare, self.wrap = kernels, cyclic, compare, wrap
        self.slots, self.timeouts, self.expiry, self.epoch_word, self.limit = slots, timeouts, expiry, epoch_word, limit
        self.reduce = self.reduce if reduce is None else reduce
        self.ids, self.tags, self.plain = {}, {}, set()
        self.failed = [self._cell(("failed", r), plain=True) for r in range(world)]
        self.rank, self.programs = [], []
        for r in range(world):
            table = [calls(r, e) for e in range(period)]
            for p in range(max(len(kernel) for call in table for kernel in call)):
                self.rank.append(r)
                self.programs.append([m for e, call in enumerate(table) for kernel in call for m in self._compile(r, e, kernel[p:p + 1])])
        self.reach = max(map(len, self.programs)) if weak else 1
        self.blockers = [[tuple(d for d in range(1, self.reach + 1) if (cyclic or i >= d) and keeps(self._at(p, i - d), m, token))
                          if weak else (1,) for i, m in enumerate(p)] for p in self.programs]
        users = [{p for p, program in enumerate(self.programs) for m in program if c in m.cells} for c in range(len(self.ids))]
        self.local = [[self.reduce and all(len(users[c]) == 1 for c in m.cells) and (m.do != "launch" or not slots) for m in program]
                      for program in self.programs]
        self.marks = {do: [[sum(m.do == do for m in p[:i]) for i in range(len(p) + 1)] for p in self.programs] for do in ("launch", "end")}
        first = {"flag": -TAGS, "epoch": -TAGS}
        memory = tuple(0 if i in self.plain else first.get(key[0], EMPTY) for key, i in self.ids.items())
        self.start = (memory, ((0, 0),) * len(self.programs), deaths, giveups)

    # ---- from table to moves --------------------------------------------------------------------------------

    def _cell(self, key, plain=False):
        """plain: it holds no epoch."""
        i = self.ids.setdefault(key, len(self.ids))
        if plain:
            self.plain.add(i)
        return i

    def _move(self, step, rank, epoch, barriers):
        """One step, by itself."""
        do, value = step.do, (epoch - getattr(step, "late", 0)) * TAGS
        fields = {"ordered": step.ordered and do not in self.relaxed, "barriers": barriers}
        text = f"{do} flag {step.slot} of rank {step.at}"
        if do in ("write", "read", "poll", "clear"):
            cells = [self._cell(("data", step.at, step.area, step.buffer, step.slot))]
            value += 1 + self.tags.setdefault((step.source, step.item), len(self.tags))
            text = f"{do} {step.area}[{step.slot}] of rank {step.at}, buffer {step.buffer}"
            fields.update(thread=int(self.kernels and do in ("write", "read")), of=int(step.source == "sum"))
        elif do in ("last", "bump"):
            text, fields["of"] = do, step.of
            cells = [self._cell(("count" if do == "last" else "epoch", rank, step.slot), plain=do == "last")]
        elif do in ("awaits", "leaves", "wake"):
            cells = [self._cell(("sleepers", step.at), plain=True)]
            if do == "wake":
                cells += [self._cell(("asleep", step.at, q), plain=True) for q in range(self.world)]
        elif do in ("sleep", "doze", "woken"):
            cells = [self._cell(("flag", step.at, 0))] * (do == "sleep") + [self._cell(("asleep", step.at, rank), plain=True)]
        else:
            cells = [self._cell(("set" if do in ("put", "take") else "flag", step.at, step.slot), plain=do in ("put", "take"))]
            fields.update(peer=step.source if isinstance(step.source, int) else step.at, skip=int(do == "look"))
        return Move(do, text, tuple(cells), (value,) * len(cells), **fields)

    def _compile(self, rank, epoch, programs):
        """The moves of one program in one kernel: what it reads of the epoch word, its steps, its end."""
        moves, barriers = [], 0

        def add(step):
            nonlocal barriers
            if step.do == "barrier":
                barriers += 1
                return
            m = self._move(step, rank, epoch, barriers)
            same = lambda x: (x.do, x.barriers, x.of)                 # noqa: E731
            if self.reduce and m.do in ("write", "read") and moves and same(m) == same(moves[-1]) and m.cells[0] not in moves[-1].cells:
                text = f"{moves[-1].text} and {step.at if m.do == 'write' else step.slot}"
                moves[-1] = moves[-1]._replace(cells=moves[-1].cells + m.cells, values=moves[-1].values + m.values, text=text)
            else:
                moves.append(m)
            if m.do == "last" or (m.do == "wait" and self.kernels):   # all threads learn what the one that looked has found
                barriers += 1
            at = len(moves)
            for inner in step.steps:
                add(inner)
            if step.steps:
                moves[at - 1] = moves[at - 1]._replace(skip=len(moves) - at)

        if self.kernels:
            moves.append(Move("launch", "starts"))
            if self.epoch_word:
                moves.append(Move("read", "reads the epoch word", (self._cell(("epoch", rank, 0)),), ((epoch - 1) * TAGS,)))
        for program in programs:
            for step in program:
                if self.epoch_word or not (step.steps and step.steps[-1].do == "bump"):
                    add(step)
        return moves + [Move("end", "ends")] * self.kernels

    @staticmethod
    def _at(program, i):
        move = program[i % len(program)]
        return move if i >= 0 else move._replace(barriers=move.barriers - 1000)  # of the period before

    # ---- one move -------------------------------------------------------------------------------------------

    def reached(self, seen, want):
        if self.compare == "==" or not self.wrap:
            return seen == want if self.compare == "==" else seen >= want
        m = TAGS << self.wrap
        return (seen - want) % m < m // 2 if self.compare == ">=" else seen % m >= want % m

    def perform(self, m, back, memory):
        """Memory after the move, None where it must wait; and how many moves are left to others."""
        new, skip = list(memory), 0
        for c, value in zip(m.cells, m.values):
            value += back
            if m.do == "wait":
                if not self.reached(memory[c], value):
                    return None, 0
            elif m.do in ("read", "poll"):
                if m.do == "poll" and memory[c] == EMPTY:
                    return None, 0
                if memory[c] != value:
                    held = f"epoch {memory[c] // TAGS}" if memory[c] > OLD else "nothing written"
                    raise Violation(f"{m.text} of epoch {value // TAGS} finds {held}")
            elif m.do in ("put", "take"):
                if memory[c] != (m.do == "take"):
                    return None, 0
                new[c] = int(m.do == "put")
            elif m.do == "last":
                new[c] = (memory[c] + 1) % m.of
                skip = m.skip if new[c] else 0
            elif m.do in ("awaits", "leaves"):
                new[c] += 1 if m.do == "awaits" else -1
            elif m.do == "look":
                skip = m.skip if self.reached(memory[c], value) else 0
            elif m.do == "sleep":                                     # the kernel looks at the flag and puts to sleep in one step
                new[m.cells[1]] = int(not self.reached(memory[c], value))
                break
            elif m.do == "woken":
                if memory[c]:
                    return None, 0
            elif m.do == "wake":
                for w in m.cells[1:] if memory[c] else ():
                    new[w] = 0
                break
            else:
                new[c] = {"clear": EMPTY, "doze": 1}.get(m.do, value)
        return tuple(new), skip

    # ---- all next states ------------------------------------------------------------------------------------

    def _count(self, kind, p, pos):
        """How many launches, or ends, process p has behind it."""
        turns, i = divmod(pos, len(self.programs[p]))
        marks = self.marks[kind][p]
        return turns * marks[-1] + marks[i] if pos >= 0 else 10**9

    def _may_launch(self, p, procs):
        """The kernel before has ended on this rank, lower programs have started, and a slot is free."""
        mine = [q for q in range(len(procs)) if self.rank[q] == self.rank[p]]
        begun, ended = ({q: self._count(kind, q, procs[q][0]) for q in mine} for kind in ("launch", "end"))
        return (all(ended[q] >= begun[p] and (q >= p or begun[q] > begun[p]) for q in mine)
                and (not self.slots or sum(begun[q] > ended[q] for q in mine) < self.slots))

    def _stop(self, memory, procs, p):
        """A wait of p ran out: the rank has failed, and p takes no further step. The others of its rank: at their next wait or start."""
        new = list(memory)
        new[self.failed[self.rank[p]]] = 1
        return tuple(new), (*procs[:p], (GAVE_UP, 0), *procs[p + 1:])

    def moves(self, state):
        """(process, text, next state) of every move; what only waits that run out could do is left in self.stuck."""
        memory, procs, deaths, giveups = state
        self.stuck, out = [], []
        for p, (pos, mask) in enumerate(procs):
            program, n = self.programs[p], len(self.programs[p])
            if pos < 0 or (not self.cyclic and pos >= n):
                continue
            failed = bool(memory[self.failed[self.rank[p]]])
            if deaths:
                gone = tuple((DEAD, 0) if self.rank[q] == self.rank[p] else x for q, x in enumerate(procs))
                out.append((p, "dies", (memory, gone, deaths - 1, giveups)))
            for k in range(self.reach):
                i = pos + k
                if mask >> k & 1:
                    continue
                if not self.cyclic and i >= n:
                    break
                m = program[i % n]
                if k and m.do in ("launch", "end"):                   # nothing overtakes these
                    break
                if k and any(not mask >> (k - d) & 1 for d in self.blockers[p][i % n] if d <= k):
                    continue
                new, skip = memory, 0
                if m.do == "launch":
                    if failed and self.expiry == "stops":
                        out.append((p, "does not start: the rank has failed", (*self._stop(memory, procs, p), deaths, giveups)))
                        continue
                    if not self._may_launch(p, procs):
                        continue
                elif m.do == "read" and failed and self.expiry == "goes on":
                    pass                                              # takes no data
                else:
                    new, skip = self.perform(m, i // n * self.period * TAGS, memory)
                if new is not None:
                    move = p, m.text, (new, self._advance(procs, p, k, skip), deaths, giveups)
                    if self.local[p][i % n] and k == 0:
                        return [move]
                    out.append(move)
                elif m.do == "wait":
                    ended = self._stop(memory, procs, p)
                    if self.expiry == "goes on":
                        ended = ended[0], self._advance(procs, p, k, 0)
                    lost = not self.kernels and any(x[0] < 0 for q, x in enumerate(procs) if self.rank[q] == m.peer)
                    if lost or failed:
                        why = "a rank is lost" if lost else "its rank has failed"
                        out.append((p, f"{m.text}: gives up, {why}", (*ended, deaths, giveups)))
                    elif giveups:
                        out.append((p, f"{m.text}: runs out", (*ended, deaths, giveups - 1)))
                    self.stuck.append((p, f"{m.text}: runs out", (*ended, deaths, giveups)))
        return out

    @staticmethod
    def _advance(procs, p, k, skip):
        pos, mask = procs[p]
        mask |= ((1 << (skip + 1)) - 1) << k
        while mask & 1:
            pos, mask = pos + 1, mask >> 1
        return (*procs[:p], (pos, mask), *procs[p + 1:])

    def canonical(self, state):
        """The state relative to its slowest process."""
        memory, procs, *faults = state
        turns = min((pos // len(self.programs[p]) for p, (pos, _) in enumerate(procs) if pos >= 0), default=0) if self.cyclic else 0
        if turns:
            back = turns * self.period * TAGS
            memory = tuple(v if i in self.plain or v <= OLD else v - back if v - back > -32 * TAGS else OLD for i, v in enumerate(memory))
            procs = tuple((pos - turns * len(self.programs[p]), m) if pos >= 0 else (pos, m) for p, (pos, m) in enumerate(procs))
        return (memory, procs, *faults)


def explore(model: Model) -> Result:
    """Breadth first from the start: the first violation met has a shortest trace."""
    parent, queue = {model.start: None}, deque([model.start])

    def trace(state, last):
        steps = [last]
        while parent[state] is not None:
            p, text, state = parent[state]
            program = f", program {p - model.rank.index(model.rank[p])}" if len(model.rank) > model.world else ""
            steps.append(f"rank {model.rank[p]}{program}: {text}")
        return tuple(reversed(steps))

    while queue:
        state = queue.popleft()
        try:
            following = model.moves(state)
        except Violation as e:
            return Result(len(parent), "wrong data", trace(state, str(e)))
        if not following and model.timeouts:
            following = model.stuck
        if not following and any(pos >= 0 and (model.cyclic or pos < len(model.programs[p])) for p, (pos, _) in enumerate(state[1])):
            return Result(len(parent), "deadlock", trace(state, "nobody can go on"))
        for p, text, new in following:
            new = model.canonical(new)
            if new not in parent:
                parent[new] = (p, text, state)
                queue.append(new)
        if len(parent) > model.limit:
            raise MemoryError(f"over {model.limit} states: too large, or the ranks do not stay close together")
    return Result(len(parent), "", ())
