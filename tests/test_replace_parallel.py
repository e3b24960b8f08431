"""Foreign decoders over tp, sp, ep and dp: logits, loss and every gradient of a split model against the whole one in float64."""
import pytest
import torch
from ranks import run

import interlace
from interlace.kernels.comm import all_reduce
from interlace.models.replace_layers import gather
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import gradient_axis

pytest.importorskip("transformers")
from hf import MODELS, close, make, sample, step

MOE = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
_meshes = {}


def mesh(world, tp, ep=1):
    if (world, tp, ep) not in _meshes:
        _meshes[world, tp, ep] = Mesh.build(Layout(world=world, tp=tp, ep=ep))
    return _meshes[world, tp, ep]


def batch_of(d, length=9):
    """Another one for each rank of dp."""
    batch = sample(2, length)
    return batch | {"input_ids": (batch["input_ids"] + 7 * d) % 61, "labels": (batch["labels"] + 7 * d) % 61}


def whole_gradients(model, m):
    """Summed over dp (experts: edp) and gathered."""
    out = {}
    for n, p in model.named_parameters():
        axis, scale = gradient_axis(p, m)
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        out[n] = gather(p, (all_reduce(grad, axis.group) if axis.size > 1 else grad) * scale, m.tp)
    return out


def _equal(rank, world, tp, ep, sp, name, more):
    m, length = mesh(world, tp, ep), 9                                # 18 tokens: no multiple of 4
    model = make(name, **more)
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(x) for x in model.modules()]
    each = [step(model, batch_of(d, length)) for d in range(m.dp.size)]
    want = {n: sum(e[n] if n in e else torch.zeros(()) for e in each) / m.dp.size for n in {k for e in each for k in e}}
    want |= {n: each[m.dp.rank][n] for n in ("logits", "loss")}
    want |= {n: torch.zeros_like(p) for n, p in model.named_parameters() if n not in want}   # an expert without a token
    model.zero_grad()
    report = interlace.replace_(model, m, sequence_parallel=sp)
    whole = [r.name for r in report.left if "whole on every rank" in r.why and not r.name.endswith(("embed_tokens", "lm_head"))]
    assert not whole, report
    if name in MOE and (tp > 1 or ep > 1):
        assert sum(r.sharding == "experts" for r in report.replaced) >= 1, report
        count = {"deepseek_v3": 8}.get(name, 4)
        stacks = [x.down_proj for x in model.modules() if isinstance(getattr(x, "down_proj", None), torch.nn.Parameter)]
        assert stacks and all(len(p) == count // (ep if ep > 1 else tp) for p in stacks)
    got = step(model, batch_of(m.dp.rank, length))
    close({"logits": got["logits"], "loss": got["loss"]} | whole_gradients(model, m), want)
    assert not interlace.replace_(model, m, sequence_parallel=sp).replaced
    interlace.restore_(model)
    assert [type(x) for x in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())


# world, tp, ep, sp
HANDFUL = [
    ("phi3", 2, 2, 1, False), ("gpt2", 2, 2, 1, True), ("llama", 2, 2, 1, True), ("gemma2", 2, 2, 1, True), ("olmoe", 2, 2, 1, False),
    ("qwen3_moe", 2, 2, 1, True), ("gpt_oss", 2, 2, 2, False), ("gpt_oss", 2, 2, 1, True), ("deepseek_v3", 2, 2, 1, False),
    ("deepseek_v3", 2, 2, 2, True), ("mixtral", 2, 1, 2, False), ("mixtral", 4, 4, 2, False), ("olmoe", 4, 4, 2, True),
    ("mixtral", 4, 2, 4, True),
]


@pytest.mark.parametrize("name, world, tp, ep, sp", HANDFUL, ids=[f"{n}-tp{t}-ep{e}-dp{w // t}{'-sp' if s else ''}" for n, w, t, e, s in HANDFUL])
def test_equals_stock(name, world, tp, ep, sp):
    run(world, _equal, world, tp, ep, sp, name, {})


SWEEP = [(name, max(tp, ep), tp, ep, sp) for name in MODELS for tp in (1, 2, 4) for ep in (1, 2) for sp in (False, True)
         if (ep == 1 or name in MOE) and (tp > 1 or not sp) and tp * ep > 1]
SWEEP += [(name, 4, 2, ep, sp) for name in MOE for ep in (2, 4) for sp in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize("name, world, tp, ep, sp", SWEEP, ids=[f"{n}-tp{t}-ep{e}-dp{w // t}{'-sp' if s else ''}" for n, w, t, e, s in SWEEP])
def test_sweep_equals_stock(name, world, tp, ep, sp):
    run(world, _equal, world, tp, ep, sp, name, {})
