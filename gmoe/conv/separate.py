"""Experts that are run one by one. Shapes: T tokens (destinations), O width, E experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from gmoe.conv.experts import ConvExperts, MakeConv, tokens_of
from gmoe.conv.graph import Graph, parameters_of
from gmoe.conv.pieces import Pieces
from gmoe.dispatch import combine
from gmoe.routing import Routing


class SeparateExperts(ConvExperts):
    """E convs run one by one, each on the in-edges of its own destinations where it is local, else on the whole graph.

    Args:
        make: makes the conv of an expert.
        num_experts: E.
        local: for each expert, whether its conv is local.
    """

    def __init__(self, make: MakeConv, num_experts: int, local: list[bool]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(make(expert) for expert in range(num_experts))
        self.local = local

    def reset_parameters(self) -> None:
        for conv in self.convs:
            assert isinstance(conv, MessagePassing)
            conv.reset_parameters()

    def expert(self, index: int) -> MessagePassing:
        conv = copy.deepcopy(self.convs[index])
        assert isinstance(conv, MessagePassing)
        conv.zero_grad()  # the copy takes gradients along
        return conv

    def prototypes(self) -> list[MessagePassing]:
        return [conv for conv in self.convs if isinstance(conv, MessagePassing)]

    def by_pieces(self, x: Tensor, aggregate: Tensor | None, pieces: Pieces, routing: Routing) -> Tensor:
        far = {type(conv).__name__ for conv, local in zip(self.convs, self.local, strict=True) if not local}
        if far:
            raise RuntimeError(
                f"inference: {', '.join(sorted(far))} looks further than one hop, so that it has no layer-wise "
                "inference; call the model on the whole graph"
            )
        return super().by_pieces(x, aggregate, pieces, routing)

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        tokens = list(tokens_of(routing))
        outs: list[Tensor | None] = []
        for index, token in enumerate(tokens):
            if token.numel() == 0:
                outs.append(None)
                continue
            conv = self.convs[index]
            run = run_on_destinations if self.local[index] and not _loops_misalign(conv, graph) else run_on_all
            outs.append(run(conv, x_src, x_dst, graph.with_args_of([conv]), token))
        done = [out for out in outs if out is not None]
        if not done:
            done = [run_on_all(self.convs[0], x_src, x_dst, graph.with_args_of(self.prototypes()[:1]), tokens[0])]
        y = combine(torch.cat(done), routing)
        # experts without a token get zero gradients, not None, or DDP would wait for them
        idle = [p for out, conv in zip(outs, self.convs, strict=True) if out is None for p in conv.parameters()]
        return y + sum(((p * 0).sum() for p in idle), y.new_zeros(())).to(y.dtype) if idle else y


def run_on_all(conv: Any, x_src: Tensor, x_dst: Tensor, graph: Graph, token: Tensor) -> Tensor:
    """The conv on the whole graph, and of its output the rows of ``token``."""
    x = x_src if x_src is x_dst else (x_src, x_dst)
    out: Tensor = conv(x, graph.adj, **graph.edge_args)
    return out.index_select(0, token)


def run_on_destinations(conv: Any, x_src: Tensor, x_dst: Tensor, graph: Graph, token: Tensor) -> Tensor:
    """The conv on the in-edges of ``token`` only, its destinations first among the sources."""
    nodes, near, edge = graph.neighbourhood(token)
    local = near if graph.flow == "source_to_target" else near.flip(0)
    args = graph.args_of(edge, parameters_of(conv))
    x_near = x_src.index_select(0, nodes)
    x = x_near if x_src is x_dst else (x_near, x_dst.index_select(0, token))
    out: Tensor = conv(x, local, **args)
    return out[: token.numel()]


def _loops_misalign(conv: Any, graph: Graph) -> bool:
    """Self-loops of a bipartite graph join nodes of equal index, which a sub-graph keeps only where N_src >= N_dst."""
    return bool(getattr(conv, "add_self_loops", False)) and graph.num_src < graph.num_dst
