"""rope: y[:d] = x[:d] * cos - x[d:] * sin,   y[d:] = x[d:] * cos + x[:d] * sin,   d = Dh / 2
      (rotate-half, as Llama and Hugging Face have it)

Shapes    x [S, B, H, Dh], strided in S, B and H: a slice of a fused qkv buffer is read in place
          y [S, B, H, Dh] contiguous    cos, sin [S, Dh/2] fp32 (fp64 for fp64), the same for every B and H
Backward  the rotation by minus the angle: the same op with -sin. dy may be strided like x. None for cos and sin.
Bytes     fwd, bwd 2 * S*B*H*Dh * itemsize + 4 * S*Dh   (nothing but the tables is saved)
FLOPs     fwd, bwd 3 * S*B*H*Dh  -> bandwidth-bound
Numerics  fp32 (fp64 for fp64), one rounding per output. The tables' angles are computed in fp64 (rope_tables): in fp32
          the angle of position 4096 is off by up to 2.4e-4.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).chunk(2, -1)                               # [S, B, H, Dh/2] each
    c, s = cos[:, None, None], sin[:, None, None]                     # [S, 1, 1, Dh/2]
    return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, B, H, d, stride_s, stride_b, stride_h, INVERSE: tl.constexpr,
            BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                               # of [S, B]
    s, b = row // B, row % B
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    i = tl.arange(0, BLOCK_D)[None, :]
    mask = (h < H) & (i < d)                                          # [BLOCK_H, BLOCK_D]
    at = x_ptr + s * stride_s + b * stride_b + h * stride_h + i
    lo = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    hi = tl.load(at + d, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + s * d + i, mask=i < d, other=0.0)
    sin = tl.load(sin_ptr + s * d + i, mask=i < d, other=0.0)
    if INVERSE:
        sin = -sin
    to = y_ptr + (row * H + h) * 2 * d + i
    tl.store(to, lo * cos - hi * sin, mask=mask)
    tl.store(to + d, hi * cos + lo * sin, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    S, B, H, Dh = x.shape
    y = x.new_empty(x.shape)
    if y.numel():
        block_d = triton.next_power_of_2(Dh // 2)
        block_h = min(triton.next_power_of_2(H), max(1, 2048 // block_d))   # 4096 elements a program
        _kernel[(S * B, triton.cdiv(H, block_h))](x, cos, sin, y, B, H, Dh // 2, *x.stride()[:3], inverse,
                                                  block_h, block_d)
    return y


define("rope_fwd(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", _launch,
       lambda x, cos, sin, inverse: x.new_empty(x.shape))
_FWD = torch.ops.interlace.rope_fwd.default

# ---- autograd -------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    return _FWD(_rows(dy), *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope = differentiable("rope_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def rope_tables(positions: Tensor, dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32,
                device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of positions * base^(-2i / dim), i < dim / 2, computed in fp64.

    Args: positions [S]; dim = Dh, even; device: that of positions when None.
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


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [S, B, H, Dh], rotate-half convention.

    Args: x float32, bfloat16, float16 or float64, strided but for Dh; cos, sin [S, Dh/2] float32 (float64 for float64).
    Returns: y [S, B, H, Dh], contiguous. No gradient to cos and sin.
    Raises: ValueError when Dh is odd, or a table is of another shape or dtype. Source: arXiv:2104.09864.
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"rope: x must be [S, B, H, Dh] with an even Dh, got {list(x.shape)}; "
                         "view it so, and rotate a slice of even width")
    want = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != (x.shape[0], x.shape[3] // 2):
            raise ValueError(f"rope: {name} must be [S, Dh/2] = {[x.shape[0], x.shape[3] // 2]}, got {list(t.shape)}; "
                             "make it with rope_tables")
        if t.dtype != want:
            raise ValueError(f"rope: {name} must be {want} for {x.dtype} x, got {t.dtype}; "
                             f"make it with rope_tables(..., dtype={want})")
    if not fused(x, cos, sin):
        return rope_ref(x, cos.detach(), sin.detach())
    x, cos, sin = _rows(x), cos.contiguous(), sin.contiguous()
    return _rope(x, cos, sin, False)
