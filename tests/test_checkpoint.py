"""Checkpoints: any layout loads any other's, bit for bit; damage and strangers are refused by name; a save is all or nothing."""
import dataclasses
import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from ranks import run
from safetensors.torch import load_file
from test_equal import config, mesh_of

from interlace.models import checkpoint
from interlace.models.gpt import GPT
from interlace.models.optimizer import Optimizer
from interlace.models.train import forward_backward
from interlace.models.verify import RandomTokens
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.errors import UserError
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import named_pieces

GQA = {"num_query_groups": 2, "add_bias_linear": True, "vocab_size": 41, "normalization": "layernorm"}


def build(cfg, mesh, seed=1, dtype=torch.float64, vocab_size=None):
    model = GPT(cfg.model, mesh, vocab_size=vocab_size or cfg.model.vocab_size, seed=seed, dtype=dtype)
    return model, Optimizer(DistributedDataParallel(model, mesh, bucket_size=cfg.optim.ddp_bucket_size,
                                                    use_distributed_optimizer=cfg.optim.use_distributed_optimizer), cfg.optim)


def steps(cfg, opt, first, last):
    data = RandomTokens(cfg.model.vocab_size, cfg.model.seq_length, 9)
    size = cfg.model.global_batch_size
    return [(forward_backward(opt.ddp, data, s * size, cfg.model).item(), opt.step(0.01))[0] for s in range(first, last)]


def _save(rank, world, out, tp, sp, zero1):
    cfg = config(GQA, tp, sp, use_distributed_optimizer=zero1)
    mesh = mesh_of(cfg, world)
    _, opt = build(cfg, mesh)
    losses = steps(cfg, opt, 0, 3)
    checkpoint.save(out, cfg, opt, step=3, samples=12, vocab_size=41)
    after = steps(cfg, opt, 3, 5)
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses + after))


def _load_and_go_on(rank, world, out, tp, sp, zero1):
    cfg = config(GQA, tp, sp, use_distributed_optimizer=zero1)
    mesh = mesh_of(cfg, world)
    model, opt = build(cfg, mesh, seed=2)                             # other weights, to be overwritten
    state = checkpoint.load(checkpoint.find(out), cfg, model, 41, opt)
    assert (state["step"], state["samples"]) == (3, 12)
    whole = load_file(checkpoint.find(out) / "model.safetensors")
    for name, piece, p in named_pieces(model):
        assert torch.equal(piece.local(p), piece.of(whole.pop(name))), name
    assert not whole, "tensors nobody read"
    want = json.loads((out / "losses.json").read_text())[3:]
    for got, w in zip(steps(cfg, opt, 3, 5), want):
        assert abs(got - w) <= 1e-12 * abs(w), "training goes on differently"


ONE, TP2SP, TP4, TP4SP = (1, 1, False, False), (2, 2, True, False), (4, 4, False, False), (4, 4, True, False)     # ranks, tp, sp, ZeRO-1
DP2, DP2Z, DP2TP2, DP2TP2Z = (2, 1, False, False), (2, 1, False, True), (4, 2, True, False), (4, 2, True, True)


@pytest.mark.parametrize("save, load", [
    (ONE, TP2SP), (TP2SP, TP4), (TP4SP, ONE), (TP4, TP2SP), (ONE, DP2Z), (DP2Z, ONE), (DP2Z, DP2), (DP2, DP2TP2Z), (DP2TP2Z, TP2SP),
    (TP4, DP2TP2Z), (DP2TP2Z, DP2Z), (DP2TP2, DP2Z)], ids=str)
def test_any_layout_loads_any_other(save, load, tmp_path):
    run(save[0], _save, save[0], tmp_path, *save[1:])
    run(load[0], _load_and_go_on, load[0], tmp_path, *load[1:])


@pytest.fixture
def saved(tmp_path):
    cfg = config(GQA)
    model, opt = build(cfg, Mesh())
    steps(cfg, opt, 0, 1)
    for step in (1, 2):
        checkpoint.save(tmp_path, cfg, opt, step=step, samples=4 * step, vocab_size=41)
    return tmp_path, cfg, model, opt


def test_names_are_global_and_files_are_safetensors(saved):
    out, *_ = saved
    folder = checkpoint.find(out)
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}
    tensors = load_file(folder / "model.safetensors")
    assert tensors["layers.1.self_attn.k_proj.weight"].shape == (16, 32) and tensors["embed_tokens.weight"].shape == (41, 32)
    assert tensors["layers.0.mlp.gate_proj.bias"].shape == (64,)
    assert set(load_file(folder / "optimizer.safetensors")) == {f"{k}.{n}" for k in ("exp_avg", "exp_avg_sq") for n in tensors}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "folder"])
def test_damage_is_named(saved, name, harm):
    out, cfg, model, opt = saved
    path = checkpoint.find(out) / name
    data = bytearray(path.read_bytes())
    if harm in ("remove", "folder"):
        path.unlink()
        if harm == "folder":
            path.mkdir()
    else:
        data[-5] ^= 1
        path.write_bytes(data if harm == "flip" else data[:-100])
    with pytest.raises(UserError, match=f"{name} is missing or damaged"):
        checkpoint.load(checkpoint.find(out), cfg, model, 41, opt)


@pytest.mark.parametrize("word, value", [("step", "four"), ("step", True), ("samples", None), ("sha256", ["a"]), ("model", 3)])
def test_a_state_of_other_types_is_damage(saved, word, value):
    out, cfg, model, opt = saved
    path = checkpoint.find(out) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), word: value}))
    with pytest.raises(UserError, match=f"state.json cannot be read: of another type than was written: {word}"):
        checkpoint.load(checkpoint.find(out), cfg, model, 41, opt)
    said = []
    assert checkpoint.resume(out, cfg, model, 41, opt, said.append)["step"] == 1 and len(said) == 1


def test_other_model_is_refused_word_by_word(saved):
    out, _, _, _ = saved
    cfg = config({**GQA, "num_layers": 3, "ffn_hidden_size": 32})
    model, opt = build(cfg, Mesh())
    with pytest.raises(UserError, match=r"ffn_size is 64 there and 32 here; num_layers is 2 there and 3 here"):
        checkpoint.load(checkpoint.find(out), cfg, model, 41, opt)


def test_a_dense_checkpoint_and_a_config_with_experts_differ_in_one_word(saved):
    out, _, _, _ = saved
    cfg = config({**GQA, "num_moe_experts": 4})
    with pytest.raises(UserError, match=r"is of another model: num_moe_experts is None there and 4 here\. Use that"):
        checkpoint.load(checkpoint.find(out), cfg, build(cfg, Mesh())[0], 41)


def test_what_softmax_over_the_chosen_says_of_its_sum_is_no_other_model(tmp_path):
    """Those probs sum to 1 either way: a run of a single choice goes on with the word that says it is meant. Not so of sigmoids."""
    for score, refused in (("softmax", False), ("sigmoid", True)):
        cfgs = [config({**GQA, "num_moe_experts": 4, "moe_router_score_function": score, "moe_router_norm_topk_prob": norm})
                for norm in (None, True)]
        models = [build(cfg, Mesh()) for cfg in cfgs]
        out = tmp_path / score
        checkpoint.save(out, cfgs[0], models[0][1], step=1, samples=4, vocab_size=41)
        with pytest.raises(UserError, match="moe_router_norm_topk_prob is None there and True here") if refused else nullcontext():
            checkpoint.load(checkpoint.find(out), cfgs[1], models[1][0], 41)


def test_other_precision_is_refused(saved):
    out, cfg, model, opt = saved
    other = dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, precision="bf16"))
    with pytest.raises(UserError, match=r"trained in fp32, got trainer\.precision=bf16"):
        checkpoint.load(checkpoint.find(out), other, model, 41, opt)


def test_latest_must_name_a_complete_one(saved):
    out, *_ = saved
    (checkpoint.find(out) / "state.json").unlink()
    with pytest.raises(UserError, match="not complete"):
        checkpoint.find(out)
    for text in ("../../etc", ""):                                    # an empty one too is named as it stands
        (out / "checkpoints" / "latest").write_text(text)
        with pytest.raises(UserError, match=f"latest names '{text}', which is not complete"):
            checkpoint.find(out)
    shutil.rmtree(out / "checkpoints")
    assert checkpoint.find(out) is None


def test_a_failed_save_leaves_the_last_one(saved, monkeypatch):
    out, cfg, model, opt = saved
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(out, cfg, opt, step=3, samples=12, vocab_size=41)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000001", "step-00000002", "latest"}
    assert checkpoint.load(checkpoint.find(out), cfg, model, 41, opt)["step"] == 2


def test_old_ones_go(saved):
    out, cfg, _, opt = saved
    for step in (3, 4, 5):
        checkpoint.save(out, cfg, opt, step=step, samples=0, vocab_size=41)
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == [f"step-{s:08d}" for s in (3, 4, 5)]


def test_a_run_that_was_set_back_keeps_what_it_writes(saved):
    """The newest by name was kept, and what had just been written went; so did what a user put beside them."""
    out, cfg, model, opt = saved
    keep = lambda n: dataclasses.replace(cfg, trainer=dataclasses.replace(cfg.trainer, keep_checkpoints=n))  # noqa: E731
    names = lambda: sorted(p.name for p in (out / "checkpoints").glob("step-*"))  # noqa: E731
    for step in (4, 5):
        checkpoint.save(out, keep(3), opt, step=step, samples=0, vocab_size=41)
    for copy in ("step-best", "step-00000001-mine"):
        shutil.copytree(out / "checkpoints" / "step-00000005", out / "checkpoints" / copy)
    checkpoint.save(out, keep(1), opt, step=3, samples=0, vocab_size=41)
    assert names() == ["step-00000001-mine", "step-00000003", "step-00000004", "step-00000005", "step-best"]
    assert checkpoint.find(out).name == "step-00000003"
    (out / "checkpoints" / "latest").write_text("step-00000004x")     # names nothing: what is newer may be another branch's
    assert checkpoint.resume(out, cfg, model, 41, opt)["step"] == 4
