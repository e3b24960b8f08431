import pytest
import torch
import torch.nn.functional as F
from budget import DTYPES, check_budget

from interlace.kernels import clamped_swiglu, clamped_swiglu_ref
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1, 1, 1), (7, 125, 3), (64, 32, 4), (5, 1100, 2), (0, 8, 3), (3, 0, 2)]      # rows, F, experts; 1100: two blocks
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # interpreted: no bf16, no fp64


def _data(shape, device):
    """z reaches past both limits; expert 1 has no rows, the last rows no expert."""
    R, width, E = shape
    g = torch.Generator().manual_seed(0)
    z, bias, p, dy = (torch.randn(s, generator=g) for s in ((R, 2 * width), (E, 2 * width), (R,), (R, width)))
    counts = torch.zeros(E, dtype=torch.int32)
    counts[0], counts[-1] = R // 2, max(R // 2 - 1, 0)
    return (z * 6).to(device), bias.to(device), F.pad(counts.cumsum(0), (1, 0)).int().to(device), p.to(device), dy.to(device)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", ["alone", "bias", "bias and probs"])
def test_clamped_swiglu_kernel_matches(given, shape, dtype, device):
    z, bias, offsets, p, dy = _data(shape, device)
    inputs = {"alone": [z], "bias": [z, bias], "bias and probs": [z, bias, p]}[given]

    def over(fn):
        return lambda z, b=None, p=None: fn(z, b, None if b is None else offsets, p, 1.5, 5.0)
    check_budget(over(clamped_swiglu), over(clamped_swiglu_ref), inputs, dtype, [dy])


def test_reference_is_the_formula():
    z, bias, offsets, p, _ = _data((8, 6, 2), "cpu")
    at = offsets.tolist()
    for r, row in enumerate(z):
        expert = [e for e in range(2) if at[e] <= r < at[e + 1]]
        gate, up = (row + bias[expert[0]] if expert else row).view(6, 2).unbind(1)
        want = (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * torch.sigmoid(1.702 * gate.clamp(max=7)) * p[r]
        torch.testing.assert_close(clamped_swiglu_ref(z, bias, offsets, p)[r], want)
    assert (z.abs() > 7).any() and at[-1] < 8


@pytest.mark.parametrize("value", [-1e4, -104.0, -60.0, 1e4, float("nan")])
def test_extreme_values_kernel_matches(value, device):
    z = torch.full((2, 4), value, device=device, requires_grad=True)
    want = z.detach().clone().requires_grad_()
    clamped_swiglu(z).sum().backward()
    clamped_swiglu_ref(want).sum().backward()
    torch.testing.assert_close(clamped_swiglu(z), clamped_swiglu_ref(want), equal_nan=True)
    torch.testing.assert_close(z.grad.nan_to_num(), want.grad.nan_to_num())


def test_op_contract_kernel_matches(device):
    z, bias, offsets, p, dy = _data((6, 32, 3), device)
    assert fused(z), "the C++ ops are not built: make setup"
    for b, o, q in ((None, None, None), (bias, offsets, p)):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (z, b, q)]
        torch.library.opcheck(torch.ops.interlace.clamped_swiglu_fwd.default, (leaves[0], leaves[1], o, leaves[2], 1.702, 7.0))
        torch.library.opcheck(torch.ops.interlace.clamped_swiglu_bwd.default, (dy, z, b, o, q, 1.702, 7.0))


def test_compiled_and_repeated_is_the_same(device):
    z, bias, offsets, p, dy = _data((33, 129, 4), device)
    seen = []
    for fn in (clamped_swiglu, clamped_swiglu, torch.compile(clamped_swiglu, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (z, bias, p)]
        y = fn(leaves[0], leaves[1], offsets, leaves[2])
        y.backward(dy)
        seen.append((y, *(t.grad for t in leaves)))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


def test_in_float64_is_exact():
    z, bias, offsets, p, _ = (t if t.dtype == torch.int32 else t.double().requires_grad_() for t in _data((6, 5, 3), "cpu"))
    assert torch.autograd.gradcheck(lambda z, b, p: clamped_swiglu(z, b, offsets, p), (z, bias, p))


def test_misuse_is_refused(device):
    z, bias, offsets, p, _ = _data((6, 4, 3), device)
    for args, words in (((z[:, :7],), "pairs of gate and up"),
                        ((z.int(),), r"floating .*, got torch.int32 \[6, 8\]; "), ((z, bias), "must come together"),
                        ((z, bias[:, :4], offsets), r"\[E, 8\]"),
                        ((z, bias.double(), offsets), "float64"), ((z, bias, offsets.long()), r"int32 \[4\]"),
                        ((z, None, None, p[:3]), r"floating \[6\]")):
        with pytest.raises(ValueError, match="clamped_swiglu: .*" + words):
            clamped_swiglu(*args)
