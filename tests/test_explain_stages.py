"""What `explain` prints of pipeline stages and experts, against real runs: every rank's tensors, every axis's traffic, saved bytes."""
import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from ranks import kept, run
from test_explain import BASE, GPT2, Counted, Saved, nbytes

from interlace.kernels.comm import heap_of
from interlace.models.config import Config, ModelConfig, OptimConfig, TrainerConfig
from interlace.models.explain import activations, deferred, memory, parameters, remote_rows, stages, traffic
from interlace.models.gpt import GPT
from interlace.models.optimizer import Optimizer
from interlace.models.train import DTYPES, Run, forward_backward
from interlace.models.verify import RandomTokens
from interlace.parallel import expert_parallel
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.deferred import Deferred
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "seq_length": 24}
SHARED = {**MOE, "moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True}
CAPACITY = {**MOE, "moe_expert_capacity_factor": 4.0, "moe_z_loss_coeff": 1e-3}
TIED = {"share_embeddings_and_output_weights": True}
QUIET = {**MOE, "moe_router_load_balancing_type": "none"}

mesh_of = kept(Mesh.build)


def mixed(options, tp=1, pp=1, ep=1, dp=1, sp=False, recompute=False, precision="fp32", zero1=False, schedule=None, micro=2):
    m = {**BASE, **options, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep,
         "sequence_parallel": sp, "recompute_granularity": "full" if recompute else None, "pipeline_parallel_schedule": schedule,
         "virtual_pipeline_model_parallel_size": 2 if schedule not in (None, "gpipe", "1f1b") else None,
         "num_layers": 5 if pp > 1 else 3, "global_batch_size": 2 * micro * dp,
         "moe_router_force_load_balancing": "num_moe_experts" in options}
    return Config(model=ModelConfig(**m), optim=OptimConfig(clip_grad=0.1, use_distributed_optimizer=zero1),
                  trainer=TrainerConfig(precision=precision)), Layout(tp * pp * dp, tp=tp, pp=pp, ep=ep, vpp=m[
                      "virtual_pipeline_model_parallel_size"], sp=sp)


def every_choice(tokens, topk, experts, device=None):
    """Every choice of topk experts equally often: what balanced routing means in `remote_rows`."""
    choices = list(itertools.combinations(range(experts), topk))
    assert tokens % len(choices) == 0
    return torch.tensor(choices, dtype=torch.int32).repeat(tokens // len(choices), 1)


def _all_axes(rank, cfg, layout):
    m = cfg.model
    assert Layout.from_config(cfg, layout.world) == layout
    mesh = mesh_of(layout)
    expert_parallel.forced_balance = every_choice
    model = GPT(m, mesh, vocab_size=m.vocab_size, dtype=DTYPES[cfg.trainer.precision])
    optimizer = Optimizer(DistributedDataParallel(model, mesh, use_distributed_optimizer=cfg.optim.use_distributed_optimizer), cfg.optim)
    run_ = Run.__new__(Run)                                           # what train_step does, without data and files
    run_.config, run_.mesh, run_.ddp = cfg, mesh, optimizer.ddp
    model.train()
    with Counted(mesh) as seen:
        forward_backward(optimizer.ddp, RandomTokens(m.vocab_size, m.seq_length, 0), 0, m)
        optimizer.step(1e-3)
        run_.seen = expert_parallel.take_statistics(model, mesh)
        run_.balance()
    calls, sizes = Counter(), Counter()
    for axis, rows in traffic(cfg, layout, m.vocab_size, mesh.pp.rank).items():
        for row in rows:
            calls[axis, row.op] += row.calls
            sizes[axis, row.op] += row.bytes
    off = {key: (seen.calls[key], calls[key], seen.bytes[key], sizes[key]) for key in {**seen.calls, **calls}
           if seen.calls[key] != calls[key] or seen.bytes[key] != pytest.approx(sizes[key], rel=1e-12)}
    assert not off, f"(axis, op): calls, calls that explain says, bytes, bytes that it says: {off}"
    need, own = memory(cfg, layout, m.vocab_size, mesh.pp.rank), [t for kind in optimizer.own.values() for t in kind.values()]
    assert sum(p.numel() for p in model.parameters()) == parameters(m, m.vocab_size, layout, mesh.pp.rank)
    assert nbytes(list(model.parameters())) == need["weights"]
    assert nbytes([f.grads for f in optimizer.ddp.grad_buffers]) == need["gradients"]
    assert nbytes(own) == need["optimizer"]
    groups = {axis for axis, op in seen.calls}
    assert 2 * heap_of(mesh.pp.group or mesh.dp.group or mesh.tp.group).nbytes * len(groups) == need["shared memory for collectives (CPU)"]


@pytest.mark.parametrize("options, kwargs", [
    ({**GPT2}, {"tp": 2, "pp": 2, "sp": True}), ({**TIED, "num_query_groups": 1}, {"pp": 2, "dp": 2, "zero1": True, "schedule": "gpipe"}),
    ({"add_bias_linear": True}, {"pp": 2, "schedule": "interleaved_1f1b", "precision": "bf16"}),
    (TIED, {"pp": 2, "schedule": "zbv_zero_bubble", "recompute": True, "micro": 4}),
    ({}, {"pp": 2, "tp": 2, "sp": True, "schedule": "interleaved_zero_bubble"}),
    ({"hidden_dropout": 0.1}, {"pp": 2, "tp": 2, "sp": True, "schedule": "zbv_zero_bubble"}),
    ({}, {"pp": 3, "micro": 3}),
    (SHARED, {"tp": 2, "ep": 2, "recompute": True}), (MOE, {"tp": 2, "ep": 2, "recompute": True}),
    (CAPACITY, {"tp": 2, "dp": 2, "ep": 4, "sp": True}), (QUIET, {"dp": 2, "ep": 2, "recompute": True, "precision": "bf16"}),
    ({**SHARED, "moe_layer_freq": 2}, {"tp": 2, "dp": 2, "ep": 2, "sp": True, "recompute": True}),
    ({**MOE, **GPT2, "moe_layer_freq": 2}, {"dp": 2, "zero1": True, "precision": "bf16"}),
    ({**SHARED, "moe_layer_freq": (1, 1, 0, 1, 0)}, {"tp": 2, "pp": 2, "ep": 2, "sp": True,
                                                                 "schedule": "interleaved_zero_bubble"}),
], ids=str)
def test_every_axis(options, kwargs):
    cfg, layout = mixed(options, **kwargs)
    run(layout.world, _all_axes, cfg, layout)


def test_remote_rows_are_the_mean_over_all_choices():
    for E, K, ep in itertools.product((4, 6, 8), (1, 2, 4), (1, 2)):
        m = ModelConfig(**{**BASE, "num_moe_experts": E, "moe_router_topk": K})
        owners = [len({e // (E // ep) for e in c} - {0}) for c in itertools.combinations(range(E), K)]
        assert sum(owners) / math.comb(E, K) == pytest.approx(remote_rows(m, ep)), (E, K, ep)


def _stage_activations(rank, cfg, layout):
    m, item = cfg.model, torch.empty(0, dtype=DTYPES[cfg.trainer.precision]).element_size()
    flat = dataclasses.replace(layout, world=layout.world // layout.pp, pp=1, vpp=None)
    base = mesh_of(flat)
    expert_parallel.forced_balance = every_choice
    ids, labels = (x.contiguous() for x in RandomTokens(m.vocab_size, m.seq_length, 0).batch(0, m.micro_batch_size))
    for r in range(layout.pp):                                        # stages one after the other: their messages are not needed
        mesh = dataclasses.replace(base, pp=Axis("pp", layout.pp, r, tuple(range(layout.pp))))
        model = GPT(m, mesh, vocab_size=m.vocab_size, dtype=DTYPES[cfg.trainer.precision]).train()
        for i, stage in model.stages().items():
            held = stages(m, layout, r)[i]
            x = ids if held.first else torch.randn(m.seq_length // (layout.tp if layout.sp else 1), m.micro_batch_size, m.hidden_size,
                                                   dtype=DTYPES[cfg.trainer.precision], requires_grad=True)
            saved, later = Saved(model), Deferred() if "zero" in (m.pipeline_parallel_schedule or "") else None
            if later is not None:
                stage.defer(later)
            with saved.hooks():
                out = stage(x, labels=labels, first_sample=torch.tensor(0))
            kept, extra = activations(m, layout, item, held)
            logits = m.seq_length * m.micro_batch_size * 48 // layout.tp * item if held.last else 0
            got = nbytes(saved.tensors) - logits
            assert abs(kept / got - 1) < 0.02, f"stage {i}: explain says {kept}, autograd keeps {got}: {kept / got:.3f}"
            assert extra == 0 or m.recompute_granularity == "full"
            if later is not None:
                out.sum().backward()
                cells = [c.cell_contents for f in later.waiting for c in f.__closure__]
                left = sum(t.numel() * t.element_size() for t in cells if type(t) is torch.Tensor)
                assert left == deferred(m, layout, item, held) + logits


@pytest.mark.parametrize("options, kwargs", [
    ({}, {"pp": 2}), (GPT2, {"pp": 3, "micro": 3, "recompute": True}), ({"num_query_groups": 2}, {"pp": 2, "schedule": "zbv_zero_bubble"}),
    (GPT2, {"pp": 2, "tp": 2, "sp": True, "schedule": "interleaved_zero_bubble"}),
    ({}, {"pp": 2, "tp": 2, "sp": True, "schedule": "zbv_zero_bubble"}),
    (MOE, {}), (SHARED, {"tp": 2}), (SHARED, {"tp": 2, "sp": True}), ({**MOE, **GPT2}, {"precision": "bf16"}),
    (CAPACITY, {"dp": 2, "ep": 2}), (SHARED, {"tp": 2, "ep": 2, "precision": "bf16"}), (MOE, {"tp": 2, "ep": 2}),
    ({**SHARED, "moe_layer_freq": 2}, {"pp": 2, "tp": 2, "ep": 2, "sp": True, "schedule": "interleaved_zero_bubble"}),
], ids=str)
def test_activations_of_stages_and_experts(options, kwargs):
    cfg, layout = mixed(options, **kwargs)
    run(layout.world // layout.pp, _stage_activations, cfg, layout)
