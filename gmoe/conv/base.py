"""How the experts of a MoEConv are run. Shapes: T tokens (destinations), D, I, O widths, E experts, P pairs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.graph import Graph
from gmoe.dispatch import Backend
from gmoe.routing import Routing

MakeConv = Callable[[int], MessagePassing]
"""Makes a fresh conv for the expert of that index."""

MOVE = 60
"""To gather or scatter a number of a row takes as long as so many multiply-adds of a product; fitted on one core of a
CPU, not measured on GPUs."""

hooks_of = attrgetter("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""What a user may have hung on a module, which then has to be called."""


class NodeChunks:
    """The destinations of a graph in order, some at a time, each with its in-edges: for graphs too large for one pass.

    Args:
        graph: whose sources are its destinations.
        size: destinations a chunk.
        device: where chunks are computed.
        keep: keep the chunks between layers.
    """

    def __init__(self, graph: Graph, size: int, device: torch.device, keep: bool = False) -> None:
        self.graph = graph
        self.size = size
        self.device = device
        self.keep = keep
        self._made: list[tuple[slice, Tensor, Graph]] = []
        self._turned: NodeChunks | None = None

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Graph]]:
        """The destinations as a range, the nodes that the chunk holds (they come first), and its graph."""
        if self._made:
            yield from self._made
            return
        made = []
        nodes = self.graph.num_dst
        for start in range(0, max(nodes, 1), self.size):  # of no nodes, one empty chunk
            rows = slice(start, min(start + self.size, nodes))
            own, part = self.graph.part(torch.arange(rows.start, rows.stop, device=self.graph.edge_index.device))
            chunk = rows, own, part if part.adj.device == self.device else part.to(self.device)
            if self.keep:
                made.append(chunk)
            yield chunk
        self._made = made

    def in_flow(self, flow: str) -> NodeChunks:
        """The chunks for convs of that ``flow``."""
        if flow == self.graph.flow:
            return self
        if self._turned is None:
            self._turned = NodeChunks(self.graph.in_flow(flow), self.size, self.device, self.keep)
        return self._turned

    def map(self, compute: Callable[[Tensor, Graph, slice], Tensor], x: Tensor) -> Tensor:
        """(N, O) the outputs of all nodes: ``compute(x of the chunk's nodes, graph, rows)`` gives these first."""
        outs = []
        for rows, nodes, part in self:
            out = compute(x[nodes.to(x.device)].to(self.device), part, rows)
            outs.append(out[: rows.stop - rows.start].to(x.device))
        return torch.cat(outs)

    def mean(self, x: Tensor) -> Tensor:
        """(N, D) :meth:`Graph.mean` of all nodes."""
        return self.map(lambda x, part, _: part.mean(x), x)


class ConvExperts(nn.Module, ABC):
    """E convs under one routing: the weighted sum of their outputs, as if each ran on the whole graph."""

    out_width: int | None = None
    """O, where it is known before the first call."""

    takes_two_sets: bool = True
    """Whether sources and destinations may be two sets of nodes."""

    @abstractmethod
    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        """(T, O) the mixture; ``h`` is what :meth:`aggregate` gave."""

    def aggregate(self, graph: Graph, x_src: Tensor, x_dst: Tensor) -> Any:
        """(T, D) what the convs aggregate, where that is the same for all experts; else ``None``."""
        return None

    def aggregate_chunked(self, x: Tensor, chunks: NodeChunks) -> Any:
        """:meth:`aggregate` of all nodes of a large graph."""
        return None

    def forward_chunked(self, x: Tensor, chunks: NodeChunks, h: Any, routing: Routing) -> Tensor:
        """:meth:`forward` of all nodes of a large graph.

        Raises:
            RuntimeError: a conv looks further than one hop.
        """

        def compute(x: Tensor, part: Graph, rows: slice) -> Tensor:
            near = None if h is None else h[rows].to(chunks.device)
            x_dst = x if near is None else x[: len(near)]
            out: Tensor = self(part, x, x_dst, near, routing.select(rows))
            return out

        return chunks.map(compute, x)

    @abstractmethod
    def convs(self) -> list[MessagePassing]:
        """PyG convs whose arguments and ``flow`` are those of the experts."""

    @property
    def flow(self) -> str:
        """PyG's ``flow`` of the edges that the experts are given."""
        return str(self.convs()[0].flow)

    @abstractmethod
    def expert(self, index: int) -> MessagePassing:
        """A detached copy of one expert as a plain PyG conv."""

    @abstractmethod
    def fill(self, convs: list[Any]) -> None:
        """Take over the parameters of E separate convs."""

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

    prototype: Any

    def __init__(self, make: MakeConv, num_experts: int, backend: Backend) -> None:
        super().__init__()
        self.make = make
        self.num_experts = num_experts
        self._build(make(0), backend)
        self.fill([make(expert) for expert in range(num_experts)])

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Without the prototype: explainers count a hop for each MessagePassing module, and the layer is one already.

        It has no parameters; what goes by children (``to``, ``train``, ``state_dict``) reaches it.
        """
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not any(module is part for part in self.prototype.modules()):
                yield name, module

    @staticmethod
    def accepts(conv: Any) -> bool:
        """Whether this conv, with its options, can be run this way."""
        return True

    @abstractmethod
    def _build(self, template: Any, backend: Backend) -> None:
        """Set ``prototype`` and the stacked parameters up, for convs like ``template``."""

    @abstractmethod
    def _parts(self, conv: Any) -> list[tuple[Any, Any]]:
        """(stacked, own) of a conv: LinearExperts and a linear layer, or a stacked tensor and a tensor."""

    def _tensors(self, conv: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, tensor by tensor, the stacked weights as torch has a linear layer's."""
        for stacked, own in self._parts(conv):
            if isinstance(stacked, Tensor):
                yield stacked, own
                continue
            yield stacked.weight.transpose(1, 2), own.weight
            if stacked.bias is not None:
                yield stacked.bias, own.bias

    def convs(self) -> list[MessagePassing]:
        return [self.prototype]

    @torch.no_grad()
    def fill(self, convs: list[Any]) -> None:
        for expert, conv in enumerate(convs):
            for stacked, own in self._tensors(conv):
                stacked[expert] = own

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
            conv = self.make(index).to(device=first.device, dtype=first.dtype)
        for stacked, own in self._tensors(conv):
            own.copy_(stacked[index])
        return conv.train(self.training)


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
        self.takes_two_sets = all(group.takes_two_sets for group in groups)

    def convs(self) -> list[MessagePassing]:
        return [conv for group in self.groups for conv in group.convs()]

    def fill(self, convs: list[Any]) -> None:
        for group, indices in zip(self.groups, self.members, strict=True):
            group.fill([convs[index] for index in indices])

    def reset_parameters(self) -> None:
        for group in self.groups:
            group.reset_parameters()

    def expert(self, index: int) -> MessagePassing:
        for group, indices in zip(self.groups, self.members, strict=True):
            if index in indices:
                found: MessagePassing = group.expert(indices.index(index))
                return found
        raise IndexError(index)

    def aggregate(self, graph: Graph, x_src: Tensor, x_dst: Tensor) -> list[Any]:
        return [group.aggregate(graph.in_flow(group.flow), x_src, x_dst) for group in self.groups]

    def aggregate_chunked(self, x: Tensor, chunks: NodeChunks) -> list[Any]:
        return [group.aggregate_chunked(x, chunks.in_flow(group.flow)) for group in self.groups]

    def forward_chunked(self, x: Tensor, chunks: NodeChunks, h: Any, routing: Routing) -> Tensor:
        return self._sum(
            group.forward_chunked(x, chunks.in_flow(group.flow), own, routing.select(experts=indices))
            for group, indices, own in zip(self.groups, self.members, h, strict=True)
        )

    def forward(self, graph: Graph, x_src: Tensor, x_dst: Tensor, h: Any, routing: Routing) -> Tensor:
        return self._sum(
            group(graph.in_flow(group.flow), x_src, x_dst, own, routing.select(experts=indices))
            for group, indices, own in zip(self.groups, self.members, h, strict=True)
        )

    @staticmethod
    def _sum(outs: Iterable[Tensor]) -> Tensor:
        first, *others = of_one_width(list(outs))  # others would be broadcast
        return sum(others, first)


def of_one_width(outs: list[Tensor]) -> list[Tensor]:
    """What experts gave, unless their widths differ."""
    widths = {out.size(1) for out in outs}
    if len(widths) > 1:
        raise ValueError(f"conv: got experts of output widths {sorted(widths)}, expected one width for all")
    return outs


def too_far(convs: Iterable[Any]) -> RuntimeError:
    """To be raised for convs that have no layer-wise inference."""
    names = ", ".join(sorted({type(conv).__name__ for conv in convs}))
    return RuntimeError(
        f"inference: {names} looks further than one hop, or is not known not to, so that it has no "
        "layer-wise inference; call the model on the whole graph, or say local=True of a conv of your own"
    )


def powers(step: Callable[[Tensor], Tensor], x: Tensor, hops: int) -> Tensor:
    """(N, hops D) x after one step, two, ..., side by side."""
    found = [x]
    for _ in range(hops):
        found.append(step(found[-1]))
    return torch.cat(found[1:], dim=-1)


def tokens_of(routing: Routing) -> Iterator[Tensor]:
    """The tokens of each expert, in order."""
    return iter(routing.token.split(routing.load.tolist()))


def probe_copy(module: nn.Module) -> Any:
    """A float64 copy on the CPU, in training mode and without dropout, to be tried out; random if it has no values."""
    probe = copy.deepcopy(module)
    if any(value.is_meta for value in (*probe.parameters(), *probe.buffers())):
        probe = probe.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.normal_(generator=generator)
            for buffer in probe.buffers():
                buffer.fill_(1)
    probe = probe.cpu().double().train()
    for part in probe.modules():
        rate: Any = getattr(part, "dropout", None)  # as PyG's layers call it: a number, or one for each layer
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(rate, float):
            setattr(part, "dropout", 0.0)  # noqa: B010
        elif isinstance(rate, list):
            setattr(part, "dropout", [0.0] * len(rate))  # noqa: B010
    return probe
