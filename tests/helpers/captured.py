"""What a CUDA graph could not take of a compiled training step: on a CPU.

The copy of gmoe that :mod:`tests.helpers.waits` makes takes the branches of CUDA. Each node of the
traced forward and backward is asked what inductor asks before it records a graph.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import is_cudagraph_unsafe_fx_node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tests.helpers.waits import CAPABILITY, in_copy, layers

FILE = "captured.json"


def on_cuda_branches() -> dict[str, list[str]]:
    """By step: what a CUDA graph could not take of it."""

    def read(folder: Path) -> dict[str, list[str]]:
        found: dict[str, list[str]] = json.loads((folder / FILE).read_text())
        return found

    return in_copy("from tests.helpers.captured import count; count()", read)


# in the process that traces -----------------------------------------------------------------------


def refused(model: nn.Module, *inputs: Any) -> list[str]:
    """The operators that CUDA graphs refuse, and those whose sizes follow from values."""
    found: list[str] = []

    def scan(traced: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        for node in traced.graph.nodes:
            value = node.meta.get("val")
            if node.op != "call_function":
                continue
            if is_cudagraph_unsafe_fx_node(node):
                found.append(f"{node.target} is unsafe")
            elif value is not None and free_unbacked_symbols(value):
                found.append(f"{node.target} has a size that follows from values")
        return make_boxed_func(traced.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=scan, decompositions=select_decomp_table())
    compiled = torch.compile(model.train(), backend=backend, fullgraph=True)
    compiled(*inputs).sum().backward()
    return found


def count() -> None:
    """Write what is found of all steps into the working directory."""
    warnings.simplefilter("ignore")
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.manual_seed(0)
    found = {}
    for name, layer, inputs in layers():
        found[name] = refused(layer, *inputs)
    Path(FILE).write_text(json.dumps(found))
