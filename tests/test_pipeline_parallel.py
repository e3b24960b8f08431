"""The pipeline on its own: a toy model in stages against one process, bit for bit in float64; weight gradients that come later."""
import pytest
import torch
import torch.distributed as dist
from ranks import kept, run
from test_launch import check_gone, finish, pids, start
from torch import nn
from torch.utils.checkpoint import checkpoint

from interlace.kernels.comm import all_gather, copy_gemm
from interlace.models.config import ModelConfig
from interlace.models.schedule import bubble, timeline
from interlace.parallel.deferred import Deferred, linear
from interlace.parallel.layout import SCHEDULES, stages_of_rank
from interlace.parallel.mesh import Axis
from interlace.parallel.pipeline_parallel import Pipeline

S, B, D, V = 3, 2, 4, 7


class Toy(nn.Module):
    """One stage: (ids or h [S, B, D]) -> h + w2 @ tanh(w1 @ h), or in the last stage its mean square, [1], times loss_scale."""

    def __init__(self, index, last, dtype, recompute=False):
        super().__init__()
        self.index, self.last, self.recompute, self.deferred, self.loss_scale = index, last, recompute, None, 1.0
        g = torch.Generator().manual_seed(index)
        self.w1, self.w2 = (nn.Parameter(torch.randn(D, D, generator=g).to(dtype) / 2) for _ in range(2))
        self.table = nn.Parameter(torch.randn(V, D, generator=g).to(dtype)) if index == 0 else None

    def defer(self, deferred):
        self.deferred = deferred

    def block(self, h):
        a = torch.tanh(linear(copy_gemm, h, self.w1, None, self.deferred))
        return h + linear(copy_gemm, a, self.w2, None, self.deferred)

    def forward(self, x, *, labels, first_sample):
        h = self.table[x.t()].contiguous() if self.index == 0 else x         # messages must be contiguous
        h = checkpoint(self.block, h, use_reentrant=False) if self.recompute else self.block(h)
        if not self.last:
            return h
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        return (((wide - labels.t().unsqueeze(-1)) ** 2).mean() * self.loss_scale).view(1)


def batches(n):
    g = torch.Generator().manual_seed(99)
    return torch.randint(V, (n * B, S), generator=g), torch.randint(V, (n * B, S), generator=g)


def one_process(count, n, dtype):
    """Stages one after the other, plain autograd: (loss, {(stage, name): gradient})."""
    stages = [Toy(i, i == count - 1, dtype) for i in range(count)]
    stages[-1].loss_scale, total = 1 / n, 0
    for ids, labels in zip(*(x.split(B) for x in batches(n))):
        h = ids
        for stage in stages:
            h = stage(h, labels=labels, first_sample=None)
        h.backward()
        total = total + h.detach()
    return total[0], {(s.index, k): p.grad for s in stages for k, p in s.named_parameters()}


@kept
def axis_of(rank, pp):
    """A group of its own: torch's DETAIL debug mode counts messages as collectives, of which ranks have different numbers, and the
    pool's other tests gather over the world."""
    return Axis("pp", pp, rank, tuple(range(pp)), dist.new_group(list(range(pp))))


def _equal(rank, name, pp, v, n, dtype, recompute):
    m = ModelConfig(num_layers=pp * v, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=v if v > 1 else None,
                    pipeline_parallel_schedule=name)
    mine = {i: Toy(i, i == pp * v - 1, dtype, recompute) for i in stages_of_rank(m, rank)}
    wide, arrived = torch.promote_types(dtype, torch.float32), []
    for stage in mine.values():
        for p in stage.parameters():
            p.register_post_accumulate_grad_hook(lambda p: arrived.append((p, p.grad is not None)))
    pipeline = Pipeline(mine, axis_of(rank, pp), num_stages=pp * v, schedule=name, microbatches=n,
                        ids_shape=(B, S), shape=(S, B, D), dtype=dtype, loss_dtype=wide, device=torch.device("cpu"))
    loss = pipeline.step(*batches(n), torch.arange(n) * B)
    want, grads = one_process(pp * v, n, dtype)
    assert loss.dtype == wide and torch.equal(loss, want), (loss, want)
    for i, stage in mine.items():
        for k, p in stage.named_parameters():
            assert p.grad is not None, f"the gradient of {k} in stage {i} was lost"
            assert torch.equal(p.grad, grads[i, k]), f"{k} of stage {i}: off by {(p.grad - grads[i, k]).abs().max()}"
            hooks = [there for q, there in arrived if q is p]
            assert hooks == [True] * n, f"{k} of stage {i}: hooks must run once a micro-batch, with a gradient: {hooks}"


CASES = [(name, pp, 2 if how.chunked else 1, n) for name, how in SCHEDULES.items() for pp, n in ((2, 2), (2, 4), (3, 6))]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name, pp, v, n", CASES)
def test_equals_one_process(name, pp, v, n, recompute):
    run(pp, _equal, name, pp, v, n, torch.float64, recompute)


@pytest.mark.parametrize("name", ["1f1b", "zbv_zero_bubble"])
def test_bf16(name):
    run(2, _equal, name, 2, 2 if SCHEDULES[name].chunked else 1, 2, torch.bfloat16, False)


# ---- the bubble -------------------------------------------------------------------------------------------------


class Clocked(nn.Module):
    """A stage of known cost: a forward takes 1 of its rank's clock, the input's and the weights' gradients 1 each, and messages carry the
    time they were sent at. What is run is torch's schedule, over real messages; what is measured does not depend on the machine."""

    def __init__(self, index, last, clock):
        super().__init__()
        self.index, self.last, self.clock, self.deferred = index, last, clock, None
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def defer(self, deferred):
        self.deferred = deferred

    def spend(self, cost, since=0.0):
        self.clock[0] = max(self.clock[0], since) + cost
        self.clock[1] += cost
        return self.clock[0]

    def forward(self, x, *, labels, first_sample):
        h = _Spent.apply(x.double(), self.weight, self)
        return h.sum().view(1) if self.last else h


class _Spent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stage):
        ctx.stage = stage
        return torch.full_like(x, stage.spend(1, x.max().item() if stage.index else 0))

    @staticmethod
    def backward(ctx, dh):
        stage = ctx.stage
        sent = 0 if stage.last else dh.max().item()
        if stage.deferred is not None:
            stage.deferred.waiting.append(lambda: stage.spend(1))
        return torch.full_like(dh, stage.spend(2 if stage.deferred is None else 1, sent)), torch.zeros(1, dtype=torch.float64), None


def _bubble(rank, name, pp, v, n):
    m = ModelConfig(num_layers=pp * v, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=v if v > 1 else None,
                    pipeline_parallel_schedule=name)
    clock, axis = [0.0, 0.0], axis_of(rank, pp)                       # now, and busy so far
    stages = {i: Clocked(i, i == pp * v - 1, clock) for i in stages_of_rank(m, rank)}
    pipeline = Pipeline(stages, axis, num_stages=pp * v, schedule=name, microbatches=n, ids_shape=(1, 2), shape=(1, 2),
                        dtype=torch.float64, loss_dtype=torch.float64, device=torch.device("cpu"))
    ids = torch.ones(n, 2, dtype=torch.int64)
    pipeline.step(ids, ids, torch.arange(n))
    every = all_gather(torch.tensor([clock], dtype=torch.float64), axis.group)
    measured = 1 - every[:, 1].sum().item() / (pp * every[:, 0].max().item())
    assert clock[1] == 3 * n * v, "a forward or a half of a backward did not run"
    assert measured <= (pp - 1) / (n + pp - 1) + 1e-12, measured
    if name in ("gpipe", "1f1b"):
        assert measured == pytest.approx((pp - 1) / (n + pp - 1))
    assert measured == pytest.approx(bubble(timeline(m, n)), abs=0.02), (measured, bubble(timeline(m, n)))


@pytest.mark.parametrize("name, pp, v, n", [("1f1b", 2, 1, 8), ("1f1b", 3, 1, 6), ("gpipe", 2, 1, 8), ("interleaved_1f1b", 2, 2, 8),
                                            ("interleaved_zero_bubble", 2, 2, 8), ("zbv_zero_bubble", 2, 2, 8)])
def test_bubble_of_what_runs(name, pp, v, n):
    """1F1B, 2 stages, 8 micro-batches: 1/9. The measured one is that of the books, and of the timeline that `explain` draws."""
    run(pp, _bubble, name, pp, v, n)


# ---- deferred gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_deferred_gradients_come_with_w_alone(recompute):
    """Before W a parameter has no gradient and no hook has run, under recompute too; after it all is as autograd would bring it."""
    x, plain, later = torch.randn(5, D, dtype=torch.float64), Toy(1, False, torch.float64), Toy(1, False, torch.float64)
    later.defer(Deferred())
    arrived = []
    for p in later.parameters():
        p.register_post_accumulate_grad_hook(lambda p: arrived.append(p.grad is not None))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    plain.block(xs[0]).square().sum().backward()
    (checkpoint(later.block, xs[1], use_reentrant=False) if recompute else later.block(xs[1])).square().sum().backward()
    assert torch.equal(xs[0].grad, xs[1].grad) and arrived == [] and all(p.grad is None for p in later.parameters())
    later.deferred.take()()
    assert arrived == [True, True] and later.deferred.waiting == []
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), later.parameters()))


def test_w_of_one_micro_batch_takes_what_it_left_alone():
    stage = Toy(1, False, torch.float64)
    stage.defer(Deferred())
    runs = []
    for k in range(2):
        stage.block(torch.full((1, D), 1.0 + k, dtype=torch.float64, requires_grad=True)).sum().backward()
        runs.append(stage.deferred.take())
    runs[1]()
    second = stage.w1.grad.clone()
    runs[0]()
    assert second.abs().sum() > 0 and not torch.equal(stage.w1.grad, second)
    stage.deferred.take()()                                           # nothing waits: nothing happens


def test_nothing_is_deferred_without_a_gradient():
    stage = Toy(1, False, torch.float64)
    stage.defer(Deferred())
    with torch.no_grad():
        stage.block(torch.ones(2, D, dtype=torch.float64, requires_grad=True))
    stage.block(torch.ones(2, D, dtype=torch.float64)).sum().backward()   # the input needs none: a plain backward of the first product
    assert stage.w1.grad is not None and len(stage.deferred.waiting) == 1


# ---- a stage that dies ------------------------------------------------------------------------------------------


def test_a_dead_stage_ends_the_run(tmp_path):
    proc = start(2, "pipeline_dies", folder=str(tmp_path), rank=1)
    found = pids(tmp_path, 2)
    status, _, err = finish(proc)
    assert status == 1 and err.startswith("interlace: rank 1 (pid ") and "was killed by SIGKILL" in err and "Traceback" not in err, err
    check_gone(found)
