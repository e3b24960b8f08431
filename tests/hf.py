"""Tiny Hugging Face models with random weights, made from configs: nothing is downloaded."""
import copy
import importlib.util

import torch
import transformers
from torch.overrides import TorchFunctionMode

STACKED = hasattr(transformers.PreTrainedModel, "set_experts_implementation")   # since transformers 5: before, experts are modules each

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": None}
MOE = SMALL | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
MODELS = {                                                            # name -> (folder, class prefix, config)
    "llama": ("llama", "Llama", SMALL),
    "mistral": ("mistral", "Mistral", SMALL | {"sliding_window": 4}),
    "qwen2": ("qwen2", "Qwen2", SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", SMALL | {"head_dim": 16}),
    "gemma2": ("gemma2", "Gemma2", SMALL | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", "Phi3", SMALL),
    "gpt2": ("gpt2", "GPT2", {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64, "bos_token_id": 1, "eos_token_id": None}),
    "mixtral": ("mixtral", "Mixtral", SMALL | {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", "Qwen3Moe", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "olmoe": ("olmoe", "Olmoe", MOE),
    "gpt_oss": ("gpt_oss", "GptOss", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 4,
                                              "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
                                                  "rope_type": "default", "rope_theta": 10000.0}}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3", SMALL | {
        "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
        "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}),
}

# Nobody named these anywhere: found by structure alone.
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GROUPED = MOE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
FALCON = SMALL | {"ffn_hidden_size": 48, "eos_token_id": 2}
OTHERS = {                                                            # folder, maybe -what -> (class prefix, config)
    "arcee": ("Arcee", SMALL), "cohere2": ("Cohere2", SMALL | {"sliding_window": 4}), "gemma": ("Gemma", SMALL | {"head_dim": 16}),
    "deepseek_v2": ("DeepseekV2", MODELS["deepseek_v3"][2] | {"topk_method": "greedy"}), "glm4": ("Glm4", SMALL | {"head_dim": 8}),
    "granite": ("Granite", SMALL), "granitemoe": ("GraniteMoe", SMALL | {"num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2", MOE | {"head_dim": 8, "num_local_experts": 4}), "nemotron": ("Nemotron", SMALL),
    "olmo": ("Olmo", SMALL), "olmo2": ("Olmo2", SMALL), "phi": ("Phi", SMALL),
    "qwen2_moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 24}), "seed_oss": ("SeedOss", SMALL | {"head_dim": 8}),
    "smollm3": ("SmolLM3", SMALL), "stablelm": ("StableLm", SMALL), "starcoder2": ("Starcoder2", SMALL),
    # q, k and v in one layer, side by side head by head, or in groups, or [q | k | v]; alibi; attention and MLP side by side
    "gpt_neox": ("GPTNeoX", SMALL), "gptj": ("GPTJ", OLD | {"n_inner": 48, "rotary_dim": 4}),
    "falcon": ("Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-7b": ("Falcon", FALCON | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon-rw": ("Falcon", FALCON | {"multi_query": False, "new_decoder_architecture": False, "alibi": True, "parallel_attn": False}),
    "bloom": ("Bloom", OLD | {"hidden_size": 32, "n_layer": 2}), "gpt_bigcode": ("GPTBigCode", OLD | {"n_inner": 48}),
    "gpt_bigcode-mha": ("GPTBigCode", OLD | {"n_inner": 48, "multi_query": False}),
    "cohere": ("Cohere", SMALL), "cwm": ("Cwm", SMALL | SLIDING | {"head_dim": 8}), "ernie4_5": ("Ernie4_5", SMALL),
    "ernie4_5_moe": ("Ernie4_5_Moe", SMALL | {"moe_intermediate_size": 24, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "exaone4": ("Exaone4", SMALL | SLIDING | {"head_dim": 8}),
    "flex_olmo": ("FlexOlmo", SMALL | {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4Moe", GROUPED | {"head_dim": 8}), "dots1": ("Dots1", GROUPED), "helium": ("Helium", SMALL | {"head_dim": 8}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", SMALL | {"head_dim": 8}), "olmo3": ("Olmo3", SMALL | SLIDING), "persimmon": ("Persimmon", SMALL),
    "hunyuan_v1_moe": ("HunYuanMoEV1", SMALL | {"head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    "phimoe": ("Phimoe", SMALL | {"num_local_experts": 4}),
}


def there(name):
    """Whether this transformers has it."""
    return importlib.util.find_spec(f"transformers.models.{name.split('-')[0]}") is not None


def make(name, dtype=torch.float64, **more):
    """The same weights in every process; norms and biases are random too, so that a wrong formula shows."""
    folder, prefix, small = MODELS.get(name) or (name.split("-")[0], *OTHERS[name])
    config = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    torch.manual_seed(0)
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{prefix}ForCausalLM"
    model = getattr(modeling, head)(getattr(config, f"{prefix}Config")(**small | more)).eval()
    if "expert" in "".join(small) and STACKED:
        model.set_experts_implementation("eager")                     # stock's default knows no float64
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.to(dtype)


def sample(batch=2, length=9, vocab=61):
    ids = torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.roll(1, 1), "use_cache": False}


class KeepFloat64(TorchFunctionMode):
    """Stock layers cast to fp32 inside: here a float64 tensor stays one, which makes the stock model a float64 reference."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and torch.is_tensor(args[0]) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float or (func in (torch.Tensor.to, torch.Tensor.type) and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        if func is torch.Tensor.matmul and args[0].is_floating_point() and args[0].dtype != args[1].dtype:
            args = [a.double() for a in args]                         # rope's frequencies, before transformers 5
        return func(*args, **kwargs)


def step(model, batch):
    """{"logits", "loss", parameter: gradient} of one forward and backward."""
    model.zero_grad()
    with KeepFloat64():
        out = model(**batch)
        out.loss.backward()
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(got, want, tolerance=1e-10):
    assert got.keys() == want.keys()
    for name, w in want.items():
        scale = max(float(w.abs().max()), 1e-2)
        worst = float((got[name] - w).abs().max())
        assert worst <= tolerance * scale, f"{name}: {worst:.2e} of {scale:.2e}"


def twin(model):
    return copy.deepcopy(model)
