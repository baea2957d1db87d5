"""How the experts of a MoEConv are run. Shapes: T tokens (destinations), D, I, O widths, E experts, P pairs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.graph import Graph
from gmoe.conv.pieces import Piece, Pieces
from gmoe.dispatch import Backend
from gmoe.routing import Routing

MakeConv = Callable[[int], MessagePassing]
"""Makes a fresh conv for the expert of that index."""


class ConvExperts(nn.Module, ABC):
    """E convs under one routing: the weighted sum of their outputs, as if each ran on the whole graph."""

    @abstractmethod
    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        """(T, O) the mixture; ``aggregate`` is what :meth:`aggregate` gave."""

    transforms_first: bool = False
    """Whether :meth:`forward` does better without the aggregate, where the router does not need it."""

    def aggregate(self, x_src: Tensor, graph: Graph) -> Tensor | None:
        """(T, D) what the convs aggregate, where that is the same for all experts; else ``None``."""
        return None

    def aggregate_by_pieces(self, x: Tensor, pieces: Pieces) -> Tensor | None:
        """:meth:`aggregate` of all nodes of a large graph."""
        return None

    def by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        """:meth:`forward` of all nodes of a large graph.

        Raises:
            RuntimeError: a conv looks further than one hop.
        """

        def near(x: Tensor, piece: Piece) -> Tensor:
            out: Tensor = self(x, x, None, piece.graph.with_args_of(self.prototypes()), piece.routing(routing))
            return out

        return pieces.map(near, x)

    @abstractmethod
    def prototypes(self) -> list[MessagePassing]:
        """PyG convs whose arguments and ``flow`` are those of the experts."""

    @abstractmethod
    def expert(self, index: int) -> MessagePassing:
        """A detached copy of one expert as a plain PyG conv."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""


class StackedExperts(ConvExperts):
    """E convs of one class and the same options, their parameters stacked.

    Args:
        make: makes the conv of an expert.
        num_experts: E.
        backend: of the grouped product.
    """

    prototype: MessagePassing

    def __init__(self, make: MakeConv, num_experts: int, backend: Backend) -> None:
        super().__init__()
        self.make = make
        self.num_experts = num_experts
        template = make(0)
        assert self.accepts(template)
        self._build(template, backend)
        self._fill([make(expert) for expert in range(num_experts)])

    @staticmethod
    @abstractmethod
    def accepts(conv: Any) -> bool:
        """Whether this conv, with its options, can be run this way."""

    @abstractmethod
    def _build(self, template: Any, backend: Backend) -> None:
        """Set ``prototype`` and the stacked parameters up, for convs like ``template``."""

    @abstractmethod
    def _fill(self, convs: list[Any]) -> None:
        """Take the parameters of E separate convs over, initialised as PyG does."""

    @abstractmethod
    def _unfill(self, conv: Any, index: int) -> None:
        """Give a fresh conv the parameters of one expert."""

    def prototypes(self) -> list[MessagePassing]:
        return [self.prototype]

    def _rows_by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        """:meth:`forward` of experts that, given the aggregate, look at each node by itself."""
        outs = []
        for start in range(0, max(x.size(0), 1), pieces.batch_size):
            end = min(start + pieces.batch_size, x.size(0))
            near = None if aggregate is None else aggregate[start:end].to(pieces.device)
            part = x[start:end].to(pieces.device)
            graph = Graph(_no_edges(part), end - start, end - start, {})
            outs.append(self(part, part, near, graph, routing.between(start, end)).to(x.device))
        return torch.cat(outs)

    def reset_parameters(self) -> None:
        with torch.random.fork_rng(devices=[]):  # what is drawn while building is thrown away
            made = [self.make(expert) for expert in range(self.num_experts)]
        for conv in made:
            conv.reset_parameters()
        self._fill(made)

    @torch.no_grad()
    def expert(self, index: int) -> MessagePassing:
        first = next(self.parameters())
        with torch.random.fork_rng(devices=[]):  # to look at an expert must not change what is drawn next
            conv = self.make(index).to(device=first.device, dtype=first.dtype)
        self._unfill(conv, index)
        return conv.train(self.training)


def _no_edges(like: Tensor) -> Tensor:
    return torch.empty(2, 0, dtype=torch.long, device=like.device)


def tokens_of(routing: Routing) -> Iterator[Tensor]:
    """The tokens of each expert, in order."""
    return iter(routing.token.split(routing.load.tolist()))


def without_dropout(module: nn.Module) -> nn.Module:
    """A float64 copy in training mode that drops nothing, to be probed."""
    probe = copy.deepcopy(module).double().train()
    for part in probe.modules():
        rate: Any = getattr(part, "dropout", None)  # as PyG's layers call it: a number, or one for each layer
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(rate, float):
            setattr(part, "dropout", 0.0)  # noqa: B010
        elif isinstance(rate, list):
            setattr(part, "dropout", [0.0] * len(rate))  # noqa: B010
    return probe
