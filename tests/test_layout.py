"""Every rule of a layout: a config that breaks it and the exact message; several at once; proposed values work."""
import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.models.config import Config, ModelConfig
from interlace.parallel.errors import UserError
from interlace.parallel.layout import MOST_EXPERTS, RANKS, RULES, Layout, broken_rules, stage_layers, stages_of_rank

TP, PP, VPP, EP = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
                   "expert_model_parallel_size")
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"

# rule, ranks, config, parts of the message: what must hold with both numbers, then the nearest legal values
BAD = [
    ("ranks", 0, {}, "--nproc must be at least 1, got 0; use --nproc 1"),
    ("ranks", -2, {}, "--nproc must be at least 1, got -2; use --nproc 1"),
    ("world", 3, {TP: 2}, f"must be a multiple of {TP} x {PP}", "got --nproc 3 and 2 x 1 = 2; use --nproc 2 or 4, or"),
    ("world", 1, {TP: 4}, "got --nproc 1 and 4 x 1 = 4; use --nproc 4, or"),
    ("heads over tp", 3, {TP: 3}, f"num_attention_heads must be a multiple of {TP}",
     f"got 8 and 3; use {TP} 2 (with --nproc 2) or 4 (with --nproc 4)"),
    ("heads over tp", 2, {TP: 2, "num_attention_heads": 5, "kv_channels": 32}, "got 5 and 2",
     "num_attention_heads 4 or 6"),
    ("heads over tp", 16, {TP: 16}, "got 8 and 16", f"use {TP} 8, or num_attention_heads 16"),
    ("heads over groups", 1, {"num_query_groups": 3}, "num_attention_heads must be a multiple of num_query_groups",
     "got 8 and 3; use num_query_groups 2 or 4"),
    ("heads over groups", 1, {"num_query_groups": 16},
     "got 8 and 16; use num_query_groups 8, or num_attention_heads 16"),
    ("groups over tp", 4, {TP: 4, "num_attention_heads": 24, "kv_channels": 8, "num_query_groups": 6},
     f"num_query_groups must be a multiple or a divisor of {TP}",
     "got 6 and 4; use num_query_groups 4 or 8",
     f"{TP} 2"),
    ("hidden over heads", 1, {"hidden_size": 65}, "hidden_size must be a multiple of num_attention_heads",
     "got 65 and 8; use hidden_size 64 or 80"),
    ("hidden over heads", 1, {"hidden_size": 6}, "got 6 and 8; use hidden_size 16, or num_attention_heads 3"),
    ("even head", 1, {"kv_channels": 7}, "even number of channels under rope",
     "got 7 = kv_channels; use kv_channels 6 or 8"),
    ("even head", 1, {"kv_channels": 1}, "got 1 = kv_channels; use kv_channels 2"),
    ("even head", 1, {"hidden_size": 40}, "got 5 = hidden_size 40 / num_attention_heads 8; use kv_channels 4 or 6"),
    ("ffn over tp", 2, {TP: 2, "ffn_hidden_size": 129}, f"ffn_hidden_size must be a multiple of {TP}",
     f"got 129 and 2; use ffn_hidden_size 128 or 130, or {TP} 1"),
    ("ffn over tp", 8, {TP: 8, "hidden_size": 24, "kv_channels": 4, "activation": "gelu",
                         "ffn_hidden_size": 4},
     f"got 4 and 8; use ffn_hidden_size 8, or {TP} 4"),
    ("ffn over tp", 10, {TP: 10, "num_attention_heads": 10, "hidden_size": 40}, "got 128 (its default here) and 10"),
    ("sequence over tp", 2, {TP: 2, "sequence_parallel": True, "seq_length": 255}, "seq_length must be a multiple of",
     "under sequence_parallel", f"got 255 and 2; use seq_length 254 or 256, or {TP} 1"),
    ("sequence over tp", 4, {TP: 4, "sequence_parallel": True, "seq_length": 2}, "got 2 and 4; use seq_length 4, or"),
    ("layers over pp", 8, {PP: 8, "num_layers": 7}, f"num_layers must be at least {PP} x {VPP}",
     f"got 7 and 8 x 1 = 8; use {PP} 7 (with --nproc 7), or num_layers 8"),
    ("layers over pp", 2, {PP: 2, VPP: 5, "num_layers": 8}, f"got 8 and 2 x 5 = 10; use {VPP} 4 or none, or num_layers 10"),
    ("first and last stage", 2, {PP: 2, "num_layers": 8, FIRST: 3, LAST: 4}, f"{FIRST} + {LAST} must be num_layers with two stages",
     f"got 3 + 4 and 8; use {PP} 3 (with --nproc 3), or num_layers 7"),
    ("first and last stage", 4, {PP: 4, "num_layers": 8, FIRST: 7}, f"{FIRST} must leave a layer for each of the 3 stages between",
     "got 7 of 8", "num_layers 10"),
    ("first and last stage", 1, {LAST: 2}, f"{LAST} need {PP} > 1, got 1"),
    ("vpp without pp", 1, {VPP: 2}, f"{VPP} needs {PP} > 1", f"got 2 and 1; use {VPP} 1 or none"),
    ("schedule", 2, {PP: 2, "pipeline_parallel_schedule": "zbv_zero_bubble"}, f"{VPP} must be 2 under zbv_zero_bubble",
     f"got 1; use {VPP} 2"),
    ("schedule", 2, {PP: 2, "pipeline_parallel_schedule": "interleaved_1f1b"}, f"{VPP} must be at least 2 under interleaved_1f1b",
     f"got 1; use {VPP} 2"),
    ("schedule", 2, {PP: 2, VPP: 2, "pipeline_parallel_schedule": "GPipe"}, f"{VPP} must be 1 under gpipe", f"got 2; use {VPP} 1 or none"),
    ("schedule", 1, {"pipeline_parallel_schedule": "1f1b"}, f"pipeline_parallel_schedule needs {PP} > 1, got 1f1b and 1"),
    ("micro-batches", 4, {PP: 4, "micro_batch_size": 8}, f"the micro-batches of a step must be at least {PP} under 1f1b",
     "got 2 = global_batch_size / (micro_batch_size x 1) and 4; use global_batch_size 32, or micro_batch_size 4"),
    ("micro-batches", 2, {PP: 2, VPP: 2, "global_batch_size": 20}, f"must fill whole rounds of {PP} under interleaved_1f1b", "got 5 = ",
     "use global_batch_size 16 or 24"),
    ("batch", 1, {"micro_batch_size": 4, "global_batch_size": 6},
     "global_batch_size must be a multiple of micro_batch_size x",
     "got 6 and 4 x 1 = 4; use global_batch_size 4 or 8, or micro_batch_size 3 or 6"),
    ("batch", 2, {"micro_batch_size": 4, "global_batch_size": 6},
     "got 6 and 4 x 2 = 8; use global_batch_size 8, or micro_batch_size 3"),
    ("batch", 1, {"micro_batch_size": 32},
     "got 16 and 32 x 1 = 32; use global_batch_size 32, or micro_batch_size 16"),
    ("ep over stage", 2, {TP: 2, EP: 3, "num_moe_experts": 9}, f"{EP} must divide the ranks of a stage",
     f"got 3 and 2 x 1 = 2; use {EP} 1"),
    ("ep over stage", 4, {TP: 2, PP: 2, EP: 4, "num_moe_experts": 8}, f"got 4 and 2 x 1 = 2; use --nproc 8, or {EP} 2"),
    ("ep without experts", 2, {TP: 2, EP: 2}, f"{EP} > 1 needs num_moe_experts",
     f"got 2 and none (a dense model); use {EP} 1"),
    ("experts over ep", 4, {TP: 4, EP: 4, "num_moe_experts": 6}, f"num_moe_experts must be a multiple of {EP}",
     f"got 6 and 4; use {EP} 2, or num_moe_experts 4 or 8"),
    ("topk", 1, {"num_moe_experts": 8, "moe_router_topk": 9}, "moe_router_topk must be at most num_moe_experts",
     "got 9 and 8; use moe_router_topk 8, or num_moe_experts 9"),
    ("most experts", 1, {"num_moe_experts": 2048}, "num_moe_experts must be at most 1024", "got 2048"),
    ("gradient of top 1", 1, {"num_moe_experts": 4, "moe_router_topk": 1}, "moe_router_pre_softmax must be true with moe_router_topk 1",
     "moe_router_norm_topk_prob=true says so), got false; use moe_router_topk 2"),
    ("layers with experts", 1, {"num_moe_experts": 4, "moe_layer_freq": [0, 1], "num_layers": 3}, "moe_layer_freq must have an entry",
     "got 2 for 3 layers; use num_layers 2"),
    ("groups of experts", 1, {"num_moe_experts": 8, "moe_router_num_groups": 4},
     "moe_router_num_groups and moe_router_group_topk go together", "got 4 and none"),
    ("groups of experts", 1, {"num_moe_experts": 9, "moe_router_num_groups": 4, "moe_router_group_topk": 2}, "got 9 and 4",
     "num_moe_experts 8 or 12"),
    ("groups of experts", 1, {"num_moe_experts": 8, "moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 3},
     "fit into the groups kept", "got 3 experts of 1 groups of 2, 4 in all; use moe_router_topk 2"),
    ("tokens over tp", 2, {TP: 2, "num_moe_experts": 4, "seq_length": 255}, f"seq_length must be a multiple of {TP} with experts",
     "got 255 and 2; use seq_length 254 or 256"),
    ("shared expert over tp", 2, {TP: 2, "num_moe_experts": 4, "moe_shared_expert_intermediate_size": 33}, "got 33 and 2",
     "use moe_shared_expert_intermediate_size 32 or 34"),
]


def config(**model):
    return Config(model=ModelConfig(**model))


@pytest.mark.parametrize("case", BAD, ids=[f"{i}-{c[0]}" for i, c in enumerate(BAD)])
def test_the_message_of_each_rule(case):
    rule, world, model, *parts = case
    broken = {b.rule: b for b in broken_rules(config(**model), world)}
    assert rule in broken, list(broken)
    message = str(broken[rule])
    assert all(part in message for part in parts), message
    with pytest.raises(UserError) as e:
        Layout.from_config(config(**model), world)
    assert message in str(e.value)


def test_every_rule_has_a_bad_config():
    assert {case[0] for case in BAD} == set(RULES)


def test_all_violations_in_one_error():
    bad = config(num_query_groups=3, ffn_hidden_size=130, sequence_parallel=True, seq_length=255, global_batch_size=7,
                 **{TP: 4, EP: 2})
    with pytest.raises(UserError) as e:
        Layout.from_config(bad, 4)
    lines = str(e.value).splitlines()
    assert lines[0] == "this layout does not fit (6 rules are broken):"
    assert [line.split(". ")[0].strip() for line in lines[1:]] == list("123456")
    fields = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "seq_length", "global_batch_size", EP)
    for field, line in zip(fields, lines[1:]):
        assert line.split(". ")[1].startswith(field), line


def test_a_wrong_number_of_ranks_does_not_hide_the_rest():
    bad = config(seq_length=255, sequence_parallel=True, num_layers=1, **{TP: 2, PP: 2})
    assert [b.rule for b in broken_rules(bad, 3)] == ["world", "sequence over tp", "layers over pp"]


@pytest.mark.parametrize("world, model", [
    (1, {}), (2, {TP: 2}), (4, {TP: 4, "sequence_parallel": True}), (8, {TP: 8, "num_query_groups": 2}),
    (4, {TP: 4, "num_query_groups": 1}),
    (1, {"sequence_parallel": True}),                                 # SP on one rank is the identity, not an error
    (1, {"sequence_parallel": True, "seq_length": 255}), (1, {VPP: 1}),
    (2, {TP: 2, "vocab_size": 257}),                                  # vocabularies are padded
    *((1, {"num_moe_experts": 4, "moe_router_topk": 1, "moe_router_" + name: value}) for name, value in (
        ("pre_softmax", True), ("norm_topk_prob", True), ("score_function", "sigmoid"))),
    (1, {"num_moe_experts": 1, "moe_router_topk": 1}), (1, {"num_moe_experts": 1024}),
    (1, {"hidden_size": 65, "kv_channels": 8}), (1, {"hidden_size": 40, "position_embedding_type": "learned_absolute"}),
])
def test_legal_layouts_pass(world, model):
    layout = Layout.from_config(config(**model), world)
    assert (layout.world, layout.tp, layout.dp, layout.pp) == (world, model.get(TP, 1), 1, 1)


@pytest.mark.parametrize("model, sizes", [
    ({PP: 4, "num_layers": 8}, [2, 2, 2, 2]), ({PP: 4, "num_layers": 9}, [2, 3, 2, 2]), ({PP: 4, "num_layers": 11}, [3, 3, 3, 2]),
    ({PP: 2, VPP: 2, "num_layers": 5}, [1, 2, 1, 1]), ({PP: 3, "num_layers": 8, FIRST: 1}, [1, 4, 3]), ({"num_layers": 5}, [5]),
    ({PP: 3, "num_layers": 8, FIRST: 2, LAST: 1}, [2, 5, 1]),
])
def test_layers_of_the_stages(model, sizes):
    layers = stage_layers(config(**model).model)
    assert [len(r) for r in layers] == sizes and [i for r in layers for i in r] == list(range(model["num_layers"]))


@pytest.mark.parametrize("schedule, chunks, want", [("1f1b", None, [[0], [1], [2]]), ("interleaved_1f1b", 2, [[0, 3], [1, 4], [2, 5]]),
                                                    ("zbv_zero_bubble", 2, [[0, 5], [1, 4], [2, 3]])])
def test_stages_of_the_ranks(schedule, chunks, want):
    m = config(**{PP: 3, VPP: chunks, "num_layers": 6, "pipeline_parallel_schedule": schedule}).model
    assert [stages_of_rank(m, r) for r in range(3)] == want


def test_the_most_experts_are_the_routers():
    from interlace.kernels import router
    assert sys.modules[router.__module__].MOST_EXPERTS == MOST_EXPERTS


def test_dp_is_what_is_left():
    assert Layout(16, tp=2, pp=2).dp == 4
    assert not Layout(3, tp=2).whole and not Layout(0).whole and Layout(4, tp=2).whole


@st.composite
def configs(draw):
    """Mostly wrong: small numbers that rarely divide each other."""
    some = lambda *v: draw(st.sampled_from(v))  # noqa: E731
    model = {
        "num_layers": some(1, 2, 5, 8), "hidden_size": some(8, 24, 64, 65), "num_attention_heads": some(1, 3, 4, 6, 8),
        "num_query_groups": some(None, 1, 2, 3, 6), "kv_channels": some(None, 1, 4, 5),
        "ffn_hidden_size": some(None, 3, 64, 100),
        "seq_length": some(1, 7, 16), "sequence_parallel": some(True, False),
        TP: some(1, 2, 3, 4, 6), PP: some(1, 1, 2, 3),
        VPP: some(None, None, 1, 2, 3),
        "pipeline_parallel_schedule": some(None, None, "gpipe", "zbv_zero_bubble", "interleaved_1f1b"), FIRST: some(None, None, 1, 2),
        EP: some(1, 1, 2, 3), "num_moe_experts": some(None, None, 1, 4, 6),
        "moe_router_topk": some(1, 2, 5), "micro_batch_size": some(1, 2, 3, 8), "global_batch_size": some(1, 6, 16),
        "position_embedding_type": some("rope", "learned_absolute"), "activation": some("swiglu", "gelu"),
    }
    return ModelConfig(**model), draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12]))


@settings(max_examples=60, deadline=None)
@given(configs())
def test_what_a_message_proposes_works(drawn):
    """Every proposed value mends its rule and breaks no rule that held."""
    model, world = drawn
    before = broken_rules(Config(model=model), world)
    names = {b.rule for b in before}
    for b in before:
        for fix in b.fixes:
            mended = model if fix.field == RANKS else dataclasses.replace(model, **{fix.field: fix.value})
            after = {x.rule for x in broken_rules(Config(model=mended), fix.world)}
            assert b.rule not in after and after <= names, (str(b), fix, after)
            assert f"{fix.field} " in str(b) and str(fix.value).lower() in str(b)


@settings(max_examples=60, deadline=None)
@given(configs())
def test_legal_means_the_shards_are_whole(drawn):
    """What the layers rely on, said again from their side, for any config that no rule refuses."""
    model, world = drawn
    try:
        at = Layout.from_config(Config(model=model), world)
    except UserError:
        return
    H, G = model.num_attention_heads, model.query_groups
    assert at.tp * at.dp * at.pp == world and model.ffn_size % at.tp == 0 and H % at.tp == 0
    assert (H // at.tp) % max(1, G // at.tp) == 0 and (G % at.tp == 0 or at.tp % G == 0)
    assert not at.sp or model.seq_length % at.tp == 0
    sizes = [len(r) for r in stage_layers(model)]
    assert len(sizes) == at.pp * (at.vpp or 1) and min(sizes) >= 1 and sum(sizes) == model.num_layers
    assert model.head_dim * H == model.hidden_size or model.kv_channels


@pytest.mark.parametrize("module", ["interlace.parallel.mesh", "interlace.parallel.layout", "interlace.models.explain"])
def test_no_torch_is_imported(module):
    code = f"import sys, {module}; sys.exit(f'torch came with {module}' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
