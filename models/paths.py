"""Which path each layer's fused calls take on this machine, before anything runs: choose.py at the sizes of a config.

    predicted(config, layout) -> lines as in a run's paths.txt, none without tp

Of ranks on one host: CUDA where there is a GPU, there without multicast, else the shared memory of CPU ranks."""
from __future__ import annotations

import torch

from ..kernels.comm.agree import path_line
from ..kernels.comm.choose import choose
from ..kernels.comm.heap import LIB
from ..kernels.comm.machine import here
from ..kernels.comm.pad import ROOM
from ..parallel.layout import Layout
from .config import Config
from .explain import HEAP, kv_heads, vocabulary_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def predicted(config: Config, layout: Layout, vocab_size: int | None = None) -> list[str]:
    m, t, dtype, D = config.model, layout.tp, DTYPES[config.trainer.precision], config.model.hidden_size
    if t == 1:
        return []
    rows, gates, heads = m.seq_length * m.micro_batch_size, 2 if m.activation == "swiglu" else 1, m.num_attention_heads // t
    mlps = {"layers.*.mlp": m.ffn_size} if not all(map(m.has_experts, range(m.num_layers))) else {}
    if m.moe_shared_expert_intermediate_size:
        mlps["layers.*.mlp.shared"] = m.moe_shared_expert_intermediate_size
    column = {"layers.*.self_attn.qkv_proj": (heads + 2 * kv_heads(m, t)) * m.head_dim,
              **{f"{mlp}.up": gates * ffn // t for mlp, ffn in mlps.items()},
              "lm_head": vocabulary_rows(m, vocab_size or m.vocab_size or 257, t)}
    row = {"layers.*.self_attn.o_proj": heads * m.head_dim, **{f"{mlp}.down_proj": ffn // t for mlp, ffn in mlps.items()}}
    calls: dict[tuple[str, int, int, bool], list[str]] = {}           # (op, rows, K, whole) -> layers; the columns are D in each

    def add(op: str, features: int, name: str) -> None:
        gathers = op == "ag_gemm"                                     # for dx also the whole dy, from which dw is
        calls.setdefault((op, rows // t if gathers else rows, features, gathers and name.startswith("dx")), []).append(name)
    for name, n in column.items():
        if layout.sp:
            add("ag_gemm", n, name)
        add("gemm_rs" if layout.sp else "gemm_ar", n, f"dx of {name}")
    for name, k in row.items():
        if not layout.sp:
            add("gemm_ar", k, name)
        elif name.endswith("down_proj") or m.add_bias_linear or m.hidden_dropout:   # else its part goes to rs_residual_norm
            add("gemm_rs", k, name)
            add("ag_gemm", k, f"dx of {name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    slot = ROOM if device == "cuda" else HEAP // 2 if LIB is not None else 0
    return [path_line(op, n, D, k, whole, dtype, t, choose(op, n, D, k, dtype.itemsize, t, device, slot, whole, machine=here(device, t)),
                      names)
            for (op, n, k, whole), names in calls.items()]
