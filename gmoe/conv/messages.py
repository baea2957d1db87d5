"""What a routing makes of a graph's edges where experts send messages of their own.

Shapes: N sources, T tokens (destinations), I in, H heads, E experts, P (token, expert) pairs, M
messages (an edge and an expert of its destination), U rows (a source and an expert that needs it).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import lazy, operator
from gmoe.blocks import AtRows
from gmoe.conv.base import is_plain
from gmoe.conv.graph import Graph
from gmoe.edges import Edges
from gmoe.portable import cast
from gmoe.products import combine, dispatch, grouped_linear
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
        self.token = routing.token
        """(P,) the token of each pair."""
        self.from_sources = graph.edges.of(self.token, number)
        """The messages from the sources to the pairs; ``order`` has the edge of each."""
        self.message_offsets = self.from_sources.ptr[routing.offsets.long()].to(torch.int32)
        """(E,) cumulative ends of each expert's messages."""

    @lazy
    def pair_starts(self) -> Tensor:
        """(E + 1,) where each expert's pairs start, and the end of all."""
        return _starts(self.routing.offsets)

    @lazy
    def pair_expert(self) -> Tensor:
        """(P,) the expert of each pair, ascending."""
        return self.routing.expert

    @lazy
    def expert(self) -> Tensor:
        """(M,) the expert of the pair that receives each message, ascending."""
        return self.pair_expert.index_select(0, self.from_sources.receiver)

    @lazy
    def rows(self) -> Rows:
        """The sources that each expert transforms, by as few host syncs as the device takes."""
        num_experts, num_sources = self.routing.num_experts, self.graph.num_src
        source = self.from_sources.sender
        number = None
        if source.device.type != "cpu":
            # At most each message has a row of its own, and each expert all sources. The host knows
            # that; for the number itself it would wait.
            number = min(source.size(0), num_experts * num_sources)
        return Rows(*find_rows(self.expert, source, num_experts, num_sources, number))

    @lazy
    def from_rows(self) -> Edges:
        """The messages from the rows to the pairs."""
        row_M = self.rows.place[self.expert, self.from_sources.sender]
        return self.edges_from(row_M, self.rows.source.size(0))

    def edges_from(self, sender: Tensor, num_senders: int) -> Edges:
        """The messages to the pairs, sent by something else than rows.

        Args:
            sender: (M,) what sends each message.
            num_senders: how many there are.
        """
        return replace(self.from_sources, sender=sender, num_senders=num_senders)

    def rows_by(self, linear: Any, x_NI: Tensor, /) -> Tensor:
        """(U, O) the source of each row, transformed by its expert's layer."""
        rows = self.rows
        if not is_plain(linear):
            return linear(x_NI.index_select(0, rows.source), rows.offsets)
        weight_EIO, bias_EO = linear.weight.mT, linear.bias
        return grouped_linear(x_NI, weight_EIO, bias_EO, rows.offsets, source_P=rows.source)

    def tokens_by(self, linear: Any, x_TI: Tensor, /) -> Tensor:
        """(P, O) the token of each pair, transformed by its expert's layer."""
        return linear(dispatch(x_TI, self.routing), self.routing.offsets)

    def pairs_by(self, linear: Any, x_PI: Tensor, /) -> Tensor:
        """(P, O) each pair, transformed by its expert's layer."""
        return linear(x_PI, self.routing.offsets)

    def pairs_times(self, x_PI: Tensor, weight_EIO: Tensor, /) -> Tensor:
        """(P, O) each pair times its expert's weight."""
        return grouped_linear(x_PI, weight_EIO, None, self.routing.offsets)

    def times(self, x_MI: Tensor, weight_EIO: Tensor, /) -> Tensor:
        """(M, O) each message times its expert's weight."""
        return grouped_linear(x_MI, weight_EIO, None, self.message_offsets)

    def combine(self, y_PO: Tensor, /) -> Tensor:
        """(T, O) the mixture of the pairs."""
        return combine(y_PO, self.routing)

    def of_edges(self, value_M: Tensor, /) -> Tensor:
        """(M, ...) what the edge of each message has."""
        return value_M.index_select(0, self.from_sources.order)

    def at_pairs(self, value_E: Tensor, /) -> Tensor:
        """(P, ...) what the expert of each pair has."""
        return to_messages(value_E, self.pair_starts, self.pair_expert)

    def at_rows(self, value_E: Tensor, /) -> Tensor:
        """(U, ...) what the expert of each row has."""
        return to_messages(value_E, _starts(self.rows.offsets), self.rows.expert)

    def pairs_of_rows(self, value_U: Tensor, /) -> Tensor:
        """(P, ...) the rows of the pairs' own tokens, where each has a loop."""
        return value_U.index_select(0, self.rows.place[self.pair_expert, self.token])

    @lazy
    def source_place(self) -> Tensor:
        """(M,) the place of each message's source and expert among all sources and experts."""
        source = self.from_sources.sender
        return torch.add(self.expert, source, alpha=self.routing.num_experts)

    @lazy
    def token_place(self) -> Tensor:
        """(P,) the place of each pair among all tokens and experts."""
        return torch.add(self.pair_expert, self.token, alpha=self.routing.num_experts)

    def by_source(self, value_NEH: Tensor) -> Tensor:
        """(M, H) what each message's source and expert have."""
        return value_NEH.flatten(0, 1).index_select(0, self.source_place)

    def by_token(self, value_TEH: Tensor) -> Tensor:
        """(P, H) what each pair's token and expert have."""
        return value_TEH.flatten(0, 1).index_select(0, self.token_place)


class AllMessages(Messages):
    """The same where each expert transforms all nodes, those that it does not need, too.

    Each source has a row for each expert, which nobody has to find. Where each token has one
    expert, pairs are tokens and messages are edges: nothing has to be sorted.
    """

    def __init__(self, graph: Graph, routing: Routing) -> None:
        self.has_one_each = routing.pairs_each == 1
        if not self.has_one_each:
            super().__init__(graph, routing)
            return
        self.graph = graph
        self.routing = routing
        self.token = torch.arange(graph.num_dst, device=graph.edges.ptr.device)
        self.from_sources = graph.edges

    @lazy
    def choices(self) -> Any:
        """The experts and weights of the tokens, where each has one; else ``None``."""
        return self.routing.by_token if self.has_one_each else None

    @lazy
    def pair_expert(self) -> Tensor:
        return self.routing.expert if self.choices is None else self.choices.expert_TK.view(-1)

    @lazy
    def from_rows(self) -> Edges:
        num_rows = self.graph.num_src * self.routing.num_experts
        return self.edges_from(self.source_place, num_rows)

    def rows_by(self, linear: Any, x_NI: Tensor, /) -> Tensor:
        return _all_by(linear, x_NI, self.routing.num_experts)

    def tokens_by(self, linear: Any, x_TI: Tensor, /) -> Tensor:
        return self.rows_by(linear, x_TI).index_select(0, self.token_place)

    def pairs_by(self, linear: Any, x_PI: Tensor, /) -> Tensor:
        return self._own(self.rows_by(linear, x_PI), self.pair_expert)

    def pairs_times(self, x_PI: Tensor, weight_EIO: Tensor, /) -> Tensor:
        return self._own(_by_all(x_PI, weight_EIO), self.pair_expert)

    def times(self, x_MI: Tensor, weight_EIO: Tensor, /) -> Tensor:
        return self._own(_by_all(x_MI, weight_EIO), self.expert)

    def combine(self, y_PO: Tensor, /) -> Tensor:
        if self.choices is None:
            return super().combine(y_PO)
        return y_PO * cast(self.choices.weight_TK, y_PO.dtype)

    def of_edges(self, value_M: Tensor, /) -> Tensor:
        return value_M if self.has_one_each else super().of_edges(value_M)

    def at_pairs(self, value_E: Tensor, /) -> Tensor:
        return AtRows.apply(value_E, self.pair_expert)

    def at_rows(self, value_E: Tensor, /) -> Tensor:
        return value_E.expand(self.graph.num_src, *value_E.shape).flatten(0, 1)

    def pairs_of_rows(self, value_U: Tensor, /) -> Tensor:
        return value_U.index_select(0, self.token_place)

    def _own(self, y_RO: Tensor, expert_P: Tensor) -> Tensor:
        """(P, O) of each row that all experts transformed, what its own expert made of it."""
        row_P = torch.arange(expert_P.size(0), device=expert_P.device)
        place_P = torch.add(expert_P, row_P, alpha=self.routing.num_experts)
        return y_RO.index_select(0, place_P)


class DenseMessages(Messages):
    """The same of a single expert at all tokens, which then are the pairs.

    The rows are the sources, and the messages are the edges: nothing has to be found.

    Args:
        graph: the edges, self-loops included.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.from_sources = graph.edges
        self.message_offsets = graph.edges.ptr[-1:].to(torch.int32)

    @property
    def from_rows(self) -> Edges:
        return self.from_sources

    # Pairs are the tokens, rows the sources, messages the edges, and all have the one expert.

    def rows_by(self, linear: Any, x_NI: Tensor, /) -> Tensor:
        return _all_by(linear, x_NI, 1)

    tokens_by = pairs_by = rows_by

    def times(self, x_MI: Tensor, weight_EIO: Tensor, /) -> Tensor:
        return x_MI @ weight_EIO.squeeze(0)

    pairs_times = times

    def of_edges(self, value_M: Tensor, /) -> Tensor:
        return value_M

    at_pairs = at_rows = pairs_of_rows = of_edges

    def by_source(self, value_NEH: Tensor) -> Tensor:
        return value_NEH.squeeze(1).index_select(0, self.from_sources.sender)

    def by_token(self, value_TEH: Tensor) -> Tensor:
        return value_TEH.squeeze(1)


def _all_by(linear: Any, x_NI: Tensor, num_experts: int) -> Tensor:
    """(N E, O) each row, transformed by the layer of each expert."""
    if is_plain(linear):
        weight_EOI, bias_EO = linear.weight, linear.bias  # with a base, a sum at each read
        bias_F = None if bias_EO is None else bias_EO.flatten()
        y_NF = F.linear(cast(x_NI, weight_EOI.dtype), weight_EOI.flatten(0, 1), bias_F)
        return y_NF.view(-1, weight_EOI.size(1))
    ends_E = x_NI.size(0) * torch.arange(1, num_experts + 1, device=x_NI.device)
    y_UO = linear(x_NI.repeat(num_experts, 1), ends_E.to(torch.int32))
    return y_UO.unflatten(0, (num_experts, -1)).transpose(0, 1).flatten(0, 1)


def _by_all(x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
    """(R E, O) rows times the weight of each expert."""
    return F.linear(x_RI, weight_EIO.mT.flatten(0, 1)).view(-1, weight_EIO.size(2))


def _starts(offsets_E: Tensor) -> Tensor:
    """(E + 1,) where the rows of each expert start, and the end of all."""
    return F.pad(offsets_E, (1, 0)).long()
