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
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    for base in [Path(spec.origin).parent] if spec and spec.origin else [Path(sysconfig.get_path("purelib")) / "torch"]:
        if (base / "include/torch/csrc/stable/library.h").exists():
            found = re.search(r"__version__ = '(\d+)\.(\d+)", (base / "version.py").read_text())
            if found and tuple(map(int, found.groups())) < (2, 10):
                raise Missing(f"the C++ ops need torch >= 2.10, found {'.'.join(found.groups())}: pip install -U torch")
            return base
    raise Missing("no torch in this environment to build the C++ ops against: install torch, then "
                  "`pip install --no-build-isolation .`")


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            return path
    raise Missing("no C++ compiler (c++, g++, clang++, $CXX): pure Python install")


class BuildExt(build_ext):
    """Each extension is all of its folder's sources; objects are reused while no source or header is newer."""

    def run(self) -> None:
        if MODE not in ("auto", "python", "cpu"):
            raise SystemExit(f"INTERLACE_BUILD must be auto, python or cpu, got {MODE!r}")
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
                    raise SystemExit(f"INTERLACE_BUILD=cpu: {e}") from None
                self.info[tier] = {"built": False, "why": str(e)}
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        out = Path(self.get_ext_fullpath("interlace.kernels._cpu")).parent / "_build.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.info, indent=1))
        for tier, state in self.info.items():
            if isinstance(state, dict):
                print(f"interlace build: {tier}: {state['why']}", file=sys.stderr, flush=True)

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
        command = " ".join([cxx, *flags])
        fresh = stamp.exists() and stamp.read_text() == command
        headers = [*Path("csrc").rglob("*.h"), Path("setup.py")]

        def compile_one(source: str) -> tuple[Path, subprocess.CompletedProcess | None]:
            obj = objects / (Path(source).stem + ".o")
            newest = max(f.stat().st_mtime for f in [Path(source), *headers])
            if fresh and obj.exists() and obj.stat().st_mtime > newest:
                return obj, None
            return obj, subprocess.run([cxx, *flags, "-c", source, "-o", str(obj)], capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(compile_one, ext.sources))
        check(done)
        stamp.write_text(command)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")
        linked = subprocess.run([cxx, "-shared", "-o", str(new), *(str(o) for o, _ in done), *link, "-pthread"],
                                capture_output=True, text=True)
        check([(target, linked)])
        new.replace(target)                                           # a running process keeps the old library

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


def check(done: list) -> None:
    for path, result in done:
        if result is not None and result.returncode:
            hint = "the compiler was killed (out of memory?)" if result.returncode < 0 else result.stderr[-2000:]
            raise Missing(f"{path.name} does not compile: {hint}")


def cpu_flags(cxx: str, flags: list[str]) -> list[str]:
    """The instruction sets the compiler may use under `flags`, in /proc/cpuinfo's words."""
    macros = subprocess.run([cxx, *flags, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True).stdout
    names = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16")
    return [n for n in names if f"__{n.replace('_', '').upper()}__ " in macros or f"__{n.upper()}__ " in macros]


def extension(name: str, folder: str) -> list[Extension]:
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).glob("*.cpp"))
    return [Extension(name, sources)] if sources else []


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=["interlace", *(f"interlace.{p}" for f in FOLDERS for p in (f, *(f"{f}.{s}" for s in find_packages(f))))],
    package_dir={"interlace": "interlace", **{f"interlace.{f}": f for f in FOLDERS}},
    package_data={"": ["py.typed"], "interlace.kernels": ["_build.json"]},
    ext_modules=extension("interlace.kernels._runtime", "csrc/runtime") + extension("interlace.kernels._cpu", "csrc/cpu"),
    cmdclass={"build_ext": BuildExt},
    distclass=BinaryDistribution,
)
