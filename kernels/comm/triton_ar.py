"""all_reduce and gemm_ar on a pad: one kernel, y = sum over ranks of x, or of x @ w.T, in tiles that are sent as they are done

Shapes    x [M, K], w [N, K] -> y [M, N], equal on all ranks; all_reduce: x and y [n], any shape
Protocol  one_shot and two_shot of protocol.py. A program sends its tile, and while that travels computes the next one; then it sums
          the one before. It waits for nobody but the same program of other ranks and itself: no SM is set aside, no order of
          dispatch is needed, and the interpreter can run it.
Bytes     sent per rank: one-shot (W-1) M N b; two-shot 2 M N b (W-1)/W, but two waits. Pad: 2 W M N b; two-shot 4 M N b
FLOPs     2 M N K
Numerics  a part is rounded to the type once; parts are summed in rank order in fp32, one rounding: bitwise equal on every rank
Source    one- and two-shot as in the custom all-reduces of vLLM and TensorRT-LLM; the protocol is this package's
"""
import torch
from torch import Tensor

from ..dispatch import INTERPRET, tl, triton
from .pad import OPS, Pad
from .signals import (
    buffer_of,
    cells,
    finish,
    flag_word,
    going,
    next_epoch,
    owned_slot,
    owner_of,
    part_slot,
    peer_of,
    signal,
    signal_all,
    wait,
)
from .tile import Tiles, place_of, product, programs_of, tiles_of

__all__ = ["launch", "needs"]

# ---- kernel ---------------------------------------------------------------------------------------------------


@triton.jit
def _sum_parts(peers_ptr, local_ptr, error_ptr, rank, epoch, limit, flags, buffer, item, items, rows, end, DTYPE: tl.constexpr,
               OP: tl.constexpr, world, TWO_SHOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACQUIRE: tl.constexpr):
    """Wait for every rank's part of an item, sum them in rank order. NaN where one did not come."""
    ok = epoch == epoch
    for s in range(world):
        ok = ok & wait(peers_ptr, local_ptr, error_ptr, rank, s, flag_word(0, s, item, world, flags), epoch, limit, OP, ACQUIRE)
    offs = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    mask = (rows < tl.where(ok, end, 0))[:, None] & (offs >= 0)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for s in range(world):                                            # unrolled, eight parts would be held at once and spill
        slot = owned_slot(s, item, items, world) if TWO_SHOT else part_slot(s, item, items)
        part = cells(peers_ptr, rank, buffer, DTYPE) + slot.to(tl.int64) * (BM * BN)
        acc += tl.load(part + offs, mask=mask, other=0.0).to(tl.float32)
    return tl.where(ok, acc, float("nan"))


@triton.jit(do_not_specialize=["rank"])                               # one binary for the ranks that share a GPU
def _kernel(x_ptr, w_ptr, y_ptr, peers_ptr, local_ptr, error_ptr, rank, limit, data, nbytes, flags, M, N, K, numel, swn, swk,
            world, OP: tl.constexpr, GEMM: tl.constexpr, TWO_SHOT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BK: tl.constexpr, INTERP: tl.constexpr, BUFFERS: tl.constexpr, BARRIER: tl.constexpr, RELEASE: tl.constexpr,
            ACQUIRE: tl.constexpr):
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    pid, programs, epoch = tl.program_id(0), tl.num_programs(0), next_epoch(local_ptr)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    items = tiles_m * tiles_n
    i, j = tl.arange(0, BM), tl.arange(0, BN)
    offs = i[:, None] * BN + j[None, :]                               # of a cell: whole rows, so that stores stay 16 bytes wide
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    sums = buffer + world * ((items + world - 1) // world).to(tl.int64) * (BM * BN * DTYPE.primitive_bitwidth // 8)
    LAG: tl.constexpr = 2 if TWO_SHOT else 1
    go = going(local_ptr)
    for k in range(tl.cdiv(items - pid, programs) + LAG):
        item = pid + k * programs
        if item < items:
            m, n = place_of(item, tiles_m, tiles_n, 8)
            rows, cols = m * BM + i.to(tl.int64), n * BN + j.to(tl.int64)
            sent = (rows < tl.where(go, M, 0))[:, None] & (j >= 0)[None, :]
            if GEMM:
                value = product(x_ptr, w_ptr, m.to(tl.int64) * BM, n.to(tl.int64) * BN, M, N, K, swn, swk, BM, BN, BK,
                                INTERP).to(DTYPE)
            else:
                at = rows[:, None] * N + cols[None, :]
                value = tl.load(x_ptr + at, mask=at < numel, other=0.0)
            word = flag_word(0, rank, item, world, flags)
            if TWO_SHOT:
                owner = owner_of(item, world)
                slot = owned_slot(rank, item, items, world).to(tl.int64)
                tl.store(cells(peers_ptr, owner, buffer, DTYPE) + slot * (BM * BN) + offs, value, mask=sent)
                signal(peers_ptr, owner, word, epoch, go, BARRIER, RELEASE)
            else:
                slot = part_slot(rank, item, items).to(tl.int64)
                for p in range(world):
                    tl.store(cells(peers_ptr, peer_of(rank, p, world), buffer, DTYPE) + slot * (BM * BN) + offs, value, mask=sent)
                signal_all(peers_ptr, rank, word, epoch, go, world, BARRIER, RELEASE)
        item -= programs
        if (k >= 1) & (item < items) & ((not TWO_SHOT) | (owner_of(item, world) == rank)):
            m, n = place_of(item, tiles_m, tiles_n, 8)
            rows, cols = m * BM + i.to(tl.int64), n * BN + j.to(tl.int64)
            full = (rows < M)[:, None] & (j >= 0)[None, :]
            total = _sum_parts(peers_ptr, local_ptr, error_ptr, rank, epoch, limit, flags, buffer, item, items, rows, M, DTYPE, OP,
                               world, TWO_SHOT, BM, BN, ACQUIRE).to(DTYPE)
            go = going(local_ptr)
            if TWO_SHOT:
                sent = (rows < tl.where(go, M, 0))[:, None] & (j >= 0)[None, :]
                for p in range(world):
                    there = cells(peers_ptr, peer_of(rank, p, world), sums, DTYPE)
                    tl.store(there + item.to(tl.int64) * (BM * BN) + offs, total, mask=sent)
                signal_all(peers_ptr, rank, flag_word(1, rank, item, world, flags), epoch, go, world, BARRIER, RELEASE)
            else:
                at = rows[:, None] * N + cols[None, :]
                tl.store(y_ptr + at, total, mask=full & (cols < N)[None, :] & (at < numel))
        if TWO_SHOT:
            item -= programs
            if k >= 2:
                m, n = place_of(item, tiles_m, tiles_n, 8)
                rows, cols = m * BM + i.to(tl.int64), n * BN + j.to(tl.int64)
                full = (rows < M)[:, None] & (j >= 0)[None, :]
                owner = owner_of(item, world)
                ok = wait(peers_ptr, local_ptr, error_ptr, rank, owner, flag_word(1, owner, item, world, flags), epoch, limit, OP, ACQUIRE)
                go = going(local_ptr)
                total = tl.load(cells(peers_ptr, rank, sums, DTYPE) + item.to(tl.int64) * (BM * BN) + offs,
                                mask=(rows < tl.where(ok, M, 0))[:, None] & (j >= 0)[None, :], other=float("nan"))
                at = rows[:, None] * N + cols[None, :]
                tl.store(y_ptr + at, total, mask=full & (cols < N)[None, :] & (at < numel))
    finish(local_ptr, epoch)


# ---- launch ---------------------------------------------------------------------------------------------------

_COPY = Tiles(16, 512, 16, 8, 1)                                      # 8192 elements: 64 bytes a thread in bf16


def _cut(x: Tensor, w: Tensor | None) -> tuple[int, int, int, Tiles]:
    """M, N, K and tiles. all_reduce: x as rows of one tile's width."""
    if w is None:
        tiles = Tiles(4, 32, 16, 4, 1) if INTERPRET else _COPY
        return -(-x.numel() // tiles.BN), tiles.BN, 0, tiles
    return x.shape[0], w.shape[0], x.shape[1], tiles_of(x.shape[0], x.dtype)


def needs(x: Tensor, w: Tensor | None, world: int, two_shot: bool, tiles: Tiles | None = None) -> tuple[int, int]:
    """(bytes of a buffer, flags a source) of a call."""
    M, N, _, t = _cut(x, w)
    t = tiles or t
    items = triton.cdiv(M, t.BM) * triton.cdiv(N, t.BN)
    cells_ = world * -(-items // world) + items if two_shot else world * items
    return cells_ * t.BM * t.BN * x.element_size(), items


def launch(pad: Pad, x: Tensor, w: Tensor | None = None, *, two_shot: bool = False, tiles: Tiles | None = None,
           **control: object) -> Tensor:
    """y = all_reduce(x), or of x [M, K] @ w.T, w [N, K] of any strides. x contiguous, on the pad's device, M N > 0."""
    pad.demand(*needs(x, w, pad.world, two_shot, tiles))
    M, N, K, cut = _cut(x, w)
    cut = tiles or cut
    y = torch.empty_like(x) if w is None else x.new_empty(M, N)
    programs = programs_of(pad, triton.cdiv(M, cut.BM) * triton.cdiv(N, cut.BN))
    pad.agree(f"{list(x.shape)} by {None if w is None else list(w.shape)} {x.dtype}, two_shot {two_shot}, {cut}, {programs} programs")
    swn, swk = (0, 0) if w is None else w.stride()
    _kernel[(programs,)](x, x if w is None else w, y, pad.peers, pad.local, pad.error, pad.rank, pad.polls, pad.data, pad.nbytes, pad.flags,
                         M, N, K, y.numel(), swn, swk, world=pad.world, OP=OPS.index(pad.op), GEMM=w is not None, TWO_SHOT=two_shot,
                         INTERP=INTERPRET, launch_cooperative_grid=pad.share == 1, **cut.blocks(),
                         **{"BUFFERS": 2, "BARRIER": True, "RELEASE": "release", "ACQUIRE": "acquire", **control})
    if INTERPRET:
        pad.check()
    return y
