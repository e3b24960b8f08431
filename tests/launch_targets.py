"""What test_launch.py runs on ranks."""
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from interlace.models.config import Config
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.errors import RunError, UserError
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh


def _meet():
    """Every rank is up, and has left its pid for the test."""
    if dist.is_initialized():
        dist.barrier()


def fine(folder, config=None):
    _meet()
    assert config is None or isinstance(config, Config)
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    Path(folder, f"{rank}.txt").write_text(f"{world} {os.environ.get('OMP_NUM_THREADS')} {os.getppid()}")
    print(f"hello from {rank}")


def answers_no(folder):
    _meet()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("the answer is no")
    return 1


def fails(folder, how, rank):
    """Rank `rank` fails as `how` says; the others wait for it in a collective, as a training step would."""
    _meet()
    Path(folder, f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    if dist.get_rank() == rank:
        time.sleep(0.3)
        if how == "user":
            raise UserError("model.x must be 1, got 2; set it to 1")
        if how == "run":
            raise RunError("step 7: loss must be finite, got nan")
        if how == "crash":
            raise ZeroDivisionError("the cause")
        if how == "exit":
            print("last words", file=sys.stderr, flush=True)
            os._exit(7)
        os.kill(os.getpid(), getattr(signal, how))
    dist.all_reduce(torch.ones(1))


def all_fail(folder):
    _meet()
    raise UserError("the same mistake on every rank")


def waits(folder, stubborn=False):
    """Sleeps in one rank, hangs in a collective in the others."""
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _meet()
    rank = dist.get_rank() if dist.is_initialized() else 0
    Path(folder, f"{rank}.part").write_text(str(os.getpid()))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.pid"))
    if rank == 0:
        time.sleep(600)
    dist.all_reduce(torch.ones(1))


class _Fails(torch.autograd.Function):
    """Ends this rank in the middle of a backward."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        if ctx.how == "crash":
            raise ZeroDivisionError("in a backward")
        os.kill(os.getpid(), getattr(signal, ctx.how))


def _data_parallel():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    return DistributedDataParallel(model, Mesh.build(Layout(dist.get_world_size())), bucket_size=1024)


def dies_in_backward(how, rank):
    ddp = _data_parallel()
    for step in range(4):
        h = ddp.module[:2](torch.ones(1, 64))
        if step == 2 and dist.get_rank() == rank:                     # the buckets of the last layers are on their way
            h = _Fails.apply(h, how)
        ddp.module[2:](h).sum().backward()
        ddp.finish()
        ddp.zero_grad()


def waits_in_finish(folder):
    ddp = _data_parallel()
    ddp(torch.ones(1, 64)).sum().backward()
    if dist.get_rank() == 1:
        time.sleep(600)
    Path(folder, "waiting").write_text("")
    ddp.finish()


def command(wanted):
    from interlace.bench.provenance import provenance
    _meet()
    found = provenance()["command"]
    assert found == wanted, found


def pipeline_dies(folder, rank):
    """A pipeline of two stages of which one is killed in its forward of the second step."""
    from test_pipeline_parallel import B, D, S, Toy, batches

    from interlace.parallel.mesh import Axis
    from interlace.parallel.pipeline_parallel import Pipeline
    me = dist.get_rank()
    stage, steps = Toy(me, me == 1, torch.float64), []
    pipeline = Pipeline({me: stage}, Axis("pp", 2, me, (0, 1), dist.group.WORLD), num_stages=2, schedule="1f1b", microbatches=2,
                        ids_shape=(B, S), shape=(S, B, D), dtype=torch.float64, loss_dtype=torch.float64, device=torch.device("cpu"))
    stage.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL) if me == rank and steps else None)
    _meet()
    Path(folder, f"{me}.pid").write_text(str(os.getpid()))
    while True:
        pipeline.step(*batches(2), torch.arange(2) * B)
        steps.append(1)
        time.sleep(0.5)
