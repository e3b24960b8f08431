"""The training loop: micro-batches -> loss -> gradients -> optimizer, the same code for one rank and for many.

    step s reads samples (s-1) * global_batch_size ... s * global_batch_size of the endless order, in micro-batches
    micro-batch i is computed by the rank i mod dp of dp: the same micro-batches whatever the layout
    loss and gradient are means over the step's tokens, so micro_batch_size changes speed and memory, not the result
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..kernels.comm import all_reduce, forget_paths, paths_taken
from ..kernels.dispatch import not_built
from ..parallel.data_parallel import DistributedDataParallel
from ..parallel.errors import RunError, UserError
from ..parallel.expert_parallel import take_statistics, update_expert_biases
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.pipeline_parallel import Pipeline
from ..parallel.sharding import reduce_tied_grads
from ..parallel.tensor_parallel import calls_of
from . import checkpoint
from .config import Config, ModelConfig, to_yaml
from .data import Dataset, build_tokens
from .gpt import GPT
from .metrics import MetricsLog, Progress, plot_loss
from .optimizer import Optimizer, learning_rate
from .profile import Profile
from .tokenizer import load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def forward_backward(ddp: DistributedDataParallel, data: Any, samples: int, m: ModelConfig,
                     device: torch.device | str = "cpu") -> Tensor:
    """Accumulate the gradients of one step that starts at sample `samples`. Returns: the mean loss over all ranks (0-d)."""
    mesh, count = ddp.mesh, m.global_batch_size // m.micro_batch_size
    dp, mine = mesh.dp, range(mesh.dp.rank, count, mesh.dp.size)
    ddp.module.scale_losses(1 / len(mine))
    if mesh.pp.size > 1:
        return _pipelined(ddp, data, samples, mine, m, device)
    if any("global_aux_loss" in layer.balancing for layer in ddp.module.moe_layers().values()):
        ddp.ready()                                                   # it counts over dp, where ZeRO-1's weights may still be on their way
    total: Tensor | None = None
    for i in mine:
        first = samples + i * m.micro_batch_size
        ids, labels = (torch.as_tensor(x).to(device, non_blocking=True) for x in data.batch(first, m.micro_batch_size))
        loss = ddp(ids, labels, first) / len(mine)
        with contextlib.nullcontext() if i == mine[-1] else ddp.no_sync():
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    ddp.finish()                                                      # the dp axis is free again
    return all_reduce(total.view(1), dp.group)[0] / dp.size if dp.size > 1 else total


def _pipelined(ddp: DistributedDataParallel, data: Any, samples: int, mine: range, m: ModelConfig, device: torch.device | str) -> Tensor:
    """The same over the stages of pp. Gradients are reduced after the last micro-batch: those of tied embeddings first."""
    model, mesh, B = ddp.module, ddp.mesh, m.micro_batch_size
    if model.pipeline is None:
        rows = m.seq_length // (mesh.tp.size if m.sequence_parallel else 1)
        model.pipeline = Pipeline(model.stages(), mesh.pp, num_stages=mesh.pp.size * m.chunks, schedule=m.schedule, microbatches=len(mine),
                                  ids_shape=(B, m.seq_length), shape=(rows, B, m.hidden_size), dtype=model.dtype,
                                  loss_dtype=torch.promote_types(model.dtype, torch.float32), device=torch.device(device))
    firsts = [samples + i * B for i in mine]
    batches = [data.batch(first, B) for first in firsts]
    ddp.ready()                                                       # stages run layers, not ddp
    ids, labels = (torch.cat([torch.as_tensor(b[k]) for b in batches]).to(device, non_blocking=True) for k in (0, 1))
    with ddp.no_sync():
        total = model.pipeline.step(ids, labels, torch.tensor(firsts))
    reduce_tied_grads(model, mesh)
    ddp.finish()
    return all_reduce(total.view(1), mesh.dp.group)[0] / mesh.dp.size if mesh.dp.size > 1 else total


class Run:
    """One training run: builds everything from the config, resumes what `out` holds, trains to max_steps."""

    def __init__(self, config: Config, out: Path):
        import torch.distributed as dist
        many = dist.is_initialized()
        self.config, self.out = config, out
        self.mesh = Mesh.build(Layout.from_config(config, dist.get_world_size() if many else 1))
        self.rank = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
        self.main = self.rank[0] == 0
        self.device = device_of(config)
        tokenizer = load_tokenizer(config.data.tokenizer)
        if self.main:
            prepare_out(out)
            checkpoint.sweep(out)
        tokens = build_tokens(config.data.paths, tokenizer, out / "data", extensions=config.data.extensions, exclude=[out],
                              rank=0 if self.main else 1, barrier=dist.barrier if many else None)
        self.vocab_size = tokens.fit_vocab(config.model.vocab_size)
        self.data = Dataset(tokens, config.model.seq_length, config.trainer.seed)
        self.model = GPT(config.model, self.mesh, vocab_size=self.vocab_size, seed=config.trainer.seed,
                         dtype=DTYPES[config.trainer.precision]).to(self.device)
        self.ddp = DistributedDataParallel(self.model, self.mesh, bucket_size=config.optim.ddp_bucket_size,
                                           use_distributed_optimizer=config.optim.use_distributed_optimizer)
        self.optimizer = Optimizer(self.ddp, config.optim)
        self.step, self.samples = 0, 0
        if state := checkpoint.resume(out, config, self.model, self.vocab_size, self.optimizer, self._skipped):
            self.step, self.samples = state["step"], state["samples"]
            if self.main and state["data"] not in (None, tokens.digest):   # None: converted weights
                print(f"interlace: the text is not the one that {out} was trained on so far; going on with the new text at sample "
                      f"{self.samples}", file=sys.stderr, flush=True)
            was, now = (state.get("seed"), state.get("seq_length")), (config.trainer.seed, config.model.seq_length)
            if self.main and state["data"] is not None and was != now:
                print(f"interlace: (trainer.seed, model.seq_length) was {was} and is {now}: the samples are others, or in another order; "
                      f"going on at number {self.samples}", file=sys.stderr, flush=True)
        self.saver = checkpoint.Saver(out, config, self.optimizer, self.vocab_size,
                                      {"tokenizer": absolute(config.data.tokenizer), "data": tokens.digest})
        if self.step > config.trainer.max_steps:
            raise UserError(f"trainer.max_steps must be at least the {self.step} steps that {out} has been trained for, "
                            f"got {config.trainer.max_steps}; raise it, or use another --out")

    def _skipped(self, why: str) -> None:
        if self.main:
            print(f"interlace: {why}; going on from the one before", file=sys.stderr, flush=True)

    def train(self, profile: int = 0) -> None:
        """profile: steps to trace (profile.py), after two that are not where there are so many."""
        c, log, progress = self.config, None, None
        if self.main:
            new = self.out / ".config.yaml"
            new.write_text(to_yaml(c))
            new.replace(self.out / "config.yaml")                     # a full disk leaves the old one
            log, progress = MetricsLog(self.out, step=self.step), Progress(self.out, self.step, c.trainer.max_steps,
                                                                           every=c.trainer.log_every_n_steps)
        self.model.train()
        forget_paths()
        tokens, first = c.model.global_batch_size * c.model.seq_length, self.step + 1
        left = c.trainer.max_steps - self.step
        skip = min(2, left - 1)
        watch = Profile(self.out, "trace", *self.rank, skip=skip, steps=min(profile, left - skip)) if profile and left else None
        try:
            while self.step < c.trainer.max_steps:
                start = time.perf_counter()
                loss, norm, lr = self.train_step()
                with self.saving():
                    self.saver.poll()
                seconds = time.perf_counter() - start
                if watch is not None:
                    watch.step()
                if log is not None and self.step == first and (paths := paths_taken(calls_of(self.model))):
                    (self.out / "paths.txt").write_text("\n".join(paths) + "\n")
                row = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr, "tokens_per_second": tokens / seconds,
                       "seconds": seconds, "samples": self.samples, "tokens": self.samples * c.model.seq_length, **self.balance()}
                if log is not None and progress is not None:
                    if self.step % c.trainer.log_every_n_steps == 0 or self.step == c.trainer.max_steps:
                        log.write(row)
                    progress.update(row)
                every = c.trainer.save_every_n_steps
                if self.step == c.trainer.max_steps or (every and self.step % every == 0):
                    self.save()
            self.finish_saving()
        except (RunError, KeyboardInterrupt) as e:
            if isinstance(e, RunError) or self.mesh.pp.size == 1:     # the other stages come here too, or there are none
                self.finish_saving()                                  # keep what was begun
            raise
        finally:
            if log is not None and progress is not None:
                progress.close()
                log.close()
            if watch is not None:
                watch.close()
        if self.main:
            plot_loss(self.out)

    def train_step(self) -> tuple[float, float, float]:
        """One step. Returns: loss, gradient norm before the clip, learning rate. Raises: RunError when they are not finite."""
        c = self.config
        loss = forward_backward(self.ddp, self.data, self.samples, c.model, self.device).item()
        lr = learning_rate(c.optim, self.step + 1, c.trainer.max_steps)
        self.seen = take_statistics(self.model, self.mesh)            # before the step: then the dp axis is the weights'
        norm = self.optimizer.step(lr, wait=False)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            folder = self.out / "checkpoints"
            fp32 = "" if c.trainer.precision == "fp32" else ", or trainer.precision=fp32 with another --out"
            kept, again = (f" and the checkpoints in {folder} are untouched", "go on from the last checkpoint") if (
                folder / "latest").exists() else ("; there is no checkpoint yet", "begin anew")
            raise RunError(f"step {self.step + 1}: loss and gradient norm must be finite, got loss {loss} and norm {norm}; the weights "
                           f"were not updated{kept}. Way out: a lower optim.lr (now {c.optim.lr:g}), a longer optim.sched.warmup_steps "
                           f"(now {c.optim.sched.warmup_steps}){fp32}, then run the same command again to {again}")
        update_expert_biases(self.model, self.seen, c.model.moe_router_bias_update_rate)
        self.step += 1
        self.samples += c.model.global_batch_size
        return loss, norm, lr

    def balance(self) -> dict[str, float]:
        """What the last step's tokens did in the layers with experts of all stages: the largest load of an expert over the mean,
        dropped slots, and the losses that balance, summed over the layers. Collective."""
        if self.config.model.num_moe_experts is None:
            return {}
        seen = list(self.seen.values())
        sums = torch.tensor([sum(s.losses[0].item() for s in seen), sum(s.losses[1].item() for s in seen),
                             sum(s.dropped.item() for s in seen)], dtype=torch.float64)
        worst = torch.tensor([max((s.imbalance for s in seen), default=0.0)], dtype=torch.float64)
        if self.mesh.pp.size > 1:
            sums, worst = all_reduce(sums, self.mesh.pp.group), all_reduce(worst, self.mesh.pp.group, op="max")
        return {"aux_loss": sums[0].item(), "z_loss": sums[1].item(), "tokens_dropped": int(sums[2].item()),
                "expert_imbalance": worst.item()}

    def save(self) -> None:
        """Begin a checkpoint, and wait for it unless trainer.async_save."""
        self.ddp.ready()
        with self.saving():
            self.saver.start(self.step, self.samples)
            if not self.config.trainer.async_save:
                self.saver.wait()

    def finish_saving(self) -> None:
        with self.saving():
            self.saver.wait()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A disk that refuses, in words."""
        step = self.saver.write.state["step"] if self.saver.write else self.step
        try:
            yield
        except (OSError, SafetensorError) as e:                       # safetensors tells a full disk in its own words
            if isinstance(e, TimeoutError):                           # of a collective, not of a file
                raise
            raise RunError(f"step {step}: the checkpoint could not be written to {self.out}: {getattr(e, 'strerror', None) or e}; "
                           "earlier checkpoints are untouched. Free space, then run the same command again") from e


def device_of(config: Config) -> torch.device:
    """This rank's device under trainer.accelerator. Raises: UserError when CUDA is asked for and not there."""
    import torch.distributed as dist
    local, ranks = (dist.get_node_local_rank(fallback_rank=0), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wanted = config.trainer.accelerator
    if wanted == "cpu" or (wanted == "auto" and torch.cuda.device_count() < ranks):
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise UserError(f"trainer.accelerator=cuda needs a GPU for each of the {ranks} ranks, got {torch.cuda.device_count()}; "
                        "start fewer ranks, or set trainer.accelerator=cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def absolute(tokenizer: str) -> str:
    """Its name from any folder."""
    return tokenizer if tokenizer == "bytes" else str(Path(tokenizer).absolute())


def prepare_out(out: Path) -> None:
    """Make the folder and prove it can be written. Raises: UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_text("x")                                         # an empty one fits on a full disk
        probe.unlink()
    except OSError as e:
        raise UserError(f"--out must be a folder that can be written, got {out}: {e.strerror or e}; choose another") from None


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """The folder for this process alone: two runs would remove each other's checkpoints under way. The system takes the lock back from
    whoever dies. Raises: UserError where another process has it."""
    prepare_out(out)
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:                                          # any other: a file system without locks
            if e.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(f"--out must be of one run at a time, got {out}, into which {file.read().strip() or 'another process'} "
                                "trains; wait for its end, or choose another --out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def train(config: Config, out: str | Path, profile: int = 0) -> int:
    """`interlace train`: train to trainer.max_steps, going on from what `out` holds; trace `profile` steps. Returns the exit status."""
    import torch.distributed as dist
    with alone(Path(out)) if not dist.is_initialized() or dist.get_rank() == 0 else contextlib.nullcontext():
        return _train(Run(config, Path(out)), config, out, profile)


def _train(run: Run, config: Config, out: str | Path, profile: int) -> int:
    if run.main and run.device.type == "cpu" and (why := not_built()):
        print(f"interlace: the C++ ops are not built here, the slower references run: {why}", file=sys.stderr, flush=True)
    if run.main and run.step == config.trainer.max_steps:
        print(f"{out} is trained to step {run.step} already; raise trainer.max_steps to go on")
    try:
        run.train(profile)
    except OSError as e:
        if isinstance(e, TimeoutError):                               # of a collective, not of a file
            raise
        raise RunError(f"step {run.step}: --out must be writable during a run, got {e.strerror or e} in {out}; its checkpoints are "
                       "untouched. Free space, then run the same command again") from e
    if run.main:
        rows = (Path(out) / "metrics.jsonl").read_text().splitlines() if (Path(out) / "metrics.jsonl").exists() else []
        last = json.loads(rows[-1]) if rows else {}
        made = [n for n in ("metrics.jsonl", "loss.png", "config.yaml", "paths.txt", "checkpoints") if (Path(out) / n).exists()]
        name = shlex.quote(str(out))
        command = "interlace" if shutil.which("interlace") else f"{os.path.relpath(sys.executable)} -m interlace"
        with contextlib.suppress(BrokenPipeError):                    # nobody reads it; the run is done all the same
            print(f"step {run.step}: loss {last.get('loss', float('nan')):.4f}. In {out}: {', '.join(made)}\n"
                  f"sample from it: {command} generate --out {name} --prompt 'def '", flush=True)
    return 0
