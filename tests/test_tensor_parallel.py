"""The layers alone, on real ranks, against torch's own dense modules in float64: outputs and every gradient, sp on and off."""
import pytest
import torch
import torch.nn.functional as F
from ranks import kept, run

from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import init_parameters, named_pieces, reduce_partial_grads
from interlace.parallel.tensor_parallel import (
    ColumnParallelLinear,
    ParallelHead,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

S, B, D, F_, V = 12, 2, 8, 24, 22


@kept
def axis(t):
    return Mesh.build(Layout(world=t, tp=t)).tp


def fill(module, seed=3):
    """Give every global tensor the same numbers whatever the layout, biases included."""
    for p in module.parameters():
        p.init_std = 0.3
    init_parameters(module, seed)
    return module


def check_grads(module, dense, tp):
    reduce_partial_grads(module, tp)
    want = {name: piece.local(p.grad) for name, piece, p in named_pieces(dense)}
    for name, piece, p in named_pieces(module):
        torch.testing.assert_close(piece.local(p.grad), piece.of(want[name]), rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_on_their_own_start_apart_and_follow_torch_manual_seed():
    """All layers of a user's own model are named `weight` alike: a seed made of the name would give every block the same numbers."""
    def made(tp):
        torch.manual_seed(5)
        return [ColumnParallelLinear(D, F_, tp=tp), ColumnParallelLinear(D, F_, tp=tp), RowParallelLinear(F_, D, tp=tp),
                VocabParallelEmbedding(F_, D, tp=tp)]
    whole, again = made(Axis("tp")), made(Axis("tp"))
    assert not torch.equal(whole[0].weight, whole[1].weight) and all(torch.equal(a.weight, b.weight) for a, b in zip(whole, again))
    for rank in (0, 1):                                               # the layout changes no number
        for part, layer in zip(made(Axis("tp", 2, rank, (0, 1))), whole):
            piece = part.weight.pieces[0]
            assert torch.equal(piece.local(part.weight), piece.of(layer.weight))
    before = torch.get_rng_state()
    ColumnParallelLinear.from_torch(torch.nn.Linear(D, F_, device="meta"), Axis("tp"))
    assert torch.equal(torch.get_rng_state(), before), "a layer that takes its weights from another draws nothing"
    linear = torch.nn.Linear(D, F_)
    taken = ColumnParallelLinear.from_torch(linear, Axis("tp"))
    init_parameters(taken, seed=1)
    assert torch.equal(taken.weight, linear.weight) and torch.equal(taken.bias, linear.bias), "and keeps them"


class Pair(torch.nn.Module):
    def __init__(self, tp, sp):
        super().__init__()
        self.col = ColumnParallelLinear(D, F_, tp=tp, bias=True, sequence_parallel=sp, dtype=torch.float64)
        self.row = RowParallelLinear(F_, D, tp=tp, bias=True, sequence_parallel=sp, dtype=torch.float64)
        fill(self)

    def forward(self, x):
        return self.row(F.gelu(self.col(x)))


def _pair(rank, t, sp):
    torch.manual_seed(0)
    x, dy = torch.randn(2, S, B, D, dtype=torch.float64)
    dense, pair = Pair(Axis("tp"), False), Pair(axis(t), sp)
    mine = (lambda a: a.chunk(t)[rank]) if sp else (lambda a: a)
    xd, xp = x.clone().requires_grad_(), mine(x).clone().requires_grad_()
    y = F.linear(F.gelu(F.linear(xd, dense.col.weight, dense.col.bias)), dense.row.weight, dense.row.bias)
    y.backward(dy)
    got = pair(xp)
    got.backward(mine(dy))
    torch.testing.assert_close(got, mine(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(xp.grad, mine(xd.grad), rtol=1e-12, atol=1e-12)
    check_grads(pair, dense, axis(t))


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("t", [2, 3, 4])
def test_column_then_row(t, sp):
    run(t, _pair, t, sp)


class Head(torch.nn.Module):
    def __init__(self, tp, sp, tied):
        super().__init__()
        self.embed = VocabParallelEmbedding(V, D, tp=tp, rows=8 if tp.size == 4 else None, sequence_parallel=sp, dtype=torch.float64)
        self.head = ParallelHead(self.embed, tied=tied)
        fill(self)


def _vocab(rank, t, sp, tied):
    """Uneven vocabulary: 22 rows over 3 ranks of 8, or over 4 ranks of 8 where the last holds nothing but padding."""
    torch.manual_seed(1)
    ids, targets = torch.randint(V, (2, S, B))
    targets[0, 0] = -100
    tp, one = axis(t), Axis("tp")
    dense, split = Head(one, False, tied), Head(tp, sp, tied)
    want = F.cross_entropy((F.embedding(ids, dense.embed.weight) @ dense.head.weight.t()).view(-1, V), targets.view(-1), reduction="none")
    want.sum().backward()
    h = split.embed(ids)
    assert h.shape[0] == (S // t if sp else S)
    loss = vocab_parallel_cross_entropy(split.head(h), targets, tp, num_embeddings=V)
    loss.sum().backward()
    torch.testing.assert_close(loss.view(-1), want, rtol=1e-12, atol=1e-12)
    check_grads(split, dense, tp)
    for wrong in (-1, V, V + 1):                                       # V + 1: a row of padding
        bad = ids.clone()
        bad[1, 0] = wrong
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {V}\), the vocabulary, got {wrong}$"):
            split.embed(bad)
        with pytest.raises(ValueError, match=rf"targets must be in .* -100, which counts as none, got {wrong}$"):
            vocab_parallel_cross_entropy(split.head(h.detach()), bad, tp, num_embeddings=V)
    rows = split.embed.weight.pieces[0].length
    assert not split.head.weight.grad[rows:].any(), "padding rows must have no gradient"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("t", [2, 3, 4])
def test_vocabulary(t, sp, tied):
    run(t, _vocab, t, sp, tied)


def _fused(rank, t):
    """Fused q, k, v with fewer key heads than ranks: each part equals its own dense layer, replicas sum their gradients."""
    torch.manual_seed(2)
    x = torch.randn(S, B, D, dtype=torch.float64)
    parts = {"q_proj": (16, 4), "k_proj": (8, 2), "v_proj": (8, 2)}
    make = lambda tp: fill(ColumnParallelLinear(D, tp=tp, parts=parts, bias=True, dtype=torch.float64))  # noqa: E731
    dense, split = make(Axis("tp")), make(axis(t))
    want = dense(x).split(dense.sizes, -1)
    weights = [torch.randn_like(w) for w in want]
    dense(x).backward(torch.cat(weights, -1))
    got = split(x).split(split.sizes, -1)
    ups = []
    for y, w, up, piece in zip(got, want, weights, split.weight.pieces):
        span = slice(piece.start, piece.start + piece.length)
        torch.testing.assert_close(y, w[..., span], rtol=1e-12, atol=1e-12)
        ups.append(up[..., span] / piece.copies)                      # each replica sends its share of the gradient
    torch.cat(got, -1).backward(torch.cat(ups, -1))
    check_grads(split, dense, axis(t))


@pytest.mark.parametrize("t", [2, 4])
def test_fused_parts_with_replicated_heads(t):
    run(t, _fused, t)


def test_construction_errors():
    parts = {"gate_proj": (16, 16), "up_proj": (16, 16)}
    for given in ({"out_features": 999, "parts": parts}, {}, {"parts": {}}, {"out_features": 32, "parts": parts}):
        with pytest.raises(ValueError, match=r"ColumnParallelLinear: exactly one of out_features and parts must be given, got "
                                             rf"out_features={given.get('out_features')} and parts="):
            ColumnParallelLinear(8, tp=Axis("tp"), **given)
    with pytest.raises(ValueError, match=r"parts must add up to the 33 output features .*got 32"):
        ColumnParallelLinear.from_torch(torch.nn.Linear(8, 33), Axis("tp"), parts=parts)
    assert ColumnParallelLinear.from_torch(torch.nn.Linear(8, 32), Axis("tp", 2), parts=parts).sizes == [8, 8]
    with pytest.raises(ValueError, match="3 heads"):
        ColumnParallelLinear(8, tp=Axis("tp", 2), parts={"k_proj": (12, 3)})
    with pytest.raises(ValueError, match="divisible by tp=3"):
        RowParallelLinear(8, 8, tp=Axis("tp", 3))
    with pytest.raises(ValueError, match="must cover the 22 embeddings"):
        VocabParallelEmbedding(22, 8, tp=Axis("tp", 2), rows=10)
