"""The one-process model against the same formulas in plain torch, written here without any layer of ours: loss and gradients."""
import math

import pytest
import torch
import torch.nn.functional as F
from ranks import run
from test_equal import OPTIONS, config

from interlace.models.gpt import GPT, padded_vocab
from interlace.parallel.mesh import Axis, Mesh
from interlace.parallel.sharding import named_pieces


def plain(cfg, w, ids, labels):
    """w: whole tensors under global names. Returns the mean loss."""
    m, D = cfg.model, cfg.model.hidden_size
    B, S = ids.shape
    H, G, Dh = m.num_attention_heads, m.query_groups, m.head_dim
    lin = lambda x, n: F.linear(x, w[n + ".weight"], w.get(n + ".bias"))  # noqa: E731

    def norm(x, n):
        if m.normalization == "layernorm":
            return F.layer_norm(x, (D,), w[n + ".weight"], w[n + ".bias"], m.layernorm_epsilon)
        return x / (x.square().mean(-1, keepdim=True) + m.layernorm_epsilon).sqrt() * w[n + ".weight"]

    def rotate(x):                                                    # [B, S, heads, Dh], complex form of rotate-half
        angle = torch.arange(S)[:, None] * m.rotary_base ** (-torch.arange(0, Dh, 2, dtype=torch.float64) / Dh)
        z = torch.complex(x[..., :Dh // 2], x[..., Dh // 2:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([z.real, z.imag], -1)
    h = w["embed_tokens.weight"][ids]
    if m.position_embedding_type == "learned_absolute":
        h = h + w["position_embeddings"][:S]
    for i in range(m.num_layers):
        p = f"layers.{i}"
        y = norm(h, f"{p}.input_layernorm")
        q, k, v = (lin(y, f"{p}.self_attn.{n}_proj").view(B, S, -1, Dh) for n in "qkv")
        if m.position_embedding_type == "rope":
            q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(H // G, 2) for t in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k) / math.sqrt(Dh)
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        h = h + lin(torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v).flatten(2), f"{p}.self_attn.o_proj")
        y = norm(h, f"{p}.post_attention_layernorm")
        up = lin(y, f"{p}.mlp.up_proj")
        act = F.gelu(up) if m.activation == "gelu" else F.silu(lin(y, f"{p}.mlp.gate_proj")) * up
        h = h + lin(act, f"{p}.mlp.down_proj")
    head = w["embed_tokens.weight" if m.share_embeddings_and_output_weights else "lm_head.weight"]
    return F.cross_entropy((norm(h, "norm") @ head.t()).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("name", [n for n in OPTIONS if "dropout" not in n])
def test_is_the_textbook_model(name):
    cfg = config({**OPTIONS[name], "hidden_dropout": 0.0, "attention_dropout": 0.0})
    vocab = cfg.model.vocab_size
    model = GPT(cfg.model, vocab_size=vocab, seed=5, dtype=torch.float64)
    for p in model.parameters():                                      # biases and norms away from 0 and 1
        p.data += 0.05 * torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(p.numel()))
    model.embed_tokens.weight.data[vocab:] = 0
    weights = {n: piece.local(p.detach()).clone().requires_grad_() for n, piece, p in named_pieces(model)}
    ids, labels = torch.randint(vocab, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    loss, want = model(ids, labels), plain(cfg, weights, ids, labels)
    loss.backward()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    for n, piece, p in named_pieces(model):
        torch.testing.assert_close(piece.local(p.grad), weights[n].grad, rtol=1e-9, atol=1e-13, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_near(dtype, limit):
    cfg = config({})
    ids, labels = torch.randint(45, (2, 2, 8), generator=torch.Generator().manual_seed(0))
    true, low = (GPT(cfg.model, vocab_size=45, seed=5, dtype=d)(ids, labels) for d in (torch.float64, dtype))
    assert low.dtype == torch.float32
    assert abs(low.item() - true.item()) <= limit * true.item()


def test_recompute_gives_the_same_bits():
    ids, labels = torch.randint(45, (2, 2, 8), generator=torch.Generator().manual_seed(0))
    grads = []
    for granularity in (None, "full"):
        cfg = config({"recompute_granularity": granularity, "hidden_dropout": 0.3, "attention_dropout": 0.3})
        model = GPT(cfg.model, vocab_size=45, seed=5)
        model(ids, labels, first_sample=7).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_dropout_depends_on_the_sample_not_on_the_batch():
    cfg = config({"hidden_dropout": 0.4, "attention_dropout": 0.4})
    model = GPT(cfg.model, vocab_size=45, seed=5, dtype=torch.float64)
    ids, labels = torch.randint(45, (2, 4, 8), generator=torch.Generator().manual_seed(0))
    whole = model(ids, labels, first_sample=20)
    parts = [model(ids[i:i + 1], labels[i:i + 1], first_sample=20 + i) for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-12, atol=0)
    assert abs(whole - model(ids, labels, first_sample=0)) > 1e-6
    assert torch.equal(model.eval()(ids, labels, first_sample=3), model(ids, labels, first_sample=9))


def _short(rank):
    options = {"hidden_dropout": 0.5, "seq_length": 16}
    axis = Axis("tp", 2, rank, (0, 1), torch.distributed.group.WORLD)
    ids, labels = torch.randint(45, (2, 3, 8), generator=torch.Generator().manual_seed(0))
    one = GPT(config(options).model, vocab_size=45, dtype=torch.float64)
    two = GPT(config(options, tp=2, sp=True).model, Mesh(tp=axis), vocab_size=45, dtype=torch.float64)
    torch.testing.assert_close(two(ids, labels, 5), one(ids, labels, 5), rtol=1e-12, atol=0)


def test_dropout_of_short_sequences_does_not_depend_on_the_layout():
    """8 tokens of a model for 16: a rank's rows begin at token 4."""
    run(2, _short)


def test_causal():
    cfg = config({})
    model = GPT(cfg.model, vocab_size=45, seed=5, dtype=torch.float64).eval()
    ids = torch.randint(45, (1, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 45
    a, b = model.hidden(ids), model.hidden(other)
    assert torch.equal(a[:5], b[:5]) and not torch.equal(a[5:], b[5:])


def test_sizes():
    cfg = config({"position_embedding_type": "learned_absolute"})
    model = GPT(cfg.model, vocab_size=45)
    with pytest.raises(ValueError, match="at most 8 positions"):
        model.hidden(torch.zeros(1, 9, dtype=torch.long))
    assert [padded_vocab(cfg.model, 45, t) for t in (1, 2, 4)] == [48, 48, 64]


@pytest.mark.parametrize("options", [{"hidden_dropout": 0.1}, {"attention_dropout": 0.1},
                                     {"num_moe_experts": 2, "moe_input_jitter_eps": 0.1}])
def test_masks_need_to_know_the_batch(options):
    """Of a default every step had the same masks."""
    model, ids = GPT(config(options).model, vocab_size=45), torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="GPT: first_sample must be given while dropout or jitter draws"):
        model(ids, ids)
    assert model(ids, ids, 0).isfinite() and model.eval()(ids, ids).isfinite()
