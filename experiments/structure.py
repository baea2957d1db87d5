"""What nodes are like, as far as a routing may follow it. Shapes: N nodes, M edges."""

from __future__ import annotations

import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import degree, remove_self_loops, scatter

BINS = 8
"""At most so many degrees, and shares of homophily, are told apart."""


def node_properties(data: Data) -> dict[str, Tensor]:
    """(N,) integers a property: the ``label``, the in-``degree`` and the local ``homophily`` of every node.

    Homophily is the share of in-neighbors of the same label. Degree and homophily are binned by their quantiles,
    equal values together; nodes without neighbors have a bin of their own. What is not known of a node, since it or
    all its neighbors have no label (below 0), is -1. Without one label a node, ``degree`` alone.
    """
    source, destination = remove_self_loops(data.edge_index)[0]
    found = {"degree": quantile_bins(degree(destination, data.num_nodes))}
    if data.y is not None and data.y.dim() == 1:
        labeled = (data.y[source] >= 0) & (data.y[destination] >= 0)
        source, destination = source[labeled], destination[labeled]
        same = (data.y[source] == data.y[destination]).float()
        share = scatter(same, destination, dim_size=data.num_nodes, reduce="mean")
        heard = degree(destination, data.num_nodes) > 0
        found["homophily"] = quantile_bins(share.where(heard, -1.0)).where(data.y >= 0, -1)
        found["label"] = data.y.clamp(min=-1)
    return found


def quantile_bins(values: Tensor, bins: int = BINS) -> Tensor:
    """(N,) the bin of each value, equal values together: each value its own where there are few; else the bins hold
    about as many values each, as far as equal ones allow."""
    distinct, which, counts = values.unique(return_inverse=True, return_counts=True)
    if len(distinct) <= bins:
        return which
    middle = counts.cumsum(0) - (counts + 1) / 2  # the mean rank of each distinct value
    return (middle / len(values) * bins).long()[which]


def alignment(assignment: Tensor, properties: dict[str, Tensor], seed: int = 0) -> dict[str, float]:
    """Adjusted mutual information (Vinh et al., 2010) of an assignment with each property: 1 the same, 0 by chance.

    It is 0 too where one of them is constant, and so says nothing.

    Args:
        assignment: (N,) integers, such as the expert of each node.
        properties: (N,) integers each; nodes below 0 are left out.
        seed: of the baseline ``"shuffled"``: the largest alignment, in size, of the shuffled assignment.
    """
    if not properties:
        return {}
    shuffled = assignment[torch.randperm(len(assignment), generator=torch.Generator().manual_seed(seed))]
    found = {name: ami(assignment, value) for name, value in properties.items()}
    return found | {"shuffled": max((ami(shuffled, value) for value in properties.values()), key=abs)}


def ami(assignment: Tensor, value: Tensor) -> float:
    """Adjusted mutual information of two partitions, nodes below 0 in ``value`` left out; 0 where one is constant."""
    known = value >= 0
    assignment, value = assignment[known], value[known]
    if len(assignment.unique()) < 2 or len(value.unique()) < 2:
        return 0.0
    return float(adjusted_mutual_info_score(assignment.numpy(), value.numpy()))
