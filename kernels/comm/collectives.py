"""all_reduce, all_gather, reduce_scatter, all_to_all over one group: shared memory on CPU, else torch.distributed's own

Shapes    x [n, ...] -> all_reduce [n, ...] · all_gather [W * n, ...] · reduce_scatter [n / W, ...] · all_to_all [n, ...]
Bytes     moved per rank, b = bytes of x, W ranks (read + written, caches included):
          all_reduce one-shot    b in, (W + 1) b summed                                  one wait a chunk
          all_reduce two-shot    b (W-1)/W in, b/W (W + 2) summed, 2 b (W-1)/W out       from 256 KB on, one wait a chunk
          all_gather             b in, W b out       reduce_scatter, all_to_all          b (W-1)/W in, b out
Time      T = T_call + T_signal + bytes / B:  about 2 us of Python, 0.8 of them ctypes (a torch op: 1.3 to 2.0), 0.3 us a signal between
          two running cores, and the copy bandwidth of one core. Ranks that outnumber the cores give way by sched_yield, then sleep: 92 us
          for eight on two busy cores, 146 where they sleep at once.
Numerics  sums run in rank order, in fp32 for bf16 and fp16, one rounding: bitwise equal on every rank and in every run
Source    one- and two-shot all-reduce as in vLLM's and TensorRT-LLM's custom all-reduce; csrc/runtime/ has the protocol

Backward  all_reduce <-> itself, all_gather <-> reduce_scatter, all_to_all <-> itself: the exact dual, where every rank's loss
          counts. A layer that knows its gradients to be replicated has cheaper ones: parallel/collectives.py

x is never written to. The result is new memory (a copy even for one rank, so it may be modified), or `out`, which may be x
itself in all_reduce; no gradient flows through `out`.
"""
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import INTERPRET, traced
from . import overlap
from .agree import agree
from .heap import CODES, LIB, SymmHeap, _heaps, heap_of
from .pad import in_turn
from .registry import Group, checked, group_size, register

__all__ = ["Group", "all_gather", "all_reduce", "all_to_all", "begin", "beside", "gather_into", "group_size", "reduce_scatter",
           "scatter_into"]

_OPS = {"sum": (0, dist.ReduceOp.SUM), "max": (1, dist.ReduceOp.MAX)}
_unset = object()
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed them, and warns
scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _heap(x: Tensor, group: Group) -> SymmHeap | None:
    """The heap a collective over x goes through. Called before any exchange: the same answer on all ranks."""
    if not x.is_cpu or group is None:
        return None
    if type(group) is SymmHeap:
        return group
    heap = _heaps.get(id(group), _unset)
    return heap_of(checked("collective", group)) if heap is _unset else heap  # type: ignore[return-value]


def _torch_group(x: Tensor, group: Group, op: str = "") -> tuple[dist.ProcessGroup | None, int]:
    """The process group behind `group`, and its size: 1 for None. Asked before a collective of torch.distributed, which where ranks differ
    ends the process (gloo) or hangs (NCCL): at the first call of `op` with some x all ranks say what they mean."""
    if type(group) is SymmHeap:
        group = group.group
    if x.is_cuda:
        in_turn(x.device, False)
    size = 1 if group is None else dist.get_world_size(group)         # type: ignore[arg-type]
    if op and size > 1:
        agree(op, group, shape=tuple(x.shape), dtype=x.dtype)
    return group, size                                                # type: ignore[return-value]


def _rank(group: Group) -> int:
    return group.rank if type(group) is SymmHeap else 0 if group is None else dist.get_rank(group)   # type: ignore[arg-type]


def _result(op: str, x: Tensor, shape: tuple[int, ...] | torch.Size, out: Tensor | None, place: int = 0) -> Tensor:
    """out, or new memory. place: how many bytes after the start of out x may begin, where the two share memory."""
    if out is None:
        return x.new_empty(shape)
    if out.shape != torch.Size(shape) or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        raise ValueError(f"{op}: out must be a contiguous {list(shape)} tensor of {x.dtype} on {x.device}, "
                         f"got {list(out.shape)} of {out.dtype} on {out.device}")
    if -x.nbytes < (shift := x.data_ptr() - out.data_ptr()) < out.nbytes and shift != place and x.is_contiguous():
        raise ValueError(f"{op}: out must be memory of its own, or share with x what is this rank's part, got x {shift} bytes from its "
                         "start; leave out away")
    return out


def _parts(op: str, x: Tensor, size: int) -> int:
    """Rows of x per rank."""
    if x.dim() == 0 or x.shape[0] % size:
        raise ValueError(f"{op}: dimension 0 of x must be divisible by the {size} ranks of the group, got shape {list(x.shape)}; "
                         "pad it")
    return x.shape[0] // size


def _code(x: Tensor) -> int:
    return CODES.get(x.dtype, 6 + x.dtype.itemsize)


# ---- ops ------------------------------------------------------------------------------------------------------


def _all_reduce(x: Tensor, op: str, group: Group, out: Tensor | None = None) -> Tensor:
    heap, code = _heap(x, group), CODES.get(x.dtype)
    if not x.is_contiguous():
        x = x.contiguous()
    if (heap is None or INTERPRET) and op == "sum" and (y := overlap.reduced(x, group)) is not None:
        return y if out is None else _result("all_reduce", x, x.shape, out).copy_(y)
    if heap is not None and code is not None:
        y = torch.empty_like(x) if out is None else out if out is x else _result("all_reduce", x, x.shape, out)
        if rc := LIB.interlace_all_reduce(heap.handle, x.data_ptr(), y.data_ptr(), x.numel(), code, _OPS[op][0]):
            heap.fail(rc)
        return y
    pg, size = _torch_group(x, group, f"all_reduce {op}")
    y = _result("all_reduce", x, x.shape, out)
    if y is not x:
        y.copy_(x)
    if size > 1:
        dist.all_reduce(y, _OPS[op][1], pg)
    return y


def _all_gather(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    heap = _heap(x, group)
    if not x.is_contiguous():
        x = x.contiguous()
    place = 0 if out is None else _rank(heap or group) * x.nbytes
    if (heap is None or INTERPRET) and (whole := overlap.gathered(x, group)) is not None:
        return whole if out is None else _result("all_gather", x, whole.shape, out, place).copy_(whole)
    pg, size = (None, heap.size) if heap is not None else _torch_group(x, group, "all_gather")
    y = _result("all_gather", x, (x.shape[0] * size, *x.shape[1:]), out, place)
    if heap is not None:
        if rc := LIB.interlace_all_gather(heap.handle, x.data_ptr(), y.data_ptr(), x.numel(), x.element_size(), _code(x)):
            heap.fail(rc)
    elif size > 1:
        gather_into(y, x, pg)
    else:
        y.copy_(x)
    return y


def _reduce_scatter(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    heap, code = _heap(x, group), CODES.get(x.dtype)
    shape = (_parts("reduce_scatter", x, group_size(heap or group)), *x.shape[1:])
    place = 0 if out is None else -_rank(heap or group) * out.nbytes
    if not x.is_contiguous():
        x = x.contiguous()
    if (heap is None or INTERPRET) and (part := overlap.scattered(x, None, group)) is not None:
        return part if out is None else _result("reduce_scatter", x, shape, out, place).copy_(part)
    pg, size = (None, heap.size) if heap is not None else _torch_group(x, group, "reduce_scatter")
    y = _result("reduce_scatter", x, shape, out, place)
    if heap is not None and code is not None:
        if rc := LIB.interlace_reduce_scatter(heap.handle, x.data_ptr(), y.data_ptr(), y.numel(), code):
            heap.fail(rc)
    elif size > 1:
        scatter_into(y, x, group=heap.group if heap is not None else pg)
    else:
        y.copy_(x)
    return y


def _all_to_all(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    heap = _heap(x, group)
    pg, size = (None, heap.size) if heap is not None else _torch_group(x, group, "all_to_all")
    _parts("all_to_all", x, size)
    y = _result("all_to_all", x, x.shape, out)
    if not x.is_contiguous():
        x = x.contiguous()
    if heap is not None:
        if rc := LIB.interlace_all_to_all(heap.handle, x.data_ptr(), y.data_ptr(), x.numel() // size, x.element_size(), _code(x)):
            heap.fail(rc)
    elif size > 1:
        dist.all_to_all_single(y, x, group=pg)
    else:
        y.copy_(x)
    return y


def begin(op: str, x: Tensor, group: Group) -> tuple[Tensor, Callable[[], object]]:
    """torch.distributed's own all_reduce (in place), all_gather or reduce_scatter of a contiguous x, begun in the background: the
    result, and what waits for it."""
    pg, size = _torch_group(x, group)
    if op == "all_reduce":
        return x, dist.all_reduce(x, group=pg, async_op=True).wait
    y = x.new_empty(x.shape[0] * size if op == "all_gather" else x.shape[0] // size, *x.shape[1:])
    return y, (gather_into if op == "all_gather" else scatter_into)(y, x, group=pg, async_op=True).wait


def beside(op: str, x: Tensor, group: Group, meanwhile: Callable[[], object] | None) -> Tensor:
    """What `begin` begins, with meanwhile() run before it is waited for."""
    y, wait = begin(op, x, group)
    if meanwhile is not None:
        meanwhile()
    wait()
    return y


# ---- autograd -------------------------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    ctx.group = inputs[-1]


def _reduce_setup(ctx, inputs, output):
    _, ctx.op, ctx.group = inputs


def _reduce_backward(ctx, dy):
    if ctx.op != "sum":
        raise NotImplementedError(f"all_reduce: only op='sum' has a gradient, got {ctx.op!r}; detach x")
    return _reduce(dy, "sum", ctx.group), None, None


_scatter: Callable[..., Tensor]                                       # each names itself or the next
_exchange: Callable[..., Tensor]
_reduce = register("all_reduce(Tensor x, str op, str group) -> Tensor", _all_reduce,
                   lambda x, op, world: x.new_empty(x.shape), _reduce_setup, _reduce_backward, linear=True)
_gather = register("all_gather(Tensor x, str group) -> Tensor", _all_gather,
                   lambda x, world: x.new_empty(x.shape[0] * world, *x.shape[1:]), _setup,
                   lambda ctx, dy: (_scatter(dy, ctx.group), None), linear=True)
_scatter = register("reduce_scatter(Tensor x, str group) -> Tensor", _reduce_scatter,
                    lambda x, world: x.new_empty(x.shape[0] // world, *x.shape[1:]), _setup,
                    lambda ctx, dy: (_gather(dy, ctx.group), None), linear=True)
_exchange = register("all_to_all(Tensor x, str group) -> Tensor", _all_to_all,
                     lambda x, world: x.new_empty(x.shape), _setup, lambda ctx, dy: (_exchange(dy, ctx.group), None), linear=True)


def _lean(x: Tensor, out: Tensor | None) -> bool:
    """True where nobody records x: then a call is its kernel. What is recorded goes through the op. Raises: ValueError for an out where
    gradients are recorded: no graph would know of it."""
    recorded = torch.is_grad_enabled()
    if out is not None and recorded and (out.requires_grad or x.requires_grad):
        raise ValueError("x and out must not require a gradient where gradients are recorded and there is an out, got one that does; "
                         "leave out away, or use torch.no_grad()")
    return not traced() and (out is not None or not (x.requires_grad and recorded))


def _into(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)


# ---- public ---------------------------------------------------------------------------------------------------


def all_reduce(x: Tensor, group: Group, *, op: str = "sum", out: Tensor | None = None) -> Tensor:
    """out[i] = sum (op="max": maximum) of x[i] over the ranks of `group`. Every rank gets the same bits.

    Args: x, of one shape and dtype on all ranks; group  process group, SymmHeap, or None for one rank; out  may be x.
    Raises: CollectiveMismatch, PeerDied, TimeoutError, each naming the rank; ValueError for a bad op or out.
    """
    if op not in _OPS:
        raise ValueError(f"all_reduce: op must be 'sum' or 'max', got {op!r}")
    return _all_reduce(x, op, group, out) if _lean(x, out) else _into(_reduce(x, op, group), out)


def all_gather(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """The x of every rank of `group`, one after the other along dimension 0. x has one shape on all ranks; any dtype.

    Raises: as `all_reduce`; ValueError for a scalar x."""
    if x.dim() == 0:
        raise ValueError("all_gather: x must have a dimension to concatenate along, got a scalar; use x.view(1)")
    return _all_gather(x, group, out) if _lean(x, out) else _into(_gather(x, group), out)


def reduce_scatter(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """This rank's 1/W of the sum of x over the ranks of `group`, along dimension 0.

    Raises: as `all_reduce`; ValueError where dimension 0 is not divisible by the group's size."""
    if _lean(x, out):
        return _reduce_scatter(x, group, out)
    _parts("reduce_scatter", x, group_size(group))
    return _into(_scatter(x, group), out)


def all_to_all(x: Tensor, group: Group, out: Tensor | None = None) -> Tensor:
    """Equal parts of x along dimension 0, part r to rank r; the result has the part of every rank, in rank order. Any dtype.

    Raises: as `all_reduce`; ValueError where dimension 0 is not divisible by the group's size."""
    if _lean(x, out):
        return _all_to_all(x, group, out)
    _parts("all_to_all", x, group_size(group))
    return _into(_exchange(x, group), out)
