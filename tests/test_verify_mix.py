"""Faults planted in pipelines and experts, each found by what `interlace verify` compares."""
import dataclasses

import pytest
from ranks import kept, run
from test_equal import BASE

import interlace.models.train as train
from interlace.models.config import Config, ModelConfig, OptimConfig, SchedConfig
from interlace.models.verify import TOLERANCE, compare
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

TIED = {"pipeline_model_parallel_size": 2, "share_embeddings_and_output_weights": True}
EXPERTS = {"num_moe_experts": 4, "moe_aux_loss_coeff": 0.5, "tensor_model_parallel_size": 2, "sequence_parallel": True,
           "expert_model_parallel_size": 2}
CHUNKS = {"num_layers": 4, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
mesh_of = kept(Mesh.build)


def tied_counted_twice(model):
    model.embed_tokens.weight.stages = 1                              # neither summed over the stages nor counted once


def router_not_summed(model):
    for moe in model.moe_layers().values():
        moe.gate.weight.pieces = tuple(dataclasses.replace(p, partial=False) for p in moe.gate.weight.pieces)


def losses_at_another_scale(model):
    scale = model.scale_losses
    model.scale_losses = lambda s: scale(2 * s)                       # as where tp ranks each add the whole loss


def experts_of_another_rank(model):
    for moe in model.moe_layers().values():
        for p in (moe.experts.up.weight, moe.experts.down.weight):
            p.data = p.data.flip(0)


def expert_over_dp(model):
    for moe in model.moe_layers().values():
        moe.experts.up.weight.expert = False


def chunks_exchanged(model):
    """Each of a rank's two stages receives the activations that are the other's."""
    first, second = sorted(model.plan)
    if first:                                                         # the rank without the embedding
        model.plan[first], model.plan[second] = model.plan[second], model.plan[first]


def nothing(model):
    pass


def _plant(rank, model, plant, skip_tied, wrong):
    m = ModelConfig(**{**BASE, "micro_batch_size": 1, **model})
    world = m.tensor_model_parallel_size * m.pipeline_model_parallel_size if plant is not expert_over_dp else 2
    cfg = Config(model=m, optim=OptimConfig(lr=0.01, min_lr=0.001, clip_grad=0.1, sched=SchedConfig(warmup_steps=2)))
    layout = Layout.from_config(cfg, world)
    mesh = mesh_of(layout)
    plain = train.reduce_tied_grads
    if skip_tied:
        train.reduce_tied_grads = lambda *_: None
    try:
        found = compare(cfg, mesh, vocab_size=m.vocab_size, steps=2, plant=plant)
    finally:
        train.reduce_tied_grads = plain
    off = {f"{f.what} {f.name}" for f in found if not f.error <= TOLERANCE}
    assert bool(off) == bool(wrong) and all(any(w in o for o in off) for w in wrong), sorted(off)
    if plant is chunks_exchanged:
        causes = {f.name: f.cause for f in found if f.what == "activation" and f.error > TOLERANCE}
        assert causes["layers.3 input"].startswith("received the input of layers.1 at sample "), causes
        assert "layers.0 input" not in causes


@pytest.mark.parametrize("model, plant, skip_tied, wrong", [
    (TIED, nothing, False, []), (EXPERTS, nothing, False, []), (CHUNKS, nothing, False, []),
    (CHUNKS, chunks_exchanged, False, ["activation layers.3 input", "loss step 1", "gradient layers.1"]),
    (TIED, nothing, True, ["gradient embed_tokens.weight", "gradient norm"]), (TIED, tied_counted_twice, False, ["gradient norm"]),
    (EXPERTS, router_not_summed, False, ["mlp.gate.weight"]),
    (EXPERTS, losses_at_another_scale, False, ["mlp.gate.weight", "balancing losses"]),
    (EXPERTS, experts_of_another_rank, False, ["loss step 1", "experts.0.up_proj.weight"]),
    ({"num_moe_experts": 4, "expert_model_parallel_size": 2}, expert_over_dp, False, ["experts."]),
], ids=lambda x: getattr(x, "__name__", None))
def test_planted(model, plant, skip_tied, wrong):
    run(2, _plant, model, plant, skip_tied, wrong)
