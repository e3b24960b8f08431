"""Ranks as processes: how they start, and that none is left however they end."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interlace.models.config import Config, to_dict

HERE = Path(__file__).parent
CODE = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
from interlace.launch import launch
status = launch(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
assert "torch" not in sys.modules or sys.argv[1] == "1", "the parent must not import torch"
sys.exit(status)
"""


def start(nproc, target, env=None, **kwargs):
    unset = ("OMP_NUM_THREADS", "TORCH_DISTRIBUTED_DEBUG")            # conftest.py's: a user has neither
    env = {**{k: v for k, v in os.environ.items() if k not in unset}, **(env or {})}
    command = [sys.executable, "-c", CODE, str(HERE), str(nproc), f"launch_targets:{target}", json.dumps(kwargs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finish(proc, timeout=300):
    out, err = proc.communicate(timeout=timeout)
    return proc.returncode, out, err


def gone(pid):
    """The process has ended (a zombie that nobody reaps yet counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def pids(folder, world, timeout=300):
    """Wait until all ranks have met."""
    end = time.monotonic() + timeout
    while len(found := list(Path(folder).glob("*.pid"))) < world:
        assert time.monotonic() < end, "ranks did not start"
        time.sleep(0.02)
    return [int(p.read_text()) for p in found]


def check_gone(found, within=10.0):
    end = time.monotonic() + within
    while not all(gone(p) for p in found):
        assert time.monotonic() < end, "a rank is left"
        time.sleep(0.02)


def test_two_ranks(tmp_path):
    proc = start(2, "fine", folder=str(tmp_path), config=to_dict(Config()))
    status, out, err = finish(proc)
    assert (status, out, err) == (0, "hello from 0\n", "")            # only rank 0 speaks
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == f"2 {threads} {proc.pid}"


def test_one_rank_runs_in_the_same_process(tmp_path):
    status, out, _ = finish(start(1, "fine", env={"OMP_NUM_THREADS": "3"}, folder=str(tmp_path)))
    assert status == 0 and out == "hello from 0\n"
    assert (tmp_path / "0.txt").read_text() == f"1 3 {os.getpid()}"


@pytest.mark.slow
def test_threads_the_user_set_stay(tmp_path):
    assert finish(start(2, "fine", env={"OMP_NUM_THREADS": "3"}, folder=str(tmp_path)))[0] == 0
    assert (tmp_path / "1.txt").read_text().split()[1] == "3"


def test_a_command_that_says_no(tmp_path):
    assert finish(start(2, "answers_no", folder=str(tmp_path))) == (1, "the answer is no\n", "")


@pytest.mark.parametrize("how, rank, status, message", [
    ("user", 1, 2, "interlace: model.x must be 1, got 2; set it to 1\n"),
    ("run", 0, 1, "interlace: step 7: loss must be finite, got nan\n")])
def test_a_message_is_shown_once_without_traceback(tmp_path, how, rank, status, message):
    assert finish(start(2, "fails", folder=str(tmp_path), how=how, rank=rank)) == (status, "", message)


def test_the_same_mistake_on_every_rank_is_shown_once(tmp_path):
    assert finish(start(2, "all_fail", folder=str(tmp_path))) == (2, "", "interlace: the same mistake on every rank\n")


def test_a_raising_rank_shows_the_cause_and_not_its_wake(tmp_path):
    status, _, err = finish(start(2, "fails", folder=str(tmp_path), how="crash", rank=1))
    assert status == 1 and err.startswith("interlace: rank 1 (pid ") and "ZeroDivisionError: the cause" in err
    assert err.count("Traceback") == 1 and "all_reduce" not in err, err
    check_gone(pids(tmp_path, 2))


@pytest.mark.parametrize("how, wanted", [
    ("SIGKILL", "was killed by SIGKILL; the other ranks were stopped. Possible causes: out of memory"),
    pytest.param("SIGSEGV", "was killed by SIGSEGV; the other ranks were stopped. It crashed in native code",
                 marks=pytest.mark.slow)])
def test_a_killed_rank_ends_all(tmp_path, how, wanted):
    proc = start(3, "fails", folder=str(tmp_path), how=how, rank=1)
    found = pids(tmp_path, 3)
    begin = time.monotonic()
    status, _, err = finish(proc)
    assert status == 1 and wanted in err and err.startswith("interlace: rank 1 (pid ") and "Traceback" not in err, err
    assert time.monotonic() - begin < 10
    check_gone(found, 0)


def test_a_rank_that_exits_without_a_word_passes_its_status_on(tmp_path):
    status, _, err = finish(start(2, "fails", folder=str(tmp_path), how="exit", rank=1))
    assert status == 7 and "exited with status 7 and gave no reason" in err and "last words" in err


def test_a_stubborn_rank_is_killed(tmp_path):
    proc = start(2, "waits", folder=str(tmp_path), stubborn=True)
    found = pids(tmp_path, 2)
    os.kill(found[0], signal.SIGKILL)
    status, _, err = finish(proc)
    assert status == 1 and "was killed by SIGKILL" in err
    check_gone(found, 0)


@pytest.mark.parametrize("number, status", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_interrupted(tmp_path, number, status):
    proc = start(2, "waits", folder=str(tmp_path))
    found = pids(tmp_path, 2)
    for pid in [*found, proc.pid] if number == signal.SIGINT else [proc.pid]:     # a terminal sends Ctrl-C to all
        os.kill(pid, number)
    assert finish(proc) == (status, "", "interlace: interrupted; run the same command again\n")
    check_gone(found, 0)


def test_no_rank_outlives_a_killed_parent(tmp_path):
    proc = start(2, "waits", env={"TMPDIR": str(tmp_path)}, folder=str(tmp_path), stubborn=True)
    found = pids(tmp_path, 2)
    proc.kill()
    check_gone(found, 5)
    proc.communicate()


def test_nothing_is_left_in_the_temporary_folder(tmp_path):
    (tmp_path / "tmp").mkdir()
    finish(start(2, "fails", env={"TMPDIR": str(tmp_path / "tmp")}, folder=str(tmp_path), how="SIGKILL", rank=0))
    assert not list((tmp_path / "tmp").glob("interlace-*"))


def test_under_torchrun_no_process_is_made(tmp_path):
    code = CODE.replace('assert "torch"', 'assert True or "torch"')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               sys.executable, "-c", code, str(HERE), "2", "launch_targets:fine", json.dumps({"folder": str(tmp_path)})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{r}.txt").read_text().split()[0] for r in range(2)] == ["2", "2"]
    env = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}
    status, _, err = finish(start(2, "fine", env=env, folder=str(tmp_path)))
    assert status == 1 and "--nproc must be torchrun's 4 ranks, got 2; leave it out" in err
