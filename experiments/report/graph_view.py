"""Which nodes each expert handles. Shapes: N nodes, M edges, E experts (and one more row for nodes without any)."""

from __future__ import annotations

import csv
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import k_hop_subgraph, remove_self_loops, subgraph, to_networkx

from experiments.routing_stats import primary_expert
from experiments.structure import node_properties
from gmoe import Routing
from vision.patch_maps import palette

MOST_DRAWN = 250
"""Nodes of a drawing."""

NOBODY = (0.85, 0.85, 0.85)
"""The color of nodes without an expert."""


def heat_maps(graph: Data, routing: Routing, classes: tuple[str, ...] = (), planted: Tensor | None = None) -> Figure:
    """Of each expert's nodes, the share of every class, degree and local homophily, and of every planted region where
    there are some; the last row is all nodes."""
    expert = primary_expert(routing)
    properties = node_properties(graph)
    if planted is not None:
        properties["planted"] = planted
    order = [name for name in ("planted", "label", "degree", "homophily") if name in properties]
    rows = [str(number) for number in range(routing.num_experts)]
    rows += ["none"] if (expert == routing.num_experts).any() else []
    figure = Figure(figsize=(4.2 * len(order), 1.4 + 0.32 * len(rows)), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(order), squeeze=False)[0], order, strict=True):
        value = properties[name]
        known = value >= 0
        columns = value[known]
        if name in ("degree", "homophily"):  # equal values share a bin, so that some numbers are of none
            columns = columns.unique(return_inverse=True)[1]
        counts = contingency(expert[known], columns, routing.num_experts + 1)
        table = np.concatenate([counts[: len(rows)], counts.sum(axis=0, keepdims=True)])
        share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        image = axis.imshow(share, aspect="auto", cmap="Blues", vmin=0)
        axis.set_yticks(range(len(rows) + 1), [*rows, "all"])
        axis.set(xlabel=CAPTIONS[name], ylabel="expert")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if name == "label" and len(classes) == share.shape[1]:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize="x-small")
        figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


CAPTIONS = {
    "planted": "planted region",
    "label": "class",
    "degree": "in-degree (bin)",
    "homophily": "local homophily (bin)",
}
"""Of the columns of a heat map."""


def contingency(rows: Tensor, columns: Tensor, num_rows: int) -> np.ndarray:
    """How often each pair of values occurs, (num_rows, largest column + 1)."""
    width = int(columns.max()) + 1 if len(columns) else 1
    flat = (rows * width + columns).bincount(minlength=num_rows * width)
    return flat.view(num_rows, width).numpy().astype(float)


def edges_within(graph: Data, routing: Routing, repeats: int = 10, seed: int = 0) -> tuple[float, float]:
    """The share of edges, self-loops aside, whose ends have the same expert; and that by chance.

    Chance is the mean over shuffles of the experts among the nodes. Nodes without an expert count as one more.

    Args:
        graph: with ``edge_index``.
        routing: of all its nodes.
        repeats: shuffles.
        seed: of the shuffles.
    """
    source, destination = remove_self_loops(graph.edge_index)[0]
    if len(source) == 0:
        return float("nan"), float("nan")
    expert = primary_expert(routing)
    generator = torch.Generator().manual_seed(seed)

    def share(assignment: Tensor) -> float:
        return float((assignment[source] == assignment[destination]).float().mean())

    shuffled = [share(expert[torch.randperm(len(expert), generator=generator)]) for _ in range(repeats)]
    return share(expert), sum(shuffled) / len(shuffled)


def drawn_nodes(graph: Data, expert: Tensor, most: int = MOST_DRAWN) -> Tensor:
    """All nodes of a small graph; else the surroundings of a node of median degree of each expert, as many nodes each.

    Args:
        graph: with ``edge_index``.
        expert: (N,) of every node.
        most: nodes in all.
    """
    assert graph.num_nodes is not None
    if graph.num_nodes <= most:
        return torch.arange(graph.num_nodes)
    degree = graph.edge_index[1].bincount(minlength=graph.num_nodes)
    parts = []
    kinds = expert.unique()[:most]
    for kind in kinds:
        members = (expert == kind).nonzero().view(-1)
        center = members[degree[members].argsort(stable=True)[len(members) // 2]]
        parts.append(_surroundings(graph, int(center), most // len(kinds)))
    return torch.cat(parts).unique()


def _surroundings(graph: Data, center: int, most: int) -> Tensor:
    """The nodes around one, hop by hop; of the last hop some."""
    nodes = torch.tensor([center])
    for hops in range(1, most):
        grown, *_ = k_hop_subgraph(center, hops, graph.edge_index, num_nodes=graph.num_nodes)
        if len(grown) == len(nodes):
            break  # the whole component
        if len(grown) > most:
            last = grown[~torch.isin(grown, nodes)]
            return torch.cat([nodes, last[: most - len(nodes)]])
        nodes = grown
    return nodes


def drawing(graph: Data, routing: Routing, seed: int = 0) -> Figure:
    """A part of the graph twice: its nodes colored by expert, and by class."""
    expert = primary_expert(routing)
    nodes = drawn_nodes(graph, expert)
    assert graph.num_nodes is not None
    edges, _ = subgraph(nodes, graph.edge_index, relabel_nodes=True, num_nodes=graph.num_nodes)
    small = to_networkx(Data(edge_index=edges, num_nodes=len(nodes)), to_undirected=True, remove_self_loops=True)
    places = nx.spring_layout(small, seed=seed, iterations=100)
    expert = expert[nodes]
    colors = [*(tuple(color) for color in palette(routing.num_experts).tolist()), NOBODY]
    sides = [("expert", expert, colors, routing.num_experts)]
    if graph.y is not None and graph.y.dim() == 1:
        label = graph.y[nodes]
        count = int(graph.y.max()) + 1
        shades = [*(tuple(color) for color in palette(count).tolist()), NOBODY]
        sides.append(("class", label.where(label >= 0, count), shades, count))
    figure = Figure(figsize=(6 * len(sides), 5.6), layout="constrained")
    for axis, (name, value, shades, count) in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        nx.draw_networkx_edges(small, places, ax=axis, alpha=0.25, width=0.6)
        nx.draw_networkx_nodes(small, places, ax=axis, node_size=28, node_color=[shades[v] for v in value.tolist()])
        seen = [number for number in range(count + 1) if (value == number).any()]
        if len(seen) <= 20:
            handles = [Patch(color=shades[n], label=str(n) if n < count else "none") for n in seen]
            axis.legend(handles=handles, title=name, fontsize="x-small", loc="lower left")
        axis.set_title(f"by {name}")
        axis.set_axis_off()
    return figure


def write_csv(routings: list[Routing], path: Path) -> None:
    """``layer,node,expert,weight``, a row a pair."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "node", "expert", "weight"])
        for layer, routing in enumerate(routings):
            order = routing.token.argsort(stable=True)
            columns = (value[order].tolist() for value in (routing.token, routing.expert, routing.weight))
            writer.writerows(
                (layer, node, expert, f"{weight:.6g}") for node, expert, weight in zip(*columns, strict=True)
            )
