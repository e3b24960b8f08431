"""Everything one NVIDIA GPU can tell, in one command: `make gpu-report [PART=name] [OUT=folder]`.

    part        what                                                                            seconds at most
    build       csrc, in place; before any other part                                           180
    doctor      versions, build tiers, topology, self-test                                      45
    tests       every test marked gpu                                                           150
    bench       every op in its GPU sizes, each for its share of the time; tables and plots     200, the last 25 for these
    sanitizer   compute-sanitizer memcheck and racecheck over a small, odd case of each kernel  90

    --out holds report.md, a log of each part, and bench.tar.gz (rows, roofs, tables, plots), packed anew every 15 s: 7 files

Runs from the source tree (the Makefile puts a link tree on PYTHONPATH; nothing is installed, caches lie in build/), in under 9
minutes, and writes each part to --out as it goes, so that a run that is cut short leaves what it had. After a slow build every
part gets proportionally less; without csrc the others run all the same. Exit status 1 when a part failed or was cut short;
report.md says which. Without a GPU, or with --dry-run, nothing runs: it says what is missing and which commands it would run.
"""
import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# A file whose imports are not all here is an error of its own, and the others run.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--continue-on-collection-errors", "-m", "gpu"]
# The tests mostly wait for Triton to compile, about a second a kernel, and the longest file has a hundred: no file to one worker alone.
PARALLEL = ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2))), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
# One odd shape of a kernel, the likeliest to err first: under the sanitizer a launch costs a second, and each tool has 37 s.
SMALL = [f"tests/test_{op}.py::test_{test}_kernel_matches[cuda-{case}]" for op, test, case in (
    ("route_plan", "route_plan", "capacity and align"), ("router", "router", "odd groups-torch.float32"),
    ("permute", "permute_gradients", "odd-torch.float32"), ("unpermute", "unpermute", "odd-torch.float32"),
    ("cross_entropy", "cross_entropy", "(7, 250)-torch.float32"), ("rope", "rope_slice_of_qkv", "torch.float32"),
    ("rms_norm", "add_rms_norm", "(3, 7, 250)-torch.float32"), ("layer_norm", "add_layer_norm", "(3, 7, 250)-torch.float32-bias"),
    ("swiglu", "swiglu_with_probs", "(3, 7, 250)-torch.float32"), ("dropout", "dropout", "(3, 7, 250)-torch.float32"),
    ("gated", "gated", "silu-(17, 1023)-torch.float32"), ("gelu", "gelu", "tanh-(5, 1023)-torch.float32"))]
MEASURED = ROOT / "build" / "gpu-bench"                               # where the bench writes: some 20 files
TOTAL = 525.0                                                         # seconds of all
LARGEST = 15 << 20                                                    # bytes of a file in --out
GRACE = 8.0                                                           # seconds from SIGINT, at which all sum up, to SIGKILL
REFUSED = "Device not supported"                                      # what compute-sanitizer says under some virtual machines


def sanitizer() -> str:
    return shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def commands() -> dict[str, tuple[float, list[list[str]]]]:
    """part -> (seconds at most, commands)."""
    # Calls of the driver that fail as a library expects are no errors of memory.
    tools = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    checks = [[sanitizer(), "--tool", tool, *words, "--error-exitcode", "9", "--target-processes", "all", *PYTEST, "-x", "-v", *SMALL]
              for tool, words in tools.items()]
    return {
        "build": (180, [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]),
        "doctor": (45, [[sys.executable, "-m", "interlace", "doctor"]]),
        "tests": (150, [[*PYTEST, *PARALLEL, "-vv", "--durations=10", "tests"]]),
        # of the 175 s some 15 go by before the first case (CUDA, roofs), the last case runs over its share, and plots take 15 to 25
        "bench": (175, [[sys.executable, "-m", "interlace", "bench", "--device", "cuda", "--quick", "--seconds", "115", "--out",
                         str(MEASURED)]]),
        "sanitizer": (90, checks),
    }


# part -> (seconds at most, what to run when it failed or was cut short): the bench makes its table and plots at its end
AFTERWARDS = {"bench": (25.0, [sys.executable, "-m", "interlace.bench.report", str(MEASURED)])}


def environment() -> dict[str, str]:
    """Of the commands: output as it comes, and no cache outside the tree, for HOME may be read-only."""
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "", "MPLCONFIGDIR": "matplotlib"}
    folder = ROOT / "build" / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "PYTHONUNBUFFERED": "1", **{name: str(folder / sub) for name, sub in caches.items()}}


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch


def missing() -> list[str]:
    """What this machine lacks, the GPU first; only that one stops the report."""
    torch, lacks = _torch(), []
    if torch is None or torch.version.cuda is None:
        lacks.append(f"a CUDA build of torch: this is {torch.__version__ if torch else 'none'}; everything needs it")
    if torch is None or not torch.cuda.is_available():
        lacks.append("a CUDA device that torch can use: everything needs it")
    packages = {"triton": "every kernel", "pytest": "tests and sanitizers", "pytest_benchmark": "`pytest bench`", "hypothesis": "tests",
                "numpy": "tests", "rich": "tables on a terminal", "matplotlib": "plots", "omegaconf": "tests of the command line",
                "transformers": "the bench replace, tests of Hugging Face models", "safetensors": "tests of checkpoints"}
    lacks += [f"the package {name}, for {who}" for name, who in packages.items() if importlib.util.find_spec(name) is None]
    lacks += [f"the program {Path(p).name}, for {who}" for p, who in (("nvcc", "the build of csrc/cuda"), (sanitizer(), "the sanitizers"))
              if shutil.which(p) is None]
    return lacks


def pack(out: Path) -> None:
    """What the bench has written so far, as one file; without the plots where it would be too large, without the rows if even so."""
    if not MEASURED.exists():
        return
    new = out / ".bench.tar.gz"
    for keep in (lambda name: True, lambda name: "/plots" not in name, lambda name: not name.endswith(".jsonl") and "/plots" not in name):
        with tarfile.open(new, "w:gz") as tar:
            tar.add(MEASURED, "bench", filter=lambda info, keep=keep: info if keep(info.name) else None)   # type: ignore[misc]
        if new.stat().st_size <= LARGEST:
            break
    new.replace(out / "bench.tar.gz")


def cut(log: Path) -> None:
    """A log that is too large loses its middle."""
    if log.stat().st_size > LARGEST:
        text, half = log.read_bytes(), LARGEST // 2 - 100
        log.write_bytes(text[:half] + b"\n... %d bytes left out ...\n" % (len(text) - 2 * half) + text[-half:])


def wait(proc: subprocess.Popen, seconds: float, tick: Callable[[], None]) -> int | None:
    """The exit status, None past the limit; ticks every 15 s meanwhile."""
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            return proc.wait(min(15, max(left, 0)))
        except subprocess.TimeoutExpired:
            tick()
            if left <= 15:
                return None


def stop(proc: subprocess.Popen) -> None:
    """Ctrl-C, then death, of the command and all that it started."""
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(proc.pid, number)
            proc.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_part(seconds: float, todo: list[list[str]], log: Path, mode: str = "w") -> tuple[str, float]:
    """Run the commands one after another into `log`, each for at most its share of what is left.
    Returns: "ok", "failed" or "cut short", and the seconds it took."""
    start, verdict = time.monotonic(), "ok"
    with log.open(mode) as f:
        for i, command in enumerate(todo):
            f.write(f"$ {shlex.join(command)}\n")
            f.flush()
            share = (seconds - (time.monotonic() - start)) / (len(todo) - i)
            try:
                proc = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, start_new_session=True, env=environment())
            except OSError as e:
                f.write(f"{e}\n")
                verdict = "failed" if verdict == "ok" else verdict
                continue
            try:
                status = wait(proc, max(share - min(GRACE, share / 4), 0), lambda: pack(log.parent))
            finally:
                stop(proc)                                            # one that ended may have left children; Ctrl-C ends all
            if status is None:
                f.write(f"... cut short after {share:.0f} s\n")
                f.flush()
            verdict = "cut short" if status is None else "failed" if status and verdict == "ok" else verdict
    if verdict == "failed" and REFUSED in log.read_text(errors="replace"):
        verdict = "cannot run on this machine"
    cut(log)
    pack(log.parent)
    return verdict, time.monotonic() - start


def shares(parts: dict[str, tuple[float, list[list[str]]]], left: float) -> float:
    """By how much the limits of the parts to come must shrink to end in `left` seconds."""
    need = sum(seconds + AFTERWARDS.get(name, (0.0,))[0] for name, (seconds, _) in parts.items())
    return max(0.05, min(1.0, left / need))


def shrunk(command: list[str], shrink: float) -> list[str]:
    """A command that has less time, and plans with it."""
    return [f"{float(word) * shrink:.0f}" if before == "--seconds" else word for before, word in zip(["", *command], command)]


def plan(parts: dict[str, tuple[float, list[list[str]]]]) -> None:
    """What would run."""
    for name, (seconds, todo) in parts.items():
        print(f"{name}, {seconds:.0f} s at most:")
        for command in todo:
            print(f"    {shlex.join(command)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--part", help=f"run one part alone, after the build: {', '.join(commands())}")
    parser.add_argument("--dry-run", action="store_true", help="say what is missing here and what would run")
    args = parser.parse_args()
    if args.part is not None and args.part not in commands():
        print(f"gpu-report: --part must be one of {', '.join(commands())}, got {args.part}", file=sys.stderr)
        return 2
    torch = _torch()
    parts = {name: part for name, part in commands().items() if name == "build" or args.part in (None, name)}
    gpu = torch is not None and torch.cuda.is_available()
    if args.dry_run or not gpu:
        print("gpu-report: runs on a machine with one NVIDIA GPU and a CUDA build of torch; on a CPU use `make test` and `make bench`",
              file=sys.stderr)
        print("\n".join(f"missing here: {what}" for what in missing()) or "nothing is missing here")
        plan(parts)
        return 0 if gpu else 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        print(f"gpu-report: --out must be a folder that can be written, got {args.out}: {e.strerror}; choose another", file=sys.stderr)
        return 2
    lacks = [f"Missing: {what}.\n" for what in missing()]
    head = [f"# GPU report: {torch.cuda.get_device_name()}, torch {torch.__version__}", "", *lacks,
            "| part | result | seconds |", "|---|---|---|"]
    return report(args.out, head, parts, time.monotonic() + TOTAL)


def report(out: Path, lines: list[str], parts: dict[str, tuple[float, list[list[str]]]], end: float) -> int:
    """Run the parts until `end`, a row of report.md each. Returns the exit status."""
    shutil.rmtree(MEASURED, ignore_errors=True)
    failed, names = False, list(parts)
    for i, (name, (seconds, todo)) in enumerate(parts.items()):
        shrink = shares({n: parts[n] for n in names[i:]}, end - time.monotonic())
        log = out / f"{name}.log"
        verdict, took = run_part(seconds * shrink, [shrunk(command, shrink) for command in todo], log)
        if verdict != "ok" and name in AFTERWARDS and MEASURED.exists():
            took += run_part(AFTERWARDS[name][0] * shrink, [AFTERWARDS[name][1]], log, "a")[1]
        failed |= verdict in ("failed", "cut short")
        lines.append(f"| {name} | {verdict} | {took:.0f} |")
        (out / "report.md").write_text("\n".join(lines) + "\n")       # after each part: a run cut short leaves this
        print(f"gpu-report: {name}: {verdict} in {took:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
