"""Ways of a bench beside ours: peers that may be installed, and CUDA graphs, with stand-ins where there is no GPU."""
import contextlib
import importlib.util
import inspect
import math
import sys

import pytest
import torch

from interlace.bench import clocks, harness, report
from interlace.bench import run as bench_run
from interlace.bench.cases import Case, Make, Ways

CASE = Case("double", "tiny", {"N": 8}, direction="fwd+bwd")


def double(x):
    return x * 2


def measured(ways, case=CASE, **options):
    return {r["way"]: r for r in harness.measure("double", case, ways, **{"budget": 0.01, **options})}


def test_megatron_where_it_is_installed():
    """Its ways compute what ours do: test_our_error_is_not_worse_than_torchs holds them. Else each is named."""
    for op in ("swiglu", "rope", "router", "unpermute", "permute"):
        case = bench_run.load(op).cases("quick", 1)[-1]
        ways = bench_run.load(op).ways(case, Make(case, "cpu", quick=True))
        assert sum(name.startswith("megatron") for name in (*ways.all(), *ways.absent())) == 1, op
        why = [why for name, why in ways.absent().items() if name.startswith("megatron")]
        assert not why or "--quick" in why[0] or (importlib.util.find_spec("megatron") is None and "pip install --no-deps" in why[0])


def test_triton_kernels_with_a_stand_in(monkeypatch, tmp_path):
    """What we call of it, by the names and shapes of its source: x [R, K], w [E, K, N], int32 rows of each expert. Forward only."""
    (tmp_path / "triton_kernels/tensor_details").mkdir(parents=True)
    (tmp_path / "triton_kernels/__init__.py").write_text("")
    (tmp_path / "triton_kernels/tensor_details/ragged_tensor.py").write_text(
        "def make_ragged_tensor_metadata(slice_sizes, n_gates):\n"
        "    assert slice_sizes.dtype.itemsize == 4 and slice_sizes.ndim == 1 and slice_sizes.sum() == n_gates\n"
        "    return slice_sizes\n")
    (tmp_path / "triton_kernels/matmul.py").write_text(
        "import torch\n"
        "def matmul(a, b, bias, a_ragged_metadata=None):\n"
        "    assert bias is None and not a.requires_grad and a.shape[1] == b.shape[1]\n"
        "    return torch.cat([x @ w for x, w in zip(a.split(a_ragged_metadata.tolist()), b)])\n")
    monkeypatch.syspath_prepend(tmp_path)
    bench = bench_run.load("grouped_gemm")
    case = next(c for c in bench.cases("cpu", 1) if c.direction == "fwd" and c.name == "odd")
    T, H, K, E, I = (case.shape[k] for k in "THKEI")
    x, w, counts = torch.randn(T * K, H, requires_grad=True), torch.randn(E, 2 * I, H), torch.full((E,), T * K // E).int()
    counts[0] += T * K - counts.sum().int()
    want = torch.cat([rows @ one.t() for rows, one in zip(x.split(counts.tolist()), w)])
    assert torch.allclose(bench.ragged_matmul(case, "cuda", counts)(x, w), want, atol=1e-4)
    for name in [n for n in sys.modules if n.startswith("triton_kernels")]:
        del sys.modules[name]
    assert bench.ragged_matmul(case, "cpu", counts) == "needs CUDA tensors"


@pytest.fixture
def replays(monkeypatch):
    """A GPU's harness on a CPU: a graph's replay computes again into the tensors of the capture. Set replays.works = False: it does not."""
    class Replays:
        works, made = True, []

    def capture(run):
        outs = run()
        Replays.made.append(outs)
        return lambda: [o.copy_(new) for o, new in zip(outs, run())] if Replays.works else None, outs
    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness, "clock", lambda device: clocks.Clock())
    return Replays


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_cuda_graph_rows(replays, direction):
    """Ours and torch's, checked by what a replay leaves; one that leaves nothing is wrong, one that cannot be captured has no figures."""
    case, x = Case("double", "tiny", {"N": 8}, direction=direction), torch.randn(8, requires_grad=True)
    ways = Ways((x,), double, double, {"torch eager": lambda x: x + x, "peer": double}, nbytes=(64, 96), graph=True)
    found = measured(ways, case, device="cuda")
    assert {*found} == {"interlace", "torch eager", "peer", "interlace, CUDA graph", "torch eager, CUDA graph"}
    assert all(r["error"] == 0 and r["repeatable"] and r["p50_us"] > 0 for r in found.values())
    assert len(replays.made[0]) == (1 if direction == "fwd" else 2)
    assert "CUDA graph" not in report._line(list(found.values()))[3]
    replays.works = False
    assert measured(ways, case, device="cuda")["interlace, CUDA graph"]["error"] == math.inf


def test_cuda_graph_rows_where_they_mean_something(replays):
    x = torch.randn(8, requires_grad=True)
    for case, graph, nbytes, device in ((CASE, False, 64, "cuda"), (CASE, True, 1 << 30, "cuda"), (CASE, True, 64, "cpu"),
                                        (Case("double", "tiny", {"N": 8}, direction="bwd"), True, 64, "cuda")):
        ways = Ways((x,), double, double, {"torch eager": double}, nbytes=(nbytes, nbytes), graph=graph)
        assert {*measured(ways, case, device=device)} == {"interlace", "torch eager"}


def test_capture_calls_what_torch_has(monkeypatch):
    """Without a GPU: the names and the order. Warm runs and the capture on one side stream, outputs those of the capture."""
    did = []

    class Stream:
        def wait_stream(self, other):
            did.append(("wait", other))

    class Graph:
        replay = staticmethod(lambda: did.append("replay"))

    @contextlib.contextmanager
    def on(*what, **kw):
        did.append((len(what), *kw))
        yield
    for name, fake in {"Stream": Stream, "CUDAGraph": Graph, "graph": on, "stream": on, "current_stream": Stream}.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, fake)
    assert "stream" in inspect.signature(torch.cuda.graphs.graph.__init__).parameters
    replay, outs = harness.capture(lambda: (did.append("run"), (torch.ones(1),))[1])
    replay()
    assert [d for d in did if d[0] != "wait"] == [(1,), "run", "run", "run", (1, "stream"), "run", "replay"] and outs[0] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "swiglu", "gated", "gelu", "rope", "cross_entropy"])
def test_cuda_graphs_on_a_gpu(op):
    for case in bench_run.load(op).cases("quick", 1):
        ways = bench_run.load(op).ways(case, Make(case, "cuda", quick=True))
        found = {r["way"]: r for r in harness.measure(op, case, ways, device="cuda", budget=0.01)}
        assert ("interlace" + harness.GRAPH in found) == ("torch eager" + harness.GRAPH in found) == (case.direction != "bwd"), str(case)
        for name, row in found.items():
            if name.endswith(harness.GRAPH):
                assert row.get("error") == pytest.approx(found[name.removesuffix(harness.GRAPH)]["error"]), (str(case), row)
