import pytest
import torch
from budget import DTYPES, check_budget

from interlace.kernels import expert_mlp, expert_mlp_ref, grouped_gemm, permute, route_plan, swiglu
from interlace.kernels.dispatch import INTERPRET
from interlace.kernels.experts import rows_gemm_swiglu

KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # the interpreter truncates to bf16, has no fp64
CASES = {                                                             # T, H, I, K, E, route_plan's options
    "plain": (13, 32, 24, 2, 4, {}), "odd": (17, 33, 21, 3, 5, {"align": 8}), "no tokens": (0, 8, 6, 2, 3, {}),
    "capacity": (20, 16, 8, 2, 4, {"capacity": 3, "align": 4}), "static": (9, 8, 8, 2, 3, {"capacity": 4, "pad_to_capacity": True}),
    "all dropped": (5, 8, 4, 2, 3, {"capacity": 0}), "one expert": (6, 8, 4, 1, 1, {}), "64 experts": (30, 8, 4, 4, 64, {}),
}


def case(name, device, gates=2):
    """x with NaN in tokens that no expert takes, w13, w2, plan, probs, do."""
    T, H, I, K, E, kw = CASES[name]
    torch.manual_seed(0)
    ids = torch.randint(-1, E, (T, K))
    ids[:T // 3, :] = ids[:T // 3, :1]                                # the same expert more than once, and tokens without one
    plan = route_plan(ids.to(device), E, **kw)
    x, w13, w2 = torch.randn(T, H), torch.randn(E, gates * I, H) / H**0.5, torch.randn(E, H, I) / I**0.5
    x, w13, w2, probs, do = (t.to(device) for t in (x, w13, w2, torch.rand(T, K), torch.randn(T, H)))
    x[(plan.row_of_slot < 0).all(1)] = torch.nan
    return x, w13, w2, plan, probs, do


def formula(x, w13, w2, plan, probs):
    """Token by token, from the plan's rows alone."""
    at, o = plan.offsets.tolist(), torch.zeros_like(x)
    for t, rows in enumerate(plan.row_of_slot.tolist()):
        for k, r in enumerate(rows):
            if r >= 0:
                e = max(i for i in range(len(at) - 1) if at[i] <= r and at[i + 1] > r)
                gate, up = (w13[e] @ x[t]).chunk(2)
                o[t] += probs[t, k] * (w2[e] @ (gate * torch.sigmoid(gate) * up))
    return o


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_formula(name):
    x, w13, w2, plan, probs, _ = (t.double() if torch.is_tensor(t) else t for t in case(name, "cpu"))
    torch.testing.assert_close(expert_mlp_ref(x, w13, w2, plan, probs), formula(x, w13, w2, plan, probs))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "capacity"] if INTERPRET else CASES)
def test_expert_mlp_kernel_matches(name, dtype, device):
    x, w13, w2, plan, probs, do = case(name, device)
    check_budget(lambda x, a, b, p: expert_mlp(x, a, b, plan, p), lambda x, a, b, p: expert_mlp_ref(x, a, b, plan, p),
                 [torch.nan_to_num(x), w13, w2, probs], dtype, [do])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_with_addends_and_without_probs_kernel_matches(dtype, device):
    x, w13, w2, plan, _, do = case("plain", device)
    extra = torch.randn(2, *x.shape, device=device)
    check_budget(lambda x, a, b, r, s: expert_mlp(x, a, b, plan, None, r, s),
                 lambda x, a, b, r, s: expert_mlp_ref(x, a, b, plan, None, r, s),
                 [torch.nan_to_num(x), w13, w2, *extra], dtype, [do])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("with_probs", [True, False], ids=["probs", "none"])
def test_gelu_kernel_matches(with_probs, dtype, device):
    x, w1, w2, plan, probs, do = case("plain", device, gates=1)
    given = [torch.nan_to_num(x), w1, w2] + [probs] * with_probs
    check_budget(lambda x, a, b, p=None: expert_mlp(x, a, b, plan, p, activation="gelu"),
                 lambda x, a, b, p=None: expert_mlp_ref(x, a, b, plan, p, activation="gelu"), given, dtype, [do])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_rows_in_expert_order_kernel_matches(dtype, device):
    """The form behind an expert-parallel dispatch: what lies behind the last expert is never read and comes out zero."""
    x, w13, w2, plan, _, _ = case("capacity", device)
    rows, probs = torch.nan_to_num(permute(x, plan)), torch.rand(plan.rows, device=device)
    check_budget(lambda x, a, b, p: expert_mlp(x, a, b, plan.offsets, p), lambda x, a, b, p: expert_mlp_ref(x, a, b, plan.offsets, p),
                 [rows, w13, w2, probs], dtype, [torch.randn_like(rows)])
    tail = torch.cat([rows, torch.full_like(rows[:5], torch.nan)]).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (tail, w13.to(dtype), w2.to(dtype), torch.rand(len(tail), device=device))]
    o = expert_mlp(*leaves[:3], plan.offsets, leaves[3])
    o.backward(torch.where(o == 0, torch.nan, torch.ones_like(o)).clamp(min=1).nan_to_num(1))
    assert (o[-5:] == 0).all() and (leaves[0].grad[-5:] == 0).all() and all(t.isfinite().all() for t in (o, *(p.grad for p in leaves)))


def test_what_is_dropped_does_not_leak_kernel_matches(device):
    x, w13, w2, plan, probs, do = case("capacity", device)
    dropped = (plan.row_of_slot < 0).all(1)
    assert dropped.any() and x[dropped].isnan().all()
    probs[plan.row_of_slot < 0] = torch.nan
    leaves = [t.clone().requires_grad_() for t in (x, w13, w2, probs)]
    o = expert_mlp(*leaves[:3], plan, leaves[3])
    o.backward(do)
    assert (o[dropped] == 0).all() and (leaves[0].grad[dropped] == 0).all() and (leaves[3].grad[plan.row_of_slot < 0] == 0).all()
    assert all(t.isfinite().all() for t in (o, *(p.grad for p in leaves)))


def test_zero_probs_keep_their_gradient_kernel_matches(device):
    x, w13, w2, plan, probs, do = case("plain", device)
    x = torch.nan_to_num(x)
    zero, one = torch.zeros_like(probs).requires_grad_(), torch.ones_like(probs).requires_grad_()
    expert_mlp(x, w13, w2, plan, zero).backward(do)
    expert_mlp(x, w13, w2, plan, one).backward(do)
    assert zero.grad.abs().sum() > 0 and torch.equal(zero.grad, one.grad)   # the output is linear in probs


@pytest.mark.skipif(INTERPRET, reason="of what is saved, not of kernels")
@pytest.mark.parametrize("form", ["plan", "offsets"])
def test_saves_the_input_the_pre_activation_and_indices_alone(form):
    """Counted where autograd packs: weights are the caller's own and take no memory here."""
    x, w13, w2, plan, probs, _ = case("odd", "cpu")
    H, I = w2.shape[1:]
    if form == "offsets":
        x, probs = torch.randn(plan.rows, H), torch.rand(plan.rows)
    leaves = [t.requires_grad_() for t in (x, w13, w2, probs)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) is None or t, lambda t: t):
        expert_mlp(*leaves[:3], plan if form == "plan" else plan.offsets, leaves[3])
    weights = {w13.data_ptr(), w2.data_ptr()}
    got = sum(t.numel() * t.element_size() for at, t in kept.items() if at not in weights)
    index = plan.offsets.numel() + (plan.row_of_slot.numel() + plan.slot_of_row.numel() if form == "plan" else 0)
    assert got == 4 * (x.numel() + plan.rows * 2 * I + index + plan.rows)


def test_main_gradients_kernel_matches(device):
    x, w13, w2, plan, probs, do = case("plain", device)
    x = torch.nan_to_num(x)
    ws, mains = [t.clone().requires_grad_() for t in (w13, w2)], (torch.zeros_like(w13), torch.zeros_like(w2))
    expert_mlp(x, *ws, plan, probs).backward(do)
    want, after = [w.grad for w in ws], [w.detach().clone().requires_grad_() for w in ws]
    outs = [expert_mlp(x, *after, plan, probs, main_grads=mains) for _ in range(2)]   # both forwards first, as micro-batches in flight
    for o in outs:
        o.backward(do)
    assert all(w.grad is None for w in after)
    for m, w in zip(mains, want):
        torch.testing.assert_close(m, 2 * w)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_repeats_bit_for_bit_kernel_matches(dtype, device):
    x, w13, w2, plan, probs, do = case("plain", device)
    def once():
        leaves = [t.to(dtype).requires_grad_() for t in (torch.nan_to_num(x), w13, w2, probs)]
        o = expert_mlp(*leaves[:3], plan, leaves[3])
        o.backward(do.to(dtype))
        return o, *(t.grad for t in leaves)
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients_in_float64_are_exact(activation):
    x, w13, w2, plan, probs, _ = case("static", "cpu", gates=2 if activation == "swiglu" else 1)
    leaves = [t.double().requires_grad_() for t in (torch.nan_to_num(x), w13, w2, probs, torch.randn_like(x), torch.randn_like(x))]
    fn = lambda x, a, b, p, r, s: expert_mlp(x, a, b, plan, p, r, s, activation=activation)   # noqa: E731
    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)


def test_gated_product_contract_kernel_matches(device):
    """The product with SwiGLU in its epilogue, which CPU has in two steps: what it keeps is what the product alone makes."""
    x, w13, _, plan, *_ = case("plain", device)
    x, p = torch.nan_to_num(x), torch.rand(plan.rows, device=device)
    z, a = rows_gemm_swiglu(x, w13, plan.offsets, (plan.row_of_slot, plan.slot_of_row), p)
    assert torch.equal(z, grouped_gemm(x, w13, plan.offsets, plan))
    torch.testing.assert_close(a, swiglu(z, p))
    if INTERPRET or x.is_cuda:
        torch.library.opcheck(torch.ops.interlace.grouped_gemm_swiglu.default,
                              (x[:2], w13, plan.offsets * 0, plan.slot_of_row[:4] * 0 - 1, plan.row_of_slot[:2], p[:4]))


def test_compiles_whole():
    _, w13, w2, _, _, _ = case("plain", "cpu")
    def layer(x, w13, w2, ids, scores):
        plan = route_plan(ids, 4, align=4)
        return expert_mlp(x, w13, w2, plan, scores, residual=x)
    results, ids = [], torch.randint(-1, 4, (10, 2))
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        leaves = [torch.randn(10, 32, requires_grad=True), w13.clone().requires_grad_(), w2.clone().requires_grad_()]
        s = torch.rand(10, 2, requires_grad=True)
        o = run(*leaves, ids, s)
        o.square().sum().backward()
        results.append((o, s.grad, *(t.grad for t in leaves)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_rejects_misuse(device):
    x, w13, w2, plan, probs, _ = case("plain", device)
    for message, kw in {"activation must be": {"activation": "relu"}, "must agree for swiglu": {"w2": w2[:, :, 1:]}, "must agree for gelu":
                        {"activation": "gelu"}, "T = 13": {"x": x[1:]}, r"probs must be floating \[13, 2\]": {"probs": probs[1:]},
                        "residual and shared must be": {"residual": x[1:]},
                        "with offsets alone": {"plan": plan.offsets, "shared": x, "probs": None},
                        "one for each row": {"plan": plan.offsets}, "main gradients must be": {"main_grads": (w13.half(), w2)}}.items():
        with pytest.raises(ValueError, match=message):
            expert_mlp(**{"x": x, "w13": w13, "w2": w2, "plan": plan, "probs": probs, **kw})
