"""Where a node stands in its graph, in six columns: for routers, and for models beside them.

Shapes: N nodes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._checks import check
from gmoe.conv.graph import Graph, Part

COLUMNS = 6
"""The columns of :func:`structure`."""


def structure(x: Tensor, graph: Graph) -> Tensor:
    r"""Degrees, and how unlike its neighbors a node is.

    .. math::
        \log(1 + d_i), \quad \mathrm{mean}_{j \to i} \log(1 + d_j), \quad
        \cos(x_i, m_i), \quad \frac{|x_i - m_i|}{|x_i| + |m_i|}, \quad
        \cos(x_i, n_i), \quad \frac{|x_i - n_i|}{|x_i| + |n_i|}

    with the in-degree :math:`d_i`, the mean :math:`m = \hat A x` over in-edges, and
    :math:`n = \hat A m` over paths of two. Without neighbors the mean is zero, so that a cosine is
    0, and a distance 1, or 0 of a node that is zero, too.

    Args:
        x: (N, D) the nodes.
        graph: of one set of nodes, all of it.

    Returns:
        (N, 6) the columns, in the type of ``x``.

    Raises:
        ValueError: a part of a graph, or two sets of nodes: degrees and neighbors of sources are
            not known there.
    """
    is_whole = not isinstance(graph, Part) and graph.num_src == graph.num_dst == len(x)
    legal = "all of one set of nodes: 'structure' looks two hops far"
    check(is_whole, "graph", f"{graph.num_dst} of {graph.num_src} nodes", legal)
    given = x.dtype
    x = x.to(torch.promote_types(given, torch.float32))  # in half precision 0/0, and large degrees
    log_degree = graph.edges.degree.to(x.device, x.dtype).log1p()[:, None]
    columns = [log_degree, graph.mean(log_degree)]
    mean = x
    for _ in range(2):
        mean = graph.mean(mean)
        scale = x.norm(dim=1) + mean.norm(dim=1)
        # Zero over one where both are zero.
        distance = (x - mean).norm(dim=1) / scale.where(scale > 0, 1)
        columns += [F.cosine_similarity(x, mean, dim=1)[:, None], distance[:, None]]
    return torch.cat(columns, dim=1).to(given)
