"""Graphs to sample from, and the definition of a sampled subgraph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_geometric.typing
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
    out = sampler.sample_from_nodes(
        NodeSamplerInput(None, torch.as_tensor(list(seeds), dtype=torch.long))
    )
    assert isinstance(out, SamplerOutput)
    return out


def sample(
    data: Data, fanouts: list[int], seeds: Any, replace: bool = False, **kwargs: Any
) -> SamplerOutput:
    return draw(NeighborSampler(data, fanouts, replace, **kwargs), seeds)


def hops(values: Tensor, sizes: list[int]) -> list[list[int]]:
    assert sum(sizes) == len(values)
    return [part.tolist() for part in values.split(sizes)]


def expected_count(degree: int, k: int, replace: bool) -> int:
    return degree if k < 0 else k * (degree > 0) if replace else min(k, degree)


def check(data: Any, out: Any, fanouts: Any, seeds: Any, replace: bool) -> None:
    """Compare with the definition, one node and one edge at a time."""
    if isinstance(data, Data):  # as a graph of one type of nodes and of edges
        whole, kind = HeteroData(), ("node", "to", "node")
        whole["node"].num_nodes, whole[kind].edge_index = data.num_nodes, data.edge_index
        of_nodes, of_edges = (
            ("node", "num_sampled_nodes"),
            ("row", "col", "edge", "num_sampled_edges"),
        )
        fields: Any = {name: {"node": getattr(out, name)} for name in of_nodes}
        fields |= {name: {kind: getattr(out, name)} for name in of_edges}
        data, out, seeds = whole, HeteroSamplerOutput(**fields), {"node": seeds}
    per_kind = fanouts if isinstance(fanouts, dict) else dict.fromkeys(data.edge_types, fanouts)
    num_hops = len(next(iter(per_kind.values())))
    layers = {t: hops(out.node[t], out.num_sampled_nodes[t]) for t in data.node_types}
    for t, (first, *found) in layers.items():
        new = [node for layer in found for node in layer]
        assert first == seeds.get(t, [])
        assert len(set(new) - set(first)) == len(new)
        assert len(found) == num_hops
    begin = dict.fromkeys(data.node_types, 0)
    for hop in range(num_hops):
        appeared: dict[str, list[int]] = {t: [] for t in data.node_types}
        for kind in data.edge_types:
            edge_index, (source, _, destination) = data[kind].edge_index, kind
            sizes = out.num_sampled_edges[kind]
            assert (len(sizes), sum(sizes)) == (num_hops, len(out.edge[kind]))
            assert bool((out.col[kind].diff() >= 0).all())
            row, col, edge = (part[kind].split(sizes)[hop] for part in (out.row, out.col, out.edge))
            assert row.dtype == col.dtype == edge.dtype == out.node[source].dtype == torch.int64
            assert torch.equal(out.node[destination][col], edge_index[1, edge])
            sources = edge_index[0, edge].tolist()
            assert row.tolist() == [out.node[source].tolist().index(node) for node in sources]
            for position, node in enumerate(layers[destination][hop], start=begin[destination]):
                drawn = edge[col == position].tolist()
                assert len(drawn) == expected_count(
                    int((edge_index[1] == node).sum()), per_kind[kind][hop], replace
                )
                assert replace or len(set(drawn)) == len(drawn)
            known = begin[source] + len(layers[source][hop])
            appeared[source] += [
                node for place, node in zip(row.tolist(), sources, strict=True) if place >= known
            ]
        for t, nodes in appeared.items():
            assert list(dict.fromkeys(nodes)) == layers[t][hop + 1]  # in order of appearance
            begin[t] += len(layers[t][hop])


def hetero_graph() -> HeteroData:
    generator = torch.Generator().manual_seed(0)
    data = HeteroData()
    sizes = {"paper": 30, "author": 20, "place": 5}
    for name, size in sizes.items():
        data[name].x = torch.randn(size, 4, generator=generator)
    for kind in ("author writes paper", "paper cites paper", "paper by author", "author at place"):
        src, relation, dst = kind.split()
        ends = [torch.randint(sizes[end], (90,), generator=generator) for end in (src, dst)]
        data[src, relation, dst].edge_index, data[src, relation, dst].edge_attr = (
            torch.stack(ends),
            torch.arange(90),
        )
    return data


def hetero_sample(
    data: HeteroData, fanouts: Any, kind: str, seeds: list[int], replace: bool
) -> HeteroSamplerOutput:
    sampler = NeighborSampler(data, fanouts, replace)
    out = sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor(seeds), input_type=kind))
    assert isinstance(out, HeteroSamplerOutput)
    return out


needs_pyg_lib = pytest.mark.skipif(
    not torch_geometric.typing.WITH_PYG_LIB, reason="pyg-lib is not installed"
)

each_backend = pytest.mark.parametrize(
    "backend", ["gmoe", pytest.param("pyg", marks=needs_pyg_lib)]
)


def within(count: Tensor | int, trials: int, share: float) -> Tensor:
    """True where a binomial count is within 5 standard deviations of its mean."""
    return (torch.as_tensor(count) - trials * share).abs() <= 5 * math.sqrt(
        trials * share * (1 - share)
    ) + 1e-9
