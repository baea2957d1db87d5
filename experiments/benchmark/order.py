"""The order of sum and transform: each of the three forced, and the one that the cost model picks.

Shapes: N nodes, I in, O out features, E experts, K experts a node.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from experiments.benchmark.measure import Benchmark, Step, layer_step, take_turns, told
from gmoe import Graph, MoEConv
from gmoe.conv.aggregate import Order

ORDERS: tuple[Order, ...] = get_args(Order)
CLOSE = 1.1
"""A choice is right if it takes at most that many times what the best takes."""

PATIENCE = 4.0
"""Seconds of a cell after which no turn begins."""


def least_of(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds, the least of several turns: what else the machine does only adds. Slow steps get fewer turns."""
    started, times = time.perf_counter(), list[Any]()
    while not times or (len(times) < repeats and time.perf_counter() - started < PATIENCE):
        times.append(take_turns(steps, 1, device, warmup=not times))
    return {name: min(turn[name]["wall"]["min"] for turn in times) for name in steps}


@dataclass(frozen=True, kw_only=True)
class OrderBenchmark(Benchmark):
    """GCN experts on random graphs, forward and backward, in every order; a cell of the grid is a shape."""

    nodes: int = 1000
    """Nodes of a cell."""
    ins: tuple[int, ...] = (64, 256, 1433)
    """Features in."""
    outs: tuple[int, ...] = (8, 16, 64, 128)
    """Features out; only cells that are narrower than their input are measured, since others have one order."""
    degrees: tuple[int, ...] = (3, 15, 60)
    """Edges into a node, on average."""
    experts: tuple[int, ...] = (4, 8, 16)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per node, K."""
    quick: bool = False
    """Every seventh cell only."""

    def measured(self) -> dict[str, Any]:
        """``grid``: by cell the seconds of each order, which one was chosen, and its ratio to the best; ``within``: the
        share of cells where that is at most 1.1."""
        grid = {}
        for cell in told([*self._cells()][:: 7 if self.quick else 1], "cell"):
            width, out, degree, experts, k, needs_x, shared = cell
            extras = ", gradient of x" * needs_x + ", shared expert" * shared
            name = f"{width} to {out}, degree {degree}, E={experts} K={k}{extras}"
            grid[name] = self._cell(*cell)
        within = statistics.mean(figures["ratio"] <= CLOSE for figures in grid.values()) if grid else None
        return {"grid": grid, "within": within}

    def _cells(self) -> Iterator[Any]:
        for cell in itertools.product(
            self.ins, self.outs, self.degrees, self.experts, self.ks, (False, True), (False, True)
        ):
            if cell[1] < cell[0] and cell[4] <= cell[3]:
                yield cell

    def _cell(
        self, width: int, out: int, degree: int, experts: int, k: int, needs_x: bool, shared: bool
    ) -> dict[str, Any]:
        """Seconds by order."""
        device = self.torch_device()
        options: Any = {"router_kwargs": {"balance": None}, "dense_start": False, "shared_expert": shared}
        with device:
            layer = MoEConv("gcn", width, out, num_experts=experts, k=k, **options)
            graph = Graph(torch.randint(self.nodes, (2, self.nodes * degree)), self.nodes).seeing(False)
            x, grad = torch.randn(self.nodes, width, requires_grad=needs_x), torch.randn(self.nodes, out)
        step = layer_step(layer, (x, graph), grad)

        def forced(order: Order) -> Step:
            def run() -> None:
                layer.experts.order = order
                step()

            return run

        assert layer.router is not None
        chosen: Order = layer.experts.cheapest(graph, x, layer.router(x), layer.shared_expert is not None)
        steps: dict[str, Step] = {order: forced(order) for order in ORDERS}
        least = least_of(steps, self.repeats, device)
        return least | {"chosen": chosen, "ratio": least[chosen] / min(least.values())}
