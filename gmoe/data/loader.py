"""Mini-batches of a graph by nodes or by links, with or without compiled extensions."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch_geometric.typing
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader, LinkNeighborLoader, NeighborLoader, NodeLoader
from torch_geometric.sampler import NegativeSampling
from torch_geometric.sampler.base import SubgraphType
from torch_geometric.typing import EdgeType, NodeType

from gmoe._checks import INTEGERS, check, check_choice, check_counts, check_range, described
from gmoe.data.sampler import NODES, Fanouts, NeighborSampler, count_nodes
from gmoe.data.stored import StoredGraph, node_index
from gmoe.data.temporal import TemporalStrategy

Graphs: TypeAlias = Data | HeteroData | StoredGraph
SamplerBackend: TypeAlias = Literal["auto", "pyg", "gmoe"]
InputNodes: TypeAlias = (
    Tensor | Sequence[int] | NodeType | tuple[NodeType, Tensor | Sequence[int] | None] | None
)
Links: TypeAlias = Tensor | EdgeType | tuple[EdgeType, Tensor | None] | None

PYG_ONLY: dict[str, object] = {
    "subgraph_type": "directional",
    "weight_attr": None,
    "neighbor_sampler": None,
    "directed": True,
}
"""Arguments of PyG's loaders that our sampler lacks: it does what the defaults say."""


def neighbor_loader(
    data: Graphs,
    num_neighbors: Fanouts,
    input_nodes: InputNodes = None,
    batch_size: int = 1,
    replace: bool = False,
    *,
    disjoint: bool = False,
    time_attr: str | None = None,
    input_time: Tensor | None = None,
    temporal_strategy: TemporalStrategy = "uniform",
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
        disjoint: sample a subgraph for each seed, numbered by ``batch.batch`` (default ``False``).
        time_attr: the name of the times of nodes or of edges (default ``None``): then subgraphs are
            disjoint, and no edge of one is later than its seed, or comes from a node that is. Not
            for a ``StoredGraph``, which holds no times.
        input_time: the time of each seed (default: that of its node).
        temporal_strategy: with times, ``"uniform"`` (default) draws any in-edges that a seed may
            see, ``"last"`` the latest.
        backend: who samples.

            - ``"pyg"``: PyG's ``NeighborLoader``, which needs ``pyg-lib`` (``torch-sparse`` also
              works, but leaves out ``num_sampled_nodes`` and ``num_sampled_edges``, and knows
              neither times nor disjoint subgraphs).
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
        ValueError: seeds or times that do not fit the graph; whatever :class:`gmoe.NeighborSampler`
            refuses; with our sampler, an argument that asks for weighted, bidirectional or induced
            sampling, for which PyG needs ``pyg-lib``: ``weight_attr``, ``subgraph_type``,
            ``directed``, ``neighbor_sampler``.

    Example:
        >>> loader = gmoe.neighbor_loader(
        ...     data, [15, 10, 5], data.train_mask, batch_size=1024, shuffle=True
        ... )
        >>> for batch in loader:
        ...     logits = model(batch.x, batch.edge_index)[: batch.batch_size]
        ...     loss = F.cross_entropy(logits, batch.y[: batch.batch_size])
    """
    if input_time is not None and time_attr is None:
        raise ValueError("input_time: got times without time_attr, expected None")
    kwargs["input_nodes"] = seeds = _seeds(data, input_nodes)
    kwargs["input_time"] = input_time
    kwargs["batch_size"] = batch_size
    options = _sampling(replace, disjoint, time_attr, temporal_strategy)
    check_counts(batch_size=batch_size)
    _check_generator(kwargs)
    if _is_pygs(backend, data):
        return NeighborLoader(_stores(data), num_neighbors, **options, **kwargs)
    _pop_pygs_own("NeighborLoader", kwargs)
    sampler = NeighborSampler(data, num_neighbors, **options)
    kind, nodes = seeds if isinstance(seeds, tuple) else (NODES, seeds)
    if nodes.dtype == torch.bool:
        nodes = nodes.nonzero().view(-1)
    sampler.rank_seeds("input_time", kind, nodes, input_time)  # refuses times that do not fit
    return NodeLoader(_stores(data), sampler, **kwargs)


def link_neighbor_loader(
    data: Graphs,
    num_neighbors: Fanouts,
    edge_label_index: Links = None,
    edge_label: Tensor | None = None,
    batch_size: int = 1,
    replace: bool = False,
    *,
    neg_sampling: NegativeSampling | str | None = None,
    disjoint: bool = False,
    time_attr: str | None = None,
    edge_label_time: Tensor | None = None,
    temporal_strategy: TemporalStrategy = "uniform",
    backend: SamplerBackend = "auto",
    **kwargs: Any,
) -> LinkLoader:
    """Load mini-batches of links with the neighborhoods of both ends, with ``pyg-lib`` or without.

    It is PyG's ``LinkNeighborLoader``, which needs ``pyg-lib``, and with our sampler the same
    batches, negative links drawn by PyG's own function.

    The links of a batch stay among the edges that are sampled, as in PyG, so that a model can read
    the answer there. To learn links, take ``edge_label_index`` from edges that ``data`` does not
    hold (PyG's ``RandomLinkSplit`` separates them), or give times: what is as late as a link is
    seen, so let a link's time be before that of its edge.

    Args:
        data: the graph, in memory or a :class:`gmoe.StoredGraph` on disk.
        num_neighbors: see :func:`neighbor_loader`.
        edge_label_index: the links of an epoch, (2, L) sources and destinations, which need not be
            edges; all edges by default. For ``HeteroData`` a type of edges, or a pair of a type and
            (2, L) links; for a ``StoredGraph`` always links.
        edge_label: (L, ...) their labels (default ``None``).
        batch_size: links in a batch (default 1), negative ones not counted.
        replace: draw neighbors with replacement (default ``False``).
        neg_sampling: ``"binary"`` adds a negative link for each, of label 0; ``"triplet"`` a
            negative destination; PyG's ``NegativeSampling`` also says how many, and of which nodes.
            Some may be links in truth. ``None`` (default) adds none. Beside label 0, links have 1;
            of your own labels, those that begin at 0 are raised by 1, and those that begin above
            stay.
        disjoint: sample a subgraph for each end of each link; ``batch.batch`` is the number of the
            link (default ``False``).
        time_attr: the name of the times of nodes or edges; see :func:`neighbor_loader`. Negative
            ends are nodes that are not later than their link, if nodes have times, and such a node
            exists.
        edge_label_time: (L,) the time of each link; needed with ``time_attr``.
        temporal_strategy: see :func:`neighbor_loader`.
        backend: see :func:`neighbor_loader`; of PyG it is the ``LinkNeighborLoader``.
        **kwargs: see :func:`neighbor_loader`.

    Returns:
        A loader of ``Data`` or ``HeteroData``. ``edge_label_index`` are the positions of both ends
        in the batch, ``edge_label`` the labels; of triplets ``src_index``, ``dst_pos_index`` and
        ``dst_neg_index``. ``n_id``, ``e_id`` and ``input_id`` are the numbers of nodes, edges and
        links in ``data`` and ``edge_label_index``.

    Raises:
        ImportError: see :func:`neighbor_loader`.
        ValueError: links, labels or times that do not fit the graph; times of links without those
            of the graph, or the other way round; whatever :func:`neighbor_loader` refuses.

    Example:
        >>> loader = gmoe.link_neighbor_loader(
        ...     train_data, [10, 5], train_data.edge_label_index, neg_sampling="binary",
        ...     batch_size=1024, shuffle=True,
        ... )
        >>> for batch in loader:
        ...     h = model(batch.x, batch.edge_index)
        ...     source, destination = batch.edge_label_index
        ...     score = (h[source] * h[destination]).sum(dim=1)
        ...     loss = F.binary_cross_entropy_with_logits(score, batch.edge_label)
    """
    kind, links = _links(data, edge_label_index)
    if (edge_label_time is None) != (time_attr is None):
        got = f"time_attr={time_attr!r} and {described(edge_label_time)}"
        raise ValueError(f"edge_label_time: got {got}, expected both or neither")
    for name, values in (("edge_label", edge_label), ("edge_label_time", edge_label_time)):
        if values is None:
            continue
        if not isinstance(values, Tensor) or len(values) != links.size(1):
            got = described(values)
            raise ValueError(
                f"{name}: got {got}, expected a tensor, one of each of {links.size(1)} links"
            )
    negatives = NegativeSampling.cast(neg_sampling)
    if negatives is not None and negatives.is_binary() and edge_label is not None:
        edge_label = _beside_negatives(edge_label)
    kwargs |= {"edge_label": edge_label, "edge_label_time": edge_label_time}
    # PyG takes links of a homogeneous graph in memory by themselves, all others with their type.
    kwargs["edge_label_index"] = links if isinstance(data, Data) else (kind, links)
    kwargs |= {"neg_sampling": negatives, "batch_size": batch_size}
    options = _sampling(replace, disjoint, time_attr, temporal_strategy)
    check_counts(batch_size=batch_size)
    _check_generator(kwargs)
    if _is_pygs(backend, data):
        return LinkNeighborLoader(_stores(data), num_neighbors, **options, **kwargs)
    _pop_pygs_own("LinkNeighborLoader", kwargs)
    sampler = NeighborSampler(data, num_neighbors, **options)
    source_kind = NODES if kind is None else kind[0]
    sampler.rank_seeds("edge_label_time", source_kind, links[0], edge_label_time)
    return LinkLoader(_stores(data), sampler, **kwargs)


def _sampling(
    replace: bool, disjoint: bool, time_attr: str | None, temporal_strategy: TemporalStrategy
) -> dict[str, Any]:
    """What PyG's sampler and ours are told by the same names."""
    check(isinstance(replace, bool), "replace", repr(replace), "True or False")
    return {
        "replace": replace,
        "disjoint": disjoint,
        "time_attr": time_attr,
        "temporal_strategy": temporal_strategy,
    }


def _is_pygs(backend: SamplerBackend, data: Graphs) -> bool:
    """True if PyG is to sample."""
    check_choice("backend", backend, SamplerBackend)
    is_for_pyg = torch_geometric.typing.WITH_PYG_LIB and not isinstance(data, StoredGraph)
    return backend == "pyg" or (backend == "auto" and is_for_pyg)


def _check_generator(kwargs: Mapping[str, Any]) -> None:
    """Refuse a generator beside workers that are not forked.

    They get a copy of the loader, to which PyG binds what collects a batch, and torch cannot send a
    generator to them.
    """
    if kwargs.get("generator") is None or not kwargs.get("num_workers"):
        return
    method = kwargs.get("multiprocessing_context")
    if method is not None and not isinstance(method, str):
        method = method.get_start_method()
    default = multiprocessing.get_all_start_methods()[0]
    method = method or multiprocessing.get_start_method(allow_none=True) or default
    if method != "fork":
        raise ValueError(
            f"generator: got one beside workers that start by {method!r}, expected None, or "
            "multiprocessing_context='fork': seed torch's own generator before the loop"
        )


def _stores(data: Graphs) -> Any:
    """The graph as PyG's loaders take it: a stored one as a pair (features, edges)."""
    return (data, data) if isinstance(data, StoredGraph) else data


def _pop_pygs_own(loader: str, kwargs: dict[str, Any]) -> None:
    """Take the arguments of PyG's samplers out of ``kwargs``; refuse what ours cannot do.

    Args:
        loader: the name of PyG's loader that has it all.
        kwargs: of the call.
    """
    kwargs.pop("is_sorted", None)  # our sampler finds out itself
    for name, default in PYG_ONLY.items():
        value = kwargs.pop(name, default)
        if isinstance(value, SubgraphType):
            value = value.value
        if type(value) is not type(default) or value != default:
            got = described(value) if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{name}: got {got}, expected {default!r}: our sampler draws uniformly or the "
                f"latest, and no more; use torch_geometric.loader.{loader} with pyg-lib"
            )


def _seeds(data: Graphs, input_nodes: object) -> Tensor | tuple[NodeType, Tensor]:
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


def _beside_negatives(edge_label: Tensor) -> Tensor | None:
    """Labels of links beside negative ones, whose label is 0; PyG raises those that begin at 0."""
    if not len(edge_label):
        return None  # of no links, PyG would look for the least
    least = edge_label.min()
    if least < 0:
        raise ValueError(
            f"edge_label: got {least.item()}, expected labels of at least 0, since 0 is that of "
            "negative links (binary)"
        )
    return edge_label


def _links(data: Graphs, links: Any) -> tuple[EdgeType | None, Tensor]:
    """The type of links, if there are several, and (2, L) the links, checked."""
    kind = None
    if isinstance(data, HeteroData):
        is_pair = isinstance(links, tuple | list) and len(links) == 2
        if is_pair and not isinstance(links[0], str):  # (type, links), not (source, destination)
            kind, links = links
        else:  # a type alone
            kind = links
            links = None
        name = tuple(kind) if isinstance(kind, tuple | list) else None
        of_name = [edges for edges in data.edge_types if name in (edges, (edges[0], edges[-1]))]
        if len(of_name) != 1:
            got = repr(kind) if name else described(kind)
            raise ValueError(
                f"edge_label_index: got {got}, expected a type of edges of {data.edge_types}, or "
                "(type, links)"
            )
        kind = of_name[0]
        sizes = [count_nodes(data[kind[0]]), count_nodes(data[kind[-1]])]
    else:
        sizes = [count_nodes(data)] * 2
    if links is None and not isinstance(data, StoredGraph):
        links = data.edge_index if kind is None else data[kind].edge_index
    is_links = isinstance(links, Tensor) and links.dim() == 2 and links.dtype in INTEGERS
    if not is_links or len(links) != 2:
        raise ValueError(
            f"edge_label_index: got {described(links)}, expected integers of shape (2, number of "
            "links)"
        )
    for end, size in zip(links, sizes, strict=True):
        check_range("edge_label_index", end, size)
    return kind, links
