"""Everything one NVIDIA GPU can tell, in one command: `make gpu-report [PART=name] [OUT=folder]`.

    part        what                                                                            seconds at most
    doctor      versions, build tiers, topology, self-test                                      45
    tests       every test marked gpu                                                           150
    bench       every op in its GPU sizes; tables and plots, of what there is when it is cut    200, the last 25 for these
    sanitizer   compute-sanitizer memcheck and racecheck over the kernels' small cases          100

    --out holds report.md, a log of each part, and bench.tar.gz (rows, roofs, tables, plots), packed anew every 15 s: 6 files

Runs from the source tree (the Makefile builds csrc and puts a link tree on PYTHONPATH; nothing is installed), in under 9
minutes, and writes each part to --out as it goes, so that a run that is cut short leaves what it had. Exit status 1 when a
part failed or was cut short; report.md says which.
"""
import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", "gpu"]
# One small shape of each kernel: under the sanitizer a launch costs a second.
SMALL = ["tests/test_rms_norm.py", "tests/test_layer_norm.py", "tests/test_swiglu.py", "tests/test_rope.py", "tests/test_dropout.py",
         "tests/test_cross_entropy.py"]


MEASURED = ROOT / "build" / "gpu-bench"                               # where the bench writes: some 20 files


def commands() -> dict[str, tuple[float, list[list[str]]]]:
    """part -> (seconds at most, commands)."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    checks = [[sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *PYTEST, "-x",
               "-k", "kernel_matches and float32", *SMALL] for tool in ("memcheck", "racecheck")]
    return {
        "doctor": (45, [[sys.executable, "-m", "interlace", "doctor"]]),
        "tests": (150, [[*PYTEST, "--durations=10", "tests"]]),
        "bench": (175, [[sys.executable, "-m", "interlace", "bench", "--device", "cuda", "--quick", "--out", str(MEASURED)]]),
        "sanitizer": (100, checks),
    }


# part -> (seconds at most, what to run when it failed or was cut short): the bench makes its table and plots at its end
AFTERWARDS = {"bench": (25.0, [sys.executable, "-m", "interlace.bench.report", str(MEASURED)])}


def pack(out: Path) -> None:
    """What the bench has written so far, as one file."""
    if MEASURED.exists():
        new = out / ".bench.tar.gz"
        with tarfile.open(new, "w:gz") as tar:
            tar.add(MEASURED, "bench")
        new.replace(out / "bench.tar.gz")


def wait(proc: subprocess.Popen, seconds: float, out: Path) -> int:
    """The exit status; packs what is there meanwhile. Raises: subprocess.TimeoutExpired."""
    end = time.monotonic() + seconds
    while True:
        left = end - time.monotonic()
        try:
            return proc.wait(min(15, max(left, 0)))
        except subprocess.TimeoutExpired:
            pack(out)
            if left <= 15:
                raise


def run_part(seconds: float, todo: list[list[str]], log: Path, mode: str = "w") -> tuple[str, float]:
    """Run the commands one after another into `log`. Returns: "ok", "failed" or "cut short", and the seconds it took."""
    start, verdict = time.monotonic(), "ok"
    with log.open(mode) as f:
        for command in todo:
            f.write(f"$ {' '.join(command)}\n")
            f.flush()
            left = seconds - (time.monotonic() - start)
            if left <= 0:
                return "cut short", time.monotonic() - start
            try:
                proc = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
            except OSError as e:
                f.write(f"{e}\n")
                verdict = "failed"
                continue
            try:
                verdict = "failed" if wait(proc, left, log.parent) else verdict
            except subprocess.TimeoutExpired:
                os.killpg(proc.pid, signal.SIGKILL)
                proc.wait()
                verdict = "cut short"
    pack(log.parent)
    return verdict, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--part", choices=list(commands()), help="run one part alone")
    args = parser.parse_args()
    import torch
    if not torch.cuda.is_available():
        print("gpu-report: needs a CUDA device and a CUDA build of torch, found none; on a CPU use `make test` and `make bench`",
              file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(MEASURED, ignore_errors=True)
    report = args.out / "report.md"
    lines = [f"# GPU report: {torch.cuda.get_device_name()}, torch {torch.__version__}", "", "| part | result | seconds |", "|---|---|---|"]
    failed = False
    for name, (seconds, todo) in commands().items():
        if args.part in (None, name):
            log = args.out / f"{name}.log"
            verdict, took = run_part(seconds, todo, log)
            if verdict != "ok" and name in AFTERWARDS and MEASURED.exists():
                took += run_part(AFTERWARDS[name][0], [AFTERWARDS[name][1]], log, "a")[1]
            failed |= verdict != "ok"
            lines.append(f"| {name} | {verdict} | {took:.0f} |")
            report.write_text("\n".join(lines) + "\n")                # after each part: a run cut short leaves this
            print(f"gpu-report: {name}: {verdict} in {took:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
