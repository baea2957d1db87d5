"""Mini-batches of a graph, with or without compiled extensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch_geometric import typing
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.sampler.base import SubgraphType
from torch_geometric.typing import NodeType

from gmoe._checks import check, check_choice
from gmoe.data.sampler import Fanouts, NeighborSampler, count_nodes
from gmoe.data.stored import StoredGraph, node_index
from gmoe.routing import described

SamplerBackend: TypeAlias = Literal["auto", "pyg", "gmoe"]
InputNodes: TypeAlias = (
    Tensor | Sequence[int] | NodeType | tuple[NodeType, Tensor | Sequence[int] | None] | None
)

PYG_ONLY: dict[str, Any] = {
    "subgraph_type": "directional",
    "disjoint": False,
    "temporal_strategy": "uniform",
    "time_attr": None,
    "input_time": None,
    "weight_attr": None,
    "neighbor_sampler": None,
    "directed": True,
}
"""Arguments of PyG's ``NeighborLoader`` that ours lacks, and their defaults: what it does."""


def neighbor_loader(
    data: Data | HeteroData | StoredGraph,
    num_neighbors: Fanouts,
    input_nodes: InputNodes = None,
    batch_size: int = 1,
    replace: bool = False,
    *,
    backend: SamplerBackend = "auto",
    **kwargs: Any,
) -> NodeLoader:
    """Load mini-batches by PyG's ``NeighborLoader``, or without ``pyg-lib`` by a sampler of the
    same distribution.

    Args:
        data: the graph, in memory or a :class:`gmoe.StoredGraph` on disk.
        num_neighbors: in-edges drawn per node in each hop, from the seeds outwards (-1: all); for
            ``HeteroData`` also a dictionary by type of edges.
        input_nodes: the seeds of an epoch: ids, a boolean mask, or all nodes (``None``, default).
            For ``HeteroData`` a type of nodes, or a type and any of these.
        batch_size: seeds in a batch (default 1).
        replace: draw with replacement (default ``False``).
        backend: ``"pyg"``: PyG's ``NeighborLoader``, which needs ``pyg-lib`` (``torch-sparse`` will
            do, but leaves out ``num_sampled_nodes`` and ``num_sampled_edges``). ``"gmoe"``: PyG's
            ``NodeLoader`` over :class:`gmoe.NeighborSampler`. ``"auto"`` (default): the former
            where ``pyg-lib`` is installed, the latter for a ``StoredGraph``, whose edges PyG would
            copy into memory.
        **kwargs: further arguments of the loader and of ``torch.utils.data.DataLoader``.
            ``shuffle=True`` for training; ``num_workers=1, persistent_workers=True`` draws the next
            batches while the model computes. ``is_sorted`` is for PyG's sampler: ours looks at the
            order of the edges itself.

    Returns:
        A loader of ``Data`` or ``HeteroData``. The first ``batch.batch_size`` nodes of a batch are
        its seeds: loss and metric belong on them alone. ``n_id``, ``e_id`` and ``input_id`` are the
        nodes, edges and seeds in ``data``.

    Raises:
        ImportError: PyG's, of the first batch of ``backend="pyg"`` without ``pyg-lib`` and
            ``torch-sparse``.
        ValueError: seeds that do not fit the graph; whatever :class:`gmoe.NeighborSampler` refuses;
            with our sampler, an argument that asks for temporal, weighted, disjoint, bidirectional
            or induced sampling, for which PyG needs ``pyg-lib``: ``time_attr``, ``input_time``,
            ``temporal_strategy``, ``weight_attr``, ``disjoint``, ``subgraph_type``, ``directed``,
            ``neighbor_sampler``.

    Example:
        >>> for batch in gmoe.neighbor_loader(data, [15, 10, 5], data.train_mask, batch_size=1024, shuffle=True):
        ...     logits = model(batch.x, batch.edge_index)[: batch.batch_size]
        ...     loss = F.cross_entropy(logits, batch.y[: batch.batch_size])
    """
    check_choice("backend", backend, SamplerBackend)
    given = (data, data) if isinstance(data, StoredGraph) else data
    kwargs |= {"input_nodes": _seeds(data, input_nodes), "batch_size": batch_size}
    if backend == "pyg" or (backend == "auto" and typing.WITH_PYG_LIB and given is data):
        return NeighborLoader(given, num_neighbors, replace=replace, **kwargs)
    kwargs.pop("is_sorted", None)  # which our sampler sees for itself
    for name, default in PYG_ONLY.items():
        _check_default(name, kwargs.pop(name, default), default)
    return NodeLoader(given, NeighborSampler(data, num_neighbors, replace), **kwargs)


def _check_default(name: str, given: Any, default: Any) -> None:
    """Refuse an argument that asks for more than our sampler does."""
    given = given.value if isinstance(given, SubgraphType) else given
    got = described(given) if isinstance(given, Tensor) else repr(given)
    way = "use torch_geometric.loader.NeighborLoader with pyg-lib"
    is_default = type(given) is type(default) and given == default
    check(is_default, name, got, f"{default!r}: our sampler draws uniformly, and no more; {way}")


def _seeds(data: Data | HeteroData | StoredGraph, input_nodes: Any) -> Any:
    """The seeds as PyG takes them, checked."""
    if not isinstance(data, HeteroData):
        return _ids(input_nodes, count_nodes(data))
    is_pair = isinstance(input_nodes, tuple | list) and len(input_nodes) == 2
    kind, nodes = input_nodes if is_pair else (input_nodes, None)
    got = repr(kind) if isinstance(kind, str) else type(input_nodes).__name__
    legal = f"a type of nodes of {', '.join(map(repr, data.node_types))}, or (type, nodes)"
    check(isinstance(kind, str) and kind in data.node_types, "input_nodes", got, legal)
    return kind, _ids(nodes, count_nodes(data[kind]))


def _ids(nodes: Any, num_nodes: int) -> Tensor:
    """Ids or a mask as a tensor; by default all nodes."""
    return node_index("input_nodes", torch.arange(num_nodes) if nodes is None else nodes, num_nodes)
