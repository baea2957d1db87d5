"""Attention weights of routed experts by edge, as PyG returns them.

Shapes: M edges of the graph, L loops that were added, G edges that are returned, H heads, E
experts, B messages (an edge and an expert of its destination).
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from gmoe._checks import check
from gmoe.conv.graph import Graph
from gmoe.conv.messages import Messages

AttentionWeights: TypeAlias = tuple[Tensor, Tensor]
"""The edges and their weights."""


def weights_by_edge(graph: Graph, messages: Messages, alpha_BH: Tensor) -> AttentionWeights:
    """Bring the weights of messages into the order of edges that PyG returns.

    That is the order given, without the loops that new ones replace, then a new loop at each node.

    Args:
        graph: the edges as the layer was called with.
        messages: those of the graph, or of the graph with loops.
        alpha_BH: (B, H) the weight of each message.

    Returns:
        The edges, and weights of shape (G, H) if each destination has one expert by construction,
        else (G, E, H), with zeros where the destination does not use the expert.

    Raises:
        ValueError: a sparse matrix.
    """
    got = "a sparse matrix with return_attention_weights"
    check(not graph.is_sparse, "edge_index", got, "edges of shape (2, number of edges)")
    looped = messages.graph
    num_given, num_all = graph.num_edges, looped.num_edges
    is_loop = graph.edge_index[0] == graph.edge_index[1]

    # 1. The edge of each message, as numbered in the order given, then the new loops.
    edge_B = messages.of_edges(looped.edges.order)
    if looped is not graph:  # which numbers the messages
        edge_M = torch.arange(num_all, device=edge_B.device)
        given_M = graph.adjacency.of_messages(edge_M[:num_given])
        edge_B = torch.cat([given_M, edge_M[num_given:]])[edge_B]

    # 2. Its weights: one row for each edge, or one for each edge and expert.
    routing = messages.routing
    has_one_expert = routing.pairs_each == 1
    rows = 1 if has_one_expert else routing.num_experts
    place_B = edge_B if has_one_expert else edge_B * rows + messages.expert
    empty = alpha_BH.new_zeros(num_all * rows, alpha_BH.size(1))
    alpha = empty.index_copy(0, place_B, alpha_BH)
    if not has_one_expert:
        alpha = alpha.unflatten(0, (num_all, rows))

    # 3. The edges that are left, in PyG's order.
    ends = graph.adj
    if looped is not graph:
        node_L = torch.arange(num_all - num_given, device=ends.device)
        ends = torch.cat([ends, node_L.expand(2, -1)], dim=1)
        kept_G = torch.cat([~is_loop, is_loop.new_ones(node_L.size(0))]).nonzero().view(-1)
        ends, alpha = ends[:, kept_G], alpha[kept_G]
    return ends, alpha
