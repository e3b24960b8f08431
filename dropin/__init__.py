"""Kernels and parallel layers in other people's models: torch's and Hugging Face's."""
if __name__ == "dropin":
    raise ImportError("import interlace.dropin, not dropin: the repo root is on sys.path")
