"""One training step of a GPT (micro-batches, clip, AdamW), ours against torch's own tensor and data parallel, and with experts
against what one composes with torch. `interlace bench train_step`

4 layers, hidden 256, ffn 704, 8 heads, sequence 256, vocabulary 8192, 4 micro-batches of 4, fp32 (`--quick`: 2 layers of 128).
Both start from the same weights, read the same tokens, and have the same malloc thresholds. The error column is that of the
first step's loss and gradient norm against one process in float64; repeatable: two models made anew, their first steps.
"""
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from ..models.config import ModelConfig, OptimConfig
from ..models.gpt import GPT
from ..models.optimizer import Optimizer
from ..models.train import forward_backward
from ..models.verify import RandomTokens
from ..parallel.data_parallel import DistributedDataParallel
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.sharding import grad_norm, named_pieces
from .cases import Case, Make, Way, Ways
from .peers.eager_moe import EagerMoE
from .peers.torch_tp import Config, TorchGPT, parallelize, step

OPTIM = OptimConfig()
SHAPES = {"quick": {"gpt-tiny": {"L": 2, "D": 128, "F": 352, "H": 4, "S": 64, "V": 512, "B": 2, "n": 2}},
          "cpu": {"gpt": {"L": 4, "D": 256, "F": 704, "H": 8, "S": 256, "V": 8192, "B": 4, "n": 4}}}
THEIRS = {"embed_tokens": "embedding", "layers": "blocks", "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
          "self_attn": "attention", "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
          "down_proj": "down"}


def cases(sweep: str, world: int) -> list[Case]:
    """The ranks as tp, tp with sequence parallelism, dp, dp with ZeRO-1, dp with the experts of all layers spread over it. A GPU gets
    the CPU's model: the step has run on CPUs alone as yet."""
    calls = ("train_step",) + (("train_step sp", "train_step dp", "train_step dp zero1", "train_step moe") if world > 1 else ())
    return [Case(call, name, shape, world=world) for call in calls for name, shape in SHAPES.get(sweep, SHAPES["cpu"]).items()]


EXPERTS, TOPK = 8, 2


def _config(s: dict[str, int], moe: bool = False) -> ModelConfig:
    return ModelConfig(num_moe_experts=EXPERTS if moe else None, moe_router_topk=TOPK, num_layers=s["L"], hidden_size=s["D"],
                       ffn_hidden_size=s["F"], num_attention_heads=s["H"], seq_length=s["S"], micro_batch_size=s["B"],
                       global_batch_size=s["B"] * s["n"], layernorm_epsilon=1e-6)


def _tokens(s: dict[str, int]) -> RandomTokens:
    return RandomTokens(s["V"], s["S"], 1)


def ours(s: dict[str, int], layout: Layout, mesh: Mesh, zero1: bool, moe: bool) -> Callable[[], Tensor]:
    m = dataclasses.replace(_config(s, moe), expert_model_parallel_size=layout.ep, tensor_model_parallel_size=layout.tp,
                            sequence_parallel=layout.sp)
    model, data = GPT(m, mesh, vocab_size=s["V"], seed=1), _tokens(s)
    optimizer = Optimizer(DistributedDataParallel(model, mesh, use_distributed_optimizer=zero1), OPTIM)

    def run() -> Tensor:
        loss = forward_backward(optimizer.ddp, data, 0, m)
        return torch.tensor([loss.item(), optimizer.step(OPTIM.lr, wait=False)], dtype=torch.float64)
    return run


def _torch_gpt(s: dict[str, int], moe: bool = False) -> TorchGPT:
    """With our weights; of the experts, this rank's."""
    c = Config(s["L"], s["D"], s["F"], s["H"], s["V"], s["S"])
    model = TorchGPT(c)
    for block in model.blocks if moe else ():
        block.mlp = EagerMoE(c, EXPERTS, TOPK, _config(s, moe).balancing["aux_loss"], dist.group.WORLD if dist.is_initialized() else None)
    weights = {name: piece.local(p.detach()) for name, piece, p in named_pieces(GPT(_config(s, moe), vocab_size=s["V"], seed=1))}
    named = {".".join(THEIRS.get(w, w) for w in name.split(".")): t.clone() for name, t in weights.items()}
    model.load_state_dict({name: named[name] for name in model.state_dict()})
    return model


def _adamw(sets: Sequence[Sequence[Tensor]]) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": part} for part in sets], lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps,
                             weight_decay=OPTIM.weight_decay)


def torch_ddp(s: dict[str, int], world: int, zero1: bool) -> Callable[[], Tensor]:
    """torch's DistributedDataParallel over gloo; with ZeroRedundancyOptimizer for ZeRO-1."""
    ddp, n, data = torch.nn.parallel.DistributedDataParallel(_torch_gpt(s), gradient_as_bucket_view=True), s["n"], _tokens(s)
    adamw: torch.optim.Optimizer = _adamw([list(ddp.parameters())])
    if zero1:
        adamw = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps,
                                        weight_decay=OPTIM.weight_decay)
    batches = [data.batch(i * s["B"], s["B"]) for i in range(dist.get_rank(), n, world)]

    def run() -> Tensor:
        total = torch.zeros(1)
        for i, (ids, labels) in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else ddp.no_sync():
                loss = ddp(ids, labels) / len(batches)
                loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), OPTIM.clip_grad)
        adamw.step()
        adamw.zero_grad(set_to_none=False)
        return torch.tensor([total.item() / world, float(norm)], dtype=torch.float64)
    return run


def torch_moe(s: dict[str, int], world: int) -> Callable[[], Tensor]:
    """torch's DistributedDataParallel around all but the experts, which are EagerMoE's own on every rank."""
    model, n, data = _torch_gpt(s, moe=True), s["n"], _tokens(s)
    layers: list[Any] = [block.mlp for block in model.blocks]
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name}
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(experts))
    ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    dense, own = [p for name, p in model.named_parameters() if name not in experts], list(experts.values())
    adamw = _adamw([dense, own])
    batches = [data.batch(i * s["B"], s["B"]) for i in range(dist.get_rank(), n, world)]

    def run() -> Tensor:
        total = torch.zeros(1)
        for i, (ids, labels) in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else ddp.no_sync():
                loss = ddp(ids, labels) / len(batches)
                (loss + sum(layer.aux for layer in layers) / len(batches)).backward()
            total += loss.detach()
        dist.all_reduce(total)
        grads = [[p.grad for p in part if p.grad is not None] for part in (own, dense)]
        torch._foreach_mul_(grads[0], 1 / world)
        squares = torch.stack([torch.nn.utils.get_total_norm(part).square() for part in grads])
        dist.all_reduce(squares[:1])
        norm = squares.sum().sqrt()
        torch.nn.utils.clip_grads_with_norm_([*dense, *own], OPTIM.clip_grad, norm)
        adamw.step()
        adamw.zero_grad(set_to_none=False)
        return torch.tensor([total.item() / world, float(norm)], dtype=torch.float64)
    return run


def theirs(s: dict[str, int], world: int, sp: bool) -> Callable[[], Tensor]:
    model = parallelize(_torch_gpt(s), world, sp)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]   # norms, without sp: torch refuses to mix the two
    sets = [part for part in (split, plain) if part]
    adamw = _adamw(sets)
    n, data = s["n"], _tokens(s)
    batches = [data.batch(i * s["B"], s["B"]) for i in range(n)]

    def run() -> Tensor:
        loss = sum(step(model, ids, labels, 1 / n) for ids, labels in batches) / n
        norms = [torch.nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in sets]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for part in sets:
            torch.nn.utils.clip_grads_with_norm_(part, OPTIM.clip_grad, norm)
        adamw.step()
        adamw.zero_grad()
        return torch.tensor([float(loss), float(norm)], dtype=torch.float64)
    return run


def truth(s: dict[str, int], moe: bool) -> Tensor:
    m = _config(s, moe)
    ddp = DistributedDataParallel(GPT(m, vocab_size=s["V"], seed=1, dtype=torch.float64))
    loss = forward_backward(ddp, _tokens(s), 0, m)
    return torch.stack([loss, grad_norm(ddp.module, Mesh(), ddp.parts)])


def ways(case: Case, make: Make) -> Ways:
    s, world = case.shape, make.world
    sp, dp, zero1, moe = (word in case.call.split() for word in ("sp", "dp", "zero1", "moe"))
    if make.device != "cpu":
        raise NotImplementedError("train_step is a bench of CPU ranks; use --device cpu")
    layout = Layout(world, 1 if dp or moe else world, ep=world if moe else 1, sp=sp)
    mesh, true = Mesh.build(layout), [truth(s, moe)]
    sizes = {name: p.numel() for name, p in GPT(_config(s, moe), vocab_size=s["V"]).named_parameters()}
    used = TOPK / EXPERTS                                             # of the experts, by a token
    parameters = int(sum(n * (used if ".experts." in name else 1) for name, n in sizes.items())) - s["V"] * s["D"]   # no product: embedding
    flops = 2 * s["S"] * s["B"] * s["n"] * parameters / world
    known = lambda got: true  # noqa: E731
    name = "torch DDP" + " + ZeroRedundancyOptimizer" * zero1 if dp else "torch parallelize_module" if world > 1 else "torch eager"
    name = "torch DDP + all_to_all_single" if moe else name
    peer = Way(truth=known, fresh=lambda: torch_moe(s, world) if moe else torch_ddp(s, world, zero1) if dp else theirs(s, world, sp))
    return Ways((), lambda: true[0], Way(truth=known, fresh=lambda: ours(s, layout, mesh, zero1, moe)), {
        name: peer, "torch.compile": "left out: ours is not compiled either"}, flops=(flops, 2 * flops))
