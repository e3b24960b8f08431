"""One rank: join the group, call the command, write down why it failed. launch.py starts it; here torch comes in."""
from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from .parallel.errors import RunError, UserError, missing_package


def call(target: str, kwargs: dict[str, Any]) -> int:
    """The exit status of function "module:name", in this process. "config" arrives as a dict, is given as a Config."""
    warnings.formatwarning = _one_line
    from .kernels.dispatch import tune_malloc
    from .models.config import from_dict
    tune_malloc()
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    if "config" in kwargs:
        kwargs = {**kwargs, "config": from_dict(kwargs["config"])}
    return int(function(**kwargs) or 0)


def _one_line(message: Any, *where: Any, __usual: Any = warnings.formatwarning, **more: Any) -> str:
    """Our own warnings are messages to the user, without the line of code that Python adds."""
    return f"{message}\n" if str(message).startswith("interlace:") else __usual(message, *where, **more)


def main(job: dict[str, Any]) -> None:
    """The life of a child of launch.py. Never returns."""
    _die_with(job["parent"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)                      # Ctrl-C is the parent's to handle
    sys.argv[:] = job["argv"]                                         # provenance names the user's command
    try:
        status = _join_and_call(job["target"], job["kwargs"], local_ranks=job["world"], rank=job["rank"],
                                world_size=job["world"], init_method=f"file://{job['store']}")
        if status:
            _report(job, status, "status", "")
        sys.stdout.flush()
        sys.exit(status)
    except (UserError, RunError) as e:
        status = 2 if isinstance(e, UserError) else 1
        _report(job, status, "message", str(e))
    except Exception as e:
        status, text = 1, missing_package(e)
        _report(job, status, "message" if text else "crash", text or traceback.format_exc().rstrip())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)                                                  # at once: a tidy end may wait for lost peers


def under_torchrun(target: str, kwargs: dict[str, Any], local_ranks: int) -> int:
    """The exit status of this rank of torchrun's world. Its own errors are told by every rank that has them."""
    return _join_and_call(target, kwargs, local_ranks=local_ranks, init_method="env://")


def _join_and_call(target: str, kwargs: dict[str, Any], local_ranks: int, **group: Any) -> int:
    import torch
    import torch.distributed as dist
    accelerator = kwargs.get("device") or kwargs.get("config", {}).get("trainer", {}).get("accelerator", "cpu")
    cuda = accelerator != "cpu" and torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks
    if cuda:
        torch.cuda.set_device(dist.get_node_local_rank(fallback_rank=0))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **group)
    status = call(target, kwargs)
    dist.destroy_process_group()
    return status


def _report(job: dict[str, Any], status: int, kind: str, text: str) -> None:
    """Tell the parent, in one atomic step, why this rank ends. time: one clock for all processes of a host."""
    temporary = Path(job["report"]).with_suffix(".tmp")
    temporary.write_text(json.dumps({"status": status, "kind": kind, "text": text, "time": time.monotonic()}))
    temporary.replace(job["report"])


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent is gone; where it cannot (macOS), look every second."""
    PR_SET_PDEATHSIG = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except AttributeError:
        def look() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=look, daemon=True).start()
    if os.getppid() != parent:                                        # it died before the kernel was asked
        os._exit(1)
