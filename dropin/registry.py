"""Our tensor parallelism and experts in the registries of transformers 5, for models that come from its own from_pretrained.

    interlace.hf.register()
    plan = interlace.hf.plan(config, tp=2, sequence_parallel=True)    # or "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan=plan),
                                                 experts_implementation="interlace")

    name there                                          runs                      where it does not serve
    colwise, colwise_gather_output (or _rep)            copy_gemm                 transformers' own style: quantised or packed weights,
    rowwise                                             gemm_ar                   sizes that t does not divide, DTensor inputs, autocast,
    embedding_rowwise                                   a masked lookup, summed   a mesh of several dimensions
    replicated_with_grad_allreduce                      each gradient summed as it comes, so that accumulated ones are right
    interlace_attention, interlace_kv                   fewer key / value heads than ranks: each head on several; their weights are whole
    interlace_layer, _gather, _column, _row, _norm      sequence parallelism (plan writes them)
    experts_implementation="interlace"                  route_plan, expert_mlp    refused with the reason
    ep_implementation="interlace"                       dispatch, combine         refused with the reason
"""
from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import expert_mlp, route_plan
from ..kernels.comm import combine, dispatch, dispatch_plan
from ..parallel.collectives import scatter_to, stack_from
from ..parallel.errors import UserError, raise_problems
from .styles import axis_of, styles

__all__ = ["plan", "register", "unregister"]

NAME = "interlace"
DENSE = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
_before: list[tuple[dict[str, Any], str, Any]] = []                   # (registry, name, what stood there or None), to undo


def register() -> list[str]:
    """Put our styles, experts function and expert dispatch into transformers' registries, for this process. A second call changes nothing.

    Returns: their names. Raises: UserError where transformers is missing or before 5 (use replace_ there)."""
    try:
        from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
        from transformers.distributed.tensor_parallel import TensorParallelLayer  # noqa: F401  (it fills the registry)
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as e:
        raise UserError(f"hf.register: transformers must be there with the registries of 5.23, got {e}; "
                        "interlace.replace_(model, mesh) needs none") from None
    registries = [type(ALL_PARALLEL_STYLES)._global_mapping, type(ALL_EXPERTS_FUNCTIONS)._global_mapping,
                  EPImplementationInterface._global_mapping]
    if not _before:
        new = [styles(registries[0]), {NAME: experts_forward}, {NAME: _expert_dispatch(EPImplementation)}]
        for registry, ours in zip(registries, new):
            _before.extend((registry, name, registry.get(name)) for name in ours)
            registry.update(ours)
    return [name for _, name, _ in _before]


def unregister() -> None:
    """Undo register(), for models loaded from here on."""
    for registry, name, old in _before:
        if old is None:
            registry.pop(name, None)
        else:
            registry[name] = old
    _before.clear()


# ---- plans -------------------------------------------------------------------------------------------------------


def plan(config: Any, tp: int, *, sequence_parallel: bool = False) -> dict[str, str]:
    """The tp_plan of DistributedConfig for a causal language model of this config: transformers' own, with what it lacks.

    Args: config: a transformers config; tp: its tp_size; sequence_parallel: cut the sequence between the layers (dense models).
    Raises: UserError with every reason: no plan there, heads that do not fit, layers that sequence parallelism does not know.
    """
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rules: dict[str, str] = dict(model.tp_plan or {})
    if not rules:
        raise UserError(f"hf.plan: transformers must have a tensor-parallel plan for {type(model).__name__}, got none; load it, then call "
                        "interlace.replace_(model, mesh), which splits by structure")
    problems: list[str] = []
    blocks = {rule.rpartition(".")[0]: [m for n, m in model.named_modules() if _generic(n) == rule.rpartition(".")[0]]
              for rule in rules if rule.endswith(".k_proj")}
    for block, found in blocks.items():
        rules |= _key_values(block, found, tp, problems)
    if sequence_parallel:
        rules |= _sequence(model, rules, problems)
    raise_problems("hf.plan", problems)
    return rules


def _generic(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _key_values(block: str, found: list[Any], tp: int, problems: list[str]) -> dict[str, str]:
    """Rules for attention blocks with fewer key / value heads than ranks."""
    c, sizes = found[0].config, {(m.q_proj.out_features, m.k_proj.out_features) for m in found}
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    legal = [t for t in range(1, heads + 1) if heads % t == 0 and (kv % t == 0 or t % kv == 0)]
    if tp not in legal or len(sizes) > 1:
        problems.append(f"{block}: {heads} heads over {kv} key / value heads must divide over tp, got tp={tp}; use tp in {legal}"
                        if len(sizes) == 1 else f"{block}: heads must be alike in all layers, got {sorted(sizes)}; use replace_")
        return {}
    if kv % tp == 0:
        return {}
    return {block: "interlace_attention", f"{block}.k_proj": "interlace_kv", f"{block}.v_proj": "interlace_kv"}


def _sequence(model: Any, rules: dict[str, str], problems: list[str]) -> dict[str, str]:
    """Rules of sequence parallelism for layers of attention, MLP and norms."""
    stem = next((r[:r.index(".*.")] for r in rules if ".*." in r), "")
    base, at = stem.rpartition(".")[0], f"{stem}.*."
    strange = sorted(r for r in rules if r.startswith(at) and r.removeprefix(at) not in DENSE | {"self_attn"})
    if not stem or strange:
        problems.append("sequence_parallel must have layers of self_attn and a dense mlp, got "
                        f"{', '.join(strange) or 'none'}; leave it out")
        return {}
    layers = model.get_submodule(stem)
    if "position_embeddings" not in inspect.signature(type(layers[0]).forward).parameters:
        problems.append("sequence_parallel must have layers that are given position_embeddings, got "
                        f"{type(layers[0]).__name__}; leave it out")
        return {}
    small = [n for n, m in layers[0].named_children() if not list(m.children()) and all(p.dim() == 1 for p in m.parameters())]
    new = {at[:-1]: "interlace_layer", f"{at}mlp": "interlace_gather", f"{base}.norm": "interlace_last_norm"}
    new |= {at + n: "interlace_norm" for n in small}
    new[f"{at}self_attn"] = "interlace_gather_kv" if f"{at}self_attn" in rules else "interlace_gather"
    to = {"colwise": "interlace_column", "rowwise": "interlace_row", "interlace_kv": "interlace_kv_sequence"}
    return new | {r: to[s] for r, s in rules.items() if r.startswith(at) and s in to}


# ---- experts -----------------------------------------------------------------------------------------------------


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function: route_plan and expert_mlp. Raises: ValueError for experts that are no SwiGLU of stacked [gate; up] weights."""
    ids = top_k_index.where(top_k_index < len(_weights(self)[0]), -1)   # an id of num_experts: not on this rank
    w13, w2 = _weights(self)
    return expert_mlp(hidden_states.to(w13.dtype), w13, w2, route_plan(ids, len(w13)), top_k_weights).to(hidden_states.dtype)


def _weights(m: Any) -> tuple[Tensor, Tensor]:
    act = getattr(m, "act_fn", None)
    silu = act is F.silu or isinstance(act, nn.SiLU) or type(act).__name__ in ("SiLU", "SiLUActivation")
    reasons = {"without gates": not getattr(m, "has_gate", True), "with biases": getattr(m, "has_bias", False),
               "stored transposed": getattr(m, "is_transposed", False),
               "with gate and up interleaved": not getattr(m, "is_concatenated", True),
               "with a norm after them": getattr(m, "has_post_expert_norm", False), f"with {type(act).__name__} for silu": not silu,
               "with a gate of their own": getattr(type(m), "_apply_gate", None) is not None
               and getattr(type(m)._apply_gate, "__module__", "") != "transformers.integrations.moe"}
    if found := [why for why, there in reasons.items() if there]:
        raise UserError(f"experts_implementation='interlace': experts must be SwiGLU of stacked [gate; up] weights, got {type(m).__name__} "
                        f"{', '.join(found)}; use 'grouped_mm'")
    return m.gate_up_proj, m.down_proj


def _expert_dispatch(base: type) -> type:
    """The expert-parallel implementation: each token's row straight to the ranks of its experts, its sum back."""
    class Dispatch(base):
        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any):
            super().__init__(experts, ep_mesh, tp_mesh)
            self.experts, self.tp = experts, axis_of(tp_mesh)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            T, t, group = len(hidden_states), self.tp.size, self.ep_mesh.get_group()
            w13, w2 = _weights(self.experts)
            x, ids, weights = hidden_states.to(w13.dtype), top_k_index, top_k_weights
            if t > 1:                                                 # the ranks of tp share a batch: each takes its part
                more = -T % t
                x, weights = (scatter_to(F.pad(v, (0, 0, 0, more)), self.tp) for v in (x, weights))
                ids = F.pad(ids, (0, 0, 0, more), value=-1).chunk(t)[self.tp.rank]
            far = dispatch_plan(ids, self.num_local_experts * self.ep_mesh.size(), group)
            y = expert_mlp(dispatch(x, far), w13, w2, far.offsets, far.probs(weights))
            o = combine(y, far)
            return (stack_from(o, self.tp).flatten(0, 1)[:T] if t > 1 else o).to(hidden_states.dtype)
    return Dispatch
