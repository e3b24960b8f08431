"""Runs that break off and go on: in any other layout, in the same to the bit, after damage, full disks, SIGKILL; saving beside steps."""
import json
import os
import signal
import threading

import pytest
import torch
from ranks import kept, run
from safetensors.torch import load_file, save_file
from test_equal import BASE
from test_mix import MOE, STYLES

from interlace import cli
from interlace.models import checkpoint
from interlace.models.config import Config, ModelConfig, OptimConfig, SchedConfig, load_config
from interlace.models.gpt import GPT
from interlace.models.optimizer import Optimizer
from interlace.models.train import Run, forward_backward, train
from interlace.models.verify import RandomTokens
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.errors import RunError, UserError
from interlace.parallel.expert_parallel import take_statistics, update_expert_biases
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import Piece, named_pieces

MODELS = {
    "gpt2 tied": {**STYLES["gpt2"], "share_embeddings_and_output_weights": True, "hidden_dropout": 0.1},
    "gqa": STYLES["gqa"],
    "biased experts": {**MOE["sigmoid"], "share_embeddings_and_output_weights": True},
    "every second": {**MOE["every second"], "recompute_granularity": "full"},
}


def layout(tp=1, pp=1, ep=1, sp=False, zero1=False, schedule=None, dp=1):
    return {"tp": tp, "pp": pp, "ep": ep, "sp": sp, "zero1": zero1, "schedule": schedule, "dp": dp}


ONE, DP2Z, TP2SP = layout(), layout(dp=2, zero1=True), layout(tp=2, sp=True)
PP2, PP2GPIPE, ZBV = layout(pp=2), layout(pp=2, schedule="gpipe", dp=2), layout(pp=2, schedule="zbv_zero_bubble")
INTERLEAVED, IZB = layout(pp=2, schedule="interleaved_1f1b", tp=2, sp=True), layout(
    pp=2, schedule="interleaved_zero_bubble", dp=2, zero1=True)
EP2Z, EP4, TP2EP2, PP2EP2Z = layout(dp=2, ep=2, zero1=True), layout(tp=2, dp=2, ep=4, sp=True), layout(tp=2, ep=2), layout(
    pp=2, dp=2, ep=2, zero1=True)
PP4, ZBVEP2 = layout(pp=4), layout(pp=2, tp=2, ep=2, sp=True, schedule="zbv_zero_bubble")
PAIRS = [
    ("gpt2 tied", PP2, DP2Z), ("gpt2 tied", INTERLEAVED, ONE), ("gpt2 tied", DP2Z, ZBV), ("gpt2 tied", IZB, PP4), ("gqa", TP2SP, IZB),
    ("gqa", PP4, INTERLEAVED), ("biased experts", EP2Z, PP2EP2Z), ("biased experts", PP2EP2Z, TP2EP2), ("biased experts", ZBVEP2, ONE),
    ("biased experts", ONE, EP4), ("biased experts", EP4, ZBV), ("every second", PP2GPIPE, EP2Z), ("every second", TP2EP2, PP2EP2Z),
    ("every second", INTERLEAVED, EP4)]


def ranks_of(o):
    return o["tp"] * o["pp"] * o["dp"]


def title(value):
    return value.replace(" ", "-") if isinstance(value, str) else "-".join(
        f"{k}{v}" if v is not True else k for k, v in value.items() if v not in (1, False, None)) or "one"


def config(name, o):
    chunks = 2 if o["schedule"] not in (None, "gpipe") else None
    return Config(model=ModelConfig(**{
        **BASE, **MODELS[name], "num_layers": 5, "micro_batch_size": 1, "global_batch_size": 4, "tensor_model_parallel_size": o["tp"],
        "pipeline_model_parallel_size": o["pp"], "expert_model_parallel_size": o["ep"], "sequence_parallel": o["sp"],
        "virtual_pipeline_model_parallel_size": chunks, "pipeline_parallel_schedule": o["schedule"]}), optim=OptimConfig(
        lr=0.01, min_lr=0.001, clip_grad=0.1, sched=SchedConfig(warmup_steps=2), use_distributed_optimizer=o["zero1"],
        ddp_bucket_size=3000))


mesh_of = kept(Mesh.build)


def built(name, o, strange=False):
    """strange: other weights, to be overwritten (the seed is dropout's too)."""
    cfg = config(name, o)
    mesh = mesh_of(Layout.from_config(cfg, ranks_of(o)))
    model = GPT(cfg.model, mesh, vocab_size=cfg.model.vocab_size, seed=1, dtype=torch.float64)
    if strange:
        for p in model.parameters():
            torch.nn.init.constant_(p, 0.5)
    return cfg, Optimizer(DistributedDataParallel(model, mesh, bucket_size=3000, use_distributed_optimizer=o["zero1"]), cfg.optim)


def steps(cfg, opt, first, last):
    data, losses = RandomTokens(cfg.model.vocab_size, cfg.model.seq_length, 9), []
    for s in range(first, last):
        losses.append(forward_backward(opt.ddp, data, 4 * s, cfg.model).item())
        opt.step(0.01)
        update_expert_biases(opt.ddp.module, take_statistics(opt.ddp.module, opt.ddp.mesh), 1e-3)
    return losses


def holds(opt):
    """(name, tensor) of this rank's weights, moments and biases, without padding."""
    model, kinds = opt.ddp.module, {kind: dict(opt.state(kind)) for kind in opt.kinds()}
    for n, piece, p in named_pieces(model):
        yield n, piece.local(p)
        yield from ((f"{kind}.{n}", piece.local(found[p])) for kind, found in kinds.items())
    yield from ((n, t) for n, t in model.state_dict().items() if n.endswith("expert_bias"))


def _save(rank, out, name, o):
    cfg, opt = built(name, o)
    losses = steps(cfg, opt, 0, 2)
    checkpoint.save(out, cfg, opt, step=2, samples=8, vocab_size=45)
    losses += steps(cfg, opt, 2, 4)
    checkpoint.save(out / "end", cfg, opt, step=4, samples=16, vocab_size=45)
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(losses))


def _go_on(rank, out, name, o):
    cfg, opt = built(name, o, strange=True)
    state = checkpoint.resume(out, cfg, opt.ddp.module, 45, opt)
    assert (state["step"], state["samples"]) == (2, 8)
    want = json.loads((out / "losses.json").read_text())[2:]
    for got, w in zip(steps(cfg, opt, 2, 4), want, strict=True):
        assert abs(got - w) <= 1e-10 * abs(w), f"training goes on differently: {got} for {w}"
    _, end = built(name, o, strange=True)                                   # weights, moments and biases after the last step, too
    checkpoint.resume(out / "end", cfg, end.ddp.module, 45, end)
    mine, theirs = (dict(holds(x)) for x in (opt, end))
    for n, t in mine.items():
        torch.testing.assert_close(t, theirs[n], rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}")
    if "biased" in name and opt.ddp.mesh.pp.size == 1:
        assert any(t.abs().max() > 0 for n, t in opt.ddp.module.state_dict().items() if n.endswith("expert_bias"))


@pytest.mark.parametrize("name, save, load", PAIRS, ids=title)
def test_any_layout_goes_on_from_any_other(name, save, load, tmp_path):
    run(ranks_of(save), _save, tmp_path, name, save)
    run(ranks_of(load), _go_on, tmp_path, name, load)


def test_the_pairs_cover():
    used = [o for _, *pair in PAIRS for o in pair]
    assert len(PAIRS) >= 12 and all(ranks_of(o) <= 4 for o in used) and all(a != b for _, a, b in PAIRS)
    assert {o["schedule"] for o in used if o["pp"] > 1} == {None, "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"}
    for axis in ("tp", "pp", "ep", "dp", "sp", "zero1"):              # each is gained, and lost
        assert {(a[axis] > b[axis]) - (a[axis] < b[axis]) for _, a, b in PAIRS} == {-1, 0, 1}, axis


def test_pieces_of_every_kind_are_read(tmp_path):
    """A piece of the third dim, of one expert of a stack, of nothing, and a scalar."""
    t = {"a": torch.randn(4, 3, 6), "e": torch.randn(5, 2), "s": torch.tensor(3.0), "b": torch.randn(2, 8)}
    save_file(t, tmp_path / "model.safetensors")
    digest = {"model.safetensors": ""}
    with checkpoint.open_files(tmp_path, "model", {"sha256": digest}) as f:
        for name, piece, shape in (
                ("a", Piece("", (4, 3, 6), 2, 2, 3, 1), (4, 3, 5)), ("a", Piece("", (4, 3, 6), 1, 1, 2, 0), (4, 2, 6)),
                ("e", Piece("", (5, 2), 0, 0, 5, 3, expert=1), (2, 8, 2)), ("e", Piece("", (5, 2), 1, 1, 1, 0, expert=2), (3, 5, 1)),
                ("s", Piece("", (), 0, 0, 1), ()), ("b", Piece("", (2, 8), 1, 4, 4, 0), (2, 4)),
                ("b", Piece("", (2, 8), 0, 2, 0, 0), (1, 8))):
            local = torch.full(shape, 7.0)
            checkpoint._read(f, "", [(name, piece)], local)
            assert torch.equal(piece.local(local), piece.of(t[name])), name
            assert (local == 7).sum() == local.numel() - piece.local(local).numel(), "only its place is written"
        with pytest.raises(checkpoint.Damaged, match=r"must hold a as \[4, 3, 7\], got \[4, 3, 6\]"):
            checkpoint._read(f, "", [("a", Piece("", (4, 3, 7), 2, 0, 7))], torch.zeros(4, 3, 7))
        with pytest.raises(checkpoint.Damaged, match="must hold the tensor c, got files without it"):
            checkpoint._read(f, "", [("c", Piece("", (4,), 0, 0, 4))], torch.zeros(4))


# ---- damage ---------------------------------------------------------------------------------------------------


def _stage_file_damaged(rank, out, harm):
    cfg, opt = built("biased experts", PP2)
    for step in (1, 2):
        steps(cfg, opt, step, step + 1)
        checkpoint.save(out, cfg, opt, step=step, samples=4 * step, vocab_size=45)
    folder, group = out / "checkpoints" / "step-00000002", opt.ddp.mesh.pp.group
    path = folder / "model-00002-of-00002.safetensors"
    torch.distributed.barrier(group)
    if rank == 0:
        if harm == "flip":
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)
        elif harm == "remove":
            path.unlink()
        else:                                                         # also its mention, as if that stage had never been
            state = json.loads((folder / "state.json").read_text())
            if harm == "forget":
                del state["sha256"][path.name]
            else:
                state["sha256"] = {harm: "", **state["sha256"]}
            (folder / "state.json").write_text(json.dumps(state))
    torch.distributed.barrier(group)
    said = []
    state = checkpoint.resume(out, cfg, opt.ddp.module, 45, opt, said.append)
    torch.distributed.barrier(group)
    wanted = {"forget": "must name all parts of model", "../../x.safetensors": "got '../../x.safetensors'", "model.pkl": "got 'model.pkl'"}
    assert state["step"] == 1 and len(said) == 1                      # on both ranks
    assert "step-00000002" in said[0] and wanted.get(harm, "model-00002-of-00002.safetensors is missing or damaged") in said[0], said


@pytest.mark.parametrize("harm", ["flip", "remove", "forget", "../../x.safetensors", "model.pkl"])
def test_a_damaged_stage_file_is_passed_over(harm, tmp_path):
    run(2, _stage_file_damaged, tmp_path, harm)


def _one_stage_cannot_write(rank, out, zero1):
    o = layout(pp=2, dp=2, zero1=True)
    cfg, opt = built("gqa", o)
    checkpoint.save(out, cfg, opt, step=1, samples=4, vocab_size=45)
    mesh, writes = opt.ddp.mesh, opt.ddp.mesh.dp.rank == 0
    real = checkpoint.save_file
    if mesh.pp.rank == 1:
        def full(*args):
            raise OSError(28, "No space left on device")
        checkpoint.save_file = full
    try:
        saver = checkpoint.Saver(out, cfg, opt, 45)
        saver.start(2, 8)
        said = ""
        try:
            saver.wait()
        except OSError as e:
            said = str(e)
        assert ("No space left" if mesh.pp.rank == 1 else "another pipeline stage") in said if writes else said == "", said
    finally:
        checkpoint.save_file = real
    torch.distributed.barrier()
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step-00000001", "latest"}
    assert checkpoint.find(out).name == "step-00000001"
    torch.distributed.barrier()
    saver.start(3, 12)                                                # and the next one works
    saver.wait()
    torch.distributed.barrier()
    assert checkpoint.find(out).name == "step-00000003"


def test_one_stage_cannot_write(tmp_path):
    run(4, _one_stage_cannot_write, tmp_path, True)


TINY = ["model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=32", "model.micro_batch_size=1",
        "model.global_batch_size=4", "optim.sched.warmup_steps=2", "optim.lr=0.01", "trainer.save_every_n_steps=2"]


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(400)))
    return [*TINY, f"data.paths=[{path}]"]


def _train(rank, words, out):
    assert train(load_config(None, words), out) == 0


def _killed(rank, words, out, where):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    run = Run(load_config(None, words), out)
    setattr(checkpoint, where, die)
    run.train()


@pytest.mark.parametrize("where", ["save_file", "publish", "_point"])
def test_sigkill_in_a_save(words, tmp_path, where):
    """Before a file, between the files and the rename, and between the rename and `latest`."""
    out = tmp_path / "run"
    run(1, _train, [*words, "trainer.max_steps=2"], out)
    with pytest.raises(AssertionError, match="exit code -9"):
        run(1, _killed, [*words, "trainer.max_steps=4"], out, where)
    left = {p.name for p in (out / "checkpoints").iterdir()}
    assert left >= {"latest", "step-00000002"} and (where == "_point" or ".writing-step-00000004" in left)
    assert checkpoint.find(out).name == "step-00000002"
    _train(0, [*words, "trainer.max_steps=4"], out)
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"latest", "step-00000002", "step-00000004"}
    assert [json.loads(r)["step"] for r in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("mix", [
    ["tp=2", "pp=2", "sp=true", "model.share_embeddings_and_output_weights=true"],
    ["pp=2", "ep=2", "zero1=true", "model.num_moe_experts=4", "model.moe_router_score_function=sigmoid",
     "model.moe_router_enable_expert_bias=true", "trainer.precision=bf16"]], ids=["tp-pp-sp", "pp-ep-zero1-bf16"])
def test_the_same_layout_goes_on_to_the_bit(words, tmp_path, mix):
    common = [*words, *mix, "model.hidden_dropout=0.1", "optim.sched.decay_steps=5"]
    run(4, _train, [*common, "trainer.max_steps=5"], tmp_path / "whole")
    run(4, _train, [*common, "trainer.max_steps=3", "trainer.async_save=false"], tmp_path / "two")
    run(4, _train, [*common, "trainer.max_steps=5"], tmp_path / "two")
    rows = [[(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, (tmp_path / n / "metrics.jsonl").read_text().splitlines())]
            for n in ("whole", "two")]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    files = [{p.name: p.read_bytes() for p in checkpoint.find(tmp_path / n).glob("*.safetensors")} for n in ("whole", "two")]
    assert files[0] == files[1] and len(files[0]) == 4


def test_as_a_user(words, tmp_path):
    """Four ranks, then two in another layout, then one that samples and one folder for transformers."""
    out = str(tmp_path / "run")
    experts = ["model.num_moe_experts=4", "trainer.log_every_n_steps=1"]
    assert cli.main(["train", "--nproc", "4", "--out", out, *words, *experts, "tp=2", "pp=2", "trainer.max_steps=3"]) == 0
    assert cli.main(["train", "--nproc", "2", "--out", out, *words, *experts, "ep=2", "zero1=true", "trainer.max_steps=5"]) == 0
    assert [json.loads(r)["step"] for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert cli.main(["generate", "--out", out, "--prompt", "line", "--tokens", "5"]) == 0
    assert cli.main(["convert", "--out", out, "--to-hf", str(tmp_path / "hf")]) == 0
    assert len(load_file(tmp_path / "hf" / "model.safetensors")) == 2 + 1 + 2 * (2 + 4 + 1 + 3 * 4)


# ---- beside the steps -----------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes wait for the event."""
    go, real = threading.Event(), checkpoint.save_file

    def slow(*args):
        assert go.wait(60)
        real(*args)
    monkeypatch.setattr(checkpoint, "save_file", slow)
    return go


def test_a_checkpoint_is_of_its_step(tmp_path, slow_disk):
    """The steps that run while it is written change nothing in it, and `latest` waits for it."""
    cfg, opt = built("biased experts", ONE)
    steps(cfg, opt, 0, 2)
    want = {n: piece.local(p).clone() for n, piece, p in named_pieces(opt.ddp.module)}
    moments, biases = [t.clone() for _, t in opt.state("exp_avg")], {
        n: t.clone() for n, t in opt.ddp.module.state_dict().items() if n.endswith("expert_bias")}
    saver = checkpoint.Saver(tmp_path, cfg, opt, 45)
    saver.start(2, 8)
    steps(cfg, opt, 2, 4)
    saver.poll()
    assert saver.write is not None and checkpoint.find(tmp_path) is None
    slow_disk.set()
    saver.start(4, 16)                                                # waits for the first
    assert checkpoint.find(tmp_path).name == "step-00000002"
    saver.wait()
    assert checkpoint.find(tmp_path).name == "step-00000004" and saver.write is None
    _, other = built("biased experts", ONE, strange=True)
    checkpoint.load(tmp_path / "checkpoints" / "step-00000002", cfg, other.ddp.module, 45, other)
    assert all(torch.equal(piece.local(p), want[n]) for n, piece, p in named_pieces(other.ddp.module))
    assert all(torch.equal(a, t) for a, (_, t) in zip(moments, other.state("exp_avg")))
    assert all(torch.equal(t, biases[n]) for n, t in other.ddp.module.state_dict().items() if n in biases) and biases


def test_a_refused_write_stops_the_run_in_words(words, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    _train(0, [*words, "trainer.max_steps=2"], tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"step 4: the checkpoint could not be written .*No space left on device; earlier"):
        _train(0, [*words, "trainer.max_steps=50", "trainer.save_every_n_steps=4"], tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "latest"}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 50


@pytest.mark.parametrize("stop", [RunError("loss"), KeyboardInterrupt()], ids=["nan", "Ctrl-C"])
def test_what_was_begun_is_finished(words, tmp_path, slow_disk, stop):
    """A run that stops while it writes keeps that checkpoint."""
    run = Run(load_config(None, [*words, "trainer.max_steps=6"]), tmp_path)
    real = run.train_step

    def step():
        if run.step == 2:
            slow_disk.set()
            raise stop
        return real()
    run.train_step = step
    with pytest.raises(type(stop)):
        run.train()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step-00000002", "latest"}


def test_latest_may_name_nothing(tmp_path):
    cfg, opt = built("gqa", ONE)
    checkpoint.save(tmp_path, cfg, opt, step=1, samples=4, vocab_size=45)
    pointer, said = tmp_path / "checkpoints" / "latest", []
    for name in (b"../../etc", b"step-00000009", b"", b"\xff\xfe", None):   # None: a kill before the first one was pointed to
        pointer.write_bytes(name) if name is not None else pointer.unlink()
        assert checkpoint.resume(tmp_path, cfg, opt.ddp.module, 45, opt, said.append)["step"] == 1
    pointer.write_text("step-00000009")
    assert len(said) == 5 and "names '../../etc', which is not there" in said[0]
    (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"there is no step-\.\.\. beside it"):
        checkpoint.resume(tmp_path, cfg, opt.ddp.module, 45, opt)
