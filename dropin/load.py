"""Weights of a safetensors folder straight into a model, also one on meta and one that is split over tp: a rank reads its own slices.

    model = on_meta(LlamaForCausalLM, config)                        with torch.device("meta"): ...
    interlace.load_pretrained_(model, folder, mesh)                   replace_ over the mesh, then the weights

A tensor of the folder is a `Lazy`: stacking, concatenating, cutting and transposing it read nothing, copying it reads what is left. So
the functions that say which part of a whole tensor a rank holds (`copy_part`), and transformers' own conversion of the names and
layouts on disk (experts one by one there, stacked in the model), run on it as they are. Bytes read: those of this rank's parameters.
"""
from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..parallel.errors import UserError, nearest, raise_problems
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import complete_gradient, pieces_of
from ..parallel.tensor_parallel import copy_part
from .replace import replace_
from .report import Report
from .save import whole_shape

__all__ = ["Loaded", "load_pretrained_"]

Span = tuple[slice, ...]                                              # start and stop for every dimension


@dataclass
class Loaded:
    """What load_pretrained_ did. `read` and `held` count bytes: of this rank, and of the whole folder."""
    tensors: int
    read: int
    held: int
    report: Report | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors loaded, {self.read / 1e6:.1f} MB read of the {self.held / 1e6:.1f} MB in the folder"]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes), *([str(self.report)] if self.report else [])])


def load_pretrained_(model: nn.Module, folder: str | Path, mesh: Mesh | None = None, *, device: torch.device | str | None = None,
                     **options: Any) -> Loaded:
    """Fill `model` from `folder` (model.safetensors, or shards with model.safetensors.index.json), each tensor cast to the model's dtype.

    Args:
        model: whole, split by replace_, or on meta: then its parameters are made on `device` (default: the CPU).
        mesh: split the model with replace_(model, mesh, **options) first, where it is not split yet; every rank calls.
        options: of replace_, with a mesh only.
    Returns: Loaded. Raises: ValueError with every name that is missing, left over, or of another shape; the weights are then as they were.
    Names and layouts on disk are translated as transformers does for the model's class; a base model's names fit a model with a head.
    """
    if options and mesh is None:
        raise UserError(f"load_pretrained_: {', '.join(options)} must come with a mesh, got none; call replace_ itself")
    report = replace_(model, mesh, **options) if mesh is not None else None
    with _files(Path(folder)) as files:
        held = sum(t.nbytes for t in files.values())
        found = _named_as_in(model, files)
        wanted = _check(model, found, Path(folder))
        swapped = _off_meta(model, torch.device(device or "cpu"))
        notes = _buffers_off_meta(model, torch.device(device or "cpu"))   # first: it may run the model's initialisation
        before = Lazy.read_bytes
        with torch.no_grad():
            for name, tensor in wanted.items():
                _fill(swapped.get(id(tensor), tensor), found[name])
        read = Lazy.read_bytes - before
    return Loaded(len(wanted), read, held, report, notes)


# ---- tensors that are not read yet -------------------------------------------------------------------------------


class Lazy:
    """A tensor of a file, or what torch.stack, cat, chunk, split, narrow and transpose make of such; anything else reads it."""

    read_bytes = 0                                                    # of all, since the start

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[Span], Tensor]):
        self.shape, self.dtype, self._read = torch.Size(shape), dtype, read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def read(self, spans: Span | None = None) -> Tensor:
        return self._read(tuple(slice(0, n) for n in self.shape) if spans is None else spans)

    def narrow(self, dim: int, start: int, length: int) -> Lazy:
        dim = dim % self.ndim

        def read(spans: Span) -> Tensor:
            mine = slice(spans[dim].start + start, spans[dim].stop + start)
            return self._read((*spans[:dim], mine, *spans[dim + 1:]))
        return Lazy((*self.shape[:dim], length, *self.shape[dim + 1:]), self.dtype, read)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> list[Lazy]:
        n, at, parts = self.shape[dim], 0, []
        for size in [min(sizes, n - i) for i in range(0, n, sizes)] if isinstance(sizes, int) else sizes:
            parts.append(self.narrow(dim, at, size))
            at += size
        return parts

    def chunk(self, chunks: int, dim: int = 0) -> list[Lazy]:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def transpose(self, a: int, b: int) -> Lazy:
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        return Lazy([self.shape[i] for i in order], self.dtype,
                    lambda spans: self._read(tuple(spans[i] for i in order)).transpose(a, b))

    def t(self) -> Lazy:
        return self.transpose(0, 1)

    def contiguous(self) -> Lazy:
        return self

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.read()[index]

    def __getattr__(self, name: str) -> Any:                          # a method of Tensor that is not known here: read
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        known: dict[Any, Callable[..., Any]] = {
            torch.stack: _stack, torch.cat: _cat, torch.concat: _cat, torch.chunk: Lazy.chunk, torch.split: Lazy.split,
            torch.transpose: Lazy.transpose, torch.narrow: Lazy.narrow}
        if func in known and (func not in (torch.stack, torch.cat, torch.concat) or all(isinstance(t, Lazy) for t in args[0])):
            return known[func](*args, **kwargs)
        values = [a.read() if isinstance(a, Lazy) else [v.read() if isinstance(v, Lazy) else v for v in a]
                  if isinstance(a, (list, tuple)) else a for a in args]
        return func(*values, **{k: v.read() if isinstance(v, Lazy) else v for k, v in kwargs.items()})


def _stack(parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    first, dim = parts[0], dim % (parts[0].ndim + 1)
    if any(p.shape != first.shape for p in parts):
        raise ValueError(f"stack: tensors must have one shape, got {sorted({tuple(p.shape) for p in parts})}")

    def read(spans: Span) -> Tensor:
        rest = (*spans[:dim], *spans[dim + 1:])
        chosen = [p.read(rest) for p in parts[spans[dim]]]
        return torch.stack(chosen, dim) if chosen else torch.empty([s.stop - s.start for s in spans], dtype=first.dtype)
    return Lazy((*first.shape[:dim], len(parts), *first.shape[dim:]), first.dtype, read)


def _cat(parts: Sequence[Lazy], dim: int = 0) -> Lazy:
    first, dim = parts[0], dim % parts[0].ndim
    rest = lambda p: (*p.shape[:dim], *p.shape[dim + 1:])  # noqa: E731
    if any(rest(p) != rest(first) for p in parts):
        raise ValueError(f"cat: tensors must agree but for dim {dim}, got {sorted({tuple(p.shape) for p in parts})}")

    def read(spans: Span) -> Tensor:
        at, found = 0, []
        for p in parts:
            low, high = max(spans[dim].start - at, 0), min(spans[dim].stop - at, p.shape[dim])
            if low < high:
                found.append(p.read((*spans[:dim], slice(low, high), *spans[dim + 1:])))
            at += p.shape[dim]
        return torch.cat(found, dim) if found else torch.empty([s.stop - s.start for s in spans], dtype=first.dtype)
    return Lazy((*first.shape[:dim], sum(p.shape[dim] for p in parts), *first.shape[dim + 1:]), first.dtype, read)


# ---- files -------------------------------------------------------------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


@contextlib.contextmanager
def _files(folder: Path) -> Iterator[dict[str, Lazy]]:
    """Every tensor of a folder. Raises: UserError for what is no safetensors, not beside its index, or not what the index says."""
    index, path = folder / "model.safetensors.index.json", folder / "model.safetensors"
    found: dict[str, Lazy] = {}
    if not folder.is_dir():
        raise UserError(f"load_pretrained_: the folder must be there, got {folder}; download a model, or save one with save_pretrained")
    with contextlib.ExitStack() as stack:
        try:
            where = None if path.exists() or not index.exists() else json.loads(index.read_text())["weight_map"]
            names = ["model.safetensors"] if where is None else sorted(set(where.values()))
            if bad := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
                raise SafetensorError(f"an index that names {bad[0]!r}, which is not beside it")
            for path in (folder / n for n in names):
                f = stack.enter_context(safe_open(path, framework="pt"))
                for name in f.keys():  # noqa: SIM118
                    found[name] = _leaf(f.get_slice(name), path, name)
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as e:
            raise UserError(f"load_pretrained_: {path} must be of safetensors that can be read, got {e or 'no file'}; older formats (.bin) "
                            "are pickles: save them anew with save_pretrained") from None
        if where is not None and (lost := sorted(where.keys() - found.keys())):
            raise UserError(f"load_pretrained_: {index} must name what the files hold, got {_some(lost)} in none of them; fetch it anew")
        yield found


def _leaf(part: Any, path: Path, name: str) -> Lazy:
    dtype = DTYPES.get(part.get_dtype())
    if dtype is None:
        raise SafetensorError(f"{name} in {part.get_dtype()}, a quantised format")

    def read(spans: Span) -> Tensor:
        value = part[spans if spans else ...]
        Lazy.read_bytes += value.nbytes
        return value
    return Lazy(part.get_shape(), dtype, read)


# ---- names -------------------------------------------------------------------------------------------------------


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What state_dict has, by name: parameters and persistent buffers, a tied one under each of its names."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **{n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}}
        found |= {f"{prefix}.{n}" if prefix else n: t for n, t in own.items() if t is not None}
    return found


def _named_as_in(model: Any, files: dict[str, Lazy]) -> dict[str, Lazy]:
    """The tensors of the files under the model's names, converted where transformers' classes have another layout on disk."""
    keys = dict.fromkeys(_tensors(model), True)
    prefix = getattr(model, "base_model_prefix", "") or ""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
        rules: list[Any] = get_model_conversion_mapping(model) if prefix else []
    except ImportError:                                               # none installed, or before 5: names on disk are those of the model
        rules = []
    if not rules:
        return {_prefixed(name, prefix, keys): t for name, t in files.items()}
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    of_pattern = {p: c for c in converters for p in c.source_patterns}
    found: dict[str, Lazy] = {}
    waiting: dict[str, Any] = {}
    for name in sorted(files, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, keys)
        plain = _prefixed(name, prefix, keys)
        if pattern is None or new not in keys:
            found[plain if new not in keys else new] = files[name]
            continue
        converter = waiting.setdefault(new, deepcopy(of_pattern[pattern]))
        converter.add_tensor(new, name, pattern, files[name])
    for name, converter in waiting.items():
        made = converter.convert(name, model=model, config=model.config)
        found |= {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
    return found


def _prefixed(name: str, prefix: str, keys: dict[str, bool]) -> str:
    """A base model's name in a model with a head, and the other way round."""
    if name not in keys and prefix:
        if f"{prefix}.{name}" in keys:
            return f"{prefix}.{name}"
        if name.removeprefix(f"{prefix}.") in keys:
            return name.removeprefix(f"{prefix}.")
    return name


def _check(model: Any, found: dict[str, Lazy], folder: Path) -> dict[str, Tensor]:
    """{name: tensor of the model to fill from it}, each tensor once. Raises: UserError with everything that does not fit."""
    tensors, problems = _tensors(model), []
    names: dict[int, list[str]] = {}
    for name, t in tensors.items():
        names.setdefault(id(t), []).append(name)
    wanted, missing = {}, []
    for some in names.values():
        there = [n for n in some if n in found]
        if not there:
            missing.append(" = ".join(some))
            continue
        t = tensors[there[0]]
        wanted[there[0]] = t
        if tuple(found[there[0]].shape) != whole_shape(t):
            problems.append(f"{there[0]} must be {list(whole_shape(t))}, got {list(found[there[0]].shape)}")
        elif any(not torch.equal(found[n].read(), found[there[0]].read()) for n in there[1:]):
            problems.append(f"{' and '.join(there)} are one parameter of this model, got two tensors; untie them in its config")
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"rotary_emb\.inv_freq"]
    extra = [n for n in found if n not in tensors and not any(re.search(p, n) for p in ignored)]
    for name in missing:
        near = nearest(name, extra)
        problems.append(f"{name} must be there, got none" + (f"; the nearest name is {near}" if near else ""))
    problems += [f"{name} is no weight of this model" for name in sorted(extra)]
    raise_problems(f"load_pretrained_({str(folder)!r})", problems)
    return wanted


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# ---- into the model ----------------------------------------------------------------------------------------------


def _fill(local: Tensor, lazy: Any) -> None:
    if not local.numel():                                             # of another pipeline stage
        return
    if hasattr(local, "pieces"):
        copy_part(pieces_of(local), lazy, local)
    else:
        local.copy_(lazy.read())


def _off_meta(model: Any, device: torch.device) -> dict[int, Tensor]:
    """Give every parameter and persistent buffer on meta a place on `device`. {id of the old one: the new one}."""
    swapped: dict[int, Any] = {}
    tp: Axis | None = getattr(model, "_interlace_tp", None)
    for module in model.modules():
        how = vars(module).get("_interlace_split")
        for kind in (module._parameters, module._buffers):
            for name, old in list(kind.items()):
                if old is None or not old.is_meta or name in module._non_persistent_buffers_set:
                    continue
                if id(old) not in swapped:
                    new = swapped[id(old)] = _like(old, device)
                    new.old = old                                     # lives on, so that no id is given twice
                    if hasattr(old, "pieces") and tp is not None:
                        new.pieces = old.completed[1] if hasattr(old, "completed") else old.pieces
                        ours = how.complete if how is not None and name in how.pieces else None
                        (ours or partial(complete_gradient, tp=tp))(new)
                kind[name] = swapped[id(old)]
    if hasattr(model, "_interlace_stages_of"):
        stages = model._interlace_stages_of
        stages.away = {swapped.get(id(p), p): how for p, how in stages.away.items()}
        stages.places.clear()
    for new in swapped.values():
        del new.old
    return swapped


def _like(old: Any, device: torch.device) -> Any:
    """Zeros in place of a tensor on meta, with what replace_ wrote on it."""
    new: Any = torch.zeros(old.shape, dtype=old.dtype, device=device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    vars(new).update({name: value for name, value in vars(old).items() if name != "completed"})
    return new


def _buffers_off_meta(model: Any, device: torch.device) -> list[str]:
    """Buffers that no checkpoint holds, such as rope's frequencies, computed anew. Returns: notes. Raises: UserError where nothing does."""
    todo: list[tuple[str, Any, str, Tensor]] = []
    for prefix, module in model.named_modules():
        for name, old in module._buffers.items():
            if old is not None and old.is_meta:
                module._buffers[name] = torch.zeros_like(old, device=device)
                todo.append((f"{prefix}.{name}" if prefix else name, module, name, module._buffers[name]))
    unset = lambda: [row for row in todo if row[1]._buffers[row[2]] is row[3] and not row[3]._version]  # noqa: E731  (never written)
    for make in (_by_model, _by_config):
        for module in {id(m): m for _, m, *_ in unset()}.values():
            with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
                make(model, module)
    raise_problems("load_pretrained_", [f"the buffer {name} must be computed by the model's code, since no file holds it, got one on meta; "
                                        "build the model with its buffers on the CPU" for name, *_ in unset()])
    return [f"{len(todo)} buffers on meta that no file holds were computed anew"] if todo else []


def _by_model(model: Any, module: Any) -> None:
    """transformers 5 computes its buffers where it initialises weights: here those stand aside."""
    own = module._parameters
    try:
        module._parameters = {n: None if p is None else nn.Parameter(p.to("meta"), requires_grad=False) for n, p in own.items()}
        model._init_weights(module)
    finally:
        module._parameters = own


def _by_config(model: Any, module: Any) -> None:
    """Before 5 in the constructor, which takes the config: a second module is made, for its buffers."""
    for name, buffer in type(module)(module.config)._buffers.items():
        if module._buffers.get(name) is not None:
            module._buffers[name].copy_(buffer)
