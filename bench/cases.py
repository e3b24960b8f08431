"""What a bench declares: its cases, and for a case the ways to compute it.

    cases = grid(("rms_norm", "add_rms_norm"), rows("hidden"))           # of sweep quick, quick-cuda, cpu or cuda -> [Case]
    def ways(case, make) -> Ways: ...                                    # tensors from `make`, functions over them

A way is a function of the case's inputs; the harness times its forward, its backward or both, and holds its outputs and
gradients against `exact` over the same inputs in fp64. Shapes are those of models people train: whole on a GPU, an eighth
as wide on a CPU, where a sweep must take minutes.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["MODELS", "PASSES", "Case", "Make", "Model", "Way", "Ways", "grid", "rows"]

PASSES = ("fwd", "bwd", "fwd+bwd")
Shapes = Callable[[str], dict[str, dict[str, int]]]                   # sweep -> name -> sizes


@dataclass(frozen=True)
class Model:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


MODELS = {
    "gpt3": Model(12288, 49152, 96, 96, 128, 50257),
    "llama-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "llama-70b": Model(8192, 28672, 64, 8, 128, 128256),
    "mixtral": Model(4096, 14336, 32, 8, 128, 32000),
    "qwen3-30b": Model(2048, 768, 32, 4, 128, 151936),                # ffn of one expert
    "deepseek-v3": Model(7168, 2048, 128, 128, 64, 129280),           # ffn of one expert; head_dim: the part that rotates
}


@dataclass(frozen=True)
class Case:
    call: str                                                         # the function: rms_norm, add_rms_norm
    name: str                                                         # whose shape: llama-8b, odd
    shape: dict[str, int]
    dtype: str = "float32"
    direction: str = "fwd+bwd"
    world: int = 1
    compiled: bool = False                                            # whether torch.compile is among its ways; no part of its key

    def key(self) -> dict[str, Any]:
        return {"call": self.call, "name": self.name, **self.shape, "dtype": self.dtype, "pass": self.direction, "world": self.world}

    def __str__(self) -> str:
        sizes = " ".join(f"{k}={v}" for k, v in self.shape.items())
        return f"{self.call} {self.name} {sizes} {self.dtype} {self.direction}" + (f" x{self.world}" if self.world > 1 else "")


@dataclass(frozen=True)
class Way:
    """One way to compute a case. inputs: its own, instead of the case's. truth(outputs): where its truth depends on what it
    drew (dropout). fresh(): makes the function anew, where a call changes what the next one computes (a training step)."""
    fn: Callable[..., Any] | None = None
    inputs: tuple[Any, ...] | None = None
    exact: Callable[..., Any] | None = None
    truth: Callable[[tuple[Tensor, ...]], Iterable[Tensor]] | None = None
    fresh: Callable[[], Callable[..., Any]] | None = None


@dataclass
class Ways:
    """Everything about a case. peers: a way, or in words why it is absent. Costs are (forward, backward), per rank.

    gemm, comm: the two bounds of a communication op; comm_in: the passes in which it communicates. cold: where it is
    used, no cache holds its inputs (clocks.py). graph: ours and torch eager may be captured in a CUDA graph: neither waits for the GPU,
    neither keeps anything. path: which of its paths the op takes here, and why."""
    inputs: tuple[Any, ...]
    exact: Callable[..., Any]
    ours: Callable[..., Any] | Way
    peers: dict[str, Callable[..., Any] | Way | str]
    nbytes: tuple[float, float] = (0, 0)
    flops: tuple[float, float] = (0, 0)
    link: tuple[float, float] = (0, 0)
    gemm: Way | None = None
    comm: Way | None = None
    comm_in: tuple[str, ...] = PASSES
    cold: bool = False
    graph: bool = False
    path: str = ""
    extra: dict[str, Any] = field(default_factory=dict)               # goes into the rows

    def cost(self, what: tuple[float, float], direction: str) -> int:
        return int({"fwd": what[0], "bwd": what[1]}.get(direction, what[0] + what[1]))

    def all(self) -> dict[str, Way]:
        """Ours first, then the peers that are here, then the bounds."""
        every = {"interlace": self.ours, **self.peers, "gemm alone": self.gemm, "communication alone": self.comm}
        return {name: w if isinstance(w, Way) else Way(w) for name, w in every.items() if w is not None and not isinstance(w, str)}

    def absent(self) -> dict[str, str]:
        return {name: why for name, why in self.peers.items() if isinstance(why, str)}


class Make:
    """Random tensors of a case. The same ones for the same seed; other ones on other ranks, unless `same`."""

    def __init__(self, case: Case, device: str, seed: int = 0, group: dist.ProcessGroup | None = None, quick: bool = False):
        self.dtype: torch.dtype = getattr(torch, case.dtype)
        self.case, self.device, self.group, self.quick, self.seed = case, device, group, quick, seed
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        self.generators = [torch.Generator(device).manual_seed(1000 * seed + r) for r in (0, self.rank + 1)]

    def randn(self, *shape: int, grad: bool = True, same: bool = False, scale: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=self.generators[not same], device=self.device, dtype=torch.float32)
        return (t * scale).to(self.dtype).requires_grad_(grad)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generators[0], device=self.device)

    def compiled(self, fn: Callable[..., Any]) -> Callable[..., Any] | str:
        """torch.compile of fn, or why not."""
        if self.quick:
            return "left out by --quick: compiling takes seconds a case"
        if not self.case.compiled:
            return "compiled at one shape of a function and type, in the longest pass: it takes seconds a case"
        torch._dynamo.reset()                                         # past 8 shapes of one function it would run eagerly, in silence
        return torch.compile(fn, dynamic=False, fullgraph=True)


def rows(width: str, odd: int = 1023) -> Shapes:
    """N tokens of D, D being `width` of each model."""
    def shapes(sweep: str) -> dict[str, dict[str, int]]:
        if sweep == "quick":
            return {"small": {"N": 512, "D": 512}, "odd": {"N": 333, "D": odd}}
        N, part = (8192, 1) if sweep == "cuda" else (1024, 8)
        return {**{name: {"N": N, "D": getattr(m, width) // part} for name, m in MODELS.items()}, "odd": {"N": 333, "D": odd}}
    return shapes


def grid(calls: tuple[str, ...], shapes: Shapes, passes: tuple[str, ...] = PASSES,
         dtypes: tuple[str, ...] = ("float32", "bfloat16"), too_long: str = "") -> Callable[[str, int], list[Case]]:
    """cases(sweep, world). --quick keeps both types, both shapes, and every pass of the first; on a GPU ("quick-cuda") the whole
    shapes of all models in bf16, and every pass and fp32 of one. torch.compile is tried at one shape, in the longest pass.
    too_long: the type that quick-cuda leaves out, where a single case would take all the time there is."""
    def cases(sweep: str, world: int) -> list[Case]:
        sizes = shapes("cuda" if sweep == "quick-cuda" else sweep)
        whole = "llama-8b" if "llama-8b" in sizes else next(iter(sizes))
        every = [Case(call, name, shape, dtype, p, world, name == whole and p == passes[-1])
                 for call in calls for name, shape in sizes.items() for dtype in dtypes for p in passes]
        if sweep == "quick-cuda":
            kept = [c for c in every if (c.dtype == dtypes[-1]) + (c.direction == passes[-1]) + (c.name == whole) >= 2]
            kept = [c for c in kept if c.dtype != too_long]
            return sorted(kept, key=lambda c: c.dtype != dtypes[-1])  # where the time ends it is fp32 that is left out
        if sweep != "quick":
            return every
        first = next(iter(sizes))
        return [c for c in every if c.direction == passes[-1] or (c.name == first and c.dtype == dtypes[0])]
    return cases
