"""What explain predicts of the paths is what a run takes, line by line."""
import pytest
from ranks import run

from interlace.cli import main
from interlace.models.config import load_config
from interlace.models.paths import predicted
from interlace.models.train import train
from interlace.parallel.layout import Layout

SMALL = ["num_layers=2", "hidden_size=48", "num_attention_heads=4", "ffn_hidden_size=80", "tensor_model_parallel_size=2"]
SMALL = [*(f"model.{s}" for s in SMALL), "trainer.max_steps=1"]


def _train(rank, overrides, out):
    assert train(load_config(None, overrides), out) == 0


@pytest.mark.parametrize(("more", "walks"), [
    (["model.seq_length=32", "model.micro_batch_size=1", "trainer.precision=bf16"], False),
    (["model.seq_length=32", "model.micro_batch_size=1", "model.activation=gelu", "sp=true"], False),
    (["model.seq_length=512", "model.micro_batch_size=28", "model.global_batch_size=28", "model.hidden_dropout=0.1", "sp=true"], True),
], ids=["tp", "sp", "long"])
def test_what_is_predicted_is_what_runs(more, walks, tmp_path):
    config = load_config(None, [*SMALL, *more])
    run(2, _train, [*SMALL, *more], tmp_path / "run")
    ran = (tmp_path / "run" / "paths.txt").read_text().splitlines()
    assert sorted(ran) == sorted(predicted(config, Layout.from_config(config, 2)))
    assert walks == any("] heap, walked" in line for line in ran)


def test_explain_tells_them(capsys):
    assert main(["explain", *SMALL]) == 0
    assert "    layers.*.mlp.down_proj: gemm_ar [" in capsys.readouterr().out
    assert main(["explain", *SMALL, "tp=1"]) == 0
    assert "gemm_ar [" not in capsys.readouterr().out
