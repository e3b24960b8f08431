"""MoELayer against a loop over tokens and experts in float64, written from the formulae alone; over ranks against one process."""
import importlib
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from ranks import kept, run
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from interlace.kernels import jitter_ref
from interlace.kernels.comm import CollectiveMismatch
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.expert_parallel import (
    Experts,
    MoELayer,
    RouterOptions,
    record_routing,
    replay_routing,
    take_statistics,
    update_expert_biases,
)
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import init_parameters, named_pieces, reduce_partial_grads

D, FF, E, SEED = 12, 20, 6, 11


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return x @ self.weight


def layer(options=None, mesh=None, activation="swiglu", experts=E, **more):
    made = MoELayer(D, FF, experts, options or RouterOptions(), mesh, activation=activation, init_std=0.3, output_std=0.3,
                    dtype=torch.float64, seed=SEED, **more)
    init_parameters(made, seed=5)
    return made


def by_hand(x, weights, o, activation="swiglu", first_sample=0):
    """(output, balancing losses, tokens of each expert, dropped slots) of x [S, B, D], one token and one expert at a time."""
    S, B, _ = x.shape
    flat = seen = x.reshape(-1, D)
    if o.input_jitter_eps is not None:                                # of the samples [first_sample .. + B, S, D], one after the other
        noise = jitter_ref(torch.ones(first_sample + B, S, D, dtype=x.dtype), o.input_jitter_eps, SEED)[first_sample:]
        seen = (x * noise.transpose(0, 1)).reshape(-1, D)
    logits = seen @ weights["gate.weight"].t()
    s = logits.softmax(-1) if o.score_function == "softmax" else logits.sigmoid()
    normed = s / s.sum(-1, keepdim=True)
    chosen = [[e for _, e in sorted((-v, e) for e, v in enumerate(row))[:o.topk]] for row in logits.tolist()]
    if o.force_load_balancing:
        chosen = [[(t * o.topk + k) % E for k in range(o.topk)] for t in range(len(flat))]
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
    kinds, coeffs = ((v if isinstance(v, tuple) else (v,)) for v in (o.load_balancing, o.aux_loss_coeff))
    for kind, coeff in zip(kinds, coeffs):
        if kind in ("aux_loss", "global_aux_loss"):                   # of one micro-batch both are the same
            aux = aux + coeff * E / (o.topk * T * T) * (normed.sum(0) * counts.sum(0)).sum()
        elif kind == "seq_aux_loss":
            per = torch.stack([normed[b::B].sum(0) for b in range(B)])
            aux = aux + (coeff * E / (o.topk * S * S) * (per * counts).sum(1)).mean()
    z = o.z_loss_coeff * torch.logsumexp(logits, -1).square().mean()
    return torch.stack(out).view(S, B, D), torch.stack([aux, z]), counts.sum(0), len(slots) - len(kept)


OPTIONS = {
    "softmax": {}, "top 1": {"topk": 1}, "all experts": {"topk": E}, "pre-softmax": {"pre_softmax": True},
    "sigmoid": {"score_function": "sigmoid", "scaling_factor": 2.5},
    "sequence loss, z": {"load_balancing": "seq_aux_loss", "z_loss_coeff": 0.1},
    "no loss": {"load_balancing": "none"}, "capacity by probs": {"capacity_factor": 0.6},
    "capacity by position": {"capacity_factor": 0.6, "drop_policy": "position"}, "capacity of one": {"capacity_factor": 0.01},
    "noise": {"input_jitter_eps": 0.3}, "forced": {"force_load_balancing": True}, "global loss": {"load_balancing": "global_aux_loss"},
    "two losses": {"load_balancing": ("seq_aux_loss", "aux_loss"), "aux_loss_coeff": (0.5, 0.25)},
    "all at once": {"input_jitter_eps": 0.3, "load_balancing": ("global_aux_loss", "seq_aux_loss", "aux_loss"), "z_loss_coeff": 0.1,
                    "aux_loss_coeff": (0.5, 0.25, 0.125), "capacity_factor": 0.7, "pad_expert_input_to_capacity": True,
                    "enable_routing_replay": True},
}


def test_layers_on_their_own_start_apart_and_follow_torch_manual_seed():
    def made():
        torch.manual_seed(5)
        return [MoELayer(D, FF, 4, RouterOptions()) for _ in range(2)]
    (a, b), again = made(), made()[0]
    for name, p in a.named_parameters():
        assert torch.equal(p, again.get_parameter(name)) and not torch.equal(p, b.get_parameter(name)), name


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
    want, losses, counts, dropped = by_hand(xr, weights, o, activation, first_sample=3)
    ((want * g).sum() + losses.sum() * 0.25).backward()
    got = moe(x, 3)
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
    with pytest.raises(ValueError, match=r"topk must be in \[1, 6\], the number of experts, got 7"):
        layer(RouterOptions(topk=E + 1))


@pytest.mark.parametrize("make, wanted", [
    (lambda: layer(activation="relu"), "activation must be swiglu or gelu, got 'relu'"),
    (lambda: layer(shared_gate=True), "shared_gate needs a shared expert to weigh, got shared=None"),
    (lambda: MoELayer(1, 1, 1025, RouterOptions()), r"experts must be in \[1, 1024\]"),
    (lambda: layer(RouterOptions(num_groups=4, group_topk=1)), "num_groups must divide the 6 experts, got 4"),
    (lambda: layer(RouterOptions(num_groups=3, group_topk=1, topk=3)), "must hold topk = 3 experts, got 1 of 2")])
def test_what_no_forward_could_do_is_refused_before(make, wanted):
    with pytest.raises(ValueError, match=wanted):
        make()


def test_a_layer_can_be_made_on_meta():
    """Whose options are checked on the CPU."""
    with torch.device("meta"):
        made = MoELayer(D, FF, E, RouterOptions(score_function="sigmoid", expert_bias=True, num_groups=2, group_topk=1))
    assert made.gate.weight.is_meta


@pytest.mark.parametrize("options, wanted", [
    ({"load_balancing": "sinkhorn"}, "must be of aux_loss, seq_aux_loss, global_aux_loss, none, got 'sinkhorn'"),
    ({"load_balancing": ("aux_loss", "none")}, "must name different losses, or none alone"),
    ({"load_balancing": ("aux_loss", "aux_loss")}, "must name different losses"), ({"load_balancing": ()}, "must name different losses"),
    ({"load_balancing": ("aux_loss", "seq_aux_loss"), "aux_loss_coeff": (0.1,)}, "a number for each .*, got 1 for 2"),
    ({"aux_loss_coeff": -1.0}, "must be >= 0, got -1"), ({"drop_policy": "first"}, "must be probs or position, got 'first'"),
    ({"capacity_factor": 0.0}, "must be above 0, got 0.0"), ({"capacity_factor": float("nan")}, "must be above 0, got nan"),
    ({"pad_expert_input_to_capacity": True}, "needs a capacity_factor, got None"),
    ({"z_loss_coeff": -1.0}, "must be >= 0, got -1.0"), ({"z_loss_coeff": float("nan")}, "must be >= 0, got nan"),
    ({"scaling_factor": 0.0}, "must be above 0, got 0.0"), ({"score_function": "sofmax"}, "one of softmax, .*, got 'sofmax'"),
    ({"num_groups": 2}, "go together .*, got 2 and None"), ({"group_topk": 2}, "go together .*, got None and 2"),
    ({"norm_topk_prob": False}, "needs pre_softmax=True"),
    ({"input_jitter_eps": 1.0}, r"must be in \(0, 1\), got 1.0"), ({"input_jitter_eps": -0.1}, r"must be in \(0, 1\)")], ids=str)
def test_options_are_checked(options, wanted):
    with pytest.raises(ValueError, match=wanted):
        RouterOptions(**options)


def test_noise_is_of_training_alone():
    moe, x = layer(RouterOptions(input_jitter_eps=0.5)), torch.randn(4, 2, D, dtype=torch.float64)
    with torch.no_grad():
        plain = layer()(x)
        assert not torch.equal(moe(x, 0), plain) and not torch.equal(moe(x, 0), moe(x, 1)) and torch.equal(moe(x, 0), moe(x, 0))
        assert torch.equal(moe.eval()(x), plain)


@pytest.mark.parametrize("recompute", [False, True])
def test_global_loss_is_a_running_mean(recompute):
    """Micro-batch m weighs its scores by the load of all from 0 to m; where the step ends, it starts anew. Recompute counts once."""
    moe, xs = layer(RouterOptions(load_balancing="global_aux_loss", aux_loss_coeff=0.5)), torch.randn(3, 4, 2, D, dtype=torch.float64)
    gate = moe.gate.weight.detach().clone().requires_grad_()
    for _ in range(2):
        moe.zero_grad()
        gate.grad, load = None, torch.zeros(E, dtype=torch.float64)
        for m, x in enumerate(xs):
            x = x.requires_grad_()
            o = checkpoint(moe, x, 2 * m, use_reentrant=False) if recompute else moe(x, 2 * m)
            (o * 0).sum().backward()                                  # the loss alone
            s = (x.detach().reshape(-1, D) @ gate.t()).softmax(-1)
            load += torch.zeros_like(s).scatter_(1, s.topk(2).indices, 1.0).sum(0)
            (0.5 * E * (load / load.sum() * s.mean(0)).sum()).backward()
        torch.testing.assert_close(moe.gate.weight.grad, gate.grad, rtol=1e-10, atol=1e-13)
        assert moe.step_load.tolist() == load.tolist() == take_statistics(moe, Mesh())[""].tokens.tolist()
        del o                                                         # and with it the graph
        assert not moe.in_flight


@pytest.mark.parametrize("recompute", [False, True])
def test_replay_takes_the_recorded_choices(recompute):
    """With another gate: the same experts, the new gate's probs, and gradients as if it had chosen them."""
    o = RouterOptions(enable_routing_replay=True, load_balancing="none")
    old, new, x = layer(o), layer(o), torch.randn(4, 2, D, dtype=torch.float64)
    with record_routing(nn.ModuleDict({"mlp": old})) as routes:
        old(x, 6)
    assert list(routes) == ["mlp"] and list(routes["mlp"]) == [6] and routes["mlp"][6].shape == (4, 2, 2)
    with torch.no_grad():
        new.gate.weight.neg_()
    ids = routes["mlp"][6]
    holder = nn.ModuleDict({"mlp": new})
    with replay_routing(holder, routes):
        got = checkpoint(new, x, 6, use_reentrant=False) if recompute else new(x, 6)
    got.square().sum().backward()                                     # recompute comes after the context: its first pass's choices
    weights = {n: piece.local(p).detach().clone().requires_grad_() for n, piece, p in named_pieces(new)}
    flat, want = x.reshape(-1, D), []
    for t, row in enumerate(ids.reshape(-1, 2).tolist()):
        p = (flat[t] @ weights["gate.weight"].t())[row].softmax(-1)
        h = [F.silu(flat[t] @ weights[f"experts.{e}.gate_proj.weight"].t()) * (flat[t] @ weights[f"experts.{e}.up_proj.weight"].t())
             @ weights[f"experts.{e}.down_proj.weight"].t() for e in row]
        want.append(p[0] * h[0] + p[1] * h[1])
    torch.testing.assert_close(got.reshape(-1, D), torch.stack(want), rtol=1e-12, atol=1e-13)
    torch.stack(want).square().sum().backward()
    torch.testing.assert_close(new.gate.weight.grad, weights["gate.weight"].grad, rtol=1e-10, atol=1e-12)
    with replay_routing(holder, routes), pytest.raises(ValueError, match=r"starts at sample 5, got \{6: \[4, 2, 2\]\}"):
        new(x, 5)
    with pytest.raises(ValueError, match=r"set model.moe_enable_routing_replay=true"), record_routing(layer()):
        pass
    with pytest.raises(ValueError, match=r"must name layers of this model, such as mlp, got module\.mlp"), \
            replay_routing(holder, {"module.mlp": routes["mlp"]}):    # those of a wrapper: it chose itself, in silence
        pass


def test_noise_needs_to_know_the_batch():
    """Of a default every step had the same noise."""
    moe, x = layer(RouterOptions(input_jitter_eps=0.1)), torch.randn(4, 2, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="MoELayer: first_sample must be given while dropout or jitter draws"):
        moe(x)
    assert not torch.equal(moe(x, 0), moe(x, 2)) and torch.equal(moe.eval()(x), moe(x, 2))
    with pytest.raises(ValueError, match=r"x must be \[S, B, D\], got \[8, 12\]; of tokens"):
        moe(x.view(8, D))


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
    got = ddp(x, mesh.dp.rank * B)
    (got * got).sum().backward()
    ddp.finish()
    whole = every.clone().requires_grad_()
    for d in range(mesh.dp.size):
        y = one(whole[d], d * B)
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
                                               (4, 2, 2, True), (4, 1, 2, False)])
@pytest.mark.parametrize("name", ["softmax", "sequence loss, z", "capacity by probs", "capacity by position", "forced", "all at once"])
def test_over_ranks_as_one_process(world, tp, ep, sp, name):
    run(world, _over_ranks, world, tp, ep, sp, OPTIONS[name], False)


@pytest.mark.parametrize("options", [{"topk": 1, "load_balancing": "none"}, {"topk": 1, "capacity_factor": 1.0,
                                                                             "pad_expert_input_to_capacity": True}], ids=str)
@pytest.mark.parametrize("world, tp, ep, sp", [(2, 1, 2, False), (2, 2, 2, True), (3, 1, 3, False)])
def test_a_rank_without_a_row(world, tp, ep, sp, options):
    run(world, _over_ranks, world, tp, ep, sp, options, True)


# ---- bad input ------------------------------------------------------------------------------------------------


def _bad_input(rank, world, static):
    mesh = mesh_of(Layout(world, ep=world))
    capacity = {"capacity_factor": 2.0, "drop_policy": "position", "pad_expert_input_to_capacity": True} if static else {}
    moe = layer(RouterOptions(enable_routing_replay=True, **capacity), mesh)
    x = torch.randn(world, 4, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))[rank]
    clean, bad = moe(x).detach(), x.clone()
    if rank == 0:
        bad[1, 1] = torch.nan                                         # its logits are NaN: experts in range, and its output alone is NaN
        bad[2, 0] = torch.inf
    out = moe(bad).detach()
    off = out.isnan().any(-1) if rank == 0 else torch.zeros(4, 2, dtype=torch.bool)
    assert rank or off.nonzero().tolist() == [[1, 1], [2, 0]]
    torch.testing.assert_close(out[~off], clean[~off], rtol=1e-11, atol=1e-13)        # other rows in the products
    out = moe(torch.full_like(x, torch.nan))                          # all to the first experts, whose capacity is for some
    assert out.isnan().any() and (out.isnan().all(-1) | (out == 0).all(-1)).all() and (static or out.isnan().all())
    for shape in ((0, 2, D), (4, 0, D)):                              # no tokens on any rank
        none = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        moe.zero_grad()
        moe(none).sum().backward()
        assert none.grad.shape == shape and not any(p.grad.any() for p in moe.parameters() if p.grad is not None)
    for wrong in (E, -2):
        ids = torch.zeros(4, 2, 2, dtype=torch.int64)
        ids[3, 1, 1] = wrong
        with replay_routing(moe, {"": {0: ids}}), pytest.raises(ValueError, match=r"router: ids must be in \[0, 6\) or -1, got"):
            moe(x)
    if not static:
        with pytest.raises((CollectiveMismatch, ValueError)):         # ranks with unlike numbers of tokens: all of them learn it
            moe(x[:4 - rank])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("static", [False, True])
def test_bad_input_over_ranks(world, static):
    """Nothing hangs, and nothing leaks from one token into another."""
    run(world, _bad_input, world, static)


STATIC = {"capacity_factor": 0.8, "pad_expert_input_to_capacity": True, "input_jitter_eps": 0.1, "z_loss_coeff": 0.1,
          "load_balancing": ("global_aux_loss", "seq_aux_loss"), "aux_loss_coeff": (0.5, 0.25), "enable_routing_replay": True}


def _without_values(rank, world, tp, ep, options, reads, sequence=4):
    """Forward and backward over tensors that have shapes and no data: the host can read nothing, and no shape can depend on it. The
    path is that of CUDA: ops as torch.compile sees them, all-to-all in place of shared memory."""
    mesh = mesh_of(Layout(world, tp=tp, ep=ep)) if world > 1 else Mesh()
    moe, seen = layer(RouterOptions(**options), mesh), None
    heap = mock.patch.object(importlib.import_module("interlace.kernels.comm.dispatch"), "_heap", lambda *_: None)
    with heap, mock.patch("torch.compiler.is_compiling", lambda: True), FakeTensorMode():
        for m in moe.modules():
            m._parameters.update({n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for n, p in m._parameters.items()})
            m._buffers.update({n: torch.empty(b.shape, dtype=b.dtype) for n, b in m._buffers.items() if b is not None})
        x = torch.empty(sequence, 2, D, dtype=torch.float64, requires_grad=True)
        try:
            o = moe(x, 0)
            o.sum().backward()
            assert o.shape == x.grad.shape == x.shape
        except DataDependentOutputException as e:
            seen = e
    assert (seen is not None) == reads, seen


@pytest.mark.parametrize("world, tp, ep", [(1, 1, 1), (2, 1, 2), (2, 2, 2), (2, 2, 1)])
def test_static_capacity_reads_nothing(world, tp, ep):
    """With ep, rows that fit exactly must be counted by the host: the proof's own control."""
    for options, reads in ((STATIC, False), ({**STATIC, "pad_expert_input_to_capacity": False}, ep > 1)):
        if world == 1:
            _without_values(0, world, tp, ep, options, reads)
        else:
            run(world, _without_values, world, tp, ep, options, reads)


def test_more_than_2_to_31_elements():
    """Shapes alone, for want of memory: 3.2e9 numbers pass through the layer; 2^31 slots and more are refused before anything runs."""
    _without_values(0, 1, 1, 1, STATIC, False, sequence=2**27)
    with pytest.raises(ValueError, match=r"slots and rows must be fewer than 2.31, got 2147483648 slots; route fewer tokens at once"):
        _without_values(0, 1, 1, 1, STATIC, False, sequence=2**29)


def _static_is_dropping(rank, world, tp, ep, sp, drop, lopsided):
    mesh = mesh_of(Layout(world, tp=tp, ep=ep))
    every = torch.randn(mesh.dp.size, 4, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).abs()
    results = []
    for pad in (False, True):
        o = RouterOptions(capacity_factor=0.6, drop_policy=drop, pad_expert_input_to_capacity=pad)
        moe = layer(o, mesh, sequence_parallel=sp, experts=8)
        if lopsided:
            with torch.no_grad():
                moe.gate.weight.zero_()
                moe.gate.weight[0] = 1.0
        x = (every[mesh.dp.rank].chunk(tp)[mesh.tp.rank] if sp else every[mesh.dp.rank]).clone().requires_grad_()
        y = moe(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, *(p.grad for p in moe.parameters()), take_statistics(moe, mesh)[""].dropped))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and results[0][-1] > 0


@pytest.mark.parametrize("lopsided", [False, True])
@pytest.mark.parametrize("drop", ["probs", "position"])
@pytest.mark.parametrize("world, tp, ep, sp", [(2, 1, 2, False), (2, 2, 2, True), (2, 2, 1, False), (4, 2, 4, False)])
def test_static_capacity_drops_the_same(world, tp, ep, sp, drop, lopsided):
    """Outputs, gradients and counts bit for bit."""
    run(world, _static_is_dropping, world, tp, ep, sp, drop, lopsided)
