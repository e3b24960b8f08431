"""verify: a layout against one process, on the same weights and batches, in float64. Every rank trains both and compares
its own pieces, so nothing is gathered and no rank trusts another's copy.

Compared over `steps` optimizer steps: what goes into every layer in the first step (a fault of the forward shows there first),
the loss, the gradient norm that clips, every gradient of the first step, every weight after the last. An error is the largest
difference over the largest true value of that tensor, or over a thousandth of the largest of its kind where that is more: the
gradient of a key bias without rope is zero up to rounding.
"""
from __future__ import annotations

import dataclasses
import functools
import sys

import torch
from torch import Tensor, nn

from ..parallel.data_parallel import DistributedDataParallel
from ..parallel.expert_parallel import take_statistics, update_expert_biases
from ..parallel.layout import Layout
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import named_pieces
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
    """One compared quantity. scale: the factor by which it is off where it is off by a factor, else 1. cause: what that hints at."""
    what: str
    name: str
    error: float
    scale: float
    expert: bool = False                                              # of an expert: summed over edp, not dp
    cause: str = ""

    @property
    def off(self) -> float:
        """The error, to be ordered by: NaN is the largest."""
        return self.error if self.error == self.error else float("inf")


def _compare(what: str, name: str, got: Tensor, want: Tensor, floor: float = 0.0, expert: bool = False) -> Finding:
    got = got.to(want.device, torch.promote_types(got.dtype, want.dtype))
    size = max(floor, want.abs().max().item() if want.numel() else 0.0)
    error = (got - want).abs().max().item() if want.numel() else 0.0
    norm = want.square().sum().item()
    scale = (got * want).sum().item() / norm if norm else 1.0
    cause = "" if want.isfinite().all() else "not finite in one process either; use a lower optim.lr"
    return Finding(what, name, error / size if size else error, scale, expert, cause)


def compare(config: Config, mesh: Mesh, *, vocab_size: int, steps: int = 5, plant=lambda model: None,
            wrap=DistributedDataParallel, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> list[Finding]:
    """Train `config` on `mesh` and as one process; what each rank finds, the worst over ranks. Collective.

    plant: changes the parallel model before it runs; wrap: what makes it data parallel. Both for tests that plant a fault.
    dtype, device: of the parallel model; the one process computes in float64 on a CPU, from the same weights up to rounding."""
    m, optim = config.model, config.optim
    single = dataclasses.replace(
        m, tensor_model_parallel_size=1, sequence_parallel=False, expert_model_parallel_size=1, pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None, pipeline_parallel_schedule=None, num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None)
    seed = config.trainer.seed
    models = [GPT(single, vocab_size=vocab_size, seed=seed, dtype=torch.float64),
              GPT(m, mesh, vocab_size=vocab_size, seed=seed, dtype=dtype).to(device)]
    plant(models[1])
    ddps = [DistributedDataParallel(models[0]), wrap(models[1], mesh, bucket_size=optim.ddp_bucket_size,
                                                     use_distributed_optimizer=optim.use_distributed_optimizer)]
    optimizers = [Optimizer(ddp, optim) for ddp in ddps]
    data = RandomTokens(vocab_size, m.seq_length, seed)
    found: list[Finding] = []
    seen_by = [_Inputs(model) for model in models]
    for step in range(1, steps + 1):
        losses = [forward_backward(ddp, data, (step - 1) * m.global_batch_size, m, at) for ddp, at in zip(ddps, ("cpu", device))]
        found.append(_compare("loss", f"step {step}", losses[1], losses[0]))
        if step == 1:
            found += seen_by[1].against(seen_by[0])
            for optimizer in optimizers:
                optimizer.reduce_grads()
            found += _pieces("gradient", models, [dict(optimizer.state("grad")) for optimizer in optimizers])
        seen = [take_statistics(ddp.module, ddp.mesh) for ddp in ddps]
        for name, got in seen[1].items():
            found.append(_compare("balancing losses", f"{name}, step {step}", got.losses, seen[0][name].losses))
            found.append(_compare("tokens per expert", f"{name}, step {step}", got.tokens.double(), seen[0][name].tokens.double()))
        lr = learning_rate(optim, step, steps)
        norms = [torch.tensor(o.step(lr, wait=False), dtype=torch.float64) for o in optimizers]
        found.append(_compare("gradient norm", f"step {step}", norms[1], norms[0]))
        for model, stats in zip(models, seen):
            update_expert_biases(model, stats, m.moe_router_bias_update_rate)
    for ddp in ddps:
        ddp.ready()
    found += _pieces("weight", models, [{p: p.detach() for p in model.parameters()} for model in models])
    return _over_ranks(found, mesh)


class _Inputs:
    """What went into each layer of a model, by layer and first sample of the micro-batch, until it is compared."""

    def __init__(self, model: GPT):
        self.seen: dict[tuple[int, int], Tensor] = {}
        self.tp = model.tp.rank, model.tp.size if model.cfg.sequence_parallel else 1
        self.hooks = [layer.register_forward_pre_hook(functools.partial(self._keep, int(i))) for i, layer in model.layers.items()]

    def _keep(self, layer: int, module: nn.Module, args: tuple[Tensor, object, int]) -> None:
        self.seen[layer, int(args[2])] = args[0].detach()

    def against(self, true: _Inputs) -> list[Finding]:
        """One for each layer, the worst of its micro-batches. Its cause: another layer or micro-batch, whose input it is."""
        found: dict[int, Finding] = {}
        rank, size = self.tp
        want = {at: h[rank * (h.shape[0] // size):(rank + 1) * (h.shape[0] // size)] for at, h in true.seen.items()}
        for (layer, first), got in sorted(self.seen.items()):
            one = _compare("activation", f"layers.{layer} input", got, want[layer, first])
            if not one.error <= TOLERANCE:
                other = [f"layers.{i} at sample {s}" for (i, s), h in want.items() if _compare("", "", got, h).error <= TOLERANCE]
                one.cause = f"received the input of {other[0]}?" if other else one.cause
            if layer not in found or not one.error <= found[layer].error:
                found[layer] = one
        for hook in [*self.hooks, *true.hooks]:
            hook.remove()
        self.seen, true.seen = {}, {}
        return list(found.values())


def _pieces(what: str, models: list[GPT], of: list[dict[nn.Parameter, Tensor]]) -> list[Finding]:
    true = {name: piece.local(of[0][p]) for name, piece, p in named_pieces(models[0])}
    floor = 1e-3 * max(t.abs().max().item() for t in true.values())
    return [_compare(what, name, piece.local(of[1][p]), piece.of(true[name]), floor, getattr(p, "expert", False))
            for name, piece, p in named_pieces(models[1])]


Place = dict[str, int]                                                # a rank's coordinates


def _over_ranks(found: list[Finding], mesh: Mesh) -> list[Finding]:
    """What all ranks found, one of each name: the worst error, and its cause. Collective over the world."""
    import torch.distributed as dist
    axes = [axis for axis in (mesh.tp, mesh.dp, mesh.pp, mesh.edp) if axis.size > 1]
    if not axes and mesh.ep.size == 1:
        return found
    place = {a.name: a.rank for a in (mesh.tp, mesh.dp, mesh.pp, mesh.ep, mesh.edp)}
    every: list[tuple[Place, list[Finding]]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(every, (place, found))
    alike: dict[tuple[str, str], list[tuple[Place, Finding]]] = {}
    for at, rows in every:
        for f in rows:
            alike.setdefault((f.what, f.name), []).append((at, f))
    return [_worst(rows, axes) for rows in alike.values()]


def _worst(rows: list[tuple[Place, Finding]], axes: list[Axis]) -> Finding:
    """Where a sum over an axis is missing, the factors differ along that axis and add up to 1; where a reduction is done twice or at
    the wrong scale, they are n or 1/n on all ranks."""
    worst = max((f for _, f in rows), key=lambda f: f.off)
    if worst.error <= TOLERANCE or worst.cause:
        return worst
    grid = ("edp", "ep", "pp") if worst.expert else ("tp", "dp", "pp")
    mine = [axis for axis in axes if axis.name in grid]
    scales = [f.scale for _, f in rows]
    missing = [axis.name for axis in mine if _adds_up(rows, axis, grid)]
    even = max(scales) - min(scales) < 1e-6
    cause = f"sum over {' or '.join(missing)} missing?" if missing else suspect(worst.scale, mine) if even else ""
    return dataclasses.replace(worst, cause=cause)


def _adds_up(rows: list[tuple[Place, Finding]], axis: Axis, grid: tuple[str, ...]) -> bool:
    """Whether the factors along the axis are different, and sum to 1, wherever the other coordinates are."""
    lines: dict[tuple[int, ...], list[float]] = {}
    for at, f in rows:
        lines.setdefault(tuple(at[a] for a in grid if a != axis.name), []).append(f.scale)
    return all(len(x) == axis.size and abs(sum(x) - 1) < 1e-6 < max(x) - min(x) for x in lines.values())


def suspect(scale: float, axes: list[Axis]) -> str:
    """What a factor between ours and the truth, the same on all ranks, hints at."""
    for n in sorted({axis.size for axis in axes}):
        names = " or ".join(axis.name for axis in axes if axis.size == n)
        for factor, words in ((n, f"{n} times too large: summed over {names} twice, or not divided by it?"),
                              (1 / n, f"{n} times too small: sum over {names} missing, or divided by it twice?")):
            if abs(scale / factor - 1) < 1e-3:
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
    if world == 1 or dist.get_rank() == 0:
        report(found, bad, layout, steps, zero1=config.optim.use_distributed_optimizer)
    return 1 if bad else 0


def report(found: list[Finding], bad: list[Finding], layout: Layout, steps: int, file=None, *, zero1: bool = False) -> None:
    file = file or sys.stdout
    more = "".join(f" {name}={n}" for name, n in (("pp", layout.pp), ("vpp", layout.vpp or 1), ("ep", layout.ep)) if n > 1)
    print(f"verify: tp={layout.tp} sp={'on' if layout.sp else 'off'} dp={layout.dp} zero1={'on' if zero1 else 'off'}{more} against one "
          f"process, float64, {steps} steps", file=file)
    print(f"    {'quantity':<20}{'worst':<52}{'error':>10}", file=file)
    for what in dict.fromkeys(f.what for f in found):
        worst = max((f for f in found if f.what == what), key=lambda f: f.off)
        count = sum(f.what == what for f in found)
        print(f"    {what:<20}{worst.name + f'  (of {count})':<52}{worst.error:10.1e}", file=file)
    for f in sorted(bad, key=lambda f: -f.off)[:20]:
        print(f"    OFF {f.what} {f.name}: error {f.error:.1e} {f.cause}", file=file)
    verdict = f"FAILED, {len(bad)} of {len(found)} quantities over" if bad else f"equal, {len(found)} quantities within"
    alone = "; one rank against itself, which shows little: add tp=2, pp=2 or --nproc 2" if layout.world == 1 else ""
    print(f"verify: {verdict} {TOLERANCE}{alone}", file=file, flush=True)
