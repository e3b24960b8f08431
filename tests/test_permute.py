import os

import pytest
import torch
from budget import DTYPES, check_budget
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.kernels import permute, permute_ref, route_plan, unpermute
from interlace.kernels.dispatch import INTERPRET, fused

KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # the interpreter truncates to bf16, has no fp64
CASES = {                                                             # T, H, K, E, route_plan's options
    "plain": (13, 64, 2, 4, {}), "one": (1, 1, 1, 1, {}), "odd": (17, 250, 3, 5, {"align": 16}), "no tokens": (0, 8, 2, 4, {}),
    "no tokens, static": (0, 8, 2, 2, {"capacity": 3, "pad_to_capacity": True}), "no columns": (3, 0, 2, 4, {}),
    "capacity": (40, 33, 2, 4, {"capacity": 5, "align": 8}), "all dropped": (5, 16, 2, 3, {"capacity": 0, "align": 4}),
    "many choices": (4, 24, 11, 16, {}), "no choices": (3, 8, 0, 2, {}), "wide": (3, 3000, 2, 4, {"align": 4}),
}


def case(name, device, dtype=torch.float32):
    T, H, K, E, kw = CASES[name]
    torch.manual_seed(0)
    plan = route_plan(torch.randint(-1, E, (T, K)).to(device), E, **kw)
    return torch.randn(T, H).to(device, dtype), plan


def naive(x, plan):
    y = torch.zeros(plan.rows, x.shape[1], dtype=x.dtype, device=x.device)
    for t, rows in enumerate(plan.row_of_slot.tolist()):
        for r in rows:
            if r >= 0:
                y[r] = x[t]
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_permute_kernel_matches(name, dtype, device):
    x, plan = case(name, device, dtype)
    want = naive(x, plan)
    out = torch.full_like(want, float("nan"))                         # stale memory must not show
    assert torch.equal(permute(x, plan), want) and permute(x, plan, out=out) is out and torch.equal(out, want)
    assert torch.equal(permute_ref(x, plan), want)
    probs = torch.rand(plan.row_of_slot.shape, device=device)
    y, moved = permute(x, plan, probs)
    assert torch.equal(y, want) and torch.equal(moved, permute_ref(x, plan, probs)[1])
    for r, slot in enumerate(plan.slot_of_row.tolist()):
        assert moved[r] == (probs.flatten()[slot] if slot >= 0 else 0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_permute_gradients_kernel_matches(name, dtype, device):
    x, plan = case(name, device)
    probs = torch.randn(plan.row_of_slot.shape, device=device)
    seeds = [torch.randn(plan.rows, x.shape[1], device=device), torch.randn(plan.rows, device=device)]
    seeds[0][plan.slot_of_row < 0] = 0
    check_budget(lambda x, p: permute(x, plan, p), lambda x, p: permute_ref(x, plan, p), [x, probs], dtype, seeds)


def test_gradient_ignores_what_padding_holds_kernel_matches(device):
    x, plan = case("capacity", device)
    x.requires_grad_()
    dy = torch.randn(plan.rows, x.shape[1], device=device)
    dy[plan.slot_of_row < 0] = float("nan")
    y = permute(x, plan)
    y.backward(dy)
    want = torch.zeros_like(x)
    for t, rows in enumerate(plan.row_of_slot.tolist()):
        for r in rows:
            if r >= 0:
                want[t] += dy[r]
    assert torch.equal(x.grad, want)


def test_only_one_of_the_gradients(device):
    x, plan = case("plain", device)
    probs = torch.rand(plan.row_of_slot.shape, device=device, requires_grad=True)
    permute(x, plan, probs)[1].sum().backward()
    assert torch.equal(probs.grad, (plan.row_of_slot >= 0).float())
    x.requires_grad_()
    permute(x, plan, probs.detach())[0].sum().backward()
    torch.testing.assert_close(x.grad, (plan.row_of_slot >= 0).sum(1, keepdim=True).float().expand_as(x))


@settings(max_examples=10 if INTERPRET else 80, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(1, 20), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.none() | st.integers(0, 6),
       st.integers(0, 2**31))
def test_round_trip_kernel_matches(T, H, K, E, align, capacity, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(seed)
    plan = route_plan(torch.randint(-1, E, (T, K), generator=g).to(device), E, align, capacity)
    x = torch.randint(-8, 9, (T, H), generator=g).float().to(device)
    y = permute(x, plan)
    assert torch.equal(y, naive(x, plan))
    assert torch.equal(unpermute(y, plan), x * (plan.row_of_slot >= 0).sum(1, keepdim=True))


@pytest.mark.parametrize("H", [1024, 1000])
def test_rows_past_the_cache(H):
    """Sizes that take the streaming stores, whole vectors and not, at an output that is not aligned."""
    plan = route_plan(torch.randint(-1, 8, (1024, 2)), 8, align=16)
    x = torch.randn(1024, H)
    out = torch.empty(plan.rows * H + 3)[3:].view(plan.rows, H)
    assert torch.equal(permute(x, plan, out=out), naive(x, plan)) and torch.equal(permute(x, plan), out)


def test_any_dtype_is_moved(device):
    plan = route_plan(torch.randint(-1, 4, (9, 2), device=device), 4, align=4)
    for dtype in (torch.uint8, torch.int64, torch.float8_e4m3fn):
        x = torch.arange(9 * 16, device=device).reshape(9, 16).to(torch.uint8)
        x = x.view(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
        y = permute(x, plan)
        assert y.dtype == dtype and torch.equal(y.view(torch.uint8), naive(x.view(torch.uint8), plan))


@pytest.mark.slow
@pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 << 30, reason="needs 8 GB of memory")
def test_more_than_2_to_31_elements():
    K, H = 32769, 65536
    plan = route_plan(torch.zeros(1, K, dtype=torch.int64), 1)
    x = torch.arange(H).to(torch.uint8)[None]
    y = permute(x, plan)
    assert y.numel() > 2**31 and torch.equal(y[-1], x[0]) and torch.equal(y[K // 2], x[0])


def test_non_contiguous_input(device):
    plan = route_plan(torch.randint(0, 3, (6, 2), device=device), 3)
    x = torch.randn(5, 6, device=device).t()
    assert torch.equal(permute(x, plan), naive(x, plan))


def test_permute_op_contract_kernel_matches(device):
    for name in ("plain", "capacity", "no tokens"):
        x, plan = case(name, device)
        row, slot = plan.row_of_slot, plan.slot_of_row
        assert fused(x, row), "the C++ ops are not built: make setup"
        x.requires_grad_()
        probs = torch.rand(row.shape, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.interlace.permute_fwd.default, (x, None, row, slot))
        torch.library.opcheck(torch.ops.interlace.permute_fwd.default, (x, probs, row, slot))
        torch.library.opcheck(torch.ops.interlace.permute_out.default, (x.detach(), row, slot, x.new_empty(plan.rows, x.shape[1])))


def test_rejects_misuse(device):
    x, plan = case("plain", device)
    with pytest.raises(ValueError, match="the plan's T = 13, got"):
        permute(x[1:], plan)
    with pytest.raises(ValueError, match=r"probs must be floating \[13, 2\]"):
        permute(x, plan, x[:, :3])
    with pytest.raises(ValueError, match="out must be a contiguous"):
        permute(x, plan, out=torch.empty_like(x))
    with pytest.raises(ValueError, match="out must be None where a gradient is wanted"):
        permute(x.requires_grad_(), plan, out=x.new_empty(plan.rows, x.shape[1]))
