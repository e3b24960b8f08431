"""swiglu: y = silu(gate) * up,   silu(g) = g * sigmoid(g),   gate, up = the two halves of gate_up's last dimension

Shapes    gate_up, dgate_up [N, 2F]    y, dy [N, F]
Backward  s = sigmoid(gate);  dgate = dy * up * s * (1 + gate * (1 - s));  dup = dy * gate * s;  both halves in one pass
Bytes     fwd 3NF * itemsize    bwd 5NF * itemsize   (nothing but gate_up is saved)
FLOPs     fwd 5NF + NF exp   bwd 9NF + NF exp  -> bandwidth-bound, with a vectorised exp (csrc/cpu/math.h, 1 ulp)
Numerics  fp32 (fp64 for fp64) throughout, one rounding per output: silu(gate) is not rounded before the product.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def swiglu_ref(gate_up: Tensor) -> Tensor:
    xf = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = xf.chunk(2, -1)                                        # [..., F] each
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_kernel(x_ptr, y_ptr, F, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)         # [BLOCK_F]
    mask = offs < F
    gate = tl.load(x_ptr + row * 2 * F + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + offs, gate / (1.0 + tl.exp(-gate)) * up, mask=mask)


@triton.jit
def _bwd_kernel(dy_ptr, x_ptr, dx_ptr, F, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    at = row * 2 * F + offs
    gate = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * F + offs, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(dx_ptr + at, dy * up * s * (1.0 + gate * (1.0 - s)), mask=mask)
    tl.store(dx_ptr + at + F, dy * gate * s, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _grid(F: int, n: int) -> tuple[tuple[int, int], int]:
    block = min(1024, triton.next_power_of_2(F))
    return (n // F, triton.cdiv(F, block)), block


def _launch_fwd(gate_up: Tensor) -> Tensor:
    y = _half(gate_up)
    if y.numel():
        grid, block = _grid(y.shape[-1], y.numel())
        _fwd_kernel[grid](gate_up, y, y.shape[-1], block)
    return y


def _launch_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    dx = torch.empty_like(gate_up)
    if dy.numel():
        grid, block = _grid(dy.shape[-1], dy.numel())
        _bwd_kernel[grid](dy, gate_up, dx, dy.shape[-1], block)
    return dx


def _half(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


define("swiglu_fwd(Tensor gate_up) -> Tensor", _launch_fwd, _half)
define("swiglu_bwd(Tensor dy, Tensor gate_up) -> Tensor", _launch_bwd, lambda dy, gate_up: torch.empty_like(gate_up))
_BWD = torch.ops.interlace.swiglu_bwd.default

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, dy):
    return _BWD(dy.contiguous(), ctx.saved_tensors[0])


_swiglu = differentiable("swiglu_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate is the first half of the last dimension and up the second.

    Args: gate_up [..., 2F] float32, bfloat16, float16 or float64, as one fused linear layer makes it.
    Returns: y [..., F]. Raises: ValueError when the last dimension is odd. Source: arXiv:2002.05202.
    """
    if not gate_up.ndim or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension of gate_up must be even, got {list(gate_up.shape)}; "
                         "concatenate gate and up along it")
    if not fused(gate_up):
        return swiglu_ref(gate_up)
    return _swiglu(gate_up.contiguous())
