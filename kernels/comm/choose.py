"""Which path a fused communication op takes: one pure function of op, sizes, ranks and measured constants.

    choose("gemm_ar", rows, cols, inner, itemsize, world, device, slot) -> Path(name, seconds, why, others)

rows x cols: the matrix that is exchanged (gemm_ar, gemm_rs: the product; ag_gemm: one rank's x; rs_residual_norm: the partial
sums); inner: the K of the product, or in ag_gemm its columns N; slot: bytes of a heap's buffer, 0 without a heap. Every rank has
the same arguments, or is told so by the op's descriptor, hence the same answer: nothing is measured or negotiated at run time.

    path                  T = T_gemm + ...             b = rows * cols * itemsize, W ranks
    one rank              0
    torch.distributed     T_skew + T_call + v b / B    v = 2 (W-1)/W for gemm_ar, (W-1) for ag_gemm, (W-1)/W for the others
    heap, copied          T_skew + T_tick + (1 + s) b / B    the product in memory, then the collective; s: passes over b, below
    heap, staged          T_skew + p T_tick + s b / B   the GEMM writes into the buffer, p = slots full of rows
    heap, walked          T_skew / p + (p + 1) T_tick + s b / B   p = halves of a slot, and at least 64 rows each; walk.py

T_skew is what a rank waits for the slowest at a meeting, 1% of the GEMM before it; a walk absorbs all but the last's, 1/p of it.
In a walk s: gemm_ar W + 1, the others 2. Else s: gemm_ar one-shot W + 1, two-shot (from 256 KB) 3; gemm_rs 1 + 2/W; ag_gemm 2 W.

On CUDA, where the ranks reach each other's memory, `slot` is the room of a pad, and the plain collectives (inner 0) choose too:
    one-shot kernel       max(t T_gemm, (W-1) b / B) + T_tick + (W+1) b / H     up to 1 MB: the pad is 2 W b
    two-shot kernel       max(t T_gemm, v b / B) + 2 T_tick + (W+2)/W b / H     all_reduce and gemm_ar, these two
    overlapped kernel     max(t T_gemm, v b / B) + T_tick + s b / H             s: (W+1)/W where rows are summed, else 0
    kernel, then GEMM     T_gemm + v b / B + T_tick                             ag_gemm that returns the gathered x
    one-shot multicast    T_gemm + (W-1) b / B + T_tick + (W+1) b / H           where the pad has a multicast address and csrc/cuda is
    two-shot multicast    T_gemm + (1 + 1/W) b / B + 2 T_tick + 4 b / H         built: all_reduce and gemm_ar, after torch's GEMM
B: the link, H: the memory of the GPU, t: what a GEMM that overlaps may cost beside one that does not. The constants: machine.py, measured
on this machine where its roofs are kept. B, t and the seconds of HOPPER are a model until then, and so is that multicast moves at B.
A device has the paths of PATHS, no other.
"""
from dataclasses import dataclass

from .machine import CPU, HOPPER, Machine

__all__ = ["CPU", "HOPPER", "KERNELS", "MULTICAST", "PATHS", "Machine", "Path", "choose"]

MULTICAST = ("one-shot multicast", "two-shot multicast")                # first: one store instead of W where the seconds are the same
KERNELS = (*MULTICAST, "one-shot kernel", "two-shot kernel", "overlapped kernel", "kernel, then GEMM")
PATHS = {"cpu": ("heap, walked", "heap, staged", "heap, copied", "torch.distributed"), "cuda": (*KERNELS, "torch.distributed")}
ONE_SHOT, WIDEST_NORM = 1 << 20, 16384                                # bytes; elements of a row that one program can hold
_WALKED, _STAGED = ("gemm_ar", "gemm_rs", "ag_gemm"), ("gemm_ar", "gemm_rs")
SKEW, LEAST_ROWS = 0.01, 64                                           # blocks of fewer rows than 64 cost the GEMM over 10%


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
    gemm = 2.0 * rows * cols * inner * (W if op == "ag_gemm" else 1) / m.rate(itemsize)
    volume = {"gemm_ar": 2 * (W - 1) / W, "ag_gemm": W - 1}.get(op, (W - 1) / W)
    passes = {"gemm_ar": W + 1 if b < 256 << 10 else 3, "ag_gemm": 2 * W}.get(op, 1 + 2 / W)
    times = {"torch.distributed": gemm + SKEW * gemm + m.call + volume * b / m.link}
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


def _kernel_times(op: str, rows: int, cols: int, inner: int, itemsize: int, world: int, room: int, whole: bool, multicast: bool,
                  m: Machine) -> dict[str, float]:
    b, W = rows * cols * itemsize, world
    gemm = 2.0 * rows * cols * inner * (W if op == "ag_gemm" else 1) / m.rate(itemsize)
    sums, gathers = op in ("gemm_ar", "all_reduce"), op in ("ag_gemm", "all_gather")
    sent = b * (2 * (W - 1) / W if sums else W - 1 if gathers else (W - 1) / W) / m.link
    times = {"torch.distributed": gemm + m.call + sent}
    if not b or (not inner and op in ("gemm_ar", "gemm_rs", "ag_gemm")) or (op == "rs_residual_norm" and cols > WIDEST_NORM):
        return times
    if sums:
        if b <= ONE_SHOT and 2 * W * b <= room:
            times["one-shot kernel"] = max(m.tax * gemm, (W - 1) * b / m.link) + m.tick + (W + 1) * b / m.bandwidth
            if multicast:
                times["one-shot multicast"] = gemm + (W - 1) * b / m.link + m.tick + (W + 1) * b / m.bandwidth
        if 4 * b <= room:
            times["two-shot kernel"] = max(m.tax * gemm, sent) + 2 * m.tick + (W + 2) / W * b / m.bandwidth
            if multicast:
                times["two-shot multicast"] = gemm + (1 + 1 / W) * b / m.link + 2 * m.tick + 4 * b / m.bandwidth
    elif 2 * b * (W if gathers else 1) <= room:
        if whole:
            times["kernel, then GEMM"] = gemm + sent + m.tick
        else:
            times["overlapped kernel"] = max(m.tax * gemm, sent) + m.tick + (0 if gathers else (W + 1) / W) * b / m.bandwidth
    return times


_WHY = {"one-shot multicast": "one store reaches all ranks, each sums what has come",
        "two-shot multicast": "the switch sums what the ranks hold, one store brings the sum to all",
        "one-shot kernel": "parts go to all ranks, each sums them as they come",
        "two-shot kernel": "parts go to the owner of a tile, sums from there to all, while the next tile is computed",
        "overlapped kernel": "tiles are sent and taken while others are computed",
        "kernel, then GEMM": "the gathered x is wanted too, in one piece",
        "heap, walked": "blocks of the product meet in the heap, ranks a block apart do not wait",
        "heap, staged": "the GEMM writes into the buffer, the sum reads it there",
        "heap, copied": "the collective over the heap, before or after one GEMM"}


def choose(op: str, rows: int, cols: int, inner: int, itemsize: int, world: int, device: str = "cpu", slot: int = 0,
           whole: bool = False, multicast: bool = False, machine: Machine | None = None) -> Path:
    """The cheapest path that exists on `device`; the first of PATHS on a tie. whole: ag_gemm returns the gathered x too; multicast:
    the ranks' memory has a multicast address, and csrc/cuda is built."""
    machine = machine or (HOPPER if device == "cuda" else CPU)
    if world == 1:
        return Path("one rank", 2.0 * rows * cols * inner / machine.rate(itemsize), "nothing is communicated")
    sizes = op, rows, cols, inner, itemsize, world, slot, whole
    times = _kernel_times(*sizes, multicast, machine) if device == "cuda" else _times(*sizes, machine)
    order = [name for name in PATHS.get(device, ("torch.distributed",)) if name in times]
    name = min(order, key=times.__getitem__)
    why = _WHY.get(name) or ("these ranks share no memory" if not slot else "no kernel here takes it" if len(order) == 1
                             else "it is predicted to be faster than the heap" if device == "cpu" else "the GEMM alone is faster enough")
    return Path(name, times[name], why, tuple((n, times[n]) for n in order))
