"""route_plan: which row of the expert-ordered buffer each routed slot (t, k) takes, by a stable counting sort

Shapes    topk_ids [T, K] (-1: no expert), probs [T, K]    N = T*K slots, slot = t*K + k    R rows, a bound known on the host
Formulae  rank(slot) = number of earlier slots of its expert e;  keep = rank < capacity;  kept_e = min(routed_e, capacity)
          offset_{e+1} = offset_e + ceil(kept_e / align) * align;  row = offset_e + rank, -1 where not kept
          R = N + min(E, N) * (align - 1), or less by the capacity; rows past offset_E and between segments have slot -1
Drops     drop="position" keeps the first `capacity` slots of an expert in slot order; drop="probs" the `capacity` largest probs,
          ties to the lower slot, NaN the largest, rows still in slot order
Bytes     about 20N; 3 launches on CUDA. No host sync, no float arithmetic, no atomics in memory: bit-exact on every machine.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import INTERPRET, define, fused, tl, triton


@dataclass(frozen=True)
class RoutePlan:
    """Where tokens go; all int32, made on the device of topk_ids, never read by the host."""

    counts: Tensor                                                    # [E] rows kept by each expert
    routed: Tensor                                                    # [E] slots that asked for it, before the capacity
    offsets: Tensor                                                   # [E+1] first row of each expert, a multiple of align
    row_of_slot: Tensor                                               # [T, K] row of each slot, -1 when dropped
    slot_of_row: Tensor                                               # [R] slot t*K + k of each row, -1 for padding
    invalid: Tensor                                                   # [1] ids below -1 or not below E (dropped; ValueError on CPU)

    @property
    def rows(self) -> int:
        """R, the static number of rows; those from offsets[-1] on are padding."""
        return self.slot_of_row.shape[0]

    def to_mask(self) -> Tensor:
        """routing_map bool [T, E] of the kept slots, as Megatron-Core and TransformerEngine have it."""
        E, row = self.counts.shape[0], self.row_of_slot
        expert = torch.searchsorted(self.offsets[1:].contiguous(), row, right=True, out_int32=True)   # a row's segment
        expert = torch.where(row >= 0, expert, E).long()
        return torch.zeros(row.shape[0], E + 1, dtype=torch.bool, device=row.device).scatter_(1, expert, True)[:, :E]


# ---- reference ------------------------------------------------------------------------------------------------


def _key(ids: Tensor, E: int) -> Tensor:
    flat = ids.reshape(-1).long()
    return torch.where((flat >= 0) & (flat < E), flat, E)             # [N], E for a slot without expert


def _ranks(key: Tensor, E: int, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """rank [N] of each slot within its expert, in slot order or in the order of `first`, and slots per expert [E]."""
    order = key.argsort(stable=True) if first is None else first[key[first].argsort(stable=True)]
    start = torch.searchsorted(key[order], torch.arange(E + 2, device=key.device))
    rank = torch.empty_like(key)
    rank[order] = torch.arange(key.numel(), device=key.device) - start[key[order]]
    return rank, start.diff()[:E]


def _keep_by_probs(ids: Tensor, probs: Tensor, E: int, capacity: int) -> Tensor:
    """ids with -1 where an expert has `capacity` larger probs, or equal ones in earlier slots."""
    key = _key(ids, E)
    rank, _ = _ranks(key, E, probs.detach().reshape(-1).argsort(descending=True, stable=True))
    return torch.where((key < E) & (rank >= capacity), -1, ids.reshape(-1)).view_as(ids)


def _bound(N: int, E: int, align: int, capacity: int, full: bool) -> int:
    segment = -(-capacity // align) * align
    if full:
        return E * segment
    rows = N + min(E, N) * (align - 1)
    return rows if capacity < 0 else min(rows, E * segment)


def _plan_ref(ids: Tensor, probs: Tensor | None, E: int, align: int, capacity: int, full: bool) -> tuple[Tensor, ...]:
    R, dev = _bound(ids.numel(), E, align, capacity, full), ids.device
    invalid = ((ids < -1) | (ids >= E)).sum().view(1)
    routed = _ranks(_key(ids, E), E)[1]
    if probs is not None:
        ids = _keep_by_probs(ids, probs, E, capacity)
    key = _key(ids, E)
    rank, counts = _ranks(key, E)
    if capacity >= 0:
        counts = counts.clamp(max=capacity)
    size = torch.full_like(counts, capacity) if full else counts
    end = ((size + align - 1) // align * align).cumsum(0)             # [E]
    offsets = torch.cat([end.new_zeros(1), end])
    keep = (key < E) & (rank < counts[key.clamp(max=E - 1)])
    row = torch.where(keep, offsets[key] + rank, -1)                  # [N]
    slot = torch.full((R + 1,), -1, device=dev)
    slot[torch.where(keep, row, R)] = torch.arange(ids.numel(), device=dev)
    out = (counts, routed, offsets, row.view(ids.shape), slot[:R], invalid)
    return tuple(t.to(torch.int32, copy=True) for t in out)


# ---- kernels --------------------------------------------------------------------------------------------------


@triton.jit
def _tile_keys(ids_ptr, tile, N, E, TILE: tl.constexpr):
    """Expert of each slot of a tile; E for -1 and past the end, E + 1 for an id out of range."""
    at = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    ids = tl.load(ids_ptr + at, mask=at < N, other=-1)
    return tl.where(ids < -1, E + 1, tl.where(ids < 0, E, tl.where(ids >= E, E + 1, ids))).to(tl.int32)


@triton.jit
def _count_kernel(ids_ptr, part_ptr, N, E, TILE: tl.constexpr, BINS: tl.constexpr):
    tile = tl.program_id(0)
    hist = tl.histogram(_tile_keys(ids_ptr, tile, N, E, TILE), BINS)
    tl.store(part_ptr + tile.to(tl.int64) * BINS + tl.arange(0, BINS), hist)


@triton.jit
def _scan_kernel(part_ptr, routed_ptr, invalid_ptr, slot_ptr, tiles, scans, E, R,
                 BINS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, FILL: tl.constexpr):
    """The first `scans` programs turn tile counts into counts of all earlier tiles; the others clear slot_of_row."""
    pid = tl.program_id(0)
    if pid < scans:
        e = pid * BLOCK_E + tl.arange(0, BLOCK_E)
        carry = tl.zeros([BLOCK_E], dtype=tl.int32)
        for first in range(0, tiles, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            mask = (t[:, None] < tiles) & (e[None, :] < BINS)
            at = t[:, None].to(tl.int64) * BINS + e[None, :]
            n = tl.load(part_ptr + at, mask=mask, other=0)
            tl.store(part_ptr + at, carry[None, :] + tl.cumsum(n, 0) - n, mask=mask)
            carry += tl.sum(n, 0)
        tl.store(routed_ptr + e, carry, mask=e < E)
        tl.store(invalid_ptr + e - E - 1, carry, mask=e == E + 1)
    else:
        row = (pid - scans).to(tl.int64) * FILL + tl.arange(0, FILL)
        tl.store(slot_ptr + row, tl.full([FILL], -1, dtype=tl.int32), mask=row < R)


@triton.jit
def _place_kernel(ids_ptr, part_ptr, routed_ptr, counts_ptr, offsets_ptr, row_ptr, slot_ptr, N, E, align, capacity,
                  FULL: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr):
    tile = tl.program_id(0)
    e = tl.arange(0, BINS)
    kept = tl.minimum(tl.load(routed_ptr + e, mask=e < E, other=0), capacity)
    size = tl.where(e < E, capacity if FULL else kept, 0)
    size = (size + align - 1) // align * align
    end = tl.cumsum(size, 0)
    if tile == 0:
        tl.store(counts_ptr + e, kept, mask=e < E)
        tl.store(offsets_ptr + e, end - size, mask=e <= E)
    key = _tile_keys(ids_ptr, tile, N, E, TILE)
    hist = tl.histogram(key, BINS)
    before = tl.load(part_ptr + tile.to(tl.int64) * BINS + e) - (tl.cumsum(hist, 0) - hist)
    place = tl.arange(0, TILE)
    order = tl.sort(key * TILE + place)                               # stable: the low bits are the place in the tile
    key, slot = order // TILE, tile * TILE + order % TILE
    rank = place + tl.gather(before, key, 0)
    keep = (key < E) & (rank < capacity)
    row = tl.gather(end - size, key, 0) + rank
    tl.store(row_ptr + slot, tl.where(keep, row, -1), mask=slot < N)
    tl.store(slot_ptr + row, slot, mask=keep)


# ---- ops ------------------------------------------------------------------------------------------------------


def _outputs(ids: Tensor, E: int, R: int) -> tuple[Tensor, ...]:
    new = lambda *shape: ids.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return new(E), new(E), new(E + 1), new(*ids.shape), new(R), new(1)


def _launch(ids: Tensor, probs: Tensor | None, E: int, align: int, capacity: int, full: bool) -> tuple[Tensor, ...]:
    N, R = ids.numel(), _bound(ids.numel(), E, align, capacity, full)
    counts, routed, offsets, row, slot, invalid = _outputs(ids, E, R)
    TILE, FILL, BLOCK_E = 64 if INTERPRET else 1024, 4096, 16         # the interpreter sorts 1024 in seconds
    tiles, bins = max(1, -(-N // TILE)), triton.next_power_of_2(E + 2)
    part = ids.new_empty(tiles, bins, dtype=torch.int32)
    block, scans, most = min(64, triton.next_power_of_2(tiles)), -(-bins // BLOCK_E), capacity if capacity >= 0 else 2**31 - 1

    def count(ids):
        _count_kernel[(tiles,)](ids, part, N, E, TILE, bins)
        _scan_kernel[(scans + -(-R // FILL),)](part, routed, invalid, slot, tiles, scans, E, R, bins, BLOCK_E, block, FILL)

    if probs is not None:
        count(ids)
        asked, wrong = routed.clone(), invalid.clone()
        ids = _keep_by_probs(ids, probs, E, capacity)
    count(ids)
    _place_kernel[(tiles,)](ids, part, routed, counts, offsets, row, slot, N, E, align, most, full, TILE, bins)
    return (counts, routed, offsets, row, slot, invalid) if probs is None else (counts, asked, offsets, row, slot, wrong)


define("route_plan(Tensor ids, Tensor? probs, int E, int align, int capacity, bool full)"
       " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _launch,
       lambda ids, probs, E, align, capacity, full: _outputs(ids, E, _bound(ids.numel(), E, align, capacity, full)))
_PLAN = torch.ops.interlace.route_plan.default

# ---- public ---------------------------------------------------------------------------------------------------


def _check(ids: Tensor, E: int, align: int, capacity: int | None, drop: str, probs: Tensor | None, full: bool) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"route_plan: topk_ids must be integers [T, K], got {ids.dtype} {list(ids.shape)}")
    if E < 1 or align < 1 or E > 2**20:
        raise ValueError(f"route_plan: num_experts must be in [1, 2^20] and align at least 1, got {E} and {align}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"route_plan: capacity must be at least 0, got {capacity}; None keeps every slot")
    if drop not in ("position", "probs"):
        raise ValueError(f"route_plan: drop must be 'position' or 'probs', got {drop!r}")
    if drop == "probs" and capacity is not None and (probs is None or probs.shape != ids.shape or not probs.is_floating_point()):
        got = "None" if probs is None else f"{probs.dtype} {list(probs.shape)}"
        raise ValueError(f"route_plan: drop='probs' needs floating probs {list(ids.shape)} like topk_ids, got {got}")
    if full and capacity is None:
        raise ValueError("route_plan: pad_to_capacity needs a capacity, got None")


def route_plan(topk_ids: Tensor, num_experts: int, align: int = 1, capacity: int | None = None, drop: str = "position",
               probs: Tensor | None = None, pad_to_capacity: bool = False) -> RoutePlan:
    """Rows of an expert-ordered buffer for every (token, choice), in one stable counting sort without a host sync.

    Args: topk_ids int [T, K], -1 for no expert, an expert may occur twice for a token; align: every expert's rows start at a
      multiple of it; capacity: most rows of an expert; drop: which stay, "position" or "probs" (then probs [T, K]);
      pad_to_capacity: every expert has capacity rows, rounded up to align, so that offsets are constants.
    Returns: RoutePlan. On CUDA, and under torch.compile, ids outside [-1, num_experts) are dropped and counted in plan.invalid.
    Raises: ValueError for ids out of range on CPU, wrong shapes, or 2^31 slots or rows and more.
    """
    _check(topk_ids, num_experts, align, capacity, drop, probs, pad_to_capacity)
    most = -1 if capacity is None else min(capacity, 2**31 - 1)
    ids = topk_ids.detach().contiguous()
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.to(torch.int32 if ids.dtype != torch.uint32 and ids.dtype != torch.uint64 else torch.int64)
    if max(ids.numel(), _bound(ids.numel(), num_experts, align, most, pad_to_capacity)) >= 2**31:
        raise ValueError(f"route_plan: slots and rows must be fewer than 2^31, got {ids.numel()} slots; route fewer tokens at once")
    by = probs.detach().contiguous() if drop == "probs" and capacity is not None and probs is not None else None
    if fused(ids) and (by is None or by.device == ids.device):
        plan = RoutePlan(*_PLAN(ids, by, num_experts, align, most, pad_to_capacity))
    else:
        plan = RoutePlan(*_plan_ref(ids, by, num_experts, align, most, pad_to_capacity))
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and plan.invalid.item():
        wrong = ids[(ids < -1) | (ids >= num_experts)][0].item()
        raise ValueError(f"route_plan: topk_ids must be in [0, {num_experts}) or -1, got {wrong}; use -1 to drop a slot")
    return plan


def route_plan_ref(topk_ids: Tensor, num_experts: int, align: int = 1, capacity: int | None = None, drop: str = "position",
                   probs: Tensor | None = None, pad_to_capacity: bool = False) -> RoutePlan:
    """`route_plan` in torch operations; ids out of range are dropped and counted."""
    _check(topk_ids, num_experts, align, capacity, drop, probs, pad_to_capacity)
    by = probs if drop == "probs" and capacity is not None else None
    return RoutePlan(*_plan_ref(topk_ids, by, num_experts, align, -1 if capacity is None else capacity, pad_to_capacity))


def from_mask(routing_map: Tensor, probs: Tensor | None = None, topk: int | None = None) -> tuple[Tensor, Tensor | None]:
    """(topk_ids [T, K], topk_probs [T, K] or None) from the mask form of Megatron-Core and TransformerEngine.

    Args: routing_map bool (or 0/1) [T, E]; probs [T, E], differentiable; topk: most experts of a token (default E: then R is
      bounded by T*E rows, so give it). Experts in ascending order, -1 where a token has fewer: rows come out in the order of the
      mask form's permute. Raises: ValueError for wrong shapes and, on CPU, for a token with more than topk experts.
    """
    if routing_map.ndim != 2 or (probs is not None and probs.shape != routing_map.shape):
        raise ValueError(f"from_mask: routing_map and probs must be [T, E] alike, got {list(routing_map.shape)}"
                         + ("" if probs is None else f" and {list(probs.shape)}"))
    T, E = routing_map.shape
    K, chosen = E if topk is None else topk, routing_map.bool()
    if not 0 <= K <= E:
        raise ValueError(f"from_mask: topk must be in [0, {E}], the number of experts, got {topk}")
    if T and chosen.device.type == "cpu" and not torch.compiler.is_compiling() and chosen.sum(1).max() > K:
        raise ValueError(f"from_mask: a token has at most topk = {K} experts, got {int(chosen.sum(1).max())}; raise topk")
    expert = torch.arange(E, dtype=torch.int32, device=chosen.device)
    ids = torch.where(chosen, expert, E).sort(1).values[:, :K]        # [T, K], E where there is none
    picked = None
    if probs is not None:
        picked = probs.gather(1, ids.long().clamp(max=E - 1)).masked_fill(ids == E, 0.0)
    return torch.where(ids < E, ids, -1), picked
