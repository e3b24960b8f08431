"""rope: each pair of channels (a, b) of a head is turned by its angle:  (a cos - b sin,  b cos + a sin)

Shapes    x [S, B, H, Dh], strided in S, B and H: a slice of a fused qkv buffer, or a transposed [B, H, S, Dh], is read in place
          y [S, B, H, Dh] contiguous    cos, sin [S, B, d] fp32 (fp64 for fp64), strided in S and B, the same for every H
Pairs     i < d: channels (i, i + d), as Llama and Hugging Face have it; interleaved: (2i, 2i + 1), as GPT-J.  The channels from 2d on
          stay as they are (partial rotary: Phi-3, GPT-J)
Backward  the rotation by minus the angle: the same op with -sin. dy may be strided like x. None for cos and sin.
Bytes     fwd, bwd 2 * S*B*H*Dh * itemsize + 8 * S*d, times B where tables differ for the samples   (nothing but the tables is saved)
FLOPs     fwd, bwd 6 * S*B*H*d  -> bandwidth-bound
Numerics  fp32 (fp64 for fp64), one rounding per output. The tables' angles are computed in fp64 (rope_tables): in fp32
          the angle of position 4096 is off by up to 2.4e-4.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [S, B, H, Dh], tables [S, d] or [S, B, d]."""
    c, s = (t[:, None, None] if t.ndim == 2 else t[:, :, None] for t in (cos, sin))   # [S, 1 or B, 1, d]
    turned, rest = x.split((2 * c.shape[-1], x.shape[-1] - 2 * c.shape[-1]), -1)
    a, b = turned.to(c.dtype).unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.to(c.dtype).chunk(2, -1)
    pair = (a * c - b * s, b * c + a * s)
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((y.to(x.dtype), rest), -1)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, B, H, Dh, d, stride_s, stride_b, stride_h, cos_s, cos_b, sin_s, sin_b,
            INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                               # of [S, B]
    s, b = row // B, row % B
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    i = tl.arange(0, BLOCK_D)[None, :]
    mask = (h < H) & (i < d)                                          # [BLOCK_H, BLOCK_D]
    x_ptr += s * stride_s + b * stride_b
    y_ptr += row * H * Dh
    cos = tl.load(cos_ptr + s * cos_s + b * cos_b + i, mask=i < d, other=0.0)
    sin = tl.load(sin_ptr + s * sin_s + b * sin_b + i, mask=i < d, other=0.0)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:                                                   # whole rows are moved, pairs are taken apart in registers
        j = tl.arange(0, 2 * BLOCK_D)[None, :]
        both = (h < H) & (j < 2 * d)
        x = tl.load(x_ptr + h * stride_h + j, mask=both, other=0.0).to(tl.float32)
        lo, hi = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_D, 2)))
        y = tl.reshape(tl.join(lo * cos - hi * sin, hi * cos + lo * sin), (BLOCK_H, 2 * BLOCK_D))
        tl.store(y_ptr + h * Dh + j, y, mask=both)
    else:
        lo = tl.load(x_ptr + h * stride_h + i, mask=mask, other=0.0).to(tl.float32)
        hi = tl.load(x_ptr + h * stride_h + d + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + h * Dh + i, lo * cos - hi * sin, mask=mask)
        tl.store(y_ptr + h * Dh + d + i, hi * cos + lo * sin, mask=mask)
    if BLOCK_REST:
        k = 2 * d + tl.arange(0, BLOCK_REST)[None, :]
        left = (h < H) & (k < Dh)
        tl.store(y_ptr + h * Dh + k, tl.load(x_ptr + h * stride_h + k, mask=left), mask=left)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, interleaved: bool) -> Tensor:
    (S, B, H, Dh), d = x.shape, cos.shape[2]
    y = x.new_empty(x.shape)
    if y.numel():
        block_d, rest = triton.next_power_of_2(max(d, 1)), Dh - 2 * d
        block_h = min(triton.next_power_of_2(H), max(1, 2048 // block_d))   # 4096 elements a program
        _kernel[(S * B, triton.cdiv(H, block_h))](
            x, cos, sin, y, B, H, Dh, d, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], inverse, interleaved, block_h, block_d,
            triton.next_power_of_2(rest) if rest else 0)
    return y


define("rope_fwd(Tensor x, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> Tensor", _launch,
       lambda x, cos, sin, inverse, interleaved: x.new_empty(x.shape))
_FWD = torch.ops.interlace.rope_fwd.default

# ---- autograd -------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    return _FWD(_rows(dy), *ctx.saved_tensors, not ctx.inverse, ctx.interleaved), None, None, None, None


_rope = differentiable("rope_fwd", _setup, _backward, linear=True)

# ---- public ---------------------------------------------------------------------------------------------------


def rope_tables(positions: Tensor, dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32,
                device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of positions * base^(-2i / dim), i < dim / 2, computed in fp64.

    Args: positions [S]; dim: channels that turn, even; device: that of positions when None.
    Returns: (cos, sin), each [S, dim/2]. Raises: ValueError when dim is odd or positions is not 1-D.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"rope_tables: dim must be even and positive, got {dim}; rotate a slice of even width")
    if positions.ndim != 1:
        raise ValueError(f"rope_tables: positions must be [S], got {list(positions.shape)}; pass one per index")
    device = positions.device if device is None else device
    inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = positions.to(device, torch.float64)[:, None] * inv_freq   # [S, dim/2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding of x [S, B, H, Dh]. For x [B, H, S, Dh]: `rope(x.permute(2, 0, 1, 3), ...).permute(1, 2, 0, 3)`, no copy.

    Args: x float32, bfloat16, float16 or float64, strided but for Dh; cos, sin [S, d], or [S, B, d] where samples have positions of
        their own, 2 d <= Dh, float32 (float64 for float64); interleaved: pairs are neighbours (GPT-J), else d apart (Llama).
    Returns: y [S, B, H, Dh], contiguous; channels from 2 d on are those of x. No gradient to cos and sin.
    Raises: ValueError when 2 d is over Dh, or a table is of another shape or dtype. Source: arXiv:2104.09864.
    """
    if x.ndim != 4:
        raise ValueError(f"rope: x must be [S, B, H, Dh], got {list(x.shape)}; view or permute it so")
    want, (S, B, _, Dh) = torch.float64 if x.dtype == torch.float64 else torch.float32, x.shape
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape[:-1] not in ((S,), (S, B)) or 2 * t.shape[-1] > Dh or t.shape != cos.shape:
            raise ValueError(f"rope: {name} must be [S, d] or [S, B, d] with S = {S}, B = {B} and 2 d <= Dh = {Dh}, got {list(t.shape)}; "
                             "make it with rope_tables")
        if t.dtype != want:
            raise ValueError(f"rope: {name} must be {want} for {x.dtype} x, got {t.dtype}; "
                             f"make it with rope_tables(..., dtype={want})")
    if not fused(x, cos, sin):
        return rope_ref(x, cos.detach(), sin.detach(), interleaved)
    cos, sin = (_rows(t[:, None].expand(S, B, -1) if t.ndim == 2 else t) for t in (cos, sin))
    return _rope(_rows(x), cos, sin, False, interleaved)
