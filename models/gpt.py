"""GPT: a decoder whose every layer is a parallel layer over one tp axis.   On `Mesh()` the same text is the one-process model.

    ids [S, B] -> embed_tokens -> h [S/t, B, D] -> num_layers x Block -> norm -> lm_head -> logits [S, B, V/t] -> loss [S, B]

    Block   y = input_layernorm(h);  a = self_attn(y);  h, y = post_attention_layernorm(a + h);  h = h + mlp(y)

Legend  S sequence, B micro-batch, D hidden, H query heads, Hkv key / value heads, Dh channels of a head, F ffn, V vocabulary,
        L layers; S/t under sequence parallelism, else S. Parameters carry Hugging Face's Llama names.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import add_layer_norm, add_rms_norm, attention, dropout, gelu, layer_norm, rms_norm, rope, rope_tables, swiglu
from ..kernels.comm import rs_residual_norm
from ..parallel.deferred import Deferred
from ..parallel.expert_parallel import MoELayer, RouterOptions, place
from ..parallel.layout import stage_layers, stages_of_rank
from ..parallel.mesh import Axis, Mesh
from ..parallel.sharding import Described, init_parameters, replicated, set_pieces
from ..parallel.tensor_parallel import (
    ColumnParallelLinear,
    ParallelHead,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from .config import ModelConfig


class Norm(Described):
    """RMSNorm or LayerNorm over D. Under sequence parallelism each rank sees its rows only, so gradients are partial sums."""

    def __init__(self, cfg: ModelConfig, tp: Axis, dtype: torch.dtype):
        super().__init__()
        self.tp, self.eps, D = tp, cfg.layernorm_epsilon, cfg.hidden_size
        self.weight = nn.Parameter(torch.ones(D, dtype=dtype))
        set_pieces(self.weight, replicated((D,), tp, cfg.sequence_parallel), fill=1.0)
        self.bias = None
        if cfg.normalization == "layernorm":
            self.bias = nn.Parameter(torch.zeros(D, dtype=dtype))
            set_pieces(self.bias, replicated((D,), tp, cfg.sequence_parallel))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps) if self.bias is None else layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """h = x + residual -> (h, norm(h))"""
        if self.bias is None:
            return add_rms_norm(x, residual, self.weight, self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)

    def reduce_add(self, partial: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """h = reduce_scatter(partial) + residual -> (h, norm(h))"""
        return rs_residual_norm(partial, residual, self.weight, self.eps, self.tp.group, bias=self.bias)


def named_seed(seed: int, name: str) -> int:
    """A seed of its own for everything that has a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


class Dropout(nn.Module):
    """Drops the same elements whatever the layout: the mask depends on the element's place in the global batch.

    x [S/t, B, D] of the samples first_sample .. + B, or attention probabilities [B, H/t, S, S]."""

    def __init__(self, p: float, name: str, seed: int):
        super().__init__()
        self.p = p
        self.seed = named_seed(seed, name)

    def forward(self, x: Tensor, base: int, strides: tuple[int, ...]) -> Tensor:
        return dropout(x, self.p, self.seed, base=base, strides=strides) if self.p and self.training else x


class Attention(nn.Module):
    """Causal self-attention over this rank's heads: y [S/t, B, D] -> [S/t, B, D], summed over tp."""

    def __init__(self, cfg: ModelConfig, tp: Axis, name: str, seed: int, dtype: torch.dtype):
        super().__init__()
        self.cfg, self.tp, self.Dh = cfg, tp, cfg.head_dim
        H, G = cfg.num_attention_heads, cfg.query_groups
        self.qkv_proj = ColumnParallelLinear(
            cfg.hidden_size, tp=tp, bias=cfg.add_bias_linear, sequence_parallel=cfg.sequence_parallel, dtype=dtype,
            parts={"q_proj": (H * self.Dh, H), "k_proj": (G * self.Dh, G), "v_proj": (G * self.Dh, G)}, init_std=cfg.init_method_std)
        self.o_proj = RowParallelLinear(H * self.Dh, cfg.hidden_size, tp=tp, bias=cfg.add_bias_linear, dtype=dtype,
                                        sequence_parallel=cfg.sequence_parallel, init_std=_output_std(cfg))
        self.dropout = Dropout(cfg.attention_dropout, f"{name}.attention_dropout", seed)

    def heads(self, y: Tensor, tables: tuple[Tensor, Tensor] | None, first_sample: int) -> Tensor:
        """Everything before the output projection: [S/t, B, D] -> [S, B, H/t * Dh]"""
        qkv = self.qkv_proj(y)                                        # [S, B, (H + 2 Hkv)/t * Dh]
        S, B, _ = qkv.shape
        q, k, v = (x.view(S, B, -1, self.Dh) for x in qkv.split(self.qkv_proj.sizes, -1))
        if tables is not None:
            q, k = rope(q, *tables), rope(k, *tables)
        o = self._with_dropout(q, k, v, first_sample) if self.training and self.cfg.attention_dropout else attention(q, k, v)
        return o.reshape(S, B, -1)

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, first_sample: int) -> Tensor:
        """torch's attention draws its own mask, which depends on the layout: ours is applied to the explicit probabilities."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))          # [B, heads, S, Dh]
        (_, Hl, S, _), H = q.shape, self.cfg.num_attention_heads
        k, v = (x.repeat_interleave(Hl // k.shape[1], dim=1) for x in (k, v))
        mask = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
        p = ((q @ k.transpose(-1, -2)) * self.Dh**-0.5).masked_fill(~mask, float("-inf")).softmax(-1)
        base = first_sample * H * S * S + self.tp.rank * Hl * S * S
        return (self.dropout(p, base, (H * S * S, S * S, S, 1)) @ v).permute(2, 0, 1, 3)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": swiglu, "gelu": F.gelu, "gelu_tanh": partial(gelu, approximate="tanh")}


class MLP(nn.Module):
    """SwiGLU (gate and up fused into one product) or GELU: [S/t, B, D] -> [S/t, B, D], summed over tp."""

    def __init__(self, cfg: ModelConfig, tp: Axis, dtype: torch.dtype, ffn: int | None = None):
        super().__init__()
        D, ffn = cfg.hidden_size, ffn or cfg.ffn_size
        parts = {"gate_proj": (ffn, ffn), "up_proj": (ffn, ffn)} if cfg.activation == "swiglu" else {"up_proj": (ffn, ffn)}
        self.activation = ACTIVATIONS[cfg.activation]
        self.up = ColumnParallelLinear(D, tp=tp, parts=parts, bias=cfg.add_bias_linear, dtype=dtype, init_std=cfg.init_method_std,
                                       sequence_parallel=cfg.sequence_parallel)
        self.down_proj = RowParallelLinear(ffn, D, tp=tp, bias=cfg.add_bias_linear, dtype=dtype, init_std=_output_std(cfg),
                                           sequence_parallel=cfg.sequence_parallel)

    def forward(self, y: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up(y)))


def moe_layer(cfg: ModelConfig, mesh: Mesh, dtype: torch.dtype, seed: int) -> MoELayer:
    """Experts in place of an MLP."""
    assert cfg.num_moe_experts is not None
    options = RouterOptions(
        topk=cfg.moe_router_topk, score_function=cfg.moe_router_score_function, pre_softmax=cfg.moe_router_pre_softmax,
        norm_topk_prob=cfg.moe_router_norm_topk_prob, num_groups=cfg.moe_router_num_groups, group_topk=cfg.moe_router_group_topk,
        scaling_factor=cfg.moe_router_topk_scaling_factor, expert_bias=cfg.moe_router_enable_expert_bias,
        load_balancing=cfg.moe_router_load_balancing_type, aux_loss_coeff=cfg.moe_aux_loss_coeff, z_loss_coeff=cfg.moe_z_loss_coeff,
        input_jitter_eps=cfg.moe_input_jitter_eps, force_load_balancing=cfg.moe_router_force_load_balancing,
        enable_routing_replay=cfg.moe_enable_routing_replay, capacity_factor=cfg.moe_expert_capacity_factor,
        drop_policy=cfg.moe_token_drop_policy, pad_expert_input_to_capacity=cfg.moe_pad_expert_input_to_capacity)
    shared = cfg.moe_shared_expert_intermediate_size
    return MoELayer(cfg.hidden_size, cfg.moe_ffn_size, cfg.num_moe_experts, options, mesh, sequence_parallel=cfg.sequence_parallel,
                    shared=MLP(cfg, mesh.tp, dtype, shared) if shared else None, shared_gate=cfg.moe_shared_expert_gate,
                    activation=cfg.activation, init_std=cfg.init_method_std, output_std=_output_std(cfg), dtype=dtype, seed=seed)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, mesh: Mesh, layer: int, seed: int, dtype: torch.dtype):
        super().__init__()
        name, tp = f"layers.{layer}", mesh.tp
        self.cfg, self.tp = cfg, tp
        self.input_layernorm, self.post_attention_layernorm = Norm(cfg, tp, dtype), Norm(cfg, tp, dtype)
        self.self_attn = Attention(cfg, tp, name, seed, dtype)
        self.mlp = moe_layer(cfg, mesh, dtype, named_seed(seed, f"{name}.mlp")) if cfg.has_experts(layer) else MLP(cfg, tp, dtype)
        self.attn_dropout = Dropout(cfg.hidden_dropout, f"{name}.self_attn.dropout", seed)
        self.mlp_dropout = Dropout(cfg.hidden_dropout, f"{name}.mlp.dropout", seed)
        # Only where nothing stands between the sum over ranks and the residual can one op do both.
        self.fused = cfg.sequence_parallel and tp.size > 1 and not cfg.add_bias_linear and not cfg.hidden_dropout

    def forward(self, h: Tensor, tables: tuple[Tensor, Tensor] | None, first_sample: int) -> Tensor:   # [S/t, B, D]
        o = self.self_attn.heads(self.input_layernorm(h), tables, first_sample)
        proj, norm = self.self_attn.o_proj, self.post_attention_layernorm
        place = hidden_place(self.cfg, self.tp, h, first_sample)
        if self.fused:
            h, y = norm.reduce_add(proj.partial(o), h)
        else:
            h, y = norm.add(self.attn_dropout(proj(o), *place), h)
        o = self.mlp(y, first_sample) if isinstance(self.mlp, MoELayer) else self.mlp(y)
        return h + self.mlp_dropout(o, *place)


class GPT(Described):
    """The model, or this rank's stages of it. Args: cfg; mesh (default: one process); vocab_size: real size of the vocabulary;
    seed of weights and dropout.

    Forward: ids, labels [B, S] int64 -> mean loss (0-d, fp32 or fp64). first_sample: place of the batch in the global order
    of samples, which the masks of dropout and jitter depend on: while they draw it must be given, or every step had the same ones.
    With pp > 1 `stages` gives the parts that `Pipeline` runs.
    """

    described = ("position_embeddings",)
    embed_tokens: Any                                                 # these four: None on the stages that have none
    position_embeddings: Any
    norm: Any
    lm_head: Any

    @torch.random.fork_rng(devices=())                                # layers draw weights, which init_parameters writes over
    def __init__(self, cfg: ModelConfig, mesh: Mesh | None = None, *, vocab_size: int, seed: int = 0,
                 dtype: torch.dtype = torch.float32):
        super().__init__()
        mesh = mesh or Mesh()
        tp = mesh.tp
        self.cfg, self.tp, self.vocab_size, self.dtype = cfg, tp, vocab_size, dtype
        layers = stage_layers(cfg) if mesh.pp.size > 1 else [range(cfg.num_layers)]
        self.plan = {i: layers[i] for i in (stages_of_rank(cfg, mesh.pp.rank) if mesh.pp.size > 1 else [0])}   # stage -> its layers
        self.first, self.last = 0 in self.plan, len(layers) - 1 in self.plan
        tied = cfg.share_embeddings_and_output_weights
        self.embed_tokens = self.position_embeddings = self.norm = self.lm_head = None

        def table() -> VocabParallelEmbedding:
            return VocabParallelEmbedding(
                vocab_size, cfg.hidden_size, tp=tp, rows=padded_vocab(cfg, vocab_size, tp.size) // tp.size, dtype=dtype,
                sequence_parallel=cfg.sequence_parallel, init_std=cfg.init_method_std)
        if self.first or (self.last and tied):
            self.embed_tokens = table()
        if self.first and cfg.position_embedding_type == "learned_absolute":
            positions = torch.empty(cfg.seq_length, cfg.hidden_size, dtype=dtype)
            self.position_embeddings = nn.Parameter(positions)        # [S, D] on every rank
            set_pieces(self.position_embeddings, replicated(tuple(positions.shape), tp, cfg.sequence_parallel), std=cfg.init_method_std)
        self.dropout = Dropout(cfg.hidden_dropout, "embed_tokens.dropout", seed)
        self.layers = nn.ModuleDict({str(i): Block(cfg, mesh, i, seed, dtype) for mine in self.plan.values() for i in mine})
        if self.last:
            self.norm = Norm(cfg, tp, dtype)
            self.lm_head = ParallelHead(self.embed_tokens or table(), tied=tied, init_std=cfg.init_method_std)
        if tied and self.first != self.last:
            self.embed_tokens.weight.stages = 2
        self.pipeline: Any = None                                     # a Pipeline, made with the first step (models/train.py)
        init_parameters(self, seed)

    def embed(self, ids: Tensor, first_sample: int = 0) -> Tensor:
        """ids [B, S] -> h [S/t, B, D]"""
        cfg, S = self.cfg, ids.shape[1]
        if cfg.seq_length < S and self.position_embeddings is not None:
            raise ValueError(f"GPT: at most {cfg.seq_length} positions were learned, got a sequence of {S}; shorten it")
        h = self.embed_tokens(ids.t())                                # [S/t, B, D]
        if self.position_embeddings is not None:
            at = self.tp.rank * h.shape[0] if cfg.sequence_parallel else 0
            h = h + self.position_embeddings[at:at + h.shape[0]].unsqueeze(1)
        return self.dropout(h, *hidden_place(cfg, self.tp, h, first_sample))

    def run(self, h: Tensor, layers: Iterable[int], first_sample: int = 0) -> Tensor:
        """h [S/t, B, D] through some of the layers."""
        cfg, tables = self.cfg, None
        if cfg.position_embedding_type == "rope":
            S = h.shape[0] * (self.tp.size if cfg.sequence_parallel else 1)
            dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
            tables = rope_tables(torch.arange(S, device=h.device), cfg.head_dim, cfg.rotary_base, dtype, h.device)
        for i in layers:
            layer = self.layers[str(i)]
            if cfg.recompute_granularity == "full" and self.training:
                h = checkpoint(layer, h, tables, first_sample, use_reentrant=False, preserve_rng_state=False)
            else:
                h = layer(h, tables, first_sample)
        return h

    def hidden(self, ids: Tensor, first_sample: int | None = None) -> Tensor:
        """ids [B, S] -> the normalised output of the last layer, [S/t, B, D]"""
        draws = self.cfg.hidden_dropout or self.cfg.attention_dropout or (self.cfg.num_moe_experts and self.cfg.moe_input_jitter_eps)
        first_sample = place("GPT", first_sample, self.training and bool(draws))
        return self.norm(self.run(self.embed(ids, first_sample), range(self.cfg.num_layers), first_sample))

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The normalised output of the last layer, labels [B, S] -> mean loss over all of them (0-d). A label of -100 counts, with a loss
        of 0: so the mean over ranks and micro-batches is that of the whole batch."""
        return vocab_parallel_cross_entropy(self.lm_head(hidden), labels.t(), self.tp, num_embeddings=self.vocab_size).mean()

    def forward(self, ids: Tensor, labels: Tensor, first_sample: int | None = None) -> Tensor:
        return self.loss(self.hidden(ids, first_sample), labels)

    def stages(self) -> dict[int, Stage]:
        """This rank's part of a pipeline, by stage number."""
        return {i: Stage(self, i) for i in self.plan}

    def scale_losses(self, scale: float) -> None:
        """What the losses that balance experts are multiplied by in the backward: 1 / micro-batches of a step."""
        for layer in self.moe_layers().values():
            layer.loss_scale = scale

    def moe_layers(self) -> dict[str, MoELayer]:
        """{layer number: its MoELayer} of this rank."""
        return {i: block.mlp for i, block in self.layers.items() if isinstance(block.mlp, MoELayer)}


class Stage(nn.Module):
    """One stage as a module of its own, over parameters that stay the model's: (ids or h), labels, first_sample -> h, or in the last
    stage the loss, [1], times loss_scale: 1 / micro-batches of a step."""

    model: GPT

    def __init__(self, model: GPT, index: int):
        super().__init__()
        object.__setattr__(self, "model", model)                      # not a submodule: parameters have one name
        self.index, self.is_first, self.is_last = index, index == 0, model.last and index == max(model.plan)
        self.loss_scale = 1.0

    def defer(self, deferred: Deferred | None) -> None:
        """Leave weight gradients of the linear layers to `deferred`."""
        mine = [self.model.layers[str(i)] for i in self.model.plan[self.index]] + ([self.model.lm_head] if self.is_last else [])
        for layer in (layer for part in mine for layer in part.modules() if hasattr(layer, "deferred")):
            layer.deferred = deferred

    def forward(self, x: Tensor, *, labels: Tensor, first_sample: Tensor) -> Tensor:
        model, first = self.model, int(first_sample)
        h = model.run(model.embed(x, first) if self.is_first else x, model.plan[self.index], first)
        return (model.loss(model.norm(h), labels) * self.loss_scale).view(1) if self.is_last else h


def hidden_place(cfg: ModelConfig, tp: Axis, h: Tensor, first_sample: int) -> tuple[int, tuple[int, int, int]]:
    """Where element (0, 0, 0) of h [S/t, B, D] stands in the global [samples, S, D], and the strides from there."""
    rows, D = h.shape[0], cfg.hidden_size
    S, first = (rows * tp.size, rows * tp.rank) if cfg.sequence_parallel else (rows, 0)
    return (first_sample * S + first) * D, (D, S * D, 1)


def padded_vocab(cfg: ModelConfig, vocab_size: int, tp: int) -> int:
    """The rows of the embedding over all ranks: vocab_size up to a multiple of make_vocab_size_divisible_by * tp."""
    unit = cfg.make_vocab_size_divisible_by * tp
    return -(-vocab_size // unit) * unit


def _output_std(cfg: ModelConfig) -> float:
    """Projections back into the residual stream start smaller, by sqrt(2 L) (GPT-2)."""
    return cfg.init_method_std / (2 * cfg.num_layers) ** 0.5


__all__ = ["GPT", "MLP", "Attention", "Block", "Dropout", "Norm", "Stage", "hidden_place", "padded_vocab"]
