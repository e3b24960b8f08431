"""Weights between folders and replaced models: each rank reads its slices, a split model saves what stock loads, nothing is lost unseen."""
import copy
import importlib
import json

import pytest
import torch
from ranks import kept, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import interlace
from interlace.dropin import load as replace_load
from interlace.dropin import save as replace_save
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

pytest.importorskip("transformers")
from hf import MODELS, STACKED, close, make, sample, step


@kept
def mesh(t):
    return Mesh.build(Layout(world=t, tp=t))


def on_meta(name, dtype=torch.float32, **more):
    folder, prefix, small = MODELS[name]
    config = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{prefix}ForCausalLM"
    with torch.device("meta"):
        model = getattr(modeling, head)(getattr(config, f"{prefix}Config")(**small | more)).eval().to(dtype)
    if "expert" in "".join(small) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def logits(model):
    with torch.no_grad():
        return model(**sample()).logits


class Counted:
    """safe_open whose slices count what is read of them, apart from the loader's own count."""
    read = 0

    def __init__(self, *args, **kwargs):
        self.file = safe_open(*args, **kwargs)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *args):
        return self.file.__exit__(*args)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return Slice(self.file.get_slice(name))


class Slice:
    def __init__(self, part):
        self.part = part

    def __getattr__(self, name):
        return getattr(self.part, name)

    def __getitem__(self, index):
        value = self.part[index]
        Counted.read += value.nbytes
        return value


# ---- one device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_meta_gets_its_weights(name, tmp_path):
    model = make(name, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    empty = on_meta(name)
    assert all(p.is_meta for p in empty.parameters())
    told = interlace.load_pretrained_(empty, tmp_path)
    assert (not any(t.is_meta for t in (*empty.parameters(), *empty.buffers())) and "computed anew" in str(told)) or name == "gpt2"
    bits = empty.state_dict()
    assert all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    assert torch.equal(logits(empty), logits(model))
    assert told.read == sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values()), "each tensor once"
    interlace.replace_(empty)
    torch.testing.assert_close(logits(empty), logits(model), rtol=1e-4, atol=1e-4)


def test_before_or_after_and_into_another_dtype(tmp_path):
    model, other = make("llama", torch.float32), make("llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    interlace.replace_(other)
    objects = list(other.parameters())
    interlace.load_pretrained_(other, tmp_path)
    assert all(a is b for a, b in zip(objects, other.parameters(), strict=True))
    assert all(torch.equal(v.bfloat16(), other.state_dict()[n]) for n, v in model.state_dict().items())
    base = on_meta("llama").model                                     # a base model from the files of one with a head, but for the head
    with pytest.raises(ValueError, match=r"lm_head\.weight is no weight of this model"):
        interlace.load_pretrained_(base, tmp_path)


def test_everything_wrong_is_said_at_once_and_nothing_is_changed(tmp_path):
    model = make("qwen2", torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weightt"] = weights.pop("model.norm.weight")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:-1].clone()
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    bits = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="4 problems") as e:
        interlace.load_pretrained_(model, tmp_path)
    for said in ("model.embed_tokens.weight = lm_head.weight must be there, got none", "up_proj.weight must be [48, 32], got [47, 32]",
                 "model.norm.weight must be there, got none; the nearest name is model.norm.weightt", "weightt is no weight"):
        assert said in str(e.value), e.value
    assert all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    empty = on_meta("qwen2")
    with pytest.raises(ValueError, match="problems"):
        interlace.load_pretrained_(empty, tmp_path)
    assert all(p.is_meta for p in empty.parameters())


def test_tied_weights_that_differ_on_disk(tmp_path):
    model = make("qwen2", torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(interlace_loaded("qwen2", tmp_path).lm_head.weight, model.lm_head.weight)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="are one parameter of this model, got two tensors"):
        interlace_loaded("qwen2", tmp_path)


def interlace_loaded(name, folder, **more):
    model = on_meta(name, **more)
    interlace.load_pretrained_(model, folder)
    return model


def test_folders_that_cannot_be_read(tmp_path):
    model = make("llama", torch.float32)
    with pytest.raises(ValueError, match="the folder must be there"):
        interlace.load_pretrained_(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="older formats"):
        interlace.load_pretrained_(model, tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"model.norm.weight": "../../etc/model.safetensors"}}))
    with pytest.raises(ValueError, match="which is not beside it"):
        interlace.load_pretrained_(model, tmp_path)
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"more.weight": good["weight_map"]["model.norm.weight"]}}))
    with pytest.raises(ValueError, match=r"got more\.weight in none of them"):
        interlace.load_pretrained_(model, tmp_path)
    index.write_text(json.dumps(good))
    some = tmp_path / good["weight_map"]["model.norm.weight"]
    some.write_bytes(some.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be of safetensors that can be read"):
        interlace.load_pretrained_(model, tmp_path)
    with pytest.raises(ValueError, match="skip must come with a mesh"):
        interlace.load_pretrained_(model, tmp_path, skip="lm_head")


def test_lazy_is_what_torch_computes():
    """Every view against torch, and only what is asked for is read."""
    g = torch.Generator().manual_seed(0)
    full = [torch.randn(4, 6, generator=g) for _ in range(3)]
    read = []

    def lazy(t):
        def get(spans):
            read.append(t[spans].numel())
            return t[spans]
        return replace_load.Lazy(t.shape, t.dtype, get)
    cases = [lambda ts: torch.stack(ts), lambda ts: torch.stack(ts, 1), lambda ts: torch.cat(ts, 1), lambda ts: torch.cat(ts)[2:9],
             lambda ts: torch.chunk(ts[0], 3, 1)[2], lambda ts: torch.split(ts[1], [1, 3])[1], lambda ts: ts[0].t(),
             lambda ts: torch.cat([torch.stack(ts), torch.stack(ts)], 1).narrow(0, 1, 2).narrow(1, 3, 2),
             lambda ts: torch.transpose(torch.cat(ts), 0, 1).narrow(0, 5, 1).contiguous(), lambda ts: torch.mul(ts[0], ts[1]),
             lambda ts: ts[0].reshape(2, 12), lambda ts: torch.cat(ts).narrow(0, 4, 0)]
    for case in cases:
        want, got = case(full), case([lazy(t) for t in full])
        got = got.read() if isinstance(got, replace_load.Lazy) else got
        assert torch.equal(got, want)
    read.clear()
    part = torch.empty(2, 2, 6)
    part.copy_(torch.stack([torch.cat([lazy(t), lazy(t)]) for t in full]).narrow(0, 1, 2).narrow(1, 3, 2))
    assert sum(read) == part.numel()


# ---- over ranks --------------------------------------------------------------------------------------------------


def _loads(rank, t, name, folder, more, options):
    whole = make(name, torch.float32, **more)
    want = logits(whole)
    replace_load.safe_open, Counted.read = Counted, 0
    model = on_meta(name, **more)
    told = interlace.load_pretrained_(model, folder, mesh(t), **options)
    replace_load.safe_open = safe_open
    assert len(told.report.replaced) == len(interlace.replace_(whole, mesh(t), **options).replaced), "as where the weights are there"
    interlace.restore_(whole)
    held = {id(p): p.nbytes for p in model.state_dict(keep_vars=True).values()}
    assert Counted.read == told.read <= sum(held.values()) < told.held, "a rank reads what it holds, and no more"
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    interlace.restore_(model)
    bits = model.state_dict()
    assert all(torch.equal(v, bits[n]) for n, v in whole.state_dict().items())


CASES = [("llama", {"num_key_value_heads": 1}), ("qwen2", {}), ("mixtral", {}), ("gpt2", {})]


SLICES = [(n, more, {}) for n, more in CASES] + [("llama", {}, {"sequence_parallel": True}), ("gpt_oss", {}, {}), ("deepseek_v3", {}, {}),
                                                 ("phi3", {}, {})] + [("olmoe", {}, {"sequence_parallel": True})] * STACKED


@pytest.mark.parametrize("name, more, options", SLICES, ids=[n + ("-sequence" if o else "") for n, _, o in SLICES])
def test_a_rank_reads_only_its_slices(name, more, options, tmp_path):
    make(name, torch.float32, **more).save_pretrained(tmp_path, max_shard_size="20KB")
    run(2, _loads, 2, name, tmp_path, more, options, timeout=280)


def _trains(rank, folder):
    """What is made on meta has complete gradients: q / k norms, one key head on two ranks, a tied table."""
    more = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    want = step(make("qwen3", **more), sample())
    model = on_meta("qwen3", torch.float64, **more)
    interlace.load_pretrained_(model, folder, mesh(2))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    got = step(model, sample())
    from interlace.dropin.layers import gather
    got |= {n: gather(p, p.grad, mesh(2).tp) for n, p in model.named_parameters()}
    close(got, want, 1e-6)                                            # rope's frequencies are fp32 in the one, rounded in the other


def test_gradients_of_a_model_that_was_on_meta(tmp_path):
    make("qwen3", num_key_value_heads=1, tie_word_embeddings=True).save_pretrained(tmp_path)
    run(2, _trains, tmp_path, timeout=280)


def _saves(rank, name, more, folder):
    model = make(name, torch.float32, **more)
    bits, want, keys = copy.deepcopy(model.state_dict()), logits(model), list(model.state_dict())
    interlace.replace_(model, mesh(2))
    assert list(model.state_dict()) == keys
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    if hasattr(again, "set_experts_implementation") and "experts" in "".join(keys):
        again.set_experts_implementation("eager")
    assert torch.equal(logits(again), want) and not hasattr(again, "_interlace_tp")
    assert all(torch.equal(v, bits[n]) for n, v in again.state_dict().items())
    whole = interlace.whole_state_dict(model)
    assert list(whole) == (keys if rank == 0 else [])
    assert all(torch.equal(v, bits[n]) for n, v in whole.items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(bits)                                       # whole tensors: each rank takes its part
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.load_state_dict(model.state_dict())                         # and parts
    interlace.restore_(model)
    assert "save_pretrained" not in vars(model) and not model._state_dict_hooks and not model._load_state_dict_pre_hooks
    assert not vars(model).get("_tp_size")
    assert all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("name, more", CASES, ids=[n for n, _ in CASES])
def test_a_split_model_saves_what_stock_loads(name, more, tmp_path):
    run(2, _saves, name, more, tmp_path, timeout=280)


def _stages(rank, folder):
    """Two pipeline stages: loaded from meta, saved, and cut from whole tensors."""
    whole = make("llama", torch.float32)
    want, bits = logits(whole), whole.state_dict()
    model = on_meta("llama")
    told = interlace.load_pretrained_(model, folder, Mesh.build(Layout(world=2, pp=2)))
    assert told.read < told.held and told.read == sum(p.nbytes for p in model.parameters())
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    model.save_pretrained(folder / "again")
    again = type(model).from_pretrained(folder / "again")
    assert all(torch.equal(v, bits[n]) for n, v in again.state_dict().items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(bits)
    interlace.restore_(model)
    assert all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())


def test_pipeline_stages_are_loaded_and_saved(tmp_path):
    make("llama", torch.float32).save_pretrained(tmp_path)
    run(2, _stages, tmp_path, timeout=280)


def _refuses(rank, folder):
    model = make("llama", torch.float32)
    interlace.replace_(model, Mesh.build(Layout(world=2, tp=2)))      # groups of its own: a wait in them runs out
    part = model.state_dict()
    copy.deepcopy(part)
    for of in (model, model.model.layers[0]):
        with pytest.raises(ValueError, match="a model that replace_ split must not be copied, got one; restore_ it first"):
            copy.deepcopy(of)
    with pytest.raises(ValueError, match=f"the part of rank {rank} of tp=2; call interlace.whole_state_dict"):
        torch.save(part, folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="the part of rank"):
        torch.save({"model": torch.nn.Sequential(model).state_dict()}, folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="must be gathered here"):
        model.save_pretrained(folder, state_dict=part)
    with pytest.raises(ValueError, match="assign=True"):
        model.load_state_dict(part, assign=True)
    (folder / "file").touch()
    with pytest.raises((OSError, RuntimeError)):                      # rank 0 fails, the other is told
        model.save_pretrained(folder / "file" / "below")
    replace_save.WAIT = 2
    if rank == 0:
        with pytest.raises(RuntimeError, match="every rank of tp must call it"):
            model.save_pretrained(folder / "alone")
    torch.distributed.barrier()


def test_a_part_is_never_written_as_the_whole(tmp_path):
    run(2, _refuses, tmp_path, timeout=280)
