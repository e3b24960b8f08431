"""What this machine can do, measured: the roofs a row's percentage is of.

    copy       {threads: {bytes: GB/s}}      read + written, by size: what fits a cache has a higher roof
    gemm       {threads: {dtype: GFLOP/s}}   the best of some square products, torch's own or ours
    link       {bytes: GB/s}                 what a rank gets through in an all-to-all, by size; between ranks only
    signal_us  a barrier of two ranks over the heap (CPU), or a dependent pair of launches
    gemm_less_sms  {SMs taken away: GFLOP/s} CUDA only: what overlapped communication may cost

Kept in bench/results/<machine>/roofs.json with provenance, used again until `interlace bench --roofs`; those of --quick
only by --quick, those taken while others kept the cores busy by none.
"""
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.comm import all_to_all, gemm, heap_of
from .cases import Case
from .clocks import Clock, clock
from .provenance import Neighbours, machine, provenance

__all__ = ["between_ranks", "limits", "load", "on_one", "save", "usable"]

DTYPES = ("float32", "bfloat16")
_SPIN = """
extern "C" __global__ void hold(volatile int* stop) {
  const long long start = clock64();
  if (threadIdx.x == 0) while (!*stop && clock64() - start < 20000000000LL);   // some 10 s, should nobody set it
}
"""


def _best(c: Clock, fn: Callable[[], Any], seconds: float) -> float:
    """The fastest sample, after a warm one: a roof is what is possible."""
    one = max(c.sample(fn), c.sample(fn))
    inner = c.inner(one)
    return min(c.sample(fn, inner) for _ in range(max(3, min(50, int(seconds / max(one * inner, 1e-9))))))


def _copies(c: Clock, device: str, quick: bool) -> dict[str, float]:
    top = 31 if device == "cuda" else 26 if quick else 28
    out = {}
    for b in range(16, top + 1, 2):
        x = torch.randn((1 << b) // 8, device=device)                 # half is read, half is written
        y = torch.empty_like(x)
        out[str(1 << b)] = (1 << b) / _best(c, partial(y.copy_, x), 0.05 if quick else 0.3) / 1e9
    return out


def _gemms(c: Clock, device: str, quick: bool) -> dict[str, float]:
    out = {}
    for name in DTYPES:
        dtype, best = getattr(torch, name), 0.0
        for n in (4096, 8192) if device == "cuda" else (512,) if quick else (512, 1024, 2048):
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            for fn in (torch.mm, gemm):
                best = max(best, 2 * n ** 3 / _best(c, partial(fn, a, b), 0.1 if quick else 0.5) / 1e9)
        out[name] = best
    return out


def _less_sms(c: Clock) -> dict[str, float]:
    """The bf16 GEMM while s SMs are held by a kernel that spins until a word is set."""
    n, total = 8192, torch.cuda.get_device_properties(0).multi_processor_count
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    hold = torch.cuda._compile_kernel(_SPIN, "hold")                  # NVRTC
    side, out = torch.cuda.Stream(), {}
    shared = getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", 96 << 10)
    hold.set_shared_memory_config(shared)                             # a block to an SM: nothing else fits beside it
    for s in (0, 4, 8, 16, 32):
        if s >= total:
            break
        stop = torch.zeros(1, dtype=torch.int32).pin_memory()
        torch.cuda.synchronize()
        if s:
            hold((s, 1, 1), (32, 1, 1), (stop,), shared_mem=shared, stream=side)
        times = []
        try:
            for _ in range(10):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                torch.mm(a, b)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3)
        finally:
            stop.fill_(1)
        torch.cuda.synchronize()
        out[str(s)] = 2 * n ** 3 / min(times) / 1e9
    return out


def on_one(device: str, quick: bool = False, threads: tuple[int, ...] = ()) -> dict[str, Any]:
    """Copy and GEMM, with one thread (as ranks have) and with all (as one process has)."""
    before, around = torch.get_num_threads(), Neighbours()
    found: dict[str, Any] = {"copy": {}, "gemm": {}}
    with clock(device) as c:
        for t in sorted({1, before, *threads}) if device == "cpu" else (0,):
            if t:
                torch.set_num_threads(t)
            found["copy"][str(t)], found["gemm"][str(t)] = _copies(c, device, quick), _gemms(c, device, quick)
        torch.set_num_threads(before)
        if device == "cuda":
            try:
                found["gemm_less_sms"] = _less_sms(c)
            except Exception as e:                                    # an older torch has no _compile_kernel
                found["gemm_less_sms"] = {"failed": f"{type(e).__name__}: {e}"[:200]}
    cores = around.cores()
    return {**found, "busy_cores": round(cores, 2), "loaded": cores > Neighbours.LIMIT}


def between_ranks(group: dist.ProcessGroup, device: str, quick: bool = False) -> dict[str, Any]:
    """Link bandwidth by size and the latency of a signal; collective."""
    world, links = dist.get_world_size(group), {}
    heap = heap_of(group) if device == "cpu" else None
    barrier = heap.barrier if heap is not None else lambda: dist.barrier(group)
    with clock(device) as c:
        for b in range(12, 23 if quick else 27 if device == "cpu" else 31, 2):
            x = torch.randn((1 << b) // 4, device=device)
            y, times = torch.empty_like(x), []
            for _ in range(5 if quick else 20):
                barrier()
                times.append(c.sample(partial(all_to_all, x, group, out=y), 5))
            worst = torch.tensor([min(times)], dtype=torch.float64)
            dist.all_reduce(worst, dist.ReduceOp.MAX, group)
            links[str(1 << b)] = (1 << b) * (world - 1) / world / worst.item() / 1e9
        signal = min(c.sample(barrier, 200 if heap is not None else 5) for _ in range(5))
    return {"link": {str(world): links}, "signal_us": {str(world): signal * 1e6}}


def load(*folders: Path) -> dict[str, Any]:
    """The roofs of this machine that are kept in one of the folders; {} where there are none."""
    for folder in folders:
        try:
            found = json.loads((folder / "roofs.json").read_text())
        except (OSError, ValueError):
            continue
        if found.get("machine") == machine():
            return found
    return {}


def usable(found: dict[str, Any], quick: bool) -> bool:
    return "copy" in found and not found.get("loaded") and (quick or not found.get("quick"))


def save(folder: Path, found: dict[str, Any], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**found, **more, "machine": machine(), "provenance": provenance()}, indent=1)
    (folder / "roofs.json").write_text(text + "\n")


def _at(table: dict[str, float], nbytes: float) -> float:
    """The rate at the smallest measured size that holds nbytes."""
    sizes = sorted(map(int, table))
    return table[str(next((s for s in sizes if s >= nbytes), sizes[-1]))]


def limits(found: dict[str, Any]) -> Callable[[Case, int, int, int], tuple[float, str]]:
    """(case, bytes, FLOPs, link bytes) -> (the least seconds it can take here, which roof binds)."""
    def limit(case: Case, nbytes: int, flops: int, link: int) -> tuple[float, str]:
        copies, gemms = found.get("copy", {}), found.get("gemm", {})
        threads = next((t for t in (str(torch.get_num_threads()), "0", *copies) if t in copies), "")
        bounds = [(0.0, "")]
        if threads and nbytes:
            bounds.append((nbytes / _at(copies[threads], nbytes) / 1e9, "memory"))
        if threads and flops:
            bounds.append((flops / gemms[threads].get(case.dtype, max(gemms[threads].values())) / 1e9, "gemm"))
        links = found.get("link", {}).get(str(case.world), {})
        if link and links:
            bounds.append((link / _at(links, link) / 1e9, "link"))
        return max(bounds)
    return limit
