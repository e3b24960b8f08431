"""router: each token's K experts, their probs, and the sums that aux and z losses are made of, in one pass over the logits

Shapes    logits l, dlogits [T, E]    ids, probs, dprobs [T, K]    lse [T]    score_sums, counts [sequences, E]    bias [E]
          token t is of sequence t % sequences: tokens are [S, B] flattened, sequences = B
Scores    lse = log(sum exp(l));  s = exp(l - lse), or 1 / (1 + exp(-l)), or sqrt(log(1 + exp(l)));  n = s, or s / (sum_e s + 1e-20)
Choice    K largest of v = l (softmax after the choice, and always without bias and groups, where the order is the same and nothing
          saturates), else s, each + bias; of groups: those group_topk whose group_score largest v sum to most. Equal v: lower index.
Probs     q = s[ids];  normalised: q / (sum_k q + 1e-20), for softmax the softmax of l[ids];  probs = scaling_factor * q
Sums      score_sums = sum_t n;  counts = sum_t,k [ids = e]. Tokens that are not valid, and ids of -1, are in neither.
Backward  of probs, score_sums and lse into dlogits in one kernel: g_k = sum_j dq_j dq_j/ds_k, and D = dscore_sums[t % sequences];
          softmax   dl = s (D - sum_e s D + dlse) + [e = id_k] g_k s_k, less s sum_k g_k s_k where not normalised
          others    dl = s' (D - sum_e n D) / sum_e s + dlse exp(l - lse) + [e = id_k] g_k s'_k
          s' = s (1 - s), sigmoid(l) / (2 s). The choice has no gradient, nor has the bias. Saved: logits, ids.
Bytes     fwd TE * itemsize + 8TK + 4T    bwd 2TE * itemsize + 8TK + 4T, no [T, E] in between    FLOPs  about 5TE + 2TKE, one exp an
          element (two for sigmoid and lse)  -> bandwidth-bound for small K
Numerics  fp32 (fp64 for fp64) throughout; sums over tokens in fixed order, no float atomics. Ties by (value, lower index), exactly:
          floats are compared as ordered integers, -0 = 0, a NaN the largest. A token's ids and probs do not depend on its batch.
          NaN logits give ids in range and NaN probs. Source: arXiv:2101.03961 (aux), 2202.08906 (z), 2412.19437 (bias, groups).
"""
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import define, differentiable, fused, tl, triton

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
MOST_EXPERTS = 1024                                                   # a row is held in registers
_TINY = 1e-20


class Routing(NamedTuple):
    """Where tokens want to go. probs, score_sums and lse are differentiable; fp32 (fp64 for fp64 logits)."""

    ids: Tensor                                                       # [T, K] int32, largest first; -1 for tokens that are not valid
    probs: Tensor                                                     # [T, K], 0 where ids are -1
    score_sums: Tensor                                                # [sequences, E] sum over tokens of scores that sum to 1
    lse: Tensor                                                       # [T] log of the sum of exp of the logits; 0 where not valid
    counts: Tensor                                                    # [sequences, E] int32 tokens of each expert, before any capacity


# ---- reference ------------------------------------------------------------------------------------------------


def _largest(v: Tensor, n: int, allowed: Tensor | None = None) -> Tensor:
    """Columns [T, n] of the n largest of v, the lower first where equal, NaN the largest; of those allowed."""
    order = (v + 0.0).sort(dim=1, descending=True, stable=True).indices   # + 0.0: no -0
    if allowed is not None:
        order = order.gather(1, allowed.gather(1, order).byte().sort(dim=1, descending=True, stable=True).indices)
    return order[:, :n]


def _choose_ref(v: Tensor, K: int, groups: int, group_topk: int, group_best: int) -> Tensor:
    if groups == 1:
        return _largest(v, K)
    T, E = v.shape
    best = v.view(T * groups, E // groups)
    best = best.gather(1, _largest(best, group_best)).cumsum(1)[:, -1].view(T, groups)        # summed largest first
    kept = torch.zeros(T, groups, dtype=torch.bool, device=v.device).scatter_(1, _largest(best, group_topk), True)
    return _largest(v, K, kept.repeat_interleave(E // groups, 1))


def _router_ref(logits: Tensor, bias: Tensor | None, valid: Tensor | None, given: Tensor | None, K: int, func: int, norm: bool,
                by_score: bool, groups: int, group_topk: int, group_best: int, scaling: float, sequences: int) -> tuple[Tensor, ...]:
    (T, E), device = logits.shape, logits.device
    ok = torch.ones(T, dtype=torch.bool, device=device) if valid is None else valid
    x = logits.to(_acc(logits)).masked_fill(~ok[:, None], 0.0)        # what is not valid must not come through, NaN least of all
    m = x.detach().amax(1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0.0)
    e = (x - m).exp()
    lse = (m + e.sum(1, keepdim=True).log())[:, 0].masked_fill(~ok, 0.0)
    if func == 0:
        s = n = e / e.sum(1, keepdim=True)
    else:
        s = x.sigmoid() if func == 1 else torch.logaddexp(x, torch.zeros_like(x)).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
        n = s / (s.sum(1, keepdim=True) + _TINY)
    if given is None:
        v = (s if by_score else x).detach()
        given = _choose_ref(v if bias is None else v + bias, K, groups, group_topk, group_best)
    on = ok[:, None] & (given >= 0) & (given < E)
    at = torch.where(on, given, 0).long()
    xk = x.gather(1, at)
    if func == 0 and norm:
        q = xk.masked_fill(~on, torch.finfo(x.dtype).min).softmax(1)
    else:
        q = s.gather(1, at).masked_fill(~on, 0.0)
        q = q / (q.sum(1, keepdim=True) + _TINY) if norm else q
    q = q.masked_fill(~on | (xk == -torch.inf), 0.0)
    of = torch.arange(T, device=device) % sequences
    sums = n.masked_fill(~ok[:, None], 0.0).double()                  # summed in token order, which fp32 would feel
    sums = sums.new_zeros(sequences, E).index_add(0, of, sums).to(x.dtype)
    slot = (of[:, None] * E + at)[on]
    counts = torch.zeros(sequences * E, dtype=torch.int32, device=device).index_add(0, slot, torch.ones_like(slot, dtype=torch.int32))
    return q * scaling, sums, lse, torch.where(on, at, -1).int(), counts.view(sequences, E)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _ordered(v):
    """int32 in the order of floats: -0 = 0, NaN the largest; above the -2^31 of what may not be chosen."""
    bits = tl.where(v == 0, 0.0, v).to(tl.int32, bitcast=True)
    return tl.where(v != v, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _take(key, col, N: tl.constexpr):
    """Of each row of key: the largest, and the first column it is in."""
    top = tl.max(key, axis=1)
    return top, tl.min(tl.where(key == top[:, None], col[None, :], N), axis=1)


@triton.jit
def _keep_groups(key, G, GP: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, KEEP: tl.constexpr, BEST: tl.constexpr):
    """key [R, GP * SP], -2^31 outside the KEEP groups whose BEST largest values sum to most."""
    low: tl.constexpr = -0x80000000
    members, member = tl.reshape(key, [R * GP, SP]), tl.arange(0, SP)
    total = tl.zeros([R * GP], dtype=tl.float32)
    for _i in range(BEST):
        top, at = _take(members, member, SP)
        total += (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)              # back to the value
        members = tl.where(member[None, :] == at[:, None], low, members)
    group, kept = tl.arange(0, GP), tl.zeros([R, GP], dtype=tl.int32)
    score = tl.where(group[None, :] < G, _ordered(tl.reshape(total, [R, GP])), low)
    for _i in range(KEEP):
        _top, at = _take(score, group, GP)
        hit = group[None, :] == at[:, None]
        kept, score = tl.where(hit, 1, kept), tl.where(hit, low, score)
    kept = tl.reshape(tl.broadcast_to(tl.reshape(kept, [R, GP, 1]), [R, GP, SP]), [R, GP * SP])
    return tl.where(kept != 0, key, low)


@triton.jit
def _unit(x, FUNC: tl.constexpr):
    """(s, ds/dx) of an independent score; log(1 + z) = 2 atanh(z / (2 + z)), its series cut below half an ulp for z <= 1."""
    z = tl.exp(-tl.abs(x))
    s = tl.where(x >= 0, 1.0, z) / (1.0 + z)
    if FUNC == 1:
        return s, z / ((1.0 + z) * (1.0 + z))
    w = z / (2.0 + z)
    r = w * w
    log1p = 2 * w * (1 + r * (1 / 3 + r * (1 / 5 + r * (1 / 7 + r * (1 / 9 + r * (1 / 11 + r * (1 / 13)))))))
    root = tl.sqrt(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p)
    return root, tl.where(root == 0, 0.0, s / (2 * root))


@triton.jit
def _softmax(x):
    """(exp(x - m), its sum, m) of each row; of -inf only: (0, 0, 0)."""
    m = tl.max(x, axis=1)
    m = tl.where(m == -float("inf"), 0.0, m)
    e = tl.exp(x - m[:, None])
    return e, tl.sum(e, axis=1), m


@triton.jit
def _weigh(xk, total, m, FUNC: tl.constexpr, NORM: tl.constexpr):
    """q [R, KP] of the chosen logits, -inf where there is none, and ds/dx over the divisor."""
    if FUNC == 0:
        if NORM:
            e, total, _m = _softmax(xk)
        else:
            e = tl.exp(xk - m[:, None])
        q = e / total[:, None]
        slope = q
    else:
        q, slope = _unit(xk, FUNC)
        if NORM:
            total = tl.sum(q, axis=1)[:, None] + 1e-20
            one = q
            q, slope = q / total, slope / total
            if q.shape[1] == 1:                                       # exactly 1, where a GPU's division is an ulp off
                q = tl.where(one > 1e-12, 1.0, q)
    return tl.where(xk == -float("inf"), 0.0, q), tl.where(xk == -float("inf"), 0.0, slope)


@triton.jit
def _fwd_kernel(x_ptr, bias_ptr, valid_ptr, given_ptr, ids_ptr, p_ptr, lse_ptr, sums_ptr, counts_ptr, T, E, S, G, steps, scaling,
                K: tl.constexpr, KP: tl.constexpr, FUNC: tl.constexpr, NORM: tl.constexpr, BY_SCORE: tl.constexpr,
                KEEP: tl.constexpr, BEST: tl.constexpr, SIZE: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, R: tl.constexpr):
    """`steps` tiles of R tokens of one sequence. Columns are [GP, SP], groups of SIZE experts padded to powers of two."""
    chunk, of = tl.program_id(0), tl.program_id(1)
    low: tl.constexpr = -0x80000000
    C: tl.constexpr = GP * SP
    col, kk = tl.arange(0, C), tl.arange(0, KP)
    e = col if SIZE == SP else tl.where(col % SP < SIZE, col // SP * SIZE + col % SP, E)
    real = e < E
    sums, hits = tl.zeros([R, C], dtype=tl.float32), tl.zeros([R, C], dtype=tl.int32)
    for step in range(steps):
        t = ((chunk * steps + step) * R + tl.arange(0, R)).to(tl.int64) * S + of
        here = t < T
        live = here
        if valid_ptr is not None:
            live = here & (tl.load(valid_ptr + t, mask=here, other=0) != 0)
        x = tl.load(x_ptr + t[:, None] * E + e[None, :], mask=live[:, None] & real[None, :], other=-float("inf")).to(tl.float32)
        exps, total, m = _softmax(x)
        if FUNC == 0:
            s = exps / total[:, None]
            n = s
        else:
            s, _ds = _unit(x, FUNC)
            n = s / (tl.sum(s, axis=1)[:, None] + 1e-20)
        sums += tl.where(live[:, None], n, 0.0)
        if given_ptr is None:
            v = s if BY_SCORE else x
            if bias_ptr is not None:
                v += tl.load(bias_ptr + e, mask=real, other=0.0)[None, :]
            key = tl.where(real[None, :], _ordered(v), low)
            if GP > 1:
                key = _keep_groups(key, G, GP, SP, R, KEEP, BEST)
        xk = tl.full([R, KP], -float("inf"), dtype=tl.float32)
        for k in range(K):
            if given_ptr is None:
                _top, at = _take(key, col, C)
                key = tl.where(col[None, :] == at[:, None], low, key)
                at = at if SIZE == SP else at // SP * SIZE + at % SP
            else:
                at = tl.load(given_ptr + t * K + k, mask=live, other=-1)
            at = tl.where(live & (at >= 0) & (at < E), at, -1)
            hits += (e[None, :] == at[:, None]).to(tl.int32)
            tl.store(ids_ptr + t * K + k, at, mask=here)
            one = tl.load(x_ptr + t * E + at, mask=at >= 0, other=-float("inf")).to(tl.float32)
            xk = tl.where(kk[None, :] == k, one[:, None], xk)
        q, _slope = _weigh(xk, total, m, FUNC, NORM)
        tl.store(p_ptr + t[:, None] * K + kk[None, :], q * scaling, mask=here[:, None] & (kk < K)[None, :])
        tl.store(lse_ptr + t, tl.where(live, m + tl.log(total), 0.0), mask=here)
    out = (chunk * S + of).to(tl.int64) * E + e
    tl.store(sums_ptr + out, tl.sum(sums, axis=0), mask=real)
    tl.store(counts_ptr + out, tl.sum(hits, axis=0), mask=real)


@triton.jit
def _sum_kernel(part_ptr, counted_ptr, sums_ptr, counts_ptr, chunks, N, R: tl.constexpr, BLOCK: tl.constexpr):
    """Partial sums [chunks, N] to [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, count = tl.zeros([R, BLOCK], dtype=tl.float32), tl.zeros([R, BLOCK], dtype=tl.int32)
    for first in range(0, chunks, R):
        c = first + tl.arange(0, R)
        place, mask = c[:, None].to(tl.int64) * N + at[None, :], (c < chunks)[:, None] & (at < N)[None, :]
        total += tl.load(part_ptr + place, mask=mask, other=0.0)
        count += tl.load(counted_ptr + place, mask=mask, other=0)
    tl.store(sums_ptr + at, tl.sum(total, axis=0), mask=at < N)
    tl.store(counts_ptr + at, tl.sum(count, axis=0), mask=at < N)


@triton.jit
def _bwd_kernel(dp_ptr, dsums_ptr, dlse_ptr, x_ptr, ids_ptr, valid_ptr, dx_ptr, T, E, S, scaling, K: tl.constexpr, KP: tl.constexpr,
                FUNC: tl.constexpr, NORM: tl.constexpr, C: tl.constexpr, R: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    e, kk = tl.arange(0, C), tl.arange(0, KP)
    here = t < T
    live = here
    if valid_ptr is not None:
        live = here & (tl.load(valid_ptr + t, mask=here, other=0) != 0)
    at = t[:, None] * E + e[None, :]
    mask = live[:, None] & (e < E)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=-float("inf")).to(tl.float32)
    dense = tl.zeros([R], dtype=tl.float32)                           # what softmax's gradient has in common for all columns
    total, m = dense, dense
    if FUNC == 0 or dlse_ptr is not None:
        exps, total, m = _softmax(x)
        soft = exps / total[:, None]
    if dlse_ptr is not None:
        dense += tl.load(dlse_ptr + t, mask=live, other=0.0)
    dx = tl.zeros([R, C], dtype=tl.float32)
    if dsums_ptr is not None:
        D = tl.load(dsums_ptr + (t % S)[:, None] * E + e[None, :], mask=mask, other=0.0)
        if FUNC == 0:
            dx += soft * D
            dense -= tl.sum(soft * D, axis=1)
        else:
            s, slope = _unit(x, FUNC)
            over = 1.0 / (tl.sum(s, axis=1) + 1e-20)
            dx += slope * over[:, None] * (D - (tl.sum(s * D, axis=1) * over)[:, None])
    if dp_ptr is not None:
        slot, some = t[:, None] * K + kk[None, :], here[:, None] & (kk < K)[None, :]
        id = tl.load(ids_ptr + slot, mask=some, other=-1)
        xk = tl.load(x_ptr + t[:, None] * E + id, mask=id >= 0, other=-float("inf")).to(tl.float32)
        dq = tl.load(dp_ptr + slot, mask=id >= 0, other=0.0) * scaling
        q, slope = _weigh(xk, total, m, FUNC, NORM)
        mean = tl.sum(q * dq, axis=1)
        if FUNC == 0 and not NORM:
            dense -= mean
        g = slope * (dq - mean[:, None] if NORM else dq)
        for k in range(K):
            one = tl.load(ids_ptr + t * K + k, mask=here, other=-1)
            dx += tl.where(e[None, :] == one[:, None], tl.sum(tl.where(kk[None, :] == k, g, 0.0), axis=1)[:, None], 0.0)
    if FUNC == 0 or dlse_ptr is not None:
        dx += soft * dense[:, None]
    tl.store(dx_ptr + at, tl.where(live[:, None], dx, 0.0), mask=here[:, None] & (e < E)[None, :])


# ---- ops ------------------------------------------------------------------------------------------------------


def _acc(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _outputs(logits: Tensor, K: int, sequences: int) -> tuple[Tensor, ...]:
    (T, E), acc = logits.shape, _acc(logits)
    new = lambda shape, dtype: logits.new_empty(shape, dtype=dtype)  # noqa: E731
    return new((T, K), acc), new((sequences, E), acc), new((T,), acc), new((T, K), torch.int32), new((sequences, E), torch.int32)


def _tokens(columns: int) -> int:
    return max(1, min(64, 1024 // columns))                           # of a tile: 8 elements a thread, whatever T is; 16 spill


def _launch_fwd(logits: Tensor, bias: Tensor | None, valid: Tensor | None, given: Tensor | None, K: int, func: int, norm: bool,
                by_score: bool, groups: int, group_topk: int, group_best: int, scaling: float, S: int) -> tuple[Tensor, ...]:
    (T, E), pow2 = logits.shape, triton.next_power_of_2
    probs, sums, lse, ids, counts = _outputs(logits, K, S)
    if not T:
        return probs, sums.zero_(), lse, ids, counts.zero_()
    size, gp, sp = E // groups, pow2(groups), pow2(E // groups)
    whole = groups == 1 or sp == size                                 # columns are experts
    R = _tokens(gp * sp)
    tiles = triton.cdiv(triton.cdiv(T, S), R)
    steps = triton.cdiv(tiles, max(1, 1024 // S))                     # at most 1024 programs, or one a sequence
    chunks = triton.cdiv(tiles, steps)
    part, counted = (sums, counts) if chunks == 1 else (sums.new_empty(chunks, S, E), counts.new_empty(chunks, S, E))
    _fwd_kernel[(chunks, S)](logits, bias, valid, given, ids, probs, lse, part, counted, T, E, S, groups, steps, scaling, K, pow2(K),
                             func, norm, by_score, group_topk, group_best, sp if whole else size, gp, sp, R, num_warps=4)
    if chunks > 1:
        _sum_kernel[(triton.cdiv(S * E, 32),)](part, counted, sums, counts, chunks, S * E, 64, 32, num_warps=4)
    return probs, sums, lse, ids, counts


def _launch_bwd(dprobs: Tensor | None, dsums: Tensor | None, dlse: Tensor | None, logits: Tensor, ids: Tensor, valid: Tensor | None,
                func: int, norm: bool, scaling: float, sequences: int) -> Tensor:
    (T, E), K = logits.shape, ids.shape[1]
    dlogits, columns = torch.empty_like(logits), triton.next_power_of_2(E)
    if T:
        R = _tokens(columns)
        _bwd_kernel[(triton.cdiv(T, R),)](dprobs, dsums, dlse, logits, ids, valid, dlogits, T, E, sequences, scaling, K,
                                          triton.next_power_of_2(K), func, norm, columns, R, num_warps=4)
    return dlogits


define("router_fwd(Tensor logits, Tensor? bias, Tensor? valid, Tensor? given, int K, int func, bool norm, bool by_score, int groups, "
       "int group_topk, int group_best, float scaling, int sequences) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
       _launch_fwd, lambda logits, bias, valid, given, K, *rest: _outputs(logits, K, rest[-1]))
define("router_bwd(Tensor? dprobs, Tensor? dsums, Tensor? dlse, Tensor logits, Tensor ids, Tensor? valid, int func, bool norm, "
       "float scaling, int sequences) -> Tensor",
       _launch_bwd, lambda dprobs, dsums, dlse, logits, *_: torch.empty_like(logits))

# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    logits, _, valid, _, _, func, norm, *_, scaling, sequences = inputs
    *_, ids, counts = output
    ctx.mark_non_differentiable(ids, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids, valid)
    ctx.args = func, norm, scaling, sequences


def _backward(ctx, *grads):
    dprobs, dsums, dlse = (None if g is None else g.contiguous() for g in grads[:3])
    dlogits = None
    if any(g is not None for g in (dprobs, dsums, dlse)):
        dlogits = torch.ops.interlace.router_bwd(dprobs, dsums, dlse, *ctx.saved_tensors, *ctx.args)
    return dlogits, *[None] * 12


_router = differentiable("router_fwd", _setup, _backward, keep=5)

# ---- public ---------------------------------------------------------------------------------------------------


def _check_groups(E: int, topk: int, num_groups: int | None, group_topk: int | None, group_score: int | None) -> tuple[int, int, int]:
    """(groups, groups kept, experts of a group that make its score)"""
    if num_groups is None:
        if group_topk is not None or group_score is not None:
            raise ValueError(f"router: group_topk and group_score need num_groups, got {group_topk} and {group_score}; give num_groups")
        return 1, 1, 1
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"router: num_groups must divide the {E} experts, got {num_groups}")
    if group_topk is None or not 1 <= group_topk <= num_groups:
        raise ValueError(f"router: group_topk must be in [1, {num_groups}], the number of groups, got {group_topk}")
    size = E // num_groups
    if group_topk * size < topk:
        raise ValueError(f"router: the groups kept must hold topk = {topk} experts, got {group_topk} of {size}; raise group_topk")
    best = max(1, topk // group_topk) if group_score is None else group_score
    if not 1 <= best <= size:
        raise ValueError(f"router: group_score must be in [1, {size}], the experts of a group, got {best}")
    return (num_groups, group_topk, best) if group_topk < num_groups else (1, 1, 1)


def _arguments(logits: Tensor, topk: int, score_function: str, pre_softmax: bool, norm_topk_prob: bool | None, expert_bias: Tensor | None,
               num_groups: int | None, group_topk: int | None, group_score: int | None, scaling_factor: float, sequences: int,
               valid: Tensor | None, ids: Tensor | None) -> tuple:
    """What the op takes."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"router: logits must be floating point [T, E], got {logits.dtype} {list(logits.shape)}; flatten the tokens")
    T, E = logits.shape
    if not 1 <= E <= MOST_EXPERTS or not 1 <= topk <= E:
        raise ValueError(f"router: experts must be in [1, {MOST_EXPERTS}] and topk in [1, experts], got {E} and {topk}")
    if score_function not in SCORES:
        raise ValueError(f"router: score_function must be one of {', '.join(SCORES)}, got {score_function!r}")
    if sequences < 1:
        raise ValueError(f"router: sequences must be at least 1, got {sequences}")
    groups, kept, best = _check_groups(E, topk, num_groups, group_topk, group_score)
    func = SCORES.index(score_function)
    if func == 0 and not pre_softmax:
        if norm_topk_prob is False:
            raise ValueError("router: softmax over the chosen experts sums to 1, got norm_topk_prob=False; use pre_softmax=True")
        norm_topk_prob = True
    if norm_topk_prob is None:
        norm_topk_prob = func != 0 and topk > 1
    if expert_bias is not None and (expert_bias.shape != (E,) or not expert_bias.is_floating_point()):
        raise ValueError(f"router: expert_bias must be floating point [{E}], got {expert_bias.dtype} {list(expert_bias.shape)}")
    if valid is not None and (valid.shape != (T,) or valid.dtype != torch.bool):
        raise ValueError(f"router: valid must be bool [{T}], True for real tokens, got {valid.dtype} {list(valid.shape)}")
    if ids is not None:
        if ids.shape != (T, topk) or ids.dtype not in (torch.int16, torch.int32, torch.int64):
            raise ValueError(f"router: ids must be int16, int32 or int64 [{T}, {topk}], got {ids.dtype} {list(ids.shape)}")
        if T and ids.device.type == "cpu" and not torch.compiler.is_compiling() and (ids.min() < -1 or ids.max() >= E):
            raise ValueError(f"router: ids must be in [0, {E}) or -1, got {ids.min()} to {ids.max()}; use -1 for no expert")
        ids = torch.where((ids >= 0) & (ids < E), ids, -1).int().contiguous()
    by_score = (expert_bias is not None or groups > 1) and (func != 0 or pre_softmax)
    bias = None if expert_bias is None or ids is not None else expert_bias.detach().to(_acc(logits)).contiguous()
    return (logits.contiguous(), bias, None if valid is None else valid.contiguous(), ids, topk, func, norm_topk_prob, by_score,
            groups, kept, best, float(scaling_factor), sequences)


def router(logits: Tensor, topk: int, *, score_function: str = "softmax", pre_softmax: bool = False, norm_topk_prob: bool | None = None,
           expert_bias: Tensor | None = None, num_groups: int | None = None, group_topk: int | None = None,
           group_score: int | None = None, scaling_factor: float = 1.0, sequences: int = 1, valid: Tensor | None = None,
           ids: Tensor | None = None) -> Routing:
    """Choose topk experts for every token. Formulae: the top of this file.

    Args: logits [T, E] float32, bfloat16, float16 or float64, E <= 1024; score_function: softmax, sigmoid or sqrtsoftplus;
      pre_softmax: probs are those of the softmax over all experts, else over the chosen; norm_topk_prob: divide probs by their sum
      (None: for sigmoid and sqrtsoftplus, when topk > 1); expert_bias [E]: added for the choice only;
      num_groups, group_topk: choose within the group_topk best of num_groups equal groups; group_score: how many of a group's largest
      make its score (None: topk // group_topk as Megatron-Core; 2: Hugging Face's DeepSeek-V3; 1: DeepSeek-V2);
      sequences: t % sequences is token t's row of score_sums and counts; valid bool [T]: False for padding, which gets ids -1, prob
      0, lse 0 and no gradient, whatever its logits; ids [T, K]: take these experts (replay, forced balance), -1 for none.
    Returns: Routing.
    Raises: ValueError for options that do not fit, and on CPU for ids out of range; on CUDA those are -1.
    """
    args = _arguments(logits, topk, score_function, pre_softmax, norm_topk_prob, expert_bias, num_groups, group_topk, group_score,
                      scaling_factor, sequences, valid, ids)
    probs, sums, lse, chosen, counts = (_router if fused(*(t for t in args[:4] if t is not None)) else _router_ref)(*args)
    return Routing(chosen, probs, sums, lse, counts)


def router_ref(logits: Tensor, topk: int, *, score_function: str = "softmax", pre_softmax: bool = False,
               norm_topk_prob: bool | None = None, expert_bias: Tensor | None = None, num_groups: int | None = None,
               group_topk: int | None = None, group_score: int | None = None, scaling_factor: float = 1.0, sequences: int = 1,
               valid: Tensor | None = None, ids: Tensor | None = None) -> Routing:
    """`router` in torch operations."""
    probs, sums, lse, chosen, counts = _router_ref(*_arguments(
        logits, topk, score_function, pre_softmax, norm_topk_prob, expert_bias, num_groups, group_topk, group_score, scaling_factor,
        sequences, valid, ids))
    return Routing(chosen, probs, sums, lse, counts)


def aux_loss(score_sums: Tensor, counts: Tensor, topk: int, coeff: float, *, per_sequence: bool = False,
             tokens: Tensor | float | None = None) -> Tensor:
    """Load balancing: coeff * E * sum_e f_e P_e,  f = counts / sum counts,  P = score_sums / tokens; 1 * coeff when balanced.

    Switch's loss, coeff * E / (K T^2) * sum_e c_e sum_t s_te. Args: score_sums, counts [sequences, E] of a Routing; counts is a
      constant, and may first be summed over ranks (global batch) or averaged over micro-batches, any dtype; per_sequence: the mean
      over sequences of each one's own loss (seq_aux_loss, arXiv:2412.19437 eq. 17), else one over all tokens (aux_loss,
      global_aux_loss); tokens: valid tokens behind score_sums, a number, or [sequences] for per_sequence (None: sum counts / topk,
      where counts are of the same tokens). With the tokens of all ranks the ranks' losses add up to the whole, with its own their
      mean is it. Returns: a scalar.
    """
    c = counts.detach().to(score_sums.dtype)
    if not per_sequence:
        score_sums, c = score_sums.sum(0, keepdim=True), c.sum(0, keepdim=True)
    routed = c.sum(1)
    of = torch.as_tensor(routed / topk if tokens is None else tokens, dtype=c.dtype, device=c.device)
    return coeff * c.shape[1] * ((score_sums * c).sum(1) / (of.clamp(min=1) * routed.clamp(min=1))).mean()


def z_loss(lse: Tensor, coeff: float, *, tokens: Tensor | float | None = None) -> Tensor:
    """coeff * sum_t lse_t^2 / tokens (ST-MoE, arXiv:2202.08906 eq. 5). tokens: how many are valid (None: all of lse, [T])."""
    of = torch.as_tensor(lse.shape[0] if tokens is None else tokens, dtype=lse.dtype, device=lse.device)
    return coeff * lse.square().sum() / of.clamp(min=1)


def forced_balance(tokens: int, topk: int, experts: int, device: torch.device | str | None = None) -> Tensor:
    """ids int32 [tokens, topk] that give every expert the same load, in turn: for benches, as `ids` of router."""
    return (torch.arange(tokens * topk, dtype=torch.int64, device=device) % experts).int().view(tokens, topk)


@torch.no_grad()
def update_expert_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean(counts) - counts), in place; counts [E] of the whole batch (arXiv:2408.15664). bias in fp32."""
    c = counts.double()
    return bias.add_((c.mean() - c).sign().to(bias.dtype), alpha=rate)
