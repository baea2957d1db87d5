"""Mini-batches of a graph, with or without compiled extensions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, distributed
from torch_geometric import typing
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.typing import NodeType

from gmoe._checks import check, check_choice
from gmoe.data.sampler import Fanouts, NeighborSampler, check_nodes
from gmoe.data.stored import StoredGraph

SamplerBackend: TypeAlias = Literal["auto", "pyg", "gmoe", "cugraph"]
InputNodes: TypeAlias = Tensor | Sequence[int] | NodeType | tuple[NodeType, Tensor | Sequence[int] | None] | None

PYG_ONLY = ("subgraph_type", "directed", "disjoint", "temporal_strategy", "time_attr", "input_time", "weight_attr")
"""Arguments of PyG's NeighborLoader of which our sampler knows just the default; and ``neighbor_sampler``."""


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
    """Load mini-batches by PyG's ``NeighborLoader``, or without ``pyg-lib`` by a sampler of the same distribution.

    Args:
        data: the graph, in memory or a :class:`gmoe.StoredGraph` on disk.
        num_neighbors: in-edges drawn per node in each hop, from the seeds outwards (-1: all); for
            ``HeteroData`` also a dictionary by type of edges.
        input_nodes: the seeds of an epoch: ids, a boolean mask, or all nodes (``None``, default). For ``HeteroData`` a
            type of nodes, or a type and any of these.
        batch_size: seeds in a batch (default 1).
        replace: draw with replacement (default ``False``).
        backend: ``"pyg"``: PyG's ``NeighborLoader``, which needs ``pyg-lib`` (``torch-sparse`` will do, but leaves out
            ``num_sampled_nodes`` and ``num_sampled_edges``). ``"gmoe"``: PyG's ``NodeLoader`` over
            :class:`gmoe.NeighborSampler`. ``"auto"`` (default): the former where ``pyg-lib`` is installed, the latter
            for a ``StoredGraph``, whose edges PyG would copy into memory. ``"cugraph"``: cuGraph-PyG's
            ``NeighborLoader`` for a ``StoredGraph`` that is split over NVIDIA GPUs. **Written to its interface and not
            tested with it, for want of a GPU.** Start the process group and cuGraph's and WholeGraph's communicators
            first, as cuGraph-PyG's examples do; each process reads the slices of edges, x and y that
            ``torch.tensor_split`` would give it, and brings its own seeds. cuGraph numbers the edges anew, and ignores
            arguments of ``DataLoader`` such as ``num_workers``.
        **kwargs: further arguments of the loader and of ``torch.utils.data.DataLoader``. ``shuffle=True`` for training;
            ``num_workers=1, persistent_workers=True`` draws the next batches while the model computes.

    Returns:
        A loader of ``Data`` or ``HeteroData``. The first ``batch.batch_size`` nodes of a batch are its seeds: loss and
        metric belong on them alone. ``n_id``, ``e_id`` and ``input_id`` are the nodes, edges and seeds in ``data``.

    Raises:
        ImportError: ``backend="pyg"``, and neither ``pyg-lib`` nor ``torch-sparse`` is installed; ``"cugraph"`` without
            ``cugraph_pyg``.
        RuntimeError: ``backend="cugraph"`` outside of a process group.
        ValueError: with our sampler, an argument that asks for temporal, weighted, disjoint, bidirectional or induced
            sampling; seeds that do not fit the graph; whatever :class:`gmoe.NeighborSampler` refuses.

    Example:
        >>> for batch in gmoe.neighbor_loader(data, [15, 10, 5], data.train_mask, batch_size=1024, shuffle=True):
        ...     logits = model(batch.x, batch.edge_index)[: batch.batch_size]
        ...     loss = F.cross_entropy(logits, batch.y[: batch.batch_size])
    """
    check_choice("backend", backend, get_args(SamplerBackend))
    kwargs |= {"input_nodes": _checked(data, input_nodes), "batch_size": batch_size}
    if backend == "cugraph":
        check(isinstance(data, StoredGraph), "data", f"{type(data).__name__} with backend='cugraph'", "a StoredGraph")
        return _cugraph_loader(data, num_neighbors, replace=replace, **kwargs)
    if backend == "pyg" and not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        raise ImportError("backend: got 'pyg' without pyg-lib or torch-sparse installed, expected 'auto' or 'gmoe'")
    given = (data, data) if isinstance(data, StoredGraph) else data
    if backend == "pyg" or (backend == "auto" and typing.WITH_PYG_LIB and given is data):
        return NeighborLoader(given, num_neighbors, replace=replace, **kwargs)
    parameters = inspect.signature(NeighborLoader).parameters
    for name in (*PYG_ONLY, "neighbor_sampler"):
        default = parameters[name].default
        value = kwargs.pop(name, default)
        taken = not isinstance(value, Tensor) and getattr(value, "value", value) == default  # of an enum, its value
        check(taken, name, repr(value), f"{default!r}, or backend='pyg' with pyg-lib installed")
    sampler = NeighborSampler(data, num_neighbors, replace, is_sorted=kwargs.pop("is_sorted", False))
    return NodeLoader(given, sampler, **kwargs)


def _cugraph_loader(graph: StoredGraph, num_neighbors: Fanouts, *, input_nodes: Tensor, **kwargs: Any) -> Any:
    """cuGraph-PyG's ``NeighborLoader`` over this process's slices of the graph; not tested with cuGraph itself."""
    try:
        from cugraph_pyg.data import FeatureStore, GraphStore
        from cugraph_pyg.loader import NeighborLoader as CuGraphLoader
    except ModuleNotFoundError as error:
        legal = "pip install cugraph-pyg-cu13 (Linux, NVIDIA GPUs), or backend='gmoe'"
        raise ImportError(f"backend: got 'cugraph' without {error.name} installed, expected {legal}") from error
    if not distributed.is_initialized():
        raise RuntimeError("backend: got 'cugraph' without a process group, expected one (of one process, if need be)")
    rank, world = distributed.get_rank(), distributed.get_world_size()

    def part(size: int) -> tuple[int, int]:
        """Where this process's slice of so many rows begins and ends."""
        each, more = divmod(size, world)
        return rank * each + min(rank, more), (rank + 1) * each + min(rank + 1, more)

    features, edges = FeatureStore(), GraphStore()
    for attr in graph.get_all_tensor_attrs():
        features["node", attr.attr_name, None] = graph.rows(attr.attr_name, slice(*part(graph.num_nodes)))
    size = (graph.num_nodes, graph.num_nodes)
    edges[("node", "to", "node"), "coo", False, size] = torch.stack(graph.edges_of(*part(graph.num_edges)))
    return CuGraphLoader((features, edges), num_neighbors, input_nodes=input_nodes.cuda(), **kwargs)


def _checked(data: Data | HeteroData | StoredGraph, input_nodes: Any) -> Any:
    """The seeds as PyG takes them, refusing what it would meet with an assertion, a crash or wrong seeds."""
    if isinstance(data, StoredGraph):  # of stores, PyG wants the ids of all nodes too
        return torch.arange(data.num_nodes) if input_nodes is None else _ids(input_nodes, data.num_nodes)
    if isinstance(data, Data):
        return _ids(input_nodes, data.num_nodes)
    is_pair = isinstance(input_nodes, tuple | list) and len(input_nodes) == 2
    kind, nodes = input_nodes if is_pair else (input_nodes, None)
    if not isinstance(kind, str) or kind not in data.node_types:
        got = repr(kind) if isinstance(kind, str) else type(input_nodes).__name__
        legal = ", ".join(map(repr, data.node_types))
        raise ValueError(f"input_nodes: got {got}, expected a type of nodes of {legal}, or (type, nodes)")
    return kind, _ids(nodes, data[kind].num_nodes)


def _ids(nodes: Any, num_nodes: Any) -> Tensor | None:
    """Ids or a mask, as a tensor: of a list or an array of booleans PyG would take 0 and 1 as ids."""
    if nodes is None:
        return None
    nodes = torch.as_tensor(nodes)
    if nodes.dtype == torch.bool:
        check(nodes.shape == (num_nodes,), "input_nodes", f"a mask of shape {tuple(nodes.shape)}", f"({num_nodes},)")
        return nodes
    if nodes.numel() == 0:
        nodes = nodes.long()  # an empty list makes floats
    check_nodes("input_nodes", nodes, num_nodes)
    return nodes
