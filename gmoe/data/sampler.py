"""Neighbor sampling in pure torch.

Shapes: F nodes of a frontier (those that a hop expands), L of them with more in-edges than are
drawn, S edges drawn, k the fan-out (in-edges drawn per node).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.storage import EdgeStorage, NodeStorage
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

from gmoe.conv.graph import Graph
from gmoe.data.stored import StoredGraph, check_nodes

Fanouts: TypeAlias = Sequence[int] | Mapping[EdgeType, Sequence[int]] | NumNeighbors
InEdges: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""(N + 1,) the start of each node's in-edges, (M,) their sources, and (M,) their ids."""
Positions: TypeAlias = dict[NodeType, Tensor]
"""(N,) by type of nodes: each node's position in the output."""

NODES: NodeType = ""
EDGES: EdgeType = (NODES, "", NODES)
"""A homogeneous graph is sampled as one with a single type of nodes and of edges."""


class NeighborSampler(BaseSampler):
    r"""Uniform neighbor sampling (GraphSAGE, Hamilton et al., 2017) with torch alone.

    It replaces ``pyg-lib`` behind PyG's interface: give it to PyG's ``NodeLoader`` or
    ``LinkLoader``, or call :func:`gmoe.neighbor_loader`. Hop by hop, each node that the previous
    hop found draws a set

    .. math::
        S_v \sim \mathrm{Uniform}\{S \subseteq \mathrm{in}(v) : |S| = \min(k, |\mathrm{in}(v)|)\}

    of in-edges, so that messages flow from the sources to the seeds. Floyd's algorithm draws the
    subsets of all nodes of a hop at once, in O(k^2) a node, whatever its degree. Parallel edges and
    self-loops are edges like any other. A node is expanded once, in the hop after the one that
    found it. A seed that is given twice stays two nodes, as in PyG, each with its own draws; edges
    from it start at the first.

    Draws come from torch's default generator, so that ``torch.manual_seed`` repeats them, in worker
    processes too.

    Args:
        data: the graph, on any device, with ``edge_index`` (a tensor or PyG's ``EdgeIndex``), which
            is sorted by destination here; or a :class:`gmoe.StoredGraph`, whose edges stay on disk:
            each process needs 4 bytes of memory per node.
        num_neighbors: k of each hop, from the seeds outwards; -1 takes all in-edges. For
            ``HeteroData`` one list for all types of edges, or a dictionary with a list for each.
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
        if isinstance(data, StoredGraph):  # as it lies on disk: not checked, converted or copied
            self._dtype = data.source.dtype
            self._graph = {EDGES: data}
        else:
            # int32 halves the memory traffic.
            largest = max([*self._sizes.values(), data.num_edges])
            self._dtype = torch.int32 if largest < 2**31 else torch.int64
            edges = data.edge_items() if isinstance(data, HeteroData) else [(EDGES, data)]
            self._graph = {kind: self._in_edges(store, kind) for kind, store in edges}
        self._spare_positions: list[Positions] = []
        self.num_neighbors = self._checked_fanouts(num_neighbors)
        self._fanouts = self.num_neighbors.get_values(list(self._graph))
        for fanout in self._fanouts.values():
            if not all(isinstance(k, int) and k >= -1 for k in fanout):
                raise ValueError(
                    f"num_neighbors: got {num_neighbors}, expected whole numbers of at least -1 "
                    "(all)"
                )

    @staticmethod
    def _checked_fanouts(num_neighbors: Fanouts) -> NumNeighbors:
        if isinstance(num_neighbors, NumNeighbors):
            return num_neighbors
        if not isinstance(num_neighbors, list | tuple | dict):
            raise ValueError(
                f"num_neighbors: got {num_neighbors!r}, expected a list, one number a hop"
            )
        return NumNeighbors(num_neighbors)

    def sample_from_nodes(
        self, index: NodeSamplerInput, **kwargs: object
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that the seeds ``index.node`` need; called by ``NodeLoader``."""
        _refuse_times(index.time)
        return node_sample(index, self._sample)

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that both ends of the seed edges need; called by ``LinkLoader``."""
        _refuse_times(index.time)
        sizes = self._sizes if self.is_hetero else self._sizes[NODES]
        return edge_sample(index, self._sample, sizes, disjoint=False, neg_sampling=neg_sampling)

    def _sample(
        self, seed: Tensor | dict[NodeType, Tensor], seed_time: None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The function that PyG's ``node_sample`` and ``edge_sample`` call."""
        seeds = seed if isinstance(seed, dict) else {NODES: seed}
        for kind, nodes in seeds.items():
            if kind not in self._sizes:
                raise ValueError(f"input_type: got {kind!r}, expected one of {list(self._sizes)}")
            check_nodes("node", nodes, self._sizes[kind])
        position = self._take_positions()
        output = self._expand(seeds, position)
        # Clean up what was written, which is cheaper than a new table of all nodes.
        for kind, nodes in output.node.items():
            position[kind].index_fill_(0, nodes, self._unseen)
        self._spare_positions.append(position)
        if self.is_hetero:
            return output
        return SamplerOutput(
            node=output.node[NODES],
            row=output.row[EDGES],
            col=output.col[EDGES],
            edge=output.edge[EDGES],
            num_sampled_nodes=output.num_sampled_nodes[NODES],
            num_sampled_edges=output.num_sampled_edges[EDGES],
        )

    @property
    def _unseen(self) -> int:
        """The position of a node that is not in the output: larger than that of any other."""
        return torch.iinfo(self._dtype).max

    def _take_positions(self) -> Positions:
        """A clean table of positions, which nobody else uses.

        It is taken out of the list, so that threads have their own, and an error leaves no dirty
        one behind.
        """
        try:
            return self._spare_positions.pop()
        except IndexError:
            # Not as an inference tensor, which cannot be written to outside of that mode.
            with torch.inference_mode(False):
                return {
                    kind: torch.full((size,), self._unseen, dtype=self._dtype)
                    for kind, size in self._sizes.items()
                }

    def _expand(self, seeds: dict[NodeType, Tensor], position: Positions) -> HeteroSamplerOutput:
        """Sample hop by hop.

        Args:
            seeds: of each type.
            position: all ``_unseen``; holds each node's position in the output afterwards.

        Returns:
            PyG's output, by type of nodes or edges.
        """
        none = torch.empty(0, dtype=torch.int64)
        # By type: of nodes the seeds, then a tensor a hop; of edges an empty one, then one a hop.
        node = {kind: [seeds.get(kind, none).long()] for kind in self._sizes}
        row = {kind: [none] for kind in self._graph}
        col = {kind: [none] for kind in self._graph}
        edge = {kind: [none] for kind in self._graph}

        # A seed that is given twice has the position of its first occurrence.
        for kind, (seeds_of_kind,) in node.items():
            candidates = torch.arange(len(seeds_of_kind), dtype=self._dtype)
            position[kind].scatter_reduce_(0, seeds_of_kind, candidates, "amin")

        for hop in range(self.num_neighbors.num_hops):
            for parts in node.values():
                parts.append(none)
            for kind, in_edges in self._graph.items():
                if isinstance(in_edges, StoredGraph):
                    start, source = in_edges.start, in_edges.source
                    ids = None  # an edge's place is its id
                else:
                    start, source, ids = in_edges
                src, _, dst = kind

                # 1. Draw in-edges of the nodes that the previous hop found.
                frontier = node[dst][hop]
                fanout = self._fanouts[kind][hop]
                place_S, index_S = _draw(start, frontier, fanout, self.replace)
                source_S = source.index_select(0, place_S).long()

                # 2. Give new sources the next positions in the output.
                num_known = sum(map(len, node[src]))
                new = _number(position[src], source_S, num_known)
                node[src][-1] = torch.cat([node[src][-1], new])

                # 3. Note the edges: positions of both ends, and their ids in the graph.
                row[kind].append(position[src].index_select(0, source_S).long())
                num_before_frontier = sum(map(len, node[dst][:hop]))
                col[kind].append(index_S + num_before_frontier)
                ids_S = place_S if ids is None else ids.index_select(0, place_S)
                edge[kind].append(ids_S.long())

        return HeteroSamplerOutput(
            node=_joined(node),
            row=_joined(row),
            col=_joined(col),
            edge=_joined(edge),
            num_sampled_nodes={kind: list(map(len, parts)) for kind, parts in node.items()},
            num_sampled_edges={kind: list(map(len, parts[1:])) for kind, parts in edge.items()},
        )

    def _in_edges(self, store: Data | EdgeStorage, kind: EdgeType) -> InEdges:
        """The edges of one type by destination, checked, on the CPU."""
        src, _, dst = kind
        if not {src, dst} <= self._sizes.keys():
            raise ValueError(
                f"data: got edges {kind}, expected edges between nodes {list(self._sizes)}"
            )
        if "edge_index" not in store or "adj_t" in store:
            raise ValueError(f"data: got {store}, expected edge_index of {kind}, and no adj_t")
        edges = Graph(store.edge_index.cpu(), (self._sizes[src], self._sizes[dst])).edges
        return edges.ptr.to(self._dtype), edges.sender.to(self._dtype), edges.order.to(self._dtype)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the tables of positions.

        Spawned workers share the memory of pickled tensors: all would write into one table.
        """
        return self.__dict__ | {"_spare_positions": []}


Kind = TypeVar("Kind", NodeType, EdgeType)


def _joined(parts_of: Mapping[Kind, list[Tensor]]) -> dict[Kind, Tensor]:
    """By type, the parts of all hops as one tensor."""
    return {kind: torch.cat(parts) for kind, parts in parts_of.items()}


def _refuse_times(time: Tensor | None) -> None:
    if time is not None:
        raise ValueError(
            "time: got times of the seeds, expected None: sampling by time needs pyg-lib"
        )


def _draw(start: Tensor, nodes_F: Tensor, k: int, replace: bool) -> tuple[Tensor, Tensor]:
    """Draw in-edges of some nodes.

    Args:
        start: (N + 1,) the start of each node's in-edges.
        nodes_F: the nodes.
        k: the fan-out; -1 for all in-edges.
        replace: draw with replacement.

    Returns:
        (S,) the places of the drawn in-edges, node by node; and (S,) which of ``nodes_F`` drew
        each.
    """
    first_F = start.index_select(0, nodes_F)
    degree_F = start.index_select(0, nodes_F + 1) - first_F
    if k < 0:
        count_F = degree_F
    elif replace:
        count_F = (degree_F > 0) * k
    else:
        count_F = degree_F.clamp(max=k)
    index_S = torch.arange(len(nodes_F)).repeat_interleave(count_F)

    if replace and k >= 0:
        offset_S = torch.rand(len(index_S), dtype=torch.float64)
        offset_S = offset_S.mul_(degree_F.index_select(0, index_S)).to(start.dtype)
        return first_F.index_select(0, index_S) + offset_S, index_S

    # Take the first `count` in-edges of each node, which are all of them for most nodes ...
    slot_F = count_F.cumsum(0) - count_F  # where a node's draws begin
    place_S = (first_F - slot_F).to(start.dtype).index_select(0, index_S)
    place_S += torch.arange(len(index_S), dtype=start.dtype)
    # ... and overwrite those of the nodes that have more with random ones.
    large_L = (degree_F > count_F).nonzero().view(-1)
    if k > 0:
        subset_kL = _subsets(degree_F.index_select(0, large_L), k)
        slot_kL = slot_F.index_select(0, large_L) + torch.arange(k)[:, None]
        place_S[slot_kL] = first_F.index_select(0, large_L) + subset_kL
    return place_S, index_S


def _subsets(size_L: Tensor, k: int) -> Tensor:
    """(k, L) a uniform k-subset of ``range(size)`` in each column, for sizes above k.

    Floyd's algorithm: step i draws from one number more than the step before; if the number is
    taken already, that additional one is not, and takes its place.
    """
    draw_kL = torch.rand(k, len(size_L), dtype=torch.float64)  # float32 cannot tell a hub's edges
    chosen_kL = torch.empty(k, len(size_L), dtype=size_L.dtype)
    for i in range(k):
        last_L = size_L - (k - i)
        value_L = draw_kL[i].mul_(last_L + 1).to(size_L.dtype)
        is_taken_L = (chosen_kL[:i] == value_L).any(dim=0)
        torch.where(is_taken_L, last_L, value_L, out=chosen_kL[i])
    return chosen_kL


def _number(position: Tensor, nodes: Tensor, first: int) -> Tensor:
    """Give nodes without a position the next ones, in order of appearance, and return these nodes.

    Args:
        position: of all nodes; changed in place.
        nodes: some of them, which may repeat.
        first: the next free position.
    """
    # Candidates are larger than every position that is taken, so that the minimum keeps those, and
    # gives a new node that appears several times its first candidate.
    candidate = torch.arange(first, first + len(nodes), dtype=position.dtype)
    position.scatter_reduce_(0, nodes, candidate, "amin")
    new = nodes[position.index_select(0, nodes) == candidate]
    position[new] = candidate[: len(new)]  # without the gaps that repeated nodes left
    return new


def count_nodes(store: Data | NodeStorage | StoredGraph) -> int:
    """The number of nodes of a graph or of a type, which PyG cannot always tell."""
    if store.num_nodes is None:
        raise ValueError(f"data: got {store} without a number of nodes, expected num_nodes")
    return int(store.num_nodes)
