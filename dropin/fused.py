"""Fused kernels inside modules that somebody else wrote: how a module is recognised, and what its new class does.

A module is recognised by what it computes on a small random probe, never by the name of its class. It is replaced by giving the
instance a subclass of its own class (`fused_class`): parameters, names, hooks, `isinstance` and `state_dict` stay as they are, nothing
else in the process changes, and the original forward is one `super()` away: it runs wherever the kernel cannot (another dtype under
autocast, say) and under `use(kernels="original")`.

    recognised                                                                     runs
    1-d weight, y = x * rstd * w or * (1 + w)                                      rms_norm
    1-d weight and maybe bias, y = (x - mean) * rstd * w + b                       layer_norm
    gate_proj, up_proj, down_proj (or gate_up_proj): down(silu(gate(x)) * up(x))   both products into one buffer, swiglu
    the same with either gelu in place of silu                                     gated
    no parameters, the tanh form of gelu (torch's exact one is as fast)            gelu
    a forward that calls a function (q, k, cos, sin) of its file, which turns halves   rope, in a copy of that forward (attention.py)
    a forward that calls scaled_dot_product_attention, causal and without a mask     attention, on CPU (attention.py)
    stacks of experts, called with chosen experts and their weights                route_plan, expert_mlp and others (fused_experts.py)
    nn.Linear, and x @ weight + bias as transformers' Conv1D, on a CPU whose torch multiplies slower                gemm (product.py)
    nn.CrossEntropyLoss; a model's `loss_function` equal to the shifted mean over labels                  cross_entropy
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import cross_entropy, dispatch, gated, gelu, layer_norm, rms_norm, swiglu
from ..kernels.autocast import undisturbed
from ..kernels.comm.gemm import gemm
from ..kernels.comm.gemm_ar import reduced_product
from ..parallel.tensor_parallel import ColumnParallelLinear

WIDEST = 16384                                                        # of a norm's row in the Triton kernels


@dataclass
class Change:
    """What was done to a module, to undo it: its class and the attributes that changed."""
    original: type
    kernel: str = ""
    eps: Any = None                                                   # a float; None: the dtype's own, as in nn.RMSNorm
    offset: float = 0.0                                               # y = xhat * (offset + w)
    activation: str = ""                                              # silu, gelu, gelu_tanh
    clamp: tuple[float, float] = (0.0, 0.0)                           # alpha and the limit of clamped_swiglu
    style: str = ""                                                   # sharding: column, row, ...
    attributes: dict[str, Any] = field(default_factory=dict)


# ---- which implementation runs -----------------------------------------------------------------------------------

_original = False


@contextmanager
def use(kernels: str = "auto") -> Iterator[None]:
    """Within the block run "reference" (plain torch beside each kernel, for every op of this package), "original" (the replaced
    modules' own forward; sharding stays), or "auto". Process-wide, not for two threads at once. Raises: ValueError."""
    global _original
    if kernels not in ("auto", "reference", "original"):
        raise ValueError(f"use: kernels must be 'auto', 'reference' or 'original', got {kernels!r}; say one of the three")
    before = _original, dispatch._REFERENCE_ONLY
    _original, dispatch._REFERENCE_ONLY = kernels == "original", kernels == "reference"
    try:
        yield
    finally:
        _original, dispatch._REFERENCE_ONLY = before


def stock() -> bool:
    """Whether a module's own forward runs: as `use` says, and under torch.func and forward-mode AD."""
    return _original or dispatch.transformed()


def implementation(kernel: str, param: Tensor) -> str:
    """What runs `kernel` over tensors like `param` here: "rms_norm (C++)"."""
    if not dispatch.fused(param):
        return f"{kernel} (reference)"
    return f"{kernel} ({'Triton' if param.is_cuda else 'Triton, interpreted' if dispatch.INTERPRET else 'C++'})"


# ---- classes -----------------------------------------------------------------------------------------------------


class Fused:
    """Stands before a module's own class. Subclasses say in `forward` when the kernel serves, else call super().forward."""

    _interlace: Change
    forward: Callable[..., Any]                                       # of the original class, and what its instances have
    weight: Any
    gate_proj: Any
    up_proj: Any
    gate_up_proj: Any
    down_proj: Any
    ignore_index: int
    reduction: str

    def __reduce_ex__(self, protocol):
        how: Any = super().__reduce_ex__(max(2, protocol))          # the class itself has no importable name
        return _empty, (_kind(type(self)), self._interlace.original), *how[2:]


    @classmethod
    def members(cls, original: type) -> dict[str, Any]:
        """What the subclass of `original` has besides this class's methods."""
        return {}


@functools.cache
def fused_class(kind: type, original: type) -> type:
    words = {"__module__": original.__module__, "__doc__": kind.__doc__, **kind.members(original)}  # type: ignore[attr-defined]
    return type(f"Fused{original.__name__}", (kind, original), words)


def _kind(cls: type) -> type:
    return cls.__bases__[0]


def _empty(kind: type, original: type) -> object:
    return object.__new__(fused_class(kind, original))


def _alike(*tensors: Tensor | None) -> bool:
    """One dtype and device: what a kernel needs, and what autocast or a moved module may break."""
    there = [t for t in tensors if t is not None]
    return not stock() and all(t.dtype == there[0].dtype and t.device == there[0].device for t in there)


def _of_its_own(norm: Any, x: Tensor) -> AbstractContextManager[None]:
    """Autocast changes what torch's own norms return (kernels/autocast.py); a model's own casts back to its input's dtype."""
    return nullcontext() if norm._interlace.original.__module__.startswith("torch.") else undisturbed(x)


class RMSNorm(Fused):
    """rms_norm, with Gemma's 1 + w too: the sum is made in fp32, where it has room."""

    def forward(self, x):
        if not _alike(x, self.weight):
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self._interlace.eps is None else self._interlace.eps
        with _of_its_own(self, x):
            return rms_norm(x, self.weight, eps, self._interlace.offset)


class LayerNorm(Fused):
    """layer_norm."""

    def forward(self, x):
        bias = getattr(self, "bias", None)
        if not _alike(x, self.weight, bias):
            return super().forward(x)
        with _of_its_own(self, x):
            return layer_norm(x, self.weight, bias, self._interlace.eps)


class GatedMLP(Fused):
    """down(act(gate) * up) in one pass: act(gate) is neither rounded nor kept. With silu both products come into one buffer for swiglu."""

    def forward(self, x):
        if stock():
            return super().forward(x)
        act = self._interlace.activation
        if hasattr(self, "gate_up_proj"):
            both = self.gate_up_proj(x)
        else:
            both = _gate_up(self.gate_proj, self.up_proj, x) if act == "silu" else None
        if both is not None and act == "silu":
            return self.down_proj(swiglu(both))
        if both is not None:
            gate, up = both.chunk(2, -1)
        else:                                                         # adapters, hooks, quantised layers: they are called
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(gate, up, act))


class GELU(Fused):
    """gelu's tanh form in one pass and one exponential."""

    def forward(self, x):
        if not _alike(x) or not x.is_floating_point():
            return super().forward(x)
        return gelu(x, "tanh")


class CrossEntropyLoss(Fused):
    """cross_entropy of [N, V] logits and class indices."""

    def forward(self, input, target):
        if input.dim() != 2 or not _served(input, target, self.ignore_index):
            return super().forward(input, target)
        loss = cross_entropy(input, target, ignore_index=self.ignore_index)
        out = loss if self.reduction == "none" else loss.sum()
        out = out / (target != self.ignore_index).sum() if self.reduction == "mean" else out
        return out.to(input.dtype)


class CausalLoss:
    """Stands in a Hugging Face model's `loss_function`: the loss in one pass over the logits, which are not copied to fp32."""

    def __init__(self, original: Callable):
        self.original = original

    def __call__(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
        targets = shift_labels
        if targets is None:
            targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = targets.reshape(-1).to(logits.device)
        flat = logits.reshape(-1, vocab_size)
        if kwargs.get("weight") is not None or kwargs.get("label_smoothing") or not _served(flat, targets, ignore_index):
            return self.original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        loss = cross_entropy(flat, targets, ignore_index=ignore_index).sum()
        count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / (count.to(loss.device) if torch.is_tensor(count) else count)


def _served(logits: Tensor, targets: Tensor, ignore: int) -> bool:
    """Whether the kernel serves; an id outside the vocabulary is left to torch, which raises for it."""
    if stock() or targets.dtype != torch.int64 or targets.dim() != 1 or logits.device != targets.device:
        return False
    if logits.is_cuda or torch.compiler.is_compiling():
        return True
    return not bool(((targets != ignore) & ((targets < 0) | (targets >= logits.shape[-1]))).any())


# ---- gate and up in one buffer -----------------------------------------------------------------------------------


class _GateUp(torch.autograd.Function):
    """[x Wg^T | x Wu^T], each product straight into its half; with a group, dx is summed over it once for both."""

    @staticmethod
    def forward(ctx, x, wg, wu, bg, bu, group):
        rows, width = x.reshape(-1, x.shape[-1]), wg.shape[0]
        y = x.new_empty(rows.shape[0], 2 * width)
        for half, w, b in ((y[:, :width], wg, bg), (y[:, width:], wu, bu)):
            gemm(rows, w.t(), out=half)
            if b is not None:
                half += b
        ctx.save_for_backward(rows, wg, wu)
        ctx.group, ctx.shape, ctx.biased = group, x.shape, bg is not None
        return y.view(*x.shape[:-1], 2 * width)

    @staticmethod
    @dispatch.once("gate and up")
    def backward(ctx, dy):
        rows, wg, wu = ctx.saved_tensors
        dg, du = dy.reshape(-1, dy.shape[-1]).chunk(2, -1)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.group is None:
                dx = gemm(dg, wg).add_(gemm(du, wu)).view(ctx.shape)
            else:
                dx = reduced_product(dy.reshape(-1, dy.shape[-1]), torch.cat((wg, wu)), ctx.group).view(ctx.shape)
        dw = [gemm(d.t(), rows) if need else None for d, need in zip((dg, du), ctx.needs_input_grad[1:3])]
        db = [d.sum(0) if ctx.biased and need else None for d, need in zip((dg, du), ctx.needs_input_grad[3:5])]
        return dx, *dw, *db, None


def _gate_up(gate: Any, up: Any, x: Tensor) -> Tensor | None:
    plain = all(_linear(m) and not _hooked(m) for m in (gate, up)) and type(gate) is type(up)
    if plain and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type) and _alike(x, gate.weight, up.weight):
        return _GateUp.apply(x, gate.weight, up.weight, gate.bias, up.bias, gate.tp.group if type(gate) is ColumnParallelLinear else None)
    return None


def _linear(m: nn.Module) -> bool:
    return type(m) in (nn.Linear, ColumnParallelLinear) or (isinstance(m, Fused) and m._interlace.original is nn.Linear)


def _hooked(m: nn.Module) -> bool:
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m))


# ---- recognising -------------------------------------------------------------------------------------------------


def recognise(module: nn.Module) -> tuple[type, Change] | str | None:
    """(class to put in front, the change), or why a likely candidate is left as it is, or None for what is no candidate."""
    for look in (_loss, _norm, _mlp, _gelu):
        found = look(module)
        if found is not None:
            if "forward" in vars(module):
                return "its forward was overridden on the instance"
            return found
    return None


def _loss(module: nn.Module) -> tuple[type, Change] | str | None:
    if type(module) is not nn.CrossEntropyLoss:
        return None
    if module.weight is not None or module.label_smoothing:
        return "class weights and label smoothing have no kernel"
    return CrossEntropyLoss, Change(type(module), "cross_entropy")


def _norm(module: Any) -> tuple[type, Change] | str | None:
    params = dict(module.named_parameters(recurse=False))
    if list(module.children()) or not {"weight"} <= set(params) <= {"weight", "bias"} or any(p.dim() != 1 for p in params.values()):
        return None
    width = len(module.weight)
    if any(len(p) != width for p in params.values()) or list(module.buffers()):
        return None
    eps: list[float | None] = [v for k, v in vars(module).items() if isinstance(v, float) and 0 <= v < 0.1]
    eps += [None] if getattr(module, "eps", 0) is None else []
    probe = as_probe(module)
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(1))
    xs = [x, x * 1e-3, x * 1e-6 + 1e-6]                               # the small ones tell one eps from another
    try:
        with torch.no_grad():
            ys = [type(module).forward(probe, x) for x in xs]
    except Exception:
        return None
    if not all(torch.is_tensor(y) and y.shape == x.shape for x, y in zip(xs, ys)):
        return None
    for e in eps:
        number = torch.finfo(torch.float32).eps if e is None else e
        for kind, offset in ((RMSNorm, 0.0), (RMSNorm, 1.0), (LayerNorm, 0.0)):
            if (kind is RMSNorm and "bias" in params) or (kind is LayerNorm and e is None):
                continue
            want = [_norm_of(kind, x, probe, number, offset) for x in xs]
            if all(_close(y, w) for y, w in zip(ys, want)):
                if width > WIDEST and module.weight.is_cuda:
                    return f"rows of {width} are wider than the kernel's {WIDEST}"
                return kind, Change(type(module), "rms_norm" if kind is RMSNorm else "layer_norm", e, offset)
    return None if not eps else "it is no RMSNorm and no LayerNorm over the last dimension on a probe"


def _norm_of(kind: type, x: Tensor, probe: Any, eps: float, offset: float) -> Tensor:
    if kind is RMSNorm:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + probe.weight)
    bias = getattr(probe, "bias", None)
    y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + eps) * probe.weight
    return y if bias is None else y + bias


def _close(y: Tensor, want: Tensor) -> bool:
    return bool((y.float() - want).abs().max() <= 1e-4 * want.abs().max())


def as_probe(module: nn.Module) -> Any:
    """A copy on the CPU in fp32, with random parameters."""
    probe = copy.copy(module)
    g = torch.Generator().manual_seed(2)
    probe.__dict__["_parameters"] = {n: None if p is None else nn.Parameter(torch.randn(p.shape, generator=g))
                                     for n, p in module._parameters.items()}
    return probe


GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def gated_probe(module: nn.Module) -> tuple[Any, Tensor, Tensor, Tensor] | str | None:
    """For a gated MLP: (a small copy of it, x, gate(x), up(x)); a reason, or None for what is no such module."""
    children = dict(module.named_children())
    named = next((names for names in GATED if names <= set(children)), None)
    if named is None:
        return None
    if next(module.parameters(recurse=False), None) is not None:
        return "it has parameters of its own beside its projections"
    probe: Any = copy.copy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        small = {n: nn.Linear(24 if n == "down_proj" else 16, {"down_proj": 16, "gate_up_proj": 48}.get(n, 24)) for n in named}
        x = torch.randn(2, 3, 16)
    probe.__dict__["_modules"] = {**module._modules, **small}
    with torch.no_grad():
        gate, up = probe.gate_up_proj(x).chunk(2, -1) if "gate_up_proj" in named else (probe.gate_proj(x), probe.up_proj(x))
    return probe, x, gate, up


def _mlp(module: nn.Module) -> tuple[type, Change] | str | None:
    if isinstance(getattr(module, "down_proj", None), nn.Parameter):
        return None
    found = gated_probe(module)
    if found is None or isinstance(found, str):
        return found
    probe, x, gate, up = found
    try:
        with torch.no_grad():
            got = type(module).forward(probe, x)
    except Exception as e:
        return f"its forward does not run on a probe: {type(e).__name__}"
    for act, function in ACTIVATIONS.items():
        with torch.no_grad():
            want = probe.down_proj(function(gate) * up)
        if torch.is_tensor(got) and got.shape == want.shape and _same(got, want):
            return GatedMLP, Change(type(module), "swiglu" if act == "silu" else "gated", activation=act)
    return "its forward is not down(act(gate(x)) * up(x)) on a probe, act being silu or gelu"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def _same(y: Tensor, want: Tensor) -> bool:
    """Closer than the two gelus are, which differ by 5e-4 of 3 at most."""
    return bool((y.float() - want).abs().max() <= 3e-6 * want.abs().max())


def _gelu(module: Any) -> tuple[type, Change] | str | None:
    if list(module.children()) or list(module.parameters()) or list(module.buffers()):
        return None
    x = torch.cat((torch.linspace(-4, 4, 129), torch.tensor([-20.0, -12.0, 12.0, 20.0])))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            y = type(module).forward(module, x.clone())
        except Exception:
            return None
    if torch.is_tensor(y) and y.shape == x.shape and bool((y - ACTIVATIONS["gelu_tanh"](x)).abs().max() <= 1e-5):
        return GELU, Change(type(module), "gelu")
    return None


def recognise_loss(model: Any) -> CausalLoss | str | None:
    """A stand-in for the model's `loss_function`, or why not; None where there is none or it stands already."""
    original = getattr(model, "loss_function", None)
    if not callable(original) or isinstance(original, (CausalLoss, nn.Module)):
        return None
    g = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(2, 4, 7, generator=g), torch.randint(7, (2, 4), generator=g)
    want = F.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    try:
        got = original(logits=logits, labels=labels, vocab_size=7)
    except Exception as e:
        return f"it does not run on a probe: {type(e).__name__}"
    if not torch.is_tensor(got) or got.dim() or not torch.isclose(got, want, rtol=1e-5):
        return "it is not the mean cross entropy of the next token on a probe"
    return CausalLoss(original)
