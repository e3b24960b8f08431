"""How a model is split over ranks, and every rule a split must obey. Integers only: no torch, no process group.

    world = tp * dp * pp      edp * ep = dp * tp      (ranks of a stage, folded twice)

A rule is a function of the model's config and the layout that returns what is wrong, or None. `broken_rules` runs them
all, and for each broken one tries the values around the user's until one obeys it and breaks no rule that held: a value
that a message proposes has passed the same rules.
"""
from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
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


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule of torch.distributed.pipelining. chunked: a rank holds several stages; v_shaped: two, folded as a V;
    split_backward: the weights' gradients are computed apart from the input's."""
    torch_name: str
    chunked: bool = False
    v_shaped: bool = False
    split_backward: bool = False


SCHEDULES = {"gpipe": Schedule("ScheduleGPipe"), "1f1b": Schedule("Schedule1F1B"),
             "interleaved_1f1b": Schedule("ScheduleInterleaved1F1B", chunked=True),
             "interleaved_zero_bubble": Schedule("ScheduleInterleavedZeroBubble", chunked=True, split_backward=True),
             "zbv_zero_bubble": Schedule("ScheduleZBVZeroBubble", chunked=True, v_shaped=True, split_backward=True)}


def stage_layers(m: ModelConfig) -> list[range]:
    """The layers of every stage, in order: as even as can be, and where it is not, the first stage (it embeds) and above all the
    last (it holds the head) get fewer. num_layers_in_{first,last}_pipeline_stage set theirs."""
    stages = m.pipeline_model_parallel_size * m.chunks
    counts: list[int | None] = [None] * stages
    if stages > 1:
        counts[0], counts[-1] = m.num_layers_in_first_pipeline_stage, m.num_layers_in_last_pipeline_stage
    open_ = [i for i in range(stages) if counts[i] is None]
    base, extra = divmod(m.num_layers - sum(c for c in counts if c is not None), max(1, len(open_)))
    favoured = sorted(open_, key=lambda i: (i == stages - 1, i == 0, i))[:extra]
    sizes = [base + (i in favoured) if (c := counts[i]) is None else c for i in range(stages)]
    ends = list(itertools.accumulate(sizes, initial=0))
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def stages_of_rank(m: ModelConfig, rank: int) -> list[int]:
    """The stages that rank `rank` of pp holds: r, r + pp, r + 2 pp, ..., or r and 2 pp - 1 - r under a V-shaped schedule."""
    pp = m.pipeline_model_parallel_size
    if SCHEDULES[m.schedule].v_shaped:
        return [rank, 2 * pp - 1 - rank]
    return [rank + c * pp for c in range(m.chunks)]


def bucketing(numbers: int, ranks: int, size: int | None) -> tuple[int, int]:
    """(numbers of a gradient buffer padded to equal parts for `ranks`, numbers of a bucket of about `size`).

    size None: 1/64 of them, which is what remains to be reduced when a backward ends, but at least 2**20: measured on two CPU ranks,
    1 to 4 MB of fp32 were alike, 16 MB and more cost the overlap. Parts begin on cache lines."""
    unit = ALIGN * ranks
    whole = -(-numbers // unit) * unit
    return whole, max(1, (size or max(1 << 20, whole // 64)) // unit) * unit


MOST_EXPERTS = 1024                                                   # of the router, which imports torch
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def balancing(types: str | Sequence[str], coeffs: float | Sequence[float]) -> dict[str, float]:
    """{loss that balances experts: its weight} of moe_router_load_balancing_type and moe_aux_loss_coeff: one of each, or lists alike.

    Raises: ValueError for an unknown word, lists of unlike lengths, a word given twice, or "none" beside others."""
    words = [types] if isinstance(types, str) else list(types)
    weights = [coeffs] * len(words) if isinstance(coeffs, (int, float)) else list(coeffs)
    if wrong := [w for w in words if w not in BALANCING]:
        raise ValueError(f"moe_router_load_balancing_type must be of {', '.join(BALANCING)}, got {wrong[0]!r}")
    if len(words) != len(weights):
        raise ValueError("moe_aux_loss_coeff must have a number for each of moe_router_load_balancing_type, "
                         f"got {len(weights)} for {len(words)}")
    if not words or len(set(words)) < len(words) or ("none" in words and len(words) > 1):
        raise ValueError(f"moe_router_load_balancing_type must name different losses, or none alone, got {words}")
    if any(w < 0 for w in weights):
        raise ValueError(f"moe_aux_loss_coeff must be >= 0, got {min(weights)}")
    return {word: float(weight) for word, weight in zip(words, weights) if word != "none" and weight}


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
    stages = at.pp * m.chunks
    if at.pp == 1 or m.num_layers >= stages:
        return None
    return (f"num_layers must be at least {PP} x {VPP} (a stage holds one layer or more), "
            f"got {m.num_layers} and {at.pp} x {m.chunks} = {stages}")


def _ends(m: ModelConfig, at: Layout) -> str | None:
    ends = {f"num_layers_in_{e}_pipeline_stage": n for e, n in (("first", m.num_layers_in_first_pipeline_stage),
                                                              ("last", m.num_layers_in_last_pipeline_stage)) if n is not None}
    if not ends or _layers(m, at):
        return None
    if at.pp == 1:
        return f"{' and '.join(ends)} need {PP} > 1, got {at.pp}"
    between, rest = at.pp * m.chunks - len(ends), m.num_layers - sum(ends.values())
    if rest >= between if between else rest == 0:
        return None
    return (f"{' + '.join(ends)} must leave a layer for each of the {between} stages between, "
            f"got {' + '.join(map(str, ends.values()))} of {m.num_layers}" if between else
            f"{' + '.join(ends)} must be num_layers with two stages, got {' + '.join(map(str, ends.values()))} and {m.num_layers}")


def _vpp_alone(m: ModelConfig, at: Layout) -> str | None:
    if at.vpp is None or at.vpp == 1 or at.pp > 1:
        return None
    return f"{VPP} needs {PP} > 1 (it cuts each stage into chunks), got {at.vpp} and {at.pp}"


def _schedule(m: ModelConfig, at: Layout) -> str | None:
    word, kind = m.pipeline_parallel_schedule, SCHEDULES[m.schedule]
    if at.pp == 1:
        return f"pipeline_parallel_schedule needs {PP} > 1, got {word} and {at.pp}" if word else None
    if kind.v_shaped and m.chunks != 2:
        return f"{VPP} must be 2 under {m.schedule} (each rank holds two stages of the V), got {m.chunks}"
    if kind.chunked and m.chunks == 1:
        return f"{VPP} must be at least 2 under {m.schedule} (several chunks a rank), got {m.chunks}"
    if not kind.chunked and m.chunks > 1:
        return f"{VPP} must be 1 under {m.schedule} (one stage a rank), got {m.chunks}"
    return None


def _microbatches(m: ModelConfig, at: Layout) -> str | None:
    if at.pp == 1 or not at.whole or _batch(m, at):
        return None
    n, per = m.global_batch_size // (m.micro_batch_size * at.dp), f"global_batch_size / (micro_batch_size x {at.dp})"
    if n < at.pp and m.schedule == "1f1b":
        return f"the micro-batches of a step must be at least {PP} under 1f1b, got {n} = {per} and {at.pp}"
    if m.schedule.startswith("interleaved") and n % max(1, n // at.pp):
        return (f"the micro-batches of a step must fill whole rounds of {PP} under {m.schedule}, got {n} = {per} "
                f"in {n // at.pp} rounds of {at.pp}")
    return None


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


def _most(m: ModelConfig, at: Layout) -> str | None:
    if m.num_moe_experts is None or m.num_moe_experts <= MOST_EXPERTS:
        return None
    return f"num_moe_experts must be at most {MOST_EXPERTS} (the router holds a token's scores in registers), got {m.num_moe_experts}"


def _topk(m: ModelConfig, at: Layout) -> str | None:
    if m.num_moe_experts is None or m.moe_router_topk <= m.num_moe_experts:
        return None
    return ("moe_router_topk must be at most num_moe_experts (a token goes to that many different experts), "
            f"got {m.moe_router_topk} and {m.num_moe_experts}")


def _top1(m: ModelConfig, at: Layout) -> str | None:
    weighs = m.moe_router_score_function != "softmax" or m.moe_router_pre_softmax or m.moe_router_norm_topk_prob
    if (m.num_moe_experts or 1) == 1 or m.moe_router_topk > 1 or weighs:
        return None
    return ("moe_router_pre_softmax must be true with moe_router_topk 1 (softmax over the one expert chosen is 1: the router would learn "
            "from balancing losses alone; if that is meant, as in a Mixtral of top 1, moe_router_norm_topk_prob=true says so), got false")


def _freq(m: ModelConfig, at: Layout) -> str | None:
    freq = m.moe_layer_freq
    if m.num_moe_experts is None or not isinstance(freq, tuple) or len(freq) == m.num_layers:
        return None
    return f"moe_layer_freq must have an entry for each layer, got {len(freq)} for {m.num_layers} layers"


def _expert_groups(m: ModelConfig, at: Layout) -> str | None:
    groups, kept, E = m.moe_router_num_groups, m.moe_router_group_topk, m.num_moe_experts
    if E is None or (groups is None and kept is None):
        return None
    if groups is None or kept is None:
        return f"moe_router_num_groups and moe_router_group_topk go together (both or neither), got {groups or 'none'} and {kept or 'none'}"
    if E % groups:
        return f"num_moe_experts must be a multiple of moe_router_num_groups (equal groups), got {E} and {groups}"
    if kept > groups or E // groups * kept < m.moe_router_topk or m.moe_router_topk % kept:
        return (f"moe_router_topk must be a multiple of moe_router_group_topk <= moe_router_num_groups and fit into the groups kept, "
                f"got {m.moe_router_topk} experts of {kept} groups of {E // groups}, {groups} in all")
    return None


def _tokens(m: ModelConfig, at: Layout) -> str | None:
    if m.num_moe_experts is None or at.sp or m.seq_length % at.tp == 0:
        return None
    return (f"seq_length must be a multiple of {TP} with experts (each rank routes a part of the sequence), "
            f"got {m.seq_length} and {at.tp}")


def _shared(m: ModelConfig, at: Layout) -> str | None:
    shared = m.moe_shared_expert_intermediate_size
    if m.num_moe_experts is None or shared is None or shared % at.tp == 0:
        return None
    return f"moe_shared_expert_intermediate_size must be a multiple of {TP}, got {shared} and {at.tp}"


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
    "layers over pp": (_layers, (PP, VPP, "num_layers")),
    "first and last stage": (_ends, (PP, "num_layers")),
    "vpp without pp": (_vpp_alone, (VPP,)),
    "schedule": (_schedule, (VPP, PP)),
    "batch": (_batch, ("global_batch_size", "micro_batch_size")),
    "micro-batches": (_microbatches, ("global_batch_size", "micro_batch_size", PP)),
    "ep over stage": (_ep, (RANKS, EP)),
    "ep without experts": (_ep_dense, (EP,)),
    "experts over ep": (_experts, (EP, "num_moe_experts")),
    "most experts": (_most, ()),
    "topk": (_topk, ("moe_router_topk", "num_moe_experts")),
    "gradient of top 1": (_top1, ("moe_router_topk",)),
    "layers with experts": (_freq, ("num_layers",)),
    "groups of experts": (_expert_groups, ("moe_router_topk", "num_moe_experts")),
    "tokens over tp": (_tokens, ("seq_length", TP)),
    "shared expert over tp": (_shared, ("moe_shared_expert_intermediate_size", TP)),
}
