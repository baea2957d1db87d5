"""What one call of a layer knows: its graph, its nodes and, once computed, their shared aggregate.

Shapes: S sources, T tokens (destinations), D width, A columns of the aggregate.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gmoe.conv.graph import Graph


class Call(NamedTuple):
    """What router and experts read of one call of a layer. It never changes.

    A tuple, so that torch finds the tensors in it: ``fully_shard`` casts them, for example.

    Example:
        >>> call = Call(graph, x, x)
        >>> call = call.with_aggregate(experts.aggregate(call))
        >>> y = experts(call, routing)
    """

    graph: Graph
    """From the S sources to the T destinations."""
    x_src: Tensor
    """(S, D) features of the sources."""
    x_dst: Tensor
    """(T, D) features of the destinations; ``x_src`` itself if all nodes of one set are both."""
    aggregate: Tensor | None = None
    """(T, A) the sum over neighbors that all experts share; ``None`` if they share none, and until
    it is computed."""

    def with_aggregate(self, aggregate: Tensor | None) -> Call:
        """The same call, with this aggregate."""
        return Call(self.graph, self.x_src, self.x_dst, aggregate)
