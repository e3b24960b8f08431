"""gemm: both ways of a 16-bit product on a CPU, whichever this CPU would take, against float64; into a given output too."""
import pytest
import torch

from interlace.kernels.comm.gemm import _FAST, gemm


@pytest.mark.parametrize("fast", [False, True], ids=["through fp32", "torch's own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M, K, N", [(5, 7, 3), (64, 300, 33), (150, 4000, 40), (0, 4, 2), (3, 0, 2)])
def test_16_bit_products(M, K, N, dtype, fast, monkeypatch):
    monkeypatch.setitem(_FAST, dtype, fast)
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=g).to(dtype), torch.randn(N, K, generator=g).to(dtype).t()   # b transposed, as a weight is
    truth, out = a.double() @ b.double(), torch.full((M, N), torch.nan, dtype=dtype)
    got = gemm(a, b, out=out)
    assert got.data_ptr() == out.data_ptr() and torch.equal(got, gemm(a, b)) and got.dtype == dtype
    if truth.numel():
        limit = torch.finfo(dtype).eps * (truth.abs().max() + 1e-3)
        assert (got.double() - truth).abs().max() <= limit


def test_through_fp32_rounds_once(monkeypatch):
    """256 + 1 + ... + 1 in bf16 partial sums would stay 256: fp32 ones give 512."""
    monkeypatch.setitem(_FAST, torch.bfloat16, False)
    a = torch.ones(1, 257, dtype=torch.bfloat16)
    a[0, 0] = 256
    assert gemm(a, torch.ones(257, 1, dtype=torch.bfloat16)).item() == 512


def test_full_precision_is_torchs():
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    assert torch.equal(gemm(a, b), a @ b) and torch.equal(gemm(a.double(), b.double()), a.double() @ b.double())
