"""What a routing makes of a graph's edges where experts send messages of their own.

Shapes: N sources, T tokens (destinations), I in, H heads, E experts, P (token, expert) pairs, M
messages (an edge and an expert of its destination), U rows (a source and an expert that needs it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe import portable
from gmoe._autograd import lazy, operator
from gmoe.conv.graph import Graph
from gmoe.edges import Edges
from gmoe.portable import exported_as
from gmoe.products import dispatch
from gmoe.routing import Routing
from gmoe.sums import to_messages


class Rows(NamedTuple):
    """What experts transform: U rows, one for each (expert, source) with a message, ascending.

    Args:
        expert: (U,) the expert of each row.
        source: (U,) its source.
        offsets: (E,) int32, cumulative ends of each expert's rows.
        place: (E, N) the position of (expert, source) among the rows, if it is one.
    """

    expert: Tensor
    source: Tensor
    offsets: Tensor
    place: Tensor


def _empty_rows(
    expert: Tensor, _: Tensor, num_experts: int, num_sources: int, number: int | None
) -> tuple[Tensor, ...]:
    num_rows = torch.library.get_ctx().new_dynamic_size() if number is None else number
    return (
        expert.new_empty(num_rows),
        expert.new_empty(num_rows),
        expert.new_empty(num_experts, dtype=torch.int32),
        expert.new_empty(num_experts, num_sources),
    )


@operator(fake=_empty_rows)
def find_rows(
    expert: Tensor, source: Tensor, num_experts: int, num_sources: int, number: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The :class:`Rows` of messages, given the expert and the source of each.

    If a number is given, there are so many rows: those left over are copies of the last one, from
    which nothing is sent. It must be large enough.
    """
    is_row = expert.new_zeros(num_experts, num_sources, dtype=torch.bool)
    is_row[expert, source] = True
    rows_up_to = is_row.view(-1).cumsum(0)  # each cell included
    if number is None:
        cell = is_row.view(-1).nonzero().view(-1)
    else:
        rank = torch.arange(number, device=expert.device).minimum(rows_up_to[-1:] - 1)
        cell = torch.searchsorted(rows_up_to, rank, right=True)
    row_expert, row_source = cell // num_sources, cell % num_sources
    experts = torch.arange(num_experts, device=expert.device)
    offsets = torch.searchsorted(row_expert, experts, right=True, out_int32=True)
    return row_expert, row_source, offsets, rows_up_to.view_as(is_row) - 1


@exported_as(portable.all_rows)
def _rows_of(
    expert: Tensor, source: Tensor, num_experts: int, num_sources: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The :class:`Rows` of messages, by as few host syncs as the device takes."""
    number = None
    if source.device.type != "cpu":
        # At most each message has a row of its own, and each expert all sources. The host knows
        # that; for the number itself it would wait.
        number = min(source.size(0), num_experts * num_sources)
    return find_rows(expert, source, num_experts, num_sources, number)


class Messages:
    """The in-edges of each pair of a routing, pair by pair.

    One message runs along each edge for each expert of its destination.

    Args:
        graph: the edges, self-loops included.
        routing: the pairs.
    """

    def __init__(self, graph: Graph, routing: Routing) -> None:
        self.graph = graph
        self.routing = routing
        number = None
        if routing.pairs_each is not None:
            number = routing.pairs_each * graph.edges.sender.numel()
        self.edge, self.pair, self.ptr = graph.edges.of(routing.token, number)
        """(M,) the edge of each message; (M,) the pair that receives it, ascending; and (P + 1,)
        where the messages of each pair start."""
        self.source = graph.edges.sender.index_select(0, self.edge)
        """(M,) the node that sends it."""
        self.pair_offsets = routing.offsets
        """(E,) cumulative ends of each expert's pairs."""
        self.message_offsets = self.ptr[routing.offsets.long()].to(torch.int32)
        """(E,) cumulative ends of each expert's messages."""

    @lazy
    def pair_starts(self) -> Tensor:
        """(E + 1,) where each expert's pairs start, and the end of all."""
        return _starts(self.pair_offsets)

    @lazy
    def pair_expert(self) -> Tensor:
        """(P,) the expert of each pair, ascending."""
        return self.routing.expert

    @lazy
    def expert(self) -> Tensor:
        """(M,) the expert of the pair that receives each message, ascending."""
        return self.pair_expert.index_select(0, self.pair)

    @lazy
    def rows(self) -> Rows:
        """The sources that each expert transforms."""
        num_experts, num_sources = self.routing.num_experts, self.graph.num_src
        return Rows(*_rows_of(self.expert, self.source, num_experts, num_sources))

    @lazy
    def from_rows(self) -> Edges:
        """The messages from the rows to the pairs."""
        row_M = self.rows.place[self.expert, self.source]
        return self.edges_from(row_M, self.rows.source.size(0))

    @property
    def row_offsets(self) -> Tensor:
        """(E,) int32, cumulative ends of each expert's rows."""
        return self.rows.offsets

    def edges_from(self, sender: Tensor, num_senders: int) -> Edges:
        """The messages to the pairs, sent by something else than rows.

        Args:
            sender: (M,) what sends each message.
            num_senders: how many there are.
        """
        return Edges(self.ptr, sender, self.pair, num_senders, self.edge)

    @lazy
    def from_sources(self) -> Edges:
        """The messages from the sources to the pairs."""
        return self.edges_from(self.source, self.graph.num_src)

    def of_pairs(self, x_TI: Tensor, /) -> Tensor:
        """(P, I) the token of each pair."""
        return dispatch(x_TI, self.routing)

    def of_rows(self, x_NI: Tensor, /) -> Tensor:
        """(U, I) the source of each row."""
        return x_NI.index_select(0, self.rows.source)

    def of_edges(self, value_M: Tensor, /) -> Tensor:
        """(M, ...) what the edge of each message has."""
        return value_M.index_select(0, self.edge)

    def at_pairs(self, value_E: Tensor, /) -> Tensor:
        """(P, ...) what the expert of each pair has."""
        return to_messages(value_E, self.pair_starts, self.pair_expert)

    def at_rows(self, value_E: Tensor, /) -> Tensor:
        """(U, ...) what the expert of each row has."""
        return to_messages(value_E, _starts(self.rows.offsets), self.rows.expert)

    def pairs_of_rows(self, value_U: Tensor, /) -> Tensor:
        """(P, ...) the rows of the pairs' own tokens, where each has a loop."""
        return value_U.index_select(0, self.rows.place[self.pair_expert, self.routing.token])

    def by_source(self, value_NEH: Tensor) -> Tensor:
        """(M, H) what each message's source and expert have."""
        place_M = self.source * self.routing.num_experts + self.expert
        return value_NEH.flatten(0, 1).index_select(0, place_M)

    def by_token(self, value_TEH: Tensor) -> Tensor:
        """(P, H) what each pair's token and expert have."""
        place_P = self.routing.token * self.routing.num_experts + self.pair_expert
        return value_TEH.flatten(0, 1).index_select(0, place_P)


class DenseMessages(Messages):
    """The same of a single expert at all tokens, which then are the pairs.

    The rows are the sources, and the messages are the edges: nothing has to be found.

    Args:
        graph: the edges, self-loops included.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.pair = graph.edges.receiver
        self.ptr = graph.edges.ptr
        self.source = graph.edges.sender
        self.pair_offsets = _ends_of_one(graph.num_dst, self.source)
        self.message_offsets = _ends_of_one(self.source.numel(), self.source)

    @property
    def from_rows(self) -> Edges:
        return self.graph.edges

    from_sources = from_rows

    @property
    def row_offsets(self) -> Tensor:
        return _ends_of_one(self.graph.num_src, self.source)

    def edges_from(self, sender: Tensor, num_senders: int) -> Edges:
        edges = self.graph.edges
        return Edges(edges.ptr, sender, edges.receiver, num_senders, edges.order)

    # Pairs are the tokens, rows the sources, messages the edges, and all have the one expert.

    def of_pairs(self, x_TI: Tensor, /) -> Tensor:
        return x_TI

    def of_rows(self, x_NI: Tensor, /) -> Tensor:
        return x_NI

    def of_edges(self, value_M: Tensor, /) -> Tensor:
        return value_M

    def at_pairs(self, value_E: Tensor, /) -> Tensor:
        return value_E

    def at_rows(self, value_E: Tensor, /) -> Tensor:
        return value_E

    def pairs_of_rows(self, value_U: Tensor, /) -> Tensor:
        return value_U

    def by_source(self, value_NEH: Tensor) -> Tensor:
        return value_NEH.squeeze(1).index_select(0, self.source)

    def by_token(self, value_TEH: Tensor) -> Tensor:
        return value_TEH.squeeze(1)


def _starts(offsets_E: Tensor) -> Tensor:
    """(E + 1,) where the rows of each expert start, and the end of all."""
    return F.pad(offsets_E, (1, 0)).long()


def _ends_of_one(number: int, like: Tensor) -> Tensor:
    """(1,) the offsets of a single expert that has all of so many."""
    return like.new_full((1,), number, dtype=torch.int32)
