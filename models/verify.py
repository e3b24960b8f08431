"""verify: a layout against one process, on the same weights and batches, in float64. Every rank trains both and compares
its own pieces, so nothing is gathered and no rank trusts another's copy.

Compared over `steps` optimizer steps: the loss, the gradient norm that clips, every gradient of the first step, every
weight after the last. An error is the largest difference over the largest true value of that tensor, or over a thousandth
of the largest of its kind where that is more: the gradient of a key bias without rope is zero up to rounding.
"""
from __future__ import annotations

import dataclasses
import sys

import torch
from torch import Tensor

from ..kernels.comm import all_reduce
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.sharding import named_pieces, reduce_partial_grads
from .config import Config
from .gpt import GPT
from .optimizer import Optimizer, learning_rate
from .train import forward_backward

TOLERANCE = 1e-10


class RandomTokens:
    """Samples that depend on their number and the seed alone, so no data is needed."""

    def __init__(self, vocab_size: int, seq_length: int, seed: int):
        self.vocab_size, self.seq_length, self.seed = vocab_size, seq_length, seed

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        rows = [torch.randint(self.vocab_size, (self.seq_length + 1,), generator=torch.Generator().manual_seed(self.seed * 1000003 + i))
                for i in range(first, first + count)]
        both = torch.stack(rows)
        return both[:, :-1], both[:, 1:]


@dataclasses.dataclass
class Finding:
    """One compared quantity. scale: the factor by which it is off where it is off by a factor, else 1."""
    what: str
    name: str
    error: float
    scale: float


def _compare(what: str, name: str, got: Tensor, want: Tensor, floor: float = 0.0) -> Finding:
    size = max(floor, want.abs().max().item() if want.numel() else 0.0)
    error = (got - want).abs().max().item() if want.numel() else 0.0
    norm = want.square().sum().item()
    scale = (got * want).sum().item() / norm if norm else 1.0
    return Finding(what, name, error / size if size else error, scale)


def compare(config: Config, mesh: Mesh, *, vocab_size: int, steps: int = 5, plant=lambda model: None) -> list[Finding]:
    """Train `config` on `mesh` and as one process; what each rank finds, the worst over ranks. Collective.

    plant: changes the parallel model before it runs, for tests that plant a fault."""
    m = config.model
    single = dataclasses.replace(m, tensor_model_parallel_size=1, sequence_parallel=False)
    seed = config.trainer.seed
    models = [GPT(single, vocab_size=vocab_size, seed=seed, dtype=torch.float64),
              GPT(m, mesh, vocab_size=vocab_size, seed=seed, dtype=torch.float64)]
    plant(models[1])
    axes = [Mesh().tp, mesh.tp]
    optimizers = [Optimizer(model, config.optim, axis) for model, axis in zip(models, axes)]
    data = RandomTokens(vocab_size, m.seq_length, seed)
    found: list[Finding] = []
    for step in range(1, steps + 1):
        losses = [forward_backward(model, data, (step - 1) * m.global_batch_size, m) for model in models]
        found.append(_compare("loss", f"step {step}", losses[1], losses[0]))
        if step == 1:
            reduce_partial_grads(models[1], mesh.tp)
            found += _pieces("gradient", models, lambda p: p.grad)
            for _, piece, p in named_pieces(models[1]):               # the optimizer reduces once more: undo ours
                if piece.partial and p.grad is not None:
                    piece.local(p.grad).div_(piece.copies)
        lr = learning_rate(config.optim, step, steps)
        norms = [torch.tensor(o.step(lr), dtype=torch.float64) for o in optimizers]
        found.append(_compare("gradient norm", f"step {step}", norms[1], norms[0]))
    found += _pieces("weight", models, lambda p: p.detach())
    return _worst_over_ranks(found, mesh)


def _pieces(what: str, models: list[GPT], of) -> list[Finding]:
    true = {name: piece.local(of(p)) for name, piece, p in named_pieces(models[0])}
    floor = 1e-3 * max(t.abs().max().item() for t in true.values())
    return [_compare(what, name, piece.local(of(p)), piece.of(true[name]), floor) for name, piece, p in named_pieces(models[1])]


def _worst_over_ranks(found: list[Finding], mesh: Mesh) -> list[Finding]:
    if mesh.tp.size == 1:
        return found
    errors = torch.nan_to_num(torch.tensor([f.error for f in found], dtype=torch.float64), nan=torch.inf)
    worst = all_reduce(errors, mesh.tp.group, op="max")
    return [dataclasses.replace(f, error=e) for f, e in zip(found, worst.tolist())]


def suspect(f: Finding, tp: int) -> str:
    """What a factor between ours and the truth hints at."""
    for factor, words in ((tp, f"{tp} times too large: summed over tp twice?"), (1 / tp, f"{tp} times too small: sum over tp missing?")):
        if tp > 1 and abs(f.scale / factor - 1) < 1e-3:
            return words
    return ""


def verify(config: Config, *, steps: int = 5) -> int:
    """`interlace verify`: print the table on rank 0; 0 when every error is within 1e-10, else 1."""
    import torch.distributed as dist
    world = dist.get_world_size() if dist.is_initialized() else 1
    layout = Layout.from_config(config, world)
    mesh = Mesh.build(layout)
    found = compare(config, mesh, vocab_size=config.model.vocab_size or 257, steps=steps)
    bad = [f for f in found if not f.error <= TOLERANCE]
    if mesh.tp.rank == 0:
        report(found, bad, layout, steps)
    return 1 if bad else 0


def report(found: list[Finding], bad: list[Finding], layout: Layout, steps: int, file=None) -> None:
    file = file or sys.stdout
    print(f"verify: tp={layout.tp} sp={'on' if layout.sp else 'off'} against one process, float64, {steps} steps", file=file)
    print(f"    {'quantity':<16}{'worst':<52}{'error':>10}", file=file)
    for what in dict.fromkeys(f.what for f in found):
        worst = max((f for f in found if f.what == what), key=lambda f: f.error)
        count = sum(f.what == what for f in found)
        print(f"    {what:<16}{worst.name + f'  (of {count})':<52}{worst.error:10.1e}", file=file)
    for f in sorted(bad, key=lambda f: -f.error)[:20]:
        print(f"    OFF {f.what} {f.name}: error {f.error:.1e} {suspect(f, layout.tp)}", file=file)
    verdict = f"FAILED, {len(bad)} of {len(found)} quantities over" if bad else f"equal, {len(found)} quantities within"
    print(f"verify: {verdict} {TOLERANCE}", file=file, flush=True)
