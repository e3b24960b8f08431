"""Every number that `explain` prints against a real run: a model's tensors, a step's collectives, autograd's memory."""
import dataclasses
import itertools
import sys
import threading
from collections import Counter
from typing import ClassVar

import pytest
import torch
from ranks import kept, run
from torch.distributed.pipelining import PipelineStage
from torch.utils._python_dispatch import TorchDispatchMode

import interlace.parallel.data_parallel as data_parallel_module
from interlace.kernels.comm import heap_of
from interlace.models.config import Config, ModelConfig, OptimConfig, TrainerConfig
from interlace.models.explain import (
    HEAP,
    activations,
    dp_traffic,
    explain,
    human,
    memory,
    parameters,
    tp_traffic,
)
from interlace.models.gpt import GPT
from interlace.models.optimizer import Optimizer
from interlace.models.train import DTYPES, forward_backward
from interlace.models.verify import RandomTokens
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.errors import UserError
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Axis, Mesh

BASE = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "seq_length": 32,
        "vocab_size": 45, "micro_batch_size": 2, "global_batch_size": 4, "make_vocab_size_divisible_by": 8}
GPT2 = {"normalization": "layernorm", "activation": "gelu", "position_embedding_type": "learned_absolute",
        "add_bias_linear": True, "share_embeddings_and_output_weights": True}
MODELS = {
    "llama": {}, "gpt2": GPT2, "gqa": {"num_query_groups": 2}, "gpt2-gqa": {**GPT2, "num_query_groups": 2},
    "mqa-bias": {"num_query_groups": 1, "add_bias_linear": True},
    "kv-channels": {"kv_channels": 10}, "one-sample": {"micro_batch_size": 1},
    "gpt2-one-sample": {**GPT2, "micro_batch_size": 1}, "attention-dropout": {"attention_dropout": 0.1},
    "hidden-dropout": {"hidden_dropout": 0.1},
    "learned-gqa-dropout": {**GPT2, "num_query_groups": 2, "attention_dropout": 0.1},
}
mesh_of = kept(Mesh.build)


def config(options, tp=1, sp=False, recompute=False, precision="fp32"):
    model = ModelConfig(**{**BASE, **options}, tensor_model_parallel_size=tp, sequence_parallel=sp,
                        recompute_granularity="full" if recompute else None)
    return Config(model=model, optim=OptimConfig(clip_grad=0.1), trainer=TrainerConfig(precision=precision))


def build(cfg):
    m = cfg.model
    layout = Layout.from_config(cfg, m.tensor_model_parallel_size)
    mesh = mesh_of(layout)
    return GPT(m, mesh, vocab_size=m.vocab_size, dtype=DTYPES[cfg.trainer.precision]), layout, mesh


# ---- parameters -----------------------------------------------------------------------------------------------

OPTIONS = [dict(zip(("num_query_groups", "add_bias_linear", "share_embeddings_and_output_weights", "activation",
                     "position_embedding_type", "normalization"), values))
           for values in itertools.product((None, 2, 1), (False, True), (False, True), ("swiglu", "gelu"),
                                           ("rope", "learned_absolute"), ("rmsnorm", "layernorm"))]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_parameters_of_every_combination(tp):
    for options in (*OPTIONS, {"kv_channels": 6}, {"ffn_hidden_size": None}, {"vocab_size": 40}, {"vocab_size": 9}):
        cfg = config(options, tp)
        meshes = [Mesh(tp=Axis("tp", tp, r, tuple(range(tp)))) for r in (0, tp - 1)]
        for mesh in meshes:                                           # shapes alone: no group is needed
            model = GPT(cfg.model, mesh, vocab_size=cfg.model.vocab_size)
            count = sum(p.numel() for p in model.parameters())
            assert count == parameters(cfg.model, cfg.model.vocab_size, Layout(tp, tp=tp)), options


# ---- bytes on the wire ----------------------------------------------------------------------------------------


def wrapped(mine, plain):
    return lambda *args, **kwargs: mine(plain, *args, **kwargs)


class Counted(TorchDispatchMode):
    """What this rank sends in a block: {(axis, op): calls} and bytes, of the communication ops, of the collectives that the thread of
    DistributedDataParallel runs (a mode sees its own thread alone), of point-to-point messages, and of rows of tokens."""

    KINDS: ClassVar = {"all_reduce": "all-reduce", "gemm_ar": "all-reduce", "all_gather": "all-gather", "ag_gemm": "all-gather",
                       "reduce_scatter": "reduce-scatter", "gemm_rs": "reduce-scatter", "rs_residual_norm": "reduce-scatter"}

    def __init__(self, mesh):
        super().__init__()
        self.calls, self.bytes, self.undo = Counter(), Counter(), []
        self.axis = {a.group.group_name: a for a in (mesh.tp, mesh.dp, mesh.pp, mesh.ep, mesh.edp, mesh.embd) if a.group is not None}

    def by_op(self):
        return [Counter({op: n for (_, op), n in seen.items()}) for seen in (self.calls, self.bytes)]

    def __enter__(self):
        comm, data = sys.modules["interlace.kernels.comm.dispatch"], data_parallel_module
        for module, name, mine in ((comm, "_dispatch", self.dispatch), (comm, "_combine", self.combine),
                                   (PipelineStage, "get_fwd_send_ops", self.send), (PipelineStage, "get_bwd_send_ops", self.send),
                                   *((data, op, self.threaded) for op in ("all_reduce", "reduce_scatter", "all_gather"))):
            plain = getattr(module, name)
            setattr(module, name, wrapped(mine, plain))
            self.undo.append((module, name, plain))
        return super().__enter__()

    def __exit__(self, *args):
        for module, name, plain in self.undo:
            setattr(module, name, plain)
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if func.namespace == "interlace" and name in self.KINDS and args[-1]:       # args[-1]: the group's name, "" for one rank
            x = args[0]
            n = x.numel() * x.element_size()
            if name in ("gemm_ar", "gemm_rs"):                                      # of the product
                n = n // x.shape[-1] * args[1].shape[0]
            self.collective(self.KINDS[name], n, self.axis[args[-1]])
        return func(*args, **(kwargs or {}))

    def collective(self, op, n, axis):
        n *= axis.size if op == "all-gather" else 1
        self.add((axis.name, op), (axis.size - 1) / axis.size * n * (2 if op == "all-reduce" else 1))

    def threaded(self, plain, x, group, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            self.collective(self.KINDS[plain.__name__], x.numel() * x.element_size(), self.axis[group.group_name])
        return plain(x, group, **kwargs)

    def add(self, key, n):
        self.calls[key] += 1
        self.bytes[key] += n

    def send(self, plain, stage, microbatch):
        ops = plain(stage, microbatch)
        for op in ops:
            self.add(("pp", "send"), op.tensor.numel() * op.tensor.element_size())
        return ops

    def away(self, plan):
        """[ranks, tokens]: whether a token has a row on a rank; and this rank."""
        per, rank = plan.experts // plan.size, torch.distributed.get_rank(plan.group)
        on = torch.stack([((plan.ids >= 0) & (plan.ids // per == r)).any(1) for r in range(plan.size)])
        return on.view(plan.size, plan.size, -1), rank

    def dispatch(self, plain, x, plan):
        on, me = self.away(plan)                                      # [holds, of, token]
        self.add(("ep", "dispatch"), (on[:, me].sum() - on[me, me].sum()).item() * x.shape[1] * x.element_size())
        return plain(x, plan)

    def combine(self, plain, y, plan, residual=None):
        on, me = self.away(plan)
        self.add(("ep", "combine"), (on[me].sum() - on[me, me].sum()).item() * y.shape[1] * max(4, y.element_size()))
        return plain(y, plan, residual)


def _traffic(rank, cfg):
    m = cfg.model
    model, layout, mesh = build(cfg)
    optimizer = Optimizer(DistributedDataParallel(model, mesh), cfg.optim)
    model.train()
    with Counted(mesh) as seen:
        forward_backward(optimizer.ddp, RandomTokens(m.vocab_size, m.seq_length, 0), 0, m)
        optimizer.step(1e-3)
    calls, sizes = Counter(), Counter()
    for row in tp_traffic(cfg, layout):
        calls[row.op] += row.calls
        sizes[row.op] += row.bytes
    assert seen.by_op() == [calls, pytest.approx(dict(sizes), rel=1e-12)]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mqa-bias", "gpt2-gqa", "attention-dropout", "hidden-dropout"])
def test_traffic(name, tp, sp, recompute):
    run(tp, _traffic, config(MODELS[name], tp, sp, recompute))


@pytest.mark.parametrize("precision", ["bf16", "float64"])
def test_traffic_of_other_types(precision):
    run(2, _traffic, config(MODELS["gpt2-gqa"], 2, True, False, precision))
    run(4, _traffic, config(MODELS["gqa"], 4, False, False, precision))


def data_parallel(options, precision, zero1, bucket=None):
    cfg = config({**options, "global_batch_size": 24}, 1, precision=precision)
    return dataclasses.replace(cfg, optim=OptimConfig(use_distributed_optimizer=zero1, ddp_bucket_size=bucket))


def build_data_parallel(cfg, dp):
    mesh = mesh_of(Layout(dp))
    model = GPT(cfg.model, mesh, vocab_size=cfg.model.vocab_size, dtype=DTYPES[cfg.trainer.precision])
    return Optimizer(DistributedDataParallel(model, mesh, bucket_size=cfg.optim.ddp_bucket_size,
                                             use_distributed_optimizer=cfg.optim.use_distributed_optimizer), cfg.optim)


def _dp(rank, dp, precision, zero1, bucket):
    cfg = data_parallel({}, precision, zero1, bucket)
    m, optimizer = cfg.model, build_data_parallel(cfg, dp)
    with Counted(optimizer.ddp.mesh) as seen:
        forward_backward(optimizer.ddp, RandomTokens(m.vocab_size, m.seq_length, 0), 0, m)
        optimizer.step(1e-3)
    calls, sizes = Counter(), Counter()
    for row in dp_traffic(cfg, Layout(dp), m.vocab_size):
        calls[row.op] += row.calls
        sizes[row.op] += row.bytes
    assert seen.by_op() == [calls, pytest.approx(dict(sizes), rel=1e-12)]
    need, own = memory(cfg, Layout(dp), m.vocab_size), [t for own in optimizer.own.values() for t in own.values()]
    assert nbytes(list(optimizer.ddp.parameters())) == need["weights"]
    assert nbytes([f.grads for f in optimizer.ddp.grad_buffers]) == need["gradients"]
    assert nbytes(own) == need["optimizer"]
    assert 2 * heap_of(optimizer.ddp.mesh.dp.group).nbytes == HEAP == need["shared memory for collectives (CPU)"]


@pytest.mark.parametrize("dp, precision, zero1, bucket", [
    (2, "fp32", False, None), (2, "bf16", True, 5000), (4, "float64", True, None), (3, "bf16", False, 700)])
def test_traffic_and_memory_of_data_parallelism(dp, precision, zero1, bucket):
    run(dp, _dp, dp, precision, zero1, bucket)


def test_one_rank_sends_nothing():
    assert tp_traffic(config({}), Layout()) == dp_traffic(config({}), Layout(), 45) == []


# ---- memory ---------------------------------------------------------------------------------------------------


def nbytes(tensors):
    """Bytes of the storages behind `tensors`, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Saved:
    """The tensors autograd saves, parameters apart; kept alive so that no address is used twice."""

    def __init__(self, model):
        self.own, self.tensors = {p.untyped_storage().data_ptr() for p in model.parameters()}, []

    def hooks(self):
        def pack(t):
            if t.untyped_storage().data_ptr() not in self.own:
                self.tensors.append(t)
            return t
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


def _activations(rank, cfg):
    m = cfg.model
    model, layout, _ = build(cfg)
    model.train()
    ids, labels = (x.contiguous() for x in RandomTokens(m.vocab_size, m.seq_length, 0).batch(0, m.micro_batch_size))
    saved, inputs = Saved(model), []
    handle = list(model.layers.values())[-1].register_forward_pre_hook(lambda layer, args: inputs.append(args))
    with saved.hooks():
        loss = model(ids, labels, 0)
        handle.remove()
        if m.recompute_granularity == "full":                         # the layer whose backward comes first
            list(model.layers.values())[-1](*inputs[0])
    assert loss.isfinite()
    logits = memory(cfg, layout, m.vocab_size)["logits and their gradient"] // 2
    item = loss.new_empty(0, dtype=DTYPES[cfg.trainer.precision]).element_size()
    got, said = nbytes(saved.tensors) - logits, sum(activations(m, layout, item))
    assert abs(said / got - 1) < 0.02, f"explain says {said}, autograd keeps {got}: {said / got:.3f}"


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_activations(name, tp, sp, recompute):
    run(tp, _activations, config(MODELS[name], tp, sp, recompute))


@pytest.mark.parametrize("precision", ["bf16", "float64"])
@pytest.mark.parametrize("name", ["llama", "gpt2-gqa"])
def test_activations_of_other_types(name, precision):
    run(2, _activations, config(MODELS[name], 2, True, False, precision))
    run(4, _activations, config(MODELS[name], 4, False, False, precision))


def _state(rank, cfg):
    m = cfg.model
    model, layout, mesh = build(cfg)
    optimizer = Optimizer(DistributedDataParallel(model, mesh), cfg.optim)
    need = memory(cfg, layout, m.vocab_size)
    forward_backward(optimizer.ddp, RandomTokens(m.vocab_size, m.seq_length, 0), 0, m)
    params = list(model.parameters())
    assert nbytes(params) == need["weights"]
    assert nbytes([p.main_grad for p in params]) == need["gradients"] and all(p.grad is None for p in params)
    optimizer.step(1e-3)
    assert nbytes([t for own in optimizer.own.values() for t in own.values()]) == need["optimizer"]
    if layout.tp > 1:
        assert 2 * heap_of(mesh.tp.group).nbytes == HEAP == need["shared memory for collectives (CPU)"]
    ids, _ = RandomTokens(m.vocab_size, m.seq_length, 0).batch(0, m.micro_batch_size)
    logits = model.lm_head(model.hidden(ids))
    assert 2 * nbytes([logits]) == need["logits and their gradient"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "float64"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_gradients_optimizer(name, tp, precision):
    run(tp, _state, config(MODELS[name], tp, tp > 1, False, precision))


# ---- the text -------------------------------------------------------------------------------------------------


def test_text():
    text = explain(config({"num_query_groups": 2}, 2, True), 2)
    lines = text.splitlines()
    assert lines[:4] == [
        "model     3 layers, hidden 64, ffn 96, 4 heads of 16 (2 key / value), vocabulary 45 (padded to 48)",
        f"          {parameters(config({'num_query_groups': 2}).model, 45):,} parameters in fp32, "
        f"{parameters(config({'num_query_groups': 2}).model, 45, Layout(2, tp=2)):,} on each rank",
        "layout    2 ranks = tp 2 x dp 1 x pp 1, sequence parallel on",
        "step      4 samples of 32 tokens = 128 tokens, in 2 micro-batches of 2"]
    assert "    rank     tp   dp   pp   ep  edp" in lines and "    1         1    0    0    0    1" in lines
    assert "    tp    [0, 1]" in lines and "    dp    [0] [1]" in lines and "    edp   [0, 1]" in lines
    cfg, layout = config({"num_query_groups": 2}, 2, True), Layout(2, tp=2, sp=True)
    total = sum(row.bytes for row in tp_traffic(cfg, layout))
    assert f"sent by each rank in a step, over tp: {human(total)}" in lines
    for row in tp_traffic(cfg, layout):
        assert any(row.cause in x and row.op in x and x.endswith(human(row.bytes)) for x in lines), row
    need = memory(cfg, layout, 45)
    assert f"memory of each rank: {human(sum(need.values()))}" in lines
    assert all(any(what in x and x.endswith(human(size)) for x in lines) for what, size in need.items())
    assert max(map(len, lines)) <= 120 and "\x1b" not in text


def test_text_of_one_rank():
    lines = explain(config({"num_layers": 1, "micro_batch_size": 4}), 1).splitlines()
    assert lines[0].startswith("model     1 layer, ")
    assert lines[2] == "layout    1 rank = tp 1 x dp 1 x pp 1, sequence parallel off"
    assert lines[3].endswith("in 1 micro-batch of 4")
    assert "sent by each rank in a step, over tp: 0 B, for there is one rank" in lines


def test_vocabulary_of_the_tokenizer_comes_first():
    cfg = config({"vocab_size": None})
    assert "vocabulary 1,000," not in explain(cfg, 1) and "vocabulary 1,000\n" in explain(cfg, 1, vocab_size=1000)


def test_text_of_data_parallelism():
    on, off = (explain(data_parallel({}, "bf16", zero1), 4).splitlines() for zero1 in (True, False))
    need = [human(sum(memory(data_parallel({}, "bf16", zero1), Layout(4), 45).values())) for zero1 in (True, False)]
    assert f"memory of each rank: {need[0]} ({need[1]} without ZeRO-1, zero1=false)" in on
    assert f"memory of each rank: {need[1]} ({need[0]} with ZeRO-1, zero1=true)" in off
    for lines, zero1 in ((on, True), (off, False)):
        rows = dp_traffic(data_parallel({}, "bf16", zero1), Layout(4), 45)
        assert f"sent by each rank in a step, over dp: {human(sum(row.bytes for row in rows))}" in lines
        assert all(any(row.cause in x and row.op in x and x.endswith(human(row.bytes)) for x in lines) for row in rows)


def test_text_of_axes_that_are_no_word_of_the_layout():
    """edp, where experts have replicas, and embd, where a tied table is on two stages."""
    mixed = {"edp": config({"num_moe_experts": 4, "global_batch_size": 8, "expert_model_parallel_size": 2}),
             "embd": config({**GPT2, "global_batch_size": 8, "pipeline_model_parallel_size": 2})}
    for axis, cfg in mixed.items():
        lines = explain(cfg, 4).splitlines()
        assert any(x.startswith(f"sent by each rank in a step, over {axis}: ") and not x.endswith("one rank") for x in lines)
        assert "sent by each rank in a step, over tp: 0 B, for there is one rank" in lines


def test_a_wrong_layout_is_not_explained():
    with pytest.raises(UserError, match="num_attention_heads"):
        explain(config({}, 3), 3)


def test_human():
    assert [human(n) for n in (0, 8, 1023, 1024, 1536, 3 << 20, 5 << 30, 7 << 40)] == [
        "0 B", "8 B", "1,023 B", "1.0 KiB", "1.5 KiB", "3.0 MiB", "5.0 GiB", "7,168.0 GiB"]


def test_all_reduce_and_its_halves_send_the_same():
    """Sequence parallelism sends the bytes of tensor parallelism, and its inputs once more (they are not kept)."""
    rows = {sp: tp_traffic(config({}, 2, sp), Layout(2, tp=2, sp=sp)) for sp in (False, True)}
    total = {sp: sum(r.bytes for r in rows[sp] if "again" not in r.cause and "gradient" not in r.cause) for sp in rows}
    assert total[True] == total[False]
