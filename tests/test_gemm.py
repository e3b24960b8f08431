"""gemm: both ways of a 16-bit product on a CPU, whichever this CPU would take, against float64; into a given output too; our kernel."""
import sys

import pytest
import torch
from torch.library import opcheck

from interlace.kernels import dispatch
from interlace.kernels.comm.gemm import _FAST, TILES, gemm, ready


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


ONEDNN = {"": (True, True), "avx2": (False, False), "avx2_vnni_2": (False, False), "avx512_core_vnni": (False, False),
          "avx512_core_bf16": (True, False), "avx512_core_fp16": (True, True), "avx10_1_512": (True, True), "avx512_core_amx": (True, True)}


@pytest.mark.parametrize("isa", ONEDNN)
def test_torchs_products_are_held_to_what_onednn_may_use(isa, monkeypatch):
    monkeypatch.setattr(dispatch, "ONEDNN_ISA", isa)
    monkeypatch.setattr(dispatch, "cpu_flags", lambda: frozenset({"avx2", "avx512_bf16", "avx512_fp16"}))
    assert (dispatch.multiplies("bf16"), dispatch.multiplies("fp16")) == ONEDNN[isa]
    monkeypatch.setattr(dispatch, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert not dispatch.multiplies("bf16") and not dispatch.multiplies("fp16")


def test_double_is_torchs():
    a, b = torch.randn(4, 5).double(), torch.randn(5, 6).double()
    assert torch.equal(gemm(a, b), a @ b)


SHAPES = [(1, 1, 1), (5, 7, 3), (33, 513, 31), (64, 1024, 200), (97, 130, 65), (300, 600, 129), (150, 1100, 40)]


@pytest.mark.skipif(not TILES, reason="needs the C++ kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_our_kernel(shape, dtype):
    """Every layout of both operands, rows that lie apart, packed before or not: the same bits, no further from float64 than torch."""
    M, K, N = shape
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(M, K, generator=g).to(dtype), torch.randn(K, N, generator=g).to(dtype)
    truth, eager = x.double() @ y.double(), x @ y
    apart = lambda t: torch.cat([t, t], 1)[:, :t.shape[1]]            # noqa: E731
    flip = lambda t: t.t().contiguous().t()                           # noqa: E731
    results, packed = [], torch.empty(K * -(-N // 64) * 64)
    for a in (x, flip(x), apart(x)):
        for b in (y, flip(y), apart(y)):
            out = torch.full((M, N + 3), torch.nan, dtype=dtype)
            torch.ops.interlace.gemm(a, b, out[:, :N])
            assert out[:, N:].isnan().all(), "nothing is written beside the result"
            results.append(out[:, :N])
            torch.ops.interlace.gemm_pack(b, packed)
            results.append(torch.empty(M, N, dtype=dtype))
            torch.ops.interlace.gemm_packed(a, packed, results[-1])
    assert all(torch.equal(r, results[0]) for r in results)
    allowed = (eager.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert (results[0].double() - truth).abs().max() <= allowed
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.ops.interlace.gemm(x, y, results[1])
    torch.set_num_threads(threads)
    torch.ops.interlace.gemm(x[M // 2:], y, results[2][M // 2:])
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0]), "bits depend on threads or other rows"


@pytest.mark.skipif(not TILES, reason="needs the C++ kernel")
def test_our_kernel_is_taken(monkeypatch):
    """From 32 rows on where torch is slow; never where a gradient is recorded, and NaN and inf go through."""
    module = sys.modules[gemm.__module__]
    monkeypatch.setattr(module, "_AMD", True)
    a, b = torch.randn(40, 50), torch.randn(50, 6)
    want = torch.empty(40, 6)
    torch.ops.interlace.gemm(a, b, want)
    assert torch.equal(gemm(a, b), want) and torch.equal(gemm(a, ready(b)), want)
    w = b.clone().requires_grad_()
    gemm(a, w).sum().backward()
    assert torch.allclose(w.grad, a.sum(0)[:, None].expand(50, 6), atol=1e-4)
    a[3, 4], a[5, 6] = torch.nan, torch.inf
    got = gemm(a, b)
    assert got[3].isnan().all() and got[5].isinf().all() and got[[*range(3), 4, *range(6, 40)]].isfinite().all()


@pytest.mark.skipif(not TILES, reason="needs the C++ kernel")
@pytest.mark.parametrize("K", [8192, 9001])
def test_a_deep_product_in_pieces(K, monkeypatch):
    """From 8192 on: no further from float64 than torch, the same bits for other rows, into a given output."""
    monkeypatch.setattr(sys.modules[gemm.__module__], "_AMD", True)
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(40, K, generator=g), torch.randn(33, K, generator=g).t()
    truth, out = a.double() @ b.double(), torch.full((40, 36), torch.nan)
    got = gemm(a, b, out=out[:, :33])
    assert torch.equal(got, gemm(a, b)) and out[:, 33:].isnan().all() and torch.equal(gemm(a[:35], b), got[:35])
    allowed = (a @ b - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
    assert (got - truth).abs().max() <= allowed


@pytest.mark.skipif(not TILES, reason="needs the C++ kernel")
def test_ops():
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    opcheck(torch.ops.interlace.gemm.default, (a, b, torch.empty(4, 6)))
    opcheck(torch.ops.interlace.gemm_pack.default, (b, torch.empty(5 * 64)))
    opcheck(torch.ops.interlace.gemm_packed.default, (a, torch.zeros(5 * 64), torch.empty(4, 6)))
    with pytest.raises(RuntimeError, match="gemm: dtype must be float32, bfloat16 or float16"):
        torch.ops.interlace.gemm(a.double(), b.double(), torch.empty(4, 6).double())
