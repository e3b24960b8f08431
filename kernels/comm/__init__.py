"""Communication kernels: operators over one group of ranks. On CPU they go through shared memory (`SymmHeap`)."""
from .agree import forget_paths, paths_taken
from .choose import choose
from .collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from .dispatch import DispatchPlan, combine, combine_ref, dispatch, dispatch_plan, dispatch_ref
from .gemm import gemm
from .gemm_ar import copy_gemm, gemm_ar, gemm_ar_ref
from .gemm_rs import ag_gemm, ag_gemm_ref, gemm_rs, gemm_rs_ref
from .heap import CollectiveMismatch, HeapUnavailable, PeerDied, SymmHeap, heap_of
from .pad import reset_pads
from .registry import group_size
from .rs_residual_norm import rs_residual_norm, rs_residual_norm_ref

__all__ = ["CollectiveMismatch", "DispatchPlan", "HeapUnavailable", "PeerDied", "SymmHeap", "ag_gemm", "ag_gemm_ref",
           "all_gather", "all_reduce", "all_to_all", "choose", "combine", "combine_ref", "copy_gemm", "dispatch",
           "dispatch_plan", "dispatch_ref", "forget_paths", "gemm", "gemm_ar", "gemm_ar_ref", "gemm_rs", "gemm_rs_ref",
           "group_size", "heap_of", "paths_taken", "reduce_scatter", "reset_pads", "rs_residual_norm", "rs_residual_norm_ref"]
