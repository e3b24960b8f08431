"""Drop-in on one device: every output and gradient against the stock model in float64, the way back, and what is refused."""
import copy
import io
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from budget import check_budget
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import interlace
from interlace.dropin import product
from interlace.dropin.fused import Fused
from interlace.kernels.comm.gemm import TILES, gemm, pays, torch_keeps
from interlace.parallel.mesh import Axis, Mesh


class Net(nn.Module):
    """Plain torch: both norms, a gated MLP by structure, a loss, and look-alikes that must stay."""

    def __init__(self, D=8):
        super().__init__()
        self.a, self.b, self.c = nn.LayerNorm(D), nn.RMSNorm(D), nn.LayerNorm(D, bias=False, eps=1e-3)
        self.mlp, self.trap = Gated(D), Swapped(D)
        self.scale, self.batch = Scale(D), nn.BatchNorm1d(D)
        self.flat = nn.LayerNorm((3, D))
        self.out = nn.Linear(D, 11)
        self.loss = nn.CrossEntropyLoss(ignore_index=-1)

    def forward(self, x, y):
        h = self.scale(self.c(self.trap(self.b(self.mlp(self.a(x))))))
        logits = self.out(self.flat(h))
        return {"loss": self.loss(logits.flatten(0, 1), y.flatten()), "logits": logits}


class Gated(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(D, 12), nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Gated):
    """Same children, another formula: a list of names would replace it, and be wrong."""

    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * F.silu(self.up_proj(x)))


class Scale(nn.Module):
    """A 1-d weight and an eps, but no norm."""

    def __init__(self, D):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(D)), 1e-5

    def forward(self, x):
        return x * self.weight / (1 + self.eps)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    g = torch.Generator().manual_seed(1)
    return model.to(dtype), (torch.randn(4, 3, 8, generator=g).to(dtype), torch.randint(-1, 11, (4, 3), generator=g))


def run(model, batch):
    model.zero_grad()
    out = model(*batch)
    out["loss"].backward()
    return [out["logits"].detach(), out["loss"].detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


REPLACED = {"a": "layer_norm", "b": "rms_norm", "c": "layer_norm", "mlp": "swiglu", "loss": "cross_entropy"}


def test_plain_torch_and_the_way_back():
    model, batch = net()
    ids, bits, classes = [id(p) for p in model.parameters()], copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    want = run(model, batch)
    seen = []
    model.a.register_forward_hook(lambda *_: seen.append("a"))
    report = interlace.replace_(model)
    assert {r.name: r.kernel.split()[0] for r in report.replaced} == REPLACED
    assert "not down(act(gate(x)) * up(x))" in next(r.why for r in report.left if r.name == "trap")
    for got, w in zip(run(model, batch), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-12, atol=1e-12)
    assert seen == ["a"] and isinstance(model.a, nn.LayerNorm) and list(model.state_dict()) == list(bits)
    assert interlace.verify(model, batch).ok
    again = interlace.replace_(model)
    assert not again.replaced and sum("already" in r.why for r in again) == len(REPLACED)
    interlace.restore_(model)
    assert [type(m) for m in model.modules()] == classes and [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    assert not any("_interlace" in vars(m) for m in model.modules())
    assert all(torch.equal(g, w) for g, w in zip(run(model, batch), want, strict=True))


def test_verify_finds_a_planted_fault():
    model, batch = net()
    interlace.replace_(model)
    model.b._interlace.eps = 0.1
    found = interlace.verify(model, batch)
    assert not found.ok and "NOT EQUAL" in str(found)
    with pytest.raises(ValueError, match="call replace_ first"):
        interlace.verify(net()[0], batch)


def test_verify_leaves_gradients_and_buffers():
    model, batch = net()
    interlace.replace_(model)
    run(model, batch)
    model.batch.running_mean.fill_(3)
    before = [p.grad.clone() if p.grad is not None else None for p in model.parameters()]
    interlace.verify(model, batch)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before, (p.grad for p in model.parameters())))


def test_copies_pickles_and_compiles():
    model, batch = net(torch.float32)
    interlace.replace_(model)
    want = run(model, batch)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert isinstance(other.a, Fused) and all(torch.equal(g, w) for g, w in zip(run(other, batch), want))
        interlace.restore_(other)
        assert type(other.a) is nn.LayerNorm
    out = torch.compile(model, backend="eager", fullgraph=True)(*batch)
    torch.testing.assert_close(out["logits"], want[0])


def test_autocast_and_another_dtype_run_the_original():
    model, (x, y) = net(torch.float32)
    stock = copy.deepcopy(model)
    interlace.replace_(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x, y)["logits"], stock(x, y)["logits"], rtol=0.05, atol=0.1)
    mixed = interlace.replace_(nn.Sequential(nn.LayerNorm(8)).double())
    assert mixed.replaced


def test_choices():
    model, _ = net()
    assert {r.name for r in interlace.replace_(model, kernels={"swiglu"}, dry_run=True).replaced} == {"mlp"}
    assert {r.name for r in interlace.replace_(model, only=["a", "m*"], dry_run=True).replaced} == {"a", "mlp"}
    assert {r.name for r in interlace.replace_(model, skip="loss", dry_run=True).replaced} == set(REPLACED) - {"loss"}
    assert not interlace.replace_(model, kernels="none").replaced and not any(isinstance(m, Fused) for m in model.modules())
    assert "nearest name is 'mlp'" in str(interlace.replace_(model, skip=["mpl"], dry_run=True))
    with pytest.raises(ValueError, match="nearest name is 'mlp'"):
        interlace.replace_(model, skip=["mpl"], strict=True)
    with pytest.raises(ValueError, match="must match a module"):
        interlace.replace_(model, only="mpl")
    with pytest.raises(ValueError, match="did you mean 'swiglu'"):
        interlace.replace_(model, kernels="swigl")
    with pytest.raises(ValueError, match=r"trap: .*skip=\['trap'\]"):
        interlace.replace_(model, strict=True)
    assert not any(isinstance(m, Fused) for m in model.modules()), "left half replaced after an error"


def test_use():
    model, batch = net()
    interlace.replace_(model)
    want = run(model, batch)
    for kernels in ("reference", "original", "auto"):
        with interlace.use(kernels=kernels):
            for got, w in zip(run(model, batch), want, strict=True):
                torch.testing.assert_close(got, w, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="must be 'auto'"), interlace.use("fast"):
        pass


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = self.b = nn.LayerNorm(8)


def test_refusals():
    mixed = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"one dtype.*bfloat16 \(1.weight\)"):
        interlace.replace_(mixed)
    with pytest.raises(ValueError, match="on meta; load them first"):
        interlace.replace_(nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8, device="meta")))
    with pytest.raises(ValueError, match="got one instance at a and b"):
        interlace.replace_(Twice())
    assert not interlace.replace_(Twice(), skip="a").replaced
    with pytest.raises(ValueError, match="OptimizedModule; call replace_ first"):
        interlace.replace_(torch.compile(nn.LayerNorm(8)))
    with pytest.raises(ValueError, match=r"must be a torch.nn.Module"):
        interlace.replace_(3)
    hooked = nn.Sequential(nn.LayerNorm(8))
    hooked[0].forward = lambda x: x
    assert "overridden on the instance" in interlace.replace_(hooked).left[0].why


class Activated(Gated):
    """Gemma's MLP: another activation in the same place."""

    def __init__(self, D, act):
        super().__init__(D)
        self.act = act

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class FusedActivated(nn.Module):
    def __init__(self, D):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(D, 24), nn.Linear(12, D)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.gelu(gate) * up)


def equal_to_stock(model, x):
    """Output and every gradient of the replaced model, in float64."""
    stock = copy.deepcopy(model)
    interlace.restore_(stock)
    both = []
    for m in (model, stock):
        m.zero_grad()
        y = m(x)
        y.square().sum().backward()
        both.append([y, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(*both, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tanh", [False, True], ids=["exact", "tanh"])
def test_gelus_told_apart(tanh):
    act = nn.GELU("tanh" if tanh else "none")
    others = nn.SiLU(), nn.Identity(), nn.Dropout(0.5)
    model = nn.Sequential(Activated(8, act), nn.GELU("none" if tanh else "tanh"), FusedActivated(8), *others).double().eval()
    report = interlace.replace_(model)
    assert {r.name: r.kernel.split()[0] for r in report.replaced} == {
        "0": "gated", "0.act" if tanh else "1": "gelu", "2": "gated"}
    equal_to_stock(model, torch.randn(4, 8, dtype=torch.float64))
    quick = nn.Sequential(Activated(8, lambda x: x * torch.sigmoid(1.702 * x)))
    assert "act being silu or gelu" in interlace.replace_(quick).left[0].why


def test_a_hooked_gate_is_called():
    model, seen = nn.Sequential(Gated(8)).double(), []
    interlace.replace_(model)
    model[0].gate_proj.register_forward_hook(lambda *_: seen.append("gate"))
    equal_to_stock(model, torch.randn(4, 8, dtype=torch.float64))
    assert seen


def rotate(q, k, cos, sin):
    half = lambda x: torch.cat((-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]), -1)  # noqa: E731
    return tuple(x * cos[:, None] + half(x) * sin[:, None] for x in (q, k))


def rotate_other(q, k, cos, sin):
    """Neighbouring pairs: another function of the same signature."""
    half = lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)  # noqa: E731
    return tuple(x * cos[:, None] + half(x) * sin[:, None] for x in (q, k))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.factor = nn.Linear(12, 24), nn.Linear(12, 12), 1

    def tables(self):
        angle = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()
        angle = torch.cat((angle, angle * self.factor), -1)
        return angle.cos(), angle.sin()

    def forward(self, x):
        q, k = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        return torch.cat(rotate(q, k, *self.tables()), 1)


class TurnedOther(Turned):
    def forward(self, x):
        q, k = (p(x).unflatten(-1, (-1, 6)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        return torch.cat(rotate_other(q, k, *self.tables()), 1)


def test_rotary_function_by_what_it_computes():
    model = nn.ModuleDict({"a": Turned(), "b": TurnedOther()}).double()
    report = interlace.replace_(model)
    assert {r.name: r.kernel.split()[0] for r in report.replaced} == {"a": "rope"}
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    equal_to_stock(model["a"], x)
    assert "Permute" in str(model["a"](x).grad_fn.next_functions)
    model["a"].factor = 2                                             # tables that are no rotation: the original function
    equal_to_stock(model["a"], x)
    assert "Add" in str(model["a"](x).grad_fn.next_functions)
    assert rotate.__globals__["rotate"] is rotate, "nothing outside the instance may change"
    copied = pickle.loads(pickle.dumps(nn.Sequential(nn.GELU("tanh"), nn.LayerNorm(8))))
    assert interlace.replace_(copied).replaced and isinstance(pickle.loads(pickle.dumps(copied))[0], Fused)


def test_out_of_vocabulary_raises_like_torch():
    loss = nn.Sequential(nn.CrossEntropyLoss())
    interlace.replace_(loss)
    with pytest.raises(IndexError, match="out of bounds"):
        loss[0](torch.randn(2, 5), torch.tensor([1, 5]))


# ---- linear layers -----------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """transformers' layer under another name: a weight stored [K, N]."""

    def __init__(self, K, N):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(K, N) * 0.1), nn.Parameter(torch.randn(N))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Own(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def linears(D=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Linear(D, D, bias=False), Conv1D(D, D), Own(D, D), nn.Linear(D, D))


@pytest.fixture
def ran(monkeypatch):
    """The layers' product ran: a list of its outputs' shapes. Ours whatever the CPU and the size; in float64 it is torch's below."""
    calls = []

    def counted(x, w):
        calls.append([*x.shape[:-1], w.shape[0]])
        return op(x, w)
    op = product.copy_gemm
    monkeypatch.setattr(product, "copy_gemm", counted)
    monkeypatch.setattr(product, "torch_keeps", lambda w: "")
    monkeypatch.setattr(product, "pays", lambda x, w: True)
    return calls


@pytest.fixture
def amd(monkeypatch):
    """The rule of a CPU on which ours is faster in fp32, and in fp16."""
    if not TILES:
        pytest.skip("needs the C++ kernel")
    module = sys.modules[gemm.__module__]
    monkeypatch.setattr(module, "_AMD", True)
    monkeypatch.setitem(module._FAST, torch.float16, False)


def test_linear_layers_equal_stock_and_the_way_back(ran):
    model, x = linears().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    model[1].weight.requires_grad_(False)
    classes, bits = [type(m) for m in model], copy.deepcopy(model.state_dict())
    model[4].forward = lambda x: nn.Linear.forward(model[4], x)
    report = interlace.replace_(model)
    assert {r.name: r.kernel.split()[0] for r in report.replaced} == {"0": "gemm", "1": "gemm", "2": "gemm"}
    assert "1 linear layers keep torch's product: Own is a class of its own" in report.notes and "overridden" in str(report.notes)
    del model[4].forward
    assert interlace.replace_(model).replaced[0].name == "4"
    for m in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran.clear()
        m(x)
        assert ran == [[2, 3, 8]] * 4
    stock = copy.deepcopy(model)
    interlace.restore_(stock)
    for m in (model, stock):
        m.zero_grad()
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        y.square().sum().backward()
        m.seen = [y, leaf.grad, *(p.grad for p in m.parameters() if p.requires_grad)]
    torch.testing.assert_close(model.seen, stock.seen, rtol=1e-10, atol=1e-10)
    assert model[1].weight.grad is None and model[2].weight.grad.is_contiguous(), "the gradient lies as its weight does"
    assert list(model.state_dict()) == list(bits) and interlace.verify(model, x).ok
    interlace.restore_(model)
    assert [type(m) for m in model] == classes and all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())


def test_a_wrong_product_is_found(ran, monkeypatch):
    model, x = nn.Sequential(nn.Linear(8, 8)).double(), torch.randn(3, 8, dtype=torch.float64)
    interlace.replace_(model)
    assert interlace.verify(model, x).ok
    monkeypatch.setattr(product, "copy_gemm", lambda x, w: x @ w.t() * 1.001)
    assert not interlace.verify(model, x).ok


@pytest.mark.parametrize("dtype, D", [(torch.float32, 512), (torch.float16, 96)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_linear_errs_no_more_than_eager(kind, dtype, D, amd):
    layer = nn.Sequential(nn.Linear(D, D) if kind == "linear" else Conv1D(D, D)).to(dtype)
    assert interlace.replace_(layer).replaced
    g = torch.Generator().manual_seed(3)
    x, w, b, dy = (torch.randn(*s, generator=g) for s in ((512, D), (D, D), (D,), (512, D)))
    assert pays(x.to(dtype), w.to(dtype))
    ours = lambda x, w, b: torch.func.functional_call(layer, {"0.weight": w, "0.bias": b}, x)  # noqa: E731
    check_budget(ours, (lambda x, w, b: F.linear(x, w, b)) if kind == "linear" else (lambda x, w, b: x @ w + b), (x, w, b), dtype, [dy])


def test_where_torchs_product_stays(amd, monkeypatch):
    at = lambda M, K, N, dtype=torch.float32: (torch.empty(M, K, dtype=dtype), torch.empty(N, K, dtype=dtype))  # noqa: E731
    assert pays(*at(512, 512, 512)) and pays(*at(64, 512, 8192)) and pays(torch.empty(2, 256, 512), torch.empty(512, 512))
    assert not pays(*at(1, 512, 32000)) and not pays(*at(31, 4096, 4096)), "a step of generate"
    assert not pays(*at(128, 512, 512)) and not pays(*at(8192, 512, 256)) and not pays(*at(512, 512, 512, torch.float64))
    assert pays(*at(32, 64, 64, torch.float16)) and not pays(*at(8, 512, 512, torch.float16))
    assert not pays(torch.empty(512, 512), torch.empty(512, 512).half()) and not pays(torch.empty(0, 512), torch.empty(512, 512))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not pays(*at(512, 512, 512))
    with interlace.use("reference"):
        assert not pays(*at(512, 512, 512))
    assert "float64" in torch_keeps(at(1, 512, 512, torch.float64)[1]) and "fewer than 512" in torch_keeps(at(1, 8, 512)[1])
    assert not torch_keeps(torch.empty(512, 512, device="meta")) or torch.cuda.is_available()
    monkeypatch.setattr(sys.modules[gemm.__module__], "_AMD", False)
    assert "as fast on this CPU" in torch_keeps(at(1, 512, 512)[1]) and not pays(*at(512, 512, 512))
    assert "as fast on this CPU" in str(interlace.replace_(nn.Sequential(nn.Linear(512, 512))))
    assert not interlace.replace_(nn.Sequential(nn.Linear(512, 512)), strict=True).replaced, "not a reason to refuse"
    assert not interlace.replace_(nn.Sequential(nn.Linear(512, 512)), kernels="rms_norm").notes


def test_what_users_do_to_linear_layers(amd, monkeypatch):
    """Hooks, no_grad, checkpointing, a second derivative, torch.func, forward mode, torch.compile, autocast."""
    calls, op = [], product.copy_gemm
    monkeypatch.setattr(product, "copy_gemm", lambda x, w: calls.append(0) or op(x, w))
    torch.manual_seed(0)
    layer, x, seen = nn.Linear(512, 512), torch.randn(512, 512, requires_grad=True), []
    stock = copy.deepcopy(layer)
    interlace.replace_(layer)
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # noqa: E731
    hook = layer.register_forward_hook(lambda *_: seen.append(0))
    with torch.no_grad():
        near(layer(x), stock(x))
    near(layer(input=x), stock(x))
    assert len(calls) == len(seen) == 2
    hook.remove()
    for m in (layer, stock):
        checkpoint(m, x, use_reentrant=False).square().mean().backward()
        first, = torch.autograd.grad(m(x).square().mean(), x, create_graph=True)
        m.grads = [m.weight.grad, m.bias.grad, *torch.autograd.grad(first.square().sum(), [x, m.weight])]
    near(layer.grads, stock.grads)
    assert len(calls) == 5
    for m in (layer, stock):
        m.grads = torch.func.grad(lambda w, m=m: torch.func.functional_call(m, {"weight": w}, (x,)).sum())(m.weight.detach())
        with torch.autograd.forward_ad.dual_level():
            y = m(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
            m.grads = m.grads, torch.autograd.forward_ad.unpack_dual(y).tangent
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert m(x).dtype == torch.bfloat16
    near(layer.grads, stock.grads)
    near(torch.compile(layer, backend="eager", fullgraph=True)(x), stock(x))
    assert len(calls) == 5, "torch's own forward where ours is unknown to what looks on"


def test_gate_and_up_stay_one_buffer(ran):
    model = nn.Sequential(Gated(8)).double()
    assert {r.kernel.split()[0] for r in interlace.replace_(model).replaced} == {"swiglu", "gemm"}
    equal_to_stock(model, torch.randn(4, 8, dtype=torch.float64))
    assert ran == [[4, 8]], "gate and up go through the buffer, down through its layer"


def test_linear_layers_go_back_before_a_mesh_cuts_them(ran):
    model = linears()
    interlace.replace_(model)
    with pytest.raises(ValueError, match=r"mesh of \{'tp': 2\} needs linear layers as they were, got gemm in 0 and 3 more; call restore_"):
        interlace.replace_(model, Mesh(tp=Axis("tp", 2, 0)))


def test_restore_refuses_what_was_parametrized_since():
    """torch puts a class of its own before ours: without it the weight is gone."""
    model, x = nn.Sequential(nn.RMSNorm(8), nn.LayerNorm(8)), torch.randn(3, 8)
    want = model(x)
    interlace.replace_(model)
    classes = [type(m) for m in model]
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    torch.testing.assert_close(model[0](x), F.rms_norm(x, (8,), torch.ones(8).tanh()))
    with pytest.raises(ValueError, match=r"restore_: 0 must have the class .*, got ParametrizedFusedRMSNorm; remove its param"):
        interlace.restore_(model)
    assert type(model[1]) is classes[1]
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert [type(m) for m in model] == classes
    interlace.restore_(model)
    assert type(model[0]) is nn.RMSNorm and torch.equal(model(x), want)
