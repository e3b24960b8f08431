"""Foreign decoders cut into pipeline stages: logits, loss and every gradient against the whole model in float64."""
import pytest
import torch
from ranks import kept, run

import interlace
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import grad_norm

pytest.importorskip("transformers")
from hf import KeepFloat64, close, make, sample, step


@kept
def mesh(world, tp, pp, ep=1):
    return Mesh.build(Layout(world=world, tp=tp, pp=pp, ep=ep))


def gathered(model, m):
    """Gradients from the stages that have them, over tp as well: restore_ brings both together."""
    interlace.restore_(model)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def _equal(rank, world, tp, pp, ep, sp, name, batch, more):
    m, model, data = mesh(world, tp, pp, ep), make(name, **more), sample(batch)
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(x) for x in model.modules()]
    want = step(model, data)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for n, g in want.items() if n not in ("logits", "loss")]))
    model.zero_grad()
    report = interlace.replace_(model, m, sequence_parallel=sp)
    held = sum(p.numel() > 0 for p in model.parameters())
    assert held < len(want) - 2 and {r.sharding for r in report.replaced} >= {f"stage {i}" for i in range(pp)}
    got = step(model, data)
    torch.testing.assert_close(grad_norm(model, m), norm, rtol=1e-9, atol=0)
    assert not interlace.replace_(model, m, sequence_parallel=sp).replaced
    close({"logits": got["logits"], "loss": got["loss"]} | gathered(model, m), want)
    assert [type(x) for x in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    model.zero_grad()
    close(step(model, data), want, 1e-13)


@pytest.mark.parametrize("world, tp, pp, ep, sp, name, batch, more", [
    (2, 1, 2, 1, False, "llama", 3, {"num_hidden_layers": 3}), (2, 1, 2, 1, False, "gpt2", 1, {}), (2, 1, 2, 1, False, "gpt_oss", 10, {}),
    (2, 1, 2, 1, False, "gemma2", 2, {}), (4, 1, 4, 1, False, "qwen2", 5, {"num_hidden_layers": 5}), (4, 2, 2, 2, False, "mixtral", 3, {}),
    (4, 2, 2, 1, True, "deepseek_v3", 2, {"num_hidden_layers": 3}), (4, 2, 2, 1, True, "gpt2", 3, {"n_layer": 4})])
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


def test_data_parallel_around_stages():
    run(4, _data_parallel)


def test_refusals():
    two = Mesh(pp=interlace.Axis("pp", 2))
    with pytest.raises(ValueError, match=r"3 layers must be at least one for each of pp=4"):
        interlace.replace_(make("llama", num_hidden_layers=3), Mesh(pp=interlace.Axis("pp", 4)))
    with pytest.raises(ValueError, match="needs one list of decoder layers"):
        interlace.replace_(torch.nn.Sequential(torch.nn.Linear(2, 2)), two)
    with pytest.raises(ValueError, match="needs plan='auto'"):
        interlace.replace_(make("llama"), two, plan=None)
