"""Graphs to sample from, and what a sampled subgraph must be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.sampler import HeteroSamplerOutput, NodeSamplerInput, SamplerOutput

from gmoe.data.sampler import NeighborSampler


def graph(num_nodes: int, num_edges: int, seed: int = 0) -> Data:
    """With parallel edges and self-loops, in no order."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(num_nodes, (2, num_edges), generator=generator)
    return Data(x=torch.randn(num_nodes, 4, generator=generator), edge_index=edge_index)


def star(degree: int) -> Data:
    """Node 0 has an in-edge from each other node: edge i comes from node i + 1."""
    source = torch.arange(1, degree + 1)
    return Data(edge_index=torch.stack([source, torch.zeros_like(source)]), num_nodes=degree + 1)


def draw(sampler: NeighborSampler, seeds: Any, seed: int | None = None) -> SamplerOutput:
    if seed is not None:
        torch.manual_seed(seed)
    out = sampler.sample_from_nodes(NodeSamplerInput(None, torch.as_tensor(list(seeds), dtype=torch.long)))
    assert isinstance(out, SamplerOutput)
    return out


def sample(data: Data, fanouts: list[int], seeds: Any, replace: bool = False, **kwargs: Any) -> SamplerOutput:
    return draw(NeighborSampler(data, fanouts, replace, **kwargs), seeds)


def hops(values: Tensor, sizes: list[int]) -> list[list[int]]:
    assert sum(sizes) == len(values)
    return [part.tolist() for part in values.split(sizes)]


def expected_count(degree: int, k: int, replace: bool) -> int:
    if k < 0:
        return degree
    return (k if degree else 0) if replace else min(k, degree)


def check(data: Data, out: SamplerOutput, fanouts: list[int], seeds: list[int], replace: bool) -> None:
    """All that a sampled subgraph must be, one node and one edge at a time."""
    assert out.edge is not None
    assert out.num_sampled_nodes is not None
    assert out.num_sampled_edges is not None
    assert all(value.dtype == torch.int64 for value in (out.node, out.row, out.col, out.edge))
    in_edges: dict[int, list[int]] = {node: [] for node in range(int(data.num_nodes or 0))}
    for edge, destination in enumerate(data.edge_index[1].tolist()):
        in_edges[destination].append(edge)

    layers = hops(out.node, out.num_sampled_nodes)
    assert layers[0] == seeds
    found = [node for layer in layers[1:] for node in layer]
    assert len(set(found)) == len(found)
    assert not set(found) & set(seeds)
    assert len(layers) == len(fanouts) + 1
    assert len(out.num_sampled_edges) == len(fanouts)

    local_edges = list(zip(out.row.tolist(), out.col.tolist(), out.edge.tolist(), strict=True))
    assert out.col.tolist() == sorted(out.col.tolist())
    begin = taken = 0
    for k, layer, new, num_edges in zip(fanouts, layers, layers[1:], out.num_sampled_edges, strict=False):
        of_hop = local_edges[taken : taken + num_edges]
        for position, node in enumerate(layer, start=begin):
            drawn = [edge for _, col, edge in of_hop if col == position]
            assert len(drawn) == expected_count(len(in_edges[node]), k, replace)
            assert set(drawn) <= set(in_edges[node])
            assert replace or len(set(drawn)) == len(drawn)
        for row, col, edge in of_hop:
            source, destination = data.edge_index[:, edge].tolist()
            assert (row, int(out.node[col])) == (out.node.tolist().index(source), destination)
        appeared = [int(out.node[row]) for row, _, _ in of_hop if row >= begin + len(layer)]
        assert list(dict.fromkeys(appeared)) == new  # in order of appearance
        begin, taken = begin + len(layer), taken + num_edges
    assert taken == len(local_edges)


def hetero_graph() -> HeteroData:
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    sizes = {"paper": 30, "author": 20, "place": 5}
    for node_kind, size in sizes.items():
        data[node_kind].x = torch.randn(size, 4, generator=generator)
    kinds = [("author", "writes", "paper"), ("paper", "cites", "paper"), ("paper", "by", "author")]
    for kind, num_edges in zip([*kinds, ("author", "at", "place")], (90, 120, 90, 30), strict=True):
        ends = [torch.randint(sizes[kind[i]], (num_edges,), generator=generator) for i in (0, 2)]
        data[kind].edge_index = torch.stack(ends)
        data[kind].edge_attr = torch.arange(num_edges)
    return data


def hetero_sample(data: HeteroData, fanouts: Any, kind: str, seeds: list[int], replace: bool) -> HeteroSamplerOutput:
    sampler = NeighborSampler(data, fanouts, replace)
    out = sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor(seeds), input_type=kind))
    assert isinstance(out, HeteroSamplerOutput)
    return out
