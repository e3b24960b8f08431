"""Any layout of tp x sp trains to the losses and weights of one process: 1e-10 relative in float64, for every option."""
import os
import subprocess
import sys

import pytest
import torch
from ranks import kept, run

import interlace.kernels.comm.heap as heap_module
from interlace.models.config import Config, ModelConfig, OptimConfig, SchedConfig
from interlace.models.verify import TOLERANCE, compare
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

BASE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "seq_length": 8, "micro_batch_size": 2,
        "global_batch_size": 4, "make_vocab_size_divisible_by": 8, "vocab_size": 45}
OPTIONS = {
    "llama": {},
    "gpt2": {"normalization": "layernorm", "activation": "gelu", "position_embedding_type": "learned_absolute", "add_bias_linear": True,
             "share_embeddings_and_output_weights": True},
    "gqa-replicated": {"num_query_groups": 2, "add_bias_linear": True},
    "mqa": {"num_query_groups": 1},
    "kv-channels": {"kv_channels": 6, "num_query_groups": 4},
    "dropout": {"hidden_dropout": 0.2, "attention_dropout": 0.1},
    "dropout-learned-tied": {"hidden_dropout": 0.1, "position_embedding_type": "learned_absolute",
                             "share_embeddings_and_output_weights": True},
    "recompute": {"recompute_granularity": "full", "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "one-micro-batch": {"micro_batch_size": 4},
    "gelu-rmsnorm-bias": {"activation": "gelu", "add_bias_linear": True},
    "padding-only-rank": {"vocab_size": 9},
}


def config(options, tp=1, sp=False, **optim):
    model = ModelConfig(**{**BASE, **options}, tensor_model_parallel_size=tp, sequence_parallel=sp)
    few = {"ddp_bucket_size": 3000}                                   # numbers: several buckets of these small models
    return Config(model=model, optim=OptimConfig(**{"lr": 0.01, "min_lr": 0.001, "clip_grad": 0.1, "sched": SchedConfig(warmup_steps=2),
                                                    **few, **optim}))


_mesh = kept(Mesh.build)


def mesh_of(cfg, world):
    return _mesh(Layout.from_config(cfg, world))


def _equal(rank, world, options, tp, sp, **optim):
    torch.manual_seed(rank)                                           # nothing may depend on torch's own generator
    cfg = config(options, tp, sp, **optim)
    found = compare(cfg, mesh_of(cfg, world), vocab_size=cfg.model.vocab_size, steps=5)
    bad = [f for f in found if not f.error <= TOLERANCE]
    assert not bad, "\n".join(f"{f.what} {f.name}: {f.error:.1e}" for f in bad[:10])
    kinds = {f.what for f in found}
    assert kinds == {"activation", "loss", "gradient", "gradient norm", "weight"}


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_one_process(name, tp, sp):
    run(tp, _equal, tp, OPTIONS[name], tp, sp)


def _without_heap(rank, world, sp):
    cfg = config({"num_query_groups": 2}, world, sp)
    mesh = Mesh.build(Layout.from_config(cfg, world))                 # a group of its own, whose heap is said to be impossible
    heap_module.keep_heap(mesh.tp.group, None)
    found = compare(cfg, mesh, vocab_size=45, steps=2)
    assert all(f.error <= TOLERANCE for f in found)
    assert heap_module.heap_of(mesh.tp.group) is None


# Each of dp 2, 3, 4, tp, sp, ZeRO-1, accumulation, small and one bucket with each of the others: dp, tp, sp, ZeRO-1, micro-batches a rank.
DATA = [
    (2, 1, False, False, 2, "llama", 3000), (2, 1, False, True, 1, "gpt2", 3000), (2, 1, False, True, 2, "dropout", 1 << 20),
    (4, 1, False, False, 1, "dropout-learned-tied", 1000), (4, 1, False, True, 2, "gqa-replicated", 500),
    (3, 1, False, True, 1, "mqa", 700), (3, 1, False, False, 2, "gpt2", 1 << 20),
    (2, 2, False, False, 1, "gqa-replicated", 1000), (2, 2, False, True, 2, "mqa", 300),
    (2, 2, True, True, 1, "gpt2", 1000), (2, 2, True, False, 2, "recompute", 3000), (2, 2, True, True, 2, "mqa", 1 << 20),
    (2, 2, True, True, 1, "padding-only-rank", 1),
]


def _data_parallel(rank, dp, tp, sp, zero1, rounds, name, bucket):
    options = {**OPTIONS[name], "micro_batch_size": 2, "global_batch_size": 2 * rounds * dp}
    _equal(rank, dp * tp, options, tp, sp, use_distributed_optimizer=zero1, ddp_bucket_size=bucket)


@pytest.mark.parametrize("case", DATA, ids=lambda c: f"dp{c[0]}-tp{c[1]}{'-sp' * c[2]}{'-zero1' * c[3]}-{c[4]}x-{c[5]}-{c[6]}")
def test_data_parallel_equals_one_process(case):
    run(case[0] * case[1], _data_parallel, *case)


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_equals_one_process_over_torch_distributed(sp):
    run(2, _without_heap, 2, sp)


@pytest.mark.parametrize("env", [{"INTERLACE_KERNELS": "reference"}, {"TRITON_INTERPRET": "1"}], ids=str)
def test_references_alone_give_the_same(env):
    """What a machine without a compiler runs; under the interpreter float64 takes the references too."""
    args = ["verify", "tp=2", "sp=true", "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=2",
            "model.seq_length=8", "model.micro_batch_size=1", "model.global_batch_size=2", "model.hidden_dropout=0.1", "--steps", "2"]
    done = subprocess.run([sys.executable, "-m", "interlace", *args], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr
