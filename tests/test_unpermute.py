import dataclasses

import pytest
import torch
from budget import check_budget
from test_permute import CASES, KERNEL_DTYPES
from test_permute import case as permute_case

from interlace.kernels import permute, route_plan, unpermute, unpermute_ref
from interlace.kernels.dispatch import fused


def _case(name, device):
    """y with NaN where nothing may read, a plan, probs with NaN where dropped, residual, shared."""
    x, plan = permute_case(name, device)
    y, probs = torch.randn(plan.rows, x.shape[1], device=device), torch.randn(plan.row_of_slot.shape, device=device)
    return y, plan, probs, x, torch.randn_like(x)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_unpermute_kernel_matches(name, dtype, device):
    y, plan, probs, residual, shared = _case(name, device)
    do = torch.randn_like(residual)
    check_budget(lambda y: unpermute(y, plan), lambda y: unpermute_ref(y, plan), [y], dtype, [do])
    check_budget(lambda y, p: unpermute(y, plan, p), lambda y, p: unpermute_ref(y, plan, p), [y, probs], dtype, [do])
    check_budget(lambda y, p, r, s: unpermute(y, plan, p, r, s), lambda y, p, r, s: unpermute_ref(y, plan, p, r, s),
                 [y, probs, residual, shared], dtype, [do])
    check_budget(lambda y, s: unpermute(y, plan, shared=s), lambda y, s: unpermute_ref(y, plan, shared=s), [y, shared], dtype, [do])


def test_reference_is_the_formula():
    plan = route_plan(torch.tensor([[1, 0], [-1, 1], [0, 0]]), 2, capacity=2)   # token 2: its second copy is dropped
    y = torch.arange(plan.rows * 2.0).reshape(-1, 2)
    p, r, s = torch.rand(3, 2), torch.rand(3, 2), torch.rand(3, 2)
    want = torch.stack([p[0, 0] * y[2] + p[0, 1] * y[0], p[1, 1] * y[3], p[2, 0] * y[1]]) + s + r
    torch.testing.assert_close(unpermute_ref(y, plan, p, r, s), want)


def test_what_is_dropped_or_padding_is_never_read_kernel_matches(device):
    y, plan, probs, _, _ = _case("capacity", device)
    clean = unpermute(y, plan, probs)
    y[plan.slot_of_row < 0] = float("nan")
    probs[plan.row_of_slot < 0] = float("nan")
    ys, ps = y.clone().requires_grad_(), probs.clone().requires_grad_()
    o = unpermute(ys, plan, ps)
    assert torch.equal(o, clean)
    o.sum().backward()
    assert (ys.grad[plan.slot_of_row < 0] == 0).all() and (ps.grad[plan.row_of_slot < 0] == 0).all()
    assert ys.grad.isfinite().all() and ps.grad.isfinite().all()


def test_zero_probs_keep_their_gradient_kernel_matches(device):
    y, plan, _, _, _ = _case("plain", device)
    probs = torch.zeros(plan.row_of_slot.shape, device=device, requires_grad=True)
    unpermute(y, plan, probs).sum().backward()
    want = [[y[r].sum().item() if r >= 0 else 0.0 for r in rows] for rows in plan.row_of_slot.tolist()]
    torch.testing.assert_close(probs.grad.cpu(), torch.tensor(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [1024, 1000])
def test_rows_past_the_cache(H, dtype):
    """Sizes that take the streaming stores, whole vectors and not."""
    plan = route_plan(torch.randint(-1, 8, (2200, 3)), 8, align=16)
    check_budget(lambda y, p: unpermute(y, plan, p), lambda y, p: unpermute_ref(y, plan, p),
                 [torch.randn(plan.rows, H), torch.rand(2200, 3)], dtype, [torch.randn(2200, H)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_passes_as_it_is(dtype):
    """One row of all bit patterns through load, times one, and rounding: NaN stays NaN, all else keeps its bits."""
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    plan = route_plan(torch.zeros(1, 1, dtype=torch.int64), 1)
    o = unpermute(y, plan)
    nan = y.isnan()
    assert torch.equal(o.isnan(), nan) and torch.equal(torch.where(nan, 0, o), torch.where(nan, 0, y))
    third = unpermute(y, plan, torch.full((1, 1), 1 / 3))
    assert torch.equal(torch.where(nan, 0, third), torch.where(nan, 0, (y.float() * torch.tensor(1 / 3)).to(dtype)))


def test_rows_past_2_to_31_elements():
    """A row that begins behind element 2^31. Only what is written costs memory: the rows between are never touched."""
    R, H = 32770, 65536
    y, probs = torch.empty(R, H, dtype=torch.float16), torch.tensor([[0.5, 0.25]])
    y[0], y[R - 1] = torch.arange(H) % 7, torch.arange(H) % 5
    slots = torch.full((R,), -1, dtype=torch.int32)
    slots[0], slots[R - 1] = 0, 1
    plan = dataclasses.replace(route_plan(torch.zeros(1, 2, dtype=torch.int64), 1), slot_of_row=slots,
                               row_of_slot=torch.tensor([[0, R - 1]], dtype=torch.int32))
    assert (R - 1) * H > 2**31 and torch.equal(unpermute(y, plan, probs)[0], (0.5 * y[0].float() + 0.25 * y[R - 1].float()).half())


def test_a_token_does_not_depend_on_its_batch(device):
    y, plan, probs, residual, _ = _case("odd", device)
    o = unpermute(y, plan, probs, residual)
    for t in range(0, 17, 5):
        rows = plan.row_of_slot[t]
        kept = rows >= 0
        alone = route_plan(torch.where(kept, torch.arange(3, device=device), -1)[None], 3)
        at = torch.where(alone.slot_of_row < 0, 0, rows[alone.slot_of_row.long()])
        assert torch.equal(unpermute(y[at.long()], alone, probs[t:t + 1], residual[t:t + 1]), o[t:t + 1])


def test_repeats_bit_for_bit(device):
    y, plan, probs, residual, shared = _case("odd", device)
    def once():
        leaves = [t.clone().requires_grad_() for t in (y, probs, residual, shared)]
        o = unpermute(leaves[0], plan, *leaves[1:])
        o.square().sum().backward()
        return o, *(t.grad for t in leaves)
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_gradients_in_float64_are_exact():
    y, plan, probs, residual, shared = (t.double() if torch.is_tensor(t) else t for t in _case("odd", "cpu"))
    leaves = [t.requires_grad_() for t in (y, probs, residual, shared)]
    assert torch.autograd.gradcheck(lambda y, p, r, s: unpermute(y[:, :7], plan, p, r[:, :7], s[:, :7]), leaves)
    x = residual.detach()[:, :5].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, p: permute(x, plan, p), (x, probs))


def test_out_is_written(device):
    y, plan, probs, residual, shared = _case("capacity", device)
    out = torch.full_like(residual, float("nan"))
    assert unpermute(y, plan, probs, residual, shared, out=out) is out
    assert torch.equal(out, unpermute(y, plan, probs, residual, shared))


def test_probs_of_another_dtype(device):
    y, plan, probs, _, _ = _case("plain", device)
    half, wide = probs.half().requires_grad_(), probs.half().float().requires_grad_()
    a, b = unpermute(y, plan, half), unpermute(y, plan, wide)
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    assert half.grad.dtype == torch.float16 and torch.equal(half.grad, wide.grad.half())


def test_compiles_whole():
    def layer(x, ids, scores):
        plan = route_plan(ids, 4, align=4)
        y, moved = permute(x, plan, scores)
        return unpermute(torch.tanh(y) * moved[:, None], plan, scores, residual=x)

    def given(x, plan, scores):
        return unpermute(permute(x, plan), plan, scores)

    ids = torch.randint(0, 4, (10, 2))
    plan = route_plan(ids, 4)
    for fn, second in ((layer, ids), (given, plan)):
        results = []
        for run in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(0)
            x, s = torch.randn(10, 8, requires_grad=True), torch.rand(10, 2, requires_grad=True)
            o = run(x, second, s)
            o.square().sum().backward()
            results.append((o, x.grad, s.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def test_unpermute_op_contract_kernel_matches(device):
    for name in ("plain", "capacity", "no tokens"):
        y, plan, probs, residual, shared = _case(name, device)
        row, slot = plan.row_of_slot, plan.slot_of_row
        assert fused(y, row), "the C++ ops are not built: make setup"
        out = torch.empty_like(residual)
        torch.library.opcheck(torch.ops.interlace.unpermute_out.default, (y, probs, residual, shared, row, slot, out))
        torch.library.opcheck(torch.ops.interlace.unpermute_bwd.default, (residual, y, probs, row, slot))
        y, probs, residual = (t.requires_grad_() for t in (y, probs, residual))
        torch.library.opcheck(torch.ops.interlace.unpermute_fwd.default, (y, probs, residual, shared, row, slot))
        torch.library.opcheck(torch.ops.interlace.unpermute_fwd.default, (y, None, None, None, row, slot))


def test_rejects_misuse(device):
    y, plan, probs, residual, _ = _case("plain", device)
    learned = probs.clone().requires_grad_()
    for message, kw in {"R = 26 rows, got": {"y": y[1:]}, r"probs must be floating \[13, 2\]": {"probs": probs[:, :1]},
                        "residual must be": {"residual": residual[1:]}, "shared must be": {"shared": residual.double()},
                        "out must be a contiguous": {"out": y}, "out must be None": {"out": residual, "probs": learned}}.items():
        with pytest.raises(ValueError, match=message):
            unpermute(**{"y": y, "plan": plan, **kw})
