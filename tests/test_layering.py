"""Who may import whom (DESIGN, section 1), read from the sources at every nesting level."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gmoe

ROOT = Path(__file__).parent.parent
GRAPH = (
    "gmoe.conv",
    "gmoe.convert_gnn",
    "gmoe.hetero",
    "gmoe.inference",
    "gmoe.loader",
    "gmoe.models",
    "gmoe.sampler",
)
"""The parts of gmoe that may import torch_geometric."""

PYG = {"torch_geometric", "tqdm"}
"""What they may import beside torch: torch_geometric, and its own dependency for progress bars."""

GRAPH_NAMES = {
    "FilterConv",
    "GNNMoE",
    "HeteroGNNMoE",
    "HeteroMoEConv",
    "MLPConv",
    "MoEConv",
    "NeighborSampler",
    "RelationalConv",
    "neighbor_loader",
}
"""What of the public names comes from them."""

SOURCES = sorted(path for folder in ("gmoe", "vision", "experiments") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """All that a module imports, as dotted names; ``from a import b`` gives ``a.b``."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gmoe":
            yield f"gmoe.{node.attr}"  # import gmoe; gmoe.GNNMoE


def inside(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_graph(name: str) -> bool:
    return inside(name, *GRAPH) or name in {f"gmoe.{public}" for public in GRAPH_NAMES}


def upward(module: str, name: str) -> bool:
    """Whether ``module`` may not import ``name``."""
    top = name.split(".")[0]
    if module == "gmoe":
        return top != "gmoe"  # re-exports only
    if inside(module, "gmoe"):
        legal = {"torch", "gmoe", *sys.stdlib_module_names} | (PYG if inside(module, *GRAPH) else set())
        legal |= {"torchmetrics"} if module == "gmoe.stats" else set()
        return top not in legal or name == "gmoe" or (is_graph(name) and not inside(module, *GRAPH))
    if inside(module, "vision"):
        return top in ("torch_geometric", "experiments", "tests", "ogb") or is_graph(name)
    return top == "tests"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_upward_import(path: Path) -> None:
    module = module_of(path)
    found = {name for name in imports(path.read_text(), module, path.name == "__init__.py") if upward(module, name)}
    assert not found, f"{module} may not import {sorted(found)}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_one_file_is_one_thing(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("gmoe.moe", "import torch_geometric", True),
        ("gmoe.moe", "def f():\n    if True:\n        from torch_geometric.nn import GCNConv", True),
        ("gmoe.routing.pools", "from ..conv import MoEConv", True),
        ("gmoe.routing.pools", "from ..dispatch import dispatch", False),
        ("gmoe.convert", "from gmoe import models", True),
        ("gmoe.convert", "import gmoe", True),
        ("gmoe.convert", "import numpy", True),
        ("gmoe.convert", "import importlib\nimportlib.import_module('torch_geometric')", True),
        ("gmoe.convert", "from collections import abc\nimport torch.utils.checkpoint", False),
        ("gmoe.conv.experts", "from torch_geometric.nn import GCNConv\nfrom gmoe.experts import LinearExperts", False),
        ("gmoe.models", "from gmoe.conv import MoEConv", False),
        ("gmoe.models", "import experiments.train", True),
        ("gmoe", "import torch", True),
        ("vision.vit", "from torchvision.models import VisionTransformer\nfrom gmoe import MoE, ExpertChoice", False),
        ("vision.vit", "from gmoe import GNNMoE", True),
        ("vision.vit", "import gmoe\ngmoe.MoEConv", True),
        ("vision.vit", "from torch_geometric.data import Data", True),
        ("vision.vit", "from experiments import train", True),
        ("experiments.train", "import torch_geometric, vision, gmoe", False),
    ],
)
def test_the_rule_itself(module: str, source: str, bad: bool) -> None:
    assert any(upward(module, name) for name in imports(source, module)) == bad


def test_public_surface_is_a_sorted_and_complete_list_of_names() -> None:
    """gmoe/__init__.py holds re-exports, ``__version__`` and ``__all__``, and nothing else."""
    body = ast.parse((ROOT / "gmoe" / "__init__.py").read_text()).body
    docstring, *statements = body
    assert isinstance(docstring, ast.Expr)
    exported: list[str] = []
    assigned: list[str] = []
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            assert all(alias.asname is None and alias.name != "*" for alias in statement.names)
            exported += [alias.name for alias in statement.names]
        else:
            assert isinstance(statement, ast.Assign)
            assigned += [target.id for target in statement.targets if isinstance(target, ast.Name)]
    assert assigned == ["__version__", "__all__"]

    def order(name: str) -> tuple[int, str]:  # constants, classes, the rest: as ruff's RUF022 sorts
        return (0 if name.isupper() else 1 if name[0].isupper() else 2), name

    assert gmoe.__all__ == sorted(gmoe.__all__, key=order)
    assert sorted(gmoe.__all__) == sorted([*exported, "__version__"])
    assert all(hasattr(gmoe, name) for name in gmoe.__all__)
    assert all(getattr(gmoe, name).__doc__ for name in gmoe.__all__ if name != "ROUTERS")


def test_every_module_says_what_it_is() -> None:
    bare = [module_of(path) for path in SOURCES if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert bare == []


def test_library_is_typed_and_tests_are_no_package() -> None:
    assert (ROOT / "gmoe" / "py.typed").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
