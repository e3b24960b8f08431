"""explain: what a config means before anything runs: ranks, groups, bytes on the wire, memory. Arithmetic, no torch.

Every number here is held against a real run by tests/test_explain.py: parameters, gradients and optimizer bytes against
a model's tensors, bytes on the axis against the collectives that a step calls, activations against what autograd saves.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..parallel.layout import Layout, bucketing
from ..parallel.mesh import rank_table
from .config import Config, ModelConfig

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


def parameters(m: ModelConfig, vocab_size: int, tp: int = 1) -> int:
    """Numbers one tp rank holds, vocabulary padding and copied key / value heads included: the same on every rank."""
    D, F, H, Dh, L = m.hidden_size, m.ffn_size // tp, m.num_attention_heads // tp, m.head_dim, m.num_layers
    bias, norm = int(m.add_bias_linear), (2 if m.normalization == "layernorm" else 1) * D
    column = (H + 2 * kv_heads(m, tp)) * Dh + (2 if m.activation == "swiglu" else 1) * F
    row = H * Dh + F
    layer = column * (D + bias) + row * D + 2 * bias * D + 2 * norm
    tables = vocabulary_rows(m, vocab_size, tp) * D * (1 if m.share_embeddings_and_output_weights else 2)
    positions = m.seq_length * D if m.position_embedding_type == "learned_absolute" else 0
    return L * layer + tables + positions + norm


def _summed(m: ModelConfig, layout: Layout) -> int:
    """Numbers in the one all-reduce for gradients that tp ranks hold in parts (parallel/sharding.py)."""
    t, D, L, bias = layout.tp, m.hidden_size, m.num_layers, int(m.add_bias_linear)
    n = 0
    if layout.sp and t > 1:                                           # each rank saw its part of the sequence
        n += (2 * L + 1) * (2 if m.normalization == "layernorm" else 1) * D + 2 * L * bias * D
        n += m.seq_length * D if m.position_embedding_type == "learned_absolute" else 0
    if m.query_groups % t:                                            # each copy of a head serves its own queries
        n += L * 2 * m.query_groups * m.head_dim * (D + bias)
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


def tp_traffic(config: Config, layout: Layout) -> list[Traffic]:
    m, t = config.model, layout.tp
    if t == 1:
        return []
    micro = m.global_batch_size // (m.micro_batch_size * layout.dp)
    itemsize, tokens, L = ITEMSIZE[config.trainer.precision], m.seq_length * m.micro_batch_size, m.num_layers
    hidden, stat, again = tokens * m.hidden_size * itemsize, max(4, itemsize), m.recompute_granularity == "full"
    rows: list[Traffic] = []

    def add(cause: str, op: str, calls: int, n: int) -> None:
        rows.append(Traffic(cause, op, calls, calls * (t - 1) / t * n * (2 if op == "all-reduce" else 1)))
    if layout.sp:
        add("embedding, forward", "reduce-scatter", micro, hidden)
        add("layers, forward", "all-gather", 2 * L * micro, hidden)
        add("layers, forward", "reduce-scatter", 2 * L * micro, hidden)
        add("head, forward", "all-gather", micro, hidden)
        add("head, backward", "reduce-scatter", micro, hidden)
        add("head, backward: its input again", "all-gather", micro, hidden)
        if again:
            add("layers, forward again", "all-gather", 2 * L * micro, hidden)
            add("layers, forward again", "reduce-scatter", 2 * L * micro, hidden)
        add("layers, backward", "all-gather", 2 * L * micro, hidden)
        add("layers, backward", "reduce-scatter", 2 * L * micro, hidden)
        add("layers, backward: their inputs again", "all-gather", 2 * L * micro, hidden)
        add("embedding, backward", "all-gather", micro, hidden)
    else:
        add("embedding, forward", "all-reduce", micro, hidden)
        add("layers, forward", "all-reduce", 2 * L * micro, hidden)
        add("head, backward", "all-reduce", micro, hidden)
        if again:
            add("layers, forward again", "all-reduce", 2 * L * micro, hidden)
        add("layers, backward", "all-reduce", 2 * L * micro, hidden)
    add("cross entropy: 3 numbers a token", "all-gather", micro, t * tokens * 3 * stat)
    if summed := _summed(m, layout):                                  # under ZeRO-1 the mean over dp: parts are cut by place
        add("gradients that ranks hold in parts", "all-reduce", 1, summed * stat // _shards(config, layout))
    add("gradient norm", "all-reduce", 1, 8)
    return rows


def _shards(config: Config, layout: Layout) -> int:
    return layout.dp if config.optim.use_distributed_optimizer else 1


def dp_traffic(config: Config, layout: Layout, vocab_size: int) -> list[Traffic]:
    """Once a step, whatever the number of micro-batches."""
    n, itemsize = layout.dp, ITEMSIZE[config.trainer.precision]
    if n == 1:
        return []
    whole, size = bucketing(parameters(config.model, vocab_size, layout.tp), n, config.optim.ddp_bucket_size)
    calls, wide, once = -(-whole // size), max(4, itemsize), (n - 1) / n
    rows = [Traffic("gradients", "all-reduce", calls, 2 * once * whole * wide)]
    if config.optim.use_distributed_optimizer:
        rows = [Traffic("gradients", "reduce-scatter", calls, once * whole * wide),
                Traffic("weights after the step", "all-gather", calls, once * whole * itemsize)]
    return [*rows, Traffic("loss", "all-reduce", 1, 2 * once * wide), Traffic("gradient norm", "all-reduce", 1, 2 * once * 8)]


# ---- memory ---------------------------------------------------------------------------------------------------


def activations(m: ModelConfig, layout: Layout, itemsize: int) -> int:
    """Bytes that the forward of one micro-batch keeps for its backward on a rank, the logits left out.

    Under full recompute: the input of every layer, and what one layer keeps while its backward runs."""
    t, D, L, S, B = layout.tp, m.hidden_size, m.num_layers, m.seq_length, m.micro_batch_size
    tokens, rows, stat = S * B, S * B // (t if layout.sp else 1), max(4, itemsize)
    norm = rows * stat * (2 if m.normalization == "layernorm" else 1)
    stream = rows * D * itemsize                                      # the residual stream, or a normalised copy of it
    up = (2 if m.activation == "swiglu" else 1) * m.ffn_size // t
    mlp = tokens * (up + m.ffn_size // t) * itemsize                  # input and output of the activation
    layer = 4 * stream + 2 * norm + _attention(m, layout, itemsize) + mlp
    tables = S * m.head_dim * stat if m.position_embedding_type == "rope" else 0
    ids = tokens * (16 + (1 if t > 1 else 0))                         # ids, labels, and which ids are this rank's
    ends = 2 * stream + norm + 2 * tokens * stat + tables + ids       # last norm, head, statistics of the cross entropy
    if m.recompute_granularity == "full":
        return L * stream + (layer - stream) + ends
    return L * layer + ends


def _attention(m: ModelConfig, layout: Layout, itemsize: int) -> int:
    """What attention keeps between its projections: the heads it reads, its output, statistics or probabilities."""
    S, B, heads, kv = m.seq_length, m.micro_batch_size, m.num_attention_heads // layout.tp, kv_heads(m, layout.tp)
    rope = m.position_embedding_type == "rope"
    fused = heads + 2 * kv                                            # q, k, v of the projection: views of one tensor
    if m.attention_dropout:
        explicit = 2 * B * heads * S * S * itemsize + S * S           # probabilities before and after, the causal mask
        return S * B * 4 * heads * m.head_dim * itemsize + explicit
    if kv != heads:                                                   # k and v are repeated for every query head
        kept = 2 * heads + (heads if rope else fused)
    else:
        kept = fused + (heads + kv if rope else 0)                    # v stays a view, and keeps its whole tensor
    return S * B * ((kept + heads) * m.head_dim * itemsize + heads * max(4, itemsize))


def memory(config: Config, layout: Layout, vocab_size: int) -> dict[str, int]:
    """Bytes a rank needs. Gradients are kept in fp32 at least; AdamW has two moments, and masters of bf16 weights, of which a rank
    of dp has 1/dp under ZeRO-1."""
    m, item = config.model, ITEMSIZE[config.trainer.precision]
    n, wide = bucketing(parameters(m, vocab_size, layout.tp), layout.dp, None)[0], max(4, item)
    logits = m.seq_length * m.micro_batch_size * vocabulary_rows(m, vocab_size, layout.tp)
    need = {"weights": n * item, "gradients": n * wide, "optimizer": n // _shards(config, layout) * wide * (3 if item < wide else 2),
            "activations": activations(m, layout, item), "logits and their gradient": 2 * logits * item}
    if axes := sum(size > 1 for size in (layout.tp, layout.dp)):
        need["shared memory for collectives (CPU)"] = axes * HEAP
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
    micro = m.global_batch_size // (m.micro_batch_size * layout.dp)
    all_rows = vocabulary_rows(m, vocab, layout.tp) * layout.tp
    padding = f" (padded to {all_rows:,})" if all_rows != vocab else ""
    lines = [f"model     {_count(m.num_layers, 'layer')}, hidden {m.hidden_size:,}, ffn {m.ffn_size:,}, "
             f"{_count(m.num_attention_heads, 'head')} of {m.head_dim}"
             + (f" ({m.query_groups} key / value)" if m.query_groups != m.num_attention_heads else "")
             + f", vocabulary {vocab:,}{padding}",
             f"          {parameters(m, vocab):,} parameters in {config.trainer.precision}"
             + (f", {parameters(m, vocab, layout.tp):,} on each rank" if layout.tp > 1 else ""),
             f"layout    {_count(world, 'rank')} = tp {layout.tp} x dp {layout.dp} x pp {layout.pp}, "
             f"sequence parallel {'on' if layout.sp else 'off'}",
             f"step      {_count(m.global_batch_size, 'sample')} of {_count(m.seq_length, 'token')} = "
             f"{m.global_batch_size * m.seq_length:,} tokens, "
             f"in {_count(micro, 'micro-batch')} of {m.micro_batch_size}", ""]
    table = rank_table(layout)
    lines.append("place of each rank on the axes, and the ranks it shares them with")
    lines.append(f"    {'rank':<6}" + "".join(f"{a:>5}" for a in AXES))
    for r in range(world):
        place = (next(g.index(r) for g in table[a] if r in g) for a in AXES)
        lines.append(f"    {r:<6}" + "".join(f"{p:>5}" for p in place))
    lines += [f"    {a:<6}" + " ".join(str(list(g)) for g in table[a]) for a in AXES]
    for axis, traffic in (("tp", tp_traffic(config, layout)), ("dp", dp_traffic(config, layout, vocab))):
        lines += ["", f"sent by each rank in a step, over {axis}: {human(sum(x.bytes for x in traffic))}"
                  + ("" if traffic else ", for there is one rank")]
        lines += [f"    {x.cause:<40}{x.op:<16}{x.calls:>7,} x {human(x.bytes / x.calls):>10} {human(x.bytes):>12}"
                  for x in traffic]
    need = memory(config, layout, vocab)
    lines += ["", f"memory of each rank: {human(sum(need.values()))}" + _other_zero1(config, layout, vocab)]
    return "\n".join(lines + [f"    {what:<56}{human(size):>33}" for what, size in need.items()])


def _other_zero1(config: Config, layout: Layout, vocab: int) -> str:
    """What ZeRO-1 would save, or saves."""
    if layout.dp == 1:
        return ""
    on = config.optim.use_distributed_optimizer
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, use_distributed_optimizer=not on))
    return f" ({human(sum(memory(other, layout, vocab).values()))} {'without' if on else 'with'} ZeRO-1, zero1={str(not on).lower()})"
