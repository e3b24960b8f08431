"""explain: what a config means before anything runs: ranks, groups, bytes on the wire, memory. Arithmetic only, no torch.

Every number here is held against a real run by tests/test_explain.py: parameters and optimizer bytes against the model's
tensors, bytes per axis against the collectives that were called, activations against what autograd saved.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..parallel.layout import Layout
from ..parallel.mesh import rank_table
from .config import Config, ModelConfig

ITEMSIZE = {"fp32": 4, "bf16": 2, "float64": 8}


def parameters(m: ModelConfig, vocab_size: int, tp: int = 1) -> int:
    """Numbers one tp rank holds, vocabulary padding included (the largest rank's count: all are equal)."""
    D, F, H, G, Dh, L = m.hidden_size, m.ffn_size, m.num_attention_heads, m.query_groups, m.head_dim, m.num_layers
    kv = G // tp if G % tp == 0 else 1
    bias, norms = m.add_bias_linear, 2 if m.normalization == "layernorm" else 1
    qkv, up = (H // tp + 2 * kv) * Dh, (2 if m.activation == "swiglu" else 1) * F // tp
    layer = (qkv + up) * (D + bias) + (H // tp * Dh + F // tp) * D + 2 * bias * D + 2 * norms * D
    unit = m.make_vocab_size_divisible_by * tp
    rows = -(-vocab_size // unit) * m.make_vocab_size_divisible_by
    tables = rows * D * (1 if m.share_embeddings_and_output_weights else 2)
    positions = m.seq_length * D if m.position_embedding_type == "learned_absolute" else 0
    return L * layer + tables + positions + norms * D


@dataclass(frozen=True)
class Traffic:
    """What one rank sends over an axis in a step, by cause: {cause: (calls, bytes)}. An all-reduce of n bytes over t ranks
    counts 2 (t-1)/t n, an all-gather or reduce-scatter of n gathered bytes (t-1)/t n: the least any algorithm moves."""
    by_cause: dict[str, tuple[int, float]]

    @property
    def total(self) -> float:
        return sum(b for _, b in self.by_cause.values())


def tp_traffic(config: Config, layout: Layout) -> Traffic:
    m, t = config.model, layout.tp
    if t == 1:
        return Traffic({})
    micro = m.global_batch_size // (m.micro_batch_size * layout.dp)
    itemsize, S, B, D, L = ITEMSIZE[config.trainer.precision], m.seq_length, m.micro_batch_size, m.hidden_size, m.num_layers
    n = S * B * D * itemsize
    half = (t - 1) / t * n                                            # one all-gather or reduce-scatter; an all-reduce is two
    again = 1 if m.recompute_granularity == "full" else 0
    causes: dict[str, tuple[int, float]] = {}

    def add(cause: str, calls: int, each: float) -> None:
        causes[cause] = (calls * micro, calls * micro * each)
    if layout.sp:
        add("embedding, reduce-scatter", 1, half)
        add("embedding backward, all-gather", 1, half)
        add("layers forward, all-gather", 2 * L * (1 + again), half)
        add("layers forward, reduce-scatter", 2 * L * (1 + again), half)
        add("layers backward, reduce-scatter", 2 * L, half)
        add("layers backward, all-gather (gradient, and input again)", 4 * L, half)
        add("head, all-gather (forward, and input again)", 2, half)
        add("head backward, reduce-scatter", 1, half)
    else:
        add("embedding, all-reduce", 1, 2 * half)
        add("layers forward, all-reduce", 2 * L * (1 + again), 2 * half)
        add("layers backward, all-reduce", 2 * L, 2 * half)
        add("head backward, all-reduce", 1, 2 * half)
    stat = 8 if itemsize == 8 else 4
    add("cross entropy, all-gather of 3 numbers a token", 1, (t - 1) * S * B * 3 * stat)
    return Traffic(causes)


def activations(m: ModelConfig, layout: Layout, itemsize: int) -> float:
    """Bytes that the forward of one micro-batch keeps for its backward on a rank, logits included, rounded-off terms
    (row statistics, masks) left out. See the layers for what each saves."""
    t, s, B, S, D, Dh = layout.tp, layout.tp if layout.sp else 1, m.micro_batch_size, m.seq_length, m.hidden_size, m.head_dim
    kv = m.query_groups // t if m.query_groups % t == 0 else 1
    H = m.num_attention_heads // t
    tokens, rows = S * B, S * B / s
    up = (2 if m.activation == "swiglu" else 1) * m.ffn_size / t
    attention = (H + 2 * kv) * Dh * 2 + H * Dh                        # qkv, its rotated or expanded copies, the output
    layer = 4 * rows * D + tokens * (attention + up + m.ffn_size / t)
    if m.recompute_granularity == "full":
        kept = m.num_layers * rows * D + layer                        # inputs of all layers, and one layer at a time
    else:
        kept = m.num_layers * layer
    return itemsize * (kept + 2 * rows * D)


def memory(config: Config, layout: Layout, vocab_size: int) -> dict[str, float]:
    """Bytes a rank needs: weights, gradients, optimizer (two moments, and fp32 masters of bf16 weights), activations, logits."""
    m, item = config.model, ITEMSIZE[config.trainer.precision]
    n, wide = parameters(m, vocab_size, layout.tp), max(4, item)
    unit = m.make_vocab_size_divisible_by * layout.tp
    logits = m.seq_length * m.micro_batch_size * (-(-vocab_size // unit) * m.make_vocab_size_divisible_by)
    return {"weights": n * item, "gradients": n * (wide if wide == item else wide + item),
            "optimizer": n * (2 * wide + (4 if item == 2 else 0)),
            "activations": activations(m, layout, item), "logits and their gradient": 2.0 * logits * item}


def human(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def explain(config: Config, world: int, vocab_size: int | None = None) -> str:
    """The text of `interlace explain`. Raises: UserError when the layout breaks a rule."""
    layout = Layout.from_config(config, world)
    m = config.model
    vocab = vocab_size or m.vocab_size or 257
    micro = m.global_batch_size // (m.micro_batch_size * layout.dp)
    n, mine = parameters(m, vocab), parameters(m, vocab, layout.tp)
    lines = [f"model       {m.num_layers} layers, hidden {m.hidden_size}, ffn {m.ffn_size}, {m.num_attention_heads} heads "
             f"({m.query_groups} key / value), vocabulary {vocab}: {n:,} parameters, {mine:,} on a rank",
             f"layout      world {layout.world} = tp {layout.tp} x dp {layout.dp} x pp {layout.pp}, "
             f"sequence parallel {'on' if layout.sp else 'off'}",
             f"step        {m.global_batch_size} samples of {m.seq_length} tokens = {micro} micro-batches of {m.micro_batch_size} "
             f"on each of {layout.dp} replicas", ""]
    table = rank_table(layout)
    lines.append("rank   " + "".join(f"{a:>8}" for a in ("tp", "dp", "pp", "ep", "edp")) + "    its place on each axis")
    for r in range(layout.world):
        place = [next(g.index(r) for g in table[a] if r in g) for a in ("tp", "dp", "pp", "ep", "edp")]
        lines.append(f"{r:<7}" + "".join(f"{p:>8}" for p in place))
    lines += ["", "groups"] + [f"{a:<12}" + " ".join(str(list(g)) for g in table[a]) for a in ("tp", "dp", "pp", "ep", "edp")]
    traffic = tp_traffic(config, layout)
    lines += ["", f"bytes a rank sends per step: tp {human(traffic.total)}" + ("" if traffic.by_cause else " (one rank: nothing)")]
    lines += [f"    {cause:<58}{calls:>6} calls {human(size):>12}" for cause, (calls, size) in traffic.by_cause.items()]
    need = memory(config, layout, vocab)
    lines += ["", f"memory of a rank: {human(sum(need.values()))}"] + [f"    {what:<58}{human(size):>25}" for what, size in need.items()]
    return "\n".join(lines)
