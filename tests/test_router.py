import math

import pytest
import torch
from budget import check_budget
from torch.autograd import gradcheck

from interlace.kernels import Routing, aux_loss, forced_balance, router, router_ref, update_expert_bias, z_loss
from interlace.kernels.dispatch import INTERPRET, fused

KERNEL_DTYPES = [torch.float32, torch.bfloat16] + ([] if INTERPRET else [torch.float16, torch.float64])
GROUPS = {"num_groups": 8, "group_topk": 4}
CASES = {                                                             # T, E, K, options; "bias" and "valid" are made
    "mixtral": (64, 8, 2, {}), "one expert": (7, 1, 1, {}), "one token": (1, 8, 3, {}), "no token": (0, 8, 2, {"sequences": 3}),
    "all experts": (7, 8, 8, {"pre_softmax": True}), "three": (64, 3, 2, {"sequences": 5}),
    "qwen3": (33, 128, 8, {"pre_softmax": True, "norm_topk_prob": True, "valid": True}),
    "qwen1.5": (65, 60, 4, {"pre_softmax": True, "sequences": 2}),
    "odd": (70, 257, 6, {"score_function": "sigmoid", "sequences": 4, "valid": True}), "many": (9, 1000, 16, {"sequences": 2}),
    "deepseek-v3": (20, 256, 8, {"score_function": "sigmoid", "bias": True, "scaling_factor": 2.5, **GROUPS}),
    "deepseek-v2": (20, 160, 6, {"pre_softmax": True, "num_groups": 8, "group_topk": 3, "group_score": 1, "scaling_factor": 16.0}),
    "odd groups": (33, 60, 4, {"score_function": "sigmoid", "bias": True, "num_groups": 5, "group_topk": 2, "valid": True}),
    "small groups": (33, 24, 4, {"num_groups": 6, "group_topk": 4, "group_score": 3, "bias": True}),
    "groups after": (33, 64, 4, GROUPS), "biased softmax": (40, 16, 2, {"pre_softmax": True, "bias": True, "sequences": 3}),
    "sqrtsoftplus": (64, 40, 3, {"score_function": "sqrtsoftplus", "bias": True, "valid": True}),
    "not normalised": (40, 16, 3, {"score_function": "sqrtsoftplus", "norm_topk_prob": False, "sequences": 4}),
    "sigmoid top-1": (40, 16, 1, {"score_function": "sigmoid"}), "all padding": (6, 8, 2, {"valid": False, "sequences": 2}),
}


def _case(name, device="cpu"):
    """Logits exact in every dtype, with many ties, and options. Padding has NaN logits."""
    T, E, K, options = CASES[name]
    T, options = min(T, 11) if INTERPRET else T, dict(options)
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(T, E, generator=g) * 8).round() / 4
    if options.pop("bias", False):
        options["expert_bias"] = ((torch.randn(E, generator=g) * 8).round() / 64).to(device)
    if (valid := options.pop("valid", None)) is not None:
        options["valid"] = ((torch.rand(T, generator=g) < 0.7) & valid).to(device)
        logits[~options["valid"].cpu()] = torch.nan
    return logits.to(device), K, options


def _seeds(T, K, E, sequences, device):
    g = torch.Generator().manual_seed(4)
    return [(torch.randn(shape, generator=g) * 8).round().div(8).to(device) for shape in ((T, K), (sequences, E), (T,))]


# ---- kernel against reference, reference against the words ----------------------------------------------------


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_router_kernel_matches(name, dtype, device):
    logits, K, options = _case(name, device)
    assert fused(logits), "the C++ ops are not built: make setup"
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel")
    got, want = router(logits.to(dtype), K, **options), router_ref(logits.to(dtype), K, **options)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.counts, want.counts)
    assert got.ids.dtype == got.counts.dtype == torch.int32 and [t.dtype for t in got[1:4]] == [t.dtype for t in want[1:4]]
    outputs = lambda f: lambda x: tuple(f(x, K, **options)[1:4])  # noqa: E731
    check_budget(outputs(router), outputs(router_ref), [logits], dtype, _seeds(*got.ids.shape, logits.shape[1], len(got.counts), device))


def _by_hand(logits, K, score, pre, norm, bias, groups, kept, best, scale, sequences, valid):
    """Every token in Python floats: the rules of DeepSeek-V3, Mixtral and Qwen in their own words."""
    E = logits.shape[1]
    ids, probs, sums, counts, lse = [], [], [[0.0] * E for _ in range(sequences)], [[0] * E for _ in range(sequences)], []
    for t, row in enumerate(logits.double().tolist()):
        if valid is not None and not valid[t]:
            ids.append([-1] * K), probs.append([0.0] * K), lse.append(0.0)
            continue
        m = max(row)
        lse.append(m + math.log(sum(math.exp(x - m) for x in row)))
        if score == "softmax":
            s = [math.exp(x - lse[-1]) for x in row]
        else:
            s = [1 / (1 + math.exp(-x)) if score == "sigmoid" else math.sqrt(math.log1p(math.exp(x))) for x in row]
        v = row if score == "softmax" and not pre else s
        v = [a + b for a, b in zip(v, bias)] if bias is not None else v
        size = E // groups
        worth = [sum(sorted(v[g * size:(g + 1) * size], reverse=True)[:best]) for g in range(groups)]
        open_ = sorted(range(groups), key=lambda g: (-worth[g], g))[:kept]
        mine = sorted((e for e in range(E) if e // size in open_), key=lambda e: (-v[e], e))[:K]
        p = [math.exp(row[e]) if score == "softmax" and not pre else s[e] for e in mine]
        p = [a / sum(p) for a in p] if norm else p
        ids.append(mine), probs.append([scale * a for a in p])
        for e in mine:
            counts[t % sequences][e] += 1
        for e in range(E):
            sums[t % sequences][e] += s[e] / sum(s)
    return ids, probs, sums, lse, counts


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_definition(name):
    logits, K, o = _case(name)
    logits = logits.double()
    if "expert_bias" in o or "num_groups" in o:                       # sums in another order may part what is equal: no ties here
        logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    score, pre = o.get("score_function", "softmax"), o.get("pre_softmax", False)
    norm = o.get("norm_topk_prob", (score != "softmax" and K > 1) or not (pre or score != "softmax"))
    kept = o.get("group_topk", 1)
    bias = o["expert_bias"].tolist() if "expert_bias" in o else None
    want = _by_hand(logits, K, score, pre, norm, bias, o.get("num_groups", 1), kept, o.get("group_score", max(1, K // kept)),
                    o.get("scaling_factor", 1.0), o.get("sequences", 1), o.get("valid"))
    got = router_ref(logits, K, **o)
    assert got.ids.tolist() == want[0] and got.counts.tolist() == want[4]
    for g, w in zip(got[1:4], want[1:4]):
        torch.testing.assert_close(g, torch.tensor(w, dtype=torch.float64).view(g.shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("E,K", [(256, 8), (128, 8), (8, 2), (60, 4)])
def test_as_other_systems_compose_it_kernel_matches(E, K, device):
    """torch.topk on data without ties, in the order of operations of Megatron-Core and of Hugging Face's models."""
    T = 5 if INTERPRET else 48
    x = torch.randn(T, E, generator=torch.Generator().manual_seed(6)).to(device)
    values, ids = x.topk(K)

    def same(r, p, i):
        assert torch.equal(r.ids.long(), i)
        torch.testing.assert_close(r.probs, p)

    same(router(x, K), values.softmax(-1), ids)
    p = x.softmax(-1).gather(1, ids)
    same(router(x, K, pre_softmax=True), p, ids)
    same(router(x, K, pre_softmax=True, norm_topk_prob=True, scaling_factor=3.0), 3 * p / p.sum(-1, keepdim=True), ids)
    groups, kept = (8, 4) if E % 8 == 0 and E > 8 else (4, 2)
    bias, s = torch.linspace(-0.2, 0.3, E, device=device), x.sigmoid()
    best = (s + bias).view(T, groups, -1)
    worth = best.topk(min(2, best.shape[2]), -1).values.sum(-1)       # Hugging Face: the top 2 of s + b
    mask = torch.zeros(T, groups, device=device).scatter_(1, worth.topk(kept).indices, 1.0).repeat_interleave(E // groups, 1)
    ids = (s + bias).masked_fill(mask == 0, -torch.inf).topk(K).indices
    p = s.gather(1, ids)
    same(router(x, K, score_function="sigmoid", expert_bias=bias, num_groups=groups, group_topk=kept, group_score=min(2, E // groups),
                scaling_factor=2.5), p / (p.sum(-1, keepdim=True) + 1e-20) * 2.5, ids)


# ---- properties -----------------------------------------------------------------------------------------------


def test_ties_take_the_lower_index_kernel_matches(device):
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -1.0, 2.0], [100.0, 200.0, 300.0, 200.0]], device=device)
    want = [[0, 1, 2], [0, 1, 2], [3, 0, 1], [2, 1, 3]]               # the last: a saturated sigmoid still keeps the order
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        assert router(x, 3, score_function=score).ids.tolist() == router_ref(x, 3, score_function=score).ids.tolist() == want
    groups = {"num_groups": 2, "group_topk": 1}
    assert router(x[:2], 2, **groups).ids.tolist() == router_ref(x[:2], 2, **groups).ids.tolist() == [[0, 1]] * 2


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_one_choice_has_prob_one_kernel_matches(score, device):
    """Exactly: else a capacity that drops by probs would choose by rounding noise, and each kernel otherwise."""
    x = torch.randn(2000, 4, device=device) * 2
    assert (router(x, 1, score_function=score, pre_softmax=score == "softmax", norm_topk_prob=True).probs == 1).all()


@pytest.mark.parametrize("options", [{}, {"score_function": "sigmoid"}, {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2}],
                         ids=["softmax", "sigmoid", "groups"])
def test_bad_logits_give_ids_in_range_kernel_matches(options, device):
    nan, inf = math.nan, math.inf
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(7)).to(device)
    x[0], x[1, 5], x[2], x[3, 2], x[4, :5], x[5, 7] = nan, nan, -inf, inf, -inf, -nan
    got, want = router(x, 3, **options), router_ref(x, 3, **options)
    assert torch.equal(got.ids, want.ids) and torch.equal(got.counts, want.counts)
    assert all(len(set(row)) == 3 and 0 <= min(row) <= max(row) < 8 for row in got.ids.tolist())
    assert got.ids[1, 0] == 5 and got.ids[5, 0] == 7, "NaN is the largest"
    assert got.probs[0].isnan().all() and got.probs[1].isnan().any() and got.score_sums.isnan().any()
    torch.testing.assert_close(got.probs, want.probs, equal_nan=True)
    torch.testing.assert_close(got.lse, want.lse, equal_nan=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_far_logits_kernel_matches(score, device):
    x = torch.tensor([[-200.0, 0.0, 90.0, -90.0], [-300.0, -200.0, -120.0, -250.0], [1e4, -1e4, 5.0, -3e38]], device=device)
    got = x.clone().requires_grad_()
    r, want = router(got, 2, score_function=score, pre_softmax=True), router_ref(x.double(), 2, score_function=score, pre_softmax=True)
    for a, b in zip(r[1:4], want[1:4]):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
    (r.probs.sum() + r.lse.sum() + (r.score_sums * torch.arange(4.0, device=device)).sum()).backward()
    assert got.grad.isfinite().all()


def test_padding_does_not_leak_kernel_matches(device):
    logits, K, options = _case("qwen3", device)
    valid = options.pop("valid")
    x = logits.clone().requires_grad_()
    r, alone = router(x, K, valid=valid, **options), router(logits[valid], K, **options)
    assert (r.ids[~valid] == -1).all() and (r.probs[~valid] == 0).all() and (r.lse[~valid] == 0).all()
    assert torch.equal(r.ids[valid], alone.ids) and torch.equal(r.probs[valid], alone.probs) and torch.equal(r.counts, alone.counts)
    torch.testing.assert_close(r.score_sums, alone.score_sums)
    (r.probs.square().sum() + r.lse.sum() + r.score_sums.square().sum()).backward()
    assert (x.grad[~valid] == 0).all() and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_replay_kernel_matches(dtype, device):
    """Given ids: as if chosen; any order, some twice, some none."""
    logits = torch.randn(30, 12, generator=torch.Generator().manual_seed(8)).to(device)
    for options in ({}, {"pre_softmax": True}, {"score_function": "sigmoid", "scaling_factor": 2.0}):
        chosen = router(logits, 3, **options)
        again = router(logits, 3, ids=chosen.ids.to(dtype), **options)
        assert all(torch.equal(a, b) for a, b in zip(chosen, again))
        ids = torch.randint(-1, 12, (30, 3), generator=torch.Generator().manual_seed(9)).to(device, dtype)
        ids[0], ids[1] = -1, 4
        got = router(logits, 3, ids=ids, **options)
        assert torch.equal(got.ids, ids.int()) and (got.probs[ids < 0] == 0).all() and got.probs.isfinite().all()
        assert got.counts.sum() == (ids >= 0).sum()
        f = lambda g: lambda x: tuple(g(x, 3, ids=ids, **options)[1:4])  # noqa: E731, B023
        check_budget(f(router), f(router_ref), [logits], torch.float32, _seeds(30, 3, 12, 1, device))


@pytest.mark.parametrize("name", ["mixtral", "qwen1.5", "deepseek-v3", "odd"])
def test_a_token_does_not_depend_on_its_batch_kernel_matches(name, device):
    logits, K, options = _case(name, device)
    options.pop("valid", None)
    logits = logits.nan_to_num(0.5)
    whole = router(logits, K, **options)
    for t in (0, 5, len(logits) - 1):
        alone = router(logits[t:t + 1], K, **options)
        assert torch.equal(alone.ids[0], whole.ids[t]) and torch.equal(alone.probs[0], whole.probs[t]) and alone.lse[0] == whole.lse[t]


def test_same_bits_again_kernel_matches(device):
    T, E = (200, 16) if INTERPRET else (5000, 64)
    x = torch.randn(T, E, device=device)
    runs = []
    for threads in (1, 2, 1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = x.clone().requires_grad_()
            r = router(y, 4, pre_softmax=True, sequences=3)
            (r.probs.square().sum() + r.lse.square().sum() + r.score_sums.square().sum()).backward()
            runs.append((*r, y.grad))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_many_partial_sums_kernel_matches(device):
    """More tokens than one partial sum takes, in every way of cutting them."""
    most = 300 if INTERPRET else 3000
    every = torch.randn(most, 5, generator=torch.Generator().manual_seed(10)).to(device)
    for T, sequences in ((most, 1), (most, 3), (30, 30), (30, 33)):
        x = every[:T]
        got, want = router(x, 2, sequences=sequences), router_ref(x.double(), 2, sequences=sequences)
        assert torch.equal(got.counts, want.counts)
        torch.testing.assert_close(got.score_sums.double(), want.score_sums, rtol=1e-6, atol=1e-6)


def test_strided_logits_kernel_matches(device):
    x = torch.randn(12, 20, device=device)
    assert all(torch.equal(a, b) for a, b in zip(router(x.t(), 3), router(x.t().contiguous(), 3)))
    assert all(torch.equal(a, b) for a, b in zip(router(x[:, 4:13], 3), router(x[:, 4:13].clone(), 3)))


@pytest.mark.skipif(INTERPRET, reason="float64 has no kernel")
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("no token", "many", "all padding", "one expert")])
def test_gradients(name):
    logits, K, options = _case(name)
    logits = logits[:9].double().nan_to_num(0.0)
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64) * 0.3
    if "valid" in options:
        options["valid"] = options["valid"][:len(logits)]
    ids = router(logits, K, **options).ids                            # fixed: finite differences may change a choice
    x = logits.requires_grad_()
    assert gradcheck(lambda x: router(x, K, ids=ids, **options)[1:4], (x,), fast_mode=True)
    chosen, replayed = (torch.autograd.grad(r.probs.square().sum() + r.lse.sum(), x) for r in
                        (router(x, K, **options), router(x, K, ids=ids, **options)))
    assert torch.equal(*chosen, *replayed)


def test_only_what_is_used_kernel_matches(device):
    """Each output alone: its gradient comes without those of the others."""
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        for i in (1, 2, 3):
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(11)).to(device)
            grads = []
            for f, dtype in ((router, torch.float32), (router_ref, torch.float64)):
                y = x.detach().to(dtype, copy=True).requires_grad_()
                f(y, 2, score_function=score, sequences=2)[i].square().sum().backward()
                grads.append(y.grad.double())
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    r = router(x.requires_grad_(), 2)
    assert not r.ids.requires_grad and not r.counts.requires_grad and r.probs.requires_grad


# ---- contracts ------------------------------------------------------------------------------------------------


def test_router_op_contract_kernel_matches(device):
    x = torch.randn(12, 10, device=device)
    bias, valid, ids = torch.randn(10, device=device), torch.rand(12, device=device) < 0.5, torch.randint(0, 10, (12, 2), device=device)
    fwd, bwd = torch.ops.interlace.router_fwd.default, torch.ops.interlace.router_bwd.default
    for args in ((x.clone().requires_grad_(), bias, valid, None, 2, 1, True, True, 5, 2, 2, 2.5, 3),
                 (x.clone().requires_grad_(), None, None, ids.int(), 2, 2, False, False, 1, 1, 1, 1.0, 2),
                 (x[:0].clone().requires_grad_(), None, None, None, 2, 0, False, False, 1, 1, 1, 1.0, 2)):
        torch.library.opcheck(fwd, args)
    torch.library.opcheck(bwd, (torch.randn(12, 2, device=device), torch.randn(3, 10, device=device), None, x, ids.int(), valid, 1, True,
                                2.5, 3))


@pytest.mark.skipif(INTERPRET, reason="compiles C++")
def test_compiles_whole():
    bias = torch.randn(16)

    def loss(x, valid):
        r = router(x, 4, score_function="sigmoid", expert_bias=bias, num_groups=4, group_topk=2, sequences=2, valid=valid)
        return r.probs.square().sum() + aux_loss(r.score_sums, r.counts, 4, 0.1, per_sequence=True) + z_loss(r.lse, 0.1)

    x, valid = torch.randn(20, 16), torch.rand(20) < 0.8
    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        y = x.clone().requires_grad_()
        f(y, valid).backward()
        grads.append(y.grad)
    torch.testing.assert_close(*grads)


def test_rejects_misuse(device):
    x, ids = torch.randn(4, 8, device=device), torch.zeros(4, 2, dtype=torch.int64, device=device)
    for message, args, options in (
            (r"floating point \[T, E\]", (x[0], 2), {}), ("floating point", (ids, 2), {}), ("topk in", (x, 9), {}), ("topk in", (x, 0), {}),
            (r"experts must be in \[1, 1024\]", (torch.randn(1, 1025, device=device), 2), {}),
            ("one of softmax, sigmoid, sqrtsoftplus, got 'tanh'", (x, 2), {"score_function": "tanh"}),
            ("sequences", (x, 2), {"sequences": 0}), ("use pre_softmax=True", (x, 2), {"norm_topk_prob": False}),
            (r"expert_bias must be floating point \[8\]", (x, 2), {"expert_bias": torch.zeros(7, device=device)}),
            (r"valid must be bool \[4\]", (x, 2), {"valid": torch.ones(4, device=device)}),
            ("must divide the 8 experts, got 3", (x, 2), {"num_groups": 3, "group_topk": 1}),
            (r"group_topk must be in \[1, 4\]", (x, 2), {"num_groups": 4}), ("need num_groups", (x, 2), {"group_topk": 2}),
            ("hold topk = 5 experts, got 2 of 2", (x, 5), {"num_groups": 4, "group_topk": 2}),
            (r"group_score must be in \[1, 2\]", (x, 2), {"num_groups": 4, "group_topk": 2, "group_score": 3}),
            (r"ids must be int16, int32 or int64 \[4, 2\]", (x, 2), {"ids": ids[:3]})):
        with pytest.raises(ValueError, match=message):
            router(*args, **options)


@pytest.mark.parametrize("bad", [8, -2, 2**31, 2**32 + 1])
def test_ids_out_of_range(bad):
    x, ids = torch.randn(4, 8), torch.zeros(4, 2, dtype=torch.int64)
    ids[2, 1] = bad
    with pytest.raises(ValueError, match=r"ids must be in \[0, 8\) or -1"):
        router(x, 2, ids=ids)
    if bad < 2**31:                                                   # what reaches the op itself is dropped, never followed
        got = torch.ops.interlace.router_fwd(x, None, None, ids.int(), 2, 0, True, False, 1, 1, 1, 1.0, 1)
        assert got[3][2, 1] == -1 and got[0][2].tolist() == [1.0, 0.0]


# ---- losses and what goes with them ---------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_are_their_formulae(score):
    """Dense one-hot float64, from the papers: Switch eq. 4, DeepSeek-V3 eq. 17 to 20, ST-MoE eq. 5."""
    S, B, E, K, coeff = 6, 3, 8, 2, 0.3
    x = torch.randn(S * B, E, dtype=torch.float64, requires_grad=True)
    r = router(x, K, score_function=score, sequences=B)
    y = x.detach().clone().requires_grad_()
    s = y.softmax(-1) if score == "softmax" else y.sigmoid() / y.sigmoid().sum(-1, keepdim=True)
    chosen = torch.zeros(S * B, E, dtype=torch.float64).scatter_(1, y.topk(K).indices, 1.0)
    f, P = chosen.mean(0) / K, s.mean(0)
    switch = coeff * E * (f * P).sum()
    sequence = 0.0
    for b in range(B):
        mine = torch.arange(S) * B + b
        f = E / (K * S) * chosen[mine].sum(0)
        sequence = sequence + coeff * (f * s[mine].mean(0)).sum() / B
    z = coeff * torch.logsumexp(y, -1).square().mean()
    got = (aux_loss(r.score_sums, r.counts, K, coeff), aux_loss(r.score_sums, r.counts, K, coeff, per_sequence=True), z_loss(r.lse, coeff))
    for g, w in zip(got, (switch, sequence, z)):
        torch.testing.assert_close(g, w, rtol=1e-13, atol=0)
        torch.testing.assert_close(*torch.autograd.grad(g, x, retain_graph=True), *torch.autograd.grad(w, y, retain_graph=True),
                                   rtol=1e-11, atol=1e-15)


def test_losses_add_up_over_parts_and_padding():
    """Two ranks with counts summed over both, each with the tokens of all: the whole. Padding changes nothing."""
    x = torch.randn(40, 8, dtype=torch.float64)
    whole = router(x, 2)
    want = aux_loss(whole.score_sums, whole.counts, 2, 0.1), z_loss(whole.lse, 0.1)
    parts = router(x[:12], 2), router(x[12:], 2)
    counts = parts[0].counts + parts[1].counts
    torch.testing.assert_close(sum(aux_loss(p.score_sums, counts, 2, 0.1, tokens=40) for p in parts), want[0])
    torch.testing.assert_close(sum(z_loss(p.lse, 0.1, tokens=40) for p in parts), want[1])
    torch.testing.assert_close(sum(n / 40 * aux_loss(p.score_sums, counts, 2, 0.1, tokens=n) for n, p in zip((12, 28), parts)), want[0])
    padded = torch.cat([x, torch.full((5, 8), torch.nan, dtype=torch.float64)])
    valid = torch.arange(45) < 40
    r = router(padded, 2, valid=valid)
    torch.testing.assert_close(aux_loss(r.score_sums, r.counts, 2, 0.1), want[0])
    torch.testing.assert_close(z_loss(r.lse, 0.1, tokens=valid.sum()), want[1])
    none = router(x[:0], 2, sequences=3)
    assert aux_loss(none.score_sums, none.counts, 2, 0.1, per_sequence=True) == z_loss(none.lse, 0.1) == 0
    some = torch.tensor([40.0])
    assert aux_loss(whole.score_sums, whole.counts, 2, 0.1, per_sequence=True, tokens=some) == want[0]


def test_forced_balance(device):
    ids = forced_balance(24, 2, 8, device)
    r = router(torch.randn(24, 8, device=device), 2, ids=ids)
    assert r.counts.tolist() == [[6] * 8] and all(a != b for a, b in ids.tolist()) and isinstance(r, Routing)
    balanced = aux_loss(torch.full((1, 8), 3.0, device=device), r.counts, 2, 0.25)
    torch.testing.assert_close(balanced.item(), 0.25)


def test_expert_bias_moves_towards_balance():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    out = update_expert_bias(bias, torch.tensor([10, 4, 0, 6], dtype=torch.int32), 0.125)
    assert out is bias and bias.tolist() == [0.375, 0.125, -0.375, -0.125]
    g = torch.Generator().manual_seed(12)
    x, bias = torch.randn(512, 8, generator=g) + torch.linspace(-1, 1, 8), torch.zeros(8)
    spread = []
    for _ in range(200):
        c = router(x, 2, score_function="sigmoid", expert_bias=bias).counts[0]
        update_expert_bias(bias, c, 0.005)
        spread.append(int(c.max() - c.min()))
    assert spread[-1] < spread[0] / 10
