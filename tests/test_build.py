"""setup.py: which tiers it builds, and what it says where it cannot. csrc/cuda itself: test_multicast_ar.py, make cuda-build-check."""
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def build():
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, {"INTERLACE_BUILD": "auto"}):
        return runpy.run_path(str(ROOT / "setup.py"))


def fake_torch(folder, cuda):
    (folder / "version.py").write_text(f"__version__ = '2.11.0'\ndebug = False\ncuda: Optional[str] = {cuda!r}\nhip = None\n")
    return folder


def fake_nvcc(folder, version="13.0", arches="compute_80 compute_90 compute_100"):
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\ncase $1 in --version) echo 'tools, release {version}, V{version}.88';; *) echo '{arches}';; esac\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc_must_be_of_torchs_cuda(build, tmp_path, monkeypatch):
    find = build["find_nvcc"]
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path))
    with pytest.raises(build["Missing"], match=r"need a CUDA build of torch, found a CPU build in"):
        find(fake_torch(tmp_path, None))
    with pytest.raises(build["Missing"], match=r"need nvcc of CUDA 12, torch's own, found CUDA 13.0 in .*: set NVCC or CUDA_HOME"):
        find(fake_torch(tmp_path, "12.8"))
    assert find(fake_torch(tmp_path, "13.2")) == (str(tmp_path / "nvcc"), ["80", "90a", "100a"])
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "12.4", "compute_80 compute_90"))
    assert find(fake_torch(tmp_path, "12.6"))[1] == ["80", "90a"], "what it does not know is left out"
    monkeypatch.setenv("NVCC", str(tmp_path / "nowhere"))
    with pytest.raises(build["Missing"], match=r"need nvcc of CUDA 12: .*nowhere is not there"):
        find(fake_torch(tmp_path, "12.6"))


def test_every_folder_is_an_extension(build):
    """Every folder of csrc is a tier, and every source in it is compiled."""
    assert {p.name for p in (ROOT / "csrc").iterdir()} == set(build["INSTEAD"])
    for tier in build["INSTEAD"]:
        ext, = build["extension"](f"interlace.kernels._{tier}", f"csrc/{tier}")
        assert {Path(s).name for s in ext.sources} == {p.name for p in (ROOT / "csrc" / tier).iterdir() if p.suffix in (".cpp", ".cu")}


def run(tmp_path, mode):
    """setup.py in a copy of the tree whose sources are empty: what is built does not matter here."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "interlace", "kernels", "parallel", "models", "dropin", "bench"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "kernels" else (tmp_path / name).mkdir()
    shutil.copy(ROOT / "kernels" / "__init__.py", tmp_path / "kernels")
    for tier, suffix in (("runtime", "cpp"), ("cpu", "cpp"), ("cuda", "cu")):
        (tmp_path / "csrc" / tier).mkdir(parents=True)
        (tmp_path / "csrc" / tier / f"empty.{suffix}").touch()
    (tmp_path / "setup.py").unlink()
    shutil.copy(ROOT / "setup.py", tmp_path)
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "INTERLACE_BUILD": mode})
    book = tmp_path / "kernels" / "_build.json"
    return done, json.loads(book.read_text()) if book.exists() else {}


def test_auto_degrades_and_says_so(tmp_path):
    import torch
    if torch.version.cuda or not shutil.which("c++"):
        pytest.skip("needs a CPU build of torch, and a C++ compiler")
    done, book = run(tmp_path, "auto")
    assert not done.returncode and book["runtime"]["built"] and book["cpu"]["built"] and not book["cuda"]["built"], done.stderr
    assert "interlace build: cuda: not built, Triton takes its place: the CUDA ops need a CUDA build of torch" in done.stderr


def test_an_explicit_word_raises(tmp_path):
    import torch
    if torch.version.cuda or not shutil.which("c++"):
        pytest.skip("needs a CPU build of torch, and a C++ compiler")
    done, _ = run(tmp_path, "cuda")
    assert done.returncode and "INTERLACE_BUILD=cuda must build all three libraries, got: cuda: the CUDA ops need a" in done.stderr
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "INTERLACE_BUILD": "gpu"})
    assert done.returncode and "INTERLACE_BUILD must be auto, python, cpu or cuda, got 'gpu'" in done.stderr
