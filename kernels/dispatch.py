"""What runs where: the one place that asks for Triton, for the C++ ops, and for the environment.

    tensors                        runs
    CUDA (not float64)             the Triton kernel
    CPU                            the C++ op of csrc/cpu when built, else the reference
    CPU with TRITON_INTERPRET=1    the Triton kernel, interpreted (not float64: the kernels accumulate in fp32)

An op's schema stands in its kernels/<op>.py (`define`), not in C++: a pure-Python install needs it too. csrc/cpu/<op>.cpp
only adds the CPU implementation to it.
"""
import ctypes
import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:                                                   # no wheel for macOS: the references still run there
    class _Absent:
        """Stands in for triton where it is not installed: kernels can be defined, not launched."""

        constexpr = None

        def jit(self, fn=None, **_):
            return fn or self.jit

    triton = tl = _Absent()

__all__ = ["CPP", "CUDA", "CUDA_ONLY", "INTERPRET", "LIB", "ONEDNN_ISA", "ONE_PASS", "TILES", "build_info", "cpu_flags", "define",
           "differentiable", "fused", "multiplies", "not_built", "on_its_gpu", "once", "row_programs", "row_warps", "stand_ins", "tl",
           "traced", "transformed", "triton", "tune_malloc"]

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_REFERENCE_ONLY = os.environ.get("INTERLACE_KERNELS") == "reference"  # A/B any run against the references
ONEDNN_ISA = os.environ.get("ONEDNN_MAX_CPU_ISA", "").lower().replace("default", "")   # holds torch's products to older instructions
_HERE = Path(__file__).parent
LIB = torch.library.Library("interlace", "DEF")
CUDA_ONLY: list[str] = []                                             # the ops that csrc/cuda alone computes


def build_info() -> dict[str, Any]:
    """What setup.py built and why not the rest: {"runtime"|"cpu"|"cuda": {"built": bool, "why": str}, "cpu_flags": [...]}."""
    path = _HERE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """This CPU's instruction sets in /proc/cpuinfo's words; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return frozenset(next(ln.split(":")[1] for ln in lines if ln.startswith("flags")).split())
    except (OSError, StopIteration):
        return frozenset()


def multiplies(kind: str) -> bool:
    """Whether torch's products on this CPU have instructions for "bf16" or "fp16"; without, they run at a tenth of fp32's rate."""
    newer = ("fp16", "amx", "avx10", *([kind] if kind == "bf16" else []))   # the names of oneDNN's sets that have them
    return bool(cpu_flags() & {f"avx512_{kind}", f"amx_{kind}"}) and (not ONEDNN_ISA or any(name in ONEDNN_ISA for name in newer))


def _load_cpp() -> bool:
    """Load the C++ CPU ops. They are compiled for the CPU they were built on, so refuse them on a lesser one."""
    path = _HERE / "_cpu.so"
    if not path.exists():
        return False
    missing = sorted(set(build_info().get("cpu_flags", ())) - cpu_flags()) if cpu_flags() else []
    if missing:
        warnings.warn(f"interlace: C++ ops were built for a CPU with {', '.join(missing)}, which this one lacks: "
                      "using the references; rebuild with `pip install --no-build-isolation .`", stacklevel=2)
        return False
    return _load(path, "C++", "the references")


def _load_cuda() -> bool:
    """Load the ops of csrc/cuda, which need a CUDA build of torch; no GPU yet."""
    path = _HERE / "_cuda.so"
    return path.exists() and torch.version.cuda is not None and _load(path, "CUDA", "the Triton kernels")


def _load(path: Path, what: str, instead: str) -> bool:
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        warnings.warn(f"interlace: {what} ops do not load with torch {torch.__version__}, using {instead}: {e}", stacklevel=3)
        return False
    return True


def not_built() -> str:
    """Why CPU tensors run the references here although nobody asked for that; "" where they do not."""
    if CPP or INTERPRET or _REFERENCE_ONLY or (_HERE / "_cpu.so").exists():    # one that does not load has warned already
        return ""
    return build_info().get("cpu", {}).get("why", "the package was not built")


CPP = not INTERPRET and not _REFERENCE_ONLY and _load_cpp()
TILES = CPP and {"avx2", "fma"} <= set(build_info().get("cpu_flags", ()))    # csrc/cpu/gemm.h has the vectors that it needs
CUDA = not INTERPRET and not _REFERENCE_ONLY and _load_cuda()


def define(schema: str, launch: Callable | str, fake: Callable, everywhere: bool = False) -> None:
    """Declare op `interlace::<schema>`: its Triton launcher, and its fake for tracing. C++ adds the CPU side.

    launch: "csrc/cuda" or "csrc/cpu" where that has it alone. everywhere: launch serves every device (it asks for itself which path
    to take)."""
    name = schema.split("(")[0]
    LIB.define(schema)
    if launch == "csrc/cuda":
        CUDA_ONLY.append(name)
    elif not isinstance(launch, str):
        for key in ("CompositeExplicitAutograd",) if everywhere else ("CUDA", "CPU") if INTERPRET else ("CUDA",):
            LIB.impl(name, launch if everywhere else on_its_gpu(launch), key)
    torch.library.register_fake(f"interlace::{name}", fake, lib=LIB)


def on_its_gpu(launch: Callable) -> Callable:
    """launch where its first CUDA tensor is: Triton takes the current GPU, which for a model over several GPUs is another."""
    @functools.wraps(launch)
    def run(*args):
        tensors = (t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor))
        device = next((t.device for t in tensors if t.device.type == "cuda"), None)
        if device is None or device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)
    return run


def traced() -> bool:
    """True where an op must be visible to a tracer: under torch.compile, or while any dispatch mode looks on."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def stand_ins() -> bool:
    """True where tensors may have no data or be recorded: under torch.compile, FakeTensorMode and make_fx. Not where a mode only looks on,
    as FlopCounterMode does, perhaps on one rank alone: what ranks must decide alike goes by this."""
    key = torch._C._TorchDispatchModeKey
    return torch.compiler.is_compiling() or any(torch._C._get_dispatch_mode(k) is not None for k in (key.FAKE, key.PROXY, key.FUNCTIONAL))


def transformed() -> bool:
    """True under torch.func and forward-mode AD, which the gradients of the ops do not serve."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def once(op: str) -> Callable[[Callable], Callable]:
    """Marks a backward whose own gradient nobody has: create_graph=True raises. What the kernels compute has no graph, and would pass for
    a constant; torch's once_differentiable lets it, where the gradient that comes in is one: as in every loss."""
    def mark(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{op}: create_graph must be False, for there is no second derivative, got True; where one is wanted, "
                                   "use the op's reference (rms_norm_ref for rms_norm, ...)")
            return backward(ctx, *grads)
        return checked
    return mark


def differentiable(name: str, setup: Callable, backward: Callable, keep: int = 1, run: Callable | None = None,
                   linear: bool = False) -> Callable:
    """Give op `interlace::<name>` its gradient; returns the callable that public functions use.

    setup(ctx, inputs, output) and backward(ctx, *grads) are those of `torch.library.register_autograd`, which serves tracing.
    Eager calls go through an autograd.Function over the same two: 36 us less a step than register_autograd's wrapper.
    keep: the outputs a caller sees; the rest are statistics saved for the backward, whose gradients never come.
    run: what an eager call runs in place of the op, where that is Python anyway: the dispatcher and back is 7 us.
    linear: the backward is made of ops that have gradients themselves, so it may be differentiated again; else `once`.
    """
    backward = backward if linear else once(name.removesuffix("_fwd"))(backward)
    torch.library.register_autograd(f"interlace::{name}", backward, setup_context=setup, lib=LIB)
    op = getattr(torch.ops.interlace, name).default
    cut = lambda out: out if isinstance(out, Tensor) else out[0] if keep == 1 else out[:keep]  # noqa: E731

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            if run is not None:
                out = run(*inputs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    out = op(*inputs)
            setup(ctx, inputs, out)
            return cut(out)

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    if run is None:
        return lambda *inputs: cut(op(*inputs)) if torch.compiler.is_compiling() else Eager.apply(*inputs)
    return lambda *inputs: cut(op(*inputs)) if traced() else Eager.apply(*inputs)


def fused(*tensors: Tensor) -> bool:
    """True when an op over these tensors has a kernel here; False when its reference must run."""
    if _REFERENCE_ONLY or transformed():
        return False
    if all(t.is_cuda for t in tensors):
        return all(t.dtype != torch.float64 for t in tensors)
    if all(t.device.type == "cpu" for t in tensors):
        return CPP or (INTERPRET and all(t.dtype != torch.float64 for t in tensors))
    return False


def row_warps(block: int) -> int:
    """num_warps of a kernel that holds a row of `block` in registers: 16 elements a thread, where 64 would spill."""
    return min(32, max(4, block // 512))


ONE_PASS = 8192                                                       # widest row that a norm's backward holds in registers, with its dw


def row_programs(x: Tensor) -> int:
    """Programs of a kernel that walks rows and leaves one partial sum of them each."""
    return 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def tune_malloc() -> bool:
    """Keep freed memory in the process: glibc gives tensors over 32 MB back to the kernel at every free, and touching
    fresh pages runs at 1 GB/s. Process-wide; ranks and benches (for every peer alike) call it once. False off glibc."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 64 << 20)])
