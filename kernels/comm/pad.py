"""Pads: the memory of one overlapped op on one group, the same at every rank, mapped into all of them.

    pad = Pad(group, "gemm_ar", nbytes, flags, device)        collective: every rank of the group makes it at the same time
    pads = Pad.virtual(world, "gemm_ar", nbytes, flags, device)   ranks that are only streams: all pads in this process
    pad.agree(key)                                            collective, once per key: all ranks were called alike
    pad.check()                                               raises what a wait that ran out has written
    pad.settle()                                              collective: nobody runs a kernel over it, nobody's wait has run out

Memory    one allocation a rank: [flag words: 2 stages x world x flags, int32 | buffer 0 | buffer 1], nbytes a buffer.
          Beside it, of this rank alone: `peers` int64 [world], the address of every rank's allocation; `local` int32: epoch, programs
          done, error lock, counters; `error` int32 [6]: set, op, epoch, source, word, got. On CUDA `error` is pinned host memory, so
          looking at it costs no synchronisation.
Backends  CPU: the memory of a SymmHeap (POSIX shared memory without a name).  CUDA: torch symmetric memory, several processes on
          one GPU too (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1; without multicast then).  Virtual: plain tensors.
Graphs    nothing here runs per call but agree(): addresses and the epoch are in device memory. Make pads, and call an op once,
          before capture.
"""
from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import CUDA, INTERPRET
from .heap import CollectiveMismatch, SymmHeap, _exchange, _heaps, _host, heap_of, keep_heap, meet, name_of
from .machine import HOPPER, Machine, here

__all__ = ["OPS", "Pad", "in_turn", "pad_machine", "pad_multicast", "pad_of", "pad_room", "reset_pads"]

OPS = ("all_reduce", "gemm_ar", "all_gather", "ag_gemm", "reduce_scatter", "gemm_rs", "rs_residual_norm", "dispatch", "combine")
COUNTERS = 1 << 16
ROOM = 1 << 30                                                        # bytes of both buffers, from which on a call needs no overlap
_POLLS = {"cuda": 1 << 28, "cpu": 1 << 19}                            # at 0.5 to 1 us and at 30 to 100 us a poll: minutes, both


class Pad:
    """The pad of one (group, op, slot). Two calls that may run at the same time need two slots: two pads.

    Args: group  a process group over which set-up messages go; op  one of OPS; nbytes  of one of the two buffers;
          flags  words per source and stage; device; polls  of a wait before it gives up.
    Raises: HeapUnavailable, OSError as SymmHeap; RuntimeError where ranks disagree on nbytes or flags."""

    world: int
    rank: int
    memory: Tensor
    _keep: list[Any]                                                  # what the addresses lie in
    share = 1                                                         # ranks on this rank's GPU
    multicast = 0                                                     # the multicast address of the allocation, 0 without one
    fed_by: Pad | None = None                                         # whose kernel sends into this one, onward
    owed = ""                                                         # what was sent onward into this pad and is not yet taken

    def __init__(self, group: dist.ProcessGroup | None, op: str, nbytes: int, flags: int, device: torch.device | str = "cpu", *,
                 polls: int | None = None, start: int = 0):
        self.op, self.device, self.flags = op, torch.device(device), flags
        self._group = None if group is None else weakref.ref(group)    # the pads of a group end with it
        self.nbytes = -(-max(nbytes, 1) // 256) * 256
        self.polls = polls or _POLLS.get(self.device.type, 1)
        self._agreed: set[str] = set()
        self.name = "?"
        if group is None:
            return
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.name = name_of(group)
        self._agree((op, self.nbytes, flags, self.device.type, start), "made the pad of")
        if self.device.type == "cpu":
            addresses = self._map()
        else:
            addresses = self._rendezvous()
        self._ready(addresses, start)
        meet(None, group, op, "begin")                                # nobody signals before all have cleared their words

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self._group is None else self._group()

    @classmethod
    def virtual(cls, world: int, op: str, nbytes: int, flags: int, device: torch.device | str, *, polls: int | None = None,
                start: int = 0) -> list[Pad]:
        """The pads of `world` ranks in this process, for one stream each: device-resident kernels of all of them run at once."""
        pads = [cls(None, op, nbytes, flags, device, polls=polls, start=start) for _ in range(world)]
        for r, pad in enumerate(pads):
            pad.rank, pad.world, pad.name, pad.share = r, world, "virtual", world
            pad.memory = torch.empty(pad.total, dtype=torch.uint8, device=device)
        addresses = [p.memory.data_ptr() if p.device.type != "meta" else 0 for p in pads]
        for pad in pads:
            pad._ready(addresses, start)
            pad._keep = list(pads)                                    # an address is no reference
        return pads

    @property
    def data(self) -> int:
        """Byte offset of buffer 0."""
        return -(-2 * self.world * self.flags * 4 // 256) * 256

    @property
    def total(self) -> int:
        return self.data + 2 * self.nbytes

    def _map(self) -> list[int]:
        assert self.group is not None
        self._heap = SymmHeap(self.group, -(-self.total // 2), name=f"{self.name} {self.op}")
        each = 2 * self._heap.nbytes
        views = [self._heap._segment.view(r * each, self.total) for r in range(self.world)]  # type: ignore[union-attr]
        self.memory, self._keep = views[self.rank], list(views)
        return [v.data_ptr() for v in views]

    def _rendezvous(self) -> list[int]:
        import torch.distributed._symmetric_memory as symm_mem
        with torch.cuda.device(self.device):
            self.memory = symm_mem.empty(self.total, dtype=torch.uint8, device=self.device)
            self._handle = symm_mem.rendezvous(self.memory, self.group)  # type: ignore[arg-type]
        here = f"{_host()} {torch.cuda.get_device_properties(self.device).uuid}"
        self.share = _exchange(here, self.group).count(here)  # type: ignore[arg-type]
        begin = self.memory.data_ptr() - self._handle.buffer_ptrs[self.rank]   # 0 on torch 2.11; an allocator may put several in one block
        self.multicast = self._handle.multicast_ptr and self._handle.multicast_ptr + begin
        return [address + begin for address in self._handle.buffer_ptrs]

    def _ready(self, addresses: list[int], start: int) -> None:
        self.peers = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.local = torch.zeros(3 + COUNTERS, dtype=torch.int32, device=self.device)
        self.error = torch.zeros(6, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        if self.device.type == "meta":
            self.error = self.error.to("meta")
        self._clear(start)

    def _clear(self, start: int) -> None:
        self.memory[:self.data].view(torch.int32).fill_(start)
        self.local.zero_()
        self.local[:1].fill_(start)
        self.error.zero_()
        self.owed = ""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def buffer(self, parity: int) -> Tensor:
        """This rank's buffer, as bytes: tests poison it."""
        return self.memory[self.data + parity * self.nbytes:][:self.nbytes]

    def agree(self, key: str) -> None:
        """Every rank calls its op in the same way: `key` names shapes, dtype, tiles and grid. Exchanged at the first call with it.

        Raises: CollectiveMismatch on every rank, naming both; the pad stays usable. TimeoutError as check(), at a first call on every
        rank: one that left an exchange out would leave the others in it."""
        if key not in self._agreed:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{self.op}: a call must have run once before it is captured in a CUDA graph, got a capture of {key} "
                                   f"over group '{self.name}'; call it once before")
            if self.group is not None:
                self.settle()
                self._agree((self.op, key), "called", f", in epoch {int(self.local[0]) + 1}")
            self._agreed.add(key)
        self.check()
        if self.group is not None:                                    # virtual ranks must run at once
            in_turn(self.device, True)

    def _agree(self, mine: tuple, what: str, when: str = "") -> None:
        digest = hashlib.sha256(repr(mine).encode()).hexdigest()
        every = meet((digest, str(mine)), self.group, self.op, "agree")  # type: ignore[arg-type]
        for r, (other, text) in enumerate(every):
            if other != every[0][0]:
                raise CollectiveMismatch(f"{self.op}: rank 0 of group '{self.name}' {what} {every[0][1]}, but rank {r} {what} {text}"
                                         f"{when}; every rank must make the same call (this is rank "
                                         f"{self.rank})")

    def settle(self) -> None:
        """Collective. When it returns, every kernel over the pad has ended, on all ranks. Raises: TimeoutError, on all of them where a
        wait of any ran out."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        every = [self.failure()] if self.group is None else meet(self.failure(), self.group, self.op, "settle")
        if first := next(filter(None, every), ""):
            raise TimeoutError(self.failure() or first)

    def check(self) -> None:
        """Raises: TimeoutError where a wait of an earlier call ran out. No device synchronisation where none has."""
        if self.device.type != "meta" and (self.error[0] or self.fed_by) and (text := self.failure()):
            raise TimeoutError(text)

    def failure(self) -> str:
        """Which wait of this rank ran out, "" for none."""
        if not self.error[0]:
            return self.fed_by.failure() if self.fed_by else ""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)                       # the other five words
        _, op, epoch, source, word, got = self.error.tolist()
        return (f"{OPS[op]}: no signal from rank {source} of group '{self.name}' to rank {self.rank} after {self.polls} polls; "
                f"waited for epoch {epoch} in flag {word % self.flags}, it had signalled {got}. Its result holds NaN. Do all "
                "ranks make the same calls in the same order? After mending that, reset_pads() of the group on all ranks")

    def reset(self, start: int = 0) -> None:
        """Make the pad new after a TimeoutError. Collective: no rank may still run a kernel over it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for step in (lambda: self._clear(start), lambda: None):
            if self.group is not None:
                meet(None, self.group, self.op, "reset")              # all have ended their kernels; all have cleared their words
            step()

    def fits(self, nbytes: int, flags: int) -> bool:
        return nbytes <= self.nbytes and flags <= self.flags

    def demand(self, nbytes: int, flags: int) -> None:
        """Before every launch: room for the call. Raises: ValueError, on all ranks alike."""
        if not self.fits(nbytes, flags) and self.device.type != "meta":
            raise ValueError(f"{self.op}: the pad of group '{self.name}' must hold {nbytes} bytes and {flags} flags, got {self.nbytes} and "
                             f"{self.flags}; make it with needs() of the largest call")


# A kernel over a pad has every SM, and waits in it for other ranks. Were a collective of another stream to hold some of them, and at
# another rank the other way round, both would wait for ever: so those that this package starts take turns, in the order of the program.
_spinning: dict[torch.device, Any] = {}                               # the stream of the last kernel over a pad, and whether in a capture
_others: dict[torch.device, set[Any]] = {}                            # those of collectives of torch.distributed since then


def in_turn(device: torch.device, spins: bool) -> None:
    """Before a collective on the current stream: behind those that must not run beside it, on other streams. spins: a kernel over a pad.

    A capture of a CUDA graph begins with an idle GPU, and what is in it can wait for nothing else."""
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    now = stream, torch.cuda.is_current_stream_capturing()
    last, others = _spinning.get(stream.device), _others.setdefault(stream.device, set())
    for of, captured in {last, *(others if spins else ())} - {None, now}:
        if captured == now[1]:
            stream.wait_stream(of)
    if spins:
        _spinning[stream.device] = now
        others.clear()
    else:
        others.add(now)


_pads: dict[tuple[int, str, int, str], Pad] = {}


def pad_of(group: dist.ProcessGroup, op: str, nbytes: int, flags: int, device: torch.device, slot: int = 0) -> Pad:
    """The pad of (group, op, slot), made or made larger, which is collective, where it does not fit.

    nbytes and flags are functions of shapes that are equal on all ranks, so all of them grow it in the same call.
    Raises: RuntimeError while a CUDA graph is captured: run the op once before."""
    key = (id(group), op, slot, device.type)
    pad = _pads.get(key)
    if pad is None or not pad.fits(nbytes, flags):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{op}: its pad must be made before a CUDA graph is captured, got a capture that needs {nbytes} bytes; "
                               "call the op once with the largest shape before")
        if pad is None:
            weakref.finalize(group, _pads.pop, key, None)
        else:
            pad.settle()                                              # before its memory is given back: peers may still write there
            nbytes, flags = max(nbytes, pad.nbytes), max(flags, pad.flags)
        pad = _pads[key] = Pad(group, op, nbytes, flags, device)
    return pad


def reset_pads(group: dist.ProcessGroup) -> None:
    """Make every pad of the group new, and its heap, after a TimeoutError or a CollectiveMismatch of an op over it. Collective: all ranks
    call it."""
    for key in sorted(k for k in _pads if k[0] == id(group)):
        _pads[key].reset()
    if _heaps.get(id(group)) is not None:
        keep_heap(group, SymmHeap(group))


_rooms: dict[tuple[int, str], int] = {}
_multicast: set[tuple[int, str]] = set()
_machines: dict[tuple[int, str], Machine] = {}


def pad_room(x: Tensor, group: dist.ProcessGroup | SymmHeap) -> int:
    """Bytes a pad over `group` may have, 0 where its ranks cannot reach each other's memory or no kernel takes x's type. Collective
    at its first use on a group: one answer on all ranks. CPU tensors have pads for the interpreter alone."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or (x.is_cpu and not INTERPRET):
        return 0
    if isinstance(group, SymmHeap):
        group = group.group
    key = (id(group), x.device.type)
    if key not in _rooms:
        works, multicast = (heap_of(group) is not None, False) if x.is_cpu else _symmetric(group, x.device)
        _rooms[key] = ROOM if works else 0
        if works and not x.is_cpu:
            _machines[key] = _exchange(here("cuda", dist.get_world_size(group)), group)[0]   # one for all ranks: they must choose alike
            weakref.finalize(group, _machines.pop, key, None)
        weakref.finalize(group, _rooms.pop, key, None)
        if multicast:
            _multicast.add(key)
            weakref.finalize(group, _multicast.discard, key)
    return _rooms[key]


def pad_multicast(x: Tensor, group: dist.ProcessGroup | SymmHeap) -> bool:
    """Whether multicast_ar serves pads over `group`: they have a multicast address, and csrc/cuda is built, on every rank. After
    pad_room, which asks."""
    return (id(group.group if isinstance(group, SymmHeap) else group), x.device.type) in _multicast


def pad_machine(x: Tensor, group: dist.ProcessGroup | SymmHeap) -> Machine:
    """What the ranks of `group` take for their machine. After pad_room, which asks."""
    return _machines.get((id(group.group if isinstance(group, SymmHeap) else group), x.device.type), HOPPER)


def _symmetric(group: dist.ProcessGroup, device: torch.device) -> tuple[bool, bool]:
    """Whether all ranks of the group can map each other's GPU memory: one host, NVLink or peer access; and whether multicast_ar can
    use it. Collective."""
    if dist.get_world_size(group) == 1 or len(set(_exchange(_host(), group))) > 1:
        return False, False
    try:
        pad = Pad(group, "all_reduce", 256, 1, device)
        mine = True, CUDA and pad.multicast != 0
    except (RuntimeError, OSError, ImportError):                      # no peer access, no driver support, a torch without it
        mine = False, False
    every = _exchange(mine, group)
    return all(works for works, _ in every), all(multicast for _, multicast in every)
