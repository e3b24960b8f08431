import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import cross_entropy, cross_entropy_ref
from interlace.kernels.cross_entropy import _combine, _stats_ref
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1, 1), (7, 250), (4, 1024), (5, 4999), (0, 8)]             # one, odd, one block, many blocks, no rows
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES  # no bf16, no fp64 there
SLICES = [(1, [37]), (2, [20, 17]), (3, [20, 17, 0])]                # columns per rank of 37, padded to 20 if t > 1


def _data(N, V, device="cpu", scale=3.0):
    torch.manual_seed(0)
    x, targets = torch.randn(N, V, device=device) * scale, torch.randint(V, (N,), device=device)
    return x, targets, torch.randn(N, device=device)


def _eager(x, targets):
    """torch's own, in fp32 for the 16-bit types as a model would call it."""
    return F.cross_entropy(x if x.dtype == torch.float64 else x.float(), targets, reduction="none")


def _split(logits, valids, width, pad):
    """Columns of `logits` cut into slices of `width`, of which the first `valid` are real and the rest hold `pad`."""
    slices, first = [], 0
    for valid in valids:
        piece = logits[:, first:first + valid]
        slices.append((F.pad(piece, (0, width - valid), value=pad).detach(), first, valid))
        first += valid
    return slices


def _on_slices(fn, logits, targets, dloss, valids, width, pad, **more):
    """What every rank computes, in one process: the fake gather returns all slices' stats, its own put in its place."""
    slices = _split(logits, valids, width, pad)
    ignore = more.get("ignore_index", -100)
    every = torch.stack([_stats_ref(x, targets, first, valid, ignore) for x, first, valid in slices])
    results = []
    for r, (x, first, valid) in enumerate(slices):
        x.requires_grad_()
        loss = fn(x, targets, first=first, valid=valid, **more,
                  gather=lambda own, r=r: torch.cat([every[:r], own[None], every[r + 1:]]))
        loss.backward(dloss)
        assert not x.grad[:, valid:].any(), "padding columns must have gradient zero"
        results.append((loss.detach(), x.grad[:, :valid]))
    return results


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_kernel_matches(shape, dtype, device):
    x, targets, dloss = _data(*shape, device)
    targets[::3] = -100
    check_budget(cross_entropy, cross_entropy_ref, [x, targets], dtype, [dloss])
    check_budget(cross_entropy, _eager, [x, targets], dtype, [dloss])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_cross_entropy_stats_kernel_matches(dtype, device):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel")
    x, targets, _ = _data(9, 2100, device)
    targets[4] = -100
    for first, valid in ((0, 2100), (1000, 2000), (2100, 0), (5, 1)):
        got = torch.ops.interlace.cross_entropy_stats(x.to(dtype), targets, first, valid, -100)
        want = _stats_ref(x.to(dtype).double(), targets, first, valid, -100)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("fn", [cross_entropy, cross_entropy_ref])
@pytest.mark.parametrize("pad", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("t,valids", SLICES)
def test_slices_equal_the_whole(fn, pad, t, valids):
    x, targets, dloss = _data(11, 37)
    x, dloss, targets[3] = x.double(), dloss.double(), -100
    whole = x.clone().requires_grad_()
    F.cross_entropy(whole, targets, reduction="none").backward(dloss)
    results = _on_slices(fn, x, targets, dloss, valids, 20 if t > 1 else 37, pad)
    for loss, _ in results:
        torch.testing.assert_close(loss, _eager(x, targets), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in results], 1), whole.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRET else [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [1, 3])
def test_cross_entropy_combine_kernel_matches(ranks, dtype, device):
    """As torch composes it, with an ignored row and one rank's slice of padding (-inf, 0, 0)."""
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("no kernel")
    g = torch.Generator().manual_seed(0)
    stats = torch.stack((torch.randn(ranks, 300, generator=g) * 5, torch.rand(ranks, 300, generator=g) + 1,
                         torch.randn(ranks, 300, generator=g)), -1).to(device, dtype)
    stats[-1, 4], targets = torch.tensor([-torch.inf, 0, 0]), torch.zeros(300, dtype=torch.int64, device=device)
    targets[7], stats[:, 7] = -100, torch.tensor([-torch.inf, 0, 0])
    if ranks == 1:
        stats[-1, 4, 1] = 1.0
    got = torch.ops.interlace.cross_entropy_combine(stats, targets, -100)
    torch.testing.assert_close(got, _combine(stats, targets == -100))
    assert got[0][7] == 0 and got[2][7] == 1
    torch.library.opcheck(torch.ops.interlace.cross_entropy_combine.default, (stats, targets, -100))


def test_slices_in_fp32_kernel_matches(device):
    x, targets, dloss = _data(6, 37, device)
    x[2, 20:] = -torch.inf                                            # a slice of -inf only, of a row that is not
    targets[2] = 3
    want = x.double().requires_grad_()
    F.cross_entropy(want, targets, reduction="none").backward(dloss.double())
    results = _on_slices(cross_entropy, x, targets, dloss, [20, 17, 0], 20, 0.0)
    for loss, _ in results:
        torch.testing.assert_close(loss.double(), _eager(x.double(), targets), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([g for _, g in results], 1).double(), want.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits_kernel_matches(dtype, device):
    x, targets, dloss = _data(8, 3000, device, scale=1e4)
    x[5] = 1e4 + torch.randn(3000, device=device)                     # all close to 1e4: a rounded lse errs by 5e-4
    x[:, 7] = -torch.inf
    targets[targets == 7] = 8
    x, dloss = (t.to(dtype) for t in (x, dloss))
    if dtype == torch.float64 and INTERPRET:
        pytest.skip("the interpreter has no fp64")
    truth, eager, got = (v.clone().requires_grad_() for v in (x.double(), x, x))
    losses = []
    for v, fn in ((truth, _eager), (eager, _eager), (got, cross_entropy)):
        losses.append(fn(v, targets))
        losses[-1].backward(dloss.to(v.dtype))
    for t, e, g in ((losses[0], losses[1], losses[2]), (truth.grad, eager.grad, got.grad)):
        error, eagers = ((v.detach().double() - t.detach()).abs().max() for v in (g, e))
        assert error <= eagers + torch.finfo(dtype).eps, f"error {error:.3g} against eager's {eagers:.3g}"


def test_infinite_loss_and_nan_as_torch_has_them(device):
    x = torch.zeros(4, 5, device=device)
    x[0, 2], x[1, :], x[2, 1], x[3, 1] = -torch.inf, -torch.inf, torch.nan, torch.inf
    targets = torch.tensor([2, 0, 0, 1], device=device)
    torch.testing.assert_close(cross_entropy(x, targets), _eager(x, targets), equal_nan=True)
    x.requires_grad_()
    ignored = torch.full_like(targets, -100)                          # not even NaN reaches an ignored row
    loss = cross_entropy(x, ignored)
    loss.sum().backward()
    assert not loss.any() and not x.grad.any()


def test_ignore_index_may_be_a_token(device):
    x, targets, dloss = _data(20, 4, device)
    got, want = x.clone().requires_grad_(), x.clone().requires_grad_()
    cross_entropy(got, targets, ignore_index=2).backward(dloss)
    F.cross_entropy(want, targets, ignore_index=2, reduction="none").backward(dloss)
    torch.testing.assert_close(got.grad, want.grad)


def test_error_of_a_large_vocabulary_is_no_larger_than_eagers():
    x, targets, dloss = _data(16, 131072, scale=1.0)
    for dtype in DTYPES:
        check_budget(cross_entropy, _eager, [x, targets], dtype, [dloss])
    x = x.bfloat16()                                                  # the budget rounds to x's dtype; the loss is fp32
    torch.testing.assert_close(cross_entropy(x, targets), _eager(x.double(), targets).float(), rtol=1e-6, atol=0)


def test_views_expanded_gradients_and_one_token(device):
    x, targets, _ = _data(6, 12, device)
    view = x[:, 2:9].requires_grad_()
    targets %= 7
    cross_entropy(view, targets).mean().backward()                    # dloss of mean: expanded, stride 0
    want = x[:, 2:9].clone().requires_grad_()
    F.cross_entropy(want, targets).backward()
    torch.testing.assert_close(view.grad, want.grad)
    other = torch.arange(12, device=device) % 6
    torch.testing.assert_close(cross_entropy(x.t(), other), _eager(x.t(), other))


def test_cross_entropy_op_contract_kernel_matches(device):
    x, targets, dloss = _data(4, 64, device)
    assert fused(x), "the C++ ops are not built: make setup"
    torch.library.opcheck(torch.ops.interlace.cross_entropy_stats.default, (x, targets, 0, 60, -100))
    m, total = x.amax(1), (x - x.amax(1, keepdim=True)).exp().sum(1)
    torch.library.opcheck(torch.ops.interlace.cross_entropy_bwd.default, (dloss, x, targets, m, total, 0, 60, -100))


def test_cross_entropy_repeats_bit_for_bit(device):
    x, targets, dloss = _data(33, 1029, device)
    def once():
        xs = x.clone().requires_grad_()
        loss = cross_entropy(xs, targets)
        loss.backward(dloss)
        return loss, xs.grad
    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_leaves_logits_alone_and_keeps_no_copy():
    x, targets, dloss = _data(5, 100)
    before = x.clone()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = cross_entropy(x.requires_grad_(), targets)
    loss.backward(dloss)
    assert torch.equal(x, before)
    assert sum(t.numel() for t in saved if t.data_ptr() != x.data_ptr()) == 3 * 5     # targets, m, total


def test_combine_survives_ranks_of_padding():
    empty = torch.tensor([[-torch.inf, 0.0, 0.0]])
    loss, m, total = _combine(torch.stack([empty, torch.tensor([[2.0, 3.0, 1.0]]), empty]), torch.tensor([False]))
    torch.testing.assert_close(loss, torch.tensor([3.0]).log() + 1.0)
    assert (m.item(), total.item()) == (2.0, 3.0)


def test_cross_entropy_rejects_misuse(device):
    x, targets, _ = _data(4, 8, device)
    with pytest.raises(ValueError, match=r"logits must be floating point \[N, V\], got torch.float32 \[2, 2, 8\]"):
        cross_entropy(x.view(2, 2, 8), targets)
    with pytest.raises(ValueError, match=r"targets must be int64 \[4\]"):
        cross_entropy(x, targets[:3])
    with pytest.raises(ValueError, match=r"targets must be int64 \[4\]"):
        cross_entropy(x, targets.int())
    with pytest.raises(ValueError, match=r"valid must be in \[0, 8\]"):
        cross_entropy(x, targets, valid=9)
