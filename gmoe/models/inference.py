"""Layer-wise inference of a GNNMoE: part by part, over a graph in memory or on disk.

Shapes: N nodes, n destinations of a part, S nodes of a part (these come first), D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader
from torch_geometric.nn import BatchNorm, LayerNorm
from tqdm import tqdm

from gmoe._checks import check, check_counts
from gmoe.conv.base import refuse_far
from gmoe.conv.graph import Graph, numbered
from gmoe.conv.kinds import looks_one_hop
from gmoe.conv.moe_conv import MoEConv
from gmoe.data.stored import StoredGraph, create_npy
from gmoe.routers import Router
from gmoe.routing import Routing


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
) -> Any:
    """Logits of all nodes, layer by layer in chunks, without gradients: equal to the forward on the
    whole graph.

    Each layer routes once over all nodes, so that no node's experts depend on its chunk, and GCN's
    degrees are those of the whole graph. Call ``eval()`` first, as for any evaluation.

    Of a :class:`gmoe.StoredGraph`, the features of all nodes are kept on disk, in ``folder``, and
    memory is that of a chunk, its in-edges and their sources. Each chunk is then routed by itself:
    routers must decide token by token (token choice, random, uniform, centroids, or expert choice
    with ``inference="threshold"``), norms row by row.

    Args:
        loader: a node loader, of which the graph and the batch size are taken (not what it
            samples), or the graph: ``x``, ``edge_index``, and, where they are there and the convs
            take them, ``edge_weight``, ``edge_attr`` and ``batch``. Or a stored graph.
        device: where chunks are computed (default: where the model is); the features of all nodes
            stay on the CPU.
        progress_bar: show one (default ``False``).
        batch_size: nodes per chunk (default: the loader's, or 1,024).
        return_routing: return the routings too, as :meth:`forward` does.
        folder: of a stored graph, where to write ``logits.npy``, as which the result is mapped.
            Hidden features go into a fresh folder inside it, which is removed in the end, so
            that several calls may share ``folder``: the last one to end leaves its ``logits.npy``.
            Results of earlier calls stay as they are.

    Raises:
        ValueError: of a stored graph, no ``folder``; ``return_routing``, which would take memory
            for all nodes; a model in training; a router, norm, ``jk``, ``flow`` or number of hops
            that needs all nodes at once, by name.
        RuntimeError: a conv that looks further than one hop, such as ``ChebConv``.
    """
    data = loader if isinstance(loader, Data | StoredGraph) else getattr(loader, "data", loader)
    data = data[0] if isinstance(data, tuple) else data
    batch_size = getattr(loader, "batch_size", None) or 1024 if batch_size is None else batch_size
    check_counts(batch_size=batch_size)
    device = torch.device(device or next(model.parameters()).device)
    for layer, conv in enumerate(model.convs):
        width = model.hidden_channels if layer else model.in_channels
        if isinstance(conv, MoEConv):
            refuse_far(far for part in conv.parts() for far in part.too_far)
        elif not looks_one_hop(conv, width, model.local or None):
            refuse_far([conv])
    if not isinstance(data, StoredGraph):
        check(folder is None, "folder", f"{str(folder)!r} for a graph in memory", None)
        if not isinstance(data, Data) or data.x is None or data.edge_index is None:
            raise ValueError(
                f"loader: got one over {type(data).__name__}, expected a Data with x and edge_index"
            )
        weight, attr = (
            data.get(name) if model._takes(name) else None for name in ("edge_weight", "edge_attr")
        )
        graph = model._graph(data.x, data.edge_index, weight, attr).to("cpu")
        batch = None if data.get("batch") is None else data.batch.to(device)
        way = PartByPart(
            model, graph, data.x.cpu(), graph.num_dst, device, batch_size, progress_bar, batch=batch
        )
        logits = model.through(way.raw, way.step)
        return (logits, way.routings) if return_routing else logits
    _check_stored(model, data)
    check(
        not return_routing,
        "return_routing",
        "True",
        "False for a stored graph: it takes memory for all nodes",
    )
    if folder is None:
        raise ValueError(
            "folder: got None, expected where to write the hidden features of a stored graph"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # calls that run at once, in other threads or processes, each have a folder of their own
    with TemporaryDirectory(prefix="inference-", dir=folder) as name:
        own = Path(name)
        way = PartByPart(model, data, data, data.num_nodes, device, batch_size, progress_bar, own)
        logits = model.through(data, way.step)
        # in one step: readers find the earlier file or this one, and keep the one that they opened
        way.path.replace(folder / "logits.npy")
    return logits


@dataclass(eq=False)
class PartByPart:
    """A GNNMoE's loop over layers, each computed part by part.

    In memory, each layer routes once over all nodes. Of a stored graph, features are in files, two
    of which take turns, and each part is routed by itself; memory is that of a part: its in-edges,
    and the features of their sources.

    Args:
        model: a ``GNNMoE``.
        graph: in memory or stored.
        raw: (N, D) the features; of a stored graph, the graph.
        num_nodes: N.
        device: where parts are computed.
        batch_size: destinations a part.
        progress_bar: show one.
        folder: for the files of a stored graph, which no other call writes to.
        batch: (N,) the graph of each node.
    """

    model: Any
    graph: Any
    raw: Any
    num_nodes: int
    device: torch.device
    batch_size: int
    progress_bar: bool
    folder: Path | None = None
    batch: Tensor | None = None
    routings: list[Routing] = field(default_factory=list)
    path: Path = Path()
    """The file that was written last."""

    def step(self, layer: int, x: Any) -> Tensor:
        """(N, D) a layer's output."""
        model, conv, shared = self.model, self.model.convs[layer], self.model.shared_router
        routed = isinstance(conv, MoEConv)
        owner, seen = (conv, x) if shared is None else (model, self.raw)
        if routed and self.folder is None and (shared is None or not self.routings):
            views = [
                owner.view(self.rows(seen, nodes), part) for _, nodes, part in self.parts("Routing")
            ]
            router = conv.router if shared is None else shared
            self.routings.append(
                router(torch.cat(views), self.batch, self.graph.edge_index.to(self.device))
            )

        found = torch.empty(0)
        for rows, nodes, part in self.parts(f"Layer {layer + 1}"):
            routing = None
            if routed and self.routings:
                routing = self.routings[-1].select(rows)
            elif routed and shared is not None:
                routing = shared(model.view(self.rows(self.raw, nodes), part))
            out, _ = model.conv(layer, self.rows(x, nodes), part, None, routing)
            out = out if self.folder is None else model.after(layer, out)
            found = found if rows.start else self.empty(layer, out)
            found[rows] = out.cpu()
        # all nodes at once, since some norms look at all of them
        return (
            model.after(layer, found.to(self.device), self.batch).cpu()
            if self.folder is None
            else found
        )

    def empty(self, layer: int, like: Tensor) -> Tensor:
        """(N, D) for a layer's output, in memory or in a file."""
        shape = self.num_nodes, like.size(1)
        if self.folder is None:
            return like.new_empty(shape, device="cpu")
        self.path = self.folder / f"hidden-{layer % 2}.npy"
        return create_npy(self.path, like.dtype, shape)

    def rows(self, x: Any, nodes: slice | Tensor) -> Tensor:
        """The features of some nodes, where parts are computed."""
        stored = isinstance(x, StoredGraph)
        found = x.rows("x", nodes).to(next(self.model.parameters()).dtype) if stored else x[nodes]
        return found.to(self.device)

    def ranges(self, name: str) -> Iterator[slice]:
        """The nodes in order, some at a time."""
        for start in tqdm(
            range(0, max(self.num_nodes, 1), self.batch_size), name, disable=not self.progress_bar
        ):
            yield slice(start, min(start + self.batch_size, self.num_nodes))

    def parts(self, name: str) -> Iterator[tuple[slice, Tensor, Graph]]:
        """Some destinations as a range, the nodes of their part of the graph (they come first), and
        the part.
        """
        part_of = self.graph.part if self.folder is None else self.stored_part
        for rows in self.ranges(name):
            nodes, part = part_of(torch.arange(rows.start, rows.stop))
            yield rows, nodes, part.to(self.device)

    def stored_part(self, token: Tensor) -> tuple[Tensor, Graph]:
        """:meth:`Graph.part` of a stored graph, of consecutive destinations."""
        first, start = int(token[0]), self.graph.start
        source, destination = self.graph.in_edges(slice(first, first + len(token)))
        nodes, source = numbered(token, source)
        part = Graph(torch.stack([source, destination - first]), (len(nodes), len(token)))
        part.num_rows = len(nodes)

        def scale(improved: bool, loops: bool, dtype: torch.dtype) -> Tensor:
            degree = start[nodes + 1] - start[nodes]
            degree = (
                degree - self.loops[nodes] + 1 if loops else degree
            )  # one a node, in place of those there are
            found = degree.to(dtype).pow(-0.5)
            return found.masked_fill(found == torch.inf, 0.0)

        part.scale_of = scale
        return nodes, part

    @cached_property
    def loops(self) -> Tensor:
        """(N,) the self-loops of each node of a stored graph, 4 bytes a node."""
        loops = torch.empty(self.num_nodes, dtype=torch.int32)
        for rows in self.ranges("Loops"):
            source, node = self.graph.in_edges(rows)
            loops[rows] = (
                (node[source == node] - rows.start).bincount(minlength=rows.stop - rows.start).int()
            )
        return loops


def _check_stored(model: Any, graph: StoredGraph) -> None:
    """Refuse models that cannot be computed a part of a stored graph at a time."""
    check(graph.num_nodes, "loader", "no nodes", "at least one")
    dtype = next(model.parameters()).dtype
    check(
        dtype in (torch.float32, torch.float64),
        "model",
        dtype,
        "float32 or float64: what .npy files hold",
    )
    check(
        not model.training,
        "model",
        "one in training mode",
        "eval() before inference of a stored graph",
    )
    check(
        model.jk_mode in (None, "last"),
        "jk",
        repr(model.jk_mode),
        "None or 'last': others keep every layer",
    )
    check(
        model.flow == "source_to_target",
        "flow",
        repr(model.flow),
        "'source_to_target': in-edges are stored",
    )
    for norm in model.norms:
        plain = norm.module if isinstance(norm, BatchNorm) else norm
        by_row = isinstance(plain, nn.Identity | nn.LayerNorm)
        by_row |= isinstance(plain, LayerNorm) and plain.mode == "node"
        by_row |= isinstance(plain, nn.BatchNorm1d) and plain.track_running_stats
        check(
            by_row,
            "norm",
            type(norm).__name__,
            "one by row: batch norm, LayerNorm(mode='node') or none",
        )
    legal = "one that decides token by token: token choice, random, uniform, centroids, or inference='threshold'"
    for router in model.modules():
        if isinstance(router, Router):
            check(router.by_token, "router", type(router).__name__, legal)
