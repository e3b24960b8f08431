"""The error rule: fp64 truth, eager torch in the same dtype, ours; ours may err no more than eager does."""
import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def grads(fn, inputs, cast, seeds):
    """Outputs of fn and the gradient of every floating input, in fp64. inputs: tensors (cast) or other values (as they are).

    seeds: one upstream gradient per output."""
    args = [t.to(cast).detach().clone().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    outs = fn(*args)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [s.to(cast) for s in seeds])
    leaves = [a.grad for a in args if torch.is_tensor(a) and a.requires_grad]
    return [t.detach().double() for t in (*outs, *leaves)]


def check_budget(ours, ref, inputs, dtype, seeds, *, slack=1.0):
    """ours(*inputs) against ref(*inputs), forward and every gradient. inputs and seeds must be exact in `dtype`.

    The bound is eager's own error plus one rounding of the largest value (a kernel that is exactly right may still land on
    the other side of a tie) plus the noise of the type it accumulates in, where terms of size one cancel."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]
    seeds = [s.to(dtype) for s in seeds]
    truth = grads(ref, inputs, torch.float64, seeds)
    eager, got = grads(ref, inputs, dtype, seeds), grads(ours, inputs, dtype, seeds)
    for i, (t, e, g) in enumerate(zip(truth, eager, got, strict=True)):
        assert g.shape == t.shape, f"output {i}: shape {list(g.shape)}, want {list(t.shape)}"
        if not t.numel():
            continue
        scale = t.abs().max()
        allowed = slack * (e - t).abs().max() + torch.finfo(dtype).eps * scale + 16 * torch.finfo(acc).eps * max(1.0, scale)
        worst = (g - t).abs().max()
        assert worst <= allowed, f"output {i} ({dtype}): error {worst:.3g} > {allowed:.3g} (eager {(e - t).abs().max():.3g})"
