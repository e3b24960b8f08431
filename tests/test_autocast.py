"""Under torch.autocast: ops, parallel layers and models against torch's own under the same autocast on one process: values, every gradient,
and every dtype. Outside, mixed dtypes raise as ever."""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import kept, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from interlace import kernels
from interlace.kernels import add_layer_norm, add_rms_norm, attention, expert_mlp, grouped_gemm, layer_norm, rms_norm, route_plan
from interlace.kernels.comm import ag_gemm, all_reduce, copy_gemm, gemm_ar, gemm_rs, rs_residual_norm
from interlace.models.config import ModelConfig
from interlace.models.gpt import GPT
from interlace.parallel.deferred import Deferred
from interlace.parallel.expert_parallel import MoELayer, RouterOptions
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import gradient_axis, init_parameters, named_pieces, reduce_partial_grads
from interlace.parallel.tensor_parallel import (
    ColumnParallelLinear,
    GatheredLinear,
    ParallelHead,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

S, B, D, F_, V = 8, 2, 16, 24, 22
BF16 = torch.bfloat16
cast = partial(torch.autocast, "cpu", BF16)
one = Axis("tp")


@kept
def mesh(t, ep=1):
    return Mesh.build(Layout(world=t, tp=t, ep=ep))


def rand(*shape, seed=0, grad=False, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


def near(got, want, what="", tolerance=0.01):
    """Equal but for a few roundings to bf16, each of 0.002 of the whole on average, and of one dtype."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, torch's is {want.dtype}"
    assert got.shape == want.shape, f"{what}: {list(got.shape)}, torch's is {list(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    off = float((got - want).norm() / want.norm().clamp(min=1e-6))
    assert off <= tolerance, f"{what}: off by {off:.3g} of the whole"


def gradients(y, *leaves, inside=False):
    """d sum(y * a fixed random tensor), outside autocast or within."""
    with torch.autocast("cpu", BF16, enabled=inside):
        return torch.autograd.grad((y.float() * rand(*y.shape, seed=9)).sum(), leaves)


# ---- ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("op", [copy_gemm, gemm_ar, gemm_rs, ag_gemm, partial(ag_gemm, regather=False)])
def test_products_are_F_linear(op, dtype, inside):
    x, w = rand(S, B, D, grad=True, dtype=dtype), rand(F_, D, seed=1, grad=True)
    with cast():
        got, want = op(x, w), F.linear(x, w)
    near(got, want, "y", 0)
    for name, g, t in zip(("dx", "dw"), gradients(got, x, w, inside=inside), gradients(want, x, w, inside=inside)):
        near(g, t, name)
        assert g.dtype == (dtype if name == "dx" else torch.float32)


def test_outside_and_in_float64_nothing_is_cast():
    x, w = rand(S, B, D), rand(F_, D, seed=1)
    for op in (copy_gemm, gemm_ar, gemm_rs, ag_gemm):
        with pytest.raises(ValueError, match=r"x and w must have one dtype and device, got torch\.bfloat16 on cpu and torch\.float32"):
            op(x.bfloat16(), w)
        with cast():
            assert op(x.double(), w.double()).dtype == torch.float64
            with pytest.raises(ValueError, match="one dtype"):        # F.linear raises too
                op(x.double(), w)
            with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match="one dtype"):
                op(x.bfloat16(), w)
    with torch.autocast("cpu", torch.float16):
        assert copy_gemm(x, w).dtype == torch.float16
    for norm in (partial(rms_norm, x.bfloat16(), x.new_ones(D)), partial(layer_norm, x.bfloat16(), x.new_ones(D), None)):
        with pytest.raises(ValueError, match="one dtype"):
            norm()
        with torch.autocast("cuda", BF16, enabled=torch.cuda.is_available()), pytest.raises(ValueError, match="one dtype"):
            norm()                                                    # of another device


def torch_rms(x, w, b=None):
    return F.rms_norm(x, w.shape, w, 1e-5)


def torch_layer(x, w, b):
    return F.layer_norm(x, w.shape, w, b, 1e-5)


def ours(kind):
    if kind == "rms":
        return lambda x, w, b: rms_norm(x, w, 1e-5), lambda x, r, w, b: add_rms_norm(x, r, w, 1e-5), torch_rms
    return lambda x, w, b: layer_norm(x, w, b, 1e-5), lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-5), torch_layer


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("xd, rd, wd", [
    (BF16, torch.float32, torch.float32), (BF16, BF16, torch.float32), (torch.float32, BF16, torch.float32), (torch.float32,) * 3,
    (BF16,) * 3])
def test_norms_are_torchs(kind, xd, rd, wd, device):
    """F.layer_norm and F.rms_norm take 16-bit x and fp32 weights: on CUDA autocast runs them in fp32, on CPU the result is like x."""
    norm, add, theirs = ours(kind)
    leaves = [t.to(device).detach().requires_grad_() for t in (rand(S, D, dtype=xd), rand(S, D, seed=1, dtype=rd),
                                                              rand(D, seed=2, dtype=wd), rand(D, seed=3, dtype=wd))]
    x, r, w, b = leaves
    params = [w, b] if kind == "layer" else [w]
    up = rand(S, D, seed=9).to(device)
    for name, run_ours, run_torch, of in (("norm", lambda: norm(x, w, b), lambda: theirs(x, w, b), [x]),
                                          ("add", lambda: add(x, r, w, b)[1], lambda: theirs(x + r, w, b), [x, r]),
                                          ("h", lambda: sum(add(x, r, w, b)), lambda: (x + r) + theirs(x + r, w, b), [x, r])):
        with torch.autocast(device, BF16):
            got, want = run_ours(), run_torch()
        if device == "cuda" and kind == "rms":                        # which autocast knows since torch 2.12
            want = want.float()
        near(got, want, name, 0.005)
        for g, t in zip(*(torch.autograd.grad((y.float() * up).sum(), of + params) for y in (got, want))):
            near(g, t, f"gradient of {name}")


def test_attention_is_torchs():
    q, k, v = (rand(S, B, 4, D, seed=s, grad=True) for s in range(3))
    with cast():
        got = attention(q, k, v)
        want = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True).permute(2, 0, 1, 3)
    near(got, want, "o")
    for g, t in zip(gradients(got, q, k, v), gradients(want, q, k, v)):
        near(g, t, "gradient", 0.02)


@pytest.mark.parametrize("reference", [False, True], ids=["", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_experts_take_what_a_linear_gives(dtype, reference):
    E, T = 4, 24
    x, w13, w2 = rand(T, D, grad=True, dtype=dtype), rand(E, 2 * F_, D, seed=1, grad=True), rand(E, D, F_, seed=2, grad=True)
    plan = route_plan(torch.randint(E, (T, 2), generator=torch.Generator().manual_seed(3), dtype=torch.int32), E)
    probs, residual = rand(T, 2, seed=4).abs().requires_grad_(), rand(T, D, seed=5)
    low = [t.detach().to(BF16).requires_grad_() for t in (x, w13, w2)]
    mlp = kernels.expert_mlp_ref if reference else expert_mlp
    want = kernels.expert_mlp(*low, plan, probs, residual.to(BF16))
    with cast():
        got = mlp(*low, plan, probs, residual.to(BF16)) if reference else mlp(x, w13, w2, plan, probs, residual)
        one_product = grouped_gemm(x, w13, plan.offsets, plan)
    near(got, want, "o")
    near(one_product, grouped_gemm(low[0], low[1], plan.offsets, plan), "z", 0)
    if not reference:
        for leaf, g, t in zip((x, w13, w2, probs), gradients(got, x, w13, w2, probs), gradients(want, *low, probs)):
            near(g.to(t.dtype), t, "gradient")
            assert g.dtype == leaf.dtype
    with pytest.raises(ValueError, match="one dtype"):
        expert_mlp(x.to(BF16), w13, w2, plan, probs)
    with pytest.raises(ValueError, match="one dtype"):
        grouped_gemm(x.to(BF16), w13, plan.offsets, plan)


# ---- layers ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Every tensor-parallel linear layer, with biases."""

    def __init__(self, tp, sp):
        super().__init__()
        self.up = ColumnParallelLinear(D, F_, tp=tp, bias=True, sequence_parallel=sp)
        self.down = RowParallelLinear(F_, D, tp=tp, bias=True, sequence_parallel=sp)
        self.out = None if sp else GatheredLinear(D, 10, tp=tp, bias=True)
        for p in self.parameters():
            p.init_std = 0.3
        init_parameters(self, 3)

    def forward(self, x):
        y = self.down(F.gelu(self.up(x)))
        return y if self.out is None else self.out(y)


def dense(net, x):
    y = F.linear(F.gelu(F.linear(x, net.up.weight, net.up.bias)), net.down.weight, net.down.bias)
    return y if net.out is None else F.linear(y, net.out.weight, net.out.bias)


def check_parameters(module, whole, tp, tolerance=0.02):
    reduce_partial_grads(module, tp)
    want = {name: piece.local(p.grad) for name, piece, p in named_pieces(whole)}
    for name, piece, p in named_pieces(module):
        assert p.grad.dtype == p.dtype == torch.float32, name
        near(piece.local(p.grad), piece.of(want[name]), name, tolerance)


def _layers(rank, t, sp, dtype, how):
    x = rand(S, B, D, dtype=dtype)
    mine = (lambda a: a.chunk(t)[rank]) if sp else (lambda a: a)
    whole, net = Net(one, False), Net(mesh(t).tp, sp)
    whole.out = None if sp else whole.out
    xw, xn = x.clone().requires_grad_(), mine(x).clone().requires_grad_()
    up = rand(S, B, D if sp else 10, seed=9)
    with cast():
        want = dense(whole, xw)
        got = checkpoint(net, xn, use_reentrant=how == "reentrant") if how in ("reentrant", "checkpoint") else net(xn)
        if how == "inside":
            (got.float() * mine(up)).sum().backward()
    if how != "inside":
        (got.float() * mine(up)).sum().backward()
    (want.float() * up).sum().backward()
    near(got, mine(want), "y")
    near(xn.grad, mine(xw.grad), "dx", 0.02)
    check_parameters(net, whole, mesh(t).tp)


@pytest.mark.parametrize("sp, dtype, how", [
    (False, torch.float32, ""), (True, torch.float32, ""), (False, BF16, "inside"), (True, BF16, ""), (True, torch.float32, "inside"),
    (False, torch.float32, "checkpoint"), (True, torch.float32, "reentrant")])
def test_layers_are_nn_linear(sp, dtype, how):
    run(2, _layers, 2, sp, dtype, how)


def _vocabulary(rank, t, sp, tied):
    ids, targets = torch.randint(V, (2, S, B), generator=torch.Generator().manual_seed(1))

    def losses(tp, sp):
        embed = VocabParallelEmbedding(V, D, tp=tp, sequence_parallel=sp, init_std=0.5)
        both = nn.ModuleDict({"embed": embed, "head": ParallelHead(embed, tied=tied, init_std=0.3)})
        init_parameters(both, 3)
        with cast():
            h = both["embed"](ids)
            logits = both["head"](h)
            loss = vocab_parallel_cross_entropy(logits, targets, tp, num_embeddings=V)
        loss.sum().backward()
        return both, h, logits, loss
    whole, _, _, want = losses(one, False)
    split, h, logits, got = losses(mesh(t).tp, sp)
    assert h.dtype == torch.float32 and logits.dtype == BF16          # as F.embedding, as F.linear
    near(got, want, "loss")
    with cast():
        stock = F.cross_entropy(F.linear(F.embedding(ids, whole["embed"].weight), whole["head"].weight).float().view(-1, V),
                                targets.view(-1), reduction="none").view(S, B)
    near(got, stock, "torch's loss")
    check_parameters(split, whole, mesh(t).tp)


@pytest.mark.parametrize("sp, tied", [(False, True), (True, False)])
def test_vocabulary(sp, tied):
    run(2, _vocabulary, 2, sp, tied)


def _partial_and_norm(rank, t):
    """rs_residual_norm takes a 16-bit product and an fp32 residual: what torch's addition and norm do with them."""
    tp, x, residual, up = mesh(t).tp, rand(S, B, F_), rand(S, B, D, seed=1), rand(S, B, D, seed=9)

    def of(row, x, residual, split):
        norm, bias = rand(D, seed=2, grad=True), rand(D, seed=3, grad=True)
        out = []
        for b in (None, bias):
            with cast():
                if split:
                    out += rs_residual_norm(row.partial(x), residual, norm, 1e-5, tp.group, bias=b)
                else:
                    h = F.linear(x, row.weight) + residual
                    out += [h, torch_rms(h, norm) if b is None else torch_layer(h, norm, b)]
        return out, (norm, bias)
    row, whole = (RowParallelLinear(F_, D, tp=a, sequence_parallel=True, init_std=0.3) for a in (tp, one))
    for layer in (row, whole):
        init_parameters(layer, 3)
    mine = residual.chunk(t)[rank].clone().requires_grad_()
    got, params = of(row, x.chunk(t, -1)[rank], mine, True)
    residual.requires_grad_()
    want, theirs = of(whole, x, residual, False)
    for g, w in zip(got, want):
        near(g, w.chunk(t)[rank], "h, y")
    sum((g * up.chunk(t)[rank]).sum() for g in got).backward()
    sum((w * up).sum() for w in want).backward()
    near(mine.grad, residual.grad.chunk(t)[rank], "gradient of the residual")
    near(row.weight.grad, whole.weight.grad.chunk(t, -1)[rank], "dw", 0.02)
    for p, w in zip(params, theirs):
        near(all_reduce(p.grad, tp.group), w.grad, "gradient of the norm")


def test_partial_product_and_norm():
    run(2, _partial_and_norm, 2)


@pytest.mark.parametrize("x_dtype", [torch.float32, BF16], ids=str)
def test_deferred_weight_gradients(x_dtype):
    x = rand(S, B, D, grad=True, dtype=x_dtype)
    for layer in (ColumnParallelLinear(D, F_, tp=one, bias=True), RowParallelLinear(D, F_, tp=one)):
        later = copy.deepcopy(layer)
        later.deferred = Deferred()
        for each in (layer, later):
            with cast():
                y = each(x)
            (y.float() * rand(S, B, F_, seed=9)).sum().backward()
        assert later.weight.grad is None
        later.deferred.take()()
        assert later.weight.grad.dtype == torch.float32
        torch.testing.assert_close(later.weight.grad, layer.weight.grad, rtol=0, atol=0)


def _compiled(rank, t, sp):
    net, x = Net(mesh(t).tp, sp), rand(S // t if sp else S, B, D, seed=rank if sp else 0, grad=True)
    norm = nn.Parameter(torch.ones(D))

    def forward(x):
        y, n = net(x), rms_norm(net.down(net.up(x)), norm)
        return y.float().sum() + (n.float() ** 2 * 0.1).sum()
    leaves = [x, norm, *net.parameters()]
    out = []
    for f in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        with cast():
            y = f(x)
        out.append((y, *torch.autograd.grad(y, leaves)))
    for got, want in zip(out[1], out[0]):
        near(got, want, "compiled", 0.02)


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_compiles_in_one_graph(sp):
    run(2, _compiled, 2, sp)


# ---- mixture of experts ------------------------------------------------------------------------------------------


def _moe(rank, t, ep, sp):
    m, x = mesh(t, ep), rand(S, B, D)
    mine = (lambda a: a.chunk(t)[rank]) if sp else (lambda a: a)
    before = nn.Linear(D, D)
    with torch.no_grad():
        before.weight.copy_(rand(D, D, seed=5) * 0.3)
    up = rand(S, B, D, seed=9)

    def run_one(m, sp, x, up, autocast):
        layer = MoELayer(D, F_, 4, RouterOptions(z_loss_coeff=1e-3), m, sequence_parallel=sp, init_std=0.3, output_std=0.3)
        init_parameters(layer, 3)
        with cast():
            h = before(x)
        with torch.autocast("cpu", BF16, enabled=autocast):
            y = layer(h if autocast else h.float())                   # one rounding more, and a token may choose another expert
            fp32 = layer(x)                                           # a norm's output
        (y.float() * up).sum().backward()
        return layer, y, fp32
    truth = run_one(None, False, x, up, False)
    want, got = run_one(None, False, x, up, True), run_one(m, sp, mine(x), mine(up), True)
    assert want[1].dtype == want[2].dtype == BF16                     # as an MLP's
    near(want[2].float(), truth[2], "fp32 in")
    near(got[2], mine(want[2]), "split, fp32 in")
    near(got[1], mine(want[1]), "split")
    for name, p in got[0].named_parameters():
        assert p.grad.dtype == torch.float32, name
    for p, q in zip(want[0].parameters(), truth[0].parameters()):
        near(p.grad, q.grad, "one process", 0.05)
    for p in got[0].parameters():
        axis, scale = gradient_axis(p, m)                             # experts that every rank has: DistributedDataParallel sums them
        p.grad = all_reduce(p.grad, axis.group) * scale if axis.size > 1 else p.grad
    check_parameters(got[0], want[0], m.tp)
    with pytest.raises(ValueError, match="one dtype"):
        got[0](x.to(BF16))


@pytest.mark.parametrize("ep, sp", [(1, False), (2, False), (2, True)])
def test_mixture_of_experts(ep, sp):
    run(2, _moe, 2, ep, sp)


def test_router_scores_stay_fp32():
    layer = MoELayer(D, F_, 8, RouterOptions(), init_std=0.3)
    x, seen = rand(64, 1, D), []
    layer.gate.register_forward_hook(lambda m, args, out: seen.append(out))
    layer(x)
    with cast():
        layer(x)
    assert torch.equal(seen[0].ids, seen[1].ids) and torch.equal(seen[0].probs, seen[1].probs)


# ---- models ------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48, "seq_length": 16,
         "make_vocab_size_divisible_by": 1, "init_method_std": 0.1}


def _gpt(rank, t, sp, more):
    ids, labels = torch.randint(V, (2, 3, 16), generator=torch.Generator().manual_seed(2))

    def loss_of(m, autocast=True, **layout):
        model, seen = GPT(ModelConfig(**SHAPE | more | layout), m, vocab_size=V), set()
        for block in model.layers.values():
            for layer in (block.self_attn.qkv_proj, block.mlp.up):
                layer.register_forward_hook(lambda m, args, y: seen.add(y.dtype))
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = model(ids, labels)
        loss.backward()
        assert seen == {BF16 if autocast else torch.float32}
        return model, loss
    truth, exact = loss_of(None, False)
    whole, want = loss_of(None)
    split, got = loss_of(mesh(t), tensor_model_parallel_size=t, sequence_parallel=sp)
    near(want, exact, "one process", 0.005)
    near(got, want, "loss", 0.005)
    for (name, p), q in zip(whole.named_parameters(), truth.parameters()):
        near(p.grad, q.grad, name, 0.06)
    check_parameters(split, whole, mesh(t).tp, 0.06)


@pytest.mark.parametrize("sp, more", [
    (False, {}), (True, {}), (True, {"normalization": "layernorm", "activation": "gelu", "add_bias_linear": True}),
    (False, {"recompute_granularity": "full", "position_embedding_type": "learned_absolute"})])
def test_gpt(sp, more):
    run(2, _gpt, 2, sp, more)
