"""Builds the stand-ins for libcudart, libcuda and NVML beside a CUDA torch: `python tests/host_cuda/build.py FOLDER`, then

    . FOLDER/env.sh                                             # HOST_CUDA=values (default) or launches: what sitecustomize.py does
    python -m pytest -m gpu tests ...                           # of the torch it was built for

What runtime.c and driver.c do not define, and torch or Triton may look up, returns 0. Needs gcc and the headers of nvcc 13."""
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HERE, FOLDER = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
PACKAGES = Path(find_spec("torch").origin).parents[1]
CUDA = next(top for top in (Path(shutil.which("nvcc") or "/").resolve().parent.parent, Path("/usr/local/cuda"))
            if (top / "include" / "cuda_runtime_api.h").exists())


def asked(prefix: str) -> set[str]:
    """The functions that torch looks up at run time."""
    text = (PACKAGES / "torch" / "lib" / "libc10_cuda.so").read_bytes()
    return {name.decode() for name in re.findall(rb"(?<!\w)" + prefix.encode() + rb"[A-Z]\w+(?=\0)", text)}


def library(name: str, source: str | None, stubs: set[str], *options: str) -> None:
    weak = FOLDER / "weak.c"
    weak.write_text("".join(f"__attribute__((weak)) int {stub}(void) {{ return 0; }}\n" for stub in sorted(stubs)))
    own = [str(HERE / source)] if source else []
    subprocess.run(["gcc", "-O1", "-fPIC", "-shared", "-fno-builtin", f"-I{CUDA / 'include'}", *own, "-x", "c", str(weak), "-o",
                    str(FOLDER / name), f"-Wl,-soname,{name}", *options, "-ldl", "-lpthread"], check=True)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    real = next(PACKAGES.glob("nvidia/**/libcudart.so.13"))
    listed = subprocess.run(["nm", "-D", "--defined-only", str(real)], check=True, capture_output=True, text=True).stdout
    version = FOLDER / "version"
    version.write_text("libcudart.so.13 { global: *; };\n")
    library("libcudart.so.13", "runtime.c", set(re.findall(r" T (\w+)", listed)), f"-Wl,--version-script={version}")
    library("libcuda.so.1", "driver.c", asked("cu") | set(re.findall(r"\bcu[A-Z]\w+", (CUDA / "include" / "cuda.h").read_text())))
    library("libnvidia-ml.so.1", None, asked("nvml"))
    (FOLDER / "env.sh").write_text(
        f"export LD_LIBRARY_PATH={FOLDER} LD_PRELOAD={FOLDER}/libcudart.so.13 TRITON_LIBCUDA_PATH={FOLDER}\n"
        f"export PYTHONSAFEPATH=1 PYTHONPATH={HERE}:{HERE.parents[1]}/build/tree HOST_CUDA=${{HOST_CUDA:-values}}\n"
        "if [ $HOST_CUDA = values ]; then export TRITON_INTERPRET=1; else export PYTORCH_NO_CUDA_MEMORY_CACHING=1; fi\n")


main()
