from functools import partial

import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import gated, gated_ref, swiglu
from interlace.kernels.dispatch import INTERPRET, fused
from interlace.kernels.gated import ACTIVATIONS

SHAPES = [(1, 1), (3, 7, 125), (4, 64), (17, 1023), (2, 1100), (0, 8), (3, 0), (5,)]   # 1100: two blocks
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # interpreted: no bf16, no fp64
TORCH = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def _data(shape, device):
    torch.manual_seed(0)
    return torch.randn(shape, device=device) * 3, torch.randn(shape, device=device), torch.randn(shape, device=device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_kernel_matches(activation, shape, dtype, device):
    gate, up, dy = _data(shape, device)
    ours, ref = (partial(fn, activation=activation) for fn in (gated, gated_ref))
    check_budget(ours, ref, [gate, up], dtype, [dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_large_gates_kernel_matches(activation, dtype, device):
    gate = torch.tensor([-1e4, -200.0, -104.0, -89.0, -88.0, -17.0, 0.0, 17.0, 89.0, 200.0, 1e4], device=device)
    ours, ref = (partial(fn, activation=activation) for fn in (gated, gated_ref))
    check_budget(ours, ref, [gate, torch.ones_like(gate)], dtype, [torch.ones_like(gate)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_reference_is_torchs(activation):
    gate, up, _ = _data((6, 17), "cpu")
    torch.testing.assert_close(gated_ref(gate, up, activation), TORCH[activation](gate) * up)


def test_gated_halves_of_one_tensor_are_read_in_place_kernel_matches(device):
    both, dy = torch.randn(4, 3, 34, device=device), torch.randn(4, 3, 17, device=device)
    ours, want = both.clone().requires_grad_(), both.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved = []
        y = gated(*ours.chunk(2, -1))
    assert {t.untyped_storage().data_ptr() for t in saved} == {ours.untyped_storage().data_ptr()}
    y.backward(dy)
    expected = swiglu(want)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.grad, want.grad)


def test_gated_strided_inputs(device):
    gate, up = (torch.randn(6, 5, device=device).t().requires_grad_() for _ in range(2))
    wide = torch.randn(3, 8, 10, device=device)[:, ::2]               # rows that no single stride leads to
    torch.testing.assert_close(gated(wide, wide), gated_ref(wide, wide))
    gated(gate, up).sum().backward()                                  # an expanded gradient, too
    got, gate.grad = gate.grad, None
    gated_ref(gate, up).sum().backward()
    torch.testing.assert_close(got, gate.grad)


def test_gated_op_contract_kernel_matches(device):
    gate, up = (torch.randn(4, 64, device=device, requires_grad=True) for _ in range(2))
    assert fused(gate, up), "the C++ ops are not built: make setup"
    for act in range(len(ACTIVATIONS)):
        torch.library.opcheck(torch.ops.interlace.gated_fwd.default, (gate, up, act))
        torch.library.opcheck(torch.ops.interlace.gated_bwd.default, (torch.randn(4, 64, device=device), gate.detach(), up.detach(), act))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_compiled_and_repeated_is_the_same(activation, device):
    gate, up, dy = _data((33, 129), device)
    seen = []
    for fn in (gated, gated, torch.compile(gated, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (gate, up)]
        y = fn(*leaves, activation)
        y.backward(dy)
        seen.append((y, *(t.grad for t in leaves)))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


def test_gated_in_float64_is_exact():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda g, u, a=activation: gated(g, u, a), (gate, up))


def test_gated_nan_stays_nan_kernel_matches(device):
    nan, one = torch.full((3, 33), float("nan"), device=device), torch.ones(3, 33, device=device)
    for activation in ACTIVATIONS:
        assert gated(nan, one, activation).isnan().all() and gated(one, nan, activation).isnan().all()


def test_gated_rejects_misuse(device):
    x = torch.randn(2, 6, device=device)
    with pytest.raises(ValueError, match=r"gated: activation must be one of silu, gelu, gelu_tanh, got 'relu'; "):
        gated(x, x, "relu")
    with pytest.raises(ValueError, match=r"gated: gate and up must be .* one shape.* got .*\[2, 6\].*\[2, 5\]"):
        gated(x, x[:, :5])
    with pytest.raises(ValueError, match=r"gated: .* dtype"):
        gated(x, x.double())
