"""Layer-wise inference over a graph on disk, with the embeddings on disk.

Shapes: N nodes, B rows of a block, S nodes that these hear from (they come first), D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import BatchNorm, GCNConv, LayerNorm, MessagePassing
from tqdm import tqdm

from gmoe._checks import check
from gmoe.conv.aggregate import FilterConv, FilterExperts
from gmoe.conv.base import NodeChunks, too_far
from gmoe.conv.graph import Edges, Graph, Matrix
from gmoe.conv.kinds import looks_one_hop
from gmoe.conv.moe_conv import MoEConv
from gmoe.data.stored import StoredGraph, create_npy
from gmoe.routers import ExpertChoice, MultiCentroid, RandomRouter, Router, TokenChoice, UniformRouter


def check_one_hop(conv: Any, width: int, local: bool | None) -> None:
    """Refuse a plain conv that has no layer-wise inference.

    Raises:
        RuntimeError: it looks further than one hop.
    """
    if not looks_one_hop(conv, width, local or None):
        raise too_far([conv])


def dense_chunked(conv: Any, x: Tensor, chunks: NodeChunks) -> Tensor:
    """A plain conv, some nodes at a time; GCN with the degrees of the whole graph."""
    chunks = chunks.in_flow(conv.flow)
    if isinstance(conv, FilterConv):
        return chunks.map(lambda x, part, _: conv(x, part), x)
    if not isinstance(conv, GCNConv) or not conv.normalize:
        return chunks.map(lambda x, part, _: conv(x, part.adj, **part.args_for(conv)), x)
    plain = copy.copy(conv)  # another thread may be running the conv itself
    plain.flow, plain.normalize = "source_to_target", False

    def compute(x: Tensor, part: Graph, _: slice) -> Tensor:
        matrix = part.normalized(conv.improved, conv.add_self_loops, x.dtype)
        out: Tensor = plain(x, torch.stack([matrix.edges.sender, matrix.edges.receiver]), matrix.weight)
        return out

    return chunks.map(compute, x)


class Block(Graph):
    """The in-edges of some rows of a stored graph, as a graph of S nodes, normalized as the whole one is.

    Args:
        graph: the stored graph.
        rows: which of its nodes.
        loops: (N,) how many of each node's in-edges are self-loops; ``None`` if nobody asks for added ones.
        device: where the block is computed.

    Attributes:
        rows: the same.
        others: (S - B,) the sources that are not among them, ascending.
    """

    def __init__(self, graph: StoredGraph, rows: slice, loops: Tensor | None, device: torch.device) -> None:
        size = rows.stop - rows.start
        source, destination = graph.edges_of(int(graph.start[rows.start]), int(graph.start[rows.stop]))
        inside = (source >= rows.start) & (source < rows.stop)
        others, position = source[~inside].unique(return_inverse=True)
        source -= rows.start
        source[~inside] = position + size
        edge_index = torch.stack([source, destination - rows.start])
        if not len(source):  # some convs fail without an edge: one more node, with a loop
            others, edge_index = torch.tensor([rows.start]), torch.full((2, 1), size)
        super().__init__(edge_index.to(device), size + len(others))
        self.rows, self.others, self.constant = rows, others, False
        ends = torch.stack([graph.start[others], graph.start[others + 1]])
        self.degree_S = torch.cat([graph.start[rows.start : rows.stop + 1].diff(), ends[1] - ends[0]])
        self.loops_S = None if loops is None else self.gather(lambda index: loops[index])

    def gather(self, read: Callable[[slice | Tensor], Tensor]) -> Tensor:
        """(S, ...) what ``read`` gives of the nodes."""
        return torch.cat([read(self.rows), read(self.others)])

    def normalize(self, improved: bool, loops: bool, dtype: torch.dtype) -> None:
        """Let :meth:`normalized` give the rows of the whole graph's matrix, which follow from the degrees on disk."""
        degree_S, sender, receiver = self.degree_S, self.edges.sender, self.edges.receiver
        if loops:  # one a node, in place of those there are
            assert self.loops_S is not None
            degree_S = degree_S - self.loops_S + 1
            kept, node = sender != receiver, torch.arange(self.num_dst, device=sender.device)
            sender, receiver = torch.cat([sender[kept], node]), torch.cat([receiver[kept], node])
        scale_S = degree_S.to(sender.device, dtype).pow(-0.5)
        scale_S = scale_S.masked_fill(scale_S == torch.inf, 0.0)
        edges, _ = Edges.sorted(sender, receiver, self.num_src, self.num_dst)
        weight = scale_S.index_select(0, edges.receiver) * scale_S.index_select(0, edges.sender)
        self._matrices[improved, loops, dtype] = Matrix(edges, weight)


def inference_on_disk(
    model: Any, graph: StoredGraph, folder: Path, batch_size: int, device: torch.device, progress_bar: bool
) -> Tensor:
    """(N, out_channels) ``model.inference`` of a stored graph, mapped from ``folder / "logits.npy"``.

    Two files of hidden features take turns, and are removed in the end. Memory is that of a block: its in-edges, and
    the features of their sources.

    Args:
        model: a ``GNNMoE``.
        graph: the graph.
        folder: for the files; made if need be.
        batch_size: rows a block.
        device: where blocks are computed.
        progress_bar: show one.
    """
    check(graph.num_nodes, "loader", "no nodes", "at least one")
    check(graph.x_dim == model.in_channels, "x", f"{graph.x_dim} columns", f"in_channels={model.in_channels}")
    _check_model(model)
    dtype = next(model.parameters()).dtype
    check(dtype in (torch.float32, torch.float64), "model", dtype, "float32 or float64: what .npy files hold")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [slice(first, min(first + batch_size, graph.num_nodes)) for first in range(0, graph.num_nodes, batch_size)]
    temporary = [folder / f"{name}.npy" for name in ("loops", "hidden-0", "hidden-1", "logits-new")]

    def raw(index: slice | Tensor) -> Tensor:
        return graph.rows("x", index).to(dtype)

    def layer_of(layer: int, block: Block, read: Callable[[Any], Tensor]) -> Tensor:
        """(B, D) the layer's output; ``read`` gives rows of its input."""
        size = block.rows.stop - block.rows.start
        x = block.gather(read).to(device)
        if layer == 0 and model.lin_in is not None:
            x = model.lin_in(x)
        chunks = NodeChunks(block, size, device)
        chunks._made = [(slice(0, size), torch.arange(block.num_src), block)]
        conv = model.convs[layer]
        for improved, adds_loops in _normalizations(conv):
            block.normalize(improved, adds_loops, dtype)
        if isinstance(conv, MoEConv):
            routing = _route(model, conv, block, x, raw)
            out, _ = conv.forward_chunked(x, chunks, None, routing)
        else:
            out = dense_chunked(conv, x, chunks)
        if layer < len(model.residuals):
            out = out + model.residuals[layer](x[:size])
        out = model._after(layer, out, None, None)
        return model.lin(out) if layer == model.num_layers - 1 and hasattr(model, "lin") else out

    try:
        adds_loops = any(loops for _, loops in _normalizations(model))
        loops = _count_loops(graph, rows, temporary[0]) if adds_loops else None
        read: Callable[[Any], Tensor] = raw
        for layer in range(model.num_layers):
            last = layer == model.num_layers - 1
            written: Tensor | None = None
            for part in tqdm(rows, desc=f"Layer {layer + 1}/{model.num_layers}", disable=not progress_bar):
                out = layer_of(layer, Block(graph, part, loops, device), read)
                if written is None:
                    path = temporary[3 if last else 1 + layer % 2]
                    written = create_npy(path, out.dtype, (graph.num_nodes, out.size(1)))
                written[part] = out.cpu()
            assert written is not None
            read = written.__getitem__
        temporary[3].replace(folder / "logits.npy")
        return read(slice(None))
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _route(model: Any, conv: MoEConv, block: Block, x: Tensor, raw: Callable[[Any], Tensor]) -> Any:
    """The routing of the block's rows, by the layer's own router or by the one of all layers."""
    size = block.rows.stop - block.rows.start
    if model.shared_router is not None:
        if model.router_input == ("node",):
            return model.shared_router(raw(block.rows).to(x.device))
        return model.shared_router(model._view(block.gather(raw).to(x.device), block, block.mean)[:size])
    assert conv.router is not None
    if conv.router_input == ("node",) and conv.transform is None:
        return conv.router(x[:size])
    u = x if conv.transform is None else conv._transformed(x, x)[0]
    h = conv.experts.aggregate(block, u, u) if "neighbors" in conv.router_input else None
    return conv.router(conv._view(block, u, u, h, block.mean)[:size])


def _normalizations(module: nn.Module) -> set[tuple[bool, bool]]:
    """How its convs normalize the graph: ``improved``, and with added self-loops."""
    gcns = [part for part in _convs(module) if isinstance(part, GCNConv) and part.normalize]
    filters = [part for part in _convs(module) if isinstance(part, FilterConv)]
    return {(part.improved, part.add_self_loops) for part in gcns} | {(False, part.add_self_loops) for part in filters}


def _convs(module: nn.Module) -> Iterator[Any]:
    """All convs, those whose experts are stacked among them."""
    for part in module.modules():
        if isinstance(part, MoEConv):
            yield from part._all_convs()
        elif isinstance(part, MessagePassing):
            yield part


def _count_loops(graph: StoredGraph, rows: list[slice], path: Path) -> Tensor:
    """(N,) the self-loops of each node, in a file."""
    loops = create_npy(path, torch.int32, (graph.num_nodes,))
    for part in rows:
        source, node = graph.edges_of(int(graph.start[part.start]), int(graph.start[part.stop]))
        loops[part] = (node[source == node] - part.start).bincount(minlength=part.stop - part.start).int()
    return loops


def _check_model(model: Any) -> None:
    """Refuse what cannot be computed a block of rows at a time."""
    check(not model.training, "model", "one in training mode", "eval() before inference of a stored graph")
    check(model.jk_mode in (None, "last"), "jk", repr(model.jk_mode), "None or 'last': others keep every layer")
    for norm in model.norms:
        got = f"{type(norm).__name__}, which looks at all rows,"
        check(_is_row_wise(norm), "norm", got, "one by row: batch norm, LayerNorm(mode='node') or none")
    far = "neighbors" in model.router_input and model.shared_router is not None and model.router_hops > 1
    check(not far, "router_hops", model.router_hops, "1, where a shared router sees neighbors of a stored graph")
    for part in model.modules():
        if isinstance(part, Router):
            how = " with inference='group'" if isinstance(part, ExpertChoice | MultiCentroid) else ""
            got = f"{type(part).__name__}{how}, whose tokens compete or depend on each other,"
            legal = "tokens that decide alone: token choice, random, uniform, centroids, or inference='threshold'"
            check(_decides_alone(part), "router", got, legal)
        if isinstance(part, FilterExperts | FilterConv):
            check(part.hops <= 1, "hops", part.hops, "1, where the graph is stored")
    for part in _convs(model):
        got = f"{part.flow!r} of {type(part).__name__}"
        check(part.flow == "source_to_target", "flow", got, "'source_to_target': in-edges are stored")
    for layer, conv in enumerate(model.convs):
        if not isinstance(conv, MoEConv):
            first = layer == 0 and model.lin_in is None
            check_one_hop(conv, model.in_channels if first else model.hidden_channels, model.local)


def _decides_alone(router: Router) -> bool:
    if isinstance(router, ExpertChoice | MultiCentroid):
        return router.selection is None or router.selection.inference == "threshold"
    return isinstance(router, TokenChoice | RandomRouter | UniformRouter)


def _is_row_wise(norm: nn.Module) -> bool:
    """In evaluation."""
    norm = norm.module if isinstance(norm, BatchNorm) else norm
    if isinstance(norm, nn.BatchNorm1d):
        return bool(norm.track_running_stats)
    return isinstance(norm, nn.Identity | nn.LayerNorm) or (isinstance(norm, LayerNorm) and norm.mode == "node")
