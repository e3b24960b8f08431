import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.models import config as module
from interlace.models.config import Config, ModelConfig, OptimConfig, TrainerConfig, load_config, to_dict, to_yaml
from interlace.models.idle import without_effect
from interlace.parallel.errors import UserError


def test_defaults_need_no_file():
    assert load_config() == Config()
    assert Config().model.ffn_size == 704 and ModelConfig(activation="gelu").ffn_size == 1024
    assert Config().model.query_groups == 8 and Config().model.head_dim == 32 and Config().decay_steps == 200
    hash(Config())


def test_yaml_then_overrides(tmp_path):
    path = tmp_path / "gpt.yaml"
    path.write_text("model:\n  num_layers: 6\n  tp: 4\noptim:\n  lr: 3e-4\n  sched:\n    decay: linear\ntrainer:\n")
    config = load_config(str(path), ["model.tensor_model_parallel_size=2", "optim.sched.warmup_steps=5"])
    assert (config.model.num_layers, config.model.tensor_model_parallel_size) == (6, 2)
    assert (config.optim.lr, config.optim.sched.decay, config.optim.sched.warmup_steps) == (3e-4, "linear", 5)


@pytest.mark.parametrize("text, key, value", [
    ("tp=2", "tensor_model_parallel_size", 2), ("model.tp=2", "tensor_model_parallel_size", 2),
    ("pp=2", "pipeline_model_parallel_size", 2), ("vpp=2", "virtual_pipeline_model_parallel_size", 2),
    ("model.sp=true", "sequence_parallel", True), ("ep=3", "expert_model_parallel_size", 3),
    ("model.num_query_groups=None", "num_query_groups", None),
    ("model.num_query_groups=null", "num_query_groups", None),
    ("model.seq_length=1e3", "seq_length", 1000)])
def test_spellings_of_keys(text, key, value):
    assert getattr(load_config(None, [text]).model, key) == value


@pytest.mark.parametrize("spelling, word", [
    ("32", "fp32"), ("bf16-mixed", "bf16"), ("64", "float64"), ("fp64", "float64")])
def test_spellings_of_precision(spelling, word):
    assert load_config(None, [f"trainer.precision={spelling}"]).trainer.precision == word
    assert TrainerConfig(precision=spelling).precision == word
    assert TrainerConfig(precision=32).precision == "fp32"


def test_lists():
    config = load_config(None, ["data.paths=[a, b c]", "optim.betas=[0.8, 0.9]", "data.extensions=.py"])
    assert config.data.paths == ("a", "b c") and config.optim.betas == (0.8, 0.9) and config.data.extensions == (".py",)


def test_losses_that_balance_experts():
    """Megatron's words: one, or a list with a weight for each or for all."""
    of = lambda *words: load_config(None, [f"model.{w}" for w in words]).model.balancing  # noqa: E731
    kind, weight = "moe_router_load_balancing_type", "moe_aux_loss_coeff"
    assert of() == {"aux_loss": 0.01} and of(f"{kind}=none") == {} and of(f"{weight}=0") == {}
    assert of(f"{kind}=global_aux_loss", f"{weight}=0.5") == {"global_aux_loss": 0.5}
    assert of(f"{kind}=[aux_loss, global_aux_loss]", f"{weight}=[0.1, 0.2]") == {"aux_loss": 0.1, "global_aux_loss": 0.2}
    assert of(f"{kind}=[aux_loss, seq_aux_loss]", f"{weight}=0.1") == {"aux_loss": 0.1, "seq_aux_loss": 0.1}
    assert of(f"{kind}=[aux_loss, seq_aux_loss]", f"{weight}=[0.1, 0]") == {"aux_loss": 0.1}


@pytest.mark.parametrize("override, wanted", [
    ("model.num_layer=3", "did you mean model.num_layers"),
    ("model.lr=3", "did you mean optim.lr"),                          # the right word in the wrong section
    ("max_steps=3", "did you mean trainer.max_steps"),
    ("optm=3", "did you mean optim?"),                                # a section, not a key of it
    ("model.sequence_parallelism=true", "did you mean model.sequence_parallel"),
    ("optim.sched.warmup=3", "did you mean optim.sched.warmup_steps"),
    ("model.zzz=3", "section model has: num_layers"),
    ("zzz=3", "sections are model, optim"),
    ("model.num_layers=2.5", "must be a whole number, got 2.5"),
    ("model.num_layers=two", "must be a whole number, got 'two'"),
    ("model.num_layers=true", "must be a whole number, got True"),
    ("model.num_layers=0", "must be >= 1, got 0"),
    ("model.hidden_dropout=1", "must be >= 0 and < 1, got 1.0"),
    ("model.sequence_parallel=yep", "must be true or false, got 'yep'"),
    ("model.activation=gelo", "one of swiglu, gelu, gelu_tanh, got 'gelo'; did you mean gelu"),
    ("model=3", "model is a section"),
    ("optim.betas=[0.9]", "must be a list of 2 numbers"),
    ("optim.lr=nan", "must be a finite number"),
    ("optim.lr=1e-5", "set optim.min_lr=1e-06"),
    ("model.moe_router_load_balancing_type=sinkhorn", "must be one of aux_loss, seq_aux_loss, global_aux_loss, none, got 'sinkhorn'"),
    ("model.moe_router_load_balancing_type=[aux_loss, aux]", "load_balancing_type[1] must be one of aux_loss"),
    ("model.moe_router_load_balancing_type=[aux_loss, none]", "model.moe_router_load_balancing_type must name different losses"),
    ("model.moe_aux_loss_coeff=[0.1, 0.2]", "model.moe_aux_loss_coeff must have a number for each"),
    ("model.moe_aux_loss_coeff=-1", "must be >= 0, got -1.0"),
    ("model.moe_input_jitter_eps=1", "must be > 0 and < 1, got 1.0"),
    ("model.moe_input_jitter_eps=0", "must be > 0 and < 1, got 0.0"),
    ("model.moe_pad_expert_input_to_capacity=true", "needs model.moe_expert_capacity_factor, got none; set it to 1.25"),
    ("model.moe_expert_capacity_factor=0", "must be > 0, got 0.0"),
    ("model.moe_token_drop_policy=first", "one of probs, position, got 'first'"),
    ("model.moe_enable_routing_replay=1", "must be true or false, got 1"),
    ("num_layers", "must be key=value"),
    ("model.num_layers=[1", "must be YAML")])
def test_mistakes_name_the_way_out(override, wanted):
    with pytest.raises(UserError) as e:
        load_config(None, [override])
    assert wanted in str(e.value), str(e.value)


def test_experts_have_no_gelu_tanh():
    assert ModelConfig(activation="gelu_tanh").ffn_size == 1024
    with pytest.raises(UserError, match=r"must be swiglu or gelu with experts, got gelu_tanh; set model\.activation=gelu"):
        load_config(None, ["model.activation=gelu_tanh", "model.num_moe_experts=4"])


MOE = "model.num_moe_experts=4"
CONTRADICTIONS = [
    (["model.moe_shared_expert_gate=true"], "needs model.moe_shared_expert_intermediate_size (the shared expert that it weighs), got none"),
    (["model.moe_router_norm_topk_prob=false"], "needs model.moe_router_pre_softmax=true (softmax over the chosen experts sums to 1)"),
    ([MOE, "model.moe_layer_freq=[0, 0, 0, 0]"], "must have a 1 where model.num_moe_experts=4, got [0, 0, 0, 0]; set model.num_moe"),
    (["optim.sched.decay_steps=20"], "optim.sched.decay_steps must be > optim.sched.warmup_steps (the rate falls between them), got 20 and "
                                     "20; set optim.sched.warmup_steps=2"),
    (["optim.sched.warmup_steps=0", "optim.sched.decay_steps=0"], "optim.sched.decay_steps must be >= 1"),
    (["optim.sched.decay=linear", "optim.sched.decay_steps=1", "optim.sched.warmup_steps=5"], "set optim.sched.warmup_steps=0"),
]


@pytest.mark.parametrize("overrides, wanted", CONTRADICTIONS, ids=str)
def test_what_contradicts_itself_is_refused(overrides, wanted):
    with pytest.raises(UserError) as e:
        load_config(None, overrides)
    assert wanted in str(e.value) and "problems" not in str(e.value), str(e.value)


@pytest.mark.parametrize("overrides", [
    ["trainer.max_steps=10"], ["trainer.max_steps=20"],               # ends in its warm-up: a smoke test
    ["optim.sched.decay=constant", "optim.sched.decay_steps=5"], ["optim.sched.decay_steps=21"],
    ["model.moe_router_norm_topk_prob=false", "model.moe_router_pre_softmax=true"],
    ["model.moe_router_norm_topk_prob=false", "model.moe_router_score_function=sigmoid"],
    ["model.moe_layer_freq=[0, 0]"], [MOE, "model.moe_layer_freq=[0, 1]"]], ids=str)
def test_what_makes_sense_is_not(overrides):
    load_config(None, overrides)


def test_contradictions_of_all_sections_at_once():
    with pytest.raises(UserError) as e:
        load_config(None, ["model.moe_shared_expert_gate=true", "model.moe_router_norm_topk_prob=false", "optim.lr=1e-5",
                           "optim.sched.decay_steps=3"])
    assert str(e.value).startswith("config: 4 problems\n  - ") and str(e.value).count("\n  - ") == 4, str(e.value)


@pytest.mark.parametrize("overrides, wanted", [
    ([], ""), (["model.moe_router_topk=2", "optim.sched.decay=constant"], ""),
    (["model.moe_router_topk=1", "model.moe_layer_freq=[0]", "model.moe_router_num_groups=2"],
     "model.moe_router_topk, model.moe_layer_freq, model.moe_router_num_groups (as model.num_moe_experts=none)"),
    (["model.moe_router_pre_softmax=true", "model.moe_router_score_function=sigmoid", MOE],
     "model.moe_router_pre_softmax (as model.moe_router_score_function=sigmoid)"),
    (["model.moe_router_pre_softmax=true", MOE], ""),
    (["model.moe_aux_loss_coeff=0.1", "model.moe_router_load_balancing_type=none", MOE],
     "model.moe_aux_loss_coeff (as model.moe_router_load_balancing_type=none)"),
    (["model.moe_aux_loss_coeff=[0.1]", "model.moe_router_load_balancing_type=[none]", MOE],
     "model.moe_aux_loss_coeff (as model.moe_router_load_balancing_type=none)"),
    (["model.moe_aux_loss_coeff=0", "model.moe_router_load_balancing_type=none", MOE], ""),
    (["model.moe_aux_loss_coeff=0.1", MOE], ""),
    (["model.moe_router_bias_update_rate=0.1", MOE], "model.moe_router_bias_update_rate (as model.moe_router_enable_expert_bias=false)"),
    (["model.moe_router_bias_update_rate=0.1", "model.moe_router_enable_expert_bias=true", MOE], ""),
    (["model.moe_token_drop_policy=position", MOE], "model.moe_token_drop_policy (as model.moe_expert_capacity_factor=none)"),
    (["model.moe_token_drop_policy=position", "model.moe_expert_capacity_factor=2", MOE], ""),
    (["model.rotary_base=5", "model.position_embedding_type=learned_absolute", "optim.min_lr=0", "optim.sched.decay=constant"],
     "model.rotary_base (as model.position_embedding_type=learned_absolute); optim.min_lr (as optim.sched.decay=constant)"),
    (["optim.sched.decay_steps=50", "optim.sched.decay=constant"], "optim.sched.decay_steps (as optim.sched.decay=constant)"),
    (["data.extensions=.py"], "data.extensions (as data.paths=[])"), (["data.extensions=.py", "data.paths=x"], "")], ids=str)
def test_what_has_no_effect_is_named(overrides, wanted):
    assert without_effect(load_config(None, overrides), reads_text=True) == wanted


def test_all_mistakes_at_once():
    with pytest.raises(UserError) as e:
        load_config(None, ["model.num_layer=3", "model.tp=0", "trainer.precision=fp8", "optim.lr=x"])
    assert "4 problems" in str(e.value) and str(e.value).count("\n  - ") == 4


def test_python_made_configs_are_checked_too():
    with pytest.raises(UserError, match=r"2 problems(.|\n)*model.num_layers must be >= 1(.|\n)*swiglu, gelu, gelu_tanh"):
        ModelConfig(num_layers=0, activation="relu")
    with pytest.raises(UserError, match="model must be ModelConfig"):
        Config(model={"num_layers": 2})
    with pytest.raises(UserError, match=r"min_lr must be <= optim\.lr"):
        dataclasses.replace(OptimConfig(), lr=1e-6)


@pytest.mark.parametrize("content, wanted", [
    (b"model: [", "valid YAML"), (b"- 1\n- 2\n", "holds a list"), (b"\xff\xfe", "valid YAML"),
    (b"model:\n  tp: 2\n  tensor_model_parallel_size: 4\n", "given twice"),
    (b"model:\n  tp: 2\n  tp: 4\n", "valid YAML"), (b"model:\n  3: 4\n", "unknown key model.3"),
    (b"data:\n  paths: ${nope}\n", "valid YAML"), (None, "can be read"), (b"", None)])
def test_broken_files(tmp_path, content, wanted):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    if wanted is None:
        assert load_config(str(path)) == Config()
        return
    with pytest.raises(UserError, match=wanted):
        load_config(str(path))


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$", exclude_categories=["C"]), min_size=1)
VALUES = {"model.num_layers": st.integers(1, 1 << 40), "model.activation": st.sampled_from(["swiglu", "gelu", "gelu_tanh"]),
           "model.kv_channels": st.none() | st.integers(1, 99), "model.add_bias_linear": st.booleans(),
           "optim.lr": st.floats(1e-3, 1e9), "optim.sched.decay": st.sampled_from(["cosine", "linear", "constant"]),
           "data.paths": st.lists(TEXT), "trainer.seed": st.integers(0, 2**32 - 1),
           "model.moe_router_load_balancing_type": st.sampled_from(["none", "global_aux_loss", ["aux_loss", "seq_aux_loss"]]),
           "optim.betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2)}


@settings(deadline=None)                                              # on a busy machine one of 100 takes seconds
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_written_reads_back(tmp_path_factory, values):
    nested: dict = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        at = nested
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    from omegaconf import OmegaConf
    path = tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(nested)), encoding="utf-8")
    config = load_config(str(path))
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_every_key_is_in_the_yaml():
    tree, seen = to_dict(Config()), set()
    def walk(node, prefix):
        for k, v in node.items():
            walk(v, f"{prefix}{k}.") if isinstance(v, dict) else seen.add(prefix + k)
    walk(tree, "")
    assert seen == set(module._KEYS)


def test_config_needs_neither_torch_nor_omegaconf():
    code = "import interlace.models.config, sys; print({'torch', 'omegaconf', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
