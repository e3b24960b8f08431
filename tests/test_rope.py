import pytest
import torch
from budget import DTYPES, check_budget

from interlace.kernels import rope, rope_ref, rope_tables
from interlace.kernels.dispatch import INTERPRET, fused

SHAPES = [(1, 1, 1, 2), (5, 2, 3, 6), (7, 1, 5, 64), (3, 2, 17, 254), (0, 2, 3, 8), (4, 2, 0, 8)]
KERNEL_DTYPES = [torch.float32, torch.float16] if INTERPRET else DTYPES   # interpreted: no bf16, no fp64


def _data(shape, device):
    torch.manual_seed(0)
    return torch.randn(shape, device=device), torch.randn(shape, device=device)


def _with_tables(fn, S, Dh, device):
    """fn over x alone: check_budget casts every tensor it is given, and tables stay fp32 under bf16 x."""
    def call(x):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = rope_tables(torch.arange(S, device=device) + 3, Dh)
        return fn(x, cos.to(dtype), sin.to(dtype))
    return call


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_kernel_matches(shape, dtype, device):
    x, dy = _data(shape, device)
    ours, ref = (_with_tables(fn, shape[0], shape[3], device) for fn in (rope, rope_ref))
    check_budget(ours, ref, [x], dtype, [dy])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_rope_slice_of_qkv_kernel_matches(dtype, device):
    """q and k inside one qkv buffer, a transposed B and S, and a strided gradient: read in place, never copied."""
    S, B, H, Dh = 6, 3, 5, 10
    qkv, dy = torch.randn(B, S, H, 3 * Dh, device=device), torch.randn(S, B, H, 2 * Dh, device=device)
    for part in (0, 1):
        def both(fn, part=part):
            turn = _with_tables(fn, S, Dh, device)
            return lambda qkv: torch.cat((turn(qkv.transpose(0, 1)[..., part * Dh:(part + 1) * Dh]),) * 2, -1)
        check_budget(both(rope), both(rope_ref), [qkv], dtype, [dy])


FORMS = {"partial": (10, 3, False, False), "interleaved": (8, 4, True, False), "interleaved-partial": (11, 2, True, True),
         "positions": (8, 4, False, True), "nothing": (4, 0, False, False)}   # Dh, d, interleaved, tables of their own for each sample


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rope_forms_kernel_matches(form, dtype, device):
    (Dh, d, interleaved, own), (S, B, H) = FORMS[form], (5, 2, 3)
    x, dy = _data((S, B, H, Dh), device)
    angle = torch.randn((S, B, d) if own else (S, d), device=device, dtype=torch.float64)

    def call(fn):
        def turn(x):
            to = torch.float64 if x.dtype == torch.float64 else torch.float32
            return fn(x, angle.cos().to(to), angle.sin().to(to), interleaved=interleaved)
        return turn
    check_budget(call(rope), call(rope_ref), [x], dtype, [dy])


def test_rope_of_heads_first_is_hugging_faces_kernel_matches(device):
    """x [B, H, S, Dh] and tables [B, S, 2d] whose halves repeat, both read in place."""
    B, H, S, Dh, R = 2, 3, 5, 10, 6
    x = torch.randn(B, S, H, Dh, device=device).transpose(1, 2)
    angle = torch.randn(B, S, R // 2, device=device).repeat(1, 1, 2)
    cos, sin = angle.cos(), angle.sin()
    turned, rest = x[..., :R], x[..., R:]
    a, b = turned.chunk(2, -1)
    want = torch.cat((turned * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None], rest), -1)
    got = rope(x.permute(2, 0, 1, 3), *(t[..., :R // 2].transpose(0, 1) for t in (cos, sin)))
    torch.testing.assert_close(got.permute(1, 2, 0, 3), want)


def test_rope_interleaved_is_halves_of_shuffled_channels(device):
    x, _ = _data((4, 2, 3, 8), device)
    tables = rope_tables(torch.arange(4, device=device), 8)
    halves = rope(x.unflatten(-1, (4, 2)).transpose(-1, -2).flatten(-2), *tables)
    torch.testing.assert_close(rope(x, *tables, interleaved=True), halves.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2))


def test_rope_is_the_complex_rotation(device):
    x, _ = _data((9, 2, 3, 8), device)
    positions = torch.arange(9, device=device) * 7
    angle = positions.double()[:, None] * 500.0 ** (-torch.arange(4, device=device).double() / 4)
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    got = rope(x, *rope_tables(positions, 8, base=500.0))
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1).float())
    assert got.is_contiguous()


def test_rope_tables_are_exact(device):
    cos, sin = rope_tables(torch.tensor([0, 1, 1_000_003], device=device), 2, dtype=torch.float64)
    want = torch.tensor([[0.0], [1.0], [1_000_003.0]], dtype=torch.float64, device=device)
    torch.testing.assert_close((cos, sin), (want.cos(), want.sin()), rtol=0, atol=1e-15)
    assert rope_tables(torch.arange(3), 6, device=device)[0].device.type == device


def test_rope_last_dimension_strided(device):
    x, _ = _data((4, 2, 8, 3), device)
    cos, sin = rope_tables(torch.arange(4, device=device), 8)
    torch.testing.assert_close(rope(x.transpose(2, 3), cos, sin), rope_ref(x.transpose(2, 3), cos, sin))


def test_rope_op_contract_kernel_matches(device):
    x = torch.randn(4, 2, 3, 24, device=device, requires_grad=True)
    cos, sin = rope_tables(torch.arange(4, device=device), 8)
    assert fused(x), "the C++ ops are not built: make setup"
    cos, sin = (t[:, None].expand(4, 2, 4) for t in (cos, sin))
    for inverse, interleaved, part in ((False, False, x[..., :8]), (True, False, x[..., :8]), (False, True, x), (True, True, x)):
        torch.library.opcheck(torch.ops.interlace.rope_fwd.default, (part, cos, sin, inverse, interleaved))


def test_rope_no_gradient_to_the_tables(device):
    x, dy = _data((4, 2, 3, 8), device)
    cos, sin = (t.requires_grad_() for t in rope_tables(torch.arange(4, device=device), 8))
    rope(x.requires_grad_(), cos, sin).backward(dy)
    assert x.grad is not None and cos.grad is None and sin.grad is None


def test_rope_compiled_is_eager(device):
    x, dy = _data((4, 2, 3, 8), device)
    cos, sin = rope_tables(torch.arange(4, device=device), 8)
    both = []
    for fn in (rope, torch.compile(rope, backend="aot_eager", fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = fn(leaf, cos, sin)
        y.backward(dy)
        both.append((y, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_rope_repeats_bit_for_bit(device):
    x, _ = _data((33, 2, 3, 34), device)
    cos, sin = rope_tables(torch.arange(33, device=device), 34)
    assert torch.equal(rope(x, cos, sin), rope(x, cos, sin))


def test_rope_rejects_misuse(device):
    x = torch.randn(4, 2, 3, 8, device=device)
    cos, sin = rope_tables(torch.arange(4, device=device), 8)
    with pytest.raises(ValueError, match=r"rope: x must be \[S, B, H, Dh\], got \[4, 3, 8\]; "):
        rope(x[:, 0], cos, sin)
    with pytest.raises(ValueError, match=r"rope: cos must be .* 2 d <= Dh = 7, got \[4, 4\]; "):
        rope(x[..., :7], cos, sin)
    with pytest.raises(ValueError, match=r"rope: cos must be .* B = 2 .*got \[4, 3, 4\]; "):
        rope(x, cos[:, None].expand(4, 3, 4), sin)
    with pytest.raises(ValueError, match=r"rope: sin must be .* S = 4, .*got \[3, 4\]; "):
        rope(x, cos, sin[:3])
    with pytest.raises(ValueError, match=r"rope: cos must be torch.float32 .*got torch.float64; "):
        rope(x, cos.double(), sin)
    with pytest.raises(ValueError, match="rope_tables: dim must be even and positive, got 7; "):
        rope_tables(torch.arange(4), 7)
    with pytest.raises(ValueError, match=r"rope_tables: positions must be \[S\], got \[2, 2\]; "):
        rope_tables(torch.zeros(2, 2), 8)
