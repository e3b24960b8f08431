"""The declaration table of the static report: for every Triton kernel, launches of real sizes, and the bytes it must move.

    Case("rms_norm", "8192x8192", lambda dt: RMS._launch_fwd(x(dt), None, w(dt), 1e-6), {"_fwd_kernel": lambda s: ...})

launch(dtype) calls the op's own launcher on tensors without data (that say they are on CUDA), so signature, constexprs, block sizes
and num_warps are what a real call compiles: nothing is written twice. floor[kernel](itemsize) is the `Bytes` formula of the
kernel file's docstring for one launch of that kernel, less what this launch design adds (partial sums): the report shows both.

A new kernel gets a Case here (tests/test_static.py counts), then `interlace bench --static --accept`.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASES", "Case"]


def _module(name: str) -> Any:                                        # by path: the package's name for it is the function
    return import_module(f"..kernels.{name}", __package__)


RMS, LN, SWIGLU, ROPE, CE, DROPOUT, PLAN, PERMUTE, UNPERMUTE = map(_module, (
    "rms_norm", "layer_norm", "swiglu", "rope", "cross_entropy", "dropout", "route_plan", "permute", "unpermute"))
PAD, AR, AG, RS = map(_module, ("comm.pad", "comm.triton_ar", "comm.triton_ag", "comm.triton_rs"))
Launch = Callable[[torch.dtype], object]
Floor = Callable[[int], float]


@dataclass(frozen=True)
class Case:
    """One launch. op: the kernel file; flops: of all kernels of this launch."""
    op: str
    name: str
    launch: Launch
    floor: dict[str, Floor]
    flops: float = 0.0


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _norms(N: int, D: int) -> list[Case]:
    """Llama 70B's width 8192, and GPT-3's 12288 in a masked block of 16384, the widest that is taken."""
    x: Callable[[torch.dtype], Tensor] = lambda dt: _new(N, D, dtype=dt)      # noqa: E731
    w: Callable[[torch.dtype], Tensor] = lambda dt: _new(D, dtype=dt)         # noqa: E731
    stat, size = lambda: _new(N), f"{N}x{D}"
    return [
        Case("rms_norm", size, lambda dt: RMS._launch_fwd(x(dt), None, w(dt), 1e-6),
             {"_fwd_kernel": lambda s: (2 * N * D + D) * s + 4 * N}, 4 * N * D),
        Case("rms_norm", f"add {size}", lambda dt: RMS._launch_fwd(x(dt), x(dt), w(dt), 1e-6),
             {"_fwd_kernel": lambda s: (4 * N * D + D) * s + 4 * N}, 5 * N * D),
        Case("rms_norm", size, lambda dt: RMS._launch_bwd(x(dt), x(dt), w(dt), stat(), _new(0, dtype=dt)),
             {"_bwd_kernel": lambda s: (3 * N * D + 2 * D) * s + 4 * N}, 9 * N * D),
        Case("rms_norm", f"add {size}", lambda dt: RMS._launch_bwd(x(dt), x(dt), w(dt), stat(), x(dt)),
             {"_bwd_kernel": lambda s: (4 * N * D + 2 * D) * s + 4 * N}, 10 * N * D),
        Case("layer_norm", size, lambda dt: LN._launch_fwd(x(dt), None, w(dt), w(dt), 1e-5),
             {"_fwd_kernel": lambda s: (2 * N * D + 2 * D) * s + 8 * N}, 7 * N * D),
        Case("layer_norm", f"add {size}", lambda dt: LN._launch_fwd(x(dt), x(dt), w(dt), w(dt), 1e-5),
             {"_fwd_kernel": lambda s: (4 * N * D + 2 * D) * s + 8 * N}, 8 * N * D),
        Case("layer_norm", size, lambda dt: LN._launch_bwd(x(dt), x(dt), w(dt), stat(), stat(), None, True),
             {"_bwd_kernel": lambda s: (3 * N * D + 3 * D) * s + 8 * N}, 12 * N * D),
        Case("layer_norm", f"add {size}", lambda dt: LN._launch_bwd(x(dt), x(dt), w(dt), stat(), stat(), x(dt), True),
             {"_bwd_kernel": lambda s: (4 * N * D + 3 * D) * s + 8 * N}, 13 * N * D),
    ]


def _swiglu(N: int, F: int) -> list[Case]:
    """Llama 70B's ffn of 28672."""
    half, both = lambda dt: _new(N, F, dtype=dt), lambda dt: _new(N, 2 * F, dtype=dt)
    return [
        Case("swiglu", f"{N}x{F}", lambda dt: SWIGLU._launch_fwd(both(dt)), {"_fwd_kernel": lambda s: 3 * N * F * s}, 5 * N * F),
        Case("swiglu", f"{N}x{F}", lambda dt: SWIGLU._launch_bwd(half(dt), both(dt)),
             {"_bwd_kernel": lambda s: 5 * N * F * s}, 9 * N * F),
    ]


def _rope(S: int, B: int, H: int, Dh: int) -> list[Case]:
    """Llama 70B's queries, a slice of a fused qkv with 8 key and 8 value heads, and the contiguous gradient."""
    floor: dict[str, Floor] = {"_kernel": lambda s: 2 * S * B * H * Dh * s + 4 * S * Dh}
    table, size, flops = lambda: _new(S, Dh // 2), f"{S}x{B}x{H}x{Dh}", 3 * S * B * H * Dh
    q = lambda dt: _new(S, B, H + 16, Dh, dtype=dt)[:, :, :H]                                 # noqa: E731
    return [
        Case("rope", f"qkv {size}", lambda dt: ROPE._launch(q(dt), table(), table(), False), floor, flops),
        Case("rope", f"inverse {size}", lambda dt: ROPE._launch(_new(S, B, H, Dh, dtype=dt), table(), table(), True), floor, flops),
    ]


def _cross_entropy(N: int, V: int) -> list[Case]:
    """Llama 3's vocabulary of 128256 over tp=8; the second rank."""
    logits, stat = lambda dt: _new(N, V, dtype=dt), lambda: _new(N)
    ids = lambda: _new(N, dtype=torch.int64)                                                  # noqa: E731
    return [
        Case("cross_entropy", f"{N}x{V}", lambda dt: CE._launch_stats(logits(dt), ids(), V, V, -100),
             {"_stats_kernel": lambda s: N * V * s + 20 * N}, 4 * N * V),
        Case("cross_entropy", f"{N}x{V}", lambda dt: CE._launch_bwd(stat(), logits(dt), ids(), stat(), stat(), V, V, -100),
             {"_bwd_kernel": lambda s: 2 * N * V * s + 20 * N}, 3 * N * V),
    ]


def _dropout(N: int, D: int) -> list[Case]:
    """A whole activation, and a shard of its columns (tp=8): the index in the global tensor needs one division."""
    def case(name: str, n: int, shape: tuple[int, int], strides: tuple[int, int]) -> Case:
        sizes, steps = DROPOUT._merge(torch.Size(shape), strides)
        start, threshold = DROPOUT._start(1234, 0), DROPOUT._threshold(0.1)
        return Case("dropout", name, lambda dt: DROPOUT._launch(_new(*shape, dtype=dt), start, threshold, 1 / 0.9, sizes, steps),
                    {"_kernel": lambda s: 2 * n * s}, 12 * n)
    return [case(f"{N}x{D}", N * D, (N, D), (D, 1)), case(f"shard {N}x{D // 8}", N * D // 8, (N, D // 8), (D, 1))]


def _moe(T: int, H: int, K: int, E: int) -> list[Case]:
    """Qwen3-30B: 128 experts, 8 of them a token. The plan has no dtype: its ids are int64, its maps int32."""
    x, rows, size = lambda dt: _new(T, H, dtype=dt), lambda dt: _new(T * K, H, dtype=dt), f"{T}x{H} {K} of {E}"
    row, slot = lambda: _new(T, K, dtype=torch.int32), lambda: _new(T * K, dtype=torch.int32)
    move: Floor = lambda s: (1 + K) * T * H * s + 8 * T * K                                   # noqa: E731
    return [
        Case("route_plan", size, lambda dt: PLAN._launch(_new(T, K, dtype=torch.int64), None, E, 1, -1, False),
             {"_count_kernel": lambda s: 8 * T * K, "_scan_kernel": lambda s: 4 * T * K, "_place_kernel": lambda s: 16 * T * K}),
        Case("permute", size, lambda dt: PERMUTE._launch_fwd(x(dt), None, row(), slot()), {"_kernel": move}),
        Case("permute", f"probs {size}", lambda dt: PERMUTE._launch_fwd(x(dt), _new(T, K), row(), slot()),
             {"_kernel": lambda s: move(s) + 8 * T * K}),
        Case("unpermute", f"probs {size}", lambda dt: UNPERMUTE._launch_fwd(rows(dt), _new(T, K), None, None, row(), slot()),
             {"_fwd_kernel": lambda s: move(s) + 4 * T * K}, 2 * T * K * H),
        Case("unpermute", f"probs residual {size}", lambda dt: UNPERMUTE._launch_fwd(rows(dt), _new(T, K), x(dt), x(dt), row(), slot()),
             {"_fwd_kernel": lambda s: move(s) + 2 * T * H * s + 4 * T * K}, 2 * T * K * H),
        Case("unpermute", size, lambda dt: UNPERMUTE._launch_bwd(x(dt), rows(dt), _new(T, K), row(), slot()),
             {"_bwd_kernel": lambda s: (1 + 2 * K) * T * H * s + 16 * T * K}, 3 * T * K * H),
    ]


def _overlapped(M: int, N: int, K: int, W: int) -> list[Case]:
    """Llama 70B's MLP over tp=8, the second rank. A pad's memory is no argument of a launch: the floors are of what is."""
    x, w, size, m, flops = lambda dt: _new(M, K, dtype=dt), lambda dt: _new(N, K, dtype=dt), f"{M}x{N}x{K} of {W}", M // W, 2 * M * N * K

    def pad(op: str) -> Any:
        made = PAD.Pad.virtual(W, op, 1 << 20, 1 << 12, "meta")[1]
        made.share = 1                                                # a GPU of its own
        return made
    return [
        Case("comm.triton_ar", f"one_shot {size}", lambda dt: AR.launch(pad("gemm_ar"), x(dt), w(dt)),
             {"_kernel": lambda s: (M * K + N * K + M * N) * s}, flops),
        Case("comm.triton_ar", f"two_shot {size}", lambda dt: AR.launch(pad("gemm_ar"), x(dt), w(dt), two_shot=True),
             {"_kernel": lambda s: (M * K + N * K + M * N) * s}, flops),
        Case("comm.triton_ag", size, lambda dt: AG.launch(pad("ag_gemm"), _new(m, K, dtype=dt), M, w(dt)),
             {"_kernel": lambda s: (m * K + N * K + M * N) * s}, flops),
        Case("comm.triton_rs", size, lambda dt: RS.push(pad("gemm_rs"), x(dt), w(dt)),
             {"_push_kernel": lambda s: (M * K + N * K) * s}, flops),
        Case("comm.triton_rs", f"norm {size}",
             lambda dt: RS.take(pad("rs_residual_norm"), M, N, dt, True, _new(m, N, dtype=dt), _new(N, dtype=dt), onward=pad("ag_gemm")),
             {"_take_kernel": lambda s: (3 * m * N + N) * s + 4 * m}, (W + 6) * m * N),
    ]


CASES: list[Case] = [
    *_norms(8192, 8192), *_norms(8192, 12288), *_swiglu(8192, 28672), *_rope(4096, 2, 64, 128),
    *_cross_entropy(8192, 128256 // 8), *_dropout(8192, 8192),
    *_moe(16384, 2048, 8, 128), *_overlapped(8192, 8192, 3584, 8),
]
