"""Fields of a config that are set and change nothing: the command line names them before ranks start.

No mistakes: a YAML keeps its section where experts, a loss or the decay are switched off on the command line. What contradicts itself
is refused instead (models/config.py, parallel/layout.py). No torch here.
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from .config import Config


def without_effect(config: Config, *, reads_text: bool = False) -> str:
    """The fields that nothing reads and that are not at their defaults, each group with its cause; "" for none.

    reads_text: data.* counts too; verify and explain read none."""
    def changed(key: str) -> bool:
        here, usual = (reduce(getattr, key.split("."), c) for c in (config, Config()))
        return here != usual
    found = [(cause, [*filter(changed, fields)]) for cause, fields in _unread(config)]
    return "; ".join(f"{', '.join(fields)} (as {cause})" for cause, fields in found
                     if fields and (reads_text or not cause.startswith("data.")))


def _unread(config: Config) -> Iterator[tuple[str, list[str]]]:
    """(cause, fields that nothing reads for it)"""
    m, coeff = config.model, config.model.moe_aux_loss_coeff
    if m.num_moe_experts is None:
        yield "model.num_moe_experts=none", [f"model.{name}" for name in vars(m) if name.startswith("moe_")]
    else:
        if m.moe_router_score_function != "softmax":                  # NeMo's DeepSeek-V3 has it set
            yield f"model.moe_router_score_function={m.moe_router_score_function}", ["model.moe_router_pre_softmax"]
        if set(_tuple(m.moe_router_load_balancing_type)) == {"none"} and any(_tuple(coeff)):
            yield "model.moe_router_load_balancing_type=none", ["model.moe_aux_loss_coeff"]
        if not m.moe_router_enable_expert_bias:
            yield "model.moe_router_enable_expert_bias=false", ["model.moe_router_bias_update_rate"]
        if m.moe_expert_capacity_factor is None:
            yield "model.moe_expert_capacity_factor=none", ["model.moe_token_drop_policy"]
    if m.position_embedding_type != "rope":
        yield f"model.position_embedding_type={m.position_embedding_type}", ["model.rotary_base"]
    if config.optim.sched.decay == "constant":
        yield "optim.sched.decay=constant", ["optim.min_lr", "optim.sched.decay_steps"]
    if not config.data.paths:
        yield "data.paths=[]", ["data.extensions"]


def _tuple(x: object) -> tuple:
    return x if isinstance(x, tuple) else (x,)
