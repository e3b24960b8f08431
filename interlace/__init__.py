"""Fused communication + computation kernels under thin parallel layers. Names load on first use, torch with them."""
from importlib import import_module

_NAMES = {                                                            # public name -> module
    **dict.fromkeys(("Config", "ModelConfig", "load_config"), "models.config"),
    "GPT": "models.gpt",
    **dict.fromkeys(("replace_", "restore_", "use", "verify"), "dropin.replace"),
    "load_pretrained_": "dropin.load", "pipeline_step": "dropin.scheduled", "whole_state_dict": "dropin.save",
    **dict.fromkeys(("RunError", "UserError"), "parallel.errors"),
    **dict.fromkeys(("Axis", "ColumnParallelLinear", "DistributedDataParallel", "Layout", "Mesh", "RowParallelLinear",
                     "VocabParallelEmbedding", "vocab_parallel_cross_entropy"), "parallel"),
    **dict.fromkeys(("add_layer_norm", "add_rms_norm", "cross_entropy", "dropout", "layer_norm", "rms_norm", "rope",
                     "rope_tables", "swiglu"), "kernels"),
    **dict.fromkeys(("SymmHeap", "ag_gemm", "all_gather", "all_reduce", "all_to_all", "gemm_ar", "gemm_rs",
                     "reduce_scatter", "rs_residual_norm"), "kernels.comm"),
}
_FOLDERS = ("bench", "dropin", "hf", "kernels", "models", "parallel")

__all__ = ["__version__", *_NAMES, *_FOLDERS]


def __getattr__(name: str) -> object:
    if name in _NAMES:
        value: object = getattr(import_module(f".{_NAMES[name]}", __name__), name)
    elif name in _FOLDERS:
        value = import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("interlace")
    except PackageNotFoundError:                                      # a source tree that is not installed
        return "0+unknown"
