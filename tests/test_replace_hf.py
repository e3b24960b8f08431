"""Drop-in on Hugging Face models: logits, loss and every gradient against stock in float64 and bf16, generate, checkpointing."""
import pytest
import torch

import interlace
from interlace.dropin import product

transformers = pytest.importorskip("transformers")
from hf import MODELS, OTHERS, STACKED, KeepFloat64, close, make, sample, step, there, twin  # noqa: E402

EXPECTED = {                                                          # kernels that must run, and how many modules each
    "llama": {"rms_norm": 5, "rope": 2, "swiglu": 2, "cross_entropy": 1},
    "mistral": {"rms_norm": 5, "rope": 2, "swiglu": 2, "cross_entropy": 1},
    "qwen2": {"rms_norm": 5, "rope": 2, "swiglu": 2, "cross_entropy": 1},
    "qwen3": {"rms_norm": 9, "rope": 2, "swiglu": 2, "cross_entropy": 1},
    "gemma2": {"rms_norm": 9, "rope": 2, "gated": 2, "gelu": 2, "cross_entropy": 1},   # gelu: its MLP's act_fn, which gated passes over
    "phi3": {"rms_norm": 5, "rope": 2, "swiglu": 2, "cross_entropy": 1},
    "gpt2": {"layer_norm": 5, "gelu": 2, "cross_entropy": 1},
    "mixtral": {"rms_norm": 5, "rope": 2, "expert_mlp": 2, "cross_entropy": 1},
    "qwen3_moe": {"rms_norm": 9, "rope": 2, "expert_mlp": 2, "cross_entropy": 1},
    "olmoe": {"rms_norm": 9, "rope": 2, "expert_mlp": 2, "cross_entropy": 1},
    "gpt_oss": {"rms_norm": 5, "clamped_swiglu": 2, "cross_entropy": 1},
    "deepseek_v3": {"rms_norm": 9, "rope": 2, "swiglu": 2, "expert_mlp": 1, "cross_entropy": 1},
}
if not STACKED:                                                       # before 5 experts are modules, one by one
    for kernels in EXPECTED.values():                                 # and most attention's forward is decorated: not looked through
        kernels.pop("rope", None)
    EXPECTED["gpt_oss"].pop("clamped_swiglu")                         # called with the weights of all experts
    EXPECTED["mixtral"].pop("expert_mlp")                             # of three layers with other names
    EXPECTED["qwen3_moe"] = EXPECTED["olmoe"] = {"rms_norm": 9, "swiglu": 8, "cross_entropy": 1}
    EXPECTED["deepseek_v3"] = {"rms_norm": 9, "swiglu": 10, "cross_entropy": 1}


@pytest.mark.parametrize("name", MODELS)
def test_equals_stock_in_float64(name):
    model, batch = make(name), sample()
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    want = step(model, batch)
    report = interlace.replace_(model)
    ran = [r.kernel.split()[0] for r in report.replaced]
    assert {k: ran.count(k) for k in ran} == EXPECTED[name], report
    close(step(model, batch), want)
    assert not interlace.replace_(model).replaced and list(model.state_dict()) == list(bits)
    interlace.restore_(model)
    assert [type(m) for m in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    close(step(model, batch), want, 0)


@pytest.mark.skipif(not STACKED, reason="experts are modules each")
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_experts_under_autocast(name):
    """Their products stay in the weights' fp32, gradients and all: nearer to fp32 than stock's in bf16."""
    model, batch = make(name, torch.float32), sample()
    stock = twin(model)
    assert interlace.replace_(model, kernels=["clamped_swiglu", "expert_mlp"]).replaced
    truth = step(stock, batch)
    got = []
    for m in (model, stock):
        with torch.autocast("cpu", torch.bfloat16):
            got.append(step(m, batch))
    error = lambda one: sum(float((one[n].float() - t.float()).norm() / t.norm().clamp(min=1e-3)) for n, t in truth.items())  # noqa: E731
    assert got[0].keys() == truth.keys() and error(got[0]) <= 1.2 * error(got[1])


@pytest.mark.skipif(not STACKED, reason="experts are modules each")
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_an_expert_chosen_twice_counts_twice(name):
    experts = make(name).model.layers[0].mlp.experts
    stock, x, ids = twin(experts), torch.randn(3, 32).double(), torch.tensor([[2, 2], [0, 2], [3, 3]])
    assert interlace.replace_(experts).replaced
    weights = torch.tensor([[0.5, 0.25]]).double().expand(3, 2)
    torch.testing.assert_close(experts(x, ids, weights), stock(x, ids, weights))


QUICK = ("cohere", "ernie4_5_moe", "exaone4", "glm4_moe", "granitemoe", "olmo3", "phimoe", "qwen2_moe", "starcoder2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in OTHERS if there(n)])
def test_others_equal_stock(name, tmp_path):
    """Of no name in the package: float64, verify, generate with a cache, files, and the way back."""
    model, batch, ids = make(name), sample(), sample(2, 5)["input_ids"]

    def words(m):
        with KeepFloat64():
            return m.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    want, said = step(model, batch), words(model)
    kernels = {r.kernel.split()[0] for r in interlace.replace_(model, skip=["*.gelu_impl"] if name == "bloom" else []).replaced}
    assert len(kernels) >= (2 if STACKED else 1) and ("expert_mlp" in kernels) == (STACKED and "expert" in "".join(OTHERS[name][1]))
    close(step(model, batch), want)
    assert torch.equal(words(model), said)
    with KeepFloat64():
        assert interlace.verify(model, batch).ok
    model.save_pretrained(tmp_path)
    interlace.restore_(model)
    assert [type(m) for m in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(v, bits[n]) for n, v in type(model).from_pretrained(tmp_path, dtype=torch.float64).state_dict().items())


@pytest.fixture
def forced(monkeypatch):
    """The tiny models' linear layers go through the product that large ones take."""
    monkeypatch.setattr(product, "torch_keeps", lambda w: "")
    monkeypatch.setattr(product, "pays", lambda x, w: x.dtype == w.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_equal_stock_in_float64(name, forced):
    model, batch = make(name), sample()
    want = step(model, batch)
    linear = sum(type(m) is torch.nn.Linear or type(m).__name__ == "Conv1D" for m in model.modules())
    report = interlace.replace_(model)
    assert sum(r.kernel.startswith("gemm") for r in report.replaced) == linear > 8
    close(step(model, batch), want)
    interlace.restore_(model)
    close(step(model, batch), want, 0)


@pytest.mark.parametrize("first", ["adapters", "replace_"])
def test_lora_over_our_product(first, forced):
    """Adapters call their base layer, which is ours; only they learn; merged and unloaded, the layers stay ours."""
    peft = pytest.importorskip("peft")
    both = []
    for ours in (False, True):
        model, batch = make("llama"), sample()
        if ours and first == "replace_":
            interlace.replace_(model)
        torch.manual_seed(7)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "gate_proj"], lora_dropout=0.0))
        for n, p in model.named_parameters():
            if "lora_B" in n:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(8))
        if ours and first == "adapters":
            rows = interlace.replace_(model).replaced
            assert any(r.name.endswith("q_proj.base_layer") and r.kernel.startswith("gemm") for r in rows)
        both.append(step(model.double(), batch))
        assert all("lora" in n for n in both[-1] if n not in ("loss", "logits"))
        merged = model.merge_and_unload()
        assert ours == (type(merged.model.layers[0].self_attn.q_proj).__name__ == "FusedLinear")
        with KeepFloat64(), torch.no_grad():
            both[-1]["merged"] = merged(**batch).logits
    close(*both)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_bf16_is_no_further_from_float64_than_stock(name):
    model, batch = make(name, torch.bfloat16), sample(4, 16)
    truth = step(twin(model).double(), batch)
    error = lambda got: sum(float((got[n].double() - t).norm() / t.norm()) for n, t in truth.items()) / len(truth)  # noqa: E731
    stock = error(step(model, batch))
    interlace.replace_(model)
    ours = error(step(model, batch))
    assert ours <= 1.1 * stock, f"{ours:.3g} against {stock:.3g} of stock"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_generate_with_cache(name, forced):
    model = make(name, torch.float32)
    ids = sample(2, 5)["input_ids"]
    words = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=True,  # noqa: E731
                                   pad_token_id=0)
    want = words()
    interlace.replace_(model)
    assert torch.equal(words(), want)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradient_checkpointing(name, forced):
    model, batch = make(name, torch.float32).train(), sample()
    want = step(model, batch)
    interlace.replace_(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    close(step(model, batch), want, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_torch_func_runs_the_original(name, forced):
    """torch.func knows no gradient of the kernels: the modules' own forwards give it."""
    model, batch = make(name), sample()
    interlace.replace_(model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    with KeepFloat64():
        got = torch.func.grad(lambda p: torch.func.functional_call(model, p, kwargs=batch).loss)(params)
    want = step(model, batch)
    close(got, {n: w for n, w in want.items() if n in got})


def test_saved_files_load_into_stock(tmp_path):
    model = make("llama", torch.float32)
    interlace.replace_(model)
    model.save_pretrained(tmp_path)
    again = type(make("llama")).from_pretrained(tmp_path)
    assert type(again.model.norm).__name__ == "LlamaRMSNorm"
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())


def test_loss_over_items_in_batch():
    """Gradient accumulation in Trainer divides by the items of all micro-batches."""
    model, batch = make("llama"), sample() | {"num_items_in_batch": 7}
    want = step(model, batch)
    interlace.replace_(model)
    close(step(model, batch), want)
