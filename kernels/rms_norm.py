"""rms_norm: y = h * rstd * (w + offset),   rstd = 1 / sqrt(mean(h^2, -1) + eps),   h = x, or x + residual in add_rms_norm;
               offset: 0, or 1 where weights are stored less one (Gemma)

Shapes    x, residual, h, y, dy, dh, dx [N, D]    w, dw [D]    rstd [N] fp32 (fp64 for fp64), saved for backward
Backward  xhat = h * rstd;  g = dy * (w + offset);  dx = rstd * (g - xhat * mean(g * xhat, -1)) + dh;  dw = sum(dy * xhat, 0)
          add_rms_norm: dresidual = dx; dh is the gradient of the returned h.
Bytes     fwd (2ND + D) * itemsize + 4N (add: 4ND)     bwd (3ND + 2D) * itemsize + 4N + 8PD   (P = number of partial sums)
          over D = 8192 bwd 5ND in Triton: a row, its dw and w spill there, so that its sum is a kernel of its own
FLOPs     fwd 4ND   bwd 9ND  -> bandwidth-bound
Numerics  statistics, w + offset and dw partials in fp32, one rounding per output. One row per step: D <= 16384 in Triton.
"""
import torch
from torch import Tensor

from .autocast import narrowed, widened
from .dispatch import ONE_PASS, define, differentiable, fused, row_programs, row_warps, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def rms_norm_ref(x: Tensor, w: Tensor, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    xf = x if x.dtype == torch.float64 else x.float()                 # [..., D]
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)      # [..., 1]
    return (xf * rstd * (w.to(xf.dtype) + offset)).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    h = x + residual                                                  # [..., D]
    return h, rms_norm_ref(h, w, eps, offset)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_kernel(x_ptr, res_ptr, w_ptr, h_ptr, y_ptr, rstd_ptr, D, eps, offset, ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)                                      # [BLOCK_D]
    mask = offs < D
    x = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(res_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * D + offs, h, mask=mask)
        x = h.to(tl.float32)                                          # normalise what the backward will read
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32) + offset
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / D + eps)
    tl.store(y_ptr + row * D + offs, x * rstd * w, mask=mask)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _bwd_kernel(dy_ptr, h_ptr, w_ptr, rstd_ptr, dh_ptr, dx_ptr, dw_ptr, N, D, offset, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(pid, N, tl.num_programs(0)):                     # strided rows: dw stays in registers
        at = row * D + offs
        x = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = x * rstd
        g = dy * w
        dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / D))
        if DH:
            dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dw += dy * xhat
        tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(dw_ptr + pid * D + offs, dw, mask=mask)                  # [P, D] partials, summed by the launcher


@triton.jit
def _sums_kernel(dy_ptr, h_ptr, w_ptr, rstd_ptr, c_ptr, D, offset, BLOCK_D: tl.constexpr):
    """c = mean(g * xhat) of a row of any width."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    c = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        offs = first + tl.arange(0, BLOCK_D)
        mask = offs < D
        x = tl.load(h_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        c += dy * (tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32) + offset) * (x * rstd)
    tl.store(c_ptr + row, tl.sum(c, axis=0) / D)


@triton.jit
def _columns_kernel(dy_ptr, h_ptr, w_ptr, rstd_ptr, c_ptr, dh_ptr, dx_ptr, dw_ptr, N, D, offset, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """dx and dw of some columns of strided rows, whose sums are known."""
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs < D
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(pid, N, tl.num_programs(0)):
        at = row * D + offs
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dx = rstd * (dy * w - xhat * tl.load(c_ptr + row))
        if DH:
            dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dw += dy * xhat
        tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(dw_ptr + pid * D + offs, dw, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch_fwd(x: Tensor, residual: Tensor | None, w: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    h, y = torch.empty_like(x) if residual is not None else x, torch.empty_like(x)
    rstd = x.new_empty(x.numel() // max(D, 1), dtype=torch.float32)
    if rstd.numel():
        block = triton.next_power_of_2(D)
        _fwd_kernel[(rstd.numel(),)](x, residual, w, h, y, rstd, D, eps, offset, residual is not None, block,
                                     num_warps=row_warps(block))
    return h, y, rstd


def _launch_bwd(dy: Tensor, h: Tensor, w: Tensor, rstd: Tensor, dh: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    N, D = rstd.numel(), h.shape[-1]
    P = min(N, row_programs(h))
    dx, dw = torch.empty_like(h), h.new_empty(P, D, dtype=torch.float32)
    if N and D <= ONE_PASS:
        block = triton.next_power_of_2(D)
        _bwd_kernel[(P,)](dy, h, w, rstd, dh, dx, dw, N, D, offset, dh.numel() > 0, block, num_warps=row_warps(block))
    elif N:
        c = torch.empty_like(rstd)
        _sums_kernel[(N,)](dy, h, w, rstd, c, D, offset, 2048, num_warps=8)
        _columns_kernel[(P, triton.cdiv(D, 1024))](dy, h, w, rstd, c, dh, dx, dw, N, D, offset, dh.numel() > 0, 1024)
    return dx, dw.sum(0).to(w.dtype)


def _stat(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() // max(x.shape[-1], 1), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


define("rms_norm_fwd(Tensor x, Tensor w, float eps, float offset=0.0) -> (Tensor, Tensor)",
       lambda x, w, eps, offset=0.0: _launch_fwd(x, None, w, eps, offset)[1:],
       lambda x, w, eps, offset=0.0: (torch.empty_like(x), _stat(x)))
define("add_rms_norm_fwd(Tensor x, Tensor residual, Tensor w, float eps, float offset=0.0) -> (Tensor, Tensor, Tensor)",
       _launch_fwd,
       lambda x, residual, w, eps, offset=0.0: (torch.empty_like(x), torch.empty_like(x), _stat(x)))
define("rms_norm_bwd(Tensor dy, Tensor h, Tensor w, Tensor rstd, Tensor dh, float offset=0.0) -> (Tensor, Tensor)",
       _launch_bwd,
       lambda dy, h, w, rstd, dh, offset=0.0: (torch.empty_like(h), torch.empty_like(w)))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    x, w, _, ctx.offset = inputs
    ctx.save_for_backward(x, w, output[1])


def _backward(ctx, dy, *_):
    x, w, rstd = ctx.saved_tensors
    dx, dw = torch.ops.interlace.rms_norm_bwd(dy.contiguous(), x, w, rstd, x.new_empty(0), ctx.offset)
    return dx, dw, None, None


def _add_setup(ctx, inputs, output):
    ctx.save_for_backward(output[0], inputs[2], output[2])
    ctx.offset = inputs[4]


def _add_backward(ctx, dh, dy, *_):
    h, w, rstd = ctx.saved_tensors
    dx, dw = torch.ops.interlace.rms_norm_bwd(dy.contiguous(), h, w, rstd, dh.contiguous(), ctx.offset)
    return dx, dx, dw, None, None


_rms_norm = differentiable("rms_norm_fwd", _setup, _backward)
_add_rms_norm = differentiable("add_rms_norm_fwd", _add_setup, _add_backward, keep=2)

# ---- public ---------------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor, w: Tensor) -> None:
    if w.shape != x.shape[-1:]:
        raise ValueError(f"{op}: w must be [{x.shape[-1]}], the last dimension of x, got {list(w.shape)}")
    if w.dtype != x.dtype:
        raise ValueError(f"{op}: x and w must have one dtype, got {x.dtype} and {w.dtype}; cast one of them")
    if x.is_cuda and x.shape[-1] > 16384:
        raise ValueError(f"{op}: D must be <= 16384 on CUDA, got {x.shape[-1]}; use {op}_ref")


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """RMS normalisation over the last dimension, times w + offset.

    Args: x [..., D] float32, bfloat16, float16 or float64; w [D] of the same dtype; offset: added to w in fp32 (1 for Gemma's weights).
    Returns: y [..., D]. Raises: ValueError when w is not [D] or of another dtype. Source: arXiv:1910.07467.
    """
    if (wide := widened(x, w)) is not None:
        xf, wf = wide
        return narrowed(rms_norm(xf, wf, eps, offset), x.dtype)
    _check("rms_norm", x, w)
    if not fused(x, w):
        return rms_norm_ref(x, w, eps, offset)
    return _rms_norm(x.contiguous(), w.contiguous(), eps, offset)


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = rms_norm(h, w, eps, offset), in one pass.

    Args: x, residual [..., D] of one shape and dtype; w [D]. Returns: (h, y). Raises: ValueError as `rms_norm`.
    """
    if (wide := widened(x, residual, w)) is not None:
        xf, rf, wf = wide
        h, y = add_rms_norm(xf, rf, wf, eps, offset)
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return h.to(dtype), narrowed(y, dtype)
    _check("add_rms_norm", x, w)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"add_rms_norm: residual must be {list(x.shape)} {x.dtype} like x, "
                         f"got {list(residual.shape)} {residual.dtype}")
    if not fused(x, residual, w):
        return add_rms_norm_ref(x, residual, w, eps, offset)
    return _add_rms_norm(x.contiguous(), residual.contiguous(), w.contiguous(), eps, offset)
