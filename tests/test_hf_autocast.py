"""Hugging Face models over tp, sp and ep under torch.autocast: as near to fp32 as the stock model under it, dtypes its own."""
import copy

import pytest
import torch
from ranks import kept, run
from torch._subclasses.fake_tensor import FakeTensorMode

import interlace
from interlace.dropin.layers import gather
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

pytest.importorskip("transformers")
from hf import STACKED, make, sample, twin


@kept
def mesh(tp, ep):
    return Mesh.build(Layout(world=2, tp=tp, ep=ep))


def step(model, autocast=True):
    """{"logits", "loss", parameter: gradient}, whole."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**sample(2, 8))
    out.loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | grads


def error(got, truth):
    return {n: float((got[n].double() - t.double()).norm() / t.double().norm().clamp(min=1e-3)) for n, t in truth.items()}


def _near(rank, name, tp, ep, sp, gather_logits):
    model = make(name, torch.float32, tie_word_embeddings=False)
    exact, stock = twin(model), twin(model)
    truth, want = step(exact, False), step(stock)
    interlace.replace_(model, mesh(tp, ep), sequence_parallel=sp, gather_logits=gather_logits)
    got = step(model)
    assert got["logits"].dtype == want["logits"].dtype and got["loss"].dtype == want["loss"].dtype
    params = dict(model.named_parameters())
    assert all(got[n].dtype == p.dtype == torch.float32 for n, p in params.items())
    got |= {n: gather(p, got[n], mesh(tp, ep).tp) for n, p in params.items()}
    if not gather_logits:
        assert got["logits"].shape[-1] == -(-61 // tp)
        got["logits"] = truth["logits"]
    ours, theirs = error(got, truth), error(want, truth)
    worse = {n: (e, theirs[n]) for n, e in ours.items() if e > 2 * theirs[n] + 0.02}
    assert not worse, worse
    assert sum(ours.values()) <= 1.5 * sum(theirs.values()), (sum(ours.values()), sum(theirs.values()))


needs_stacks = pytest.mark.skipif(not STACKED, reason="experts are stacked in one module since transformers 5")


@pytest.mark.parametrize("name, tp, ep, sp, gather_logits", [
    ("llama", 2, 1, False, True), ("llama", 2, 1, True, False), ("gpt2", 2, 1, True, True), ("gpt2", 2, 1, False, True),
    ("qwen2", 2, 1, True, True), pytest.param("mixtral", 2, 2, True, True, marks=needs_stacks),
    pytest.param("gpt_oss", 2, 2, False, True, marks=needs_stacks)])
def test_as_near_as_stock(name, tp, ep, sp, gather_logits):
    run(2, _near, name, tp, ep, sp, gather_logits)


def _trainer(rank, folder):
    from test_hf_user import arguments, words
    from transformers import Trainer
    model = make("llama", torch.float32)
    losses = []
    for cls, each in ((Trainer, twin(model)), (interlace.hf.Trainer, model)):
        if each is model:
            interlace.replace_(model, mesh(2, 1), sequence_parallel=True)
        trainer = cls(model=each, args=arguments(folder / f"{cls.__module__}{rank}", bf16=True), train_dataset=words())
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
    assert len(losses[1]) == 5
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0.02, atol=0.02)


def test_trainer_with_bf16(tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    run(2, _trainer, tmp_path)


class OwnRMSNorm(torch.nn.Module):
    """As transformers write theirs."""

    def __init__(self, D):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(D)), 1e-6

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def test_a_models_own_norm_keeps_its_dtype_on_cuda():
    """There autocast has torch's layer_norm return fp32, and every product after it would cast: not a norm that casts back itself."""
    stock = torch.nn.Sequential(OwnRMSNorm(256), torch.nn.LayerNorm(256)).bfloat16()
    ours = copy.deepcopy(stock)
    assert len(interlace.replace_(ours).replaced) == 2
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 256, dtype=torch.bfloat16, device="cuda")
        for layer in (*stock, *ours):
            for name in layer._parameters:
                layer._parameters[name] = torch.nn.Parameter(torch.empty(256, dtype=x.dtype, device="cuda"))
        torch.set_autocast_enabled("cuda", True)                      # torch.autocast turns itself off where there is no GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            got = [layer(x).dtype for layer in (*stock, *ours)]
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert got == [torch.bfloat16, torch.float32] * 2
