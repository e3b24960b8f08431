"""all_gather and ag_gemm on a pad: a few programs send this rank's rows, the others multiply what has arrived

Shapes    x [m, K] of M rows in all, shares by first_row of protocol.py (they differ by one at most; m = 0 is fine), w [N, K] -> y [M, N];
          all_gather: y [M, K]
Protocol  gather of protocol.py. Row blocks of BM rows never cross owners. Own rows are multiplied first, in place, then those of the
          rank before, and so on: in the order in which they arrive
Bytes     sent per rank m K b (W-1). Pad: 2 M K b     FLOPs  2 M N K
Numerics  the product of one rank, accumulated in fp32, rounded once: the same bits as x @ w.T by the same tiles on one rank
Source    all-gather matmul of torch's symmetric memory, Flux (arXiv:2406.06858), TileLink; the protocol is this package's
"""
import torch
from torch import Tensor

from ..dispatch import INTERPRET, tl, triton
from .pad import OPS, Pad
from .protocol import blocks_of as count_blocks
from .protocol import first_row as start_of
from .signals import before, blocks_of, buffer_of, cells, finish, first_row, flag_word, going, next_epoch, part_slot, peer_of, signal, wait
from .tile import Tiles, copy_tiles, place_of, product, programs_of, tiles_of

__all__ = ["launch", "needs"]

# ---- kernel ---------------------------------------------------------------------------------------------------


@triton.jit
def _push(x_ptr, peers_ptr, rank, pid, pushers, go, epoch, buffer, flags, M, K, blocks, DTYPE: tl.constexpr, world,
          BM: tl.constexpr, COPY: tl.constexpr, BARRIER: tl.constexpr, RELEASE: tl.constexpr):
    rows = first_row(rank + 1, M, world) - first_row(rank, M, world)
    for at in range(pid, tl.where(go, (world - 1) * blocks, 0), pushers):
        to, block = peer_of(rank, 1 + at // blocks, world), at % blocks
        left = tl.maximum(tl.minimum(rows - block * BM, BM), 0).to(tl.int64) * K
        source = x_ptr + block.to(tl.int64) * BM * K
        target = cells(peers_ptr, to, buffer, DTYPE) + part_slot(rank, block, blocks).to(tl.int64) * BM * K
        for first in range(0, left, COPY):
            offs = first + tl.arange(0, COPY)
            tl.store(target + offs, tl.load(source + offs, mask=offs < left), mask=offs < left)
        signal(peers_ptr, to, flag_word(0, rank, block, world, flags), epoch, True, BARRIER, RELEASE)


@triton.jit(do_not_specialize=["rank"])
def _kernel(x_ptr, w_ptr, y_ptr, peers_ptr, local_ptr, error_ptr, rank, limit, data, nbytes, flags, pushers, M, N, K, swn, swk,
            world, OP: tl.constexpr, GEMM: tl.constexpr, COPY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, INTERP: tl.constexpr, BUFFERS: tl.constexpr, BARRIER: tl.constexpr, RELEASE: tl.constexpr,
            ACQUIRE: tl.constexpr):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pid, epoch, blocks = tl.program_id(0), next_epoch(local_ptr), blocks_of(M, world, BM)
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    if pid < pushers:
        go = going(local_ptr)
        _push(x_ptr, peers_ptr, rank, pid, pushers, go, epoch, buffer, flags, M, K, blocks, DTYPE, world, BM, COPY, BARRIER, RELEASE)
    else:
        tiles_n = tl.cdiv(N, BN)
        theirs, mine = tl.load(peers_ptr + rank) + buffer, x_ptr.to(tl.int64)
        for at in range(pid - pushers, world * blocks * tiles_n, tl.num_programs(0) - pushers):
            i = at // (blocks * tiles_n)
            block, n = place_of(at % (blocks * tiles_n), blocks, tiles_n, 4)
            s = before(rank, i, world)
            start = first_row(s, M, world) + block * BM
            rows = tl.maximum(tl.minimum(first_row(s + 1, M, world) - start, BM), 0)
            ok = rows >= 0
            if i > 0:
                ok = wait(peers_ptr, local_ptr, error_ptr, rank, s, flag_word(0, s, block, world, flags), epoch, limit, OP, ACQUIRE)
            base = tl.multiple_of(tl.where(i == 0, mine, theirs).to(tl.pointer_type(DTYPE)), 16)
            row = tl.where(i == 0, block, part_slot(s, block, blocks)).to(tl.int64) * BM
            end = row + tl.where(ok, rows, 0)
            r, cols = tl.arange(0, BM), n.to(tl.int64) * BN + tl.arange(0, BN)
            if rows > 0:
                inside = (r < rows)[:, None] & (cols < N)[None, :]
                if GEMM:
                    value = product(base, w_ptr, row, n.to(tl.int64) * BN, end, N, K, swn, swk, BM, BN, BK, INTERP)
                else:
                    from_ = row + r.to(tl.int64)
                    value = tl.load(base + from_[:, None] * K + cols[None, :], mask=inside & (from_ < end)[:, None], other=0.0)
                    value = value.to(tl.float32)
                value = tl.where(ok, value, float("nan"))
                tl.store(y_ptr + (start + r.to(tl.int64))[:, None] * N + cols[None, :], value.to(DTYPE), mask=inside)
    finish(local_ptr, epoch)


# ---- launch ---------------------------------------------------------------------------------------------------


def _pushers(pad: Pad, N: int, itemsize: int, gemm: bool) -> int:
    """Programs that send. 16 SMs fill a link, as published for NVLink; fewer where the product takes longer than the transfer:
    T_gemm / T_link = 2 N B W / (P b (W - 1)) with B = 380 GB/s and P = 790 TFLOP/s: a model, not a measurement."""
    if pad.world == 1:
        return 0
    if pad.device.type == "cpu":
        return 1
    slack = 2 * N * 380e9 * pad.world / (790e12 * itemsize * (pad.world - 1)) if gemm else 1.0
    return max(1, round(16 / max(slack, 1.0)) // pad.share)


def needs(rows: int, K: int, dtype: torch.dtype, world: int, tiles: Tiles | None = None) -> tuple[int, int]:
    """(bytes of a buffer, flags a source) of a gather of `rows` rows in all."""
    BM = (tiles or tiles_of(-(-rows // world), dtype)).BM
    blocks = count_blocks(rows, world, BM)
    return world * blocks * BM * K * dtype.itemsize, blocks


def launch(pad: Pad, x: Tensor, rows: int, w: Tensor | None = None, *, pushed: bool = False, tiles: Tiles | None = None,
           **control: object) -> Tensor:
    """y = all_gather(x), or that @ w.T. x [m, K] contiguous; rows: of all ranks, > 0.

    pushed: triton_rs has already sent x into this pad, in this epoch; nobody sends here."""
    share = -(-rows // pad.world)
    K, N = x.shape[1], x.shape[1] if w is None else w.shape[0]
    t = tiles or (copy_tiles(share, x.dtype) if w is None else tiles_of(share, x.dtype))
    pad.demand(*needs(rows, K, x.dtype, pad.world, t))
    if x.shape[0] != start_of(pad.rank + 1, rows, pad.world) - start_of(pad.rank, rows, pad.world):
        raise ValueError(f"{pad.op}: rank {pad.rank} must have its share of {rows} rows over {pad.world} ranks, got {x.shape[0]}")
    if x.device.type != "meta" and x.data_ptr() % 16:                 # own rows are read with the alignment of a pad
        x = x.clone()
    y = x.new_empty(rows, N)
    what = f"{rows} x {K} {x.dtype}"
    if (what if pushed else "") != pad.owed:
        raise ValueError(f"{pad.op}: a gather must take the rows that were sent onward to it, {pad.owed or 'none'}, got {what}, "
                         f"pushed={pushed}")
    pushers = 0 if pushed else _pushers(pad, N, x.element_size(), w is not None)
    items = pad.world * count_blocks(rows, pad.world, t.BM) * triton.cdiv(N, t.BN)
    programs = programs_of(pad, items, less=pushers)
    pad.agree(f"{rows} rows of {K} by {None if w is None else list(w.shape)} {x.dtype}, pushed {pushed}, {t}, "
              f"{pushers} + {programs} programs")
    pad.owed = ""
    swn, swk = (0, 0) if w is None else w.stride()
    _kernel[(pushers + programs,)](
        x, x if w is None else w, y, pad.peers, pad.local, pad.error, pad.rank, pad.polls, pad.data, pad.nbytes, pad.flags, pushers,
        rows, N, K, swn, swk, world=pad.world, OP=OPS.index(pad.op), GEMM=w is not None, COPY=256 if INTERPRET else 8192,
        INTERP=INTERPRET, launch_cooperative_grid=pad.share == 1, **t.blocks(),
        **{"BUFFERS": 2, "BARRIER": True, "RELEASE": "release", "ACQUIRE": "acquire", **control})
    if INTERPRET:
        pad.check()
    return y
