"""Safe in CUDA graphs by construction, seen without a GPU: what the host does in a call that has run once before, and in a capture."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interlace.bench import static
from interlace.kernels import dispatch
from interlace.kernels.comm import pad as pads
from interlace.kernels.comm import triton_ag, triton_ar, triton_moe, triton_rs
from interlace.kernels.comm.pad import Pad, pad_of

pytestmark = pytest.mark.skipif(dispatch.INTERPRET or not hasattr(dispatch.triton, "__version__"), reason="no Triton compiler in this mode")
M, N, K, W = 48, 32, 16, 3
slots = torch.arange(M, dtype=torch.int32)
x, w, part, whole = torch.ones(M, K), torch.ones(N, K), torch.ones(M // W, N), torch.ones(M, N)


def norm(pad):
    triton_rs.push(pad, whole)
    return triton_rs.take(pad, M, N, x.dtype, False, part, part[0])


CALLS = {
    "gemm_ar": lambda pad: triton_ar.launch(pad, x, w), "gemm_ar two_shot": lambda pad: triton_ar.launch(pad, x, w, two_shot=True),
    "all_reduce": lambda pad: triton_ar.launch(pad, x), "ag_gemm": lambda pad: triton_ag.launch(pad, x[:M // W], M, w),
    "all_gather": lambda pad: triton_ag.launch(pad, x[:M // W], M),
    "gemm_rs": lambda pad: (triton_rs.push(pad, x, w), triton_rs.take(pad, M, N, x.dtype, True)), "rs_residual_norm": norm,
    "dispatch": lambda pad: triton_moe.dispatch(pad, x[:M // W], slots.view(-1, 1), slots, M // W),
    "combine": lambda pad: triton_moe.combine(pad, x, None, slots.view(-1, 1), slots.view(-1, 1), M // W, M),
}
FRESH = ("empty", "empty_like", "new_empty")                          # memory of the graph's pool, addresses that a replay finds again
VIEWS = ("view", "select", "slice", "t", "transpose", "detach", "alias", "as_strided", "expand")


class Watch(TorchDispatchMode):
    """What a call asks torch for: new memory, views, a look at the error words on the host, and anything else."""

    def __init__(self, pad):
        super().__init__()
        self.pad, self.other, self.fresh = pad, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, first = func.overloadpacket.__name__, next((a for a in args if isinstance(a, torch.Tensor)), None)
        error = first is not None and first.untyped_storage().data_ptr() == self.pad.error.untyped_storage().data_ptr()
        self.fresh += name in FRESH
        if name not in (*FRESH, *VIEWS) and not error:
            self.other.append(name)
        return func(*args, **kwargs or {})


def watched(call, monkeypatch):
    """(kernels started, what else) of the second call over a pad."""
    pad, started = Pad.virtual(W, "gemm_ar", 1 << 20, 1 << 10, "cpu")[1], []
    pad.share = 1

    def never(*_, **__):
        raise AssertionError("a host synchronisation, or a meeting of the ranks")
    launches = static._record(lambda _: call(pad), None, 132)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", never)
        patch.setattr(pads, "meet", never)
        with Watch(pad) as seen:
            started = static._record(lambda _: call(pad), None, 132)
    assert len(started) == len(launches) and [k.kernel for k in started] == [k.kernel for k in launches]
    return started, seen


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_ran_before_neither_waits_nor_moves(name, monkeypatch):
    """No copy to or from the host, no item(), no fill: kernels, and memory for the result. The epoch is no argument of a kernel."""
    started, seen = watched(CALLS[name], monkeypatch)
    assert started and not seen.other, f"the host also did {seen.other}"
    assert 0 < seen.fresh <= 8


@pytest.mark.parametrize("sin", ["item", "fill_", "copy_"])
def test_what_a_graph_cannot_hold_is_found(sin, monkeypatch):
    def bad(pad):
        y = CALLS["all_reduce"](pad)
        if sin == "item":
            pad.local[0].item()
        elif sin == "fill_":
            pad.local.fill_(0)
        else:
            y.copy_(torch.zeros_like(y, device="cpu"))
    assert watched(bad, monkeypatch)[1].other


def test_a_capture_of_something_new_is_refused(monkeypatch):
    """What is collective, a larger pad or a first agreement, cannot be captured: said before anything hangs."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(pads, "_pads", {})
    with pytest.raises(RuntimeError, match="gemm_ar: its pad must be made before a CUDA graph is captured, got a capture that needs 4096"):
        pad_of(object(), "gemm_ar", 4096, 8, torch.device("cuda"))
    pad = Pad.virtual(2, "gemm_ar", 4096, 8, "cpu")[0]
    pad.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="gemm_ar: a call must have run once before it is captured in a CUDA graph, got a capture of 8"):
        pad.agree("8 x 8")
