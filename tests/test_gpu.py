"""One GPU: the model on CUDA against the CPU in the same weights, and a run that learns. Kernels: the `device` fixture's tests."""
import json

import pytest
import torch
from test_equal import OPTIONS, config

from interlace.models.config import Config, DataConfig, ModelConfig, OptimConfig, SchedConfig, TrainerConfig, to_dict
from interlace.models.gpt import GPT
from interlace.models.train import train
from interlace.parallel.sharding import named_pieces

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("name", OPTIONS)
def test_model_matches_cpu(name):
    cfg = config(OPTIONS[name])
    vocab = cfg.model.vocab_size
    true, there = GPT(cfg.model, vocab_size=vocab, seed=5, dtype=torch.float64), GPT(cfg.model, vocab_size=vocab, seed=5).cuda()
    ids, labels = torch.randint(vocab, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    want, got = true(ids, labels), there(ids.cuda(), labels.cuda())
    want.backward()
    got.backward()
    assert abs(got.item() - want.item()) <= 1e-5 * want.item()
    grads = {n: piece.local(p.grad) for n, piece, p in named_pieces(true)}
    floor = 1e-3 * max(g.abs().max().item() for g in grads.values())
    for n, piece, p in named_pieces(there):
        error = (piece.local(p.grad).cpu().double() - grads[n]).abs().max().item()
        assert error <= 1e-4 * max(floor, grads[n].abs().max().item()), f"{n}: {error}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_run_learns_and_resumes(tmp_path, precision, monkeypatch):
    """Configs made here and not read, written as JSON: the GPU report installs nothing, and omegaconf may not be there."""
    monkeypatch.setattr("interlace.models.train.to_yaml", lambda c: json.dumps(to_dict(c)))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(400)))
    for out, last in (("whole", 20), ("two", 10), ("two", 20)):
        train(Config(model=ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, seq_length=64),
                     optim=OptimConfig(lr=0.01, sched=SchedConfig(warmup_steps=2, decay_steps=20)), data=DataConfig(paths=[str(text)]),
                     trainer=TrainerConfig(precision=precision, accelerator="cuda", save_every_n_steps=10, max_steps=last)), tmp_path / out)
    whole, two = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "two"))
    assert whole[-1]["loss"] < 0.7 * whole[0]["loss"]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in whole], rel=1e-3)
