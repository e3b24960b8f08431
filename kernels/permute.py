"""permute: y[row_of_slot[t, k]] = x[t], every other row zero: tokens copied into the rows of their experts (`route_plan`)

Shapes    x, dx [T, H]    y, dy [R, H]    probs, dprobs [T, K]    permuted probs [R] (0 on padding); y is not scaled by them
Backward  dx[t] = sum_k dy[row(t, k)] in fp32, in the order of k, one rounding;  dprobs[t, k] = dpermuted[row(t, k)]
Bytes     fwd and bwd (1 + K) T * H * itemsize + padding rows + 8N: a token's row is read once and stored K times
FLOPs     fwd 0   bwd TKH  -> bandwidth-bound
Numerics  forward bit-exact for every dtype; dropped slots and padding rows are never read, so a NaN there stays there.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton
from .route_plan import RoutePlan

# ---- reference ------------------------------------------------------------------------------------------------


def permute_ref(x: Tensor, plan: RoutePlan, probs: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    slot, K = plan.slot_of_row, max(plan.row_of_slot.shape[1], 1)     # [R]
    pad = torch.cat([x, x.new_zeros(1, x.shape[1])])                  # [T+1, H], the last row for padding
    y = pad[torch.where(slot < 0, x.shape[0], slot // K).long()]
    if probs is None:
        return y
    return y, torch.cat([probs.flatten(), probs.new_zeros(1)])[torch.where(slot < 0, probs.numel(), slot).long()]


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def zero_pads(y_ptr, slot_ptr, first, R, h, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Zero columns h .. h + BLOCK_H - 1 of those of rows first .. first + ROWS - 1 that no slot takes."""
    offs = h + tl.arange(0, BLOCK_H)
    for row in range(first, tl.minimum(first + ROWS, R)):
        if tl.load(slot_ptr + row) < 0:
            tl.store(y_ptr + row * H + offs, tl.zeros([BLOCK_H], dtype=y_ptr.dtype.element_ty), mask=offs < H)


@triton.jit
def _kernel(x_ptr, p_ptr, row_ptr, slot_ptr, y_ptr, moved_ptr, T, R, H,
            K: tl.constexpr, U: tl.constexpr, PROBS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    if pid < T:
        offs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = offs < H
        x = tl.load(x_ptr + pid * H + offs, mask=mask, other=0.0)
        for first in range(0, K, U):
            for k in tl.static_range(U):
                row = tl.load(row_ptr + pid * K + first + k).to(tl.int64)
                if row >= 0:
                    tl.store(y_ptr + row * H + offs, x, mask=mask)
                    if PROBS and tl.program_id(1) == 0:
                        tl.store(moved_ptr + row, tl.load(p_ptr + pid * K + first + k))
    else:
        first_row = (pid - T) * ROWS
        zero_pads(y_ptr, slot_ptr, first_row, R, tl.program_id(1) * BLOCK_H, H, ROWS, BLOCK_H)
        if PROBS and tl.program_id(1) == 0:
            r = first_row + tl.arange(0, ROWS)
            pad = tl.load(slot_ptr + r, mask=r < R, other=0) < 0
            tl.store(moved_ptr + r, tl.zeros([ROWS], dtype=moved_ptr.dtype.element_ty), mask=pad)


# ---- ops ------------------------------------------------------------------------------------------------------

ROWS = 32                                                             # rows of a program that zeroes padding


def blocks(H: int, itemsize: int, most: int = 8192) -> tuple[int, int]:
    """(BLOCK_H, num_warps): 16 bytes a thread and access, no more than `most` bytes of a row a program."""
    block = min(triton.next_power_of_2(H), most // itemsize)
    return block, max(1, min(8, block * itemsize // 1024))


def unroll(K: int) -> int:
    """How many of a token's K rows are in flight: a divisor of K, so that none needs a mask."""
    return max(u for u in range(1, 9) if not K % u)


def _launch(x: Tensor, probs: Tensor | None, row: Tensor, slot: Tensor, y: Tensor, moved: Tensor | None) -> None:
    (T, K), R, H = row.shape, slot.shape[0], x.shape[1]
    if R and (H or moved is not None):
        block, warps = blocks(max(H, 1), x.element_size())
        _kernel[(T + -(-R // ROWS), max(1, -(-H // block)))](x, probs, row, slot, y, moved, T, R, H, K, unroll(K),
                                                     probs is not None, ROWS, block, num_warps=warps)


def _launch_fwd(x: Tensor, probs: Tensor | None, row: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    y, moved = _fake_fwd(x, probs, row, slot)
    _launch(x, probs, row, slot, y, moved)
    return y, moved


def _fake_fwd(x: Tensor, probs: Tensor | None, row: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    R = slot.shape[0]
    return x.new_empty(R, x.shape[1]), x.new_empty(0) if probs is None else probs.new_empty(R)


define("permute_fwd(Tensor x, Tensor? probs, Tensor row_of_slot, Tensor slot_of_row) -> (Tensor, Tensor)", _launch_fwd, _fake_fwd)
define("permute_out(Tensor x, Tensor row_of_slot, Tensor slot_of_row, Tensor(a!) out) -> ()",
       lambda x, row, slot, out: _launch(x, None, row, slot, out, None), lambda x, row, slot, out: None)

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dmoved):
    row, slot = ctx.saved_tensors
    dx = dprobs = None
    if dy is not None and ctx.needs_input_grad[0]:
        dx = torch.ops.interlace.unpermute_fwd(dy.contiguous(), None, None, None, row, slot)
    if dmoved is not None and ctx.needs_input_grad[1]:
        dprobs = slots_of(dmoved, row)
    return dx, dprobs, None, None


def slots_of(moved: Tensor, row: Tensor) -> Tensor:
    """moved [R] back in slots [T, K], 0 where dropped."""
    if not moved.numel():
        return moved.new_zeros(row.shape)
    return moved.index_select(0, row.flatten().clamp(min=0)).view(row.shape).masked_fill(row < 0, 0)


_permute = differentiable("permute_fwd", _setup, _backward, keep=2, linear=True)

# ---- public ---------------------------------------------------------------------------------------------------


def check_out(op: str, out: Tensor, like: Tensor, rows: int, inputs: tuple[Tensor | None, ...]) -> None:
    shape = [rows, like.shape[1]]
    if list(out.shape) != shape or out.dtype != like.dtype or out.device != like.device or not out.is_contiguous():
        raise ValueError(f"{op}: out must be a contiguous {shape} {like.dtype} on {like.device}, "
                         f"got {list(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, out)):
        raise ValueError(f"{op}: out must be None where a gradient is wanted, got a tensor; use torch.no_grad()")


def check_probs(op: str, probs: Tensor | None, plan: RoutePlan) -> None:
    if probs is not None and (probs.shape != plan.row_of_slot.shape or not probs.is_floating_point()):
        raise ValueError(f"{op}: probs must be floating {list(plan.row_of_slot.shape)}, one for each slot of the plan, "
                         f"got {probs.dtype} {list(probs.shape)}")


def permute(x: Tensor, plan: RoutePlan, probs: Tensor | None = None, out: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Copy each token into the rows its experts have for it; rows of no slot become zeros.

    Args: x [T, H]; plan: of `route_plan` for these T tokens; probs [T, K] to move along; out [R, H] to write y into
      (no gradient then). Returns: y [R, H], or (y, permuted probs [R]). Raises: ValueError where shapes and plan disagree.
    """
    if x.ndim != 2 or x.shape[0] != plan.row_of_slot.shape[0]:
        raise ValueError(f"permute: x must be [T, H] with the plan's T = {plan.row_of_slot.shape[0]}, got {list(x.shape)}")
    check_probs("permute", probs, plan)
    row, slot = plan.row_of_slot, plan.slot_of_row
    if out is not None:
        check_out("permute", out, x, plan.rows, (x, probs))
        if not fused(x, row, slot):
            y = permute_ref(x, plan, probs)
            return out.copy_(y) if isinstance(y, Tensor) else (out.copy_(y[0]), y[1])
        torch.ops.interlace.permute_out(x.contiguous(), row, slot, out)
        return out if probs is None else (out, permute_ref(x[:, :0], plan, probs)[1])
    if not fused(*(t for t in (x, probs, row, slot) if t is not None)):
        return permute_ref(x, plan, probs)
    y, moved = _permute(x.contiguous(), None if probs is None else probs.contiguous(), row, slot)
    return y if probs is None else (y, moved)
