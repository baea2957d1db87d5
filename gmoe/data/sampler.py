"""Neighbor sampling in pure torch. Shapes: F nodes of a frontier, L of them large, S edges drawn, k the fan-out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch_geometric import Index
from torch_geometric.data import Data, HeteroData
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    HeteroSamplerOutput,
    NegativeSampling,
    NodeSamplerInput,
    NumNeighbors,
    SamplerOutput,
)
from torch_geometric.sampler.neighbor_sampler import edge_sample, node_sample
from torch_geometric.sampler.utils import to_csc
from torch_geometric.typing import EdgeType, NodeType, SparseTensor

from gmoe._checks import check
from gmoe.data.stored import StoredGraph
from gmoe.routers.base import check_edge_index

Fanouts: TypeAlias = Sequence[int] | Mapping[EdgeType, Sequence[int]] | NumNeighbors

NODES: NodeType = ""
EDGES: EdgeType = (NODES, "", NODES)
"""A homogeneous graph is sampled as one with a single type of nodes and of edges."""

NO_TIMES = ("time", "times of the seeds", "None: sampling by time needs pyg-lib")


class InEdges(NamedTuple):
    """Edges by destination: where each node's begin, their sources, and their ids (``None`` where not reordered)."""

    start: Tensor
    source: Tensor
    edge: Tensor | None

    def to(self, dtype: torch.dtype) -> InEdges:
        edge = None if self.edge is None else self.edge.to(dtype)
        return InEdges(self.start.to(dtype), self.source.to(dtype), edge)


class NeighborSampler(BaseSampler):
    r"""Uniform neighbor sampling (GraphSAGE, Hamilton et al., 2017) with torch alone.

    What ``pyg-lib`` is to PyG's ``NeighborLoader``, behind the same interface: give it to PyG's ``NodeLoader`` or
    ``LinkLoader``, or call :func:`gmoe.neighbor_loader`. Hop by hop, each node that the last hop found draws

    .. math::
        S_v \sim \mathrm{Uniform}\{S \subseteq \mathrm{in}(v) : |S| = \min(k, |\mathrm{in}(v)|)\}

    of its in-edges, so that messages flow from the sources to the seeds. Floyd's algorithm draws the subsets of all
    nodes of a hop at once, in O(k^2) a node, whatever its degree. Parallel edges and self-loops are edges like any
    other. A node is expanded once, in the hop after the one that found it. A seed that is given twice stays two nodes,
    as in PyG, each with its own draws; as a source it counts as the first.

    Draws come from torch's default generator, so that ``torch.manual_seed`` repeats them, in worker processes too.

    Args:
        data: the graph, on any device, with ``edge_index`` (a tensor or PyG's ``EdgeIndex``) or a ``SparseTensor`` as
            ``adj_t``; or a :class:`gmoe.StoredGraph`, whose edges stay on disk: memory is 4 bytes a node and process.
        num_neighbors: k of each hop, from the seeds outwards; -1 takes all in-edges. For ``HeteroData`` a list for all
            types of edges, or a dictionary with one for each.
        replace: make k independent draws for each node with in-edges (default ``False``).
        is_sorted: ``edge_index`` is sorted by destination already (default ``False``).

    Shapes:
        As PyG's ``SamplerOutput`` and ``HeteroSamplerOutput``: ``node`` begins with the seeds, ``row`` and ``col`` are
        positions in it, ``edge`` are ids of the graph's own edges, and ``col`` never descends. ``num_sampled_nodes``
        (the seeds, then what each hop found) and ``num_sampled_edges`` are what ``trim_to_layer`` takes.

    Raises:
        ValueError: fan-outs below -1 or of unknown types of edges; edges or seeds outside the nodes; an unknown number
            of nodes; an adjacency that PyG's ``to_csc`` does not take; seeds with times.
    """

    def __init__(
        self,
        data: Data | HeteroData | StoredGraph,
        num_neighbors: Fanouts,
        replace: bool = False,
        *,
        is_sorted: bool = False,
    ) -> None:
        legal = "Data, HeteroData or StoredGraph"
        check(isinstance(data, Data | HeteroData | StoredGraph), "data", type(data).__name__, legal)
        self.is_hetero = isinstance(data, HeteroData)
        self.replace = replace
        self._stored = data if isinstance(data, StoredGraph) else None
        if isinstance(data, StoredGraph):  # as it lies on disk: nothing is checked, converted or copied
            self._sizes = {NODES: data.num_nodes}
            self._dtype = data.source.dtype
            self._graph = {EDGES: InEdges(data.start, data.source, None)}
        else:
            stores: dict[EdgeType, Any] = dict(data.edge_items()) if self.is_hetero else {EDGES: data}
            self._sizes = _sizes(data, list(stores))
            graph = {kind: _in_edges(store, kind, self._sizes, is_sorted) for kind, store in stores.items()}
            largest = max([*self._sizes.values(), *(len(edges.source) for edges in graph.values())], default=0)
            # half the memory traffic
            self._dtype = torch.int32 if largest < torch.iinfo(torch.int32).max else torch.int64
            self._graph = {kind: edges.to(self._dtype) for kind, edges in graph.items()}
        self._maps: list[dict[NodeType, Tensor]] = []
        self.num_neighbors = num_neighbors

    @property
    def num_neighbors(self) -> NumNeighbors:
        """The fan-outs; may be set anew."""
        return self._num_neighbors

    @num_neighbors.setter
    def num_neighbors(self, num_neighbors: Fanouts) -> None:
        if not isinstance(num_neighbors, NumNeighbors | Sequence | Mapping):
            raise ValueError(f"num_neighbors: got {num_neighbors!r}, expected a list, one number a hop")
        given = num_neighbors if isinstance(num_neighbors, NumNeighbors) else NumNeighbors(num_neighbors)
        if self.is_hetero:
            fanouts = given.get_values(list(self._graph))
        elif isinstance(given.values, dict):
            raise ValueError(f"num_neighbors: got {num_neighbors}, expected a list for homogeneous Data")
        else:
            fanouts = {EDGES: given.values}
        for fanout in fanouts.values():
            whole = all(isinstance(k, int) and k >= -1 for k in fanout)
            check(whole, "num_neighbors", list(fanout), "whole numbers of at least -1 (all)")
        self._num_neighbors, self._fanouts = given, fanouts

    @property
    def num_nodes(self) -> int | dict[NodeType, int]:
        """Nodes of the graph, by type in a heterogeneous one."""
        return self._sizes if self.is_hetero else self._sizes[NODES]

    def sample_from_nodes(self, index: NodeSamplerInput, **kwargs: Any) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that the seeds ``index.node`` need; called by ``NodeLoader``."""
        check(index.time is None, *NO_TIMES)
        return node_sample(index, self._sample)

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that both ends of the seed edges need; called by ``LinkLoader``."""
        check(index.time is None, *NO_TIMES)
        return edge_sample(index, self._sample, self.num_nodes, disjoint=False, neg_sampling=neg_sampling)

    def _sample(self, seed: Tensor | dict[NodeType, Tensor], seed_time: None) -> SamplerOutput | HeteroSamplerOutput:
        """What PyG's ``node_sample`` and ``edge_sample`` call."""
        seeds = seed if isinstance(seed, dict) else {NODES: seed}
        for kind, nodes in seeds.items():
            legal = ", ".join(repr(name or None) for name in self._sizes)
            check(kind in self._sizes, "input_type", repr(kind or None), f"one of {legal}")
            check_nodes("node", nodes, self._sizes[kind])
        try:
            local = self._maps.pop()  # taken, not shared: threads have their own, and an error leaves no dirty one
        except IndexError:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                unseen = torch.iinfo(self._dtype).max
                local = {t: torch.full((size,), unseen, dtype=self._dtype) for t, size in self._sizes.items()}
        fields = self._expand({kind: nodes.long() for kind, nodes in seeds.items()}, local)
        for kind, nodes in fields["node"].items():
            local[kind].index_fill_(0, nodes, torch.iinfo(self._dtype).max)
        self._maps.append(local)
        if self.is_hetero:
            return HeteroSamplerOutput(**fields)
        return SamplerOutput(**{name: next(iter(value.values())) for name, value in fields.items()})

    def _expand(self, seeds: dict[NodeType, Tensor], local: dict[NodeType, Tensor]) -> dict[str, dict[Any, Any]]:
        """The output's fields by type. ``local``: each node's position in the output, huge where it has none yet."""
        none = torch.empty(0, dtype=torch.int64)
        nodes = {kind: [seeds.get(kind, none)] for kind in self._sizes}  # a tensor a hop
        row, col, edge = ({kind: [none] for kind in self._graph} for _ in range(3))
        total = {kind: parts[0].numel() for kind, parts in nodes.items()}
        for kind, (given,) in nodes.items():
            local[kind].scatter_reduce_(0, given, torch.arange(len(given), dtype=self._dtype), "amin")
        for hop in range(self.num_neighbors.num_hops):
            frontier = {kind: (total[kind] - parts[-1].numel(), parts[-1]) for kind, parts in nodes.items()}
            found: dict[NodeType, list[Tensor]] = {kind: [none] for kind in nodes}
            for kind, edges in self._graph.items():
                sources, _, destinations = kind
                begin, frontier_F = frontier[destinations]
                position_S, index_S = _draw(edges.start, frontier_F, self._fanouts[kind][hop], self.replace)
                source_S = edges.source.index_select(0, position_S).long()
                edge_S = position_S if edges.edge is None else edges.edge.index_select(0, position_S)
                found[sources].append(_number(local[sources], source_S, total[sources]))
                total[sources] += found[sources][-1].numel()
                row[kind].append(local[sources].index_select(0, source_S).long())
                col[kind].append(index_S + begin)
                edge[kind].append(edge_S.long())
            for kind, new in found.items():
                nodes[kind].append(torch.cat(new))
        joined = {"node": nodes, "row": row, "col": col, "edge": edge}
        return {
            **{name: {kind: torch.cat(parts) for kind, parts in value.items()} for name, value in joined.items()},
            "num_sampled_nodes": {kind: [part.numel() for part in parts] for kind, parts in nodes.items()},
            "num_sampled_edges": {kind: [part.numel() for part in parts[1:]] for kind, parts in edge.items()},
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: spawned workers share the memory of pickled tensors, and would all write into one map.
        Of a stored graph without its edges too, which would be copied: the graph itself travels as its path."""
        return {**self.__dict__, "_maps": []} | ({} if self._stored is None else {"_graph": {}})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._stored is not None:
            self._graph = {EDGES: InEdges(self._stored.start, self._stored.source, None)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_neighbors={self.num_neighbors.values}, replace={self.replace})"


def _draw(start: Tensor, nodes_F: Tensor, k: int, replace: bool) -> tuple[Tensor, Tensor]:
    """(S,) positions of the in-edges drawn, node by node, and (S,) which of ``nodes_F`` drew each."""
    first_F = start.index_select(0, nodes_F)
    degree_F = start.index_select(0, nodes_F + 1) - first_F
    count_F = degree_F if k < 0 else (degree_F > 0) * k if replace else degree_F.clamp(max=k)
    index_S = torch.arange(len(nodes_F)).repeat_interleave(count_F)
    if replace and k >= 0:
        offset_S = torch.rand(len(index_S), dtype=torch.float64).mul_(degree_F.index_select(0, index_S))
        return first_F.index_select(0, index_S) + offset_S.to(start.dtype), index_S

    slot_F = count_F.cumsum(0) - count_F
    position_S = (first_F - slot_F).to(start.dtype).index_select(0, index_S)
    position_S += torch.arange(len(index_S), dtype=start.dtype)
    large_L = (degree_F > count_F).nonzero().view(-1)
    if k > 0:
        chosen_kL = first_F.index_select(0, large_L) + _subsets(degree_F.index_select(0, large_L), k)
        position_S[slot_F.index_select(0, large_L) + torch.arange(k)[:, None]] = chosen_kL
    return position_S, index_S


def _subsets(size_L: Tensor, k: int) -> Tensor:
    """(k, L) a uniform k-subset of ``range(size)`` in each column, for sizes above k, by Floyd's algorithm."""
    draw_kL = torch.rand(k, len(size_L), dtype=torch.float64)  # float32 has too few digits for the degree of a hub
    chosen_kL = torch.empty(k, len(size_L), dtype=size_L.dtype)
    for i in range(k):
        last_L = size_L - (k - i)
        value_L = draw_kL[i].mul_(last_L + 1).to(size_L.dtype)
        taken_L = (chosen_kL[:i] == value_L).any(dim=0)
        torch.where(taken_L, last_L, value_L, out=chosen_kL[i])
    return chosen_kL


def _number(local: Tensor, nodes: Tensor, first: int) -> Tensor:
    """Give the nodes without a position the next ones from ``first`` on, in order of appearance, and return them."""
    candidate = torch.arange(first, first + len(nodes), dtype=local.dtype)
    local.scatter_reduce_(0, nodes, candidate, "amin")  # a position that a node has already is below all candidates
    new = nodes[local.index_select(0, nodes) == candidate]
    local[new] = candidate[: len(new)]
    return new


def _sizes(data: Data | HeteroData, edge_types: list[EdgeType]) -> dict[NodeType, int]:
    """Nodes of each type."""
    if isinstance(data, Data):
        sizes = {NODES: data.num_nodes}
    else:
        sizes = {kind: store.num_nodes for kind, store in data.node_items()}
        for source, relation, destination in edge_types:
            got = f"edges {(source, relation, destination)} and nodes {', '.join(map(repr, sizes))}"
            check({source, destination} <= set(sizes), "data", got, "the nodes of both ends")
    for kind, size in sizes.items():
        check(size is not None, "data", f"no number of nodes{f' {kind!r}' if kind else ''}", "num_nodes")
    return sizes


def _in_edges(store: Any, kind: EdgeType, sizes: Mapping[NodeType, int], is_sorted: bool) -> InEdges:
    """The edges of one type, by destination, on the CPU."""
    names = [name for name in ("adj", "adj_t", "edge_index") if name in store]  # in the order of to_csc
    check(names or kind == EDGES, "data", f"no edge_index of {kind}", "one")
    if names[:1] == ["edge_index"]:
        edge_index = store["edge_index"].cpu()
        check_edge_index(edge_index, sizes[kind[0]], sizes[kind[2]])
        in_order = not is_sorted or bool((edge_index[1].diff() >= 0).all())
        check(in_order, "is_sorted", "True with edges in another order", "them by destination, or False")
    elif names:
        got = f"{names[0]} of type {type(store[names[0]]).__name__}"
        check(isinstance(store[names[0]], SparseTensor), "data", got, "a SparseTensor, or edge_index alone")
    start, source, edge = to_csc(store, device=torch.device("cpu"), is_sorted=is_sorted)
    return InEdges(start, source.as_tensor() if isinstance(source, Index) else source, edge)


def check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse what is no vector of node ids."""
    if nodes.dim() != 1 or nodes.is_floating_point() or nodes.is_complex() or nodes.dtype == torch.bool:
        raise ValueError(f"{name}: got shape {tuple(nodes.shape)} of {nodes.dtype}, expected a vector of node ids")
    if nodes.numel():
        low, high = (int(value) for value in nodes.aminmax())
        if low < 0 or high >= num_nodes:
            raise ValueError(f"{name}: got {low if low < 0 else high}, expected values in 0..{num_nodes - 1}")
