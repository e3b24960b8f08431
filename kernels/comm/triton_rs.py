"""reduce_scatter, gemm_rs and rs_residual_norm on a pad: send tiles to the owners of their rows, then sum what has come, and more

Shapes    x [M, K], w [N, K] -> y [m, N]: this rank's rows of the sum; shares by first_row of protocol.py. reduce_scatter: x [M, N]
          rs_residual_norm: residual, h, y [m, N], weight, bias [N]; also rstd, mean [m] fp32 for the backward
Protocol  scatter of protocol.py, two kernels. The first sends the next rank's rows first and its own last, so that the last
          tiles need no link; the last of a row block's tiles to be done signals the owner. The second waits block by block. No
          SM waits while there is anything to multiply. Optionally the second sends y on to all: the next all-gather, done
Bytes     sent per rank M N b (W-1)/W. Pad: 2 M N b. Sum: (W + 1) m N b, rs_residual_norm (W + 3) m N b     FLOPs  2 M N K
Numerics  a part is rounded to the type once; sum in rank order, residual added, in fp32; h rounded once, the norm as in rms_norm
Source    gemm + reduce-scatter as in Flux (arXiv:2406.06858); arXiv:2205.05198 for the residual stream; the protocol is this package's
"""
import torch
from torch import Tensor

from ..dispatch import INTERPRET, row_warps, tl, triton
from .pad import COUNTERS, OPS, Pad
from .protocol import blocks_of as count_blocks
from .protocol import first_row as start_of
from .signals import (
    blocks_of,
    buffer_of,
    cells,
    finish,
    first_row,
    flag_word,
    going,
    last,
    next_epoch,
    part_slot,
    peer_of,
    signal,
    signal_all,
    wait,
)
from .tile import Tiles, copy_tiles, place_of, product, programs_of, tiles_of

__all__ = ["needs", "push", "take"]

# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rank"])
def _push_kernel(x_ptr, w_ptr, peers_ptr, local_ptr, rank, data, nbytes, flags, M, N, K, swn, swk, world, GEMM: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr, BUFFERS: tl.constexpr,
                 BARRIER: tl.constexpr, RELEASE: tl.constexpr):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    epoch, blocks, tiles_n = next_epoch(local_ptr), blocks_of(M, world, BM), tl.cdiv(N, BN)
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    for at in range(tl.program_id(0), tl.where(going(local_ptr), world * blocks * tiles_n, 0), tl.num_programs(0)):
        to = peer_of(rank, 1 + at // (blocks * tiles_n), world)
        block, n = place_of(at % (blocks * tiles_n), blocks, tiles_n, 4)
        row, end = (first_row(to, M, world) + block * BM).to(tl.int64), first_row(to + 1, M, world)
        if row < end:
            i, j = tl.arange(0, BM), tl.arange(0, BN)
            rows, cols = row + i, n * BN + j
            if GEMM:
                value = product(x_ptr, w_ptr, row, n.to(tl.int64) * BN, end, N, K, swn, swk, BM, BN, BK, INTERP).to(DTYPE)
            else:
                value = tl.load(x_ptr + rows[:, None] * N + cols[None, :], mask=(rows < end)[:, None] & (cols < N)[None, :], other=0.0)
            cell = part_slot(rank, block, blocks).to(tl.int64) * BM + i   # whole tiles of columns: stores stay 16 bytes wide
            tl.store(cells(peers_ptr, to, buffer, DTYPE) + cell[:, None] * (tiles_n * BN) + cols[None, :], value,
                     mask=(rows < end)[:, None] & (j >= 0)[None, :])
        if last(local_ptr, to * blocks + block, tiles_n, BARRIER):
            signal(peers_ptr, to, flag_word(0, rank, block, world, flags), epoch, True, BARRIER, RELEASE)


@triton.jit
def _row_sum(parts, offs, mask, step, world, BLOCK: tl.constexpr):
    """Row of every rank's part, `step` apart, in rank order. Two loads in flight: four spill in some of the launches. Said to be
    aligned: Triton 3.6 does not see it of the loop's odd last turn, and loads that in words of 2 bytes."""
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for s in tl.range(world, loop_unroll_factor=2):
        acc += tl.load(tl.multiple_of(parts + s * step, 16) + offs, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["rank"])
def _take_kernel(y_ptr, res_ptr, weight_ptr, bias_ptr, h_ptr, rstd_ptr, mean_ptr, peers_ptr, local_ptr, error_ptr, next_peers_ptr,
                 next_local_ptr, rank, limit, data, nbytes, flags, next_data, next_nbytes, next_flags, M, N, stride, eps,
                 world, OP: tl.constexpr, NORM: tl.constexpr, PUSH: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr, BUFFERS: tl.constexpr, BARRIER: tl.constexpr, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr):
    """NORM: 0 sum only, 1 RMSNorm, 2 LayerNorm. PUSH: send y into the pad of the next all-gather, in its coming epoch."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    epoch, blocks = next_epoch(local_ptr), blocks_of(M, world, BM)
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    total = first_row(rank + 1, M, world) - first_row(rank, M, world)
    step = blocks.to(tl.int64) * BM * stride                          # from one rank's parts to the next one's
    for at in range(tl.program_id(0), blocks * (BM // ROWS), tl.num_programs(0)):
        block = at // (BM // ROWS)
        ok = epoch == epoch
        for s in range(world):
            ok = ok & wait(peers_ptr, local_ptr, error_ptr, rank, s, flag_word(0, s, block, world, flags), epoch, limit, OP, ACQUIRE)
        width = tl.where(ok, N, 0)
        if PUSH:
            go = going(local_ptr)
        for row in range(at * ROWS, tl.minimum(at * ROWS + ROWS, total)):
            row64 = tl.full([], row, tl.int64)                        # interpreted, a loop variable is a plain int
            parts = cells(peers_ptr, rank, buffer, DTYPE) + row64 * stride
            if NORM == 0:
                for first in range(0, N, BLOCK):
                    offs = first + tl.arange(0, BLOCK)
                    acc = _row_sum(parts, offs, offs < width, step, world, BLOCK)
                    tl.store(y_ptr + row64 * N + offs, tl.where(ok, acc, float("nan")).to(DTYPE), mask=offs < N)
            else:
                offs = tl.arange(0, BLOCK)
                mask = offs < N
                acc = _row_sum(parts, offs, offs < width, step, world, BLOCK)
                acc += tl.load(res_ptr + row64 * N + offs, mask=mask, other=0.0).to(tl.float32)
                h = tl.where(ok | (offs >= N), acc, float("nan")).to(DTYPE)
                tl.store(h_ptr + row64 * N + offs, h, mask=mask)
                x = h.to(tl.float32)                                  # normalise what the backward will read
                if NORM == 2:
                    mean = tl.sum(x, axis=0) / N
                    x = tl.where(mask, x - mean, 0.0)
                    tl.store(mean_ptr + row, mean)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / N + eps)
                tl.store(rstd_ptr + row, rstd)
                y = x * rstd * tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                if NORM == 2:
                    y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                y = y.to(DTYPE)
                tl.store(y_ptr + row64 * N + offs, y, mask=mask)
                if PUSH:
                    there = next_data + buffer_of(next_epoch(next_local_ptr), BUFFERS).to(tl.int64) * next_nbytes
                    sent = offs < tl.where(go, N, 0)
                    for p in range(1, world):
                        target = cells(next_peers_ptr, peer_of(rank, p, world), there, DTYPE)
                        tl.store(target + (part_slot(rank, 0, blocks).to(tl.int64) * BM + row64) * N + offs, y, mask=sent)
        if PUSH:  # noqa: SIM102                                      a constexpr and a tensor: two kinds of if
            if last(local_ptr, block, BM // ROWS, BARRIER):
                go = going(local_ptr)                                 # of all who worked on the block
                signal_all(next_peers_ptr, rank, flag_word(0, rank, block, world, next_flags), next_epoch(next_local_ptr), go, world,
                           BARRIER, RELEASE)
                if not go:                                            # that gather has no part of this rank: nor may later ones
                    tl.store(next_local_ptr + 2, 1)
    finish(local_ptr, epoch)


# ---- launch ---------------------------------------------------------------------------------------------------

_CONTROL = {"BUFFERS": 2, "BARRIER": True, "RELEASE": "release"}


def _tiles(rows: int, world: int, dtype: torch.dtype, gemm: bool) -> Tiles:
    share = -(-rows // world)
    return tiles_of(share, dtype) if gemm else copy_tiles(share, dtype)


def needs(rows: int, N: int, dtype: torch.dtype, world: int, gemm: bool = True) -> tuple[int, int]:
    """(bytes of a buffer, flags a source) of a reduce-scatter of [rows, N]."""
    t = _tiles(rows, world, dtype, gemm)
    blocks = count_blocks(rows, world, t.BM)
    return world * blocks * t.BM * triton.cdiv(N, t.BN) * t.BN * dtype.itemsize, blocks


def push(pad: Pad, x: Tensor, w: Tensor | None = None, **control: object) -> None:
    """Kernel 1: the rows of x, or of x @ w.T, to their owners. x [rows, K] contiguous, rows > 0. take() must follow."""
    rows, N = x.shape[0], x.shape[1] if w is None else w.shape[0]
    pad.demand(*needs(rows, N, x.dtype, pad.world, w is not None))
    t = _tiles(rows, pad.world, x.dtype, w is not None)
    items = pad.world * count_blocks(rows, pad.world, t.BM) * triton.cdiv(N, t.BN)
    if pad.world * count_blocks(rows, pad.world, t.BM) > COUNTERS:
        raise ValueError(f"{pad.op}: row blocks must number at most {COUNTERS}, got {rows} rows in blocks of {t.BM}; split x")
    programs = programs_of(pad, items)
    pad.agree(f"{list(x.shape)} by {None if w is None else list(w.shape)} {x.dtype}, {t}, {programs} programs")
    swn, swk = (0, 0) if w is None else w.stride()
    _push_kernel[(programs,)](x, x if w is None else w, pad.peers, pad.local, pad.rank, pad.data, pad.nbytes, pad.flags, rows, N,
                              x.shape[1], swn, swk, world=pad.world, GEMM=w is not None, INTERP=INTERPRET, **t.blocks(),
                              **{**_CONTROL, **{k: v for k, v in control.items() if k != "ACQUIRE"}})


def take(pad: Pad, rows: int, N: int, dtype: torch.dtype, gemm: bool, residual: Tensor | None = None, weight: Tensor | None = None,
         bias: Tensor | None = None, eps: float = 1e-6, onward: Pad | None = None, **control: object) -> tuple[Tensor, ...]:
    """Kernel 2: (y,), this rank's rows of the sum; with a weight, (h, y, rstd, mean) of sum + residual, mean unwritten for RMSNorm.

    rows, N, dtype, gemm: of the push() before. onward: the pad of an all-gather to whose coming call y is sent (`pushed=True`)."""
    t = _tiles(rows, pad.world, dtype, gemm)
    own = start_of(pad.rank + 1, rows, pad.world) - start_of(pad.rank, rows, pad.world)
    new = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device=pad.device)             # noqa: E731
    y, norm = new(own, N), 0 if weight is None else 1 if bias is None else 2
    h, rstd, mean = (new(own, N), new(own, dtype=torch.float32), new(own, dtype=torch.float32)) if norm else (y, y, y)
    block = min(triton.next_power_of_2(N), 16384 if norm else 4096)
    if block < N and norm:
        raise ValueError(f"{pad.op}: rows must have at most 16384 elements, got {N}; use rs_residual_norm_ref")
    # num_warps of a plain sum: 4, with 32 elements a thread; of 8 ptxas makes 32 registers and spills
    per = 4 if t.BM % 4 == 0 else t.BM                                # rows a program takes after one look at the flags
    programs = programs_of(pad, count_blocks(rows, pad.world, t.BM) * (t.BM // per))
    to = onward or pad
    pad.agree(f"sum of {rows} x {N} {dtype}, norm {norm}, onward {onward is not None}, {programs} programs")
    if onward is not None:
        blocks = count_blocks(rows, pad.world, t.BM)
        onward.demand(pad.world * blocks * t.BM * N * dtype.itemsize, blocks)
        if onward.owed:
            raise ValueError(f"{pad.op}: the all-gather of the rows sent onward before must run first, got {onward.owed} not yet taken; "
                             "call it with pushed=True")
        onward.check()
        onward.owed, onward.fed_by = f"{rows} x {N} {dtype}", pad
    _take_kernel[(programs,)](
        y, y if residual is None else residual, y if weight is None else weight, y if bias is None else bias, h, rstd, mean, pad.peers,
        pad.local, pad.error, to.peers, to.local, pad.rank, pad.polls, pad.data, pad.nbytes, pad.flags, to.data, to.nbytes, to.flags,
        rows, N, triton.cdiv(N, t.BN) * t.BN, eps, world=pad.world, OP=OPS.index(pad.op), NORM=norm, PUSH=onward is not None, BM=t.BM,
        ROWS=per, BLOCK=block, num_warps=row_warps(block) if norm else 4, launch_cooperative_grid=pad.share == 1,
        **{**_CONTROL, "ACQUIRE": "acquire", **control})
    if INTERPRET:
        pad.check()
    return (h, y, rstd, mean) if norm else (y,)
