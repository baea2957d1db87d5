"""The experts of a MoEConv. Shapes: T tokens (destinations), D, O widths, E experts, P pairs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.graph import Graph
from gmoe.dispatch import Backend
from gmoe.experts import LinearExperts
from gmoe.routing import Routing

MakeConv = Callable[[int], MessagePassing]
"""Makes a fresh conv for the expert of that index."""


class ConvExperts(nn.Module, ABC):
    """E convs under one routing: the weighted sum of their outputs, as if each ran on the whole graph.

    Called with a graph of S sources and T destinations. Its destinations are the first of its sources, unless it is
    bipartite.
    """

    takes_two_sets: bool = True
    """True if sources and destinations may be two sets of nodes."""
    flow: str
    """PyG's ``flow`` of the convs."""

    @abstractmethod
    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Tensor | None, routing: Routing) -> Tensor:
        """(T, O) the mixture; ``h`` is what :meth:`aggregate` gave."""

    def on_all(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Tensor | None) -> Tensor:
        """(T, O) a single expert's output at every token."""
        return self(graph, x_src, x_dst, h, to_one(x_dst))

    def aggregate(self, graph: Graph, x_src: Tensor) -> Tensor | None:
        """(T, D) the sum over neighbors that all experts share, if they do."""
        return None

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of features that the experts take; ``None`` where each conv sees to it."""
        return None

    @property
    def too_far(self) -> list[MessagePassing]:
        """Convs whose output at a node follows from more than in-edges, their ends, and the graph's norms."""
        return []

    @abstractmethod
    def convs(self) -> list[MessagePassing]:
        """PyG convs whose arguments are those of the experts."""

    @abstractmethod
    def expert(self, index: int) -> MessagePassing:
        """A detached copy of one expert as a plain PyG conv."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""

    @abstractmethod
    def become(self, conv: MessagePassing) -> None:
        """Make every expert a copy of this conv, which is of their kind."""


class StackedExperts(ConvExperts):
    """E convs of one class and the same options, their parameters stacked.

    A subclass says in ``parts`` where the parameters of a conv lie; filling, resetting and ``expert`` follow.

    Args:
        convs: the E convs.
        make: makes such a conv.
        backend: of the grouped product.
    """

    prototype: Any

    def __init__(self, convs: Sequence[MessagePassing], make: MakeConv, backend: Backend) -> None:
        super().__init__()
        self.make = make
        self.num_experts = len(convs)
        self.flow = convs[0].flow
        self.build(convs, backend)
        self.fill(convs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Without the prototype: explainers count a hop for each MessagePassing module, and the layer is one already.

        It has no parameters; what goes by children (``to``, ``train``, ``state_dict``) reaches it.
        """
        hidden = set(self.prototype.modules())
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if module not in hidden:
                yield name, module

    @staticmethod
    def accepts(conv: Any) -> bool:
        """True if this conv, with its options, can be run this way."""
        return True

    @abstractmethod
    def build(self, convs: Sequence[Any], backend: Backend) -> None:
        """Set ``prototype`` and the stacked parameters up."""

    @abstractmethod
    def parts(self, conv: Any) -> list[tuple[Any, Any]]:
        """Pairs of (LinearExperts, linear layer) or (stacked tensor, tensor) of a conv."""

    def _tensors(self, conv: Any, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor of a conv behind its place among the stacked ones."""
        for ours, part in self.parts(conv):
            if isinstance(ours, LinearExperts):
                yield ours.weight[expert].T, part.weight
                if ours.bias is not None:
                    yield ours.bias[expert], part.bias
            else:
                yield ours[expert], part

    def convs(self) -> list[MessagePassing]:
        return [self.prototype]

    @torch.no_grad()
    def fill(self, convs: Sequence[MessagePassing]) -> None:
        for expert, conv in enumerate(convs):
            for place, value in self._tensors(conv, expert):
                place.copy_(value)

    @property
    def dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), None)

    def become(self, conv: MessagePassing) -> None:
        self.fill([conv] * self.num_experts)

    def reset_parameters(self) -> None:
        with torch.random.fork_rng(devices=[]):  # what is drawn while building is thrown away
            made = [self.make(expert) for expert in range(self.num_experts)]
        for conv in made:
            conv.reset_parameters()
        self.fill(made)

    @torch.no_grad()
    def expert(self, index: int) -> MessagePassing:
        first = next(self.parameters())
        with torch.random.fork_rng(devices=[]):  # to look at an expert must not change what is drawn next
            conv = self.make(index).to(first)
        for place, value in self._tensors(conv, index):
            value.copy_(place)
        return conv.train(self.training)


def to_one(x_TD: Tensor) -> Routing:
    """Every token to a single expert, with weight 1."""
    token, ones = torch.arange(len(x_TD), device=x_TD.device), x_TD.new_ones(len(x_TD))
    return Routing(token, all_of(x_TD), ones, ones[:, None], len(x_TD), checked=True)


def all_of(x_TD: Tensor) -> Tensor:
    """(1,) the offsets of a single expert, which has all tokens."""
    return x_TD.new_full((1,), len(x_TD), dtype=torch.int32)


def stacked(linear: Any, num_experts: int, backend: Backend) -> LinearExperts:
    """One linear layer like this one for each expert."""
    out, width = linear.weight.shape
    return LinearExperts(width, out, num_experts, bias=linear.bias is not None, backend=backend)


class MixedExperts(ConvExperts):
    """Groups of experts, each run in its own way on the pairs of its experts.

    Args:
        groups: the groups.
        members: for each group, the indices of its experts.
    """

    def __init__(self, groups: Sequence[ConvExperts], members: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups: Any = nn.ModuleList(groups)
        self.members = [tuple(indices) for indices in members]
        self.flow = groups[0].flow
        self.takes_two_sets = all(group.takes_two_sets for group in groups)

    @property
    def too_far(self) -> list[MessagePassing]:
        return [conv for group in self.groups for conv in group.too_far]

    @property
    def dtype(self) -> torch.dtype | None:
        return next((group.dtype for group in self.groups if group.dtype is not None), None)

    def convs(self) -> list[MessagePassing]:
        return [conv for group in self.groups for conv in group.convs()]

    def reset_parameters(self) -> None:
        for group in self.groups:
            group.reset_parameters()

    def become(self, conv: MessagePassing) -> None:
        raise ValueError("start: got 'copies' for experts of several kinds, expected 'shared' or 'plain'")

    def expert(self, index: int) -> MessagePassing:
        group, place = next((g, m.index(index)) for g, m in zip(self.groups, self.members, strict=True) if index in m)
        return group.expert(place)

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Tensor | None, routing: Routing) -> Tensor:
        outs = []
        for group, indices in zip(self.groups, self.members, strict=True):
            outs.append(group(graph, x_src, x_dst, group.aggregate(graph, x_src), routing.select(experts=indices)))
        return torch.stack(outs).sum(dim=0)  # refuses other widths, which a sum would broadcast


def refuse_far(convs: Iterable[MessagePassing]) -> None:
    """Refuse convs that have no layer-wise inference.

    Raises:
        RuntimeError: there are some.
    """
    names = ", ".join(sorted({type(conv).__name__ for conv in convs}))
    if names:
        way = "call the model on the whole graph, or say local=True of your conv"
        raise RuntimeError(f"inference: {names} looks further than one hop, or is not known not to; {way}")


def tokens_of(routing: Routing) -> Iterator[Tensor]:
    """The tokens of each expert, in order."""
    return iter(routing.token.split(routing.load.tolist()))


def probe_copy(module: nn.Module) -> Any:
    """A float64 copy on the CPU, in training mode and without dropout, to be tried out; random if it has no values."""
    probe: Any = copy.deepcopy(module)
    if any(value.is_meta for value in (*probe.parameters(), *probe.buffers())):
        probe, generator = probe.to_empty(device="cpu"), torch.Generator().manual_seed(0)
        for parameter in probe.parameters():
            nn.init.normal_(parameter, generator=generator)
        for buffer in probe.buffers():
            buffer.fill_(1)
    probe = probe.cpu().double().train()
    for part in probe.modules():
        rate = getattr(part, "dropout", None)  # of PyG's layers: a number, or one for each layer
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(rate, float | list):
            part.dropout = 0.0 if isinstance(rate, float) else [0.0] * len(rate)
    return probe
