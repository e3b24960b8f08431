"""grouped_gemm: y[r] = x[r] @ w[e].T for the rows offsets[e] <= r < offsets[e+1] of each expert e

Shapes    x [R, K], or [T, K] with gather (row r is then token slot_of_row[r] // topk)    w, dw [E, N, K]    y, dy [R, N]
          offsets [E+1] int32 on the device, from 0 to at most R: made by `route_plan`, never read by the host
Backward  dx[r] = dy[r] @ w[e];  dw[e] = sum_r dy[r] (outer) x[r] over its rows, 0 for an expert without rows, or added to `main_grad`
          with gather: dx[t] = the sum of a token's rows in fp32, in the order of k (`unpermute`)
Bytes     fwd (R K + E N K + R N) * itemsize, with gather T K for R K; dx and dw alike. FLOPs 2 offsets[E] N K each -> compute-bound
Numerics  fp32 accumulation (fp64 for fp64, no tf32), one rounding, one order of summation: no split of a sum, no atomics.
          Rows from offsets[E] on are never read and come out zero; rows without a slot (-1) count as zeros, whatever x holds.
"""
from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .autocast import lowered
from .dispatch import INTERPRET, define, differentiable, fused, tl, triton
from .route_plan import RoutePlan

# ---- reference ------------------------------------------------------------------------------------------------


def _gathered(x: Tensor, slots: Tensor | None, topk: int) -> Tensor:
    if slots is None:
        return x
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[torch.where(slots < 0, x.shape[0], slots // topk).long()]


def grouped_gemm_ref(x: Tensor, w: Tensor, offsets: Tensor, gather: RoutePlan | None = None) -> Tensor:
    """`grouped_gemm` as a loop of matrix products; offsets are read by the host."""
    rows = x if gather is None else _gathered(x, gather.slot_of_row, gather.row_of_slot.shape[1])
    *_, end = at = offsets.tolist()
    y = [rows[a:b] @ w[e].t() for e, (a, b) in enumerate(pairwise(at))]
    return torch.cat([*y, x.new_zeros(rows.shape[0] - end, w.shape[1])])


def grouped_wgrad_ref(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    at = offsets.tolist()
    return torch.stack([dy[a:b].t() @ x[a:b] for a, b in pairwise(at)])


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _swizzle(tile, tall, across, GROUP: tl.constexpr):
    """(row, column) of a tile: columns of GROUP tiles in turn, so that what runs at one time shares rows and weights in L2."""
    group = tile // (GROUP * across)
    first = group * GROUP
    size = tl.minimum(tall - first, GROUP)
    place = tile - group * GROUP * across
    return first + place % size, place // size


@triton.jit
def _sources(slot_ptr, rows, keep, topk, GATHER: tl.constexpr):
    """Which rows of a side these are, and which of them are there."""
    if GATHER:
        slot = tl.load(slot_ptr + rows, mask=keep, other=-1)
        return (slot // topk).to(tl.int64), slot >= 0
    else:
        return rows.to(tl.int64), keep


@triton.jit
def _rows_kernel(x_ptr, w_ptr, offs_ptr, slot_ptr, p_ptr, y_ptr, a_ptr, R, E, D_IN, D_OUT, w_expert, w_in, w_out, topk,
                 GATHER: tl.constexpr, GATED: tl.constexpr, PROBS: tl.constexpr, UP: tl.constexpr, BINS: tl.constexpr, GROUP: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tiles of all experts, dealt to a fixed number of programs; what lies behind the last expert is one more, of zeros.

    GATED: a program has columns of the gate and the same ones of up, so that a = swiglu(y) * p is made where both are in registers."""
    e = tl.arange(0, BINS)
    start = tl.minimum(tl.load(offs_ptr + e, mask=e <= E, other=0), R)
    stop = tl.where(e == E, R, tl.minimum(tl.load(offs_ptr + e + 1, mask=e < E, other=0), R))
    across = tl.cdiv(D_OUT, BLOCK_N)
    upto = tl.cumsum(tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M) * across, 0)
    for tile in range(tl.program_id(0), tl.max(upto, 0), tl.num_programs(0)):
        expert = tl.sum((upto <= tile).to(tl.int32), 0)
        first = tl.minimum(tl.load(offs_ptr + expert), R)
        last = tl.where(expert < E, tl.minimum(tl.load(offs_ptr + tl.minimum(expert + 1, E)), R), R)
        m, n = _swizzle(tile - tl.max(tl.where(upto <= tile, upto, 0), 0), tl.cdiv(last - first, BLOCK_M), across, GROUP)
        rows = first + m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = rows < last
        source, there = _sources(slot_ptr, rows, rows < tl.where(expert < E, last, 0), topk, GATHER)
        x_at = x_ptr + source[:, None] * D_IN
        w_at = w_ptr + expert.to(tl.int64) * w_expert + cols[None, :].to(tl.int64) * w_out
        w_up_at = w_ptr + expert.to(tl.int64) * w_expert + (cols + D_OUT)[None, :].to(tl.int64) * w_out
        acc, acc_up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, tl.where(expert < E, D_IN, 0), BLOCK_K):
            k_at = k + tl.arange(0, BLOCK_K)
            inside = (k_at < D_IN)[:, None] & (cols < D_OUT)[None, :]
            a = tl.load(x_at + k_at[None, :], mask=there[:, None] & (k_at < D_IN)[None, :], other=0.0)
            b = tl.load(w_at + k_at[:, None].to(tl.int64) * w_in, mask=inside, other=0.0)
            if UP:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if GATED:
                b = tl.load(w_up_at + k_at[:, None].to(tl.int64) * w_in, mask=inside, other=0.0)
                acc_up = tl.dot(a, b.to(tl.float32) if UP else b, acc_up, input_precision="ieee")
        inside, at = keep[:, None] & (cols < D_OUT)[None, :], rows[:, None].to(tl.int64) * D_OUT
        if GATED:
            gate = acc.to(y_ptr.dtype.element_ty)
            up = acc_up.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + 2 * at + cols[None, :], gate, mask=inside)
            tl.store(y_ptr + 2 * at + D_OUT + cols[None, :], up, mask=inside)
            gate, up = gate.to(tl.float32), up.to(tl.float32)         # of what the backward will read
            acc = gate / (1.0 + tl.exp(-gate)) * up
            if PROBS:
                acc *= tl.load(p_ptr + rows, mask=keep, other=0.0)[:, None]
            tl.store(a_ptr + at + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(y_ptr + at + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _wgrad_kernel(g_ptr, x_ptr, offs_ptr, g_slot_ptr, x_slot_ptr, dw_ptr, R, N, K, topk, GATHER_G: tl.constexpr, GATHER_X: tl.constexpr,
                  ADD: tl.constexpr, UP: tl.constexpr, GROUP: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program has a tile of one expert's dw and runs through all of that expert's rows, in their order."""
    tall, across = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    expert = tl.program_id(0) // (tall * across)
    n, k = _swizzle(tl.program_id(0) - expert * tall * across, tall, across, GROUP)
    first = tl.minimum(tl.load(offs_ptr + expert), R)
    last = tl.minimum(tl.load(offs_ptr + expert + 1), R)
    n_at = n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_at = k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for r in range(first, last, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        g_row, g_there = _sources(g_slot_ptr, rows, rows < last, topk, GATHER_G)
        x_row, x_there = _sources(x_slot_ptr, rows, rows < last, topk, GATHER_X)
        g = tl.load(g_ptr + g_row[:, None] * N + n_at[None, :], mask=g_there[:, None] & (n_at < N)[None, :], other=0.0)
        x = tl.load(x_ptr + x_row[:, None] * K + k_at[None, :], mask=x_there[:, None] & (k_at < K)[None, :], other=0.0)
        if UP:
            g, x = g.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(tl.trans(g), x, acc, input_precision="ieee")
    at = dw_ptr + (expert.to(tl.int64) * N + n_at[:, None]) * K + k_at[None, :]
    mask = (n_at < N)[:, None] & (k_at < K)[None, :]
    if ADD:
        acc += tl.load(at, mask=mask, other=0.0)
    tl.store(at, acc.to(dw_ptr.dtype.element_ty), mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _tiles(tall: int, across: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of a product: one warpgroup for 64 rows, and the registers of 128 x 256 sums for two. fp32 has no tensor cores here."""
    if INTERPRET:
        return {"tall": 32, "across": 32, "deep": 32, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"tall": 64, "across": 64, "deep": 32, "num_warps": 4, "num_stages": 3}
    tall, across = (128 if tall > 64 else 64), min(256, max(64, triton.next_power_of_2(across)))
    return {"tall": tall, "across": across, "deep": 64, "num_warps": 8 if tall * across > 128 * 128 else 4, "num_stages": 3}


def _out(x: Tensor, w: Tensor, slots: Tensor | None, dgrad: bool) -> Tensor:
    return x.new_empty(x.shape[0] if slots is None else slots.shape[0], w.shape[2 if dgrad else 1])


def _launch(x: Tensor, w: Tensor, offsets: Tensor, slots: Tensor | None, row: Tensor | None, dgrad: bool,
            main_grad: Tensor | None = None) -> Tensor:
    y = _out(x, w, slots, dgrad)
    _launch_rows(x, w, offsets, slots, row, None, dgrad, y, None)
    return y


def _launch_swiglu(x: Tensor, w: Tensor, offsets: Tensor, slots: Tensor | None, row: Tensor | None,
                   p: Tensor | None) -> tuple[Tensor, Tensor]:
    z, a = _fake_swiglu(x, w, offsets, slots, row, p)
    _launch_rows(x, w, offsets, slots, row, p, False, z, a)
    return z, a


def _fake_swiglu(x: Tensor, w: Tensor, offsets: Tensor, slots: Tensor | None, row: Tensor | None,
                 p: Tensor | None) -> tuple[Tensor, Tensor]:
    z = _out(x, w, slots, False)
    return z, z.new_empty(z.shape[0], z.shape[1] // 2)


def _launch_rows(x: Tensor, w: Tensor, offsets: Tensor, slots: Tensor | None, row: Tensor | None, p: Tensor | None, dgrad: bool,
                 y: Tensor, a: Tensor | None) -> None:
    (E, N, K), (R, D_OUT), topk = w.shape, (y if a is None else a).shape, 1 if row is None else row.shape[1]
    if R and D_OUT:
        t = _tiles(-(-R // E), y.shape[1], x.dtype)
        across = t["across"] if a is None or INTERPRET else t["across"] // 2
        most = (-(-R // t["tall"]) + E) * -(-D_OUT // across)         # every expert may end in a part of a tile
        if x.is_cuda:
            most = min(most, torch.cuda.get_device_properties(x.device).multi_processor_count * (8 // t["num_warps"]))
        _rows_kernel[(min(most, 8) if INTERPRET else most,)](
            x, w, offsets, slots, p, y, a, R, E, x.shape[1], D_OUT, N * K, K if dgrad else 1, 1 if dgrad else K, topk,
            slots is not None, a is not None, p is not None, INTERPRET, triton.next_power_of_2(E + 1), 8, t["tall"], across, t["deep"],
            num_warps=t["num_warps"], num_stages=t["num_stages"])


def _launch_wgrad(g: Tensor, x: Tensor, offsets: Tensor, g_slots: Tensor | None, x_slots: Tensor | None, topk: int, dw: Tensor,
                  add: bool) -> None:
    E, N, K = dw.shape
    if dw.numel():
        t = _tiles(N, K, x.dtype)
        _wgrad_kernel[(E * -(-N // t["tall"]) * -(-K // t["across"]),)](
            g, x, offsets, g_slots, x_slots, dw, (g if g_slots is None else g_slots).shape[0], N, K, topk, g_slots is not None,
            x_slots is not None, add, INTERPRET, 8, t["tall"], t["across"], t["deep"], num_warps=t["num_warps"], num_stages=t["num_stages"])


def _new_wgrad(g: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1, g.shape[1], x.shape[1])


def _wgrad(g: Tensor, x: Tensor, offsets: Tensor, g_slots: Tensor | None, x_slots: Tensor | None, topk: int) -> Tensor:
    dw = _new_wgrad(g, x, offsets)
    _launch_wgrad(g, x, offsets, g_slots, x_slots, topk, dw, False)
    return dw


_ARGS = "Tensor g, Tensor x, Tensor offsets, Tensor? g_slots, Tensor? x_slots, int topk"
define("grouped_gemm(Tensor x, Tensor w, Tensor offsets, Tensor? slot_of_row, Tensor? row_of_slot, bool dgrad, Tensor? main_grad)"
       " -> Tensor", _launch, lambda x, w, offsets, slots, row, dgrad, main_grad: _out(x, w, slots, dgrad))
define("grouped_gemm_swiglu(Tensor x, Tensor w, Tensor offsets, Tensor? slot_of_row, Tensor? row_of_slot, Tensor? probs)"
       " -> (Tensor, Tensor)", _launch_swiglu, _fake_swiglu)
define(f"grouped_wgrad({_ARGS}) -> Tensor", _wgrad, lambda g, x, offsets, g_slots, x_slots, topk: _new_wgrad(g, x, offsets))
define(f"grouped_wgrad_add({_ARGS}, Tensor(a!) dw) -> ()",
       lambda g, x, offsets, g_slots, x_slots, topk, dw: _launch_wgrad(g, x, offsets, g_slots, x_slots, topk, dw, True), lambda *_: None)
_ROWS, _WGRAD, _WGRAD_ADD = (getattr(torch.ops.interlace, name).default for name in ("grouped_gemm", "grouped_wgrad", "grouped_wgrad_add"))


def rows_gemm(x: Tensor, w: Tensor, offsets: Tensor, plan: tuple[Tensor, Tensor] | None = None, dgrad: bool = False) -> Tensor:
    """x[r] @ w[e].T, or x[r] @ w[e]; plan: (row_of_slot, slot_of_row) where x holds tokens. No gradient."""
    row, slots = plan or (None, None)
    return _ROWS(x, w, offsets, slots, row, dgrad, None)


def rows_gemm_swiglu(x: Tensor, w: Tensor, offsets: Tensor, plan: tuple[Tensor, Tensor] | None, p: Tensor | None) -> tuple[Tensor, Tensor]:
    """z = x[r] @ w[e].T and swiglu(z, p): in one kernel where there is one, after one another on CPU. No gradient."""
    row, slots = plan or (None, None)
    if x.is_cuda or INTERPRET:
        return torch.ops.interlace.grouped_gemm_swiglu(x, w, offsets, slots, row, p)
    z = _ROWS(x, w, offsets, slots, row, False, None)
    return z, torch.ops.interlace.swiglu_fwd(z, p)


def rows_wgrad(g: Tensor, x: Tensor, offsets: Tensor, topk: int = 1, g_slots: Tensor | None = None, x_slots: Tensor | None = None,
               main_grad: Tensor | None = None) -> Tensor | None:
    """dw, or None when it was added to main_grad."""
    if main_grad is None:
        return _WGRAD(g, x, offsets, g_slots, x_slots, topk)
    _WGRAD_ADD(g, x, offsets, g_slots, x_slots, topk, main_grad)
    return None


# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    x, w, offsets, slots, row, ctx.transposed, main_grad = inputs
    ctx.save_for_backward(x, w, offsets, *(() if slots is None else (row, slots)))
    ctx.main_grad = main_grad                                         # not saved: every backward of a step writes to it


def _backward(ctx, dy):
    x, w, offsets, *plan = ctx.saved_tensors
    row, slots = plan or (None, None)
    dy = dy.contiguous()
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _ROWS(dy, w, offsets, None, None, not ctx.transposed, None)
        if row is not None:
            dx = torch.ops.interlace.unpermute_fwd(dx, None, None, None, row, slots)
    if ctx.needs_input_grad[1]:
        topk = 1 if row is None else row.shape[1]
        dw = (rows_wgrad(x, dy, offsets, topk, slots, None, ctx.main_grad) if ctx.transposed
              else rows_wgrad(dy, x, offsets, topk, None, slots, ctx.main_grad))
    return dx, dw, None, None, None, None, None


_grouped_gemm = differentiable("grouped_gemm", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def check_experts(op: str, x: Tensor, w: Tensor, offsets: Tensor, gather: RoutePlan | None, main_grad: Tensor | None) -> None:
    """x [R, K] or, with gather, [T, K]; w [E, N, K]; offsets int32 [E+1]; main_grad like w. Raises: ValueError."""
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(f"{op}: x must be [rows, K] and w [E, N, K], one nn.Linear weight for each expert, "
                         f"got {list(x.shape)} and {list(w.shape)}")
    if x.dtype != w.dtype or x.device != w.device:
        raise ValueError(f"{op}: x and w must have one dtype and device, got {x.dtype} on {x.device} and {w.dtype} on {w.device}; "
                         "cast or move one of them")
    if list(offsets.shape) != [w.shape[0] + 1] or offsets.dtype != torch.int32 or offsets.device != x.device:
        raise ValueError(f"{op}: offsets must be int32 [{w.shape[0] + 1}], one more than there are experts, on {x.device}, "
                         f"got {offsets.dtype} {list(offsets.shape)} on {offsets.device}; take them from route_plan")
    if gather is not None and gather.row_of_slot.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: x must be [T, K] with the plan's T = {gather.row_of_slot.shape[0]}, got {list(x.shape)}")
    if main_grad is not None:
        check_main_grad(op, main_grad, list(w.shape), w)


def check_main_grad(op: str, out: Tensor, shape: list[int], like: Tensor) -> None:
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    if list(out.shape) != shape or out.dtype != acc or not out.is_contiguous() or out.device != like.device or out.requires_grad:
        raise ValueError(f"{op}: main gradients must be a contiguous {shape} {acc} on {like.device} without a gradient of their own, got "
                         f"{list(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}")


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor, gather: RoutePlan | None = None, main_grad: Tensor | None = None,
                 transposed: bool = False) -> Tensor:
    """One linear layer per expert over rows in expert order.

    Args: x [R, K] float32, bfloat16, float16 (float64 on CPU); w [E, N, K] as in nn.Linear; offsets int32 [E+1], rows of expert e are
      offsets[e] .. offsets[e+1] - 1; gather: the plan whose tokens x [T, K] holds, its rows are then read from them; main_grad
      like w in float32: the backward adds dw to it and gives w no gradient; transposed: w is [E, K, N], read as it lies.
    Returns: y [R, N], zero from row offsets[E] on. On CUDA nothing waits for the offsets.
    Raises: ValueError where shapes disagree; on CPU RuntimeError for offsets that do not rise or end past R.
    """
    x, w = lowered(x), lowered(w)
    linear = w.transpose(1, 2) if transposed and w.ndim == 3 else w
    check_experts("grouped_gemm", x, linear, offsets, gather, None)
    if main_grad is not None:
        check_main_grad("grouped_gemm", main_grad, list(w.shape), w)
    if not fused(x, w, offsets):
        if main_grad is not None:
            raise ValueError("grouped_gemm: main_grad must be None where the reference runs, got a tensor; build the C++ ops (make setup)")
        return grouped_gemm_ref(x, linear, offsets, gather)
    row, slots = (None, None) if gather is None else (gather.row_of_slot, gather.slot_of_row)
    return _grouped_gemm(x.contiguous(), w.contiguous(), offsets.contiguous(), slots, row, transposed, main_grad)


def grouped_wgrad(dy: Tensor, x: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """dw[e] = dy[rows of e].T @ x[rows of e], or out += dw.

    Args: dy [R, N], x [R, K] of one dtype; offsets int32 [E+1]; out [E, N, K] float32 (float64 for float64). No gradient.
    Returns: dw [E, N, K] of x's dtype, zero where an expert has no rows, or out. Raises: ValueError where shapes disagree.
    """
    if dy.ndim != 2 or x.ndim != 2 or dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise ValueError(f"grouped_wgrad: dy and x must be [R, N] and [R, K] of one dtype, got {list(dy.shape)} {dy.dtype} and "
                         f"{list(x.shape)} {x.dtype}")
    if out is not None:
        check_main_grad("grouped_wgrad", out, [offsets.shape[0] - 1, dy.shape[1], x.shape[1]], x)
    with torch.no_grad():
        if not fused(dy, x, offsets):
            wide = x.dtype if out is None else out.dtype
            dw = grouped_wgrad_ref(dy.to(wide), x.to(wide), offsets)
            return dw if out is None else out.add_(dw)
        if out is None:
            return _WGRAD(dy.contiguous(), x.contiguous(), offsets, None, None, 1)
        _WGRAD_ADD(dy.contiguous(), x.contiguous(), offsets, None, None, 1, out)
    return out
