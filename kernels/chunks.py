"""Lists of tensors as one grid, for Triton: a table with a row for each chunk of up to CHUNK numbers, kept while addresses stay."""
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CHUNK", "chunk_table"]

CHUNK = 16384


def chunk_table(lists: Sequence[Sequence[Tensor]], values: Sequence[float]) -> tuple[Tensor, Tensor, int]:
    """lists: of n contiguous tensors each, of one dtype in a list; the i-th ones of all lists have one size. values: n numbers.

    Returns: int64 [C, 1 + len(lists)]: a chunk's length, and where it begins in each list, counted in numbers from that list's first
    tensor (views of one buffer or not: an address is an address); the chunks' values, fp64 [C]; 16 when all of the table is divisible
    by 16, so that loads may be 16 bytes wide, else 1."""
    key = tuple(tuple((t.data_ptr() - many[0].data_ptr()) // t.element_size() for t in many) for many in lists)
    return _table(key, tuple(t.numel() for t in lists[0]), tuple(values), lists[0][0].device)


@functools.lru_cache(maxsize=64)
def _table(starts: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], values: tuple[float, ...],
           device: torch.device) -> tuple[Tensor, Tensor, int]:
    rows, each = [], []
    for size, value, *at in zip(sizes, values, *starts):
        first = torch.arange(0, size, CHUNK, dtype=torch.int64)
        rows.append(torch.stack([(size - first).clamp(max=CHUNK), *(first + a for a in at)], 1))
        each.append(torch.full((len(first),), value, dtype=torch.float64))
    table = torch.cat(rows)
    return table.to(device), torch.cat(each).to(device), 1 if (table % 16).any() else 16
