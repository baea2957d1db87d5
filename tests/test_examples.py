"""Every example runs with ``--fast``, and its install line brings what it imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gmoe

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
BROUGHT = {
    "torch": "gmoe",
    "torch_geometric": r"gmoe\[graph",
    "torchvision": r"gmoe\[vision",
    "torchmetrics": r"gmoe\[(graph|vision)",
    "ase": r" ase\b",
    "lightning": "lightning",
    "ogb": "ogb",
    "sklearn": "scikit-learn",
    "timm": "timm",
}
"""What an example may import beside the standard library and gmoe.

The values are the part of its install line that brings it.
"""


@pytest.mark.slow  # .ci/run runs them against the wheel
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(path), "--fast"]
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=here)
    assert done.returncode == 0, done.stderr
    assert re.search(r"test (accuracy|error of a force) +\d+\.\d", done.stdout), done.stdout
    assert not any(tmp_path.iterdir())  # it leaves nothing behind, and downloads nothing


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_imports_what_its_install_line_brings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    install = re.search(r"pip install .*", ast.get_docstring(tree) or "")
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"gmoe"}
    assert install
    assert not [name for name in tops if not re.search(BROUGHT[name], install[0])]


def definitions(path: Path) -> dict[str, Any]:
    """The imports, functions and classes of an example, which is not run."""
    tree = ast.parse(path.read_text())
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    names: dict[str, Any] = {}
    exec(compile(tree, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("k", [2, 3])
def test_the_example_of_a_router_computes_the_losses_of_shazeer(k: int) -> None:
    own = definitions(EXAMPLES[0].parent / "own_router.py")["NoisyTopK"]
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_experts": 5, "k": k}
    router = own(7, loss_coef=0.5, **options).double()
    other = gmoe.TokenChoice(
        7, balance="importance_load", balance_coef=0.5, weight="normalized", **options
    ).double()
    torch.nn.init.normal_(router.noise.weight)
    other.load_state_dict(router.state_dict())
    x = torch.randn(40, 7, dtype=torch.float64)
    gradients = []
    for one in (router, other):
        torch.manual_seed(1)
        routing = one(x)
        (routing.aux_loss + routing.to_dense().square().sum()).backward()
        gradients.append((routing.to_dense(), one.gate.weight.grad, one.noise.weight.grad))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
