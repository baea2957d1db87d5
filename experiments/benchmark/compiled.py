"""A training step under ``torch.compile``: layers with experts beside dense layers, both compiled.

The allocator decides a good part of dense layers' times: by default glibc hands large tensors
back to the system after each step and faults them in again. So each setting is measured in a
process of its own.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from types import FunctionType
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch_geometric import seed_everything
from tqdm import tqdm

from experiments.benchmark.layers import power_law_graph
from experiments.benchmark.measure import Benchmark, Step, layer_step, take_turns
from experiments.train.results import write_json
from gmoe import MoEConv
from gmoe._checks import check_choice
from gmoe.conv.kinds import factory_of

Kind = Literal["gcn", "sage", "gin", "gat", "vit"]
Allocator = Literal["default", "kept"]

ALLOCATORS: dict[Allocator, dict[str, str]] = {
    "default": {},
    "kept": dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), "4000000000"),
}
"""Environment of each setting; ``"kept"`` never gives freed memory back to the system."""


class Size(NamedTuple):
    """Of a graph: citations (each becomes two directed edges), and the width of its nodes."""

    citations: int
    width: int


SIZES = {
    30: Size(60, 64),
    2_708: Size(5_278, 128),  # Cora's numbers
    20_000: Size(100_000, 128),
    100_000: Size(500_000, 128),
}
"""By the number of nodes."""

HEADS = 4
"""Of GAT, whose heads share the width."""

LAYERS = ("dense", "MoE shared", "MoE copies")
"""The dense layer, and experts in its place in both starts."""


STARTS: tuple[dict[str, Any], ...] = (
    {"start": "shared"},
    {"start": "copies", "router_kwargs": {"weight": "straight_through"}},  # weights that sum to 1
)


class Compiled(NamedTuple):
    """A step of a compiled layer, after its first run."""

    step: Step
    graph: str
    """``"whole"``, or into how many pieces it fell."""
    seconds: float
    """Of the first run, which compiles."""


@dataclass(frozen=True, kw_only=True)
class CompileBenchmark(Benchmark):
    """Forward and backward of a layer, eager and compiled, dense and with experts (both starts),
    under both settings of the allocator. Ratios are of minima, to the compiled dense layer of
    the same process. CPU only."""

    kinds: tuple[Kind, ...] = ("gcn", "sage", "gin", "gat", "vit")
    """Convs, by the names that MoEConv takes, and a ViT of CIFAR's size."""
    nodes: tuple[int, ...] = tuple(SIZES)
    """Sizes of the graphs, of those by default."""
    images: int = 8
    """Images of a batch of the ViT."""
    thread_counts: tuple[int, ...] = (1, 2)
    """CPU threads, in the place of `--threads`."""
    allocators: tuple[Allocator, ...] = ("default", "kept")
    """Settings of the allocator: as glibc has it, or memory kept between steps."""
    repeats: int = 25
    """Rounds, of which the fastest counts."""

    def measured(self) -> dict[str, Any]:
        """By variant ``wall`` and ``cpu``, see :func:`take_turns`; ``ratio``, the least of each
        over the compiled dense layer's; of compiled ones ``graph``, whole or in how many
        pieces, and ``compilation``, in seconds."""
        check_choice("device", self.device, ("cpu",))
        for nodes in self.nodes:
            check_choice("nodes", nodes, SIZES)
        by_variant: dict[str, Any] = {}
        for allocator in self.allocators:
            for threads in self.thread_counts:
                # glibc reads these when a process starts, and so does OpenMP its threads.
                setting = {**ALLOCATORS[allocator], "OMP_NUM_THREADS": str(threads)}
                with (
                    patch.dict(os.environ, setting),
                    ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
                ):
                    by_variant |= process.submit(measure_setting, self, threads, allocator).result()
                if self.json is not None:  # a setting may take an hour
                    write_json(self.json, self.content(by_variant))
        return by_variant


def measure_setting(config: CompileBenchmark, threads: int, allocator: Allocator) -> dict[str, Any]:
    """Measure all rows of a setting, one after the other, in the process that has it."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly")
    seed_everything(0)
    by_variant: dict[str, Any] = {}
    for row, layers, inputs in rows_of(config):
        name = f"{row}, {threads} thread{'s' * (threads > 1)}, {allocator} allocator"
        by_variant |= measure_row(name, layers, inputs, config.repeats)
    return by_variant


def rows_of(config: CompileBenchmark) -> Iterator[tuple[str, list[nn.Module], tuple[Any, ...]]]:
    """Name, layers in the order of :data:`LAYERS`, and their inputs."""
    for kind in config.kinds:
        if kind == "vit":
            yield f"vit, {config.images} images", *vit_row(config.images)
            continue
        for nodes in config.nodes:
            yield f"{kind}, {nodes:,} nodes", *conv_row(kind, nodes)


def conv_row(kind: Kind, nodes: int) -> tuple[list[nn.Module], tuple[Tensor, Tensor]]:
    """A conv as PyG has it, the layers in its place, and a random graph."""
    citations, width = SIZES[nodes]
    heads: dict[str, Any] = {"heads": HEADS} if kind == "gat" else {}
    sizes: Any = (width, width // heads.get("heads", 1))
    build: Any = partial(MoEConv, kind, *sizes, **heads)
    layers = [factory_of(kind)(*sizes, **heads), *(build(**start) for start in STARTS)]
    x = torch.randn(nodes, width, requires_grad=True)  # as between two layers of a model
    return layers, (x, power_law_graph(nodes, citations)[0])


def vit_row(images: int) -> tuple[list[nn.Module], tuple[Tensor]]:
    """A dense ViT, both with experts in every second block, and random images."""
    from gmoe.models.vit import ViTMoE  # torchvision, which graphs do without

    layers: list[nn.Module] = [ViTMoE(32, router=None)]
    layers += [ViTMoE(32, router="token_choice", **start) for start in STARTS]
    return layers, (torch.randn(images, 3, 32, 32),)


def measure_row(
    name: str, layers: list[nn.Module], inputs: tuple[Any, ...], repeats: int
) -> dict[str, Any]:
    """Compile and time the layers of a row; say what came out."""
    torch.compiler.reset()  # rows must not share the limit of recompiles
    steps = dict[str, Step]()
    compiled = dict[str, Compiled]()
    for layer_name, layer in zip(LAYERS, layers, strict=True):
        steps[f"{layer_name}, eager"] = layer_step(layer, inputs)
        compiled[layer_name] = made = compile_step(layer, inputs)
        steps[f"{layer_name}, compiled {made.graph}"] = made.step
    times = take_turns(steps, repeats, torch.device("cpu"), warmup=3)
    base = times[f"dense, compiled {compiled['dense'].graph}"]
    by_variant: dict[str, Any] = {}
    for variant, clocks in times.items():
        ratio = {clock: times["min"] / base[clock]["min"] for clock, times in clocks.items()}
        by_variant[f"{name}: {variant}"] = {**clocks, "ratio": ratio}
        milliseconds = 1000 * clocks["cpu"]["min"]
        tqdm.write(
            f"{name}: {variant}: {milliseconds:,.2f} ms CPU, {ratio['cpu']:.2f} × compiled dense",
            file=sys.stderr,
        )
    for layer_name, made in compiled.items():
        figures = by_variant[f"{name}: {layer_name}, compiled {made.graph}"]
        figures |= {"graph": made.graph, "compilation": made.seconds}
    return by_variant


def compile_step(layer: nn.Module, inputs: tuple[Any, ...]) -> Compiled:
    """Compile a layer as one graph, or, where torch cannot, in pieces; and run it once."""
    graph = "whole"
    started = time.perf_counter()
    try:
        step = compiled_step(layer, inputs, fullgraph=True)
    except torch._dynamo.exc.Unsupported:
        # Explaining resets torch's compiler: warm-up rounds compile the layers before this one
        # again.
        breaks = torch._dynamo.explain(layer)(*inputs).graph_break_count
        graph = f"in pieces ({breaks} break{'s' * (breaks > 1)})"
        started = time.perf_counter()
        step = compiled_step(layer, inputs, fullgraph=False)
    return Compiled(step, graph, time.perf_counter() - started)


def compiled_step(layer: nn.Module, inputs: tuple[Any, ...], fullgraph: bool) -> Step:
    """The step of a compiled layer, run once."""

    def call(*inputs: Any) -> Tensor:
        return layer(*inputs)

    # torch remembers by code object what it could not compile, and then runs *any* layer that
    # is called by this code without compiling it, even with fullgraph=True. So each has a code
    # object of its own.
    own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    step = layer_step(layer, inputs, torch.compile(own, fullgraph=fullgraph))
    step()
    return step
