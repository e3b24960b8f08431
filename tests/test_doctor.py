import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from interlace import cli, doctor
from interlace.launch import bounded, environment

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quick(monkeypatch):
    """The doctor without the two ranks."""
    monkeypatch.setattr(doctor, "bounded", lambda *_: (0, "through shared memory"))


def said(report, kind="notes"):
    return "\n".join(f"{f['what']}\n    {f['cure']}" for f in report[kind])


# ---- the whole ------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_two_ranks_sum():
    done = subprocess.run([sys.executable, "-m", "interlace", "doctor", "--json"], capture_output=True, text=True, timeout=600)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["ok"] and not report["problems"], said(report, "problems")
    assert {"versions", "tiers", "ops", "triton_mode", "gpu", "shm", "limits", "cores", "environment", "selftest"} <= report.keys()
    assert report["selftest"]["ok"] and "through" in report["selftest"]["said"]
    assert report["versions"]["torch"] and report["ops"]["rms_norm_fwd"]["cuda"] == "triton"
    assert report["ops"]["multicast_ar"]["cpu"] == "none", "declared before the table is made"
    said_of_comm = {op: (at["cpu"], at["cuda"]) for op, at in report["ops"].items() if op in ("gemm_ar", "rs_residual_norm", "all_reduce")}
    assert len(said_of_comm) == 3 and set(said_of_comm.values()) == {("shared memory", "triton or torch.distributed")}


def test_text(quick, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "fine"
    for word in ("versions", "tier        cpu", "op          rms_norm_fwd", "op          all_reduce", "shm", "nofile", "cores",
                 "2 ranks     ok"):
        assert word in out, word


def test_a_failing_selftest_makes_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "bounded", lambda *_: (1, "interlace: rank 1 failed"))
    assert cli.main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and not report["selftest"]["ok"]
    assert "two ranks must sum a tensor, got status 1: interlace: rank 1 failed" in said(report, "problems")
    monkeypatch.setattr(doctor, "bounded", lambda *_: (None, ""))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM: two ranks must sum a tensor, within 60 s" in out and out.endswith("1 broken requirements\n")


def test_bounded_ends_what_hangs_and_keeps_what_it_said():
    status, text = bounded(1, "no.such.module:function", {}, 60)
    assert status == 1 and "ModuleNotFoundError" in text
    assert bounded(1, "time:sleep", {"config": {}}, 0.2) == (None, "")


def test_bounded_is_no_rank_of_a_world_around_it(monkeypatch):
    for name, value in {"WORLD_SIZE": "7", "RANK": "6", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert bounded(1, "builtins:len", {"obj": []}, 60)[0] != 2, "launch would refuse: torchrun has 7 ranks"


# ---- a machine that lacks things ------------------------------------------------------------------------------


def test_nothing_but_python(tmp_path):
    """-S: no site-packages, so no torch, numpy, Triton, rich. No compiler is asked for either."""
    (tmp_path / "interlace").mkdir()
    for path in (ROOT / "interlace").glob("*.py"):
        (tmp_path / "interlace" / path.name).symlink_to(path)
    for folder in ("kernels", "parallel", "models", "dropin", "bench"):
        (tmp_path / "interlace" / folder).symlink_to(ROOT / folder)
    code = "import sys; from interlace.cli import main; sys.exit(main(sys.argv[1:]))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PATH": "/nonexistent"}
    for words in (["doctor", "--json"], ["doctor"]):
        done = subprocess.run([sys.executable, "-S", "-c", code, *words], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
        assert "interlace needs torch >= 2.10, found none" in done.stdout and "pip install torch" in done.stdout
    done = subprocess.run([sys.executable, "-S", "-c", code, "doctor", "--json"], capture_output=True, text=True, env=env, cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] is None and report["selftest"]["ok"] is None and report["ops"] == {}
    assert "interlace needs numpy, found none" in said(report, "problems")


def test_old_versions(quick, monkeypatch):
    import torch
    import triton
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu128")
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    report = doctor.examine()
    assert "interlace needs torch >= 2.10, found 2.8.0+cu128\n    pip install -U torch" in said(report, "problems")
    assert "interlace needs triton >= 3.6, found 3.4.0\n    pip install -U triton" in said(report, "problems")


def tiers(folder, dispatch=None, heard=()):
    r = doctor._Report()
    doctor._tiers(r, folder, dispatch, list(heard))
    return r.found["tiers"], said({"notes": r.notes})


def test_tiers_that_were_not_built(tmp_path):
    (tmp_path / "_build.json").write_text(json.dumps({"cpu": {"built": False, "why": "no C++ compiler"}}))
    found, notes = tiers(tmp_path)
    assert found["cpu"] == {"built": False, "loads": False, "why": "no C++ compiler"} and found["runtime"]["why"] == "not built"
    assert "the C++ ops are not built: no C++ compiler\n    apt-get install -y g++" in notes


def test_tiers_that_are_broken(tmp_path):
    for tier in ("cpu", "runtime"):
        (tmp_path / f"_{tier}.so").write_text("not a library")
    found, notes = tiers(tmp_path, types.SimpleNamespace(CPP=False), ["interlace: C++ ops were built for a CPU with avx512f"])
    assert found["runtime"]["loads"] is False and "_runtime.so" in found["runtime"]["why"]
    assert "the C++ ops are built and not used: interlace: C++ ops were built for a CPU with avx512f" in notes and "pip install" in notes


def test_the_cuda_tier(tmp_path):
    """Where torch is a CPU build nobody is told to build it; where it loads, for which GPUs."""
    (tmp_path / "_build.json").write_text(json.dumps({"cuda": {"built": True, "why": "built", "arches": ["sm_80", "sm_90a"]}}))
    found, notes = tiers(tmp_path)
    assert not found["cuda"]["built"] and "CUDA" not in notes
    (tmp_path / "_cuda.so").touch()
    found, notes = tiers(tmp_path, types.SimpleNamespace(CPP=False, CUDA=True))
    assert found["cuda"] == {"built": True, "loads": True, "why": "loads, built for sm_80 sm_90a"} and "CUDA" not in notes
    found, notes = tiers(tmp_path, types.SimpleNamespace(CPP=False, CUDA=False))
    assert found["cuda"]["loads"] is None and found["cuda"]["why"] == "torch is a CPU build" and "CUDA" not in notes


def test_a_tier_that_is_switched_off(tmp_path, monkeypatch):
    (tmp_path / "_cpu.so").touch()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, notes = tiers(tmp_path, types.SimpleNamespace(CPP=False))
    assert found["cpu"] == {"built": True, "loads": None, "why": "switched off by TRITON_INTERPRET=1"} and "C++" not in notes


# ---- the machine ----------------------------------------------------------------------------------------------


def test_environment_that_harms(monkeypatch):
    for name, value in {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_LAUNCH_BLOCKING": "0", "NCCL_ALGO": "Ring", "NCCL_ODD": "x",
                        "INTERLACE_KERNELS": "reference"}.items():
        monkeypatch.setenv(name, value)
    r = doctor._Report()
    doctor._environment(r)
    notes = said({"notes": r.notes})
    assert "communication cannot overlap computation\n    unset CUDA_DEVICE_MAX_CONNECTIONS" in notes
    assert "unset NCCL_ALGO" in notes and "unset INTERLACE_KERNELS" in notes and "CUDA_LAUNCH_BLOCKING" not in notes
    assert r.found["environment"]["NCCL_ODD"] == "x" == environment(("NCCL_",))["NCCL_ODD"]


def test_stale_segments(tmp_path):
    old, new = tmp_path / "interlace-0ld", tmp_path / "interlace-new"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    r = doctor._Report()
    doctor._shm(r, tmp_path)
    assert r.found["shm"]["stale"] == [str(old)] and any(n["cure"] == f"rm {old}" for n in r.notes)
    doctor._shm(r, tmp_path / "absent")
    assert r.found["shm"] is None


def test_gpus_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda *_: "GPU 0: NVIDIA H200 (UUID: x)\n")
    cuda = types.SimpleNamespace(is_available=lambda: False)
    r = doctor._Report()
    doctor._gpus(r, types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(cuda=None), __version__="2.13.0+cpu"))
    assert said({"notes": r.notes}) == "there are 1 GPUs, and torch 2.13.0+cpu cannot use them\n    pip install torch"


def test_gpu_pairs_that_cannot_read_each_other(monkeypatch):
    monkeypatch.setattr(doctor, "_run", lambda *c: "Link 0: 26.562 GB/s\n" if "nvlink" in c else "GPU0 GPU1")
    properties = types.SimpleNamespace(name="H200", major=9, minor=0, total_memory=1 << 37, multi_processor_count=132)
    cuda = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda _: properties,
                                 can_device_access_peer=lambda i, j: False)
    r = doctor._Report()
    doctor._gpus(r, types.SimpleNamespace(cuda=cuda))
    assert r.found["gpu"]["p2p"] == [[True, False], [False, True]] and r.found["gpu"]["nvlink_links"] == 1
    assert "GPUs 1-0 cannot read each other's memory" in said({"notes": r.notes})


@pytest.mark.gpu
def test_on_a_gpu(quick):
    gpu = doctor.examine()["gpu"]
    assert gpu["devices"][0]["sms"] > 0 and gpu["p2p"][0][0]
