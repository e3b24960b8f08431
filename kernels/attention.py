"""attention: o = softmax(scale * q k^T) v,   each query over the keys up to its own place (causal)

Shapes    q, o, do, dq [S, B, H, D]    k, v, dk, dv [S, B, G, D], head h of q with head h // (H / G) of k and v (GQA, MQA)
          lse [B, H, S] fp32, saved for backward: log of the sum of exp(scale * q k^T).  Inputs may be strided in S, B and heads:
          slices of a fused qkv buffer, or transposed [B, heads, S, D], are read in place; what comes out is contiguous
Backward  p = exp(scale * q k^T - lse);  delta = sum(do * o, -1);  ds = p * (do v^T - delta)
          dq = scale * ds k;  dk = scale * ds^T q;  dv = p^T do, the last two summed over a group's heads
Bytes     fwd (2H + 2G) S*B*D * itemsize + 4*B*H*S    bwd (4H + 4G) S*B*D * itemsize + 4*B*H*S   (scores never leave the cache)
FLOPs     fwd 2*B*H*S*(S + 1)*D    bwd 5*B*H*S*(S + 1)*D
Numerics  fp32 sums and softmax whatever the dtype, one rounding per output, one order: no result depends on threads or on B
Where     CPU, in fp32, bf16 and fp16; elsewhere torch's own scaled_dot_product_attention, which on CUDA is FlashAttention or cuDNN.
          A core of Zen 4, the causal half counted: torch 35 to 60 GFLOP/s, ours 50 (S = 256, D = 32) to 90 (S = 2048, D = 64)
Source    recomputation from lse: arXiv:2205.14135, 2307.08691; the register tiles of csrc/cpu/gemm.h
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .autocast import lowered
from .dispatch import TILES, define, differentiable, transformed

# ---- reference ------------------------------------------------------------------------------------------------


def attention_ref(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """torch's own."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))              # [B, heads, S, D]
    groups = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)  # FlashAttention takes groups; its CPU kernel, and others, do not
    if k.shape[1] != q.shape[1] and not groups:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups).permute(2, 0, 1, 3)


# ---- ops ------------------------------------------------------------------------------------------------------


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    S, B, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, S, dtype=torch.float32)


def _fake_bwd(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


define("attention_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", "csrc/cpu", _fake_fwd)
define("attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
       "csrc/cpu", _fake_bwd)
_BWD = torch.ops.interlace.attention_bwd.default

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, do, _=None):
    return *_BWD(do if do.stride(-1) == 1 else do.contiguous(), *ctx.saved_tensors, ctx.scale), None


_attention = differentiable("attention_fwd", _setup, _backward)

# ---- public ---------------------------------------------------------------------------------------------------


def ours(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True where our kernel runs, False where torch's does."""
    return (TILES and not dispatch._REFERENCE_ONLY and not transformed() and q.numel() > 0
            and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and all(x.device.type == "cpu" and x.stride(-1) == 1 for x in (q, k, v)))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal self-attention. For q [B, H, S, D] as torch has it: permute(2, 0, 1, 3) all three, and the result by (1, 2, 0, 3); no copy.

    Args: q [S, B, H, D], k and v [S, B, G, D], H a multiple of G, one floating dtype and device, strided but for D; scale: of the
        scores, 1 / sqrt(D) where None.
    Returns: o [S, B, H, D]. Raises: ValueError for other shapes, dtypes or devices. Source: arXiv:1706.03762.
    """
    q, k, v = lowered(q), lowered(k), lowered(v)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"attention: q must be [S, B, H, D], k and v [S, B, G, D], got {list(q.shape)}, {list(k.shape)} and "
                         f"{list(v.shape)}; a shorter q, or another width of v, is for scaled_dot_product_attention")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: the heads of q must be a multiple of those of k and v, got {q.shape[2]} and {k.shape[2]}; each head "
                         "of k and v serves as many of q")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device or not q.is_floating_point():
        raise ValueError("attention: q, k and v must have one floating dtype and device, got "
                         f"{', '.join(f'{x.dtype} on {x.device}' for x in (q, k, v))}; cast or move them")
    if not ours(q, k, v):
        return attention_ref(q, k, v, scale)
    return _attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale))
