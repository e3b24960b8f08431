"""Checkpoints that know nothing of the layout: whole tensors under global names, safetensors and JSON, no pickle.

    <out>/checkpoints/step-00000100/model.safetensors       weights, named as in the model
                                    optimizer.safetensors   exp_avg.<name>, exp_avg_sq.<name>, master.<name> (16-bit training)
                                    state.json              step, samples, model config, dtype, sha256 of both files
    <out>/checkpoints/latest        the newest complete one

Under pp > 1 every stage has a file of each kind: model-00001-of-00002.safetensors, ... Every rank reads only its own slices, and any
layout loads any other's.
Saving (`Saver`): the first rank of each stage takes its stage to the host; from there a thread writes it to a temporary folder, hashes
and fsyncs, while training goes on. The thread knows no group: once a step the main threads of those ranks sum two numbers over pp (who
still writes, who failed), and when all are done stage 0 renames the folder and moves `latest`. So no thread shares a group with the
steps, no rank waits for a file that will not come, and where one fails all raise.
"""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import threading
import time
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


PART = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors")


@dataclasses.dataclass
class _Write:
    """A checkpoint under way, on a rank that writes. error: what stopped its thread."""
    temporary: Path
    state: dict[str, Any]
    thread: threading.Thread
    error: Exception | None = None


class Saver:
    """The checkpoints of one run, at most one under way. All methods are collective. Raises: OSError (SafetensorError) on the ranks
    that write, at the first call after a disk has refused: the last checkpoint stays, and nothing of the new one."""

    def __init__(self, out: Path, config: Config, optimizer: Optimizer, vocab_size: int, extra: dict[str, Any] | None = None):
        self.folder, self.config, self.optimizer, self.mesh = out / "checkpoints", config, optimizer, optimizer.ddp.mesh
        self.words = {"precision": config.trainer.precision, "seed": config.trainer.seed, "seq_length": config.model.seq_length,
                      "model": model_words(config, vocab_size), **(extra or {})}
        self.write: _Write | None = None

    def start(self, step: int, samples: int) -> None:
        """Copy the state after `step` to the host and begin to write it, after the last one is done."""
        self.wait()
        files, mesh = self._on_host(), self.mesh
        if mesh.tp.rank or mesh.dp.rank:
            return
        temporary = self.folder / f".writing-step-{step:08d}"
        with _together(mesh):
            if mesh.pp.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        thread = threading.Thread(target=self._run, args=(files,), name="interlace-save", daemon=True)
        self.write = _Write(temporary, {"step": step, "samples": samples, **self.words}, thread)
        thread.start()

    def poll(self) -> None:
        """Finish the checkpoint under way if all have written their part. Once a step."""
        if (write := self.write) is None:
            return
        mesh, counts = self.mesh, torch.tensor([float(write.thread.is_alive()), float(write.error is not None)])
        if mesh.pp.size > 1:
            counts = all_reduce(counts, mesh.pp.group)
        if counts[0].item():
            return
        self.write = None
        try:
            with _together(mesh):
                if write.error is not None:
                    raise write.error
                if mesh.pp.rank == 0 and not counts[1].item():
                    publish(write.temporary, write.state, 2 * mesh.pp.size, self.config.trainer.keep_checkpoints)
        finally:
            if mesh.pp.rank == 0:
                shutil.rmtree(write.temporary, ignore_errors=True)

    def wait(self) -> None:
        """Finish the checkpoint under way."""
        while self.write is not None:
            self.poll()
            time.sleep(0.002)                                         # in step with the other stages: no long wait in a collective

    def _on_host(self) -> dict[str, dict[str, Tensor]]:
        """Copies of this stage's tensors, by file."""
        model, mesh, optimizer = self.optimizer.ddp.module, self.mesh, self.optimizer
        weights = gather_full(model, mesh, ((p, p) for p in optimizer.ddp.buffer_of))
        weights |= {name: torch.empty_like(t, device="cpu").copy_(t) for name, t in _buffers(model).items()}
        moments: dict[str, Tensor] = {}
        for kind in optimizer.kinds():
            moments |= {f"{kind}.{name}": t for name, t in gather_full(model, mesh, optimizer.state(kind)).items()}
        return {"model": weights, "optimizer": moments}

    def _run(self, files: dict[str, dict[str, Tensor]]) -> None:
        write, pp = self.write, self.mesh.pp
        assert write is not None
        part = "" if pp.size == 1 else f"-{pp.rank + 1:05d}-of-{pp.size:05d}"
        try:
            while files:
                name, whole = files.popitem()                         # written, and let go
                write_part(write.temporary / f"{name}{part}.safetensors", whole)
        except Exception as e:                                        # the main thread raises it
            write.error = e


def save(out: Path, config: Config, optimizer: Optimizer, *, step: int, samples: int, vocab_size: int,
         extra: dict[str, Any] | None = None) -> None:
    """Save after `step`, and wait for it; collective. Raises: as Saver."""
    saver = Saver(out, config, optimizer, vocab_size, extra)
    saver.start(step, samples)
    saver.wait()


def write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, on the disk, and its hash beside it (`publish` gathers those)."""
    save_file(tensors, path, {"format": "pt"})
    _sync(path)
    path.with_name(f"{path.name}.sha256").write_text(_sha256(path))


def publish(temporary: Path, state: dict[str, Any], parts: int, keep: int) -> None:
    """Make the checkpoint of the `parts` files in `temporary`: rename, then move `latest`, then drop all but the newest `keep` up to it
    (a run that was set back leaves what is after it). Folders of other names are not ours.
    Raises: OSError where a part is not to be seen from here (another host's disk)."""
    folder, digests, hashes = temporary.parent, {}, sorted(temporary.glob("*.sha256"))
    if len(hashes) != parts:
        raise OSError(f"{temporary} must hold {parts} files, got {len(hashes)}: --out must be one folder for all hosts")
    for path in hashes:
        digests[path.stem] = path.read_text()
        path.unlink()
    (temporary / "state.json").write_text(json.dumps({**state, "sha256": digests}, indent=1))
    _sync(temporary / "state.json")
    _sync(temporary)
    final = folder / f"step-{state['step']:08d}"
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    _point(folder, final.name)
    for old in [p for p in saved(folder) if p.name <= final.name][:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; not what a user put beside them (step-best)."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))


def tokenizer_of(state: dict[str, Any], run: Path) -> str:
    """The tokenizer that a checkpoint names; where that file is gone and the run's folder holds one (a converted run that moved), that."""
    name, beside = str(state.get("tokenizer", "bytes")), run / "tokenizer.json"
    return str(beside) if name != "bytes" and not Path(name).exists() and beside.exists() else name


def sweep(out: Path) -> None:
    """Remove what a killed run left half written."""
    for left in (out / "checkpoints").glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


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
    name = pointer.read_text(errors="replace").strip()
    folder = pointer.parent / name
    if folder.parent != pointer.parent or not (folder / "state.json").exists():
        others = [p.name for p in saved(pointer.parent)]
        raise UserError(f"checkpoint: {pointer} names {name!r}, which is not complete; write one of {others} into it, "
                        "or use another --out")
    return folder


def resume(out: Path, config: Config, model: nn.Module, vocab_size: int, optimizer: Optimizer,
           skipped: Callable[[str], None] = lambda why: None) -> dict[str, Any] | None:
    """Load the newest checkpoint that is what was written, from `latest` backwards; None where there is none at all. What is passed
    over goes to `skipped`, a line each. Raises: UserError as `load`, and Damaged where none is left."""
    pointer = out / "checkpoints" / "latest"
    newest = saved(pointer.parent)[::-1]
    if not pointer.exists() and not newest:
        return None
    latest = pointer.read_text(errors="replace").strip() if pointer.exists() else ""
    if latest in {f.name for f in newest}:                            # what is newer was not finished
        newest = [f for f in newest if f.name <= latest]
    else:
        skipped(f"checkpoint: {pointer} names {latest!r}, which is not there")
        newest = [f for f in newest if latest and f.name <= latest] or newest
    damage: Damaged | None = None
    for folder in newest:
        try:
            return load(folder, config, model, vocab_size, optimizer)
        except Damaged as e:
            damage = damage or e
            if folder is not newest[-1]:
                skipped(str(e).split(";")[0])
    raise damage or UserError(f"checkpoint: {pointer} names {latest!r}, and there is no step-... beside it; use another --out")


STATE = {"step": int, "samples": int, "precision": str, "model": dict, "sha256": dict}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json. Raises: Damaged."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict) or (lacks := STATE.keys() - state.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}" if isinstance(state, dict) else "it holds no object")
        if wrong := [w for w, kind in STATE.items() if type(state[w]) is not kind]:
            raise ValueError(f"of another type than was written: {', '.join(wrong)}")
        return state
    except (OSError, ValueError) as e:
        raise Damaged(f"checkpoint: {folder / 'state.json'} cannot be read: {e}; use another --out, or an older step") from None


def verify_files(folder: Path, state: dict[str, Any]) -> None:
    """Raises: Damaged unless every file is what was written."""
    way_out = "point `latest` to an older step, or use another --out"
    for name, digest in state["sha256"].items():
        if not PART.fullmatch(name):                                  # no pickle, no path out of the folder
            raise Damaged(f"checkpoint: {folder / 'state.json'} must name model and optimizer .safetensors files beside it, got {name!r}; "
                          f"{way_out}")
        part, parts = name.split("-", 1)[0], name.rpartition("-of-")[2]   # all ranks must find the same, whichever stage they read
        if "-of-" in name and sum(n.startswith(part) and n.endswith(f"-of-{parts}") for n in state["sha256"]) != int(parts.split(".")[0]):
            raise Damaged(f"checkpoint: {folder / 'state.json'} must name all parts of {part}, got {name} and not all; {way_out}")
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise Damaged(f"checkpoint: {folder / name} is missing or damaged (its SHA-256 is not the one it was written with); {way_out}")


def load(folder: Path, config: Config, model: nn.Module, vocab_size: int, optimizer: Optimizer | None = None) -> dict[str, Any]:
    """Read this rank's slices of `folder` into the model (and optimizer). Returns state.json.

    Raises: UserError when the checkpoint is of another model, damaged, or incomplete."""
    state = read_state(folder)
    here, there = model_words(config, vocab_size), state["model"]
    words = {*here, *there}
    if ("num_moe_experts" in here) != ("num_moe_experts" in there):   # one of them is dense: that says it
        words -= {*EXPERT_WORDS} - {"num_moe_experts"}
    if all(w.get("moe_router_score_function") == "softmax" and not w.get("moe_router_pre_softmax") for w in (here, there)):
        words -= {"moe_router_norm_topk_prob"}                        # softmax over the chosen sums to 1, whatever it says
    if differ := [f"{w} is {there.get(w)} there and {here.get(w)} here" for w in sorted(words) if here.get(w) != there.get(w)]:
        raise UserError(f"checkpoint: {folder} is of another model: " + "; ".join(differ) + ". Use that model's config, or another --out")
    verify_files(folder, state)
    places = _places(model)
    with open_files(folder, "model", state) as f:
        for p, rows in places.items():
            _read(f, "", rows, p)
        for name, buffer in _buffers(model).items():
            buffer.copy_(f[name].get_tensor(name))
    if optimizer is not None:
        if state["precision"] != config.trainer.precision:
            raise UserError(f"checkpoint: {folder} was trained in {state['precision']}, got trainer.precision={config.trainer.precision}; "
                            "set it alike, or use another --out")
        with open_files(folder, "optimizer", state) as f:
            _moments(f, places, optimizer)
        optimizer.set_steps(state["step"])
    return state


class Files(dict[str, Any]):
    """tensor's name -> the open file that holds it"""
    folder: Path

    def __missing__(self, name: str) -> Any:
        raise Damaged(f"checkpoint: {self.folder} must hold the tensor {name}, got files without it: a stage's file is missing; "
                      "point `latest` to an older step, or use another --out")


def _moments(f: Files, places: Places, optimizer: Optimizer) -> None:
    """One whole local tensor at a time, of which the optimizer takes what it steps. Converted weights come without: moments stay zero."""
    for kind in optimizer.kinds():
        for p, rows in places.items():
            if kind in optimizer.own[optimizer.ddp.buffer_of[p]]:
                whole = torch.zeros_like(p.main_grad)  # type: ignore[attr-defined]
                if f:
                    _read(f, f"{kind}.", rows, whole)
                elif kind == "master":
                    whole.copy_(p.detach())
                optimizer.set_state(kind, p, whole)


@torch.no_grad()
def _read(f: Files, prefix: str, rows: list[tuple[str, Piece]], local: Tensor) -> None:
    for name, piece in rows:
        if piece.length:
            part = f[prefix + name].get_slice(prefix + name)
            if tuple(part.get_shape()) != piece.shape:
                raise Damaged(f"checkpoint: {f.folder} must hold {prefix + name} as {list(piece.shape)}, got {part.get_shape()}; "
                              "point `latest` to an older step, or use another --out")
            span = slice(piece.start, piece.start + piece.length)
            piece.local(local).copy_(part[(*[slice(None)] * piece.dim, span) if piece.shape else ...])


@contextlib.contextmanager
def open_files(folder: Path, kind: str, state: dict[str, Any]) -> Iterator[Files]:
    """The files of a kind, "model" or "optimizer"."""
    path, found = folder, Files()
    found.folder = folder
    with contextlib.ExitStack() as stack:
        try:
            for path in (folder / name for name in state["sha256"] if name.startswith(kind)):
                f = stack.enter_context(safe_open(path, framework="pt"))
                found |= dict.fromkeys(f.keys(), f)
        except SafetensorError as e:
            raise Damaged(f"checkpoint: {path} cannot be read: {e}; point `latest` to an older step, or use another --out") from None
        yield found
