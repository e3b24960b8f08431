"""The column "measured" of README's table, from the rows that are kept: `make readme`, `make readme MEASURE="rope gemm_ar"`, `MEASURE=all`.

    python -m interlace.bench.readme                         rewrite the cells whose rows are in bench/results/<machine>
    python -m interlace.bench.readme --measure [OP ...]      first measure the table's own cases of these benches, all when none is named
    python -m interlace.bench.readme --check                 rewrite nothing; exit status 1 where the table says another thing

A cell is a text with figures in braces, {sweep/bench/function/shape/way}: the median time of that way over ours, forward +
backward where the bench has both, fp32 / bf16 where it has both. `a+b` as a shape: from the least to the most of several. Below
1, where we lose, it is bold; with a ? after it a row behind it is marked noisy or loaded. A cell whose rows are not kept stays.
"""
import argparse
import datetime
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..launch import launch
from ..parallel.errors import UserError
from .cases import Case
from .ops import OPS, pick
from .rows import read_old
from .run import load, pace

__all__ = ["CELLS", "figures", "main", "render"]

README = Path(__file__).resolve().parents[1] / "README.md"
Rows = dict[tuple[Any, ...], dict[str, Any]]

CELLS = {                                                             # how the row of the table begins -> its last cell
    "`rms_norm`": "{quick/rms_norm/rms_norm/small/torch eager}, {quick/rms_norm/add_rms_norm/small/torch eager} of `F.rms_norm` "
                  "(512 x 512, as the next five)",
    "`layer_norm`": "{quick/layer_norm/layer_norm/small/torch eager}, {quick/layer_norm/add_layer_norm/small/torch eager} of "
                    "`F.layer_norm`",
    "`swiglu`": "{quick/swiglu/swiglu/small/torch eager} of `F.silu(gate) * up` on one tensor",
    "`gated`": "silu {quick/gated/gated silu/small/torch eager}, gelu_tanh {quick/gated/gated gelu_tanh/small/torch eager} of "
               "`act(gate) * up`",
    "`clamped_swiglu`": "{quick/clamped_swiglu/clamped_swiglu/small/torch eager} of the formula in torch",
    "`gelu`": "tanh {quick/gelu/gelu tanh/small/torch eager}, exact {quick/gelu/gelu/small/torch eager} (its forward alone, fp32: "
              "{quick/gelu/gelu/small/torch eager/fwd}) of `F.gelu`",
    "`rope`": "{quick/rope/rope/small/torch eager} of the usual composition",
    "`attention`": "{cpu/attention/attention/gpt/torch eager} (S = 256, 4 heads of 64), "
                   "{cpu/attention/attention/llama/torch eager} (S = 512, 8), "
                   "{cpu/attention/attention/llama-8b/torch eager} (S = 1024, 4 of 128 over 1) of `scaled_dot_product_attention`",
    "`dropout`": "{quick/dropout/dropout/small/torch eager} of `F.dropout`",
    "`jitter`": "{quick/jitter/jitter/small/torch eager} of `x * uniform_`; its backward alone, fp32: "
                "{quick/jitter/jitter/small/torch eager/bwd}, for torch keeps the noise",
    "`cross_entropy`": "{quick/cross_entropy/cross_entropy/small/torch eager} of `F.cross_entropy` at 64 x 8192, "
                       "{quick/cross_entropy/cross_entropy/odd/torch eager} at 33 x 5003",
    "`router`": "{cpu/router/router/mixtral/torch eager} (8 experts, top-2), {cpu/router/router/qwen3-30b/torch eager} (128, top-8), "
                "{cpu/router/router/deepseek-v3/torch eager} (256, top-8 in groups) of the eager composition at T = 2048",
    "`route_plan`": "{cpu/route_plan/route_plan/mixtral/torch eager} of an argsort plan; {cpu/permute/permute/mixtral/torch eager} of "
                    "`index_select`; {cpu/unpermute/unpermute/mixtral/torch eager} of weighted `index_add`, "
                    "{cpu/unpermute/unpermute/mixtral/F.embedding_bag} of `F.embedding_bag` (8192 x 1024, top-2)",
    "`grouped_gemm`": "`expert_mlp`: {cpu/experts/expert_mlp/mixtral/sort + F.grouped_mm}, "
                      "{cpu/experts/expert_mlp/qwen3-30b/sort + F.grouped_mm} of sort + `F.grouped_mm`; of a loop over experts "
                      "{cpu/experts/expert_mlp/mixtral/torch eager} (8 experts), {cpu/experts/expert_mlp/qwen3-30b/torch eager} (64)",
    "`adamw`": "5 and 34 M parameters that no cache holds: {cpu/adamw/adamw/gpt 5M+gpt 34M/torch foreach} of `AdamW(foreach=True)`, "
               "{cpu/adamw/adamw/gpt 5M+gpt 34M/torch fused} of `fused=True`, {cpu/adamw/adamw clip/gpt 5M+gpt 34M/torch fused} with a "
               "clip; {cpu/grad_norm/grad_norm/gpt 5M+gpt 34M/torch eager} of torch's fp32 norm, whose error is 1e-5 to 1e-3, "
               "{cpu/grad_norm/grad_norm/gpt 5M+gpt 34M/torch eager in fp64} of an fp64 one",
    "`all_reduce`": "{cpu/collectives/all_reduce/2^14/torch eager/fwd/float32} / "
                    "{cpu/collectives/all_reduce/2^18/torch eager/fwd/float32} / "
                    "{cpu/collectives/all_reduce/2^22/torch eager/fwd/float32} of gloo, "
                    "{cpu/collectives/all_reduce/2^14/deepspeed shm/fwd/float32} / "
                    "{cpu/collectives/all_reduce/2^18/deepspeed shm/fwd/float32} / "
                    "{cpu/collectives/all_reduce/2^22/deepspeed shm/fwd/float32} of DeepSpeed's shared memory",
    "`all_gather`": "{cpu/collectives/all_gather/2^18/torch eager/fwd/float32}, "
                    "{cpu/collectives/reduce_scatter/2^18/torch eager/fwd/float32} of gloo",
    "`gemm_ar`": "{quick/gemm_ar/gemm_ar/small/torch eager}, {quick/gemm_rs/gemm_rs/small/torch eager}, "
                 "{quick/gemm_rs/ag_gemm/small/torch eager}; at 2048 x 2048 x 1024 "
                 "{cpu/gemm_ar/gemm_ar/large/torch eager}, {cpu/gemm_rs/gemm_rs/large/torch eager}, "
                 "{cpu/gemm_rs/ag_gemm/large/torch eager}",
    "`rs_residual_norm`": "{quick/rs_residual_norm/rs_residual_rms_norm/small/torch eager}",
    "`dispatch_plan`": "{cpu/dispatch/dispatch/mixtral/torch eager}, {cpu/dispatch/dispatch/fine/torch eager}",
    "a step of transformers' Llama": "{cpu/replace/replace/llama/torch eager} (vocabulary 32000), "
                                     "{cpu/replace/replace/llama-small-vocab/torch eager} (8192) of stock",
    "a training step": "{cpu/train_step@1/train_step/gpt/torch eager}",
    "the same, tp=2": "{cpu/train_step/train_step/gpt/torch parallelize_module} / "
                      "{cpu/train_step/train_step sp/gpt/torch parallelize_module}",
    "the same, dp=2": "{cpu/train_step/train_step dp/gpt/torch DDP} / "
                      "{cpu/train_step/train_step dp zero1/gpt/torch DDP + ZeroRedundancyOptimizer}",
    "the same with 8 experts": "{cpu/train_step/train_step moe/gpt/torch DDP + all_to_all_single}",
}


def figures(cell: str) -> list[str]:
    return re.findall(r"\{([^}]*)\}", cell)


def cases(figure: str) -> tuple[str, str, int, str, list[Case]]:
    """(bench, sweep, ranks, way, the cases behind a figure: fp32 first). Raises: ValueError where the bench has none."""
    sweep, bench, call, shapes, way, *rest = figure.split("/")
    bench, _, ranks = bench.partition("@")
    world = int(ranks or (1 if OPS[bench][0] == "one" else 2))
    every = [c for c in load(bench).cases(sweep, world) if c.call == call and c.name in shapes.split("+")]
    passes = {c.direction for c in every}
    want = rest[0] if rest else "fwd+bwd" if "fwd+bwd" in passes else "fwd"
    types = rest[1:] or (["float32"] if rest else ["float32", "bfloat16"])
    found = [c for t in types for name in shapes.split("+") for c in every if (c.name, c.dtype, c.direction) == (name, t, want)]
    if not found:
        raise ValueError(f"readme: a figure must name cases of a bench, got {figure}")
    return bench, sweep, world, way, found


def one(figure: str, rows: Rows) -> str | None:
    """The figure in words; None where a row of it is not kept."""
    bench, _, _, way, found = cases(figure)
    pairs = [[rows.get((bench, w, "cpu", *sorted(c.key().items()))) for w in (way, "interlace")] for c in found]
    if any(r is None or r.get("ratio") is None for pair in pairs for r in pair):
        return None
    values = [theirs["ratio"] for theirs, _ in pairs]                 # type: ignore[index]
    doubt = "?" * any(r["noisy"] or r["loaded"] for pair in pairs for r in pair)   # type: ignore[index]
    if "+" in figure.split("/")[3]:
        low, high = _times(min(values)), _times(max(values))
        return low + doubt if low == high else f"{low} to {high}{doubt}"
    return " / ".join(_times(v) for v in values) + doubt


def _times(ratio: float) -> str:
    text = f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"
    return f"**{text}**" if text < "1" else text


def render(text: str, rows: Rows) -> tuple[str, list[str]]:
    """README with the cells that can be told from rows; and what cannot, in words."""
    lines, lacking = text.split("\n"), []
    for start, cell in CELLS.items():
        at = [i for i, line in enumerate(lines) if line.startswith(f"| {start}") and line.rstrip().endswith("|")]
        if len(at) != 1:
            raise UserError(f"readme: one row of the table must begin with {start}, got {len(at)}; change CELLS of bench/readme.py")
        told = {f: one(f, rows) for f in figures(cell)}
        if unknown := [f for f, value in told.items() if value is None]:
            lacking.append(f"{start}: no rows of {', '.join(unknown)}")
            continue
        head = lines[at[0]].rstrip().rstrip("|").rpartition("|")[0]
        for figure, value in told.items():
            cell = cell.replace("{" + figure + "}", str(value))
        lines[at[0]] = f"{head}| {cell} |"
    return "\n".join(lines), lacking


def measure(names: list[str], folder: Path) -> int:
    """The cases behind the figures of these benches, in one run; what was measured is kept. Returns the worst exit status."""
    from .command import _warn_of_load
    jobs: dict[tuple[int, str, str], list[dict[str, Any]]] = defaultdict(list)
    for cell in CELLS.values():
        for figure in figures(cell):
            bench, sweep, world, _, found = cases(figure)
            if bench in names:
                jobs[world, bench, sweep] += [c.key() for c in found if c.key() not in jobs[world, bench, sweep]]
    _warn_of_load()
    run, worst = time.strftime("%Y%m%dT%H%M%S-readme"), 0
    todo = [(*what, only, sitting) for sitting in (1, 2) for what, only in sorted(jobs.items()) if sitting <= pace(what[2]).sittings]
    for i, (world, bench, sweep, only, sitting) in enumerate(todo):
        print(f"readme: {bench}, {len(only)} cases on {world} ranks ({i + 1} of {len(todo)})", flush=True)
        job = {"names": [bench], "folder": str(folder), "run": run, "device": "cpu", "sweep": sweep, "kept": str(folder), "only": only,
               "sitting": sitting}
        status = launch(world, "interlace.bench.run:ops", job, again="rows measured so far are kept; name the others after --measure")
        worst = max(worst, status)
        if status >= 128:
            break
    return worst


def main(words: list[str], readme: Path = README) -> int:
    from .command import default_folder
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m interlace.bench.readme", description=__doc__, formatter_class=raw)
    parser.add_argument("--measure", metavar="OP", nargs="*")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(words)
    folder, status = default_folder(), 0
    try:
        if args.measure is not None:
            status = measure(pick(args.measure), folder)
        rows = read_old(folder)
        before = readme.read_text()
        after, lacking = render(before, rows)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    for line in lacking:
        print(f"kept as it is, {line}")
    changed = [line for line in after.split("\n") if line not in before.split("\n")]
    for line in changed:
        print(f"{'differs' if args.check else 'now'}: {line}")
    if args.check:
        return int(bool(changed))
    if changed:
        now = datetime.date.today()
        readme.write_text(re.sub(r"(with torch )[\d.]+, \d+ \w+ \d{4}", rf"\g<1>{_torch()}, {now.day} {now:%B %Y}", after, count=1))
    return status


def _torch() -> str:
    import torch
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
