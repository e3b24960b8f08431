"""What users do around a replaced model, on one device and over 2 ranks: Trainer, LoRA, checkpointing, torch.compile, bad input."""
import copy
import time

import pytest
import torch
from ranks import kept, run
from torch import nn

import interlace
from interlace.dropin.fused import Fused
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

pytest.importorskip("transformers")
from hf import STACKED, close, make, sample, step, twin


@kept
def mesh(t):
    return Mesh.build(Layout(world=t, tp=t))


# ---- Trainer -----------------------------------------------------------------------------------------------------


def arguments(folder, **more):
    from transformers import TrainingArguments
    return TrainingArguments(output_dir=str(folder), max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=3,
                             learning_rate=1e-2, max_grad_norm=0.1, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
                             **{"save_strategy": "no"} | more)


def words():
    g = torch.Generator().manual_seed(4)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(61, (24, 9), generator=g)]


def trained(model, cls, folder, **more):
    trainer = cls(model=model, args=arguments(folder, **more), train_dataset=words())
    trainer.train()
    return trainer, [(h["loss"], float(h["grad_norm"])) for h in trainer.state.log_history if "loss" in h]


def same(got, want):
    assert len(got) == 5
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer_on_one_device(name, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    from transformers import Trainer
    model = make(name, torch.float32)
    stock = twin(model)
    _, want = trained(stock, Trainer, tmp_path)
    interlace.replace_(model)
    trainer, got = trained(model, Trainer, tmp_path)
    same(got, want)
    trainer.save_model(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in again.state_dict().items())


def _trainer(rank, folder):
    import os

    from transformers import Trainer
    model = make("qwen2", torch.float32, num_key_value_heads=1)
    stock = twin(model)
    _, want = trained(stock, Trainer, folder / f"stock{rank}")
    interlace.replace_(model, mesh(2))
    with pytest.raises(ValueError, match=r"must be trained by interlace\.hf\.Trainer"):
        Trainer(model=model, args=arguments(folder / "ours"), train_dataset=words())
    with pytest.raises(ValueError, match=r"optim must step .*got .adafactor.; use one of adagrad, adamw_torch"):
        interlace.hf.Trainer(model=model, args=arguments(folder / "ours", optim="adafactor"), train_dataset=words())
    trainer, got = trained(model, interlace.hf.Trainer, folder / "ours", save_strategy="steps", save_steps=5, save_only_model=True)
    same(got, want)
    trainer.save_model(folder / "last")
    for saved in (folder / "last", folder / "ours" / "checkpoint-5"):
        assert os.path.exists(saved)
        again = type(model).from_pretrained(saved)
        for n, v in again.state_dict().items():
            torch.testing.assert_close(v, stock.state_dict()[n], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="must be given the same batch"):
        ids = torch.full((2, 4), rank)
        trainer.training_step(model, {"input_ids": ids, "labels": ids})


def test_trainer_over_2_ranks(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    run(2, _trainer, tmp_path, timeout=280)


def _resumed(rank, folder):
    """Steps 4 and 5 after a stop at 3 are the unbroken run's: bit for bit at the same tp, near from tp=2 to one device and back."""
    import os

    from transformers import Trainer
    ours, more = interlace.hf.Trainer, {"save_strategy": "steps", "save_steps": 3}

    def go_on(cls, split, checkpoint, where):
        model = make("qwen2", torch.float32, num_key_value_heads=1)   # a tied table of 61 rows: padding on the last rank
        if split:
            interlace.replace_(model, mesh(2))
        trainer = cls(model=model, args=arguments(folder / where, **more), train_dataset=words())
        trainer.train(resume_from_checkpoint=checkpoint)
        if split:
            interlace.restore_(model)
        history = [(h["loss"], float(h["grad_norm"])) for h in trainer.state.log_history if "loss" in h]
        return history, {n: v.clone() for n, v in model.state_dict().items()}
    want, weights = go_on(ours, True, None, "unbroken")
    saved = str(folder / "unbroken" / "checkpoint-3")
    state = torch.load(os.path.join(saved, "optimizer.pt"), weights_only=True)["state"]
    whole = make("qwen2", torch.float32, num_key_value_heads=1)
    assert sorted(tuple(s["exp_avg"].shape) for s in state.values()) == sorted(tuple(p.shape) for p in whole.parameters())
    got, again = go_on(ours, True, saved, "resumed")
    assert got == want and all(torch.equal(v, weights[n]) for n, v in again.items())
    stock, theirs = go_on(Trainer, False, saved, f"one{rank}")        # the same files, on one device
    go_on(Trainer, False, None, f"stock{rank}")                       # the first rank writes
    torch.distributed.barrier()
    back, last = go_on(ours, True, str(folder / "stock0" / "checkpoint-3"), "back")   # and stock's files, over two
    for losses, there in ((stock, theirs), (back, last)):
        same(losses, want)
        for n, v in weights.items():
            torch.testing.assert_close(there[n], v, rtol=1e-3, atol=1e-4)


def test_trainer_goes_on_from_a_checkpoint(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    run(2, _resumed, tmp_path, timeout=280)


# ---- LoRA --------------------------------------------------------------------------------------------------------


def lora(model, *targets):
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(7)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.0))
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape) * 0.1)
    return wrapped.to(torch.float64)


@pytest.mark.parametrize("first", ["adapters", "replace_"])
def test_lora_on_one_device(first):
    pytest.importorskip("peft")
    targets = ("q_proj", "v_proj", "up_proj", "down_proj")
    want = step(lora(make("llama"), *targets), sample())
    model = make("llama")
    if first == "replace_":
        interlace.replace_(model)
    wrapped = lora(model, *targets)
    if first == "adapters":
        assert {r.kernel.split()[0] for r in interlace.replace_(wrapped).replaced} >= {"rms_norm", "swiglu"}
    assert any(isinstance(m, Fused) and "MLP" in type(m).__name__ for m in wrapped.modules())
    got = step(wrapped, sample())
    assert any("lora_A" in n for n in got)
    close(got, want)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(merged(**sample()).logits, want["logits"], rtol=1e-5, atol=1e-5)


def _lora(rank, folder):
    want = step(lora(make("llama"), "q_proj", "v_proj"), sample())
    wrapped = lora(make("llama"), "q_proj", "v_proj")
    report = interlace.replace_(wrapped, mesh(2))
    assert "no four nn.Linear" in next(r.why for r in report if r.name.endswith("layers.0.self_attn"))
    assert sum(r.sharding == "column" for r in report.replaced) == 4, "the MLPs are split, attention with adapters is whole"
    close(step(wrapped, sample()), want)
    model = make("llama")
    interlace.replace_(model, mesh(2))
    with pytest.raises(ValueError, match=r"ColumnParallelLinear.* is not supported"):
        lora(model, "q_proj")
    keys = list(model.state_dict())
    assert not any("lora" in k for k in keys)


def test_lora_over_2_ranks(tmp_path):
    pytest.importorskip("peft")
    run(2, _lora, tmp_path, timeout=280)


# ---- checkpointing, compile --------------------------------------------------------------------------------------


def _empty(rank):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    interlace.replace_(model, mesh(2), plan={"0": "column", "1": "row"})
    with pytest.raises(ValueError, match=r"must hold its weights, got 0\.weight on meta; load them first"):
        interlace.restore_(model)


def test_an_empty_split_model_is_not_restored():
    run(2, _empty)


def _checkpointing(rank):
    from interlace.dropin.layers import gather
    for name, more in (("llama", {"num_key_value_heads": 1}), ("mixtral", {})):
        model, batch = make(name, torch.float32, **more).train(), sample()
        want = step(model, batch)
        interlace.replace_(model, mesh(2))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        got = step(model, batch)
        close({"logits": got["logits"], "loss": got["loss"]} | {
            n: gather(p, p.grad, mesh(2).tp) for n, p in model.named_parameters()}, want, 1e-4)


def test_gradient_checkpointing_over_2_ranks():
    run(2, _checkpointing, timeout=280)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_compile_on_one_device(name):
    model, batch = make(name, torch.float32), sample()
    want = step(model, batch)
    interlace.replace_(model)
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    out = compiled(**batch)
    out.loss.backward()
    close({"logits": out.logits.detach(), "loss": out.loss.detach()} | {n: p.grad for n, p in model.named_parameters()}, want, 1e-3)


def _compiled(rank):
    model, batch = make("llama", torch.float32), sample()
    want = step(model, batch)["logits"]
    interlace.replace_(model, mesh(2))
    eager = step(model, batch)
    model.zero_grad()
    out = torch.compile(model, backend="aot_eager")(**batch)
    out.loss.backward()
    torch.testing.assert_close(out.logits.detach(), want, rtol=1e-3, atol=1e-3)
    close({n: p.grad for n, p in model.named_parameters()}, {n: g for n, g in eager.items() if n not in ("logits", "loss")}, 1e-3)


def test_compile_over_2_ranks():
    run(2, _compiled, timeout=280)


# ---- bad input, and how long it takes ----------------------------------------------------------------------------


class Strange(nn.Module):
    """An architecture that nobody has seen, with one norm in it."""

    def __init__(self):
        super().__init__()
        self.mixer, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.mixer(x.transpose(1, 2)).transpose(1, 2))


def test_an_unknown_architecture_keeps_working():
    model, x = Strange(), torch.randn(2, 5, 8)
    want = model(x)
    report = interlace.replace_(model)
    assert [r.name for r in report.replaced] == ["norm"] and type(model.mixer) is nn.Conv1d
    torch.testing.assert_close(model(x), want)


def test_quantised_layers_are_left_and_said():
    model = make("llama", torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    want = quantised(**sample()).logits
    report = interlace.replace_(quantised)
    assert {r.kernel.split()[0] for r in report.replaced} >= {"rms_norm"}
    torch.testing.assert_close(quantised(**sample()).logits, want, rtol=1e-2, atol=1e-2)
    two = Mesh(tp=interlace.Axis("tp", 2))
    report = interlace.replace_(torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8), two,
                                dry_run=True)
    assert any("no four nn.Linear" in r.why for r in report)


def test_hooks_go_on_being_called():
    model, seen = make("llama", torch.float32), []
    model.model.norm.register_forward_pre_hook(lambda m, x: seen.append("before"))
    model.model.layers[0].mlp.register_forward_hook(lambda m, x, y: seen.append("mlp"))
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda m, x, y: y * 2)
    want = model(**sample()).logits
    seen.clear()
    interlace.replace_(model)
    torch.testing.assert_close(model(**sample()).logits, want, rtol=1e-4, atol=1e-4)
    assert seen == ["mlp", "before"]


def test_wrapped_models_are_refused_whole():
    model = make("llama", torch.float32)
    for wrapped, kind in ((torch.compile(model), "OptimizedModule"), (nn.Sequential(torch.compile(model.model.norm)), "OptimizedModule")):
        with pytest.raises(ValueError, match=f"{kind}; call replace_ first"):
            interlace.replace_(wrapped)
    assert not any(isinstance(m, Fused) for m in model.modules())


def test_a_model_on_meta_is_replaced_and_told():
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    assert "load_pretrained_(model, folder) fills them" in str(interlace.replace_(model)) and isinstance(model[0], Fused)
    partly = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, device="meta"))
    with pytest.raises(ValueError, match="all its weights or none"):
        interlace.replace_(partly)


def test_an_error_leaves_nothing_half_done():
    model, two = make("llama", torch.float32), Mesh(tp=interlace.Axis("tp", 2))
    classes, bits = [type(m) for m in model.modules()], {n: v.clone() for n, v in model.state_dict().items()}
    for plan, said in (({"model.layers.*.mlp.gate_projj": "column"}, "nearest name"), ({"model.norm": "row"}, "needs Linear"),
                       ({"lm_head": "columns"}, "did you mean")):
        with pytest.raises(ValueError, match=said):
            interlace.replace_(model, two, plan=plan)
    assert [type(m) for m in model.modules()] == classes and not hasattr(model, "_interlace_tp")
    assert all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())


def test_eight_layers_twice_and_back():
    """Under a second of this process's time; no wall clock, since other jobs run."""
    model = make("llama", torch.float32, num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    interlace.replace_(make("llama", torch.float32))                  # warm
    start = time.process_time()
    report = interlace.replace_(model)
    spent = time.process_time() - start
    assert len(report.replaced) == (34 if STACKED else 26) and not interlace.replace_(model).replaced
    interlace.restore_(model)
    assert [type(m) for m in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    print(f"replace_ took {spent:.2f} s")


def test_restored_beneath_and_after_accelerates_hooks():
    """They keep the forward that they find on the instance, and leave it there when they go."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = make("llama", torch.float32), sample()
    want = model(**batch).logits
    interlace.replace_(model)
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    for m in (attention, norm):
        hooks.add_hook_to_module(m, hooks.ModelHook())
    torch.testing.assert_close(model(**batch).logits, want)
    hooks.remove_hook_from_module(norm)
    interlace.restore_(model)
    assert not any(isinstance(m, Fused) for m in model.modules()) and torch.equal(model(**batch).logits, want)
    hooks.remove_hook_from_module(attention)
    assert torch.equal(model(**batch).logits, want)
