"""Drop-in over real ranks: outputs and every gradient of split models against the whole one in float64, and the way back."""
import pytest
import torch
from ranks import kept, run
from torch import nn

import interlace
from interlace.dropin.layers import gather
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh
from interlace.parallel.sharding import grad_norm
from interlace.parallel.tensor_parallel import ColumnParallelLinear, GatheredLinear, RowParallelLinear, VocabParallelEmbedding


@kept
def mesh(t):
    return Mesh.build(Layout(world=t, tp=t))


class Block(nn.Module):
    def __init__(self, D, F):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Plain(nn.Module):
    """13 words do not divide over 2 ranks; the head is tied."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(Block(8, 12) for _ in range(2))
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.embed(ids)
        for b in self.blocks:
            h = b(h)
        return self.head(h)


PLAN = {"blocks.*.fc1": "column", "blocks.*.fc2": "row", "embed": "vocab", "head": "gather"}


def gathered(model, t):
    return {n: gather(p, p.grad, mesh(t).tp) for n, p in model.named_parameters()}


def _plain(rank, t):
    torch.manual_seed(0)
    model, ids = Plain().double(), torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(1))
    objects, classes = list(model.parameters()), [type(m) for m in model.modules()]
    bits = {n: v.clone() for n, v in model.state_dict().items()}
    want = model(ids)
    want.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    model.zero_grad()
    report = interlace.replace_(model, mesh(t), plan=PLAN)
    assert {r.sharding for r in report.replaced} == {"column", "row", "vocab", "gather", ""}
    assert model.blocks[0].fc1.weight.shape == (12 // t, 8) and model.head.weight is model.embed.weight
    assert model.embed.weight.shape[0] == -(-13 // t) and list(model.state_dict()) == list(bits)
    got = model(ids)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    got.square().sum().backward()
    for n, g in gathered(model, t).items():
        torch.testing.assert_close(g, grads[n], rtol=1e-11, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")
    torch.testing.assert_close(grad_norm(model, mesh(t)), norm)
    assert interlace.verify(model, ids).ok
    assert not interlace.replace_(model, mesh(t), plan=PLAN).replaced
    interlace.restore_(model)
    assert [type(m) for m in model.modules()] == classes and all(p is q for p, q in zip(model.parameters(), objects))
    assert all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], rtol=1e-11, atol=1e-11)
        assert not hasattr(p, "pieces")


@pytest.mark.parametrize("t", [2, 4])
def test_plain_torch_with_a_plan(t):
    run(t, _plain, t)


def _hf(rank, t, name, more):
    from hf import close, make, sample, step
    model, batch = make(name, **more), sample()
    bits, classes = {n: v.clone() for n, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    want = step(model, batch)
    model.zero_grad()
    report = interlace.replace_(model, mesh(t))
    assert sum(r.sharding == "column" for r in report.replaced) >= 4, report
    got = step(model, batch)
    close({"logits": got["logits"], "loss": got["loss"]} | gathered(model, t), want)
    assert not interlace.replace_(model, mesh(t)).replaced
    interlace.restore_(model)
    assert [type(m) for m in model.modules()] == classes and all(torch.equal(v, bits[n]) for n, v in model.state_dict().items())


CASES = [("llama", {}), ("llama", {"num_key_value_heads": 1}), ("qwen2", {}), ("qwen3", {"num_key_value_heads": 1}), ("gemma2", {}),
         ("phi3", {}), ("mixtral", {}), ("gpt2", {})]


@pytest.mark.parametrize("name, more", CASES, ids=[f"{n}{'-kv1' if m else ''}" for n, m in CASES])
def test_hugging_face_over_2_ranks(name, more):
    pytest.importorskip("transformers")
    run(2, _hf, 2, name, more)


def _generate(rank):
    from hf import make, sample
    model, ids = make("llama"), sample(2, 5)["input_ids"]
    words = lambda: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)  # noqa: E731
    want = words()
    interlace.replace_(model, mesh(2))
    assert torch.equal(words(), want)


def test_generate_over_2_ranks():
    pytest.importorskip("transformers")
    run(2, _generate)


def _verify_finds(rank):
    torch.manual_seed(0)
    model, ids = Plain().double(), torch.arange(6).view(2, 3)
    interlace.replace_(model, mesh(2), plan=PLAN)
    forward = RowParallelLinear.forward
    try:
        RowParallelLinear.forward = lambda self, x: self.partial(x)   # the sum over ranks left out
        assert not interlace.verify(model, ids).ok
    finally:
        RowParallelLinear.forward = forward
    assert interlace.verify(model, ids).ok


def test_verify_finds_a_missing_sum():
    run(2, _verify_finds)


def _from_torch(rank):
    torch.manual_seed(0)
    tp, x = mesh(2).tp, torch.randn(3, 8, dtype=torch.float64)
    col, row, table = nn.Linear(8, 6).double(), nn.Linear(6, 8).double(), nn.Embedding(5, 8).double()
    for p in (*col.parameters(), *row.parameters()):
        p.requires_grad_(p.dim() == 2)
    want = row(col(x))
    y = RowParallelLinear.from_torch(row, tp)(ColumnParallelLinear.from_torch(col, tp)(x))
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(GatheredLinear.from_torch(nn.Linear(8, 5).double().requires_grad_(False), tp)(x).shape, torch.Size([3, 5]))
    ids = torch.arange(5)
    torch.testing.assert_close(VocabParallelEmbedding.from_torch(table, tp)(ids), table(ids))
    assert not ColumnParallelLinear.from_torch(col, tp).bias.requires_grad


def test_from_torch():
    run(2, _from_torch)


def test_refusals():
    two, model = Mesh(tp=interlace.Axis("tp", 2)), Plain()
    with pytest.raises(ValueError, match=r"nearest name is 'blocks.0.fc1'"):
        interlace.replace_(model, two, plan={"blocks.0.fc11": "column"})
    with pytest.raises(ValueError, match="did you mean 'column'"):
        interlace.replace_(model, two, plan={"blocks.*.fc1": "colum"})
    with pytest.raises(ValueError, match="needs Linear, got LayerNorm"):
        interlace.replace_(model, two, plan={"blocks.*.norm": "row"})
    with pytest.raises(ValueError, match="divisible by tp=5"):
        interlace.replace_(model, Mesh(tp=interlace.Axis("tp", 5)), plan=PLAN)
    with pytest.raises(ValueError, match=r"mesh\.pp needs one list of decoder layers"):
        interlace.replace_(model, Mesh(pp=interlace.Axis("pp", 2)))
    assert "nearest name" in str(interlace.replace_(model, two, plan=PLAN | {"blocks.*.fc9": "row"}, dry_run=True))
    assert all(type(m).__module__ != "interlace.parallel.tensor_parallel" for m in model.modules())


def test_heads_that_do_not_divide():
    pytest.importorskip("transformers")
    from hf import make
    with pytest.raises(ValueError, match=r"4 heads over 2 key / value heads.*use tp in \[1, 2, 4\]"):
        interlace.replace_(make("llama"), Mesh(tp=interlace.Axis("tp", 3)))


# ---- torch's own wrappers around a split model --------------------------------------------------------------------


def _wrapped(rank):
    """torch's DistributedDataParallel over ranks with other parts is refused before it writes them, and FSDP in the first forward."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    m = Mesh.build(Layout(world=4, tp=2))
    model = Plain().double()
    interlace.replace_(model, m, plan=PLAN)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"must hold the same parts of the model, got a group across tp=2; use interlace\.Distributed"):
        DistributedDataParallel(model)
    with pytest.raises(ValueError, match="a group across tp=2"):
        DistributedDataParallel(model, process_group=m.tp.group)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ids = torch.arange(12).view(2, 6)

    class AsIfOverDp:
        """Torch's own, over a group that not all ranks are in, crashes in these tests' debug mode; it asks so before all else."""
        process_group = m.dp.group

        def asks(self):
            return set(model._ddp_params_and_buffers_to_ignore)
    assert AsIfOverDp().asks() == set()
    for shard in (lambda x: fully_shard(x), lambda x: FullyShardedDataParallel(x, use_orig_params=True, device_id=torch.device("cpu"))):
        other = Plain().double()
        interlace.replace_(other, m, plan=PLAN)
        with pytest.raises(ValueError, match=r"must not be sharded again.*use_distributed_optimizer=True"):
            shard(other)(ids % 7)


def test_wrapped_by_torch():
    run(4, _wrapped)
