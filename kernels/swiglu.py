"""swiglu: y = silu(gate) * up * p,   silu(g) = g * sigmoid(g),   gate, up = the two halves of gate_up's last dimension

Shapes    gate_up, dgate_up [N, 2F]    y, dy [N, F]    p, dp [N] fp32, a number for each row (1 where not given)
Backward  s = sigmoid(gate);  dgate = p * dy * up * s * (1 + gate * (1 - s));  dup = p * dy * gate * s;  both halves in one pass
          dp = sum(dy * silu(gate) * up, -1) in the same pass, which can write y again too (`expert_mlp` does not keep it)
Bytes     fwd 3NF * itemsize    bwd 5NF * itemsize, 6NF with y   (nothing but gate_up and p is saved)
FLOPs     fwd 5NF + NF exp   bwd 9NF + NF exp  -> bandwidth-bound, with a vectorised exp (csrc/cpu/math.h, 1 ulp)
Numerics  fp32 (fp64 for fp64) throughout, one rounding per output: silu(gate) is not rounded before the product.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def swiglu_ref(gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
    xf = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = xf.chunk(2, -1)                                        # [..., F] each
    y = gate * torch.sigmoid(gate) * up
    return (y if probs is None else y * probs[..., None].to(xf.dtype)).to(gate_up.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _fwd_kernel(x_ptr, p_ptr, y_ptr, F, PROBS: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)         # [BLOCK_F]
    mask = offs < F
    gate = tl.load(x_ptr + row * 2 * F + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * F + F + offs, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if PROBS:
        y *= tl.load(p_ptr + row)
    tl.store(y_ptr + row * F + offs, y, mask=mask)


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


@triton.jit
def _probs_bwd_kernel(dy_ptr, x_ptr, p_ptr, dx_ptr, dp_ptr, y_ptr, F, PROBS: tl.constexpr, BLOCK_F: tl.constexpr):
    """A program has a whole row, so that dp needs no second pass."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(p_ptr + row) if PROBS else 1.0
    dot = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(0, F, BLOCK_F):
        offs = first + tl.arange(0, BLOCK_F)
        mask = offs < F
        at = row * 2 * F + offs
        gate = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * F + offs, mask=mask, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-gate))
        silu, scaled = gate * s, dy * p
        dot += dy * (silu * up)
        tl.store(dx_ptr + at, scaled * up * s * (1.0 + gate * (1.0 - s)), mask=mask)
        tl.store(dx_ptr + at + F, scaled * silu, mask=mask)
        tl.store(y_ptr + row * F + offs, silu * up * p, mask=mask)
    if PROBS:
        tl.store(dp_ptr + row, tl.sum(dot, axis=0))


# ---- ops ------------------------------------------------------------------------------------------------------


def _grid(F: int, n: int) -> tuple[tuple[int, int], int]:
    block = min(1024, triton.next_power_of_2(F))
    return (n // F, triton.cdiv(F, block)), block


def _launch_fwd(gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
    y = _half(gate_up)
    if y.numel():
        grid, block = _grid(y.shape[-1], y.numel())
        _fwd_kernel[grid](gate_up, probs, y, y.shape[-1], probs is not None, block)
    return y


def _launch_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    dx = torch.empty_like(gate_up)
    if dy.numel():
        grid, block = _grid(dy.shape[-1], dy.numel())
        _bwd_kernel[grid](dy, gate_up, dx, dy.shape[-1], block)
    return dx


def _launch_probs_bwd(dy: Tensor, gate_up: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dx, dp, y = _fake_probs_bwd(dy, gate_up, probs)
    if dy.numel():
        (grid, block), F = _grid(dy.shape[-1], dy.numel()), dy.shape[-1]
        _probs_bwd_kernel[grid[:1]](dy, gate_up, probs, dx, dp, y, F, probs is not None, block)
    else:
        dp.zero_()
    return dx, dp, y


def _fake_probs_bwd(dy: Tensor, gate_up: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return torch.empty_like(gate_up), dy.new_empty(0 if probs is None else probs.numel(), dtype=acc), torch.empty_like(dy)


def _half(gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


define("swiglu_fwd(Tensor gate_up, Tensor? probs=None) -> Tensor", _launch_fwd, _half)
define("swiglu_bwd(Tensor dy, Tensor gate_up) -> Tensor", _launch_bwd, lambda dy, gate_up: torch.empty_like(gate_up))
define("swiglu_probs_bwd(Tensor dy, Tensor gate_up, Tensor? probs) -> (Tensor, Tensor, Tensor)", _launch_probs_bwd, _fake_probs_bwd)
_BWD, _PROBS_BWD = torch.ops.interlace.swiglu_bwd.default, torch.ops.interlace.swiglu_probs_bwd.default

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    gate_up, probs = ctx.saved_tensors
    if probs is None:
        return _BWD(dy.contiguous(), gate_up), None
    dx, dp, _ = _PROBS_BWD(dy.contiguous(), gate_up, probs)
    return dx, dp.view(probs.shape)


_swiglu = differentiable("swiglu_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor, probs: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times a number for each row, where gate is the first half of the last dimension and up the second.

    Args: gate_up [..., 2F] float32, bfloat16, float16 or float64, as one fused linear layer makes it; probs [...] floating.
    Returns: y [..., F]. Raises: ValueError when the last dimension is odd, or probs has another shape. Source: arXiv:2002.05202.
    """
    if not gate_up.ndim or gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension of gate_up must be even, got {list(gate_up.shape)}; "
                         "concatenate gate and up along it")
    if probs is not None and (probs.shape != gate_up.shape[:-1] or not probs.is_floating_point() or probs.device != gate_up.device):
        raise ValueError(f"swiglu: probs must be floating {list(gate_up.shape[:-1])}, one for each row, on {gate_up.device}, "
                         f"got {probs.dtype} {list(probs.shape)} on {probs.device}")
    if not fused(gate_up):
        return swiglu_ref(gate_up, probs)
    if probs is not None:
        probs = probs.to(torch.float64 if gate_up.dtype == torch.float64 else torch.float32).contiguous()
    return _swiglu(gate_up.contiguous(), probs)
