"""Our styles, experts and dispatch in the registries of transformers 5: its from_pretrained over 2 ranks against stock on one."""
import pytest
import torch
from ranks import run

import interlace.hf
from interlace.dropin import registry as hf_registry
from interlace.dropin import styles as hf_styles

pytest.importorskip("transformers.distributed.parallel_utils", reason="the registries are those of transformers 5")
from hf import close, make, sample, step

EXPERTS = {"experts_implementation": "interlace"}
CASES = {                                                             # model, config, sequence parallel, kwargs of from_pretrained, our ops
    "llama": ("llama", {}, False, {}, {"copy_gemm", "gemm_ar", "reduce_from"}),
    "llama-kv1": ("llama", {"num_key_value_heads": 1}, False, {}, {"copy_gemm", "gemm_ar"}),
    "llama-sequence": ("llama", {}, True, {}, {"copy_gemm", "gemm_rs", "gather_from", "scatter_to"}),
    "qwen3-kv1-sequence": ("qwen3", {"num_key_value_heads": 1}, True, {}, {"gemm_rs"}),
    "qwen2-tied-sequence": ("qwen2", {}, True, {}, {"gemm_rs", "reduce_from"}),
    "mixtral": ("mixtral", {}, False, EXPERTS, {"expert_mlp"}),
    "mixtral-ep": ("mixtral", {}, False, EXPERTS, {"dispatch", "combine"}),
}


def counting(seen, module, name):
    ours = getattr(module, name)

    def call(*args, **kwargs):
        seen.add(name)
        return ours(*args, **kwargs)
    setattr(module, name, call)
    return module, name, ours


def _loads(rank, case, folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.integrations import accelerate
    accelerate.is_accelerate_available = lambda *_: True              # asked for a device map, which here names one device
    name, more, sequence, kwargs, ops = CASES[case]
    whole, batch, seen = make(name, **more), sample(2, 10), set()
    want = step(whole, batch)
    undo = [counting(seen, m, n) for m, names in ((hf_styles, ("copy_gemm", "gemm_ar", "gemm_rs", "reduce_from", "gather_from",
                                                               "scatter_to")),
                                                  (hf_registry, ("expert_mlp", "dispatch", "combine"))) for n in names]
    interlace.hf.register()
    try:
        plan = interlace.hf.plan(whole.config, 2, sequence_parallel=sequence) if sequence or more else "auto"
        how = {"ep_size": 2, "ep_implementation": "interlace"} if case.endswith("-ep") else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **kwargs,
                                                     distributed_config=DistributedConfig(tp_size=2, tp_plan=plan, **how))
        full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
        got = {n: full(t) for n, t in step(model, batch).items()}
        assert seen >= ops, f"{seen} ran, not {ops - seen}"
        close(got, want, 1e-6)                                        # rope's angles are fp32 there
        odd = sample(2, 9) | {"labels": None}                         # no part of the sequence for each rank
        close({"logits": model(**odd).logits.detach()}, {"logits": whole(**odd).logits.detach()}, 1e-5)
        model.zero_grad()
        model(**batch).loss.backward()
        once = {n: full(p.grad).clone() for n, p in model.named_parameters()}
        model(**batch).loss.backward()                                # gradients accumulate
        close({n: full(p.grad) for n, p in model.named_parameters()}, {n: 2 * g for n, g in once.items()}, 1e-6)
        model.save_pretrained(folder / "again")
    finally:
        interlace.hf.unregister()
        for m, n, ours in undo:
            setattr(m, n, ours)
    again = AutoModelForCausalLM.from_pretrained(folder / "again", dtype=torch.float64)
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in again.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_over_2_ranks(case, tmp_path):
    name, more, *_ = CASES[case]
    make(name, **more).save_pretrained(tmp_path)
    run(2, _loads, case, tmp_path, timeout=280)


def test_registered_and_back():
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES as styles
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as experts
    before, experts_before = dict(styles), dict(experts)
    names = interlace.hf.register()
    assert interlace.hf.register() == names and {"colwise", "interlace_kv", "interlace"} <= set(names)
    assert styles["colwise"] is not before["colwise"] and isinstance(styles["colwise"], type(before["colwise"]))
    assert experts["interlace"] is hf_registry.experts_forward
    interlace.hf.unregister()
    assert dict(styles) == before and dict(experts) == experts_before


def test_experts_function_on_one_device():
    model, batch = make("mixtral"), sample()
    want = step(model, batch)
    interlace.hf.register()
    try:
        model.set_experts_implementation("interlace")
        close(step(model, batch), want)
    finally:
        interlace.hf.unregister()


def test_what_the_registries_cannot_take_is_refused_with_the_reason():
    from transformers import GPT2Config, GptOssConfig, LlamaConfig, MixtralConfig
    with pytest.raises(ValueError, match=r"must have a tensor-parallel plan for GPT2LMHeadModel, got none; .*interlace\.replace_"):
        interlace.hf.plan(GPT2Config(n_embd=32, n_layer=1, n_head=4), 2)
    small = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2,
             "vocab_size": 61, "head_dim": 8, "pad_token_id": None}
    with pytest.raises(ValueError, match=r"6 heads over 2 key / value heads .* got tp=4; use tp in \[1, 2, 6\]"):
        interlace.hf.plan(LlamaConfig(**small), 4)
    assert interlace.hf.plan(LlamaConfig(**small), 6)["model.layers.*.self_attn.k_proj"] == "interlace_kv"
    with pytest.raises(ValueError, match=r"a dense mlp, got .*experts"):
        interlace.hf.plan(MixtralConfig(**small, num_local_experts=4), 2, sequence_parallel=True)
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    experts = GptOssExperts(GptOssConfig(**small, num_local_experts=4))
    with pytest.raises(ValueError, match=r"GptOssExperts with biases, stored transposed, with gate and up interleaved.*use 'grouped_mm'"):
        hf_registry.experts_forward(experts, torch.randn(2, 48), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
