"""Checkpoints that know nothing of the layout: whole tensors under global names, safetensors and JSON, no pickle.

    <out>/checkpoints/step-00000100/model.safetensors       weights, named as in the model
                                    optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, master.<name> (16-bit training)
                                    state.json              step, samples, model config, dtype, sha256 of both files
    <out>/checkpoints/latest        the newest complete one

Written by rank 0 to a temporary folder, fsynced, renamed; `latest` moves last. Every rank reads only its own slices. Any
layout loads any other's. Rank 0 holds the whole model on the host; the others, under ZeRO-1, one bucket at a time.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..kernels.comm import all_gather
from ..parallel.errors import UserError
from ..parallel.mesh import Mesh
from ..parallel.sharding import Piece, named_pieces
from .config import Config
from .optimizer import Optimizer

# What a checkpoint's weights mean; the rest of the config may change between runs.
SHAPE_WORDS = ("num_layers", "hidden_size", "ffn_size", "num_attention_heads", "query_groups", "head_dim", "normalization", "activation",
               "position_embedding_type", "rotary_base", "share_embeddings_and_output_weights", "add_bias_linear",
               "layernorm_epsilon")


def model_words(config: Config, vocab_size: int) -> dict[str, Any]:
    """The words that must be equal for weights to fit, with defaults filled in."""
    words = {w: getattr(config.model, w) for w in SHAPE_WORDS} | {"vocab_size": vocab_size}
    if config.model.position_embedding_type == "learned_absolute":
        words["seq_length"] = config.model.seq_length
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
    """Whole tensors under global names, from every rank's (parameter, tensor shaped like it). Collective; full on rank 0.

    Of replicas the first sends: a dense parameter's ranks of tp, an expert's of ep."""
    full: dict[str, Tensor] = {}
    places = _places(model)
    every: dict[str, list[dict[str, tuple]]] = {}
    for axis, first in ((mesh.tp, mesh.dp.rank == 0), (mesh.ep, mesh.edp.rank == 0)):
        mine = {name: dataclasses.astuple(piece) for rows in places.values() for name, piece in rows}
        every[axis.name] = [mine]
        if axis.size > 1 and first:
            import torch.distributed as dist
            every[axis.name] = [{}] * axis.size
            dist.all_gather_object(every[axis.name], mine, group=axis.group)
    for p, tensor in items:
        expert = getattr(p, "expert", False)
        axis = mesh.ep if expert else mesh.tp
        if (mesh.edp if expert else mesh.dp).rank:
            continue
        stacked = tensor.detach().contiguous().unsqueeze(0)
        if axis.size > 1:
            stacked = all_gather(stacked, axis.group)
        for name, piece in places[p] if axis.rank == 0 else ():
            whole = full[name] = torch.empty(piece.shape, dtype=tensor.dtype)
            for r in range(axis.size):
                theirs = Piece(*every[axis.name][r][name])
                theirs.of(whole).copy_(theirs.local(stacked[r]))
    return full


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
    """Save after `step`; collective. Raises: OSError on rank 0 when the disk refuses (the last checkpoint stays)."""
    model, mesh = optimizer.ddp.module, optimizer.ddp.mesh
    files = {"model.safetensors": gather_full(model, mesh, ((p, p) for p in optimizer.ddp.buffer_of))}
    moments: dict[str, Tensor] = {}
    for kind in optimizer.kinds():
        moments |= {f"{kind}.{name}": t for name, t in gather_full(model, mesh, optimizer.state(kind)).items()}
    files["optimizer.safetensors"] = moments
    if mesh.tp.rank == 0 and mesh.dp.rank == 0:
        folder = out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        temporary, final = folder / f".writing-{os.getpid()}", folder / f"step-{step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            for name, whole in files.items():
                save_file({n: t.cpu().contiguous() for n, t in whole.items()}, temporary / name)
                _sync(temporary / name)
            state = {"step": step, "samples": samples, "precision": config.trainer.precision, "seed": config.trainer.seed,
                     "model": model_words(config, vocab_size), "sha256": {n: _sha256(temporary / n) for n in files}, **(extra or {})}
            (temporary / "state.json").write_text(json.dumps(state, indent=1))
            _sync(temporary / "state.json")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _point(folder, final.name)
        for old in sorted(folder.glob("step-*"))[:-config.trainer.keep_checkpoints]:
            shutil.rmtree(old, ignore_errors=True)


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


def read_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"checkpoint: {folder / 'state.json'} cannot be read: {e}; use another --out, or an older step") from None


def load(folder: Path, config: Config, model: nn.Module, vocab_size: int, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Read this rank's slices of `folder` into the model (and optimizer). Returns state.json.

    Raises: UserError when the checkpoint is of another model, damaged, or incomplete."""
    state = read_state(folder)
    here, there = model_words(config, vocab_size), state["model"]
    if differ := [f"{w} is {there.get(w)} there and {here.get(w)} here" for w in sorted({*here, *there}) if here.get(w) != there.get(w)]:
        raise UserError(f"checkpoint: {folder} is of another model: " + "; ".join(differ) + ". Use that model's config, or another --out")
    for name, digest in state["sha256"].items():
        if not (folder / name).exists() or _sha256(folder / name) != digest:
            raise UserError(f"checkpoint: {folder / name} is missing or damaged (its SHA-256 is not the one it was written with); "
                            "point `latest` to an older step, or use another --out")
    places = _places(model)
    with _open(folder / "model.safetensors") as f:
        for p, rows in places.items():
            _read(f, "", rows, p)
    if optimizer is not None:
        if state["precision"] != config.trainer.precision:
            raise UserError(f"checkpoint: {folder} was trained in {state['precision']}, got trainer.precision={config.trainer.precision}; "
                            "set it alike, or use another --out")
        with _open(folder / "optimizer.safetensors") as f:
            _moments(f, places, optimizer)
        optimizer.set_steps(state["step"])
    return state


def _moments(f: Any, places: Places, optimizer: Optimizer) -> None:
    """One whole local tensor at a time, of which the optimizer takes what it steps."""
    for kind in optimizer.kinds():
        for p, rows in places.items():
            if kind in optimizer.own[optimizer.ddp.buffer_of[p]]:
                whole = torch.zeros_like(p.main_grad)  # type: ignore[attr-defined]
                _read(f, f"{kind}.", rows, whole)
                optimizer.set_state(kind, p, whole)


@torch.no_grad()
def _read(f: Any, prefix: str, rows: list[tuple[str, Piece]], local: Tensor) -> None:
    for name, piece in rows:
        if piece.length:
            part = f.get_slice(prefix + name)
            span = slice(piece.start, piece.start + piece.length)
            piece.local(local).copy_(part[span] if piece.dim == 0 else part[:, span])


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as e:
        raise UserError(f"checkpoint: {path} cannot be read: {e}; point `latest` to an older step, or use another --out") from None
