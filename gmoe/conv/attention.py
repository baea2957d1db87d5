"""Attention experts. Shapes: N sources, I in, O out features, E experts, P pairs, M messages, H heads, C width."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch_geometric.utils import softmax

from gmoe.conv.experts import StackedExperts
from gmoe.conv.graph import Graph
from gmoe.conv.pair_graph import PairGraph, with_self_loops
from gmoe.conv.segment import at_least_float32
from gmoe.dispatch import Backend, combine, grouped_linear
from gmoe.experts import LinearExperts
from gmoe.routing import Routing


class AttentionExperts(StackedExperts):
    r"""E attention convs of which each token runs its own: messages along K times the edges, not E times.

    A source is transformed once for each expert that hears it, all in one grouped product; scores, softmax and sums
    run over the in-edges of each (token, expert) pair.

    The linear layers of the PyG class are :class:`LinearExperts` under PyG's names, its other parameters are stacked,
    (E, ...), under theirs.
    """

    layers: tuple[str, ...]
    vectors: tuple[str, ...]
    prototype: Any
    bias: nn.Parameter | None
    lin_edge: LinearExperts | None
    res: LinearExperts | None

    @staticmethod
    def accepts(conv: Any) -> bool:
        is_known = not any(is_lazy(parameter) for parameter in conv.parameters())
        return is_known and conv.aggr in ("add", "sum") and conv.decomposed_layers == 1

    def _layers(self, conv: Any) -> dict[str, Any]:
        """The linear layers that the options of a conv leave in use."""
        found = {name: getattr(conv, name, None) for name in self.layers}
        return {name: layer for name, layer in found.items() if layer is not None}

    def _vectors(self, conv: Any) -> dict[str, Any]:
        """Its other parameters."""
        found = {name: getattr(conv, name) for name in self.vectors}
        return {name: vector for name, vector in found.items() if vector is not None}

    def _build(self, template: Any, backend: Backend) -> None:
        self.backend: Backend = backend
        self.heads, self.width = template.heads, template.out_channels
        self.prototype = copy.deepcopy(template)
        for name in (*self.layers, *self.vectors):
            setattr(self.prototype, name, None)
            setattr(self, name, None)
        for name, layer in self._layers(template).items():
            widths = (layer.in_channels, layer.out_channels)
            stacked = LinearExperts(*widths, self.num_experts, bias=layer.bias is not None, backend=backend)
            setattr(self, name, stacked)
        for name, vector in self._vectors(template).items():
            setattr(self, name, nn.Parameter(vector.detach().new_empty(self.num_experts, *vector.shape)))

    @torch.no_grad()
    def _fill(self, convs: list[Any]) -> None:
        for expert, conv in enumerate(convs):
            for name, layer in self._layers(conv).items():
                stacked = getattr(self, name)
                stacked.weight[expert] = layer.weight.T
                if layer.bias is not None:
                    stacked.bias[expert] = layer.bias
            for name, vector in self._vectors(conv).items():
                getattr(self, name)[expert] = vector

    @torch.no_grad()
    def _unfill(self, conv: Any, index: int) -> None:
        for name, layer in self._layers(conv).items():
            stacked = getattr(self, name)
            layer.weight.copy_(stacked.weight[index].T)
            if layer.bias is not None:
                layer.bias.copy_(stacked.bias[index])
        for name, vector in self._vectors(conv).items():
            vector.copy_(getattr(self, name)[index])

    def forward(self, x_src: Tensor, x_dst: Tensor, aggregate: Tensor | None, graph: Graph, routing: Routing) -> Tensor:
        if getattr(self.prototype, "add_self_loops", False):
            graph = with_self_loops(graph, self.prototype.fill_value)
        x_PI = x_dst.index_select(0, routing.token)
        y_PHC = self._attend(x_src, x_PI, PairGraph(graph, routing))
        y_PO = y_PHC.flatten(1) if self.prototype.concat else y_PHC.mean(dim=1)
        return combine(self._finish(y_PO, x_PI, routing), routing)

    @abstractmethod
    def _attend(self, x_src: Tensor, x_PI: Tensor, pairs: PairGraph) -> Tensor:
        """(P, H, C) what each pair hears, weighted by attention."""

    def _finish(self, y_PO: Tensor, x_PI: Tensor, routing: Routing) -> Tensor:
        """What the conv does to that: residual and bias."""
        if self.res is not None:
            y_PO = y_PO + self.res(x_PI, routing.offsets)
        return y_PO if self.bias is None else y_PO + self.bias.index_select(0, routing.expert)

    def _by_head(self, row_UO: Tensor) -> Tensor:
        """(U, H, C)"""
        return row_UO.unflatten(1, (self.heads, self.width))

    def _head_by_head(self, row_PHI: Tensor, weight_EIHO: Tensor, offsets_E: Tensor) -> Tensor:
        """(P, H, O) each head of a row times that head's part of the expert's weight."""
        heads = zip(row_PHI.unbind(1), weight_EIHO.unbind(2), strict=True)
        return torch.stack([grouped_linear(row, w, None, offsets_E, self.backend) for row, w in heads], dim=1)

    def _attention(self, score_MH: Tensor, pairs: PairGraph) -> Tensor:
        """(M, H) the softmax over what each pair hears, with dropout in training."""
        alpha_MH = softmax(at_least_float32(score_MH), ptr=pairs.start).to(score_MH.dtype)
        return F.dropout(alpha_MH, self.prototype.dropout, self.training)

    def _edge_attr(self, pairs: PairGraph) -> Tensor | None:
        """(M, F) the edge features, where there are some.

        Raises:
            ValueError: edge features for convs that were built without ``edge_dim``.
        """
        if pairs.edge_attr is not None and self.lin_edge is None:
            raise ValueError(
                f"edge_attr: got a tensor, expected None, since {type(self.prototype).__name__} was built with "
                "edge_dim=None"
            )
        return pairs.edge_attr
