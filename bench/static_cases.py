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


RMS, LN, SWIGLU, GATED, GELU, ROPE, CE, DROPOUT, JITTER, ROUTER, PLAN, PERMUTE, UNPERMUTE, GROUPED = map(_module, (
    "rms_norm", "layer_norm", "swiglu", "gated", "gelu", "rope", "cross_entropy", "dropout", "jitter", "router", "route_plan", "permute",
    "unpermute", "grouped_gemm"))
ADAMW, NORM, CLAMPED = map(_module, ("adamw", "grad_norm", "clamped_swiglu"))
PAD, AR, AG, RS, MOE = map(_module, ("comm.pad", "comm.triton_ar", "comm.triton_ag", "comm.triton_rs", "comm.triton_moe"))
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
    """Llama 70B's width 8192, and GPT-3's 12288 in a masked block of 16384, whose backward is two kernels."""
    x: Callable[[torch.dtype], Tensor] = lambda dt: _new(N, D, dtype=dt)      # noqa: E731
    w: Callable[[torch.dtype], Tensor] = lambda dt: _new(D, dtype=dt)         # noqa: E731
    stat, size = lambda: _new(N), f"{N}x{D}"

    def bwd(rows: int, vectors: int, stats: int) -> dict[str, Floor]:
        """In one kernel, or its sums and the rest."""
        floor: Floor = lambda s: (rows * N * D + vectors * D) * s + stats * N                 # noqa: E731
        return {"_bwd_kernel": floor} if D <= RMS.ONE_PASS else {
            "_sums_kernel": lambda s: (2 * N * D + D) * s + stats * N, "_columns_kernel": floor}
    return [
        Case("rms_norm", size, lambda dt: RMS._launch_fwd(x(dt), None, w(dt), 1e-6),
             {"_fwd_kernel": lambda s: (2 * N * D + D) * s + 4 * N}, 4 * N * D),
        Case("rms_norm", f"add {size}", lambda dt: RMS._launch_fwd(x(dt), x(dt), w(dt), 1e-6),
             {"_fwd_kernel": lambda s: (4 * N * D + D) * s + 4 * N}, 5 * N * D),
        Case("rms_norm", size, lambda dt: RMS._launch_bwd(x(dt), x(dt), w(dt), stat(), _new(0, dtype=dt)),
             bwd(3, 2, 4), 9 * N * D),
        Case("rms_norm", f"add {size}", lambda dt: RMS._launch_bwd(x(dt), x(dt), w(dt), stat(), x(dt)),
             bwd(4, 2, 4), 10 * N * D),
        Case("layer_norm", size, lambda dt: LN._launch_fwd(x(dt), None, w(dt), w(dt), 1e-5),
             {"_fwd_kernel": lambda s: (2 * N * D + 2 * D) * s + 8 * N}, 7 * N * D),
        Case("layer_norm", f"add {size}", lambda dt: LN._launch_fwd(x(dt), x(dt), w(dt), w(dt), 1e-5),
             {"_fwd_kernel": lambda s: (4 * N * D + 2 * D) * s + 8 * N}, 8 * N * D),
        Case("layer_norm", size, lambda dt: LN._launch_bwd(x(dt), x(dt), w(dt), stat(), stat(), None, True),
             bwd(3, 3, 8), 12 * N * D),
        Case("layer_norm", f"add {size}", lambda dt: LN._launch_bwd(x(dt), x(dt), w(dt), stat(), stat(), x(dt), True),
             bwd(4, 3, 8), 13 * N * D),
    ]


def _swiglu(N: int, F: int) -> list[Case]:
    """Llama 70B's ffn of 28672."""
    half, both = lambda dt: _new(N, F, dtype=dt), lambda dt: _new(N, 2 * F, dtype=dt)
    return [
        Case("swiglu", f"{N}x{F}", lambda dt: SWIGLU._launch_fwd(both(dt)), {"_fwd_kernel": lambda s: 3 * N * F * s}, 5 * N * F),
        Case("swiglu", f"{N}x{F}", lambda dt: SWIGLU._launch_bwd(half(dt), both(dt)),
             {"_bwd_kernel": lambda s: 5 * N * F * s}, 9 * N * F),
        Case("swiglu", f"probs {N}x{F}", lambda dt: SWIGLU._launch_fwd(both(dt), _new(N)),
             {"_fwd_kernel": lambda s: 3 * N * F * s + 4 * N}, 6 * N * F),
        Case("swiglu", f"probs {N}x{F}", lambda dt: SWIGLU._launch_probs_bwd(half(dt), both(dt), _new(N)),
             {"_probs_bwd_kernel": lambda s: 6 * N * F * s + 8 * N}, 13 * N * F),
    ]


def _clamped(R: int, F: int, E: int) -> list[Case]:
    """gpt-oss 120B: an ffn of 2880, 128 experts."""
    half, both, bias = lambda dt: _new(R, F, dtype=dt), lambda dt: _new(R, 2 * F, dtype=dt), lambda dt: _new(E, 2 * F, dtype=dt)
    rest = lambda dt: (bias(dt), _new(E + 1, dtype=torch.int32), _new(R), 1.702, 7.0)  # noqa: E731
    return [
        Case("clamped_swiglu", f"{R}x{F}", lambda dt: CLAMPED._launch_fwd(both(dt), *rest(dt)),
             {"_fwd_kernel": lambda s: (3 * R * F + 2 * E * F) * s + 4 * R}, 9 * R * F),
        Case("clamped_swiglu", f"{R}x{F}", lambda dt: CLAMPED._launch_bwd(half(dt), both(dt), *rest(dt)),
             {"_bwd_kernel": lambda s: (5 * R * F + 2 * E * F) * s + 8 * R}, 18 * R * F),
    ]


def _gelus(N: int, F: int) -> list[Case]:
    """Gemma 2 27B's ffn of 36864, gated by its gelu_tanh, and the other activations; GPT-3's gelu is as wide as 49152."""
    x: Callable[[torch.dtype], Tensor] = lambda dt: _new(N, F, dtype=dt)      # noqa: E731

    def gated(act: int, name: str) -> list[Case]:
        return [
            Case("gated", f"{name} {N}x{F}", lambda dt: GATED._launch_fwd(x(dt), x(dt), act), {"_fwd_kernel": lambda s: 3 * N * F * s},
                 12 * N * F),
            Case("gated", f"{name} {N}x{F}", lambda dt: GATED._launch_bwd(x(dt), x(dt), x(dt), act),
                 {"_bwd_kernel": lambda s: 5 * N * F * s}, 18 * N * F)]

    def gelu(tanh: bool, name: str) -> list[Case]:
        return [
            Case("gelu", f"{name} {N}x{F}", lambda dt: GELU._launch_fwd(x(dt), tanh), {"_fwd_kernel": lambda s: 2 * N * F * s}, 10 * N * F),
            Case("gelu", f"{name} {N}x{F}", lambda dt: GELU._launch_bwd(x(dt), x(dt), tanh), {"_bwd_kernel": lambda s: 3 * N * F * s},
                 15 * N * F)]
    return [*(case for act, name in enumerate(GATED.ACTIVATIONS) for case in gated(act, name)), *gelu(False, "exact"), *gelu(True, "tanh")]


def _rope(S: int, B: int, H: int, Dh: int) -> list[Case]:
    """Llama 70B's queries, a slice of a fused qkv with 8 key and 8 value heads, and the contiguous gradient; Hugging Face's [B, H, S, Dh]
    with a fourth of the head left alone and tables for each sample; GPT-J's neighbouring pairs."""
    floor: dict[str, Floor] = {"_kernel": lambda s: 2 * S * B * H * Dh * s + 4 * S * Dh}
    table, size, flops = lambda: _new(S, 1, Dh // 2).expand(S, B, -1), f"{S}x{B}x{H}x{Dh}", 3 * S * B * H * Dh
    q = lambda dt: _new(S, B, H + 16, Dh, dtype=dt)[:, :, :H]                                 # noqa: E731
    heads, own = lambda dt: _new(B, S, H, Dh, dtype=dt).transpose(0, 1), lambda: _new(B, S, Dh * 3 // 4)[..., :Dh * 3 // 8].transpose(0, 1)
    return [
        Case("rope", f"qkv {size}", lambda dt: ROPE._launch(q(dt), table(), table(), False, False), floor, flops),
        Case("rope", f"inverse {size}", lambda dt: ROPE._launch(_new(S, B, H, Dh, dtype=dt), table(), table(), True, False), floor, flops),
        Case("rope", f"partial {size}", lambda dt: ROPE._launch(heads(dt), own(), own(), False, False),
             {"_kernel": lambda s: 2 * S * B * H * Dh * s + 3 * S * B * Dh}, flops),
        Case("rope", f"interleaved {size}", lambda dt: ROPE._launch(_new(S, B, H, Dh, dtype=dt), table(), table(), False, True), floor,
             flops),
    ]


def _cross_entropy(N: int, V: int) -> list[Case]:
    """Llama 3's vocabulary of 128256 over tp=8; the second rank."""
    logits, stat = lambda dt: _new(N, V, dtype=dt), lambda: _new(N)
    ids = lambda: _new(N, dtype=torch.int64)                                                  # noqa: E731
    return [
        Case("cross_entropy", f"{N}x{V}", lambda dt: CE._launch_stats(logits(dt), ids(), V, V, -100),
             {"_stats_kernel": lambda s: N * V * s + 20 * N}, 4 * N * V),
        Case("cross_entropy", f"{N} of 8", lambda dt: CE._launch_combine(_new(8, N, 3), ids(), -100),
             {"_combine_kernel": lambda s: 8 * 12 * N + 20 * N}, 40 * N),
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


def _jitter(N: int, D: int) -> list[Case]:
    sizes, steps = DROPOUT._merge(torch.Size((N, D)), (D, 1))
    return [Case("jitter", f"{N}x{D}", lambda dt: JITTER._launch(_new(N, D, dtype=dt), 1234, 0.01 * 2**-23, sizes, steps),
                 {"_kernel": lambda s: 2 * N * D * s}, 15 * N * D)]


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


def _experts(T: int, H: int, I: int, K: int, E: int) -> list[Case]:
    """Qwen3-30B's experts: both products forward, the first one's dx, and both weight gradients, tokens gathered on load."""
    R, N, size = T * K, 2 * I, f"{T}x{H}x{I} {K} of {E}"
    x, inner, z = lambda dt: _new(T, H, dtype=dt), lambda dt: _new(R, I, dtype=dt), lambda dt: _new(R, N, dtype=dt)
    w13, w2 = lambda dt: _new(E, N, H, dtype=dt), lambda dt: _new(E, H, I, dtype=dt)
    at, row, slot = (lambda: _new(E + 1, dtype=torch.int32)), (lambda: _new(T, K, dtype=torch.int32)), (lambda: _new(R, dtype=torch.int32))
    return [
        Case("grouped_gemm", f"gather swiglu {size}", lambda dt: GROUPED._launch_swiglu(x(dt), w13(dt), at(), slot(), row(), _new(R)),
             {"_rows_kernel": lambda s: (T * H + E * N * H + R * N + R * I) * s + 8 * R}, 2 * R * N * H),
        Case("grouped_gemm", f"rows {size}", lambda dt: GROUPED._launch(inner(dt), w2(dt), at(), None, None, False),
             {"_rows_kernel": lambda s: (R * I + E * H * I + R * H) * s}, 2 * R * H * I),
        Case("grouped_gemm", f"gather dx {size}", lambda dt: GROUPED._launch(x(dt), w2(dt), at(), slot(), row(), True),
             {"_rows_kernel": lambda s: (T * H + E * H * I + R * I) * s + 4 * R}, 2 * R * H * I),
        Case("grouped_gemm", f"gather dw {size}", lambda dt: GROUPED._wgrad(z(dt), x(dt), at(), None, slot(), K),
             {"_wgrad_kernel": lambda s: (R * N + T * H + E * N * H) * s + 4 * R}, 2 * R * N * H),
    ]


def _router(T: int, E: int, K: int, func: int, name: str, groups: int = 1, kept: int = 1, best: int = 1) -> list[Case]:
    """Logits in dt; a batch of 2 sequences, whose sums are their own. Partial sums are no part of the floor."""
    x: Callable[[torch.dtype], Tensor] = lambda dt: _new(T, E, dtype=dt)      # noqa: E731
    ids, programs = lambda: _new(T, K, dtype=torch.int32), min(1024, T // min(64, 1024 // E))
    biased = groups > 1
    return [
        Case("router", name, lambda dt: ROUTER._launch_fwd(x(dt), _new(E) if biased else None, None, None, K, func, True, biased, groups,
                                                           kept, best, 2.5, 2),
             {"_fwd_kernel": lambda s: T * E * s + 8 * T * K + 4 * T, "_sum_kernel": lambda s: programs * E * 8}, (5 + 2 * K) * T * E),
        Case("router", name, lambda dt: ROUTER._launch_bwd(_new(T, K), _new(2, E), _new(T), x(dt), ids(), None, func, True, 2.5, 2),
             {"_bwd_kernel": lambda s: 2 * T * E * s + 8 * T * K + 4 * T}, (10 + K) * T * E),
    ]


def _step(N: int) -> list[Case]:
    """A part of a flat buffer, N numbers: fp32 ones, and fp32 masters of bf16 parameters. The floors count what is read and written once,
    and the table of chunks not at all."""
    def launch(dt: torch.dtype) -> None:
        flat, copies = lambda: [_new(N)], [_new(N, dtype=dt)] if dt != torch.float32 else []
        ADAMW._launch(flat(), flat(), flat(), flat(), copies, [0.1], 1e-3, 0.9, 0.95, 1e-8, 1, 1.0)
    return [Case("adamw", str(N), launch, {"_kernel": lambda s: (18 if s == 2 else 16) * N}, 15 * N),
            Case("grad_norm", str(N), lambda dt: NORM._launch([_new(N, dtype=dt)], [1.0]), {"_kernel": lambda s: N * s}, 2 * N)]


def _pad(op: str, W: int) -> Any:
    """The second rank's."""
    made = PAD.Pad.virtual(W, op, 1 << 20, 1 << 12, "meta")[1]
    made.share = 1                                                    # a GPU of its own
    return made


def _exchanged(T: int, H: int, K: int, E: int, W: int) -> list[Case]:
    """Qwen3-30B's tokens over ep=8, evenly spread. A pad's memory is no argument of a launch: the floors are of what is."""
    R, size, slots = T * K, f"{T}x{H} {K} of {E} over {W}", lambda: _new(W * T, K, dtype=torch.int32)
    return [
        Case("comm.triton_moe", f"dispatch {size}",
             lambda dt: MOE.dispatch(_pad("dispatch", W), _new(T, H, dtype=dt), slots(), _new(R, dtype=torch.int32), T),
             {"_stage_kernel": lambda s: T * H * s, "_rows_kernel": lambda s: R * H * s + 4 * W * T * K + 4 * R}),
        Case("comm.triton_moe", f"combine {size}",
             lambda dt: MOE.combine(_pad("combine", W), _new(R, H, dtype=dt), _new(T, H, dtype=dt), slots(), slots(), T, E),
             {"_stage_kernel": lambda s: R * H * s + 4 * W * T * K, "_sum_kernel": lambda s: 2 * T * H * s + 4 * T * K}, R * H),
    ]


def _overlapped(M: int, N: int, K: int, W: int) -> list[Case]:
    """Llama 70B's MLP over tp=8, the second rank. A pad's memory is no argument of a launch: the floors are of what is."""
    x, w, size, m, flops = lambda dt: _new(M, K, dtype=dt), lambda dt: _new(N, K, dtype=dt), f"{M}x{N}x{K} of {W}", M // W, 2 * M * N * K
    pad: Callable[[str], Any] = lambda op: _pad(op, W)                # noqa: E731
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
    *_norms(8192, 8192), *_norms(8192, 12288), *_swiglu(8192, 28672), *_gelus(8192, 36864), *_rope(4096, 2, 64, 128),
    *_clamped(8192, 2880, 128),
    *_cross_entropy(8192, 128256 // 8), *_dropout(8192, 8192), *_jitter(8192, 8192),
    *_moe(16384, 2048, 8, 128), *_experts(16384, 2048, 768, 8, 128),
    *_router(16384, 8, 2, 0, "16384x8 2 of 8"), *_router(16384, 128, 8, 0, "16384x128 8 of 128"),
    *_router(16384, 256, 8, 1, "sigmoid groups 16384x256 8 of 256", 8, 4, 2),
    *_router(16384, 1000, 8, 2, "sqrtsoftplus 16384x1000 8 of 1000"),
    *_step(1 << 26), *_overlapped(8192, 8192, 3584, 8), *_exchanged(4096, 2048, 8, 128, 8),
]
