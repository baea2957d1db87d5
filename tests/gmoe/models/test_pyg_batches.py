"""Batches of PyG's link, temporal and typed loaders feed layers and models like any graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_geometric.typing
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader, LinkNeighborLoader, NeighborLoader, NodeLoader
from torch_geometric.nn import HeteroConv
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    HeteroSamplerOutput,
    NegativeSampling,
    NodeSamplerInput,
    SamplerOutput,
)
from torch_geometric.sampler.neighbor_sampler import edge_sample

from gmoe import GNNMoE, MoEConv
from gmoe.data import NeighborSampler
from tests.helpers.equal import assert_same
from tests.helpers.sampled import graph

NODES, WIDTH, OUT, LINKS = 30, 4, 3, 7

needs_pyg_lib = pytest.mark.skipif(
    not torch_geometric.typing.WITH_PYG_LIB, reason="pyg-lib is not installed"
)


class LinkSampler(NeighborSampler):
    """All in-edges of both ends of links, which PyG's own functions make a batch of."""

    def sample_from_edges(  # type: ignore[override]
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> Any:
        def sample(seed: torch.Tensor, _: Any) -> SamplerOutput:
            return self.sample_from_nodes(NodeSamplerInput(None, seed))

        return edge_sample(index, sample, NODES, False, None, neg_sampling)


def data_of() -> Data:
    data = graph(NODES, 120)
    data.x = data.x.double()
    data.time = torch.arange(NODES)
    return data


def model_of() -> GNNMoE:
    torch.manual_seed(0)
    return GNNMoE(WIDTH, 8, OUT, num_layers=2, num_experts=3, k=2).double().eval()


def links_are_scored(loader: Any) -> None:
    """Both ends of each link get in the batch what they get in the whole graph."""
    model, data = model_of(), data_of()
    whole = model(data.x, data.edge_index)
    for batch in loader:
        assert batch.edge_label.tolist() == [1.0] * len(batch.input_id) + [0.0] * len(
            batch.input_id
        )
        h = model(batch.x, batch.edge_index)
        ends = batch.n_id[batch.edge_label_index]
        assert_same(h[batch.edge_label_index], whole[ends])
        assert torch.equal(ends[:, : len(batch.input_id)], data.edge_index[:, batch.input_id])


def test_links_with_negative_ones() -> None:
    data = data_of()
    links = data.edge_index[:, :LINKS]
    sampler = LinkSampler(data, [-1, -1, -1])
    loader = LinkLoader(data, sampler, edge_label_index=links, neg_sampling="binary", batch_size=3)
    links_are_scored(loader)


@needs_pyg_lib
def test_links_of_pyg_lib() -> None:
    data = data_of()
    links = data.edge_index[:, :LINKS]
    loader = LinkNeighborLoader(
        data, [-1, -1, -1], edge_label_index=links, neg_sampling="binary", batch_size=3
    )
    links_are_scored(loader)


class DisjointSampler(BaseSampler):
    """A subgraph for each seed: the edges whose ends are not later than it."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def sample_from_nodes(self, index: NodeSamplerInput, **_: object) -> SamplerOutput:
        edge_index, time = self.data.edge_index, self.data.time
        nodes: list[Any] = []
        rows, cols, ids = [], [], []
        for seed in index.node.tolist():
            first = sum(map(len, nodes))
            seen = [seed, *(node for node in range(seed) if time[node] <= time[seed])]
            place = {node: first + i for i, node in enumerate(seen)}
            for edge, (source, destination) in enumerate(edge_index.T.tolist()):
                if source in place and destination in place:
                    rows.append(place[source])
                    cols.append(place[destination])
                    ids.append(edge)
            nodes.append(torch.tensor(seen))
        batch = torch.arange(len(nodes)).repeat_interleave(torch.tensor([*map(len, nodes)]))
        out = SamplerOutput(
            torch.cat(nodes), torch.tensor(rows), torch.tensor(cols), torch.tensor(ids), batch
        )
        out.metadata = (index.input_id, index.time)
        return out

    def sample_from_edges(self, *_: object, **__: object) -> Any:
        raise NotImplementedError


def subgraphs_do_not_meet(loader: Any) -> None:
    """Each seed's subgraph gives what it gives by itself."""
    model = model_of()
    for batch in loader:
        assert_same(*batch.batch[batch.edge_index])
        h = model(batch.x, batch.edge_index, batch=batch.batch)
        for number in batch.batch.unique():
            own = batch.batch == number
            part = batch.subgraph(own)
            assert_same(model(part.x, part.edge_index), h[own])


def test_disjoint_subgraphs_by_time() -> None:
    data = data_of()
    seeds = torch.tensor([9, 4, 28, 11])
    loader = NodeLoader(data, DisjointSampler(data), input_nodes=seeds, batch_size=2)
    subgraphs_do_not_meet(loader)


@needs_pyg_lib
def test_disjoint_subgraphs_of_pyg_lib() -> None:
    seeds = torch.tensor([9, 4, 28, 11])
    loader = NeighborLoader(data_of(), [3, 3], seeds, batch_size=2, time_attr="time")
    subgraphs_do_not_meet(loader)


class TypedSampler(BaseSampler):
    """The whole graph, with the seeds, the first authors, in front."""

    def __init__(self, data: HeteroData) -> None:
        self.data = data

    def sample_from_nodes(self, index: NodeSamplerInput, **_: object) -> HeteroSamplerOutput:
        kinds = self.data.edge_types
        ends = {kind: self.data[kind].edge_index for kind in kinds}
        out = HeteroSamplerOutput(
            node={kind: torch.arange(self.data[kind].num_nodes) for kind in self.data.node_types},
            row={kind: ends[kind][0] for kind in kinds},
            col={kind: ends[kind][1] for kind in kinds},
            edge={kind: torch.arange(ends[kind].size(1)) for kind in kinds},
        )
        out.metadata = (index.input_id, index.time)
        return out

    def sample_from_edges(self, *_: object, **__: object) -> Any:
        raise NotImplementedError


def typed_graph() -> HeteroData:
    data = HeteroData()
    data["author"].x, data["paper"].x = torch.randn(6, WIDTH), torch.randn(9, WIDTH)
    for name, source, destination in (("writes", 6, 9), ("by", 9, 6)):
        kind = ("author", name, "paper") if name == "writes" else ("paper", name, "author")
        ends = torch.stack([torch.randint(size, (20,)) for size in (source, destination)])
        data[kind].edge_index = ends
    return data


def typed_batches_are_scored(loader: Any, data: HeteroData) -> None:
    """The seeds of a batch get what they get in the whole graph."""
    torch.manual_seed(0)
    convs = {kind: MoEConv("sage", (-1, -1), OUT, num_experts=2) for kind in data.edge_types}
    layer = HeteroConv(convs)
    with torch.no_grad():  # makes the parameters
        layer(data.x_dict, data.edge_index_dict)
    layer.eval()
    whole = layer(data.x_dict, data.edge_index_dict)
    for batch in loader:
        size = batch["author"].batch_size
        found = layer(batch.x_dict, batch.edge_index_dict)["author"][:size]
        torch.testing.assert_close(found, whole["author"][batch["author"].n_id[:size]])


def test_typed_nodes() -> None:
    torch.manual_seed(0)
    data = typed_graph()
    seeds = ("author", torch.arange(4))
    typed_batches_are_scored(NodeLoader(data, TypedSampler(data), seeds, batch_size=4), data)


@needs_pyg_lib
def test_typed_nodes_of_pyg_lib() -> None:
    torch.manual_seed(0)
    data = typed_graph()
    loader = NeighborLoader(data, [-1, -1], ("author", torch.arange(4)), batch_size=2)
    typed_batches_are_scored(loader, data)
