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

    Homophily is the share of in-neighbours of the same label. Degree and homophily are binned by their quantiles,
    equal values together; nodes without neighbours have a bin of their own. Without one label a node, ``degree`` alone.
    """
    source, destination = remove_self_loops(data.edge_index)[0]
    in_degree = degree(destination, data.num_nodes)
    found = {"degree": quantile_bins(in_degree)}
    if data.y is not None and data.y.dim() == 1:
        same = (data.y[source] == data.y[destination]).float()
        share = scatter(same, destination, dim_size=data.num_nodes, reduce="mean")
        found["homophily"] = quantile_bins(share.where(in_degree > 0, -1.0))
        found["label"] = data.y
    return found


def quantile_bins(values: Tensor, bins: int = BINS) -> Tensor:
    """(N,) the bin of each value; the bins hold about as many values each, as far as equal values allow."""
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    places = (inner * (len(values) - 1)).round().long()
    edges = values.sort().values[places].unique()
    return torch.bucketize(values, edges)


def alignment(assignment: Tensor, properties: dict[str, Tensor], seed: int = 0) -> dict[str, float]:
    """Adjusted mutual information (Vinh et al., 2010) of an assignment with each property: 1 the same, 0 by chance.

    Args:
        assignment: (N,) integers, such as the expert of each node.
        properties: (N,) integers each.
        seed: of the control ``"shuffled"``: the largest alignment, in size, of the shuffled assignment.
    """
    if not properties:
        return {}
    order = torch.randperm(len(assignment), generator=torch.Generator().manual_seed(seed))
    given, shuffled = assignment.numpy(), assignment[order].numpy()
    found = {name: float(adjusted_mutual_info_score(given, value.numpy())) for name, value in properties.items()}
    control = [float(adjusted_mutual_info_score(shuffled, value.numpy())) for value in properties.values()]
    return found | {"shuffled": max(control, key=abs)}
