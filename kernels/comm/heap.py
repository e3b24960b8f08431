"""The symmetric heap of a group: shared memory that every rank of the group maps, on CPU.

    heap = heap_of(group)                     made at first use, one per group; None where it cannot be
    heap = SymmHeap(group, nbytes=4 << 20)    or by hand; every rank of the group makes it at the same time
    x = heap.stage((rows, cols), dtype)       a tensor inside it: a collective over x then skips one copy

Memory    4096 + 2 * nbytes * ranks bytes of /dev/shm, reserved at once; no name in it, so nothing can be left behind
Protocol  two buffers per rank, monotonic epochs, one signal and one wait per collective: csrc/runtime/heap.h
Failures  a rank that died (noticed within 0.1 s), is late by `timeout`, or made another call, is named on every rank
"""
import ctypes
import itertools
import os
import pickle
import secrets
import socket
import time
import warnings
import weakref
from collections.abc import Iterator
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import build_info
from .machine import Machine, here

__all__ = ["CODES", "CollectiveMismatch", "HeapUnavailable", "PeerDied", "SymmHeap", "by_hand", "heap_of", "keep_heap", "meet"]

# Codes of the sums in csrc/runtime/heap.h; other types travel as bytes, as code 6 + itemsize.
CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4, torch.int32: 5}
OPS = ("barrier", "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "dispatch", "combine", "gemm_ar", "gemm_rs",
       "ag_gemm", "rs_residual_norm")                                 # enum Op of csrc/runtime/heap.h
SHM = "/dev/shm"


class PeerDied(RuntimeError):
    """A rank of the group ended, closed its heap, or gave up, while this one waited for it."""


class CollectiveMismatch(RuntimeError):
    """The ranks of a group called different collectives, dtypes or sizes. The heap stays usable."""


class HeapUnavailable(RuntimeError):
    """The ranks of this group cannot share memory. Raised on all of them."""


# ---- the library ----------------------------------------------------------------------------------------------

_POLL = ctypes.CFUNCTYPE(ctypes.c_int)
_interrupt: list[BaseException] = []                                 # what the handler raised


def _signals() -> Iterator[int]:
    """Asked every 50 ms of a long wait of the main thread. Resuming Python code runs pending signal handlers, so Ctrl-C ends
    a stuck collective. A generator: what a handler raises arrives inside the try block, not before a function's first line."""
    caught = 0
    while True:
        try:
            while True:
                yield caught
                caught = 0
        except GeneratorExit:
            return
        except BaseException as e:
            _interrupt.append(e)
            caught = 1


_watch = _signals()
next(_watch)
_POLLER = _POLL(_watch.__next__)


class Span(ctypes.Structure):
    """A collective (peer -1), or a wait in it for global rank `peer`. Nanoseconds of CLOCK_REALTIME; op: an index of OPS."""
    _fields_ = [*((name, ctypes.c_int64) for name in ("begin", "end", "bytes")),
                *((name, ctypes.c_int32) for name in ("op", "peer", "thread")), ("group", ctypes.c_char * 36)]


def _load() -> tuple[Any, str]:
    """The runtime library and "", or None and why not."""
    path = Path(__file__).parents[1] / "_runtime.so"
    if not path.exists():
        return None, f"the shared-memory runtime is not built ({build_info().get('runtime', {}).get('why', 'not built')})"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        return None, f"the shared-memory runtime does not load: {e}"
    p, i, n, s, d = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p, ctypes.c_double
    ints = ctypes.POINTER(ctypes.c_int)
    for name, result, args in (
        ("heap_create", i, (s, s, n, ints, s, i)), ("heap_bytes", n, (i, n)), ("heap_close", None, (p,)),
        ("heap_map", i, (s, i, i, n, s, ints, ints, d, i, i, ctypes.POINTER(p), s, i)), ("heap_free", None, (p,)),
        ("heap_error", s, (p,)), ("heap_data", p, (p,)), ("heap_next", p, (p, n)), ("heap_on_wait", None, (p, _POLL)),
        ("heap_test", None, (p, i, i)), ("heap_tune", None, (p, i, i, n, n)), ("barrier", i, (p,)),
        ("all_reduce", i, (p, p, p, n, i, i)), ("all_gather", i, (p, p, p, n, n, i)),
        ("reduce_scatter", i, (p, p, p, n, i)), ("all_to_all", i, (p, p, p, n, n, i)), ("record", None, (i,)),
        ("spans", n, (ctypes.POINTER(Span), n, ctypes.POINTER(n))),
        ("dispatch", i, (p, p, p, p, p, p, n, n, n, n, n, n, n, i)), ("combine", i, (p, p, p, p, p, p, n, n, n, n, n, i)),
        ("heap_as", None, (p, i, n, n, n)), ("scatter_rows", i, (p, i, p, n, n, i, p, p)),
        ("walk_begin", i, (p, i, n, n, n, i)), ("walk_place", p, (p,)), ("walk_signal", None, (p,)), ("walk_wait", i, (p,)),
        ("walk_peer", p, (p, i)), ("walk_sum", None, (p, p, n, n, i)), ("walk_end", None, (p, i)),
    ):
        fn = getattr(lib, f"interlace_{name}", None)
        if fn is None:
            return None, f"the shared-memory runtime was built from other sources, it has no {name}: run make setup, or pip install . again"
        fn.restype, fn.argtypes = result, args
    return lib, ""


LIB, WHY_NOT = _load()


def record(on: bool) -> None:
    """Begin (anew) or end to keep a span of every collective over a heap of this process, and of every wait in it."""
    if LIB is not None:
        LIB.interlace_record(on)


def recorded() -> tuple[list[Span], int]:
    """The spans since `record(True)`, and how many more there were: the first million is kept."""
    if LIB is None:
        return [], 0
    lost = ctypes.c_int64()
    many = (Span * LIB.interlace_spans(None, 0, lost))()
    LIB.interlace_spans(many, len(many), lost)
    return list(many), lost.value


by_hand: weakref.WeakValueDictionary[str, "SymmHeap"] = weakref.WeakValueDictionary()   # by group_name, for ops (registry.py)
_count = itertools.count()

# ---- the heap -------------------------------------------------------------------------------------------------


class _Segment:
    """Owns the mapping. Tensors staged in it hold on to it, so it is unmapped after the last of them."""

    def __init__(self, handle: int):
        self.handle = handle
        self._finalizer = weakref.finalize(self, LIB.interlace_heap_free, handle)
        self._finalizer.atexit = False                                # the end of the process unmaps, and threads may still read

    def view(self, offset: int, nbytes: int) -> Tensor:
        raw = (ctypes.c_char * nbytes).from_address(LIB.interlace_heap_data(self.handle) + offset)
        raw._segment = self  # type: ignore[attr-defined]
        return torch.frombuffer(raw, dtype=torch.uint8)


def _exchange(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, mine, group)
    return every


_met: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()   # meetings so far
PATIENCE = 300.0                                                      # seconds, as SymmHeap's timeout


def meet(mine: Any, group: dist.ProcessGroup, op: str, to: str) -> list[Any]:
    """`mine` of every rank of `group`, through its store: a rank that does not come costs an error here, and never the group.

    to: what they meet for. "reset" goes before all else: ranks that came for another thing are sent away, and reset too.
    Raises: TimeoutError after PATIENCE, naming who is missing; what was said here is then taken back, so that the next meeting begins
    even. CollectiveMismatch, on all ranks, where they came for two things."""
    store, rank, n = dist.distributed_c10d._get_process_group_store(group), dist.get_rank(group), _met.get(group, 0)
    keys = [f"interlace/{n}/{r}" for r in range(dist.get_world_size(group))]
    end, name = time.monotonic() + PATIENCE, name_of(group)
    store.set(keys[rank], pickle.dumps((to, mine)))                   # type: ignore[arg-type]

    def away(why: str) -> TimeoutError:
        store.delete_key(keys[rank])
        return TimeoutError(f"{op}: {why}. A first call with new sizes is a meeting of all ranks. Do all ranks make the same calls in the "
                            "same order? After mending that, reset_pads() of the group on all ranks")
    while True:
        try:
            store.wait(keys, timedelta(seconds=max(0.001, end - time.monotonic())))
            if not store.check(keys):                                 # sent away meanwhile: get() would wait without end
                continue
            said = [pickle.loads(store.get(key)) for key in keys]
        except RuntimeError:                                          # waited long enough, or the store's own limit is shorter
            if time.monotonic() < end:
                continue
            late = " and ".join(str(r) for r, key in enumerate(keys) if not store.check([key]))
            raise away(f"rank {late or '?'} of group '{name}' did not come to rank {rank} in {PATIENCE:g} s") from None
        others = [r for r, (what, _) in enumerate(said) if what != to]
        if others and any(what == "reset" for what, _ in said):
            if to != "reset":
                raise away(f"rank {others[0]} of group '{name}' gave up and resets, while rank {rank} waited for it")
            if time.monotonic() > end:
                raise away(f"rank {others[0]} of group '{name}' did not reset in {PATIENCE:g} s, as rank {rank} does")
            time.sleep(0.01)
            continue
        if n:
            store.delete_key(f"interlace/{n - 1}/{rank}")             # all have read it: they are here
        _met[group] = n + 1
        if others:
            raise CollectiveMismatch(f"{op}: rank 0 of group '{name}' came to {said[0][0]}, rank {others[0] or rank} to "
                                     f"{said[others[0] or rank][0]}; every rank must make the same call (this is rank {rank})")
        return [it for _, it in said]


def name_of(group: dist.ProcessGroup) -> str:
    """As errors call it."""
    return next((n for n in (group.group_desc, group.group_name) if n and n != "undefined"), "?")


def _host() -> str:
    """Equal for ranks that can map each other's memory and see each other's pids."""
    try:
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class SymmHeap:
    """Shared memory over `group`: two buffers of `nbytes` per rank. Collective: every rank of the group makes it together.

    Args: group  any torch process group; only set-up messages go through it.
          nbytes  bytes of one buffer: larger messages go through in chunks, but cannot be staged.
          timeout  seconds a collective waits for a rank that is alive.
          directory  the tmpfs to take memory from; in it nothing is ever named, where the system allows that.
    Raises: HeapUnavailable (several hosts, no runtime), OSError (no room: names the bytes and the way out), on all ranks.
    One collective at a time: a second thread gets a RuntimeError.
    """

    def __init__(self, group: dist.ProcessGroup, nbytes: int = 2 << 20, *, timeout: float = 300.0, name: str | None = None,
                 directory: str = SHM, _buffers: int = 2):
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"SymmHeap: group must be a torch process group, got {group!r}; is this rank a member of it?")
        self._group, self.rank, self.size = weakref.ref(group), dist.get_rank(group), dist.get_world_size(group)
        self.name = name or name_of(group)
        self.group_name = f"{group.group_name}/heap {next(_count)}"   # as an op's schema names it, here and on no other rank
        by_hand[self.group_name] = self
        self.nbytes = -(-max(nbytes, 64 * self.size) // 4096) * 4096         # pages, and a cache line for each rank
        self._segment: _Segment | None = None
        self.handle, self._base = 0, 0
        if nbytes <= 0 or timeout <= 0:
            raise ValueError(f"SymmHeap: nbytes and timeout must be positive, got {nbytes} and {timeout}")
        peers = _exchange((WHY_NOT, _host(), self.nbytes, os.getpid(), dist.get_rank(), here("cpu", self.size)), group)
        for r, (why, host, size, *_) in enumerate(peers):
            if why:
                raise HeapUnavailable(f"rank {r} of group '{self.name}': {why}")
            if host != peers[0][1]:
                raise HeapUnavailable(f"ranks 0 and {r} of group '{self.name}' are on two hosts or in two containers: "
                                      f"{peers[0][1]}, {host}")
            if size != peers[0][2]:
                raise ValueError(f"SymmHeap: nbytes must be the same on all ranks, got {peers[0][2]} on rank 0 and {size} on rank {r}")
        self._pids, self._global = ((ctypes.c_int * self.size)(*column) for column in itertools.islice(zip(*peers), 3, 5))
        self.machine: Machine = peers[0][5]                           # one for all ranks: they must choose alike
        self._join(directory, timeout, _buffers)
        assert self._segment is not None
        self._all: Tensor | None = self._segment.view(0, 2 * self.nbytes * self.size)
        self._base = self._all.data_ptr()

    @property
    def group(self) -> dist.ProcessGroup:
        """Held weakly: what `heap_of` keeps for a group ends with it. Raises: RuntimeError once the group was destroyed."""
        group = self._group()
        if group is None:
            raise RuntimeError(f"heap '{self.name}': its process group must be alive, got one that was destroyed; make the heap of another")
        return group

    def _join(self, directory: str, timeout: float, buffers: int) -> None:
        """Rank 0 creates, all map. A second try with a name, where /proc/<pid>/fd cannot be opened or O_TMPFILE is not known."""
        error = ctypes.create_string_buffer(1024)
        total = LIB.interlace_heap_bytes(self.size, self.nbytes)
        for named in (False, True):
            fd, path, made = ctypes.c_int(-1), "", (0, "")
            if self.rank == 0:
                token = f"{directory}/interlace-{secrets.token_hex(16)}" if named else ""
                rc = LIB.interlace_heap_create(directory.encode(), token.encode(), total, fd, error, 1024)
                path, made = token or f"/proc/{os.getpid()}/fd/{fd.value}", (rc, error.value.decode())
            path, made = _exchange((path, made), self.group)[0]
            results = [made]
            try:
                if not made[0]:
                    handle = ctypes.c_void_p()
                    rc = LIB.interlace_heap_map(path.encode(), self.rank, self.size, self.nbytes, self.name.encode(), self._pids,
                                                self._global, timeout, max(self.size, dist.get_world_size()), buffers, handle,
                                                error, 1024)
                    if not rc:
                        self._segment, self.handle = _Segment(handle.value or 0), handle.value or 0
                    results = _exchange((rc, error.value.decode()), self.group)
            finally:                                                  # all have mapped it, or will not
                if fd.value >= 0:
                    os.close(fd.value)
                    if named:
                        os.unlink(path)
            failed = next(((r, code, text) for r, (code, text) in enumerate(results) if code), None)
            if failed is None:
                LIB.interlace_heap_on_wait(self.handle, _POLLER)
                return
            self._segment, self.handle = None, 0
            if failed[1] == 7 or named:
                raise OSError(28 if failed[1] == 7 else 0, f"SymmHeap: rank {failed[0]} of group '{self.name}': {failed[2]}")

    def view(self, address: int, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """The memory at `address`, which lies in the heap, as a tensor."""
        assert self._all is not None
        at = address - self._base
        return self._all[at:at + prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def stage(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor | None:
        """A tensor in this rank's buffer of the next collective, uninitialised; None where it does not fit.

        Hand all of it to the next collective over this heap, on all ranks: its copy-in is skipped. After that it is not yours."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes > self.nbytes or self._all is None:
            return None
        return self.view(LIB.interlace_heap_next(self.handle, nbytes), shape, dtype)

    def serve(self, op: str, rows: int, cols: int, inner: int) -> None:
        """The next collective works for fused op `op`, sizes as in choose.py: all ranks must say the same, and errors do."""
        LIB.interlace_heap_as(self.handle, OPS.index(op), rows, cols, inner)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        if rc := LIB.interlace_barrier(self.handle):
            self.fail(rc)

    def fail(self, rc: int) -> None:
        """Raise the error of a collective that returned `rc`."""
        if rc == 4:
            raise _interrupt.pop()
        if rc == 8:
            raise RuntimeError(f"the heap of group '{self.name}' is in a collective of another thread; one at a time, or one heap each")
        kind = {1: CollectiveMismatch, 2: TimeoutError, 3: PeerDied}.get(rc, RuntimeError)
        raise kind(LIB.interlace_heap_error(self.handle).decode())

    def close(self) -> None:
        """Leave: a rank that waits for this one is told. The memory goes when its last staged tensor does."""
        if self._all is not None:
            LIB.interlace_heap_close(self.handle)
            self._all = None

    def __repr__(self) -> str:
        return f"SymmHeap({self.name!r}, rank {self.rank} of {self.size}, 2 x {self.nbytes} bytes)"


# ---- one per group --------------------------------------------------------------------------------------------

_heaps: dict[int, SymmHeap | None] = {}                               # by id: hashing a ProcessGroup costs 0.3 us a call
_warned = False


def heap_of(group: "dist.ProcessGroup | SymmHeap") -> SymmHeap | None:
    """The heap of `group`, made at the first call, which is collective; None, on all its ranks, where there cannot be one."""
    global _warned
    if isinstance(group, SymmHeap):
        return group
    if id(group) in _heaps:
        return _heaps[id(group)]
    heap = None
    if dist.get_world_size(group) > 1:
        try:
            heap = SymmHeap(group)
        except (HeapUnavailable, OSError) as e:
            if not _warned and dist.get_rank(group) == 0:
                _warned = True
                why = getattr(e, "strerror", None) or e
                warnings.warn(f"interlace: collectives go through torch.distributed, not shared memory: {why}", stacklevel=3)
    keep_heap(group, heap)
    return heap


def keep_heap(group: dist.ProcessGroup, heap: SymmHeap | None) -> None:
    """`heap_of(group)` from now on; None: its collectives go through torch.distributed. Forgotten with the group, whose id comes back."""
    _heaps[id(group)] = heap
    weakref.finalize(group, _heaps.pop, id(group), None)
