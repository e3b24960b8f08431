"""Collectives over the heap against gloo and DeepSpeed's shared memory. `python -m interlace.bench.bench_collectives [ranks]`

Every way works in place where it can: all-reduce into its own input, the others into a given output. One thread a rank.
DeepSpeed's all-reduce is the strongest peer on a CPU. It is compiled from the csrc of an installed deepspeed, with that
package's own flags; nothing of it is imported, so `pip install --no-deps deepspeed` is enough, and without it it is absent.
"""
import glob
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist

from ..kernels.comm import all_gather, all_reduce, heap_of, reduce_scatter
from .harness import compare, run_ranks

SIZES = [4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
TOKEN = "interlace_bench"                                             # of the names of its segments, with our pid


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


def _deepspeed(path: str, rank: int, world: int):
    os.environ.update(LOCAL_SIZE=str(world), MASTER_ADDR=TOKEN, MASTER_PORT=str(os.getppid()))
    spec = importlib.util.spec_from_file_location("ds_shm", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.initialize(world, rank)
    return torch.ops.deepspeed.inference_all_reduce_


def _ranks(rank: int, world: int, library: str) -> None:
    group = dist.group.WORLD
    assert group is not None and heap_of(group) is not None, "no heap here"
    deepspeed = _deepspeed(library, rank, world) if library else None
    for nbytes in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            n = nbytes // dtype.itemsize
            each = [torch.randn(n, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(world)]
            case = {"ranks": world, "bytes": nbytes, "dtype": str(dtype)[6:]}
            inner = max(1, min(20, (2 << 20) // nbytes))
            rounds = 30 if nbytes <= 16 << 20 else 12
            _all_reduce(each, rank, case, inner, rounds, group, deepspeed)
            if 64 << 10 <= nbytes <= 16 << 20:
                _others(each, rank, case, inner, rounds, group)


def _all_reduce(each, rank, case, inner, rounds, group, deepspeed) -> None:
    """In place, and called again and again: after the first, checked, call the data is zeros, which stay what they are."""
    truth, world = torch.stack([x.double() for x in each]).sum(0), case["ranks"]
    buffers: dict[str, torch.Tensor] = {}

    def in_place(name, fn):
        def go():
            if name in buffers:
                fn(buffers[name])
                return buffers[name]
            buffers[name] = each[rank].clone()
            fn(buffers[name])
            got = buffers[name].clone()
            buffers[name].zero_()
            return got
        return go

    ways = {"interlace": in_place("interlace", lambda x: all_reduce(x, group, out=x)),
            "gloo": in_place("gloo", lambda x: dist.all_reduce(x, group=group))}
    if deepspeed is not None:
        ways["deepspeed shm"] = in_place("deepspeed shm", deepspeed)
    ways["interlace, new output"] = lambda: all_reduce(each[rank], group)
    moved = 2 * case["bytes"] * (world - 1) // world                  # what a rank must send, as in nccl-tests' bus bandwidth
    compare("collectives", ways, truth=truth, case={"collective": "all_reduce", **case}, rounds=rounds, inner=inner, nbytes=moved,
            group=group)


def _others(each, rank, case, inner, rounds, group) -> None:
    world, x = case["ranks"], each[rank]
    y, z, n = torch.empty(x.numel() * world, dtype=x.dtype), x.new_empty(x.numel() // world), x.numel() // world
    compare("collectives", {"interlace": lambda: all_gather(x, group, out=y),
                            "gloo": lambda: (dist.all_gather_into_tensor(y, x, group), y)[1]},
            truth=torch.cat(each).double(), case={"collective": "all_gather", **case}, rounds=rounds, inner=inner,
            nbytes=case["bytes"] * (world - 1), group=group)
    compare("collectives", {"interlace": lambda: reduce_scatter(x, group, out=z),
                            "gloo": lambda: (dist.reduce_scatter_tensor(z, x, group=group), z)[1]},
            truth=torch.stack([e.double() for e in each]).sum(0)[n * rank:n * (rank + 1)],
            case={"collective": "reduce_scatter", **case}, rounds=rounds, inner=inner,
            nbytes=case["bytes"] * (world - 1) // world, group=group)


def main() -> None:
    library, why = build_deepspeed()
    print(f"DeepSpeed's shared-memory all-reduce: {f'absent: {why}' if why else 'compiled from its source'}", flush=True)
    for world in [int(a) for a in sys.argv[1:]] or [2]:
        try:
            run_ranks(world, _ranks, world, "" if why else str(library))
        finally:                                                      # DeepSpeed leaves its segments behind
            for path in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{TOKEN}_{os.getpid()}_*"):
                os.unlink(path)


if __name__ == "__main__":
    main()
