"""The traps of composed parallelisms, each planted and found by what `interlace verify` compares. More in test_verify.py: norms under
SP, clip norm of tp's copies, row bias, dropout seeds, padding, dp's reductions."""
import dataclasses

import pytest
import torch
from ranks import kept, run
from test_equal import BASE

import interlace.models.optimizer as optimizer
import interlace.models.train as train
from interlace.models.config import Config, ModelConfig, OptimConfig, SchedConfig
from interlace.models.verify import TOLERANCE, compare
from interlace.parallel.data_parallel import DistributedDataParallel
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


def zero_token_expert(model):
    """The weight gradient of an expert without tokens is what lay in memory."""
    for moe in model.moe_layers().values():
        moe.experts.up.weight.register_hook(lambda g: g + 1e-3 * (g.abs().amax((1, 2), keepdim=True) == 0))


def micro_batches_summed(model):
    loss = model.loss
    model.loss = lambda hidden, labels: 3 * loss(hidden, labels)      # of three, not averaged


def last_backward_lost(model):
    """The last micro-batch, alone in the last round of an interleaved schedule, has no backward below the last stage."""
    through = model.run

    def run(h, layers, first=0):
        if first == 2 and 3 in layers:
            h = h.clone()
            h.register_hook(torch.zeros_like)
        return through(h, layers, first)
    model.run = run


def nothing(model):
    pass


class Swapped(DistributedDataParallel):
    """Gradients are reduced over dp, and under ZeRO-1 scattered, before those of tied embeddings are summed over the stages."""

    def finish(self):
        first = not self.done
        super().finish()
        if first:
            TIE(self.module, self.mesh)


TIE, NORM = train.reduce_tied_grads, optimizer.grad_norm


def no_experts(model, mesh, parts, **more):
    """The clip norm, over the dense parameters alone, where there is more than one rank."""
    return NORM(model, mesh, lambda p: [] if mesh.ep.size > 1 and getattr(p, "expert", False) else parts(p), **more)


def no_sum(*_):
    pass


def _plant(rank, world, model, plant, wrong, options):
    m = ModelConfig(**{**BASE, "micro_batch_size": 1, **model})
    cfg = Config(model=m, optim=OptimConfig(lr=0.01, min_lr=0.001, clip_grad=0.1, ddp_bucket_size=1000, sched=SchedConfig(warmup_steps=2),
                                            use_distributed_optimizer=options.get("zero1", False)))
    layout = Layout.from_config(cfg, world)
    mesh = mesh_of(layout)
    train.reduce_tied_grads, optimizer.grad_norm = options.get("tie", TIE), options.get("norm", NORM)
    try:
        found = compare(cfg, mesh, vocab_size=m.vocab_size, steps=2, plant=plant, wrap=options.get("wrap", DistributedDataParallel))
    finally:
        train.reduce_tied_grads, optimizer.grad_norm = TIE, NORM
    off = {f"{f.what} {f.name}" for f in found if not f.error <= TOLERANCE}
    assert bool(off) == bool(wrong) and all(any(w in o for o in off) for w in wrong), sorted(off)
    if plant is chunks_exchanged:
        causes = {f.name: f.cause for f in found if f.what == "activation" and f.error > TOLERANCE}
        assert causes["layers.3 input"].startswith("received the input of layers.1 at sample "), causes
        assert "layers.0 input" not in causes
    if plant is micro_batches_summed:
        assert {f.name for f in found if f.what == "gradient"} < {o.removeprefix("gradient ") for o in off}


THREE = {**CHUNKS, "global_batch_size": 3}
SPARSE = {"num_moe_experts": 8, "moe_router_topk": 1, "moe_router_pre_softmax": True, "expert_model_parallel_size": 2}
HALF = {"num_moe_experts": 4, "moe_layer_freq": (1, 0), "pipeline_model_parallel_size": 2}
FAULTS = {                                                            # ranks, model, planted in it, what must be off, planted elsewhere
    "nothing, tied": (2, TIED, nothing, []),
    "nothing, experts": (2, EXPERTS, nothing, []),
    "nothing, chunks": (2, CHUNKS, nothing, []),
    "nothing, tied, zero1": (4, TIED, nothing, [], {"zero1": True}),
    "nothing, a round of one micro-batch": (2, THREE, nothing, []),
    "nothing, experts without tokens": (2, SPARSE, nothing, []),
    "nothing, a stage without experts": (2, HALF, nothing, []),
    "tied gradients not summed": (2, TIED, nothing, ["gradient embed_tokens.weight", "gradient norm"], {"tie": no_sum}),
    "tied gradients summed after the scatter": (4, TIED, nothing, ["gradient embed_tokens.weight"],
                                                {"zero1": True, "tie": no_sum, "wrap": Swapped}),
    "clip norm counts tied twice": (2, TIED, tied_counted_twice, ["gradient norm"]),
    "clip norm without experts": (2, EXPERTS, nothing, ["gradient norm"], {"norm": no_experts}),
    "router not summed under sp": (2, EXPERTS, router_not_summed, ["mlp.gate.weight"]),
    "balancing losses times tp": (2, EXPERTS, losses_at_another_scale, ["mlp.gate.weight", "balancing losses"]),
    "balancing losses, a stage without experts": (2, HALF, losses_at_another_scale, ["mlp.gate.weight", "balancing losses layers.0.mlp"]),
    "another rank's experts": (2, EXPERTS, experts_of_another_rank, ["loss step 1", "experts.0.up_proj.weight"]),
    "experts over dp": (2, {"num_moe_experts": 4, "expert_model_parallel_size": 2}, expert_over_dp, ["experts."]),
    "an expert without tokens": (2, SPARSE, zero_token_expert, ["gradient layers.0.mlp.experts"]),
    "chunks exchanged": (2, CHUNKS, chunks_exchanged, ["activation layers.3 input", "loss step 1", "gradient layers.1"]),
    "micro-batches summed": (2, THREE, micro_batches_summed, ["loss step 1", "gradient norm"]),
    "last backward lost": (2, THREE, last_backward_lost, ["gradient layers.0", "gradient embed_tokens"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name):
    world, model, plant, wrong, *options = FAULTS[name]
    run(world, _plant, world, model, plant, wrong, *(options or [{}]))
