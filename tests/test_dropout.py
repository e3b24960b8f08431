import pytest
import torch
from budget import DTYPES, check_budget

from interlace.kernels import dropout, dropout_ref
from interlace.kernels.dispatch import INTERPRET, fused
from interlace.kernels.dropout import _merge

SHAPES = [(1,), (3, 7, 250), (4, 128), (17, 1023), (0, 8), (2, 3, 4, 5, 6, 7), ()]
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES  # no bf16, no fp64 there
WHOLE = (4, 6, 8, 10)                                                 # a tensor to cut shards from


def _mask(*shape, p=0.5, seed=0, **more):
    return dropout(torch.ones(shape), p, seed, **more) != 0


def _correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs().item()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout_kernel_matches(shape, dtype, device):
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    for p, seed in ((0.1, 1), (0.5, -3), (0.999, 2**63)):
        check_budget(dropout, dropout_ref, [x, p, seed], dtype, [dy])
        assert torch.equal(dropout(x.to(dtype), p, seed), dropout_ref(x.to(dtype), p, seed)), "not the same bits"


@pytest.mark.parametrize("strides", [(480, 80, 10, 1), (1, 4, 24, 192), (10**12, 3, 10**15, 7), (0, 0, 0, 5)], ids=str)
def test_dropout_global_index_kernel_matches(strides, device):
    for sizes in (WHOLE, (4, 1, 8, 10), (1, 6, 1, 10), (4, 6, 1, 1)):
        x = torch.randn(sizes, device=device)
        for base in (0, 12345, 2**62, -1):
            assert torch.equal(dropout(x, 0.3, 9, base=base, strides=strides),
                               dropout_ref(x, 0.3, 9, base=base, strides=strides)), f"sizes {sizes}, base {base}"


@pytest.mark.parametrize("fn", [dropout, dropout_ref])
@pytest.mark.parametrize("dim", range(4))
def test_every_split_drops_the_same_elements_kernel_matches(fn, dim, device):
    torch.manual_seed(0)
    x, dy = torch.randn(WHOLE, device=device, requires_grad=True), torch.randn(WHOLE, device=device)
    whole = fn(x, 0.4, 5)
    whole.backward(dy)
    start = 0
    for n in (1, WHOLE[dim] - 1):                                     # two uneven shards
        shard = x.detach().narrow(dim, start, n).requires_grad_()     # a view: not contiguous for dim > 0
        y = fn(shard, 0.4, 5, base=start * whole.stride(dim), strides=whole.stride())
        y.backward(dy.narrow(dim, start, n))
        assert torch.equal(y, whole.narrow(dim, start, n))
        assert torch.equal(shard.grad, x.grad.narrow(dim, start, n))
        start += n


def test_hash_is_splitmix64():
    def splitmix(state):                                              # Vigna's code: one output of the generator
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31
    assert splitmix(1234567) == 6457827717110365317                   # known answer
    seed, p = 77, 0.25
    key = splitmix(seed * 0x9E3779B97F4A7C15)
    want = [splitmix((key + i - 0x9E3779B97F4A7C15) % 2**64) / 2**64 >= p for i in range(1000)]
    assert _mask(1000, p=p, seed=seed).tolist() == want


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_mean_is_kept(p):
    n = 1 << 20
    keep = _mask(n, p=p, seed=3).double().mean().item()
    assert abs(keep - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5        # five sigma
    kept = dropout(torch.ones(n), p, 3).max().item()
    assert kept == torch.tensor(1 / (1 - p)).item()


def test_seeds_and_neighbours_are_independent():
    n, limit = 1 << 18, 5 / (1 << 9)                                  # five sigma of a correlation over n draws
    masks = [_mask(n, seed=s) for s in (0, 1, 2, 3, 1 << 32, -1)]
    for i, a in enumerate(masks):
        assert _correlation(a[1:], a[:-1]) < limit and _correlation(a[1024:], a[:-1024]) < limit
        for b in masks[i + 1:]:
            assert _correlation(a, b) < limit
            assert _correlation(a[1:], b[:-1]) < limit
    first = torch.stack([_mask(8, seed=s) for s in range(4096)])      # few elements, many seeds
    assert (first.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / 64
    assert _correlation(first[1:, 0], first[:-1, 0]) < 5 / 64


def test_rows_and_columns_are_as_even_as_chance():
    keep = _mask(1024, 1024, seed=8).double()
    for dim in (0, 1):
        z = (keep.mean(dim) - 0.5) / (0.5 / 32)                       # 1024 standard normals
        assert z.abs().max() < 5 and abs(z.var() - 1) < 5 * (2 / 1024) ** 0.5


def test_p_zero_is_the_identity(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = dropout(x, 0.0, 1)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_dropped_inf_or_nan_is_zero(device):
    for bad in (torch.inf, torch.nan):
        y = dropout(torch.full((100,), bad, device=device), 0.5, 0)
        keep = _mask(100).to(device)
        assert not y[~keep].any() and not y[keep].isfinite().any()


def test_second_derivative_and_gradcheck():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, 4), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.3, 4).square(), x)


def test_dropout_saves_nothing():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(torch.randn(10, requires_grad=True), 0.5, 0)
    assert not saved


def test_merge():
    assert _merge(torch.Size([2, 3, 4, 5, 6, 7]), (2520, 840, 210, 42, 7, 1)) == ([1, 1, 1, 5040], [0, 0, 0, 1])
    assert _merge(torch.Size([2, 3, 4]), (24, 8, 1)) == ([1, 1, 6, 4], [0, 0, 8, 1])
    assert _merge(torch.Size([1, 1]), (5, 9)) == ([1, 1, 1, 1], [0, 0, 0, 1])
    assert _merge(torch.Size([3, 1, 2]), (2, 77, 1)) == ([1, 1, 1, 6], [0, 0, 0, 1])


def test_threads_do_not_matter():
    x = torch.randn(7, 9000)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(dropout(x, 0.2, 1, strides=(10000, 1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], r) for r in results)


def test_dropout_op_contract_kernel_matches(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    assert fused(x), "the C++ ops are not built: make setup"
    torch.library.opcheck(torch.ops.interlace.dropout.default, (x, 123, 1 << 22, 4 / 3, [1, 1, 4, 6], [0, 0, 100, 1]))


def test_dropout_rejects_misuse(device):
    x = torch.randn(2, 8, device=device)
    for p in (1.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            dropout(x, p, 0)
    with pytest.raises(ValueError, match=r"one int per dim of x \(2\)"):
        dropout(x, 0.5, 0, strides=(1,))
    with pytest.raises(ValueError, match="at most 4 dims after merging"):
        dropout(x.view(2, 2, 2, 2, 1).expand(2, 2, 2, 2, 2), 0.5, 0, strides=(1, 3, 5, 7, 9))
    with pytest.raises(ValueError, match=r"floating point, got torch.int64"):
        dropout(x.long(), 0.5, 0)
