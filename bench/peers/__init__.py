"""What others have, held against ours. Each is optional: where it cannot be had, a bench says its name and why."""
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["installed", "liger", "megatron", "transformer_engine", "triton_kernels"]


def installed(module: str, build: Callable[[Any], Any], pip: str, device: str, cuda_only: bool = True) -> Any:
    """build(module), or in words why there is none: a peer that fails to import is named, and the bench goes on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                           # of what they lack themselves
            found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        return f"not installed (pip install {pip})" if e.name and module.startswith(e.name) else f"does not import: {e}"
    except Exception as e:
        return f"does not import: {type(e).__name__}: {' '.join(str(e).split())[:150]}"
    if cuda_only and device != "cuda":
        return "needs CUDA tensors"
    try:
        return build(found)
    except Exception as e:
        return f"cannot be used: {type(e).__name__}: {' '.join(str(e).split())[:150]}"


def transformer_engine(layer: str, width: int, eps: float, device: str, dtype: torch.dtype) -> Any:
    """TransformerEngine's RMSNorm or LayerNorm of `width` as a function of (x, weight[, bias]), or why not."""
    def build(te: Any) -> Callable[..., Any]:
        module = getattr(te, layer)(width, eps=eps, device=device, dtype=dtype)
        names = ("weight", "bias")
        return lambda x, *w: torch.func.functional_call(module, dict(zip(names, w)), (x,))
    return installed("transformer_engine.pytorch", build, "transformer-engine[pytorch]", device)


def liger(name: str, device: str, build: Callable[[Any], Any]) -> Any:
    """build(the autograd.Function `name` of Liger), or why not."""
    return installed("liger_kernel.ops", lambda ops: build(getattr(ops, name)), "liger-kernel", device)


def megatron(module: str, build: Callable[[Any], Any]) -> Any:
    """build(the module of Megatron-Core), or why not. Without TransformerEngine it is torch's ops, on a CPU too."""
    return installed(f"megatron.core.{module}", build, "--no-deps megatron-core", "cpu", cuda_only=False)


def triton_kernels(module: str, device: str, build: Callable[[Any], Any]) -> Any:
    """build(the module of Triton's own triton_kernels), or why not. The package of that name on PyPI is another."""
    return installed(f"triton_kernels.{module}", build, "./python/triton_kernels of a checkout of Triton", device)
