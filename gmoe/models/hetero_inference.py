"""Layer-wise inference of a HeteroGNNMoE: each layer over all nodes, in chunks.

Shapes: N nodes of a type, n of them in a chunk, S nodes that send to a chunk, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.loader import LinkLoader, NodeLoader
from torch_geometric.typing import NodeType
from tqdm import tqdm

from gmoe._checks import check_counts
from gmoe.conv.graph import Graph
from gmoe.conv.hetero import HeteroMoEConv, graph_of
from gmoe.models.inference import stored_edges
from gmoe.routing import Routing


@torch.no_grad()
def inference(
    model: Any,
    loader: NodeLoader | LinkLoader | HeteroData,
    device: torch.device | str | None = None,
    *,
    progress_bar: bool = False,
    batch_size: int | None = None,
    return_routing: bool = False,
) -> Any:
    """Logits of all nodes, layer by layer in chunks, without gradients.

    They equal those of the forward on the whole graph: each layer routes all nodes of a type at
    once, so that a node's experts do not depend on its chunk. Call ``eval()`` first, as for any
    evaluation.

    Args:
        loader: a graph; or a loader, whose graph and batch size are used, but not its sampler. The
            graph has ``edge_index`` or ``adj_t`` of the model's relations, ``x`` of the types with
            features, and ``batch`` if it is a ``Batch``.
        device: where chunks are computed (default: where the model is); the features of all nodes
            stay on the CPU.
        progress_bar: show one (default ``False``).
        batch_size: nodes per chunk (default: the loader's, or 1,024).
        return_routing: return the routings too, as :meth:`forward` does (default ``False``).

    Returns:
        What :meth:`forward` returns, the logits on the CPU.

    Raises:
        ValueError: no ``HeteroData``; relations that the model does not know, without edges, or
            with both ``edge_index`` and ``adj_t``; another number of nodes than the model has
            embeddings; features that do not fit.
    """
    data = loader if isinstance(loader, HeteroData) else getattr(loader, "data", loader)
    if not isinstance(data, HeteroData):
        raise ValueError(f"loader: got one over {type(data).__name__}, expected a HeteroData")
    if batch_size is None:
        batch_size = getattr(loader, "batch_size", None) or 1024
    check_counts(batch_size=batch_size)
    device = torch.device(device or next(model.parameters()).device)
    run = _LayerByLayer(model, data, device, batch_size, progress_bar)
    h_dict = run.inputs()
    for layer in range(len(model.convs)):
        h_dict = run.layer(layer, h_dict)
    logits = h_dict if model.target is None else h_dict[model.target]
    return (logits, run.routings) if return_routing else logits


class _LayerByLayer:
    """Run each layer of a HeteroGNNMoE over all nodes, some at a time.

    Args:
        model, device, batch_size, progress_bar: see :func:`inference`.
        data: the graph.
    """

    def __init__(
        self,
        model: Any,
        data: HeteroData,
        device: torch.device,
        batch_size: int,
        progress_bar: bool,
    ) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size
        self.progress_bar = progress_bar
        self.data = data
        known = model.convs[-1].edge_types
        if not set(data.edge_types) <= set(known):
            raise ValueError(f"loader: got edges {data.edge_types}, expected {known}")
        for name, number in model.num_nodes_dict.items():
            if data[name].num_nodes != number:
                raise ValueError(
                    f"loader: got {data[name].num_nodes} {name!r} nodes, expected all {number}, "
                    "which have embeddings"
                )
        self.batch_dict = {
            name: store.batch.to(device) for name, store in data.node_items() if "batch" in store
        }
        self.graphs: dict[Any, Graph] = {}
        self.routings: list[Routing] = []

    def ranges(self, name: str, number: int) -> Iterator[slice]:
        """That many nodes in order, a chunk at a time; ``name`` is what the progress bar says."""
        starts = range(0, max(number, 1), self.batch_size)  # a type without nodes has one chunk
        for start in tqdm(starts, name, disable=not self.progress_bar):
            yield slice(start, min(start + self.batch_size, number))

    def inputs(self) -> dict[NodeType, Tensor]:
        """(N, D) of each node type, on the CPU; see ``HeteroGNNMoE._inputs``."""
        x_dict = self.data.collect("x", allow_empty=True)
        numbers = {name: int(store.num_nodes or 0) for name, store in self.data.node_items()}
        chunks = []
        for rows in self.ranges("Inputs", max(numbers.values())):
            # Types with fewer nodes have empty chunks at the end.
            x_chunks = {name: x[rows].to(self.device) for name, x in x_dict.items()}
            n_ids = {
                name: torch.arange(number, device=self.device)[rows]
                for name, number in numbers.items()
            }
            chunk = self.model._inputs(x_chunks, n_ids)
            chunks.append({name: h.cpu() for name, h in chunk.items()})
        h_dict = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

        # Sort the edges once for all layers; those that no layer needs are not read.
        for relation in self.model.convs[-1].edge_types:
            if {relation[0], relation[-1]} <= h_dict.keys():
                edges: Any = torch.empty(2, 0, dtype=torch.long)  # of an absent relation
                if relation in self.data.edge_types:
                    edges = stored_edges(self.data[relation], relation).cpu()
                self.graphs[relation] = graph_of(relation, edges, h_dict)
        return h_dict

    def layer(self, layer: int, h_dict: dict[NodeType, Tensor]) -> dict[NodeType, Tensor]:
        """(N, D) a layer's output of each node type that it computes, from its input."""
        conv = self.model.convs[layer]
        is_moe = isinstance(conv, HeteroMoEConv)
        relations_into = conv.experts.relations_into if is_moe else conv.relations_into
        out_dict = {}
        for name, relations in relations_into.items():
            batch = self.batch_dict.get(name)
            # 1. Decide for all nodes of the type at once.
            if is_moe:
                self.routings.append(conv.routers[name](h_dict[name].to(self.device), batch))

            # 2. Conv and residual, chunk by chunk.
            outs = []
            for rows in self.ranges(f"Layer {layer + 1}, {name}", len(h_dict[name])):
                x = h_dict[name][rows].to(self.device)
                parts = [x, *(self.mean(relation, rows, h_dict) for relation in relations)]
                routing = (self.routings[-1].select(rows),) if is_moe else ()
                out = conv.from_parts(name, parts, *routing)
                outs.append(self.model.add_residual(layer, name, out, x).cpu())

            # 3. Norm and activation on all nodes at once, since some norms look at all of them.
            whole = torch.cat(outs).to(self.device)
            out_dict[name] = self.model.activate(layer, name, whole, batch).cpu()
        return out_dict

    def mean(self, relation: Any, rows: slice, h_dict: dict[NodeType, Tensor]) -> Tensor:
        """(n, D) the mean over the in-edges of a chunk, on the device."""
        nodes, part = self.graphs[relation].part(torch.arange(rows.start, rows.stop))
        return part.to(self.device).mean(h_dict[relation[0]][nodes].to(self.device), by="values")
