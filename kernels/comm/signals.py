"""Signals between ranks, as Triton device functions. What waits for what stands in protocol.py; the memory in pad.py.

    signal(...)   barrier of the program's threads, then a release atomic at system scope: everything the program wrote is there
    wait(...)     acquire atomics at system scope until the flag is >= the epoch; bounded: reports to the error words, returns False
    going(...)    whether this rank may send: not after a wait of it has run out, until Pad.reset(); asked again after each wait
    last(...)     True in the last of `of` programs to arrive: acq_rel at device scope, so what the others wrote is its to publish
    finish(...)   the last program of a call bumps the epoch, in memory: a CUDA graph replays it

Stock `tl` operations only, no inline assembly, so the interpreter runs them between processes. Rules they rely on:
    * `tl.debug_barrier()` before each release: up to Triton 3.6 a release atomic does not wait for the program's other threads.
    * A signalled cell is written by `tl.store`, never by a TMA store: up to 3.6 that may not have landed.
    * wait() stands outside the K loop, and what it returns goes into the mask of the loads it guards: no compiler may move them up.
BARRIER, RELEASE and ACQUIRE are parameters for the negative controls only: tests switch them off and must see a test fail.
"""
from ..dispatch import tl, triton
from . import protocol

__all__ = ["before", "blocks_of", "buffer_of", "cells", "finish", "first_row", "flag_word", "going", "last", "next_epoch", "owned_slot",
           "owner_of", "part_slot", "peer_of", "signal", "signal_all", "wait"]

# The same text as the step tables.
buffer_of, flag_word, peer_of, before, owner_of, part_slot, owned_slot, first_row, blocks_of = map(triton.jit, (
    protocol.buffer_of, protocol.flag_word, protocol.peer_of, protocol.before, protocol.owner_of, protocol.part_slot,
    protocol.owned_slot, protocol.first_row, protocol.blocks_of))

# local_ptr: int32 words of this rank alone: epoch, programs done, error lock, then counters.


@triton.jit
def cells(peers_ptr, rank, offset, DTYPE: tl.constexpr):
    """Rank's pad at a byte offset, which is a multiple of 16."""
    return tl.multiple_of((tl.load(peers_ptr + rank) + offset).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def next_epoch(local_ptr):
    return tl.load(local_ptr) + 1


@triton.jit
def _locked(local_ptr):
    """The error lock, one answer for all threads of the program: a plain load would be each thread's own, and as another program may set
    the lock in between, some would take a branch, and meet a barrier in it, that the others do not."""
    return tl.atomic_add(local_ptr + 2, 0, sem="relaxed", scope="gpu")


@triton.jit
def going(local_ptr):
    """A rank that sent on after a wait ran out would write over what a late one still reads, and send sums that lack a part."""
    return _locked(local_ptr) == 0


@triton.jit
def signal(peers_ptr, to, word, epoch, go, BARRIER: tl.constexpr, RELEASE: tl.constexpr):
    if BARRIER:
        tl.debug_barrier()
    if go:
        tl.atomic_xchg(cells(peers_ptr, to, 0, tl.int32) + word, epoch, sem=RELEASE, scope="sys")


@triton.jit
def signal_all(peers_ptr, rank, word, epoch, go, world, BARRIER: tl.constexpr, RELEASE: tl.constexpr):
    if BARRIER:
        tl.debug_barrier()
    for i in range(world):
        signal(peers_ptr, peer_of(rank, i, world), word, epoch, go, False, RELEASE)


@triton.jit
def wait(peers_ptr, local_ptr, error_ptr, rank, source, word, epoch, limit, OP: tl.constexpr, ACQUIRE: tl.constexpr):
    """True when `source` has signalled `epoch` or later in this rank's `word`; False after `limit` polls, reported once."""
    flag = cells(peers_ptr, rank, 0, tl.int32) + word
    got = tl.atomic_add(flag, 0, sem=ACQUIRE, scope="sys")
    polls = 0
    while (got - epoch < 0) & (polls < limit):                        # signed difference: epochs may wrap
        got = tl.atomic_add(flag, 0, sem=ACQUIRE, scope="sys")
        polls += 1
        if polls % 256 == 0:  # noqa: SIM102
            if _locked(local_ptr) != 0:                               # after one wait has failed, the others do not spin it out
                polls = limit
    if got - epoch < 0:  # noqa: SIM102                               nested: `and` would run the atomic in every wait
        if tl.atomic_cas(local_ptr + 2, 0, 1, sem="relaxed", scope="gpu") == 0:
            tl.store(error_ptr + 1, OP)
            tl.store(error_ptr + 2, epoch)
            tl.store(error_ptr + 3, source)
            tl.store(error_ptr + 4, word)
            tl.store(error_ptr + 5, got)
            tl.debug_barrier()
            tl.store(error_ptr, 1)
    return got - epoch >= 0


@triton.jit
def last(local_ptr, counter, of, BARRIER: tl.constexpr):
    """True in the program that arrives as number `of` at the counter, which then is 0 again."""
    if BARRIER:
        tl.debug_barrier()
    at = local_ptr + 3 + counter
    is_last = tl.atomic_add(at, 1, sem="acq_rel", scope="gpu") == of - 1
    if is_last:
        tl.store(at, 0)
    return is_last


@triton.jit
def finish(local_ptr, epoch):
    """Every program of a call's last kernel ends with this. All have read the epoch when the last one arrives."""
    tl.debug_barrier()
    if tl.atomic_add(local_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(local_ptr + 1, 0)
        tl.store(local_ptr, epoch)
