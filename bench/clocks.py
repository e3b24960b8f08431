"""Clocks, chosen by device: one sample of a function in seconds.

CPU: perf_counter around `inner` calls in a row, for work shorter than a clock can tell. CUDA: the L2 is flushed, then the
stream sleeps until the launches of the call are queued, so that the events around it time the device and not the host.

What a sample finds in the caches must not depend on which way ran before it. On a CPU `settle` sees to that: one call that is
not timed, so that every way finds what its own last call left; of a cold case (an optimizer, whose state no cache holds after a
backward) a flush, so that none finds anything. Without it ways of 15 MB each shared 32 MB of L3 as chance had it, and their
ratios moved by 30% from process to process and not within one.
"""
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["Clock", "cache_bytes", "clock"]

Fn = Callable[[], Any]
LONG = 50e-3                                                          # seconds of a call to whom the refilling of a cache is nothing


def cache_bytes() -> int:
    """Of the last level, all of them; 32 MiB where the system does not tell."""
    caches = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            caches[int(level), shared] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in caches), default=0)
    return sum(n for (level, _), n in caches.items() if level == last) or 32 << 20


class Clock:
    """The clock of a CPU."""
    least = 200e-6                                                    # seconds of a sample

    @functools.cached_property
    def junk(self) -> torch.Tensor:
        return torch.zeros(min(2 * cache_bytes(), 1 << 30) // 4)

    def settle(self, fn: Fn, seconds: float, cold: bool) -> None:
        """Before a sample of a call that takes `seconds`: the same caches for every way."""
        if cold:
            self.junk.sum()                                           # read only, as on a GPU
        elif seconds < LONG:
            fn()

    def sample(self, fn: Fn, inner: int = 1) -> float:
        calls = range(inner)
        start = time.perf_counter()
        for _ in calls:
            fn()
        return (time.perf_counter() - start) / inner

    def inner(self, seconds: float) -> int:
        return max(1, min(1000, round(self.least / max(seconds, 1e-9))))

    def __enter__(self) -> "Clock":
        gc.collect()
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.enable()


class CudaClock(Clock):
    def __init__(self) -> None:
        self.l2 = torch.zeros(64 << 20, device="cuda")                # five times an H200's
        self.queueing: dict[int, float] = {}                          # seconds to queue a call of a function
        self.hertz = 1e3 * getattr(torch.cuda.get_device_properties(0), "clock_rate", 1_700_000)

    def settle(self, fn: Fn, seconds: float, cold: bool) -> None:
        """Nothing: every sample flushes the L2."""

    def sample(self, fn: Fn, inner: int = 1) -> float:
        wait = self.queueing.get(id(fn), 0.0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.l2.sum()                                                 # read only: no lines that the sample would have to write back
        if wait:
            torch.cuda._sleep(int(min(1.5 * wait + 20e-6, 10e-3) * self.hertz))
        start = time.perf_counter()
        begin.record()
        fn()
        end.record()
        self.queueing[id(fn)] = time.perf_counter() - start
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def inner(self, seconds: float) -> int:
        return 1


def clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else Clock()
