"""Message passing: one dense conv, E masked convs, and a MoEConv, forward and backward.

Shapes: N nodes, D features, E experts, K experts a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import HeteroLinear
from torch_geometric.utils import to_torch_csr_tensor

import gmoe
from experiments.benchmark.options import Benchmark, layer_step, measure
from experiments.throughput import power_law_edges
from gmoe.conv.kinds import Make

ADJACENCIES = ("edge_index", "csr")


@dataclass(frozen=True, kw_only=True)
class ConvBenchmark(Benchmark):
    """One layer on a random graph; the default size is ogbn-arxiv's, with both directions of every edge."""

    conv: str = "gcn"
    """The conv, by the name that MoEConv takes."""
    heads: int = 1
    """Attention heads, of the convs that have them; they divide the output."""
    nodes: int = 169_343
    """Nodes."""
    edges: int = 1_166_243
    """Edges, before the reverse of each is added."""
    width: int = 128
    """Features in."""
    out: int = 128
    """Features out."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per node, K."""
    adjacency: tuple[str, ...] = ADJACENCIES
    """How edges are given; every variant of a form is compared with the dense conv in that form."""
    masked: bool = True
    """Time E convs on the whole graph too, each masked by the routing, and of GCN experts PyG's HeteroLinear on the
    aggregate; and check that the layer equals them."""

    def run(self) -> dict[str, Any]:
        """Measure.

        Returns:
            By variant, the figures of :func:`measure`; the reference is the dense conv on the same adjacency.

        Raises:
            ValueError: an unknown form of adjacency, or heads that do not divide the output.
            RuntimeError: the layer does not equal its masked convs.
        """
        for form in self.adjacency:
            if form not in ADJACENCIES:
                raise ValueError(f"adjacency: got {form!r}, expected one of {', '.join(ADJACENCIES)}")
        if self.out % self.heads:
            raise ValueError(f"out: got {self.out}, expected a multiple of heads={self.heads}")
        device, variants = self.torch_device(), {}
        generator = torch.Generator().manual_seed(self.seed)
        adjacencies = random_graph(self.nodes, self.edges, generator)
        x = torch.randn(self.nodes, self.width, generator=generator).to(device).requires_grad_()
        grad = torch.randn(self.nodes, self.out, generator=generator).to(device)
        kwargs: dict[str, Any] = {"heads": self.heads} if self.heads > 1 else {}
        torch.manual_seed(self.seed)
        try:
            dense = Make([self.conv], self.width, self.out // self.heads, (), kwargs)(0).to(device)
        except ValueError as error:
            if not kwargs:
                raise
            raise ValueError(f"heads: got {self.heads}, but {self.conv} takes none") from error
        layers = {
            (e, k): gmoe.MoEConv(
                self.conv,
                self.width,
                self.out // self.heads,
                num_experts=e,
                k=k,
                shared_expert=False,
                router_kwargs={"balance": None},  # others are compared with what it gives, which noise would change
                **kwargs,
            ).to(device)
            for e in self.experts
            for k in self.ks
            if k <= e
        }
        for form in self.adjacency:
            adj = adjacencies[form].to(device)
            variants[f"dense, {form}"] = layer_step(dense, (x, adj), grad)
            for (e, k), layer in layers.items():
                variants[f"MoEConv E={e} K={k}, {form}"] = layer_step(layer, (x, adj), grad)
            if self.masked:
                for (e, k), layer in layers.items():
                    others: dict[str, torch.nn.Module] = {"masked": Masked(layer)}
                    if self.conv == "gcn":
                        others["HeteroLinear"] = ByHeteroLinear(layer)
                    for name, other in others.items():
                        _check_equal(layer, other, x, adj)
                        variants[f"{name} E={e} K={k}, {form}"] = layer_step(other, (x, adj), grad)
        return measure(variants, self.repeats, device, lambda variant: f"dense, {variant.rsplit(', ', 1)[1]}")


def random_graph(nodes: int, edges: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A random graph by form of adjacency: both directions of ``edges`` edges."""
    edge_index = power_law_edges(nodes, edges, generator)
    return {"edge_index": edge_index, "csr": to_torch_csr_tensor(edge_index.flip([0]), size=(nodes, nodes))}


class Masked(torch.nn.Module):
    """What public GNN-MoEs do: every expert of ``layer`` on the whole graph, and the routing as a mask."""

    def __init__(self, layer: gmoe.MoEConv) -> None:
        super().__init__()
        self.router = layer.router
        self.convs = torch.nn.ModuleList(layer.experts.expert(index) for index in range(layer.num_experts))

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, out) the sum of all experts' outputs, most of them times zero."""
        assert self.router is not None
        weight_NE = self.router(x).to_dense()
        return torch.stack([weight_NE[:, index, None] * conv(x, adj) for index, conv in enumerate(self.convs)]).sum(
            dim=0
        )


class ByHeteroLinear(torch.nn.Module):
    """What PyG offers: GCN's aggregate once, and its HeteroLinear with the expert as the type of a row.

    Args:
        layer: of GCN experts, whose router and weights it takes.
    """

    def __init__(self, layer: gmoe.MoEConv) -> None:
        super().__init__()
        self.router = layer.router
        experts: list[Any] = [layer.experts.expert(index) for index in range(layer.num_experts)]
        self.conv = experts[0]
        self.conv.lin, self.conv.bias = torch.nn.Identity(), None
        self.linear = HeteroLinear(layer.in_channels, layer.out_channels, layer.num_experts, is_sorted=True)
        with torch.no_grad():
            for index, expert in enumerate(layer.experts.expert(index) for index in range(layer.num_experts)):
                self.linear.weight[index].copy_(expert.lin.weight.T)
                self.linear.bias[index].copy_(expert.bias)

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, out) the weighted sum of each node's experts."""
        assert self.router is not None
        routing = self.router(x)
        aggregate = self.conv(x, adj)
        y = self.linear(aggregate[routing.token], routing.expert) * routing.weight[:, None]
        return y.new_zeros(x.size(0), y.size(1)).index_add(0, routing.token, y)


@torch.no_grad()
def _check_equal(layer: torch.nn.Module, masked: torch.nn.Module, x: Tensor, adj: Any) -> None:
    ours, theirs = layer(x, adj), masked(x, adj)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
        far = float((ours - theirs).abs().max())
        raise RuntimeError(f"the layer and its masked convs differ by {far}, expected rounding only")
