"""Fused operators. Every op is `<op>.py` here, `test_<op>.py` in tests/, `bench_<op>.py` in bench/."""
if __name__ == "kernels":
    raise ImportError("import interlace.kernels, not kernels: the repo root is on sys.path")
from .cross_entropy import cross_entropy, cross_entropy_ref
from .dropout import dropout, dropout_ref
from .rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

__all__ = ["add_rms_norm", "add_rms_norm_ref", "cross_entropy", "cross_entropy_ref", "dropout", "dropout_ref",
           "rms_norm", "rms_norm_ref"]
