"""Local ranks: start them, watch them, end them together. No torch here: a rank imports it, the parent never does.

    launch(2, "interlace.models.train:train", {"config": to_dict(config), "out": "runs/a"})  ->  exit status

A rank dies with its parent, whatever kills that (PR_SET_PDEATHSIG). When one rank fails the others are stopped within
seconds and its error is shown once: ranks write why they failed to a file and stay silent, the parent prints the first.
This file and kernels/dispatch.py are the only ones that read the environment.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .parallel.errors import RunError, UserError

__all__ = ["bounded", "default_nproc", "environment", "launch", "launched_by_torchrun", "speaks"]

GRACE = 5.0                                                           # seconds from SIGTERM to SIGKILL
SETTLE = 0.5                                                          # seconds in which a cause and its effects arrive
# The job comes through stdin: nothing on disk, nothing in `ps`. sys.path as the parent has it: `-m` would put the
# current folder first, where a folder such as kernels/ could stand in the way.
BOOT = ("import json, sys; job = json.load(sys.stdin); sys.path[:] = job['path']; "
        "from interlace.rank import main; main(job)")
CAUSES = {
    "SIGKILL": "Possible causes: out of memory (see `dmesg`; a smaller model.micro_batch_size or "
               "model.recompute_granularity=full needs less), or somebody killed it",
    "SIGTERM": "Somebody, or the machine's scheduler, stopped it",
    "SIGBUS": "Possible causes: /dev/shm or a disk is full (see `df -h`)",
}


def launched_by_torchrun() -> bool:
    """True in a process that is one rank of a world somebody else started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))


def default_nproc(ranks: int) -> int:
    """The world of this process: torchrun's, else as many local ranks as the layout needs at least."""
    return int(os.environ["WORLD_SIZE"]) if launched_by_torchrun() else ranks


def speaks() -> bool:
    """Of the processes that find the same mistake before the ranks meet, only one says so."""
    return not launched_by_torchrun() or os.environ["RANK"] == "0"


def environment(names: tuple[str, ...]) -> dict[str, str]:
    """The variables that are set, of `names`; a name that ends in _ stands for all that begin so."""
    return {k: v for k, v in sorted(os.environ.items()) if k in names or any(n.endswith("_") and k.startswith(n) for n in names)}


def bounded(nproc: int, target: str, kwargs: dict[str, Any], seconds: float) -> tuple[int | None, str]:
    """`launch` in a process of its own, with a time limit: (exit status, None past the limit; what it printed)."""
    boot = ("import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job.pop('path'); "
            "from interlace.launch import launch; sys.exit(launch(**job))")
    job = json.dumps({"path": sys.path, "nproc": nproc, "target": target, "kwargs": kwargs})
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    try:
        done = subprocess.run([sys.executable, "-c", boot, job], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as e:                            # it was killed, and its ranks die with it
        return None, e.output.decode(errors="replace") if isinstance(e.output, bytes) else e.output or ""
    return done.returncode, done.stdout


def launch(nproc: int, target: str, kwargs: dict[str, Any], *, again: str = "run the same command again",
           grace: float = GRACE) -> int:
    """Call `target` ("module:function") with `kwargs` on `nproc` ranks; returns the exit status.

    Args: kwargs: what JSON can hold; "config" as `to_dict` gives it. again: what to do after an interruption.
    grace: seconds ranks have to end after Ctrl-C or another's failure; a second Ctrl-C gives none.
    One rank, or a process that torchrun started, runs here: no process is made.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")                    # torch's profiler prints two lines at every start (2.13)
    if launched_by_torchrun():
        if nproc != int(os.environ["WORLD_SIZE"]):
            raise UserError(f"--nproc must be torchrun's {os.environ['WORLD_SIZE']} ranks, got {nproc}; leave it out")
        from .rank import under_torchrun
        return under_torchrun(target, kwargs, local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", nproc)))
    if nproc == 1:
        from .rank import call
        return call(target, kwargs)
    folder = Path(tempfile.mkdtemp(prefix="interlace-"))              # mode 0700
    try:
        return _Ranks(nproc, target, kwargs, folder, grace).watch(again)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Ranks:
    """The child processes of one launch."""

    def __init__(self, nproc: int, target: str, kwargs: dict[str, Any], folder: Path, grace: float):
        self.folder, self.grace = folder, grace
        self.procs: list[subprocess.Popen] = []
        self.signals: list[int] = []                                  # that came to the parent
        self.noticed = 0.0                                            # when the first failure was seen
        self.handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, signal.SIG_IGN)                  # ranks inherit that it is ignored
        try:
            for rank in range(nproc):
                self.procs.append(self._start(rank, nproc, target, kwargs))
        except OSError as e:
            self.stop()
            raise RunError(f"rank {len(self.procs)} of {nproc} must start, got {e}; use a smaller --nproc") from None
        for s in self.handlers:
            signal.signal(s, lambda number, _: self.signals.append(number))

    def _start(self, rank: int, nproc: int, target: str, kwargs: dict[str, Any]) -> subprocess.Popen:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        defaults = {"OMP_NUM_THREADS": str(max(1, cores // nproc)),
                    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}    # not where hostname leads
        env = {**defaults, **os.environ, "PYTHONUNBUFFERED": "1", "LOCAL_RANK": str(rank)}
        job = {"path": sys.path, "rank": rank, "world": nproc, "parent": os.getpid(), "target": target,
               "kwargs": kwargs, "argv": sys.argv, "store": str(self.folder / "store"), "report": str(self.folder / f"{rank}.json")}
        with open(self.folder / f"{rank}.log", "wb") as log:          # rank 0 speaks to the terminal
            output = None if rank == 0 else log
            proc = subprocess.Popen([sys.executable, "-c", BOOT, f"interlace-rank-{rank}-of-{nproc}"], env=env,
                                    stdin=subprocess.PIPE, stdout=output, stderr=output)
        try:
            assert proc.stdin is not None
            proc.stdin.write(json.dumps(job).encode())
            proc.stdin.close()
        except BrokenPipeError:                                       # dead already: watch() says why
            pass
        return proc

    def watch(self, again: str) -> int:
        """Wait for the end. Returns 0, or the status of the rank that failed first."""
        try:
            while not self.signals:
                codes = [p.poll() for p in self.procs]
                if any(codes):
                    self.noticed = time.monotonic()
                    return self._fail(again)
                if None not in codes:
                    return 0
                time.sleep(0.02)
            self.stop()
            _say(f"interrupted; {again}")
            return 128 + self.signals[0]
        finally:
            self.stop()
            for s, handler in self.handlers.items():
                signal.signal(s, handler)

    def _fail(self, again: str) -> int:
        """One rank failed: find which was first, stop the others, show its error."""
        self._wait(SETTLE)
        rank, report = self._first()
        if report.get("kind") == "status":                            # no error: a command that says no on every rank
            self._wait(self.grace)
        self.stop()
        proc = self.procs[rank]
        code: int = report.get("status") or proc.wait()
        who, log = f"rank {rank} (pid {proc.pid})", self._log(rank)
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            cause = CAUSES.get(name, "It crashed in native code")
            _say(f"{who} was killed by {name}; the other ranks were stopped. {cause}. Then {again}{log}")
            return 1
        if report.get("kind") == "crash":
            _say(f"{who} failed; the other ranks were stopped\n{report['text']}")
        elif report.get("kind") == "message":
            _say(report["text"])
        elif not report:
            _say(f"{who} exited with status {code} and gave no reason; the other ranks were stopped{log}")
        return code

    def _first(self) -> tuple[int, dict[str, Any]]:
        """(rank, its report) of the one that failed first. The others fail in its wake: with a later report, or
        by SIGABRT, when a communication thread finds its peer gone. So any other end without a report is the cause."""
        reports = {int(p.stem): json.loads(p.read_text()) for p in self.folder.glob("*.json")}
        silent = [r for r, p in enumerate(self.procs) if p.poll() and r not in reports]
        silent.sort(key=lambda r: self.procs[r].returncode == -signal.SIGABRT)
        earliest = min(reports, key=lambda r: reports[r]["time"], default=None)
        if silent and (self.procs[silent[0]].returncode != -signal.SIGABRT or earliest is None
                       or reports[earliest]["time"] > self.noticed - 0.1):
            return silent[0], {}
        assert earliest is not None, "a rank failed, so it is silent or has a report"
        return earliest, reports[earliest]

    def _log(self, rank: int) -> str:
        """The last words of a rank whose output went to a file."""
        lines = (self.folder / f"{rank}.log").read_text(errors="replace").splitlines()[-20:]
        return "\n".join([". Its last words:", *lines]) if lines else ""

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while any(p.poll() is None for p in self.procs) and time.monotonic() < end:
            time.sleep(0.02)

    def stop(self) -> None:
        """End every rank: SIGTERM, `grace` seconds (none after a second Ctrl-C), SIGKILL."""
        alive = [p for p in self.procs if p.poll() is None]
        if not alive:
            return
        for p in alive:
            p.terminate()
        end, before = time.monotonic() + self.grace, len(self.signals)
        while any(p.poll() is None for p in alive) and time.monotonic() < end and len(self.signals) == before:
            time.sleep(0.02)
        for p in alive:
            p.kill()
            p.wait()


def _say(message: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")                               # a progress bar that died hid the cursor
    print(f"interlace: {message}", file=sys.stderr, flush=True)
