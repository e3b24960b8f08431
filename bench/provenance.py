"""Where, on what and how a row was measured, and whether somebody else was using the machine meanwhile."""
import datetime
import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..kernels.dispatch import ONEDNN_ISA, tune_malloc

__all__ = ["Neighbours", "busy", "machine", "provenance"]

PEERS = ("liger-kernel", "transformer-engine", "deepspeed", "megatron-core", "triton-kernels", "quack-kernels", "flash-attn")
# Rows are written into the tree they are measured from: those alone do not make it another one.
STATUS = ("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)bench/results")
SHOWN = ("OMP_", "MKL_", "KMP_", "TRITON_", "NCCL_", "GLOO_", "CUDA_", "TORCH_", "INTERLACE_", "ONEDNN_", "DNNL_", "ATEN_")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


@functools.cache
def machine() -> str:
    """A folder name for this machine: GPU or CPU model, core count, and what oneDNN is held to: then it multiplies as another CPU does."""
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()} x{torch.cuda.device_count()}"
    else:
        lines = _read("/proc/cpuinfo").splitlines()
        name = next((ln.split(":")[1] for ln in lines if ln.startswith("model name")), platform.processor() or "cpu")
        name = f"{name} {os.cpu_count()}c {'avx512' if any('avx512f' in ln for ln in lines) else 'avx2'}"
        name += f" onednn {ONEDNN_ISA}" if ONEDNN_ISA else ""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()).lower()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def clocks() -> dict[str, Any]:
    """MHz now, where they can be read."""
    mhz = [float(ln.split(":")[1]) for ln in _read("/proc/cpuinfo").splitlines() if ln.startswith("cpu MHz")]
    out: dict[str, Any] = {"cpu_mhz": round(sum(mhz) / len(mhz)) if mhz else None,
                           "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None}
    if torch.cuda.is_available():
        try:
            query = "clocks.sm,clocks.mem,power.limit,temperature.gpu,driver_version"
            text = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True, text=True,
                                  timeout=20).stdout
            out["gpu"] = dict(zip(query.split(","), text.splitlines()[0].split(", ")))
        except (OSError, IndexError, subprocess.TimeoutExpired):
            out["gpu"] = None
    return out


def provenance(seed: int = 0) -> dict[str, Any]:
    """One for a run; costs a few processes, so not for every row."""
    cuda = torch.cuda.is_available()
    lines = _read("/proc/cpuinfo").splitlines()
    cpu = next((ln.split(":")[1].strip() for ln in lines if ln.startswith("model name")), platform.processor())
    commit = _git("rev-parse", "--short=12", "HEAD")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "gpu": torch.cuda.get_device_name() if cuda else None,
                     "gpus": torch.cuda.device_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl,
                     "triton": _version("triton"), "interlace": _version("interlace"), "numpy": _version("numpy"),
                     **{p: v for p in PEERS if (v := _version(p))}},
        "commit": commit or None, "dirty": bool(_git(*STATUS)) if commit else None,
        "clocks": clocks(), "load": round(os.getloadavg()[0], 2), "seed": seed, "threads": torch.get_num_threads(),
        "command": shlex.join([*_program(), *sys.argv[1:]]), "malloc_tuned": tune_malloc(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SHOWN)},
    }


def busy() -> float:
    """Seconds of work that all cores of this machine have done; 0 where the kernel does not tell."""
    head = _read("/proc/stat").split("\n", 1)[0].split()
    if len(head) < 9:
        return 0.0
    user, nice, system, _, _, irq, soft, steal = map(int, head[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """The cores that other processes kept busy between its making and `cores()`: a row they spoilt says so."""
    LIMIT = 0.25

    def __init__(self) -> None:
        self.wall, self.all, self.own = time.perf_counter(), busy(), time.process_time()

    def cores(self, ours: float | None = None) -> float:
        """ours: seconds of work of all our processes; this one's when None."""
        wall = time.perf_counter() - self.wall
        ours = self.spent() if ours is None else ours
        return max(0.0, (busy() - self.all - ours) / wall) if wall > 0.2 else 0.0

    def spent(self) -> float:
        return time.process_time() - self.own


def _program() -> list[str]:
    """What was typed before the arguments: bench/readme.py is a program of its own."""
    return ["python", "-m", "interlace.bench.readme"] if Path(sys.argv[0]).name == "readme.py" else ["interlace"]
