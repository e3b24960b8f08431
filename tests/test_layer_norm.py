from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1, 1), (3, 7, 250), (4, 128), (17, 1023), (0, 8), (5, 8197)]   # one element, odd rank, aligned, off by one, no rows, two passes
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # interpreted: no bf16, no fp64


def _budget(ours, ref, inputs, dtype, seeds):
    """With one element a row rstd is 316 at eps = 1e-5, and magnifies the last bit of g - mean(g): eps = 1 there."""
    eps = 1.0 if inputs[0].shape[-1] == 1 else 1e-5
    check_budget(partial(ours, eps=eps), partial(ref, eps=eps), inputs, dtype, seeds)


def _data(shape, device, n, bias=True):
    torch.manual_seed(0)
    b = torch.randn(shape[-1], device=device) if bias else None
    return [torch.randn(shape, device=device) for _ in range(n)], torch.randn(shape[-1], device=device), b


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_kernel_matches(shape, dtype, bias, device):
    (x, dy), w, b = _data(shape, device, 2, bias)
    _budget(layer_norm, layer_norm_ref, [x, w, b], dtype, [dy])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_layer_norm_kernel_matches(shape, dtype, bias, device):
    (x, r, dh, dy), w, b = _data(shape, device, 4, bias)
    _budget(add_layer_norm, add_layer_norm_ref, [x, r, w, b], dtype, [dh, dy])


def test_layer_norm_far_from_zero_kernel_matches(device):
    """Mean 1000, deviation 1: E[x^2] - E[x]^2 would lose 20 of the 24 bits."""
    (x, dy), w, b = _data((5, 515), device, 2)
    check_budget(layer_norm, layer_norm_ref, [x + 1000, w, b], torch.float32, [dy])


def test_layer_norm_reference_is_torchs():
    (x, r), w, b = _data((6, 33), "cpu", 2)
    torch.testing.assert_close(layer_norm_ref(x, w, b), F.layer_norm(x, (33,), w, b))
    torch.testing.assert_close(add_layer_norm_ref(x, r, w, None)[1], F.layer_norm(x + r, (33,), w))


def test_layer_norm_non_contiguous_input(device):
    x, r = torch.randn(6, 5, device=device).t(), torch.randn(6, 5, device=device).t()
    w, b = torch.randn(12, device=device)[::2], torch.randn(12, device=device)[1::2]
    torch.testing.assert_close(layer_norm(x, w, b), layer_norm_ref(x, w, b))
    torch.testing.assert_close(add_layer_norm(x, r, w, b), add_layer_norm_ref(x, r, w, b))


@pytest.mark.parametrize("used", [0, 1], ids=["h", "y"])
def test_add_layer_norm_one_output_used(used, device):
    (x, r, d), w, b = _data((5, 40), device, 3)
    grads = []
    for fn in (add_layer_norm, add_layer_norm_ref):
        leaves = [t.clone().requires_grad_() for t in (x, r, w, b)]
        fn(*leaves)[used].backward(d)
        grads.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    torch.testing.assert_close(*grads)


def test_layer_norm_op_contract_kernel_matches(device):
    x, r = (torch.randn(4, 64, device=device, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(64, device=device, requires_grad=True) for _ in range(2))
    assert fused(x, w), "the C++ ops are not built: make setup"
    ops = torch.ops.interlace
    for bias in (b, None):
        torch.library.opcheck(ops.layer_norm_fwd.default, (x, w, bias, 1e-5))
        torch.library.opcheck(ops.add_layer_norm_fwd.default, (x, r, w, bias, 1e-5))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_layer_norm_compiled_is_eager(bias, device):
    """Tracing takes the registered op, eager the Function: one result, one set of gradients."""
    (x, r, dh, dy), w, b = _data((6, 48), device, 4, bias)
    both = []
    for fn in (add_layer_norm, torch.compile(add_layer_norm, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, r, w, b) if t is not None]
        outs = fn(*leaves, *([] if bias else [None]))
        torch.autograd.backward(outs, (dh, dy))
        both.append([*outs, *(t.grad for t in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_layer_norm_repeats_bit_for_bit(device):
    (x, dy), w, b = _data((33, 129), device, 2)
    def once():
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        layer_norm(*leaves).backward(dy)
        return [t.grad for t in leaves]
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_layer_norm_rejects_misuse(device):
    x, w = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    with pytest.raises(ValueError, match=r"layer_norm: w must be \[8\].*got \[4\]; "):
        layer_norm(x, w[:4], None)
    with pytest.raises(ValueError, match=r"layer_norm: b must be \[8\].*got \[1, 8\]; "):
        layer_norm(x, w, w[None])
    with pytest.raises(ValueError, match=r"add_layer_norm: x and b must have one dtype, got .*; cast"):
        add_layer_norm(x, x, w, w.double())
    with pytest.raises(ValueError, match=r"add_layer_norm: residual must be \[2, 8\].*got \[2, 7\]"):
        add_layer_norm(x, x[:, :7], w, w)
