"""Wide inputs: MoEConv against its three orders of sum and transform as a few lines of bare torch each.

Shapes: N nodes, M edges, I in, O out features, E experts, K experts a node, U rows that experts hear.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmark.measure import Benchmark, Step, layer_step, told
from experiments.benchmark.order import ORDERS, least_of
from gmoe import Graph, MoEConv, TokenChoice
from gmoe.conv.aggregate import Order


@dataclass(frozen=True, kw_only=True)
class WideBenchmark(Benchmark):
    """GCN experts, E = 8, K = 1, forward and backward."""

    shapes: tuple[tuple[int, int, int, int], ...] = (
        (2708, 10_556, 1433, 16),
        (2708, 10_556, 1433, 128),
        (890, 17_700, 2325, 16),
    )
    """Nodes, edges, I and O of each layer; by default two of Cora's size, and a smaller and denser graph."""

    def measured(self) -> dict[str, Any]:
        """``wide``: by layer, the seconds of bare torch in each order and of MoEConv, and the ratio of MoEConv to the
        cheapest of these.

        Raises:
            AssertionError: bare torch does not give what the layer gives.
        """
        found = {}
        for (nodes, edges, width, out), shared in told(itertools.product(self.shapes, (False, True)), "layer"):
            name = f"{nodes} nodes, {edges} edges, {width} to {out}{', shared expert' * shared}"
            found[name] = self._layer(nodes, edges, width, out, shared)
        return {"wide": found}

    def _layer(self, nodes: int, edges: int, width: int, out: int, shared: bool) -> dict[str, Any]:
        device = self.torch_device()
        options: Any = {"router_kwargs": {"balance": None}, "dense_start": False, "shared_expert": shared}
        with device:
            layer = MoEConv("gcn", width, out, num_experts=8, k=1, **options)
            graph = Graph(torch.randint(nodes, (2, edges)), nodes)
            x, grad = torch.randn(nodes, width), torch.randn(nodes, out)
        steps: dict[str, Step] = {}
        for order in ORDERS:
            bare = Bare(layer, graph, order)
            torch.testing.assert_close(bare(x), layer(x, graph), rtol=1e-3, atol=1e-4)
            steps[f"bare {order}"] = layer_step(bare, (x,), grad)
        steps["MoEConv"] = layer_step(layer, (x, graph.seeing(False)), grad)
        steps["MoEConv, features of the last call"] = layer_step(layer, (x, graph), grad)
        least = least_of(steps, self.repeats, device)
        return least | {"ratio": least["MoEConv"] / min(least[f"bare {order}"] for order in ORDERS)}


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

    def __init__(self, layer: MoEConv, graph: Graph, order: Order) -> None:
        super().__init__()
        assert isinstance(layer.router, TokenChoice)
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
