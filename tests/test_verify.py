"""verify must find what it exists to find: one planted fault a test, each in a layout that hides it from world size 1."""
import contextlib
import dataclasses
import io
import re

import pytest
from ranks import run
from test_equal import config, mesh_of

from interlace.models.gpt import GPT
from interlace.models.verify import TOLERANCE, compare, report, suspect, verify
from interlace.parallel.collectives import reduce_from
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.mesh import Axis


def _no_norm_reduction(model):
    """Norm gradients under SP stay partial."""
    for p in model.parameters():
        p.pieces = tuple(type(q)(*[getattr(q, f) for f in ("name", "shape", "dim", "start", "length", "at", "copies")]) for q in p.pieces)


def _clip_counts_copies(model):
    """Replicated parameters count once per rank in the clip norm."""
    for p in model.parameters():
        p.pieces = tuple(type(q)(q.name, q.shape, q.dim, q.start, q.length, q.at, 1, False) for q in p.pieces)


def _bias_on_every_rank(model):
    """The row bias is added before the sum over ranks."""
    proj = model.layers["0"].mlp.down_proj
    proj.forward = lambda x: reduce_from(x @ proj.weight.t() + proj.bias, proj.tp)


def _missing_sum(model):
    """The row product is not summed at all."""
    proj = model.layers["0"].self_attn.o_proj
    proj.forward = lambda x: x @ proj.weight.t()


def _rank_seed(model):
    """Dropout masks differ between ranks."""
    model.dropout.seed += model.tp.rank


def _same_mask(model):
    """Dropout under SP takes the local position: every rank drops the same rows."""
    drop = model.layers["0"].mlp_dropout
    drop.forward = lambda x, base, strides: type(drop).forward(drop, x, 0, strides)


def _pad_in_softmax(model):
    """Vocabulary padding takes part in the softmax."""
    model.vocab_size = model.embed_tokens.weight.shape[0] * model.tp.size


FAULTS = {
    "norm gradients not reduced": (_no_norm_reduction, {}, True, "gradient"),
    "clip norm counts copies": (_clip_counts_copies, {}, False, "gradient norm"),
    "bias added twice": (_bias_on_every_rank, {"add_bias_linear": True}, False, "loss"),
    "sum missing": (_missing_sum, {}, False, "loss"),
    "dropout seeded by rank": (_rank_seed, {"hidden_dropout": 0.3}, True, "loss"),
    "dropout by local place": (_same_mask, {"hidden_dropout": 0.3}, True, "loss"),
    "padding in the softmax": (_pad_in_softmax, {"vocab_size": 45}, False, "loss"),
    "replicated key heads not summed": (_no_norm_reduction, {"num_query_groups": 1, "normalization": "rmsnorm"}, False, "gradient"),
}


def _finds(rank, name):
    plant, options, sp, what = FAULTS[name]
    cfg = config(options, 2, sp)
    if name == "bias added twice":                                    # a zero bias hides it
        plant_ = plant
        def plant(model):
            model.layers["0"].mlp.down_proj.bias.data.fill_(0.1)
            plant_(model)
    found = compare(cfg, mesh_of(cfg, 2), vocab_size=cfg.model.vocab_size, steps=2, plant=plant)
    assert any(f.what == what and f.error > 1e3 * TOLERANCE for f in found), f"{name} went unseen"


@pytest.mark.parametrize("name", FAULTS)
def test_finds_planted_fault(name):
    run(2, _finds, name)


def _names_the_missing_sum(rank):
    cfg = config({}, 2, True)
    found = compare(cfg, mesh_of(cfg, 2), vocab_size=45, steps=1, plant=_no_norm_reduction)
    bad = [f for f in found if not f.error <= TOLERANCE]
    assert {f.name for f in bad if f.what == "gradient"} == {n for n, _ in GPT(cfg.model, vocab_size=45).named_parameters() if "norm" in n}
    text = io.StringIO()
    from interlace.parallel.layout import Layout
    report(found, bad, Layout(2, 2, sp=True), 1, text)
    assert "FAILED" in text.getvalue() and "input_layernorm" in text.getvalue()


def test_names_what_is_off():
    run(2, _names_the_missing_sum)


def test_a_config_that_diverges_alone_is_not_the_layouts_fault(capsys):
    cfg = config({}, 1, False)
    assert verify(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=1e200)), steps=2) == 1
    text = capsys.readouterr().out
    assert "OFF gradient norm step 2: error nan not finite in one process either; use a lower optim.lr" in text
    assert re.search(r"gradient norm +step 2  \(of 2\) +nan", text), text


class Never(DistributedDataParallel):
    """The second bucket is never reduced."""

    def _reduce(self, bucket):
        if bucket is not self.buckets[1]:
            super()._reduce(bucket)


class Twice(DistributedDataParallel):
    """Every bucket is reduced twice: 1/dp of dp sums."""

    def _reduce(self, bucket):
        super()._reduce(bucket)
        super()._reduce(bucket)


class Summed(DistributedDataParallel):
    """The sum over dp is not divided by it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for buffer in self.grad_buffers:
            buffer.scale = 1.0


class Early(DistributedDataParallel):
    """Reduced before the last micro-batch, whose gradients stay this rank's own."""
    now = False

    def _reduce(self, bucket):
        if self.now:
            super()._reduce(bucket)

    @contextlib.contextmanager
    def no_sync(self):
        with super().no_sync():
            yield
        self.now = True
        for bucket in self.buckets:
            self._reduce(bucket)
        self.worker.wait()
        self.now = False


class Stale(DistributedDataParallel):
    """ZeRO-1: the weights of the other ranks' parts are not gathered after the step."""

    def gather_weights(self):
        pass


class CountedByAll(DistributedDataParallel):
    """The clip norm counts what all ranks of dp hold once for each."""

    def finish(self):
        super().finish()
        self.sharded = True


DATA_FAULTS = {                                                       # class, ZeRO-1, the quantity that is off, the cause in words
    "a bucket never reduced": (Never, False, "gradient", "sum over dp missing"),
    "a bucket never scattered": (Never, True, "gradient", ""),
    "reduced twice": (Twice, False, "gradient", "2 times too large: summed over dp twice"),
    "not scaled": (Summed, False, "gradient", "2 times too large"),
    "not scaled, zero1": (Summed, True, "gradient", "2 times too large"),
    "reduced before the last micro-batch": (Early, False, "gradient", ""),
    "weights not gathered": (Stale, True, "loss", ""),
    "clip norm counted twice": (CountedByAll, False, "gradient norm", ""),
}


def _finds_in_data(rank, name):
    wrap, zero1, what, words = DATA_FAULTS[name]
    cfg = config({"global_batch_size": 8}, clip_grad=1e-3, use_distributed_optimizer=zero1)
    found = compare(cfg, mesh_of(cfg, 2), vocab_size=45, steps=2, wrap=wrap)
    bad = [f for f in found if not f.error <= TOLERANCE]
    assert any(f.what == what and f.error > 1e3 * TOLERANCE for f in bad), f"{name} went unseen"
    gradients = [f for f in bad if f.what == "gradient"]
    causes = {f.cause for f in gradients} - {""}                      # a parameter that only reaches into the bucket has no one factor
    assert all(words in cause for cause in causes) and (causes or not words), causes
    if name == "a bucket never reduced":                              # and nothing else is
        assert {f.name for f in gradients} < {f.name for f in found if f.what == "gradient"}


@pytest.mark.parametrize("name", DATA_FAULTS)
def test_finds_planted_fault_of_data_parallelism(name):
    run(2, _finds_in_data, name)


def _names_the_axis(rank):
    """tp and dp of one size: only the axis along which ranks differ tells which sum is missing."""
    class NeverAny(DistributedDataParallel):
        def _reduce(self, bucket):
            pass
    cfg = config({}, 2, True)
    for wrap, plant, axis in ((NeverAny, lambda model: None, "dp"), (DistributedDataParallel, _no_norm_reduction, "tp")):
        found = compare(cfg, mesh_of(cfg, 4), vocab_size=45, steps=1, plant=plant, wrap=wrap)
        causes = {f.cause for f in found if f.what == "gradient" and f.error > TOLERANCE}
        assert causes == {f"sum over {axis} missing?"}, causes


def test_names_the_axis_whose_sum_is_missing():
    run(4, _names_the_axis)


def test_suspect():
    axes = [Axis("tp", 2), Axis("dp", 4)]
    assert "sum over tp missing" in suspect(0.5, axes) and "dp" not in suspect(0.5, axes)
    assert "4 times too large: summed over dp twice" in suspect(4.0, axes)
    assert "tp or dp" in suspect(2.0, [Axis("tp", 2), Axis("dp", 2)])
    assert suspect(1.3, axes) == suspect(1.0, axes) == suspect(0.0, axes) == ""
