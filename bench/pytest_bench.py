"""`pytest bench --benchmark-only`: the quick cases of every bench through pytest-benchmark. Loaded by pyproject.toml.

A plugin and not a conftest.py: pytest would import that as `bench.conftest`, and bench/ is only ever interlace.bench. Every
bench_<op>.py becomes a test_bench_<op> per case and way; error, bytes and FLOPs go to extra_info. Of an op over several ranks
pytest itself is rank 0; the others call the same way as often, which is fixed beforehand.
"""
import atexit
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
WAYS = ("interlace", "torch eager")
ROUNDS, WARMUP = 5, 1
_others: dict[int, list] = {}                                         # world -> inboxes of the other ranks


def pytest_collect_directory(path: Path, parent: Any) -> Any:
    """A folder, not a package: pytest imports the __init__ of a package, under its bare name."""
    return pytest.Dir.from_parent(parent, path=path) if path == HERE else None


def pytest_collect_file(file_path: Path, parent: Any) -> Any:
    if file_path.parent == HERE and file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return _Bench.from_parent(parent, path=file_path)
    return None


class _Bench(pytest.Module):
    def _getobj(self) -> Any:
        """Not the bench itself, which pytest would import under a name it must not have."""
        op = self.path.stem.removeprefix("bench_")
        return SimpleNamespace(**{f"test_bench_{op}": _test(op), "__name__": op, "__doc__": None})


def _test(op: str) -> Any:
    from .ops import OPS
    from .run import load
    worlds = {"one": (1,), "many": (2,)}.get(OPS[op][0], (1, 2))
    cases = [case for world in worlds for case in load(op).cases("quick", world)]

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("index", range(len(cases)), ids=[str(c).replace(" ", "-") for c in cases])
    def test(benchmark: Any, index: int, way: str) -> None:
        case = cases[index]
        _tell(case.world, (op, index, way, worlds))
        benchmark.group = f"{op} {case}"
        run, extra = _way(op, case, way)
        benchmark.extra_info.update(extra, way=way, case=case.key())
        benchmark.pedantic(run, rounds=ROUNDS, iterations=1, warmup_rounds=WARMUP)
    return test


def _way(op: str, case: Any, name: str) -> tuple[Any, dict[str, Any]]:
    import torch.distributed as dist

    from .harness import prepare
    from .run import build
    ways = build(op, case, "cpu", dist.group.WORLD if case.world > 1 else None, 0, True)
    every = ways.all()
    way = every[name] if name in every else next(w for n, w in every.items() if n.startswith("torch "))
    ready = prepare(way, ways, case, {})
    return ready.run, {"error": ready.error, "repeatable": ready.repeatable, "bytes": ways.cost(ways.nbytes, case.direction),
                       "flops": ways.cost(ways.flops, case.direction)}


def _tell(world: int, job: tuple) -> None:
    """Start the other ranks at the first op that needs them, and hand them the same way."""
    if world == 1:
        return
    if world not in _others:
        import torch
        import torch.distributed as dist
        import torch.multiprocessing as mp
        ctx, store = mp.get_context("spawn"), os.path.join(tempfile.mkdtemp(), "store")
        _others[world] = [ctx.SimpleQueue() for _ in range(world - 1)]
        procs = [ctx.Process(target=_serve, args=(r, world, store, q), daemon=True) for r, q in enumerate(_others[world], 1)]
        for p in procs:
            p.start()
        atexit.register(lambda: [p.kill() for p in procs])            # type: ignore[func-returns-value]
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=world)
    for inbox in _others[world]:
        inbox.put(job)


def _serve(rank: int, world: int, store: str, inbox: Any) -> None:
    import torch
    import torch.distributed as dist

    from .run import load
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while (job := inbox.get()) is not None:
        op, index, name, worlds = job
        case = [c for w in worlds for c in load(op).cases("quick", w)][index]
        run, _ = _way(op, case, name)
        for _ in range(ROUNDS + WARMUP):
            run()
