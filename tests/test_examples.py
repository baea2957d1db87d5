"""Every example runs with ``--fast``, and its install line brings what it imports."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
BROUGHT = {
    "torch": "gmoe",
    "torch_geometric": r"gmoe\[graph",
    "matplotlib": r"gmoe\[.*plot",
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


def cv_squared(values: list[Tensor]) -> Tensor:
    mean = sum(values[1:], values[0]) / len(values)
    squares = [(value - mean) ** 2 for value in values]
    return sum(squares[1:], squares[0]) / len(values) / mean**2


@pytest.mark.parametrize("k", [2, 3])
def test_the_example_of_a_router_has_the_losses_of_shazeer(k: int) -> None:
    """A token and an expert at a time: CV^2 of sum_t p_te, and of the chance to be chosen.

    That is Phi((clean - the K-th best noisy logit of the others) / std).
    """
    torch.manual_seed(0)
    own = definitions(EXAMPLES[0].parent / "own_router.py")["NoisyTopK"]
    router = own(7, num_experts=5, k=k, loss_coef=0.5).double()
    torch.nn.init.normal_(router.noise.weight)
    x = torch.randn(40, 7, dtype=torch.float64)
    torch.manual_seed(1)
    routing = router(x)

    torch.manual_seed(1)
    clean = x @ router.gate.weight.T
    std = torch.nn.functional.softplus(x @ router.noise.weight.T) + 0.01
    noisy = clean + std * torch.randn(40, 5, dtype=torch.float64)
    probs = noisy.softmax(dim=1)
    load = []
    for expert in range(5):
        chance = torch.zeros((), dtype=torch.float64)
        for token in range(40):
            others = sorted((noisy[token, e] for e in range(5) if e != expert), reverse=True)
            margin = (clean[token, expert] - others[k - 1]) / std[token, expert]
            chance = chance + 0.5 * (1 + torch.erf(margin / math.sqrt(2)))
        load.append(chance)
    importance = [probs[:, expert].sum() for expert in range(5)]
    expected = 0.5 * (cv_squared(importance) + cv_squared(load))

    torch.testing.assert_close(routing.aux_loss, expected)
    weights = [router.gate.weight, router.noise.weight]
    found = torch.autograd.grad(routing.aux_loss, weights)
    torch.testing.assert_close(found, torch.autograd.grad(expected, weights))
