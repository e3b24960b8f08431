"""The laws of the house: imports one way, only relative ones inside, small files and functions, silence at import."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RANK = {"kernels": 0, "parallel": 1, "models": 2, "dropin": 2, "interlace": 3, "bench": 4}
FILES = [p.relative_to(ROOT) for f in RANK for p in sorted((ROOT / f).rglob("*.py"))]
ALL = [*FILES, pathlib.Path("setup.py"), *(p.relative_to(ROOT) for p in sorted((ROOT / "tests").glob("*.py")))]
READS_ENVIRONMENT = {"kernels/dispatch.py", "interlace/launch.py", "setup.py"}


def parsed(path):
    text = (ROOT / path).read_text()
    return text, ast.parse(text)


def imported_folders(path, tree):
    """The house folder of every relative import: `from .models.gpt` in interlace/x.py and `from ..models.gpt` in
    parallel/x.py both mean models. Imports under TYPE_CHECKING are for readers and do not run."""
    package = ("interlace", *path.parent.parts) if path.parts[0] != "interlace" else path.parent.parts
    unread = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and ast.unparse(i.test) == "TYPE_CHECKING"
              for n in ast.walk(i)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in unread:
            base = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [a.name for a in node.names]
            for name in names:
                parts = (*base, *name.split("."))
                assert parts[0] == "interlace" and len(parts) > 1, f"{path}:{node.lineno} leaves the package"
                yield parts[1] if parts[1] in RANK else "interlace"


def absolute_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def environment_reads(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (node.lineno for a in node.names if "env" in a.name)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path):
    _, tree = parsed(path)
    own = path.parts[0]
    for folder in imported_folders(path, tree):
        assert RANK[folder] < RANK[own] or folder == own, f"{path} must not import {folder}"
    inside = {*RANK, "tests"}.intersection(absolute_imports(tree))
    assert not inside, f"{path}: relative imports only inside the package, got {inside}"


@pytest.mark.parametrize("path", ALL, ids=str)
def test_sizes(path):
    text, tree = parsed(path)
    assert len(text.splitlines()) <= 500, f"{path} is over 500 lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, f"{path}:{node.lineno} {node.name} is over 80 lines"


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] != "bench"], ids=str)
def test_environment_is_read_in_two_places(path):
    if str(path) not in READS_ENVIRONMENT:
        lines = list(environment_reads(parsed(path)[1]))
        assert not lines, f"{path}:{lines} reads the environment: only {sorted(READS_ENVIRONMENT)} may"


def test_environment_reads_are_found():
    code = "import os\nfrom os import getenv\nos.environ['A']\nos.getenv('B')\n"
    assert sorted(environment_reads(ast.parse(code))) == [2, 3, 4]


def test_direction_is_found():
    code = ast.parse("from ..models import gpt\nfrom . import mesh\nfrom ..kernels.comm import all_reduce\n")
    assert list(imported_folders(pathlib.Path("parallel/x.py"), code)) == ["models", "parallel", "kernels"]
    code = ast.parse("from .models.gpt import GPT\nfrom .launch import launch\n")
    assert list(imported_folders(pathlib.Path("interlace/x.py"), code)) == ["models", "interlace"]
    code = ast.parse("from ..dispatch import fused\nfrom ...parallel.mesh import Axis\n")
    assert list(imported_folders(pathlib.Path("kernels/comm/x.py"), code)) == ["kernels", "parallel"]
    code = ast.parse("if TYPE_CHECKING:\n    from ..models.config import Config\n")
    assert list(imported_folders(pathlib.Path("parallel/x.py"), code)) == []


@pytest.mark.parametrize("folder", ["kernels", "parallel", "models", "dropin"])
def test_folders_refuse_their_bare_name(folder):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import interlace.{folder}, not {folder}" in done.stderr


def test_nothing_is_printed_at_import():
    modules = [".".join(("interlace", *p.with_suffix("").parts)).removesuffix(".__init__").replace(
               "interlace.interlace", "interlace") for p in FILES if p.parts[0] != "bench" and p.stem != "__main__"]
    code = f"import importlib\nfor m in {modules}: importlib.import_module(m)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
