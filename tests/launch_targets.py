"""What test_launch.py runs on ranks."""
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from interlace.models.config import Config
from interlace.parallel.errors import RunError, UserError


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


def command(wanted):
    from interlace.bench.provenance import provenance
    _meet()
    found = provenance()["command"]
    assert found == wanted, found
