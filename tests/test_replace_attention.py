"""replace_: causal attention of somebody else's module by our kernel, and only what that serves."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import interlace
from interlace.dropin import attention as dropin
from interlace.kernels.dispatch import INTERPRET, TILES

pytestmark = pytest.mark.skipif(INTERPRET or not TILES, reason="torch's attention stays where the C++ kernel is not built")


class Block(nn.Module):
    """As in nanoGPT: torch's attention, called by name."""

    def __init__(self, heads=4, groups=4, dim=32, dropout=0.0, causal=True):
        super().__init__()
        self.heads, self.groups, self.dropout, self.causal, width = heads, groups, dropout, causal, dim // heads
        self.qkv, self.out = nn.Linear(dim, (heads + 2 * groups) * width), nn.Linear(heads * width, dim)

    def forward(self, x, mask=None):
        B, S, _ = x.shape
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).view(B, S, self.heads + 2 * self.groups, -1).split(
            (self.heads, self.groups, self.groups), 2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0, is_causal=self.causal,
                                           scale=0.3, enable_gqa=self.heads != self.groups)
        return self.out(y.transpose(1, 2).reshape(B, S, -1))


@pytest.fixture
def ran(monkeypatch):
    """The calls of our kernel."""
    calls, real = [], dropin.attention
    monkeypatch.setattr(dropin, "WORK", 16 * 60 * 60)                 # small enough for these
    monkeypatch.setattr(dropin, "attention", lambda *a: calls.append(a[0].shape) or real(*a))
    return calls


def _step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def _as_stock(model, x, ran, served=True):
    stock = copy.deepcopy(model)
    report = interlace.replace_(model, kernels=["attention"])
    assert [r.kernel for r in report.replaced] == ["attention (C++)"], report
    torch.manual_seed(3)
    want = _step(stock, x)
    torch.manual_seed(3)
    got = _step(model, x)
    assert bool(ran) == served
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-4 * served, atol=1e-4 * served)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_plain_module(groups, batch, ran):
    torch.manual_seed(0)
    _as_stock(Block(groups=groups), torch.randn(batch, 70, 32), ran)
    assert ran == [(70, batch, 4, 8)]


@pytest.mark.parametrize("case", ["dropout", "not causal", "few tokens"])
def test_what_it_does_not_serve_is_torchs(case, ran):
    torch.manual_seed(0)
    _as_stock(Block(dropout=0.5 * (case == "dropout"), causal=case != "not causal"), torch.randn(2, 8 if case == "few tokens" else 70, 32),
              ran, served=False)


def test_other_dtypes(ran):
    """Autocast's products are bf16, and so is attention over them; float64 is torch's."""
    model, x = Block(), torch.randn(2, 70, 32)
    stock = copy.deepcopy(model)
    interlace.replace_(model, kernels="attention")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), stock(x), rtol=0.02, atol=0.02)
    assert len(ran) == 1
    assert torch.equal(model.double()(x.double()), stock.double()(x.double())) and len(ran) == 1
    assert not interlace.replace_(stock, kernels="attention").replaced


class Plain(nn.Module):
    """No product that autocast would cast before the call; the result is looked at as rows, which torch's kernel leaves in memory."""

    def forward(self, x):
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return y.transpose(1, 2).view(-1, 32)


def test_autocast_casts_what_comes_in_fp32(ran):
    """As in torch's function, one dtype whatever came: rotated q and k are fp32 beside v in bf16."""
    model, x = Plain(), torch.randn(2, 70, 32, requires_grad=True)
    stock = Plain()
    interlace.replace_(model, kernels="attention")
    grads = []
    for m in (model, stock):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(y.float().square().sum(), x)[0])
    assert len(ran) == 1
    torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)
    with dropin.Causal(), torch.autocast("cpu", torch.bfloat16):
        q = torch.randn(1, 2, 64, 8)
        assert F.scaled_dot_product_attention(q, q, q.bfloat16(), is_causal=True).dtype == torch.bfloat16 and len(ran) == 2


def test_the_result_lies_in_memory_as_torchs(ran):
    model, x = Plain(), torch.randn(3, 70, 32)
    stock = Plain()
    interlace.replace_(model, kernels="attention")
    torch.testing.assert_close(model(x), stock(x))
    assert len(ran) == 1


def test_with_flash_kernels_switched_off_it_is_torchs(ran):
    """torch's math has a second derivative, and who asks for it by sdpa_kernel gets it."""
    model, x = Block(), torch.randn(1, 64, 32, requires_grad=True)
    stock = copy.deepcopy(model)
    interlace.replace_(model, kernels="attention")
    with sdpa_kernel(SDPBackend.MATH):
        first = [torch.autograd.grad(m(x).square().sum(), x, create_graph=True)[0] for m in (model, stock)]
        assert torch.equal(*(torch.autograd.grad(g.square().sum(), x)[0] for g in first)) and not ran
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(x)
    assert len(ran) == 1


def test_a_compiled_part_and_nested_tensors_are_torchs(ran):
    q = torch.randn(1, 2, 64, 8)
    part = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True) * 2, backend="aot_eager", fullgraph=True)
    with dropin.Causal():
        torch.testing.assert_close(part(q), 2 * F.scaled_dot_product_attention(q, q, q, is_causal=True))
        assert len(ran) == 1
        ragged = torch.nested.nested_tensor([q[0], q[0, :, :9]])
        with pytest.raises(RuntimeError, match=r"Nested tensors .* not supported when is_causal=True"):
            F.scaled_dot_product_attention(ragged, ragged, ragged, is_causal=True)


def test_a_mask_and_a_shorter_query_are_torchs(ran):
    model, x = Block(causal=False), torch.randn(2, 70, 32)
    stock, mask = copy.deepcopy(model), torch.ones(70, 70, dtype=torch.bool).tril()
    interlace.replace_(model, kernels="attention")
    assert torch.equal(model(x, mask), stock(x, mask)) and not ran
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 4, 70, 8)
    with dropin.Causal():
        for args in ((q, k, k), (q, q, q[..., :4]), (q[0], q[0], q[0]), (q, k[:, :1, :64], k[:, :1, :64])):
            try:
                want = torch._C._nn.scaled_dot_product_attention(*args, is_causal=True)
            except RuntimeError:
                continue
            assert torch.equal(F.scaled_dot_product_attention(*args, is_causal=True), want)
    assert not ran


def test_chosen_undone_and_copied(ran):
    model, x = nn.Sequential(Block(), Block()), torch.randn(1, 64, 32)
    want = model(x)
    assert not interlace.replace_(copy.deepcopy(model), kernels=["rms_norm", "rope"]).replaced
    assert len(interlace.replace_(model, only="0").replaced) == 1
    torch.testing.assert_close(copy.deepcopy(model)(x), want)
    assert len(ran) == 1
    with interlace.use(kernels="original"):
        assert torch.equal(model(x), want)
    with interlace.use(kernels="reference"):
        torch.testing.assert_close(model(x), want)
    assert len(ran) == 1
    interlace.restore_(model)
    assert type(model[0]) is Block and torch.equal(model(x), want) and len(ran) == 1


def test_compiled_is_the_original(ran):
    model, x = Block(), torch.randn(1, 64, 32)
    interlace.replace_(model, kernels="attention")
    want = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), want)
    assert len(ran) == 1


# ---- Hugging Face ------------------------------------------------------------------------------------------------

SERVED = ("llama", "qwen2", "qwen3", "phi3", "gpt2", "mixtral", "qwen3_moe", "olmoe")


@pytest.mark.parametrize("name", [*SERVED, "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_hugging_face(name, ran):
    """No further from float64 than stock; windows, sinks, soft caps and values of another width are torch's."""
    pytest.importorskip("transformers")
    from hf import make, sample, step, twin
    model, batch = make(name, torch.float32), sample(4, 33)
    truth = step(twin(model).double(), batch)
    error = lambda got: sum(float((got[n].double() - t).norm() / t.norm()) for n, t in truth.items()) / len(truth)  # noqa: E731
    stock = error(step(model, batch))
    report = interlace.replace_(model)
    assert sum("attention" in r.kernel.replace("(C++)", "").split(", ")[-1] for r in report.replaced) == 2, report
    ours = error(step(model, batch))
    assert ours <= 1.25 * stock, f"{ours:.3g} against {stock:.3g} of stock"
    assert len(ran) == (2 if name in SERVED else 0), ran


def test_padding_is_torchs_and_generate_agrees(ran):
    pytest.importorskip("transformers")
    from hf import make, sample, twin
    model, ids = make("llama", torch.float32), sample(2, 40)["input_ids"]
    stock, mask = twin(model), torch.ones_like(ids)
    interlace.replace_(model)
    words = lambda m, mask: m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)  # noqa: E731
    assert torch.equal(words(model, mask), words(stock, mask)) and len(ran) == 2, "the prompt by ours, one token after another by torch's"
    mask[0, :5] = 0
    assert torch.equal(words(model, mask), words(stock, mask)) and len(ran) == 2
