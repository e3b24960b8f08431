import pytest
import torch
from budget import DTYPES, check_budget

from interlace.kernels import jitter, jitter_ref
from interlace.kernels.dispatch import INTERPRET, fused
from interlace.kernels.dropout import uniform_ref

SHAPES = [(1,), (3, 7, 250), (17, 1023), (0, 8), (2, 3, 4, 5, 6, 7), ()]
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES  # no bf16, no fp64 there
WHOLE = (4, 6, 8, 10)                                                 # a tensor to cut shards from


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_jitter_kernel_matches(shape, dtype, device):
    torch.manual_seed(0)
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    for eps, seed in ((0.01, 1), (0.5, -3), (0.999, 2**63)):
        check_budget(jitter, jitter_ref, [x, eps, seed], dtype, [dy])


@pytest.mark.parametrize("fn", [jitter, jitter_ref])
@pytest.mark.parametrize("dim", range(4))
def test_every_split_draws_the_same_noise_kernel_matches(fn, dim, device):
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


def test_noise_is_uniform_and_of_the_hash():
    n, eps = 1 << 18, 0.25
    f = jitter(torch.ones(n, dtype=torch.float64), eps, 3)
    u = (f - 1) / eps                                                 # in [-1, 1)
    assert -1 <= u.min() < -0.9999 and 0.9999 < u.max() < 1
    assert abs(u.mean()) < 5 * (1 / 3 / n) ** 0.5 and abs(u.square().mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5   # five sigma
    other = jitter(torch.ones(n, dtype=torch.float64), eps, 4)
    assert torch.corrcoef(torch.stack([f, other]))[0, 1].abs() < 5 / 512
    assert torch.corrcoef(torch.stack([f[1:], f[:-1]]))[0, 1].abs() < 5 / 512
    assert uniform_ref(torch.Size([8]), (1,), 0, torch.device("cpu")).max() < 2**24


def test_eps_zero_is_the_identity_and_nothing_is_saved(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    assert jitter(x, 0.0, 1) is x
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        jitter(x, 0.1, 0)
    assert not saved


def test_second_derivative_and_gradcheck():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: jitter(x, 0.3, 4), x)
    assert torch.autograd.gradgradcheck(lambda x: jitter(x, 0.3, 4).square(), x)


def test_jitter_op_contract_kernel_matches(device):
    x = torch.randn(4, 6, device=device, requires_grad=True)
    assert fused(x), "the C++ ops are not built: make setup"
    torch.library.opcheck(torch.ops.interlace.jitter.default, (x, 123, 0.1 * 2**-23, [1, 1, 4, 6], [0, 0, 100, 1]))


def test_jitter_rejects_misuse(device):
    x = torch.randn(2, 8, device=device)
    for eps in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"jitter: eps must be in \[0, 1\)"):
            jitter(x, eps, 0)
    with pytest.raises(ValueError, match=r"jitter: strides must be one int per dim of x \(2\)"):
        jitter(x, 0.5, 0, strides=(1,))
    with pytest.raises(ValueError, match="jitter: x must have at most 4 dims after merging"):
        jitter(x.view(2, 2, 2, 2, 1).expand(2, 2, 2, 2, 2), 0.5, 0, strides=(1, 3, 5, 7, 9))
    with pytest.raises(ValueError, match=r"floating point, got torch.int64"):
        jitter(x.long(), 0.5, 0)
