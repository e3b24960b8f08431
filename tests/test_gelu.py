from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import gelu, gelu_ref
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1,), (3, 7, 25), (5, 1023), (2, 1100), (0, 8), ()]          # one, odd, off by one, two blocks, none, a scalar
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # interpreted: no bf16, no fp64
FORMS = ["none", "tanh"]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gelu_kernel_matches(form, shape, dtype, device):
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device) * 3, torch.randn(shape, device=device)
    check_budget(partial(gelu, approximate=form), partial(gelu_ref, approximate=form), [x], dtype, [dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gelu_of_large_values_kernel_matches(form, dtype, device):
    """x^3 overflows past 7e12, exp(-x^2 / 2) is 0 past 13: the value is x or 0 there, the slope 1 or 0."""
    x = torch.tensor([-6e4, -200.0, -40.0, -20.5, -14.0, -9.0, -5.0, 0.0, 5.0, 9.0, 14.0, 20.5, 200.0, 6e4], device=device)
    check_budget(partial(gelu, approximate=form), partial(gelu_ref, approximate=form), [x], dtype, [torch.ones_like(x)])
    if dtype != torch.float16:
        huge = torch.tensor([-1e30, -1e20, 1e20, 1e30], device=device, dtype=dtype, requires_grad=True)
        y = gelu(huge, form)
        y.sum().backward()
        torch.testing.assert_close((y, huge.grad), (huge.clamp(min=0).detach(), (huge > 0).to(dtype)), rtol=0, atol=1e-200)


@pytest.mark.parametrize("form", FORMS)
def test_gelu_error_over_the_whole_range_kernel_matches(form, device):
    """Against fp64, at most a few ulp of the value where it is not tiny: no cancellation of 1 + erf."""
    x = torch.linspace(-9, 9, 200_001, device=device)
    leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    y, want = gelu(leaf, form), gelu_ref(truth, form)
    y.sum().backward()
    want.sum().backward()
    eps = torch.finfo(torch.float32).eps
    assert ((y.double() - want).abs() <= 8 * eps * want.abs() + 2 * eps * x.abs().clamp(max=1)).all()
    assert (leaf.grad.double() - truth.grad).abs().max() <= 8 * eps


def test_gelu_reference_is_torchs():
    x = torch.randn(50, dtype=torch.float64)
    for form in FORMS:
        assert torch.equal(gelu_ref(x, form), F.gelu(x, approximate=form))
        torch.testing.assert_close(gelu(x, form), F.gelu(x, approximate=form), rtol=1e-13, atol=1e-15)


def test_gelu_nan_stays_nan_kernel_matches(device):
    for form in FORMS:
        assert gelu(torch.full((70,), float("nan"), device=device), form).isnan().all()


def test_gelu_strided_input(device):
    x = torch.randn(6, 5, device=device).t().requires_grad_()
    gelu(x).sum().backward()                                          # an expanded gradient, too
    got, x.grad = x.grad, None
    gelu_ref(x).sum().backward()
    torch.testing.assert_close(got, x.grad)


def test_gelu_op_contract_kernel_matches(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    assert fused(x), "the C++ ops are not built: make setup"
    for tanh in (False, True):
        torch.library.opcheck(torch.ops.interlace.gelu_fwd.default, (x, tanh))
        torch.library.opcheck(torch.ops.interlace.gelu_bwd.default, (torch.randn(4, 64, device=device), x.detach(), tanh))


@pytest.mark.parametrize("form", FORMS)
def test_gelu_compiled_and_repeated_is_the_same(form, device):
    x, dy = torch.randn(33, 129, device=device), torch.randn(33, 129, device=device)
    seen = []
    for fn in (gelu, gelu, torch.compile(gelu, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = fn(leaf, form)
        y.backward(dy)
        seen.append((y, leaf.grad))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


def test_gelu_rejects_misuse(device):
    with pytest.raises(ValueError, match=r"gelu: approximate must be 'none' or 'tanh', got 'erf'; "):
        gelu(torch.randn(2, device=device), "erf")
    with pytest.raises(ValueError, match=r"gelu: x must be floating point, got torch.int64; "):
        gelu(torch.arange(2, device=device))
