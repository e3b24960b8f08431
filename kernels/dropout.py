"""dropout: y = keep * x / (1 - p),   keep = u >= p,   u = top 24 bits of mix(index + key(seed)), as a number in [0, 1)

Shapes    x, y, dy, dx [...], any number of dims that merge to at most 4
Index     of an element in the tensor of which x is a shard: base + sum_d i_d * strides[d]. Every layout of ranks drops
          the same elements, and no generator has a state to keep in step.
Hash      mix is the finaliser of splitmix64, key(seed) = mix(seed * golden + golden), in 64-bit arithmetic that wraps:
          the same bits in the reference, C++ and Triton. Neighbouring seeds start at unrelated counters.
Backward  dx = keep * dy / (1 - p): the same op on dy, keep is made again, nothing is saved.
Bytes     fwd 2n * itemsize   bwd 2n * itemsize     (with a saved mask: n + 2n * itemsize each)
FLOPs     12 integer operations of 64 bits per element -> bandwidth-bound on GPU, compute-bound on CPU
Numerics  x * (1 / (1 - p)) in fp32, one rounding. A dropped inf or NaN is 0.  P(keep) is exact to 2^-24.
"""
import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

_GOLDEN, _M1, _M2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MAX_DIMS = 4


def _signed(z: int) -> int:
    """The int64 of the same bits: torch and Triton have no wrapping uint64 everywhere."""
    return (z + 2**63) % 2**64 - 2**63


def _mix(z: int) -> int:
    z = ((z ^ z >> 30) * _M1) % 2**64
    z = ((z ^ z >> 27) * _M2) % 2**64
    return z ^ z >> 31


def _start(seed: int, base: int) -> int:
    """The counter of the element with index `base`."""
    return _signed(_mix((seed + 1) * _GOLDEN % 2**64) + base)


def _threshold(p: float) -> int:
    return min(round(p * 2**24), 2**24 - 1)                           # u < threshold is dropped


# ---- reference ------------------------------------------------------------------------------------------------


def uniform_ref(shape: torch.Size, strides: tuple[int, ...], start: int, device: torch.device) -> Tensor:
    """u int64 in [0, 2^24) of each element."""
    z = torch.full(shape, start, dtype=torch.int64, device=device)
    for d, (size, stride) in enumerate(zip(shape, strides)):
        z += (torch.arange(size, device=device) * stride).view(-1, *[1] * (len(shape) - d - 1))
    shift = lambda z, k: (z >> k) & ((1 << 64 - k) - 1)               # noqa: E731  logical, where >> is arithmetic
    z = (z ^ shift(z, 30)) * _signed(_M1)
    z = (z ^ shift(z, 27)) * _signed(_M2)
    return shift(z ^ shift(z, 31), 40)


def dropout_ref(x: Tensor, p: float, seed: int, *, base: int = 0, strides: tuple[int, ...] | None = None) -> Tensor:
    strides = _contiguous_strides(x.shape) if strides is None else strides
    keep = uniform_ref(x.shape, strides, _start(seed, base), x.device) >= _threshold(p)
    xf = x if x.dtype == torch.float64 else x.float()
    scale = torch.tensor(1 / (1 - p), dtype=xf.dtype, device=x.device)
    return torch.where(keep, xf * scale, torch.zeros_like(scale)).to(x.dtype)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def uniform(offs, start, n1, n2, n3, s0, s1, s2, s3, DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """u int64 [BLOCK] in [0, 2^24) of the elements `offs` of a contiguous shard."""
    row = offs if WIDE else offs.to(tl.int32)                         # a 64-bit division costs four of 32 bits
    z = tl.zeros([BLOCK], dtype=tl.int64) + start
    if DIMS > 1:
        z += (row % n3).to(tl.int64) * s3
        row = row // n3
        if DIMS > 2:
            z += (row % n2).to(tl.int64) * s2
            row = row // n2
        if DIMS > 3:
            z += (row % n1).to(tl.int64) * s1
            row = row // n1
        z += row.to(tl.int64) * s0
    else:
        z += offs * s3
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47         # signed, logical shifts by masks: as uniform_ref
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return ((z ^ ((z >> 31) & 0x1FFFFFFFF)) >> 40) & 0xFFFFFF


@triton.jit
def _kernel(x_ptr, y_ptr, total, start, threshold, scale, n1, n2, n3, s0, s1, s2, s3,
            DIMS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < total
    u = uniform(offs, start, n1, n2, n3, s0, s1, s2, s3, DIMS, WIDE, BLOCK)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, tl.where(u >= threshold, x * scale, 0.0), mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def place_arguments(n: int, sizes: list[int], strides: list[int]) -> tuple[int | bool, ...]:
    """n1, n2, n3, s0, s1, s2, s3, DIMS, WIDE of `uniform`."""
    dims = sum(size > 1 for size in sizes[:3]) + 1
    return *sizes[1:], strides[_MAX_DIMS - dims], *strides[1:], dims, n >= 2**31   # _merge puts the dims of size 1 first


def _launch(x: Tensor, start: int, threshold: int, scale: float, sizes: list[int], strides: list[int]) -> Tensor:
    y, n = torch.empty_like(x), x.numel()
    if n:
        _kernel[(triton.cdiv(n, 1024),)](x, y, n, start, threshold, scale, *place_arguments(n, sizes, strides), 1024)
    return y


define("dropout(Tensor x, int start, int threshold, float scale, int[] sizes, int[] strides) -> Tensor",
       _launch,
       lambda x, *_: torch.empty_like(x))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    ctx.args = inputs[1:]


def _backward(ctx, dy):
    return torch.ops.interlace.dropout(dy.contiguous(), *ctx.args), None, None, None, None, None


_dropout = differentiable("dropout", _setup, _backward, linear=True)

# ---- public ---------------------------------------------------------------------------------------------------


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def _merge(shape: torch.Size, strides: tuple[int, ...], op: str = "dropout") -> tuple[list[int], list[int]]:
    """Sizes and strides, 4 each and outermost first, with dims of size 1 dropped and dims merged that count on."""
    sizes, steps = [1], [1]
    for size, step in reversed([(n, s) for n, s in zip(shape, strides) if n != 1]):
        if sizes[0] == 1:
            sizes[0], steps[0] = size, step
        elif step == sizes[0] * steps[0]:
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            steps.insert(0, step)
    if len(sizes) > _MAX_DIMS:
        raise ValueError(f"{op}: x must have at most {_MAX_DIMS} dims after merging those that are contiguous in "
                         f"the global tensor, got {list(shape)} with strides {list(strides)}; apply it to pieces of x")
    pad = _MAX_DIMS - len(sizes)
    return [1] * pad + sizes, [0] * pad + steps


def place(op: str, x: Tensor, strides: tuple[int, ...] | None) -> tuple[tuple[int, ...], list[int], list[int]]:
    """The global tensor's strides (None: x is all of it), and x's sizes and steps as an op takes them."""
    strides = _contiguous_strides(x.shape) if strides is None else tuple(strides)
    if len(strides) != x.dim():
        raise ValueError(f"{op}: strides must be one int per dim of x ({x.dim()}), got {list(strides)}; pass the global tensor's stride()")
    return strides, *_merge(x.shape, strides, op)


def dropout(x: Tensor, p: float, seed: int, *, base: int = 0, strides: tuple[int, ...] | None = None) -> Tensor:
    """Dropout whose mask depends on the seed and each element's index in the global tensor, never on the layout.

    Args: x float32, bfloat16, float16 or float64; p in [0, 1), the chance of 0; seed: any int, a new one for every
        layer and step; base: index of x's first element in the global tensor; strides: one int per dim of x, the
        strides of the global tensor (None: x is all of it).
    Returns: y like x. The seed is a number on the host: a CUDA graph replays one mask.
    Raises: ValueError when p is not in [0, 1), strides do not fit x, or x needs more than 4 strides.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, for counters; splitmix64 for the hash.
    """
    if not x.is_floating_point():
        raise ValueError(f"dropout: x must be floating point, got {x.dtype}; cast it")
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must be in [0, 1), got {p}; for all zeros use torch.zeros_like")
    strides, sizes, steps = place("dropout", x, strides)
    if p == 0:
        return x
    if not fused(x):
        return dropout_ref(x, p, seed, base=base, strides=strides)
    return _dropout(x.contiguous(), _start(seed, base), _threshold(p), 1 / (1 - p), sizes, steps)
