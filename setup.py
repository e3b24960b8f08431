"""Maps the folders to interlace.<folder> and builds csrc/. Never imports torch: it may be absent, or the wrong one.

Three shared libraries, each optional, none a Python module (no CPython ABI, no pybind11):
    kernels/_runtime.so   csrc/runtime/*.cpp   shared memory and collectives, plain extern "C", called through ctypes
    kernels/_cpu.so       csrc/cpu/*.cpp       CPU ops on LibTorch's stable ABI (one binary for torch >= 2.10)
    kernels/_cuda.so      csrc/cuda/*.cu       CUDA ops on the same ABI, where torch is a CUDA build and there is nvcc

INTERLACE_BUILD  auto: build what can be built, say what cannot (default) | python: nothing | cpu: the first two, or fail
                 | cuda: all three, or fail
INTERLACE_MARCH  -march of the C++ ops (default native: kernels/dispatch.py refuses them on a CPU that lacks its flags)
"""
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FOLDERS = ["kernels", "parallel", "models", "dropin", "bench"]
MODE = os.environ.get("INTERLACE_BUILD", "auto")
# Contraction (fma) only: no -ffast-math, whose flush-to-zero would reach torch's own kernels in the same process.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
         "-fvisibility=hidden", "-Wall"]


# multimem, which csrc/cuda is there for, begins with 9.0; for 8.0 the same sources compile, and refuse when called.
ARCHES = ("80", "90a", "100a")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
INSTEAD = {"runtime": "torch.distributed", "cpu": "plain Python", "cuda": "Triton"}

NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-DUSE_CUDA", TARGET]


class Missing(Exception):
    """Why a tier cannot be built here."""


def find_torch() -> Path:
    """The folder of the torch to build against: this environment's, or the one behind pip's build isolation."""
    spec = importlib.util.find_spec("torch")
    paths = [Path(spec.origin).parents[1]] if spec and spec.origin else [
        *(Path(sysconfig.get_path("purelib", vars=v)) for v in ({}, {"base": sys.base_prefix})), Path(site.getusersitepackages())]
    for torch in (path / "torch" for path in paths):
        if (torch / "version.py").exists():
            found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
            if found and tuple(map(int, found.groups())) < (2, 10):
                raise Missing(f"the C++ ops need torch >= 2.10, found {'.'.join(found.groups())} in {torch}: pip install -U torch")
            if not (torch / "include/torch/csrc/stable/library.h").exists():
                raise Missing(f"the C++ ops need torch's headers, found none in {torch}/include: install torch from its wheel")
            return torch
    raise Missing("no torch in this environment to build the C++ ops against: install torch, then "
                  "`pip install --no-build-isolation .`")


def find_nvcc(torch: Path) -> tuple[str, list[str]]:
    """nvcc and the targets it knows; it must be of the CUDA that torch was built with, whose driver runs what it makes."""
    built = re.search(r"^cuda\b.*= '(\d+)\.(\d+)", (torch / "version.py").read_text(), re.M)
    if not built:
        raise Missing(f"the CUDA ops need a CUDA build of torch, found a CPU build in {torch}")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc")
    ask = lambda word: subprocess.run([nvcc, word], capture_output=True, text=True).stdout        # noqa: E731
    try:
        version = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    except OSError:
        raise Missing(f"the CUDA ops need nvcc of CUDA {built[1]}: {nvcc} is not there, nor is one on PATH, in CUDA_HOME or NVCC") from None
    if not version or version[1] != built[1]:
        found = f"CUDA {'.'.join(version.groups())}" if version else "an unknown version"
        raise Missing(f"the CUDA ops need nvcc of CUDA {built[1]}, torch's own, found {found} in {nvcc}: set NVCC or CUDA_HOME")
    known = ask("--list-gpu-arch").split()
    return nvcc, [arch for arch in ARCHES if f"compute_{arch.rstrip('a')}" in known]


def find_compiler() -> list[str]:
    """The command of the C++ compiler. $CXX may have arguments (ccache g++); one that is not there is not passed over."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if found := next((c for c in ([wanted] if wanted else [["c++"], ["g++"], ["clang++"]]) if shutil.which(c[0])), None):
        return found
    looked = f"CXX={wanted[0]} is not a command" if wanted else "c++, g++, clang++, $CXX"
    raise Missing(f"no C++ compiler ({looked})")


class BuildExt(build_ext):
    """Each extension is all of its folder's sources; objects are reused while no source or header is newer."""

    def run(self) -> None:
        self.info: dict = {}
        for ext in self.extensions:
            tier = ext.name.rsplit("._", 1)[1]
            try:
                if MODE == "python" or (MODE, tier) == ("cpu", "cuda"):
                    raise Missing(f"INTERLACE_BUILD={MODE}")
                more = self.build_one(ext, tier)
                self.info[tier] = {"built": True, "why": "built", **more}
            except Missing as e:
                if MODE == "cuda" or (MODE == "cpu" and tier != "cuda"):
                    what = "all three libraries" if MODE == "cuda" else "runtime and cpu"
                    raise SystemExit(f"interlace build: INTERLACE_BUILD={MODE} must build {what}, got: {tier}: {e}") from None
                self.info[tier] = {"built": False, "why": str(e)}
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        out = Path(self.get_ext_fullpath("interlace.kernels._cpu")).parent / "_build.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.info, indent=1))
        for tier, state in self.info.items():
            if isinstance(state, dict):
                text = "built" if state["built"] else f"not built, {INSTEAD[tier]} takes its place: {state['why']}"
                print(f"interlace build: {tier}: {text}", file=sys.stderr, flush=True)

    def build_one(self, ext: Extension, tier: str) -> dict:
        compiler, link, more = self.tools(tier)
        target = Path(self.get_ext_fullpath(ext.name))
        objects = ROOT / "build" / "obj" / tier
        objects.mkdir(parents=True, exist_ok=True)
        stamp = objects / "flags"
        command = shlex.join([*compiler, *self.info.get("cpu_flags", [])])        # -march=native differs between machines
        fresh = stamp.exists() and stamp.read_text() == command
        if not fresh:
            stamp.unlink(missing_ok=True)
        headers = [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.cuh"), Path("setup.py")]

        def compile_one(source: str) -> tuple[Path, subprocess.CompletedProcess | None]:
            obj = objects / (Path(source).stem + ".o")
            newest = max(f.stat().st_mtime for f in [Path(source), *headers])
            if fresh and obj.exists() and obj.stat().st_mtime > newest:
                return obj, None
            return obj, subprocess.run([*compiler, "-c", source, "-o", str(obj)], capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(compile_one, ext.sources))
        check(done)
        stamp.write_text(command)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        linked = subprocess.run([*link, "-shared", "-o", str(new), *(str(o) for o, _ in done), *self.linked_with(tier)],
                                capture_output=True, text=True)
        check([(target, linked)])
        new.replace(target)                                           # a running process keeps the old library
        return more

    def tools(self, tier: str) -> tuple[list[str], list[str], dict]:
        """The compiler with its flags, the linker, and what _build.json tells of them."""
        cxx = find_compiler()
        if tier == "cuda":
            nvcc, arches = find_nvcc(find_torch())
            tools = [nvcc, *(["-ccbin", cxx[0]] if os.environ.get("CXX") else [])]
            targets = [f for a in arches for f in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
            flags = [*NVCC_FLAGS, *targets, "--threads", str(os.cpu_count()), "-isystem", str(find_torch() / "include")]
            return [*tools, *flags], [*tools, *targets], {"arches": [f"sm_{a}" for a in arches]}
        flags = list(FLAGS)
        if tier == "cpu":
            march = os.environ.get("INTERLACE_MARCH", "native")
            flags += [f"-march={march}", TARGET, "-isystem", str(find_torch() / "include")]
            self.info["cpu_flags"] = cpu_flags(cxx, flags)
        elif sys.platform == "darwin":
            raise Missing("the shared-memory heap needs Linux: collectives go through torch.distributed")
        return [*cxx, *flags], cxx, {}

    @staticmethod
    def linked_with(tier: str) -> list[str]:
        if tier == "runtime":
            return ["-pthread"]
        lib = f"-L{find_torch() / 'lib'}"
        return [lib, "-ltorch_cpu", "-pthread"] if tier == "cpu" else [lib, "-ltorch_cuda", "-ltorch_cpu", "-Xcompiler", "-pthread"]

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


def check(done: list) -> None:
    for path, result in done:
        if result is not None and result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-5:]
            hint = "the compiler was killed (out of memory?)" if result.returncode < 0 else "\n".join(errors[:5])
            raise Missing(f"{os.path.basename(path)} does not compile: {hint}")


def cpu_flags(cxx: list[str], flags: list[str]) -> list[str]:
    """The instruction sets the compiler may use under `flags`, in /proc/cpuinfo's words."""
    macros = subprocess.run([*cxx, *flags, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True).stdout
    names = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return [n for n in names if f"__{n.replace('_', '').upper()}__ " in macros or f"__{n.upper()}__ " in macros]


def extension(name: str, folder: str) -> list[Extension]:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*.cu" if "cuda" in name else "*.cpp"))
    return [Extension(name, sources)] if sources else []


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if MODE not in ("auto", "python", "cpu", "cuda"):
    raise SystemExit(f"interlace build: INTERLACE_BUILD must be auto, python, cpu or cuda, got {MODE!r}")
if int(setuptools.__version__.split(".")[0]) < 77:                   # the first that reads this pyproject.toml
    raise SystemExit(f"interlace build: setuptools must be >= 77, found {setuptools.__version__}: pip install -U setuptools, "
                     "or leave out --no-build-isolation")
setup(
    packages=["interlace", *(f"interlace.{p}" for f in FOLDERS for p in (f, *(f"{f}.{s}" for s in find_packages(f))))],
    package_dir={"interlace": "interlace", **{f"interlace.{f}": f for f in FOLDERS}},
    package_data={"": ["py.typed"], "interlace.kernels": ["_build.json"]},
    ext_modules=[e for tier in INSTEAD for e in extension(f"interlace.kernels._{tier}", f"csrc/{tier}")],
    cmdclass={"build_ext": BuildExt},
    distclass=BinaryDistribution,
)
