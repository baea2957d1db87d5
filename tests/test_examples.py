"""Every example runs with ``--fast``, says what it needs and what it came to, and needs no clone; one as a notebook."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from sphinx_gallery.gen_gallery import DEFAULT_GALLERY_CONF
from sphinx_gallery.notebook import jupyter_notebook
from sphinx_gallery.py_source_parser import split_code_and_text_blocks

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
BROUGHT = {
    "torch": "gmoe",
    "torch_geometric": r"gmoe\[graph",
    "torchvision": r"gmoe\[vision",
    "torchmetrics": r"gmoe\[(graph|vision)",
    "lightning": "lightning",
    "ogb": "ogb",
    "sklearn": "scikit-learn",
    "timm": "timm",
}
"""What an example may import beside the standard library and gmoe, and the part of its install line that brings it."""


def environment() -> dict[str, str]:
    """One thread, and this checkout's gmoe, whatever is installed."""
    root = str(Path(__file__).parent.parent)
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow  # .ci/run runs them against the wheel
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(path), "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.search(r"test accuracy +\d+\.\d", done.stdout), done.stdout
    assert not any(tmp_path.iterdir())  # it leaves nothing behind, and downloads nothing


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_imports_what_its_install_line_brings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    install = re.search(r"pip install .*", ast.get_docstring(tree) or "")
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"gmoe"}
    assert install
    assert not [name for name in tops if not re.search(BROUGHT[name], install[0])]


def test_an_example_runs_as_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sphinx-gallery makes it for the site, whose first cell gives the arguments."""
    (path,) = [path for path in EXAMPLES if path.stem == "swap_pyg_conv"]
    config = DEFAULT_GALLERY_CONF | {"first_notebook_cell": "import sys\nsys.argv[1:] = ['--fast']"}
    blocks = split_code_and_text_blocks(str(path))[1]
    notebook = nbformat.reads(json.dumps(jupyter_notebook(blocks, config, str(path.parent))), as_version=4)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    done = client.execute()
    printed = "".join(out.get("text", "") for cell in done.cells for out in cell.get("outputs", []))
    assert re.search(r"test accuracy +\d+\.\d", printed), printed
