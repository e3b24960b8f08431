"""`interlace bench trace OP`: what every rank does during a few calls of ours, as a trace, a picture and shares (models/profile.py).

Of every function of the bench, its largest case (bf16 on a GPU, fp32 on a CPU; --quick: of the small ones) in the longest pass.
"""
import argparse
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..launch import launch, launched_by_torchrun
from ..models.profile import Profile
from ..parallel.errors import RunError, UserError
from .cases import PASSES, Case
from .command import ranks_of, writable
from .harness import failure, timed, together
from .ops import OPS, pick
from .run import build, load

__all__ = ["main", "trace"]

CALLS = 5
KEPT = "what was traced is kept; run the same command again"
NOT_HERE = ("against", "explain", "resume", "roofs", "seconds", "list")


def main(args: argparse.Namespace) -> int:
    """One launch an op. Exit status 1 when a case failed."""
    if not args.ops[1:]:
        raise UserError("bench trace: must be given an op, got none; e.g. interlace bench trace gemm_ar (--list shows them)")
    names = pick(args.ops[1:])
    for flag in NOT_HERE:
        if getattr(args, flag):
            raise UserError(f"bench trace: times nothing, so --{flag} must be left out")
    if launched_by_torchrun():
        raise UserError("bench trace: must be one process, got torchrun's; it starts its own ranks: interlace bench trace OP --nproc N")
    world = ranks_of(args)
    if args.device == "cuda" and "train_step" in names:
        raise UserError("bench trace: train_step runs on CPU ranks; use --device cpu, or interlace train --profile")
    folder = writable(Path(args.out or "runs/trace"), "bench trace")
    sweep = {"cpu": "quick", "cuda": "quick-cuda"}[args.device] if args.quick else args.device
    status = 0
    for name in names:
        ranks = 1 if OPS[name][0] == "one" else world
        job = {"name": name, "folder": str(folder), "device": args.device, "sweep": sweep, "seed": args.seed}
        status = launch(ranks, "interlace.bench.trace:trace", job, again=KEPT, grace=20.0) or status
        if status >= 128:                                             # Ctrl-C
            break
    return status


def chosen(op: str, sweep: str, world: int, device: str) -> list[Case]:
    dtype = "bfloat16" if device == "cuda" else "float32"
    every = sorted(load(op).cases(sweep, world), key=lambda c: (c.dtype == dtype, PASSES.index(c.direction), prod(c.shape.values())))
    return list({c.call: c for c in every}.values())


def trace(name: str, folder: str, device: str, sweep: str, seed: int) -> int:
    """Target of the launcher: one rank."""
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    profile, status = Profile(Path(folder), name, rank, world), 0
    try:
        for case in chosen(name, sweep, world, device):
            if why := together(_one(profile, name, case, device, group, seed), group):
                status = 1
                if rank == 0:
                    print(f"failed: {case}: {why}", flush=True)
    except OSError as e:
        if isinstance(e, TimeoutError):
            raise
        raise RunError(f"bench trace: --out must be writable, got {e.strerror or e} in {folder}") from e
    finally:
        profile.close()
    return status


def _one(profile: Profile, name: str, case: Case, device: str, group: Any, seed: int) -> str:
    """Trace a case; returns why not, or ""."""
    run, why = None, ""
    try:
        ways = build(name, case, device, group, seed, quick=True)
        way = ways.all()["interlace"]
        fn = way.fresh() if way.fresh is not None else way.fn
        assert fn is not None
        run = timed(fn, ways.inputs if way.inputs is None else way.inputs, case)
        run(), run()
    except Exception as e:
        why = failure(e)
    if run is None or together(why, group):
        return why
    profile.start()
    if group is not None:
        dist.barrier(group)                                           # profilers do not start at once
    for _ in range(CALLS):
        with profile.window(str(case)):
            run()
    profile.stop()
    return ""
