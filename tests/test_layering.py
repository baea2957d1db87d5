"""The imports that each part may have, read from the sources; and what an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import gmoe

ROOT = Path(__file__).parent.parent
PYG = frozenset({"torch_geometric", "numpy"})
"""torch_geometric, and its own dependency for arrays."""

ROOMS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("gmoe.conv", "gmoe.data"), PYG),
    **dict.fromkeys(
        (
            "gmoe.models.blocks",
            "gmoe.models.gnn",
            "gmoe.models.inference",
            "gmoe.models.layered",
            "gmoe.models.layers",
            "gmoe.models.parts",
        ),
        PYG,
    ),
    "gmoe.metrics": frozenset({"torchmetrics"}),
    "gmoe.callbacks.lightning": frozenset({"lightning", "torchmetrics"}),
    "gmoe.callbacks.trainer": frozenset({"transformers", "torchmetrics"}),
    "gmoe.models.vit": frozenset({"torchvision"}),
    "gmoe.plot": frozenset({"matplotlib"}),
}
"""What the parts of gmoe may import beside torch. All others, the core, import torch alone."""

LAZY = {
    "gmoe": tuple(ROOMS),
    "gmoe.convert": ("gmoe.conv", "gmoe.models.gnn"),
    "gmoe.edges": ("numpy",),
    "gmoe.saved": ("huggingface_hub", "safetensors", "transformers"),
}
"""Who may import what of it inside of functions, or for the type checker."""

EXPERIMENTS = ("train", "convert", "show", "benchmark", "study")
"""The rooms of the experiments: each may import those before it, and itself."""

EXPORT_WORDS = frozenset({"exported_as", "refuse_in_export"})
"""What a file says that has a portable form, or none; it does not ask when that matters."""

SOURCES = sorted(
    path for folder in ("gmoe", "vision", "experiments") for path in (ROOT / folder).rglob("*.py")
)


class Import(NamedTuple):
    name: str
    lazy: bool = False
    """Inside of a function, or under ``if TYPE_CHECKING``."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> Iterator[Import]:
    """All that a module imports, as dotted names.

    ``from a import b`` gives ``a.b``, and ``from .a import b`` gives ``.a.b``.
    """

    def named(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "gmoe"
        ):
            yield f"gmoe.{node.attr}"  # import gmoe; gmoe.GNNMoE

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        yield from (Import(name, lazy) for name in named(node))
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        lazy |= typing or isinstance(node, ast.FunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy)

    yield from walk(ast.parse(source), False)


def inside(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def needs(name: str) -> frozenset[str]:
    """What a module of gmoe, or a public name, needs beside torch."""
    name = gmoe._LAZY.get(name.removeprefix("gmoe."), name)
    return frozenset().union(*(packages for room, packages in ROOMS.items() if inside(name, room)))


def upward(module: str, found: Import) -> bool:
    """Whether ``module`` may not import ``found``."""
    name, lazy = found
    top = name.split(".")[0]
    if top == "":  # relative: named in full, so that one sees where it comes from
        return True
    if lazy and inside(name, *LAZY.get(module, ())):
        return False
    if inside(module, "gmoe"):
        if top != "gmoe":
            return top not in {"torch", *sys.stdlib_module_names, *needs(module)}
        return name == "gmoe" or not needs(name) <= needs(module)
    if inside(module, "vision"):
        others = ("torch_geometric", "experiments", "tests", "tools", "ogb")
        return top in others or bool(needs(name) & PYG)
    return top in ("tests", "tools") or (top == "experiments" and upstairs(module, name))


def upstairs(module: str, name: str) -> bool:
    """Whether a module in a room of the experiments imports from a later room, or a command."""
    own, other = (path.split(".")[1:2] for path in (module, name))
    if not own or own[0] not in EXPERIMENTS:  # a command, which may open any room
        return False
    return other[0] not in EXPERIMENTS[: EXPERIMENTS.index(own[0]) + 1]


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in turn, also inside of functions; none if there are none."""
    found = {
        module: {home(name, sources) for name, _ in imports(source)} - {""}
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def home(name: str, modules: Iterable[str]) -> str:
    """The module in which an imported name is, or nothing."""
    return max((module for module in modules if inside(name, module)), key=len, default="")


def test_no_upward_import() -> None:
    found = {
        module_of(path): [
            name for name in imports(path.read_text()) if upward(module_of(path), name)
        ]
        for path in SOURCES
    }
    assert not {module: names for module, names in found.items() if names}


@pytest.mark.parametrize("package", ["gmoe", "vision", "experiments"])
def test_no_circle(package: str) -> None:
    """Also none inside of functions, and none for types alone."""
    sources = {module_of(path): path.read_text() for path in (ROOT / package).rglob("*.py")}
    assert circle(sources) == []


def words_of_exports(source: str) -> set[str]:
    """The names in a source that speak of exports, but for the two by which a file may say so."""
    words = {
        word
        for node in ast.walk(ast.parse(source))
        for field in ("id", "attr", "arg", "name", "value")
        if isinstance(word := getattr(node, field, None), str) and word.isidentifier()
    }
    return {word for word in words if "export" in word or "onnx" in word} - EXPORT_WORDS


FILES = [path for path in SOURCES if path.is_relative_to(ROOT / "gmoe")]


def test_one_file_asks_whether_a_model_is_exported() -> None:
    """No other hands the answer down either, by a flag or an argument."""
    found = {module_of(path): words_of_exports(path.read_text()) for path in FILES}
    assert [module for module, words in found.items() if words] == ["gmoe.portable"]


def imported_tests(source: str) -> list[str]:
    """The tests and tools that a file imports: what tests share is in ``tests/helpers``."""
    return [
        name
        for name, _ in imports(source)
        if inside(name, "tools")
        or (inside(name, "tests") and any(part.startswith("test_") for part in name.split(".")))
    ]


def test_no_test_is_imported() -> None:
    """Nor does a test import from the tools, which take helpers from the tests."""
    files = (ROOT / "tests").rglob("*.py")
    found = {module_of(path): imported_tests(path.read_text()) for path in files}
    assert not {module: names for module, names in found.items() if names}


def run(script: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_a_file_of_the_library_has_a_mirrored_test() -> None:
    """``gmoe/conv/graph.py`` has ``tests/gmoe/conv/test_graph.py``; packages have their own."""
    tests = [
        path.relative_to(ROOT).with_name(f"test_{path.name.lstrip('_')}")
        for path in FILES
        if path.name != "__init__.py"
    ]
    assert tests
    assert not [test for test in tests if not (ROOT / "tests" / test).exists()]


def test_an_import_loads_torch_alone() -> None:
    loaded = run("import sys, gmoe; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert "torch" in loaded
    later = {
        "torch_geometric",
        "torchvision",
        "torchmetrics",
        "matplotlib",
        "networkx",
        "scipy",
        "sklearn",
        "pandas",
    }
    assert not later & set(loaded)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("gmoe", "gmoe.callbacks."),  # which import transformers and lightning
        pytest.param("gmoe", "__main__", marks=pytest.mark.slow),
        pytest.param("experiments", "__main__", marks=pytest.mark.slow),
    ],
)
def test_no_import_opens_a_connection(name: str, left_out: str) -> None:
    script = f"""
import importlib, pkgutil, socket
def refuse(*args, **kwargs):
    raise AssertionError("an import opens a connection")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import {name} as package
for module in pkgutil.walk_packages(package.__path__, "{name}."):
    if "{left_out}" not in module.name:
        importlib.import_module(module.name)
print("all")
"""
    assert run(script) == "all\n"


def test_what_is_missing_is_named_with_its_extra() -> None:
    """``dir`` lists the names without an import.

    Neither models nor an import of gmoe need the Hub's packages.
    """
    script = """
import sys
sys.modules.update(dict.fromkeys(["torch_geometric", "torchmetrics", "matplotlib"]))  # not there
import gmoe
assert set(gmoe.__all__) <= set(dir(gmoe))
model = gmoe.ViTMoE(8)
assert not {"huggingface_hub", "safetensors"} & set(sys.modules)
sys.modules.update(dict.fromkeys(["torchvision", "huggingface_hub", "safetensors.torch"]))
names = ("MoEConv", "neighbor_loader", "RoutingStats", "plot", "x")
calls = [lambda name=name: getattr(gmoe, name) for name in names]
calls.append(lambda: model.save_pretrained("nowhere"))
calls.append(lambda: model.push_to_hub("me/mine"))
for call in calls:
    try:
        call()
    except (ImportError, AttributeError) as error:
        print(type(error).__name__, *str(error).split('"')[1:2])
"""
    extras = [
        "gmoe[graph]",
        "gmoe[graph]",
        "gmoe[graph]",
        "gmoe[plot]",
        None,
        "gmoe[hub]",
        "gmoe[hub]",
    ]
    errors = ["AttributeError" if extra is None else f"ImportError {extra}" for extra in extras]
    assert run(script).splitlines() == errors


def test_the_type_checker_sees_the_lazy_names() -> None:
    """The imports under ``TYPE_CHECKING`` are those of ``_LAZY``.

    ``__all__`` has them, and what is imported at once.
    """
    body = ast.parse((ROOT / "gmoe" / "__init__.py").read_text()).body
    now = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (checked,) = [node.body for node in body if isinstance(node, ast.If)]
    typed = [node for node in checked if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in typed for alias in node.names} == gmoe._LAZY
    public = (now - {"TYPE_CHECKING", "Any"}) | gmoe._LAZY.keys()
    assert sorted(gmoe.__all__) == sorted(public | {"__version__", "plot"})


READS_FILES = {"torch.load": "weights_only", "load_state_dict": "weights_only"}
"""Functions of torch and timm that run what is pickled in a file, unless an argument forbids it.

The least versions that ``pyproject.toml`` takes have other defaults than the newest ones.
"""

RUNS_FILES = ("pickle.load", "pickle.loads", "pd.read_pickle", "joblib.load", "torch.hub.load")
"""Functions that always do."""


def unsafe_reads(source: str) -> list[str]:
    """The calls in a source that may run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {one.arg: ast.unparse(one.value) for one in node.keywords}
        is_open = name in READS_FILES and given.get(READS_FILES[name]) != "True"
        is_open |= any(name == one or name.endswith(f".{one}") for one in RUNS_FILES)
        if is_open or given.get("allow_pickle", "False") != "False":
            found.append(name)
    return found


def test_no_file_that_is_read_can_run_code() -> None:
    paths = [*SOURCES, *(ROOT / "examples").rglob("*.py"), *(ROOT / "docs").rglob("*.py")]
    found = {str(path.relative_to(ROOT)): unsafe_reads(path.read_text()) for path in paths}
    assert not {path: names for path, names in found.items() if names}
