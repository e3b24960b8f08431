"""Maps the folders to interlace.<folder> and builds csrc/. Never imports torch: it may be absent, or the wrong one.

Two shared libraries, each optional, neither a Python module (no CPython ABI, no pybind11):
    kernels/_runtime.so   csrc/runtime/*.cpp   shared memory and collectives, plain extern "C", called through ctypes
    kernels/_cpu.so       csrc/cpu/*.cpp       CPU ops on LibTorch's stable ABI (one binary for torch >= 2.10)

INTERLACE_BUILD  auto: build what can be built, say what cannot (default) | python: nothing | cpu: both, or fail
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
FOLDERS = ["kernels", "parallel", "models", "bench"]
MODE = os.environ.get("INTERLACE_BUILD", "auto")
# Contraction (fma) only: no -ffast-math, whose flush-to-zero would reach torch's own kernels in the same process.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
         "-fvisibility=hidden", "-Wall"]


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
                if MODE == "python":
                    raise Missing("INTERLACE_BUILD=python")
                self.build_one(ext, tier)
                self.info[tier] = {"built": True, "why": "built"}
            except Missing as e:
                if MODE == "cpu":
                    raise SystemExit(f"interlace build: INTERLACE_BUILD=cpu must build both libraries, got: {e}") from None
                self.info[tier] = {"built": False, "why": str(e)}
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        out = Path(self.get_ext_fullpath("interlace.kernels._cpu")).parent / "_build.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.info, indent=1))
        for tier, state in self.info.items():
            if isinstance(state, dict):
                text = "built" if state["built"] else f"not built, plain Python takes its place: {state['why']}"
                print(f"interlace build: {tier}: {text}", file=sys.stderr, flush=True)

    def build_one(self, ext: Extension, tier: str) -> None:
        cxx = find_compiler()
        flags, link = [*FLAGS], []
        if tier == "cpu":
            torch = find_torch()
            march = os.environ.get("INTERLACE_MARCH", "native")
            flags += [f"-march={march}", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch / "include")]
            link = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
            self.info["cpu_flags"] = cpu_flags(cxx, flags)
        elif sys.platform == "darwin":
            raise Missing("the shared-memory heap needs Linux: collectives go through torch.distributed")
        target = Path(self.get_ext_fullpath(ext.name))
        objects = ROOT / "build" / "obj" / tier
        objects.mkdir(parents=True, exist_ok=True)
        stamp = objects / "flags"
        command = shlex.join([*cxx, *flags, *self.info.get("cpu_flags", [])])     # -march=native differs between machines
        fresh = stamp.exists() and stamp.read_text() == command
        if not fresh:
            stamp.unlink(missing_ok=True)
        headers = [*Path("csrc").rglob("*.h"), Path("setup.py")]

        def compile_one(source: str) -> tuple[Path, subprocess.CompletedProcess | None]:
            obj = objects / (Path(source).stem + ".o")
            newest = max(f.stat().st_mtime for f in [Path(source), *headers])
            if fresh and obj.exists() and obj.stat().st_mtime > newest:
                return obj, None
            return obj, subprocess.run([*cxx, *flags, "-c", source, "-o", str(obj)], capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(compile_one, ext.sources))
        check(done)
        stamp.write_text(command)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        linked = subprocess.run([*cxx, "-shared", "-o", str(new), *(str(o) for o, _ in done), *link, "-pthread"],
                                capture_output=True, text=True)
        check([(target, linked)])
        new.replace(target)                                           # a running process keeps the old library

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
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*.cpp"))
    return [Extension(name, sources)] if sources else []


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


if MODE not in ("auto", "python", "cpu"):
    raise SystemExit(f"interlace build: INTERLACE_BUILD must be auto, python or cpu, got {MODE!r}")
if int(setuptools.__version__.split(".")[0]) < 77:                   # the first that reads this pyproject.toml
    raise SystemExit(f"interlace build: setuptools must be >= 77, found {setuptools.__version__}: pip install -U setuptools, "
                     "or leave out --no-build-isolation")
setup(
    packages=["interlace", *(f"interlace.{p}" for f in FOLDERS for p in (f, *(f"{f}.{s}" for s in find_packages(f))))],
    package_dir={"interlace": "interlace", **{f"interlace.{f}": f for f in FOLDERS}},
    package_data={"": ["py.typed"], "interlace.kernels": ["_build.json"]},
    ext_modules=extension("interlace.kernels._runtime", "csrc/runtime") + extension("interlace.kernels._cpu", "csrc/cpu"),
    cmdclass={"build_ext": BuildExt},
    distclass=BinaryDistribution,
)
