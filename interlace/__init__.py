"""Fused communication + computation kernels under thin parallel layers. Names load on first use, torch with them."""
from importlib import import_module

_NAMES = {                                                            # public name -> module
    "Config": "models.config",
    "GPT": "models.gpt",
    "Layout": "parallel.layout",
    "Mesh": "parallel.mesh",
    "ModelConfig": "models.config",
    "RunError": "parallel.errors",
    "UserError": "parallel.errors",
    "add_rms_norm": "kernels",
    "load_config": "models.config",
    "rms_norm": "kernels",
}
_FOLDERS = ("bench", "kernels", "models", "parallel")

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
