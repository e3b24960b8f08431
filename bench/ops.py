"""The benches by name: no torch here, `interlace bench --list` answers at once. A test holds this list against the files."""
import difflib

from ..parallel.errors import UserError

__all__ = ["OPS", "pick"]

OPS = {                                                               # name of bench_<name>.py -> ranks it runs on, what it holds
    "rms_norm": ("one", "rms_norm, add_rms_norm"),
    "layer_norm": ("one", "layer_norm, add_layer_norm"),
    "swiglu": ("one", "swiglu"),
    "gated": ("one", "gated: silu, gelu and gelu_tanh of a gate, times up"),
    "clamped_swiglu": ("one", "clamped_swiglu: gpt-oss's gate, with the biases of experts"),
    "gelu": ("one", "gelu, exact and tanh"),
    "rope": ("one", "rope on a slice of a fused qkv buffer"),
    "attention": ("one", "causal attention on slices of a fused qkv buffer, on CPU"),
    "dropout": ("one", "dropout, whole and a shard"),
    "jitter": ("one", "jitter, the noise on a router's input"),
    "cross_entropy": ("one", "cross_entropy"),
    "router": ("one", "router of Mixtral, Qwen3 and DeepSeek-V3, with the sums of the aux and z losses"),
    "route_plan": ("one", "route_plan"),
    "permute": ("one", "permute"),
    "unpermute": ("one", "unpermute with probs"),
    "grouped_gemm": ("one", "grouped_gemm, balanced and skewed"),
    "experts": ("one", "expert_mlp: the feed-forward of all experts"),
    "adamw": ("one", "a step of AdamW over a GPT's parameters, alone and with the clip"),
    "grad_norm": ("one", "the norm of a GPT's gradients"),
    "collectives": ("many", "all_reduce, all_gather, reduce_scatter, all_to_all"),
    "gemm_ar": ("many", "gemm_ar, copy_gemm"),
    "gemm_rs": ("many", "gemm_rs, ag_gemm"),
    "dispatch": ("many", "dispatch and combine of expert parallelism, with the plan"),
    "rs_residual_norm": ("many", "rs_residual_norm with RMSNorm and LayerNorm"),
    "replace": ("one", "a step of transformers' Llama after replace_, against stock"),
    "train_step": ("both", "a training step of a GPT, against torch's tensor parallel"),
}


def pick(names: list[str]) -> list[str]:
    """The benches to run, all when none is named. Raises: UserError with the nearest names."""
    for name in names:
        if name not in OPS:
            near = difflib.get_close_matches(name, OPS, n=3, cutoff=0.4)
            raise UserError(f"bench: an op must be one of those `interlace bench --list` shows, got {name}; "
                            + (f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(OPS)}"))
    return list(dict.fromkeys(names)) or list(OPS)
