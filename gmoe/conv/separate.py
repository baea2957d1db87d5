"""Experts that run one by one, for convs that cannot be stacked.

Shapes: T tokens (destinations), n of one expert, S sources, D in, O out width, m in-edges of n
tokens, E experts, P pairs.

``torch.compile`` runs them in pieces: each conv gets a graph of its own, whose sizes follow the
data.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe._checks import must_be_called
from gmoe._torch import untraced
from gmoe._verify import moved_copy
from gmoe.conv.base import Conv, ConvExperts
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.plain import are_two, run, run_on
from gmoe.portable import exported_as
from gmoe.products import combine
from gmoe.routing import Routing


def _run_all_on_all(experts: SeparateExperts, call: Call, routing: Routing) -> Tensor:
    """(T, O) the same, each conv at every token: an export does not know the loads of experts."""
    graph, x_src, x_dst, _ = call
    all_TEO = torch.stack([run(conv, graph, x_src, x_dst) for conv in experts.members], dim=1)
    return (all_TEO * routing.to_dense()[..., None]).sum(dim=1)


Way: TypeAlias = Literal["whole", "part", "rows"]
"""What a conv gets for some tokens: the whole graph; their in-edges and the ends of these; or
their in-edges, and no other rows than their own."""


def way_on(conv: MessagePassing, call: Call) -> Way:
    """The cheapest way in which a conv gives some nodes the same as on the whole graph."""
    graph, x_src, x_dst, _ = call
    out = run(conv, graph, x_src, x_dst)
    order = torch.randperm(graph.num_dst, generator=torch.Generator().manual_seed(1))
    # Among those of each size is a node that has an in-edge.
    sets = [torch.cat([order[:size], graph.edges.receiver[:1]]).unique() for size in (1, 4, 9)]

    def is_right(run_on_some: Callable[[Tensor], Tensor]) -> bool:
        return all(torch.allclose(run_on_some(token), out[token], atol=1e-9) for token in sets)

    def on_rows(token: Tensor) -> Tensor:
        return _run_on_rows(conv, call, *_in_edges(call, token, [token.numel()]))

    if not is_right(lambda token: run_on(conv, graph, x_src, x_dst, token)):
        return "whole"
    try:
        return "rows" if _can_give_rows(conv, call) and is_right(on_rows) else "part"
    except Exception:  # it makes something else of its nodes before it sends them
        return "part"


def _can_give_rows(conv: MessagePassing, call: Call) -> bool:
    """True for edges and nodes in the one form that :func:`_run_on_rows` takes."""
    is_plain = conv.flow == "source_to_target" and not call.graph.is_sparse
    return is_plain and not are_two(*call[:3])


class InEdges(NamedTuple):
    """The edges that end in n tokens; the numbers of their senders are those in the graph."""

    rows: Tensor
    """(n, D) the features of the tokens."""
    message: Tensor
    """(m,) the edges."""
    position: Tensor
    """(m,) the token of each, 0..n-1."""

    @property
    def are_several(self) -> bool:
        """False for what some convs fail on: a single row in a batch norm, or no edges."""
        return len(self.rows) > 1 and len(self.message) > 0


def _in_edges(call: Call, token_P: Tensor, sizes: Sequence[int]) -> list[InEdges]:
    """The in-edges of the tokens of each expert, which are as many as ``sizes`` say."""
    found = call.graph.edges.of(token_P)
    first = [0, *accumulate(sizes)]
    numbers = found.ptr[first].diff().tolist()
    rows = call.x_src.index_select(0, token_P).split(sizes)
    message, position = (part.split(numbers) for part in (found.order, found.receiver))
    by_expert = zip(rows, message, position, first, strict=False)
    return [InEdges(own, edges, place - start) for own, edges, place, start in by_expert]


@untraced  # compiled code cannot copy a conv
def _run_on_rows(conv: Conv, call: Call, edges: InEdges) -> Tensor:
    """(n, O) PyG's conv on the rows of some tokens.

    It must hand its nodes to ``propagate`` as they are: there, the sources join them. All else it
    computes of the tokens alone, such as GIN's network, which on a part also runs on its senders.
    """
    graph, x_src = call.graph, call.x_src
    rows = edges.rows

    def propagate(edge_index: Tensor, size: object = None, **given: Any) -> Tensor:
        sent = {
            name: (x_src, rows) if all(part is rows for part in _parts_of(value)) else value
            for name, value in given.items()
        }
        out: Tensor = conv.propagate(edge_index, size=(len(x_src), len(rows)), **sent)
        return out

    # A copy, since another thread may be running the conv itself.
    running = copy.copy(conv)
    running.propagate = propagate
    edge_index = torch.stack([graph.edges.sender.index_select(0, edges.message), edges.position])
    place = graph.edges.as_given(edges.message)
    args = {name: value.index_select(0, place) for name, value in graph.args_for(conv).items()}
    out: Tensor = running(rows, edge_index, **args)
    del running.propagate
    conv.__dict__.update(running.__dict__)  # what its forward notes on itself
    return out


def _parts_of(value: object) -> Sequence[object]:
    """The tensors of a pair: PyG's convs make one of nodes that are sources and destinations."""
    return value if isinstance(value, tuple) and value else (value,)


def not_local(conv: MessagePassing) -> ValueError:
    """The error of ``local=True`` for a conv that is not local."""
    return ValueError(
        f"local: got True, but {type(conv).__name__} gives another output on a node's in-edges "
        "than on the whole graph, expected None or False; what it reads of senders, such as their "
        "degrees, can come with the edges, as an edge_weight that is computed before the call"
    )


def _in_float64(value: Any) -> Any:
    """On the CPU; whole numbers, such as the types of bonds, stay what they are."""
    if value is None:
        return None
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


class SeparateExperts(ConvExperts):
    """E convs that run one by one.

    A local conv runs on the in-edges of its own tokens only, any other on the whole graph.

    Args:
        convs: the E convs.
        ways: how each of them runs on some tokens.
        is_tried: that was found out (default). ``False`` finds it out on the first call, whose edge
            features may be of any kind.

    Raises:
        ValueError: at the first call: a conv that is not local after all.
    """

    def __init__(
        self, convs: Sequence[MessagePassing], ways: Sequence[Way], *, is_tried: bool = True
    ) -> None:
        super().__init__()
        self.is_tried = is_tried
        self.members: Any = nn.ModuleList(convs)
        self.ways = list(ways)
        self.flow = convs[0].flow

    @property
    def too_far(self) -> list[MessagePassing]:
        ways = zip(self.members, self.ways, strict=True)
        return [conv for conv, way in ways if way == "whole"]

    def reset_parameters(self) -> None:
        for conv in self.members:
            conv.reset_parameters()

    def become(self, conv: MessagePassing) -> None:
        """Make every expert a copy of this conv, which must be of their kind."""
        for member in self.members:
            member.load_state_dict(conv.state_dict())

    def keep(self, kept: Sequence[int]) -> None:
        self.members = nn.ModuleList(self.members[expert] for expert in kept)
        self.ways = [self.ways[expert] for expert in kept]

    def expert(self, index: int) -> MessagePassing:
        conv = copy.deepcopy(self.members[index])
        conv.zero_grad()  # deepcopy copies gradients too
        return conv

    def convs(self) -> list[MessagePassing]:
        return list(self.members)

    @exported_as(_run_all_on_all)
    def forward(self, call: Call, routing: Routing) -> Tensor:
        graph, x_src, x_dst, _ = call
        if not self.is_tried and graph.num_edges and not torch.compiler.is_compiling():
            self._try_on(call)
        sizes = routing.load.tolist()
        gives_rows = "rows" in self.ways and _can_give_rows(self.members[0], call)
        edges = _in_edges(call, routing.token, sizes) if gives_rows else []
        outputs: list[Tensor] = []
        idle: list[Tensor] = []  # parameters of experts without a token
        for expert, token in enumerate(routing.token.split(sizes)):
            conv, way = self.members[expert], self.ways[expert]
            is_hooked = must_be_called(conv)  # a hook may change the nodes before they are sent
            if not token.numel():
                idle += conv.parameters()
            elif way == "whole" or self._needs_whole_graph(conv, graph, token):
                outputs.append(run(conv, graph, x_src, x_dst).index_select(0, token))
            elif way == "rows" and edges and edges[expert].are_several and not is_hooked:
                outputs.append(_run_on_rows(conv, call, edges[expert]))
            else:
                outputs.append(run_on(conv, graph, x_src, x_dst, token))
        if not outputs:  # no tokens at all: only the shape and the dtype of the output matter
            outputs = [run(self.members[0], graph, x_src, x_dst)[:0]]
        y = combine(torch.cat(outputs), routing)
        if not idle:
            return y
        # Idle experts get zero gradients, not None: DDP would wait for them.
        zero = sum(((parameter * 0).sum() for parameter in idle), y.new_zeros(()))
        return y + zero.to(y.dtype)

    @untraced
    def _try_on(self, call: Call) -> None:
        """Find out whether the convs are local, on copies in evaluation, once."""
        graph = call.graph.to("cpu")
        edges = {"edge_weight": graph.edge_weight, "edge_attr": graph.edge_attr}
        graph = graph.with_weights(**{name: _in_float64(value) for name, value in edges.items()})
        x_src, x_dst = _in_float64(call.x_src), _in_float64(call.x_dst)
        if call.x_src is call.x_dst:
            x_dst = x_src
        for expert, conv in enumerate(self.members):
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                try:
                    way = way_on(moved_copy(conv), Call(graph, x_src, x_dst))
                except Exception as error:
                    way = "part"
                    warnings.warn(
                        f"local: got True, which is believed: a copy of {type(conv).__name__} "
                        f"fails in float64 on the CPU ({error})",
                        stacklevel=2,
                    )
            if way == "whole":
                raise not_local(conv)
            self.ways[expert] = way
        self.is_tried = True

    @staticmethod
    def _needs_whole_graph(conv: Conv, graph: Graph, token: Tensor) -> bool:
        """True if a local conv cannot run on a part of the graph, or does not gain from it."""
        # Self-loops that a conv adds to a bipartite graph join nodes of equal index, and a part
        # keeps those indices only if N_src >= N_dst.
        is_misaligned = getattr(conv, "add_self_loops", False) and graph.num_src < graph.num_dst
        # An explainer's mask has an entry for each edge of the whole graph.
        return conv.explain or is_misaligned or token.size(0) == graph.num_dst
