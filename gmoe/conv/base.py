"""The experts of a MoEConv: what all of them have in common, and how they are stacked or mixed.

Shapes: T tokens (destinations), S sources, D in, O out width, A columns of the aggregate, E
experts, P pairs.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe._checks import check
from gmoe._torch import dtype_of
from gmoe.conv.call import Call
from gmoe.conv.explain import HidesPrototype
from gmoe.conv.network import stacked
from gmoe.experts import LinearExperts
from gmoe.portable import refuse_in_export
from gmoe.routing import Routing
from gmoe.stack import (
    Stack,
    become,
    check_stacked,
    fill,
    has_base,
    paths_in,
    routed_parameters,
    stacks_in,
    tensors_of,
)

Conv: TypeAlias = Any
"""A conv of a kind that an experts' class knows: it reads layers of the conv, such as ``conv.lin``,
which :class:`MessagePassing` does not declare."""


class MakeConv(Protocol):
    """Makes a fresh conv for the expert of an index; see :class:`gmoe.conv.kinds.Make`."""

    def __call__(self, expert: int) -> MessagePassing: ...

    def keep(self, kept: Sequence[int]) -> MakeConv:
        """What makes the convs of some experts, which are numbered anew."""


GAIN_SCALE = 0.1
"""Factor of the gain of routed experts, which starts at zero beside a shared expert.

However small the gradient is, Adam moves a number by the learning rate in each step: the factor
keeps the routed experts small where steps and labels are few.
"""


class ConvExperts(nn.Module, ABC):
    """E convs under one routing: the weighted sum of their outputs on the whole graph.

    Called with a :class:`~gmoe.conv.call.Call`: a graph of S sources and T destinations, and their
    features. Unless the graph is bipartite, its destinations are the first of its sources. A layer
    first calls :meth:`aggregate`; router and experts then find its result in the call.
    """

    flow: str
    """PyG's ``flow`` of the convs."""

    @abstractmethod
    def forward(self, call: Call, routing: Routing) -> Tensor:
        """(T, O) the mixture.

        Args:
            call: the graph, the features of its nodes, and what :meth:`aggregate` gave for them.
            routing: of the T destinations.
        """

    def on_all(self, call: Call) -> Tensor:
        """(T, O) a single expert's output at every token; for layers of one expert only."""
        return self(call, to_one(call.x_dst))

    def aggregate(self, call: Call, routing: Routing | None = None) -> Tensor | None:
        """(T, A) the sum over neighbors that all experts share; ``None`` if they share none.

        It follows from the graph and the sources alone.

        Args:
            call: what is known so far.
            routing: the decision, if the experts alone see the sum: then ``None``, too, if they sum
                in the order of its pairs.
        """
        return None

    @property
    def aggregate_width(self) -> int | None:
        """A, the columns of :meth:`aggregate`; ``None`` if they are as many as the sources'.

        The router's width follows from it before any call. Where :meth:`aggregate` gives ``None``,
        the router sees the mean over in-edges, which has as many columns as the sources.
        """
        return None

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of which a token uses those of its own experts: all but a base's."""
        return routed_parameters(self)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of features that the experts take; ``None`` if each conv checks it."""
        return None

    @property
    def too_far(self) -> list[MessagePassing]:
        """Convs whose output at a node needs more than in-edges, their ends, and norms."""
        return []

    @abstractmethod
    def convs(self) -> list[MessagePassing]:
        """PyG convs that take the same arguments as the experts."""

    @abstractmethod
    def expert(self, index: int) -> MessagePassing:
        """A detached copy of one expert as a plain PyG conv."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""

    def check_kept(self, kept: Sequence[int]) -> None:
        """Refuse what :meth:`keep` cannot do, before anything changes."""
        return

    @abstractmethod
    def keep(self, kept: Sequence[int]) -> None:
        """Take all other experts away, in place; those that stay are numbered anew.

        Args:
            kept: the experts that stay, ascending.

        Raises:
            ValueError: parts that are parametrized, or were replaced.
        """


class StackedExperts(HidesPrototype, ConvExperts, Stack):
    """E convs of one class and the same options, their parameters stacked.

    A subclass names its :attr:`parts` and implements ``forward``; filling, resetting and ``expert``
    follow. Each part is an attribute under PyG's name: a tensor of the conv as one (E, ...), a
    linear layer as :class:`gmoe.LinearExperts`, a network of layers as the same network of those,
    and ``None`` where the options of the convs leave a part out.

    Args:
        convs: the E convs.
        make: makes such a conv.

    Raises:
        ValueError: the convs have a parameter that no part names: nothing would train it.
    """

    parts: tuple[str, ...]
    """Names of the layers and tensors of a conv that are stacked, all that have parameters."""
    prototype: Conv
    """A conv without these parts, whose options are those of all experts."""

    def __init__(self, convs: Sequence[MessagePassing], make: MakeConv) -> None:
        super().__init__()
        self.make = make
        self._num_experts = len(convs)
        self.flow = convs[0].flow
        self.build(convs)
        forgotten = [name for name, _ in self.prototype.named_parameters()]
        got = f"{self.parts} in {type(self).__name__}"
        whole = f"parts that hold all parameters of {type(convs[0]).__name__}"
        check(not forgotten, "parts", got, f"{whole}, {', '.join(forgotten)} too")
        self.paths = paths_in(self)
        self.to(dtype=dtype_of(convs[0]))  # before they are filled: float64 convs are not rounded
        for expert, conv in enumerate(convs):
            fill(self, expert, tensors_in(conv))
        # From here on, what somebody changes in any of the stacks is noted in one place.
        self.changes.clear()
        for _, stack in stacks_in(self):
            stack.changes = self.changes

    @staticmethod
    def accepts(conv: Conv) -> bool:
        """True if a conv with these options can be stacked in this class."""
        return True

    def build(self, convs: Sequence[Conv]) -> None:
        """Make room for the stacked parts, and the prototype of the first conv.

        The constructor calls it once, with ``num_experts`` and ``flow`` already set, and fills the
        parts afterwards. The convs must stay as they are.

        Args:
            convs: the E convs, which agree in their options and in the shapes of their parameters.
        """
        self.prototype = copy.deepcopy(convs[0])
        self.prototype.flow = "source_to_target"  # as edges run inside a graph
        layers: list[nn.Module] = []
        for name in self.parts:
            part = getattr(convs[0], name, None) if self.is_used(name, convs[0]) else None
            if not isinstance(part, nn.Module):
                self.add(name, part, self.num_experts)
            elif part in layers:  # one layer may stand for both ends, under two names
                setattr(self, name, None)
            else:
                setattr(self, name, stacked(part, self.num_experts))
                layers.append(part)
            setattr(self.prototype, name, None)

    def is_used(self, name: str, conv: Conv) -> bool:
        """False for a part that a conv has, but never runs."""
        return True

    def convs(self) -> list[MessagePassing]:
        return [self.prototype]

    def draw(self, conv: MessagePassing, experts: Iterable[int]) -> None:
        """Draw the parameters of these experts, each by a reset of this conv."""
        for expert in experts:
            conv.reset_parameters()
            fill(self, expert, tensors_in(conv))

    @property
    def dtype(self) -> torch.dtype | None:
        return dtype_of(self)

    def become(self, conv: MessagePassing) -> None:
        """Make every expert a copy of this conv, which must be of their kind."""
        become(self, tensors_in(conv))

    def _check_parts(self) -> None:
        """Refuse experts of which some tensors are elsewhere, or others than when they were built.

        Raises:
            ValueError: a part that was replaced, as by an adapter's or by ``nn.Linear``s.
        """
        names = paths_in(self)
        legal = "merge adapters, remove parametrizations, and unstack last"
        got = f"parameters {', '.join(names)}"
        check(names == self.paths, "experts", got, f"{', '.join(self.paths)}: {legal}")

    def check_kept(self, kept: Sequence[int]) -> None:
        check_stacked(self)

    def keep(self, kept: Sequence[int]) -> None:
        self.check_kept(kept)
        for _, stack in stacks_in(self):
            Stack.keep(stack, kept)
        self.make = self.make.keep(kept)

    def reset_parameters(self) -> None:
        self._check_parts()
        # What a conv draws when it is built is thrown away.
        with torch.random.fork_rng(devices=[]):
            conv = self.make(0)
        if has_base(self):
            conv.reset_parameters()
            self.become(conv)
        else:
            self.draw(conv, range(self.num_experts))

    @torch.no_grad()
    def expert(self, index: int) -> MessagePassing:
        self._check_parts()
        like = next(self.parameters())
        # Looking at an expert must not change what is drawn next.
        with torch.random.fork_rng(devices=[]):
            conv = self.make(index).to(like)
        places = tensors_in(conv)
        for path, value in tensors_of(self, index).items():
            places[path].copy_(value)
        return conv.train(self.training)


def tensors_in(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, by path."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def to_one(x_TD: Tensor) -> Routing:
    """Route every token to a single expert, with weight 1."""
    number = x_TD.size(0)
    token = torch.arange(number, device=x_TD.device)
    ones = x_TD.new_ones(number)
    return Routing(token, all_of(x_TD), ones, ones[:, None], number, slot=token, validate=False)


def all_of(x_TD: Tensor) -> Tensor:
    """(1,) the offsets of a single expert that has all tokens."""
    return x_TD.new_full((1,), x_TD.size(0), dtype=torch.int32)


def is_plain(linear: nn.Module) -> bool:
    """True if a kernel may read the layer's weight: nobody replaced it or hooked it."""
    return type(linear) is LinearExperts and not linear.changes


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

    @property
    def too_far(self) -> list[MessagePassing]:
        return [conv for group in self.groups for conv in group.too_far]

    @property
    def dtype(self) -> torch.dtype | None:
        dtypes = [group.dtype for group in self.groups if group.dtype is not None]
        return dtypes[0] if dtypes else None

    def convs(self) -> list[MessagePassing]:
        return [conv for group in self.groups for conv in group.convs()]

    def reset_parameters(self) -> None:
        for group in self.groups:
            group.reset_parameters()

    def check_kept(self, kept: Sequence[int]) -> None:
        for group in self.groups:
            group.check_kept(kept)

    def keep(self, kept: Sequence[int]) -> None:
        groups = []
        members = []
        for group, indices in zip(self.groups, self.members, strict=True):
            places = [place for place, expert in enumerate(indices) if expert in kept]
            if places:
                group.keep(places)
                groups.append(group)
                members.append(tuple(kept.index(indices[place]) for place in places))
        self.groups = nn.ModuleList(groups)
        self.members = members

    def expert(self, index: int) -> MessagePassing:
        for group, indices in zip(self.groups, self.members, strict=True):
            if index in indices:
                return group.expert(indices.index(index))
        raise ValueError(f"index: got {index}, expected that of an expert")

    def forward(self, call: Call, routing: Routing) -> Tensor:
        refuse_in_export(
            "experts of several kinds",
            "one kind: how many pairs each kind has is a size that follows the data",
        )
        outputs = []
        for group, indices in zip(self.groups, self.members, strict=True):
            # Each kind of conv has an aggregate of its own.
            group_call = call.with_aggregate(group.aggregate(call))
            # The first select waits for a GPU: the host cannot know how many pairs each group has,
            # and with its upper bound every group would compute all pairs.
            outputs.append(group(group_call, routing.select(experts=indices)))
        # Not sum(outputs), which would broadcast different widths: stack refuses them.
        return torch.stack(outputs).sum(dim=0)


def refuse_far(convs: Iterable[MessagePassing]) -> None:
    """Refuse convs that layer-wise inference cannot run.

    Args:
        convs: those of a model that look further than one hop.

    Raises:
        RuntimeError: there are some.
    """
    names = ", ".join(sorted({type(conv).__name__ for conv in convs}))
    if names:
        raise RuntimeError(
            f"inference: {names} looks further than one hop, or is not known not to; call the "
            "model on the whole graph, or say local=True of your conv"
        )


def times(factor: Tensor, conv: nn.Module, args: Any, out: Any) -> Any:
    """The output of a conv times a factor, as a hook; attention weights beside it stay."""
    if isinstance(out, tuple):
        return out[0] * factor.to(out[0]), *out[1:]
    return out * factor.to(out)
