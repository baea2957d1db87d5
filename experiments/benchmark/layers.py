"""A layer of message passing forward and backward: dense, with experts, and others' experts.

Shapes: N nodes, D width, E experts, K experts a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn import HeteroLinear
from torch_geometric.utils import to_torch_csr_tensor, to_undirected
from tqdm import tqdm

import gmoe
from experiments.benchmark.measure import (
    Measurement,
    Steps,
    check_equal,
    layer_step,
    peak_bytes,
    take_turns,
)
from gmoe import MoEConv

NODE = 128
"""D of a node."""


def power_law_graph(nodes: int, edges: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw a graph with in-degrees by a power law: ``edge_index``, and CSR.

    Uniform nodes cite others by weights of a power law (exponent 2.7), in both directions.
    """
    if edges is None:
        edges = nodes * 1_166_243 // 169_343  # as many a node as in ogbn-arxiv
    cited = torch.multinomial(torch.rand(nodes).pow(-1 / 1.7), edges, replacement=True)
    edge_index = to_undirected(
        torch.stack([cited, torch.randint(nodes, (edges,))]), num_nodes=nodes
    )
    return edge_index, to_torch_csr_tensor(edge_index.flip([0]), size=(nodes, nodes))


class Masked(nn.Module):
    """What public GNN-MoEs do.

    Every expert of ``layer`` runs on the whole graph, and the routing is a mask.
    """

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        self.convs = nn.ModuleList(
            layer.experts.expert(index) for index in range(layer.num_experts)
        )

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the sum of all experts' outputs, most of them times zero."""
        weights = self.router(x).to_dense().T
        return torch.stack(
            [w_N[:, None] * conv(x, adj) for w_N, conv in zip(weights, self.convs, strict=True)]
        ).sum(0)


class Grouped(nn.Module):
    """What PyG offers.

    GCN aggregates once, and HeteroLinear takes the expert as the type of a row.
    """

    def __init__(self, layer: MoEConv) -> None:
        super().__init__()
        self.router: Any = layer.router
        experts: list[Any] = [layer.experts.expert(index) for index in range(layer.num_experts)]
        self.linear = HeteroLinear(
            layer.in_channels, layer.out_channels, layer.num_experts, is_sorted=True
        )
        self.linear.weight = nn.Parameter(torch.stack([expert.lin.weight.T for expert in experts]))
        self.linear.bias = nn.Parameter(torch.stack([expert.bias for expert in experts]))
        self.conv = experts[0]
        self.conv.lin = nn.Identity()
        self.conv.bias = None

    def forward(self, x: Tensor, adj: Any) -> Tensor:
        """(N, D) the weighted sum of each node's experts."""
        routing = self.router(x)
        y = self.linear(self.conv(x, adj)[routing.token], routing.expert) * routing.weight[:, None]
        return y.new_zeros(x.size(0), y.size(1)).index_add(0, routing.token, y)


@dataclass(frozen=True, kw_only=True)
class LayersBenchmark(Measurement):
    """One layer on a random graph, as the plain mixture and as it is by default (with a shared
    expert), beside a dense conv; E masked ones and PyG's HeteroLinear (of GCN experts) are
    checked to equal the plain one. The default size is ogbn-arxiv's."""

    conv: str = "gcn"
    """The conv, by the name that MoEConv takes; those of attention have 4 heads."""
    nodes: int = 169_343
    """Nodes of the graph."""
    edges: int | None = None
    """Edges, before the reverse of each is added; by default as many a node as in ogbn-arxiv."""
    experts: tuple[int, ...] = (8,)
    """Numbers of experts, E."""
    ks: tuple[int, ...] = (1, 2)
    """Experts per node, K."""
    adjacency: tuple[Literal["edge_index", "csr"], ...] = ("edge_index", "csr")
    """How edges are given; every variant of a form is compared with the dense conv in that form."""
    masked: bool = True
    """Time E masked convs and HeteroLinear too."""
    repeats: int = 7
    """Timed runs of each variant."""

    def measured(self) -> dict[str, Any]:
        """By variant ``wall`` and ``cpu``, see :func:`take_turns`; ``flops`` of one run;
        ``memory``, the most bytes that it holds at once; ``ratio``, each of these (of times the
        median) over that of the dense conv with edges in the same form."""
        device = torch.device(self.device)
        with device:
            forms = list(self.forms())
        steps = {name: step for form in forms for name, step in form.items()}
        by_variant = take_turns(steps, self.repeats, device)
        for name, step in tqdm(steps.items(), desc="costs", leave=False, disable=None):
            costs = {"flops": gmoe.count_flops(step), "memory": peak_bytes(step, device)}
            by_variant[name] |= costs
        for form in forms:
            base = by_variant[next(iter(form))]
            for name in form:
                figures = by_variant[name]
                figures["ratio"] = {
                    clock: figures[clock]["median"] / base[clock]["median"]
                    for clock in ("wall", "cpu")
                }
                figures["ratio"] |= {of: figures[of] / base[of] for of in ("flops", "memory")}
        return by_variant

    def forms(self) -> Iterator[Steps]:
        """For each form of the edges what is compared, the dense conv first."""
        graphs = power_law_graph(self.nodes, self.edges)
        by_form = dict(zip(("edge_index", "csr"), graphs, strict=True))
        x = torch.randn(self.nodes, NODE, requires_grad=True)
        heads: dict[str, Any] = {"heads": 4} if self.conv in ("gat", "gatv2", "transformer") else {}
        build: Any = partial(MoEConv, self.conv, NODE, NODE // heads.get("heads", 1), **heads)
        sizes = {f"E={e} K={k}": {"num_experts": e, "k": k} for e in self.experts for k in self.ks}
        # Others are compared with what the layer gives, which noise would change
        plain = {"start": "plain", "router_kwargs": {"balance": None}}
        layers = {name: build(**size, **plain) for name, size in sizes.items()}
        others = {"masked": Masked} | ({"HeteroLinear": Grouped} if self.conv == "gcn" else {})
        for form in self.adjacency:
            inputs = (x, by_form[form])
            timed = {"dense": next(iter(layers.values())).experts.expert(0)}
            timed |= {f"MoEConv {name}": layer for name, layer in layers.items()}
            for name, size in sizes.items():
                timed[f"default MoEConv {name}"] = build(**size)
            for name, layer in layers.items() if self.masked else ():
                for kind, make in others.items():
                    timed[f"{kind} {name}"] = other = make(layer)
                    check_equal(kind, other(*inputs), layer(*inputs))
            yield {f"{name}, {form}": layer_step(layer, inputs) for name, layer in timed.items()}
