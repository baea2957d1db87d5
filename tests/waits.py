"""How often a training step on a GPU would wait for the GPU, counted on a CPU.

``python -m tests.waits`` prints where.

A copy of gmoe takes the branches of CUDA on tensors of the CPU, in a process of its own. It notes
each operator that on CUDA must know values before Python goes on. It also notes what the step
computes, to compare it with the CPU's own branches.

What waits inside an operator of torch is known by name only. Tensors that stay on the host on
purpose (the sizes of groups, if experts choose in a ragged batch) look like the others, so such
layers are left out. Nothing here replaces a run on a GPU (``python -m experiments.benchmark gpu``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Results = dict[str, list[Tensor]]
"""By layer: its output in training, and the gradients of its input and parameters; in float64."""


class Found(NamedTuple):
    """What there is to know of all layers."""

    waits: dict[str, dict[str, int]]
    """By layer: how often a step waits, by operator and line of code."""
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

COPY = "counted.py"
"""Name of this file where it runs beside that copy."""

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

INDEXING = {f"aten.{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}
"""Operators that read values where the index is a mask."""


def on_cuda_branches() -> Found:
    """Run all layers in a copy of gmoe that takes the branches of CUDA, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_with_cuda_branches(folder)
        command = [sys.executable, shutil.copy(__file__, folder / COPY)]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return Found(
            json.loads((folder / "waits.json").read_text()), torch.load(folder / "results.pt")
        )


def copy_with_cuda_branches(folder: Path) -> None:
    """Copy gmoe, and answer its questions for a device as on CUDA.

    Raises:
        ValueError: a question that is put in other words, so that nobody answers it.
    """
    source = Path(__file__).parents[1] / "gmoe"
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
    """Note operators that wait."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        masked = name in INDEXING and any(is_mask(index) for index in args[1])
        if name in OPERATORS or masked:
            self.found[f"{name.removeprefix('aten.')} at {place()}"] += 1
        return func(*args, **(kwargs or {}))


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


def step_waits(model: nn.Module, *inputs: Any) -> dict[str, int]:
    """The waits of a training step that is not the first."""
    model.train()(*inputs)
    found: Counter[str] = Counter()
    with Calls(found), Operators(found):
        model(*inputs).sum().backward()
    return dict(found)


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
    """Name, layer and inputs of each layer."""
    for name, layer, inputs in drawn():
        yield name, opened(layer), inputs


def drawn() -> Iterator[tuple[str, nn.Module, tuple[Any, ...]]]:
    """The same as they are drawn."""
    from gmoe import GNNMoE, Graph, MLPExperts, MoE, MoEConv, SoftMoE, SoftSlots, build_router

    x, edge_index = torch.randn(60, 64, requires_grad=True), torch.randint(60, (2, 240))
    edges, graph = (x, edge_index), (x, Graph(edge_index, 60))
    starts: dict[str, Any] = {"": "shared", ", copies": "copies"}
    for words, start in starts.items():
        for conv in ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer"):
            yield f"{conv}{words}", MoEConv(conv, 64, 64, start=start), edges
        for conv in ("gcn", "gat"):
            yield f"{conv} on a Graph{words}", MoEConv(conv, 64, 64, start=start), graph
        weighted = MoEConv("gcn", 64, 64, start=start)
        yield f"gcn, weighted edges{words}", weighted, (*edges, torch.rand(240))
        yield f"GNNMoE{words}", GNNMoE(64, 64, 5, 3, start=start), edges
    for conv in ("gat", "gatv2"):
        layer = MoEConv(conv, 64, 64, router="expert_choice", start="shared")
        yield f"{conv}, expert_choice", layer, edges
    yield "GNNMoE of gat", GNNMoE(64, 64, 5, 3, conv="gat"), edges
    filters = ["identity", "low_pass", "high_pass", "low_pass"]
    yield "filters", MoEConv(filters, 64, 64), edges
    mixed = ["gcn", "sage", "gin", "graph"]
    yield "mixed kinds", MoEConv(mixed, 64, 64), edges
    images = (torch.randn(2, 30, 64, requires_grad=True),)

    def mlps() -> MLPExperts:
        return MLPExperts(64, 128, 64, num_experts=8)

    for router in (
        "token_choice",
        "expert_choice",
        "attention_vote",
        "multi_centroid",
        "random",
        "uniform",
    ):
        yield f"MoE, {router}", MoE(build_router(router, 64, num_experts=8, k=2), mlps()), images
    balances: dict[str, dict[str, Any]] = {
        "importance and load": {"balance": "importance_load"},
        "switch and z": {"balance": "switch", "z_coef": 0.1},
        "capacity": {"capacity_factor": 1.0},
        "top_p": {"top_p": 0.5, "entropy_coef": 0.1},
    }
    for name, options in balances.items():
        yield (
            f"MoE, {name}",
            MoE(build_router("token_choice", 64, num_experts=8, k=2, kwargs=options), mlps()),
            images,
        )
    threshold = build_router(
        "expert_choice", 64, num_experts=8, k=2, kwargs={"inference": "threshold"}
    )
    yield "MoE, threshold", MoE(threshold, mlps()), images
    ragged = (x, torch.tensor([0] * 25 + [1] * 35))
    yield (
        "MoE, token_choice on a batch",
        MoE(build_router("token_choice", 64, num_experts=8, k=2), mlps()),
        ragged,
    )
    yield "SoftMoE", SoftMoE(SoftSlots(64, num_experts=8, slots=2), mlps()), images


def main() -> None:
    """Write what is found of all layers into the working directory."""
    warnings.simplefilter("ignore")
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.manual_seed(0)
    waits = {name: step_waits(layer, *inputs) for name, layer, inputs in layers()}
    Path("waits.json").write_text(json.dumps(waits))
    torch.save(results(), "results.pt")


if __name__ == "__main__":
    if Path(__file__).name == COPY:
        main()
    else:
        for layer, places in on_cuda_branches().waits.items():
            print(
                f"{layer}: {sum(places.values())}",
                *(f"  {n} x {at}" for at, n in places.items()),
                sep="\n",
            )
