"""transformers' Trainer for a model that is split over tp: one batch for all its ranks, one norm of the whole gradient, saved whole.

    interlace.replace_(model, mesh)
    interlace.hf.Trainer(model=model, args=TrainingArguments(...), train_dataset=...).train(resume_from_checkpoint=True)

A checkpoint is what the plain Trainer writes of the whole model, weights and optimizer: any tp, and stock transformers, go on from it.
The plain Trainer would wrap the parts of a model in DistributedDataParallel, as if they were copies, and clip each by its own norm: it is
refused (`RefusesTrainer`). A model that is not split needs nothing of this. Every rank runs the same script with the same seed.
"""
from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.comm import all_gather
from ..parallel.errors import UserError, raise_problems
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import grad_norm
from .save import parts_of_state, together, unhidden, whole_optimizer_state, whole_state_dict

__all__ = ["trainer_class"]

BY_ELEMENT = ("adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")   # optimizers that step a part as they step the whole


def _axis(model: nn.Module | None) -> Axis | None:
    return getattr(model, "_interlace_tp", None)


@functools.cache
def trainer_class() -> type:
    """interlace.hf.Trainer, a subclass of transformers.Trainer. Raises: UserError where transformers or accelerate is missing."""
    try:
        import accelerate  # noqa: F401
        from transformers import Trainer as Stock
    except ImportError as e:
        raise UserError(f"hf.Trainer: transformers and accelerate must be installed, got {e}; pip install accelerate") from None

    class Trainer(Stock):
        def __init__(self, model: Any = None, args: Any = None, **kwargs: Any):
            if (tp := _axis(model)) is None:
                super().__init__(model, args, **kwargs)
                return
            _check(args, tp, kwargs.get("optimizers", (None,))[0])
            with unhidden(model):
                super().__init__(model, args, **kwargs)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if (tp := _axis(self.model)) is not None:
                _hold_together(self.accelerator, self.model, tp)

        def get_tp_size(self) -> int:
            tp = _axis(self.model)
            return super().get_tp_size() if tp is None else tp.size if self.accelerator.num_processes > 1 else 1

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if (tp := _axis(self.model)) is not None:
                _same_batch(inputs, tp)
            return super().training_step(model, inputs, *args, **kwargs)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if (tp := _axis(self.model)) is None:
                super().save_model(output_dir, _internal_call)
                return
            model: Any = self.model
            whole = whole_state_dict(model)
            with together(model), unhidden(model):
                if tp.rank == 0 and self.args.should_save:
                    self._save(output_dir or self.args.output_dir, state_dict=whole)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if (tp := _axis(self.model)) is None:
                super()._save_optimizer_and_scheduler(output_dir)
                return
            model: Any = self.model
            optimizer: Any = self.optimizer
            whole = whole_optimizer_state(model, optimizer)
            optimizer.state_dict = lambda: whole                      # what the plain Trainer writes, on the first rank
            try:
                with together(model):
                    if tp.rank == 0:
                        super()._save_optimizer_and_scheduler(output_dir)
            finally:
                del optimizer.state_dict

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if _axis(self.model) is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            optimizer: Any = self.optimizer
            hook = getattr(optimizer, "optimizer", optimizer).register_load_state_dict_pre_hook(parts_of_state)
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            finally:
                hook.remove()
    return Trainer


def _check(args: Any, tp: Axis, own: Any) -> None:
    problems = []
    if dist.get_world_size() != tp.size:
        problems.append(f"tp must cover the world, got tp={tp.size} of {dist.get_world_size()} ranks: Trainer would not sum gradients over "
                        "the others; use your own loop, or wrap with interlace.DistributedDataParallel")
    optim = getattr(getattr(args, "optim", None), "value", "adamw_torch")
    if own is None and optim not in BY_ELEMENT:
        problems.append(f"optim must step every number by itself, since a rank holds parts, got {optim!r}; use one of "
                        f"{', '.join(BY_ELEMENT)}, or pass optimizers= of your own")
    words = {word: getattr(args, word, None) for word in ("deepspeed", "fsdp")}
    problems += [f"{word} must be unset, got {value}; leave it out" for word, value in words.items() if value]
    raise_problems("hf.Trainer", problems)


def _hold_together(accelerator: Any, model: Any, tp: Axis) -> None:
    """On this accelerator: no wrapping of the model, the same batches on every rank, one norm of the whole gradient."""
    from accelerate.data_loader import prepare_data_loader
    prepare_model = accelerator.prepare_model

    def data(loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None) -> Any:
        if getattr(loader, "_is_accelerate_prepared", False):
            return loader
        ready = prepare_data_loader(loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
                                    use_seedable_sampler=accelerator.use_seedable_sampler, non_blocking=accelerator.non_blocking)
        accelerator._dataloaders.append(ready)
        return ready

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        if norm_type != 2:
            raise ValueError(f"clip_grad_norm_: the norm of a split model must be the 2-norm, got {norm_type}")
        accelerator.unscale_gradients()
        norm = grad_norm(model, Mesh(tp=tp)).float()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(scale.to(p.grad))
        return norm
    accelerator.prepare_model = lambda m, device_placement=None, evaluation_mode=False: prepare_model(m, device_placement, True)
    accelerator.prepare_data_loader, accelerator.clip_grad_norm_ = data, clip


def _same_batch(inputs: Any, tp: Axis) -> None:
    """Raises: ValueError where the ranks of tp were given different batches."""
    sums = [t.double().mul(torch.arange(1, t.numel() + 1, device=t.device).view(t.shape)).sum()
            for t in inputs.values() if torch.is_tensor(t)]
    every = all_gather(torch.stack(sums).unsqueeze(0), tp.group)
    if not torch.equal(every, every[:1].expand_as(every)):
        raise ValueError("hf.Trainer: all ranks of tp must be given the same batch, got different ones; set the same seed on every rank, "
                         "and shuffle by it")
