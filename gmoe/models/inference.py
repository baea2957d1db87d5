"""Layer-wise inference of a GNNMoE: part by part, over a graph in memory or in mapped files.

Shapes: N nodes, n destinations of a part, S nodes of a part (the destinations come first), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.typing import Adj

from gmoe._checks import check, check_counts, described
from gmoe.conv.base import refuse_far
from gmoe.conv.build import looks_one_hop
from gmoe.conv.graph import Graph
from gmoe.conv.moe_conv import MoEConv
from gmoe.models.parts import Nodes, is_by_row
from gmoe.routers import Router
from gmoe.routing import Routing


@torch.no_grad()
def inference(
    model: Any,
    loader: NodeLoader | Data,
    device: torch.device | str | None = None,
    *,
    batch_size: int | None = None,
    return_routing: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Logits of all nodes, layer by layer in chunks, without gradients.

    They equal those of the forward on the whole graph: each layer routes once over all nodes, so
    that a node's experts do not depend on its chunk, and GCN's degrees are those of the whole
    graph. Call ``eval()`` first, as for any evaluation.

    A graph larger than memory has memory-mapped tensors: ``x``, which is read by rows, and
    ``edge_index``, which stays where it is if it ascends by destination (else it is sorted in
    memory). With ``out``, memory then holds 12 bytes a node, one chunk, its in-edges and their
    sources, and the hidden features of all nodes are in a temporary file (see
    ``tempfile.gettempdir``). Each chunk is then routed by itself: routers must decide token by
    token (token choice, random, uniform, centroids, or expert choice with
    ``inference="threshold"``), and norms must work row by row.

    Args:
        loader: a graph; or a node loader, whose graph and batch size are used, but not its sampler.
        device: where chunks are computed (default: where the model is); the features of all nodes
            stay on the CPU.
        batch_size: nodes per chunk (default: the loader's, or 1,024).
        return_routing: return the routings too, as :meth:`forward` does.
        out: (N, out_channels) where to write the logits, such as a memory-mapped tensor; it is
            returned (default: a new tensor).

    Raises:
        ValueError: a graph without ``x``, or with both ``edge_index`` and ``adj_t``; an ``out`` of
            another shape or of integers. With ``out``, ``return_routing``, which would take memory
            for all nodes; a model in training; a router, norm or ``jk`` that needs all nodes at
            once, by name.
        RuntimeError: a conv that looks further than one hop, such as ``ChebConv``.
    """
    data = loader if isinstance(loader, Data) else getattr(loader, "data", loader)
    legal = "a Data with x, and with edge_index or adj_t"
    check(isinstance(data, Data), "loader", f"one over {type(data).__name__}", legal)
    check(data.x is not None, "loader", "a Data without x", legal)
    if batch_size is None:
        batch_size = getattr(loader, "batch_size", None) or 1024
    check_counts(batch_size=batch_size)
    device = torch.device(device or next(model.parameters()).device)
    _check_hops(model)
    if out is not None:
        _check_out(model, out, data.x.size(0))
        check(not return_routing, "return_routing", True, "False with out: it takes much memory")
    run = _LayerByLayer(model, data, device, batch_size, out)
    logits = run.logits()
    return (logits, run.routings) if return_routing else logits


def stored_edges(data: Data) -> Adj:
    """The edges that a graph holds, in the form in which it holds them.

    Raises:
        ValueError: none; or two forms, which may be of different edges.
    """
    forms = [name for name in ("edge_index", "adj_t") if data.get(name) is not None]
    got = " and ".join(forms) or "neither"
    check(len(forms) == 1, "loader", f"{got} in the graph", "edge_index or adj_t")
    edges: Adj = data[forms[0]]
    return edges


class _LayerByLayer:
    """Run each layer of a GNNMoE over all nodes, some destinations at a time.

    Args:
        model: a ``GNNMoE``.
        data: the graph.
        device: where parts are computed.
        batch_size: destinations per part.
        out: for the logits. If there is one, each part is finished before the next one begins;
            otherwise routers, and what follows the convs, look at all nodes at once.
    """

    def __init__(
        self,
        model: Any,
        data: Data,
        device: torch.device,
        batch_size: int,
        out: Tensor | None,
    ) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.out = out
        self.features: Tensor = data.x.cpu()
        edge_args: Any = {
            name: value.cpu()
            for name in ("edge_weight", "edge_attr")
            if model._takes(name) and (value := data.get(name)) is not None
        }
        num_nodes = self.features.size(0)
        edges: Any = stored_edges(data).to("cpu")
        if isinstance(edges, Graph):
            self.graph = edges.fitting((num_nodes, num_nodes), model.flow, **edge_args)
        else:
            self.graph = Graph(edges, num_nodes, flow=model.flow, **edge_args)
        self.num_nodes = num_nodes
        self.batch = None if data.get("batch") is None else data.batch.to(device)
        self.routings: list[Routing] = []
        self.scales: dict[tuple[Any, ...], Tensor] = {}

    def logits(self) -> Tensor:
        """(N, O) the output of the model."""
        model = self.model
        x = self.collect(self.entered()) if model.has_input_layer else self.features
        outputs: list[Tensor] = []
        for layer in range(model.num_layers):
            x = self.layer(layer, x)
            outputs = [*outputs, x] if model.joins_layers else [x]
        if self.out is not None:  # the last layer has filled it
            return x
        left: Tensor = model.leave([output.to(self.device) for output in outputs])
        return left.cpu()

    def layer(self, layer: int, x: Tensor) -> Tensor:
        """(N, D) the output of a layer, from its input."""
        if self.out is None:
            return self.all_at_once(layer, x)
        return self.collect(self.finished(layer, x), layer == self.model.num_layers - 1)

    def entered(self) -> Iterator[tuple[slice, Tensor]]:
        """What the first layer sees of the raw features, part by part."""
        for rows in self.ranges():
            nodes = torch.arange(rows.start, rows.stop)
            yield rows, self.model.enter(self.rows(self.features, nodes))

    def finished(self, layer: int, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The output of a layer (the logits of the last), part by part, each routed by itself."""
        model = self.model
        for rows, nodes, graph in self.parts():
            routing = None  # the layer's own router decides
            if model.shared_router is not None and model.has_experts(layer):
                seen = model.shared_router_input(self.rows(self.features, nodes), graph)
                routing = model.shared_router(seen)
            x_part = self.rows(x, nodes)
            out, _ = model.convolve(layer, x_part, graph, None, routing)
            out, _ = model.finish(layer, x_part, out, Nodes(), routing)
            yield rows, model.leave([out]) if layer == model.num_layers - 1 else out

    def convolved(
        self, layer: int, x: Tensor, decision: Routing | None
    ) -> Iterator[tuple[slice, Tensor]]:
        """A layer's conv and residual, part by part, by a decision for all nodes."""
        for rows, nodes, graph in self.parts():
            routing = None if decision is None else decision.select(rows)
            yield rows, self.model.convolve(layer, self.rows(x, nodes), graph, None, routing)[0]

    def all_at_once(self, layer: int, x: Tensor) -> Tensor:
        """(N, C) the output of a layer whose router and norm may look at all nodes."""
        model = self.model
        # 1. Decide for all nodes: a shared router before its first MoE layer, that of a conv with
        # experts before each. Experts behind a conv see its output, and decide in 3.
        decision = None
        is_moe = model.has_experts(layer)
        if is_moe and model.shared_router is not None and self.routings:
            decision = self.routings[-1]
        elif is_moe and (
            model.shared_router is not None or isinstance(model.convs[layer], MoEConv)
        ):
            decision = self.route(layer, x)
            self.routings.append(decision)

        # 2. Conv and residual, part by part.
        out = self.collect(self.convolved(layer, x, decision)).to(self.device)

        # 3. The rest on all nodes at once, since some norms and routers look at all of them.
        nodes = Nodes(self.batch, edge_index=self.graph.edge_index.to(self.device))
        x, routing = model.finish(layer, x, out, nodes, decision)
        if routing is not None and decision is None:
            self.routings.append(routing)
        return x.cpu()

    def route(self, layer: int, x: Tensor) -> Routing:
        """Route all nodes, by what the router of a layer, or the shared one, sees of them."""
        conv = self.model.convs[layer]
        shared = self.model.shared_router
        seen = []
        for _, nodes, graph in self.parts():
            if shared is None:
                seen.append(conv.router_features(self.rows(x, nodes), graph))
            else:
                raw = self.rows(self.features, nodes)
                seen.append(self.model.shared_router_input(raw, graph))
        router = conv.router if shared is None else shared
        assert router is not None  # a layer without a router of its own needs a shared one
        edge_index = self.graph.edge_index.to(self.device)
        routing: Routing = router(torch.cat(seen), self.batch, edge_index)
        return routing

    def rows(self, x: Tensor, nodes: Tensor) -> Tensor:
        """(S, D) the features of some nodes, on the device; raw ones as wide as the model's."""
        rows = x[nodes].to(self.device)
        if x is self.features and rows.is_floating_point():
            rows = rows.to(torch.promote_types(rows.dtype, next(self.model.parameters()).dtype))
        return rows

    def ranges(self) -> Iterator[slice]:
        """All nodes in order, a batch at a time."""
        for start in range(0, max(self.num_nodes, 1), self.batch_size):
            yield slice(start, min(start + self.batch_size, self.num_nodes))

    def parts(self) -> Iterator[tuple[slice, Tensor, Graph]]:
        """The destinations of each part as a range, (S,) its nodes, and its graph on the device."""
        for rows in self.ranges():
            nodes, part = self.graph.part(torch.arange(rows.start, rows.stop))

            def scale_of(nodes: Tensor = nodes, **options: Any) -> Tensor:
                return self.scale(**options)[nodes]

            yield rows, nodes, part.scaled_by(scale_of).to(self.device)

    def scale(self, **options: Any) -> Tensor:
        """(N,) GCN's factors of all nodes, by their in-edges, part by part; kept for all layers."""
        key = tuple(options.values())
        if key not in self.scales:
            pieces = []
            for rows in self.ranges():
                _, part = self.graph.part(torch.arange(rows.start, rows.stop))
                pieces.append(part.scale(**options))
            self.scales[key] = torch.cat(pieces)
        return self.scales[key]

    def collect(self, pieces: Iterable[tuple[slice, Tensor]], is_last: bool = False) -> Tensor:
        """(N, C) the rows of all pieces, on the CPU, in a file if there is an ``out``."""
        whole = self.out if is_last else None
        for rows, piece in pieces:
            if whole is None:  # now the width is known
                shape = (self.num_nodes, piece.size(1))
                if self.out is None or not self.num_nodes:  # no file is mapped that is empty
                    whole = piece.new_empty(shape, device="cpu")
                else:
                    whole = _in_file(shape, piece.dtype)
            whole[rows] = piece.to(whole.device)
        assert whole is not None  # there is one piece at least
        return whole


def _in_file(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tensor in a file that has no name: its space is free again when the tensor is gone."""
    with NamedTemporaryFile(prefix="gmoe-") as file:
        size = shape[0] * shape[1]
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def _check_hops(model: Any) -> None:
    """Refuse convs that look further than one hop: a part holds no more."""
    for layer, conv in enumerate(model.convs):
        if isinstance(conv, MoEConv):
            refuse_far(far for part in conv.parts() for far in part.too_far)
            continue
        if not looks_one_hop(conv, model.conv_width(layer), model.local or None):
            refuse_far([conv])


def _check_out(model: Any, out: Any, num_nodes: int) -> None:
    """Refuse an ``out`` that does not fit, and models that cannot run one part at a time."""
    shape = (num_nodes, model.out_channels)
    is_fitting = isinstance(out, Tensor) and out.shape == shape and out.is_floating_point()
    check(is_fitting, "out", described(out), f"floating-point numbers of shape {shape}")
    legal = "eval() before out is filled"
    check(not model.training, "model", "one in training mode", legal)
    jk = getattr(model, "jk_mode", None)
    legal = "None or 'last': others keep every layer"
    check(not model.joins_layers, "jk", f"{jk!r} with out", legal)
    for norm in model.norms:
        legal = "one by row: batch norm, LayerNorm(mode='node') or none"
        check(is_by_row(norm), "norm", f"{type(norm).__name__} with out", legal)
    for router in model.modules():
        is_by_token = not isinstance(router, Router) or router.by_token
        legal = (
            "one that decides token by token: token choice, random, uniform, centroids, or "
            "inference='threshold'"
        )
        check(is_by_token, "router", f"{type(router).__name__} with out", legal)
