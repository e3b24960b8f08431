from itertools import pairwise

import pytest
import torch
from budget import DTYPES, check_budget

from interlace.kernels import grouped_gemm, grouped_gemm_ref, grouped_wgrad, route_plan
from interlace.kernels.dispatch import INTERPRET, fused

KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # the interpreter truncates to bf16, has no fp64
CASES = {                                                             # rows of each expert, rows behind the last, K, N
    "plain": ([5, 3, 9, 4], 0, 32, 48), "one expert": ([17], 3, 40, 8), "empty experts": ([0, 7, 0, 0, 12, 0], 5, 33, 21),
    "one has all": ([0, 0, 70], 0, 8, 136), "no rows": ([0, 0, 0], 0, 8, 6), "only a tail": ([0, 0], 9, 7, 5), "ones": ([1] * 8, 1, 1, 1),
    "64 experts": ([e % 4 for e in range(64)], 11, 24, 10), "no inputs": ([2, 3], 1, 0, 4), "no outputs": ([2, 3], 1, 4, 0),
    "deep": ([33, 2], 2, 200, 30),
}
NAMES = ["empty experts", "only a tail", "no inputs"] if INTERPRET else CASES   # interpreted, a tile takes 30 ms


def case(name, device, whole=False):
    """x with NaN where nothing may read, w, offsets, dy. whole: integers, whose products are exact."""
    sizes, tail, K, N = CASES[name]
    torch.manual_seed(0)
    draw = (lambda *s: torch.randint(-4, 5, s).float()) if whole else torch.randn
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)
    R = sum(sizes) + tail
    x, w, dy = (t.to(device) for t in (draw(R, K), draw(len(sizes), N, K), draw(R, N)))
    x[sum(sizes):] = torch.nan
    return x, w, offsets, dy


def plan_case(device, T=13, H=40, K=3, E=5, N=24, **kw):
    torch.manual_seed(1)
    plan = route_plan(torch.randint(-1, E, (T, K)).to(device), E, **kw)
    return torch.randn(T, H).to(device), torch.randn(E, N, H).to(device), plan, torch.randn(plan.rows, N).to(device)


def loop(x, w, offsets):
    """What the formula says, row by row."""
    at, y = offsets.tolist(), x.new_zeros(x.shape[0], w.shape[1])
    for e, (a, b) in enumerate(pairwise(at)):
        for r in range(a, b):
            y[r] = w[e] @ x[r]
    return y


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_grouped_gemm_kernel_matches(name, dtype, device):
    x, w, offsets, dy = case(name, device)
    check_budget(lambda x, w: grouped_gemm(x, w, offsets), lambda x, w: grouped_gemm_ref(x, w, offsets), [x, w], dtype, [dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("kw", [{}, {"align": 8}, {"capacity": 4, "align": 4}, {"capacity": 2, "pad_to_capacity": True}], ids=str)
def test_gathering_kernel_matches(kw, dtype, device):
    x, w, plan, dy = plan_case(device, **kw)
    check_budget(lambda x, w: grouped_gemm(x, w, plan.offsets, plan), lambda x, w: grouped_gemm_ref(x, w, plan.offsets, plan),
                 [x, w], dtype, [dy])


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_are_exact_kernel_matches(name, device):
    x, w, offsets, dy = case(name, device, whole=True)
    want = loop(x, w, offsets)
    assert torch.equal(grouped_gemm(x, w, offsets), want) and torch.equal(grouped_gemm_ref(x, w, offsets), want)
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    grouped_gemm(xs, ws, offsets).backward(dy)
    assert torch.equal(xs.grad, loop(dy, w.transpose(1, 2), offsets))
    at = offsets.tolist()
    dw = torch.stack([sum((torch.outer(dy[r], x[r]) for r in range(a, b)), torch.zeros_like(w[0])) for a, b in pairwise(at)])
    assert torch.equal(ws.grad, dw) and torch.equal(grouped_wgrad(dy, x, offsets), dw)


def test_gathered_is_permuted_kernel_matches(device):
    """The gather reads what permute would have copied; its gradient is a token's rows summed."""
    x, w, plan, dy = plan_case(device, align=8)
    x, w, dy = (t.mul(4).round() for t in (x, w, dy))
    leaves = [[t.clone().requires_grad_() for t in (x, w)] for _ in range(2)]
    slots = plan.slot_of_row.long()
    rows = torch.where((slots < 0)[:, None], 0, leaves[1][0][slots.clamp(min=0) // 3])
    a, b = grouped_gemm(leaves[0][0], leaves[0][1], plan.offsets, plan), grouped_gemm_ref(rows, leaves[1][1], plan.offsets)
    a.backward(dy), b.backward(dy)
    assert torch.equal(a, b) and all(torch.equal(m.grad, n.grad) for m, n in zip(*leaves))


@pytest.mark.parametrize("add", [False, True])
def test_transposed_weights_are_read_as_they_lie_kernel_matches(add, device):
    x, w, plan, dy = plan_case(device, align=8)
    other = w.transpose(1, 2).contiguous()
    leaves = [(x.clone().requires_grad_(), t.clone().requires_grad_()) for t in (w, other)]
    main = [torch.ones_like(t, dtype=torch.float32) if add and fused(x) else None for t in (w, other)]
    a = grouped_gemm(*leaves[0], plan.offsets, plan, main[0])
    b = grouped_gemm(*leaves[1], plan.offsets, plan, main[1], transposed=True)
    a.backward(dy), b.backward(dy)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(leaves[0][0].grad, leaves[1][0].grad)
    dw = [t.grad if m is None else m for (_, t), m in zip(leaves, main)]
    torch.testing.assert_close(dw[0].transpose(1, 2), dw[1])


def test_nan_behind_the_experts_and_of_dropped_tokens_stays_there_kernel_matches(device):
    x, w, offsets, dy = case("empty experts", device)                 # x is NaN there already
    dy[offsets[-1]:] = torch.nan
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = grouped_gemm(xs, ws, offsets)
    y.backward(dy)
    assert (y[offsets[-1]:] == 0).all() and (xs.grad[offsets[-1]:] == 0).all() and (ws.grad[0] == 0).all()
    assert all(t.isfinite().all() for t in (y, xs.grad, ws.grad))
    x, w, plan, dy = plan_case(device, capacity=2, align=4)
    dropped = (plan.row_of_slot < 0).all(1)
    assert dropped.any()
    x[dropped] = torch.nan
    dy[plan.slot_of_row < 0] = torch.nan                              # unpermute's backward writes 0 there; the gather must not care
    xs, ws = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = grouped_gemm(xs, ws, plan.offsets, plan)
    y.backward(torch.where((plan.slot_of_row < 0)[:, None], 0, dy))
    assert all(t.isfinite().all() for t in (y, xs.grad, ws.grad)) and (xs.grad[dropped] == 0).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_main_gradients_are_added_to_kernel_matches(dtype, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel")
    x, w, offsets, dy = case("empty experts", device, whole=True)
    start = torch.randn_like(w) if dtype != torch.float64 else torch.randn_like(w).double()
    start = (start * 8).round() / 8
    main, ws = start.clone(), w.to(dtype).requires_grad_()
    for _ in range(2):
        grouped_gemm(x.to(dtype), ws, offsets, main_grad=main).backward(dy.to(dtype))
    want = start + 2 * grouped_wgrad(dy, x, offsets).to(start.dtype)
    assert ws.grad is None and torch.equal(main, want)
    assert grouped_wgrad(dy.to(dtype), x.to(dtype), offsets, out=main) is main and torch.equal(main, want + (want - start) / 2)


def test_main_gradients_are_not_rounded_on_the_way_kernel_matches(device):
    """1 + 2^-11 is no float16: the sum must reach the main gradients as it is."""
    x, dy = torch.ones(2, 1, device=device).half(), torch.tensor([[1.0], [2.0 ** -11]], device=device).half()
    main = torch.zeros(1, 1, 1, device=device)
    grouped_wgrad(dy, x, torch.tensor([0, 2], dtype=torch.int32, device=device), out=main)
    assert main.item() == 1 + 2 ** -11


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_repeats_bit_for_bit_kernel_matches(dtype, device):
    x, w, plan, dy = plan_case(device, align=4)
    def once():
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = grouped_gemm(*leaves, plan.offsets, plan)
        y.backward(dy.to(dtype))
        return y, *(t.grad for t in leaves)
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_gradients_in_float64_are_exact():
    x, w, offsets, _ = case("empty experts", "cpu")
    x = torch.nan_to_num(x)
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, offsets), [t.double().requires_grad_() for t in (x, w)])
    x, w, plan, _ = plan_case("cpu", T=7, H=6, N=5, align=4, capacity=3)
    assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, plan.offsets, plan), [t.double().requires_grad_() for t in (x, w)])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads):
    """Few rows an expert: experts in parallel."""
    x, w, offsets, dy = case("64 experts", "cpu", whole=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(grouped_gemm(x, w, offsets), loop(x, w, offsets))
        assert torch.equal(grouped_wgrad(dy, x, offsets)[1:2], (dy[:1].t() @ x[:1])[None])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_that_round_up_a_product_stay_out_of_the_others(dtype, threads):
    """16-bit products are made of 34, 36 or 72 rows for 33, 35 and 70: neither the rows behind nor the tail may show it."""
    sizes = [33, 0, 35, 70]
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    for tail in (0, 1, 40):
        x, dy = (torch.randint(-3, 4, (138 + tail, 8)).to(dtype) for _ in range(2))
        x[138:], dy[138:] = torch.nan, torch.nan
        w = torch.randint(-3, 4, (4, 8, 8)).to(dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y, dw = grouped_gemm(x, w, offsets), grouped_wgrad(dy, x, offsets)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(y, loop(x.float(), w.float(), offsets).to(dtype))
        at = offsets.tolist()
        want = torch.stack([dy[a:b].float().t() @ x[a:b].float() for a, b in pairwise(at)])
        assert torch.equal(dw, want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "N"), [(40, 24), (601, 67)])
def test_experts_of_many_rows(H, N, dtype):
    """From 32 rows of an expert, backward from 128, a CPU may take our own product, which gathers as it packs."""
    x, w, plan, dy = plan_case("cpu", T=420, H=H, K=2, E=4, N=N, align=8)
    assert plan.counts.min() > 128 and (plan.slot_of_row[:plan.offsets[-1]] < 0).any()
    check_budget(lambda x, w: grouped_gemm(x, w, plan.offsets, plan), lambda x, w: grouped_gemm_ref(x, w, plan.offsets, plan),
                 [x, w], dtype, [dy])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("H", "N"), [(40, 75), (520, 33)])
def test_many_rows_gathered_and_added_are_exact(H, N, dtype):
    """Whole numbers: padding, tokens without an expert, main gradients and the number of threads leave no trace."""
    x, w, plan, dy = plan_case("cpu", T=420, H=H, K=2, E=4, N=N, align=8)
    x, w, dy = ((t.clamp(-2, 2) * 1.5).round().to(dtype) for t in (x, w, dy))
    nowhere = (plan.row_of_slot < 0).all(1)
    x[nowhere] = torch.nan
    slots = plan.slot_of_row.long()
    rows = torch.where((slots < 0)[:, None], 0, x[slots.clamp(min=0) // 2]).double()
    want, dw = grouped_gemm_ref(rows, w.double(), plan.offsets), grouped_wgrad(dy.double(), rows, plan.offsets)
    dx = grouped_gemm_ref(dy.double(), w.double().transpose(1, 2), plan.offsets)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            main, leaf = torch.ones(4, N, H), w.clone().requires_grad_()
            y = grouped_gemm(x, leaf, plan.offsets, plan, main_grad=main)
            y.backward(dy)
            assert nowhere.any() and torch.equal(y, want.to(dtype)) and torch.equal(main.double(), dw + 1)
            got = torch.ops.interlace.grouped_gemm(dy, w, plan.offsets, None, None, True, None)
            assert torch.equal(got, dx.to(dtype))
            assert torch.equal(grouped_wgrad(dy, rows.to(dtype), plan.offsets), dw.to(dtype))
    finally:
        torch.set_num_threads(before)


def test_compiles_whole():
    def layer(x, w, ids):
        plan = route_plan(ids, 4, align=4)
        return grouped_gemm(torch.tanh(grouped_gemm(x, w, plan.offsets, plan)), w.transpose(1, 2), plan.offsets)

    results = []
    ids = torch.randint(-1, 4, (10, 2))
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        x, w = torch.randn(10, 8, requires_grad=True), torch.randn(4, 6, 8, requires_grad=True)
        y = run(x, w, ids)
        y.square().sum().backward()
        results.append((y, x.grad, w.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["no rows"] if INTERPRET else ["plain", "empty experts", "no rows"])
def test_grouped_gemm_op_contract_kernel_matches(name, device):
    ops = torch.ops.interlace
    x, w, offsets, dy = case(name, device)
    x, (xg, wg) = torch.nan_to_num(x), (t.requires_grad_() for t in (torch.nan_to_num(x), w.clone()))
    assert fused(x, w), "the C++ ops are not built: make setup"
    torch.library.opcheck(ops.grouped_gemm.default, (xg, wg, offsets, None, None, False, None))
    torch.library.opcheck(ops.grouped_wgrad.default, (dy, x, offsets, None, None, 1))
    torch.library.opcheck(ops.grouped_wgrad_add.default, (dy, x, offsets, None, None, 1, torch.zeros_like(w)))
    x, w, plan, dy = plan_case(device, T=2, E=2)
    row, slots = plan.row_of_slot, plan.slot_of_row
    torch.library.opcheck(ops.grouped_gemm.default, (x.requires_grad_(), w.requires_grad_(), plan.offsets, slots, row, False, None))
    torch.library.opcheck(ops.grouped_wgrad.default, (dy, x.detach(), plan.offsets, None, slots, row.shape[1]))


def test_rejects_misuse(device):
    x, w, offsets, dy = case("plain", device)
    _, _, plan, _ = plan_case(device)
    for message, kw in {r"w \[E, N, K\]": {"w": w[0]}, "one dtype and device": {"w": w.half()},
                        r"offsets must be int32 \[5\]": {"offsets": offsets[1:]},
                        "take them from route_plan": {"offsets": offsets.long()}, "T = 13": {"gather": plan},
                        "main gradients must be": {"main_grad": w.half()}}.items():
        with pytest.raises(ValueError, match=message):
            grouped_gemm(**{"x": x, "w": w, "offsets": offsets, **kw})
    with pytest.raises(ValueError, match="grouped_wgrad: dy and x must be"):
        grouped_wgrad(dy[1:], x, offsets)


@pytest.mark.skipif(INTERPRET, reason="only the C++ op may read offsets")
@pytest.mark.parametrize("wrong", [[0, 8, 5, 17, 21], [0, 5, 8, 17, 22], [1, 5, 8, 17, 21]], ids=str)
def test_wrong_offsets_are_refused_on_cpu(wrong):
    x, w, _, dy = case("plain", "cpu")
    offsets = torch.tensor(wrong, dtype=torch.int32)
    for call in (lambda: grouped_gemm(x, w, offsets), lambda: grouped_wgrad(dy, x, offsets)):
        with pytest.raises(RuntimeError, match="offsets must rise from 0"):
            call()
