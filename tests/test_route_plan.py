import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interlace.kernels import RoutePlan, from_mask, route_plan, route_plan_ref
from interlace.kernels.dispatch import INTERPRET, fused

FIELDS = [f.name for f in dataclasses.fields(RoutePlan)]
EXAMPLES = settings(max_examples=15 if INTERPRET else 150, deadline=None, derandomize=True)


def brute_force(ids, E, align=1, capacity=None, drop="position", probs=None, pad_to_capacity=False):
    """The docstring's words as Python loops: (counts, routed, offsets, row_of_slot, slot_of_row without its unused tail, invalid)."""
    flat, members = ids.flatten().tolist(), [[] for _ in range(E)]
    for slot, e in enumerate(flat):
        if 0 <= e < E:
            members[e].append(slot)
    routed = [len(m) for m in members]
    if capacity is not None:
        p = probs.flatten().tolist() if drop == "probs" else None
        by = (lambda s: (p[s] == p[s], -p[s] if p[s] == p[s] else 0.0, s)) if p else (lambda s: s)
        members = [sorted(sorted(m, key=by)[:capacity]) for m in members]
    offsets, row_of, slot_of = [0], [-1] * len(flat), []
    for m in members:
        n = capacity if pad_to_capacity else len(m)
        for slot in m:
            row_of[slot] = offsets[-1] + m.index(slot)
        offsets.append(offsets[-1] + -(-n // align) * align)
        slot_of += m + [-1] * (offsets[-1] - offsets[-2] - len(m))
    return [len(m) for m in members], routed, offsets, row_of, slot_of, [sum(e < -1 or e >= E for e in flat)]


def check(plan, ids, E, **kw):
    want = brute_force(ids.cpu(), E, **kw)
    for name, w in zip(FIELDS, want):
        got = getattr(plan, name)
        assert got.dtype == torch.int32 and got.device == ids.device
        assert got.flatten().tolist()[:len(w)] == w, name
    assert plan.row_of_slot.shape == ids.shape
    assert plan.rows >= want[2][-1] and (plan.slot_of_row[want[2][-1]:] == -1).all()


CASES = {
    "plain": (64, 2, 8, {}), "one": (1, 1, 1, {}), "no tokens": (0, 2, 4, {}), "no choices": (3, 0, 4, {}),
    "odd": (37, 3, 5, {"align": 16}),
    "many": (700, 3, 257, {"align": 8}), "capacity": (513, 2, 7, {"capacity": 50}), "nothing fits": (9, 2, 3, {"capacity": 0}),
    "capacity and align": (100, 4, 6, {"capacity": 33, "align": 16}), "by probs": (600, 2, 5, {"capacity": 100, "drop": "probs"}),
    "static": (50, 2, 4, {"capacity": 20, "pad_to_capacity": True, "align": 8}),
    "static, no tokens": (0, 2, 4, {"capacity": 3, "pad_to_capacity": True}),
    "roomy": (50, 2, 4, {"capacity": 10**12}), "by probs, static": (90, 2, 3, {"capacity": 7, "drop": "probs", "pad_to_capacity": True}),
}


def _case(name, device, dtype=torch.int64):
    T, K, E, kw = CASES[name]
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, E, (T, K), generator=g).to(device, dtype)
    if kw.get("drop") == "probs":
        kw = {**kw, "probs": torch.randint(0, 9, (T, K), generator=g).div(8).to(device)}   # many ties
    return ids, E, kw


@pytest.mark.parametrize("name", CASES)
def test_route_plan_kernel_matches(name, device):
    ids, E, kw = _case(name, device)
    assert fused(ids), "the C++ ops are not built: make setup"
    check(route_plan(ids, E, **kw), ids, E, **kw)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    ids, E, kw = _case(name, "cpu")
    check(route_plan_ref(ids, E, **kw), ids, E, **kw)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8], ids=str)
def test_other_integers_kernel_matches(dtype, device):
    ids = torch.randint(0, 8, (33, 2), device=device).to(dtype)
    check(route_plan(ids, 8), ids.long(), 8)
    check(route_plan(ids.t(), 8), ids.t().long(), 8)


@EXAMPLES
@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.none() | st.integers(0, 8), st.booleans(),
       st.booleans(), st.integers(0, 2**31))
def test_any_small_plan_kernel_matches(T, K, E, align, capacity, by_probs, static, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(seed)
    ids, probs = torch.randint(-1, E, (T, K), generator=g).to(device), torch.randint(-2, 3, (T, K), generator=g).float().to(device)
    kw = {"align": align, "capacity": capacity, "pad_to_capacity": static and capacity is not None}
    if by_probs:
        kw |= {"drop": "probs", "probs": probs}
    check(route_plan(ids, E, **kw), ids, E, **kw)
    check(route_plan_ref(ids, E, **kw), ids, E, **kw)


def test_everyone_to_one_expert_kernel_matches(device):
    ids = torch.full((300, 2), 3, device=device)                      # twice for each token
    check(route_plan(ids, 6, align=4), ids, 6, align=4)
    check(route_plan(ids, 6, capacity=11), ids, 6, capacity=11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_probs_stay(dtype, device):
    probs = torch.tensor([[0.5], [float("nan")], [-0.0], [0.0], [float("inf")], [0.5], [-1.0]], dtype=dtype, device=device)
    ids = torch.zeros(7, 1, dtype=torch.int64, device=device)
    for capacity, kept in ((1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (5, [0, 1, 2, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        for plan in (route_plan, route_plan_ref):
            got = plan(ids, 1, capacity=capacity, drop="probs", probs=probs)
            assert got.slot_of_row.tolist() == kept, (plan.__name__, capacity)


def test_threads_do_not_change_the_plan():
    ids, probs = torch.randint(-1, 16, (70_000, 2)), torch.rand(70_000, 2)
    before = torch.get_num_threads()
    try:
        for kw in ({}, {"capacity": 5000}, {"capacity": 5000, "drop": "probs", "probs": probs}):
            plans = []
            for threads in (1, 3):
                torch.set_num_threads(threads)
                plans.append(route_plan(ids, 16, align=8, **kw))
            want = route_plan_ref(ids, 16, align=8, **kw)
            for plan in plans:
                assert all(torch.equal(getattr(plan, f), getattr(want, f)) for f in FIELDS)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [-2, 4, 2**31, 2**32 + 1, -(2**40)])
def test_an_id_out_of_range_is_an_error(bad):
    ids = torch.tensor([[0, 3], [bad, -1]])
    with pytest.raises(ValueError, match=rf"topk_ids must be in \[0, 4\) or -1, got {bad}; use -1"):
        route_plan(ids, 4)


def test_an_id_out_of_range_is_dropped_and_counted_by_the_op_kernel_matches(device):
    ids = torch.tensor([[0, 3], [2**32 + 1, -1], [4, -7]], device=device)
    plan = RoutePlan(*torch.ops.interlace.route_plan(ids, None, 4, 1, -1, False))
    check(plan, ids, 4)
    assert plan.invalid.item() == 3


def test_rejects_misuse(device):
    ids = torch.zeros(4, 2, dtype=torch.int64, device=device)
    for message, args in {
        "integers": (ids.float(), 4), r"\[T, K\]": (ids[0], 4), "num_experts": (ids, 0), "align": (ids, 4, 0),
        "capacity must": (ids, 4, 1, -1), "'position' or 'probs'": (ids, 4, 1, 2, "best"), "needs floating probs": (ids, 4, 1, 2, "probs"),
        "needs a capacity": (ids, 4, 1, None, "position", None, True), "fewer than 2": (ids, 4, 2**31),
    }.items():
        with pytest.raises(ValueError, match=message):
            route_plan(*args)


def test_mask_form_and_back(device):
    torch.manual_seed(0)
    chosen = torch.rand(40, 9, device=device).argsort(1) < 3
    chosen[5] = False                                                 # a token without experts
    probs = torch.rand(40, 9, dtype=torch.float64, device=device).masked_fill(~chosen, 0).requires_grad_()
    ids, p = from_mask(chosen, probs, topk=3)
    plan = route_plan(ids, 9)
    assert torch.equal(plan.to_mask(), chosen)
    experts, tokens = chosen.t().nonzero().unbind(1)                  # the order of Megatron-Core's permute
    used = int(plan.offsets[-1])
    assert torch.equal(plan.slot_of_row[:used] // 3, tokens.int()) and used == int(chosen.sum())
    assert torch.equal(p.flatten()[plan.slot_of_row[:used].long()], probs[tokens, experts])
    p.square().sum().backward()
    torch.testing.assert_close(probs.grad, 2 * probs.detach())
    dense, _ = from_mask(chosen.int())
    assert torch.equal(route_plan(dense, 9).offsets, plan.offsets)
    if device == "cpu":
        with pytest.raises(ValueError, match="at most topk = 2 experts, got 3"):
            from_mask(chosen, topk=2)
    with pytest.raises(ValueError, match="alike"):
        from_mask(chosen, probs[:3])


def test_dropped_slots_leave_the_mask(device):
    ids = torch.tensor([[0, 1], [0, 1], [0, 2]], device=device)
    assert route_plan(ids, 4, capacity=2, align=8).to_mask().int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]


def test_route_plan_op_contract_kernel_matches(device):
    ids, probs = torch.randint(-1, 5, (40, 2), device=device), torch.rand(40, 2, device=device)
    op = torch.ops.interlace.route_plan.default
    for args in ((ids, None, 5, 1, -1, False), (ids.int(), None, 5, 8, 9, True), (ids, probs, 5, 4, 3, False),
                 (ids[:0], None, 5, 1, -1, False)):
        torch.library.opcheck(op, args)
