"""layer_norm: y = xhat * w + b,   xhat = (h - mean(h, -1)) * rstd,   rstd = 1 / sqrt(var(h, -1) + eps),
               h = x, or x + residual in add_layer_norm; b may be None

Shapes    x, residual, h, y, dy, dh, dx [N, D]    w, b, dw, db [D]    mean, rstd [N] fp32 (fp64 for fp64), saved
Backward  g = dy * w;  dx = rstd * (g - mean(g, -1) - xhat * mean(g * xhat, -1)) + dh
          dw = sum(dy * xhat, 0);  db = sum(dy, 0)
          add_layer_norm: dresidual = dx; dh is the gradient of the returned h.
Bytes     fwd (2ND + 2D) * itemsize + 8N (add: 4ND)    bwd (3ND + 3D) * itemsize + 8N + 16PD   (P = number of partials)
          over D = 8192 bwd 5ND in Triton, as in rms_norm
FLOPs     fwd 7ND   bwd 12ND  -> bandwidth-bound
Numerics  mean first, then the centred squares (no cancellation), in fp32; dw and db partials in fp32, on CPU summed in
          fp64 every 64 rows; one rounding per output. One row per step: D <= 16384 in Triton.
"""
import torch
from torch import Tensor

from .autocast import narrowed, widened
from .dispatch import ONE_PASS, define, differentiable, fused, row_programs, row_warps, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def layer_norm_ref(x: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    xf = x if x.dtype == torch.float64 else x.float()                 # [..., D]
    xc = xf - xf.mean(-1, keepdim=True)
    y = xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps) * w.to(xf.dtype)
    return (y if b is None else y + b.to(xf.dtype)).to(x.dtype)


def add_layer_norm_ref(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None,
                       eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    h = x + residual                                                  # [..., D]
    return h, layer_norm_ref(h, w, b, eps)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_kernel(x_ptr, res_ptr, w_ptr, b_ptr, h_ptr, y_ptr, mean_ptr, rstd_ptr, D, eps, ADD: tl.constexpr,
                BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)                                      # [BLOCK_D]
    mask = offs < D
    x = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(res_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        h = x.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * D + offs, h, mask=mask)
        x = h.to(tl.float32)                                          # normalise what the backward will read
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / D
    xc = tl.where(mask, x - mean, 0.0)                                # the padding is not at the mean
    rstd = 1.0 / tl.sqrt(tl.sum(xc * xc, axis=0) / D + eps)
    y = xc * rstd * w
    if BIAS:
        y += tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs, y, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _bwd_kernel(dy_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dh_ptr, dx_ptr, dw_ptr, db_ptr, N, D, DH: tl.constexpr,
                BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(pid, N, tl.num_programs(0)):                     # strided rows: dw and db stay in registers
        at = row * D + offs
        x = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)   # 0 in the padding: xhat there never counts
        rstd = tl.load(rstd_ptr + row)
        xhat = (x - tl.load(mean_ptr + row)) * rstd
        g = dy * w
        dx = rstd * (g - tl.sum(g, axis=0) / D - xhat * (tl.sum(g * xhat, axis=0) / D))
        if DH:
            dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dw += dy * xhat
        if BIAS:
            db += dy
        tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(dw_ptr + pid * D + offs, dw, mask=mask)                  # [P, D] partials, summed by the launcher
    if BIAS:
        tl.store(db_ptr + pid * D + offs, db, mask=mask)


@triton.jit
def _sums_kernel(dy_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, c_ptr, D, BLOCK_D: tl.constexpr):
    """c = (mean(g), mean(g * xhat)) of a row of any width."""
    row = tl.program_id(0).to(tl.int64)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    c = tl.zeros([BLOCK_D], dtype=tl.float32)
    cx = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        offs = first + tl.arange(0, BLOCK_D)
        mask = offs < D
        x = tl.load(h_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        g = dy * tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        c += g
        cx += g * ((x - mean) * rstd)
    tl.store(c_ptr + 2 * row, tl.sum(c, axis=0) / D)
    tl.store(c_ptr + 2 * row + 1, tl.sum(cx, axis=0) / D)


@triton.jit
def _columns_kernel(dy_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, c_ptr, dh_ptr, dx_ptr, dw_ptr, db_ptr, N, D, DH: tl.constexpr,
                    BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    """dx, dw and db of some columns of strided rows, whose sums are known."""
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs < D
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = tl.zeros([BLOCK_D], dtype=tl.float32)
    for row in range(pid, N, tl.num_programs(0)):
        at = row * D + offs
        rstd = tl.load(rstd_ptr + row)
        xhat = (tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32) - tl.load(mean_ptr + row)) * rstd
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dx = rstd * (dy * w - tl.load(c_ptr + 2 * row) - xhat * tl.load(c_ptr + 2 * row + 1))
        if DH:
            dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dw += dy * xhat
        if BIAS:
            db += dy
        tl.store(dx_ptr + at, dx, mask=mask)
    tl.store(dw_ptr + pid * D + offs, dw, mask=mask)
    if BIAS:
        tl.store(db_ptr + pid * D + offs, db, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch_fwd(x: Tensor, residual: Tensor | None, w: Tensor, b: Tensor | None,
                eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    D = x.shape[-1]
    h, y = torch.empty_like(x) if residual is not None else x, torch.empty_like(x)
    mean, rstd = _stat(x), _stat(x)
    if rstd.numel():
        block = triton.next_power_of_2(D)
        _fwd_kernel[(rstd.numel(),)](x, residual, w, b, h, y, mean, rstd, D, eps, residual is not None, b is not None, block,
                                     num_warps=row_warps(block))
    return h, y, mean, rstd


def _launch_bwd(dy: Tensor, h: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, dh: Tensor | None,
                bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    N, D = rstd.numel(), h.shape[-1]
    P = min(N, row_programs(h))
    dx = torch.empty_like(h)
    dw, db = (h.new_empty(P, width, dtype=torch.float32) for width in (D, D * bias))
    if N and D <= ONE_PASS:
        block = triton.next_power_of_2(D)
        _bwd_kernel[(P,)](dy, h, w, mean, rstd, dh, dx, dw, db, N, D, dh is not None, bias, block, num_warps=row_warps(block))
    elif N:
        c = rstd.new_empty(N, 2)
        _sums_kernel[(N,)](dy, h, w, mean, rstd, c, D, 2048, num_warps=8)
        _columns_kernel[(P, triton.cdiv(D, 1024))](dy, h, w, mean, rstd, c, dh, dx, dw, db, N, D, dh is not None, bias, 1024)
    return dx, dw.sum(0).to(w.dtype), db.sum(0).to(w.dtype)


def _stat(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.numel() // max(x.shape[-1], 1), dtype=dtype)


define("layer_norm_fwd(Tensor x, Tensor w, Tensor? b, float eps) -> (Tensor, Tensor, Tensor)",
       lambda x, w, b, eps: _launch_fwd(x, None, w, b, eps)[1:],
       lambda x, w, b, eps: (torch.empty_like(x), _stat(x), _stat(x)))
define("add_layer_norm_fwd(Tensor x, Tensor residual, Tensor w, Tensor? b, float eps) "
       "-> (Tensor, Tensor, Tensor, Tensor)",
       _launch_fwd,
       lambda x, residual, w, b, eps: (torch.empty_like(x), torch.empty_like(x), _stat(x), _stat(x)))
define("layer_norm_bwd(Tensor dy, Tensor h, Tensor w, Tensor mean, Tensor rstd, Tensor? dh, bool bias) "
       "-> (Tensor, Tensor, Tensor)",
       _launch_bwd,
       lambda dy, h, w, mean, rstd, dh, bias: (torch.empty_like(h), torch.empty_like(w), w.new_empty(len(w) * bias)))
_BWD = torch.ops.interlace.layer_norm_bwd.default

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    x, w, b, _ = inputs
    ctx.save_for_backward(x, w, *output[1:])
    ctx.bias = b is not None


def _backward(ctx, dy, *_):
    x, w, mean, rstd = ctx.saved_tensors
    dx, dw, db = _BWD(dy.contiguous(), x, w, mean, rstd, None, ctx.bias)
    return dx, dw, db if ctx.bias else None, None


def _add_setup(ctx, inputs, output):
    h, _, mean, rstd = output
    ctx.save_for_backward(h, inputs[2], mean, rstd)
    ctx.bias = inputs[3] is not None


def _add_backward(ctx, dh, dy, *_):
    h, w, mean, rstd = ctx.saved_tensors
    dx, dw, db = _BWD(dy.contiguous(), h, w, mean, rstd, dh.contiguous(), ctx.bias)
    return dx, dx, dw, db if ctx.bias else None, None


_layer_norm = differentiable("layer_norm_fwd", _setup, _backward)
_add_layer_norm = differentiable("add_layer_norm_fwd", _add_setup, _add_backward, keep=2)

# ---- public ---------------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    for name, t in (("w", w), ("b", b)):
        if t is None:
            continue
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must be {[*x.shape[-1:]]}, the last dimension of x, got {list(t.shape)}; "
                             "reshape x so that what is normalised is its last dimension")
        if t.dtype != x.dtype:
            raise ValueError(f"{op}: x and {name} must have one dtype, got {x.dtype} and {t.dtype}; cast one of them")
    if x.is_cuda and x.shape[-1] > 16384:
        raise ValueError(f"{op}: D must be <= 16384 on CUDA, got {x.shape[-1]}; use {op}_ref")


def layer_norm(x: Tensor, w: Tensor, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension.

    Args: x [..., D] float32, bfloat16, float16 or float64; w [D] of the same dtype; b [D] likewise, or None.
    Returns: y [..., D]. Raises: ValueError when w or b is not [D] or of another dtype. Source: arXiv:1607.06450.
    """
    if (wide := widened(x, w, b)) is not None:
        xf, wf, bf = wide
        return narrowed(layer_norm(xf, wf, bf, eps), x.dtype)
    _check("layer_norm", x, w, b)
    if not fused(x, w):
        return layer_norm_ref(x, w, b, eps)
    x, w, b = x.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    return _layer_norm(x, w, b, eps)


def add_layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None,
                   eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """h = x + residual, y = layer_norm(h, w, b), in one pass.

    Args: x, residual [..., D] of one shape and dtype; w [D]; b [D] or None.
    Returns: (h, y). Raises: ValueError as `layer_norm`.
    """
    if (wide := widened(x, residual, w, b)) is not None:
        xf, rf, wf, bf = wide
        h, y = add_layer_norm(xf, rf, wf, bf, eps)
        dtype = torch.promote_types(x.dtype, residual.dtype)
        return h.to(dtype), narrowed(y, dtype)
    _check("add_layer_norm", x, w, b)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"add_layer_norm: residual must be {list(x.shape)} {x.dtype} like x, "
                         f"got {list(residual.shape)} {residual.dtype}; broadcast or cast it first")
    if not fused(x, residual, w):
        return add_layer_norm_ref(x, residual, w, b, eps)
    x, residual, w, b = x.contiguous(), residual.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    return _add_layer_norm(x, residual, w, b, eps)
