"""The position that each sampled node has in the output.

Shapes: S edges drawn, so many sources, which may repeat; L seeds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch_geometric.typing import NodeType


class SharedPositions:
    """One subgraph for all seeds: a table of all nodes of the graph, by type.

    Args:
        sizes: the number of nodes of each type.
        dtype: of the table.
    """

    def __init__(self, sizes: Mapping[NodeType, int], dtype: torch.dtype) -> None:
        self._unseen = torch.iinfo(dtype).max
        # Not as an inference tensor, which cannot be written to outside of that mode.
        with torch.inference_mode(False):
            self._table = {
                kind: torch.full((size,), self._unseen, dtype=dtype) for kind, size in sizes.items()
            }

    def add_seeds(self, kind: NodeType, seed_L: Tensor, _: Tensor | None) -> None:
        """Give the seeds of a type the first positions; a repeated one has that of its first."""
        table = self._table[kind]
        candidate = torch.arange(len(seed_L), dtype=table.dtype)
        table.scatter_reduce_(0, seed_L, candidate, "amin")

    def add(
        self, kind: NodeType, source_S: Tensor, _: Tensor | None, first: int
    ) -> tuple[Tensor, Tensor]:
        """Give sources without a position the next ones, from ``first`` on.

        Returns:
            (S,) the positions, and which of the sources are new: where each appears first.
        """
        table = self._table[kind]
        new = _number(table, source_S, first)
        return table.index_select(0, source_S).long(), new

    def clear(self, nodes: Mapping[NodeType, Tensor]) -> None:
        """Forget these nodes, which is cheaper than a new table."""
        for kind, nodes_of_kind in nodes.items():
            self._table[kind].index_fill_(0, nodes_of_kind, self._unseen)


class SeparatePositions:
    """A subgraph for each seed: sorted lists of the pairs (seed, node) that have a position.

    A table of all pairs would take the memory of the graph's nodes for each seed.

    Args:
        sizes: the number of nodes of each type.
    """

    def __init__(self, sizes: Mapping[NodeType, int]) -> None:
        none = torch.empty(0, dtype=torch.int64)
        self._sizes = sizes
        self._pairs = dict.fromkeys(sizes, none)  # as seed * size + node, ascending
        self._positions = dict.fromkeys(sizes, none)  # of each pair

    def add_seeds(self, kind: NodeType, seed_L: Tensor, batch_L: Tensor) -> None:
        """Give the seeds of a type the first positions."""
        self.add(kind, seed_L, batch_L, 0)

    def add(
        self, kind: NodeType, source_S: Tensor, batch_S: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Give sources without a position in their seed's subgraph the next ones.

        Args:
            kind: the type of the sources.
            source_S: nodes.
            batch_S: the number of the seed in whose subgraph each is.
            first: the next free position.

        Returns:
            (S,) the positions, and which of the sources are new: where each appears first.
        """
        known = self._pairs[kind]
        pair_S = batch_S * self._sizes[kind] + source_S
        pairs, place = torch.cat([known, pair_S]).unique(return_inverse=True)
        position = torch.full((len(pairs),), torch.iinfo(torch.int64).max)
        position[place[: len(known)]] = self._positions[kind]
        place_S = place[len(known) :]
        new = _number(position, place_S, first)
        self._pairs[kind] = pairs
        self._positions[kind] = position
        return position.index_select(0, place_S), new


def _number(position: Tensor, place_S: Tensor, first: int) -> Tensor:
    """Give places without a position the next ones, in order of appearance.

    Args:
        position: of all places, larger than any other where there is none; changed in place.
        place_S: some of the places, which may repeat.
        first: the next free position.

    Returns:
        Which of the places are new: where each that had no position appears first, ascending.
    """
    # Candidates are larger than every position that is taken, so that the minimum keeps those, and
    # gives a new place that appears several times its first candidate.
    candidate_S = torch.arange(first, first + len(place_S), dtype=position.dtype)
    position.scatter_reduce_(0, place_S, candidate_S, "amin")
    new = (position.index_select(0, place_S) == candidate_S).nonzero().view(-1)
    # Without the gaps that repeated places left.
    position[place_S.index_select(0, new)] = candidate_S[: len(new)]
    return new
