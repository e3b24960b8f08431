"""DistributedDataParallel: every rank of dp trains a copy of the model on its own samples; gradients are averaged (arXiv:2006.15704)

    last layer  ....................................  first layer       the order in which a backward makes gradients
    [ buffer: every gradient of one axis and type, fp32 at least  ]     contiguous; p.main_grad is a view of it
    [ bucket 0 ][ bucket 1 ][ bucket 2 ][ ...         ][ bucket k ]     equal cuts; all-reduced one by one, in this order,
     reducing    reducing    waits for its last gradient                while the backward goes on

Comm    dp axis: 2 (n-1)/n * bytes of the gradients a step, whatever the number of micro-batches
ZeRO-1  (use_distributed_optimizer, arXiv:1910.02054) rank r owns part r of every bucket: reduce-scatter in place of all-reduce,
        the optimizer steps that part alone, an all-gather of the weights completes them, while the next forward begins: a layer waits
        for the buckets it has numbers in. The same bytes; 1/n of optimizer state. p.data is a view of a buffer cut alike: all in place.
Numerics  gradients are scaled by 1/dp as they are added, and summed in rank order (kernels/comm): bitwise repeatable, and equal
        with and without ZeRO-1. Experts have buffers of their own over edp (sharding.gradient_axis).
Threads on a CPU one thread a process runs the collectives of all buckets in order, over the heaps of dp and edp, which nothing else
        uses until finish(); none where kernels are interpreted. What it raises, finish() or the next gradient raises.
        CUDA: a stream beside the backward's.
"""
from __future__ import annotations

import contextlib
import functools
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.comm import all_gather, all_reduce, heap_of, reduce_scatter
from ..kernels.dispatch import INTERPRET
from .layout import ALIGN, bucketing
from .mesh import Axis, Mesh
from .sharding import gradient_axis


@dataclass(eq=False)
class Bucket:
    """Numbers start .. stop of a buffer, reduced in one call. waiting: parameters whose gradient has not arrived."""
    buffer: Buffer
    start: int
    stop: int
    params: list[nn.Parameter] = field(default_factory=list)
    waiting: set[nn.Parameter] = field(default_factory=set)

    def own(self) -> slice:
        """What this rank steps: its part under ZeRO-1, else all."""
        n = (self.stop - self.start) // self.buffer.shards
        first = self.start + (self.buffer.axis.rank * n if self.buffer.shards > 1 else 0)
        return slice(first, first + n)


class Buffer:
    """Gradients and weights of the parameters that share an axis and a type, each as one flat tensor, and its buckets."""

    def __init__(self, params: list[nn.Parameter], axis: Axis, scale: float, bucket_size: int | None, sharded: bool):
        self.params, self.axis, self.scale, self.shards = params, axis, scale, axis.size if sharded else 1
        self.start: dict[nn.Parameter, int] = {}
        at = 0
        for p in params:
            self.start[p] = at
            at += -(-p.numel() // ALIGN) * ALIGN
        self.numel, size = bucketing(at, axis.size, bucket_size)      # its tail is zero
        one = params[0]
        self.weights = torch.zeros(self.numel, dtype=one.dtype, device=one.device)
        self.grads = torch.zeros(self.numel, dtype=torch.promote_types(one.dtype, torch.float32), device=one.device)
        self.buckets = [Bucket(self, i, min(i + size, self.numel)) for i in range(0, self.numel, size)]
        for p in params:
            first, last = self.start[p], self.start[p] + p.numel()
            weight = self.weights[first:last].view_as(p)
            weight.copy_(p.detach())
            p.data, p.main_grad = weight, self.grads[first:last].view_as(p)  # type: ignore[attr-defined]
            for bucket in self.reaches(p):
                bucket.params.append(p)

    def address(self, p: nn.Parameter) -> int:
        """Where p begins in memory."""
        return self.weights.data_ptr() + self.start[p] * self.weights.element_size()

    def reaches(self, p: nn.Parameter) -> list[Bucket]:
        """The buckets that hold a part of p."""
        first, last, size = self.start[p], self.start[p] + p.numel(), self.buckets[0].stop
        return self.buckets[first // size:-(-last // size)]

    def parts(self, p: nn.Parameter) -> Iterator[tuple[int, slice]]:
        """(place in the flattened p, where it is in the buffer) of every part of p that this rank steps."""
        first, last = self.start[p], self.start[p] + p.numel()
        for bucket in self.reaches(p):
            own = bucket.own()
            here = slice(max(first, own.start), min(last, own.stop))
            if here.start < here.stop:
                yield here.start - first, here

    def gather(self, own: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Whole tensors, shaped like the parameters, of what each rank holds for its parts (`own`: flat, bucket after bucket).
        Collective over the axis under ZeRO-1, a bucket at a time."""
        whole: dict[Bucket, Tensor] = {}
        for p in self.params:
            flat, first = own.new_empty(p.numel()), self.start[p]
            reached = self.reaches(p)
            whole = {b: whole[b] if b in whole else self._whole(b, own) for b in reached}
            for b in reached:
                here = slice(max(first, b.start), min(first + p.numel(), b.stop))
                flat[here.start - first:here.stop - first] = whole[b][here.start - b.start:here.stop - b.start]
            yield p, flat.view_as(p)

    def _whole(self, bucket: Bucket, own: Tensor) -> Tensor:
        mine = own[bucket.start // self.shards:bucket.stop // self.shards]
        return all_gather(mine, self.axis.group) if self.shards > 1 else mine


class _Worker:
    """One thread that runs jobs in order. After a failure it drops the rest, until the failure has been raised."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[tuple[Callable[[], Any], threading.Event] | None] = queue.Queue()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="interlace-reduce", daemon=True)   # an exit must not wait for a peer
        self.thread.start()

    def _run(self) -> None:
        while (entry := self.jobs.get()) is not None:
            job, done = entry
            try:
                if self.error is None:
                    job()
            except BaseException as e:                                # raised again where the main thread can see it
                self.error = e
            finally:
                done.set()
                del entry, job                                        # it holds the buffers
                self.jobs.task_done()

    def close(self) -> None:
        """No more jobs. The end of a process aborts where it finds a daemon thread in C++: up to 5 s for what is under way."""
        self.jobs.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join(5)

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def wait(self) -> None:
        self.jobs.join()                                              # a signal's handler may raise out of this
        error, self.error = self.error, None
        if error is not None:
            raise error


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a model's forward calls: its children, and those in its lists."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _layers(child)
        else:
            yield child


class DistributedDataParallel(nn.Module):
    """`module` with its gradients averaged over the data-parallel ranks of `mesh`; on one rank, only its buffers.

        ddp = DistributedDataParallel(model, mesh)
        for i, batch in enumerate(micro_batches):             # this rank's
            with contextlib.nullcontext() if i == last else ddp.no_sync():
                ddp(batch).backward()
        ddp.finish()                                          # p.main_grad holds the mean; p.grad is always None
        ...; ddp.zero_grad()

    Args:
        module: every parameter on its device, the same weights on all ranks of an axis. mesh: default one process.
        bucket_size: numbers (not bytes) in a bucket, as Megatron's --ddp-bucket-size; None: 1/64 of them, 2**20 at least.
        use_distributed_optimizer: ZeRO-1. After finish() only `parts(p)` of main_grad hold the mean; models/optimizer.py steps them.
    Raises (from backward or finish): RuntimeError for a second backward after the reduction began, and where the module's parameters
    are no longer those of the buffers; what the collectives raise.
    """

    def __init__(self, module: nn.Module, mesh: Mesh | None = None, *, bucket_size: int | None = None,
                 use_distributed_optimizer: bool = False):
        super().__init__()
        self.module: Any
        self.module, self.mesh, self.sharded = module, mesh or Mesh(), use_distributed_optimizer
        order = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        alike: dict[tuple, list[nn.Parameter]] = {}
        for p in order:
            alike.setdefault((gradient_axis(p, self.mesh), p.dtype, p.device), []).append(p)
        self.grad_buffers = [Buffer(params, axis, scale, bucket_size, self.sharded) for ((axis, scale), *_), params in alike.items()]
        self.buffer_of = {p: buffer for buffer in self.grad_buffers for p in buffer.params}
        last = {p: i for i, p in enumerate(order)}
        self.buckets = sorted((b for f in self.grad_buffers for b in f.buckets), key=lambda b: last[b.params[-1]])
        self.sync, self.started, self.done = True, 0, False           # buckets begun this step; whether finish() ran
        self.seen: set[nn.Parameter] = set()                          # have a gradient this step
        self.worker: _Worker | None = None
        self.stream = next((torch.cuda.Stream(f.grads.device) for f in self.grad_buffers if f.grads.is_cuda and f.axis.size > 1), None)
        for buffer in self.grad_buffers:
            if buffer.axis.size > 1 and buffer.grads.is_cpu:
                assert buffer.axis.group is not None
                heap_of(buffer.axis.group)                            # made here, together, and not by the thread
                if not INTERPRET:                                     # Triton's interpreter serves one thread: a job runs at once
                    self.worker = self.worker or _Worker()
        if self.worker is not None:
            weakref.finalize(self, self.worker.close)
        arrived = weakref.WeakMethod(self._arrived)                  # hooks are hidden from the garbage collector: a strong one keeps all
        for p in order:
            p.register_post_accumulate_grad_hook(lambda p: call(p) if (call := arrived()) is not None else None)
        self.coming: dict[Bucket, Callable[[], Any]] = {}             # buckets of weights on their way, and what waits for each
        self.direct = self._buckets_of(module.parameters(recurse=False))
        for layer in _layers(module) if self.sharded else ():
            layer.register_forward_pre_hook(functools.partial(self._before, self._buckets_of(layer.parameters())))
        self._expect()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.ready(self.direct)
        return self.module(*args, **kwargs)

    def _buckets_of(self, params: Iterable[nn.Parameter]) -> list[Bucket]:
        return list(dict.fromkeys(b for p in params if p in self.buffer_of for b in self.buffer_of[p].reaches(p)))

    def _before(self, buckets: list[Bucket], *_: Any) -> None:
        if self.coming:
            self.ready(buckets)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in here add up gradients and reduce nothing: all micro-batches of a step but the last."""
        before, self.sync = self.sync, False
        try:
            yield
        finally:
            self.sync = before

    @torch.no_grad()
    def _add(self, p: nn.Parameter) -> None:
        """main_grad += scale * grad, in main_grad's type (a bf16 sum over micro-batches would lose its low bits)."""
        grad, scale, main = p.grad, self.buffer_of[p].scale, p.main_grad  # type: ignore[attr-defined]
        p.grad = None
        assert grad is not None
        if p in self.seen:
            main.add_(grad, alpha=scale)
        elif scale == 1 or grad.dtype != main.dtype:
            main.copy_(grad)
            if scale != 1:
                main.mul_(scale)
        else:
            torch.mul(grad, scale, out=main)
        self.seen.add(p)

    def _arrived(self, p: nn.Parameter) -> None:
        """A gradient is complete for this backward."""
        buckets = self.buffer_of[p].reaches(p)
        if self.done or any(p not in b.waiting for b in buckets):
            raise RuntimeError("DistributedDataParallel: a step reduces a gradient once, got one more after the last; run every backward "
                               "but the last under no_sync(), and call zero_grad() after a step")
        self._add(p)
        if self.sync:
            for bucket in buckets:
                bucket.waiting.discard(p)
            self._start(lambda b: not b.waiting)

    def _expect(self) -> None:
        for bucket in self.buckets:
            bucket.waiting = set(bucket.params)

    def _start(self, ready: Callable[[Bucket], bool]) -> None:
        """Begin the reductions of the next buckets that are ready; in one order, or ranks would wait for each other for ever."""
        if self.worker is not None:
            self.worker.check()
        while self.started < len(self.buckets) and ready(self.buckets[self.started]):
            self.started += 1
            self._reduce(self.buckets[self.started - 1])

    def _reduce(self, bucket: Bucket) -> None:
        """Begin to sum one bucket over its axis, in place."""
        buffer, group = bucket.buffer, bucket.buffer.axis.group
        whole, own = buffer.grads[bucket.start:bucket.stop], buffer.grads[bucket.own()]

        def job() -> None:
            if buffer.shards > 1:
                reduce_scatter(whole, group, out=own)
            else:
                all_reduce(whole, group, out=whole)
        if buffer.axis.size > 1:
            self._beside(job, whole)

    def _beside(self, job: Callable[[], Any], of: Tensor) -> Callable[[], Any]:
        """Run a collective over tensor `of` beside what goes on; returns what waits for it."""
        if of.is_cpu:
            if self.worker is None:
                job()
                return lambda: None
            done = threading.Event()
            self.worker.jobs.put((job, done))
            return done.wait
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream(of.device))
        with torch.cuda.stream(self.stream):
            job()
        event = self.stream.record_event()
        return lambda: torch.cuda.current_stream(of.device).wait_event(event)

    def finish(self) -> None:
        """Reduce what is left and wait for all of it; a parameter without a gradient has zero. Twice is as once."""
        if self.done:
            return
        self._still_here()
        for p in self.buffer_of:
            if p.grad is not None:                                    # set by hand, past autograd's hooks
                self._arrived(p)
            elif p not in self.seen:
                p.main_grad.zero_()  # type: ignore[attr-defined]
        self._start(lambda b: True)
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        if self.worker is not None:
            self.worker.wait()
        self.done = True

    def _still_here(self) -> None:
        """Else the buffers would be stepped, and the model would compute with others."""
        for name, p in self.module.named_parameters():
            buffer = self.buffer_of.get(p)
            if p.requires_grad and (buffer is None or (p.numel() and p.data_ptr() != buffer.address(p))):
                raise RuntimeError(f"DistributedDataParallel: the parameters must stay those that were wrapped, in its buffers, got a new "
                                   f"{name}: by module.to(), load_state_dict(assign=True) or requires_grad_()? Do that first, then wrap")

    def parts(self, p: nn.Parameter) -> Iterable[tuple[int, Tensor]]:
        """(place in the flattened p, gradient there) of what this rank steps: all of p, or its parts under ZeRO-1."""
        buffer = self.buffer_of.get(p)
        return [] if buffer is None else [(at, buffer.grads[here]) for at, here in buffer.parts(p)]

    def gather_weights(self) -> None:
        """ZeRO-1, after the step: begin to give this rank's parts of the weights to all, and to take the others'; in place, the first
        layers' buckets first. ready() before weights are read, or the axis is used, by other than the forward."""
        for bucket in reversed(self.buckets):
            buffer = bucket.buffer
            if buffer.shards > 1:
                whole, own, group = buffer.weights[bucket.start:bucket.stop], buffer.weights[bucket.own()], buffer.axis.group
                self.coming[bucket] = self._beside(functools.partial(all_gather, own, group, out=whole), whole)

    def ready(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Wait for the weights of some buckets that gather_weights() began with; default: of all."""
        for bucket in list(self.coming) if buckets is None else buckets:
            if (wait := self.coming.pop(bucket, None)) is not None:
                wait()
        if self.worker is not None:
            self.worker.check()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step: what is in main_grad is written over by the next gradient."""
        self.seen.clear()
        self.started, self.done = 0, False
        self._expect()
