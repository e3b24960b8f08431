"""The symmetric heap: nothing left behind, no room, mismatched calls, lost ranks, late ranks, and its negative control."""
import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run

from interlace.kernels.comm import CollectiveMismatch, HeapUnavailable, PeerDied, SymmHeap, all_gather, all_reduce, reduce_scatter
from interlace.kernels.comm.heap import LIB

SHM = "/dev/shm"


def _named():
    return [n for n in os.listdir(SHM) if n.startswith("interlace-")]


def _lifetime(rank, world):
    before = set(_named())
    heap = SymmHeap(dist.group.WORLD, 100_000)
    assert set(_named()) == before, "the heap has a name"
    assert heap.nbytes == 102_400 and heap.rank == rank and heap.size == world
    a = heap.stage((3, 5), torch.bfloat16)
    assert a.shape == (3, 5) and a.is_contiguous() and a.data_ptr() % 64 == 0
    assert heap.stage((102_401,), torch.uint8) is None
    a.fill_(rank)
    assert all_reduce(a, heap).eq(sum(range(world))).all()
    b = heap.stage((3, 5), torch.bfloat16)
    assert b.data_ptr() != a.data_ptr(), "two buffers"
    fds, handle = os.listdir("/proc/self/fd"), heap.handle
    heap.barrier()
    heap.close()
    heap.close()
    assert heap.stage((1,), torch.float32) is None
    with pytest.raises(RuntimeError, match=r"out of use after close\(\)"):
        all_reduce(torch.ones(3), heap)
    b.fill_(1)                                                        # a staged tensor outlives close()
    maps = lambda: Path("/proc/self/maps").read_text().count(SHM)     # noqa: E731
    mapped = maps()
    del heap, a, b
    assert maps() == mapped - 1 and len(os.listdir("/proc/self/fd")) == len(fds) - (world - 1), handle


def _named_fallback(rank, world):
    """Where /proc/<pid>/fd cannot be opened the segment has a name until all have mapped it."""
    import ctypes
    real, before = LIB.interlace_heap_map, _named()

    def refuse(path, *args):
        if b"/proc/" in path and rank == world - 1:
            ctypes.memmove(args[-2], b"cannot open\0", 12)
            return 6
        return real(path, *args)

    LIB.interlace_heap_map = refuse
    try:
        heap = SymmHeap(dist.group.WORLD, 4096)
    finally:
        LIB.interlace_heap_map = real
    dist.barrier()
    assert _named() == before
    assert all_reduce(torch.ones(3), heap).eq(world).all()
    heap.close()


def _mismatch(rank, world):
    heap = SymmHeap(dist.group.WORLD, 8192)
    odd, ones = rank == world - 1, torch.ones(6 * world)
    calls = [(lambda: all_reduce(ones[:3] if odd else ones[:4], heap), "3 x float32", "4 x float32"),
             (lambda: all_reduce(ones.bfloat16() if odd else ones, heap), "bfloat16", "float32"),
             (lambda: all_reduce(ones[:0] if odd else torch.ones(99999), heap), r"\(sum, 0 x", r"\(sum, 99999 x"),
             (lambda: all_reduce(ones, heap, op="max" if odd else "sum"), r"all_reduce\(max", r"all_reduce\(sum"),
             (lambda: all_gather(ones, heap) if odd else all_reduce(ones, heap), "all_gather", "all_reduce"),
             (lambda: reduce_scatter(ones.half() if odd else ones, heap), "float16", "float32"),
             (lambda: heap.barrier() if odd else all_reduce(ones, heap), "barrier", "all_reduce")]
    for i, (call, theirs, mine) in enumerate(calls):
        with pytest.raises(CollectiveMismatch) as e:
            call()
        assert re.search(theirs, str(e.value)) and re.search(mine, str(e.value)), (i, str(e.value))
        assert f"rank {rank} " in str(e.value) and "every rank must make the same call" in str(e.value)
        assert all_reduce(torch.full((5,), float(rank)), heap).eq(sum(range(world))).all(), "the heap must stay usable"
    heap.close()


def _timeout(rank, world):
    heap = SymmHeap(dist.group.WORLD, 4096, timeout=0.4, name="tp")
    if rank:
        start = time.monotonic()
        with pytest.raises((TimeoutError, PeerDied)) as e:
            all_reduce(torch.ones(3), heap)
        assert 0.3 < time.monotonic() - start < 5
        text = str(e.value)
        assert "all_reduce" in text and "of group 'tp'" in text and "epoch 1" in text and "signalled 0" in text, text
        if e.type is TimeoutError:
            assert re.search(r"rank 0 \(global rank 0, pid \d+\)", text) and "in 0.4 s" in text, text
        with pytest.raises(RuntimeError, match="out of use after"):
            all_reduce(torch.ones(3), heap)
    dist.barrier()
    if rank == 0:                                                     # comes too late: told at once, not after its own timeout
        with pytest.raises(PeerDied, match="gave up after an error of its own"):
            all_reduce(torch.ones(3), heap)
            all_reduce(torch.ones(3), heap)
    dist.barrier()


def _closed_peer(rank, world):
    heap = SymmHeap(dist.group.WORLD, 4096)
    if rank:
        heap.close()
    else:
        with pytest.raises(PeerDied, match=r"rank 1 \(global rank 1, pid \d+\) of group '.*' closed the heap"):
            all_reduce(torch.ones(3), heap)
    dist.barrier()


def _wrong_sizes(rank, world):
    with pytest.raises(ValueError, match="nbytes must be the same on all ranks, got 4096 on rank 0 and 8192 on rank 1"):
        SymmHeap(dist.group.WORLD, 4096 << min(rank, 1))
    with pytest.raises(ValueError, match="must be positive"):
        SymmHeap(dist.group.WORLD, 0)


def _other_host(rank, world):
    import warnings

    from interlace.kernels.comm import heap as module
    real, module._warned = module._host, False
    module._host = lambda: f"host{rank}"
    groups = [dist.new_group(list(range(world))) for _ in range(2)]
    try:
        with pytest.raises(HeapUnavailable, match="two hosts or in two containers: host0, host1"):
            SymmHeap(groups[0])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for g in groups:
                assert all_reduce(torch.ones(3), g).eq(world).all()
        assert len([w for w in said if "go through torch.distributed" in str(w.message)]) == (rank == 0), "said once"
    finally:
        module._host = real


def _no_room(rank, world, folder):
    import warnings

    from interlace.kernels.comm import heap as module
    with pytest.raises(OSError, match=r"needs \d+ bytes, \d+ are free; give it more \(docker run --shm-size") as e:
        SymmHeap(dist.group.WORLD, 1 << 20, directory=folder)
    assert e.value.errno == 28
    SymmHeap(dist.group.WORLD, 4096, directory=folder).close()       # and a smaller one fits
    with pytest.raises(OSError, match="/no/such/folder"):
        SymmHeap(dist.group.WORLD, 4096, directory="/no/such/folder")
    module.SymmHeap.__init__.__kwdefaults__["directory"] = "/no/such/folder"
    module._warned = False
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert all_reduce(torch.ones(2), dist.new_group(list(range(world)))).eq(world).all()
    assert any("/no/such/folder" in str(w.message) for w in said) == (rank == 0)
    module.SymmHeap.__init__.__kwdefaults__["directory"] = SHM


def _forgotten(rank, world):
    """A destroyed group takes its heap with it, and its gloo threads; the heap of a living one stays."""
    from interlace.kernels.comm import heap as module
    threads, kept = len(os.listdir("/proc/self/task")), set(module._heaps)
    for _ in range(3):
        group = dist.new_group(list(range(world)))
        all_reduce(torch.ones(3), group)
        heap = weakref.ref(module.heap_of(group))
        assert len(module._heaps) == len(kept) + 1 and heap().group is group
        dist.barrier()
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert heap() is None and set(module._heaps) == kept and len(os.listdir("/proc/self/task")) == threads
    denied = dist.new_group(list(range(world)))
    module.keep_heap(denied, None)
    assert module.heap_of(denied) is None and len(module._heaps) == len(kept) + 1
    dist.barrier()
    dist.destroy_process_group(denied)
    del denied
    gc.collect()
    assert set(module._heaps) == kept, "the next group of this id would have no heap, on this rank alone"
    heap = SymmHeap(dist.group.WORLD, 4096)
    heap._group = lambda: None
    with pytest.raises(RuntimeError, match="its process group must be alive, got one that was destroyed"):
        _ = heap.group


def _wrap(rank, world):
    """Epochs pass 2**32 without a hitch."""
    import ctypes
    heap = SymmHeap(dist.group.WORLD, 4096)
    line = LIB.interlace_heap_data(heap.handle) - 4096 + 128 * rank
    ctypes.c_uint32.from_address(line).value = 2**32 - 4
    dist.barrier()
    for i in range(9):
        assert all_reduce(torch.full((3,), float(i + rank)), heap).eq(sum(i + r for r in range(world))).all()
    assert ctypes.c_uint32.from_address(line).value == 5
    heap.close()


def _race(rank, world, buffers, caught):
    """Rank 0 dawdles between its wait and its read; the others run ahead into their next write."""
    heap = SymmHeap(dist.group.WORLD, 65536, _buffers=buffers)
    LIB.interlace_heap_test(heap.handle, 1, 3000 if rank == 0 else 0)
    wrong = 0
    for i in range(20):
        got = all_reduce(torch.full((1000,), float(i + rank)), heap)
        wrong += not got.eq(sum(i + r for r in range(world))).all()
    assert wrong > 0 if caught and rank == 0 else caught or not wrong, f"{wrong} wrong results of 20 with {buffers} buffers"
    heap.close()


def _out_in_heap(rank, world):
    """What is staged is read by the others until they come to the next call: no result may be written there."""
    heap = SymmHeap(dist.group.WORLD, 65536)
    LIB.interlace_heap_test(heap.handle, 0, 3000 if rank == 0 else 0)
    for i in range(5):
        x = heap.stage((1000,), torch.float32).fill_(i + rank)
        with pytest.raises(RuntimeError, match="all_reduce: out lies in the heap, where others read; give it memory of its own"):
            assert all_reduce(x, heap, out=x).eq(sum(i + r for r in range(world))).all(), "a result over the data of a slower rank"
        assert all_reduce(x, heap).eq(sum(i + r for r in range(world))).all()
    heap.close()


def _threads(rank, world):
    """A second thread is refused while the first waits; a signal ends a wait."""
    import threading
    heap, errors = SymmHeap(dist.group.WORLD, 4096), []

    def first():
        all_reduce(torch.ones(3), heap)

    if rank == 0:
        t = threading.Thread(target=first)
        t.start()
        time.sleep(0.2)
        with pytest.raises(RuntimeError, match="of another thread"):
            all_reduce(torch.ones(3), heap)
        dist.barrier()
        t.join(5)
        assert not t.is_alive() and not errors
    else:
        dist.barrier()
        first()
    if rank == 0:
        def interrupt(*_):
            raise KeyboardInterrupt
        old = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            all_reduce(torch.ones(3), heap)
        assert time.monotonic() - start < 2
        signal.signal(signal.SIGALRM, old)
    dist.barrier()


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", [_lifetime, _named_fallback, _mismatch, _timeout, _wrong_sizes, _other_host, _out_in_heap, _forgotten,
                                   _wrap],
                         ids=lambda f: f.__name__)
def test_heap(check, world):
    run(world, check, world)


@pytest.mark.parametrize("check", [_closed_peer, _threads], ids=lambda f: f.__name__)
def test_two_ranks(check):
    run(2, check, 2)


@pytest.mark.parametrize("world", [2, 3])
def test_second_buffer_is_needed(world):
    run(world, _race, world, 2, False)
    run(world, _race, world, 1, True)


def test_too_small_folder(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        run(2, _no_room, 2, str(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


VICTIM = """
    import os, signal, sys, time, torch, torch.distributed as dist
    from interlace.kernels.comm import PeerDied, SymmHeap, all_reduce
    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    heap = SymmHeap(dist.group.WORLD, name="tp")
    x = torch.ones(1 << 20)
    for i in range(10**9):
        if rank == 1 and i == 20:
            open(path + ".time", "w").write(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            all_reduce(x, heap)
        except PeerDied as e:
            print(time.time() - float(open(path + ".time").read()), e, flush=True)
            os._exit(0)
"""


def test_killed_rank_is_noticed_and_named(tmp_path):
    before = sorted(os.listdir(SHM))
    ranks = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(VICTIM), str(r), str(tmp_path / "store")],
                              stdout=subprocess.PIPE, text=True) for r in range(2)]
    try:
        text, _ = ranks[0].communicate(timeout=300)                    # rank 1 stays a zombie until we look: that must not hide it
        assert ranks[0].returncode == 0, text
        seconds, message = text.split(" ", 1)
        assert float(seconds) < 1, text
        assert f"all_reduce: rank 1 (global rank 1, pid {ranks[1].pid}) of group 'tp' died; waited for epoch" in message, text
    finally:
        for p in ranks:
            p.kill()
            p.wait()
    assert sorted(n for n in os.listdir(SHM) if not n.startswith("sem.")) == [n for n in before if not n.startswith("sem.")]


def test_a_runtime_of_other_sources(monkeypatch):
    """After an update that was not built: no traceback at import, but where it is, and the way out."""
    from interlace.kernels.comm import heap as module
    real = module.ctypes.CDLL

    class Older:
        def __init__(self, path):
            self.lib = real(path)

        def __getattr__(self, name):
            if name == "interlace_scatter_rows":
                raise AttributeError(name)
            return getattr(self.lib, name)
    monkeypatch.setattr(module.ctypes, "CDLL", Older)
    lib, why = module._load()
    assert lib is None and "built from other sources, it has no scatter_rows: run make setup" in why
