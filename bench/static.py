"""`interlace bench --static`: what the compiler makes of every kernel, without a GPU.

    main(out=None, arches=("sm_80", "sm_90", "sm_100")) -> exit status

Each launch of bench/static_cases.py is recorded on tensors without data, specialised as Triton would (16-byte aligned pointers,
sizes divisible by 16, sizes of 1), compiled in bf16 and fp32 for each arch, and read:
    regs, spill    ptxas -v: registers a thread; bytes a thread spills (stores + loads)
    smem, occ      shared memory of a program; resident warps / most warps of an SM
    mma            tensor-core instructions in the PTX (mma.sync, wgmma, tcgen05)
    16B, wide      global accesses of 16 bytes or more in the PTX of all but scalars; bytes that go through them / all bytes
    sass           the same count, with scalars, in the machine code, where cuobjdump is found
    bytes / floor  every tensor the launch is given, once / what the kernel's docstring says must move
    us             max(bytes / bandwidth, flops / rate) at the roof. A bound from a datasheet, not a measurement.
csrc/cuda/*.cu are compiled by nvcc for the same arches where there are both. What was compiled is kept in build/static
(or ~/.cache/interlace/static, when installed), by a hash of kernel, specialisation, compiler and this file.
"""
from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ..parallel.errors import RunError, UserError

__all__ = ["ARCHES", "ROOFS", "Roof", "compare", "compiled_rows", "defined_kernels", "main"]

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "static_golden.json"
ACCEPT = "if this is meant, accept it with `interlace bench --static --accept`"


@dataclass(frozen=True)
class Roof:
    """The limits of one GPU. kind: "datasheet", or "measured" when a caller passes its own."""
    gpu: str
    bandwidth: float                                                  # bytes / s
    bf16: float                                                       # dense tensor-core flop / s
    fp32: float                                                       # flop / s outside the tensor cores
    sms: int
    smem: int                                                         # bytes of an SM that programs can have
    source: str
    kind: str = "datasheet"


ROOFS = {
    "sm_80": Roof("A100 SXM 80GB", 2.039e12, 312e12, 19.5e12, 108, 164 << 10, "NVIDIA A100 datasheet, 2021"),
    "sm_90": Roof("H200 SXM", 4.8e12, 989e12, 67e12, 132, 228 << 10, "NVIDIA H200 datasheet, 2024"),
    "sm_100": Roof("B200", 8.0e12, 2250e12, 75e12, 148, 228 << 10, "NVIDIA DGX B200 datasheet, 2024, per GPU, dense"),
}
ARCHES = tuple(ROOFS)
# CUDA C++ programming guide, "technical specifications per compute capability": the same for 8.0, 9.0 and 10.0
_WARPS, _BLOCKS, _REGS, _SMEM_RESERVED = 64, 32, 65536, 1024


# ---- which kernels there are ----------------------------------------------------------------------------------


def defined_kernels(folder: Path = ROOT / "kernels") -> set[str]:
    """ "<module>.<function>" of every @triton.jit function under `folder` that no other one calls (those are its helpers)."""
    found, called = set(), set()
    for path in sorted(folder.rglob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(_is_jit(d) for d in node.decorator_list):
                found.add(f"{module}.{node.name}")
                called |= {_last(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)} - {node.name}
    return {name for name in found if name.rsplit(".", 1)[1] not in called}


def _is_jit(decorator: ast.expr) -> bool:
    return _last(decorator.func if isinstance(decorator, ast.Call) else decorator) == "jit"


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


# ---- what a launch compiles -----------------------------------------------------------------------------------


@dataclass
class _Launch:
    """One recorded `kernel[grid](...)`, specialised."""
    kernel: Any
    programs: int
    bytes: int
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        module = self.kernel.fn.__module__.split(".kernels.", 1)[-1]
        return f"{module}.{self.kernel.fn.__name__}"


def _specialise(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Launch:
    """As triton.runtime.jit does it: None and 1 are constants, 16 divides or not, ints are 32 bits where they fit."""
    from torch import Tensor
    given = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names and k not in ("warmup", "stream")}
    signature, constexprs, attrs, tensors = {}, {}, {}, {}
    for i, p in enumerate(kernel.params):
        v = given.get(p.name, p.default)
        if isinstance(v, Tensor):
            tensors[id(v)] = v.numel() * v.element_size()
            signature[p.name] = "*" + _type_name(v.dtype)
            aligned = v.storage_offset() * v.element_size() % 16 == 0
        elif p.is_constexpr or v is None or (type(v) is int and v == 1 and not p.do_not_specialize):
            signature[p.name], constexprs[p.name] = "constexpr", v
            continue
        else:
            signature[p.name] = "u1" if isinstance(v, bool) else "fp32" if isinstance(v, float) else (
                "i32" if -2**31 <= v < 2**31 else "i64")
            aligned = type(v) is int and v % 16 == 0
        if aligned and not p.do_not_specialize and not p.do_not_specialize_on_alignment:
            attrs[(i,)] = [["tt.divisibility", 16]]
    grid = grid(given | options) if callable(grid) else grid
    programs = 1
    for n in grid if isinstance(grid, tuple) else (grid,):
        programs *= n
    return _Launch(kernel, programs, sum(tensors.values()), signature, constexprs, attrs, options)


def _type_name(dtype: Any) -> str:
    from triton.runtime.jit import type_canonicalisation_dict
    return type_canonicalisation_dict[str(dtype).split(".")[-1]]


def _record(launch: Callable[[Any], object], dtype: Any, sms: int) -> list[_Launch]:
    """The kernels that `launch(dtype)` starts, on meta tensors that say they are on CUDA; no kernel runs."""
    import torch
    from triton.runtime.jit import JITFunction
    seen: list[_Launch] = []

    def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        seen.append(_specialise(self, grid, args, kwargs))

    gpu = SimpleNamespace(multi_processor_count=sms)
    with mock.patch.object(JITFunction, "run", run), mock.patch.object(torch.Tensor, "is_cuda", True, create=True), \
            mock.patch.object(torch.cuda, "get_device_properties", lambda *_: gpu):
        launch(dtype)
    return seen


# ---- compiling ------------------------------------------------------------------------------------------------


def _compile(launch: _Launch, arch: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    cc = int(arch.removeprefix("sm_"))
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                               # 3.9 announces 3.10's default of fp fusion
        made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=launch.options)
    flags = [] if getattr(made.metadata, "enable_fp_fusion", True) else ["--fmad=false"]
    regs, spill = _ptxas(get_ptxas(cc).path, made.asm["ptx"], flags)
    return {"regs": regs, "spill": spill, "smem": made.metadata.shared, "warps": made.metadata.num_warps * made.metadata.num_ctas,
            **read_ptx(made.asm["ptx"], scalars(made.asm["ttgir"])), "sass": _sass(made.asm["cubin"])}


def _ptxas(ptxas: str, ptx: str, flags: list[str]) -> tuple[int, int]:
    """(registers a thread, bytes spilled a thread)"""
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    with tempfile.TemporaryDirectory(prefix="interlace-") as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run([ptxas, "-v", "-lineinfo", *flags, f"--gpu-name={target[1]}", str(path), "-o", f"{path}.cubin"],
                              capture_output=True, text=True)
    return _usage(done.stdout + done.stderr, f"{ptxas} on Triton's PTX")


def _usage(log: str, who: str) -> tuple[int, int]:
    regs = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spill = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)]
    if not regs:
        raise RunError(f"{who} must report registers, got: {log.strip()[-500:] or 'nothing'}; is it a working ptxas?")
    return max(regs), max(spill, default=0)


_ACCESS = re.compile(r"\b(?:ld|st)\.(?:[a-z_0-9:]+\.)*?global\.(?:[a-zA-Z_0-9:]+\.)*?(?:v(\d)\.)?[bufs](\d+)\b")
_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)")


def scalars(ttgir: str) -> list[int]:
    """The bytes of every load and store of one value (a row's statistic, a target): they cannot be wide."""
    types = re.findall(r"\btt\.(?:load|store) [^\n]*?: !tt\.ptr<\w*?(\d+)>", ttgir)
    return [max(int(bits), 8) // 8 for bits in types]


def read_ptx(ptx: str, alone: Sequence[int] = ()) -> dict[str, Any]:
    """Tensor-core instructions, and global accesses by width in bytes, `alone` (the scalars) apart. TMA copies count as 16."""
    widths: dict[int, int] = {}
    sizes = [int(v or 1) * int(bits) // 8 for v, bits in _ACCESS.findall(ptx)]
    sizes += [int(n, 0) for n in _ASYNC.findall(ptx)] + [16] * len(re.findall(r"\bcp\.async\.bulk\.", ptx))
    for size in sizes:
        widths[size] = widths.get(size, 0) + 1
    for size in alone:
        if widths.get(size):
            widths[size] -= 1
    widths = {k: n for k, n in widths.items() if n}
    moved = sum(size * n for size, n in widths.items())
    return {"mma": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
            "accesses": {str(k): widths[k] for k in sorted(widths, reverse=True)}, "scalars": len(alone),
            "wide": round(sum(k * n for k, n in widths.items() if k >= 16) / moved, 4) if moved else 1.0}


def _sass(cubin: bytes) -> dict[str, int] | None:
    """Global accesses by width in the machine code; None without cuobjdump."""
    from triton import knobs
    try:
        tool: str | None = knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError):
        tool = shutil.which("cuobjdump")
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True).stdout
    counts: dict[str, int] = {}
    for flags in re.findall(r"\b(?:LDG|STG|LDGSTS)\.E((?:\.\w+)*)", text):
        bits = re.search(r"\.(?:[US])?(8|16|64|128|256)\b", flags)
        width = str(int(bits[1]) // 8 if bits else 4)
        counts[width] = counts.get(width, 0) + 1
    return counts


def occupancy(regs: int, smem: int, warps: int, roof: Roof) -> float:
    """Resident warps over the SM's most: registers in units of 256 a warp, shared memory with the 1 KB the system takes."""
    per_warp = -(-max(regs, 1) * 32 // 256) * 256
    by_regs = _REGS // per_warp // 4 * 4 // warps if warps >= 4 else _REGS // per_warp // warps
    blocks = min(_BLOCKS, _WARPS // warps, by_regs, roof.smem // (smem + _SMEM_RESERVED))
    return round(blocks * warps / _WARPS, 4)


# ---- the report -----------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    return ROOT / "build" / "static" if (ROOT / "pyproject.toml").exists() else Path.home() / ".cache" / "interlace" / "static"


def _cached(key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    path = cache_folder() / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    value = make()
    with contextlib.suppress(OSError):                                # a read-only home: slow, not wrong
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{id(value)}")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    return value


def _needs_compiler() -> str:
    """Triton's version, or a UserError that says why there is no compiler."""
    from ..kernels.dispatch import INTERPRET, triton
    if not hasattr(triton, "__version__"):
        raise UserError("--static needs Triton, which is not installed; pip install triton (Linux)")
    if INTERPRET:
        raise UserError("--static compiles: TRITON_INTERPRET must not be 1; run env -u TRITON_INTERPRET interlace bench --static")
    return str(triton.__version__)


@dataclass(frozen=True)
class _Planned:
    """A launch to compile for one architecture, and its name in the cache."""
    case: Any
    launch: _Launch
    dtype: str
    itemsize: int
    arch: str
    key: str

    def made(self) -> dict[str, Any]:
        return _cached(self.key, lambda: _compile(self.launch, self.arch))


def _planned(arches: Sequence[str], roofs: dict[str, Roof]) -> Iterator[_Planned]:
    """Every launch of every case: recorded, not compiled."""
    version = _needs_compiler()
    import torch

    from .static_cases import CASES
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    for arch in arches:
        if arch not in roofs:
            raise UserError(f"arches must be among {', '.join(roofs)}, got {arch}; or pass its roof")
        for case in CASES:
            for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
                launches = _record(case.launch, dtype, roofs[arch].sms)
                missing = {x.kernel.fn.__name__ for x in launches} ^ set(case.floor)
                if missing:
                    raise RunError(f"static_cases.py: floors of {case.op} {case.name} must name the kernels it launches; "
                                   f"{', '.join(sorted(missing))} is in one of the two only; declare it")
                for launch in launches:
                    spec = (launch.kernel.cache_key, launch.signature, launch.constexprs, sorted(launch.attrs), launch.options)
                    key = hashlib.sha256(repr((spec, version, arch, own)).encode()).hexdigest()[:32]
                    yield _Planned(case, launch, short, dtype.itemsize, arch, key)


def _compile_from_the_end(share: int, of: int, arches: Sequence[str]) -> None:
    for planned in list(_planned(arches, ROOFS))[::-1][share::of]:
        planned.made()


@contextlib.contextmanager
def _helped(planned: Sequence[_Planned], arches: Sequence[str]) -> Iterator[None]:
    """On the other cores processes that fill the cache from its end, until the caller, who reads it from the front, has met them."""
    cold = sum(not (cache_folder() / f"{p.key}.json").exists() for p in planned)
    others = min(len(os.sched_getaffinity(0)) - 1, cold // 20)        # a process takes 5 s to begin, a kernel 1 s
    code = f"import sys; from {__name__} import _compile_from_the_end as go; go(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(i), str(others), *arches], stderr=subprocess.DEVNULL)
               for i in range(others)]
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def compiled_rows(arches: Sequence[str] = ARCHES, roofs: dict[str, Roof] = ROOFS) -> Iterator[dict[str, Any]]:
    """One row per kernel, case, dtype and arch."""
    every = list(_planned(arches, roofs))
    with _helped(every, arches):
        for planned in every:
            yield _row(planned, roofs[planned.arch])
    yield from _cuda_rows(arches, hashlib.sha256(Path(__file__).read_bytes()).hexdigest())


def _row(planned: _Planned, roof: Roof) -> dict[str, Any]:
    case, launch, made = planned.case, planned.launch, planned.made()
    floor = case.floor[launch.kernel.fn.__name__](planned.itemsize)
    rate = roof.bf16 if made["mma"] else roof.fp32
    return {"kernel": launch.name, "case": case.name, "dtype": planned.dtype, "arch": planned.arch, **made,
            "programs": launch.programs, "occupancy": occupancy(made["regs"], made["smem"], made["warps"], roof),
            "bytes": launch.bytes, "floor": int(floor), "over_floor": round(launch.bytes / floor, 4),
            "roof_us": round(1e6 * max(launch.bytes / roof.bandwidth, case.flops / rate), 2), "roof": f"{roof.gpu}, {roof.kind}"}


def _cuda_rows(arches: Sequence[str], own: str, folder: Path = ROOT / "csrc" / "cuda") -> Iterator[dict[str, Any]]:
    """What nvcc and ptxas say of csrc/cuda/*.cu: the worst kernel of a file. No launch is declared: no occupancy, no floor."""
    sources, nvcc = sorted(folder.glob("*.cu")), shutil.which("nvcc")
    if sources and nvcc is None:
        print(f"interlace: {len(sources)} CUDA sources are left out: nvcc is not on PATH", file=sys.stderr)
        return
    for source in sources:
        headers = b"".join(p.read_bytes() for p in sorted(folder.rglob("*.*h")))
        for arch in arches:
            key = hashlib.sha256(source.read_bytes() + headers + f"{arch} {own} {nvcc}".encode()).hexdigest()[:32]
            made = _cached(key, lambda source=source, arch=arch: _nvcc(str(nvcc), source, arch))  # type: ignore[misc]
            yield {"kernel": f"cuda/{source.stem}", "case": "", "dtype": "", "arch": arch, **made}


def _nvcc(nvcc: str, source: Path, arch: str) -> dict[str, Any]:
    import torch
    include = Path(torch.__file__).parent / "include"
    arch += "" if arch == "sm_80" else "a"
    with tempfile.TemporaryDirectory(prefix="interlace-") as folder:
        command = [nvcc, "-std=c++20", "-O3", f"-arch={arch}", "-Xptxas", "-v", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
                   "-isystem", str(include), "-cubin", "--keep", "--keep-dir", folder, str(source),
                   "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"{source.name} must compile for {arch}, got: {done.stderr.strip()[-1500:]}; fix it")
        regs, spill = _usage(done.stdout + done.stderr, "nvcc -Xptxas -v")
        smem = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stdout + done.stderr)]
        return {"regs": regs, "spill": spill, "smem": max(smem, default=0), **read_ptx(next(Path(folder).glob("*.ptx")).read_text()),
                "sass": _sass(Path(f"{folder}/out.cubin").read_bytes())}


def row_id(row: dict[str, Any]) -> str:
    return " ".join(str(row[k]) for k in ("kernel", "case", "dtype", "arch") if row[k])


def compare(rows: list[dict[str, Any]], golden: dict[str, dict[str, Any]]) -> list[str]:
    """What got worse against the golden file, one sentence each. `golden` holds the rows of the arches in `rows` at least. Without
    nvcc there are no rows of csrc/cuda, and those of the golden file are left out too."""
    arches, now = {r["arch"] for r in rows}, {row_id(r): r for r in rows}
    nvcc = any(k.startswith("cuda/") for k in now)
    was = {k: v for k, v in golden.items() if k.rsplit(" ", 1)[1] in arches and (nvcc or not k.startswith("cuda/"))}
    problems = [f"{k}: is in the golden file and is no more" for k in sorted(was.keys() - now.keys())]
    problems += [f"{k}: is not in the golden file" for k in sorted(now.keys() - was.keys())]
    for k in sorted(was.keys() & now.keys()):
        old, new = was[k], now[k]
        if new["spill"] > old["spill"]:
            problems.append(f"{k}: must not spill more than {old['spill']} bytes a thread, got {new['spill']}")
        if new["regs"] > 1.1 * old["regs"]:
            problems.append(f"{k}: registers must stay within 10% of {old['regs']}, got {new['regs']}")
        if new["wide"] < old["wide"] - 0.005:
            problems.append(f"{k}: {old['wide']:.1%} of its bytes must go through 16-byte accesses, got {new['wide']:.1%}")
        if new["mma"] < old["mma"] and not new["mma"]:
            problems.append(f"{k}: must use tensor cores ({old['mma']} instructions), got none")
    return problems


def golden_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row_id(r): {k: r[k] for k in ("regs", "spill", "smem", "mma", "wide")} for r in rows}


def _accept(rows: list[dict[str, Any]], version: str) -> None:
    if not GOLDEN.parent.is_dir():
        raise UserError(f"--accept writes {GOLDEN.name} of a source tree, got an installed package; run it in a clone")
    book = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    arches = {r["arch"] for r in rows}
    kept = {k: v for k, v in book.get(version, {}).items() if k.rsplit(" ", 1)[1] not in arches}
    book[version] = dict(sorted({**kept, **golden_of(rows)}.items()))
    versions = [json.dumps(v) + ": {\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(r)}" for k, r in rows_of.items()) + "\n}"
                for v, rows_of in sorted(book.items())]               # one line a row: a diff that can be read
    GOLDEN.write_text("{" + ",\n".join(versions) + "}\n")


def _table(rows: list[dict[str, Any]], arch: str, roof: Roof, console: Any) -> None:
    from rich.table import Table
    table = Table(title=f"{arch}: time at the roof of {roof.gpu}, {roof.bandwidth / 1e12:.2f} TB/s ({roof.kind}: {roof.source})")
    for name in ("kernel", "case", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("warps", "regs", "spill", "smem", "occ", "mma", "16B", "wide", "sass 16B", "MB", "/floor", "us"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in rows:
        if r["arch"] != arch:
            continue
        n, sass, bad = sum(r["accesses"].values()), r["sass"], r["spill"] or r["wide"] < 0.9
        wide, wide_sass = (sum(v for k, v in d.items() if int(k) >= 16) for d in (r["accesses"], sass or {}))
        launch = [f"{r['bytes'] / 1e6:.0f}", f"{r['over_floor']:.2f}", f"{r['roof_us']:.0f}"] if "floor" in r else ["-"] * 3
        occ = f"{r['occupancy']:.0%}" if "occupancy" in r else "-"
        table.add_row(r["kernel"], r["case"], r["dtype"], str(r.get("warps", "-")), str(r["regs"]), str(r["spill"]), str(r["smem"]), occ,
                      str(r["mma"]), f"{wide}/{n}", f"{r['wide']:.0%}", f"{wide_sass}/{sum(sass.values())}" if sass else "-", *launch,
                      style="red" if bad else None)
    console.print(table)


def main(out: str | Path | None = None, arches: Sequence[str] = ARCHES, *, accept: bool = False,
         roofs: dict[str, Roof] = ROOFS) -> int:
    """Print the report and write static.json into `out` (default: the cache folder). 1 when the golden file says worse."""
    version = _needs_compiler()
    from rich.console import Console
    from rich.progress import track

    from .command import writable
    folder = Path(out) if out is not None else cache_folder()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder, got the file {folder}; name another")
    writable(folder, "bench --static")
    console = Console() if sys.stdout.isatty() else Console(width=170)
    rows = list(track(compiled_rows(arches, roofs), "compiling", console=Console(stderr=True), transient=True))
    for arch in arches:
        _table(rows, arch, roofs[arch], console)
    report = {"triton": version, "roofs": {a: asdict(roofs[a]) for a in arches}, "rows": rows}
    (folder / "static.json").write_text(json.dumps(report, indent=1))
    print(f"{len(rows)} rows in {folder / 'static.json'}")
    if accept:
        _accept(rows, version)
        print(f"accepted as {GOLDEN.name} of Triton {version}")
        return 0
    book = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if version not in book:
        print(f"no golden rows for Triton {version} (there are: {', '.join(book) or 'none'}): nothing to compare with")
        return 0
    problems = compare(rows, book[version])
    for p in problems:
        print(f"interlace: {p}", file=sys.stderr)
    if problems:
        print(f"interlace: {len(problems)} kernels got worse; {ACCEPT}", file=sys.stderr)
    return 1 if problems else 0
