"""`interlace doctor [--json]`: what runs here, on what, and why not on more.

Everything is looked at, nothing is changed. Works without torch, Triton or a compiler: each missing thing is a line. A
problem is a requirement that does not hold (exit status 1); a note is what makes interlace slower or less repeatable than it
could be (0). Both name the command that cures them.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from .launch import bounded, environment

__all__ = ["examine", "main", "selftest"]

TORCH, TRITON, PYTHON = (2, 10), (3, 6), (3, 10)
LIMIT = 60.0                                                          # seconds of the self-test
SHM = Path("/dev/shm")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps .    # in the source tree"
WATCHED = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NCCL_", "TORCH_NCCL_",
           "OMP_", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_", "TRITON_", "INTERLACE_", "NVIDIA_TF32_OVERRIDE",
           "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_DISTRIBUTED_DEBUG", "PYTORCH_NO_CUDA_MEMORY_CACHING", "LD_PRELOAD")
HARM = {                                                              # name -> (values that harm; None: any), what it does
    "CUDA_DEVICE_MAX_CONNECTIONS": (("1",), "puts all streams into one queue: communication cannot overlap computation"),
    "CUDA_LAUNCH_BLOCKING": (("1",), "makes every launch wait: nothing overlaps"),
    "NCCL_P2P_DISABLE": (("1",), "sends between GPUs through host memory"),
    "NCCL_SHM_DISABLE": (("1",), "sends between processes through the network"),
    "NCCL_NVLS_ENABLE": (("0",), "switches NVLink multicast off"),
    "NCCL_BLOCKING_WAIT": (("1",), "makes the host wait for every collective: nothing overlaps"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "makes the host wait for every collective: nothing overlaps"),
    "NCCL_ALGO": (None, "fixes NCCL's algorithm: sums have another order than elsewhere"),
    "NCCL_PROTO": (None, "fixes NCCL's protocol"),
    "NVIDIA_TF32_OVERRIDE": (None, "changes what fp32 matrix products round to"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": (("1",), "rounds the inputs of fp32 matrix products to 10 bits"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "checks every collective with one more: slow"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": (None, "makes every allocation synchronise: nothing overlaps"),
    "TRITON_INTERPRET": (("1",), "interprets the Triton kernels on the CPU: for tests, 1000 times slower"),
    "INTERLACE_KERNELS": (("reference",), "runs every op as its reference: for comparison, slow"),
}


class _Report:
    """The findings so far, and what was found."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.problems: list[dict[str, str]] = []
        self.notes: list[dict[str, str]] = []

    def problem(self, what: str, cure: str) -> None:
        self.problems.append({"what": what, "cure": cure})

    def note(self, what: str, cure: str) -> None:
        self.notes.append({"what": what, "cure": cure})


def main(as_json: bool = False) -> int:
    """Print the report; 1 when a requirement is broken."""
    with contextlib.redirect_stdout(sys.stderr):                      # what a library prints when imported is not the report
        report = examine()
    ok = not report["problems"]
    print(json.dumps(report, indent=1) if as_json else _text(report))
    return 0 if ok else 1


def examine() -> dict[str, Any]:
    """All there is to know, as JSON can hold it: "ok", "problems" and "notes" (each {"what", "cure"}), and the facts."""
    r = _Report()
    modules = _versions(r)
    torch, dispatch, heard = modules.get("torch"), None, []
    folder = _kernels_folder()
    if torch is not None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                dispatch = importlib.import_module(".kernels.dispatch", __package__)
                importlib.import_module(".kernels", __package__)
            except Exception as e:
                r.problem(f"interlace.kernels must import, got {type(e).__name__}: {e}", REBUILD)
        heard = [str(w.message) for w in caught if "interlace" in str(w.message)]
    _tiers(r, folder, dispatch, heard)
    r.found["ops"] = _ops(torch, dispatch) if dispatch else {}
    _triton(r, modules, dispatch)
    _gpus(r, torch)
    _shm(r)
    _limits(r)
    _cores(r, torch)
    _environment(r)
    _selftest(r, dispatch)
    return {"ok": not r.problems, "problems": r.problems, "notes": r.notes, **r.found}


# ---- versions and tiers ---------------------------------------------------------------------------------------


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])


def _versions(r: _Report) -> dict[str, Any]:
    """The modules that import, by name; their versions go into the report."""
    from . import __version__
    found: dict[str, Any] = {"interlace": __version__, "commit": _commit(), "python": platform.python_version(),
                             "platform": platform.platform()}
    modules = {}
    for name in ("numpy", "torch", "triton"):
        try:
            modules[name] = importlib.import_module(name)
            found[name] = str(getattr(modules[name], "__version__", "?"))
        except ImportError as e:
            found[name] = None
            broken = "" if isinstance(e, ModuleNotFoundError) else f" (it is there, and fails: {e})"
            if name == "torch":
                r.problem(f"interlace needs torch >= {TORCH[0]}.{TORCH[1]}, found none{broken}",
                          "pip install torch --index-url https://download.pytorch.org/whl/cpu    # CPU; for CUDA: pip install torch")
            elif name == "numpy":
                r.problem(f"interlace needs numpy, found none{broken}", "pip install numpy")
            elif sys.platform == "linux":
                r.note(f"Triton is not installed{broken}: no kernels on CUDA, nor interpreted", "pip install 'triton>=3.6'")
        except Exception as e:                                        # a library that does not load says so in many ways
            found[name] = None
            r.problem(f"{name} must import, got {type(e).__name__}: {e}", f"pip install --force-reinstall {name}")
    if sys.version_info < PYTHON:
        r.problem(f"interlace needs Python >= 3.10, found {found['python']}", "python3.11 -m venv .venv")
    for name, least in (("torch", TORCH), ("triton", TRITON)):
        if found[name] and _numbers(found[name]) < least:
            r.problem(f"interlace needs {name} >= {least[0]}.{least[1]}, found {found[name]}", f"pip install -U {name}")
    r.found["versions"] = found
    return modules


def _commit() -> str | None:
    """Of the source tree this runs from; None when it was installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    git = lambda *a: subprocess.run(["git", "-C", str(root), *a], capture_output=True, text=True).stdout.strip()  # noqa: E731
    return (git("rev-parse", "--short", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")) or None


def _kernels_folder() -> Path:
    """Where the built libraries lie; the package is found, not imported: that would need torch."""
    spec = importlib.util.find_spec("interlace.kernels")
    return Path(spec.origin).parent if spec and spec.origin else Path(__file__).parent / "kernels"


def _tiers(r: _Report, folder: Path, dispatch: Any, heard: list[str]) -> None:
    """Pure Python, the shared-memory runtime, the C++ and the CUDA ops: built, loaded, why not."""
    try:
        built = json.loads((folder / "_build.json").read_text())
    except (OSError, ValueError):
        built = {}
    tiers: dict[str, Any] = {"python": {"built": True, "loads": True, "why": "always there"}}
    for tier, names in (("runtime", "shared-memory collectives"), ("cpu", "C++ ops"), ("cuda", "CUDA ops")):
        path = folder / f"_{tier}.so"
        why = built.get(tier, {}).get("why", "not built")
        if not path.exists():
            why = "the library is gone" if why == "built" else why
            tiers[tier] = {"built": False, "loads": False, "why": why}
            if tier == "cuda" and not _cuda_torch():                  # nobody can want them here
                continue
            r.note(f"the {names} are not built: {why}", "apt-get install -y g++ && " + REBUILD if "compiler" in why else REBUILD)
            continue
        loads, reason = _loads(tier, path, dispatch, heard)
        if loads and (arches := built.get(tier, {}).get("arches")):
            reason += f", built for {' '.join(arches)}"
        tiers[tier] = {"built": True, "loads": loads, "why": reason}
        if loads is False:
            r.note(f"the {names} are built and not used: {reason}", REBUILD)
    r.found["tiers"] = tiers


def _loads(tier: str, path: Path, dispatch: Any, heard: list[str]) -> tuple[bool | None, str]:
    """(whether the library loads, None: nobody asked it to; why)"""
    if tier == "runtime":
        try:
            ctypes.CDLL(str(path))
        except OSError as e:
            return False, str(e)
        return True, "loads"
    if dispatch is None:
        return None, "needs torch"
    if dispatch.CPP if tier == "cpu" else dispatch.CUDA:
        return True, "loads"
    if tier == "cuda" and not _cuda_torch():
        return None, "torch is a CPU build"
    asked = environment(("TRITON_INTERPRET", "INTERLACE_KERNELS"))
    if not heard and asked:
        return None, "switched off by " + ", ".join(f"{k}={v}" for k, v in asked.items())
    return False, "; ".join(heard) or "it does not load"


def _cuda_torch() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and getattr(torch.version, "cuda", None) is not None


def _ops(torch: Any, dispatch: Any) -> dict[str, dict[str, str]]:
    """op -> what runs it on CPU, on CUDA, and on CPU under TRITON_INTERPRET=1."""
    from .kernels.comm.heap import LIB, WHY_NOT  # before the list: the communication ops are declared there
    names = sorted(n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("interlace::"))
    has = lambda op, key: torch._C._dispatch_has_kernel_for_dispatch_key(f"interlace::{op}", key)  # noqa: E731
    triton = hasattr(dispatch.triton, "__version__")
    plain = environment(("INTERLACE_KERNELS",)).get("INTERLACE_KERNELS") == "reference"
    shared = "shared memory" if LIB is not None else f"torch.distributed ({WHY_NOT})"
    table = {}
    for op in names:
        if has(op, "CompositeExplicitAutograd"):                      # communicates: every call asks kernels/comm/choose.py for its path
            kernel = triton and op != "all_to_all"
            table[op] = {"cpu": shared, "cuda": "triton or torch.distributed" if kernel else "torch.distributed",
                         "interpreter": "triton" if kernel else shared}
            continue
        cpu = "reference" if plain or not has(op, "CPU") else "triton, interpreted" if dispatch.INTERPRET else "C++"
        table[op] = {"cpu": cpu, "cuda": "triton" if triton and has(op, "CUDA") and not plain else "reference",
                     "interpreter": "triton" if triton else "none"}
        if op in dispatch.CUDA_ONLY:
            table[op] = {"cpu": "none", "cuda": "CUDA C++" if dispatch.CUDA else "none: not built", "interpreter": "none"}
    return table


def _triton(r: _Report, modules: dict[str, Any], dispatch: Any) -> None:
    if "triton" not in modules:
        r.found["triton_mode"] = "absent"
        return
    interpreted = bool(dispatch and dispatch.INTERPRET)
    r.found["triton_mode"] = "interpreted" if interpreted else "compiled"
    triton, numpy = modules["triton"].__version__, r.found["versions"]["numpy"]
    if numpy and _numbers(numpy) >= (2, 4) and _numbers(triton) < (3, 7):
        what = f"Triton {triton} cannot interpret with numpy {numpy}: TRITON_INTERPRET=1 needs Triton >= 3.7 or numpy < 2.4"
        (r.problem if interpreted else r.note)(what, "pip install -U triton    # or pip install 'numpy<2.4'")


# ---- the machine ----------------------------------------------------------------------------------------------


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None


def _gpus(r: _Report, torch: Any) -> None:
    """Names, who can read whose memory, NVLink, multicast."""
    smi = _run("nvidia-smi", "-L")
    listed = [ln for ln in (smi or "").splitlines() if ln.startswith("GPU ")]
    gpu: dict[str, Any] = {"listed": listed, "devices": [], "p2p": [], "topology": None}
    r.found["gpu"] = gpu
    if torch is None or not torch.cuda.is_available():
        if listed and torch is not None:
            hidden = "nvidia-smi    # driver too old, or CUDA_VISIBLE_DEVICES hides them"
            cure = "pip install torch" if torch.version.cuda is None else hidden
            r.note(f"there are {len(listed)} GPUs, and torch {torch.__version__} cannot use them", cure)
        return
    n = torch.cuda.device_count()
    for i in range(n):
        p = torch.cuda.get_device_properties(i)
        gpu["devices"].append({"name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory": p.total_memory, "sms": p.multi_processor_count,
                               "multicast": _multicast(torch, i)})
    gpu["p2p"] = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(n)] for i in range(n)]
    gpu["topology"] = _run("nvidia-smi", "topo", "-m") if n > 1 else None
    nvlink = _run("nvidia-smi", "nvlink", "--status") or ""
    gpu["nvlink_links"] = len(re.findall(r"Link \d+: [\d.]+ GB/s", nvlink))
    blind = [f"{i}-{j}" for i in range(n) for j in range(i) if not gpu["p2p"][i][j]]
    if blind:
        r.note(f"GPUs {', '.join(blind)} cannot read each other's memory: fused communication needs that", "nvidia-smi topo -m")


def _multicast(torch: Any, device: int) -> bool | None:
    try:
        from torch._C._autograd import DeviceType
        return bool(torch._C._distributed_c10d._SymmetricMemory.has_multicast_support(DeviceType.CUDA, device))
    except Exception:                                                 # private names: gone in another version
        return None


def _shm(r: _Report, folder: Path = SHM) -> None:
    try:
        s = os.statvfs(folder)
    except OSError:
        r.found["shm"] = None
        if sys.platform == "linux":
            r.note(f"{folder} is not there: collectives go through torch.distributed", f"mount -t tmpfs -o size=1g tmpfs {folder}")
        return
    stale = []
    with contextlib.suppress(OSError):
        for p in sorted(folder.glob("interlace-*")):
            with contextlib.suppress(OSError):                        # gone meanwhile
                if time.time() - p.stat().st_mtime > 60:              # a name lives only while the ranks map it
                    stale.append(str(p))
    r.found["shm"] = {"folder": str(folder), "size": s.f_blocks * s.f_frsize, "free": s.f_bavail * s.f_frsize, "stale": stale}
    if stale:
        r.note(f"{len(stale)} segments of ranks that were killed lie in {folder}", "rm " + " ".join(map(shlex.quote, stale)))
    if s.f_bavail * s.f_frsize < 64 << 20:
        r.note(f"{folder} has {s.f_bavail * s.f_frsize >> 20} MB free; 2 ranks take 8 MB a group, 64 MB is safe",
               f"mount -o remount,size=1g {folder}    # in docker: --shm-size=1g")


def _limits(r: _Report) -> None:
    try:
        import resource
    except ImportError:
        return
    word = lambda n: "unlimited" if n == resource.RLIM_INFINITY else n                        # noqa: E731
    r.found["limits"] = {n: [word(v) for v in resource.getrlimit(k)]
                         for n, k in (("memlock", resource.RLIMIT_MEMLOCK), ("nofile", resource.RLIMIT_NOFILE))}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1024:
        r.note(f"this shell may open {soft} files at once; ranks and data want 1024",
               f"ulimit -n {min(4096, hard) if hard != resource.RLIM_INFINITY else 4096}")
    if r.found["gpu"]["devices"] and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        r.note("locked memory is limited: pinned buffers and RDMA may fail", "ulimit -l unlimited    # in docker: --ulimit memlock=-1")


def _cores(r: _Report, torch: Any) -> None:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        allowed = None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = torch.get_num_threads() if torch is not None else None
    r.found["cores"] = {"machine": os.cpu_count(), "affinity": mine, "quota": allowed, "threads": threads, "load": load}
    if threads and threads > mine:
        r.note(f"torch runs {threads} threads on {mine} cores: they wait for each other", f"export OMP_NUM_THREADS={mine}")
    if allowed and allowed < mine:
        r.note(f"this container may use {allowed:g} of the {mine} cores it sees", f"export OMP_NUM_THREADS={max(1, int(allowed))}")
    if load > 1.5 * mine:
        r.note(f"the load is {load:.1f} on {mine} cores: do not measure now", "uptime")


def _environment(r: _Report) -> None:
    r.found["environment"] = seen = environment(WATCHED)
    for name, (values, does) in HARM.items():
        if name in seen and (values is None or seen[name].upper() in [v.upper() for v in values]):
            r.note(f"{name}={seen[name]} {does}", f"unset {name}")


# ---- two ranks ------------------------------------------------------------------------------------------------


def selftest() -> int:
    """On every rank: the sum over the heap is the sum, bit for bit. Raises RunError where it is not; rank 0 says how it went."""
    import torch
    import torch.distributed as dist

    from .kernels.comm import all_reduce, heap_of
    from .parallel.errors import RunError
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    heap = heap_of(group)                                             # type: ignore[arg-type]
    for dtype in (torch.float32, torch.bfloat16):
        parts = torch.arange(1, world + 1, dtype=torch.float64)[:, None] * (torch.arange(4097) % 13)
        got = all_reduce(parts[rank].to(dtype), group)                # small whole numbers: every dtype holds the sum
        if not torch.equal(got.double(), parts.sum(0)):
            raise RunError(f"all_reduce over {world} ranks must be the sum, got another {dtype} result on rank {rank}")
    if rank == 0:
        print("through shared memory" if heap is not None else "through torch.distributed")
    return 0


def _selftest(r: _Report, dispatch: Any, target: str = "interlace.doctor:selftest") -> None:
    if dispatch is None:
        r.found["selftest"] = {"ok": None, "said": "needs torch"}
        return
    begin = time.monotonic()
    status, said = bounded(2, target, {}, LIMIT)
    said = said.strip()[-2000:]
    r.found["selftest"] = {"ok": status == 0, "status": status, "seconds": round(time.monotonic() - begin, 1), "said": said}
    if status != 0:
        how = f"within {LIMIT:g} s" if status is None else f"got status {status}"
        r.problem(f"two ranks must sum a tensor, {how}: {said or 'they said nothing'}", "interlace verify tp=2    # shows where; "
                  "INTERLACE_KERNELS=reference interlace doctor tells whether the C++ ops do it")


# ---- text -----------------------------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> str:
    versions, gpu, shm, cores = report["versions"], report["gpu"], report["shm"], report["cores"]
    lines = ["versions    " + "  ".join(f"{k} {v or 'none'}" for k, v in versions.items() if k != "platform")]
    lines.append(f"            {versions['platform']}")
    words = {True: "loads", False: "does not load", None: "not loaded"}
    for name, t in report["tiers"].items():
        state = words[t["loads"]] if t["built"] else "not built"
        lines.append(f"tier        {name:<8} {state}{'' if t['why'] in (state, '') else ': ' + t['why']}")
    for op, row in report["ops"].items():
        lines.append(f"op          {op:<22} cpu: {row['cpu']:<20} cuda: {row['cuda']:<27} interpreter: {row['interpreter']}")
    lines.append(f"triton      {report['triton_mode']}")
    for i, d in enumerate(gpu["devices"]):
        lines.append(f"gpu {i}       {d['name']} {d['arch']} {d['memory'] >> 30} GB, {d['sms']} SMs, multicast {d['multicast']}, "
                     f"p2p {''.join('x' if ok else '.' for ok in gpu['p2p'][i])}")
    if not gpu["devices"]:
        lines.append(f"gpu         none that torch can use, {len(gpu['listed'])} listed by nvidia-smi")
    elif gpu["topology"]:
        lines += ["            " + ln for ln in gpu["topology"].splitlines()]
    if shm:
        lines.append(f"shm         {shm['folder']} {shm['size'] >> 20} MB, {shm['free'] >> 20} MB free, {len(shm['stale'])} stale segments")
    for name, (soft, hard) in report.get("limits", {}).items():
        lines.append(f"limit       {name} {soft} (hard {hard})")
    lines.append("cores       " + "  ".join(f"{k} {v}" for k, v in cores.items() if v is not None))
    lines += [f"env         {k}={v}" for k, v in report["environment"].items()]
    test = report["selftest"]
    state = "not run" if test["ok"] is None else ("ok" if test["ok"] else "FAILED") + f" in {test['seconds']} s"
    lines.append(f"2 ranks     {state}: {(test['said'].splitlines() or [''])[-1]}")
    for kind in ("notes", "problems"):
        for f in report[kind]:
            lines += [f"{kind[:-1].upper()}: {f['what']}", f"    {f['cure']}"]
    lines.append("fine" if report["ok"] else f"{len(report['problems'])} broken requirements")
    return "\n".join(lines)
