"""Neighbor sampling in pure torch.

Shapes: F nodes of a frontier (those that a hop expands), L of them with more in-edges than are
drawn, S edges drawn, k the fan-out (in-edges drawn per node), B seeds of all types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

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

from gmoe._checks import check_choice, described, is_whole, shown
from gmoe.conv.graph import Graph
from gmoe.data.positions import SeparatePositions, SharedPositions
from gmoe.data.stored import StoredGraph, check_nodes
from gmoe.data.temporal import Clock, TemporalStrategy, read_times

Fanouts: TypeAlias = Sequence[int] | Mapping[EdgeType, Sequence[int]] | NumNeighbors
Seeds: TypeAlias = dict[NodeType, Tensor]

NODES: NodeType = ""
EDGES: EdgeType = (NODES, "", NODES)
"""A homogeneous graph is sampled as one with a single type of nodes and of edges."""


class InEdges(NamedTuple):
    """The edges of one type by destination; those of a node by time, if they have times."""

    start: Tensor
    """(N + 1,) where each node's in-edges start."""
    source: Tensor
    """(M,)"""
    ids: Tensor | None = None
    """(M,); ``None`` if an edge's place is its id."""
    times: Tensor | None = None
    """(M,) the sorted keys of :class:`Clock`; ``None`` if any seed may see any edge."""


class NeighborSampler(BaseSampler):
    r"""Uniform neighbor sampling (GraphSAGE, Hamilton et al., 2017) with torch alone.

    It replaces ``pyg-lib`` behind PyG's interface: give it to PyG's ``NodeLoader`` or
    ``LinkLoader``, or call :func:`gmoe.neighbor_loader` or :func:`gmoe.link_neighbor_loader`. Hop
    by hop, each node that the previous hop found draws a set

    .. math::
        S_v \sim \mathrm{Uniform}\{S \subseteq \mathrm{in}(v) : |S| = \min(k, |\mathrm{in}(v)|)\}

    of in-edges, so that messages flow from the sources to the seeds. Floyd's algorithm draws the
    subsets of all nodes of a hop at once, in O(k^2) a node, whatever its degree. Parallel edges and
    self-loops are edges like any other. A node is expanded once, in the hop after the one that
    found it. A seed that is given twice stays two nodes, as in PyG, each with its own draws; edges
    from it start at the first.

    Two further modes are PyG's with ``pyg-lib``. *Disjoint*: each seed gets a subgraph of its own,
    in which a node occurs once, however many other seeds meet it. *Temporal* (by ``time_attr``),
    which is disjoint, too: no edge of a seed's subgraph is later than the seed, or comes from a
    node that is. Where some types have no times, all their nodes or edges may be drawn. A seed is
    in its subgraph whatever the time of its node.

    Draws come from torch's default generator, so that ``torch.manual_seed`` repeats them, in worker
    processes too.

    Args:
        data: the graph, on any device, with ``edge_index`` (a tensor or PyG's ``EdgeIndex``), which
            is sorted by destination here; or a :class:`gmoe.StoredGraph`, whose edges stay on disk:
            each process needs 4 bytes of memory per node.
        num_neighbors: k of each hop, from the seeds outwards; -1 takes all in-edges. For
            ``HeteroData`` one list for all types of edges, or a dictionary with a list for each.
        replace: make k independent draws for each node with in-edges (default ``False``).
        disjoint: sample a subgraph for each seed (default ``False``; with ``time_attr`` always).
        time_attr: the name of the times of nodes or of edges, integers or floats (default ``None``:
            no times); not for a ``StoredGraph``, which holds none. Seeds that come without a time
            have that of their node.
        temporal_strategy: ``"uniform"`` (default) draws any k of the in-edges that a seed may see,
            ``"last"`` takes the k latest; of equal times those last in the graph. With ``replace``
            the k draws are among these.

    Shapes:
        As PyG's ``SamplerOutput`` and ``HeteroSamplerOutput``: ``node`` begins with the seeds,
        ``row`` and ``col`` are positions in it, ``edge`` are ids of the graph's own edges, and
        ``col`` never descends. ``num_sampled_nodes`` (the seeds, then what each hop found) and
        ``num_sampled_edges`` are what ``trim_to_layer`` takes. If disjoint, ``batch`` is the number
        of the seed in whose subgraph a node is; seeds of several types are numbered in sequence.
        Of links it is the number of the link; PyG gives negative ones those of the positive ones.

    Raises:
        ValueError: fan-outs below -1 or of unknown types of edges; edges or seeds outside the
            nodes; an unknown number of nodes; a graph without ``edge_index`` or with ``adj_t``;
            times that do not fit the graph; seeds with times where the graph has none, or without
            where it has none of their type; of disjoint links, a fraction of negative ones.
    """

    def __init__(
        self,
        data: Data | HeteroData | StoredGraph,
        num_neighbors: Fanouts,
        replace: bool = False,
        *,
        disjoint: bool = False,
        time_attr: str | None = None,
        temporal_strategy: TemporalStrategy = "uniform",
    ) -> None:
        check_choice("temporal_strategy", temporal_strategy, TemporalStrategy)
        if temporal_strategy == "last" and time_attr is None:
            raise ValueError("temporal_strategy: got 'last' without time_attr, expected 'uniform'")
        self.is_hetero = isinstance(data, HeteroData)
        self.replace = replace
        self.disjoint = disjoint or time_attr is not None
        self.temporal_strategy = temporal_strategy
        nodes = data.node_items() if isinstance(data, HeteroData) else [(NODES, data)]
        self._sizes = {kind: count_nodes(store) for kind, store in nodes}
        self._node_times: dict[NodeType, Tensor] = {}
        edge_times: dict[EdgeType, Tensor] = {}
        self._clock: Clock | None = None
        if time_attr is not None:
            self._node_times, edge_times = read_times(data, time_attr)
            self._clock = Clock([*self._node_times.values(), *edge_times.values()])

        self._graph: dict[EdgeType, InEdges | StoredGraph]
        if isinstance(data, StoredGraph):  # as it lies on disk: not checked, converted or copied
            self._dtype = data.source.dtype
            self._graph = {EDGES: data}
        else:
            # int32 halves the memory traffic.
            largest = max([*self._sizes.values(), data.num_edges])
            self._dtype = torch.int32 if largest < 2**31 else torch.int64
            edges = data.edge_items() if isinstance(data, HeteroData) else [(EDGES, data)]
            self._graph = {
                kind: self._in_edges(store, kind, edge_times.get(kind)) for kind, store in edges
            }
        self._spare_positions: list[SharedPositions] = []
        self.num_neighbors = self._checked_fanouts(num_neighbors)
        self._fanouts = self.num_neighbors.get_values(list(self._graph))
        for fanout in self._fanouts.values():
            if not all(is_whole(k) and k >= -1 for k in fanout):
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
        return node_sample(index, self._sample)

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The subgraph that both ends of the seed edges need; called by ``LinkLoader``."""
        if (index.time is None) != (self._clock is None):
            expected = "None, as the graph has no times" if self._clock is None else "times"
            raise ValueError(f"time: got {described(index.time)} of the links, expected {expected}")
        amount = 1 if neg_sampling is None else neg_sampling.amount
        if self.disjoint and amount != int(amount):
            raise ValueError(
                f"neg_sampling: got amount {amount}, expected a whole number for disjoint "
                "subgraphs: otherwise PyG would give both ends of a link different numbers"
            )
        return edge_sample(
            index,
            self._sample,
            self._sizes if self.is_hetero else self._sizes[NODES],
            disjoint=self.disjoint,
            node_time=self._node_times if self.is_hetero else self._node_times.get(NODES),
            neg_sampling=neg_sampling,
        )

    def _sample(
        self, seed: Tensor | Seeds, seed_time: Tensor | Seeds | None
    ) -> SamplerOutput | HeteroSamplerOutput:
        """The function that PyG's ``node_sample`` and ``edge_sample`` call."""
        seeds = seed if isinstance(seed, dict) else {NODES: seed}
        times = {NODES: seed_time} if isinstance(seed_time, Tensor) else seed_time or {}
        for kind, nodes in seeds.items():
            if kind not in self._sizes:
                raise ValueError(f"input_type: got {kind!r}, expected one of {list(self._sizes)}")
            check_nodes("node", nodes, self._sizes[kind])
        ranks = [
            self.rank_seeds("time", kind, nodes, times.get(kind)) for kind, nodes in seeds.items()
        ]
        # With a clock every entry is a rank; without one every entry is None.
        rank_B = None if self._clock is None else torch.cat([r for r in ranks if r is not None])
        if self.disjoint:
            output = self._expand(seeds, SeparatePositions(self._sizes), rank_B)
        else:
            positions = self._take_positions()
            output = self._expand(seeds, positions, rank_B)
            positions.clear(output.node)
            self._spare_positions.append(positions)
        if self.is_hetero:
            return output
        return SamplerOutput(
            node=output.node[NODES],
            row=output.row[EDGES],
            col=output.col[EDGES],
            edge=output.edge[EDGES],
            batch=None if output.batch is None else output.batch[NODES],
            num_sampled_nodes=output.num_sampled_nodes[NODES],
            num_sampled_edges=output.num_sampled_edges[EDGES],
        )

    def _take_positions(self) -> SharedPositions:
        """A clean table of positions, which nobody else uses.

        It is taken out of the list, so that threads have their own, and an error leaves no dirty
        one behind.
        """
        try:
            return self._spare_positions.pop()
        except IndexError:
            return SharedPositions(self._sizes, self._dtype)

    def rank_seeds(
        self, name: str, kind: NodeType, nodes: Tensor, times: Tensor | None
    ) -> Tensor | None:
        """(L,) the ranks of the times of seeds of a type; ``None`` if the graph has no times.

        Args:
            name: of the times, for errors.
            kind: the type of the seeds.
            nodes: (L,) the seeds.
            times: (L,) their times; ``None`` for those of the nodes.

        Raises:
            ValueError: times where the graph has none, or none where it has, but not of this type.
        """
        if self._clock is None:
            if times is not None:
                raise ValueError(f"{name}: got times without time_attr of the graph, expected None")
            return None
        if times is None:
            if kind not in self._node_times:
                raise ValueError(
                    f"{name}: got None, expected the times of the seeds: time_attr gives their "
                    "nodes none"
                )
            times = self._node_times[kind][nodes.long()]
        return self._clock.rank(name, times, len(nodes))

    def _expand(
        self, seeds: Seeds, positions: SharedPositions | SeparatePositions, rank_B: Tensor | None
    ) -> HeteroSamplerOutput:
        """Sample hop by hop.

        Args:
            seeds: of each type.
            positions: without any node; holds those of the output afterwards.
            rank_B: the ranks of the seeds' times, or ``None``.

        Returns:
            PyG's output, by type of nodes or edges.
        """
        none = torch.empty(0, dtype=torch.int64)
        # By type: of nodes the seeds, then a tensor a hop; of edges an empty one, then one a hop.
        node = {kind: [seeds.get(kind, none).long()] for kind in self._sizes}
        row = {kind: [none] for kind in self._graph}
        col = {kind: [none] for kind in self._graph}
        edge = {kind: [none] for kind in self._graph}
        # The seed in whose subgraph each node is: only of disjoint subgraphs, as it takes time.
        batch = {kind: [none] for kind in self._sizes}
        if self.disjoint:
            numbers = torch.arange(sum(map(len, seeds.values()))).split([*map(len, seeds.values())])
            batch |= {kind: [one] for kind, one in zip(seeds, numbers, strict=True)}
        for kind, (seeds_of_kind,) in node.items():
            positions.add_seeds(kind, seeds_of_kind, batch[kind][0])

        for hop in range(self.num_neighbors.num_hops):
            for parts in (*node.values(), *batch.values()):
                parts.append(none)
            for kind, graph in self._graph.items():
                # In a stored graph, an edge's place is its id.
                is_stored = isinstance(graph, StoredGraph)
                in_edges = InEdges(graph.start, graph.source) if is_stored else graph
                src, _, dst = kind

                # 1. Draw in-edges of the nodes that the previous hop found.
                frontier = node[dst][hop]
                fanout = self._fanouts[kind][hop]
                rank_F = None if rank_B is None else rank_B[batch[dst][hop]]
                first_F, degree_F = self._visible(in_edges, frontier, rank_F, fanout)
                place_S, index_S = _draw(first_F, degree_F, fanout, self.replace)
                source_S = in_edges.source.index_select(0, place_S).long()

                # 2. Give new sources the next positions in the output.
                batch_S = batch[dst][hop].index_select(0, index_S) if self.disjoint else none
                num_known = sum(map(len, node[src]))
                row_S, new = positions.add(src, source_S, batch_S, num_known)
                node[src][-1] = torch.cat([node[src][-1], source_S.index_select(0, new)])
                if self.disjoint:
                    batch[src][-1] = torch.cat([batch[src][-1], batch_S.index_select(0, new)])

                # 3. Note the edges: positions of both ends, and their ids in the graph.
                row[kind].append(row_S)
                num_before_frontier = sum(map(len, node[dst][:hop]))
                col[kind].append(index_S + num_before_frontier)
                ids_S = place_S  # a stored edge's place is its id
                if in_edges.ids is not None:
                    ids_S = in_edges.ids.index_select(0, place_S)
                edge[kind].append(ids_S.long())

        return HeteroSamplerOutput(
            node=_joined(node),
            row=_joined(row),
            col=_joined(col),
            edge=_joined(edge),
            batch=_joined(batch) if self.disjoint else None,
            num_sampled_nodes={kind: list(map(len, parts)) for kind, parts in node.items()},
            num_sampled_edges={kind: list(map(len, parts[1:])) for kind, parts in edge.items()},
        )

    def _visible(
        self, in_edges: InEdges, node_F: Tensor, rank_F: Tensor | None, fanout: int
    ) -> tuple[Tensor, Tensor]:
        """(F,) where the in-edges begin that each node may draw, and how many they are."""
        first_F = in_edges.start.index_select(0, node_F)
        if rank_F is None or in_edges.times is None or self._clock is None:
            return first_F, in_edges.start.index_select(0, node_F + 1) - first_F
        degree_F = self._clock.end(in_edges.times, node_F, rank_F).to(first_F.dtype) - first_F
        if self.temporal_strategy == "last" and fanout >= 0:
            too_old_F = (degree_F - fanout).clamp(min=0)
            return first_F + too_old_F, degree_F - too_old_F
        return first_F, degree_F

    def _in_edges(
        self, store: Data | EdgeStorage, kind: EdgeType, time_M: Tensor | None
    ) -> InEdges:
        """The edges of one type by destination, checked, on the CPU."""
        src, _, dst = kind
        if not {src, dst} <= self._sizes.keys():
            raise ValueError(
                f"data: got edges {kind}, expected edges between nodes {list(self._sizes)}"
            )
        if "edge_index" not in store or "adj_t" in store:
            raise ValueError(f"data: got {store}, expected edge_index of {kind}, and no adj_t")
        edges = Graph(store.edge_index.cpu(), (self._sizes[src], self._sizes[dst])).edges
        sender, ids, times = edges.sender, edges.order, None
        if time_M is not None:
            time_M = time_M[ids]
        elif src in self._node_times:  # an edge is as late as its source
            time_M = self._node_times[src][sender]
        if time_M is not None and self._clock is not None:
            rank_M = self._clock.rank("time_attr", time_M, len(time_M))
            times, order = self._clock.order(edges.receiver, rank_M)
            sender, ids = sender[order], ids[order]
        return InEdges(
            edges.ptr.to(self._dtype), sender.to(self._dtype), ids.to(self._dtype), times
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave out the tables of positions.

        Spawned workers share the memory of pickled tensors: all would write into one table.
        """
        return self.__dict__ | {"_spare_positions": []}


Kind = TypeVar("Kind", NodeType, EdgeType)


def _joined(parts_of: Mapping[Kind, list[Tensor]]) -> dict[Kind, Tensor]:
    """By type, the parts of all hops as one tensor."""
    return {kind: torch.cat(parts) for kind, parts in parts_of.items()}


def _draw(first_F: Tensor, degree_F: Tensor, k: int, replace: bool) -> tuple[Tensor, Tensor]:
    """Draw in-edges of some nodes.

    Args:
        first_F: where each node's in-edges start.
        degree_F: how many there are to draw from.
        k: the fan-out; -1 for all of them.
        replace: draw with replacement.

    Returns:
        (S,) the places of the drawn in-edges, node by node; and (S,) which of the nodes drew each.
    """
    dtype = first_F.dtype
    if k < 0:
        count_F = degree_F
    elif replace:
        count_F = (degree_F > 0) * k
    else:
        count_F = degree_F.clamp(max=k)
    index_S = torch.arange(len(first_F)).repeat_interleave(count_F)

    if replace and k >= 0:
        offset_S = torch.rand(len(index_S), dtype=torch.float64)
        offset_S = offset_S.mul_(degree_F.index_select(0, index_S)).to(dtype)
        return first_F.index_select(0, index_S) + offset_S, index_S

    # Take the first `count` in-edges of each node, which are all of them for most nodes ...
    slot_F = count_F.cumsum(0) - count_F  # where a node's draws begin
    place_S = (first_F - slot_F).to(dtype).index_select(0, index_S)
    place_S += torch.arange(len(index_S), dtype=dtype)
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


def count_nodes(store: Data | NodeStorage | StoredGraph) -> int:
    """The number of nodes of a graph or of a type, which PyG cannot always tell."""
    # A class has a property, not a number.
    number = None if isinstance(store, type) else getattr(store, "num_nodes", None)
    if number is None:
        raise ValueError(
            f"data: got {shown(store)} without a number of nodes, expected a graph of PyG's or a "
            "StoredGraph, with num_nodes"
        )
    return int(number)
