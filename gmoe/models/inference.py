"""Layer-wise inference of a GNNMoE: part by part, over a graph in memory or on disk.

Shapes: N nodes, n destinations of a part, S nodes of a part (these come first), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
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
from gmoe.routers import ExpertChoice, MultiCentroid, RandomRouter, Router, TokenChoice, UniformRouter
from gmoe.routing import Routing


def inference(
    model: Any,
    loader: NodeLoader | Data | StoredGraph,
    device: torch.device | str | None,
    embedding_device: torch.device | str,
    progress_bar: bool,
    batch_size: int | None,
    return_routing: bool,
    folder: str | Path | None,
) -> Any:
    """See :meth:`gmoe.GNNMoE.inference`."""
    data: Any = loader if isinstance(loader, Data | StoredGraph) else loader.data
    data = data[0] if isinstance(data, tuple) else data
    if batch_size is None:
        batch_size = 1024 if isinstance(loader, Data | StoredGraph) else int(loader.batch_size or 1)
    check_counts(batch_size=batch_size)
    device = next(model.parameters()).device if device is None else torch.device(device)
    for layer, conv in enumerate(model.convs):
        width = model.in_channels if layer == 0 and model.lin_in is None else model.hidden_channels
        if isinstance(conv, MoEConv):
            refuse_far([*conv.experts.too_far, *([] if conv.shared_expert is None else conv.shared_expert.too_far)])
        else:
            refuse_far([] if looks_one_hop(conv, width, model.local or None) else [conv])
    if isinstance(data, StoredGraph):
        if folder is None:
            raise ValueError("folder: got None, expected where to write the embeddings of a stored graph")
        in_memory = {"embedding_device": str(embedding_device) != "cpu", "return_routing": return_routing}
        for name, value in in_memory.items():
            check(not value, name, "what takes memory for all nodes", "the default, where the graph is stored")
        return _on_disk(model, data, Path(folder), device, batch_size, progress_bar)
    check(folder is None, "folder", f"{str(folder)!r} for a graph in memory", None)
    if not isinstance(data, Data) or data.x is None or data.edge_index is None:
        raise ValueError(f"loader: got one over {type(data).__name__}, expected a Data with x and edge_index")
    x, batch, home = data.x, data.get("batch"), torch.device(embedding_device)
    graph = model._graph(x, data.edge_index, data.get("edge_weight"), data.get("edge_attr"))
    way = PartByPart(model, graph, device, batch_size, progress_bar, home, batch=batch)
    logits = way.run(x.to(home))
    return (logits, way.routings) if return_routing else logits


class PartByPart:
    """A GNNMoE's loop over layers, each computed part by part.

    In memory, each layer routes once over all nodes. Of a stored graph, features are in files, two of which take turns,
    and each part is routed by itself; memory is that of a part: its in-edges, and the features of their sources.

    Args:
        model: a ``GNNMoE``.
        graph: in memory or stored.
        device: where parts are computed.
        batch_size: destinations a part.
        progress_bar: show one.
        home: where the features of all nodes are kept, if not in files.
        folder: for the files.
        batch: (N,) the graph of each node.
    """

    def __init__(
        self,
        model: Any,
        graph: Graph | StoredGraph,
        device: torch.device,
        batch_size: int,
        progress_bar: bool,
        home: torch.device,
        folder: Path | None = None,
        batch: Tensor | None = None,
    ) -> None:
        self.model, self.graph, self.device, self.batch_size = model, graph, device, batch_size
        self.progress_bar, self.home, self.folder = progress_bar, home, folder
        self.batch = None if batch is None else batch.to(device)
        self.num_nodes: int = graph.num_dst if isinstance(graph, Graph) else graph.num_nodes
        self.routings: list[Routing] = []
        self.raw: Any = None
        self.files = 0

    def run(self, x: Any) -> Tensor:
        """(N, out_channels) the logits of features, or of what gives rows of them."""
        self.raw = x
        if self.model.shared_router is not None and isinstance(self.graph, Graph):
            self.routings.append(self.route(self.model, self.model.shared_router, x))
        logits: Tensor = self.model.through(x, self.step, self.each)
        return logits

    def route(self, part: Any, router: Any, x: Any) -> Routing:
        """The decision over all nodes; ``part`` of the model says what its router sees."""
        views = [part.view(x[nodes].to(self.device), graph) for _, nodes, graph in self.parts("Routing")]
        assert isinstance(self.graph, Graph)
        routing: Routing = router(torch.cat(views), self.batch, self.graph.edge_index.to(self.device))
        return routing

    def each(self, module: nn.Module, x: Any) -> Tensor:
        """(N, D) a module that treats each row by itself."""
        return self.gathered((rows, module(x[rows].to(self.device))) for rows in self.ranges(type(module).__name__))

    def step(self, layer: int, x: Any) -> Tensor:
        """(N, D) a layer's output."""
        conv, routing = self.model.convs[layer], None
        if isinstance(conv, MoEConv) and isinstance(self.graph, Graph):
            shared = self.model.shared_router is not None
            routing = self.routings[0] if shared else self.route(conv, conv.router, x)
            self.routings += [] if shared else [routing]

        def computed() -> Iterator[tuple[slice, Tensor]]:
            for rows, nodes, part in self.parts(f"Layer {layer + 1}"):
                followed = None if routing is None else routing.select(rows)
                if self.model.shared_router is not None and isinstance(conv, MoEConv) and routing is None:
                    followed = self.model.shared_router(self.model.view(self.raw[nodes].to(self.device), part))
                out, _ = self.model.conv(layer, x[nodes].to(self.device), part, None, followed)
                yield rows, out if self.folder is None else self.model.after(layer, out)

        out = self.gathered(computed())
        # all nodes at once, since some norms look at all of them
        return self.model.after(layer, out.to(self.device), self.batch).to(self.home) if self.folder is None else out

    def gathered(self, parts: Iterable[tuple[slice, Tensor]]) -> Tensor:
        """(N, D) rows of all nodes, in memory or in a file."""
        found: Tensor | None = None
        for rows, out in parts:
            if found is None:
                found = self._new((self.num_nodes, out.size(1)), out.dtype)
            found[rows] = out.to(found.device)
        assert found is not None
        return found

    def _new(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.folder is None:
            return torch.empty(shape, dtype=dtype, device=self.home)
        self.files += 1
        return create_npy(self.path, dtype, shape)

    @property
    def path(self) -> Path:
        """The file that was written last."""
        assert self.folder is not None
        return self.folder / f"hidden-{self.files % 2}.npy"

    def ranges(self, name: str) -> Iterator[slice]:
        """The nodes in order, some at a time."""
        for start in tqdm(range(0, max(self.num_nodes, 1), self.batch_size), name, disable=not self.progress_bar):
            yield slice(start, min(start + self.batch_size, self.num_nodes))

    def parts(self, name: str) -> Iterator[tuple[slice, Tensor, Graph]]:
        """Some destinations as a range, the nodes of their part of the graph (they come first), and the part."""
        for rows in self.ranges(name):
            if isinstance(self.graph, StoredGraph):
                nodes, part = self.stored_part(self.graph, rows)
            else:
                nodes, part = self.graph.part(torch.arange(rows.start, rows.stop, device=self.graph.edge_index.device))
            yield rows, nodes.to(self.home), part.to(self.device)

    def stored_part(self, graph: StoredGraph, rows: slice) -> tuple[Tensor, Graph]:
        """:meth:`Graph.part` of a stored graph."""
        source, destination = graph.in_edges(rows)
        nodes, source = numbered(torch.arange(rows.start, rows.stop), source)
        edge_index, size = torch.stack([source, destination - rows.start]), rows.stop - rows.start
        if not len(source):
            nodes = torch.cat([nodes, nodes[:1]])
        part = Graph(edge_index, len(nodes))
        if not len(source):  # some convs fail without an edge: one more node, with a loop
            part.adj = torch.full((2, 1), size)
        part.num_dst = size

        def scale(improved: bool, loops: bool, dtype: torch.dtype) -> Tensor:
            degree = graph.start[nodes + 1] - graph.start[nodes]
            degree = degree - self.loops[nodes] + 1 if loops else degree  # one a node, in place of those there are
            found = degree.to(dtype).pow(-0.5)
            return found.masked_fill(found == torch.inf, 0.0)

        part.scale_of = scale
        return nodes, part

    @cached_property
    def loops(self) -> Tensor:
        """(N,) the self-loops of each node of a stored graph, in a file."""
        assert isinstance(self.graph, StoredGraph)
        assert self.folder is not None
        loops = create_npy(self.folder / "loops.npy", torch.int32, (self.num_nodes,))
        for rows in self.ranges("Loops"):
            source, node = self.graph.in_edges(rows)
            loops[rows] = (node[source == node] - rows.start).bincount(minlength=rows.stop - rows.start).int()
        return loops


class StoredRows:
    """Rows of a stored graph's features.

    Args:
        graph: the graph.
        dtype: in which they are handed out.
    """

    def __init__(self, graph: StoredGraph, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self.graph.rows("x", index).to(self.dtype)


def _on_disk(model: Any, graph: StoredGraph, folder: Path, device: torch.device, batch_size: int, bar: bool) -> Tensor:
    """(N, out_channels) the logits, mapped from ``folder / "logits.npy"``."""
    check(graph.num_nodes, "loader", "no nodes", "at least one")
    check(graph.x_dim == model.in_channels, "x", f"{graph.x_dim} columns", f"in_channels={model.in_channels}")
    _check_stored(model)
    dtype = next(model.parameters()).dtype
    check(dtype in (torch.float32, torch.float64), "model", dtype, "float32 or float64: what .npy files hold")
    folder.mkdir(parents=True, exist_ok=True)
    way = PartByPart(model, graph, device, batch_size, bar, torch.device("cpu"), folder)
    try:
        logits = way.run(StoredRows(graph, dtype))
        way.path.replace(folder / "logits.npy")
        return logits
    finally:
        for name in ("loops", "hidden-0", "hidden-1"):
            (folder / f"{name}.npy").unlink(missing_ok=True)


def _check_stored(model: Any) -> None:
    """Refuse models that cannot be computed a part of a stored graph at a time."""
    check(not model.training, "model", "one in training mode", "eval() before inference of a stored graph")
    check(model.jk_mode in (None, "last"), "jk", repr(model.jk_mode), "None or 'last': others keep every layer")
    for norm in model.norms:
        got = f"{type(norm).__name__}, which looks at all rows,"
        check(_is_row_wise(norm), "norm", got, "one by row: batch norm, LayerNorm(mode='node') or none")
    for part in model.modules():
        if isinstance(part, Router):
            how = " with inference='group'" if isinstance(part, ExpertChoice | MultiCentroid) else ""
            got = f"{type(part).__name__}{how}, whose tokens compete or depend on each other,"
            legal = "tokens that decide alone: token choice, random, uniform, centroids, or inference='threshold'"
            check(_decides_alone(part), "router", got, legal)
    check(model.flow == "source_to_target", "flow", repr(model.flow), "'source_to_target': in-edges are stored")


def _decides_alone(router: Router) -> bool:
    if isinstance(router, ExpertChoice | MultiCentroid):
        return router.selection is None or router.selection.inference == "threshold"
    return isinstance(router, TokenChoice | RandomRouter | UniformRouter)


def _is_row_wise(norm: nn.Module) -> bool:
    """True of a norm that, in evaluation, treats each row by itself."""
    norm = norm.module if isinstance(norm, BatchNorm) else norm
    if isinstance(norm, nn.BatchNorm1d):
        return bool(norm.track_running_stats)
    return isinstance(norm, nn.Identity | nn.LayerNorm) or (isinstance(norm, LayerNorm) and norm.mode == "node")
