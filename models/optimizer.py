"""AdamW over this rank's parameters: schedule, global gradient clip, fp32 masters for 16-bit parameters.

    g = sum over micro-batches of grad / number of micro-batches     in fp32 whatever the parameter's type (fp64 for fp64)
    g = g * min(1, clip_grad / (|g| + 1e-6))                         |g| over the whole model, every parameter once, in fp64
    kernels/adamw.py on the masters, the clip in the same pass; lr: linear warm-up, then cosine (or linear, or constant) to min_lr
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels import adamw
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


@dataclass
class Runs:
    """What adamw() takes of one buffer: stretches of neighbours with one weight decay, as views."""
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)                # of masters: the model's weights
    weight_decay: list[float] = field(default_factory=list)


class Optimizer:
    """AdamW of what this rank steps of `ddp`'s parameters: all of them, or its parts of every bucket under ZeRO-1.

    `own` holds, for each buffer, flat tensors of exactly that: the moments, and fp32 masters where the weights are 16-bit. Weights that
    others wrote since (load_state_dict, copy_ under no_grad) go on from there: their masters are copied anew. What is written through
    p.data nothing tells of: it is written over."""

    def __init__(self, ddp: DistributedDataParallel, cfg: OptimConfig):
        self.ddp, self.cfg, self.reduced, self.steps = ddp, cfg, False, 0
        self.own: dict[Buffer, dict[str, Tensor]] = {}
        self.runs: list[Runs] = []
        for buffer in ddp.grad_buffers:
            parts = [bucket.own() for bucket in buffer.buckets]
            zeros = [torch.zeros_like(buffer.grads[:buffer.numel // buffer.shards]) for _ in MOMENTS]
            own = self.own[buffer] = dict(zip(MOMENTS, zeros))
            if buffer.weights.dtype != buffer.grads.dtype:
                own["master"] = torch.cat([buffer.weights[part] for part in parts]).to(buffer.grads.dtype)
            runs = Runs()
            for here, at, decay in _runs(buffer):
                runs.weights.append(own["master"][at] if "master" in own else buffer.weights[here])
                runs.grads.append(buffer.grads[here])
                runs.exp_avgs.append(own["exp_avg"][at])
                runs.exp_avg_sqs.append(own["exp_avg_sq"][at])
                if "master" in own:
                    runs.copies.append(buffer.weights[here])
                runs.weight_decay.append(cfg.weight_decay if decay else 0.0)
            self.runs.append(runs)
        self.written = {p: p._version for p in ddp.buffer_of}         # by others: what adamw and collectives write counts as nothing

    @torch.no_grad()
    def reduce_grads(self) -> None:
        """Sum over dp, then over the tp ranks that hold parts. Done by step(); twice is as once."""
        self.ddp.finish()
        if not self.reduced:
            reduce_partial_grads(self.ddp.module, self.ddp.mesh.tp, self.ddp.parts)
            self.reduced = True

    @torch.no_grad()
    def step(self, lr: float, *, wait: bool = True) -> float:
        """Reduce, clip, update, zero. Returns the gradient's norm before the clip (nan or inf: nothing was updated).

        wait=False, for ZeRO-1: the other ranks' parts of the weights come while the next forward of `ddp` runs, in which each parameter
        is read by the child of the model that holds it. Call ddp.ready() before anything else reads them, or uses the dp axis."""
        self.reduce_grads()
        norm = grad_norm(self.ddp.module, self.ddp.mesh, self.ddp.parts, sharded=self.ddp.sharded).item()
        self._take_over()
        if math.isfinite(norm):
            scale = min(1.0, self.cfg.clip_grad / (norm + 1e-6)) if self.cfg.clip_grad else 1.0
            self.steps += 1
            for runs in self.runs:
                adamw(**vars(runs), lr=lr, betas=self.cfg.betas, eps=self.cfg.eps, step=self.steps, scale=scale)
            self.ddp.gather_weights()
            if wait:
                self.ddp.ready()
        self.ddp.zero_grad()
        self.reduced = False
        return norm

    def _take_over(self) -> None:
        """Masters of weights that others wrote. The others' low bits stay: a checkpoint's weights are its masters, rounded."""
        for p, version in self.written.items():
            buffer = self.ddp.buffer_of[p]
            if p._version != version and "master" in self.own[buffer]:
                for here, master in self._places(p, "master"):
                    weights = buffer.weights[here]
                    master.copy_(torch.where(master.to(weights.dtype) == weights, master, weights.to(master.dtype)))
            self.written[p] = p._version

    def _places(self, p: nn.Parameter, kind: str) -> Iterator[tuple[slice, Tensor]]:
        """(where in its buffer, this rank's state of it) of every part of one parameter."""
        buffer = self.ddp.buffer_of[p]
        for _, here in buffer.parts(p):
            bucket = next(b for b in buffer.reaches(p) if b.start <= here.start < b.stop)
            first = bucket.start // buffer.shards + here.start - bucket.own().start
            yield here, self.own[buffer][kind][first:first + here.stop - here.start]

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
        for here, part in self._places(p, kind):
            at = here.start - self.ddp.buffer_of[p].start[p]
            part.copy_(whole.reshape(-1)[at:at + len(part)])

    def set_steps(self, steps: int) -> None:
        """How many updates the state has seen (for Adam's bias correction)."""
        self.steps = steps


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
