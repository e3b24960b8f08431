"""What the choice of a path (choose.py) knows of the machine: measured where `interlace bench` has kept its roofs, else the defaults.

    here("cpu", world) -> Machine      of this process; ranks may differ, so a heap or a pad takes that of its rank 0 for all

From bench/results/<machine>/roofs.json, where it was taken on this processor or GPU, with all its cores, and nobody else at work:
    flops      the GEMM of a rank, by type      bandwidth  CPU: the best that a rank gets through between ranks; CUDA: the copy
    link       CUDA only: likewise between ranks
"""
import functools
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

__all__ = ["CPU", "HOPPER", "Machine", "here"]

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"   # beside us in a source tree; a wheel has none


@dataclass(frozen=True)
class Machine:
    """Of one rank. The defaults were measured on 2 Zen 4 cores, one thread a rank; gloo's over one host. HOPPER: flops and bandwidth
    as measured elsewhere for H200, the rest assumed."""
    flops: float = 100e9                                              # FLOP/s of a GEMM; of 32 bits
    bandwidth: float = 12e9                                           # bytes/s of a copy or a sum, read and written
    tick: float = 4e-6                                                # seconds of a meeting, Python included
    call: float = 120e-6                                              # of a torch.distributed collective
    link: float = 1.2e9                                               # bytes/s of a torch.distributed collective
    tax: float = 1.0                                                  # a GEMM inside an overlapped kernel against one outside
    half: float = 1.0                                                 # flops of 16 bits, in those of 32
    measured: bool = False                                            # on this machine

    def rate(self, itemsize: int) -> float:
        return self.flops * (self.half if itemsize == 2 else 1.0)


CPU = Machine()
HOPPER = Machine(flops=790e12, bandwidth=4.3e12, tick=4e-6, call=20e-6, link=380e9, tax=1.08)


def _processor(device: str) -> dict[str, Any]:
    """As provenance.py of bench/ names it."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), None)
    return {"cpu": model, "cores": os.cpu_count(), "gpu": None}


def _kept(device: str) -> dict[str, Any]:
    """The roofs of this machine, {} where there are none to rely on."""
    mine = _processor(device)
    for path in sorted(RESULTS.glob("*/roofs.json")):
        try:
            found = json.loads(path.read_text())
            hardware = found["provenance"]["hardware"]
            if not found["quick"] and not found["loaded"] and mine.items() <= hardware.items():
                return found
        except (OSError, ValueError, KeyError, AttributeError, TypeError):   # another version's, or half written
            continue
    return {}


@functools.cache
def here(device: str, world: int) -> Machine:
    """The constants of this machine for `world` ranks."""
    base, found = HOPPER if device == "cuda" else CPU, _kept(device)
    try:
        gemm = found["gemm"].get("0" if device == "cuda" else "1") or {}
        links = found.get("link", {}).get(str(world), {})
        link = 1e9 * max(links.values(), default=0.0)
        if device == "cuda":
            flops = 1e9 * gemm["bfloat16"]                            # what a product of 32 bits runs at no choice depends on
            copy = 1e9 * found["copy"]["0"][max(found["copy"]["0"], key=int)]
            return replace(base, flops=flops, bandwidth=copy, link=link or base.link, measured=True)
        return replace(base, flops=1e9 * gemm["float32"], half=gemm["bfloat16"] / gemm["float32"], bandwidth=link or base.bandwidth,
                       measured=True)
    except (KeyError, AttributeError, TypeError, ZeroDivisionError):
        return base
