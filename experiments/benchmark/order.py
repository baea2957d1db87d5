"""The order of sum and transform: each of the three forced, the one that the cost model picks, and bare torch.

Shapes: N nodes, M edges, I in, O out features, E experts, K experts a node, U rows that experts hear.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gmoe
from experiments.benchmark.options import Benchmark, layer_step
from experiments.timing import take_turns
from gmoe.conv.aggregate import Order

ORDERS: tuple[Order, ...] = get_args(Order)
CLOSE = 1.1
"""A choice is right if it takes at most that many times what the best takes."""

PATIENCE = 4.0
"""Seconds of a cell after which no turn begins."""

WIDE = ((2708, 10_556, 1433, 16), (2708, 10_556, 1433, 128), (890, 17_700, 2325, 16))
"""Nodes, edges, I and O of the layers that are compared with bare torch; the first two are of Cora's size."""


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
    wide: bool = True
    """Compare wide layers with bare torch too."""

    def run(self) -> dict[str, Any]:
        """Measure.

        Returns:
            ``grid``: by cell the seconds of each order, which one was chosen, and its ratio to the best; ``within``:
            the share of cells where that is at most 1.1; ``wide``: by layer, the seconds of bare torch in each order
            and of MoEConv, and its ratio to the cheapest of these.

        Raises:
            RuntimeError: bare torch does not give what the layer gives.
        """
        device, nodes = self.torch_device(), self.nodes
        told = Console(stderr=True)
        sizes = (self.ins, self.outs, self.degrees, self.experts, self.ks)
        shapes = itertools.product(*sizes, (False, True), (False, True))
        cells = [shape for shape in shapes if shape[1] < shape[0] and shape[4] <= shape[3]][:: 7 if self.quick else 1]
        grid: dict[str, Any] = {}
        for index, (width, out, degree, experts, k, needs_x, shared) in enumerate(cells):
            options = [f"E={experts} K={k}", *["gradient of x"] * needs_x, *["shared expert"] * shared]
            name = f"{width} to {out}, degree {degree}, {', '.join(options)}"
            layer, x, graph = self._layer(nodes, nodes * degree, width, out, experts, k, shared, device)
            x.requires_grad_(needs_x)
            grad = torch.randn(nodes, out, device=device)
            chosen = _chosen(layer, x, graph)
            forced = {order: _forced(layer, x, graph, grad, order) for order in ORDERS}
            found = _least(forced, self.repeats, device)
            grid[name] = found | {"chosen": chosen, "ratio": found[chosen] / min(found.values())}
            told.print(f"{index + 1} of {len(cells)}: {name}: {chosen}, {grid[name]['ratio']:.2f} of the best")
        within = statistics.mean(figures["ratio"] <= CLOSE for figures in grid.values()) if grid else None
        wide: dict[str, Any] = {}
        for (count, edges, width, out), shared in itertools.product(WIDE if self.wide else (), (False, True)):
            name = f"{count} nodes, {edges} edges, {width} to {out}{', shared expert' * shared}"
            layer, x, graph = self._layer(count, edges, width, out, 8, 1, shared, device)
            grad = torch.randn(count, out, device=device)
            plain = {order: Bare(layer, graph, order) for order in ORDERS}
            for order, module in plain.items():
                if not torch.allclose(module(x), layer(x, graph), rtol=1e-3, atol=1e-4):
                    raise RuntimeError(f"bare torch in the order {order} and the layer differ")
            steps: dict[Any, Any] = {f"bare {order}": layer_step(module, (x,), grad) for order, module in plain.items()}
            steps["MoEConv"] = layer_step(layer, (x, graph.seeing(False)), grad)
            steps["MoEConv, features of the last call"] = layer_step(layer, (x, graph), grad)
            found = _least(steps, self.repeats, device)
            best = min(found[f"bare {order}"] for order in ORDERS)
            wide[name] = found | {"ratio": found["MoEConv"] / best, "chosen": _chosen(layer, x, graph)}
            told.print(f"{name}: MoEConv takes {wide[name]['ratio']:.2f} of the cheapest in bare torch")
        return {"grid": grid, "within": within, "wide": wide}

    def _layer(
        self, nodes: int, edges: int, width: int, out: int, experts: int, k: int, shared: bool, device: torch.device
    ) -> tuple[gmoe.MoEConv, Tensor, gmoe.Graph]:
        """A layer of GCN experts, features, and a graph."""
        torch.manual_seed(self.seed)
        plain: Any = {"router_kwargs": {"balance": None}, "dense_start": False, "shared_expert": shared}
        layer = gmoe.MoEConv("gcn", width, out, num_experts=experts, k=k, **plain).to(device)
        graph = gmoe.Graph(torch.randint(nodes, (2, edges), device=device), nodes)
        return layer, torch.randn(nodes, width, device=device), graph

    def table(self, found: dict[str, Any]) -> Table:
        """What :meth:`run` returned, to read."""
        share = "" if found["within"] is None else f"; {found['within']:.1%} of the cells within {CLOSE} of the best"
        table = Table(title=f"least of several turns (ms){share}", title_justify="left")
        for column in ("", *ORDERS, "MoEConv", "kept", "chosen", "× best"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, figures in (found["grid"] | found["wide"]).items():
            timed = [figures.get(order, figures.get(f"bare {order}")) for order in ORDERS]
            timed += [figures.get("MoEConv"), figures.get("MoEConv, features of the last call")]
            shown = ["–" if seconds is None else f"{1000 * seconds:,.1f}" for seconds in timed]
            table.add_row(name, *shown, figures["chosen"], f"{figures['ratio']:.2f}")
        return table


def _least(steps: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device) -> dict[Any, float]:
    """The least of several turns: what else the machine does only adds. Slow steps get fewer turns."""
    started, times = time.perf_counter(), list[dict[Any, float]]()
    while not times or (len(times) < repeats and time.perf_counter() - started < PATIENCE):
        turn = take_turns(steps, 1, device, warmup=not times)
        times.append({name: figures["wall"]["min"] for name, figures in turn.items()})
    return {name: min(turn[name] for turn in times) for name in steps}


def _chosen(layer: gmoe.MoEConv, x: Tensor, graph: gmoe.Graph) -> Order:
    """What the cost model says of features that are new in each call."""
    routing = layer.router(x) if layer.router is not None else None
    order: Order = layer.experts.cheapest(graph.seeing(False), x, routing, layer.shared_expert is not None)
    return order


def _forced(layer: gmoe.MoEConv, x: Tensor, graph: gmoe.Graph, grad: Tensor, order: Order) -> Callable[[], None]:
    step = layer_step(layer, (x, graph.seeing(False)), grad)

    def forced() -> None:
        layer.experts.order = order
        step()
        layer.experts.order = None

    return forced


class Sum(torch.autograd.Function):
    """A x, of a matrix that comes with its transpose."""

    @staticmethod
    def forward(ctx: Any, adj: Tensor, transpose: Tensor, x: Tensor) -> Tensor:
        ctx.transpose = transpose
        return adj @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None]:
        return None, None, ctx.transpose @ grad if ctx.needs_input_grad[2] else None


class Bare(nn.Module):
    """GCN experts by token choice as a few lines of torch, in one of the orders.

    Args:
        layer: whose parameters it takes.
        graph: the graph, of which everything that does not change is prepared here.
        order: of sum and transform.
    """

    def __init__(self, layer: gmoe.MoEConv, graph: gmoe.Graph, order: Order) -> None:
        super().__init__()
        assert isinstance(layer.router, gmoe.TokenChoice)
        self.order, self.k, self.gate = order, layer.k, layer.router.gate
        self.weight, self.bias = layer.experts.linear.weight, layer.experts.linear.bias
        self.shared = None if layer.shared_expert is None else layer.shared_expert.linear
        matrix = graph.normalized(improved=False, loops=True, dtype=self.weight.dtype)
        dst, src = matrix.edges.receiver, matrix.edges.sender
        coo = torch.sparse_coo_tensor(torch.stack([dst, src]), matrix.weight, (graph.num_dst, graph.num_src))
        self.adj, self.transpose = coo.to_sparse_csr(), coo.t().coalesce().to_sparse_csr()
        self.dst, self.src, self.entry = dst, src, matrix.weight

    def forward(self, x: Tensor) -> Tensor:
        """(N, O)"""
        best = self.gate(x).log_softmax(dim=-1).topk(self.k)
        weight_NK = best.values.exp() if self.k == 1 else best.values.softmax(dim=-1)
        y: Tensor = getattr(self, self.order)(x, best.indices, weight_NK)
        return y

    def aggregate(self, x: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """(A x) W"""
        h = Sum.apply(self.adj, self.transpose, x)
        y = h.new_zeros(len(x), self.weight.size(2))
        pair = expert_NK.flatten().argsort(stable=True)
        load = expert_NK.flatten().bincount(minlength=len(self.weight)).tolist()
        for expert, chosen in enumerate(pair.split(load)):
            row = h[chosen // self.k] @ self.weight[expert] + self.bias[expert]
            y = y.index_add(0, chosen // self.k, row * weight_NK.flatten()[chosen, None])
        return y if self.shared is None else y + h @ self.shared.weight[0] + self.shared.bias[0]

    def transform(self, x: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """A (x W)"""
        weight_EIO = self.weight if self.shared is None else torch.cat([self.weight, self.shared.weight])
        h = Sum.apply(self.adj, self.transpose, x @ weight_EIO.transpose(0, 1).flatten(1))
        h_NEO = h.view(len(x), len(weight_EIO), -1)
        index = expert_NK[:, :, None].expand(-1, -1, h_NEO.size(2))
        y = ((h_NEO.gather(1, index) + self.bias[expert_NK]) * weight_NK[:, :, None]).sum(dim=1)
        return y if self.shared is None else y + h_NEO[:, -1] + self.shared.bias[0]

    def pairs(self, x: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """A W x of the (source, expert) pairs that edges ask for."""
        asked = expert_NK[self.dst] * len(x) + self.src[:, None]
        heard, place = asked.unique(return_inverse=True)
        load = (heard // len(x)).bincount(minlength=len(self.weight)).tolist()
        row = torch.cat([x[u % len(x)] @ self.weight[e] for e, u in enumerate(heard.split(load))])
        message = row[place] * (self.entry[:, None] * weight_NK[self.dst])[:, :, None]
        y = (self.bias[expert_NK] * weight_NK[:, :, None]).sum(dim=1)
        y = y.index_add(0, self.dst, message.sum(dim=1))
        if self.shared is None:
            return y
        return y + Sum.apply(self.adj, self.transpose, x @ self.shared.weight[0]) + self.shared.bias[0]
