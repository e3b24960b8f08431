"""DistributedDataParallel: when it reduces and when not, ZeRO-1 to the bit, experts over their own axis, errors out of its thread."""
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from ranks import kept, run
from test_equal import config
from torch import nn

import interlace.kernels.comm.heap as heap_module
from interlace.kernels.comm import PeerDied
from interlace.launch import bounded
from interlace.models.config import OptimConfig
from interlace.models.gpt import GPT
from interlace.models.optimizer import Optimizer
from interlace.models.train import forward_backward
from interlace.models.verify import RandomTokens
from interlace.parallel import data_parallel, sharding
from interlace.parallel.data_parallel import ALIGN, DistributedDataParallel
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

F64 = torch.float64


def mlp(dtype=F64):
    """Odd sizes; the middle layer is frozen."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 13), nn.Tanh(), nn.Linear(13, 3)).to(dtype)
    model[2].requires_grad_(False)
    return model


def sample(i, dtype=F64):
    return torch.randn(5, 7, dtype=dtype, generator=torch.Generator().manual_seed(i))


class Seen(DistributedDataParallel):
    """Remembers how many gradients had arrived when each bucket's reduction began."""

    def _reduce(self, bucket):
        self.__dict__.setdefault("log", []).append((self.buckets.index(bucket), len(self.seen), self.sync))
        super()._reduce(bucket)


# ---- buffers and buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_size", [1, 16, 50, 100, None])
def test_buckets_cover_every_number_once_and_last_layers_come_first(bucket_size):
    model = mlp()
    want = [p.detach().clone() for p in model.parameters()]
    ddp = DistributedDataParallel(model, bucket_size=bucket_size)
    (buffer,), trained = ddp.grad_buffers, [p for p in model.parameters() if p.requires_grad]
    assert [b.start for b in buffer.buckets] == [0, *(b.stop for b in buffer.buckets[:-1])] and buffer.buckets[-1].stop == buffer.numel
    assert list(map(id, buffer.params)) == list(map(id, trained[::-1])) and all(buffer.start[p] % ALIGN == 0 for p in trained)
    for p, w in zip(model.parameters(), want):
        assert torch.equal(p, w)
    for p in trained:
        assert p.data_ptr() == buffer.weights[buffer.start[p]:].data_ptr()
        assert p.main_grad.data_ptr() == buffer.grads[buffer.start[p]:].data_ptr()
        assert [b for b in buffer.buckets if any(p is q for q in b.params)] == buffer.reaches(p)
        assert sum(part.numel() for _, part in ddp.parts(p)) == p.numel()
    assert list(ddp.parts(model[2].weight)) == []


def test_one_process_accumulates_into_main_grad():
    plain, model = mlp(), mlp()
    ddp = DistributedDataParallel(model)
    for step in range(2):
        plain.zero_grad()
        for i in range(3):
            plain(sample(i + step)).sum().backward()
            with ddp.no_sync():
                ddp(sample(i + step)).sum().backward()
        ddp.finish()
        ddp.finish()
        for p, q in zip(plain.parameters(), model.parameters()):
            assert q.grad is None and (p.grad is None or torch.equal(p.grad, q.main_grad))
        ddp.zero_grad()


def test_what_got_no_gradient_has_zero_not_the_last_steps():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()
    ddp = DistributedDataParallel(model)
    for used in (model, model[:1]):
        x = torch.ones(1, 3, dtype=F64)
        for layer in used:
            x = layer(x)
        x.sum().backward()
        ddp.finish()
        filled = [bool(p.main_grad.any()) for p in model.parameters()]
        ddp.zero_grad()
    assert filled == [True, True, False, False]


def test_one_more_backward_than_announced_is_refused():
    ddp = DistributedDataParallel(mlp())
    ddp(sample(0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"reduces a gradient once.*no_sync\(\).*zero_grad\(\)"):
        ddp(sample(0)).sum().backward()


@pytest.mark.parametrize("moved", [
    lambda m: m.float(), lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    lambda m: m.append(nn.Linear(3, 3).double())], ids=["float", "assign", "append"])
def test_parameters_that_left_their_buffers_are_refused(moved):
    """The buffers were stepped, and the model did not move."""
    model = mlp()
    ddp = DistributedDataParallel(model)
    moved(model)
    model(sample(0).to(next(model.parameters()).dtype)).sum().backward()
    with pytest.raises(RuntimeError, match=r"must stay those that were wrapped, in its buffers, got a new \S+: by module.to\(\)"):
        ddp.finish()


def test_gradients_set_by_hand_count():
    """A pipeline schedule that splits the backward assigns p.grad itself, past autograd's hooks."""
    model = mlp()
    ddp = DistributedDataParallel(model)
    grads = torch.autograd.grad(ddp(sample(0)).sum(), list(ddp.buffer_of))
    for p, g in zip(ddp.buffer_of, grads):
        p.grad = g.clone()
    ddp.finish()
    assert all(torch.equal(p.main_grad, g) and p.grad is None for p, g in zip(ddp.buffer_of, grads))


def _ends(rank):
    """With its last name a model goes, its buffers, its thread and what its group had: a second run in one process starts from nothing."""
    mesh = Mesh.build(Layout(2))
    model = mlp()
    ddp = DistributedDataParallel(model, mesh)
    ddp(torch.ones(3, model[0].in_features, dtype=model[0].weight.dtype)).sum().backward()
    ddp.finish()
    there, threads = weakref.ref(model), threading.active_count()
    del ddp, model
    gc.collect()
    assert there() is None
    end = time.monotonic() + 60
    while threading.active_count() == threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() < threads


def test_nothing_outlives_a_model():
    run(2, _ends)


# ---- reductions -----------------------------------------------------------------------------------------------


@kept
def mesh2(world=2, **sizes):
    return Mesh.build(Layout(world, **sizes))


def _reduces(rank, heap, sharded):
    mesh = mesh2()
    if not heap:
        heap_module.keep_heap(mesh.dp.group, None)
    model, plain = mlp(), mlp()
    ddp = Seen(model, mesh, bucket_size=32, use_distributed_optimizer=sharded)
    for step in range(3):
        ddp.log = []
        with ddp.no_sync():
            ddp(sample(4 * step + rank)).sum().backward()
        assert ddp.log == [], "communication before the last micro-batch"
        ddp(sample(4 * step + 2 + rank)).sum().backward()
        assert [i for i, *_ in ddp.log] == list(range(len(ddp.buckets))) and len(ddp.buckets) > 4
        assert ddp.log[0][1] >= 1 and all(sync for *_, sync in ddp.log)
        ddp.finish()
        plain.zero_grad()
        (sum(plain(sample(4 * step + i)).sum() for i in range(4)) / 2).backward()
        for p, q in zip(model.parameters(), plain.parameters()):
            for at, part in ddp.parts(p):
                torch.testing.assert_close(part, q.grad.view(-1)[at:at + part.numel()], rtol=1e-13, atol=1e-13)
        held = sum(part.numel() for p in model.parameters() for _, part in ddp.parts(p))
        assert held == (trained := sum(p.numel() for p in ddp.buffer_of)) or (sharded and 0 < held < trained)
        ddp.zero_grad()


@pytest.mark.parametrize("sharded", [False, True], ids=["", "zero1"])
@pytest.mark.parametrize("heap", [True, False], ids=["heap", "gloo"])
def test_reduces_after_the_last_micro_batch_alone(heap, sharded):
    run(2, _reduces, heap, sharded)


class _Watch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))
        self.events = []

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x.register_hook(lambda g, i=i: self.events.append(f"backward of layer {i}"))
        return x


def _overlaps(rank):
    model = _Watch()
    ddp = Seen(model, mesh2(), bucket_size=1024)                      # a bucket a layer
    plain = ddp._reduce
    ddp._reduce = lambda bucket: (model.events.append(f"reduce {ddp.buckets.index(bucket)}"), plain(bucket))
    ddp(torch.ones(2, 32)).sum().backward()
    assert model.events == [x for i in range(4) for x in (f"backward of layer {3 - i}", f"reduce {i}")]
    ddp.finish()


def test_a_bucket_starts_while_the_backward_goes_on():
    run(2, _overlaps)


def _steps(mesh, zero1, precision, steps=4, bucket=700):
    cfg = config({"num_query_groups": 2, "hidden_dropout": 0.1, "add_bias_linear": True}, mesh.tp.size, mesh.tp.size > 1, clip_grad=0.0)
    m = cfg.model
    model = GPT(m, mesh, vocab_size=m.vocab_size, seed=1, dtype=precision)
    opt = Optimizer(DistributedDataParallel(model, mesh, bucket_size=bucket, use_distributed_optimizer=zero1), cfg.optim)
    data = RandomTokens(m.vocab_size, m.seq_length, 9)
    losses = [(forward_backward(opt.ddp, data, 4 * s, m).item(), opt.step(0.01))[0] for s in range(steps)]
    return losses, [p.detach().clone() for p in model.parameters()], opt


def _same_bits(rank, world, tp):
    mesh = mesh2(world, tp=tp, sp=tp > 1)
    for precision in (torch.float32, torch.bfloat16, F64):
        plain, zero1, again = (_steps(mesh, z, precision, bucket=b) for z, b in ((False, 700), (True, 700), (True, 1 << 20)))
        for other in (zero1, again):
            assert plain[0] == other[0] and all(torch.equal(a, b) for a, b in zip(plain[1], other[1])), precision
        for kind in plain[2].kinds():
            whole = [dict(opt.state(kind)) for opt in (plain[2], zero1[2])]
            assert all(torch.equal(a, b) for a, b in zip(whole[0].values(), whole[1].values())), kind
        held = [sum(t.numel() for own in opt.own.values() for t in own.values()) for opt in (plain[2], zero1[2])]
        assert held[0] <= held[1] * mesh.dp.size < 1.1 * held[0], "AdamW's state is not cut in equal parts"
        if tp == 1:                                                   # 2 micro-batches: one process adds the same two numbers
            one = _steps(Mesh(), False, precision)
            assert plain[0] == one[0] and all(torch.equal(a, b) for a, b in zip(plain[1], one[1])), precision


@pytest.mark.parametrize("world, tp", [(2, 1), (4, 2)])
def test_zero1_plain_and_one_process_have_the_same_bits(world, tp):
    run(world, _same_bits, world, tp)


def _loaded_later(rank):
    """Weights that are loaded after the optimizer was made, in 16 bits: each rank's parts of the masters are copied anew."""
    mesh = mesh2()
    for zero1 in (False, True):
        model = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5)).bfloat16()
        opt = Optimizer(DistributedDataParallel(model, mesh, bucket_size=128, use_distributed_optimizer=zero1),
                        OptimConfig(lr=0.1, min_lr=0.0, weight_decay=0.0))
        want = {n: torch.arange(p.numel()).view_as(p).bfloat16() for n, p in model.named_parameters()}
        model.load_state_dict(want)
        opt.ddp(torch.ones(2, 33, dtype=torch.bfloat16)).sum().backward()
        opt.step(0.0)
        assert all(torch.equal(p, want[n]) for n, p in model.named_parameters()), f"zero1={zero1}"
        names = {p: n for n, p in model.named_parameters()}
        assert all(torch.equal(t, want[names[p]].float()) for p, t in opt.state("master")), f"zero1={zero1}"


def test_weights_loaded_after_the_optimizer_stay():
    run(2, _loaded_later)


def _gathers_in_the_next_forward(rank):
    """The last layer's weights come only after the first layer's forward has run: a step that waits for all would never end."""
    mesh, first_ran, threads = mesh2(), threading.Event(), set()
    models = [nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4))).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.distributed.broadcast(p.data, 0, group=mesh.dp.group)
        q.data.copy_(p.data)
    opts = [Optimizer(DistributedDataParallel(m, mesh, bucket_size=1024, use_distributed_optimizer=True),
                      OptimConfig(lr=0.1, min_lr=0.0)) for m in models]
    plain, last = data_parallel.all_gather, opts[1].ddp.buckets[0].buffer.weights

    def late(own, group, out):
        threads.add(threading.current_thread().name)
        if out.data_ptr() == last.data_ptr():                         # bucket 0: the last layer's
            assert first_ran.wait(120), "a forward waited for weights that it does not read yet"
        return plain(own, group, out=out)
    x = torch.randn(3, 32, dtype=F64, generator=torch.Generator().manual_seed(rank))
    for step in range(3):
        for opt, wait in zip(opts, (True, False)):
            opt.ddp(x).square().sum().backward()
            data_parallel.all_gather = plain if wait or step else late
            opt.step(0.1, wait=wait)
        if step == 0:
            assert len(opts[1].ddp.coming) == 4
            hook = models[1][1].register_forward_hook(lambda *_: first_ran.set())
            assert torch.equal(opts[0].ddp(x), opts[1].ddp(x)) and first_ran.is_set() and not opts[1].ddp.coming
            hook.remove()
            data_parallel.all_gather = plain
        opts[1].ddp.ready()                                           # the other model's gradients go over the same axis
    assert threads == {"interlace-reduce"} and all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters()))


def test_weights_are_gathered_while_the_next_forward_runs():
    run(2, _gathers_in_the_next_forward)


def _gather_fails(rank):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).double()
    ddp = DistributedDataParallel(model, mesh2(), bucket_size=1024, use_distributed_optimizer=True)
    opt = Optimizer(ddp, OptimConfig(lr=0.1, min_lr=0))

    def dies(*args, **kwargs):
        raise PeerDied("rank 1 of group 'dp' died")
    x = torch.ones(1, 32, dtype=F64)
    opt.ddp(x).sum().backward()
    plain, data_parallel.all_gather = data_parallel.all_gather, dies
    try:
        opt.step(0.1, wait=False)
        with pytest.raises(PeerDied, match="rank 1 of group 'dp' died"):
            opt.ddp(x)
    finally:
        data_parallel.all_gather = plain


def test_a_gather_that_fails_is_raised_by_the_forward():
    run(2, _gather_fails)


# ---- experts --------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A dense vector, equal on all ranks of tp, and this rank's experts; sum of squares of products."""

    def __init__(self, mesh, experts):
        super().__init__()
        values = torch.arange(1.0, 6.0, dtype=F64)
        self.dense = nn.Parameter(values / 3)
        sharding.set_pieces(self.dense, sharding.replicated((5,), mesh.tp, partial=False))
        here = experts // mesh.ep.size
        first = mesh.ep.rank * here
        self.experts = nn.Parameter(torch.stack([values * (e + 1) / 7 for e in range(first, first + here)]))
        sharding.set_pieces(self.experts, sharding.Piece("", (experts, 5), 0, first, here))
        self.experts.expert = True


def _expert(rank, world, tp, ep, zero1, plant=False):
    mesh, experts = mesh2(world, tp=tp, ep=ep), 2
    true, toy = Toy(Mesh(), experts), Toy(mesh, experts)
    clip = OptimConfig(lr=0.1, min_lr=0.0, clip_grad=0.5)
    if plant:
        data_parallel.gradient_axis = lambda p, m: (m.dp, 1 / m.dp.size)
    try:
        ddp = DistributedDataParallel(toy, mesh, bucket_size=16, use_distributed_optimizer=zero1)
    finally:
        data_parallel.gradient_axis = sharding.gradient_axis
    one, many = Optimizer(DistributedDataParallel(true), clip), Optimizer(ddp, clip)
    dense = torch.randn(mesh.dp.size, 5, dtype=F64, generator=torch.Generator().manual_seed(1))
    tokens = torch.randn(mesh.dp.size, tp, 5, dtype=F64, generator=torch.Generator().manual_seed(2))      # split over tp before dispatch
    for _ in range(3):
        loss = (true.dense * dense).square().sum() + (tokens.unsqueeze(2) * true.experts).square().sum()
        (loss / mesh.dp.size).backward()
        mine = tokens.view(-1, 5)[list(mesh.ep.ranks)].unsqueeze(1)   # the tokens of every rank of ep come to this rank's experts
        ((toy.dense * dense[mesh.dp.rank]).square().sum() + (mine * toy.experts).square().sum()).backward()
        one.reduce_grads()
        many.reduce_grads()
        for p, q, piece in ((toy.dense, true.dense, None), (toy.experts, true.experts, toy.experts.pieces[0])):
            want = (q.main_grad if piece is None else piece.of(q.main_grad)).reshape(-1)
            for at, part in ddp.parts(p):
                torch.testing.assert_close(part, want[at:at + part.numel()], rtol=1e-13, atol=0)
        assert abs(many.step(0.1) / one.step(0.1) - 1) < 1e-14, "clip norm"
        torch.testing.assert_close(toy.experts, toy.experts.pieces[0].of(true.experts), rtol=1e-12, atol=0)
        torch.testing.assert_close(toy.dense, true.dense, rtol=1e-12, atol=0)
    assert {buffer.axis.name for buffer in ddp.grad_buffers} == {"dp", "edp"}


@pytest.mark.parametrize("zero1", [False, True], ids=["", "zero1"])
@pytest.mark.parametrize("tp, ep", [(1, 2), (2, 1), (2, 2)])
def test_experts_are_reduced_over_edp_and_scaled_by_dp(tp, ep, zero1):
    run(4, _expert, 4, tp, ep, zero1)


def _planted(rank, *args):
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        _expert(rank, *args, plant=True)


@pytest.mark.parametrize("tp, ep", [(1, 2), (2, 1)])
def test_experts_reduced_over_dp_are_found(tp, ep):
    run(4, _planted, 4, tp, ep, False)


# ---- failures -------------------------------------------------------------------------------------------------


def _late_weights(rank):
    """Rank 1 gives its part of the weights late: rank 0's next forward must not use the dp axis until they are there."""
    cfg = config({"num_moe_experts": 4, "moe_router_load_balancing_type": "global_aux_loss", "micro_batch_size": 1, "global_batch_size": 2},
                 use_distributed_optimizer=True).model
    ddp = DistributedDataParallel(GPT(cfg, mesh := mesh2(), vocab_size=45, dtype=F64), mesh, bucket_size=3000,
                                  use_distributed_optimizer=True)
    optimizer, now = Optimizer(ddp, OptimConfig()), data_parallel.all_gather
    data_parallel.all_gather = lambda *args, **kw: (time.sleep(0.05 * rank), now(*args, **kw))[1]
    try:
        for step in range(2):
            forward_backward(ddp, RandomTokens(45, cfg.seq_length, 0), 2 * step, cfg)
            optimizer.step(0.01, wait=False)
        ddp.ready()
    finally:
        data_parallel.all_gather = now


def test_counts_over_dp_wait_for_the_weights_of_zero1():
    run(2, _late_weights)


def _error_in_the_thread(rank):
    where = []

    def dies(*args, **kwargs):
        where.append(threading.current_thread() is threading.main_thread())
        raise PeerDied("rank 1 of group 'dp' died")
    ddp = DistributedDataParallel(mlp(), mesh2(), bucket_size=16)
    data_parallel.all_reduce, plain = dies, data_parallel.all_reduce
    try:
        with pytest.raises(PeerDied, match="rank 1 of group 'dp' died"):
            ddp(sample(0)).sum().backward()
            ddp.finish()
    finally:
        data_parallel.all_reduce = plain
    assert where == [False], "what follows a failure is dropped"


def test_an_error_in_the_thread_is_raised_by_its_own_name():
    run(2, _error_in_the_thread)


@pytest.mark.parametrize("how, rank", [("SIGKILL", 1), ("crash", 0)])
def test_a_rank_that_dies_in_a_backward_ends_the_run_with_its_name(tmp_path, how, rank):
    start = time.monotonic()
    status, text = bounded(2, "launch_targets:dies_in_backward", {"how": how, "rank": rank}, seconds=90)
    assert status == 1 and f"rank {rank} (pid " in text, text
    assert ("killed by SIGKILL" if how == "SIGKILL" else "ZeroDivisionError: in a backward") in text, text
    assert time.monotonic() - start < 85


def test_ctrl_c_ends_a_run_whose_thread_waits_for_a_peer(tmp_path):
    code = ("import sys; sys.path[:] = eval(sys.argv[1]); from interlace.launch import launch; "
            "sys.exit(launch(2, 'launch_targets:waits_in_finish', {'folder': sys.argv[2]}))")
    proc = subprocess.Popen([sys.executable, "-c", code, repr(sys.path), str(tmp_path)], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (tmp_path / "waiting").exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(proc.pid, signal.SIGINT)
    _, error = proc.communicate(timeout=300)
    assert proc.returncode == 130 and "interrupted" in error, error


