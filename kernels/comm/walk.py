"""A fused op over the heap: blocks of a product, computed between the ticks of the protocol (csrc/runtime/heap.h).

    summed_product    rows lo..hi of the sum over ranks of a @ b     gemm_ar: all rows     gemm_rs: this rank's
    gathered_product  all_gather(x) @ b

The GEMM writes a block of rows into this rank's place of the heap, and every rank sums the blocks it wants while they are still
in cache: no copy in, and no second pass over the product. A rank writes block k + 1 before it waits for block k, so a rank that
is late by less than a block delays nobody. Nothing overlaps otherwise: one core does both.

Before anything is written all ranks agree on op, dtype and sizes; where they do not, each gets a CollectiveMismatch.
"""
import torch
from torch import Tensor

from .gemm import gemm, ready
from .heap import CODES, LIB, OPS, SymmHeap

__all__ = ["Walk", "block_rows", "gathered_product", "summed_product"]


def block_rows(rows: int, row_bytes: int, slot: int) -> int:
    """Rows of a block: as many as half a slot takes, evenly, so that the last block is no crumb; 0 where not one fits."""
    fit = slot // 2 // max(1, row_bytes)
    return -(-rows // -(-rows // fit)) if fit and rows else fit


class Walk:
    """One walk over the ticks: place, fill it, wait and read the tick before, signal; at the end wait and read the last."""

    def __init__(self, heap: SymmHeap, op: str, rows: int, cols: int, inner: int, dtype: torch.dtype):
        self.heap, self.handle, self.dtype = heap, heap.handle, dtype
        if rc := LIB.interlace_walk_begin(heap.handle, OPS.index(op), rows, cols, inner, CODES[dtype]):
            heap.fail(rc)

    def place(self, rows: int, cols: int) -> Tensor:
        """This rank's place of the coming tick."""
        return self.heap.view(LIB.interlace_walk_place(self.handle), (rows, cols), self.dtype)

    def signal(self) -> None:
        LIB.interlace_walk_signal(self.handle)

    def wait(self) -> None:
        if rc := LIB.interlace_walk_wait(self.handle):
            self.heap.fail(rc)

    def peer(self, rank: int, rows: int, cols: int) -> Tensor:
        """What rank wrote for the tick just waited for. To be read only."""
        return self.heap.view(LIB.interlace_walk_peer(self.handle, rank), (rows, cols), self.dtype)

    def sum(self, out: Tensor, skip: int) -> None:
        """The ranks' places of the tick just waited for, from element `skip` on, summed in rank order into out."""
        LIB.interlace_walk_sum(self.handle, out.data_ptr(), skip * self.dtype.itemsize, out.numel(), CODES[self.dtype])

    def __enter__(self) -> "Walk":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        LIB.interlace_walk_end(self.handle, kind is None)


def summed_product(op: str, a: Tensor, b: Tensor, heap: SymmHeap, lo: int, hi: int) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    y, step = a.new_empty(hi - lo, N), block_rows(M, N * a.element_size(), heap.nbytes)
    packed = ready(b)
    with Walk(heap, op, M, N, K, a.dtype) as walk:

        def take(at: int) -> None:
            walk.wait()
            first, last = max(at, lo), min(at + step, M, hi)
            if first < last:
                walk.sum(y[first - lo:last - lo], (first - at) * N)

        for i in range(0, M, step):
            rows = a[i:i + step]
            gemm(rows, packed, out=walk.place(rows.shape[0], N))
            if i:
                take(i - step)
            walk.signal()
        take(i)
    return y


def gathered_product(x: Tensor, b: Tensor, heap: SymmHeap) -> Tensor:
    (m, K), N, mine = x.shape, b.shape[1], heap.rank * x.shape[0]
    y, step = x.new_empty(heap.size * m, N), block_rows(m, K * x.element_size(), heap.nbytes)
    packed = ready(b)
    with Walk(heap, "ag_gemm", m, K, N, x.dtype) as walk:

        def take(at: int) -> None:
            walk.wait()
            rows = min(step, m - at)
            for i in range(1, heap.size):
                r = (heap.rank + i) % heap.size
                gemm(walk.peer(r, rows, K), packed, out=y[r * m + at:r * m + at + rows])

        for i in range(0, m, step):
            rows = x[i:i + step]
            walk.place(*rows.shape).copy_(rows)
            if i:
                take(i - step)
            walk.signal()
            gemm(rows, packed, out=y[mine + i:mine + i + rows.shape[0]])   # while the others' rows arrive
        take(i)
    return y
