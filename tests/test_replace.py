"""Drop-in on one device: every output and gradient against the stock model in float64, the way back, and what is refused."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import interlace
from interlace.dropin.fused import Fused


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
