"""The one place that measures: the ways to compute a case, interleaved, checked, and made into rows.

    rows = measure("rms_norm", case, ways, device="cpu", roof=roofs.of(...))

First every way is called twice: its error against fp64 is that of its outputs and gradients, `repeatable` says whether the
two calls gave the same bits. A torch.compile that takes over a minute is given up, and its row says so. Then every round times
each way once, in rotating order, from caches in the same state (clocks.py); figures are p20 / p50 / p80 over rounds, and the
ratio to ours is the median of the ratios within a round, so that a machine that slows down slows all of them. With a group a
sample starts at a barrier and costs what its slowest rank costs. A second sitting, after all other cases and in other memory, is
timed and not checked again; its rows hold the samples of both. A row is `noisy` when p80 / p20 is over 1.3, when the ratios of
the first and the second half of the run (of the two sittings), or of its odd and even rounds, differ by over 10%, or when they
scatter so much that those of a second run may; `loaded` when others kept the cores busy. A way that fails has a row that says how,
and the others go on. A row without an error against fp64 cannot be made.
"""
import itertools
import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.comm import heap_of
from .cases import Case, Way, Ways
from .clocks import LONG, Clock, clock
from .provenance import Neighbours

__all__ = ["BOUNDS", "GRAPH", "OUT_OF_MEMORY", "SCHEMA", "Prepared", "error", "failure", "measure", "noisy", "prepare",
           "seeds", "timed", "together"]

SCHEMA = 2                                                            # of a row; 1 had no case, provenance or roof
BOUNDS = ("gemm alone", "communication alone")
GRAPH, SMALL = ", CUDA graph", 16 << 20                               # bytes a case moves
SPREAD, HALVES = 1.3, 0.10
OUT_OF_MEMORY = "out of memory"
COMPILE = 60.0                                                        # seconds torch.compile may take over a case
MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
Row = dict[str, Any]
Roof = Callable[[Case, int, int, int], tuple[float, str]]             # bytes, FLOPs, link bytes -> (seconds, which binds)


def failure(e: BaseException) -> str:
    """Why a way has no figures, in one line."""
    text = " ".join(str(e).split())[:200]
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(w in text.lower() for w in MEMORY):
        return f"{OUT_OF_MEMORY}: {text or type(e).__name__}"
    return f"{type(e).__name__}: {text}"


def error(got: Any, truth: Any) -> float:
    """Largest absolute error over the largest true value, over all tensors; infinite where got has a NaN that truth has not."""
    got, truth = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (got, truth))
    worst, scale = 0.0, 0.0
    for g, t in zip(got, truth, strict=True):
        if g.shape != t.shape:
            raise ValueError(f"bench: an output must have the shape of the truth, {list(t.shape)}, got {list(g.shape)}")
        if t.numel():
            off = (g.detach().to(torch.float64) - t.to(torch.float64)).abs().max().item()
            worst = max(worst, off if math.isfinite(off) else math.inf)
            scale = max(scale, t.abs().max().item())
    return worst / scale if scale else worst


class TooLong(BaseException):
    """No Exception: torch.compile catches those and goes on."""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raises TooLong in a body that takes longer, again every second until it is heard. None: no limit."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong(f"gave up after {seconds:.0f} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _leaves(inputs: tuple[Any, ...]) -> list[Tensor]:
    return [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]


def seeds(outs: tuple[Tensor, ...], case: Case) -> list[Tensor]:
    """Upstream gradients: the same for the same shapes, and exact in the case's type."""
    made = []
    for i, o in enumerate(outs):
        generator = torch.Generator(o.device).manual_seed(77 + i)
        made.append(torch.randn(o.shape, generator=generator, device=o.device).to(getattr(torch, case.dtype)).to(o.dtype))
    return made


def _whole(fn: Callable[..., Any], inputs: tuple[Any, ...], case: Case) -> tuple[Tensor, ...]:
    """Outputs, and unless the case is a forward every gradient."""
    outs, leaves = _tuple(fn(*inputs)), _leaves(inputs)
    if case.direction == "fwd" or not leaves:
        return tuple(o.detach() for o in outs)
    grads = torch.autograd.grad(outs, leaves, seeds(outs, case))
    return (*(o.detach() for o in outs), *grads)


def timed(fn: Callable[..., Any], inputs: tuple[Any, ...], case: Case) -> Callable[[], Any]:
    """What one sample calls: the pass of the case."""
    leaves = _leaves(inputs)
    if case.direction == "fwd" or not leaves:
        return lambda: fn(*inputs)
    outs = _tuple(fn(*inputs))
    upstream, grad = seeds(outs, case), torch.autograd.grad
    if case.direction == "bwd":
        return lambda: grad(outs, leaves, upstream, retain_graph=True)
    return lambda: grad(_tuple(fn(*inputs)), leaves, upstream)


@dataclass
class Prepared:
    """A way that was called and checked, ready to be timed."""
    run: Callable[[], Any]
    error: float
    repeatable: bool
    times: list[float] = field(default_factory=list)


def prepare(way: Way, ways: Ways, case: Case, truth: dict[int, tuple[Tensor, ...]], earlier: Row | None = None) -> Prepared:
    """Call it twice and hold the results against fp64. truth: kept from way to way by the function that computes it. earlier: the row of
    an earlier sitting, which was checked."""
    inputs = ways.inputs if way.inputs is None else way.inputs
    functions = [way.fresh(), way.fresh()] if way.fresh is not None else [way.fn, way.fn]
    off, same = (earlier["error"], earlier["repeatable"]) if earlier is not None else _check(functions, inputs, way, ways, case, truth)
    run = timed(functions[0], inputs, case)                           # type: ignore[arg-type]
    if ways.cold:
        copies = tuple(t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in inputs)
        run = _in_turn(run, timed(functions[1], copies, case))        # type: ignore[arg-type]
    return Prepared(run, off, same, [t * 1e-6 for t in earlier["samples_us"]] if earlier is not None else [])


def _check(functions: list[Any], inputs: tuple[Any, ...], way: Way, ways: Ways, case: Case,
           truth: dict[int, tuple[Tensor, ...]]) -> tuple[float, bool]:
    """(error, whether two calls gave the same bits)"""
    got, again = (_whole(fn, inputs, case) for fn in functions)
    if any(g.data_ptr() == a.data_ptr() and g.numel() for g, a in zip(got, again)):   # into a buffer of its own
        got, again = tuple(t.clone() for t in again), _whole(functions[1], inputs, case)
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return error(got, _truth(way, ways, case, truth, got)), same


def _in_turn(*runs: Callable[[], Any]) -> Callable[[], Any]:
    """Of what no cache holds the time depends on where in memory it came to lie, which differs between two processes: two places, so that
    what they differ by shows between odd and even rounds, which `noisy` compares."""
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def _truth(way: Way, ways: Ways, case: Case, truth: dict[int, tuple[Tensor, ...]], got: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if way.truth is not None:
        return tuple(way.truth(got))
    exact = way.exact or (ways.exact if way.inputs is None else way.fn)
    if id(exact) not in truth:
        double = tuple(t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) and t.is_floating_point() else t
                       for t in (ways.inputs if way.inputs is None else way.inputs))
        truth[id(exact)] = _whole(exact, double, case)                # type: ignore[arg-type]
    return truth[id(exact)]


def capture(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """(replay, the tensors that a replay writes) of a CUDA graph of run()."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):                                            # compiles, allocates
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        outs = run()
    return graph.replay, outs


def graphed(way: Way, ways: Ways, case: Case, truth: dict[int, tuple[Tensor, ...]]) -> Way:
    """The way's pass in a CUDA graph. What it is held to is a replay's doing: the capture's own tensors are filled with NaN."""
    fn, inputs = way.fn, ways.inputs if way.inputs is None else way.inputs
    assert fn is not None
    leaves, upstream = _leaves(inputs), seeds(_tuple(fn(*inputs)), case)

    def run() -> tuple[Tensor, ...]:
        outs = _tuple(fn(*inputs))
        grads = torch.autograd.grad(outs, leaves, upstream) if leaves and case.direction != "fwd" else ()
        return (*(o.detach() for o in outs), *grads)
    replay, outs = capture(run)
    theirs = {t.untyped_storage().data_ptr() for t in (*inputs, *upstream) if isinstance(t, Tensor)}   # x + r passes its gradient on
    for o in outs:
        if o.is_floating_point() and o.untyped_storage().data_ptr() not in theirs:
            o.fill_(math.nan)
    return Way(lambda: (replay(), outs)[1], (), truth=lambda got: _truth(way, ways, case, truth, got))


def _agree(value: float, group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.MAX) -> float:
    if group is None:
        return value
    t = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(t, op, group)
    return t.item()


def together(why: str, group: dist.ProcessGroup | None) -> str:
    """The reason of the first rank that has one: a way is timed on all ranks or on none."""
    if group is None:
        return why
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, why, group)
    return next((f"rank {r}: {w}" for r, w in enumerate(every) if w), "")


def _every(ways: Ways, case: Case, device: str) -> dict[str, Way]:
    """The ways of a case by name; of a small one on a GPU, where its bench says so, ours and torch's in a CUDA graph too. A backward alone
    would have to run where its forward was recorded."""
    every = {name: way for name, way in ways.all().items() if name != BOUNDS[1] or case.direction in ways.comm_in}
    if device == "cuda" and ways.graph and case.direction != "bwd" and ways.cost(ways.nbytes, case.direction) <= SMALL:
        every |= {name + GRAPH: every[name] for name in ("interlace", "torch eager")}
    return every


def _prepare_all(ways: Ways, every: dict[str, Way], case: Case, group: dist.ProcessGroup | None,
                 earlier: dict[str, Row]) -> tuple[dict[str, Prepared], dict[str, str]]:
    ready: dict[str, Prepared] = {}
    failed: dict[str, str] = {}
    truth: dict[int, tuple[Tensor, ...]] = {}
    for name, way in every.items():
        why, made = "", None
        try:
            with limited(COMPILE if "torch.compile" in name else None):
                made = prepare(graphed(way, ways, case, truth) if name.endswith(GRAPH) else way, ways, case, truth, earlier.get(name))
        except TooLong as e:
            why = str(e)
            torch._dynamo.reset()
        except Exception as e:
            why = failure(e)
        if why := together(why, group):
            failed[name] = why
        elif made is not None:
            ready[name] = made
    return ready, failed


def _barrier(group: dist.ProcessGroup | None, device: str) -> Callable[[], Any]:
    if group is None:
        return lambda: None
    heap = heap_of(group) if device == "cpu" else None
    return heap.barrier if heap is not None else lambda: dist.barrier(group)


def _time(ready: dict[str, Prepared], budget: float, device: str, group: dist.ProcessGroup | None, rounds: tuple[int, int],
          cold: bool) -> None:
    """Fill in the times."""
    barrier, names = _barrier(group, device), list(ready)
    with clock(device) as c:
        took = _calibrate(ready, c, barrier, group)
        inner = {name: 1 if cold else c.inner(seconds) for name, seconds in took.items()}
        one = sum(seconds * (inner[name] + (seconds < LONG)) for name, seconds in took.items())
        n = int(_agree(max(rounds[0], min(rounds[1], budget / max(one, 1e-9))), group, dist.ReduceOp.MIN))
        for i in range(n):
            for name in names[i % len(names):] + names[:i % len(names)]:
                c.settle(ready[name].run, took[name], cold)
                barrier()
                ready[name].times.append(c.sample(ready[name].run, inner[name]))
    if group is not None:                                             # a sample costs what its slowest rank costs
        every = torch.tensor([ready[name].times for name in names], dtype=torch.float64)
        dist.all_reduce(every, dist.ReduceOp.MAX, group)
        for name, times in zip(names, every.tolist()):
            ready[name].times = times


def _calibrate(ready: dict[str, Prepared], c: Clock, barrier: Callable[[], Any], group: dist.ProcessGroup | None) -> dict[str, float]:
    """Seconds of a call of every way, the same on all ranks."""
    took = {}
    for name, p in ready.items():
        seconds = math.inf
        for _ in range(3):
            barrier()
            seconds = min(seconds, c.sample(p.run))
        took[name] = _agree(seconds, group)
    return took


def noisy(times: list[float], ours: list[float], first: int = 0) -> bool:
    """Whether a second run may tell another story. first: samples of the first of two sittings; 0: one sitting, cut in half."""
    q = statistics.quantiles(times, n=10)
    if q[7] > SPREAD * q[1]:
        return True
    ratios, n = [t / o for t, o in zip(times, ours)], len(times)
    cut = first or n // 2
    for one, two in ((ratios[:cut], ratios[cut:]), (ratios[::2], ratios[1::2])):
        a, b = statistics.median(one), statistics.median(two)
        if abs(a - b) > HALVES * min(a, b):
            return True
    # Of a bell curve p80 - p20 is 1.68 sigma, and the medians of two runs lie within 1.96 * sqrt(2) * 1.25 sigma / sqrt(n) 19 times in 20.
    r = statistics.quantiles(ratios, n=10)
    return 2.06 * (r[7] - r[1]) / math.sqrt(n) > HALVES * statistics.median(ratios)


def measure(op: str, case: Case, ways: Ways, *, device: str = "cpu", budget: float = 1.0, rounds: tuple[int, int] = (9, 100),
            group: dist.ProcessGroup | None = None, roof: Roof | None = None, seed: int = 0,
            earlier: dict[str, Row] | None = None) -> list[Row]:
    """Rows of a case, ours first; the same ones on all ranks. budget: seconds of timing. earlier: {way: its row of the first sitting}, in
    the second; a way that failed there is not tried again."""
    around = Neighbours()
    every = _every(ways, case, device)
    earlier = {name: row for name, row in (earlier or {}).items() if "samples_us" in row}
    if earlier:
        every = {name: way for name, way in every.items() if name in earlier}
    first = max((row["n"] for row in earlier.values()), default=0)    # the same of all: they were timed in the same rounds
    ready, failed = _prepare_all(ways, every, case, group, earlier)
    if ready:
        _time(ready, budget, device, group, rounds, ways.cold)
    spent = _agree(around.spent(), group, dist.ReduceOp.SUM)
    cores = max([_agree(around.cores(spent), group), *(row["busy_cores"] for row in earlier.values())])
    errors = {name: _agree(p.error, group) for name, p in ready.items()}
    same = {name: bool(_agree(p.repeatable, group, dist.ReduceOp.MIN)) for name, p in ready.items()}
    nbytes, flops, link = (ways.cost(c, case.direction) for c in (ways.nbytes, ways.flops, ways.link))
    shared = {"schema": SCHEMA, "op": op, "case": case.key(), "device": device, "seed": seed, "bytes": nbytes, "flops": flops,
              "link_bytes": link, "path": ways.path, "cold": ways.cold,
              "sitting": 2 if earlier else 1, "busy_cores": round(cores, 2), "loaded": cores > Neighbours.LIMIT, **ways.extra}
    limit, binds = roof(case, nbytes, flops, link) if roof is not None else (0.0, "")
    rows = [{**shared, "way": name, "failed": why} for name, why in failed.items()]
    ours = ready["interlace"].times if "interlace" in ready else None
    p50 = {name: statistics.median(p.times) for name, p in ready.items()}
    for name, p in ready.items():
        q = statistics.quantiles(p.times, n=10)
        rows.append({
            **shared, "way": name, "p20_us": q[1] * 1e6, "p50_us": p50[name] * 1e6, "p80_us": q[7] * 1e6, "n": len(p.times),
            "samples_us": [float(f"{t * 1e6:.4g}") for t in p.times],
            "error": errors[name], "repeatable": same[name],
            "roof": binds, "roof_percent": 100 * limit / p50[name] if limit and name not in BOUNDS else None,
            "ratio": statistics.median(t / o for t, o in zip(p.times, ours)) if ours else None,
            "noisy": noisy(p.times, ours or p.times, first), "overlap": _overlap(p50, name)})
    order = list(every)
    rows.sort(key=lambda r: order.index(r["way"]))
    rows[0]["absent"] = ways.absent()
    return rows


def _overlap(p50: dict[str, float], name: str) -> float | None:
    """The share of the shorter of GEMM and communication that the way hides: (gemm + comm - fused) / min(gemm, comm)."""
    gemm, comm = (p50.get(b) for b in BOUNDS)
    if name in BOUNDS or not gemm or not comm:
        return None
    return (gemm + comm - p50[name]) / min(gemm, comm)
