"""How a model is split over ranks, and every rule a split must obey. Integers only: no torch, no process group.

    world = tp * dp * pp      edp * ep = dp * tp      (ranks of a stage, folded twice)

`Layout.from_config` checks all rules and reports every violation at once: the field, the numbers, why, the legal values.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from ..models.config import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes. dp is what is left of the world; sequence parallelism shares the ranks of tp."""
    world: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int | None = None
    sp: bool = False

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @classmethod
    def from_config(cls, config: Config, world: int) -> Layout:
        """The layout that `config` asks for on `world` ranks. Raises: UserError naming every violated rule."""
        m = config.model
        layout = cls(world, m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.expert_model_parallel_size,
                     m.virtual_pipeline_model_parallel_size, m.sequence_parallel)
        wrong = _sizes(layout)
        if not wrong:                                                 # the rest divides by these sizes
            wrong = [*_shapes(config, layout), *_batches(config, layout), *_experts(config, layout), *_not_yet(config, layout)]
        if wrong:
            n = len(wrong)
            raise UserError(f"this layout does not fit ({n} {'rule is' if n == 1 else 'rules are'} broken):\n"
                            + "\n".join(f"  {i}. {w}" for i, w in enumerate(wrong, 1)))
        return layout


def _near(value: int, legal: list[int]) -> str:
    """The legal values closest to `value`, for an error message."""
    return " or ".join(map(str, sorted(sorted(legal, key=lambda v: abs(v - value))[:3]))) or "none"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _multiples(value: int, of: int) -> str:
    low = value // of * of
    return f"{low} or {low + of}" if low else str(of)


def _sizes(layout: Layout) -> list[str]:
    wrong = []
    for word, size in (("tensor_model_parallel_size", layout.tp), ("pipeline_model_parallel_size", layout.pp),
                       ("expert_model_parallel_size", layout.ep), ("--nproc", layout.world)):
        if size < 1:
            wrong.append(f"{word} must be at least 1, got {size}")
    if not wrong and layout.world % (layout.tp * layout.pp):
        need = layout.tp * layout.pp
        wrong.append(f"the number of ranks must be a multiple of tensor_model_parallel_size {layout.tp} x "
                     f"pipeline_model_parallel_size {layout.pp} = {need}, got {layout.world}; "
                     f"start --nproc {_multiples(layout.world, need)} ranks")
    return wrong


def _shapes(config: Config, layout: Layout) -> list[str]:
    m, tp, wrong = config.model, layout.tp, []
    heads, groups = m.num_attention_heads, m.query_groups
    if heads % tp:
        wrong.append(f"num_attention_heads must be a multiple of tensor_model_parallel_size {tp} (each rank holds whole "
                     f"heads), got {heads}; use tensor_model_parallel_size {_near(tp, _divisors(heads))}, or "
                     f"{_multiples(heads, tp)} heads")
    if heads % groups:
        wrong.append(f"num_attention_heads must be a multiple of num_query_groups, got {heads} and {groups}; "
                     f"use num_query_groups {_near(groups, _divisors(heads))}")
    if groups % tp and tp % groups:
        legal = [g for g in _divisors(heads) if g % tp == 0 or tp % g == 0]
        wrong.append(f"num_query_groups must be a multiple or a divisor of tensor_model_parallel_size {tp} (key / value heads "
                     f"are split, or replicated evenly), got {groups}; use num_query_groups {_near(groups, legal)}")
    if m.kv_channels is None and m.hidden_size % heads:
        wrong.append(f"hidden_size must be a multiple of num_attention_heads {heads} when kv_channels is not set, got "
                     f"{m.hidden_size}; use {_multiples(m.hidden_size, heads)}, or set kv_channels")
    elif m.position_embedding_type == "rope" and m.head_dim % 2:
        wrong.append(f"a head must have an even number of channels under rope, got {m.head_dim}; "
                     f"set kv_channels to {m.head_dim - 1 or 2} or {m.head_dim + 1}")
    if m.ffn_size % tp:
        wrong.append(f"ffn_hidden_size must be a multiple of tensor_model_parallel_size {tp}, got {m.ffn_size}; "
                     f"use {_multiples(m.ffn_size, tp)}")
    if layout.sp and m.seq_length % tp:
        wrong.append(f"seq_length must be a multiple of tensor_model_parallel_size {tp} under sequence_parallel (each rank "
                     f"holds seq_length / tp positions), got {m.seq_length}; use {_multiples(m.seq_length, tp)}")
    if m.num_layers % layout.pp:
        wrong.append(f"num_layers must be a multiple of pipeline_model_parallel_size {layout.pp}, got {m.num_layers}; "
                     f"use pipeline_model_parallel_size {_near(layout.pp, _divisors(m.num_layers))}")
    if layout.vpp is not None and layout.pp == 1:
        wrong.append(f"virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size > 1, got {layout.vpp} with 1; "
                     "leave it out")
    elif layout.vpp is not None and (layout.vpp < 1 or m.num_layers % (layout.pp * layout.vpp)):
        wrong.append(f"num_layers must be a multiple of pipeline_model_parallel_size {layout.pp} x "
                     f"virtual_pipeline_model_parallel_size {layout.vpp}, got {m.num_layers}")
    return wrong


def _batches(config: Config, layout: Layout) -> list[str]:
    m = config.model
    step = m.micro_batch_size * layout.dp
    if m.global_batch_size % step == 0:
        return []
    return [f"global_batch_size must be a multiple of micro_batch_size {m.micro_batch_size} x data parallel size {layout.dp} = "
            f"{step}, got {m.global_batch_size}; use {_multiples(m.global_batch_size, step)}, or micro_batch_size "
            f"{math.gcd(m.micro_batch_size, m.global_batch_size)}"]


def _experts(config: Config, layout: Layout) -> list[str]:
    m, wrong, stage = config.model, [], layout.dp * layout.tp
    if stage % layout.ep:
        wrong.append(f"expert_model_parallel_size must divide the {stage} ranks of a stage (tp {layout.tp} x dp {layout.dp}), "
                     f"got {layout.ep}; use {_near(layout.ep, _divisors(stage))}")
    if m.num_moe_experts is None:
        if layout.ep > 1:
            wrong.append(f"expert_model_parallel_size needs num_moe_experts, got {layout.ep} for a dense model; set it to 1")
        return wrong
    if m.num_moe_experts % layout.ep:
        wrong.append(f"num_moe_experts must be a multiple of expert_model_parallel_size {layout.ep}, got {m.num_moe_experts}; "
                     f"use expert_model_parallel_size {_near(layout.ep, _divisors(m.num_moe_experts))}")
    if m.moe_router_topk > m.num_moe_experts:
        wrong.append(f"moe_router_topk must be at most num_moe_experts {m.num_moe_experts}, got {m.moe_router_topk}")
    return wrong


def _not_yet(config: Config, layout: Layout) -> list[str]:
    """Axes whose arithmetic exists and whose layers do not: refused, never ignored."""
    wrong = []
    if layout.dp > 1:
        legal = [t for t in _divisors(layout.world) if config.model.num_attention_heads % t == 0]
        wrong.append(f"data parallelism is not in this version: {layout.world} ranks leave {layout.dp} replicas; start --nproc "
                     f"{layout.tp * layout.pp}, or set tensor_model_parallel_size to {_near(layout.world, legal)}")
    if layout.pp > 1:
        wrong.append(f"pipeline parallelism is not in this version: pipeline_model_parallel_size must be 1, got {layout.pp}")
    if config.model.num_moe_experts is not None:
        wrong.append(f"mixture of experts is not in this version: leave num_moe_experts out, got {config.model.num_moe_experts}")
    return wrong
