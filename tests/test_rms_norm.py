from functools import partial

import pytest
import torch
from budget import DTYPES, check_budget

from interlace.kernels import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1, 1), (3, 7, 250), (4, 128), (17, 1023), (0, 8), (5, 8197)]   # one element, odd rank, aligned, off by one, no rows, two passes
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # the interpreter truncates to bf16, has no fp64


def _data(shape, device, n):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device) for _ in range(n)], torch.randn(shape[-1], device=device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_kernel_matches(shape, dtype, device):
    (x, dy), w = _data(shape, device, 2)
    check_budget(rms_norm, rms_norm_ref, [x, w], dtype, [dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm_kernel_matches(shape, dtype, device):
    (x, r, dh, dy), w = _data(shape, device, 4)
    check_budget(add_rms_norm, add_rms_norm_ref, [x, r, w], dtype, [dh, dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_offset_kernel_matches(shape, dtype, device):
    """Gemma's 1 + w, with weights so small that 1 + w has no room for them in 16 bits."""
    (x, r, dh, dy), w = _data(shape, device, 4)
    check_budget(partial(rms_norm, offset=1.0), partial(rms_norm_ref, offset=1.0), [x, w / 512], dtype, [dy])
    check_budget(partial(add_rms_norm, offset=1.0), partial(add_rms_norm_ref, offset=1.0), [x, r, w / 512], dtype, [dh, dy])


def test_reference_is_the_formula():
    x, w = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    rms = (12.5 + 1e-6) ** 0.5
    torch.testing.assert_close(rms_norm_ref(x, w), torch.tensor([[3 / rms, 8 / rms]]))
    torch.testing.assert_close(rms_norm_ref(x, w, offset=1.0), torch.tensor([[6 / rms, 12 / rms]]))


def test_non_contiguous_input(device):
    x, w = torch.randn(6, 5, device=device).t(), torch.randn(12, device=device)[::2]
    torch.testing.assert_close(rms_norm(x, w), rms_norm_ref(x, w))


def test_rms_norm_op_contract_kernel_matches(device):
    x, w = torch.randn(4, 64, device=device, requires_grad=True), torch.randn(64, device=device, requires_grad=True)
    assert fused(x, w), "the C++ ops are not built: make setup"
    torch.library.opcheck(torch.ops.interlace.rms_norm_fwd.default, (x, w, 1e-6))
    torch.library.opcheck(torch.ops.interlace.rms_norm_fwd.default, (x, w, 1e-6, 1.0))
    torch.library.opcheck(torch.ops.interlace.add_rms_norm_fwd.default, (x, x.detach().clone().requires_grad_(), w, 1e-6))


def test_repeats_bit_for_bit(device):
    (x, dy), w = _data((33, 129), device, 2)
    def once():
        xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
        rms_norm(xs, ws).backward(dy)
        return xs.grad, ws.grad
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_rejects_misuse(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(ValueError, match=r"w must be \[8\]"):
        rms_norm(x, torch.randn(4, device=device))
    with pytest.raises(ValueError, match="one dtype"):
        rms_norm(x, torch.randn(8, device=device, dtype=torch.float64))
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, torch.randn(2, 7, device=device), torch.randn(8, device=device))
