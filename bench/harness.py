"""Timing and bookkeeping shared by bench_<op>.py: several ways to do one thing, interleaved, checked, and written down.

    compare("rms_norm", {"interlace": ours, "torch": eager}, truth=truth, case={"N": 4096, "D": 1024, "dtype": "float32"})

Every round runs each way once, in rotating order; the figures are p20 / p50 / p80 over rounds, and the ratio to the first
way is the median of the ratios within a round, so that a machine that slows down slows all of them. With a group, a round
starts at a barrier and costs what its slowest rank costs. A row without an error against fp64 truth cannot be made.
"""
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.dispatch import tune_malloc

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """A folder name for this machine: GPU or CPU model and core count."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((ln.split(":")[1] for ln in lines if ln.startswith("model name")), platform.processor() or "cpu")
        name = f"{name} {os.cpu_count()}c {'avx512' if any('avx512f' in ln for ln in lines) else 'avx2'}"
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()).lower()


def provenance() -> dict[str, Any]:
    git = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()  # noqa: E731
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+dirty" if git("status", "--porcelain") else ""),
        "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "command": " ".join(sys.argv),
    }


def error(got: Any, truth: Any) -> float:
    """Largest absolute error over the largest true value, over all tensors."""
    got, truth = ((t,) if isinstance(t, Tensor) else t for t in (got, truth))
    worst, scale = 0.0, 0.0
    for g, t in zip(got, truth, strict=True):
        worst = max(worst, (g.detach().double().cpu() - t.double().cpu()).abs().max().item() if t.numel() else 0.0)
        scale = max(scale, t.abs().max().item() if t.numel() else 0.0)
    return worst / scale if scale else worst


def compare(op: str, ways: dict[str, Callable[[], Any]], *, truth: Any, case: dict[str, Any], rounds: int = 30,
            warmup: int = 3, inner: int = 1, nbytes: int = 0, flops: int = 0,
            group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
    """Time `ways` against one another; each returns a tensor (or a tuple) to hold against `truth`. Rows, ours first.

    inner: calls in a row for one timing, for work shorter than a clock can tell. With a group, only rank 0 writes."""
    tune_malloc()
    errors = {name: error(fn(), truth) for name, fn in ways.items()}
    for _ in range(warmup):
        for fn in ways.values():
            fn()
    names, times = list(ways), {name: [] for name in ways}  # type: ignore[var-annotated]
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            if group is not None:
                dist.barrier(group)
            start = time.perf_counter()
            for _ in range(inner):
                ways[name]()
            times[name].append((time.perf_counter() - start) / inner)
    if group is not None:                                             # a round costs what its slowest rank costs
        every = torch.tensor([times[n] for n in names], dtype=torch.float64)
        dist.all_reduce(every, dist.ReduceOp.MAX, group)
        times = dict(zip(names, every.tolist()))
        worst = torch.tensor([errors[n] for n in names], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group)
        errors = dict(zip(names, worst.tolist()))
    rows = []
    for name in names:
        q = statistics.quantiles(times[name], n=10)
        ratio = statistics.median(t / mine for t, mine in zip(times[name], times[names[0]]))
        rows.append({"op": op, "way": name, **case, "p20_us": q[1] * 1e6, "p50_us": q[4] * 1e6, "p80_us": q[7] * 1e6,
                     "n": rounds, "ratio": ratio, "error": errors[name],
                     "gbps": nbytes / q[4] / 1e9, "gflops": flops / q[4] / 1e9})
    if group is None or dist.get_rank(group) == 0:
        _write(op, rows, case)
    return rows


def _write(op: str, rows: list[dict[str, Any]], case: dict[str, Any]) -> None:
    folder = RESULTS / machine()
    folder.mkdir(parents=True, exist_ok=True)
    stamp = provenance()
    with (folder / f"{op}.jsonl").open("a") as f:
        for row in rows:
            f.write(json.dumps({**row, **stamp}) + "\n")
    print(f"{op}  " + "  ".join(f"{k}={v}" for k, v in case.items()))
    for r in rows:
        rate = "  ".join(f"{r[k]:8.1f} {u}" for k, u in (("gbps", "GB/s"), ("gflops", "GFLOP/s")) if r[k])
        print(f"    {r['way']:<24} {r['p50_us']:12.1f} us  [{r['p20_us']:.1f}, {r['p80_us']:.1f}]  "
              f"{r['ratio']:6.2f}x  error {r['error']:.1e}  {rate}", flush=True)


def _rank(rank: int, world: int, path: str, threads: int, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    tune_malloc()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    fn(rank, *args)
    dist.destroy_process_group()


def run_ranks(world: int, fn: Callable, *args: Any, threads: int = 1) -> None:
    """fn(rank, *args) on `world` fresh gloo ranks of `threads` threads each."""
    import tempfile

    import torch.multiprocessing as mp
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, f"{folder}/store", threads, fn, args), nprocs=world)
