"""How a model is split over ranks, and every rule a split must obey. Integers only: no torch, no process group.

    world = tp * dp * pp      edp * ep = dp * tp      (ranks of a stage, folded twice)

A rule is a function of the model's config and the layout that returns what is wrong, or None. `broken_rules` runs them
all, and for each broken one tries the values around the user's until one obeys it and breaks no rule that held: a value
that a message proposes has passed the same rules.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from ..models.config import Config, ModelConfig

TP, PP, VPP, EP = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
                   "expert_model_parallel_size")
RANKS = "--nproc"
ALIGN = 16                                                            # numbers: where parameters and parts begin, a cache line of fp32


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

    @property
    def whole(self) -> bool:
        """Whether tp x pp divides the world, so that dp has a meaning."""
        return self.world >= 1 and self.world % (self.tp * self.pp) == 0

    @classmethod
    def from_config(cls, config: Config, world: int) -> Layout:
        """The layout that `config` asks for on `world` ranks. Raises: UserError naming every violated rule."""
        if wrong := broken_rules(config, world):
            count = "1 rule is" if len(wrong) == 1 else f"{len(wrong)} rules are"
            raise UserError("\n".join([f"this layout does not fit ({count} broken):",
                                       *(f"  {i}. {w}" for i, w in enumerate(wrong, 1))]))
        return cls._of(config.model, world)

    @classmethod
    def _of(cls, m: ModelConfig, world: int) -> Layout:
        return cls(world, m.tensor_model_parallel_size, m.pipeline_model_parallel_size, m.expert_model_parallel_size,
                   m.virtual_pipeline_model_parallel_size, m.sequence_parallel)


def bucketing(numbers: int, ranks: int, size: int | None) -> tuple[int, int]:
    """(numbers of a gradient buffer padded to equal parts for `ranks`, numbers of a bucket of about `size`).

    size None: 1/64 of them, which is what remains to be reduced when a backward ends, but at least 2**20: measured on two CPU ranks,
    1 to 4 MB of fp32 were alike, 16 MB and more cost the overlap. Parts begin on cache lines."""
    unit = ALIGN * ranks
    whole = -(-numbers // unit) * unit
    return whole, max(1, (size or max(1 << 20, whole // 64)) // unit) * unit


Rule = Callable[["ModelConfig", Layout], "str | None"]


@dataclass(frozen=True)
class Fix:
    """One change that mends a rule: a field and its value (None: leave it out), and the number of ranks it takes."""
    field: str
    value: int | None
    world: int


@dataclass(frozen=True)
class Broken:
    """A violated rule: what must hold and the numbers, then the changes that mend it. `str` is the whole message."""
    rule: str
    what: str
    world: int
    fixes: tuple[Fix, ...]

    def __str__(self) -> str:
        by_field: dict[str, list[str]] = {}
        for f in self.fixes:
            value = "none" if f.value is None else str(f.value)
            ranks = f" (with {RANKS} {f.world})" if f.field != RANKS and f.world != self.world else ""
            by_field.setdefault(f.field, []).append(value + ranks)
        ways = [f"{field} {' or '.join(values)}" for field, values in by_field.items()]
        return self.what + (f"; use {', or '.join(ways)}" if ways else "")


def broken_rules(config: Config, world: int) -> list[Broken]:
    """Every rule that `config` on `world` ranks breaks, in the order of RULES; [] for a legal layout."""
    m, layout = config.model, Layout._of(config.model, world)
    wrong = {name: text for name, (check, _) in RULES.items() if (text := check(m, layout))}
    held = [check for name, (check, _) in RULES.items() if name not in wrong]
    return [Broken(name, text, world, tuple(fix for field in RULES[name][1]
                                            for fix in _fixes(m, layout, field, [RULES[name][0], *held])))
            for name, text in wrong.items()]


def _fixes(m: ModelConfig, layout: Layout, field: str, rules: list[Rule]) -> Iterator[Fix]:
    """The nearest values of `field` below and above the user's that obey `rules`."""
    changed = copy.copy(m)

    def works(value: int | None) -> Fix | None:
        if field != RANKS:
            changed.__dict__[field] = value                           # a scratch copy, checked by the rules alone
        for world in _worlds(layout, field, value):
            at = Layout._of(changed, world)
            if not any(rule(changed, at) for rule in rules):
                return Fix(field, value, world)
        return None
    now = layout.world if field == RANKS else _value(m, field)
    near = _near(now, m, layout)
    for values in (sorted((v for v in near if v < now), reverse=True), sorted(v for v in near if v > now)):
        if found := next(filter(None, map(works, values)), None):
            yield found
    if field == VPP and (leave_out := works(None)):
        yield leave_out


def _near(now: int, m: ModelConfig, layout: Layout) -> set[int]:
    """Values to try: all close to `now`; farther off, multiples and divisors of the numbers that rules divide by."""
    dp = layout.dp if layout.whole else 1
    numbers = {layout.tp, layout.pp * (layout.vpp or 1), layout.ep, m.num_attention_heads, m.query_groups,
               m.micro_batch_size * dp, m.global_batch_size // max(1, dp), m.hidden_size, m.num_layers}
    close = set(range(now - 64, now + 65))
    multiples = {(now // n + k) * n for n in numbers if n for k in range(-2, 4)}
    divisors = {n // k for n in numbers for k in range(1, 33) if n % k == 0}
    return {v for v in close | multiples | divisors if v >= 1}


def _worlds(layout: Layout, field: str, value: Any) -> list[int]:
    """The worlds to try with a new value: this one, and for the size of tp or pp the one where the other axes stay."""
    if field == RANKS:
        return [value]
    dp = layout.dp if layout.whole else 1
    follow = {TP: lambda: value * dp * layout.pp, PP: lambda: value * dp * layout.tp}
    return [layout.world] + ([follow[field]()] if field in follow else [])


def _value(m: ModelConfig, field: str) -> int:
    """The value a field has, its default filled in."""
    filled = {"num_query_groups": m.query_groups, "ffn_hidden_size": m.ffn_size, "kv_channels": m.head_dim}
    return filled[field] if field in filled else getattr(m, field) or 1


# ---- the rules ------------------------------------------------------------------------------------------------


def _ranks(m: ModelConfig, at: Layout) -> str | None:
    return f"{RANKS} must be at least 1, got {at.world}" if at.world < 1 else None


def _world(m: ModelConfig, at: Layout) -> str | None:
    if at.whole or at.world < 1:
        return None
    return (f"the number of ranks must be a multiple of {TP} x {PP} (a copy of the model fills tp x pp ranks), "
            f"got {RANKS} {at.world} and {at.tp} x {at.pp} = {at.tp * at.pp}")


def _heads(m: ModelConfig, at: Layout) -> str | None:
    if m.num_attention_heads % at.tp == 0:
        return None
    return (f"num_attention_heads must be a multiple of {TP} (each rank holds whole heads), "
            f"got {m.num_attention_heads} and {at.tp}")


def _groups(m: ModelConfig, at: Layout) -> str | None:
    if m.num_attention_heads % m.query_groups == 0:
        return None
    return ("num_attention_heads must be a multiple of num_query_groups (each key / value head serves equally many), "
            f"got {m.num_attention_heads} and {m.query_groups}")


def _groups_over_tp(m: ModelConfig, at: Layout) -> str | None:
    if m.num_query_groups is None or m.query_groups % at.tp == 0 or at.tp % m.query_groups == 0:
        return None                                                   # None: as many as heads: their own rule
    return (f"num_query_groups must be a multiple or a divisor of {TP} (key / value heads are split over the ranks, or "
            f"each copied to equally many), got {m.query_groups} and {at.tp}")


def _hidden(m: ModelConfig, at: Layout) -> str | None:
    if m.kv_channels is not None or m.hidden_size % m.num_attention_heads == 0:
        return None
    return ("hidden_size must be a multiple of num_attention_heads where kv_channels (channels of a head) is not set, "
            f"got {m.hidden_size} and {m.num_attention_heads}")


def _rope(m: ModelConfig, at: Layout) -> str | None:
    if m.position_embedding_type != "rope" or m.head_dim % 2 == 0 or _hidden(m, at):
        return None
    how = "kv_channels"
    if m.kv_channels is None:
        how = f"hidden_size {m.hidden_size} / num_attention_heads {m.num_attention_heads}"
    return f"a head must have an even number of channels under rope (it turns pairs of them), got {m.head_dim} = {how}"


def _ffn(m: ModelConfig, at: Layout) -> str | None:
    if m.ffn_size % at.tp == 0:
        return None
    default = " (its default here)" if m.ffn_hidden_size is None else ""
    return f"ffn_hidden_size must be a multiple of {TP}, got {m.ffn_size}{default} and {at.tp}"


def _sequence(m: ModelConfig, at: Layout) -> str | None:
    if not at.sp or m.seq_length % at.tp == 0:
        return None
    return (f"seq_length must be a multiple of {TP} under sequence_parallel (each rank holds a part of it), "
            f"got {m.seq_length} and {at.tp}")


def _layers(m: ModelConfig, at: Layout) -> str | None:
    if m.num_layers % at.pp == 0:
        return None
    return f"num_layers must be a multiple of {PP} (stages of equal depth), got {m.num_layers} and {at.pp}"


def _vpp_alone(m: ModelConfig, at: Layout) -> str | None:
    if at.vpp is None or at.vpp == 1 or at.pp > 1:
        return None
    return f"{VPP} needs {PP} > 1 (it cuts each stage into chunks), got {at.vpp} and {at.pp}"


def _vpp(m: ModelConfig, at: Layout) -> str | None:
    if at.vpp is None or at.pp == 1 or _layers(m, at) or m.num_layers % (at.pp * at.vpp) == 0:
        return None
    return (f"num_layers must be a multiple of {PP} x {VPP} (chunks of equal depth), "
            f"got {m.num_layers} and {at.pp} x {at.vpp} = {at.pp * at.vpp}")


def _batch(m: ModelConfig, at: Layout) -> str | None:
    if not at.whole or m.global_batch_size % (m.micro_batch_size * at.dp) == 0:
        return None
    return ("global_batch_size must be a multiple of micro_batch_size x data parallel size (whole micro-batches on "
            f"each replica), got {m.global_batch_size} and {m.micro_batch_size} x {at.dp} = "
            f"{m.micro_batch_size * at.dp}")


def _ep(m: ModelConfig, at: Layout) -> str | None:
    if not at.whole or at.dp * at.tp % at.ep == 0:
        return None
    return (f"{EP} must divide the ranks of a stage, tensor x data parallel size (experts live on the same ranks), "
            f"got {at.ep} and {at.tp} x {at.dp} = {at.tp * at.dp}")


def _ep_dense(m: ModelConfig, at: Layout) -> str | None:
    if at.ep == 1 or m.num_moe_experts is not None:
        return None
    return f"{EP} > 1 needs num_moe_experts, got {at.ep} and none (a dense model)"


def _experts(m: ModelConfig, at: Layout) -> str | None:
    if m.num_moe_experts is None or m.num_moe_experts % at.ep == 0:
        return None
    return (f"num_moe_experts must be a multiple of {EP} (equally many experts on each rank), "
            f"got {m.num_moe_experts} and {at.ep}")


def _topk(m: ModelConfig, at: Layout) -> str | None:
    if m.num_moe_experts is None or m.moe_router_topk <= m.num_moe_experts:
        return None
    return ("moe_router_topk must be at most num_moe_experts (a token goes to that many different experts), "
            f"got {m.moe_router_topk} and {m.num_moe_experts}")


# Axes whose arithmetic exists and whose layers do not: refused, never ignored.


def _no_pp(m: ModelConfig, at: Layout) -> str | None:
    return f"pipeline parallelism is not in this version: {PP} must be 1, got {at.pp}" if at.pp > 1 else None


def _no_moe(m: ModelConfig, at: Layout) -> str | None:
    if m.num_moe_experts is None:
        return None
    return ("mixture of experts is not in this version: leave num_moe_experts out "
            f"(with {EP} 1), got {m.num_moe_experts}")


RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {                    # name: its check, the fields a fix may change
    "ranks": (_ranks, (RANKS,)),
    "world": (_world, (RANKS, TP, PP)),
    "heads over tp": (_heads, (TP, "num_attention_heads")),
    "heads over groups": (_groups, ("num_query_groups", "num_attention_heads")),
    "groups over tp": (_groups_over_tp, ("num_query_groups", TP)),
    "hidden over heads": (_hidden, ("hidden_size", "num_attention_heads")),
    "even head": (_rope, ("kv_channels",)),
    "ffn over tp": (_ffn, ("ffn_hidden_size", TP)),
    "sequence over tp": (_sequence, ("seq_length", TP)),
    "layers over pp": (_layers, (PP, "num_layers")),
    "vpp without pp": (_vpp_alone, (VPP,)),
    "layers over vpp": (_vpp, (VPP, "num_layers")),
    "batch": (_batch, ("global_batch_size", "micro_batch_size")),
    "ep over stage": (_ep, (EP,)),
    "ep without experts": (_ep_dense, (EP,)),
    "experts over ep": (_experts, (EP, "num_moe_experts")),
    "topk": (_topk, ("moe_router_topk", "num_moe_experts")),
    "no pp": (_no_pp, (PP,)),
    "no moe": (_no_moe, ()),
}
