"""One training step of a GPT (micro-batches, clip, AdamW), ours against torch's own tensor parallel on gloo, in one run.

    python -m interlace.bench.bench_train_step [--rounds N] [--worlds 1 2]

4 layers, hidden 256, ffn 704, 8 heads, sequence 256, vocabulary 8192, 4 micro-batches of 4, fp32, one thread a rank. Both
start from the same weights, read the same tokens, and have the same malloc thresholds. The error column is that of the first
step's loss and gradient norm against one process in float64.
"""
import argparse
import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..models.config import ModelConfig, OptimConfig
from ..models.gpt import GPT
from ..models.optimizer import Optimizer
from ..models.train import forward_backward
from ..models.verify import RandomTokens
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.sharding import grad_norm, named_pieces
from .harness import compare, run_ranks
from .peers.torch_tp import Config, TorchGPT, parallelize, step

VOCAB = 8192
MODEL = ModelConfig(num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, seq_length=256, micro_batch_size=4,
                    global_batch_size=16, layernorm_epsilon=1e-6)
OPTIM = OptimConfig()
DATA = RandomTokens(VOCAB, MODEL.seq_length, 1)
THEIRS = {"embed_tokens": "embedding", "layers": "blocks", "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
          "self_attn": "attention", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
          "down_proj": "down"}


def ours(mesh: Mesh, tp: int, sp: bool) -> Callable[[], Tensor]:
    m = dataclasses.replace(MODEL, tensor_model_parallel_size=tp, sequence_parallel=sp)
    model = GPT(m, mesh, vocab_size=VOCAB, seed=1)
    optimizer = Optimizer(model, OPTIM, mesh.tp)

    def run() -> Tensor:
        loss = forward_backward(model, DATA, 0, m)
        return torch.tensor([loss.item(), optimizer.step(OPTIM.lr)], dtype=torch.float64)
    return run


def theirs(world: int, sp: bool) -> Callable[[], Tensor]:
    model = TorchGPT(Config(vocab=VOCAB))
    weights = {name: piece.local(p.detach()) for name, piece, p in named_pieces(GPT(MODEL, vocab_size=VOCAB, seed=1))}
    model.load_state_dict({".".join(THEIRS.get(w, w) for w in name.split(".")): t.clone() for name, t in weights.items()})
    parallelize(model, world, sp)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]   # norms, without sp: torch refuses to mix the two
    sets = [s for s in (split, plain) if s]
    adamw = torch.optim.AdamW([{"params": s} for s in sets], lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay)
    n = MODEL.global_batch_size // MODEL.micro_batch_size
    batches = [DATA.batch(i * MODEL.micro_batch_size, MODEL.micro_batch_size) for i in range(n)]

    def run() -> Tensor:
        loss = sum(step(model, ids, labels, 1 / n) for ids, labels in batches) / n
        norms = [torch.nn.utils.get_total_norm([p.grad for p in s if p.grad is not None]) for s in sets]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for s in sets:
            torch.nn.utils.clip_grads_with_norm_(s, OPTIM.clip_grad, norm)
        adamw.step()
        adamw.zero_grad()
        return torch.tensor([float(loss), float(norm)], dtype=torch.float64)
    return run


def truth() -> Tensor:
    model = GPT(MODEL, vocab_size=VOCAB, seed=1, dtype=torch.float64)
    loss = forward_backward(model, DATA, 0, MODEL)
    return torch.stack([loss, grad_norm(model, Mesh().tp)])


def bench(rank: int, world: int, rounds: int) -> None:
    case = {"layers": 4, "hidden": 256, "seq": 256, "vocab": VOCAB, "micro_batch": 4, "micro_batches": 4, "dtype": "float32",
            "world": world}
    group = dist.group.WORLD if world > 1 else None
    true = truth()
    tokens = MODEL.global_batch_size * MODEL.seq_length
    flops = 6 * tokens * sum(p.numel() for p in GPT(MODEL, vocab_size=VOCAB).parameters()) - 6 * tokens * VOCAB * MODEL.hidden_size
    for sp in (False, True) if world > 1 else (False,):
        mesh = Mesh.build(Layout(world, world, sp=sp))
        ways = {"interlace": ours(mesh, world, sp), "torch parallelize_module" if world > 1 else "torch eager": theirs(world, sp)}
        compare("train_step", ways, truth=true, case={**case, "sp": sp}, rounds=rounds, warmup=1, flops=flops, group=group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    for world in args.worlds:
        run_ranks(world, bench, world, args.rounds)


if __name__ == "__main__":
    main()
