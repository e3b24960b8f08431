"""AdamW over this rank's parameters: schedule, global gradient clip, fp32 masters for 16-bit parameters.

    g = sum over micro-batches of grad / number of micro-batches     in fp32 whatever the parameter's type (fp64 for fp64)
    g = g * min(1, clip_grad / (|g| + 1e-6))                         |g| over the whole model, every parameter once, in fp64
    torch.optim.AdamW(fused=True) on the masters; lr: linear warm-up, then cosine (or linear, or constant) to min_lr
"""
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..parallel.data_parallel import Buffer, DistributedDataParallel
from ..parallel.sharding import grad_norm, reduce_partial_grads
from .config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(cfg: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of step 1, 2, ...: step / warmup_steps of lr during the warm-up, min_lr from decay_steps on."""
    warmup, end = cfg.sched.warmup_steps, cfg.sched.decay_steps or max_steps
    if step < warmup:
        return cfg.lr * step / warmup
    if cfg.sched.decay == "constant":
        return cfg.lr
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if cfg.sched.decay == "cosine" else 1 - done
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


class Optimizer:
    """AdamW of what this rank steps of `ddp`'s parameters: all of them, or its parts of every bucket under ZeRO-1.

    `own` holds, for each buffer, flat tensors of exactly that: the moments, and fp32 masters where the weights are 16-bit.
    `runs` are stretches of neighbours with one weight decay, as views: what torch.optim steps."""

    def __init__(self, ddp: DistributedDataParallel, cfg: OptimConfig):
        self.ddp, self.cfg, self.reduced = ddp, cfg, False
        self.own: dict[Buffer, dict[str, Tensor]] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []                 # (weights, their masters)
        self.runs: list[Tensor] = []
        groups: dict[bool, list[Tensor]] = {True: [], False: []}      # decayed or not
        for buffer in ddp.grad_buffers:
            parts = [bucket.own() for bucket in buffer.buckets]
            zeros = [torch.zeros_like(buffer.grads[:buffer.numel // buffer.shards]) for _ in MOMENTS]
            own = self.own[buffer] = dict(zip(MOMENTS, zeros))
            if buffer.weights.dtype != buffer.grads.dtype:
                own["master"] = torch.cat([buffer.weights[part] for part in parts]).to(buffer.grads.dtype)
            for here, at, decay in _runs(buffer):
                run = own["master"][at] if "master" in own else buffer.weights[here]
                run.grad = buffer.grads[here]
                groups[decay].append(run)
                self.runs.append(run)
                if "master" in own:
                    self.copies.append((buffer.weights[here], run))
        self.adamw = torch.optim.AdamW([{"params": runs, "weight_decay": cfg.weight_decay if decay else 0.0}
                                        for decay, runs in groups.items() if runs], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
        runs = iter(self.runs)
        for buffer, own in self.own.items():
            for _, at, _ in _runs(buffer):
                self.adamw.state[next(runs)] = {kind: own[kind][at] for kind in MOMENTS}
        self.set_steps(0)

    @torch.no_grad()
    def reduce_grads(self) -> None:
        """Sum over dp, then over the tp ranks that hold parts. Done by step(); twice is as once."""
        self.ddp.finish()
        if not self.reduced:
            reduce_partial_grads(self.ddp.module, self.ddp.mesh.tp, self.ddp.parts)
            self.reduced = True

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Reduce, clip, update, zero. Returns the gradient's norm before the clip (nan or inf: nothing was updated)."""
        self.reduce_grads()
        norm = grad_norm(self.ddp.module, self.ddp.mesh, self.ddp.parts, sharded=self.ddp.sharded).item()
        if math.isfinite(norm):
            if self.cfg.clip_grad and (scale := self.cfg.clip_grad / (norm + 1e-6)) < 1:
                torch._foreach_mul_([run.grad for run in self.runs if run.grad is not None], scale)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            for weights, master in self.copies:
                weights.copy_(master)
            self.ddp.gather_weights()
        self.ddp.zero_grad()
        self.reduced = False
        return norm

    def kinds(self) -> list[str]:
        """What a checkpoint keeps for a parameter: exp_avg, exp_avg_sq, and master under 16-bit training."""
        return list(dict.fromkeys(kind for own in self.own.values() for kind in own))

    def state(self, kind: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, whole tensor shaped like it) for one of kinds(), or "grad" after reduce_grads(). Collective under ZeRO-1."""
        for buffer, own in self.own.items():
            if kind == "grad":
                yield from buffer.gather(torch.cat([buffer.grads[bucket.own()] for bucket in buffer.buckets]))
            elif kind in own:
                yield from buffer.gather(own[kind])

    def set_state(self, kind: str, p: nn.Parameter, whole: Tensor) -> None:
        """Take this rank's parts of one parameter's state."""
        buffer = self.ddp.buffer_of[p]
        for at, here in buffer.parts(p):
            bucket = next(b for b in buffer.reaches(p) if b.start <= here.start < b.stop)
            first = bucket.start // buffer.shards + here.start - bucket.own().start
            self.own[buffer][kind][first:first + here.stop - here.start] = whole.reshape(-1)[at:at + here.stop - here.start]

    def set_steps(self, steps: int) -> None:
        """How many updates the state has seen (for Adam's bias correction)."""
        for run in self.runs:
            self.adamw.state[run]["step"] = torch.tensor(float(steps), device=run.device)


def _runs(buffer: Buffer) -> Iterator[tuple[slice, slice, bool]]:
    """(in the buffer, in this rank's own, decayed?) of each stretch of one weight decay; the zeros between parameters go along, so
    that a rank whose part is nothing else has a run too. Norms and biases are not decayed."""
    for bucket in buffer.buckets:
        own = bucket.own()
        cuts: list[tuple[int, bool]] = []
        shift = own.start - bucket.start // buffer.shards
        for p in bucket.params:
            first, decay = buffer.start[p], p.dim() > 1
            if first < own.stop and own.start < first + p.numel() and (not cuts or cuts[-1][1] != decay):
                cuts.append((max(first, own.start) if cuts else own.start, decay))
        cuts = cuts or [(own.start, False)]
        for (a, decay), (b, _) in zip(cuts, [*cuts[1:], (own.stop, False)]):
            yield slice(a, b), slice(a - shift, b - shift), decay
