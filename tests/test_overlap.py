"""The public communication ops through the Triton kernels, interpreted: forward and backward against one process in fp64 by the rule of
each op's own test, and the path said is the path taken; then the rule for CUDA by itself."""
import pytest
import torch
import torch.distributed as dist
from ranks import run
from test_gemm_ar import _copy_gemm, _gemm_ar
from test_gemm_rs import _ag_gemm, _gemm_rs
from test_rs_residual_norm import _check as _rs_residual_norm

from interlace.kernels import dispatch
from interlace.kernels.comm import SymmHeap, all_gather, all_reduce, gemm_ar, paths_taken, reduce_scatter
from interlace.kernels.comm.choose import KERNELS, choose

interpreted = pytest.mark.skipif(not dispatch.INTERPRET, reason="needs TRITON_INTERPRET=1")


def _counted(counts, name, real):
    def call(pad, *args, **options):
        counts[pad.op, name] = counts.get((pad.op, name), 0) + 1
        return real(pad, *args, **options)
    return call


def _launched(rank, check, kernels, op, name, *args):
    """Runs check and holds paths_taken() against the kernels that were launched."""
    from interlace.kernels.comm import agree, triton_ag, triton_ar, triton_rs
    agree._taken.clear()
    agree._choose.cache_clear()
    counts = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, fn in ((triton_ar, "launch"), (triton_ag, "launch"), (triton_rs, "push"), (triton_rs, "take")):
            patch.setattr(module, fn, _counted(counts, fn, getattr(module, fn)))
        check(rank, *args)
    assert all(counts.get(k) for k in kernels), f"{kernels} should have run, got {counts}"
    lines = [line for line in paths_taken() if line.startswith(f"{op} [")]
    assert any(name in line for line in lines), f"{op} should take the {name}, got {paths_taken()}"
    assert not any("float64" in line and "kernel:" in line for line in lines)


CASES = {
    "gemm_ar": (_gemm_ar, [("gemm_ar", "launch")], "one-shot kernel", (19, 21, 23)),
    "gemm_rs": (_gemm_rs, [("gemm_rs", "push"), ("gemm_rs", "take"), ("all_gather", "launch")], "overlapped kernel", (6, 3, 21, 19)),
    "ag_gemm": (_ag_gemm, [("ag_gemm", "launch"), ("gemm_rs", "take"), ("all_gather", "launch")], "overlapped kernel", (6, 3, 21, 19)),
    "rs_residual_norm": (_rs_residual_norm, [("rs_residual_norm", "push"), ("rs_residual_norm", "take"), ("all_gather", "launch")],
                         "overlapped kernel", (6, 2, 7)),
}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_public_op_kernel_matches(world, op, dtype):
    check, kernels, name, shape = CASES[op]
    extra = (world % 2 == 0,) if op == "rs_residual_norm" else ()     # LayerNorm over 2 ranks, RMSNorm over 3
    run(world, _launched, check, kernels, op, name, world, shape, dtype, *extra)


@interpreted
def test_copy_gemm_backward_kernel_matches_in_float64_without_one():
    """float64 goes through the heap: the kernels accumulate in fp32."""
    run(3, _copy_gemm, 3)


def _collectives(rank, world):
    g = torch.Generator().manual_seed(1)
    every = [torch.randint(-4, 5, (2 * world, 3, 5), generator=g).half() for _ in range(world)]
    total, x, group = sum(every), every[rank], dist.group.WORLD
    for make in (lambda: x, lambda: x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(all_reduce(make(), group), total)
        assert torch.equal(all_gather(make(), group), torch.cat(every))
        assert torch.equal(reduce_scatter(make(), group), total.chunk(world)[rank])
    out = x.clone()
    assert all_reduce(out, group, out=out) is out and torch.equal(out, total)
    assert torch.equal(all_reduce(x, SymmHeap(group)), total)
    assert torch.equal(all_gather(x[:, 0, 0].contiguous(), group), torch.cat([e[:, 0, 0] for e in every]))
    assert torch.equal(reduce_scatter(x[:, 0, 0].contiguous(), group), total[:, 0, 0].chunk(world)[rank])
    flat = [torch.randint(-4, 5, (world * 688,), generator=g).half() for _ in range(world)]   # a bucket of gradients: no power of 2
    for n in (688, 77):                                               # rows of 688; of 1, since 77 has no divisor that is whole 16s
        mine = slice(rank * n, rank * n + n)
        assert torch.equal(reduce_scatter(flat[rank][:world * n], group), sum(flat)[:world * n][mine])
        want = torch.cat([f[r * n:r * n + n] for r, f in enumerate(flat)])
        assert torch.equal(all_gather(flat[rank][mine], group), want)
        whole = flat[rank][:world * n].clone()                        # ZeRO-1: a rank's part lies in the whole, both ways
        assert torch.equal(all_gather(whole[mine], group, out=whole), want) and torch.equal(whole, want)
        whole = flat[rank][:world * n].clone()
        assert torch.equal(reduce_scatter(whole, group, out=whole[mine]), sum(flat)[:world * n][mine])
    y = x.clone().requires_grad_()
    all_gather(y, group).backward(torch.cat([e * (rank + 1) for e in every]))
    assert torch.equal(y.grad, x * sum(range(1, world + 1)))
    assert torch.equal(all_reduce(x, group, op="max"), torch.stack(every).amax(0)), "no kernel takes a maximum"
    assert torch.equal(all_gather(x.int(), group), torch.cat(every).int()), "nor integers"
    assert all_reduce(x[:0], group).shape == x[:0].shape and all_gather(x[:0], group).shape == x[:0].shape


@interpreted
@pytest.mark.parametrize("world", [2, 3])
def test_collectives_kernel_matches(world):
    run(world, _launched, _collectives, [("all_reduce", "launch"), ("all_gather", "launch"), ("reduce_scatter", "take")], "all_gather",
        "overlapped kernel", world)


def _fallback(rank):
    """Where the rule says so, or ranks cannot reach each other's memory, or w has no columns, the plain way is taken."""
    from interlace.kernels.comm import agree, pad
    agree._choose.cache_clear()
    x, w, group = torch.ones(3, 4), torch.ones(5, 4), dist.group.WORLD
    assert torch.equal(gemm_ar(x[:, :0], w[:, :0], group), torch.zeros(3, 5))
    pad._rooms[id(group), "cpu"] = 0
    try:
        assert torch.equal(gemm_ar(x, w, group), torch.full((3, 5), 8.0))
        assert any(line.startswith("gemm_ar [3 x 5, K 4") and "kernel" not in line for line in paths_taken())
    finally:
        pad._rooms.clear()
        agree._choose.cache_clear()


@interpreted
def test_without_symmetric_memory_interpret():
    run(2, _fallback)


GB = 1 << 30


def test_the_rule_on_cuda():
    """One-shot for few bytes, two-shot for many, NCCL for what no pad holds, no K, no memory in common, or a GEMM that hides nothing."""
    path = lambda op, rows, cols, inner, slot=GB, **more: choose(op, rows, cols, inner, 2, 8, "cuda", slot, **more).name  # noqa: E731
    assert path("gemm_ar", 4, 4096, 4096) == path("all_reduce", 4096, 1, 0) == "one-shot kernel"
    assert path("gemm_ar", 4096, 8192, 3584) == path("all_reduce", 1 << 20, 1, 0) == "two-shot kernel"
    assert path("gemm_rs", 4096, 8192, 3584) == path("ag_gemm", 512, 8192, 7168) == path("rs_residual_norm", 512, 8192, 0) \
        == path("all_gather", 1 << 20, 1, 0) == path("reduce_scatter", 1 << 20, 1, 0) == "overlapped kernel"
    assert path("ag_gemm", 512, 8192, 7168, whole=True) == "kernel, then GEMM"
    for op, sizes in (("gemm_ar", (1 << 20, 8192, 64)), ("gemm_rs", (4096, 8192, 0)), ("gemm_ar", (0, 8192, 64)),
                      ("rs_residual_norm", (512, 20000, 0)), ("gemm_rs", (2048, 1024, 1 << 20))):
        assert path(op, *sizes) == "torch.distributed", (op, sizes)
    for op in ("gemm_ar", "gemm_rs", "ag_gemm", "rs_residual_norm", "all_reduce", "all_gather", "reduce_scatter"):
        assert path(op, 512, 1024, 1024, 0) == "torch.distributed"
        seconds = [choose(op, rows, 1024, 1024, 2, 8, "cuda", GB).seconds for rows in (1, 16, 256, 4096)]
        assert seconds == sorted(seconds)
    assert set(KERNELS) >= {name for name, _ in choose("gemm_ar", 4, 64, 64, 2, 2, "cuda", GB).others if name != "torch.distributed"}


@pytest.mark.skipif(dispatch.INTERPRET or not hasattr(dispatch.triton, "__version__"), reason="the tiles of a GPU, which Triton makes")
@pytest.mark.parametrize("n", [77777, 14448 * 9, 1 << 20, 3 * 5 * 1024])
def test_a_vector_takes_the_room_that_the_path_was_chosen_for(n):
    """n numbers a rank; odd ones move in rows of one number, each in a tile of 64."""
    from interlace.kernels.comm import overlap, triton_rs
    world, width = 3, overlap._width(n, 3 * n)
    assert n % width == 0 and (width == 1) == (n % 2 == 1)
    rows = world * n // width
    nbytes, _ = triton_rs.needs(rows, width, torch.float32, world, False)
    assert nbytes <= 1.2 * 4 * overlap._room_for(world * n, width) + world * 64 * 1024 * 4, "more than whole row blocks round up"
