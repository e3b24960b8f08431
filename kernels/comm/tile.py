"""One tile of a product, and how a product is cut into tiles: shared by the overlapped GEMMs.

Numerics  fp32 accumulation; fp32 operands are multiplied as fp32 ("ieee"), never as TF32
Config    a function of shape and dtype alone: the same on all ranks by construction, so their grids cannot differ
"""
from dataclasses import asdict, dataclass
from math import gcd

import torch

from ..dispatch import INTERPRET, tl, triton
from .pad import Pad

__all__ = ["Tiles", "copy_tiles", "place_of", "product", "programs_of", "tiles_of"]


@triton.jit
def place_of(item, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles side by side, so that the programs at work at one time share operands in L2."""
    group = item // (GROUP * tiles_n)
    high = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = item % (GROUP * tiles_n)
    return group * GROUP + within % high, within // high


@triton.jit
def product(x_ptr, w_ptr, row, col, end, N, K, swn, swk, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr):
    """[BM, BN] fp32 of x[row:end] @ w.T[:, col:N]. Where x was waited for, `end` depends on what wait() returned."""
    rows, cols, ks = row + tl.arange(0, BM).to(tl.int64), col + tl.arange(0, BN).to(tl.int64), tl.arange(0, BK)
    x_at = x_ptr + rows[:, None] * K + ks[None, :]
    w_at = w_ptr + ks[:, None].to(tl.int64) * swk + cols[None, :] * swn
    inside, within = (rows < end)[:, None], (cols < N)[None, :]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(x_at, mask=inside & (ks < K - k)[None, :], other=0.0)
        b = tl.load(w_at, mask=within & (ks < K - k)[:, None], other=0.0)
        if INTERP:                                                    # its dot knows no bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        x_at += BK
        w_at += BK * swk
    return acc


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and compiler options of one launch."""
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int

    def blocks(self) -> dict[str, int]:
        return asdict(self)


def tiles_of(rows: int, dtype: torch.dtype) -> Tiles:
    """rows: of the product, or of one rank's share where blocks do not cross owners."""
    if INTERPRET:
        return Tiles(16, 16, 32, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 4)
    return Tiles(128, 256, 64, 8, 3) if rows > 64 else Tiles(64, 128, 64, 4, 4)


def copy_tiles(rows: int, dtype: torch.dtype) -> Tiles:
    """For what is moved and not multiplied: the row blocks of tiles_of, so that pads fit together, 32 elements a thread."""
    BM = tiles_of(rows, dtype).BM
    return Tiles(BM, 16, 16, 4, 1) if INTERPRET else Tiles(BM, 64, 16, max(4, BM // 16), 1)


def programs_of(pad: Pad, items: int, less: int = 0, each: int = 1) -> int:
    """One program an SM of this rank's share of the GPU, or `each`: all are resident, and ranks that share a GPU do not starve each other.

    Coprime to the world: then a program's items pass from owner to owner, and every program sums as much as the others."""
    if pad.device.type == "cpu":
        most = 3
    else:
        most = torch.cuda.get_device_properties(pad.device).multi_processor_count * each // pad.share - less
    while most > 1 and gcd(most, pad.world) > 1:
        most -= 1
    return max(1, min(most, items))
