"""Which path a fused communication op takes: one pure function of op, sizes, ranks and measured constants.

    choose("gemm_ar", rows, cols, inner, itemsize, world, device, slot) -> Path(name, seconds, why, others)

rows x cols: the matrix that is exchanged (gemm_ar, gemm_rs: the product; ag_gemm: one rank's x; rs_residual_norm: the partial
sums); inner: the K of the product, or in ag_gemm its columns N; slot: bytes of a heap's buffer, 0 without a heap. Every rank has
the same arguments, or is told so by the op's descriptor, hence the same answer: nothing is measured or negotiated at run time.

    path                  T = T_gemm + ...             b = rows * cols * itemsize, W ranks
    one rank              0
    torch.distributed     T_call + v b / B             v = 2 (W-1)/W for gemm_ar, (W-1) for ag_gemm, (W-1)/W for the others
    heap, copied          T_tick + (1 + s) b / B       the product in memory, then the collective; s: passes over b, below
    heap, staged          p (T_tick + T_skew) + s b/B  the GEMM writes into the buffer, p = slots full of rows
    heap, walked          (p + 1) T_tick + T_skew + s b / B    p = halves of a slot, and at least 64 rows each; walk.py

T_skew is what a rank waits for the slowest at a meeting, 1% of the GEMM between two of them; a walk absorbs all but the last, 1/p of it. In a walk s: gemm_ar W + 1, the others 2.
s: gemm_ar one-shot W + 1, two-shot (from 256 KB) 3; gemm_rs 1 + 2/W; ag_gemm 2 W. A device has the paths of PATHS, no other.
"""
from dataclasses import dataclass

__all__ = ["CPU", "PATHS", "Machine", "Path", "choose"]

PATHS = {"cpu": ("heap, walked", "heap, staged", "heap, copied", "torch.distributed"), "cuda": ("torch.distributed",)}
_WALKED, _STAGED = ("gemm_ar", "gemm_rs", "ag_gemm"), ("gemm_ar", "gemm_rs")
SKEW, LEAST_ROWS = 0.01, 64                                           # blocks of fewer rows than 64 cost the GEMM over 10%


@dataclass(frozen=True)
class Machine:
    """Of one rank. The defaults were measured on 2 Zen 4 cores, one thread a rank; gloo's over one host."""
    flops: float = 70e9                                               # FLOP/s of a GEMM
    bandwidth: float = 12e9                                           # bytes/s of a copy or a sum, read and written
    tick: float = 4e-6                                                # seconds of a meeting, Python included
    call: float = 120e-6                                              # of a torch.distributed collective
    link: float = 1.2e9                                               # bytes/s of a torch.distributed collective


CPU = Machine()


@dataclass(frozen=True)
class Path:
    name: str
    seconds: float                                                    # predicted, GEMM included
    why: str
    others: tuple[tuple[str, float], ...] = ()                        # the paths that exist here, with their predicted seconds

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * t:.3g} ms" for name, t in self.others)
        return f"{self.name}: {self.why}" + (f" (predicted: {times})" if len(self.others) > 1 else "")


def _times(op: str, rows: int, cols: int, inner: int, itemsize: int, world: int, slot: int, whole: bool,
           m: Machine) -> dict[str, float]:
    b, W = rows * cols * itemsize, world
    gemm = 2.0 * rows * cols * inner * (W if op == "ag_gemm" else 1) / m.flops
    volume = {"gemm_ar": 2 * (W - 1) / W, "ag_gemm": W - 1}.get(op, (W - 1) / W)
    passes = {"gemm_ar": W + 1 if b < 256 << 10 else 3, "ag_gemm": 2 * W}.get(op, 1 + 2 / W)
    times = {"torch.distributed": gemm + m.call + volume * b / m.link}
    if not slot:
        return times
    times["heap, copied"] = gemm + SKEW * gemm + m.tick + (1 + passes) * b / m.bandwidth
    fit = slot // max(1, cols * itemsize)                             # rows of a slot
    pieces = -(-rows // fit) if fit else 0
    if op in _STAGED and fit and (op == "gemm_ar" or pieces <= 1):
        times["heap, staged"] = gemm + SKEW * gemm + max(1, pieces) * m.tick + passes * b / m.bandwidth
    if op in _WALKED and not whole and fit // 2 >= LEAST_ROWS and rows > fit // 2:
        blocks = -(-rows // (fit // 2))
        read = (W if op == "gemm_ar" else 1) + 1
        times["heap, walked"] = gemm + SKEW * gemm / blocks + (blocks + 1) * m.tick + read * b / m.bandwidth
    return times


_WHY = {"heap, walked": "blocks of the product meet in the heap, ranks a block apart do not wait",
        "heap, staged": "the GEMM writes into the buffer, the sum reads it there",
        "heap, copied": "the collective over the heap, before or after one GEMM"}


def choose(op: str, rows: int, cols: int, inner: int, itemsize: int, world: int, device: str = "cpu", slot: int = 0,
           whole: bool = False, machine: Machine = CPU) -> Path:
    """The cheapest path that exists on `device`; the first of PATHS on a tie. whole: ag_gemm returns the gathered x too."""
    if world == 1:
        return Path("one rank", 2.0 * rows * cols * inner / machine.flops, "nothing is communicated")
    times = _times(op, rows, cols, inner, itemsize, world, slot if device == "cpu" else 0, whole, machine)
    order = [name for name in PATHS.get(device, ("torch.distributed",)) if name in times]
    name = min(order, key=times.__getitem__)
    why = _WHY.get(name) or ("there is no heap for this device" if device != "cpu" else "these ranks share no memory" if not slot
                             else "it is predicted to be faster than the heap")
    return Path(name, times[name], why, tuple((n, times[n]) for n in order))
