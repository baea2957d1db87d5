"""Pictures of a graph for the report: its nodes colored by expert."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import networkx as nx
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse.csgraph import breadth_first_order
from torch import Tensor
from torch_geometric.utils import degree, subgraph, to_scipy_sparse_matrix

from gmoe.plot import palette

MOST_NODES = 300
"""A drawing of more is a cloud."""
PARTS = 6
"""Of a larger graph so many neighborhoods are drawn."""
MOST_PANELS = 6
NONE = (0.85, 0.85, 0.85)
"""The color of a node without a value: an unknown class, or no expert."""


def neighborhoods(edge_index: Tensor, num_nodes: int, most: int = MOST_NODES) -> Tensor:
    """The nodes to draw: all of a small graph, else some around each of six nodes.

    These six have ordinary degrees, since a hub in the middle would make a star of any graph.
    There are several because one neighborhood may lie in one region.
    """
    if num_nodes <= most:
        return torch.arange(num_nodes)
    source, destination = edge_index
    degrees = degree(destination, num_nodes) + degree(source, num_nodes)
    by_degree = degrees.argsort(stable=True)[int((degrees == 0).sum()) :]
    places = torch.linspace(0.25, 0.75, PARTS) * (len(by_degree) - 1)
    starts = by_degree[places.long()] if len(by_degree) else torch.arange(PARTS)
    edges = to_scipy_sparse_matrix(edge_index, num_nodes=num_nodes).tocsr()
    # Hop by hop, against edges too
    reached = partial(breadth_first_order, edges, directed=False, return_predecessors=False)
    parts = [reached(start)[: most // PARTS] for start in starts.tolist()]
    return torch.from_numpy(np.concatenate(parts)).long().unique()


def draw_nodes(edge_index: Tensor, num_nodes: int, values: Mapping[str, Tensor]) -> Figure:
    """The same nodes in the same places, once for each (N,) of integers, in its values' colors.

    Values below 0 are gray. Of more than six the first six are drawn.
    """
    nodes = neighborhoods(edge_index, num_nodes)
    edges, _ = subgraph(nodes, edge_index, relabel_nodes=True, num_nodes=num_nodes)
    graph = nx.Graph()
    graph.add_nodes_from(range(len(nodes)))
    graph.add_edges_from(edges.T.tolist())
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    places = nx.spring_layout(graph, seed=0)
    panels = list(values.items())[:MOST_PANELS]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, value) in zip(figure.axes, panels, strict=False):
        colors = [*palette(num_experts=max(1, int(value.max()) + 1)), NONE]
        shown = [colors[max(number, -1)] for number in value[nodes].tolist()]
        nx.draw_networkx_edges(graph, places, ax=axis, edge_color="#c8ccd0", width=0.5)
        nx.draw_networkx_nodes(
            graph, places, ax=axis, node_color=shown, node_size=22, linewidths=0, edgecolors="none"
        )
        axis.set_title(title, fontsize=10)
    return figure
