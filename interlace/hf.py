"""Hugging Face beside replace_: register() puts our layers into the registries of transformers 5, for its own from_pretrained, and plan()
writes what its plans lack; Trainer trains a model that replace_ split over tp."""
from .dropin.registry import plan, register, unregister

__all__ = ["Trainer", "plan", "register", "unregister"]             # noqa: F822  (Trainer: below)


def __getattr__(name: str) -> object:
    if name == "Trainer":
        from .dropin.trainer import trainer_class
        return trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
