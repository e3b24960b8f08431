"""Foreign decoders cut into pipeline stages: logits, loss and every gradient against the whole model in float64."""
import pytest
import torch
from ranks import kept, run

import interlace
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import grad_norm

pytest.importorskip("transformers")
from hf import STACKED, KeepFloat64, close, make, sample, step


def needs_tensors(*cases):
    """Layers of these return tuples before transformers 5, and are refused there."""
    marks = pytest.mark.skipif(not STACKED, reason="its layers return a tensor since transformers 5")
    return [pytest.param(*c, marks=[marks] if {"gpt2", "gemma2", "mixtral", "deepseek_v3"} & {str(x) for x in c} else []) for c in cases]


@kept
def mesh(world, tp, pp, ep=1):
    return Mesh.build(Layout(world=world, tp=tp, pp=pp, ep=ep))


def gathered(model, m):
    """Gradients from the stages that have them, over tp as well: restore_ brings both together."""
    interlace.restore_(model)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def _equal(rank, world, tp, pp, ep, sp, name, batch, more, vpp=1):
    m, model, data = mesh(world, tp, pp, ep), make(name, **more), sample(batch)
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(x) for x in model.modules()]
    want = step(model, data)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for n, g in want.items() if n not in ("logits", "loss")]))
    model.zero_grad()
    how = {"sequence_parallel": sp, "virtual_pipeline_model_parallel_size": vpp}
    report = interlace.replace_(model, m, **how)
    held = sum(p.numel() > 0 for p in model.parameters())
    assert held < len(want) - 2 and {r.sharding for r in report.replaced} >= {f"stage {i}" for i in range(pp * vpp)}
    got = step(model, data)
    torch.testing.assert_close(grad_norm(model, m), norm, rtol=1e-9, atol=0)
    assert not interlace.replace_(model, m, **how).replaced
    close({"logits": got["logits"], "loss": got["loss"]} | gathered(model, m), want)
    assert [type(x) for x in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    model.zero_grad()
    close(step(model, data), want, 1e-13)


@pytest.mark.parametrize("world, tp, pp, ep, sp, name, batch, more", needs_tensors(
    (2, 1, 2, 1, False, "llama", 3, {"num_hidden_layers": 3}), (2, 1, 2, 1, False, "gpt2", 1, {}), (2, 1, 2, 1, False, "gpt_oss", 10, {}),
    (2, 1, 2, 1, False, "gemma2", 2, {}), (4, 1, 4, 1, False, "qwen2", 5, {"num_hidden_layers": 5}), (4, 2, 2, 2, False, "mixtral", 3, {}),
    (4, 2, 2, 1, True, "deepseek_v3", 2, {"num_hidden_layers": 3}), (4, 2, 2, 1, True, "gpt2", 3, {"n_layer": 4})))
def test_equals_stock(world, tp, pp, ep, sp, name, batch, more):
    run(world, _equal, world, tp, pp, ep, sp, name, batch, more)


def _train(rank):
    """Five steps; masks of padded samples; eval without gradients; frozen embeddings."""
    m, stock, model = mesh(2, 1, 2), make("llama"), make("llama")
    for x in (stock, model):
        x.get_input_embeddings().requires_grad_(False)
    data = sample(4)
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    data["attention_mask"][1, :3] = 0
    interlace.replace_(model, m)
    losses = []
    for x in (stock, model):
        optimizer = torch.optim.AdamW(x.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            with KeepFloat64():
                loss = x(**data).loss
                loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-8, atol=1e-8)
    with torch.no_grad(), KeepFloat64():
        torch.testing.assert_close(model(**data).logits, stock(**data).logits, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="use_cache must be False"):
        model(input_ids=data["input_ids"], use_cache=True)
    with pytest.raises(ValueError, match="pipeline stages: output_hidden_states must be unset"):
        model(**data, output_hidden_states=True)
    assert interlace.verify(model, data, tolerance=1e-5).ok
    interlace.restore_(model)
    for p, q in zip(model.parameters(), stock.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_training():
    run(2, _train)


# ---- one forward, one backward -----------------------------------------------------------------------------------


def _scheduled(rank, world, tp, pp, ep, sp, name, many, schedule, more, vpp=1):
    """Twice, so that gradients add up; labels to leave out, unlike in number; how many micro-batches are alive at once."""
    from interlace.dropin import scheduled
    m, model, data, alive, most = mesh(world, tp, pp, ep), make(name, **more), sample(4), [0], [0]
    data["labels"] = data["labels"].masked_fill(torch.arange(9) > torch.tensor([[8], [2], [5], [8]]), -100)
    want = step(model, data)
    model.zero_grad()
    interlace.replace_(model, m, sequence_parallel=sp, virtual_pipeline_model_parallel_size=vpp)
    forward = scheduled._Stage.forward

    def counted(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        out.register_hook(lambda g: alive.__setitem__(0, alive[0] - 1))
        return out
    scheduled._Stage.forward = counted
    try:
        with KeepFloat64():
            losses = [interlace.pipeline_step(model, data, microbatches=many, schedule=schedule) for _ in range(2)]
    finally:
        scheduled._Stage.forward = forward
    assert vpp > 1 or most[0] == (many if schedule == "gpipe" else min(many, pp - m.pp.rank)), most
    for loss in losses:
        torch.testing.assert_close(loss, want["loss"], rtol=1e-12, atol=0)
    close({"loss": loss} | gathered(model, m), {n: v if n == "loss" else 2 * v for n, v in want.items() if n != "logits"})
    again = step(model, data)                                         # the model's own call, when it is whole again
    torch.testing.assert_close(again["loss"], want["loss"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("world, tp, pp, ep, sp, name, many, schedule, more", needs_tensors(
    (2, 1, 2, 1, False, "qwen2", 4, "1f1b", {"num_hidden_layers": 3}), (2, 1, 2, 1, False, "gpt2", 2, "gpipe", {}),
    (4, 1, 4, 1, False, "gpt_oss", 4, "1f1b", {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    (4, 2, 2, 2, False, "mixtral", 4, "1f1b", {}), (4, 2, 2, 1, True, "llama", 2, "1f1b", {})))
def test_1f1b_equals_stock(world, tp, pp, ep, sp, name, many, schedule, more):
    run(world, _scheduled, world, tp, pp, ep, sp, name, many, schedule, more)


FOUR, SLIDING = {"num_hidden_layers": 4}, {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("world, tp, sp, name, batch, more", [
    (2, 1, False, "qwen2", 3, FOUR), (2, 1, False, "gpt_oss", 4, FOUR | SLIDING), (4, 2, True, "llama", 2, {"num_hidden_layers": 5})])
def test_virtual_stages_equal_stock(world, tp, sp, name, batch, more):
    """Two stages a rank; Qwen2's table is tied, on all ranks. The model's own call, and the interleaved schedule."""
    run(world, _equal, world, tp, 2, 1, sp, name, batch, more, 2)
    run(world, _scheduled, world, tp, 2, 1, sp, name, 4, "interleaved_1f1b", more, 2)


def _scheduled_refusals(rank):
    m, model = mesh(2, 1, 2), make("llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="must be cut into stages, got LlamaForCausalLM without; call replace_"):
        interlace.pipeline_step(model, sample(4))
    interlace.replace_(model, m, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"under interleaved_1f1b, got 3"):
        interlace.pipeline_step(model, sample(3))
    with pytest.raises(ValueError, match=r"got 1; use one of \[2, 4\](.|\n)*one of interleaved_1f1b with 2 stages a rank, got '1f1b'"):
        interlace.pipeline_step(model, sample(4), microbatches=1, schedule="1f1b")
    interlace.restore_(model)
    interlace.replace_(model, m)
    with pytest.raises(ValueError, match=r"must divide the 4 samples of the batch, got 3; use one of \[1, 2, 4\]"):
        interlace.pipeline_step(model, sample(4), microbatches=3)
    with pytest.raises(ValueError, match="schedule must be one of 1f1b, gpipe with 1 stages a rank, got 'zbv'"):
        interlace.pipeline_step(model, sample(4), schedule="zbv")
    with pytest.raises(ValueError, match="batch must have 'labels', got 'input_ids'"):
        interlace.pipeline_step(model, {"input_ids": sample(4)["input_ids"]})


def test_1f1b_refusals():
    run(2, _scheduled_refusals)


def _generate(rank):
    """Refused with a cache, and what the message says works."""
    model, ids = make("llama", torch.float32), sample(2, 5)["input_ids"]
    words = lambda **more: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False,  # noqa: E731
                                          pad_token_id=0, **more)
    want = words()
    interlace.replace_(model, mesh(2, 1, 2))
    with pytest.raises(ValueError, match=r"use_cache must be False.*use_cache=False, to generate\(\) too.*or call restore_ first"):
        words()
    assert torch.equal(words(use_cache=False), want)
    interlace.restore_(model)
    assert torch.equal(words(), want)


def test_generate_over_stages():
    run(2, _generate)


def _verify(rank):
    """With a planted fault: the gradient that does not reach the stage before."""
    from interlace.dropin.pipeline import _Receive
    m, model = mesh(4, 2, 2), make("llama")
    interlace.replace_(model, m, sequence_parallel=True)
    assert interlace.verify(model, sample(3), tolerance=1e-5).ok
    right = _Receive.backward
    try:
        _Receive.backward = staticmethod(lambda ctx, dx: right(ctx, torch.zeros_like(dx)))
        assert not interlace.verify(model, sample(3), tolerance=1e-5).ok
    finally:
        _Receive.backward = right
    assert interlace.verify(model, sample(3), tolerance=1e-5).ok


def test_verify_finds_a_planted_fault():
    run(4, _verify)


def _data_parallel(rank):
    """dp around stages: each dp rank has samples of its own."""
    m, stock, model = mesh(4, 1, 2), make("llama"), make("llama")
    each = [step(stock, sample(3) | {"labels": (sample(3)["labels"] + d) % 61}) for d in range(2)]
    interlace.replace_(model, m)
    ddp = interlace.DistributedDataParallel(model, m)
    with KeepFloat64():
        ddp(**sample(3) | {"labels": (sample(3)["labels"] + m.dp.rank) % 61}).loss.backward()
    ddp.finish()
    held = 0
    for n, p in model.named_parameters():
        if p.requires_grad:
            want, held = (each[0][n] + each[1][n]) / 2, held + 1
            assert (p.main_grad - want).abs().max() <= 1e-10 * max(1e-2, want.abs().max()), n
    assert held == 3 + 9                                              # embedding, norm, head, and one layer
    ddp.zero_grad()
    for half in range(2):                                             # the same by 1F1B, in two steps of a half each
        data = {k: v[2 * half:2 * half + 2] if torch.is_tensor(v) else v for k, v in sample(4).items()}
        with KeepFloat64():
            interlace.pipeline_step(ddp, data | {"labels": (data["labels"] + m.dp.rank) % 61}, microbatches=2)
    ddp.finish()
    stock.zero_grad()
    each = []
    for d in range(2):
        for half in range(2):
            data = {k: v[2 * half:2 * half + 2] if torch.is_tensor(v) else v for k, v in sample(4).items()}
            each.append(step(stock, data | {"labels": (data["labels"] + d) % 61}))
    for n, p in model.named_parameters():
        if p.requires_grad:
            want = sum(e[n] for e in each) / 2
            assert (p.main_grad - want).abs().max() <= 1e-10 * max(1e-2, want.abs().max()), n


def test_data_parallel_around_stages():
    run(4, _data_parallel)


def test_refusals():
    two = Mesh(pp=interlace.Axis("pp", 2))
    with pytest.raises(ValueError, match=r"3 layers must be at least one for each of pp=4"):
        interlace.replace_(make("llama", num_hidden_layers=3), Mesh(pp=interlace.Axis("pp", 4)))
    with pytest.raises(ValueError, match=r"3 layers must be at least one for each of pp=2 times vpp=2 stages"):
        interlace.replace_(make("llama", num_hidden_layers=3), two, virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"virtual_pipeline_model_parallel_size needs mesh\.pp > 1"):
        interlace.replace_(make("llama"), virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="needs one list of decoder layers"):
        interlace.replace_(torch.nn.Sequential(torch.nn.Linear(2, 2)), two)
    with pytest.raises(ValueError, match="needs plan='auto'"):
        interlace.replace_(make("llama"), two, plan=None)
