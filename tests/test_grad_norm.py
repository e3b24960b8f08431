"""grad_norm against exact sums: where fp32 sums err, with factors, in every type, whatever the number of threads."""
import math

import pytest
import torch
from torch.library import opcheck

from interlace.kernels import grad_norm, grad_square_sum, grad_square_sum_ref

SIZES = [1, 40, 0, 333, 16384, 50001]


def grads(dtype, device="cpu"):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(n, generator=g).mul(0.01).to(device, dtype) for n in SIZES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernel_matches_exact_sum(dtype, device):
    many, factors = grads(dtype, device), [1.0, 0.5, 3.0, 1 / 3, 0.25, 1.0]
    want = math.fsum(f * x * x for f, t in zip(factors, many) for x in t.double().tolist())
    for got in (grad_square_sum(many, factors), grad_square_sum_ref(many, factors)):
        assert got.shape == (1,) and got.dtype == torch.float64 and got.device.type == device
        assert got.item() == pytest.approx(want, rel=1e-14)
    norm = grad_norm(many)
    assert norm.shape == () and norm.item() == pytest.approx(math.sqrt(math.fsum(x * x for t in many for x in t.tolist())), rel=1e-14)


def test_kernel_matches_where_fp32_sums_do_not(device):
    """2^24 ones and a 4096: an fp32 sum stops at 2^24."""
    ones = torch.ones(2**18, device=device)
    assert grad_square_sum([ones] * 64 + [torch.full((1,), 4096.0, device=device)]).item() == 2**18 * 64 + 2**24


def test_kernel_matches_mixed_types_and_shapes(device):
    many = [torch.full((3, 5), 2.0, device=device), torch.full((4,), 3.0, device=device, dtype=torch.bfloat16),
            torch.full((2, 6), 1.0, device=device, dtype=torch.float64).t()]
    assert grad_square_sum(many, 0.5).item() == 0.5 * (15 * 4 + 4 * 9 + 12)
    assert grad_square_sum([], []).item() == 0 and grad_norm([torch.zeros(0, device=device)]).item() == 0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_kernel_matches_what_is_not_finite(value, device):
    t = torch.zeros(20000, device=device)
    t[17003] = value
    assert not math.isfinite(grad_norm([t]).item())


def test_repeatable_for_any_number_of_threads():
    many, threads, seen = grads(torch.float32) * 5, torch.get_num_threads(), set()
    for n in (1, 2, 3, 4):
        torch.set_num_threads(n)
        seen.add(grad_square_sum(many).item())
    torch.set_num_threads(threads)
    assert len(seen) == 1


def test_opcheck():
    opcheck(torch.ops.interlace.grad_square_sum.default, (grads(torch.float32), [1.0] * len(SIZES)))


def test_refusal():
    with pytest.raises(ValueError, match="one number for each of the 2 gradients, got 1"):
        grad_norm([torch.ones(2), torch.ones(3)], [1.0])
