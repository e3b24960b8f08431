"""transformers 5's own from_pretrained with our layers: register() puts them into its registries, plan() writes what its plans lack."""
from .models.hf_registry import plan, register, unregister

__all__ = ["plan", "register", "unregister"]
