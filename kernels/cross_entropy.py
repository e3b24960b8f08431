"""cross_entropy: loss = lse(x) - x[target],   lse = m + log(sum(exp(x - m))),   over a vocabulary split among ranks

Shapes    logits, dlogits [N, V/t]    targets [N] int64, global ids
          stats [N, 3], loss, m, total [N] fp32 (fp64 for fp64); m and total saved for backward
Ranks     each rank reduces its columns to stats (max, sum(exp(x - max)), target logit or 0); one all-gather of [N, 3]
          (Megatron: three all-reduces); combined in rank order to m = max, total = sum(sum_r * exp(max_r - m)), target.
          Logits are never gathered.
Backward  dlogits = (exp(x - m) / total - onehot(target)) * dloss: no communication, needs logits, m and total only.
Bytes     fwd NV/t * itemsize + 20N     bwd 2NV/t * itemsize + 20N     (log_softmax + nll_loss: 3 and 4 times NV/t)
FLOPs     fwd 4NV/t   bwd 3NV/t, and one exp per element in each -> bandwidth-bound
Numerics  statistics in fp32, one rounding per output. m and log(total) stay apart, loss = log(total) - (target - m):
          lse rounded to fp32 errs by 5e-4 where logits are 1e4. The CPU adds fp32 sums of 1024 columns up in fp64.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import define, fused, once, tl, triton

# ---- reference ------------------------------------------------------------------------------------------------


def _stats_ref(logits: Tensor, targets: Tensor, first: int, valid: int, ignore_index: int) -> Tensor:
    x = logits if logits.dtype == torch.float64 else logits.float()
    ignored = targets == ignore_index
    x = x[:, :valid].masked_fill(ignored[:, None], -torch.inf)        # [N, valid]
    if not valid:
        return x.new_tensor([-torch.inf, 0.0, 0.0]) + x.sum(1, keepdim=True)   # [N, 3]; + 0 keeps the graph
    m = x.detach().amax(1)                                            # [N]
    total = (x - m.masked_fill(m == -torch.inf, 0.0)[:, None]).exp().sum(1)
    at = targets - first
    here = (at >= 0) & (at < valid) & ~ignored
    target = x.gather(1, at.clamp(0, valid - 1)[:, None])[:, 0].where(here, torch.zeros_like(m))
    return torch.stack([m, total, target], 1)                         # [N, 3]


def _combine(stats: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """stats [t, N, 3] of every rank -> loss, m, total [N]."""
    top, total, target = stats.unbind(-1)                             # [t, N]
    m = top.detach().amax(0)
    m = m.masked_fill(m == -torch.inf, 0.0)                           # an ignored row: no inf - inf below
    total = (total * (top.detach() - m).exp()).sum(0).masked_fill(ignored, 1.0)
    loss = (total.log() - (target.sum(0) - m)).masked_fill(ignored, 0.0)
    return loss, m, total


def cross_entropy_ref(logits: Tensor, targets: Tensor, *, first: int = 0, valid: int | None = None,
                      gather: Callable[[Tensor], Tensor] | None = None, ignore_index: int = -100) -> Tensor:
    stats = _stats_ref(logits, targets, first, logits.shape[1] if valid is None else valid, ignore_index)
    return _combine(gather(stats) if gather else stats[None], targets == ignore_index)[0]


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _stats_kernel(x_ptr, target_ptr, stats_ptr, V, first, valid, ignore_index, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * V
    target = tl.load(target_ptr + row)
    offs = tl.arange(0, BLOCK)
    end = tl.where(target == ignore_index, 0, valid)                  # an ignored row costs nothing: (-inf, 0, 0)
    m, total = -float("inf"), 0.0
    for start in range(0, end, BLOCK):
        at = start + offs
        x = tl.load(x_ptr + at, mask=at < end, other=-float("inf")).to(tl.float32)
        top = tl.maximum(m, tl.max(x, axis=0))
        shift = tl.where(top == -float("inf"), 0.0, top)              # -inf so far: sum 0, not exp(-inf + inf)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), axis=0)
        m = top
    mine = target - first
    logit = tl.load(x_ptr + mine, mask=(mine >= 0) & (mine < end), other=0.0).to(tl.float32)
    tl.store(stats_ptr + row * 3, m)
    tl.store(stats_ptr + row * 3 + 1, total)
    tl.store(stats_ptr + row * 3 + 2, logit)


@triton.jit
def _combine_kernel(stats_ptr, target_ptr, loss_ptr, m_ptr, total_ptr, N, ranks, ignore_index, BLOCK: tl.constexpr):
    """stats [ranks, N, 3] -> loss, m, total [N], in rank order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < N
    ignored = tl.load(target_ptr + row, mask=mask, other=0) == ignore_index
    m = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    for r in range(ranks):
        m = tl.maximum(m, tl.load(stats_ptr + (r * N + row) * 3, mask=mask, other=0.0))
    m = tl.where(m == -float("inf"), 0.0, m)                          # an ignored row: no inf - inf below
    total = tl.zeros([BLOCK], dtype=tl.float32)
    target = tl.zeros([BLOCK], dtype=tl.float32)
    for r in range(ranks):
        at = stats_ptr + (r * N + row) * 3
        total += tl.load(at + 1, mask=mask, other=1.0) * tl.exp(tl.load(at, mask=mask, other=0.0) - m)
        target += tl.load(at + 2, mask=mask, other=0.0)
    total = tl.where(ignored, 1.0, total)
    tl.store(loss_ptr + row, tl.where(ignored, 0.0, tl.log(total) - (target - m)), mask=mask)
    tl.store(m_ptr + row, m, mask=mask)
    tl.store(total_ptr + row, total, mask=mask)


@triton.jit
def _bwd_kernel(dloss_ptr, x_ptr, target_ptr, m_ptr, total_ptr, dx_ptr, V, first, valid, ignore_index,
                BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    end = tl.where(target == ignore_index, 0, valid)                  # zeros for ignored rows and padding columns
    dloss = tl.load(dloss_ptr + row)
    scale = dloss / tl.load(total_ptr + row)
    x = tl.load(x_ptr + row * V + at, mask=at < end, other=-float("inf")).to(tl.float32)
    dx = tl.exp(x - tl.load(m_ptr + row)) * scale - tl.where(at == target - first, dloss, 0.0)
    tl.store(dx_ptr + row * V + at, tl.where(at < end, dx, 0.0), mask=at < V)


# ---- ops ------------------------------------------------------------------------------------------------------


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _launch_stats(logits: Tensor, targets: Tensor, first: int, valid: int, ignore_index: int) -> Tensor:
    N, V = logits.shape
    stats = logits.new_empty(N, 3, dtype=torch.float32)
    if N:
        block = min(4096, triton.next_power_of_2(max(V, 1)))
        _stats_kernel[(N,)](logits, targets, stats, V, first, valid, ignore_index, block, num_warps=8)
    return stats


def _launch_combine(stats: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    loss, m, total = (stats.new_empty(stats.shape[1]) for _ in range(3))
    if loss.numel():
        _combine_kernel[(triton.cdiv(loss.numel(), 256),)](stats, targets, loss, m, total, loss.numel(), stats.shape[0], ignore_index, 256)
    return loss, m, total


def _launch_bwd(dloss: Tensor, logits: Tensor, targets: Tensor, m: Tensor, total: Tensor, first: int, valid: int,
                ignore_index: int) -> Tensor:
    N, V = logits.shape
    dlogits = torch.empty_like(logits)
    if N and V:
        block = min(4096, triton.next_power_of_2(V))
        grid = (N, triton.cdiv(V, block))
        _bwd_kernel[grid](dloss, logits, targets, m, total, dlogits, V, first, valid, ignore_index, block, num_warps=8)
    return dlogits


define("cross_entropy_stats(Tensor logits, Tensor targets, int first, int valid, int ignore_index) -> Tensor",
       _launch_stats,
       lambda logits, *_: logits.new_empty(logits.shape[0], 3, dtype=_stats_dtype(logits)))
define("cross_entropy_combine(Tensor stats, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor)",
       _launch_combine,
       lambda stats, targets, ignore_index: tuple(stats.new_empty(stats.shape[1]) for _ in range(3)))
define("cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor m, Tensor total, int first, int valid, "
       "int ignore_index) -> Tensor",
       _launch_bwd,
       lambda dloss, logits, *_: torch.empty_like(logits))

# ---- autograd -------------------------------------------------------------------------------------------------


class _CrossEntropy(torch.autograd.Function):
    """Not register_autograd: between the two ops stands `gather`, which no schema can take."""

    @staticmethod
    def forward(ctx, logits, targets, first, valid, gather, ignore_index):
        stats = torch.ops.interlace.cross_entropy_stats(logits, targets, first, valid, ignore_index)
        every = gather(stats).contiguous() if gather else stats[None]
        loss, m, total = torch.ops.interlace.cross_entropy_combine(every, targets, ignore_index)
        ctx.save_for_backward(logits, targets, m, total)
        ctx.args = first, valid, ignore_index
        return loss

    @staticmethod
    @once("cross_entropy")
    def backward(ctx, dloss):
        dlogits = torch.ops.interlace.cross_entropy_bwd(dloss.contiguous(), *ctx.saved_tensors, *ctx.args)
        return dlogits, None, None, None, None, None


# ---- public ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, *, first: int = 0, valid: int | None = None,
                  gather: Callable[[Tensor], Tensor] | None = None, ignore_index: int = -100) -> Tensor:
    """Cross entropy of every row over a vocabulary of which this rank holds columns first .. first + V/t.

    Args: logits [N, V/t] float32, bfloat16, float16 or float64; targets [N] int64, ids in the whole vocabulary;
        valid: columns of this slice that are real; the rest is padding, out of the softmax and with gradient zero
        (None: all; 0 is fine); gather: [N, 3] -> [t, N, 3], all-gathers over the ranks in rank order, and is differentiable where the
        reference runs (parallel.collectives.stack_from; None: one rank);
        ignore_index: rows with this target have loss and gradient zero.
    Returns: loss [N], float32 (float64 for float64), the same on every rank.
    A target outside the vocabulary goes unseen (its row's loss is lse): no rank alone can tell. The caller checks.
    Raises: ValueError on shapes or dtypes that do not fit. Source: arXiv:1909.08053, section 3.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError("cross_entropy: logits must be floating point [N, V], "
                         f"got {logits.dtype} {list(logits.shape)}; "
                         "flatten the batch with logits.flatten(0, -2)")
    N, V = logits.shape
    if targets.shape != (N,) or targets.dtype != torch.int64:
        raise ValueError(f"cross_entropy: targets must be int64 [{N}], one id per row of logits, "
                         f"got {targets.dtype} {list(targets.shape)}; use targets.flatten().long()")
    if targets.device != logits.device:
        raise ValueError(f"cross_entropy: logits and targets must be on one device, got {logits.device} and "
                         f"{targets.device}; move the targets")
    valid = V if valid is None else valid
    if not 0 <= valid <= V:
        raise ValueError(f"cross_entropy: valid must be in [0, {V}], the columns of this slice, got {valid}; "
                         "use min(max(vocab - first, 0), V)")
    if not fused(logits):
        return cross_entropy_ref(logits, targets, first=first, valid=valid, gather=gather, ignore_index=ignore_index)
    return _CrossEntropy.apply(logits.contiguous(), targets.contiguous(), first, valid, gather, ignore_index)
