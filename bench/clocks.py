"""Clocks, chosen by device: one sample of a function in seconds.

CPU: perf_counter around `inner` calls in a row, for work shorter than a clock can tell. CUDA: the L2 is flushed, then the
stream sleeps until the launches of the call are queued, so that the events around it time the device and not the host.
"""
import gc
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Clock", "clock"]

Fn = Callable[[], Any]


class Clock:
    """The clock of a CPU."""
    least = 200e-6                                                    # seconds of a sample

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
        self.l2 = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        self.queueing: dict[int, float] = {}                          # seconds to queue a call of a function
        self.hertz = 1e3 * getattr(torch.cuda.get_device_properties(0), "clock_rate", 1_700_000)

    def sample(self, fn: Fn, inner: int = 1) -> float:
        wait = self.queueing.get(id(fn), 0.0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.l2.zero_()
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
