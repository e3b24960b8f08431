import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import swiglu, swiglu_ref
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1, 2), (3, 7, 250), (4, 128), (17, 2046), (2, 2200), (0, 8), (3, 0)]   # 2200: two blocks
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # interpreted: no bf16, no fp64


def _data(shape, device):
    torch.manual_seed(0)
    return torch.randn(shape, device=device) * 3, torch.randn(*shape[:-1], shape[-1] // 2, device=device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_kernel_matches(shape, dtype, device):
    x, dy = _data(shape, device)
    check_budget(swiglu, swiglu_ref, [x], dtype, [dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_swiglu_large_gates_kernel_matches(dtype, device):
    """exp(-gate) overflows below -88.7: silu and its slope are 0 there, and 1 * gate and 1 far above."""
    gate = torch.tensor([-1e4, -200.0, -104.0, -89.0, -88.0, -17.0, 0.0, 17.0, 89.0, 200.0, 1e4], device=device)
    check_budget(swiglu, swiglu_ref, [torch.cat((gate, torch.ones_like(gate)))], dtype, [torch.ones_like(gate)])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu_with_probs_kernel_matches(shape, dtype, device):
    x, dy = _data(shape, device)
    check_budget(swiglu, swiglu_ref, [x, torch.randn(shape[:-1], device=device)], dtype, [dy])


def test_swiglu_probs_of_zero_keep_their_gradient_kernel_matches(device):
    x, dy = _data((5, 34), device)
    p = torch.zeros(5, device=device, requires_grad=True)
    y = swiglu(x, p)
    y.backward(dy)
    assert (y == 0).all()
    torch.testing.assert_close(p.grad, (dy * swiglu_ref(x)).sum(-1))


def test_swiglu_backward_writes_the_output_again_kernel_matches(device):
    x, dy = _data((5, 34), device)
    p = torch.rand(5, device=device)
    for probs in (p, None):
        dx, dp, y = torch.ops.interlace.swiglu_probs_bwd(dy, x, probs)
        leaf = x.clone().requires_grad_()
        want = swiglu(leaf, probs)
        want.backward(dy)
        assert dp.numel() == (5 if probs is not None else 0)
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(dx, leaf.grad)


def test_swiglu_with_probs_in_float64_is_exact():
    x, p = torch.randn(3, 10, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x, p))


def test_swiglu_nan_stays_nan_kernel_matches(device):
    y = swiglu(torch.tensor([float("nan"), 1.0, 1.0, float("nan")] * 16, device=device).view(16, 4))
    assert y.isnan().all()


@pytest.mark.skipif(INTERPRET, reason="of the C++ exponential")
def test_swiglu_exponential_within_two_ulp():
    """silu(g) / g = 1 / (1 + exp(-g)) shows exp's own error where exp(-g) is large: the quotient adds 1.5 ulp."""
    gate = -torch.linspace(0, 87, 1 << 18)
    y = swiglu(torch.stack((gate, torch.ones_like(gate)), -1))[:, 0]
    truth = gate.double() * torch.sigmoid(gate.double())
    normal = truth.abs() > torch.finfo(torch.float32).tiny
    assert ((y.double() - truth).abs() / truth.abs())[normal].max() <= 3.5 * torch.finfo(torch.float32).eps


def test_swiglu_reference_is_torchs():
    x, _ = _data((6, 34), "cpu")
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu_ref(x), F.silu(gate) * up)


def test_swiglu_non_contiguous_input(device):
    x = torch.randn(6, 5, device=device).t().requires_grad_()
    swiglu(x).sum().backward()                                        # an expanded gradient, too
    got, x.grad = x.grad, None
    swiglu_ref(x).sum().backward()
    torch.testing.assert_close(swiglu(x), swiglu_ref(x))
    torch.testing.assert_close(got, x.grad)


def test_swiglu_op_contract_kernel_matches(device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    assert fused(x), "the C++ ops are not built: make setup"
    torch.library.opcheck(torch.ops.interlace.swiglu_fwd.default, (x,))
    p, dy = torch.rand(4, device=device, requires_grad=True), torch.randn(4, 32, device=device)
    torch.library.opcheck(torch.ops.interlace.swiglu_fwd.default, (x, p))
    torch.library.opcheck(torch.ops.interlace.swiglu_probs_bwd.default, (dy, x.detach(), p.detach()))


def test_swiglu_compiled_is_eager(device):
    x, dy = _data((6, 48), device)
    both = []
    for fn in (swiglu, torch.compile(swiglu, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = fn(leaf)
        y.backward(dy)
        both.append((y, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_swiglu_repeats_bit_for_bit(device):
    x, dy = _data((33, 258), device)
    def once():
        leaf = x.clone().requires_grad_()
        y = swiglu(leaf)
        y.backward(dy)
        return y, leaf.grad
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_swiglu_rejects_misuse(device):
    with pytest.raises(ValueError, match=r"swiglu: the last dimension of gate_up must be even, got \[2, 7\]; "):
        swiglu(torch.randn(2, 7, device=device))
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match=r"swiglu: probs must be floating \[2\], one for each row"):
        swiglu(torch.randn(2, 6, device=device), torch.ones(3, device=device))
