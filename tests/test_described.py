"""What is written on parameters outlives torch's own ways to make new ones: to_empty, assign=True, deepcopy, pickle; with ties, groups and
completed gradients. Buffers that must stay wide do. torch's DistributedDataParallel is refused where it would write over parts."""
import contextlib
import copy
import io

import pytest
import torch
import torch.distributed as dist
from ranks import kept, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from interlace.models.config import ModelConfig
from interlace.models.gpt import GPT
from interlace.parallel.expert_parallel import MoELayer, RouterOptions, TopKRouter
from interlace.parallel.foreign import SharedTail, SplitRMSNorm, TransposedColumnLinear, TransposedRowLinear
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import Described, grad_norm, init_parameters, named_pieces, reduce_partial_grads, replicated, set_pieces
from interlace.parallel.tensor_parallel import ColumnParallelLinear, GatheredLinear, RowParallelLinear, VocabParallelEmbedding

D, F_, V = 8, 24, 22
HALF = Axis("tp", 2, 1, (0, 1))                                       # nothing is communicated
DENSE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24, "seq_length": 8, "add_bias_linear": True}
MODELS = {"dense": {**DENSE, "normalization": "layernorm", "position_embedding_type": "learned_absolute", "num_query_groups": 2},
          "tied": {**DENSE, "share_embeddings_and_output_weights": True},
          "experts": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24, "seq_length": 8,
                      "num_moe_experts": 4, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True,
                      "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}}


def gpt(name, mesh=None):
    return GPT(ModelConfig(**MODELS[name]), mesh, vocab_size=V, seed=7)


def on_meta(make):
    with torch.device("meta"):
        return make()


def to_empty(make):
    model = on_meta(make).to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(9.0)
    return model


def assigned(make):
    model = on_meta(make)
    model.load_state_dict({k: torch.full_like(v, 9.0) for k, v in make().state_dict().items()}, assign=True)
    return model


def reloaded(make):
    stream = io.BytesIO()
    torch.save(make(), stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


NEW = {"to_empty": to_empty, "assign": assigned, "deepcopy": lambda make: copy.deepcopy(make()), "save": reloaded}


def marks(model):
    return [(name, piece, tuple(p.shape), p.init_std, p.init_fill, getattr(p, "expert", None), getattr(p, "stages", None))
            for name, piece, p in named_pieces(model)]


@pytest.mark.parametrize("way", NEW)
@pytest.mark.parametrize("name", MODELS)
def test_a_gpt_stays_what_it_is(name, way):
    true, model = gpt(name), NEW[way](lambda: gpt(name))
    assert marks(model) == marks(true) and len(list(model.parameters())) == len(list(true.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(9.0)
    init_parameters(model, seed=7)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), true.parameters()))
    assert (model.lm_head.weight is model.embed_tokens.weight) == (name == "tied")
    ids = torch.arange(16).view(2, 8)
    if way != "to_empty":                                             # which leaves buffers as empty as the rest
        assert torch.equal(model(ids, ids), true(ids, ids))


LAYERS = {
    "column": lambda: ColumnParallelLinear(D, tp=HALF, parts={"q": (D, 2), "k": (4, 1)}, bias=True),
    "row": lambda: RowParallelLinear(F_, D, tp=HALF, bias=True, sequence_parallel=True),
    "vocab": lambda: VocabParallelEmbedding(V, D, tp=HALF),
    "gathered": lambda: GatheredLinear(D, V, tp=HALF, bias=True),
    "router": lambda: TopKRouter(D, 4, RouterOptions(), tp=HALF, partial=True),
    "experts": lambda: MoELayer(D, F_, 4, RouterOptions(), Mesh(ep=Axis("ep", 2, 1, (0, 1)))),
}


@pytest.mark.parametrize("way", NEW)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_its_pieces(name, way):
    true, layer = LAYERS[name](), NEW[way](LAYERS[name])
    assert marks(layer) == marks(true)
    for one in (true, layer):
        init_parameters(one, seed=3)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), true.parameters()))


def test_foreign_layers_keep_theirs():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(D, 4)), nn.Parameter(torch.randn(4))
    made = [TransposedColumnLinear.from_torch(Conv1D(), HALF), TransposedRowLinear.from_torch(Conv1D(), HALF),
            SplitRMSNorm.from_torch(nn.RMSNorm(D), HALF, heads=2, eps=1e-6), SharedTail.from_torch(nn.Linear(D, 6), HALF, tail=2)]
    for layer in made:
        assert marks(copy.deepcopy(layer)) == marks(layer)


def test_a_table_of_two_stages_counts_for_two():
    meshes = [Mesh(pp=Axis("pp", 2, r, (0, 1)), embd=Axis("embd", 2, r, (0, 1))) for r in (0, 1)]
    for mesh in meshes:
        model = GPT(ModelConfig(**MODELS["tied"], pipeline_model_parallel_size=2), mesh, vocab_size=V)
        other = copy.deepcopy(model)
        assert other.embed_tokens.weight.stages == 2 and marks(other) == marks(model)
        assert not other.last or other.lm_head.weight is other.embed_tokens.weight


def test_other_ways_of_torch():
    layer = LAYERS["column"]()
    want = marks(layer)
    assert marks(layer.double()) == want and marks(layer.share_memory()) == want and marks(layer.to("meta")) == want
    layer = LAYERS["column"]()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert marks(layer.double()) == want
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model = gpt("tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())   # untied by hand: stays so
    set_pieces(model.lm_head.weight, *model.embed_tokens.weight.pieces)
    assert copy.deepcopy(model).double().lm_head.weight is not model.lm_head.weight is not model.embed_tokens.weight


def test_a_parameter_put_there_by_hand_is_not_passed_over():
    model = nn.Sequential(LAYERS["column"](), nn.Linear(D, D))
    init_parameters(model, seed=1)                                    # a user's own module has no pieces, and keeps its weights
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    for read in (lambda: init_parameters(model, seed=1), lambda: grad_norm(model, Mesh()),
                 lambda: reduce_partial_grads(model, HALF)):
        with pytest.raises(ValueError, match=r"0: its weight must be described by pieces, got a parameter put there by hand; copy values"):
            read()
    set_pieces(model[0].weight, *LAYERS["column"]().weight.pieces, std=0.02)
    init_parameters(model, seed=1)
    assert model[0].weight.any()


def test_a_module_of_your_own():
    class Norm(Described):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(D))
            set_pieces(self.weight, replicated((D,), HALF, True), fill=1.0)
    assert marks(copy.deepcopy(Norm())) == marks(Norm())


# ---- buffers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_biases_and_losses_keep_their_dtype(cast):
    layer = MoELayer(D, F_, 4, RouterOptions(score_function="sigmoid", expert_bias=True))
    layer.gate.expert_bias.fill_(1 + 1e-3)
    layer.losses.fill_(1 + 1e-12)
    bias, losses = layer.gate.expert_bias.clone(), layer.losses.clone()
    cast(layer)
    assert layer.gate.weight.dtype != torch.float32
    assert torch.equal(layer.gate.expert_bias, bias) and layer.gate.expert_bias.dtype == torch.float32
    assert torch.equal(layer.losses, losses) and layer.losses.dtype == torch.float64
    layer.to("meta", torch.float16)
    assert layer.gate.expert_bias.is_meta and layer.losses.is_meta and layer.gate.expert_bias.dtype == torch.float32


# ---- ranks -----------------------------------------------------------------------------------------------------


@kept
def mesh(world, **sizes):
    return Mesh.build(Layout(world=world, **sizes))


def _completed(rank, t):
    """One key head on two ranks: the backward of a layer made by from_torch sums its gradient, and so does that of its copy."""
    tp = mesh(t, tp=t).tp
    torch.manual_seed(0)
    linear, x = nn.Linear(D, 24).double(), torch.randn(3, 2, D, dtype=torch.float64)
    parts = {"q": (16, 2 * t), "k": (4, 1), "v": (4, 1)}
    layer = ColumnParallelLinear.from_torch(linear, tp, parts=parts)

    def gradient(m):
        m.zero_grad()
        m(x).square().mul(rank + 1).sum().backward()                  # other heads' gradients on every rank
        return m.weight.grad
    want, state = gradient(layer).clone(), layer.state_dict()
    twin = copy.deepcopy(layer)
    assert twin.tp is layer.tp and twin.weight is not layer.weight
    empty = ColumnParallelLinear.from_torch(linear.to("meta"), tp, parts=parts).to_empty(device="cpu")
    empty.load_state_dict(state)
    other = ColumnParallelLinear.from_torch(linear, tp, parts=parts)
    other.load_state_dict(state, assign=True)
    for m in (twin, empty, other):
        assert torch.equal(gradient(m), want)
    key = layer.weight.pieces[1].local(want)
    assert torch.equal(key, gradient(layer)[layer.weight.pieces[1].at:][:4]) and key.abs().max() > 0


@pytest.mark.parametrize("t", [2, 4])
def test_a_copy_sums_its_gradients(t):
    run(t, _completed, t)


def _model(rank, name, sizes):
    """The copy of a model over ranks: the same loss, gradients and norm."""
    m = mesh(2, **sizes)
    model = gpt(name, m)
    other = copy.deepcopy(model)
    ids = torch.arange(16).view(2, 8) + rank * (m.dp.size > 1)
    losses = []
    for one in (model, other):
        losses.append(one(ids, ids))
        losses[-1].backward()
        reduce_partial_grads(one, m.tp)
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters()))
    assert torch.equal(grad_norm(model, m), grad_norm(other, m))


@pytest.mark.parametrize("name, sizes", [("dense", {"tp": 2}), ("tied", {"tp": 2}), ("experts", {"tp": 2}), ("experts", {"ep": 2})])
def test_a_copy_over_ranks(name, sizes):
    run(2, _model, name, sizes)


class Net(nn.Module):
    def __init__(self, tp):
        super().__init__()
        torch.manual_seed(4)
        self.up = ColumnParallelLinear(D, F_, tp=tp, bias=True, dtype=torch.float64)
        self.down = RowParallelLinear(F_, D, tp=tp, bias=True, dtype=torch.float64)

    def forward(self, x):
        return self.down(self.up(x).tanh())


@contextlib.contextmanager
def undebugged():
    """Groups made in here are no wrappers, on which torch's DistributedDataParallel crashes."""
    level = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.OFF)
    try:
        yield
    finally:
        dist.set_debug_level(level)


def _refused(rank):
    tp, ep = mesh(2, tp=2), mesh(2, ep=2)
    for model, name, axis in ((Net(tp.tp), "up", "tp"), (MoELayer(D, F_, 4, RouterOptions(), ep), "experts.up", "ep"),
                              (gpt("dense", tp), "GPT", "tp"), (RowParallelLinear(F_, D, tp=tp.tp), "RowParallelLinear", "tp")):
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=f"same part of {name}, got a group across {axis}=2; use interlace.DistributedDataParallel"):
            DistributedDataParallel(model)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    with undebugged():
        both = dist.new_group([0, 1])
    moe = MoELayer(D, F_, 4, RouterOptions(), ep)
    moe._ddp_params_and_buffers_to_ignore = [n for n, _ in moe.named_parameters() if "experts" in n]
    DistributedDataParallel(moe, process_group=both)                  # the rest is the same on all ranks
    DistributedDataParallel(MoELayer(D, F_, 4, RouterOptions()), process_group=both)
    DistributedDataParallel(Net(Axis("tp")), process_group=both)


def test_torchs_ddp_does_not_write_over_parts():
    run(2, _refused)


def _replicas(rank):
    """torch's own over the ranks that hold the same part: gradients are the mean over dp, those of one process."""
    with undebugged():
        m = mesh(4, tp=2)
    torch.manual_seed(1)
    x = torch.randn(m.dp.size, 3, 2, D, dtype=torch.float64)
    one, net = Net(Axis("tp")), Net(m.tp)
    one(x.flatten(1, 2)).square().mean().backward()
    ddp = DistributedDataParallel(net, process_group=m.dp.group)      # its hooks end with it
    ddp(x[m.dp.rank]).square().mean().backward()
    want = {name: p.grad for name, _, p in named_pieces(one)}
    for name, piece, p in named_pieces(net):
        torch.testing.assert_close(piece.local(p.grad), piece.of(want[name]), rtol=1e-12, atol=1e-14)


def test_torchs_ddp_over_replicas():
    run(4, _replicas)
