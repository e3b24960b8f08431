"""adamw: one step of AdamW over lists of tensors, in place and in one pass

    g = scale * grad                                     scale: of the gradient clip
    m = m + (1 - beta1) (g - m)                          exp_avg
    v = beta2 v + (1 - beta2) g^2                        exp_avg_sq
    w = (1 - lr decay) w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    copy = w in 16 bit                                   where the model's parameters are copies of fp32 weights

Shapes    weights, grads, exp_avgs, exp_avg_sqs, copies: n tensors each, the i-th ones of one size; a decay for each
Bytes     28 N (w, g, m, v read; w, m, v written), with copies 30 N; fp64 56 N. torch's foreach: 12 passes, about 130 N
FLOPs     15 N -> bandwidth-bound
Numerics  elementwise in the weights' type, fp32 or fp64: what a number becomes does not depend on how the lists are cut. sqrt and
          division are correctly rounded; factors come from fp64. Source: arXiv:1711.05101, arXiv:1412.6980.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .chunks import CHUNK, chunk_table
from .dispatch import define, fused, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def adamw_ref(weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *,
              lr: float, betas: tuple[float, float], eps: float, step: int, weight_decay: float | Sequence[float] = 0.0,
              scale: float = 1.0, copies: Sequence[Tensor] = ()) -> None:
    decays = [weight_decay] * len(weights) if isinstance(weight_decay, (int, float)) else weight_decay
    rate, root = lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)
    for i, (w, grad, m, v, decay) in enumerate(zip(weights, grads, exp_avgs, exp_avg_sqs, decays)):
        g = grad * scale
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        w.mul_(1 - lr * decay).addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-rate)
        if copies:
            copies[i].copy_(w)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _kernel(w_ptr, g_ptr, m_ptr, v_ptr, copy_ptr, table_ptr, decay_ptr, lr, rest1, beta2, rest2, eps, rate, unbias, scale,
            COPY: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    row = table_ptr + pid * (6 if COPY else 5)
    n, w_at, g_at, m_at, v_at = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    n = tl.multiple_of(n, UNIT)
    w_ptr += tl.multiple_of(w_at, UNIT)
    g_ptr += tl.multiple_of(g_at, UNIT)
    m_ptr += tl.multiple_of(m_at, UNIT)
    v_ptr += tl.multiple_of(v_at, UNIT)
    if COPY:
        copy_ptr += tl.multiple_of(tl.load(row + 5), UNIT)
    keep = (1.0 - lr * tl.load(decay_ptr + pid)).to(tl.float32)
    for first in range(0, CHUNK, BLOCK):
        offs = first + tl.arange(0, BLOCK)                            # [BLOCK]
        mask = offs < n
        g = tl.load(g_ptr + offs, mask=mask, other=0.0) * scale
        m = tl.load(m_ptr + offs, mask=mask, other=0.0)
        v = tl.load(v_ptr + offs, mask=mask, other=0.0)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        move = tl.div_rn(m, tl.sqrt_rn(v) * unbias + eps)
        w = keep * tl.load(w_ptr + offs, mask=mask, other=0.0) - rate * move
        tl.store(w_ptr + offs, w, mask=mask)
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)
        if COPY:
            tl.store(copy_ptr + offs, w, mask=mask)


# ---- ops ------------------------------------------------------------------------------------------------------


def _launch(weights: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], copies: list[Tensor],
            decays: list[float], lr: float, beta1: float, beta2: float, eps: float, step: int, scale: float) -> None:
    lists = [weights, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])]
    table, decay, unit = chunk_table(lists, decays)
    if len(table):
        _kernel[(len(table),)](weights[0], grads[0], exp_avgs[0], exp_avg_sqs[0], copies[0] if copies else None, table, decay, lr,
                               1 - beta1, beta2, 1 - beta2, eps, lr / (1 - beta1 ** step), 1 / math.sqrt(1 - beta2 ** step), scale,
                               bool(copies), unit, CHUNK, 1024, num_warps=4)


define("adamw(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
       "float[] decays, float lr, float beta1, float beta2, float eps, int step, float scale) -> ()",
       _launch, lambda *_: None)
_OP = torch.ops.interlace.adamw.default

# ---- public ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw(weights: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor], *,
          lr: float, betas: tuple[float, float], eps: float, step: int, weight_decay: float | Sequence[float] = 0.0,
          scale: float = 1.0, copies: Sequence[Tensor] = ()) -> None:
    """One step of AdamW with decoupled weight decay over lists of tensors, in place.

    Args: weights, exp_avgs, exp_avg_sqs  contiguous fp32 or fp64 tensors, all of one dtype, written; grads of the same dtype.
          step  1 at the first step: for the bias correction. weight_decay  one number, or one for each weight.
          scale  multiplies the gradients: clip / norm where that is less than 1. copies  bf16 or fp16 tensors, one for each fp32
          weight, that get the new weights.
    Raises: ValueError for lists of different lengths, sizes or dtypes, tensors that are not contiguous, and step < 1."""
    decays = [float(weight_decay)] * len(weights) if isinstance(weight_decay, (int, float)) else [float(d) for d in weight_decay]
    lists = {"weights": weights, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **({"copies": copies} if copies else {})}
    if wrong := {k: len(many) for k, many in {**lists, "weight_decay": decays}.items() if len(many) != len(weights)}:
        raise ValueError(f"adamw: every list must have one entry for each of the {len(weights)} weights, got {wrong}")
    if step < 1:
        raise ValueError(f"adamw: step must be at least 1 (the first step), got {step}")
    if not len(weights):
        return
    one = weights[0].dtype
    if one not in (torch.float32, torch.float64):
        raise ValueError(f"adamw: weights must be float32 or float64, got {one}; step fp32 weights and give the others as `copies`")
    if copies and (one != torch.float32 or copies[0].dtype not in (torch.bfloat16, torch.float16)):
        raise ValueError(f"adamw: copies must be bfloat16 or float16, of float32 weights, got {copies[0].dtype} of {one}")
    for name, many in lists.items():
        kind = many[0].dtype if name == "copies" else one
        for i, (t, w) in enumerate(zip(many, weights)):
            if t.dtype != kind or t.numel() != w.numel() or not t.is_contiguous() or t.device != weights[0].device:
                raise ValueError(f"adamw: {name}[{i}] must be {w.numel()} contiguous numbers of {kind} on {weights[0].device}, got "
                                 f"{list(t.shape)} {t.dtype} on {t.device}{'' if t.is_contiguous() else ', not contiguous'}")
    if not fused(*weights):
        adamw_ref(weights, grads, exp_avgs, exp_avg_sqs, lr=lr, betas=betas, eps=eps, step=step, weight_decay=decays, scale=scale,
                  copies=copies)
    else:
        _OP(weights, grads, exp_avgs, exp_avg_sqs, copies, decays, lr, *betas, eps, step, scale)
