"""Memory of a process: its peak beside what tensors hold at once, and while it serves."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F
from torch_geometric.data import Data

from experiments.benchmark.layers import power_law_graph
from experiments.benchmark.measure import Measurement, Step, peak_bytes
from experiments.convert.graph import convert
from gmoe import ROUTERS, GNNMoE, Graph, MoEConv, StoredGraph, aux_loss
from gmoe._checks import check_choice, check_positive
from gmoe.conv.kinds import factory_of
from gmoe.models.inference import inference

STATUS = Path("/proc/self/status")
BATCH = 128
PIXELS = 32
CLASSES = 10

KINDS = ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer", "le")
"""Every kind whose experts are stacked, but GINE, which sums as GIN does; and LEConv, whose experts
run one by one."""

Row = Literal["kinds", "routers", "vit", "inference", "conversion"]


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark(Measurement):
    """The peak of the process's resident memory over one step, beside the most that tensors hold
    at once in such a step. Each variant has a process of its own, and torch's default allocator.

    Steps: forward and backward of a layer of each kind and, of GCN, of each router (E = 8,
    K = 1), beside the dense conv; of a ViT on 128 images; inference of two GCN layers, layer by
    layer, and the same from disk; a graph written to disk. CPU on Linux only."""

    device: Literal["cpu"] = "cpu"
    """Device."""
    rows: tuple[Row, ...] = ("kinds", "routers", "vit", "inference", "conversion")
    """What is measured."""
    nodes: int = 100_000
    """Nodes of the graph."""
    edges: int = 500_000
    """Edges, before the reverse of each is added."""
    width: int = 64
    """Features of a node, and of an output."""
    threads: int = 1
    """CPU threads."""

    def measured(self) -> dict[str, Any]:
        """By variant ``alive`` and ``resident``, bytes beyond those before the step."""
        check_memory_is_known()
        by_variant = {}
        for row in self.rows:
            check_choice("rows", row, Row)
            for variant, make in self._variants(row).items():
                by_variant[variant] = in_new_process(measure, make, self.threads)
                print(f"{variant}: {by_variant[variant]}", flush=True)
        return by_variant

    def _variants(self, row: Row) -> dict[str, Callable[[], Step]]:
        """What makes the step of each variant of a row, in the process that runs it."""
        sizes = (self.nodes, self.edges, self.width)
        if row == "kinds":
            return {
                f"{kind}, {form}": partial(conv_step, *sizes, kind, form)
                for kind in KINDS
                for form in ("dense", "experts")
            }
        if row == "routers":
            return {f"gcn, {name}": partial(conv_step, *sizes, "gcn", name) for name in ROUTERS}
        if row == "vit":
            return {
                f"ViT, {name}": partial(vit_step, None if name == "dense" else name)
                for name in ("dense", *ROUTERS)
            }
        if row == "inference":
            return {
                "layer by layer": partial(inference_step, *sizes, False),
                "layer by layer, from disk": partial(inference_step, *sizes, True),
            }
        return {"a graph to disk": partial(conversion_step, *sizes)}


@dataclass(frozen=True, kw_only=True)
class ServeBenchmark(Measurement):
    """Threads that serve one model for minutes: what the process holds meanwhile.

    Each call is of a random graph of another size, without gradients, of two GCN or SAGE layers
    of experts that start as copies. CPU on Linux only."""

    device: Literal["cpu"] = "cpu"
    """Device."""
    kinds: tuple[str, ...] = ("gcn", "sage")
    """Convs; a model of each is served, one after the other."""
    clients: int = 8
    """Threads that call the model."""
    minutes: float = 10.0
    """Of serving each model."""
    width: int = 64
    """Features of a node, and of an output."""
    threads: int = 1
    """CPU threads of a call."""

    def measured(self) -> dict[str, Any]:
        """By model ``calls``, ``resident``, bytes by second, and ``grown``, bytes from the median
        of the second tenth of the time to that of the last."""
        check_positive("minutes", self.minutes)
        check_memory_is_known()
        by_variant = {}
        for kind in self.kinds:
            args = (kind, self.width, self.clients, 60 * self.minutes, self.threads)
            calls, held = in_new_process(serve, *args)
            tenth = max(len(held) // 10, 1)
            early = held[tenth : 2 * tenth] or held
            late = held[-tenth:]
            grown = statistics.median(late) - statistics.median(early)
            by_variant[f"{kind} model"] = {"calls": calls, "resident": held, "grown": grown}
        return by_variant


def serve(
    kind: str, width: int, clients: int, seconds: float, threads: int
) -> tuple[int, list[int]]:
    """How many calls there were, and the bytes in memory, once a second."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GNNMoE(width, width, CLASSES, num_layers=2, conv=kind).eval()
    end = time.monotonic() + seconds
    counts = [0] * clients

    def call(client: int) -> None:
        draw = torch.Generator().manual_seed(client)
        while time.monotonic() < end:
            nodes = int(torch.randint(20, 400, (), generator=draw))
            edge_index = torch.randint(nodes, (2, 4 * nodes), generator=draw)
            with torch.no_grad():
                model(torch.randn(nodes, width, generator=draw), edge_index)
            counts[client] += 1

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(call, client) for client in range(clients)]
        held = []
        while time.monotonic() < end:
            held.append(resident())
            time.sleep(min(1.0, seconds / 20))
        for future in running:
            future.result()  # or raise what a call raised
    return sum(counts), held


def check_memory_is_known() -> None:
    """Refuse a system that does not tell the peak of a process's memory."""
    if not STATUS.exists():
        raise ValueError(f"device: got a system without {STATUS}, expected Linux")


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process that has run nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(make: Callable[[], Step], threads: int) -> dict[str, int]:
    """The memory of a step, whose inputs are made anew for each of the two figures.

    A graph keeps what its first step has sorted, which the second would not hold once more.
    """
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "Sparse|.*run on the whole graph|.*runs on the whole graph")
    step = make()
    before = resident()
    forget_peak()
    step()
    peak = resident("VmHWM")
    step = make()
    return {"alive": peak_bytes(step, torch.device("cpu")), "resident": peak - before}


def resident(key: Literal["VmRSS", "VmHWM"] = "VmRSS") -> int:
    """Bytes of the process in memory, now or at the peak."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def forget_peak() -> None:
    """Let the peak begin again from what is in memory now."""
    STATUS.with_name("clear_refs").write_text("5")


# Steps --------------------------------------------------------------------------------------------


def conv_step(nodes: int, edges: int, width: int, kind: str, form: str) -> Step:
    """Forward and backward of a layer; ``form`` is "dense", "experts", or a router's name."""
    data = random_graph(nodes, edges, width)
    x = data.x.requires_grad_()  # a hidden layer
    edge_index = data.edge_index
    if form == "dense":
        conv: Any = factory_of(kind)(width, width)
        return lambda: conv(x, edge_index).sum().backward()
    router = "token_choice" if form == "experts" else form
    options: dict[str, Any] = {"k": 8} if router == "uniform" else {}
    if router == "attention_vote":  # all nodes by all nodes take minutes
        options["router_kwargs"] = {"scope": "neighbors"}
    layer: Any = MoEConv(kind, width, width, num_experts=8, router=router, **options)
    graph = Graph(edge_index, nodes)

    def step() -> None:
        y, routing = layer(x, graph, return_routing=True)
        (y.sum() + aux_loss(routing)).backward()

    return step


def vit_step(router: str | None) -> Step:
    """Forward and backward of a small ViT on a batch of images; ``None`` is the dense one."""
    from gmoe.models.vit import ViTMoE  # torchvision, which graphs do without

    torch.manual_seed(0)
    options: dict[str, Any] = {"k": 8} if router == "uniform" else {}
    model: Any = ViTMoE(PIXELS, num_classes=CLASSES, router=router, **options)
    images = torch.randn(BATCH, 3, PIXELS, PIXELS)
    target = torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        y, routings = model(images, return_routing=True)
        (F.cross_entropy(y, target) + aux_loss(routings)).backward()

    return step


def inference_step(nodes: int, edges: int, width: int, from_disk: bool) -> Step:
    """Two GCN layers on all nodes, a part of them at a time."""
    data = random_graph(nodes, edges, width)
    model = GNNMoE(width, width, CLASSES, num_layers=2, num_experts=8).eval()
    if not from_disk:
        return lambda: inference(model, data)
    folder = TemporaryDirectory()
    converted(data, Path(folder.name))
    stored = StoredGraph(Path(folder.name) / "stored")

    def step() -> None:
        inference(model, stored, folder=folder.name)

    return step


def conversion_step(nodes: int, edges: int, width: int) -> Step:
    """A graph of arrays in files, made one that is read from disk."""
    data = random_graph(nodes, edges, width)

    def step() -> None:
        with TemporaryDirectory() as folder:
            converted(data, Path(folder))

    return step


def random_graph(nodes: int, edges: int, width: int) -> Data:
    """A graph with random features."""
    torch.manual_seed(0)
    edge_index, _ = power_law_graph(nodes, edges)
    return Data(torch.randn(nodes, width), edge_index)


def converted(data: Data, folder: Path) -> None:
    """The graph as a stored one, in a subfolder; its edges are sorted in a gigabyte."""
    np.save(folder / "x.npy", data.x.numpy())
    np.save(folder / "edges.npy", data.edge_index.numpy())
    convert(
        str(folder / "edges.npy"),
        folder / "stored",
        x=folder / "x.npy",
        directed=True,
        memory=1.0,
    )
