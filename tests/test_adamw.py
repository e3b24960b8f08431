"""adamw against torch.optim.AdamW in fp64, however the lists are cut; 16-bit copies, clip scale, two decays."""
import pytest
import torch
from torch.library import opcheck

from interlace.kernels import adamw, adamw_ref
from interlace.kernels.dispatch import INTERPRET

SIZES = [1, 40, 7, 0, 16, 16400, 333]
DECAYS = [0.0, 0.3, 0.3, 0.1, 0.0, 0.1, 0.0]
HYPER = {"betas": (0.8, 0.95), "eps": 1e-8}


def state(dtype, device="cpu", sizes=SIZES):
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(n, generator=g).to(device, dtype) for n in sizes]
    return weights, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]


def gradients(step, dtype, device="cpu", sizes=SIZES):
    """Over many orders of magnitude, where eps, the bias correction and the clip matter."""
    g = torch.Generator().manual_seed(100 + step)
    return [(torch.randn(n, generator=g) * 10.0 ** torch.randint(-9, 2, (n,), generator=g)).to(device, dtype) for n in sizes]


def trained(fn, dtype, device, steps=6, scale=0.25):
    weights, first, second = state(dtype, device)
    for step in range(1, steps + 1):
        fn(weights, gradients(step, dtype, device), first, second, lr=0.01 * step, step=step, weight_decay=DECAYS, scale=scale, **HYPER)
    return weights, first, second


def torch_trained(dtype, device, steps=6, scale=0.25):
    weights, *_ = state(dtype, device)
    opt = torch.optim.AdamW([{"params": [w], "weight_decay": d} for w, d in zip(weights, DECAYS)], foreach=False, **HYPER)
    for step in range(1, steps + 1):
        for w, g, group in zip(weights, gradients(step, dtype, device), opt.param_groups):
            w.grad, group["lr"] = g * scale, 0.01 * step
        opt.step()
    return weights, *([opt.state[w][k] for w in weights] for k in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("fn", [adamw, adamw_ref])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_matches_torch(fn, dtype, device):
    """The error rule: of weights and moments we err no more than torch's loop does in the same type."""
    truth, eager, ours = torch_trained(torch.float64, device), torch_trained(dtype, device), trained(fn, dtype, device)
    for kind, t, e, o in zip(("weights", "exp_avg", "exp_avg_sq"), truth, eager, ours):
        t, e, o = (torch.cat(many).double() for many in (t, e, o))
        scale = t.abs().max()
        allowed = (e - t).abs().max() + 2 * torch.finfo(dtype).eps * scale
        assert (o - t).abs().max() <= allowed, f"{kind}: {(o - t).abs().max():.3g} > {allowed:.3g}"
        small = t.abs() > 1e-20 * scale                               # a relative one: exp_avg_sq spans 20 orders of magnitude
        relative = ((o - t).abs() / t.abs())[small].max()
        assert kind == "weights" or relative <= ((e - t).abs() / t.abs())[small].max() * 2 + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", [torch.float16] if INTERPRET else [torch.bfloat16, torch.float16])   # the interpreter truncates to bf16
def test_kernel_matches_its_copies(kind, device):
    weights, first, second = state(torch.float32, device)
    copies = [torch.full_like(w, 7, dtype=kind) for w in weights]
    adamw(weights, gradients(1, torch.float32, device), first, second, lr=0.1, step=1, copies=copies, **HYPER)
    for w, c in zip(weights, copies):
        assert torch.equal(w.to(kind), c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_matches_itself_however_it_is_cut(dtype, device):
    """ZeRO-1 cuts a buffer elsewhere than one process does, and machines have other numbers of threads: the same bits."""
    n, cuts = 40000, [1, 17, 160, 4096, 20000, 40000 - 24274]
    (flat,), (first,), (second,) = state(dtype, device, [n])
    (grad,) = gradients(1, dtype, device, [n])
    views = [t.clone() for t in (flat, grad, first, second)]
    threads = torch.get_num_threads()
    for step in (1, 2, 3):
        torch.set_num_threads(1)
        adamw([flat], [grad], [first], [second], lr=0.1, step=step, weight_decay=0.1, scale=0.7, **HYPER)
        torch.set_num_threads(3)
        adamw(*(v.split(cuts) for v in views), lr=0.1, step=step, weight_decay=0.1, scale=0.7, **HYPER)
    torch.set_num_threads(threads)
    for whole, cut in zip((flat, grad, first, second), views):
        assert torch.equal(whole, cut)


def test_kernel_matches_nothing_to_do(device):
    adamw([], [], [], [], lr=0.1, step=1, **HYPER)
    empty = [torch.zeros(0, device=device)]
    adamw(empty, empty, empty, empty, lr=0.1, step=1, **HYPER)


@pytest.mark.parametrize("copies", [False, True])
def test_opcheck(copies):
    weights, first, second = state(torch.float32, sizes=[5, 40])
    half = [w.bfloat16() for w in weights] if copies else []
    opcheck(torch.ops.interlace.adamw.default, (weights, gradients(1, torch.float32, sizes=[5, 40]), first, second, half, [0.0, 0.1], 0.1,
                                                0.9, 0.99, 1e-8, 1, 1.0))


def test_refusals():
    weights, first, second = state(torch.float32, sizes=[4, 6])
    grads = gradients(1, torch.float32, sizes=[4, 6])
    bad = [
        ((weights, grads[:1], first, second), {}, r"one entry for each of the 2 weights, got \{'grads': 1\}"),
        ((weights, grads, first, second), {"weight_decay": [0.1]}, r"got \{'weight_decay': 1\}"),
        ((weights, grads, first, second), {"step": 0}, "at least 1"),
        ((weights, [g.double() for g in grads], first, second), {}, r"grads\[0\] must be 4 contiguous numbers of torch.float32"),
        ((weights, grads[::-1], first, second), {}, r"grads\[0\] must be 4"),
        (([w.bfloat16() for w in weights], grads, first, second), {}, "step fp32 weights and give the others as `copies`"),
        ((weights, grads, first, second), {"copies": weights}, "copies must be bfloat16 or float16"),
        (([torch.zeros(4, 2)[:, :1], *weights[1:]], grads, first, second), {}, "not contiguous"),
    ]
    for args, more, words in bad:
        with pytest.raises(ValueError, match=words):
            adamw(*args, **{"lr": 0.1, "step": 1, **HYPER, **more})
    assert all(not m.any() for m in first), "refused before anything was written"


@pytest.mark.skipif(INTERPRET, reason="one mode is enough")
def test_more_than_2_to_the_31_bytes_of_offset():
    """Offsets between tensors are 64 bits: two that lie far apart in memory."""
    far = torch.empty(600_000_000, dtype=torch.float32)               # 2.4 GB of addresses, of which two pages are touched
    far[:5], far[-5:] = 1, 2
    adamw([far[:5], far[-5:]], [torch.ones(5)] * 2, [torch.zeros(5) for _ in range(2)], [torch.zeros(5) for _ in range(2)], lr=0.5,
          step=1, **HYPER)
    assert torch.allclose(far[:5], torch.tensor(0.5)) and torch.allclose(far[-5:], torch.tensor(1.5))
