"""gated: y = act(gate) * up, gate and up two tensors, as Llama's gate_proj and up_proj make them: nothing is concatenated

Shapes    gate, up [N, F], rows strided (a half of a wider tensor is read in place)    y, dy, dgate, dup [N, F] contiguous
          act(g): "silu" g * sigmoid(g) (SwiGLU), "gelu" exact, "gelu_tanh" its tanh form (GeGLU; Gemma has gelu_tanh)
Backward  dgate = dy * up * act'(gate);  dup = dy * act(gate): both in one pass
Bytes     fwd 3NF * itemsize    bwd 5NF * itemsize   (gate and up are saved, act(gate) is not)
FLOPs     fwd 5NF (silu) to 12NF, bwd 9NF to 18NF, and NF exp  -> bandwidth-bound on a GPU
Numerics  fp32 (fp64 for fp64) throughout, one rounding per output: act(gate) is not rounded before the product.   Source: arXiv:2002.05202
Where one layer makes both halves side by side, `swiglu` takes them as they are, and its gradient is one tensor again.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton
from .gelu import _gelu, gelu_ref

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")                           # by the number that ops take: csrc/cpu/activations.h

# ---- reference ------------------------------------------------------------------------------------------------


def gated_ref(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    gf, uf = (t if t.dtype == torch.float64 else t.float() for t in (gate, up))
    act = gf * torch.sigmoid(gf) if activation == "silu" else gelu_ref(gf, "tanh" if activation == "gelu_tanh" else "none")
    return (act * uf).to(gate.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _act(x, ACT: tl.constexpr):
    """The activation of x and its slope there."""
    if ACT == 0:
        s = 1.0 / (1.0 + tl.exp(-x))
        y, slope = x * s, s * (1.0 + x * (1.0 - s))
    else:
        y, slope = _gelu(x, ACT == 2)
    return y, slope


@triton.jit
def _fwd_kernel(gate_ptr, up_ptr, y_ptr, F, stride_g, stride_u, ACT: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)         # [BLOCK_F]
    mask = offs < F
    gate = tl.load(gate_ptr + row * stride_g + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_u + offs, mask=mask, other=0.0).to(tl.float32)
    a, _ = _act(gate, ACT)
    tl.store(y_ptr + row * F + offs, a * up, mask=mask)


@triton.jit
def _bwd_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, F, stride_g, stride_u, ACT: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    gate = tl.load(gate_ptr + row * stride_g + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_u + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * F + offs, mask=mask, other=0.0).to(tl.float32)
    a, slope = _act(gate, ACT)
    tl.store(dgate_ptr + row * F + offs, dy * up * slope, mask=mask)
    tl.store(dup_ptr + row * F + offs, dy * a, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _like(gate: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)                                 # contiguous, whatever the strides of gate


def _grid(y: Tensor) -> tuple[tuple[int, int], int]:
    block = min(1024, triton.next_power_of_2(y.shape[1]))
    return (y.shape[0], triton.cdiv(y.shape[1], block)), block


def _launch_fwd(gate: Tensor, up: Tensor, act: int) -> Tensor:
    y = _like(gate)
    if y.numel():
        grid, block = _grid(y)
        _fwd_kernel[grid](gate, up, y, y.shape[1], gate.stride(0), up.stride(0), act, block)
    return y


def _launch_bwd(dy: Tensor, gate: Tensor, up: Tensor, act: int) -> tuple[Tensor, Tensor]:
    dgate, dup = _like(gate), _like(gate)
    if dy.numel():
        grid, block = _grid(dy)
        _bwd_kernel[grid](dy, gate, up, dgate, dup, dy.shape[1], gate.stride(0), up.stride(0), act, block)
    return dgate, dup


define("gated_fwd(Tensor gate, Tensor up, int act) -> Tensor", _launch_fwd, lambda gate, up, act: _like(gate))
define("gated_bwd(Tensor dy, Tensor gate, Tensor up, int act) -> (Tensor, Tensor)", _launch_bwd,
       lambda dy, gate, up, act: (_like(gate), _like(gate)))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, dy):
    return *torch.ops.interlace.gated_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.act), None


_gated = differentiable("gated_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up, element by element, in one pass.

    Args: gate, up [..., F] of one shape and dtype (float32, bfloat16, float16 or float64), F contiguous: halves of one tensor are read in
        place; activation: "silu", "gelu" (exact) or "gelu_tanh".
    Returns: y [..., F], contiguous. Raises: ValueError when shapes, dtypes or devices differ, or for another activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; choose one, or use torch")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device or not gate.ndim:
        raise ValueError(f"gated: gate and up must be [..., F] of one shape, dtype and device, got {gate.dtype} {list(gate.shape)} on "
                         f"{gate.device} and {up.dtype} {list(up.shape)} on {up.device}; chunk one fused tensor in two equal halves")
    if not fused(gate, up):
        return gated_ref(gate, up, activation)
    return _gated(_rows(gate), _rows(up), ACTIVATIONS.index(activation)).view(gate.shape)


def _rows(t: Tensor) -> Tensor:
    """[N, F] over the same memory where one stride leads from row to row and F is contiguous, else a copy."""
    flat = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
