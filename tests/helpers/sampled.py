"""Graphs to sample from, and the definition of a sampled subgraph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.sampler import NodeSamplerInput, SamplerOutput

from gmoe.data import NeighborSampler


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
    return sampler.sample_from_nodes(
        NodeSamplerInput(None, torch.as_tensor(list(seeds), dtype=torch.long))
    )


def sample(data: Data, fanouts: list[int], seeds: Any) -> SamplerOutput:
    return draw(NeighborSampler(data, fanouts), seeds)


def hops(values: Tensor, sizes: list[int]) -> list[list[int]]:
    assert sum(sizes) == len(values)
    return [part.tolist() for part in values.split(sizes)]


def check(data: Data, out: SamplerOutput, fanouts: list[int], seeds: list[int]) -> None:
    """Compare with the definition, one node and one edge at a time."""
    assert out.edge is not None
    assert out.num_sampled_nodes is not None
    assert out.num_sampled_edges is not None
    layers = hops(out.node, out.num_sampled_nodes)
    first, *found = layers
    new = [node for layer in found for node in layer]
    assert first == seeds
    assert len(set(new) - set(first)) == len(new)
    assert len(found) == len(out.num_sampled_edges) == len(fanouts)
    assert bool((out.col.diff() >= 0).all())
    assert sum(out.num_sampled_edges) == len(out.edge)
    begin = 0
    for hop, fanout in enumerate(fanouts):
        row, col, edge = (
            part.split(out.num_sampled_edges)[hop] for part in (out.row, out.col, out.edge)
        )
        assert row.dtype == col.dtype == edge.dtype == out.node.dtype == torch.int64
        assert torch.equal(out.node[col], data.edge_index[1, edge])
        sources = data.edge_index[0, edge].tolist()
        assert row.tolist() == [out.node.tolist().index(node) for node in sources]
        for position, node in enumerate(layers[hop], start=begin):
            drawn = edge[col == position].tolist()
            degree = int((data.edge_index[1] == node).sum())
            assert len(drawn) == (degree if fanout < 0 else min(fanout, degree))
            assert len(set(drawn)) == len(drawn)
        begin += len(layers[hop])
        appeared = [
            node for place, node in zip(row.tolist(), sources, strict=True) if place >= begin
        ]
        assert list(dict.fromkeys(appeared)) == layers[hop + 1]  # in order of appearance


def within(count: Tensor | int, trials: int, share: float) -> Tensor:
    """True where a binomial count is within 5 standard deviations of its mean."""
    return (torch.as_tensor(count) - trials * share).abs() <= 5 * math.sqrt(
        trials * share * (1 - share)
    ) + 1e-9
