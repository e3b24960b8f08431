"""jitter: y = x * f,   f = 1 + eps * (2 u - 1), uniform in [1 - eps, 1 + eps),   u = 24 bits of dropout's hash: noise on a router's input

Shapes    x, y, dy, dx [...], any number of dims that merge to at most 4
Index     of an element in the tensor of which x is a shard: base + sum_d i_d * strides[d]. Every layout of ranks draws the same
          noise, and no generator has a state to keep in step (hash: kernels/dropout.py).
Backward  dx = dy * f: the same op on dy, f is made again, nothing is saved.
Bytes     fwd 2n * itemsize   bwd 2n * itemsize
FLOPs     12 integer operations of 64 bits and 3 of floats per element -> bandwidth-bound on GPU, compute-bound on CPU
Numerics  f and x * f in fp32 (fp64 for fp64), one rounding.   Source: arXiv:2101.03961, section 2.4
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton
from .dropout import _start, place, place_arguments, uniform, uniform_ref

# ---- reference ------------------------------------------------------------------------------------------------


def jitter_ref(x: Tensor, eps: float, seed: int, *, base: int = 0, strides: tuple[int, ...] | None = None) -> Tensor:
    """`jitter` in torch operations."""
    xf = x if x.dtype == torch.float64 else x.float()
    u = uniform_ref(x.shape, place("jitter", x, strides)[0], _start(seed, base), x.device)
    return (xf * (1 + (u - 2**23).to(xf.dtype) * (eps * 2**-23))).to(x.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _kernel(x_ptr, y_ptr, total, start, scale, n1, n2, n3, s0, s1, s2, s3, DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    u = uniform(offs, start, n1, n2, n3, s0, s1, s2, s3, DIMS, WIDE, BLOCK)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, x * (1 + (u.to(tl.int32) - 0x800000).to(tl.float32) * scale), mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch(x: Tensor, start: int, scale: float, sizes: list[int], strides: list[int]) -> Tensor:
    y, n = torch.empty_like(x), x.numel()
    if n:
        _kernel[(triton.cdiv(n, 1024),)](x, y, n, start, scale, *place_arguments(n, sizes, strides), 1024)
    return y


define("jitter(Tensor x, int start, float scale, int[] sizes, int[] strides) -> Tensor", _launch, lambda x, *_: torch.empty_like(x))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    ctx.args = inputs[1:]


def _backward(ctx, dy):
    return torch.ops.interlace.jitter(dy.contiguous(), *ctx.args), None, None, None, None


_jitter = differentiable("jitter", _setup, _backward, linear=True)

# ---- public ---------------------------------------------------------------------------------------------------


def jitter(x: Tensor, eps: float, seed: int, *, base: int = 0, strides: tuple[int, ...] | None = None) -> Tensor:
    """x times noise uniform in [1 - eps, 1 + eps) that depends on the seed and each element's index in the global tensor alone.

    Args: x float32, bfloat16, float16 or float64; eps in [0, 1); seed: any int, another for every layer; base: index of x's first
      element in the global tensor; strides: one int per dim of x, the strides of the global tensor (None: x is all of it).
    Returns: y like x. The seed is a number on the host: a CUDA graph replays one draw.
    Raises: ValueError when eps is not in [0, 1), strides do not fit x, or x needs more than 4 strides.
    """
    if not x.is_floating_point():
        raise ValueError(f"jitter: x must be floating point, got {x.dtype}; cast it")
    if not 0 <= eps < 1:
        raise ValueError(f"jitter: eps must be in [0, 1), got {eps}; 0.01 is usual")
    strides, sizes, steps = place("jitter", x, strides)
    if eps == 0:
        return x
    if not fused(x):
        return jitter_ref(x, eps, seed, base=base, strides=strides)
    return _jitter(x.contiguous(), _start(seed, base), eps * 2**-23, sizes, steps)
