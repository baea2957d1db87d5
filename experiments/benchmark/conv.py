"""Message passing: one dense conv, E masked convs, and a MoEConv, forward and backward.

Shapes: N nodes, D features, E experts, K experts a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn import HeteroLinear
from torch_geometric.utils import to_torch_csr_tensor

from experiments.benchmark.measure import Benchmark, Step, Steps, check_equal, layer_step, power_law_edges
from gmoe import MoEConv
from gmoe.conv.graph import parameters_of
from gmoe.conv.kinds import factory_of


@dataclass(frozen=True, kw_only=True)
class ConvBenchmark(Benchmark):
    """One layer on a random graph; the default size is ogbn-arxiv's, with both directions of every edge."""

    conv: str = "gcn"
    """The conv, by the name that MoEConv takes."""
    heads: int = 1
    """Attention heads, of the convs that have them; they divide the width."""
    nodes: int = 169_343
    """Nodes."""
    edges: int = 1_166_243
    """Edges, before the reverse of each is added."""
    width: int = 128
    """Features in and out."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per node, K."""
    adjacency: tuple[Literal["edge_index", "csr"], ...] = ("edge_index", "csr")
    """How edges are given; every variant of a form is compared with the dense conv in that form."""
    masked: bool = True
    """Time E convs on the whole graph too, each masked by the routing, and of GCN experts PyG's HeteroLinear on the
    aggregate; and check that the layer equals them."""

    SMALL: ClassVar = {"repeats": 3, "nodes": 5000, "edges": 34_000}

    def steps(self) -> Steps:
        if self.width % self.heads:
            raise ValueError(f"width: got {self.width}, expected a multiple of heads={self.heads}")
        edge_index = power_law_edges(self.nodes, self.edges)
        csr = to_torch_csr_tensor(edge_index.flip([0]), size=(self.nodes, self.nodes))
        x, grad = torch.randn(self.nodes, self.width, requires_grad=True), torch.randn(self.nodes, self.width)
        # others are compared with what the layer gives, which noise would change
        options: dict[str, Any] = {"shared_expert": False, "router_kwargs": {"balance": None}}
        if self.heads > 1:
            options["heads"] = self.heads
        layers = {
            f"E={e} K={k}": MoEConv(self.conv, self.width, self.width // self.heads, num_experts=e, k=k, **options)
            for e in self.experts
            for k in self.ks
            if k <= e
        }
        if not layers:
            raise ValueError(f"ks: got {self.ks}, expected one of at most experts={self.experts}")
        dense = next(iter(layers.values())).experts.expert(0)
        steps: dict[str, Step] = {}
        for form in self.adjacency:
            inputs = (x, edge_index if form == "edge_index" else csr)
            steps[f"dense, {form}"] = layer_step(dense, inputs, grad)
            for name, layer in layers.items():
                steps[f"MoEConv {name}, {form}"] = layer_step(layer, inputs, grad)
            for name, layer in layers.items() if self.masked else ():
                others = {"masked": Masked(layer)} | ({"HeteroLinear": Grouped(layer)} if self.conv == "gcn" else {})
                for kind, other in others.items():
                    check_equal(kind, other(*inputs), layer(*inputs))
                    steps[f"{kind} {name}, {form}"] = layer_step(other, inputs, grad)
        return steps

    def reference(self, variant: str) -> str:
        return f"dense, {variant.rsplit(', ', 1)[1]}"


@dataclass(frozen=True, kw_only=True)
class MoleculesBenchmark(Benchmark):
    """Graph convs with gmoe's defaults in their place, on a batch of many small graphs, as PyG's molecule examples."""

    conv: str = "gine"
    """The conv, by the name that MoEConv takes."""
    molecules: int = 128
    """Graphs in the batch, of 10 to 40 atoms, each bonded to the next and, one in six, to another."""
    width: int = 64
    """Features in and out, and of a bond."""
    layers: int = 4
    """Layers."""
    experts: int = 8
    """Experts, E."""

    SMALL: ClassVar = {"repeats": 3, "molecules": 16}

    def steps(self) -> Steps:
        sizes = torch.randint(10, 41, (self.molecules,))
        atoms, nodes = int(sizes.sum()), torch.arange(int(sizes.sum()))
        batch = torch.arange(self.molecules).repeat_interleave(sizes)
        chain = torch.stack([nodes[:-1], nodes[1:]])[:, batch[:-1] == batch[1:]]
        rings = chain[:, torch.randperm(chain.size(1))[: chain.size(1) // 6]] + torch.tensor([[0], [3]])
        rings = rings[:, (rings[1] < atoms) & (batch[rings[0]] == batch[rings[1].clamp(max=atoms - 1)])]
        bonds = torch.cat([chain, rings], dim=1)
        edge_index = torch.cat([bonds, bonds.flip(0)], dim=1)
        with_bonds = "edge_attr" in parameters_of(factory_of(self.conv)(self.width, self.width))
        attr = (torch.randn(edge_index.size(1), self.width),) if with_bonds else ()
        x, grad = torch.randn(atoms, self.width, requires_grad=True), torch.randn(atoms, self.width)
        kinds: dict[str, Any] = {
            "dense": factory_of(self.conv),
            "MoEConv": partial(MoEConv, self.conv, num_experts=self.experts),
        }
        stacks = {name: Stack(kind(self.width, self.width) for _ in range(self.layers)) for name, kind in kinds.items()}
        return {name: layer_step(stack, (x, edge_index, *attr), grad) for name, stack in stacks.items()}

    def reference(self, variant: str) -> str:
        return "dense"


class Stack(nn.ModuleList):
    """Convs one after the other, with ReLU."""

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        """(N, D)"""
        for conv in self:
            x = conv(x, *edges).relu()
        return x


class Masked(nn.Module):
    """What public GNN-MoEs do: every expert of ``layer`` on the whole graph, and the routing as a mask."""

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        self.convs = nn.ModuleList(layer.experts.expert(index) for index in range(layer.num_experts))

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the sum of all experts' outputs, most of them times zero."""
        weight_NE = self.router(x).to_dense()
        return torch.stack(
            [w_N[:, None] * conv(x, adj) for w_N, conv in zip(weight_NE.T, self.convs, strict=True)]
        ).sum(0)


class Grouped(Masked):
    """What PyG offers: GCN's aggregate once, and its HeteroLinear with the expert as the type of a row."""

    def __init__(self, layer: MoEConv) -> None:
        super().__init__(layer)
        self.linear = HeteroLinear(layer.in_channels, layer.out_channels, layer.num_experts, is_sorted=True)
        experts: list[Any] = list(self.convs)
        with torch.no_grad():
            for index, expert in enumerate(experts):
                self.linear.weight[index].copy_(expert.lin.weight.T)
                self.linear.bias[index].copy_(expert.bias)
        experts[0].lin, experts[0].bias, self.conv = nn.Identity(), None, experts[0]
        del self.convs

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the weighted sum of each node's experts."""
        routing = self.router(x)
        y = self.linear(self.conv(x, adj)[routing.token], routing.expert) * routing.weight[:, None]
        return y.new_zeros(x.size(0), y.size(1)).index_add(0, routing.token, y)
