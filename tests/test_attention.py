from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import attention, attention_ref
from interlace.kernels.attention import ours
from interlace.kernels.dispatch import INTERPRET, TILES

# S, B, H, G, D: one query, strips and panels that end early, groups, more than a block of keys, heads wider than a panel
SHAPES = [(1, 1, 1, 1, 4), (7, 2, 4, 2, 20), (33, 1, 2, 1, 8), (64, 2, 2, 2, 64), (97, 1, 6, 3, 33), (263, 1, 2, 1, 16), (530, 1, 1, 1, 5),
          (40, 1, 1, 1, 128)]
EMPTY = [(0, 2, 2, 1, 8), (5, 0, 2, 1, 8), (5, 2, 0, 1, 8), (5, 2, 2, 1, 0)]


def _data(S, B, H, G, D, device="cpu"):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(S, B, n, D, generator=g).to(device) for n in (H, G, G, H)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_within_torchs_error(shape, dtype, device):
    q, k, v, do = _data(*shape, device)
    check_budget(attention, attention_ref, [q, k, v], dtype, [do])


@pytest.mark.skipif(INTERPRET or not TILES, reason="of the C++ kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_ours(dtype):
    q, k, v, _ = _data(5, 1, 2, 1, 8)
    assert ours(*(x.to(dtype) for x in (q, k, v))) and not ours(*(x.double() for x in (q, k, v)))
    assert type(attention(q.to(dtype).requires_grad_(), k.to(dtype), v.to(dtype)).grad_fn).__name__ == "EagerBackward"


def test_attention_is_the_formula(device):
    """The reference is torch's kernel: the formula by hand, in float64."""
    q, k, v, _ = (x.double() for x in _data(9, 2, 4, 2, 6, device))
    for b in range(2):
        for h in range(4):
            scores = 0.3 * q[:, b, h] @ k[:, b, h // 2].T + torch.full((9, 9), float("-inf"), dtype=torch.float64, device=device).triu(1)
            want = scores.softmax(-1) @ v[:, b, h // 2]
            torch.testing.assert_close(attention_ref(q, k, v, 0.3)[:, b, h], want)
            torch.testing.assert_close(attention(q.float(), k.float(), v.float(), 0.3)[:, b, h], want.float())


def test_attention_reads_slices_in_place(device):
    """Of a fused qkv buffer, and of torch's [B, heads, S, D]; a gradient in torch's layout too. Torch's own may choose by strides."""
    S, B, H, G, D = 37, 3, 4, 2, 24
    same = torch.equal if device == "cpu" else partial(torch.allclose, rtol=1e-4, atol=1e-5)
    q, k, v, do = _data(S, B, H, G, D, device)
    want = [x.requires_grad_() for x in (q, k, v)]
    y = attention(*want)
    y.backward(do)
    fused = torch.cat([x.detach().reshape(S, B, -1) for x in (q, k, v)], -1).requires_grad_()
    parts = [x.view(S, B, -1, D) for x in fused.split((H * D, G * D, G * D), -1)]
    got = attention(*parts)
    got.backward(do)
    assert same(got, y) and same(fused.grad, torch.cat([x.grad.reshape(S, B, -1) for x in want], -1))
    heads = [x.detach().permute(1, 2, 0, 3).contiguous().requires_grad_() for x in (q, k, v)]
    got = attention(*(x.permute(2, 0, 1, 3) for x in heads)).permute(1, 2, 0, 3)
    got.backward(do.permute(1, 2, 0, 3).contiguous())
    assert same(got, y.permute(1, 2, 0, 3)) and all(same(h.grad, w.grad.permute(1, 2, 0, 3)) for h, w in zip(heads, want))


def test_attention_of_strided_heads_and_expanded_gradients(device):
    q, k, v, _ = _data(12, 2, 2, 2, 16, device)
    both = []
    for fn in (attention, attention_ref):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = fn(*(x[..., ::2] for x in leaves))
        y.sum().backward()
        both.append((y, *(x.grad for x in leaves)))
    for got, want in zip(*both):
        torch.testing.assert_close(got, want)


def test_attention_sees_no_later_key(device):
    q, k, v, do = _data(300, 1, 2, 1, 16, device)
    y = attention(q, k, v)
    for at in (1, 8, 31, 32, 255, 299):
        other = [torch.cat((x[:at], 100 + x[at:])) for x in (q, k, v)]
        assert torch.equal(attention(*other)[:at], y[:at]), at
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        attention(*leaves)[:at].backward(do[:at])
        assert all((x.grad[at:] == 0).all() for x in leaves), at


def test_attention_of_large_scores_is_finite(device):
    """exp of scores of 1e4 overflows: the largest is taken off first."""
    q, k, v, do = _data(40, 1, 2, 2, 16, device)
    leaves = [x.requires_grad_() for x in (1e3 * q, k, v)]
    y = attention(*leaves)
    y.backward(do)
    assert y.isfinite().all() and all(x.grad.isfinite().all() for x in leaves)
    torch.testing.assert_close(y.double(), attention_ref(*(x.detach().double() for x in leaves)), rtol=1e-3, atol=1e-3)


def test_attention_nan_stays_nan(device):
    q, k, v, _ = _data(40, 1, 1, 1, 8, device)
    q[20, 0, 0, 3] = float("nan")
    y = attention(q, k, v)
    assert y[20].isnan().all() and y[21:].isfinite().all() and y[:20].isfinite().all()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_attention_of_nothing(shape, device):
    leaves = [x.requires_grad_() for x in _data(*shape, device)[:3]]
    y = attention(*leaves)
    y.sum().backward()
    assert y.shape == leaves[0].shape and all((x.grad == 0).all() for x in leaves)


def test_attention_repeats_bit_for_bit_whatever_the_batch_and_threads():
    q, k, v, do = _data(70, 3, 4, 2, 24)

    def once(*at):
        leaves = [x[at].detach().requires_grad_() for x in (q, k, v)]
        y = attention(*leaves)
        y.backward(do[at])
        return y, *(x.grad for x in leaves)
    whole, one, threads = once(slice(None)), once(slice(None), slice(1, 2)), torch.get_num_threads()
    try:
        torch.set_num_threads(1 + (threads == 1))
        other = once(slice(None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a[:, 1:2], c) for a, b, c in zip(whole, other, one))


@pytest.mark.skipif(INTERPRET or not TILES, reason="of the C++ kernel")
def test_attention_op_contract():
    q, k, v, do = _data(9, 2, 4, 2, 8)
    torch.library.opcheck(torch.ops.interlace.attention_fwd.default, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), 0.3))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(torch.ops.interlace.attention_bwd.default, (do, q, k, v, *torch.ops.interlace.attention_fwd(q, k, v, 0.3), 0.3))


def test_attention_compiled_is_eager(device):
    q, k, v, do = _data(9, 2, 4, 2, 8, device)
    both = []
    for fn in (attention, torch.compile(attention, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = fn(*leaves)
        y.backward(do)
        both.append((y, *(x.grad for x in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*both))


@pytest.mark.skipif(INTERPRET or not TILES, reason="torch's own has a second derivative")
def test_attention_second_derivative_is_refused():
    q, k, v, _ = (x.requires_grad_() for x in _data(6, 1, 2, 2, 8))
    with pytest.raises(RuntimeError, match="attention: create_graph must be False"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


def test_attention_rejects_misuse(device):
    q, k, v, _ = _data(6, 2, 4, 2, 8, device)
    with pytest.raises(ValueError, match=r"attention: q must be \[S, B, H, D\], k and v .*got \[6, 4, 8\], "):
        attention(q[:, 0], k, v)
    with pytest.raises(ValueError, match=r"k and v \[S, B, G, D\], got \[1, 2, 4, 8\], .*; a shorter q, or another width of v, is for"):
        attention(q[:1], k, v)
    with pytest.raises(ValueError, match=r"k and v \[S, B, G, D\], got .* and \[6, 2, 2, 7\]; "):
        attention(q, k, v[..., :7])
    with pytest.raises(ValueError, match=r"the heads of q must be a multiple of those of k and v, got 3 and 2; each head of k"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match=r"one floating dtype and device, got torch.float32 on .*, torch.float64 on .*; cast or move them"):
        attention(q, k.double(), v)
    with pytest.raises(ValueError, match="one floating dtype"):
        attention(q.int(), k.int(), v.int())


def test_attention_reference_is_torchs(device):
    q, k, v, _ = _data(6, 2, 4, 4, 8, device)
    want = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True)
    assert torch.equal(attention_ref(q, k, v), want.permute(2, 0, 1, 3))
