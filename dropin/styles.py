"""Our layers as styles of transformers 5's tensor parallelism (registry.py puts them there; names and meanings are listed there).

A style cuts parameters as transformers' own does, so that they are the DTensors its loader, save_pretrained and optimizers know; its
forward runs on the local parts. With sequence parallelism activations between layers are [B, S/t, D], where t divides S; a step whose
S does not divide, such as a decoded word, runs without.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.autocast import biased
from ..kernels.comm import all_reduce, copy_gemm, gemm_ar, gemm_rs
from ..kernels.dispatch import once
from ..parallel.collectives import gather_from, reduce_from, scatter_to, stack_from
from ..parallel.mesh import Axis

__all__ = ["axis_of", "styles"]

class _GradSum(torch.autograd.Function):
    """Identity; the gradient, of which each rank has a part, is summed."""

    @staticmethod
    def forward(ctx, w, group):
        ctx.group = group
        return w.view_as(w)

    @staticmethod
    @once("tensor parallelism")
    def backward(ctx, dw):
        return all_reduce(dw.contiguous(), ctx.group), None


class _Whole(torch.autograd.Function):
    """[B, S/t, ...] -> [B, S, ...] for what is the same on every rank: the gradient is cut again, not summed."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return gather_from(x.transpose(0, 1).contiguous(), axis).transpose(0, 1)

    @staticmethod
    @once("sequence parallelism")
    def backward(ctx, dy):
        return dy.chunk(ctx.axis.size, 1)[ctx.axis.rank].contiguous(), None


def _local(p: Any) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p


def _summed(m: Any, forward: Callable, tp: Axis, *args: Any, **kwargs: Any) -> Any:
    """forward, with the gradients of m's own parameters summed over tp: in the graph, so that accumulated ones stay right."""
    own = m._parameters
    try:
        m._parameters = {n: p if p is None else _GradSum.apply(p, tp.group) for n, p in own.items()}
        return forward(*args, **kwargs)
    finally:
        m._parameters = own


def axis_of(mesh: Any) -> Axis:
    import torch.distributed as dist
    return Axis("tp", mesh.size(), mesh.get_local_rank(), tuple(dist.get_process_group_ranks(mesh.get_group())), mesh.get_group())


def _column(m: Any, x: Tensor, tp: Axis, gather: bool, summed: bool = True) -> Tensor:
    y = biased(copy_gemm(x, _local(m.weight), tp.group if summed else None), _local(m.bias))
    return stack_from(y.contiguous(), tp).movedim(0, -2).flatten(-2) if gather else y


def _row(m: Any, x: Tensor, tp: Axis) -> Tensor:
    return biased(gemm_ar(x, _local(m.weight), tp.group), _local(m.bias))


def _lookup(m: Any, ids: Tensor, tp: Axis) -> Tensor:
    w, rows = _local(m.weight), -(-m.num_embeddings // tp.size)       # DTensor's cut: full parts first
    at = ids - tp.rank * rows
    here = (at >= 0) & (at < len(w))
    if not len(w):                                                    # fewer rows than ranks
        w, here = torch.cat([w, w.new_zeros(1, w.shape[1])]), torch.zeros_like(here)
    return reduce_from(F.embedding(at.where(here, 0), w) * here.unsqueeze(-1), tp)


def _serves(m: Any, args: tuple, kwargs: dict) -> bool:
    """Whether our op takes what transformers' style would: one plain tensor, of the weight's type."""
    w = _local(m.weight)
    if len(args) != 1 or kwargs or type(args[0]) is not Tensor or getattr(m, "_hf_quantized_needs_local_tp", False):
        return False
    x = args[0]
    return x.device == w.device and not torch.is_autocast_enabled(x.device.type) and (x.dtype == w.dtype or not x.is_floating_point())


# ---- styles ------------------------------------------------------------------------------------------------------


def _over(stock: Any, serves: Callable[[Any, Any], bool], run: Callable[..., Tensor]) -> Any:
    """A style like `stock` in how parameters are cut, whose forward is `run(module, x, tp)` where it serves."""
    class Style(type(stock)):                                         # type: ignore[misc]
        def __init__(self: Any) -> None:
            self.__dict__.update(vars(stock))

        def install_forward(self, module: Any, mesh: Any) -> Any:
            super().install_forward(module, mesh)
            theirs = module.forward
            if not serves(module, mesh):
                return module
            tp = axis_of(mesh)

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                return run(module, *args, tp) if _serves(module, args, kwargs) else theirs(*args, **kwargs)
            module.forward = forward
            return module
    return Style()


def _linear(m: Any, mesh: Any, cut: str) -> bool:
    return type(m) is nn.Linear and mesh.ndim == 1 and mesh.size() > 1 and getattr(m, cut) % mesh.size() == 0


def _table(m: Any, mesh: Any) -> bool:
    options = m.padding_idx is not None or m.max_norm is not None or m.scale_grad_by_freq or m.sparse
    return type(m) is nn.Embedding and mesh.ndim == 1 and mesh.size() > 1 and not options


def styles(stock: Any) -> dict[str, Any]:
    """{name: style}, in place of those of `stock` (a registry's present ones) and beside them."""
    out = partial(_linear, cut="out_features")
    gathered = _over(stock["colwise_gather_output"], out, lambda m, x, tp: _column(m, x, tp, True))
    return {"colwise": _over(stock["colwise"], out, lambda m, x, tp: _column(m, x, tp, False)),
            "colwise_gather_output": gathered, "colwise_rep": gathered,
            "rowwise": _over(stock["rowwise"], partial(_linear, cut="in_features"), _row),
            "embedding_rowwise": _over(stock["embedding_rowwise"], _table, _lookup),
            "replicated_with_grad_allreduce": _style(stock, _replicated), **_new_styles(stock)}


def _style(stock: Any, install: Callable[[Any, Any], None], like: Any = None) -> Any:
    """A style that cuts parameters as `like` does (None: not), and changes the module by `install(module, mesh)`."""
    class Style(type(stock["replicate"])):                            # type: ignore[misc]
        def shard_param(self, module: Any, param: str, mesh: Any) -> None:
            if like is not None:
                like.shard_param(module, param, mesh)

        def install_forward(self, module: Any, mesh: Any) -> Any:
            install(module, mesh)
            return module
    return Style()


def _replicated(m: Any, mesh: Any) -> None:
    tp, theirs = axis_of(mesh), m.forward
    m.forward = lambda *args, **kwargs: _summed(m, theirs, tp, *args, **kwargs)


def _heads(m: Any, mesh: Any) -> None:
    """Of an attention block with fewer key / value heads than ranks: one of them here."""
    m.num_key_value_groups = m.config.num_attention_heads // mesh.size()
    for child in (m.k_proj, m.v_proj):
        child._interlace_heads = m.config.num_key_value_heads


def _new_styles(stock: Any) -> dict[str, Any]:
    """The styles that transformers has no like of."""
    sequence = SimpleNamespace(cut=False)                             # of the layer that runs: whether its input is cut over tp

    def key_value(m: Any, mesh: Any, cuts: bool = False) -> None:
        tp = axis_of(mesh)

        def forward(x: Tensor) -> Tensor:
            kv = m._interlace_heads
            rows, head = m.out_features // kv, tp.rank * kv // tp.size
            mine = slice(head * rows, (head + 1) * rows)
            y = copy_gemm(x, _GradSum.apply(m.weight, tp.group)[mine], None if cuts and sequence.cut else tp.group)
            return y if m.bias is None else biased(y, _GradSum.apply(m.bias, tp.group)[mine])
        m.forward = forward

    def layer(m: Any, mesh: Any) -> None:
        tp, theirs = axis_of(mesh), m.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            length = kwargs["position_embeddings"][0].shape[1]
            sequence.cut = length % tp.size == 0
            if sequence.cut and hidden_states.shape[1] == length:     # the first layer
                hidden_states = scatter_to(hidden_states.transpose(0, 1), tp).transpose(0, 1)
            return theirs(hidden_states, *args, **kwargs)
        m.forward = forward

    def gather(m: Any, mesh: Any, kv: bool = False) -> None:
        tp, theirs = axis_of(mesh), m.forward
        if kv:
            _heads(m, mesh)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sequence.cut:
                hidden_states = gather_from(hidden_states.transpose(0, 1).contiguous(), tp).transpose(0, 1)
            return theirs(hidden_states, *args, **kwargs)
        m.forward = forward

    def column(m: Any, mesh: Any) -> None:
        tp = axis_of(mesh)
        m.forward = lambda x: _column(m, x, tp, False, summed=not sequence.cut)

    def row(m: Any, mesh: Any) -> None:
        tp = axis_of(mesh)

        def forward(x: Tensor) -> Tensor:
            if not sequence.cut:
                return _row(m, x, tp)
            y = gemm_rs(x.transpose(0, 1).contiguous(), _local(m.weight), tp.group).transpose(0, 1)
            return y if m.bias is None else biased(y, _GradSum.apply(_local(m.bias), tp.group))
        m.forward = forward

    def norm(m: Any, mesh: Any, last: bool = False) -> None:
        tp, theirs = axis_of(mesh), m.forward

        def forward(x: Tensor) -> Tensor:
            y = _summed(m, theirs, tp, x) if sequence.cut else theirs(x)
            return _Whole.apply(y, tp) if last and sequence.cut else y
        m.forward = forward

    make = partial(_style, stock)
    return {"interlace_attention": make(_heads), "interlace_kv": make(key_value), "interlace_layer": make(layer),
            "interlace_gather": make(gather), "interlace_gather_kv": make(partial(gather, kv=True)),
            "interlace_kv_sequence": make(partial(key_value, cuts=True)), "interlace_column": make(column, like=stock["colwise"]),
            "interlace_row": make(row, like=stock["rowwise"]), "interlace_norm": make(norm),
            "interlace_last_norm": make(partial(norm, last=True))}
