"""Checkpoints that know nothing of the layout: whole tensors under global names, safetensors and JSON, no pickle.

    <out>/checkpoints/step-00000100/model.safetensors       weights, named as in the model
                                    optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, master.<name> (16-bit training)
                                    state.json              step, samples, model config, dtype, sha256 of both files
    <out>/checkpoints/latest        the newest complete one

Under pp > 1 every stage has a file of each kind: model-00001-of-00002.safetensors, ... Written by the first rank of each stage to a
temporary folder, fsynced, renamed by rank 0; `latest` moves last. Every rank reads only its own slices. Any layout loads any
other's. That first rank holds its stage on the host; the others, under ZeRO-1, one bucket at a time.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels.comm import all_gather, all_reduce
from ..parallel.errors import UserError
from ..parallel.mesh import Mesh
from ..parallel.sharding import Piece, named_pieces
from .config import Config
from .optimizer import Optimizer

# What a checkpoint's weights mean; the rest of the config may change between runs.
SHAPE_WORDS = ("num_layers", "hidden_size", "ffn_size", "num_attention_heads", "query_groups", "head_dim", "normalization", "activation",
               "position_embedding_type", "rotary_base", "share_embeddings_and_output_weights", "add_bias_linear",
               "layernorm_epsilon")
EXPERT_WORDS = ("num_moe_experts", "moe_router_topk", "moe_layer_freq", "moe_ffn_size", "moe_shared_expert_intermediate_size",
                "moe_shared_expert_gate", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_norm_topk_prob",
                "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias")


class Damaged(UserError):
    """A checkpoint that is not what was written: an older one may be."""


def model_words(config: Config, vocab_size: int) -> dict[str, Any]:
    """The words that must be equal for weights to fit, with defaults filled in."""
    words = {w: getattr(config.model, w) for w in SHAPE_WORDS} | {"vocab_size": vocab_size}
    if config.model.position_embedding_type == "learned_absolute":
        words["seq_length"] = config.model.seq_length
    if config.model.num_moe_experts is not None:
        words |= {w: list(v) if isinstance(v := getattr(config.model, w), tuple) else v for w in EXPERT_WORDS}
    return words


Items = Iterable[tuple[nn.Parameter, Tensor]]
Places = dict[nn.Parameter, list[tuple[str, Piece]]]


def _places(model: nn.Module) -> Places:
    """{parameter: its (global name, piece)s}"""
    found: Places = {}
    for name, piece, p in named_pieces(model):
        found.setdefault(p, []).append((name, piece))
    return found


def gather_full(model: nn.Module, mesh: Mesh, items: Items) -> dict[str, Tensor]:
    """Whole tensors of this stage under global names, from every rank's (parameter, tensor shaped like it). Collective; full on the
    stage's first rank. Of replicas the first sends: a dense parameter's ranks of tp, an expert's of ep."""
    full: dict[str, Tensor] = {}
    places = _places(model)
    index = {p: i for i, p in enumerate(places)}
    every: dict[str, list[Any]] = {}
    for axis, first in ((mesh.tp, mesh.dp.rank == 0), (mesh.ep, mesh.edp.rank == 0)):
        mine = [[(name, dataclasses.astuple(piece)) for name, piece in rows] for rows in places.values()]
        every[axis.name] = [mine]
        if axis.size > 1 and first:
            import torch.distributed as dist
            every[axis.name] = [None] * axis.size
            dist.all_gather_object(every[axis.name], mine, group=axis.group)
    for p, tensor in items:
        expert = getattr(p, "expert", False)
        axis = mesh.ep if expert else mesh.tp
        if (mesh.edp if expert else mesh.dp).rank or (getattr(p, "stages", 1) > 1 and mesh.pp.rank):
            continue                                                  # tied embeddings: the first stage saves them
        stacked = tensor.detach().contiguous().unsqueeze(0)
        if axis.size > 1:
            stacked = all_gather(stacked, axis.group)
        for r in range(axis.size) if axis.rank == 0 else ():
            for name, piece in every[axis.name][r][index[p]]:
                theirs = Piece(*piece)
                if name not in full:
                    full[name] = torch.empty(theirs.shape, dtype=tensor.dtype)
                theirs.of(full[name]).copy_(theirs.local(stacked[r]))
    return full


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What is saved and has no gradient: the routers' expert_bias, alike on all ranks of a stage."""
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if not isinstance(t, nn.Parameter)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save(out: Path, config: Config, optimizer: Optimizer, *, step: int, samples: int, vocab_size: int,
         extra: dict[str, Any] | None = None) -> None:
    """Save after `step`; collective. Raises: OSError on the ranks that write when a disk refuses (the last checkpoint stays)."""
    model, mesh = optimizer.ddp.module, optimizer.ddp.mesh
    files = {"model": gather_full(model, mesh, ((p, p) for p in optimizer.ddp.buffer_of)) | _buffers(model)}
    moments: dict[str, Tensor] = {}
    for kind in optimizer.kinds():
        moments |= {f"{kind}.{name}": t for name, t in gather_full(model, mesh, optimizer.state(kind)).items()}
    files["optimizer"] = moments
    if mesh.tp.rank or mesh.dp.rank:
        return
    part = "" if mesh.pp.size == 1 else f"-{mesh.pp.rank + 1:05d}-of-{mesh.pp.size:05d}"
    folder = out / "checkpoints"
    temporary, final = folder / f".writing-step-{step:08d}", folder / f"step-{step:08d}"
    try:
        with _together(mesh):
            if mesh.pp.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with _together(mesh):
            for name, whole in files.items():
                path = temporary / f"{name}{part}.safetensors"
                save_file({n: t.detach().cpu().contiguous() for n, t in whole.items()}, path)
                _sync(path)
                (temporary / f"{path.name}.sha256").write_text(_sha256(path))
        if mesh.pp.rank == 0:
            digests = {}
            for path in sorted(temporary.glob("*.sha256")):
                digests[path.stem] = path.read_text()
                path.unlink()
            state = {"step": step, "samples": samples, "precision": config.trainer.precision, "seed": config.trainer.seed,
                     "model": model_words(config, vocab_size), "sha256": digests, **(extra or {})}
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            _sync(temporary / "state.json")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(folder)
    finally:
        if mesh.pp.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    if mesh.pp.rank == 0:
        _point(folder, final.name)
        for old in sorted(folder.glob("step-*"))[:-config.trainer.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _together(mesh: Mesh) -> Iterator[None]:
    """What the first ranks of all stages do before any goes on; where one fails, all raise."""
    error: Exception | None = None
    try:
        yield
    except (OSError, SafetensorError) as e:
        error = e
    if mesh.pp.size > 1:
        failed = all_reduce(torch.tensor([float(error is not None)]), mesh.pp.group)
        if error is None and failed.item():
            error = OSError("the rank of another pipeline stage could not write its part")
    if error is not None:
        raise error


def _point(folder: Path, name: str) -> None:
    new = folder / ".latest"
    new.write_text(name)
    _sync(new)
    new.rename(folder / "latest")


def find(out: Path) -> Path | None:
    """The newest checkpoint under `out`, or None. Raises: UserError when `latest` names one that is not there."""
    pointer = out / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if folder.parent != pointer.parent or not (folder / "state.json").exists():
        others = sorted(p.name for p in pointer.parent.glob("step-*"))
        raise UserError(f"checkpoint: {pointer} names {folder.name}, which is not complete; write one of {others} into it, "
                        "or use another --out")
    return folder


def resume(out: Path, config: Config, model: nn.Module, vocab_size: int, optimizer: Optimizer,
           skipped: Callable[[str], None] = lambda why: None) -> dict[str, Any] | None:
    """Load the newest checkpoint that is what was written, from `latest` backwards; None where there is none at all. What is passed
    over goes to `skipped`, a line each. Raises: UserError as `load`, and Damaged where none is left."""
    pointer = out / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    latest = pointer.read_text().strip()
    newest = [pointer.parent / latest, *(f for f in sorted(pointer.parent.glob("step-*"), reverse=True) if f.name < latest)]
    damage: Damaged | None = None
    for folder in newest:
        try:
            return load(folder, config, model, vocab_size, optimizer)
        except Damaged as e:
            damage = damage or e
            skipped(str(e).split(";")[0])
    assert damage is not None
    raise damage


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as e:
        raise Damaged(f"checkpoint: {folder / 'state.json'} cannot be read: {e}; use another --out, or an older step") from None


def load(folder: Path, config: Config, model: nn.Module, vocab_size: int, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Read this rank's slices of `folder` into the model (and optimizer). Returns state.json.

    Raises: UserError when the checkpoint is of another model, damaged, or incomplete."""
    state = read_state(folder)
    here, there = model_words(config, vocab_size), state["model"]
    if differ := [f"{w} is {there.get(w)} there and {here.get(w)} here" for w in sorted({*here, *there}) if here.get(w) != there.get(w)]:
        raise UserError(f"checkpoint: {folder} is of another model: " + "; ".join(differ) + ". Use that model's config, or another --out")
    for name, digest in state["sha256"].items():
        if not (folder / name).exists() or _sha256(folder / name) != digest:
            raise Damaged(f"checkpoint: {folder / name} is missing or damaged (its SHA-256 is not the one it was written with); "
                            "point `latest` to an older step, or use another --out")
    places = _places(model)
    with _open(folder, "model", state) as f:
        for p, rows in places.items():
            _read(f, "", rows, p)
        for name, buffer in _buffers(model).items():
            buffer.copy_(f[name].get_tensor(name))
    if optimizer is not None:
        if state["precision"] != config.trainer.precision:
            raise UserError(f"checkpoint: {folder} was trained in {state['precision']}, got trainer.precision={config.trainer.precision}; "
                            "set it alike, or use another --out")
        with _open(folder, "optimizer", state) as f:
            _moments(f, places, optimizer)
        optimizer.set_steps(state["step"])
    return state


Files = dict[str, Any]                                                # tensor's name -> the open file that holds it


def _moments(f: Files, places: Places, optimizer: Optimizer) -> None:
    """One whole local tensor at a time, of which the optimizer takes what it steps."""
    for kind in optimizer.kinds():
        for p, rows in places.items():
            if kind in optimizer.own[optimizer.ddp.buffer_of[p]]:
                whole = torch.zeros_like(p.main_grad)  # type: ignore[attr-defined]
                _read(f, f"{kind}.", rows, whole)
                optimizer.set_state(kind, p, whole)


@torch.no_grad()
def _read(f: Files, prefix: str, rows: list[tuple[str, Piece]], local: Tensor) -> None:
    for name, piece in rows:
        if piece.length:
            part = f[prefix + name].get_slice(prefix + name)
            span = slice(piece.start, piece.start + piece.length)
            piece.local(local).copy_(part[span] if piece.dim == 0 else part[:, span])


@contextlib.contextmanager
def _open(folder: Path, kind: str, state: dict[str, Any]) -> Iterator[Files]:
    """The files of a kind, "model" or "optimizer"."""
    path = folder
    try:
        with contextlib.ExitStack() as stack:
            found: Files = {}
            for path in (folder / name for name in state["sha256"] if name.startswith(kind)):
                f = stack.enter_context(safe_open(path, framework="pt"))
                found |= dict.fromkeys(f.keys(), f)
            yield found
    except SafetensorError as e:
        raise Damaged(f"checkpoint: {path} cannot be read: {e}; point `latest` to an older step, or use another --out") from None
