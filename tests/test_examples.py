"""Every script of examples/ runs, and says that its model equals the one it was made from."""
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_example(path):
    if path.stem != "plain_torch":
        pytest.importorskip("transformers")
    if path.stem == "trainer":
        pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=240, cwd=path.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\nequal within" in done.stdout and "step 4  loss" in done.stdout


def test_trainer_says_what_is_missing():
    hide = "import runpy, sys; sys.modules['accelerate'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide, str(FOLDER / "trainer.py")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stderr.startswith("examples/trainer.py needs transformers and accelerate"), done.stderr[-3000:]
