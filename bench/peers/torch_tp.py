"""A Llama-style GPT in plain torch under torch's own tensor parallelism, held to float64 and timed by bench_train_step.py.

    model = parallelize(TorchGPT(Config(...)), world, sequence_parallel)
    loss = step(model, ids, labels)        # forward + backward; every rank sees the whole micro-batch

The plan is that of PyTorch's tutorial (https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html): q, k, v, gate
and up by columns, o and down by rows, the embedding and the head over the vocabulary with loss_parallel; with sequence
parallelism the norms work on their part of the sequence.
"""
import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)


@dataclass(frozen=True)
class Config:
    num_layers: int = 4
    hidden: int = 256
    ffn: int = 704
    heads: int = 8
    vocab: int = 8192
    seq: int = 256
    eps: float = 1e-6
    theta: float = 10000.0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)                                             # [B, heads, S, head_dim / 2]
    return x * cos + torch.cat([-b, a], -1) * sin


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.hidden // c.heads
        self.q, self.k, self.v, self.o = (nn.Linear(c.hidden, c.hidden, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))                   # [B, S, D]; this rank's heads when parallel


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate, self.up = (nn.Linear(c.hidden, c.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(c.hidden, c.eps), Attention(c)
        self.mlp_norm, self.mlp = nn.RMSNorm(c.hidden, c.eps), MLP(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class TorchGPT(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, c: Config):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab, c.hidden)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.RMSNorm(c.hidden, c.eps)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        head_dim = c.hidden // c.heads
        inverse = c.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(c.seq, dtype=torch.float64), inverse).repeat(1, 2)   # [S, head_dim]
        dtype = self.norm.weight.dtype
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels [B, S] -> mean loss."""
        x = self.embedding(ids)                                       # [B, S, D]
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), labels.flatten())


def _plan(num_layers: int, sp: bool) -> dict[str, object]:
    between = Shard(1) if sp else Replicate()                         # of the residual stream: [B, S/t, D] or whole
    plan: dict[str, object] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    for i in range(num_layers):
        for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"):
            plan[f"blocks.{i}.{name}"] = ColwiseParallel()
        for name in ("attention.o", "mlp.down"):
            plan[f"blocks.{i}.{name}"] = RowwiseParallel(output_layouts=between)
        if sp:
            plan[f"blocks.{i}.attention_norm"] = plan[f"blocks.{i}.mlp_norm"] = SequenceParallel()
            plan[f"blocks.{i}.attention"] = PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None))
            plan[f"blocks.{i}.mlp"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    if sp:
        plan["norm"] = SequenceParallel()
    return plan


def parallelize(model: TorchGPT, world: int, sequence_parallel: bool = False) -> TorchGPT:
    """Split `model` over the default group's `world` ranks, in place; every rank must hold the same weights."""
    if world == 1:
        return model
    mesh = init_device_mesh("cpu", (world,))
    parallelize_module(model, mesh, _plan(len(model.blocks), sequence_parallel))  # type: ignore[arg-type]
    return model


def step(model: TorchGPT, ids: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    """Forward and backward of scale * loss; loss_parallel must span both. Returns the loss, not scaled."""
    parallel = isinstance(model.lm_head.weight, DTensor)
    with loss_parallel() if parallel else contextlib.nullcontext():
        loss = model(ids, labels)
        (loss * scale).backward()
    return _full(loss.detach())


def _full(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t
