"""The sampler returns a sampled subgraph of any form of graph, and draws uniformly."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader
from torch_geometric.sampler import NodeSamplerInput

import gmoe.data.sampler
from gmoe.data.sampler import NeighborSampler
from tests.helpers.sampled import (
    check,
    draw,
    graph,
    hetero_graph,
    hetero_sample,
    sample,
    star,
    within,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    num_nodes=st.integers(1, 12),
    num_edges=st.integers(0, 40),
    fanouts=st.lists(st.integers(-1, 4), max_size=3),
    num_seeds=st.integers(0, 6),
    replace=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_output_is_a_sampled_subgraph(
    num_nodes: int, num_edges: int, fanouts: list[int], num_seeds: int, replace: bool, seed: int
) -> None:
    data = graph(num_nodes, num_edges, seed)
    generator = torch.Generator().manual_seed(seed)
    # Some of them twice
    seeds = torch.randint(num_nodes, (num_seeds,), generator=generator).tolist()
    torch.manual_seed(seed)
    sampler = NeighborSampler(data, fanouts, replace)
    for _ in range(2):  # the second batch meets no trace of the first
        check(data, draw(sampler, seeds), fanouts, seeds, replace)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("fanouts", [[3, 2, 2], [-1, -1], [[4, 1], [0, 2], [-1, 3], [1, 1]]])
def test_hetero_output_is_a_sampled_subgraph(fanouts: Any, replace: bool) -> None:
    data = hetero_graph()
    if isinstance(fanouts[0], list):  # by type of edges
        fanouts = dict(zip(data.edge_types, fanouts, strict=True))
    torch.manual_seed(0)
    out = hetero_sample(data, fanouts, "paper", [4, 9, 0], replace)
    check(data, out, fanouts, {"paper": [4, 9, 0]}, replace)


# equally likely draws; a node that is n times a seed draws n times


@pytest.mark.parametrize("k", [1, 3, 4])
def test_subsets_are_equally_likely(k: int) -> None:
    """Of two nodes at once, of five edges and of six."""
    trials, edge_index = 10_000, torch.cat([star(5).edge_index, star(6).edge_index + 6], dim=1)
    torch.manual_seed(0)
    out = sample(Data(num_nodes=13, edge_index=edge_index), [k], [0, 6] * trials)
    assert out.edge is not None
    for node, edges in enumerate((range(5), range(5, 11))):
        subsets = Counter(
            tuple(sorted(drawn)) for drawn in out.edge.view(trials, 2, k)[:, node].tolist()
        )
        assert set(subsets) == set(combinations(edges, k))
        assert within(torch.tensor(list(subsets.values())), trials, 1 / len(subsets)).all()


def test_hub() -> None:
    """Each tenth of the edges is drawn equally often.

    So are odd and even ones, and those that Floyd's algorithm adds.
    """
    degree, k, trials = 50_000, 10, 4_000
    torch.manual_seed(0)
    out = sample(star(degree), [k], [0] * trials)
    assert out.edge is not None
    edges = out.edge.view(trials, k)
    assert (edges.sort(dim=1).values.diff(dim=1) > 0).all()
    stretch = (out.edge // (degree // 10)).bincount(minlength=10)
    # Without replacement it spreads less than a binomial
    assert within(stretch, trials * k, 0.1).all()
    assert within((out.edge % 2).sum(), trials * k, 0.5)
    last = torch.tensor([0] * 10 + list(range(degree - 10, degree)))
    # Poisson(0.8): above it once in 10^6
    assert out.edge.bincount(minlength=degree)[last].max() <= 8


def test_replacement_draws_independently() -> None:
    degree, k, trials = 4, 3, 20_000
    torch.manual_seed(0)
    out = sample(star(degree), [k], [0] * trials, replace=True)
    assert out.edge is not None
    drawn = Counter(tuple(edges) for edges in out.edge.view(trials, k).tolist())
    assert len(drawn) == degree**k
    assert within(torch.tensor(list(drawn.values())), trials, degree**-k).all()


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("node", "row", "col", "edge")
    )


def test_draws_are_repeated_by_the_seed_of_torch() -> None:
    """Also by a copy, as spawned workers get it."""
    data = graph(100, 3_000)
    sampler = NeighborSampler(data, [5, 5])
    first, again, other = (draw(sampler, range(20), seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert same(first, draw(pickle.loads(pickle.dumps(sampler)), range(20), 0))


def test_error_and_inference_mode_leave_no_trace() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    data = graph(20, 60)
    sampler = NeighborSampler(data, [3, 3])
    with torch.inference_mode():
        draw(sampler, range(4))
    check(data, draw(sampler, range(4)), [3, 3], [0, 1, 2, 3], replace=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmoe.data.sampler, "_draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(sampler, range(4))
    check(data, draw(sampler, range(4)), [3, 3], [0, 1, 2, 3], replace=False)


@pytest.mark.parametrize("form", ["EdgeIndex", "EdgeIndex by col", "sorted", "int32"])
def test_forms_of_edges(form: str) -> None:
    data = graph(30, 200)
    by_destination = data.edge_index[:, data.edge_index[1].argsort(stable=True)]
    edges: Any = {
        "EdgeIndex": EdgeIndex(data.edge_index, sparse_size=(30, 30)),
        "EdgeIndex by col": EdgeIndex(by_destination, sparse_size=(30, 30), sort_order="col"),
        "sorted": by_destination,
        "int32": data.edge_index.int(),
    }[form]
    out = sample(Data(x=data.x, edge_index=edges), [4, 3], [5, 2, 8])
    assert {type(value) for value in (out.node, out.row, out.col, out.edge)} == {torch.Tensor}
    check(
        Data(edge_index=torch.as_tensor(edges), num_nodes=30), out, [4, 3], [5, 2, 8], replace=False
    )


@pytest.mark.parametrize("kind", [None, ("author", "writes", "paper")])
def test_link_loader(kind: tuple[str, str, str] | None) -> None:
    """Seed edges, with negative ones: the labeled ends are nodes of the batch."""
    data: Any = graph(30, 200) if kind is None else hetero_graph()
    edge_index = data.edge_index if kind is None else data[kind].edge_index
    label_index = edge_index[:, :6]
    given_index = label_index if kind is None else (kind, label_index)
    sampler = NeighborSampler(data, [3, 2])
    batch = next(
        iter(
            LinkLoader(
                data, sampler, edge_label_index=given_index, neg_sampling="binary", batch_size=6
            )
        )
    )
    store = batch if kind is None else batch[kind]
    source, destination = (batch, batch) if kind is None else (batch[kind[0]], batch[kind[2]])
    found = torch.stack(
        [source.n_id[store.edge_label_index[0]], destination.n_id[store.edge_label_index[1]]]
    )
    assert torch.equal(found[:, :6], label_index)
    assert store.edge_label.tolist() == [1.0] * 6 + [0.0] * 6


def test_bad_input() -> None:
    data, hetero, stranger = graph(5, 9), hetero_graph(), HeteroData()
    stranger["paper"].num_nodes = 3
    stranger["author", "writes", "paper"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    transposed = Data(edge_index=data.edge_index, num_nodes=5, adj_t=torch.eye(5).to_sparse_csr())
    outside = Data(num_nodes=3, edge_index=torch.tensor([[0, 1], [1, 3]]))
    cases: list[tuple[Any, Any, str]] = [
        *((bad, [2], "data") for bad in (stranger, transposed, Data(num_nodes=3))),
        *((data, bad, "num_neighbors") for bad in (2, [2, -2], [2, 0.5], [True])),
        (data, {("a", "to", "b"): [2]}, "num_neighbors"),
        (hetero, {("a", "to", "b"): [2]}, "num_neighbors"),
        (outside, [2], "edge_index"),
    ]
    for given_graph, fanouts, name in cases:
        with pytest.raises(ValueError, match=name):
            NeighborSampler(given_graph, fanouts)


def test_bad_seeds() -> None:
    data, zero = graph(5, 9), torch.tensor([0])
    cases: list[tuple[Any, NodeSamplerInput, str]] = [
        *(
            (data, NodeSamplerInput(None, torch.tensor(bad)), "node")
            for bad in ([0, 5], [-1, 2], [0.0], [[1], [2]])
        ),
        (data, NodeSamplerInput(None, zero, zero), "time"),
        (hetero_graph(), NodeSamplerInput(None, zero, None, "field"), "input_type"),
    ]
    for given_graph, index, name in cases:
        with pytest.raises(ValueError, match=f"^{name}: got"):
            NeighborSampler(given_graph, [2]).sample_from_nodes(index)
