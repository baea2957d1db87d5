"""Neighbor sampling in pure torch. Shapes: F nodes of a frontier, L of them large, S edges drawn, k
the fan-out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
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
from torch_geometric.typing import EdgeType, NodeType

from gmoe._checks import check
from gmoe.conv.graph import Graph
from gmoe.data.stored import StoredGraph, check_nodes

Fanouts: TypeAlias = Sequence[int] | Mapping[EdgeType, Sequence[int]] | NumNeighbors
InEdges: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""The start of each node's in-edges, their sources, and their ids."""

NODES: NodeType = ""
EDGES: EdgeType = (NODES, "", NODES)
"""A homogeneous graph is sampled as one with a single type of nodes and of edges."""

NO_TIMES = ("time", "times of the seeds", "None: sampling by time needs pyg-lib")


class NeighborSampler(BaseSampler):
    r"""Uniform neighbor sampling (GraphSAGE, Hamilton et al., 2017) with torch alone.

    It replaces ``pyg-lib`` behind PyG's interface: give it to PyG's ``NodeLoader`` or
    ``LinkLoader``, or call :func:`gmoe.neighbor_loader`. Hop by hop, each node that the last hop
    found draws

    .. math::
        S_v \sim \mathrm{Uniform}\{S \subseteq \mathrm{in}(v) : |S| = \min(k, |\mathrm{in}(v)|)\}

    of its in-edges, so that messages flow from the sources to the seeds. Floyd's algorithm draws
    the subsets of all nodes of a hop at once, in O(k^2) a node, whatever its degree. Parallel edges
    and self-loops are edges like any other. A node is expanded once, in the hop after the one that
    found it. A seed that is given twice stays two nodes, as in PyG, each with its own draws; as a
    source it counts as the first.

    Draws come from torch's default generator, so that ``torch.manual_seed`` repeats them, in worker
    processes too.

    Args:
        data: the graph, on any device, with ``edge_index`` (a tensor or PyG's ``EdgeIndex``), which
            is sorted by destination; or a :class:`gmoe.StoredGraph`, whose edges stay on disk:
            memory is 4 bytes a node and process.
        num_neighbors: k of each hop, from the seeds outwards; -1 takes all in-edges. For
            ``HeteroData`` a list for all types of edges, or a dictionary with one for each.
        replace: make k independent draws for each node with in-edges (default ``False``).

    Shapes:
        As PyG's ``SamplerOutput`` and ``HeteroSamplerOutput``: ``node`` begins with the seeds,
        ``row`` and ``col`` are positions in it, ``edge`` are ids of the graph's own edges, and
        ``col`` never descends. ``num_sampled_nodes`` (the seeds, then what each hop found) and
        ``num_sampled_edges`` are what ``trim_to_layer`` takes.

    Raises:
        ValueError: fan-outs below -1 or of unknown types of edges; edges or seeds outside the
            nodes; an unknown number of nodes; a graph without ``edge_index`` or with ``adj_t``;
            seeds with times.
    """

    def __init__(
        self, data: Data | HeteroData | StoredGraph, num_neighbors: Fanouts, replace: bool = False
    ) -> None:
        self.is_hetero = isinstance(data, HeteroData)
        self.replace = replace
        nodes = data.node_items() if isinstance(data, HeteroData) else [(NODES, data)]
        self._sizes = {kind: count_nodes(store) for kind, store in nodes}
        self._graph: dict[EdgeType, InEdges | StoredGraph]
        if isinstance(
            data, StoredGraph
        ):  # as it lies on disk: nothing is checked, converted or copied
            self._dtype, self._graph = data.source.dtype, {EDGES: data}
        else:
            largest = max([*self._sizes.values(), data.num_edges])
            # half the memory traffic
            self._dtype = torch.int32 if largest < 2**31 else torch.int64
            edges = data.edge_items() if isinstance(data, HeteroData) else [(EDGES, data)]
            self._graph = {kind: self._in_edges(store, kind) for kind, store in edges}
        self._maps: list[dict[NodeType, Tensor]] = []
        is_legal = isinstance(num_neighbors, NumNeighbors | list | tuple | dict)
        check(is_legal, "num_neighbors", repr(num_neighbors), "a list, one number a hop")
        self.num_neighbors = (
            num_neighbors
            if isinstance(num_neighbors, NumNeighbors)
            else NumNeighbors(num_neighbors)
        )
        self._fanouts = self.num_neighbors.get_values(list(self._graph))
        whole = all(
            isinstance(k, int) and k >= -1 for fanout in self._fanouts.values() for k in fanout
        )
        check(whole, "num_neighbors", num_neighbors, "whole numbers of at least -1 (all)")

    def sample_from_nodes(
        self, index: NodeSamplerInput, **kwargs: Any
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that the seeds ``index.node`` need; called by ``NodeLoader``."""
        check(index.time is None, *NO_TIMES)
        return node_sample(index, self._sample)

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that both ends of the seed edges need; called by ``LinkLoader``."""
        check(index.time is None, *NO_TIMES)
        sizes = self._sizes if self.is_hetero else self._sizes[NODES]
        return edge_sample(index, self._sample, sizes, disjoint=False, neg_sampling=neg_sampling)

    def _sample(
        self, seed: Tensor | dict[NodeType, Tensor], seed_time: None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The function that PyG's ``node_sample`` and ``edge_sample`` call."""
        seeds = seed if isinstance(seed, dict) else {NODES: seed}
        for kind, nodes in seeds.items():
            check(kind in self._sizes, "input_type", repr(kind), f"one of {list(self._sizes)}")
            check_nodes("node", nodes, self._sizes[kind])
        unseen = torch.iinfo(self._dtype).max
        try:
            local = (
                self._maps.pop()
            )  # taken, not shared: threads have their own, and an error leaves no dirty one
        except IndexError:
            with torch.inference_mode(False):  # or it could not be written to outside of that mode
                local = {
                    t: torch.full((size,), unseen, dtype=self._dtype)
                    for t, size in self._sizes.items()
                }
        fields = self._expand(seeds, local)
        for kind, nodes in fields["node"].items():
            local[kind].index_fill_(0, nodes, unseen)
        self._maps.append(local)
        if self.is_hetero:
            return HeteroSamplerOutput(**fields)
        return SamplerOutput(**{name: next(iter(value.values())) for name, value in fields.items()})

    def _expand(
        self, seeds: dict[NodeType, Tensor], local: dict[NodeType, Tensor]
    ) -> dict[str, dict[Any, Any]]:
        """The output's fields by type. ``local``: each node's position in the output, huge where it
        has none yet.
        """
        none = torch.empty(0, dtype=torch.int64)
        node = {
            kind: [seeds.get(kind, none).long()] for kind in self._sizes
        }  # the seeds, then a tensor a hop
        row, col, edge = ({kind: [none] for kind in self._graph} for _ in range(3))
        for kind, (given,) in node.items():
            local[kind].scatter_reduce_(
                0, given, torch.arange(len(given), dtype=self._dtype), "amin"
            )
        for hop in range(self.num_neighbors.num_hops):
            for parts in node.values():
                parts.append(none)
            for kind, edges in self._graph.items():
                start, source, ids = (
                    (edges.start, edges.source, None) if isinstance(edges, StoredGraph) else edges
                )
                src, _, dst = kind
                position_S, index_S = _draw(
                    start, node[dst][hop], self._fanouts[kind][hop], self.replace
                )
                source_S = source.index_select(0, position_S).long()
                new = _number(local[src], source_S, sum(map(len, node[src])))
                node[src][-1] = torch.cat([node[src][-1], new])
                row[kind].append(local[src].index_select(0, source_S).long())
                col[kind].append(index_S + sum(map(len, node[dst][:hop])))
                edge[kind].append(
                    (position_S if ids is None else ids.index_select(0, position_S)).long()
                )
        joined = {"node": node, "row": row, "col": col, "edge": edge}
        return {
            **{
                name: {kind: torch.cat(parts) for kind, parts in value.items()}
                for name, value in joined.items()
            },
            "num_sampled_nodes": {
                kind: [len(part) for part in parts] for kind, parts in node.items()
            },
            "num_sampled_edges": {
                kind: [len(part) for part in parts[1:]] for kind, parts in edge.items()
            },
        }

    def _in_edges(self, store: Any, kind: EdgeType) -> InEdges:
        """The edges of one type by destination, checked, on the CPU."""
        src, _, dst = kind
        check(
            {src, dst} <= self._sizes.keys(),
            "data",
            f"edges {kind}",
            f"edges between nodes {list(self._sizes)}",
        )
        check(
            "edge_index" in store and "adj_t" not in store,
            "data",
            store,
            f"edge_index of {kind}, and no adj_t",
        )
        edges = Graph(store.edge_index.cpu(), (self._sizes[src], self._sizes[dst])).edges
        return edges.ptr.to(self._dtype), edges.sender.to(self._dtype), edges.order.to(self._dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without the maps: spawned workers share the memory of pickled tensors, and would all
        write into one map.
        """
        return self.__dict__ | {"_maps": []}


def _draw(start: Tensor, nodes_F: Tensor, k: int, replace: bool) -> tuple[Tensor, Tensor]:
    """(S,) positions of the in-edges drawn, node by node, and (S,) which of ``nodes_F`` drew
    each.
    """
    first_F = start.index_select(0, nodes_F)
    degree_F = start.index_select(0, nodes_F + 1) - first_F
    count_F = degree_F if k < 0 else (degree_F > 0) * k if replace else degree_F.clamp(max=k)
    index_S = torch.arange(len(nodes_F)).repeat_interleave(count_F)
    if replace and k >= 0:
        offset_S = torch.rand(len(index_S), dtype=torch.float64).mul_(
            degree_F.index_select(0, index_S)
        )
        return first_F.index_select(0, index_S) + offset_S.to(start.dtype), index_S

    slot_F = count_F.cumsum(0) - count_F
    position_S = (first_F - slot_F).to(start.dtype).index_select(0, index_S)
    position_S += torch.arange(len(index_S), dtype=start.dtype)
    large_L = (degree_F > count_F).nonzero().view(-1)
    if k > 0:
        chosen_kL = first_F.index_select(0, large_L) + _subsets(
            degree_F.index_select(0, large_L), k
        )
        position_S[slot_F.index_select(0, large_L) + torch.arange(k)[:, None]] = chosen_kL
    return position_S, index_S


def _subsets(size_L: Tensor, k: int) -> Tensor:
    """(k, L) a uniform k-subset of ``range(size)`` in each column, for sizes above k, by Floyd's
    algorithm.
    """
    draw_kL = torch.rand(
        k, len(size_L), dtype=torch.float64
    )  # float32 has too few digits for the degree of a hub
    chosen_kL = torch.empty(k, len(size_L), dtype=size_L.dtype)
    for i in range(k):
        last_L = size_L - (k - i)
        value_L = draw_kL[i].mul_(last_L + 1).to(size_L.dtype)
        torch.where((chosen_kL[:i] == value_L).any(dim=0), last_L, value_L, out=chosen_kL[i])
    return chosen_kL


def _number(local: Tensor, nodes: Tensor, first: int) -> Tensor:
    """Give the nodes without a position the next ones from ``first`` on, in order of appearance,
    and return them.
    """
    candidate = torch.arange(first, first + len(nodes), dtype=local.dtype)
    local.scatter_reduce_(
        0, nodes, candidate, "amin"
    )  # a position that a node has already is below all candidates
    new = nodes[local.index_select(0, nodes) == candidate]
    local[new] = candidate[: len(new)]
    return new


def count_nodes(store: Any) -> int:
    """The number of nodes of a graph or a type, which PyG cannot always tell."""
    check(store.num_nodes is not None, "data", f"{store} without a number of nodes", "num_nodes")
    return int(store.num_nodes)
