"""The timeline of every pipeline schedule: complete, possible, with the bubble of the books, and in the order that torch executes."""
import itertools
import subprocess
import sys

import pytest
import torch
from ranks import run
from test_cli import mistake
from test_pipeline_parallel import axis_of

from interlace import cli
from interlace.models.config import ModelConfig
from interlace.models.schedule import LENGTH, bubble, deferred_at_once, draw, in_flight, text, timeline
from interlace.parallel.layout import SCHEDULES, stages_of_rank
from interlace.parallel.pipeline_parallel import Pipeline

CASES = [(name, pp, v, n) for name, how in SCHEDULES.items() for pp in (2, 3, 4)
         for v in ((2,) if how.v_shaped else (2, 3) if how.chunked else (1,)) for n in (pp, pp + 1, 2 * pp, 4 * pp)
         if not (name.startswith("interleaved") and n % (n // pp))]


def model(name, pp, v):
    return ModelConfig(num_layers=pp * v, pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=v if v > 1 else None,
                       pipeline_parallel_schedule=name)


@pytest.mark.parametrize("name, pp, v, n", CASES)
def test_timeline(name, pp, v, n):
    m = model(name, pp, v)
    rows, done = timeline(m, n), {}
    split, last = SCHEDULES[name].split_backward, pp * v - 1
    for rank, row in enumerate(rows):
        assert all(a.stop <= b.start for a, b in itertools.pairwise(row)), "a rank does two things at once"
        assert all(s.stop - s.start == LENGTH[s.kind] and s.stage in stages_of_rank(m, rank) for s in row)
        for s in row:
            assert (s.kind, s.stage, s.microbatch) not in done, "twice"
            done[s.kind, s.stage, s.microbatch] = s
    for stage in range(pp * v):
        for i in range(n):
            forward, whole = done["F", stage, i], done.get(("B", stage, i))
            halves = done.get(("I", stage, i)), done.get(("W", stage, i))
            assert halves == (None, None) if whole else split and None not in halves, "one backward, whole or in halves"
            first = whole or halves[0]
            assert forward.stop <= first.start and (whole or halves[0].stop <= halves[1].start)
            if stage:
                assert done["F", stage - 1, i].stop <= forward.start
            if stage < last:
                assert (done.get(("B", stage + 1, i)) or done["I", stage + 1, i]).stop <= first.start
    assert len(done) == sum(map(len, rows)) and {i for _, _, i in done} == set(range(n))


@pytest.mark.parametrize("name, pp, v, n", CASES)
def test_bubble(name, pp, v, n):
    got, plain = bubble(timeline(model(name, pp, v), n)), (pp - 1) / (n + pp - 1)
    if name in ("gpipe", "1f1b"):
        assert got == pytest.approx(plain)
    elif name == "interleaved_1f1b":
        assert got == pytest.approx((pp - 1) / (v * n + pp - 1)) and got < plain
    else:
        assert got < plain and (name.startswith("zbv") or got < (pp - 1) / (v * n + pp - 1))


@pytest.mark.parametrize("name, pp, v, n", CASES)
def test_what_is_in_flight(name, pp, v, n):
    """The closed forms that `explain` counts memory by."""
    m = model(name, pp, v)
    for rank, row in enumerate(timeline(m, n)):
        live, seen, waiting, most = dict.fromkeys(stages_of_rank(m, rank), 0), [], 0, 0
        for s in row:
            if s.kind in "BI":
                seen.append(dict(live))
            live[s.stage] += {"F": 1, "B": -1, "I": -1, "W": 0}[s.kind]
            waiting += {"I": 1, "W": -1}.get(s.kind, 0)
            most = max(most, waiting)
        said = in_flight(m, n, rank)
        assert said == seen if name.startswith("interleaved") else said == [max(seen, key=lambda at: sum(at.values()))]
        assert most <= deferred_at_once(m, n, rank) and (most == deferred_at_once(m, n, rank) or name.startswith("zbv"))


class Recorded(torch.nn.Module):
    """A stage that writes down what is run: F in forward, and the backward by autograd or by W."""

    def __init__(self, index, last, log):
        super().__init__()
        self.index, self.last, self.log, self.weight = index, last, log, torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.deferred = None

    def defer(self, deferred):
        self.deferred = deferred

    def forward(self, x, *, labels, first_sample):
        i = int(first_sample)
        self.log.append(("F", self.index, i))
        h = x.double() if not x.is_floating_point() else x
        h = _Noted.apply(h * self.weight, self, i)
        return h.sum().view(1) if self.last else h


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, stage, i):
        ctx.stage, ctx.i = stage, i
        return h.view_as(h)

    @staticmethod
    def backward(ctx, dh):
        stage, i = ctx.stage, ctx.i
        stage.log.append(("B" if stage.deferred is None else "I", stage.index, i))
        if stage.deferred is not None:
            stage.deferred.waiting.append(lambda: stage.log.append(("W", stage.index, i)))
        return dh, None, None


def _order(rank, name, pp, v, n):
    m, log = model(name, pp, v), []
    axis = axis_of(rank, pp)
    stages = {i: Recorded(i, i == pp * v - 1, log) for i in stages_of_rank(m, rank)}
    pipeline = Pipeline(stages, axis, num_stages=pp * v, schedule=name, microbatches=n, ids_shape=(1, 2), shape=(1, 2), dtype=torch.float64,
                        loss_dtype=torch.float64, device=torch.device("cpu"))
    ids = torch.ones(n, 2, dtype=torch.int64)
    pipeline.step(ids, ids, torch.arange(n))
    want = [(s.kind, s.stage, s.microbatch) for s in timeline(m, n)[rank]]
    if SCHEDULES[name].split_backward:                                # a whole backward there is I, and W at once
        want = [a for kind, *at in want for a in ([("I", *at), ("W", *at)] if kind == "B" else [(kind, *at)])]
    assert log == want, f"\n{log}\n{want}"


@pytest.mark.parametrize("name, pp, v, n", [c for c in CASES if c[1] < 4 and c[2] < 3 and c[3] in (c[1], 2 * c[1])])
def test_the_order_is_the_one_that_runs(name, pp, v, n):
    run(pp, _order, name, pp, v, n)


def test_text_fits_and_says_the_bubble():
    for name, pp, v, n in CASES:
        lines = text(model(name, pp, v), n).splitlines()
        assert max(map(len, lines)) <= 160 and len(lines) == pp + 2 and f"bubble {bubble(timeline(model(name, pp, v), n)):.1%}" in lines[0]
    lines = text(model("1f1b", 2, 1), 200).splitlines()
    assert max(map(len, lines)) <= 160 and all(line.endswith(" ...") for line in lines[2:])


def test_text_of_a_small_one():
    assert text(model("1f1b", 2, 1), 2).splitlines()[2:] == ["  rank 0   0 1....B0--..B1--", "  rank 1  .. 0B0-- 1B1--...."]


def test_picture(tmp_path):
    draw(model("zbv_zero_bubble", 2, 2), 4, tmp_path / "a.png")
    made = (tmp_path / "a.png").read_bytes()
    assert made[:4] == b"\x89PNG" and len(made) < 100_000


def test_the_command(tmp_path, capsys):
    assert cli.main(["explain", "--schedule", str(tmp_path / "b.png"), "pp=2", "model.global_batch_size=16"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("schedule: 1f1b, 2 ranks x 1 stages, 4 micro-batches, bubble 20.0%") and (tmp_path / "b.png").exists()
    assert cli.main(["explain", "pp=2", "vpp=2", "--schedule"]) == 0 and "interleaved_1f1b" in capsys.readouterr().out
    assert cli.main(["explain", "--schedule", "pp=2"]) == 0 and capsys.readouterr().out.startswith("schedule: 1f1b")
    assert "needs pipeline_model_parallel_size > 1" in mistake(capsys, "explain", "--schedule")
    nowhere = str(tmp_path / "no" / "c.png")
    assert "--schedule must be a file that can be written" in mistake(capsys, "explain", "pp=2", "--schedule", nowhere)
    assert "--schedule must name a picture" in mistake(capsys, "explain", "pp=2", "--schedule", str(tmp_path / "c.xyz"))


def test_explain_of_a_pipeline_needs_no_torch():
    code = ("import sys\nfrom interlace.cli import main\n"
            "status = main(['explain', '--nproc', '4', 'pp=2', 'vpp=2', 'ep=2', 'model.num_moe_experts=4'])\n"
            "assert 'torch' not in sys.modules\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "of rank" in done.stdout, done.stderr
