"""Mini-batches of a graph, with or without compiled extensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch_geometric import typing
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.sampler.base import SubgraphType
from torch_geometric.typing import NodeType

from gmoe._checks import check_choice, described
from gmoe.data.sampler import Fanouts, NeighborSampler, count_nodes
from gmoe.data.stored import StoredGraph, node_index

SamplerBackend: TypeAlias = Literal["auto", "pyg", "gmoe"]
InputNodes: TypeAlias = (
    Tensor | Sequence[int] | NodeType | tuple[NodeType, Tensor | Sequence[int] | None] | None
)

PYG_ONLY: dict[str, object] = {
    "subgraph_type": "directional",
    "disjoint": False,
    "temporal_strategy": "uniform",
    "time_attr": None,
    "input_time": None,
    "weight_attr": None,
    "neighbor_sampler": None,
    "directed": True,
}
"""Arguments of PyG's ``NeighborLoader`` that our sampler lacks: it does what the defaults say."""


def neighbor_loader(
    data: Data | HeteroData | StoredGraph,
    num_neighbors: Fanouts,
    input_nodes: InputNodes = None,
    batch_size: int = 1,
    replace: bool = False,
    *,
    backend: SamplerBackend = "auto",
    **kwargs: object,
) -> NodeLoader:
    """Load mini-batches of sampled neighborhoods, with ``pyg-lib`` or without.

    PyG's ``NeighborLoader`` needs ``pyg-lib``; our sampler draws from the same distribution.

    Args:
        data: the graph, in memory or a :class:`gmoe.StoredGraph` on disk.
        num_neighbors: in-edges drawn per node in each hop, from the seeds outwards (-1: all); for
            ``HeteroData`` also a dictionary by type of edges.
        input_nodes: the seeds of an epoch: ids, a boolean mask, or all nodes (``None``, default).
            For ``HeteroData`` a type of nodes, or a pair of a type and any of these.
        batch_size: seeds in a batch (default 1).
        replace: draw with replacement (default ``False``).
        backend: who samples.

            - ``"pyg"``: PyG's ``NeighborLoader``, which needs ``pyg-lib`` (``torch-sparse`` also
              works, but leaves out ``num_sampled_nodes`` and ``num_sampled_edges``).
            - ``"gmoe"``: PyG's ``NodeLoader`` over :class:`gmoe.NeighborSampler`.
            - ``"auto"`` (default): ``"pyg"`` if ``pyg-lib`` is installed, but ``"gmoe"`` for a
              ``StoredGraph``, whose edges PyG would copy into memory.
        **kwargs: further arguments of the loader and of ``torch.utils.data.DataLoader``.
            ``shuffle=True`` for training; ``num_workers=1, persistent_workers=True`` draws the next
            batches while the model computes. ``is_sorted`` is for PyG's sampler only: ours finds
            the order of the edges itself.

    Returns:
        A loader of ``Data`` or ``HeteroData``. The first ``batch.batch_size`` nodes of a batch are
        its seeds: compute loss and metric on them only. ``n_id``, ``e_id`` and ``input_id`` are the
        numbers of its nodes, edges and seeds in ``data``.

    Raises:
        ImportError: from PyG, at the first batch of ``backend="pyg"`` without ``pyg-lib`` and
            ``torch-sparse``.
        ValueError: seeds that do not fit the graph; whatever :class:`gmoe.NeighborSampler` refuses;
            with our sampler, an argument that asks for temporal, weighted, disjoint, bidirectional
            or induced sampling, for which PyG needs ``pyg-lib``: ``time_attr``, ``input_time``,
            ``temporal_strategy``, ``weight_attr``, ``disjoint``, ``subgraph_type``, ``directed``,
            ``neighbor_sampler``.

    Example:
        >>> loader = gmoe.neighbor_loader(
        ...     data, [15, 10, 5], data.train_mask, batch_size=1024, shuffle=True
        ... )
        >>> for batch in loader:
        ...     logits = model(batch.x, batch.edge_index)[: batch.batch_size]
        ...     loss = F.cross_entropy(logits, batch.y[: batch.batch_size])
    """
    check_choice("backend", backend, SamplerBackend)
    kwargs["input_nodes"] = _seeds(data, input_nodes)
    kwargs["batch_size"] = batch_size
    is_stored = isinstance(data, StoredGraph)
    stores = (data, data) if is_stored else data  # PyG takes a pair (features, edges)
    if backend == "pyg" or (backend == "auto" and typing.WITH_PYG_LIB and not is_stored):
        return NeighborLoader(stores, num_neighbors, replace=replace, **kwargs)
    kwargs.pop("is_sorted", None)  # our sampler finds out itself
    for name, default in PYG_ONLY.items():
        _check_default(name, kwargs.pop(name, default), default)
    return NodeLoader(stores, NeighborSampler(data, num_neighbors, replace), **kwargs)


def _check_default(name: str, value: object, default: object) -> None:
    """Refuse an argument that asks for more than our sampler does."""
    if isinstance(value, SubgraphType):
        value = value.value
    if type(value) is not type(default) or value != default:
        got = described(value) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name}: got {got}, expected {default!r}: our sampler draws uniformly, and no more; "
            "use torch_geometric.loader.NeighborLoader with pyg-lib"
        )


def _seeds(
    data: Data | HeteroData | StoredGraph, input_nodes: object
) -> Tensor | tuple[NodeType, Tensor]:
    """The seeds as PyG takes them, checked: ids or a mask, for ``HeteroData`` with their type."""
    if not isinstance(data, HeteroData):
        return _ids(input_nodes, count_nodes(data))
    kind = input_nodes
    nodes = None
    if isinstance(input_nodes, tuple | list) and len(input_nodes) == 2:
        kind, nodes = input_nodes
    if not isinstance(kind, str) or kind not in data.node_types:
        got = repr(kind) if isinstance(kind, str) else type(input_nodes).__name__
        names = ", ".join(map(repr, data.node_types))
        raise ValueError(
            f"input_nodes: got {got}, expected a type of nodes of {names}, or (type, nodes)"
        )
    return kind, _ids(nodes, count_nodes(data[kind]))


def _ids(nodes: object, num_nodes: int) -> Tensor:
    """Node ids or a mask as a tensor; by default all nodes."""
    if nodes is None:
        nodes = torch.arange(num_nodes)
    return node_index("input_nodes", nodes, num_nodes)
