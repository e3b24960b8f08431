"""Optimizer: the schedule at its corners, one rank against torch's own AdamW and clip, bf16 with fp32 masters."""
import math

import pytest
import torch

from interlace.models.config import OptimConfig, SchedConfig
from interlace.models.optimizer import Optimizer, learning_rate
from interlace.parallel.data_parallel import DistributedDataParallel

CFG = OptimConfig(lr=1.0, min_lr=0.1, sched=SchedConfig(warmup_steps=10))


@pytest.mark.parametrize("decay, step, want", [
    ("cosine", 1, 0.1), ("cosine", 10, 1.0), ("cosine", 60, 0.55), ("cosine", 110, 0.1), ("cosine", 500, 0.1),
    ("linear", 60, 0.55), ("linear", 35, 0.775), ("linear", 110, 0.1), ("constant", 60, 1.0), ("constant", 5, 0.5),
])
def test_learning_rate(decay, step, want):
    cfg = OptimConfig(lr=1.0, min_lr=0.1, sched=SchedConfig(warmup_steps=10, decay=decay, decay_steps=110))
    assert learning_rate(cfg, step, 1000) == pytest.approx(want)


def test_learning_rate_defaults_to_max_steps_and_no_warmup():
    assert learning_rate(CFG, 50, 50) == pytest.approx(0.1)
    none = OptimConfig(lr=1.0, min_lr=0.1, sched=SchedConfig(warmup_steps=0))
    assert learning_rate(none, 0, 10) == 1.0
    assert all(math.isfinite(learning_rate(none, s, 1)) for s in range(3))


def _model(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5)).to(dtype)


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
def test_equals_torch_adamw(clip):
    ours, theirs = _model(torch.float64), _model(torch.float64)
    opt = Optimizer(DistributedDataParallel(ours), OptimConfig(lr=0.1, min_lr=0.0, weight_decay=0.3, betas=(0.8, 0.9), clip_grad=clip))
    groups = [{"params": [theirs[0].weight], "weight_decay": 0.3},
              {"params": [theirs[0].bias, theirs[1].weight, theirs[1].bias], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=opt.cfg.eps)
    for step in range(4):
        x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model(x).square().sum().backward()
        want = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf).item()
        adamw.step()
        adamw.zero_grad()
        assert opt.step(0.1) == pytest.approx(want, rel=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert a.grad is None


def test_bf16_accumulates_and_steps_in_fp32():
    """1 + 512 gradients of 1/512 is 2 in fp32 and 1 in bf16; and steps of 1e-4 move a bf16 weight of 1 in the end."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    opt = Optimizer(DistributedDataParallel(model), OptimConfig(lr=1e-4, min_lr=0.0, weight_decay=0.0, clip_grad=0.0))
    with opt.ddp.no_sync():
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        for _ in range(512):
            model(torch.full((1, 1), 1 / 512, dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is None and model.weight.main_grad.item() == 2.0
    assert opt.step(1e-4) == 2.0
    for _ in range(99):
        model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        opt.step(1e-4)
    assert dict(opt.state("master"))[model.weight].item() == pytest.approx(1 - 1e-2, rel=1e-3)
    assert model.weight.item() == pytest.approx(0.99, abs=0.004)


def test_nothing_is_updated_when_the_norm_is_not_finite():
    model = _model(torch.float32)
    before = [p.clone() for p in model.parameters()]
    opt = Optimizer(DistributedDataParallel(model), CFG)
    model(torch.full((2, 6), math.inf)).sum().backward()
    assert not math.isfinite(opt.step(0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("written", ["load_state_dict", "in place"])
def test_weights_that_others_write_are_gone_on_from(written):
    """Their masters wrote over them. The low bits of masters whose weights nobody changed stay: so a resumed run has its own."""
    model = _model(torch.bfloat16)
    opt = Optimizer(DistributedDataParallel(model), OptimConfig(lr=1e-3, min_lr=0.0, weight_decay=0.0, clip_grad=0.0))
    model(torch.ones(2, 6, dtype=torch.bfloat16)).square().sum().backward()
    opt.step(1e-3)
    master = lambda: [t.clone() for _, t in opt.state("master")]  # noqa: E731
    before = master()
    assert any((t != t.bfloat16()).any() for t in before), "low bits"
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()})
    opt.step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, master())), "the same weights"
    if written == "in place":
        with torch.no_grad():
            model[0].weight[1].fill_(5.0)
    else:
        model.load_state_dict({name: torch.full_like(t, 5.0) for name, t in model.state_dict().items()})
    opt.step(0.0)
    changed = dict(opt.state("master"))
    assert (changed[model[0].weight][1] == 5).all() and (model[0].weight[1] == 5).all()
    assert torch.equal(changed[model[0].weight][0], torch.full((6,), 5.0)) == (written == "load_state_dict")
    model(torch.ones(2, 6, dtype=torch.bfloat16)).square().sum().backward()
    opt.step(1e-3)
    assert (changed[model[0].weight][1] - 5).abs().max() < 0.01
