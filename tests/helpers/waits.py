"""How often a training step on a GPU would wait for the GPU, and what it launches: on a CPU.

A copy of gmoe takes the branches of CUDA on tensors of the CPU, in a process of its own. It notes
each operator that on CUDA must know values before Python goes on, how many operators would start
kernels, and which of them torch has no CUDA kernel for. It also notes what the step computes, to
compare it with the CPU's own branches.

Launches are those of few rows, and of more rows than all experts take at once; PyG's own layers are
counted, too.

What waits inside an operator of torch is known by name only. Tensors that stay on the host on
purpose (the sizes of groups, if experts choose in a ragged batch) look like the others, so such
layers are left out. Nothing here replaces a run on a GPU (``python -m experiments.benchmark gpu``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.steps import PYG, STEPS

ROOT = Path(__file__).parents[2]

Read = TypeVar("Read")

Results = dict[str, list[Tensor]]
"""By layer: its output in training, and the gradients of its input and parameters; in float64."""


class Found(NamedTuple):
    """What there is to know of all layers."""

    waits: dict[str, dict[str, int]]
    """By layer: how often a step waits, by operator and line of code."""
    launches: dict[str, list[int]]
    """By layer: the operators of a step that start a kernel, of few rows and of many."""
    pyg: dict[str, int]
    """The same of PyG's layers."""
    without_kernel: list[str]
    """Operators of all layers for which torch has no CUDA kernel."""
    results: Results


BRANCHES = {
    r"\.is_cuda\b": ".is_floating_point()",
    r"[\w.]*\bdevice\.type == \"cpu\"": "False",
    r"[\w.]*\bdevice\.type != \"cpu\"": "True",
    r"torch\._C\._len_torch_dispatch_stack\(\)": "0",  # the operators' mode is no count of FLOPs
    r"SPARSE_DEVICES = \(\"cpu\",\)": "SPARSE_DEVICES = ()",
}
"""Regular expressions of gmoe's questions for a device, and CUDA's answers to them."""

QUESTIONS = re.compile(r"\.is_cuda\b|\.is_cpu\b|\bdevice(\.type)? (==|!=|in) \W*(cuda|cpu)\b")
"""What must not be left of them."""

IN_CONSTRUCTORS = ("start.py",)
"""Files that ask for a device where layers are built, not where they run."""

CAPABILITY = (8, 0)
"""Of the GPU that is played: one for which torch has no grouped product."""

METHODS = ("tolist", "numpy", "cpu")
"""Methods of tensors that copy values to the host, without an operator that a dispatcher sees."""

COPIES = ("tensor", "new_tensor", "as_tensor")
"""Functions that copy numbers of Python to the device, for which the host waits."""

OPERATORS = {
    f"aten.{name}"
    for name in (
        *(
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "nonzero",
            "masked_select",
            "isin",
            "bincount",
        ),
        *(
            "_unique",
            "_unique2",
            "unique_dim",
            "unique_consecutive",
            "_coalesce",
            "to_sparse",
            "to_sparse_csr",
        ),
        "_grouped_mm",  # without a kernel for the device and dtype it reads the offsets
    )
}
"""Operators that read values, or whose result has as many numbers as the values say."""

FREE = {
    f"aten.{name}"
    for name in (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("detach", "alias", "_unsafe_view", "lift_fresh", "promote_types", "result_type"),
    )
}
"""Operators that start no kernel, beside views."""

INDEXING = {f"aten.{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}
"""Operators that read values where the index is a mask."""


def on_cuda_branches() -> Found:
    """Run all layers in a copy of gmoe that takes the branches of CUDA."""

    def read(folder: Path) -> Found:
        counted = json.loads((folder / "waits.json").read_text())
        return Found(**counted, results=torch.load(folder / "results.pt"))

    return in_copy("from tests.helpers.waits import count; count()", read)


def in_copy(code: str, read: Callable[[Path], Read]) -> Read:
    """Run some code with the copy of gmoe, in a process of its own; read what it wrote."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_with_cuda_branches(folder)
        # From that folder the copy is imported, all else from here.
        paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | paths,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return read(folder)


def copy_with_cuda_branches(folder: Path) -> None:
    """Copy gmoe, and answer its questions for a device as on CUDA.

    Raises:
        ValueError: a question that is put in other words, so that nobody answers it.
    """
    source = ROOT / "gmoe"
    shutil.copytree(source, folder / "gmoe", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / "gmoe").rglob("*.py"):
        if path.name in IN_CONSTRUCTORS:
            continue
        text = path.read_text()
        for question, answer in BRANCHES.items():
            text = re.sub(question, answer, text)
        if left := QUESTIONS.search(text):
            raise ValueError(
                f"BRANCHES: got {left.group()!r} in {path.name}, "
                "expected a question that is among them"
            )
        path.write_text(text)


# in the process that counts -----------------------------------------------------------------------


class Calls(TorchFunctionMode):
    """Note calls of Python that wait."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        # The size of the result, if nobody says it.
        sized = kwargs.get("output_size") is not None or (
            len(args) > 1 and isinstance(args[1], int)
        )
        to_host = name == "to" and "cpu" in map(str, (*args[1:], *kwargs.values()))
        if name in METHODS + COPIES or to_host or (name == "repeat_interleave" and not sized):
            self.found[f"{name} at {place()}"] += 1
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Note operators that wait, and all that compute something."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found
        self.launched: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        masked = name in INDEXING and any(is_mask(index) for index in args[1])
        if name in OPERATORS or masked:
            self.found[f"{name.removeprefix('aten.')} at {place()}"] += 1
        if not func.is_view and name not in FREE:
            self.launched[name] += 1
        return func(*args, **(kwargs or {}))


def has_cuda_kernel(name: str) -> bool:
    """True for an operator of gmoe, and one whose CUDA kernel torch's headers list.

    They come with torch's CPU build, too.
    """
    space, _, name = name.partition(".")
    # The headers have an operator in place, or with an out, under the name of the plain one.
    plain = name.rstrip("_") if not name.startswith("__") else name
    folder = Path(torch.__file__).parent / "include" / "ATen" / "ops"
    kinds = ("cuda", "compositeexplicitautograd", "compositeimplicitautograd")
    headers = [folder / f"{one}_{kind}_dispatch.h" for one in (name, plain) for kind in kinds]
    return space != "aten" or any(header.exists() for header in headers)


def is_mask(index: Any) -> bool:
    """True for an index that says yes or no to each element."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def place() -> str:
    """The innermost line of gmoe or PyG that is running."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("gmoe", "torch_geometric"):
            if f"/{package}/" in frame.filename:
                return f"{package}/{frame.filename.partition(f'/{package}/')[2]}: {frame.line}"
    return "autograd"


def step_counts(model: nn.Module, *inputs: Any) -> tuple[dict[str, int], Counter[str]]:
    """The waits of a training step that is not the first, and what it launches."""
    model.train()(*inputs)
    found: Counter[str] = Counter()
    with Calls(found), Operators(found) as operators:
        model(*inputs).sum().backward()
    return dict(found), operators.launched


def step_results(model: nn.Module, *inputs: Any) -> list[Tensor]:
    """The output of a model in training; the gradients of its first input and parameters."""
    leaves = [inputs[0], *model.parameters()]
    y = model.train()(*inputs)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [
        y.detach(),
        *torch.autograd.grad(y, leaves, cotangent, allow_unused=True, materialize_grads=True),
    ]


def results() -> Results:
    """What the gmoe that is imported computes, in float64."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return {name: step_results(layer, *inputs) for name, layer, inputs in layers()}
    finally:
        torch.set_default_dtype(default)


def opened(model: nn.Module) -> nn.Module:
    """Let routed experts that start at zero count in the output, and copies differ."""
    for part in model.modules():
        if isinstance(gain := getattr(part, "gain", None), nn.Parameter):
            nn.init.constant_(gain, 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("_difference"):
            nn.init.normal_(parameter, std=0.3)
    return model


def layers() -> Iterator[tuple[str, nn.Module, tuple[Any, ...]]]:
    """Name, layer and inputs of each step."""
    for name, step in STEPS.items():
        yield name, opened(step.layer()), step.inputs()


def count() -> None:
    """Write what is found of all layers into the working directory."""
    import gmoe.routed

    warnings.simplefilter("ignore")
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.manual_seed(0)
    counts = {name: step_counts(layer, *inputs) for name, layer, inputs in layers()}
    pyg = {name: step_counts(step.layer(), *step.inputs()) for name, step in PYG.items()}
    gmoe.routed.FEW_NUMBERS_ON_GPU = 0  # any number is more
    many = {name: step_counts(layer, *inputs) for name, layer, inputs in layers()}
    both = [*counts.values(), *many.values()]
    names = {operator for _, launched in both for operator in launched}
    counted = {
        "waits": {name: waits | many[name][0] for name, (waits, _) in counts.items()},
        "launches": {
            name: [launched.total(), many[name][1].total()]
            for name, (_, launched) in counts.items()
        },
        "pyg": {name: launched.total() for name, (_, launched) in pyg.items()},
        "without_kernel": sorted(name for name in names if not has_cuda_kernel(name)),
    }
    Path("waits.json").write_text(json.dumps(counted))
    torch.save(results(), "results.pt")


def different(found: Results, expected: Results) -> dict[str, str]:
    """By layer, how the branches of CUDA compute something else than those of the CPU."""
    wrong = {}
    for name, tensors in expected.items():
        try:
            torch.testing.assert_close(found[name], tensors, atol=1e-10, rtol=1e-10)
        except AssertionError as error:
            wrong[name] = " ".join(str(error).split())
    return wrong
