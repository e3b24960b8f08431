"""grad_norm: the 2-norm of many tensors at once, sqrt(sum_i factor_i |g_i|^2), and its square, as grad_square_sum

Shapes    grads: n tensors of any sizes -> [1] fp64 (the square), 0-d fp64 (the norm). factor: 1 / ranks that hold the tensor too
Bytes     N * itemsize read
FLOPs     2N -> bandwidth-bound
Numerics  squared and added in fp64, chunk after chunk of 16384 numbers: the same for any number of threads. torch's fp32 norm of large
          tensors on a CPU is off by up to 3e-4.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import CHUNK, chunk_table
from .dispatch import define, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def grad_square_sum_ref(grads: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    total = grads[0].new_zeros(1, dtype=torch.float64)
    for g, factor in zip(grads, factors):
        total += torch.linalg.vector_norm(g, dtype=torch.float64).square() * factor
    return total


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _kernel(g_ptr, table_ptr, factor_ptr, sum_ptr, UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    n = tl.multiple_of(tl.load(table_ptr + 2 * pid), UNIT)
    g_ptr += tl.multiple_of(tl.load(table_ptr + 2 * pid + 1), UNIT)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, CHUNK, BLOCK):
        offs = first + tl.arange(0, BLOCK)                            # [BLOCK]
        g = tl.load(g_ptr + offs, mask=offs < n, other=0.0).to(tl.float32).to(tl.float64)
        total += g * g
    tl.store(sum_ptr + pid, tl.sum(total, axis=0) * tl.load(factor_ptr + pid))


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch(grads: list[Tensor], factors: list[float]) -> Tensor:
    table, factor, unit = chunk_table([grads], factors)
    sums = grads[0].new_empty(len(table), dtype=torch.float64)
    if len(table):
        _kernel[(len(table),)](grads[0], table, factor, sums, unit, CHUNK, 1024, num_warps=4)
    return sums.sum(0, keepdim=True)


define("grad_square_sum(Tensor[] grads, float[] factors) -> Tensor", _launch,
       lambda grads, factors: grads[0].new_empty(1, dtype=torch.float64))
_OP = torch.ops.interlace.grad_square_sum.default

# ---- public ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def grad_square_sum(grads: Sequence[Tensor], factors: float | Sequence[float] = 1.0) -> Tensor:
    """sum_i factors[i] * |grads[i]|^2, [1] fp64, on the device of the first.

    Args: grads  floating tensors of any shapes, dtypes and devices; factors  one number, or one for each.
    Raises: ValueError where the two lists differ in length."""
    each = [float(factors)] * len(grads) if isinstance(factors, (int, float)) else [float(f) for f in factors]
    if len(each) != len(grads):
        raise ValueError(f"grad_norm: factors must have one number for each of the {len(grads)} gradients, got {len(each)}")
    if not len(grads):
        return torch.zeros(1, dtype=torch.float64)
    alike: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[float]]] = {}
    for g, factor in zip(grads, each):
        tensors, its = alike.setdefault((g.dtype, g.device), ([], []))
        tensors.append(g.contiguous())
        its.append(factor)
    parts = [_OP(tensors, its) if fused(*tensors) else grad_square_sum_ref(tensors, its) for tensors, its in alike.values()]
    return sum((part.to(grads[0].device) for part in parts[1:]), parts[0])


def grad_norm(grads: Sequence[Tensor], factors: float | Sequence[float] = 1.0) -> Tensor:
    """The root of grad_square_sum: the 2-norm of all tensors as one vector, 0-d fp64."""
    return grad_square_sum(grads, factors).sqrt()[0]
