"""Pieces: initial weights that no layout changes, a cover of every global tensor, gradients summed, the clip norm."""
import pytest
import torch
from ranks import kept, run
from torch import nn

from interlace.models.config import ModelConfig, OptimConfig
from interlace.models.gpt import GPT
from interlace.models.optimizer import Optimizer
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import (
    Piece,
    grad_norm,
    init_parameters,
    named_pieces,
    padded,
    pieces_of,
    reduce_partial_grads,
    replicated,
    set_pieces,
    split,
    whole,
)
from interlace.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear

VOCAB = 45
BASE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "seq_length": 8,
        "make_vocab_size_divisible_by": 8}
GPT2 = {"normalization": "layernorm", "activation": "gelu", "position_embedding_type": "learned_absolute",
        "add_bias_linear": True}
MODELS = {"llama": {}, "gpt2-tied": {**GPT2, "share_embeddings_and_output_weights": True},
          "gqa-bias": {"num_query_groups": 2, "add_bias_linear": True}, "mqa": {**GPT2, "num_query_groups": 1}}


def shards(options, tp, sp=False, dtype=torch.float32, seed=7):
    """The models of all ranks, built in this process: no group is needed until something is communicated."""
    cfg = ModelConfig(**{**BASE, **options}, tensor_model_parallel_size=tp, sequence_parallel=sp)
    meshes = [Mesh(tp=Axis("tp", tp, r, tuple(range(tp)))) for r in range(tp)]
    return [GPT(cfg, mesh, vocab_size=VOCAB, seed=seed, dtype=dtype) for mesh in meshes]


def assemble(models):
    """{global name: (tensor, how many ranks wrote each element)}"""
    full = {}
    for model in models:
        for name, piece, p in named_pieces(model):
            if name not in full:
                full[name] = p.new_full(piece.shape, torch.nan), torch.zeros(piece.shape, dtype=torch.int)
            tensor, count = full[name]
            assert tensor.shape == piece.shape, name
            place, mine = piece.of(tensor), piece.local(p.detach())
            assert place.shape == mine.shape, name
            written = piece.of(count) > 0
            assert torch.equal(place[written], mine[written]), f"{name}: copies differ"
            place.copy_(mine)
            piece.of(count).add_(1)
    return full


# ---- initial weights and the cover ----------------------------------------------------------------------------


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_weights_and_a_full_cover(name, tp, sp):
    one, many = (assemble(shards(MODELS[name], t, sp and t > 1)) for t in (1, tp))
    assert one.keys() == many.keys()
    copies = {}
    for model in shards(MODELS[name], tp, sp):
        for key, piece, _ in named_pieces(model):
            assert copies.setdefault(key, piece.copies) == piece.copies
    for key, (tensor, count) in many.items():
        assert torch.equal(tensor, one[key][0]), key                  # bitwise, and no nan: all is covered
        assert (count == copies[key]).all(), key


def test_copies_are_where_they_should_be():
    pieces = {key: piece for key, piece, _ in named_pieces(shards(MODELS["gqa-bias"], 4, sp=True)[2])}
    attention = "layers.1.self_attn."
    assert pieces[attention + "k_proj.weight"] == Piece("k_proj", (16, 32), 0, 8, 8, 8, copies=2, partial=True)
    assert pieces[attention + "q_proj.weight"] == Piece("q_proj", (32, 32), 0, 16, 8, 0)
    assert pieces[attention + "v_proj.bias"] == Piece("v_proj", (16,), 0, 8, 8, 16, copies=2, partial=True)
    assert pieces[attention + "o_proj.weight"] == Piece("", (32, 32), 1, 16, 8)
    assert pieces[attention + "o_proj.bias"] == Piece("", (32,), 0, 0, 32, copies=4, partial=True)
    assert pieces["layers.0.mlp.up_proj.weight"] == Piece("up_proj", (48, 32), 0, 24, 12, 12)
    assert pieces["norm.weight"] == Piece("", (32,), 0, 0, 32, copies=4, partial=True)
    assert pieces["embed_tokens.weight"] == Piece("", (VOCAB, 32), 0, 32, 13)


def test_partial_only_where_ranks_see_different_parts():
    partial = {sp: {k.split(".", 2)[-1] for k, p, _ in named_pieces(shards(GPT2, 2, sp)[0]) if p.partial}
               for sp in (False, True)}
    assert partial[False] == set()
    assert partial[True] == {"weight", "bias", "position_embeddings", "input_layernorm.weight", "input_layernorm.bias",
                             "post_attention_layernorm.weight", "post_attention_layernorm.bias",
                             "self_attn.o_proj.bias", "mlp.down_proj.bias"}
    assert not any(p.partial for _, p, _ in named_pieces(shards(GPT2, 1, True)[0]))


def test_padding_rows_are_zero_and_belong_to_no_piece():
    models = shards({}, 4)                                            # 64 rows over 4 ranks for 45 ids
    for rank, model in enumerate(models):
        weight = model.embed_tokens.weight
        real = max(0, min(16, VOCAB - 16 * rank))
        assert weight.shape[0] == 16 and pieces_of(weight)[0].length == real
        assert not weight[real:].any() and (real == 0 or weight[:real].abs().min() > 0)


def test_a_tied_weight_counts_once():
    tied, untied = (assemble(shards({"share_embeddings_and_output_weights": s}, 2)) for s in (True, False))
    assert untied.keys() - tied.keys() == {"lm_head.weight"} and "embed_tokens.weight" in tied
    assert not torch.equal(untied["embed_tokens.weight"][0], untied["lm_head.weight"][0])


def test_the_seed_and_the_name_make_the_numbers():
    a, b, c = (assemble(shards({}, 2, seed=s)) for s in (7, 7, 8))
    assert all(torch.equal(a[k][0], b[k][0]) for k in a)
    random = [k for k in a if "norm" not in k]
    assert not any(torch.equal(a[k][0], c[k][0]) for k in random)
    same_shape = [a[f"layers.{i}.self_attn.{n}_proj.weight"][0] for i in (0, 1) for n in "qkvo"]
    assert not any(torch.equal(x, y) for i, x in enumerate(same_shape) for y in same_shape[:i])
    assert a["embed_tokens.weight"][0].std().item() == pytest.approx(0.02, rel=0.1)
    assert a["layers.0.self_attn.o_proj.weight"][0].std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)


def test_torchs_own_generator_is_not_touched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    shards(GPT2, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_type_starts_from_the_same_fp32_numbers(dtype):
    fp32, other = assemble(shards({}, 2)), assemble(shards({}, 2, dtype=dtype))
    assert all(torch.equal(other[k][0], fp32[k][0].to(dtype)) for k in fp32)


# ---- pieces alone ---------------------------------------------------------------------------------------------


def test_split_says_what_does_not_divide():
    with pytest.raises(ValueError, match=r"up_proj: dim 1 of \[4, 6\] must be divisible by tp=4, got 6; use another"):
        split("up_proj", (4, 6), 1, Axis("tp", 4, 1))


@pytest.mark.parametrize("rank, start, length", [(0, 0, 4), (1, 4, 4), (2, 8, 1), (3, 9, 0)])
def test_padded(rank, start, length):
    assert padded("", (9, 2), Axis("tp", 4, rank), 4) == Piece("", (9, 2), 0, start, length)


def test_a_plain_torch_parameter_is_whole():
    linear, scalar = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.5))
    assert pieces_of(linear.weight) == (Piece("", (2, 3), 0, 0, 2),)
    assert pieces_of(scalar) == (Piece("", (), 0, 0, 1),) and pieces_of(scalar)[0].local(scalar).item() == 1.5


def test_whole_is_the_twin_of_one_process():
    piece = Piece("k_proj", (16, 32), 0, 8, 8, 8, copies=2, partial=True)
    assert whole(piece) == Piece("k_proj", (16, 32), 0, 0, 16)


# ---- gradients ------------------------------------------------------------------------------------------------


@kept
def axis(t):
    return Mesh.build(Layout(t, tp=t)).tp


def true_grad(name, shape):
    """A gradient of the global tensor that every process can make."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def _norm(rank, t, options, sp):
    cfg = ModelConfig(**{**BASE, **options}, tensor_model_parallel_size=t, sequence_parallel=sp)
    model = GPT(cfg, Mesh(tp=axis(t)), vocab_size=VOCAB, dtype=torch.float64)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e6)                              # padding rows: in no piece, so in no norm
    names = {}
    for name, piece, p in named_pieces(model):
        names[name] = true_grad(name, piece.shape)
        piece.local(p.grad).copy_(piece.of(names[name]))
    want = sum(g.square().sum() for g in names.values()).sqrt()
    got = grad_norm(model, Mesh(tp=axis(t)))
    assert got.dtype == torch.float64 and got.dim() == 0
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_norm_counts_every_parameter_once(name, tp, sp):
    run(tp, _norm, tp, MODELS[name], sp)


def test_the_norm_of_one_process_is_torchs():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    model(torch.randn(4, 7, dtype=torch.float64)).sum().backward()
    want = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(grad_norm(model, Mesh()), want, rtol=1e-14, atol=0)
    model[0].bias.grad = None                                         # a frozen parameter
    assert grad_norm(model, Mesh()) < want


class Mixed(nn.Module):
    """Pieces with copies 2 (2 key / value heads on 4 ranks: weight, bias), 4 (norm, row bias) and 1."""

    def __init__(self, tp):
        super().__init__()
        parts = {"q_proj": (16, 4), "k_proj": (8, 2), "v_proj": (8, 2)}
        self.norm = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        set_pieces(self.norm, replicated((6,), tp, partial=True))
        self.qkv = ColumnParallelLinear(6, tp=tp, parts=parts, bias=True, dtype=torch.float64)
        self.row = RowParallelLinear(16, 6, tp=tp, bias=True, sequence_parallel=True, dtype=torch.float64)
        self.table = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        set_pieces(self.table, replicated((3, 2), tp, partial=False))  # equal on all ranks: not to be summed
        init_parameters(self, 0)


def _part(name, shape, rank):
    return true_grad(f"{name} of rank {rank}", shape)


def _reduce(rank, t, drop):
    model = Mixed(axis(t))
    grads = {}
    for name, piece, p in named_pieces(model):
        if p.grad is None and name != drop:
            p.grad = torch.zeros_like(p)
        if p.grad is not None:
            piece.local(p.grad).copy_(piece.of(_part(name, piece.shape, rank if piece.partial else 0)))
            grads[name] = piece, p
    kept = {name: piece.local(p.grad).clone() for name, (piece, p) in grads.items()}
    reduce_partial_grads(model, axis(t))
    assert {n.rsplit(".", 1)[0]: g.copies for n, (g, _) in grads.items() if "proj" in n} == {
        "q_proj": 1, "k_proj": t // 2, "v_proj": t // 2}
    for name, (piece, p) in grads.items():
        got = piece.local(p.grad)
        if not piece.partial:
            assert torch.equal(got, kept[name]), name                 # not touched
            continue
        first = rank // piece.copies * piece.copies                   # ranks that hold the same block: neighbours
        want = sum(piece.of(_part(name, piece.shape, r)) for r in range(first, first + piece.copies))
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
    assert drop is None or getattr(model, drop).grad is None


@pytest.mark.parametrize("drop", [None, "norm"])
def test_partial_gradients_of_mixed_copies(drop):
    run(4, _reduce, 4, drop)
    run(2, _reduce, 2, drop)


def test_one_rank_has_nothing_to_reduce():
    model = Mixed(Axis("tp"))
    model.norm.grad = torch.ones(6, dtype=torch.float64)
    reduce_partial_grads(model, Axis("tp"))
    assert torch.equal(model.norm.grad, torch.ones(6, dtype=torch.float64))


class Own(nn.Module):
    """A user's: plain torch layers around ours."""

    def __init__(self, tp):
        super().__init__()
        torch.manual_seed(3)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.up, self.down = ColumnParallelLinear(8, 16, tp=tp), RowParallelLinear(16, 8, tp=tp, bias=True)
        init_parameters(self, seed=5)

    def forward(self, x):
        return self.head(self.down(self.up(self.norm(x)).relu()))


def _plain_parameters(rank, world):
    """The norm, and with it what the clip leaves of a step, is that of one process."""
    mesh, x = Mesh.build(Layout(world, tp=world)), torch.randn(4, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = [Own(m.tp).double() for m in (Mesh(), mesh)]
    steps = [Optimizer(DistributedDataParallel(model, m), OptimConfig(lr=0.1, min_lr=0.0, clip_grad=0.5))
             for model, m in zip(models, (Mesh(), mesh))]
    for _ in range(3):
        one, split = ((opt.ddp(x).square().mean().backward(), opt.step(0.1))[1] for opt in steps)
        torch.testing.assert_close(split, one, rtol=1e-13, atol=0)
    for name in ("norm", "head"):
        for p, q in zip(getattr(models[0], name).parameters(), getattr(models[1], name).parameters()):
            torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(models[1].up.weight, models[0].up.weight.chunk(world)[rank], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tp", [2, 4])
def test_plain_parameters_of_a_users_module_count_once(tp):
    run(tp, _plain_parameters, tp)


def _mixed_types(rank, world):
    model = nn.ParameterDict({name: torch.zeros(4, dtype=dtype) for name, dtype in (("a", torch.bfloat16), ("b", torch.float32))})
    tp = Mesh.build(Layout(world, tp=world)).tp
    for p in model.values():
        set_pieces(p, replicated((4,), tp, partial=True))
        p.grad = torch.full((4,), 1.001, dtype=p.dtype)
    reduce_partial_grads(model, tp)
    assert torch.equal(model["b"].grad, torch.full((4,), 1.001) * 2), "an fp32 gradient went through bf16"
    assert torch.equal(model["a"].grad, torch.full((4,), 2.0).bfloat16())


def test_partial_gradients_of_two_types():
    run(2, _mixed_types, 2)
