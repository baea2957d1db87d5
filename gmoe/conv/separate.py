"""Experts that run one by one, for convs that cannot be stacked.

Shapes: T tokens (destinations), S sources, O out width, E experts.

``torch.compile`` runs them in pieces: each conv gets a graph of its own, whose sizes follow the
data.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe._torch import untraced
from gmoe._verify import moved_copy
from gmoe.conv.base import Conv, ConvExperts, tokens_of
from gmoe.conv.call import Call
from gmoe.conv.graph import Graph
from gmoe.conv.plain import run, run_on
from gmoe.portable import exported_as
from gmoe.products import combine
from gmoe.routing import Routing


def _run_all_on_all(experts: SeparateExperts, call: Call, routing: Routing) -> Tensor:
    """(T, O) the same, each conv at every token: an export does not know the loads of experts."""
    graph, x_src, x_dst, _ = call
    all_TEO = torch.stack([run(conv, graph, x_src, x_dst) for conv in experts.members], dim=1)
    return (all_TEO * routing.to_dense()[..., None]).sum(dim=1)


def is_local_on(conv: MessagePassing, graph: Graph, x_src: Tensor, x_dst: Tensor) -> bool:
    """True if a conv gives some nodes the same on their in-edges as on the whole graph."""
    out = run(conv, graph, x_src, x_dst)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(graph.num_dst, generator=generator)
    for size in (1, 4, 9):
        token = order[:size].sort().values
        part = run_on(conv, graph, x_src, x_dst, token)
        if not torch.allclose(part, out[token], atol=1e-9):
            return False
    return True


def not_local(conv: MessagePassing) -> ValueError:
    """The error of ``local=True`` for a conv that is not local."""
    return ValueError(
        f"local: got True, but {type(conv).__name__} gives another output on a node's in-edges "
        "than on the whole graph, expected None or False"
    )


def _in_float64(value: Any) -> Any:
    """On the CPU; whole numbers, such as the types of bonds, stay what they are."""
    if value is None:
        return None
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


class SeparateExperts(ConvExperts):
    """E convs that run one by one.

    A local conv runs on the in-edges of its own destinations only, any other on the whole graph.

    Args:
        convs: the E convs.
        local: for each of them, whether it is local.
        is_tried: that was found out (default). ``False`` finds it out on the first call, whose edge
            features may be of any kind.

    Raises:
        ValueError: at the first call: a conv that is not local after all.
    """

    holds_any_conv = True
    """Its parts may be of any class: they are copies of somebody's conv."""

    def __init__(
        self, convs: Sequence[MessagePassing], local: Sequence[bool], *, is_tried: bool = True
    ) -> None:
        super().__init__()
        self.is_tried = is_tried
        self.members: Any = nn.ModuleList(convs)
        self.is_local = list(local)
        self.flow = convs[0].flow

    @property
    def too_far(self) -> list[MessagePassing]:
        return [conv for conv, local in zip(self.members, self.is_local, strict=True) if not local]

    def reset_parameters(self) -> None:
        for conv in self.members:
            conv.reset_parameters()

    def become(self, conv: MessagePassing) -> None:
        for member in self.members:
            member.load_state_dict(conv.state_dict())

    def keep(self, kept: Sequence[int]) -> None:
        self.members = nn.ModuleList(self.members[expert] for expert in kept)
        self.is_local = [self.is_local[expert] for expert in kept]

    def expert(self, index: int) -> MessagePassing:
        conv = copy.deepcopy(self.members[index])
        conv.zero_grad()  # deepcopy copies gradients too
        return conv

    def convs(self) -> list[MessagePassing]:
        return list(self.members)

    @exported_as(_run_all_on_all)
    def forward(self, call: Call, routing: Routing) -> Tensor:
        graph, x_src, x_dst, _ = call
        if not (self.is_tried or torch.compiler.is_compiling()):
            self._try_on(call)
        outputs: list[Tensor] = []
        idle: list[Tensor] = []  # parameters of experts without a token
        for conv, local, token in zip(self.members, self.is_local, tokens_of(routing), strict=True):
            if not token.numel():
                idle += conv.parameters()
            elif local and not self._needs_whole_graph(conv, graph, token):
                outputs.append(run_on(conv, graph, x_src, x_dst, token))
            else:
                outputs.append(run(conv, graph, x_src, x_dst).index_select(0, token))
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
        for conv in self.members:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                try:
                    is_local = is_local_on(moved_copy(conv), graph, x_src, x_dst)
                except Exception as error:
                    is_local = True
                    warnings.warn(
                        f"local: got True, which is believed: a copy of {type(conv).__name__} "
                        f"fails in float64 on the CPU ({error})",
                        stacklevel=2,
                    )
            if not is_local:
                raise not_local(conv)
        self.is_tried = True

    @staticmethod
    def _needs_whole_graph(conv: Conv, graph: Graph, token: Tensor) -> bool:
        """True if a local conv cannot run on a part of the graph, or does not gain from it."""
        # Self-loops that a conv adds to a bipartite graph join nodes of equal index, and a part
        # keeps those indices only if N_src >= N_dst.
        is_misaligned = getattr(conv, "add_self_loops", False) and graph.num_src < graph.num_dst
        # An explainer's mask has an entry for each edge of the whole graph.
        return conv.explain or is_misaligned or token.size(0) == graph.num_dst
