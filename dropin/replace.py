"""Drop-in: these kernels and parallel layers in a torch or Hugging Face model, instance by instance, with a way back.

    report = interlace.replace_(model)               print(report): name, class, new class, kernel, sharding, why not
    interlace.verify(model, sample)                  forward and every gradient against the original modules
    with interlace.use(kernels="reference"): ...     A/B
    interlace.restore_(model)                        the original classes, bit-equal weights

Every change is planned and checked before the first is made: after an error the model is as it was. Nothing global is patched.
How modules are recognised and what runs in them: fused.py; tensor, sequence and expert parallelism: layers.py.
"""
from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from ..parallel.errors import nearest, raise_problems
from ..parallel.mesh import Axis, Mesh
from .attention import recognise_attention
from .fused import CausalLoss, Change, Fused, fused_class, implementation, recognise, recognise_loss, use
from .fused_experts import recognise_experts
from .layers import Plan as _Plan
from .layers import gather, make_plan, split_all, whole_all
from .loss import split_logits, whole_outputs
from .pipeline import cut_stages, stage_gradients, whole_stages
from .product import recognise_product
from .report import Report, Row, Verification
from .save import guard, unguard
from .split import check_mesh

__all__ = ["replace_", "restore_", "use", "verify"]

KERNELS = ("attention", "clamped_swiglu", "cross_entropy", "expert_mlp", "gated", "gelu", "gemm", "layer_norm", "rms_norm", "rope",
           "swiglu")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def replace_(model: nn.Module, mesh: Mesh | None = None, plan: str | Mapping[str, str] | None = "auto",
             kernels: str | Collection[str] = "auto", only: Iterable[str] | str | None = None, skip: Iterable[str] | str = (),
             strict: bool = False, dry_run: bool = False, sequence_parallel: bool = False,
             gather_logits: bool = True, virtual_pipeline_model_parallel_size: int = 1) -> Report:
    """Put fused kernels and parallel layers into `model`, in place. A second call changes nothing.

    Args:
        mesh: None for one device, or this rank's Mesh: layers are split over its tp axis, experts over its ep axis (over tp where ep
            has one rank); every rank calls with the same whole model.
        plan: "auto" (by structure), None (split nothing), or {pattern: "column" | "row" | "gather" | "vocab"} (fnmatch on names).
        kernels: "auto", "none", or names out of attention, clamped_swiglu, cross_entropy, expert_mlp, gated, gelu, gemm, layer_norm,
            rms_norm, rope, swiglu.
        only, skip: patterns (fnmatch) of module names to look at, or to leave alone, with all below them.
        strict: raise where a pattern matches nothing, or a candidate has to be left as it is. dry_run: report only.
        sequence_parallel: between the decoder's layers each rank of tp holds its part of the tokens (plan="auto").
        gather_logits: False: in training with labels the logits stay this rank's columns of the vocabulary, and so does `out.logits`.
        virtual_pipeline_model_parallel_size: stages a rank of pp, for pipeline_step's interleaved schedule.
    Returns: Report. Raises: ValueError for a model partly on meta, wrapped (DDP, FSDP, torch.compile), of mixed dtypes, with one module in
    two places, for patterns that match nothing, for what tp does not divide; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"replace_: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    only, skip = ([only] if isinstance(only, str) else only), ([skip] if isinstance(skip, str) else list(skip))
    names = _kernels(kernels)
    chosen, notes = _chosen(model, None if only is None else list(only), skip, strict)
    _check_model(model, chosen)
    mesh = check_mesh(Mesh() if mesh is None else mesh)
    names = _without_products(chosen, names, mesh)
    layers = make_plan(model, chosen, mesh, plan, strict, sequence_parallel, virtual_pipeline_model_parallel_size)
    loss, loss_row = _look_at_loss(model, names, only, skip)
    if not gather_logits:
        loss = split_logits(layers, model, loss, mesh.tp)
    report = Report(notes=notes + layers.notes + _meta_notes(model), dry_run=dry_run)
    todo: list[tuple[Any, type, Change]] = []
    torchs: Counter[str] = Counter()
    for name, module in chosen:
        row, found = _look(name, module, names, torchs)
        row = _sharding(name, module, row, layers)
        if row is not None:
            report.rows.append(row)
        if found is not None and not (name in layers.splits and layers.splits[name][1].make is not None):
            todo.append((module, *found))
    report.rows += [loss_row] if loss_row else []
    report.notes += [f"{n} linear layers keep torch's product: {why}" for why, n in torchs.items()]
    if strict and (left := [r for r in report if r.why and "already" not in r.why]):
        raise_problems("replace_(strict=True)", [f"{r.name}: {r.why}; leave it out with skip=[{r.name!r}]" for r in left])
    if not dry_run:
        _put(model, todo, layers, mesh)
        if loss is not None:
            model.loss_function = loss  # type: ignore[assignment]
    return report


def _put(model: nn.Module, todo: list[tuple[Any, type, Change]], layers: _Plan, mesh: Mesh) -> None:
    """All changes, or none: the parts of weights are made before the first module is split."""
    for module, kind, change in todo:
        module._interlace = change
        module.__class__ = fused_class(kind, change.original)
    try:
        if layers.splits:
            split_all(model, list(layers.splits.values()), layers.partial, mesh.tp)
            guard(model)
        if layers.stages is not None:
            cut_stages(model, layers.stages)
    except BaseException:
        for module, _, change in todo:
            module.__class__ = change.original
            del module._interlace
        raise


def restore_(model: nn.Module) -> None:
    """Undo replace_: the original classes and loss function, the same Parameter objects with the same bits. Parameters that were split
    are gathered, with their gradients: every rank of tp calls it. Raises: ValueError for weights on meta, or parametrized since."""
    raise_problems("restore_", [f"{n} must have the class that replace_ gave it, got {type(m).__name__}; remove its parametrizations first"
                                for n, m in model.named_modules() if is_parametrized(m) and isinstance(m, Fused)])
    if hasattr(model, "_interlace_tp"):
        empty = [n for n, p in model.named_parameters() if p.is_meta][:1]
        raise_problems("restore_", [f"a split model must hold its weights, got {n} on meta; load them first" for n in empty])
    if hasattr(model, "_interlace_stages_of"):
        whole_stages(model)
    if hasattr(model, "_interlace_tp"):
        whole_all(model)
        unguard(model)
    for module in model.modules():
        change = vars(module).get("_interlace")
        if isinstance(module, Fused) and change is not None:
            for name, held in vars(module).items():                   # accelerate's hooks keep the bound forward that they found
                if getattr(held, "__func__", None) is type(module).forward:
                    vars(module)[name] = MethodType(change.original.forward, module)
            module.__class__ = change.original
            del module._interlace
    if isinstance(loss := getattr(model, "loss_function", None), CausalLoss):
        if vars(model).get("_loss_function") is loss:                 # Hugging Face's setter keeps it there
            del model._loss_function
        if getattr(model, "loss_function", None) is not loss.original:
            model.loss_function = loss.original  # type: ignore[assignment]


# ---- what to look at ---------------------------------------------------------------------------------------------


def _kernels(kernels: str | Collection[str]) -> tuple[str, ...]:
    if kernels in ("auto", "none"):
        return KERNELS if kernels == "auto" else ()
    given = (kernels,) if isinstance(kernels, str) else tuple(kernels)
    raise_problems("replace_", [f"kernels must be 'auto', 'none' or names out of {', '.join(KERNELS)}, got {k!r}"
                                + (f"; did you mean {near!r}?" if (near := nearest(str(k), KERNELS)) else "") for k in given
                                if k not in KERNELS])
    return given


def _chosen(model: nn.Module, only: list[str] | None, skip: list[str], strict: bool) -> tuple[list[tuple[str, nn.Module]], list[str]]:
    """The modules to look at, and notes on patterns that match nothing."""
    named = list(model.named_modules())
    problems, hits = [], {}
    for pattern in (*(only or ()), *skip):
        hits[pattern] = {n for n, _ in named if fnmatch.fnmatchcase(n, pattern)}
        if not hits[pattern]:
            near = nearest(pattern, (n for n, _ in named))
            problems.append(f"the pattern {pattern!r} must match a module, got none" + (f"; the nearest name is {near!r}" if near else ""))
    if problems and (strict or (only and not any(hits[p] for p in only))):
        raise_problems("replace_", problems)
    inside = lambda n, patterns: any(n == h or n.startswith(h + ".") for p in patterns for h in hits[p])  # noqa: E731
    return [(n, m) for n, m in named if (only is None or inside(n, only)) and not inside(n, skip)], problems


def _check_model(model: nn.Module, chosen: list[tuple[str, nn.Module]]) -> None:
    """Raise for a model that cannot be replaced as it stands, every reason at once."""
    problems = []
    for name, m in model.named_modules():
        kind = type(m).__name__
        if isinstance(m, DistributedDataParallel) or kind in ("FullyShardedDataParallel", "OptimizedModule") or kind.startswith("FSDP"):
            problems.append(f"{name or 'the model'} must not be wrapped yet, got {kind}; call replace_ first, wrap or compile after it")
    params = list(model.named_parameters())
    if (meta := [n for n, p in params if p.is_meta]) and len(meta) < len(params):
        problems.append(f"the model must hold all its weights or none, got {meta[0]} and {len(meta) - 1} more on meta; load them first")
    if cut := [n for n, p in params if type(p.data).__name__ == "DTensor"]:
        problems.append(f"parameters must be plain tensors, got a DTensor in {cut[0]}; call replace_ before fully_shard")
    here = {f"{n}.{k}".lstrip("."): type(p.data).__name__ for n, m in chosen for k, p in m.named_parameters(recurse=False)
            if type(p.data) is not Tensor}
    if odd := {n: kind for n, kind in here.items() if kind != "DTensor"}:
        name = next(iter(odd))
        problems.append(f"parameters must be plain tensors, got {odd[name]} in {name} and {len(odd) - 1} more; a quantised weight has no "
                        f"kernel here: skip its module, or replace_ before quantising")
    dtypes = {p.dtype: n for n, p in reversed(params) if p.is_floating_point()}
    if len(dtypes) > 1:
        some = ", ".join(f"{d} ({n})" for d, n in reversed(dtypes.items()))
        problems.append(f"the model must have one dtype, got {some}; call model.to(dtype), or use autocast over fp32 weights")
    looked = {id(m) for _, m in chosen}
    places: dict[int, list[str]] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        if id(m) in looked and next(m.parameters(), None) is not None:
            places.setdefault(id(m), []).append(name)
    shared = [p for p in places.values() if len(p) > 1]
    outer = [p for p in shared if not any(p[0].startswith(q[0] + ".") for q in shared)]
    problems += [f"a module must stand in one place, got one instance at {' and '.join(p)}; skip=[{p[0]!r}] leaves it" for p in outer]
    raise_problems("replace_", problems)


def _meta_notes(model: nn.Module) -> list[str]:
    empty = any(p.is_meta for p in model.parameters())
    return ["the weights are on meta: load_pretrained_(model, folder) fills them"] if empty else []


def _without_products(chosen: list[tuple[str, nn.Module]], names: tuple[str, ...], mesh: Mesh) -> tuple[str, ...]:
    """The kernels without gemm where layers are cut: the parallel layers have it. Raises: ValueError for layers that have it already."""
    cut = {n: a.size for n, a in (("tp", mesh.tp), ("ep", mesh.ep), ("pp", mesh.pp)) if a.size > 1}
    stands = [n for n, m in chosen if cut and isinstance(m, Fused) and m._interlace.kernel == "gemm"]
    raise_problems("replace_", [f"a mesh of {cut} needs linear layers as they were, got gemm in {n} and {len(stands) - 1} more; "
                                "call restore_ first" for n in stands[:1]])
    return tuple(n for n in names if n != "gemm") if cut else names


def _look(name: str, module: nn.Module, names: tuple[str, ...],
          torchs: Counter[str]) -> tuple[Row | None, tuple[type, Change] | None]:
    """The report's row of one module, and what to do with it; why a linear layer is left to torch is counted in `torchs`."""
    old = type(module).__name__
    if isinstance(module, Fused):
        return Row(name, old, why="already replaced"), None
    found = recognise(module) or recognise_experts(module) or recognise_attention(module) if names else None
    if isinstance(found, str):
        return Row(name, old, why=found), None
    if found is None and "gemm" in names:
        found = recognise_product(module)
        if isinstance(found, str):
            torchs[found] += 1
            return None, None
    if found is None:
        if hasattr(module, "head_dim") and next(module.parameters(), None) is not None:
            return Row(name, old, why="rope and attention are functions its forward calls: nothing to replace in the instance"), None
        return None, None
    kind, change = found
    if not (wanted := [k for k in change.kernel.split(", ") if k in names]):
        return None, None
    change.kernel = ", ".join(wanted)
    at = next(module.parameters(), torch.empty(0))
    return Row(name, old, fused_class(kind, change.original).__name__, implementation(change.kernel, at)), found


def _sharding(name: str, module: nn.Module, row: Row | None, layers: _Plan) -> Row | None:
    """The row with what is split in this module, or why it is whole on every rank."""
    if "_interlace_split" in vars(module) or "_interlace_stages" in vars(module):
        return Row(name, type(module).__name__, why="already replaced")
    if name in layers.left:
        old = row or Row(name, type(module).__name__)
        return replace(old, why=f"{old.why}; {layers.left[name]}" if old.why else layers.left[name])
    if layers.stages is not None and any(module is layer for layer in layers.stages.layers):
        stage = layers.stages.stage[list(layers.stages.layers).index(module)]
        return replace(row or Row(name, type(module).__name__), new=type(module).__name__, sharding=f"stage {stage}")
    if name not in layers.splits or layers.splits[name][1].watch is not None:
        return row
    how = layers.splits[name][1]
    kernel = {"column": "copy_gemm", "gather": "copy_gemm", "row": "gemm_ar", "experts": "dispatch, combine"}.get(how.style, "")
    if "TokenRow" in getattr(how.layer, "__name__", ""):
        kernel = "gemm_rs"
    if how.make is not None:
        return Row(name, type(module).__name__, how.layer.__name__, kernel, how.style)
    old = row or Row(name, type(module).__name__)
    kernels = ", ".join(k for k in (old.kernel, kernel) if k)
    return replace(old, new=old.new or old.old, kernel=kernels, sharding=how.style)


def _look_at_loss(model: nn.Module, names: tuple[str, ...], only: Any, skip: list[str]) -> tuple[CausalLoss | None, Row | None]:
    if only is not None or "cross_entropy" not in names or "loss_function" in skip:
        return None, None
    found, old = recognise_loss(model), getattr(getattr(model, "loss_function", None), "__name__", "function")
    if isinstance(found, str):
        return None, Row("loss_function", old, why=found)
    if found is not None:
        at = next(model.parameters(), torch.empty(0))
        return found, Row("loss_function", old, "CausalLoss", implementation("cross_entropy", at))
    return None, None


# ---- verify ------------------------------------------------------------------------------------------------------


def verify(model: nn.Module, sample: Any, tolerance: float | None = None) -> Verification:
    """Compare a replaced model with its original modules: every output and the gradient of every parameter.

    Args: sample: a tensor, a tuple (positional) or a mapping (keyword arguments); the gradient is that of the output `loss` where there
    is one, else of a fixed random projection of all outputs; tolerance: largest difference over the largest value of a tensor
    (default 1e-6 in float64, since many models cast to fp32 inside, 1e-4 in fp32, 5e-2 in bf16, 2e-2 in fp16).
    Returns: Verification (`.ok`, `.errors`, prints as a table). The model, its gradients, buffers and the random state stay.
    Raises: ValueError where nothing was replaced. Under a mesh every rank calls it with the same sample, and holds the whole model
    meanwhile.
    """
    held: Any = model
    split = hasattr(model, "_interlace_tp")
    if not (split or isinstance(getattr(model, "loss_function", None), CausalLoss) or any(isinstance(m, Fused) for m in model.modules())):
        raise ValueError("verify: the model must hold replaced modules, got none; call replace_ first")
    ours = _run(model, sample)
    tp: Any
    tp, partial = (held._interlace_tp, [p for p in model.parameters() if hasattr(p, "completed")]) if split else (None, [])
    stages = whole_stages(model) if hasattr(model, "_interlace_stages_of") else None
    splits = whole_all(model) if split else []
    try:
        with use("original"):
            stock = _run(model, sample)
    finally:
        if split:
            split_all(model, splits, partial, tp)
        if stages is not None:
            cut_stages(model, stages)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    largest = max((float(g.abs().max()) for n, g in stock.items() if not n.startswith("output") and g.numel()), default=0.0)
    errors = {}
    for name in {**stock, **ours}:
        if name not in ours or name not in stock or ours[name].shape != stock[name].shape:
            errors[name] = float("inf")                               # an output or a gradient that only one of the two has
            continue
        want = stock[name]
        floor = 1e-4 * largest if not name.startswith("output") else 0.0   # a gradient that is zero but for rounding: key biases
        scale = max(float(want.abs().max()), floor) if want.numel() else 0.0
        worst = float((ours[name].double() - want.double()).abs().max()) if want.numel() else 0.0
        errors[name] = worst / scale if scale else worst
        if errors[name] != errors[name]:
            errors[name] = float("inf")
    return Verification(errors, TOLERANCE.get(dtype, 1e-4) if tolerance is None else tolerance)


def _run(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """{"output i": ..., parameter name: gradient} of one forward and backward."""
    params = dict(model.named_parameters())
    grads, buffers = {n: p.grad for n, p in params.items()}, {n: b.clone() for n, b in model.named_buffers()}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.zero_grad(set_to_none=True)
            out = model(**sample) if isinstance(sample, Mapping) else model(*sample) if isinstance(sample, tuple) else model(sample)
        tensors = whole_outputs(model, list(_tensors(out)))
        loss = out.get("loss") if isinstance(out, Mapping) else None
        if loss is None:
            g = torch.Generator().manual_seed(1)
            loss = sum((t * torch.randn(t.shape, generator=g).to(t)).sum() for t in tensors if t.requires_grad)
        if torch.is_tensor(loss) and loss.requires_grad:
            loss.backward()
        tp, mine = getattr(model, "_interlace_tp", None), {p: p.grad for p in params.values() if p.grad is not None}
        mine |= stage_gradients(model) if hasattr(model, "_interlace_stages_of") else {}
        return {f"output {i}": t.detach() for i, t in enumerate(tensors)} | {
            n: mine[p] if tp is None or not p.dim() else _gathered(p, mine[p], tp) for n, p in params.items() if p in mine}
    finally:
        for n, p in params.items():
            p.grad = grads[n]
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])


def _gathered(p: Any, grad: Tensor, tp: Axis) -> Tensor:
    """The whole gradient of one sample: experts that dp shares got as many samples as ranks of dp share them."""
    full = gather(p, grad, tp)
    return full / (p.axis.size // tp.size) if getattr(p, "expert", False) else full


def _tensors(out: Any) -> Iterable[Tensor]:
    if torch.is_tensor(out):
        if out.is_floating_point():
            yield out
    elif isinstance(out, Mapping):
        for v in out.values():
            yield from _tensors(v)
    elif isinstance(out, (tuple, list)):
        for v in out:
            yield from _tensors(v)
