"""clamped_swiglu: y = (u + 1) * g * sigmoid(alpha * g) * p, what an expert of gpt-oss computes between its two products

Shapes    z, dz [R, 2F], pairs (gate, up) side by side    y, dy [R, F]    bias [E, 2F], row r has that of the expert e with
          offsets[e] <= r < offsets[e+1], rows past offsets[E] none    p, dp [R] fp32 (fp64 for fp64), 1 where not given
          g = min(z[2i] + bias[2i], limit);  u = min(max(z[2i+1] + bias[2i+1], -limit), limit)
Backward  s = sigmoid(alpha * g);  dg = p * dy * (u + 1) * s * (1 + alpha * g * (1 - s));  du = p * dy * g * s, 0 where clamped;
          dp = sum(dy * (u + 1) * g * s, -1) in the same pass;  dbias[e] = the sum of its rows of dz (`grouped_wgrad` of ones)
Bytes     fwd 3RF * itemsize    bwd 5RF * itemsize, and dz once more for dbias   (z and p are saved)
FLOPs     fwd 8RF + RF exp   bwd 16RF + RF exp  -> bandwidth-bound
Numerics  fp32 (fp64 for fp64) from the sum with the bias to y, one rounding per output.   Source: arXiv:2508.10925
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton
from .grouped_gemm import _WGRAD

# ---- reference ------------------------------------------------------------------------------------------------


def clamped_swiglu_ref(z: Tensor, bias: Tensor | None = None, offsets: Tensor | None = None, probs: Tensor | None = None,
                       alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    zf = z if z.dtype == torch.float64 else z.float()
    if bias is not None and offsets is not None:
        expert = torch.searchsorted(offsets[1:], torch.arange(len(z), device=z.device, dtype=torch.int32), right=True)
        zf = zf + torch.cat((bias, bias.new_zeros(1, bias.shape[1])))[expert].to(zf.dtype)
    gate, up = zf[:, ::2].clamp(max=limit), zf[:, 1::2].clamp(-limit, limit)
    y = (up + 1) * gate * torch.sigmoid(alpha * gate)
    return (y if probs is None else y * probs[:, None].to(zf.dtype)).to(z.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _expert(offs_ptr, row, E, BINS: tl.constexpr):
    """Which expert has this row; E: none."""
    e = tl.arange(0, BINS)
    return tl.sum((tl.load(offs_ptr + 1 + e, mask=e < E, other=2147483647) <= row).to(tl.int32), 0)


@triton.jit
def _pairs(z_ptr, bias_ptr, row, first, expert, E, F, BIAS: tl.constexpr, BLOCK_F: tl.constexpr):
    """Gate and up before the clamps [BLOCK_F], from loads as wide as can be."""
    at = 2 * first + tl.arange(0, 2 * BLOCK_F)
    both = tl.load(z_ptr + row * 2 * F + at, mask=at < 2 * F, other=0.0).to(tl.float32)
    if BIAS:
        width = tl.where(expert < E, 2 * F, 0)
        both += tl.load(bias_ptr + expert.to(tl.int64) * 2 * F + at, mask=at < width, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(both, [BLOCK_F, 2]))


@triton.jit
def _clamped(gate, up, alpha, limit):
    """g, u + 1, sigmoid(alpha * g); a NaN comes through."""
    g = tl.where(gate > limit, limit, gate)
    u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return g, u + 1.0, 1.0 / (1.0 + tl.exp(-alpha * g))


@triton.jit
def _fwd_kernel(z_ptr, bias_ptr, offs_ptr, p_ptr, y_ptr, E, F, alpha, limit, BIAS: tl.constexpr, PROBS: tl.constexpr,
                BINS: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    expert = _expert(offs_ptr, row, E, BINS) if BIAS else 0
    first = tl.program_id(1) * BLOCK_F
    gate, up = _pairs(z_ptr, bias_ptr, row, first, expert, E, F, BIAS, BLOCK_F)
    g, u1, s = _clamped(gate, up, alpha, limit)
    y = u1 * (g * s)
    if PROBS:
        y *= tl.load(p_ptr + row)
    offs = first + tl.arange(0, BLOCK_F)
    tl.store(y_ptr + row * F + offs, y, mask=offs < F)


@triton.jit
def _bwd_kernel(dy_ptr, z_ptr, bias_ptr, offs_ptr, p_ptr, dz_ptr, dp_ptr, E, F, alpha, limit, BIAS: tl.constexpr, PROBS: tl.constexpr,
                BINS: tl.constexpr, BLOCK_F: tl.constexpr):
    """A program has a whole row, so that dp needs no second pass."""
    row = tl.program_id(0).to(tl.int64)
    expert = _expert(offs_ptr, row, E, BINS) if BIAS else 0
    p = tl.load(p_ptr + row) if PROBS else 1.0
    dot = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(0, F, BLOCK_F):
        gate, up = _pairs(z_ptr, bias_ptr, row, first, expert, E, F, BIAS, BLOCK_F)
        g, u1, s = _clamped(gate, up, alpha, limit)
        offs = first + tl.arange(0, BLOCK_F)
        dy = tl.load(dy_ptr + row * F + offs, mask=offs < F, other=0.0).to(tl.float32)
        dot += dy * (u1 * (g * s))
        dg = tl.where(gate > limit, 0.0, p * dy * u1 * (s * (1.0 + alpha * g * (1.0 - s))))
        du = tl.where((up > limit) | (up < -limit), 0.0, p * dy * (g * s))
        at = 2 * first + tl.arange(0, 2 * BLOCK_F)
        tl.store(dz_ptr + row * 2 * F + at, tl.reshape(tl.join(dg, du), [2 * BLOCK_F]), mask=at < 2 * F)
    if PROBS:
        tl.store(dp_ptr + row, tl.sum(dot, axis=0))


# ---- ops ------------------------------------------------------------------------------------------------------


def _fake_fwd(z: Tensor, bias: Tensor | None, offsets: Tensor | None, probs: Tensor | None, alpha: float, limit: float) -> Tensor:
    return z.new_empty(z.shape[0], z.shape[1] // 2)


def _fake_bwd(dy: Tensor, z: Tensor, bias: Tensor | None, offsets: Tensor | None, probs: Tensor | None, alpha: float,
              limit: float) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return torch.empty_like(z), dy.new_empty(0 if probs is None else dy.shape[0], dtype=acc)


def _numbers(bias: Tensor | None, probs: Tensor | None, F: int) -> tuple[int, bool, bool, int, int]:
    """E, BIAS, PROBS, BINS, BLOCK_F"""
    E = 0 if bias is None else len(bias)
    return E, bias is not None, probs is not None, triton.next_power_of_2(max(E, 1)), min(1024, triton.next_power_of_2(F))


def _launch_fwd(z: Tensor, bias: Tensor | None, offsets: Tensor | None, probs: Tensor | None, alpha: float, limit: float) -> Tensor:
    y = _fake_fwd(z, bias, offsets, probs, alpha, limit)
    if y.numel():
        E, *flags, block = _numbers(bias, probs, y.shape[1])
        grid = y.shape[0], triton.cdiv(y.shape[1], block)
        _fwd_kernel[grid](z, bias, offsets, probs, y, E, y.shape[1], alpha, limit, *flags, block)
    return y


def _launch_bwd(dy: Tensor, z: Tensor, bias: Tensor | None, offsets: Tensor | None, probs: Tensor | None, alpha: float,
                limit: float) -> tuple[Tensor, Tensor]:
    dz, dp = _fake_bwd(dy, z, bias, offsets, probs, alpha, limit)
    if dy.numel():
        E, *flags, block = _numbers(bias, probs, dy.shape[1])
        _bwd_kernel[(dy.shape[0],)](dy, z, bias, offsets, probs, dz, dp, E, dy.shape[1], alpha, limit, *flags, block)
    else:
        dp.zero_()
    return dz, dp


_ARGS = "Tensor z, Tensor? bias, Tensor? offsets, Tensor? probs, float alpha, float limit"
define(f"clamped_swiglu_fwd({_ARGS}) -> Tensor", _launch_fwd, _fake_fwd)
define(f"clamped_swiglu_bwd(Tensor dy, {_ARGS}) -> (Tensor, Tensor)", _launch_bwd, _fake_bwd)

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    *tensors, ctx.alpha, ctx.limit = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    z, bias, offsets, probs = ctx.saved_tensors
    dz, dp = torch.ops.interlace.clamped_swiglu_bwd(dy.contiguous(), z, bias, offsets, probs, ctx.alpha, ctx.limit)
    db = None
    if ctx.needs_input_grad[1]:
        db = _WGRAD(dz, dz.new_ones(len(dz), 1), offsets, None, None, 1).view(bias.shape)
    return dz, db, None, None if probs is None else dp, None, None


_clamped_swiglu = differentiable("clamped_swiglu_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def clamped_swiglu(z: Tensor, bias: Tensor | None = None, offsets: Tensor | None = None, probs: Tensor | None = None,
                   alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """(u + 1) * g * sigmoid(alpha * g) of pairs (gate, up) with the bias of the row's expert, clamped; times a number for each row.

    Args: z [R, 2F] float32, bfloat16, float16 or float64; bias [E, 2F] of its dtype with offsets int32 [E+1], rows of expert e are
      offsets[e] .. offsets[e+1] - 1; probs [R] floating; alpha; limit: g stays below it, u within -limit and limit.
    Returns: y [R, F]. Raises: ValueError where shapes, dtypes or devices disagree.
    """
    if z.ndim != 2 or z.shape[1] % 2 or not z.is_floating_point():
        raise ValueError(f"clamped_swiglu: z must be floating [R, 2F], pairs of gate and up, got {z.dtype} {list(z.shape)}; flatten tokens "
                         "into rows, and lay gate and up side by side")
    if (bias is None) != (offsets is None):
        raise ValueError("clamped_swiglu: bias and offsets must come together, got one of them; offsets of [0, R] give all rows one bias")
    if bias is not None and offsets is not None:
        if bias.ndim != 2 or bias.shape[1] != z.shape[1] or bias.dtype != z.dtype or bias.device != z.device:
            raise ValueError(f"clamped_swiglu: bias must be [E, {z.shape[1]}] {z.dtype} on {z.device} like z, "
                             f"got {list(bias.shape)} {bias.dtype} on {bias.device}; cast or move it")
        if list(offsets.shape) != [len(bias) + 1] or offsets.dtype != torch.int32 or offsets.device != z.device:
            raise ValueError(f"clamped_swiglu: offsets must be int32 [{len(bias) + 1}], one more than there are experts, on {z.device}, "
                             f"got {offsets.dtype} {list(offsets.shape)} on {offsets.device}; take them from route_plan")
        bias, offsets = bias.contiguous(), offsets.contiguous()
    if probs is not None:
        if probs.shape != z.shape[:1] or not probs.is_floating_point() or probs.device != z.device:
            raise ValueError(f"clamped_swiglu: probs must be floating {list(z.shape[:1])}, one for each row, on {z.device}, "
                             f"got {probs.dtype} {list(probs.shape)} on {probs.device}; take them from permute")
        probs = probs.to(torch.float64 if z.dtype == torch.float64 else torch.float32).contiguous()
    if not fused(z):
        return clamped_swiglu_ref(z, bias, offsets, probs, alpha, limit)
    return _clamped_swiglu(z.contiguous(), bias, offsets, probs, alpha, limit)
