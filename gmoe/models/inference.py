"""Layer-wise inference of a GNNMoE: part by part, over a graph in memory or on disk.

Shapes: N nodes, n destinations of a part, S nodes of a part (the destinations come first), D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.typing import Adj
from tqdm import tqdm

from gmoe._checks import check_counts
from gmoe.conv.base import refuse_far
from gmoe.conv.build import looks_one_hop
from gmoe.conv.graph import Graph
from gmoe.conv.moe_conv import MoEConv
from gmoe.data.stored import StoredGraph, create_npy
from gmoe.edges import renumber
from gmoe.models.parts import is_by_row
from gmoe.routers import Router
from gmoe.routing import Routing


@overload
def inference(
    model: Any,
    loader: NodeLoader | Data | StoredGraph,
    device: torch.device | str | None = ...,
    *,
    progress_bar: bool = ...,
    batch_size: int | None = ...,
    return_routing: Literal[False] = ...,
    folder: str | Path | None = ...,
) -> Tensor: ...


@overload
def inference(
    model: Any,
    loader: NodeLoader | Data | StoredGraph,
    device: torch.device | str | None = ...,
    *,
    progress_bar: bool = ...,
    batch_size: int | None = ...,
    return_routing: Literal[True],
    folder: str | Path | None = ...,
) -> tuple[Tensor, list[Routing]]: ...


@torch.no_grad()
def inference(
    model: Any,
    loader: NodeLoader | Data | StoredGraph,
    device: torch.device | str | None = None,
    *,
    progress_bar: bool = False,
    batch_size: int | None = None,
    return_routing: bool = False,
    folder: str | Path | None = None,
) -> Tensor | tuple[Tensor, list[Routing]]:
    """Logits of all nodes, layer by layer in chunks, without gradients.

    They equal those of the forward on the whole graph: each layer routes once over all nodes, so
    that a node's experts do not depend on its chunk, and GCN's degrees are those of the whole
    graph. Call ``eval()`` first, as for any evaluation.

    With a :class:`gmoe.StoredGraph`, the features of all nodes stay on disk, in ``folder``, and
    memory holds one chunk, its in-edges and their sources. Each chunk is then routed by itself:
    routers must decide token by token (token choice, random, uniform, centroids, or expert choice
    with ``inference="threshold"``), and norms must work row by row.

    Args:
        loader: a graph; or a node loader, whose graph and batch size are used, but not its sampler.
        device: where chunks are computed (default: where the model is); the features of all nodes
            stay on the CPU.
        progress_bar: show one (default ``False``).
        batch_size: nodes per chunk (default: the loader's, or 1,024).
        return_routing: return the routings too, as :meth:`forward` does.
        folder: for a stored graph, where to write ``logits.npy``; the result is a memory map of it.
            Hidden features go into a new folder inside it, which is removed at the end, so that
            several calls may share ``folder``: the last one to end leaves its ``logits.npy``.
            Results of earlier calls remain valid.

    Raises:
        ValueError: for a stored graph, no ``folder``; ``return_routing``, which would take memory
            for all nodes; a model in training; a router, norm, ``jk``, ``flow`` or number of hops
            that needs all nodes at once, by name. A graph in memory with a ``folder``, or with
            both ``edge_index`` and ``adj_t``.
        RuntimeError: a conv that looks further than one hop, such as ``ChebConv``.
    """
    data = loader if isinstance(loader, Data | StoredGraph) else getattr(loader, "data", loader)
    if isinstance(data, tuple):  # a loader over PyG's stores holds (features, graph)
        data = data[0]
    if not isinstance(data, Data | StoredGraph):
        raise ValueError(
            f"loader: got one over {type(data).__name__}, expected a Data with x, and with "
            "edge_index or adj_t"
        )
    if batch_size is None:
        batch_size = getattr(loader, "batch_size", None) or 1024
    check_counts(batch_size=batch_size)
    device = torch.device(device or next(model.parameters()).device)
    _check_hops(model)

    if not isinstance(data, StoredGraph):
        if folder is not None:
            raise ValueError(f"folder: got {str(folder)!r} for a graph in memory, expected None")
        if data.x is None:
            raise ValueError(
                "loader: got a Data without x, expected one with x, and with edge_index or adj_t"
            )
        run = InMemory(model, data, device, batch_size, progress_bar)
        logits = run.logits()
        return (logits, run.routings) if return_routing else logits

    _check_stored(model, data)
    if return_routing:
        raise ValueError(
            "return_routing: got True, expected False for a stored graph: it takes memory for all "
            "nodes"
        )
    if folder is None:
        raise ValueError(
            "folder: got None, expected where to write the hidden features of a stored graph"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Concurrent calls, in other threads or processes, each get their own folder.
    with TemporaryDirectory(prefix="inference-", dir=folder) as scratch:
        stored_run = OnDisk(model, data, device, batch_size, progress_bar, Path(scratch))
        x: Tensor | StoredGraph = data
        for layer in range(model.num_layers):
            x = logits = stored_run.layer(layer, x)
        # Replacing is atomic: a reader opens the old file or the new one, and keeps what it opened.
        stored_run.last_file.replace(folder / "logits.npy")
    return logits


def stored_edges(data: Data) -> Adj:
    """The edges that a graph holds, in the form in which it holds them.

    Raises:
        ValueError: none; or two forms, which may be of different edges.
    """
    forms = [name for name in ("edge_index", "adj_t") if data.get(name) is not None]
    if len(forms) != 1:
        got = " and ".join(forms) or "neither"
        raise ValueError(f"loader: got {got} in the graph, expected edge_index or adj_t")
    edges: Adj = data[forms[0]]
    return edges


class _LayerByLayer(ABC):
    """Run each layer of a GNNMoE over all nodes, some destinations at a time.

    Args:
        model: a ``GNNMoE``.
        num_nodes: N.
        device: where parts are computed.
        batch_size: destinations per part.
        progress_bar: show one.
    """

    def __init__(
        self,
        model: Any,
        num_nodes: int,
        device: torch.device,
        batch_size: int,
        progress_bar: bool,
    ) -> None:
        self.model = model
        self.num_nodes = num_nodes
        self.device = device
        self.batch_size = batch_size
        self.progress_bar = progress_bar

    @abstractmethod
    def part(self, destinations: Tensor) -> tuple[Tensor, Graph]:
        """(S,) the nodes that consecutive destinations need, and the graph among them."""

    def ranges(self, name: str) -> Iterator[slice]:
        """All nodes in order, a batch at a time; ``name`` is what the progress bar says."""
        starts = range(0, max(self.num_nodes, 1), self.batch_size)
        for start in tqdm(starts, name, disable=not self.progress_bar):
            yield slice(start, min(start + self.batch_size, self.num_nodes))

    def parts(self, name: str) -> Iterator[tuple[slice, Tensor, Graph]]:
        """The destinations of each part as a range, (S,) its nodes, and its graph on the device."""
        for rows in self.ranges(name):
            nodes, graph = self.part(torch.arange(rows.start, rows.stop))
            yield rows, nodes, graph.to(self.device)


class InMemory(_LayerByLayer):
    """Inference over a graph in memory: each layer routes once over all nodes.

    Args:
        model, device, batch_size, progress_bar: see :func:`inference`.
        data: the graph.
    """

    def __init__(
        self, model: Any, data: Data, device: torch.device, batch_size: int, progress_bar: bool
    ) -> None:
        edge_args = {
            name: data.get(name) if model._takes(name) else None
            for name in ("edge_weight", "edge_attr")
        }
        self.graph: Graph = model._graph(data.x, stored_edges(data), **edge_args).to("cpu")
        super().__init__(model, self.graph.num_dst, device, batch_size, progress_bar)
        self.features: Tensor = data.x.cpu()
        self.batch = None if data.get("batch") is None else data.batch.to(device)
        self.routings: list[Routing] = []

    def logits(self) -> Tensor:
        """(N, O) the output of the model."""
        model = self.model
        x = self.features
        if model.has_input_layer:
            x = torch.cat(
                [model.enter(x[rows].to(self.device)).cpu() for rows in self.ranges("Input")]
            )
        outputs: list[Tensor] = []
        for layer in range(model.num_layers):
            x = self.layer(layer, x)
            outputs = [*outputs, x] if model.joins_layers else [x]
        left: Tensor = model.leave([output.to(self.device) for output in outputs])
        return left.cpu()

    def layer(self, layer: int, x: Tensor) -> Tensor:
        """(N, D) the output of a layer, from its input."""
        model = self.model
        # 1. Decide for all nodes at once: a shared router before its first MoE layer, that of a
        # conv with experts before each. Experts behind a conv see its output, and decide in 3.
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
        out = torch.empty(0)
        for rows, nodes, graph in self.parts(f"Layer {layer + 1}"):
            routing = None if decision is None else decision.select(rows)
            out_part, _ = model.convolve(layer, self.rows(x, nodes), graph, None, routing)
            if rows.start == 0:  # now the width is known
                out = out_part.new_empty((self.num_nodes, out_part.size(1)), device="cpu")
            out[rows] = out_part.cpu()

        # 3. The rest on all nodes at once, since some norms and routers look at all of them.
        edge_index = self.graph.edge_index.to(self.device)
        x, routing = model.finish(
            layer, x, out.to(self.device), self.batch, routing=decision, edge_index=edge_index
        )
        if routing is not None and decision is None:
            self.routings.append(routing)
        return x.cpu()

    def route(self, layer: int, x: Tensor) -> Routing:
        """Route all nodes, by what the router of a layer, or the shared one, sees of them."""
        conv = self.model.convs[layer]
        shared = self.model.shared_router
        seen = []
        for _, nodes, graph in self.parts("Routing"):
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
        """(S, D) the features of some nodes, on the device."""
        return x[nodes].to(self.device)

    def part(self, destinations: Tensor) -> tuple[Tensor, Graph]:
        return self.graph.part(destinations)


class OnDisk(_LayerByLayer):
    """Inference over a stored graph: each part is routed by itself, and features are in files.

    Two files take turns: a layer reads one and writes the other. Memory is that of one part: its
    in-edges, and the features of their sources.

    Args:
        model, device, batch_size, progress_bar: see :func:`inference`.
        graph: the stored graph.
        folder: for the files; no other call writes there.
    """

    def __init__(
        self,
        model: Any,
        graph: StoredGraph,
        device: torch.device,
        batch_size: int,
        progress_bar: bool,
        folder: Path,
    ) -> None:
        super().__init__(model, graph.num_nodes, device, batch_size, progress_bar)
        self.graph = graph
        self.folder = folder
        self.last_file = Path()  # the file that was written last

    def layer(self, layer: int, x: Tensor | StoredGraph) -> Tensor:
        model = self.model
        is_moe = model.has_experts(layer)
        out = torch.empty(0)
        for rows, nodes, graph in self.parts(f"Layer {layer + 1}"):
            routing = None  # the layer's own router decides
            if is_moe and model.shared_router is not None:
                seen = model.shared_router_input(self.rows(self.graph, nodes), graph)
                routing = model.shared_router(seen)
            x_part = self.rows(x, nodes)
            if layer == 0:
                x_part = model.enter(x_part)
            out_part, _ = model.convolve(layer, x_part, graph, None, routing)
            out_part, _ = model.finish(layer, x_part, out_part, routing=routing)
            if layer == model.num_layers - 1:
                out_part = model.leave([out_part])
            if rows.start == 0:  # now the width is known
                self.last_file = self.folder / f"hidden-{layer % 2}.npy"
                shape = (self.num_nodes, out_part.size(1))
                out = create_npy(self.last_file, out_part.dtype, shape)
            out[rows] = out_part.cpu()
        return out

    def rows(self, x: Tensor | StoredGraph, nodes: Tensor) -> Tensor:
        """(S, D) the features of some nodes, on the device, and raw ones in the model's dtype."""
        if isinstance(x, StoredGraph):
            return x.rows("x", nodes).to(next(self.model.parameters()).dtype).to(self.device)
        return x[nodes].to(self.device)

    def part(self, destinations: Tensor) -> tuple[Tensor, Graph]:
        """As :meth:`Graph.part`, with all edges from disk."""
        start = self.graph.start
        first = int(destinations[0])
        source, destination = self.graph.in_edges(slice(first, first + len(destinations)))
        nodes, source = renumber(destinations, source)
        edge_index = torch.stack([source, destination - first])

        def scale_of(*, improved: bool, loops: bool, dtype: torch.dtype) -> Tensor:
            """(S,) GCN's factor of each node, by its degree in the whole graph."""
            degree = start[nodes + 1] - start[nodes]
            if loops:  # replace existing self-loops by one
                degree = degree - self.num_loops[nodes] + 1
            factor = degree.to(dtype).pow(-0.5)
            return factor.masked_fill(factor == torch.inf, 0.0)

        part = Graph(edge_index, (len(nodes), len(destinations))).as_part(scale_of)
        return nodes, part

    @cached_property
    def num_loops(self) -> Tensor:
        """(N,) the number of self-loops of each node, 4 bytes a node."""
        num_loops = torch.empty(self.num_nodes, dtype=torch.int32)
        for rows in self.ranges("Loops"):
            source, node = self.graph.in_edges(rows)
            looped = node[source == node] - rows.start
            num_loops[rows] = looped.bincount(minlength=rows.stop - rows.start).int()
        return num_loops


def _check_hops(model: Any) -> None:
    """Refuse convs that look further than one hop: a part holds no more."""
    for layer, conv in enumerate(model.convs):
        if isinstance(conv, MoEConv):
            refuse_far(far for part in conv.parts() for far in part.too_far)
            continue
        if not looks_one_hop(conv, model.conv_width(layer), model.local or None):
            refuse_far([conv])


def _check_stored(model: Any, graph: StoredGraph) -> None:
    """Refuse models that cannot be computed one part of a stored graph at a time."""
    if not graph.num_nodes:
        raise ValueError("loader: got no nodes, expected at least one")
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"model: got {dtype}, expected float32 or float64: what .npy files hold")
    if model.training:
        raise ValueError(
            "model: got one in training mode, expected eval() before inference of a stored graph"
        )
    if model.joins_layers:
        raise ValueError(
            f"jk: got {model.jk_mode!r}, expected None or 'last': others keep every layer"
        )
    if model.flow != "source_to_target":
        raise ValueError(
            f"flow: got {model.flow!r}, expected 'source_to_target': in-edges are stored"
        )
    for norm in model.norms:
        if not is_by_row(norm):
            raise ValueError(
                f"norm: got {type(norm).__name__}, expected one by row: batch norm, "
                "LayerNorm(mode='node') or none"
            )
    for router in model.modules():
        if isinstance(router, Router) and not router.by_token:
            raise ValueError(
                f"router: got {type(router).__name__}, expected one that decides token by token: "
                "token choice, random, uniform, centroids, or inference='threshold'"
            )
