"""AdamW over this rank's parameters: schedule, global gradient clip, fp32 masters for 16-bit parameters.

    g = sum over micro-batches of grad / number of micro-batches     in fp32 whatever the parameter's type (fp64 for fp64)
    g = g * min(1, clip_grad / (|g| + 1e-6))                         |g| over the whole model, every parameter once, in fp64
    torch.optim.AdamW(fused=True) on the masters; lr: linear warm-up, then cosine (or linear, or constant) to min_lr
"""
import math

import torch
from torch import Tensor, nn

from ..parallel.mesh import Axis
from ..parallel.sharding import grad_norm, reduce_partial_grads
from .config import OptimConfig


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
    """AdamW of one rank. `masters` maps each parameter to the tensor that is stepped: itself, or its fp32 copy."""

    def __init__(self, model: nn.Module, cfg: OptimConfig, tp: Axis):
        self.model, self.cfg, self.tp = model, cfg, tp
        self.params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        narrow = (torch.bfloat16, torch.float16)
        self.masters: dict[Tensor, Tensor] = {p: p.detach().float() if p.dtype in narrow else p for p in self.params}
        for p, master in self.masters.items():
            if master is not p:
                p.register_post_accumulate_grad_hook(self._to_main_grad)
        decay = [m for p, m in self.masters.items() if p.dim() > 1]
        plain = [m for p, m in self.masters.items() if p.dim() <= 1]  # norms and biases are not decayed
        groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)

    def _to_main_grad(self, p: Tensor) -> None:
        """A bf16 sum over micro-batches would lose their low bits: add in fp32, drop the bf16 gradient."""
        master = self.masters[p]
        assert p.grad is not None
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def grad_of(self, p: Tensor) -> Tensor | None:
        return self.masters[p].grad

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Reduce, clip, update, zero. Returns the gradient's norm before the clip (nan or inf: nothing was updated)."""
        reduce_partial_grads(self.model, self.tp, self.grad_of)
        norm = grad_norm(self.model, self.tp, self.grad_of).item()
        if math.isfinite(norm):
            grads = [m.grad for m in self.masters.values() if m.grad is not None]
            if self.cfg.clip_grad and (scale := self.cfg.clip_grad / (norm + 1e-6)) < 1:
                torch._foreach_mul_(grads, scale)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            for p, master in self.masters.items():
                if master is not p:
                    p.copy_(master)
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def state(self) -> dict[str, dict[Tensor, Tensor]]:
        """{"exp_avg": {parameter: tensor}, "exp_avg_sq": ..., "master": ...}, tensors shaped like the local parameter."""
        found: dict[str, dict[Tensor, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "master": {}}
        for p, master in self.masters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                found[key][p] = self.adamw.state[master].setdefault(key, torch.zeros_like(master))
            if master is not p:
                found["master"][p] = master
        return {key: tensors for key, tensors in found.items() if tensors}

    def set_steps(self, steps: int) -> None:
        """After the state was loaded: how many updates it has seen (for Adam's bias correction)."""
        for master in self.masters.values():
            self.adamw.state[master]["step"] = torch.tensor(float(steps), device=master.device)
