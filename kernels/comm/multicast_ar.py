"""multicast_ar: all_reduce on a pad whose memory has a multicast address: one load through the switch reads the sum of all ranks' parts,
one store reaches every rank. CUDA only, csrc/cuda/multicast_ar.cu: Triton knows no such address

Shapes    x -> y of x's shape, contiguous, 16-byte aligned; fp32, bf16, fp16. y may be x. Items of 16 KB, whatever the shape
Protocol  two-shot: `multicast` of protocol.py. A part stays in its rank's pad; the item's owner, item mod W, waits for all,
          multimem.ld_reduce, multimem.st, signals all.  one-shot: `one_shot` of protocol.py, where multimem.st carries a part to all
          ranks at once. Signals are those of signals.py: epochs, release behind a barrier, acquire, bounded waits, NaN and an error
          word where one runs out. A multicast address is an alias of the ranks' own, so every wait has a fence.proxy.alias
Bytes     sent per rank: one-shot b, two-shot (1 + 1/W) b, against (W-1) b and 2 (W-1)/W b without multicast. Pad: 2 W b; two-shot 4 b
Numerics  one-shot: in rank order in fp32, one rounding: the bits of one_shot of triton_ar. Two-shot: the switch adds, in its own order,
          16-bit types in fp32, and rounds once: one rank reads each sum and sends it to all, so every rank has the same bits; that two
          runs, or another W, add in one order nobody promises
GEMM      gemm_ar takes torch's product and reduces it in place. The product is not written into the pad by the GEMM itself: a GEMM has
          one address, also in a CUDA graph, and which buffer is in turn only device memory knows; nor could it be kept from writing
          after a wait has run out, when a late rank may still read
Source    PTX ISA, multimem and the memory consistency model; two-shot over NVLink SHARP as in NCCL's NVLS; the protocol is this package's
"""
import torch
from torch import Tensor

from ..dispatch import CUDA, define
from .pad import OPS, Pad
from .tile import programs_of

__all__ = ["ITEM", "launch", "needs", "serves"]

ITEM = 1 << 14                                                        # CHUNK of csrc/cuda/multicast_ar.cuh

# ---- op -------------------------------------------------------------------------------------------------------

define("multicast_ar(Tensor x, Tensor(a!) y, Tensor peers, Tensor(b!) local, Tensor(c!) error, int multicast, int rank, int polls, "
       "int data, int nbytes, int flags, int op, bool two_shot, int programs) -> ()", "csrc/cuda", lambda *_: None)

# ---- launch ---------------------------------------------------------------------------------------------------


def serves(device: torch.device) -> bool:
    """Whether csrc/cuda is built, and for this GPU. That the ranks' memory has a multicast address, the pad says."""
    return CUDA and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def needs(x: Tensor, world: int, two_shot: bool) -> tuple[int, int]:
    """(bytes of a buffer, flags a source) of a call."""
    items = -(-x.numel() * x.element_size() // ITEM)
    return (2 if two_shot else world) * items * ITEM, items


def launch(pad: Pad, x: Tensor, y: Tensor | None = None, *, two_shot: bool) -> Tensor:
    """y = all_reduce(x). x contiguous, not empty, on the pad's device; y: like x, or x."""
    pad.demand(*needs(x, pad.world, two_shot))
    if not pad.multicast:
        raise ValueError(f"{pad.op}: the pad of group '{pad.name}' must have a multicast address, got none; use triton_ar")
    if x.data_ptr() % 16:
        x = x.clone()
    y = torch.empty_like(x) if y is None or y.data_ptr() % 16 else y
    programs = programs_of(pad, needs(x, pad.world, two_shot)[1])
    pad.agree(f"multicast {list(x.shape)} {x.dtype}, two_shot {two_shot}, {programs} programs")
    torch.ops.interlace.multicast_ar(x, y, pad.peers, pad.local, pad.error, pad.multicast, pad.rank, pad.polls, pad.data, pad.nbytes,
                                     pad.flags, OPS.index(pad.op), two_shot, programs)
    return y
