"""dispatch and combine on a pad: a rank leaves what others may want in its own buffer, and fetches what it wants from theirs

Shapes    dispatch: x [T, H] -> rows [R, H]    combine: y [R, H], residual [T, H] -> o [T, H]    maps and orders: DispatchPlan (dispatch.py)
Protocol  fetch of protocol.py, two kernels. The first copies x, or y behind its row_of_slot, into the rank's own buffer; the last of its
          programs signals all. The second waits for all ranks, then reads where things lie, own and next neighbours' first
Bytes     dispatch: T H b copied, each token read once by every rank that has an expert of it, R H b written. combine: R H b copied,
          a token's K rows read in their own type: fewer bytes than fp32 sums a rank, as long as K < 2 W. Pad: 2 T H b; 2 (R H b + 4 W T K)
Numerics  dispatch bit-exact; combine over k in order, then the residual, in fp32, rounded once: as one rank sums. Bitwise repeatable
Source    reads in place of DeepEP's writes (whose buffers hold W times the tokens); the protocol is this package's
"""
import torch
from torch import Tensor

from ..dispatch import INTERPRET, row_warps, tl, triton
from .pad import OPS, Pad
from .signals import before, buffer_of, cells, finish, flag_word, going, last, next_epoch, signal_all, wait
from .tile import programs_of

__all__ = ["combine", "dispatch", "needs"]

# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _copy(source, target, n, go, COPY: tl.constexpr):
    for at in range(tl.program_id(0), tl.where(go, tl.cdiv(n, COPY), 0), tl.num_programs(0)):
        offs = tl.full([], at, tl.int64) * COPY + tl.arange(0, COPY)
        tl.store(target + offs, tl.load(source + offs, mask=offs < n), mask=offs < n)


@triton.jit(do_not_specialize=["rank", "T"])                          # no binary of its own for what differs among ranks and batches
def _stage_kernel(x_ptr, index_ptr, peers_ptr, local_ptr, rank, data, nbytes, flags, start, T, H, indices, world, COPY: tl.constexpr,
                  BUFFERS: tl.constexpr, BARRIER: tl.constexpr, RELEASE: tl.constexpr):
    """The index at the buffer's begin, the T rows of x from byte `start` on."""
    epoch, go = next_epoch(local_ptr), going(local_ptr)
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    _copy(x_ptr, cells(peers_ptr, rank, buffer + start, x_ptr.dtype.element_ty), tl.full([], T, tl.int64) * H, go, COPY)
    _copy(index_ptr, cells(peers_ptr, rank, buffer, tl.int32), indices, go, COPY)
    if last(local_ptr, 0, tl.num_programs(0), BARRIER):
        signal_all(peers_ptr, rank, flag_word(0, rank, 0, world, flags), epoch, going(local_ptr), world, BARRIER, RELEASE)


@triton.jit
def _all_came(peers_ptr, local_ptr, error_ptr, rank, epoch, limit, flags, world, OP: tl.constexpr, ACQUIRE: tl.constexpr):
    ok = epoch == epoch
    for i in range(world):
        s = before(rank, i, world)
        ok = ok & wait(peers_ptr, local_ptr, error_ptr, rank, s, flag_word(0, s, 0, world, flags), epoch, limit, OP, ACQUIRE)
    return ok


@triton.jit(do_not_specialize=["rank", "R"])
def _rows_kernel(y_ptr, row_ptr, slot_ptr, peers_ptr, local_ptr, error_ptr, rank, limit, data, nbytes, flags, most, K, H, R, world,
                 OP: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, BUFFERS: tl.constexpr, ACQUIRE: tl.constexpr):
    """A token is read once, however many of its experts are here."""
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    epoch = next_epoch(local_ptr)
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    ok = _all_came(peers_ptr, local_ptr, error_ptr, rank, epoch, limit, flags, world, OP, ACQUIRE)
    width, ks = tl.where(ok, H, 0), tl.arange(0, SLOTS)
    for at in range(tl.program_id(0), world * most, tl.num_programs(0)):
        s, token = before(rank, at // most, world), tl.full([], at % most, tl.int64)
        rows = row_ptr + (s * most + token) * K
        if tl.max(tl.load(rows + ks, mask=ks < K, other=-1), axis=0) >= 0:
            x = cells(peers_ptr, s, buffer, DTYPE) + token * H
            for first in range(0, H, BLOCK):
                offs = first + tl.arange(0, BLOCK)
                value = tl.load(x + offs, mask=offs < width, other=0.0).to(tl.float32)
                value = tl.where(ok, value, float("nan")).to(DTYPE)
                for k in range(K):
                    r = tl.load(rows + k).to(tl.int64)
                    if r >= 0:
                        tl.store(y_ptr + r * H + offs, value, mask=offs < H)
    for at in range(tl.program_id(0), R, tl.num_programs(0)):
        if tl.load(slot_ptr + at) < 0:
            for first in range(0, H, BLOCK):
                offs = first + tl.arange(0, BLOCK)
                tl.store(y_ptr + tl.full([], at, tl.int64) * H + offs, tl.zeros([BLOCK], dtype=DTYPE), mask=offs < H)
    finish(local_ptr, epoch)


@triton.jit(do_not_specialize=["rank", "T"])
def _sum_kernel(o_ptr, res_ptr, ids_ptr, peers_ptr, local_ptr, error_ptr, rank, limit, data, nbytes, flags, start, T, most, K, H, per,
                world, OP: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, BUFFERS: tl.constexpr, ACQUIRE: tl.constexpr):
    """per: experts of a rank. A slot's row stands in the index of the rank that has its expert, -1 where it was dropped."""
    DTYPE: tl.constexpr = o_ptr.dtype.element_ty
    epoch = next_epoch(local_ptr)
    buffer = data + buffer_of(epoch, BUFFERS).to(tl.int64) * nbytes
    ok = _all_came(peers_ptr, local_ptr, error_ptr, rank, epoch, limit, flags, world, OP, ACQUIRE)
    width = tl.where(ok, H, 0)
    for at in range(tl.program_id(0), T, tl.num_programs(0)):
        token = tl.full([], at, tl.int64)
        slot = (rank * most + token) * K
        for first in range(0, H, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            acc = tl.zeros([BLOCK], dtype=tl.float32)
            for k in range(K):
                e = tl.load(ids_ptr + slot + k)
                there = (e >= 0) & (e < per * world) & ok
                owner = tl.where(there, e // per, 0)
                r = tl.load(cells(peers_ptr, owner, buffer, tl.int32) + slot + k, mask=there, other=-1).to(tl.int64)
                y = cells(peers_ptr, owner, buffer + start, DTYPE) + r * H
                acc += tl.load(y + offs, mask=offs < tl.where(r >= 0, width, 0), other=0.0).to(tl.float32)
            if RESIDUAL:
                acc += tl.load(res_ptr + token * H + offs, mask=offs < H, other=0.0).to(tl.float32)
            tl.store(o_ptr + token * H + offs, tl.where(ok, acc, float("nan")).to(DTYPE), mask=offs < H)
    finish(local_ptr, epoch)


# ---- launch ---------------------------------------------------------------------------------------------------

_CONTROL = {"BUFFERS": 2, "BARRIER": True, "RELEASE": "release", "ACQUIRE": "acquire"}


def needs(rows: int, H: int, dtype: torch.dtype, indices: int = 0) -> tuple[int, int]:
    """(bytes of a buffer, flags a source) of a call in which no rank leaves more than `rows` rows, behind `indices` indices."""
    return _start(indices) + rows * H * dtype.itemsize, 1


def _start(indices: int) -> int:
    return -(-4 * indices // 256) * 256


def _only(control: dict[str, object], *names: str) -> dict[str, object]:
    return {name: {**_CONTROL, **control}[name] for name in names}


def _stage(pad: Pad, x: Tensor, index: Tensor, indices: int, **control: object) -> None:
    copy = 256 if INTERPRET else 8192
    programs = programs_of(pad, triton.cdiv(max(x.numel(), indices), copy), each=2)
    _stage_kernel[(programs,)](x, index, pad.peers, pad.local, pad.rank, pad.data, pad.nbytes, pad.flags, _start(indices), *x.shape,
                               indices, world=pad.world, COPY=copy, num_warps=8, **_only(control, "BUFFERS", "BARRIER", "RELEASE"))


def dispatch(pad: Pad, x: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, most: int, **control: object) -> Tensor:
    """The rows of this rank's experts: x [T, H] contiguous; row_of_slot [W * most, K] of all ranks' tokens, slot_of_row [R]; most > 0."""
    pad.demand(*needs(most, x.shape[1], x.dtype))
    pad.agree(f"{most} tokens of {x.shape[1]} {x.dtype}, {row_of_slot.shape[1]} slots")
    _stage(pad, x, row_of_slot, 0, **control)
    return _rows(pad, x.new_empty(len(slot_of_row), x.shape[1]), row_of_slot, slot_of_row, most, **control)


def _shape(pad: Pad, rows: int, H: int) -> tuple[int, int, int]:
    """(programs, BLOCK, num_warps): 512 threads an SM, 128 registers for each, to have 16 KB of 16-bit rows on their way to an SM."""
    block = min(4096, triton.next_power_of_2(H))
    return programs_of(pad, rows, each=max(1, 16 // row_warps(block))), block, row_warps(block)


def _rows(pad: Pad, y: Tensor, row_of_slot: Tensor, slot_of_row: Tensor, most: int, **control: object) -> Tensor:
    (R, H), K = y.shape, row_of_slot.shape[1]
    programs, block, warps = _shape(pad, pad.world * most, H)
    _rows_kernel[(programs,)](
        y, row_of_slot, slot_of_row, pad.peers, pad.local, pad.error, pad.rank, pad.polls, pad.data, pad.nbytes, pad.flags, most, K, H, R,
        world=pad.world, OP=OPS.index(pad.op), SLOTS=triton.next_power_of_2(max(K, 1)), BLOCK=block, num_warps=warps,
        launch_cooperative_grid=pad.share == 1, **_only(control, "BUFFERS", "ACQUIRE"))
    if INTERPRET:
        pad.check()
    return y


def combine(pad: Pad, y: Tensor, residual: Tensor | None, ids: Tensor, row_of_slot: Tensor, tokens: int, experts: int,
            **control: object) -> Tensor:
    """The sums of this rank's `tokens` tokens: y [R, H] contiguous; ids and row_of_slot [W * most, K] of all ranks' tokens, most > 0."""
    indices = row_of_slot.numel()
    pad.demand(*needs(len(y), y.shape[1], y.dtype, indices))
    pad.agree(f"{list(ids.shape)} slots of {y.shape[1]} {y.dtype}, {experts} experts")
    _stage(pad, y, row_of_slot, indices, **control)
    return _sums(pad, y.new_empty(tokens, y.shape[1]), residual, ids, experts, **control)


def _sums(pad: Pad, o: Tensor, residual: Tensor | None, ids: Tensor, experts: int, **control: object) -> Tensor:
    (T, H), K = o.shape, ids.shape[1]
    programs, block, warps = _shape(pad, T, H)
    _sum_kernel[(programs,)](
        o, o if residual is None else residual, ids, pad.peers, pad.local, pad.error, pad.rank, pad.polls, pad.data, pad.nbytes, pad.flags,
        _start(ids.numel()), T, len(ids) // pad.world, K, H, experts // pad.world, world=pad.world, OP=OPS.index(pad.op),
        RESIDUAL=residual is not None, BLOCK=block, num_warps=warps, launch_cooperative_grid=pad.share == 1,
        **_only(control, "BUFFERS", "ACQUIRE"))
    if INTERPRET:
        pad.check()
    return o
