"""expert_mlp: the feed-forward of all experts as one node, o[t] = sum_k w2[e] @ (act(w13[e] @ x[t]) * p[t, k]) over a token's experts

Shapes    x, o, do [T, H]    w13 [E, 2I, H] (gate rows, then up rows; [E, I, H] with gelu)    w2 [E, H, I]    probs [T, K]
          rows form: offsets for the plan, x and o [R, H] in expert order, probs [R]
Forward   z[r] = x[t(r)] @ w13[e].T (gathered on load);  a = act(z) * p;  y[r] = a[r] @ w2[e].T;  o[t] = sum_k y[row(t, k)] (+ addends)
Backward  da[r] = do[t(r)] @ w2[e];  dz, dp, a from da, z, p in one pass;  dw2[e] = sum_r do[t(r)] (outer) a[r];
          dw13[e] = sum_r dz[r] (outer) x[t(r)];  dx[t] = sum_k dz[row(t, k)] @ w13[e]
Saves     x, z, p and the plan's index vectors: neither permuted tokens, nor a, nor y (probs before the second product: dp needs no y)
FLOPs     fwd 6RHI   bwd 12RHI  -> compute-bound
Numerics  as grouped_gemm, swiglu and unpermute: fp32 sums in one order, bitwise repeatable; p is never rounded.  Source: arXiv:2512.14080
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import lowered
from .dispatch import fused, once
from .grouped_gemm import check_experts, grouped_gemm_ref, rows_gemm, rows_gemm_swiglu, rows_wgrad
from .permute import check_probs, permute_ref, slots_of
from .route_plan import RoutePlan
from .swiglu import swiglu_ref
from .unpermute import unpermute_ref

# ---- reference ------------------------------------------------------------------------------------------------


def _gelu_ref(z: Tensor, probs: Tensor | None) -> Tensor:
    y = F.gelu(z if z.dtype == torch.float64 else z.float())
    return (y if probs is None else y * probs[..., None].to(y.dtype)).to(z.dtype)


_REF: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu_ref, "gelu": _gelu_ref}


def expert_mlp_ref(x: Tensor, w13: Tensor, w2: Tensor, plan: RoutePlan | Tensor, probs: Tensor | None = None,
                   residual: Tensor | None = None, shared: Tensor | None = None, activation: str = "swiglu") -> Tensor:
    """`expert_mlp` in torch operations, one product after the other; offsets are read by the host."""
    if isinstance(plan, Tensor):
        return grouped_gemm_ref(_REF[activation](grouped_gemm_ref(x, w13, plan), probs), w2, plan)
    rows, moved = permute_ref(x, plan, x.new_zeros(plan.row_of_slot.shape) if probs is None else probs)
    y = expert_mlp_ref(rows, w13, w2, plan.offsets, None if probs is None else moved, activation=activation)
    return unpermute_ref(y, plan, None, residual, shared)


# ---- autograd -------------------------------------------------------------------------------------------------


def _act_backward(da: Tensor, z: Tensor, p: Tensor | None, activation: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """dz, dp, and the output again."""
    if activation == "swiglu":
        dz, dp, a = torch.ops.interlace.swiglu_probs_bwd(da, z, p)
        return dz, None if p is None else dp, a
    zf, daf = (t if t.dtype == torch.float64 else t.float() for t in (z, da))
    g = F.gelu(zf)
    if p is None:
        return torch.ops.aten.gelu_backward(daf, zf).to(z.dtype), None, g.to(z.dtype)
    return torch.ops.aten.gelu_backward(daf * p[:, None], zf).to(z.dtype), (daf * g).sum(-1), (g * p[:, None]).to(z.dtype)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w13, w2, probs, residual, shared, offsets, row, slots, activation, main_grads):
        ops, plan = torch.ops.interlace, None if row is None else (row, slots)
        p = probs
        if row is not None and probs is not None:
            p = ops.permute_fwd(x[:, :0], probs, row, slots)[1]       # [R], 0 on padding
        if activation == "swiglu":
            z, a = rows_gemm_swiglu(x, w13, offsets, plan, p)
        else:
            z = rows_gemm(x, w13, offsets, plan)
            a = _gelu_ref(z, p)
        o = rows_gemm(a, w2, offsets)
        if row is not None:
            o = ops.unpermute_fwd(o, None, residual, shared, row, slots)
        ctx.save_for_backward(x, z, p, w13, w2, offsets, row, slots)
        ctx.activation, ctx.main_grads = activation, main_grads
        return o

    @staticmethod
    @once("expert_mlp")
    def backward(ctx, do):
        x, z, p, w13, w2, offsets, row, slots = ctx.saved_tensors
        need_x, need_13, need_2, need_p, need_res, need_sh = ctx.needs_input_grad[:6]
        main13, main2 = ctx.main_grads or (None, None)
        plan, topk = (None, 1) if row is None else ((row, slots), row.shape[1])
        g = do.contiguous()
        dx = dw13 = dw2 = dprobs = None
        dz, dp, a = _act_backward(rows_gemm(g, w2, offsets, plan, dgrad=True), z, p, ctx.activation)
        if need_2:
            dw2 = rows_wgrad(g, a, offsets, topk, g_slots=slots, main_grad=main2)
        del a
        if need_13:
            dw13 = rows_wgrad(dz, x, offsets, topk, x_slots=slots, main_grad=main13)
        if need_x:
            dx = rows_gemm(dz, w13, offsets, dgrad=True)
            if row is not None:
                dx = torch.ops.interlace.unpermute_fwd(dx, None, None, None, row, slots)
        if need_p and dp is not None:
            dprobs = dp if row is None else slots_of(dp, row)
        return dx, dw13, dw2, dprobs, do if need_res else None, do if need_sh else None, None, None, None, None, None


# ---- public ---------------------------------------------------------------------------------------------------


def _check(x: Tensor, w13: Tensor, w2: Tensor, plan: RoutePlan | Tensor, probs: Tensor | None, addends: tuple[Tensor | None, ...],
           activation: str, main_grads: tuple[Tensor, Tensor] | None) -> None:
    if activation not in _REF:
        raise ValueError(f"expert_mlp: activation must be 'swiglu' or 'gelu', got {activation!r}")
    rows, offsets = isinstance(plan, Tensor), plan if isinstance(plan, Tensor) else plan.offsets
    main13, main2 = main_grads or (None, None)
    check_experts("expert_mlp", x, w13, offsets, None if isinstance(plan, Tensor) else plan, main13)
    gates = 2 if activation == "swiglu" else 1
    if w2.ndim != 3 or w13.shape[1] != gates * w2.shape[2] or w2.shape[:2] != (w13.shape[0], x.shape[1]):
        raise ValueError(f"expert_mlp: w13 [E, {'2I' if gates == 2 else 'I'}, H] and w2 [E, H, I] must agree for {activation}, "
                         f"got {list(w13.shape)} and {list(w2.shape)}")
    check_experts("expert_mlp", x.new_empty(0, w2.shape[2]), w2, offsets, None, main2)
    if isinstance(plan, RoutePlan):
        check_probs("expert_mlp", probs, plan)
    elif probs is not None and (probs.shape != x.shape[:1] or not probs.is_floating_point()):
        raise ValueError(f"expert_mlp: probs must be floating {list(x.shape[:1])}, one for each row, got {probs.dtype} {list(probs.shape)}")
    for t in addends:
        if t is not None and (rows or t.shape != x.shape or t.dtype != x.dtype):
            raise ValueError(f"expert_mlp: residual and shared must be {list(x.shape)} {x.dtype} like x and need a plan, "
                             f"got {list(t.shape)} {t.dtype}{' with offsets alone' if rows else ''}")


def expert_mlp(x: Tensor, w13: Tensor, w2: Tensor, plan: RoutePlan | Tensor, probs: Tensor | None = None, residual: Tensor | None = None,
               shared: Tensor | None = None, activation: str = "swiglu", main_grads: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The experts' feed-forward network, which keeps x, the pre-activation and index vectors for its backward, and nothing else.

    Args: x [T, H]; w13 [E, 2I, H], w2 [E, H, I] of x's dtype; plan: of `route_plan` for these tokens, then probs [T, K] and the output
      [T, H] is the sum over a token's experts, plus shared [T, H], plus residual [T, H]; or plan: offsets int32 [E+1], then x [R, H]
      holds rows in expert order (as an expert-parallel dispatch leaves them), probs [R], and so is the output [R, H].
      activation: "swiglu", or "gelu" (exact) with w13 [E, I, H]; main_grads: fp32 tensors like (w13, w2) that the backward adds to,
      w13 and w2 then get no gradient.
    Returns: o. Raises: ValueError where shapes disagree.
    """
    x, w13, w2 = lowered(x), lowered(w13), lowered(w2)
    residual, shared = (None if t is None else lowered(t) for t in (residual, shared))   # as autocast has addmm's
    _check(x, w13, w2, plan, probs, (residual, shared), activation, main_grads)
    if not fused(x, w13, w2):
        if main_grads is not None:
            raise ValueError("expert_mlp: main_grads must be None where the reference runs, got tensors; build the C++ ops (make setup)")
        return expert_mlp_ref(x, w13, w2, plan, probs, residual, shared, activation)
    if probs is not None:
        probs = probs.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
    residual, shared = (None if t is None else t.contiguous().view_as(t) for t in (residual, shared))   # torch.compile: may be x itself
    maps = (plan, None, None) if isinstance(plan, Tensor) else (plan.offsets, plan.row_of_slot, plan.slot_of_row)
    return _Experts.apply(x.contiguous(), w13.contiguous(), w2.contiguous(), probs, residual, shared, *maps, activation, main_grads)
