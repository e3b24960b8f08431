"""Any mix of the five parallelisms trains to the losses and weights of one process: every legal pair of options in some layout.

The layouts are a covering array: each pair of values of two options that any legal layout can have is in at least one of them.
"""
import itertools
import multiprocessing
import random

import pytest
from ranks import run
from test_equal import BASE

from interlace.models.config import Config, ModelConfig, OptimConfig, SchedConfig
from interlace.models.verify import TOLERANCE, compare
from interlace.parallel.layout import Layout, broken_rules
from interlace.parallel.mesh import Mesh

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
OPTIONS = {
    "tp": (1, 2, 4), "pp": (1, 2, 4), "dp": (1, 2, 4), "ep": (1, 2, 4), "sp": (False, True), "zero1": (False, True),
    "schedule": (None, "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
    "micro_batches": (2, 4), "recompute": (False, True), "tied": (False, True), "dropout": (False, True),
    "experts": (None, "softmax", "capacity", "sigmoid", "every second"),
    "style": ("llama", "gpt2", "gqa"),
}
MOE = {
    None: {}, "softmax": EXPERTS, "capacity": {**EXPERTS, "moe_expert_capacity_factor": 1.0, "moe_z_loss_coeff": 1e-3},
    "sigmoid": {**EXPERTS, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
                "moe_router_load_balancing_type": "seq_aux_loss", "moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True,
                "moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 1.5},
    "every second": {**EXPERTS, "moe_layer_freq": 2, "moe_token_drop_policy": "position", "moe_expert_capacity_factor": 0.5,
                     "moe_pad_expert_input_to_capacity": True, "moe_input_jitter_eps": 0.1, "moe_enable_routing_replay": True,
                     "moe_router_load_balancing_type": ("global_aux_loss", "seq_aux_loss"), "moe_aux_loss_coeff": (0.05, 0.01)},
}
STYLES = {
    "llama": {}, "gqa": {"num_query_groups": 1},
    "gpt2": {"normalization": "layernorm", "activation": "gelu", "position_embedding_type": "learned_absolute", "add_bias_linear": True},
}


def config(o):
    chunks = 2 if o["schedule"] and o["schedule"] != "gpipe" else None
    model = {
        **BASE, **STYLES[o["style"]], **MOE[o["experts"]], "num_layers": 2 if o["pp"] == 1 else o["pp"] * (chunks or 1) + 1,
        "micro_batch_size": 1, "global_batch_size": o["micro_batches"] * o["dp"], "seq_length": 8,
        "tensor_model_parallel_size": o["tp"], "pipeline_model_parallel_size": o["pp"], "expert_model_parallel_size": o["ep"],
        "sequence_parallel": o["sp"], "virtual_pipeline_model_parallel_size": chunks, "pipeline_parallel_schedule": o["schedule"],
        "recompute_granularity": "full" if o["recompute"] else None, "share_embeddings_and_output_weights": o["tied"],
        "hidden_dropout": 0.1 if o["dropout"] else 0.0, "attention_dropout": 0.1 if o["dropout"] else 0.0}
    return Config(model=ModelConfig(**model), optim=OptimConfig(
        lr=0.01, min_lr=0.001, clip_grad=0.1, sched=SchedConfig(warmup_steps=2), use_distributed_optimizer=o["zero1"]))


def world(o):
    return o["tp"] * o["pp"] * o["dp"]


def legal(o):
    cheap = (world(o) <= 8 and o["zero1"] <= (o["dp"] > 1) and o["sp"] <= (o["tp"] > 1) and (o["schedule"] is not None) <= (o["pp"] > 1)
             and o["tp"] * o["dp"] % o["ep"] == 0 and (o["ep"] > 1) <= (o["experts"] is not None))
    return cheap and not broken_rules(config(o), world(o))


def pairs_of(o):
    return {frozenset(p) for p in itertools.combinations(o.items(), 2)}


def shape(o):
    return o["tp"], o["pp"], o["dp"], o["ep"]


def layouts(most, seed=0, drawn=800, tries=40):
    """Of `drawn` random legal layouts on up to `most` ranks enough to hold every pair of values and every shape (tp, pp, dp, ep) that
    any of them has: greedily, each the one of `tries` that holds most of what is missing."""
    rng, draws, chosen = random.Random(seed), [], []
    while len(draws) < drawn:
        o = {k: rng.choice(v) for k, v in OPTIONS.items()}
        if world(o) <= most and legal(o):
            draws.append(o)
    missing, shapes = set().union(*map(pairs_of, draws)), {shape(o) for o in draws}
    while missing or shapes:
        best = max(rng.sample(draws, tries), key=lambda o: len(pairs_of(o) & missing) + 10 * (shape(o) in shapes))
        if pairs_of(best) & missing or shape(best) in shapes:
            missing -= pairs_of(best)
            shapes.discard(shape(best))
            chosen.append(best)
    return chosen


def name(o):
    shown = [f"{k}{o[k]}" for k in ("tp", "pp", "dp", "ep") if o[k] > 1]
    shown += [k for k in ("sp", "zero1", "recompute", "tied", "dropout") if o[k]]
    return "-".join([*shown, *(str(o[k]).replace("_", " ") for k in ("schedule", "experts", "style") if o[k]), str(o["micro_batches"])])


LAYOUTS = []
if multiprocessing.parent_process() is None:                          # ranks import this file too
    LAYOUTS = sorted({name(o): o for o in layouts(8) + layouts(4, seed=1)[:18]}.values(), key=world)   # a pool of ranks after the other


def _equal(rank, o):
    cfg = config(o)
    found = compare(cfg, Mesh.build(Layout.from_config(cfg, world(o))), vocab_size=cfg.model.vocab_size, steps=5)
    bad = [f for f in found if not f.error <= TOLERANCE]
    assert not bad, "\n".join(f"{f.what} {f.name}: {f.error:.1e} {f.cause}" for f in bad[:10])
    kinds = {"activation", "loss", "gradient", "gradient norm", "weight"}
    kinds |= {"balancing losses", "tokens per expert"} if o["experts"] else set()
    assert {f.what for f in found} == kinds
    names = {f.name for f in found if f.what == "weight"}
    assert {int(n.split(".")[1]) for n in names if n.startswith("layers.")} == set(range(cfg.model.num_layers)), "a stage was not compared"


@pytest.mark.parametrize("o", LAYOUTS, ids=name)
def test_any_mix_equals_one_process(o):
    run(world(o), _equal, o)


def test_the_layouts_cover():
    """Every value of every option, every pair of axes, and no fewer than 60 layouts up to 8 ranks."""
    assert len(LAYOUTS) >= 60 and max(map(world, LAYOUTS)) == 8
    seen = {frozenset(p) for o in LAYOUTS for p in itertools.combinations(o.items(), 2)}
    for key, values in OPTIONS.items():
        assert {o[key] for o in LAYOUTS} == set(values), key
    for a, b in itertools.combinations(("tp", "pp", "dp"), 2):
        assert frozenset({(a, 2), (b, 2)}) in seen
    for pair in [("ep", 2), ("pp", 2)], [("ep", 4), ("sp", True)], [("zero1", True), ("ep", 2)], [("zero1", True), ("tied", True)], \
            [("schedule", "zbv_zero_bubble"), ("recompute", True)], [("schedule", "zbv_zero_bubble"), ("experts", "capacity")]:
        assert frozenset(pair) in seen, pair
    every = sum(len(a) * len(b) for a, b in itertools.combinations(OPTIONS.values(), 2))
    assert len(seen) >= 0.8 * every                                   # the rest contradicts itself: a schedule without pp, ...

