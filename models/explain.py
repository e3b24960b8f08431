"""explain: what a config means before anything runs: ranks, groups, bytes on the wire, memory. Arithmetic, no torch.

Every number here is held against a real run by tests/test_explain.py: parameters, gradients and optimizer bytes against
a model's tensors, bytes on the axis against the collectives that a step calls, activations against what autograd saves.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..parallel.layout import ALIGN, SCHEDULES, Layout, bucketing, stage_layers, stages_of_rank
from ..parallel.mesh import rank_table
from .config import Config, ModelConfig
from .schedule import deferred_at_once, in_flight

ITEMSIZE = {"fp32": 4, "bf16": 2, "float64": 8}
HEAP = 2 * (2 << 20)                                                  # SymmHeap's two buffers of a rank, on a CPU
AXES = ("tp", "dp", "pp", "ep", "edp")

# ---- sizes ----------------------------------------------------------------------------------------------------


def vocabulary_rows(m: ModelConfig, vocab_size: int, tp: int) -> int:
    """Rows of the embedding on one rank, padding included."""
    unit = m.make_vocab_size_divisible_by
    return -(-vocab_size // (unit * tp)) * unit


def kv_heads(m: ModelConfig, tp: int) -> int:
    """Key / value heads of one rank: fewer than tp are copied."""
    return m.query_groups // tp if m.query_groups % tp == 0 else 1


@dataclass(frozen=True)
class Stage:
    """What one stage of the pipeline holds: its layers, the embedding, the head."""
    layers: range
    first: bool
    last: bool


def stages(m: ModelConfig, layout: Layout, rank: int) -> dict[int, Stage]:
    """The stages of pp rank `rank`; the whole model without a pipeline."""
    if layout.pp == 1:
        return {0: Stage(range(m.num_layers), True, True)}
    every = stage_layers(m)
    return {i: Stage(every[i], i == 0, i == len(every) - 1) for i in stages_of_rank(m, rank)}


def _mine(m: ModelConfig, layout: Layout, rank: int) -> tuple[list[int], list[int], bool, bool]:
    """(all layers of a pp rank, those of them with experts, whether it embeds, whether it has the head)."""
    held = stages(m, layout, rank).values()
    layers = [i for s in held for i in s.layers]
    return layers, [i for i in layers if m.has_experts(i)], any(s.first for s in held), any(s.last for s in held)


def _mlp(m: ModelConfig, ffn: int) -> list[int]:
    gates, D, bias = 2 if m.activation == "swiglu" else 1, m.hidden_size, m.add_bias_linear
    return [gates * ffn * D, ffn * D, *([gates * ffn, D] if bias else [])]


def tensors(m: ModelConfig, vocab_size: int, layout: Layout, rank: int = 0) -> tuple[list[int], list[int]]:
    """Numbers in each parameter that a rank at `rank` of pp holds: (summed over dp, experts' over edp)."""
    t, D, H, Dh, bias = layout.tp, m.hidden_size, m.num_attention_heads // layout.tp, m.head_dim, m.add_bias_linear
    layers, moe, first, last = _mine(m, layout, rank)
    norm = [D, D] if m.normalization == "layernorm" else [D]
    qkv, E, gates = (H + 2 * kv_heads(m, t)) * Dh, m.num_moe_experts or 0, 2 if m.activation == "swiglu" else 1
    shared, dense = m.moe_shared_expert_intermediate_size, len(layers) - len(moe)
    table, tied = [vocabulary_rows(m, vocab_size, t) * D], m.share_embeddings_and_output_weights
    attention = [qkv * D, H * Dh * D, *([qkv, D] if bias else [])]
    routed = [E * D, *(_mlp(m, shared // t) if shared else []), *([D] if shared and m.moe_shared_expert_gate else [])]
    plain = len(layers) * (2 * norm + attention) + dense * _mlp(m, m.ffn_size // t) + len(moe) * routed
    plain += table * ((first or (last and tied)) + (last and not tied)) + norm * last
    plain += [m.seq_length * D] if first and m.position_embedding_type == "learned_absolute" else []
    per = E // layout.ep * m.moe_ffn_size * D
    return plain, len(moe) * [gates * per, per]


def parameters(m: ModelConfig, vocab_size: int, layout: Layout | None = None, rank: int = 0) -> int:
    """Numbers that a rank at `rank` of pp holds, vocabulary padding and copied key / value heads included."""
    plain, experts = tensors(m, vocab_size, layout or Layout(), rank)
    return sum(plain) + sum(experts)


def active(m: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model that one token meets: topk of the experts."""
    plain, experts = tensors(m, vocab_size, Layout())
    return sum(plain) + sum(experts) * m.moe_router_topk // (m.num_moe_experts or 1)


def buffers(config: Config, layout: Layout, vocab_size: int, rank: int = 0) -> dict[str, tuple[int, int]]:
    """{axis: (numbers, calls to reduce them)} of the flat gradient buffers (parallel/data_parallel.py)."""
    sizes = {"dp": layout.dp, "edp": layout.dp * layout.tp // layout.ep}
    made = {}
    for (axis, n), numbers in zip(sizes.items(), tensors(config.model, vocab_size, layout, rank)):
        if numbers:
            whole, size = bucketing(sum(-(-x // ALIGN) * ALIGN for x in numbers), n, config.optim.ddp_bucket_size)
            made[axis] = whole, -(-whole // size)
    return made


def _summed(m: ModelConfig, layout: Layout, rank: int) -> int:
    """Numbers in the one all-reduce for gradients that tp ranks hold in parts (parallel/sharding.py)."""
    t, D, bias = layout.tp, m.hidden_size, int(m.add_bias_linear)
    layers, moe, first, last = _mine(m, layout, rank)
    n, shared = len(moe) * (m.num_moe_experts or 0) * D, m.moe_shared_expert_intermediate_size   # routers see parts of the tokens
    if layout.sp and t > 1:                                           # each rank saw its part of the sequence
        norm = (2 if m.normalization == "layernorm" else 1) * D
        rows = len(layers) + len(layers) - len(moe) + (len(moe) if shared else 0)
        n += (2 * len(layers) + last) * norm + rows * bias * D
        n += m.seq_length * D if first and m.position_embedding_type == "learned_absolute" else 0
        n += len(moe) * D if shared and m.moe_shared_expert_gate else 0
    if m.query_groups % t:                                            # each copy of a head serves its own queries
        n += len(layers) * 2 * m.query_groups * m.head_dim * (D + bias)
    return n


# ---- bytes on the wire ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """What one rank sends over an axis in a step for one cause: `calls` of collective `op`, `bytes` in all.

    Of t ranks, an all-reduce of n bytes counts 2 (t-1)/t n, an all-gather to or a reduce-scatter from n bytes
    (t-1)/t n: the least that any algorithm sends. A message larger than the heap's buffers counts as one call."""
    cause: str
    op: str
    calls: int
    bytes: float


def _microbatches(config: Config, layout: Layout) -> int:
    return config.model.global_batch_size // (config.model.micro_batch_size * layout.dp)


def _rows(n: int) -> Callable[..., Traffic]:
    """Makes the Traffic of collectives over n ranks, each of `size` bytes."""
    share = {"all-reduce": 2 * (n - 1) / n}
    return lambda cause, op, calls, size: Traffic(cause, op, calls, calls * share.get(op, (n - 1) / n) * size)


def tp_traffic(config: Config, layout: Layout, rank: int = 0) -> list[Traffic]:
    m, t = config.model, layout.tp
    if t == 1:
        return []
    layers, moe, first, last = _mine(m, layout, rank)
    micro, itemsize, tokens = _microbatches(config, layout), ITEMSIZE[config.trainer.precision], m.seq_length * m.micro_batch_size
    hidden, stat, again = tokens * m.hidden_size * itemsize, max(4, itemsize), m.recompute_granularity == "full"
    mlps = len(layers) - len(moe) + (len(moe) if m.moe_shared_expert_intermediate_size else 0)
    pairs, row, rows = micro * (len(layers) + mlps), _rows(t), []
    if layout.sp:
        if first:
            rows += [row("embedding, forward", "reduce-scatter", micro, hidden), row("embedding, backward", "all-gather", micro, hidden)]
        for how in ("forward", "forward again", "backward") if again else ("forward", "backward"):
            rows += [row(f"layers, {how}", op, pairs, hidden) for op in ("all-gather", "reduce-scatter")]
        rows.append(row("layers, backward: their inputs again", "all-gather", pairs, hidden))
        if last:
            rows += [row("head, forward", "all-gather", micro, hidden), row("head, backward", "reduce-scatter", micro, hidden),
                     row("head, backward: its input again", "all-gather", micro, hidden)]
        if layout.pp > 1 and SCHEDULES[m.schedule].split_backward:    # the output's gradient once for I, once for W
            fused = not m.add_bias_linear and not m.hidden_dropout    # there it comes gathered from the op that reduces and adds
            rows.append(row("layers, backward: gathered for W too", "all-gather", micro * (mlps + (0 if fused else len(layers))), hidden))
    else:
        rows += [row("embedding, forward", "all-reduce", micro, hidden)] * first
        rows += [row(f"layers, {how}", "all-reduce", pairs, hidden) for how in ("forward", *["forward again"] * again, "backward")]
        rows += [row("head, backward", "all-reduce", micro, hidden)] * last
    rows += [row("cross entropy: 3 numbers a token", "all-gather", micro, t * tokens * 3 * stat)] * last
    rows += _tp_experts(m, layout, row, micro * len(moe), hidden, stat)
    if summed := _summed(m, layout, rank):                            # under ZeRO-1 the mean over dp: parts are cut by place
        rows.append(row("gradients that ranks hold in parts", "all-reduce", 1, summed * stat // _shards(config, layout)))
    return [r for r in [*rows, *_counts(m, moe, row), row("gradient norm", "all-reduce", 1, 8)] if r.calls]


def _tp_experts(m: ModelConfig, layout: Layout, row: Callable[..., Traffic], calls: int, hidden: int, stat: int) -> list[Traffic]:
    """What `calls` layers with experts send over tp for their routing, and to join the tokens where each rank took a part.

    Recompute ends with the last tensor that the backward needs, which comes before the join."""
    times = 2 if m.recompute_granularity == "full" else 1
    slots = m.seq_length * m.micro_batch_size * m.moe_router_topk
    rows = []
    if not layout.sp:
        after = times if m.moe_shared_expert_intermediate_size else 1
        rows = [row("experts: outputs joined, forward", "all-gather", after * calls, hidden),
                row("experts: inputs' gradients joined", "all-gather", calls, hidden)]
    if m.moe_expert_capacity_factor is not None:
        rows += [row("experts: choices, for the capacity", "all-gather", times * calls, 4 * slots),
                 row("experts: probs, for the capacity", "all-gather", times * calls, stat * slots)]
    if m.balancing:
        rows.append(row("experts: counts for the balancing loss", "all-reduce", times * calls,
                        4 * m.micro_batch_size * (m.num_moe_experts or 0)))
    return rows


def _counts(m: ModelConfig, moe: list[int], row: Callable[..., Traffic]) -> list[Traffic]:
    """What the layers with experts saw, summed once a step."""
    return [row("experts: tokens and losses of the step", "all-reduce", 1, 8 * len(moe) * ((m.num_moe_experts or 0) + 3))] if moe else []


def _shards(config: Config, layout: Layout) -> int:
    return layout.dp if config.optim.use_distributed_optimizer else 1


def dp_traffic(config: Config, layout: Layout, vocab_size: int, rank: int = 0, axis: str = "dp") -> list[Traffic]:
    """Once a step, whatever the number of micro-batches. axis "edp": the experts' gradients, over their replicas."""
    n, itemsize = layout.dp if axis == "dp" else layout.dp * layout.tp // layout.ep, ITEMSIZE[config.trainer.precision]
    whole, calls = buffers(config, layout, vocab_size, rank).get(axis, (0, 0))
    if n == 1 or not whole:
        return []
    wide, row = max(4, itemsize), _rows(n)
    of = "gradients" if axis == "dp" else "experts' gradients"
    rows = [row(of, "all-reduce", calls, whole * wide / calls)]
    if config.optim.use_distributed_optimizer:
        rows = [row(of, "reduce-scatter", calls, whole * wide / calls),
                row("weights after the step", "all-gather", calls, whole * itemsize / calls)]
    if axis == "edp":
        return rows
    m, moe = config.model, _mine(config.model, layout, rank)[1]
    shared = _microbatches(config, layout) * len(moe) if "global_aux_loss" in m.balancing else 0     # not again in a recompute
    rows.append(row("experts: counts for the global loss", "all-gather", shared, 8 * n * (m.num_moe_experts or 0)))
    return [r for r in [*rows, *_counts(m, moe, row), row("loss", "all-reduce", 1, wide), row("gradient norm", "all-reduce", 1, 8)]
            if r.calls]


def pp_traffic(config: Config, layout: Layout, rank: int = 0) -> list[Traffic]:
    """Point to point: a stage's output to the next, its gradient back. Two stages of one rank hand over without a message."""
    m, held = config.model, stages(config.model, layout, rank)
    if layout.pp == 1:
        return []
    micro, wide, row = _microbatches(config, layout), max(4, ITEMSIZE[config.trainer.precision]), _rows(layout.pp)
    size = _message(config, layout)
    ahead = sum(not s.last and i + 1 not in held for i, s in held.items())
    back = sum(not s.first and i - 1 not in held for i, s in held.items())
    rows = [Traffic("outputs to the next stage", "send", ahead * micro, ahead * micro * size),
            Traffic("gradients to the stage before", "send", back * micro, back * micro * size),
            row("loss", "all-reduce", 1, wide), row("gradient norm", "all-reduce", 1, 8)]
    if m.num_moe_experts is not None:
        rows += [row("experts: losses and drops of the step", "all-reduce", 1, 24), row("experts: largest load", "all-reduce", 1, 8)]
    return [r for r in rows if r.calls]


def _message(config: Config, layout: Layout) -> int:
    """Bytes of the residual stream between two stages, of one micro-batch."""
    m = config.model
    return m.seq_length // (layout.tp if layout.sp else 1) * m.micro_batch_size * m.hidden_size * ITEMSIZE[config.trainer.precision]


def embd_traffic(config: Config, layout: Layout, vocab_size: int, rank: int = 0) -> list[Traffic]:
    """The gradient of a tied embedding, which the first and the last stage hold."""
    m = config.model
    _, _, first, last = _mine(m, layout, rank)
    if not m.share_embeddings_and_output_weights or first == last:
        return []
    n = vocabulary_rows(m, vocab_size, layout.tp) * m.hidden_size * max(4, ITEMSIZE[config.trainer.precision])
    return [_rows(2)("tied embedding's gradient", "all-reduce", 1, n)]


def remote_rows(m: ModelConfig, ep: int) -> float:
    """Other ranks of ep that one token goes to, in the mean, when every choice of topk of the experts is as likely as any other:
    the chance that a rank has one of them, times ep - 1. A token is sent to a rank once, however many of its experts are there."""
    E, K = m.num_moe_experts or 0, m.moe_router_topk
    return (ep - 1) * (1 - math.comb(E - E // ep, K) / math.comb(E, K))


def ep_traffic(config: Config, layout: Layout, rank: int = 0) -> list[Traffic]:
    """Rows of tokens to the ranks of their experts and back (kernels/comm/dispatch.py), under balanced routing: `remote_rows`.
    Partial sums of 16-bit types travel in fp32."""
    m, e = config.model, layout.ep
    if e == 1:
        return []
    itemsize, again = ITEMSIZE[config.trainer.precision], m.recompute_granularity == "full"
    calls = _microbatches(config, layout) * len(_mine(m, layout, rank)[1])
    tokens, wide, row = m.seq_length * m.micro_batch_size // layout.tp, max(4, itemsize), _rows(e)
    rows, slots = tokens * remote_rows(m, e) * m.hidden_size, e * tokens * m.moe_router_topk
    losses = m.moe_z_loss_coeff or m.balancing
    made = []
    for how in ("forward", "forward again") if again else ("forward",):
        made += [row(f"choices, {how}", "all-gather", calls, 4 * slots), row(f"probs, {how}", "all-gather", calls, wide * slots),
                 Traffic(f"tokens to their experts, {how}", "dispatch", calls, calls * rows * itemsize)]
        if how == "forward" or losses:                                # else nothing after it is needed again
            made.append(Traffic(f"outputs to their tokens, {how}", "combine", calls, calls * rows * wide))
    made += [Traffic("outputs' gradients, backward", "dispatch", calls, calls * rows * itemsize),
             Traffic("tokens' gradients, backward", "combine", calls, calls * rows * wide),
             row("probs' gradients, backward", "reduce-scatter", calls, wide * slots)]
    return [r for r in made if r.calls]


def traffic(config: Config, layout: Layout, vocab_size: int, rank: int = 0) -> dict[str, list[Traffic]]:
    """{axis: what a rank at `rank` of pp sends over it in a step}."""
    return {"tp": tp_traffic(config, layout, rank), "dp": dp_traffic(config, layout, vocab_size, rank),
            "pp": pp_traffic(config, layout, rank), "ep": ep_traffic(config, layout, rank),
            "edp": dp_traffic(config, layout, vocab_size, rank, "edp"), "embd": embd_traffic(config, layout, vocab_size, rank)}


# ---- memory ---------------------------------------------------------------------------------------------------


def activations(m: ModelConfig, layout: Layout, itemsize: int, stage: Stage | None = None) -> tuple[int, int]:
    """(bytes that the forward of one micro-batch through a stage keeps for its backward on a rank, the logits left out; bytes on
    top while its backward runs, of one micro-batch at a time).

    Under full recompute it keeps the input of every layer, and on top comes what one layer keeps."""
    stage = stage or Stage(range(m.num_layers), True, True)
    D, S, B = m.hidden_size, m.seq_length, m.micro_batch_size
    tokens, rows, stat = S * B, S * B // (layout.tp if layout.sp else 1), max(4, itemsize)
    norm = rows * stat * (2 if m.normalization == "layernorm" else 1)
    stream = rows * D * itemsize                                      # the residual stream, or a normalised copy of it
    attention = 3 * stream + 2 * norm + _attention(m, layout, itemsize)
    layers = [attention + (_experts(m, layout, itemsize) if m.has_experts(i) else stream + _mlp_keeps(m, layout, m.ffn_size, itemsize))
              for i in stage.layers]
    ends = S * m.head_dim * stat if m.position_embedding_type == "rope" else 0
    ends += tokens * (8 + (1 if layout.tp > 1 else 0)) if stage.first else 0          # ids, and which of them are this rank's
    ends += 2 * stream + norm + 2 * tokens * stat + 8 * tokens if stage.last else 0   # last norm, head, cross entropy, labels
    if m.recompute_granularity == "full":
        return len(layers) * stream + ends, max(layers) - stream
    return sum(layers) + ends, 0


def _mlp_keeps(m: ModelConfig, layout: Layout, ffn: int, itemsize: int) -> int:
    """Input and output of the activation."""
    return m.seq_length * m.micro_batch_size * ((3 if m.activation == "swiglu" else 2) * ffn // layout.tp) * itemsize


def _experts(m: ModelConfig, layout: Layout, itemsize: int) -> int:
    """What a layer with experts keeps after its norm, under balanced routing: topk rows a token on every rank."""
    D, E, K, stat = m.hidden_size, m.num_moe_experts or 0, m.moe_router_topk, max(4, itemsize)
    every, mine = m.seq_length * m.micro_batch_size, m.seq_length * m.micro_batch_size // layout.tp
    shared, slots = m.moe_shared_expert_intermediate_size, mine * K
    whole, part = (mine if layout.sp else every) * D * itemsize, mine * D * itemsize   # the layer's input, this rank's part of it
    copied = layout.tp > 1 and not layout.sp
    noisy = m.moe_input_jitter_eps is not None
    kept = layout.ep == 1 or (stat == itemsize and not noisy) or (shared and not copied)      # dispatch keeps no input
    n = (part if kept else 0) + (whole if shared and copied else 0)
    if stat != itemsize or noisy:                                     # the router multiplies in fp32: copies of input and weight
        n += (mine + E) * D * stat
    n += mine * E * stat + slots * 4 + (mine * stat if m.moe_z_loss_coeff else 0)     # logits, choices, logsumexp
    if m.moe_expert_capacity_factor is not None:                      # of a micro-batch, which tp ranks share
        most = E // layout.ep * math.ceil(every * K / E * m.moe_expert_capacity_factor) * max(1, layout.ep // layout.tp)
        slots = min(most, layout.ep * slots if m.moe_pad_expert_input_to_capacity else slots)
    n += slots * ((2 if m.activation == "swiglu" else 1) * m.moe_ffn_size * itemsize + stat)   # pre-activations, probs
    n += slots * D * itemsize if layout.ep > 1 else 2 * slots * 4     # the tokens that came, or the maps to gather them
    if shared:
        n += _mlp_keeps(m, layout, shared, itemsize)
        n += whole + whole // D if m.moe_shared_expert_gate else 0
    return n


def deferred(m: ModelConfig, layout: Layout, itemsize: int, stage: Stage) -> int:
    """Bytes that one micro-batch leaves in a stage between I and W of a zero-bubble schedule (parallel/deferred.py): the inputs and
    the outputs' gradients of its linear layers, the logits' gradient left out."""
    t, tokens = layout.tp, m.seq_length * m.micro_batch_size
    stream, whole = tokens // (t if layout.sp else 1) * m.hidden_size, tokens * m.hidden_size
    heads, kv = m.num_attention_heads // t, kv_heads(m, t)
    fused = layout.sp and t > 1 and not m.add_bias_linear and not m.hidden_dropout

    def mlp(ffn: int) -> int:
        return 2 * stream + tokens * (3 if m.activation == "swiglu" else 2) * ffn // t
    n = stream if stage.last else 0
    for i in stage.layers:
        n += stream + tokens * (2 * heads + 2 * kv) * m.head_dim + (whole if fused else stream)
        shared = m.moe_shared_expert_intermediate_size
        n += mlp(m.ffn_size) if not m.has_experts(i) else mlp(shared) if shared else 0
    return n * itemsize


def _attention(m: ModelConfig, layout: Layout, itemsize: int) -> int:
    """What attention keeps between its projections: the heads it reads, its output, statistics or probabilities."""
    S, B, heads, kv = m.seq_length, m.micro_batch_size, m.num_attention_heads // layout.tp, kv_heads(m, layout.tp)
    rope = m.position_embedding_type == "rope"
    fused = heads + 2 * kv                                            # q, k, v of the projection: views of one tensor
    if m.attention_dropout:
        explicit = 2 * B * heads * S * S * itemsize + S * S           # probabilities before and after, the causal mask
        return S * B * 4 * heads * m.head_dim * itemsize + explicit
    if kv != heads and itemsize == 8:                                 # torch's attention: k and v are repeated for every query head
        kept = 2 * heads + (heads if rope else fused)
    else:
        kept = fused + (heads + kv if rope else 0)                    # v stays a view, and keeps its whole tensor
    return S * B * ((kept + heads) * m.head_dim * itemsize + heads * max(4, itemsize))


def memory(config: Config, layout: Layout, vocab_size: int, rank: int = 0) -> dict[str, int]:
    """Bytes a rank at `rank` of pp needs. Gradients are kept in fp32 at least; AdamW has two moments, and masters of bf16 weights, of
    which a rank of dp has 1/dp under ZeRO-1 (of experts 1/edp). Activations: of the micro-batches in flight."""
    m, item = config.model, ITEMSIZE[config.trainer.precision]
    made, wide, held = buffers(config, layout, vocab_size, rank), max(4, item), stages(m, layout, rank)
    n, zero1 = sum(numbers for numbers, _ in made.values()), config.optim.use_distributed_optimizer
    sizes = {"tp": layout.tp, "dp": layout.dp, "pp": layout.pp, "ep": layout.ep, "edp": layout.dp * layout.tp // layout.ep}
    own = sum(numbers // (sizes[axis] if zero1 else 1) for axis, (numbers, _) in made.items())
    keeps = {i: activations(m, layout, item, s) for i, s in held.items()}
    micro, logits = _microbatches(config, layout), m.seq_length * m.micro_batch_size * vocabulary_rows(m, vocab_size, layout.tp) * item
    flights = in_flight(m, micro, rank) if layout.pp > 1 else [{0: 1}]
    worst = max(flights, key=lambda at: sum(k * keeps[i][0] for i, k in at.items()))
    last = next((i for i, s in held.items() if s.last), None)
    need = {"weights": n * item, "gradients": n * wide, "optimizer": own * wide * (3 if item < wide else 2),
            "activations": sum(k * keeps[i][0] for i, k in worst.items()) + max(extra for _, extra in keeps.values())}
    if last is not None:
        need["logits and their gradient"] = (max(at.get(last, 0) for at in flights) + 1) * logits
    if layout.pp > 1:                                                 # torch's stages have a buffer for every micro-batch, both ways
        more = sum((micro - worst[i]) * (not s.first) + micro * (not s.last) for i, s in held.items())
        need["messages between stages, not yet or no longer activations"] = more * _message(config, layout)
        if waiting := deferred_at_once(m, micro, rank):
            need["waiting for W: inputs and gradients of linears"] = waiting * max(
                deferred(m, layout, item, s) + (logits if s.last else 0) for s in held.values())
    axes = [a for a in ("tp", "dp", "pp") if sizes[a] > 1] + [a for a in ("ep", "edp") if m.num_moe_experts and sizes[a] > 1]
    axes += ["embd"] if embd_traffic(config, layout, vocab_size, rank) else []
    if axes:
        need["shared memory for collectives (CPU)"] = len(axes) * HEAP
    return need


# ---- the text -------------------------------------------------------------------------------------------------


def human(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    raise AssertionError


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "es" if what.endswith("ch") else "s")


def explain(config: Config, world: int, vocab_size: int | None = None) -> str:
    """The text of `interlace explain`. Raises: UserError when the layout breaks a rule."""
    layout, m = Layout.from_config(config, world), config.model
    vocab = vocab_size or m.vocab_size or 257
    lines = [*_model(config, layout, world, vocab), "", *_places(layout)]
    needs = [memory(config, layout, vocab, r) for r in range(layout.pp)]
    sent = [traffic(config, layout, vocab, r) for r in range(layout.pp)]
    worst = max(range(layout.pp), key=lambda r: sum(needs[r].values()))
    if layout.pp > 1:
        lines += ["", f"ranks of pp ({m.schedule}): what follows is of rank {worst} of pp, which needs the most memory",
                  f"    {'pp':<6}{'layers of its stages':<40}{'parameters':>18}{'sent in a step':>18}{'memory':>18}"]
        for r in range(layout.pp):
            held = " ".join(f"{s.layers[0]}-{s.layers[-1]}" if len(s.layers) > 1 else str(s.layers[0])
                            for s in stages(m, layout, r).values())
            total = sum(x.bytes for rows in sent[r].values() for x in rows)
            lines.append(f"    {r:<6}{held:<40}{parameters(m, vocab, layout, r):>18,}{human(total):>18}"
                         f"{human(sum(needs[r].values())):>18}")
    for axis, rows in sent[worst].items():
        if not rows and axis not in ("tp", "dp"):
            continue
        whole = human(sum(x.bytes for x in rows))
        lines += ["", f"sent by each rank in a step, over {axis}: {whole}" + ", for there is one rank" * (not rows)]
        lines += [f"    {x.cause:<40}{x.op:<16}{x.calls:>7,} x {human(x.bytes / x.calls):>10} {human(x.bytes):>12}" for x in rows]
        if axis == "ep":
            lines.append(f"    (balanced routing: a token goes to {remote_rows(m, layout.ep):.2f} other ranks in the mean)")
    need = needs[worst]
    of = "each rank" if layout.pp == 1 else f"a rank at {worst} of pp"
    lines += ["", f"memory of {of}: {human(sum(need.values()))}" + _other_zero1(config, layout, vocab, worst)]
    return "\n".join(lines + [f"    {what:<60}{human(size):>29}" for what, size in need.items()])


def _model(config: Config, layout: Layout, world: int, vocab: int) -> list[str]:
    m = config.model
    all_rows = vocabulary_rows(m, vocab, layout.tp) * layout.tp
    padding = f" (padded to {all_rows:,})" if all_rows != vocab else ""
    alike = world > layout.dp and layout.pp == 1
    lines = [f"model     {_count(m.num_layers, 'layer')}, hidden {m.hidden_size:,}, ffn {m.ffn_size:,}, "
             f"{_count(m.num_attention_heads, 'head')} of {m.head_dim}"
             + (f" ({m.query_groups} key / value)" if m.query_groups != m.num_attention_heads else "")
             + f", vocabulary {vocab:,}{padding}",
             f"          {parameters(m, vocab):,} parameters in {config.trainer.precision}"
             + (f", {active(m, vocab):,} of them for a token" if m.num_moe_experts else "")
             + (f", {parameters(m, vocab, layout):,} on each rank" if alike or (layout.ep > 1 and layout.pp == 1) else "")]
    if m.num_moe_experts:
        count, shared = sum(map(m.has_experts, range(m.num_layers))), m.moe_shared_expert_intermediate_size
        lines.append(f"experts   {m.num_moe_experts} in {_count(count, 'layer')}, {m.moe_router_topk} a token, ffn {m.moe_ffn_size:,}, "
                     f"{m.num_moe_experts // layout.ep} on each rank" + (f", and a shared one, ffn {shared:,}" if shared else ""))
    experts = f", experts on ep {layout.ep} x edp {layout.dp * layout.tp // layout.ep}" if m.num_moe_experts else ""
    return [*lines, f"layout    {_count(world, 'rank')} = tp {layout.tp} x dp {layout.dp} x pp {layout.pp}{experts}, "
            f"sequence parallel {'on' if layout.sp else 'off'}",
            f"step      {_count(m.global_batch_size, 'sample')} of {_count(m.seq_length, 'token')} = "
            f"{m.global_batch_size * m.seq_length:,} tokens, "
            f"in {_count(_microbatches(config, layout), 'micro-batch')} of {m.micro_batch_size}"]


def _places(layout: Layout) -> list[str]:
    table = rank_table(layout)
    lines = ["place of each rank on the axes, and the ranks it shares them with", f"    {'rank':<6}" + "".join(f"{a:>5}" for a in AXES)]
    for r in range(layout.world):
        place = (next(g.index(r) for g in table[a] if r in g) for a in AXES)
        lines.append(f"    {r:<6}" + "".join(f"{p:>5}" for p in place))
    return lines + [f"    {a:<6}" + " ".join(str(list(g)) for g in table[a]) for a in AXES]


def _other_zero1(config: Config, layout: Layout, vocab: int, rank: int) -> str:
    """What ZeRO-1 would save, or saves."""
    if layout.dp == 1:
        return ""
    on = config.optim.use_distributed_optimizer
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, use_distributed_optimizer=not on))
    return f" ({human(sum(memory(other, layout, vocab, rank).values()))} {'without' if on else 'with'} ZeRO-1, zero1={str(not on).lower()})"
