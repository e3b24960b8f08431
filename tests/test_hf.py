"""Hugging Face folders: the same bits both ways, the same logits in transformers, strangers refused with every reason at once."""
import json
import pathlib
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import build, steps
from test_equal import config

from interlace import cli
from interlace.models import checkpoint, hf
from interlace.models.config import load_config
from interlace.models.generate import generate
from interlace.models.gpt import GPT
from interlace.models.train import Run
from interlace.parallel.errors import UserError
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import named_pieces

GPT2 = {"normalization": "layernorm", "activation": "gelu", "position_embedding_type": "learned_absolute", "add_bias_linear": True}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
MODELS = {                                                            # options, class, precision, largest difference of a logit
    "llama": ({"num_query_groups": 2, "rotary_base": 5000.0}, hf.LLAMA, "fp32", 1e-5),
    "llama-tied-bias-mqa": ({"num_query_groups": 1, "add_bias_linear": True, "share_embeddings_and_output_weights": True,
                             "kv_channels": 12},
                            hf.LLAMA, "fp32", 1e-5),
    "llama-float64": ({}, hf.LLAMA, "float64", 1e-5),                 # its norms and angles are fp32 there
    "llama-bf16": ({}, hf.LLAMA, "bf16", 0.1),
    "mixtral": ({**EXPERTS, "num_query_groups": 2}, hf.MIXTRAL, "fp32", 1e-5),
    "mixtral-top1-tied": ({**EXPERTS, "moe_router_topk": 1, "share_embeddings_and_output_weights": True}, hf.MIXTRAL, "fp32", 1e-5),
    "gpt2": ({**GPT2, "share_embeddings_and_output_weights": True}, hf.GPT2, "float64", 1e-10),
    "gpt2-gelu_new": ({**GPT2, "activation": "gelu_tanh", "share_embeddings_and_output_weights": True}, hf.GPT2, "float64", 1e-10),
    "gpt2-untied": (GPT2, hf.GPT2, "float64", 1e-10),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


@pytest.fixture(autouse=True)
def _the_root_is_not_on_the_path(monkeypatch):
    """`python -m pytest` puts it there, and transformers would take our kernels/ for Hugging Face's package of that name."""
    root = pathlib.Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [p for p in sys.path if pathlib.Path(p).resolve() != root])


def saved(out, options, precision="fp32"):
    """A run's folder with one checkpoint, of weights that are not round."""
    cfg = config({**options, "vocab_size": 41})
    cfg = load_config(None, [f"trainer.precision={precision}", *(f"model.{k}={str(v).lower()}" for k, v in {
        **{f: getattr(cfg.model, f) for f in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length",
                                              "micro_batch_size", "global_batch_size", "make_vocab_size_divisible_by", "vocab_size")},
        **options}.items())])
    model, opt = build(cfg, Mesh(), dtype=DTYPES[precision])
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):                    # norms and biases too
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype), alpha=0.05)
    steps(cfg, opt, 0, 1)
    checkpoint.save(out, cfg, opt, step=1, samples=4, vocab_size=41, extra={"tokenizer": "bytes", "data": None})
    return cfg, model


def logits(model, ids):
    with torch.no_grad():
        return model.lm_head(model.hidden(ids))[..., :model.vocab_size].transpose(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path, capsys):
    import transformers
    options, architecture, precision, tolerance = MODELS[name]
    _, model = saved(tmp_path / "run", options, precision)
    assert cli.main(["convert", "--out", str(tmp_path / "run"), "--to-hf", str(tmp_path / "hf")]) == 0
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path / "hf", dtype=DTYPES[precision], output_loading_info=True)
    theirs, info = theirs
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(0, 41, (2, 8), generator=torch.Generator().manual_seed(0))
    model.eval(), theirs.eval()
    with torch.no_grad():
        want = theirs(ids).logits
    got = logits(model, ids)
    assert want.std() > 0.05 and (got - want).abs().max() <= tolerance, f"{(got - want).abs().max():.1e}"

    assert cli.main(["convert", "--from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    one, two = (load_file(checkpoint.find(tmp_path / n) / "model.safetensors") for n in ("run", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)
    theirs.save_pretrained(tmp_path / "resaved")                      # as transformers itself writes it
    assert cli.main(["convert", "--from-hf", str(tmp_path / "resaved"), "--out", str(tmp_path / "again")]) == 0
    three = load_file(checkpoint.find(tmp_path / "again") / "model.safetensors")
    assert one.keys() == three.keys() and all(torch.equal(one[n], three[n]) for n in one)
    capsys.readouterr()
    Layout.from_config(load_config(str(tmp_path / "back" / "config.yaml")), 1)   # what training refuses, such as an unsaid top 1, raises


def test_gpt2_as_it_was_released(tmp_path):
    """Names of the model under the head, causal masks among the tensors, activation_function and n_inner left to their defaults."""
    import transformers
    options = MODELS["gpt2-gelu_new"][0]
    saved(tmp_path / "run", {**options, "ffn_hidden_size": 128}, "float64")
    hf.to_hf(tmp_path / "run", tmp_path / "hf")
    path, tensors = tmp_path / "hf" / "config.json", load_file(tmp_path / "hf" / "model.safetensors")
    c = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("activation_function", "n_inner", "torch_dtype")}
    path.write_text(json.dumps(c))
    old = {n.removeprefix("transformer."): t for n, t in tensors.items()} | {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril().double()}
    save_file(old, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert hf.from_hf(tmp_path / "hf", tmp_path / "back") == hf.GPT2
    one, two = (load_file(checkpoint.find(tmp_path / n) / "model.safetensors") for n in ("run", "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert load_config(str(tmp_path / "back" / "config.yaml"), []).model.activation == "gelu_tanh"
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    assert theirs.config.activation_function == "gelu_new"
    path.write_text(json.dumps(c | {"activation_function": "relu"}))
    with pytest.raises(UserError, match="activation_function must be one of gelu, gelu_new, gelu_pytorch_tanh, got relu"):
        hf.from_hf(tmp_path / "hf", tmp_path / "x")


@pytest.mark.parametrize("name", ["llama-tied-bias-mqa", "mixtral", "gpt2-untied"])
def test_every_tensor_is_described(name):
    cfg = config({**MODELS[name][0], "vocab_size": 41})
    words = checkpoint.model_words(cfg, 41)
    model = GPT(cfg.model, Mesh(), vocab_size=41)
    assert dict(hf.parameters(words)) == {name: tuple(piece.shape) for name, piece, _ in named_pieces(model)}
    ours = [n for row in hf.rows(MODELS[name][1], words) for n in row.ours]
    assert sorted(ours) == sorted(dict(hf.parameters(words)))


def test_a_converted_model_trains_and_speaks(tmp_path, monkeypatch):
    """The weights of the run it starts from are the folder's, the optimizer's masters too; then it trains."""
    cfg = load_config(None, ["model.num_layers=1", "model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=16",
                             "model.micro_batch_size=1", "model.global_batch_size=1", "trainer.precision=bf16"])
    model, opt = build(cfg, Mesh(), dtype=torch.bfloat16, vocab_size=257)
    checkpoint.save(tmp_path / "run", cfg, opt, step=7, samples=4, vocab_size=257, extra={"tokenizer": "bytes", "data": None})
    hf.to_hf(checkpoint.find(tmp_path / "run"), tmp_path / "hf")      # a checkpoint's own folder
    hf.from_hf(tmp_path / "hf", tmp_path / "new")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 50)
    run = Run(load_config(str(tmp_path / "new" / "config.yaml"), [
        f"data.paths=[{text}]", "trainer.max_steps=2", "model.micro_batch_size=1", "model.global_batch_size=1"]), tmp_path / "new")
    assert (run.step, run.samples) == (0, 0)
    for (name, _, p), (_, _, q) in zip(named_pieces(run.model), named_pieces(model)):
        assert torch.equal(p, q), name
    for runs in run.optimizer.runs:
        assert runs.copies and all(torch.equal(weights.float(), master) for weights, master in zip(runs.copies, runs.weights))
    run.train()
    assert (tmp_path / "new" / "checkpoints" / "latest").read_text() == "step-00000002"
    assert generate(tmp_path / "new", "to", tokens=3)


def test_many_files(tmp_path, monkeypatch):
    """Past SHARD bytes a folder has several files and an index; both ways the tensors are the same."""
    import transformers
    saved(tmp_path / "run", {})
    monkeypatch.setattr(hf, "SHARD", 20_000)
    hf.to_hf(tmp_path / "run", tmp_path / "hf")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and index["metadata"]["total_size"] == sum(
        t.numel() * 4 for t in load_file(checkpoint.find(tmp_path / "run") / "model.safetensors").values())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.architectures == [hf.LLAMA]
    hf.from_hf(tmp_path / "hf", tmp_path / "back")
    folder = checkpoint.find(tmp_path / "back")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    two = {k: t for f in folder.glob("model-*.safetensors") for k, t in load_file(f).items()}
    one = load_file(checkpoint.find(tmp_path / "run") / "model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    cfg = config({"vocab_size": 41})
    model, opt = build(cfg, Mesh(), dtype=torch.float32)
    assert checkpoint.resume(tmp_path / "back", cfg, model, 41, opt)["step"] == 0
    assert all(torch.equal(piece.local(p), piece.of(one[n])) for n, piece, p in named_pieces(model))


@pytest.mark.parametrize("options, words", [
    ({"activation": "gelu"}, ["LlamaForCausalLM has activation=swiglu, got gelu"]),
    ({"normalization": "layernorm", "activation": "gelu", "add_bias_linear": True}, [
        "2 problems", "normalization=rmsnorm", "activation=swiglu"]),
    ({"position_embedding_type": "learned_absolute", "num_query_groups": 2},
     ["4 problems", "normalization=layernorm", "activation=gelu", "add_bias_linear=True", "query_groups=4, got 2"]),
    ({**EXPERTS, "moe_layer_freq": 2, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
      "moe_shared_expert_intermediate_size": 8},
     ["4 problems", "experts in every layer, got moe_layer_freq=2", "score_function=softmax", "enable_expert_bias=False",
      "intermediate_size=None"]),
    ({**EXPERTS, "moe_router_topk": 1, "moe_router_pre_softmax": True}, ["moe_router_norm_topk_prob=True, got None"])])
def test_what_fits_none_is_refused(options, words):
    with pytest.raises(UserError) as e:
        hf.architecture_of(checkpoint.model_words(config(options), 41))
    assert all(word in str(e.value) for word in words), e.value


@pytest.mark.parametrize("change, words", [
    ({"architectures": ["BertModel"]}, ["architectures must be one of", "got BertModel"]),
    ({"hidden_act": "gelu", "sliding_window": 128, "rope_parameters": {"rope_type": "yarn"}, "vocab_size": None},
     ["4 problems", "hidden_act must be silu, got gelu", "sliding_window must be None, got 128", "got yarn", "vocab_size must be there"]),
    ({"attention_bias": True}, ["mlp_bias must be True, got False"]),
    ({"num_hidden_layers": 3}, ["model.layers.2.mlp.down_proj.weight must be there, got none"]),
    ({"num_hidden_layers": 1}, ["model.layers.1.mlp.down_proj.weight is not a weight of this model"]),
    ({"intermediate_size": 32}, ["model.layers.0.mlp.up_proj.weight must be [32, 32], got [64, 32]"])])
def test_strange_folders_are_refused(tmp_path, change, words):
    saved(tmp_path / "run", {})
    hf.to_hf(tmp_path / "run", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError) as e:
        hf.from_hf(tmp_path / "hf", tmp_path / "back")
    assert all(word in str(e.value) for word in words), e.value
    assert not (tmp_path / "back").exists()


def test_bad_files_and_places(tmp_path):
    saved(tmp_path / "run", {})
    hf.to_hf(tmp_path / "run", tmp_path / "hf")
    for call, words in (
            (lambda: hf.to_hf(tmp_path / "run", tmp_path / "hf"), "--to-hf must be a new or empty folder"),
            (lambda: hf.from_hf(tmp_path / "hf", tmp_path / "run"), "--out must be a new folder"),
            (lambda: hf.from_hf(tmp_path / "hf", tmp_path / "hf" / "config.json"), "which is a file; choose another"),
            (lambda: hf.to_hf(tmp_path / "nowhere", tmp_path / "x"), "train first"),
            (lambda: hf.from_hf(tmp_path / "nowhere", tmp_path / "x"), "must be a folder with config.json")):
        with pytest.raises(UserError, match=words):
            call()
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../run/model.safetensors"}}))
    with pytest.raises(UserError, match=r"names '\.\./run/model.safetensors', which is not beside it"):
        hf.from_hf(tmp_path / "hf", tmp_path / "x")
    index.unlink()
    mixed = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({n: t.half() if "norm" in n else t for n, t in mixed.items()}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match="all tensors must be of one type"):
        hf.from_hf(tmp_path / "hf", tmp_path / "x")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"older formats .* are pickles"):
        hf.from_hf(tmp_path / "hf", tmp_path / "x")
    (checkpoint.find(tmp_path / "run") / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="missing or damaged"):
        hf.to_hf(tmp_path / "run", tmp_path / "y")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "hf"}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "run", {})
    hf.to_hf(tmp_path / "run", tmp_path / "hf")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hf, "save_file", full)
    monkeypatch.setattr(checkpoint, "save_file", full)
    assert cli.main(["convert", "--out", str(tmp_path / "run"), "--to-hf", str(tmp_path / "x")]) == 1
    assert cli.main(["convert", "--from-hf", str(tmp_path / "hf"), "--out", str(tmp_path / "y")]) == 1
    assert capsys.readouterr().err.count("No space left on device; nothing was left behind") == 2
    assert {p.name for p in tmp_path.iterdir() if any(p.rglob("*"))} == {"run", "hf"}


def test_into_an_empty_folder_that_is_there(tmp_path, monkeypatch):
    """It may be a mount or the current folder, which no rename replaces: its files come, or none. A tokenizer that is gone is said."""
    saved(tmp_path / "run", MODELS["llama"][0], "fp32")
    here = tmp_path / "here"
    here.mkdir()
    before = here.stat().st_ino
    monkeypatch.chdir(here)
    hf.to_hf(tmp_path / "run", pathlib.Path("."))
    assert {p.name for p in here.iterdir()} == {"config.json", "model.safetensors"} and here.stat().st_ino == before
    state = checkpoint.find(tmp_path / "run") / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"tokenizer": "/nope/tok.json"}))
    with pytest.raises(UserError, match=r"tokenizer must be there, got /nope/tok\.json, which is gone; put it beside config\.yaml"):
        hf.to_hf(tmp_path / "run", tmp_path / "x")
    assert not (tmp_path / "x").exists()
