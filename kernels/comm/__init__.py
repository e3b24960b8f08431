"""Communication kernels: operators over one group of ranks. On CPU they go through shared memory (`SymmHeap`)."""
from .collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from .heap import CollectiveMismatch, HeapUnavailable, PeerDied, SymmHeap, heap_of

__all__ = ["CollectiveMismatch", "HeapUnavailable", "PeerDied", "SymmHeap", "all_gather", "all_reduce", "all_to_all", "heap_of",
           "reduce_scatter"]
