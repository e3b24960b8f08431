"""The whole run: loss falls on real text, the same for every layout, resume exact to the bit, sampling, errors in words."""
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import run
from safetensors import SafetensorError

from interlace.kernels.comm import gemm_ar, paths_taken
from interlace.models.config import load_config
from interlace.models.generate import generate, sample
from interlace.models.train import Run, train
from interlace.parallel.errors import RunError, UserError

TINY = ["model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=32", "model.micro_batch_size=2",
        "model.global_batch_size=4", "optim.sched.warmup_steps=2", "optim.lr=0.01", "trainer.save_every_n_steps=3"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(400)))
    return [f"data.paths=[{path}]"]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _train(rank, overrides, out):
    assert train(load_config(None, overrides), out) == 0


def test_learns_and_writes_what_it_says(tmp_path, text):
    out = tmp_path / "run"
    _train(0, [*TINY, *text, "trainer.max_steps=30"], out)
    log = rows(out)
    assert [r["step"] for r in log] == list(range(1, 31))
    assert log[0]["loss"] == pytest.approx(math.log(257), rel=0.02)   # nothing known: uniform over the vocabulary
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert {"step", "loss", "grad_norm", "lr", "tokens_per_second", "samples", "tokens", "seconds"} <= set(log[0])
    assert log[-1]["samples"] == 120 and log[-1]["tokens"] == 120 * 32
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert load_config(str(out / "config.yaml")).trainer.max_steps == 30
    assert (out / "checkpoints" / "latest").read_text() == "step-00000030"


def test_layouts_give_one_curve(tmp_path, text):
    common = [*TINY, *text, "trainer.max_steps=4", "trainer.precision=float64", "model.hidden_dropout=0.1"]
    losses = {}
    for name, world, layout in (("one", 1, []), ("tp2", 2, ["tp=2"]), ("tp2sp", 2, ["tp=2", "sp=true"]), ("dp2", 2, ["zero1=true"])):
        run(world, _train, [*common, *layout], tmp_path / name)
        losses[name] = [(r["loss"], r["grad_norm"]) for r in rows(tmp_path / name)]
    for name in ("tp2", "tp2sp", "dp2"):
        torch.testing.assert_close(torch.tensor(losses[name], dtype=torch.float64), torch.tensor(losses["one"], dtype=torch.float64),
                                   rtol=1e-10, atol=0)


@pytest.mark.parametrize("world, layout, precision", [
    (1, [], "fp32"), (2, ["tp=2", "sp=true"], "fp32"), (2, ["tp=2", "sp=true"], "bf16"), (2, [], "bf16"), (2, ["zero1=true"], "bf16"),
    (2, ["zero1=true"], "fp32")], ids=str)
def test_resume_is_exact(tmp_path, text, world, layout, precision):
    common = [*TINY, *text, *layout, f"trainer.precision={precision}", "optim.sched.decay_steps=8", "model.hidden_dropout=0.1"]
    run(world, _train, [*common, "trainer.max_steps=8"], tmp_path / "whole")
    run(world, _train, [*common, "trainer.max_steps=5"], tmp_path / "two")
    with (tmp_path / "two" / "metrics.jsonl").open("a") as f:         # a step that was logged and never saved
        f.write(json.dumps({"step": 6, "loss": 99.0}) + "\n")
    run(world, _train, [*common, "trainer.max_steps=8"], tmp_path / "two")
    pick = lambda out: [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows(out)]  # noqa: E731
    assert pick(tmp_path / "two") == pick(tmp_path / "whole")
    one, two = ((tmp_path / n / "checkpoints" / "step-00000008" / "model.safetensors").read_bytes() for n in ("whole", "two"))
    assert one == two


def test_accumulation_does_not_change_the_result(tmp_path, text):
    for micro in (1, 4):
        _train(0, [*TINY, *text, f"model.micro_batch_size={micro}", "trainer.max_steps=3", "trainer.precision=float64",
                   "model.hidden_dropout=0.2"], tmp_path / str(micro))
    one, four = ([r["loss"] for r in rows(tmp_path / n)] for n in ("1", "4"))
    assert one == pytest.approx(four, rel=1e-12)


def test_tied_bf16_gpt2_runs(tmp_path, text):
    _train(0, [*TINY, *text, "model.normalization=layernorm", "model.activation=gelu", "model.position_embedding_type=learned_absolute",
               "model.share_embeddings_and_output_weights=true", "model.add_bias_linear=true", "model.recompute_granularity=full",
               "model.hidden_dropout=0.1", "model.attention_dropout=0.1", "trainer.precision=bf16", "trainer.max_steps=12"], tmp_path / "o")
    log = rows(tmp_path / "o")
    assert log[-1]["loss"] < log[0]["loss"] - 0.5


@pytest.mark.parametrize("where", ["checkpoint.save_file", "MetricsLog.write", "plot_loss"])
def test_a_full_disk_stops_with_words_and_keeps_the_checkpoint(tmp_path, text, monkeypatch, where):
    out = tmp_path / "run"
    train(load_config(None, [*TINY, *text, "trainer.max_steps=3"]), out)
    config = (out / "config.yaml").read_text()

    def full(*args, **kwargs):                                        # safetensors tells it in its own words
        raise (SafetensorError("I/O error: No space left on device") if "save" in where else OSError(28, "No space left on device"))
    monkeypatch.setattr(f"interlace.models.train.{where}", full)
    with pytest.raises(RunError, match=r"step 6: .*No space left on device.* untouched\. Free space" if where != "MetricsLog.write"
                       else r"step 4: --out must be writable"):
        train(load_config(None, [*TINY, *text, "trainer.max_steps=6"]), out)
    monkeypatch.undo()
    assert (out / "checkpoints" / "latest").read_text() == ("step-00000006" if where == "plot_loss" else "step-00000003")
    assert (out / "config.yaml").read_text() == config.replace("max_steps: 3", "max_steps: 6")
    _train(0, [*TINY, *text, "trainer.max_steps=6"], out)
    assert [r["step"] for r in rows(out)] == list(range(1, 7))


def test_nan_stops_with_words_and_keeps_the_checkpoint(tmp_path, text):
    out, cfg = tmp_path / "run", load_config(None, [*TINY, *text, "trainer.max_steps=3"])
    train(cfg, out)
    before = (out / "checkpoints" / "step-00000003" / "model.safetensors").read_bytes()
    go_on = Run(load_config(None, [*TINY, *text, "trainer.max_steps=6"]), out)
    go_on.model.layers["0"].mlp.down_proj.weight.data.fill_(math.nan)
    with pytest.raises(RunError, match=r"step 4: loss and gradient norm must be finite.*lower optim.lr"):
        go_on.train()
    assert (out / "checkpoints" / "step-00000003" / "model.safetensors").read_bytes() == before
    assert (out / "checkpoints" / "latest").read_text() == "step-00000003"


def test_nan_before_the_first_checkpoint_speaks_of_none(tmp_path, text):
    for precision, wider in (("fp32", False), ("bf16", True)):
        run = Run(load_config(None, [*TINY, *text, f"trainer.precision={precision}"]), tmp_path / precision)
        run.model.layers["0"].mlp.down_proj.weight.data.fill_(math.nan)
        with pytest.raises(RunError, match=r"step 1: .*were not updated; there is no checkpoint yet.*to begin anew$") as e:
            run.train()
        assert ("fp32" in str(e.value).split("Way out")[1]) == wider


def test_two_runs_do_not_share_a_folder(tmp_path, text):
    """The second would remove the first one's checkpoint under way; a run that died holds nothing."""
    hold = ("import sys; from pathlib import Path; from interlace.models.train import alone\n"
            f"with alone(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"--out must be of one run at a time, got .*, into which process {other.pid} of .* trains"):
            _train(0, [*TINY, *text, "trainer.max_steps=1"], tmp_path)
    finally:
        other.kill()
        other.communicate()
    _train(0, [*TINY, *text, "trainer.max_steps=1"], tmp_path)


def _train_after_another(rank, overrides, out):
    """The paths told are of this run, not of what the process did before."""
    gemm_ar(torch.ones(4, 8, dtype=torch.float64), torch.ones(3, 8, dtype=torch.float64), dist.group.WORLD)
    assert any("K 8, float64, 2 ranks]" in line for line in paths_taken()), paths_taken()
    _train(rank, overrides, out)


def test_generate(tmp_path, text, monkeypatch):
    out = tmp_path / "run"
    run(2, _train_after_another, [*TINY, *text, "trainer.max_steps=40", "tp=2", "sp=true"], out)
    paths = (out / "paths.txt").read_text()                           # which path each op took, and why
    assert "float64" not in paths and "ag_gemm [" in paths and "gemm_rs [" in paths
    assert all("] heap, " in line for line in paths.splitlines())
    assert re.search(r"^layers\.\*\.self_attn\.qkv_proj.*: ag_gemm \[", paths, re.M), paths
    greedy = generate(out, "line 1: the", tokens=12, temperature=0)
    assert greedy.startswith("line 1: the") and len(greedy) > len("line 1: the")
    assert greedy == generate(out, "line 1: the", tokens=12, temperature=0)
    assert generate(out, "x" * 100, tokens=3)                         # longer than the window
    assert generate(out, "", tokens=3) is not None
    assert generate(out / "checkpoints" / (out / "checkpoints" / "latest").read_text(), "x", tokens=3) == generate(out, "x", tokens=3)
    monkeypatch.chdir(out / "checkpoints" / (out / "checkpoints" / "latest").read_text())
    assert generate(".", "x", tokens=3) == generate(out, "x", tokens=3)
    monkeypatch.undo()
    with pytest.raises(UserError, match="train first"):
        generate(tmp_path / "nowhere", "a")
    (out / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"must hold the config\.yaml that the run wrote"):
        generate(out, "a")


def test_generate_keeps_the_space_before_a_word(tmp_path, monkeypatch):
    """SentencePiece's tokenizers decode a first word without it: what followed the prompt was decoded alone. From another folder, too."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    made.train_from_iterator(["the fox " * 50], tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=["<unk>"]))
    made.save(str(tmp_path / "tok.json"))
    (tmp_path / "text.txt").write_text("the fox " * 4000)
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "data.paths=[text.txt]", "data.tokenizer=tok.json", "trainer.max_steps=30"]
    assert train(load_config(None, words), "run") == 0
    monkeypatch.chdir("run")
    said = generate("..//run", "the fox the", tokens=8, temperature=0)
    assert {*said.split()} == {"the", "fox"} and len(said.split()) > 4, said


def test_sample():
    logits, g = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    assert sample(logits, temperature=0, top_k=0, generator=g) == 1
    assert {sample(logits, temperature=5.0, top_k=2, generator=g) for _ in range(100)} == {1, 3}
    counts = torch.bincount(torch.tensor([sample(logits, temperature=1.0, top_k=0, generator=g) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, logits.softmax(-1), atol=0.03, rtol=0)


def test_user_mistakes(tmp_path, text):
    file = tmp_path / "a-file"
    file.write_text("")
    for overrides, out, words in (
            ([*TINY, *text], file / "run", "--out must be a folder that can be written"),
            ([*TINY, *text, "model.vocab_size=100"], tmp_path / "v", "model.vocab_size must be >"),
            ([*TINY, f"data.paths=[{file}]"], tmp_path / "e", "data.paths"),
            ([*TINY, *text, "model.seq_length=100000"], tmp_path / "s", "model.seq_length"),
            ([*TINY, *text, "tp=3", "trainer.max_steps=1"], tmp_path / "t", "number of ranks must be a multiple")):
        with pytest.raises(UserError, match=words):
            train(load_config(None, overrides), out)
    train(load_config(None, [*TINY, *text, "trainer.max_steps=2"]), tmp_path / "two")
    with pytest.raises(UserError, match="at least the 2 steps"):
        train(load_config(None, [*TINY, *text, "trainer.max_steps=1"]), tmp_path / "two")


def test_what_changes_the_samples_is_said_and_tokens_count_them(tmp_path, text, capsys):
    out = tmp_path / "run"
    train(load_config(None, [*TINY, *text, "trainer.max_steps=2"]), out)
    assert "the samples are others" not in capsys.readouterr().err
    train(load_config(None, [*TINY, *text, "trainer.max_steps=4", "trainer.seed=7", "model.global_batch_size=8"]), out)
    assert "(trainer.seed, model.seq_length) was (1234, 32) and is (7, 32): the samples are others" in capsys.readouterr().err
    assert [(r["samples"], r["tokens"]) for r in rows(out)] == [(n, 32 * n) for n in (4, 8, 16, 24)]
