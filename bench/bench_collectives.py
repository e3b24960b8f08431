"""Collectives over the heap against torch.distributed's (gloo, NCCL) and DeepSpeed's shared memory. `interlace bench collectives`

Every way works in place where it can: all-reduce into its own input, the others into a given output. n: elements of one rank.
DeepSpeed's all-reduce is the strongest peer on a CPU. It is compiled from the csrc of an installed deepspeed, with that
package's own flags; nothing of it is imported, so `pip install --no-deps deepspeed` is enough, and without it it is absent.
"""
import atexit
import functools
import glob
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.comm import all_gather, all_reduce, all_to_all, reduce_scatter
from ..kernels.comm.collectives import gather_into, scatter_into
from .cases import Case, Make, Way, Ways, grid
from .explain import path
from .peers.eager_comm import Collectives

TOKEN = "interlace_bench"                                             # of the names of its segments, with our parent's pid


def shapes(sweep: str) -> dict[str, dict[str, int]]:
    top = {"quick": 22, "cpu": 24}.get(sweep, 28)
    sizes = (12, 16, 20, 22) if sweep == "quick" else range(10, top + 1, 2)
    return {"odd": {"n": 3 * 5 * 1024}, **{f"2^{b}": {"n": 1 << b} for b in sizes}}


_every = grid(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), shapes, passes=("fwd",))


def cases(sweep: str, world: int) -> list[Case]:
    """n is cut to a multiple of the ranks."""
    return [Case(c.call, c.name, {"n": c.shape["n"] // world * world}, c.dtype, c.direction, world) for c in _every(sweep, world)
            if sweep != "quick" or c.dtype == "float32" or c.call == "all_reduce"]


@functools.cache
def build_deepspeed() -> tuple[Path, str]:
    """The library of DeepSpeed's shared-memory collectives and "", or why there is none. Kept: it takes a minute to compile."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None or not spec.submodule_search_locations:
        return Path(), "not installed (pip install --no-deps deepspeed)"
    base = Path(spec.submodule_search_locations[0])
    source = next((p for p in (base / "ops/csrc/cpu", base.parent / "csrc/cpu") if (p / "comm/shm.cpp").exists()), None)
    if source is None:
        return Path(), "installed without csrc/cpu/comm/shm.cpp"
    from torch.utils.cpp_extension import include_paths
    sources = [source / f"comm/{n}.cpp" for n in ("shm", "shm_interface")]
    stamp = hashlib.sha256(b"".join(p.read_bytes() for p in sources) + torch.__version__.encode()).hexdigest()[:16]
    out, lib = Path.home() / f".cache/interlace/ds_shm-{stamp}.so", Path(torch.__file__).parent / "lib"
    if out.exists():
        return out, ""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["c++", "-std=c++20", "-O2", "-fopenmp", "-fPIC", "-march=native", "-shared", "-w", "-DTORCH_EXTENSION_NAME=ds_shm",
         *(f"-isystem{p}" for p in (*include_paths(), sysconfig.get_paths()["include"])), f"-I{source}/includes",
         *map(str, sources), "-o", f"{out}.new", f"-L{lib}", f"-Wl,-rpath,{lib}",
         "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"], capture_output=True, text=True)
    if made.returncode:
        return Path(), f"does not compile: {made.stderr[:300]}"
    os.replace(f"{out}.new", out)
    return out, ""


def _remove(names: str) -> None:
    for segment in glob.glob(names):
        Path(segment).unlink(missing_ok=True)


@functools.cache
def _deepspeed(rank: int, world: int) -> Callable | str:
    """Its all-reduce, in place; or why there is none. Rank 0 compiles, the others wait for what it made."""
    library, why = build_deepspeed() if rank == 0 else (Path(), "")
    told: list = [(str(library), why)]
    dist.broadcast_object_list(told, 0)
    if told[0][1]:
        return told[0][1]
    names = f"/dev/shm/deepspeed_allreduce_buffer_*_{TOKEN}_{os.getppid()}_*"
    atexit.register(_remove, names)                                   # it leaves its segments behind
    os.environ.update(LOCAL_SIZE=str(world), MASTER_ADDR=TOKEN, MASTER_PORT=str(os.getppid()))
    spec = importlib.util.spec_from_file_location("ds_shm", told[0][0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.initialize(world, rank)
    return torch.ops.deepspeed.inference_all_reduce_


def _in_place(x: Tensor, fn: Callable[[Tensor], object]) -> Callable[[], Callable[[], Tensor]]:
    """Called again and again on one buffer: after the first, checked, call the data is zeros, which stay what they are."""
    def fresh() -> Callable[[], Tensor]:
        buffer, first = x.clone(), True

        def run() -> Tensor:
            nonlocal first
            fn(buffer)
            if not first:
                return buffer
            first, got = False, buffer.clone()
            buffer.zero_()
            return got
        return run
    return fresh


def ways(case: Case, make: Make) -> Ways:
    n, t, size, group = case.shape["n"], make.world, make.dtype.itemsize, make.group
    x, c, at = make.randn(n, grad=False), Collectives(group), case.call
    sent = {"all_reduce": 2 * n * (t - 1) // t, "all_gather": n * (t - 1)}.get(at, n * (t - 1) // t) * size   # bus bytes, as nccl-tests
    exact = [getattr(c, at)(x.double())]
    y = torch.empty_like(exact[0], dtype=make.dtype)
    cost = {"nbytes": ((n + (n * t if at == "all_gather" else n // t if at == "reduce_scatter" else n)) * size, 0), "link": (sent, 0),
            "path": path(at, group, make.device, (n,), make.dtype)}
    eager = {"all_gather": lambda: (gather_into(y, x, group), y)[1],
             "reduce_scatter": lambda: (scatter_into(y, x, group=group), y)[1],
             "all_to_all": lambda: (dist.all_to_all_single(y, x, group=group), y)[1]}
    mine = {"all_gather": lambda: all_gather(x, group, out=y), "reduce_scatter": lambda: reduce_scatter(x, group, out=y),
            "all_to_all": lambda: all_to_all(x, group, out=y)}
    way = lambda fn: Way(fn, truth=lambda got: exact)  # noqa: E731
    if at != "all_reduce":
        return Ways((), lambda: exact[0], way(mine[at]), {"torch eager": way(eager[at])}, **cost)  # type: ignore[arg-type]

    def in_place(fn: Callable[[Tensor], object]) -> Way:
        return Way(truth=lambda got: exact, fresh=_in_place(x, fn))

    deepspeed = "needs CPU tensors in float32 or bfloat16" if make.device != "cpu" else _deepspeed(make.rank, t)
    return Ways((), lambda: exact[0], in_place(lambda b: all_reduce(b, group, out=b)), {
        "torch eager": in_place(lambda b: dist.all_reduce(b, group=group)),
        "deepspeed shm": deepspeed if isinstance(deepspeed, str) else in_place(deepspeed),
        "interlace, new output": way(lambda: all_reduce(x, group))}, **cost)  # type: ignore[arg-type]
