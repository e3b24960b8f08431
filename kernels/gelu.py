"""gelu: y = x * cdf(x), cdf of the normal distribution;  approximate="tanh": y = x * (1 + tanh(u)) / 2, u = sqrt(2/pi) (x + 0.044715 x^3)

Shapes    x, y, dy, dx [...]
Backward  dx = dy * (cdf + x * pdf);  tanh form, s = (1 + tanh(u)) / 2 = sigmoid(2u):  dx = dy * (s + x * s * (1 - s) * 2 du/dx)
Bytes     fwd 2n * itemsize    bwd 3n * itemsize   (x alone is saved)
FLOPs     fwd 10n + n exp   bwd 15n + n exp: on CPU one vectorised exponential in place of erf or tanh
Numerics  fp32 (fp64 for fp64), one rounding per output.   Source: arXiv:1606.08415
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def gelu_ref(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x if x.dtype == torch.float64 else x.float(), approximate=approximate).to(x.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """gelu(x) and its slope."""
    if TANH:
        c = tl.where(x < -20.0, -20.0, tl.where(x > 20.0, 20.0, x))   # past that it is x or 0, and x^3 may overflow
        q = 0.044715 * c * c
        z = 1.5957691216057308 * c * (1.0 + q)
        e = tl.exp(-tl.abs(z))                                        # s (1 - s) = e / (1 + e)^2: 1 - s would cancel
        r = 1.0 / (1.0 + e)
        s = tl.where(z < 0, e * r, r)
        y, slope = x * s, s + 1.5957691216057308 * c * (1.0 + 3.0 * q) * (e * r * r)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y, slope = x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return y, slope


@triton.jit
def _fwd_kernel(x_ptr, y_ptr, total, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    y, _ = _gelu(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32), TANH)
    tl.store(y_ptr + offs, y, mask=mask)


@triton.jit
def _bwd_kernel(dy_ptr, x_ptr, dx_ptr, total, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    _, slope = _gelu(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32), TANH)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs, dy * slope, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch_fwd(x: Tensor, tanh: bool) -> Tensor:
    y = torch.empty_like(x)
    if y.numel():
        _fwd_kernel[(triton.cdiv(y.numel(), 1024),)](x, y, y.numel(), tanh, 1024)
    return y


def _launch_bwd(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    dx = torch.empty_like(x)
    if dx.numel():
        _bwd_kernel[(triton.cdiv(dx.numel(), 1024),)](dy, x, dx, dx.numel(), tanh, 1024)
    return dx


define("gelu_fwd(Tensor x, bool tanh) -> Tensor", _launch_fwd, lambda x, tanh: torch.empty_like(x))
define("gelu_bwd(Tensor dy, Tensor x, bool tanh) -> Tensor", _launch_bwd, lambda dy, x, tanh: torch.empty_like(x))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    x, ctx.tanh = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    return torch.ops.interlace.gelu_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.tanh), None


_gelu_op = differentiable("gelu_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, element by element.

    Args: x float32, bfloat16, float16 or float64 of any shape; approximate: "none" (exact), or "tanh" (GPT-2's, `gelu_new`).
    Returns: y like x, contiguous. Raises: ValueError for another approximate, or x that is not floating.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}; as in torch.nn.functional.gelu")
    if not x.is_floating_point():
        raise ValueError(f"gelu: x must be floating point, got {x.dtype}; convert it")
    if not fused(x):
        return gelu_ref(x, approximate)
    return _gelu_op(x.contiguous(), approximate == "tanh")
