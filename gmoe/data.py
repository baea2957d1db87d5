"""Mini-batches of a graph by nodes, with or without compiled extensions.

Shapes: N nodes, M edges, F nodes of a frontier (those that a hop expands), L of them with more
in-edges than are drawn, S edges drawn, k the fan-out (in-edges drawn per node), B seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_geometric.typing
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.sampler import BaseSampler, NodeSamplerInput, SamplerOutput

from gmoe._checks import INTEGERS, check, check_counts, check_range, described, is_whole, shown
from gmoe.conv.graph import Graph
from gmoe.edges import ascends


def neighbor_loader(
    data: Data,
    num_neighbors: Sequence[int],
    input_nodes: Tensor | Sequence[int] | None = None,
    batch_size: int = 1,
    **kwargs: Any,
) -> NodeLoader:
    """Load mini-batches of sampled neighborhoods, with ``pyg-lib`` or without.

    It is PyG's ``NeighborLoader`` where ``pyg-lib`` is installed, which that one needs. Elsewhere
    it is PyG's ``NodeLoader`` over ``NeighborSampler``, which draws from the same distribution
    with torch alone.

    The tensors of ``data`` may be memory-mapped, and larger than memory: ``x`` and what else there
    is per node or edge is read by rows, and edges that ascend by destination stay where they are.
    Others are sorted in memory.

    Args:
        data: the graph, with ``edge_index``.
        num_neighbors: in-edges drawn per node in each hop, from the seeds outwards (-1: all).
        input_nodes: the seeds of an epoch: ids, a boolean mask, or all nodes (``None``, default).
        batch_size: seeds in a batch (default 1).
        **kwargs: further arguments of the loader and of ``torch.utils.data.DataLoader``.
            ``shuffle=True`` for training; ``num_workers=1, persistent_workers=True`` draws the next
            batches while the model computes.

    Returns:
        A loader of ``Data``. The first ``batch.batch_size`` nodes of a batch are its seeds: compute
        loss and metric on them only. ``n_id``, ``e_id`` and ``input_id`` are the numbers of its
        nodes, edges and seeds in ``data``.

    Raises:
        ValueError: typed nodes, or no ``edge_index``; seeds or edges outside the nodes; fan-outs
            below -1; without ``pyg-lib``, an ``input_time``.
        TypeError: without ``pyg-lib``, an argument that needs it, such as ``replace``,
            ``disjoint`` or ``time_attr``.

    Example:
        >>> loader = gmoe.neighbor_loader(
        ...     data, [15, 10, 5], data.train_mask, batch_size=1024, shuffle=True
        ... )
        >>> for batch in loader:
        ...     logits = model(batch.x, batch.edge_index)[: batch.batch_size]
        ...     loss = F.cross_entropy(logits, batch.y[: batch.batch_size])
    """
    if not isinstance(data, Data):
        raise ValueError(
            f"data: got {shown(data)}, expected a Data; typed nodes are sampled by "
            "torch_geometric.loader.NeighborLoader with pyg-lib"
        )
    seeds = _seeds(input_nodes, _count_nodes(data))
    check_counts(batch_size=batch_size)
    kwargs |= {"input_nodes": seeds, "batch_size": batch_size}
    if torch_geometric.typing.WITH_PYG_LIB:
        if "edge_index" in data:  # PyG takes sorted edges as they are, too, if it is told
            kwargs.setdefault("is_sorted", ascends(data.edge_index[1]))
        return NeighborLoader(data, num_neighbors, **kwargs)
    kwargs.pop("is_sorted", None)  # our sampler finds out itself
    return NodeLoader(data, NeighborSampler(data, num_neighbors), **kwargs)


def _count_nodes(data: Data) -> int:
    """The number of nodes, which PyG cannot always tell."""
    if data.num_nodes is None:
        raise ValueError(f"data: got {shown(data)}, expected a graph with num_nodes")
    return int(data.num_nodes)


def _seeds(nodes: object, num_nodes: int) -> Tensor:
    """Node ids or a mask of all nodes as a tensor, checked; by default all nodes.

    A list of booleans is a mask, not the ids 0 and 1.
    """
    if nodes is None:
        return torch.arange(num_nodes)
    try:
        seeds = torch.as_tensor(nodes)
    except (RuntimeError, TypeError, ValueError) as error:  # text, or lists of several sizes
        got = f"{type(nodes).__name__} ({error})"
        raise ValueError(f"input_nodes: got {got}, expected node ids or a mask") from error
    if seeds.dtype == torch.bool:
        legal = f"({num_nodes},)"
        got = f"a mask of shape {tuple(seeds.shape)}"
        check(seeds.shape == (num_nodes,), "input_nodes", got, legal)
        return seeds
    if not seeds.numel():  # an empty list became floats
        seeds = seeds.long()
    _check_nodes("input_nodes", seeds, num_nodes)
    return seeds


def _check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse anything but a vector of node ids."""
    is_vector = nodes.dim() == 1 and nodes.dtype in INTEGERS
    check(is_vector, name, described(nodes), "a vector of node ids")
    check_range(name, nodes, num_nodes)


class NeighborSampler(BaseSampler):
    r"""Uniform neighbor sampling (GraphSAGE, Hamilton et al., 2017) with torch alone.

    It replaces ``pyg-lib`` behind PyG's interface. Hop by hop, each node that the previous hop
    found draws a set

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
        data, num_neighbors: see :func:`neighbor_loader`.

    Shapes:
        As PyG's ``SamplerOutput``: ``node`` begins with the seeds, ``row`` and ``col`` are
        positions in it, ``edge`` are ids of the graph's own edges, and ``col`` never descends.
        ``num_sampled_nodes`` (the seeds, then what each hop found) and ``num_sampled_edges`` are
        what ``trim_to_layer`` takes.
    """

    def __init__(self, data: Data, num_neighbors: Sequence[int]) -> None:
        is_list = isinstance(num_neighbors, list | tuple)
        is_legal = is_list and all(is_whole(k) and k >= -1 for k in num_neighbors)
        legal = "a list of whole numbers of at least -1 (all), one a hop"
        check(is_legal, "num_neighbors", repr(num_neighbors), legal)
        if "edge_index" not in data or "adj_t" in data:
            raise ValueError(f"data: got {data}, expected edge_index, and no adj_t")
        self.num_neighbors = list(num_neighbors)
        self.num_nodes = _count_nodes(data)
        edges = Graph(data.edge_index.cpu(), self.num_nodes).edges
        self._start, self._source, self._ids = edges.ptr, edges.sender, edges.given_order
        # int32 halves the memory traffic.
        self._dtype = torch.int32 if max(self.num_nodes, len(edges.sender)) < 2**31 else torch.int64
        if self._ids is not None:  # else the edges may be larger than memory
            self._start = self._start.to(self._dtype)
            self._source = self._source.to(self._dtype)
            self._ids = self._ids.to(self._dtype)
        self._spare_tables: list[Tensor] = []

    def sample_from_nodes(self, index: NodeSamplerInput, **_: object) -> SamplerOutput:
        """The subgraph that the seeds ``index.node`` need; called by ``NodeLoader``."""
        got = "times of the seeds"
        check(index.time is None, "input_time", got, "none: they need PyG's sampler and pyg-lib")
        _check_nodes("node", index.node, self.num_nodes)
        position = self._take_table()
        output = self._expand(index.node.long(), position)
        position.index_fill_(0, output.node, torch.iinfo(self._dtype).max)
        self._spare_tables.append(position)
        output.metadata = (index.input_id, None)
        return output

    def sample_from_edges(self, *_: object, **__: object) -> SamplerOutput:
        """Refuse links."""
        raise NotImplementedError(
            "loader: got one of links, expected one of nodes; "
            "torch_geometric.loader.LinkNeighborLoader with pyg-lib samples links"
        )

    def _take_table(self) -> Tensor:
        """(N,) the position of each node in the output: none yet, the largest number.

        It is taken out of the list, so that threads have their own, and an error leaves no dirty
        one behind. To clear it is cheaper than a new one.
        """
        try:
            return self._spare_tables.pop()
        except IndexError:
            # Not as an inference tensor, which cannot be written to outside of that mode.
            with torch.inference_mode(False):
                return torch.full(
                    (self.num_nodes,), torch.iinfo(self._dtype).max, dtype=self._dtype
                )

    def _expand(self, seed_B: Tensor, position: Tensor) -> SamplerOutput:
        """Sample hop by hop; ``position`` holds the nodes of the output afterwards."""
        order_B = torch.arange(len(seed_B), dtype=position.dtype)
        position.scatter_reduce_(0, seed_B, order_B, "amin")  # of a seed that is given twice
        none = torch.empty(0, dtype=torch.int64)
        node, row, col, edge = [seed_B], [none], [none], [none]
        num_known = len(seed_B)
        for k in self.num_neighbors:
            # 1. Draw in-edges of the nodes that the previous hop found.
            frontier_F = node[-1]
            first_F = self._start.index_select(0, frontier_F)
            degree_F = self._start.index_select(0, frontier_F + 1) - first_F
            place_S, index_S = _draw(first_F, degree_F, k)
            source_S = self._source.index_select(0, place_S).long()

            # 2. Give new sources the next positions in the output.
            new = _number(position, source_S, num_known)
            node.append(source_S.index_select(0, new))

            # 3. Note the edges: positions of both ends, and their ids in the graph.
            row.append(position.index_select(0, source_S).long())
            col.append(index_S + (num_known - len(frontier_F)))
            ids_S = place_S if self._ids is None else self._ids.index_select(0, place_S)
            edge.append(ids_S.long())
            num_known += len(new)
        return SamplerOutput(
            node=torch.cat(node),
            row=torch.cat(row),
            col=torch.cat(col),
            edge=torch.cat(edge),
            num_sampled_nodes=list(map(len, node)),
            num_sampled_edges=list(map(len, edge[1:])),
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave out the tables of positions.

        Spawned workers share the memory of pickled tensors: all would write into one table.
        """
        return self.__dict__ | {"_spare_tables": []}


def _number(position: Tensor, source_S: Tensor, first: int) -> Tensor:
    """Give nodes without a position the next ones, in order of appearance.

    Args:
        position: of all nodes, larger than any other where there is none; changed in place.
        source_S: some of the nodes, which may repeat.
        first: the next free position.

    Returns:
        Which of the sources are new: where each that had no position appears first, ascending.
    """
    # Candidates are larger than every position that is taken, so that the minimum keeps those, and
    # gives a new node that appears several times its first candidate.
    candidate_S = torch.arange(first, first + len(source_S), dtype=position.dtype)
    position.scatter_reduce_(0, source_S, candidate_S, "amin")
    new = (position.index_select(0, source_S) == candidate_S).nonzero().view(-1)
    # Without the gaps that repeated nodes left.
    position[source_S.index_select(0, new)] = candidate_S[: len(new)]
    return new


def _draw(first_F: Tensor, degree_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Draw in-edges of some nodes.

    Args:
        first_F: where each node's in-edges start.
        degree_F: how many there are to draw from.
        k: the fan-out; -1 for all of them.

    Returns:
        (S,) the places of the drawn in-edges, node by node; and (S,) which of the nodes drew each.
    """
    dtype = first_F.dtype
    count_F = degree_F if k < 0 else degree_F.clamp(max=k)
    index_S = torch.arange(len(first_F)).repeat_interleave(count_F)

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
