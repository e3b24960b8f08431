"""Every script of examples/ runs, and says that its model equals the one it was made from."""
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.stem)
def test_example(path):
    if "llama" in path.stem:
        pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600, cwd=path.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\nequal within" in done.stdout and "step 4  loss" in done.stdout
