"""MoELayer against a loop over tokens and experts in float64, written from the formulae alone; over ranks against one process."""
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import kept, run
from torch import nn

from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.expert_parallel import Experts, MoELayer, RouterOptions, take_statistics, update_expert_biases
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import init_parameters, named_pieces, reduce_partial_grads

D, FF, E = 12, 20, 6


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return x @ self.weight


def layer(options=None, mesh=None, activation="swiglu", **more):
    made = MoELayer(D, FF, E, options or RouterOptions(), mesh, activation=activation, init_std=0.3, output_std=0.3, dtype=torch.float64,
                    **more)
    init_parameters(made, seed=5)
    return made


def by_hand(x, weights, o, activation="swiglu"):
    """(output, balancing losses, tokens of each expert, dropped slots) of x [S, B, D], one token and one expert at a time."""
    S, B, _ = x.shape
    flat = x.reshape(-1, D)
    logits = flat @ weights["gate.weight"].t()
    s = logits.softmax(-1) if o.score_function == "softmax" else logits.sigmoid()
    normed = s / s.sum(-1, keepdim=True)
    chosen = [[e for _, e in sorted((-v, e) for e, v in enumerate(row))[:o.topk]] for row in logits.tolist()]
    slots = [(t, k, e) for t, row in enumerate(chosen) for k, e in enumerate(row)]
    probs = {}
    for t, row in enumerate(chosen):
        p = logits[t, row].softmax(-1) if o.score_function == "softmax" and not o.pre_softmax else s[t, row]
        if o.score_function == "sigmoid":
            p = p / p.sum()
        for k in range(o.topk):
            probs[t, k] = p[k] * o.scaling_factor
    kept = set()
    capacity = len(slots) if o.capacity_factor is None else math.ceil(len(slots) / E * o.capacity_factor)
    for e in range(E):
        mine = [(t, k) for t, k, other in slots if other == e]
        if o.drop_policy == "probs":
            mine.sort(key=lambda tk: (-probs[tk].item(), tk))
        kept |= {(t, k, e) for t, k in mine[:capacity]}
    out = [torch.zeros(D, dtype=torch.float64)] * len(flat)
    for t, k, e in slots:
        if (t, k, e) in kept:
            up = flat[t] @ weights[f"experts.{e}.up_proj.weight"].t()
            h = F.silu(flat[t] @ weights[f"experts.{e}.gate_proj.weight"].t()) * up if activation == "swiglu" else F.gelu(up)
            out[t] = out[t] + probs[t, k] * (h @ weights[f"experts.{e}.down_proj.weight"].t())
    counts = torch.zeros(B, E, dtype=torch.float64)
    for t, _, e in slots:
        counts[t % B, e] += 1
    T, aux = len(flat), torch.zeros((), dtype=torch.float64)
    if o.load_balancing == "aux_loss":
        aux = o.aux_loss_coeff * E / (o.topk * T * T) * (normed.sum(0) * counts.sum(0)).sum()
    elif o.load_balancing == "seq_aux_loss":
        per = torch.stack([normed[b::B].sum(0) for b in range(B)])
        aux = (o.aux_loss_coeff * E / (o.topk * S * S) * (per * counts).sum(1)).mean()
    z = o.z_loss_coeff * torch.logsumexp(logits, -1).square().mean()
    return torch.stack(out).view(S, B, D), torch.stack([aux, z]), counts.sum(0), len(slots) - len(kept)


OPTIONS = {
    "softmax": {}, "top 1": {"topk": 1}, "all experts": {"topk": E}, "pre-softmax": {"pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid", "scaling_factor": 2.5},
    "sequence loss, z": {"load_balancing": "seq_aux_loss", "z_loss_coeff": 0.1},
    "no loss": {"load_balancing": "none"}, "capacity by probs": {"capacity_factor": 0.6},
    "capacity by position": {"capacity_factor": 0.6, "drop_policy": "position"}, "capacity of one": {"capacity_factor": 0.01},
}


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_is_the_formula(name, activation):
    o = RouterOptions(**{"aux_loss_coeff": 0.5, **OPTIONS[name]})
    moe = layer(o, activation=activation)
    moe.loss_scale = 0.25
    x = torch.randn(5, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g = torch.randn(5, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights = {n: piece.local(p).detach().clone().requires_grad_() for n, piece, p in named_pieces(moe)}
    xr = x.detach().clone().requires_grad_()
    want, losses, counts, dropped = by_hand(xr, weights, o, activation)
    ((want * g).sum() + losses.sum() * 0.25).backward()
    got = moe(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    (got * g).sum().backward()
    torch.testing.assert_close(x.grad, xr.grad, rtol=1e-10, atol=1e-12)
    for n, piece, p in named_pieces(moe):
        wanted = torch.zeros_like(weights[n]) if weights[n].grad is None else weights[n].grad
        torch.testing.assert_close(piece.local(p.grad), wanted, rtol=1e-10, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")
    seen = take_statistics(moe, Mesh())[""]
    assert torch.equal(seen.tokens.double(), counts) and seen.dropped == dropped
    torch.testing.assert_close(seen.losses, losses.detach() * 0.25)
    assert take_statistics(moe, Mesh())[""].tokens.sum() == 0         # asked twice: it starts anew


def test_shared_expert_with_a_gate():
    x = torch.randn(4, 2, D, dtype=torch.float64)
    plain, shared = layer(), layer(shared=Shared(), shared_gate=True)
    with torch.no_grad():
        extra = Shared()(x) * torch.sigmoid(x @ shared.shared_expert_gate.weight.t())
        torch.testing.assert_close(shared(x), plain(x) + extra)


def test_losses_do_not_change_the_output_and_evaluation_counts_nothing():
    x = torch.randn(4, 2, D, dtype=torch.float64)
    with torch.no_grad():
        on, off = layer(RouterOptions(z_loss_coeff=9.0, aux_loss_coeff=9.0)), layer(RouterOptions(load_balancing="none"))
        assert torch.equal(on(x), off(x))
    assert take_statistics(on, Mesh())[""].tokens.sum() == 0


def test_bias_moves_against_the_load():
    moe = layer(RouterOptions(score_function="sigmoid", expert_bias=True, topk=1))
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[2] = 1.0                                      # positive inputs: all tokens to expert 2
    x = torch.rand(8, 1, D, dtype=torch.float64) + 0.1
    moe(x.requires_grad_()).sum().backward()
    seen = take_statistics(moe, Mesh())
    assert seen[""].tokens.tolist() == [0, 0, 8, 0, 0, 0] and seen[""].imbalance == 6.0
    update_expert_biases(moe, seen, 0.5)
    assert moe.gate.expert_bias.tolist() == [0.5, 0.5, -0.5, 0.5, 0.5, 0.5]
    assert "gate.expert_bias" in moe.state_dict() and "tokens_per_expert" not in moe.state_dict()


@pytest.mark.parametrize("shape", [(0, 2, D), (3, 0, D)])
def test_no_tokens(shape):
    moe = layer(RouterOptions(z_loss_coeff=0.1))
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    moe(x).sum().backward()
    assert x.grad.shape == shape and all(torch.equal(p.grad, torch.zeros_like(p)) for p in moe.parameters())


def test_one_expert_gets_all_and_nan_stays_with_its_token():
    moe = layer(RouterOptions(topk=1, load_balancing="none"))
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[4] = 1.0
    x = torch.rand(6, 1, D, dtype=torch.float64) + 0.1
    clean = moe(x).detach()
    x[2] = torch.nan
    y = moe(x).detach()
    assert y[2].isnan().all()
    torch.testing.assert_close(y[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]], rtol=1e-12, atol=1e-14)   # a row fewer in the product


def test_experts_must_divide():
    with pytest.raises(ValueError, match=r"num_experts must be divisible by ep=4, got 6; use another number"):
        Experts(D, FF, 6, ep=Axis("ep", 4, 0, (0, 1, 2, 3)))
    with pytest.raises(ValueError, match="topk"):
        layer(RouterOptions(topk=E + 1))(torch.zeros(2, 1, D, dtype=torch.float64))


# ---- over ranks -----------------------------------------------------------------------------------------------

mesh_of = kept(Mesh.build)


def _over_ranks(rank, world, tp, ep, sp, options, lopsided):
    """Every rank of dp has other samples; tp ranks share them. Output, gradients and statistics of one process with all samples, where
    each micro-batch (a dp rank's samples) routes on its own."""
    mesh = mesh_of(Layout(world, tp=tp, ep=ep))
    o, S, B = RouterOptions(**options), 4, 2
    every = torch.randn(mesh.dp.size, S, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    one, moe = layer(o), layer(o, mesh, sequence_parallel=sp)
    if lopsided:                                                      # all tokens to the first expert: no row for the other ranks
        with torch.no_grad():
            for m in (one, moe):
                m.gate.weight.zero_()
                m.gate.weight[0] = 1.0
        every = every.abs() + 0.1
    ddp = DistributedDataParallel(moe, mesh)
    for m in (one, moe):
        m.loss_scale = 1.0
    x = every[mesh.dp.rank].clone()
    mine = slice(mesh.tp.rank * S // tp, (mesh.tp.rank + 1) * S // tp) if sp else slice(None)
    x = x[mine].requires_grad_()
    got = ddp(x)
    (got * got).sum().backward()
    ddp.finish()
    whole = every.clone().requires_grad_()
    for d in range(mesh.dp.size):
        y = one(whole[d])
        (y * y).sum().backward()
        if d == mesh.dp.rank:
            torch.testing.assert_close(got, y[mine], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, whole.grad[mesh.dp.rank][mine], rtol=1e-10, atol=1e-12)
    reduce_partial_grads(moe, mesh.tp, lambda p: [(0, p.main_grad.view(-1))])
    want = {n: piece.local(p.grad) for n, piece, p in named_pieces(one)}
    for n, piece, p in named_pieces(moe):
        torch.testing.assert_close(piece.local(p.main_grad) * mesh.dp.size, want[n], rtol=1e-10, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")
    seen, true = take_statistics(moe, mesh)[""], take_statistics(one, Mesh())[""]
    assert torch.equal(seen.tokens, true.tokens) and seen.dropped == true.dropped
    torch.testing.assert_close(seen.losses, true.losses / mesh.dp.size, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("world, tp, ep, sp", [(2, 1, 2, False), (2, 2, 1, False), (2, 2, 2, False), (2, 2, 2, True), (3, 1, 3, False),
                                               (4, 2, 2, True)])
@pytest.mark.parametrize("name", ["softmax", "sequence loss, z", "capacity by probs", "capacity by position"])
def test_over_ranks_as_one_process(world, tp, ep, sp, name):
    run(world, _over_ranks, world, tp, ep, sp, OPTIONS[name], False)


@pytest.mark.parametrize("world, tp, ep, sp", [(2, 1, 2, False), (2, 2, 2, True), (3, 1, 3, False)])
def test_a_rank_without_a_row(world, tp, ep, sp):
    run(world, _over_ranks, world, tp, ep, sp, {"topk": 1, "load_balancing": "none"}, True)
