"""unpermute: o[t] = sum_k p[t, k] * y[row_of_slot[t, k]] + shared[t] + residual[t]: experts' rows back to their tokens

Shapes    y, dy [R, H]    o, do, residual, shared [T, H]    probs, dprobs [T, K] (1 where not given)
Backward  dy[row(t, k)] = p[t, k] * do[t], rows of no slot 0;  dprobs[t, k] = sum_h do[t] * y[row(t, k)];  dresidual = dshared = do
Bytes     fwd (1 + K + addends) T * H * itemsize + 8N    bwd (1 + 2K) T * H * itemsize + padding rows + 12N, (1 + K) without probs
FLOPs     fwd 2TKH   bwd 3TKH  -> bandwidth-bound
Numerics  fp32 (fp64 for fp64), in the order of k, then shared, then residual, one rounding; no atomics. A token's sum does not
          depend on the other tokens. Dropped slots are left out, their probs get 0; padding rows are never read.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton
from .permute import ROWS, blocks, check_out, check_probs, unroll, zero_pads
from .route_plan import RoutePlan

# ---- reference ------------------------------------------------------------------------------------------------


def unpermute_ref(y: Tensor, plan: RoutePlan, probs: Tensor | None = None, residual: Tensor | None = None,
                  shared: Tensor | None = None) -> Tensor:
    acc = torch.float64 if y.dtype == torch.float64 else torch.float32
    row, drop = plan.row_of_slot, plan.row_of_slot < 0                # [T, K]
    pad = torch.cat([y, y.new_zeros(1, y.shape[1])])                  # [R+1, H], the last row for dropped slots
    terms = pad[torch.where(drop, y.shape[0], row).long()].to(acc)    # [T, K, H]
    o = (terms if probs is None else terms * probs.to(acc).masked_fill(drop, 0)[..., None]).sum(1)
    for addend in (shared, residual):
        o = o if addend is None else o + addend.to(acc)
    return o.to(y.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_kernel(y_ptr, p_ptr, res_ptr, sh_ptr, row_ptr, o_ptr, H, K: tl.constexpr, U: tl.constexpr,
                PROBS: tl.constexpr, RES: tl.constexpr, SHARED: tl.constexpr, BLOCK_H: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs < H
    acc = tl.zeros([BLOCK_H], dtype=tl.float32)
    for first in range(0, K, U):
        for k in tl.static_range(U):                                  # U rows in flight
            row = tl.load(row_ptr + t * K + first + k).to(tl.int64)
            y = tl.load(y_ptr + row * H + offs, mask=offs < tl.where(row >= 0, H, 0), other=0.0).to(tl.float32)
            if PROBS:
                y *= tl.where(row >= 0, tl.load(p_ptr + t * K + first + k), 0.0)   # a NaN there must not come through
            acc += y
    if SHARED:
        acc += tl.load(sh_ptr + t * H + offs, mask=mask, other=0.0).to(tl.float32)
    if RES:
        acc += tl.load(res_ptr + t * H + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + t * H + offs, acc, mask=mask)


@triton.jit
def _bwd_kernel(g_ptr, y_ptr, p_ptr, row_ptr, slot_ptr, dy_ptr, dp_ptr, T, R, H,
                K: tl.constexpr, U: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """A program has a whole token, so that dprobs needs no second pass: do is read once for each U of its rows."""
    pid = tl.program_id(0).to(tl.int64)
    if pid < T:
        for first in range(0, K, U):
            k = first + tl.arange(0, U)
            row = tl.load(row_ptr + pid * K + k, mask=k < K, other=-1).to(tl.int64)
            p = tl.load(p_ptr + pid * K + k, mask=row >= 0, other=0.0)
            acc = tl.zeros([U, BLOCK_H], dtype=tl.float32)
            for h in range(0, H, BLOCK_H):
                offs = h + tl.arange(0, BLOCK_H)
                g = tl.load(g_ptr + pid * H + offs, mask=offs < H, other=0.0).to(tl.float32)[None, :]
                at = row[:, None] * H + offs[None, :]
                mask = (row >= 0)[:, None] & (offs < H)[None, :]
                acc += g * tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(dy_ptr + at, p[:, None] * g, mask=mask)
            tl.store(dp_ptr + pid * K + k, tl.sum(acc, axis=1), mask=k < K)
    else:
        for h in range(0, H, BLOCK_H):
            zero_pads(dy_ptr, slot_ptr, (pid - T) * ROWS, R, h, H, ROWS, BLOCK_H)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch(y: Tensor, probs: Tensor | None, residual: Tensor | None, shared: Tensor | None, row: Tensor, slot: Tensor,
            o: Tensor) -> None:
    (T, K), H = row.shape, y.shape[1]
    if T and H:
        block, warps = blocks(H, y.element_size(), 4096)
        _fwd_kernel[(T, -(-H // block))](y, probs, residual, shared, row, o, H, K, unroll(K), probs is not None,
                                         residual is not None, shared is not None, block, num_warps=warps)


def _launch_fwd(y: Tensor, probs: Tensor | None, residual: Tensor | None, shared: Tensor | None, row: Tensor,
                slot: Tensor) -> Tensor:
    o = y.new_empty(row.shape[0], y.shape[1])
    _launch(y, probs, residual, shared, row, slot, o)
    return o


def _launch_bwd(g: Tensor, y: Tensor, probs: Tensor, row: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    (T, K), R, H = row.shape, slot.shape[0], y.shape[1]
    dy, dp = torch.empty_like(y), torch.zeros_like(probs) if not H else torch.empty_like(probs)
    if H and T + R:
        some = min(8, triton.next_power_of_2(max(K, 1)))
        block, _ = blocks(H, y.element_size(), max(2048, 4096 // some))
        _bwd_kernel[(T + -(-R // ROWS),)](g, y, probs, row, slot, dy, dp, T, R, H, K, some, ROWS, block, num_warps=4)
    return dy, dp


_ARGS = "Tensor y, Tensor? probs, Tensor? residual, Tensor? shared, Tensor row_of_slot, Tensor slot_of_row"
define(f"unpermute_fwd({_ARGS}) -> Tensor", _launch_fwd,
       lambda y, probs, residual, shared, row, slot: y.new_empty(row.shape[0], y.shape[1]))
define(f"unpermute_out({_ARGS}, Tensor(a!) out) -> ()", _launch, lambda *_: None)
define("unpermute_bwd(Tensor g, Tensor y, Tensor probs, Tensor row_of_slot, Tensor slot_of_row) -> (Tensor, Tensor)", _launch_bwd,
       lambda g, y, probs, row, slot: (torch.empty_like(y), torch.empty_like(probs)))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    y, probs, _, _, row, slot = inputs
    ctx.save_for_backward(*((row, slot) if probs is None else (row, slot, y, probs)))


def _backward(ctx, do):
    row, slot, *rest = ctx.saved_tensors
    want_y, want_p, want_res, want_sh = ctx.needs_input_grad[:4]
    dy = dp = None
    if rest and (want_y or want_p):
        dy, dp = torch.ops.interlace.unpermute_bwd(do.contiguous(), *rest, row, slot)
    elif want_y:
        dy = torch.ops.interlace.permute_fwd(do.contiguous(), None, row, slot)[0]
    return dy if want_y else None, dp if want_p else None, do if want_res else None, do if want_sh else None, None, None


_unpermute = differentiable("unpermute_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def unpermute(y: Tensor, plan: RoutePlan, probs: Tensor | None = None, residual: Tensor | None = None,
              shared: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Sum each token's rows, weighted by probs, with the shared expert's output and the residual in the same pass.

    Args: y [R, H] rows in the plan's order; probs [T, K]; residual, shared [T, H] of y's dtype; out [T, H] to write into (no
      gradient then). Returns: o [T, H]. Raises: ValueError where shapes and plan disagree.
    """
    T = plan.row_of_slot.shape[0]
    if y.ndim != 2 or y.shape[0] != plan.rows:
        raise ValueError(f"unpermute: y must be [R, H] with the plan's R = {plan.rows} rows, got {list(y.shape)}")
    check_probs("unpermute", probs, plan)
    for name, t in (("residual", residual), ("shared", shared)):
        if t is not None and (t.shape != (T, y.shape[1]) or t.dtype != y.dtype):
            raise ValueError(f"unpermute: {name} must be {[T, y.shape[1]]} {y.dtype} like y, got {list(t.shape)} {t.dtype}")
    row, slot = plan.row_of_slot, plan.slot_of_row
    if out is not None:
        check_out("unpermute", out, y, T, (y, probs, residual, shared))
    if not fused(*(t for t in (y, row, slot, residual, shared) if t is not None)):
        o = unpermute_ref(y, plan, probs, residual, shared)
        return o if out is None else out.copy_(o)
    acc = torch.float64 if y.dtype == torch.float64 else torch.float32
    if probs is not None:
        probs = probs.to(acc).contiguous()
    residual, shared = (None if t is None else t.contiguous() for t in (residual, shared))
    if out is None:
        return _unpermute(y.contiguous(), probs, residual, shared, row, slot)
    torch.ops.interlace.unpermute_out(y.contiguous(), probs, residual, shared, row, slot, out)
    return out
