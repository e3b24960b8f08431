"""Weights between a checkpoint and a Hugging Face folder (config.json, model.safetensors or shards with an index), bit for bit.

    ours                                    LlamaForCausalLM, MixtralForCausalLM             GPT2LMHeadModel
    embed_tokens.weight                     model.embed_tokens.weight                        transformer.wte.weight
    position_embeddings                                                                      transformer.wpe.weight
    layers.0.self_attn.{q,k,v}_proj.weight  model.layers.0.self_attn.{q,k,v}_proj.weight     transformer.h.0.attn.c_attn.weight
                                                                                             (the three stacked, then transposed: Conv1D)
    layers.0.mlp.gate.weight                model.layers.0.block_sparse_moe.gate.weight
    layers.0.mlp.experts.1.gate_proj.weight model.layers.0.block_sparse_moe.experts.1.w1.weight        (up w3, down w2)
    lm_head.weight                          lm_head.weight                                   lm_head.weight; where tied, none

The architecture follows from the config; what fits none is refused with every reason. rope rotates halves on both sides, so queries
and keys move as they are. Padding of the vocabulary is never in a checkpoint. One file's worth of tensors (SHARD bytes) is held at once.
Sources: transformers' configuration_{llama,mixtral,gpt2}.py for words and defaults, safetensors' format.
"""
from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..parallel.errors import RunError, UserError, raise_problems
from . import checkpoint
from .config import Config, DataConfig, ModelConfig, TrainerConfig, to_yaml
from .tokenizer import load_tokenizer

LLAMA, MIXTRAL, GPT2 = "LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"
SHARD = 4 << 30                                                       # bytes of one file, at most (a larger tensor has its own)
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F64": "float64"}        # safetensors' words and ours
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "float64": "float64"}   # ours and transformers'
BYTES = {"fp32": 4, "bf16": 2, "float64": 8}
Words = dict[str, Any]

# ---- names and shapes -----------------------------------------------------------------------------------------


def parameters(w: Words) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of a checkpoint with these words (checkpoint.model_words), in the model's order."""
    D, V, heads = w["hidden_size"], w["vocab_size"], w["num_attention_heads"] * w["head_dim"]
    keys, bias = w["query_groups"] * w["head_dim"], w["add_bias_linear"]

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (D,)
        if w["normalization"] == "layernorm":
            yield f"{name}.bias", (D,)
    yield "embed_tokens.weight", (V, D)
    if w["position_embedding_type"] == "learned_absolute":
        yield "position_embeddings", (w["seq_length"], D)
    for i in range(w["num_layers"]):
        at = f"layers.{i}"
        yield from norm(f"{at}.input_layernorm")
        yield from norm(f"{at}.post_attention_layernorm")
        for part, rows in (("q", heads), ("k", keys), ("v", keys)):
            yield from linear(f"{at}.self_attn.{part}_proj", rows, D)
        yield from linear(f"{at}.self_attn.o_proj", D, heads)
        if w.get("num_moe_experts"):
            yield f"{at}.mlp.gate.weight", (w["num_moe_experts"], D)
        for mlp in [f"{at}.mlp.experts.{e}" for e in range(w.get("num_moe_experts") or 0)] or [f"{at}.mlp"]:
            F = w["moe_ffn_size"] if w.get("num_moe_experts") else w["ffn_size"]
            for part in ("gate", "up") if w["activation"] == "swiglu" else ("up",):
                yield from linear(f"{mlp}.{part}_proj", F, D)
            yield from linear(f"{mlp}.down_proj", D, F)
    yield from norm("norm")
    if not w["share_embeddings_and_output_weights"]:
        yield "lm_head.weight", (V, D)


@dataclass(frozen=True)
class Row:
    """One tensor of theirs: ours, one below the other, then transposed where theirs is [in, out]."""
    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


_GPT2 = {"embed_tokens.weight": "wte.weight", "position_embeddings": "wpe.weight", "input_layernorm": "ln_1",
         "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}
_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}   # transformers' words and ours
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def rows(architecture: str, w: Words) -> list[Row]:
    """How every tensor of ours is called and laid out there."""
    found: list[Row] = []
    for name, shape in parameters(w):
        if name == "lm_head.weight":
            found.append(Row(name, (name,)))
        elif architecture == GPT2:
            found += _gpt2_row(name, shape)
        else:
            if architecture == MIXTRAL and ".mlp." in name:
                name_there = name.replace(".mlp.", ".block_sparse_moe.")
                for ours, theirs in _MIXTRAL.items():
                    name_there = name_there.replace(f".{ours}.", f".{theirs}.")
            else:
                name_there = name
            found.append(Row(f"model.{name_there}", (name,)))
    return found


def _gpt2_row(name: str, shape: tuple[int, ...]) -> list[Row]:
    *path, leaf = name.split(".")
    if path[:1] != ["layers"]:
        return [Row("transformer." + (_GPT2.get(name) or f"ln_f.{leaf}"), (name,))]
    at, layer = ".".join(path[2:]), f"layers.{path[1]}."
    there = f"transformer.h.{path[1]}."
    if at in ("self_attn.k_proj", "self_attn.v_proj"):                # come with q_proj
        return []
    ours = tuple(f"{layer}self_attn.{x}_proj.{leaf}" for x in "qkv") if at == "self_attn.q_proj" else (name,)
    return [Row(f"{there}{_GPT2.get(at, 'attn.c_attn')}.{leaf}", ours, transposed=len(shape) == 2)]


# ---- configs --------------------------------------------------------------------------------------------------


def architecture_of(w: Words) -> str:
    """The transformers class that computes what a model with these words computes. Raises: UserError with every reason why none does."""
    if w["position_embedding_type"] == "learned_absolute":
        act = w["activation"] if w["activation"] in _GELUS.values() else "gelu"
        name, wanted = GPT2, {"normalization": "layernorm", "activation": act, "add_bias_linear": True}
        wanted |= {"query_groups": w["num_attention_heads"]}
    else:
        name, wanted = LLAMA, {"normalization": "rmsnorm", "activation": "swiglu"}
    if w.get("num_moe_experts"):
        if name == LLAMA:
            name = MIXTRAL
            wanted |= {"add_bias_linear": False}
            wanted |= {"moe_router_score_function": "softmax", "moe_shared_expert_intermediate_size": None,
                       "moe_router_num_groups": None, "moe_router_topk_scaling_factor": 1.0, "moe_router_enable_expert_bias": False}
            if w["moe_router_pre_softmax"] and not (w["moe_router_norm_topk_prob"] or (
                    w["moe_router_norm_topk_prob"] is None and w["moe_router_topk"] > 1)):
                wanted["moe_router_norm_topk_prob"] = True
        else:
            wanted |= {"num_moe_experts": None}
    reasons = [f"{name} has {word}={value}, got {w.get(word)}" for word, value in wanted.items() if w.get(word) != value]
    freq = w.get("moe_layer_freq", 1)
    if name == MIXTRAL and not (freq == 1 or (isinstance(freq, (list, tuple)) and all(freq))):
        reasons.append(f"{name} has experts in every layer, got moe_layer_freq={freq}")
    if w["hidden_size"] % w["num_attention_heads"] or (name == GPT2 and w["head_dim"] * w["num_attention_heads"] != w["hidden_size"]):
        reasons.append(f"{name} has hidden_size = heads x a whole number{' = heads x head_dim' if name == GPT2 else ''}, got "
                       f"{w['hidden_size']}, {w['num_attention_heads']} heads of {w['head_dim']}")
    raise_problems("convert: no model of transformers computes what this one does", reasons)
    return name


def to_config(architecture: str, w: Words, *, seq_length: int, precision: str, eos: int | None) -> dict[str, Any]:
    """config.json of a model with these words."""
    common = {"architectures": [architecture], "torch_dtype": DTYPES[precision], "vocab_size": w["vocab_size"], "bos_token_id": None,
              "eos_token_id": eos, "tie_word_embeddings": w["share_embeddings_and_output_weights"]}
    if architecture == GPT2:
        return {"model_type": "gpt2", **common, "n_positions": w["seq_length"], "n_embd": w["hidden_size"], "n_layer": w["num_layers"],
                "n_head": w["num_attention_heads"], "n_inner": w["ffn_size"],
                "activation_function": "gelu" if w["activation"] == "gelu" else "gelu_new",
                "layer_norm_epsilon": w["layernorm_epsilon"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = {"model_type": "llama", **common, "hidden_size": w["hidden_size"], "intermediate_size": w["ffn_size"],
              "num_hidden_layers": w["num_layers"], "num_attention_heads": w["num_attention_heads"],
              "num_key_value_heads": w["query_groups"], "head_dim": w["head_dim"], "hidden_act": "silu",
              "max_position_embeddings": seq_length, "rms_norm_eps": w["layernorm_epsilon"], "rope_theta": w["rotary_base"],
              "rope_parameters": {"rope_type": "default", "rope_theta": w["rotary_base"]}}   # before and since transformers 5
    if architecture == MIXTRAL:
        return {**theirs, "model_type": "mixtral", "intermediate_size": w["moe_ffn_size"], "num_local_experts": w["num_moe_experts"],
                "num_experts_per_tok": w["moe_router_topk"], "sliding_window": None}
    return {**theirs, "attention_bias": w["add_bias_linear"], "mlp_bias": w["add_bias_linear"]}


def from_config(c: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(architecture, words of ModelConfig) of a config.json. Raises: UserError with everything that ours cannot compute."""
    architecture = (c.get("architectures") or [None])[0]
    if architecture not in (LLAMA, MIXTRAL, GPT2):
        raise UserError(f"convert: architectures must be one of {LLAMA}, {MIXTRAL}, {GPT2}, got {architecture}")
    gpt2 = architecture == GPT2
    sizes = {"num_layers": "n_layer", "hidden_size": "n_embd", "num_attention_heads": "n_head", "seq_length": "n_positions"} if gpt2 else {
        "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
        "seq_length": "max_position_embeddings", "ffn_hidden_size": "intermediate_size", "layernorm_epsilon": "rms_norm_eps"}
    if architecture == MIXTRAL:
        sizes |= {"num_moe_experts": "num_local_experts", "moe_router_topk": "num_experts_per_tok"}
    sizes["vocab_size"] = "vocab_size"
    reasons = [f"{theirs} must be there, got none" for theirs in sizes.values() if c.get(theirs) is None]
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    fixed = {"scale_attn_weights": (True, True), "add_cross_attention": (False, False),
             "scale_attn_by_inverse_layer_idx": (False, False), "reorder_and_upcast_attn": (False, False)} if gpt2 else {
             "hidden_act": ("silu", "silu"), "sliding_window": (None, None), "mlp_bias": (c.get("attention_bias", False), False)}
    reasons += [f"{word} must be {value}, got {c.get(word, default)}" for word, (value, default) in fixed.items()
                if c.get(word, default) != value]
    act = c.get("activation_function", "gelu_new")                    # of GPT-2
    if gpt2 and act not in _GELUS:
        reasons.append(f"activation_function must be one of {', '.join(_GELUS)}, got {act}")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        reasons.append(f"rope must be plain (rope_type default), got {kind}")
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        reasons.append("rope must turn whole heads, got a partial_rotary_factor")
    raise_problems(f"convert: this {architecture} cannot be computed here", reasons)
    words = {ours: c[theirs] for ours, theirs in sizes.items()}
    if words.get("moe_router_topk") == 1:                             # a Mixtral's one prob is 1: said aloud, as training demands
        words["moe_router_norm_topk_prob"] = True
    words["share_embeddings_and_output_weights"] = c.get("tie_word_embeddings", gpt2)
    if gpt2:
        return architecture, {**words, "ffn_hidden_size": c.get("n_inner") or 4 * c["n_embd"], "normalization": "layernorm",
                              "activation": _GELUS[act], "position_embedding_type": "learned_absolute", "add_bias_linear": True,
                              "layernorm_epsilon": c.get("layer_norm_epsilon", 1e-5)}
    theta = rope.get("rope_theta") or c.get("rope_theta") or (1e6 if architecture == MIXTRAL else 1e4)
    return architecture, {**words, "num_query_groups": c.get("num_key_value_heads") or c["num_attention_heads"],
                          "kv_channels": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"], "rotary_base": float(theta),
                          "add_bias_linear": bool(c.get("attention_bias", False))}


# ---- files ----------------------------------------------------------------------------------------------------


def _files(items: list[tuple[str, int]]) -> Iterator[tuple[str, list[str]]]:
    """(file's name, tensors in it) for tensors of so many bytes, at most SHARD a file."""
    parts: list[list[str]] = [[]]
    room = SHARD
    for name, size in items:
        if parts[-1] and size > room:
            parts.append([])
            room = SHARD
        parts[-1].append(name)
        room -= size
    for i, part in enumerate(parts):
        yield "model" + (f"-{i + 1:05d}-of-{len(parts):05d}" if len(parts) > 1 else "") + ".safetensors", part


def to_hf(source: Path, target: Path) -> str:
    """Write the checkpoint `source` (its folder, or that of a run: the newest) as a Hugging Face folder. Returns: the architecture.

    Raises: UserError when transformers has no such model, `target` holds something, or the checkpoint is damaged."""
    folder = source if (source / "state.json").exists() else checkpoint.find(source)
    if folder is None:
        raise UserError(f"convert: --out must be the folder of a checkpoint, or of a run that saved one, got {source}; train first")
    state = checkpoint.read_state(folder)
    w, precision = state["model"], state["precision"]
    architecture = architecture_of(w)
    checkpoint.verify_files(folder, state)
    shapes, by_name = dict(parameters(w)), {row.theirs: row for row in rows(architecture, w)}
    sizes = [(name, BYTES[precision] * sum(prod(shapes[n]) for n in row.ours)) for name, row in by_name.items()]
    tokenizer = checkpoint.tokenizer_of(state, folder.resolve().parent.parent)
    if tokenizer != "bytes" and not Path(tokenizer).exists():
        raise UserError(f"convert: the run's tokenizer must be there, got {tokenizer}, which is gone; put it beside config.yaml as "
                        "tokenizer.json")
    eos = load_tokenizer(tokenizer).eod
    config = to_config(architecture, w, seq_length=state["seq_length"], precision=precision,
                       eos=eos if eos is not None and eos < w["vocab_size"] else None)
    with _whole_or_nothing(target) as temporary, checkpoint.open_files(folder, "model", state) as f:
        where: dict[str, str] = {}
        files = list(_files(sizes))
        for file, names in files:
            save_file({name: _theirs(by_name[name], lambda n: f[n].get_tensor(n)) for name in names}, temporary / file, {"format": "pt"})
            where |= dict.fromkeys(names, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": where}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (temporary / "config.json").write_text(json.dumps(config, indent=1))
        if tokenizer != "bytes":
            shutil.copyfile(tokenizer, temporary / "tokenizer.json")
    return architecture


def _theirs(row: Row, read: Callable[[str], Tensor]) -> Tensor:
    whole = torch.cat([read(name) for name in row.ours]) if len(row.ours) > 1 else read(row.ours[0])
    return whole.t().contiguous() if row.transposed else whole


def from_hf(source: Path, out: Path) -> str:
    """Make `out` a run that starts from the weights of a Hugging Face folder: step 0, moments zero. Returns: the architecture.

    Raises: UserError when ours cannot compute that model, tensors are missing, left over or of another shape, or `out` holds a run."""
    try:
        c = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"convert: --from-hf must be a folder with config.json and .safetensors files, got {source}: {e}") from None
    architecture, words = from_config(c)
    if (out / "checkpoints").exists():
        raise UserError(f"convert: --out must be a new folder, got {out}, which holds checkpoints; choose another")
    if out.exists() and not out.is_dir():
        raise UserError(f"convert: --out must be a new folder, got {out}, which is a file; choose another")
    model = ModelConfig(**words)
    w = checkpoint.model_words(Config(model=model), model.vocab_size or 0)
    table, shapes = rows(architecture, w), dict(parameters(w))
    with _their_files(source) as f:
        if "wte.weight" in f:                                         # the released GPT-2: files of the model under the head
            table = [replace(row, theirs=row.theirs.removeprefix("transformer.")) for row in table]
        precision = _check(table, shapes, f, source)
        part_of = {name: (row, i) for row in table for i, name in enumerate(row.ours)}
        tokenizer = str((out / "tokenizer.json").absolute()) if (source / "tokenizer.json").exists() else "bytes"
        config = Config(model=model, trainer=TrainerConfig(precision=precision), data=DataConfig(tokenizer=tokenizer))
        temporary = out / "checkpoints" / ".writing-step-00000000"
        try:
            temporary.mkdir(parents=True)
            files = list(_files([(name, BYTES[precision] * prod(shape)) for name, shape in shapes.items()]))
            for file, names in files:
                checkpoint.write_part(temporary / file, {name: _ours(*part_of[name], f, shapes) for name in names})
            if tokenizer != "bytes":
                shutil.copyfile(source / "tokenizer.json", tokenizer)
            (out / "config.yaml").write_text(to_yaml(config))
            state = {"step": 0, "samples": 0, "precision": precision, "seed": config.trainer.seed, "seq_length": model.seq_length,
                     "model": w, "tokenizer": tokenizer, "data": None}
            checkpoint.publish(temporary, state, len(files), keep=1)
        except BaseException:
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            raise
    return architecture


def _ours(row: Row, i: int, f: checkpoint.Files, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    whole = f[row.theirs].get_tensor(row.theirs)
    whole = whole.t() if row.transposed else whole
    return whole.split([shapes[name][0] for name in row.ours])[i].contiguous()


def _check(table: list[Row], shapes: dict[str, tuple[int, ...]], f: checkpoint.Files, source: Path) -> Any:
    """The precision of all tensors. Raises: UserError with everything that is not as the config says."""
    problems, dtypes = [], set()
    for row in table:
        if row.theirs not in f:
            problems.append(f"{row.theirs} must be there, got none")
            continue
        part = f[row.theirs].get_slice(row.theirs)
        first = shapes[row.ours[0]]
        wanted = (sum(shapes[n][0] for n in row.ours), *first[1:])
        wanted = wanted[::-1] if row.transposed else wanted
        if tuple(part.get_shape()) != wanted:
            problems.append(f"{row.theirs} must be {list(wanted)}, got {part.get_shape()}")
        dtypes.add(part.get_dtype())
    # a tied head may be spelled out; old GPT-2 files hold their causal masks
    known = {row.theirs for row in table} | {"lm_head.weight"}
    problems += [f"{name} is not a weight of this model" for name in sorted(f.keys() - known)
                 if not name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))]
    if len(dtypes) > 1 or not dtypes <= PRECISIONS.keys():
        problems.append(f"all tensors must be of one type, {', '.join(PRECISIONS)}, got {', '.join(sorted(dtypes))}")
    raise_problems(f"convert: {source} does not hold what its config.json says", problems)
    return PRECISIONS[dtypes.pop()]


@contextlib.contextmanager
def _their_files(folder: Path) -> Iterator[checkpoint.Files]:
    """The tensors of a Hugging Face folder. Raises: UserError for what is no safetensors, or not beside its index."""
    index = folder / "model.safetensors.index.json"
    path, found = index, checkpoint.Files()
    found.folder = folder
    with contextlib.ExitStack() as stack:
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
            if bad := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
                raise SafetensorError(f"an index that names {bad[0]!r}, which is not beside it")
            for path in (folder / name for name in names):
                f = stack.enter_context(safe_open(path, framework="pt"))
                found |= dict.fromkeys(f.keys(), f)
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as e:
            raise UserError(f"convert: {path} must be of safetensors that can be read, got {e or 'no file'}; older formats (.bin) are "
                            "pickles: save them anew with save_pretrained") from None
        yield found


@contextlib.contextmanager
def _whole_or_nothing(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` at the end, and nothing before; of one that is there, which may be a mount, the files do, config.json
    last. Raises: UserError unless `target` is free."""
    target, there = target.resolve(), target.exists()
    temporary = target / ".writing" if there else target.with_name(f".{target.name}.writing")
    if there and (not target.is_dir() or any(p != temporary for p in target.iterdir())):
        raise UserError(f"convert: --to-hf must be a new or empty folder, got {target}; choose another")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if not there:
            temporary.replace(target)
            return
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == "config.json"):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(out: str, to: str | None, source: str | None) -> int:
    """`interlace convert`"""
    folder = Path(out)
    try:
        if to is not None:
            print(f"{to}: {to_hf(folder, Path(to))}, for transformers' from_pretrained")
        elif source is not None:
            print(f"{out}: {from_hf(Path(source), folder)} at step 0. "
                  f"Train on: interlace train --config {folder / 'config.yaml'} --out {out}")
    except (OSError, SafetensorError) as e:
        raise RunError(f"convert: the files could not be written: {getattr(e, 'strerror', None) or e}; nothing was left behind. "
                       "Free space, then run the same command again") from e
    return 0
