"""Mini-batches: the contract of PyG's NeighborLoader, and a sampler that draws uniformly."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.typing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import LinkLoader, NeighborLoader, NodeLoader
from torch_geometric.sampler import NodeSamplerInput

from gmoe.data import NeighborSampler, neighbor_loader
from tests.helpers.mapped import map_to
from tests.helpers.sampled import check, draw, graph, sample, star, within

NODES, EDGES = 40, 300
HAS_PYG_LIB = torch_geometric.typing.WITH_PYG_LIB


@pytest.fixture(autouse=True)
def without_pyg_lib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our sampler, wherever the tests run."""
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", False)


def full_graph() -> Data:
    data = graph(NODES, EDGES)
    data.y, data.edge_attr = torch.arange(NODES), torch.arange(EDGES)[:, None]
    data.train_mask = torch.arange(NODES) % 3 == 0
    return data


# loaders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["in memory", "in files"])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("has_pyg_lib", [False, *([True] if HAS_PYG_LIB else [])])
def test_batches_are_parts_of_the_graph(
    has_pyg_lib: bool,
    num_workers: int,
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", has_pyg_lib)
    data = full_graph() if form == "in memory" else map_to(tmp_path, full_graph())
    kwargs: Any = {
        "shuffle": True,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
    }
    loader = neighbor_loader(data, [4, 3], data.train_mask, 5, **kwargs)
    assert len(loader) == 3
    for _ in range(2):
        batches = list(loader)
        seeds = torch.cat([batch.n_id[: batch.batch_size] for batch in batches])
        assert torch.equal(seeds.sort().values, data.train_mask.nonzero().view(-1))
        assert torch.equal(torch.cat([batch.input_id for batch in batches]), seeds)
        for batch in batches:
            assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
            assert torch.equal(batch.edge_attr, data.edge_attr[batch.e_id])
            for name in ("x", "y", "train_mask"):
                assert torch.equal(batch[name], data[name][batch.n_id])
            assert batch.batch_size == batch.num_sampled_nodes[0]
            assert sum(batch.num_sampled_nodes) == batch.num_nodes == len(batch.n_id.unique())
            assert sum(batch.num_sampled_edges) == batch.num_edges
            assert batch.edge_index[1].bincount().max() <= 4
            assert batch.edge_index[1].max() < sum(batch.num_sampled_nodes[:2])
    # Ends a worker at once, which the garbage collector would wait 5 seconds for
    loader._iterator = None


def test_input_nodes() -> None:
    cases: list[tuple[Any, list[int]]] = [
        (None, list(range(NODES))),
        ([7, 3, 3], [7, 3, 3]),
        (torch.tensor([5, 1], dtype=torch.int32), [5, 1]),
        ([True, *[False] * (NODES - 2), True], [0, NODES - 1]),
        ([], []),
    ]
    for input_nodes, seeds in cases:
        batches = list(neighbor_loader(full_graph(), [2], input_nodes, NODES))
        found = [batch.n_id[: batch.batch_size].tolist() for batch in batches]
        assert found == ([seeds] if seeds else [])


def test_pyg_lib_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = full_graph()
    ours = neighbor_loader(data, [4, 3], [1, 2], 2)
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", True)
    theirs = neighbor_loader(data, [4, 3], [1, 2], 2, disjoint=True)
    assert (type(ours), type(theirs), theirs.node_sampler.disjoint) == (
        NodeLoader,
        NeighborLoader,
        True,
    )
    for loader in (ours, theirs):
        assert (loader.batch_size, loader.input_data.node.tolist()) == (2, [1, 2])
    data.time = torch.arange(NODES)
    times: Any = {"time_attr": "time", "input_time": torch.tensor([3, 4])}
    timed = neighbor_loader(data, [4], [1, 2], 2, **times)
    assert torch.equal(timed.node_sampler.node_time, data.time)
    # PyG sorts edges, too, and is told where it need not.
    mapped = map_to(tmp_path, data)
    sampler = neighbor_loader(mapped, [4]).node_sampler
    assert sampler.perm is None
    assert sampler.row.data_ptr() == mapped.edge_index.data_ptr()
    assert theirs.node_sampler.perm is not None


def test_what_only_pyg_does_is_refused() -> None:
    for option in ("replace", "disjoint", "subgraph_type", "time_attr", "weight_attr"):
        with pytest.raises(TypeError, match=option):
            neighbor_loader(full_graph(), [3], None, 1, is_sorted=True, **{option: True})
    timed = neighbor_loader(full_graph(), [3], input_time=torch.arange(NODES))
    with pytest.raises(ValueError, match=r"^input_time: got times of the seeds"):
        next(iter(timed))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": None}, "batch_size: got None, expected a whole number"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
    ],
)
def test_batches_of_no_size_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        neighbor_loader(full_graph(), [1], **options)


def test_bad_input_nodes() -> None:
    masks = [torch.ones(3, dtype=torch.bool), torch.ones(NODES, 1, dtype=torch.bool)]
    for input_nodes in ([0, NODES], [-1], [0.5], "field", [[1], [2, 3]], *masks):
        with pytest.raises(ValueError, match=r"^input_nodes: got"):
            neighbor_loader(full_graph(), [3], input_nodes)  # type: ignore[arg-type]


def test_bad_graphs() -> None:
    data = graph(5, 9)
    transposed = Data(edge_index=data.edge_index, num_nodes=5, adj_t=torch.eye(5).to_sparse_csr())
    outside = Data(num_nodes=3, edge_index=torch.tensor([[0, 1], [1, 3]]))
    for bad in (HeteroData(), (data, data), transposed, Data(num_nodes=3)):
        with pytest.raises(ValueError, match=r"^data: got"):
            neighbor_loader(bad, [3])
    with (
        pytest.warns(UserWarning, match="num_nodes"),
        pytest.raises(ValueError, match=r"^data: got"),
    ):
        neighbor_loader(Data(), [3])
    for edges in (outside.edge_index, outside.edge_index - 1, outside.edge_index.flip(0)):
        with pytest.raises(ValueError, match=r"^edge_index: got nodes"):
            neighbor_loader(Data(num_nodes=3, edge_index=edges), [3])


@pytest.mark.parametrize("fanouts", [2, [2, -2], [2, 0.5], [True], {("a", "to", "b"): [2]}])
def test_bad_fanouts(fanouts: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_neighbors: got"):
        neighbor_loader(graph(5, 9), fanouts)


def test_links_are_refused() -> None:
    data = graph(5, 9)
    loader = LinkLoader(data, NeighborSampler(data, [2]), edge_label_index=data.edge_index)
    with pytest.raises(NotImplementedError, match="LinkNeighborLoader with pyg-lib"):
        next(iter(loader))


# the sampler --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    num_nodes=st.integers(1, 12),
    num_edges=st.integers(0, 40),
    fanouts=st.lists(st.integers(-1, 4), max_size=3),
    num_seeds=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_output_is_a_sampled_subgraph(
    num_nodes: int, num_edges: int, fanouts: list[int], num_seeds: int, seed: int
) -> None:
    data = graph(num_nodes, num_edges, seed)
    generator = torch.Generator().manual_seed(seed)
    # Some of them twice
    seeds = torch.randint(num_nodes, (num_seeds,), generator=generator).tolist()
    torch.manual_seed(seed)
    sampler = NeighborSampler(data, fanouts)
    for _ in range(2):  # the second batch meets no trace of the first
        check(data, draw(sampler, seeds), fanouts, seeds)


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


def same(a: Any, b: Any) -> bool:
    names = ("node", "row", "col", "edge")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_draws_are_repeated_by_the_seed_of_torch() -> None:
    """Also by a copy, as spawned workers get it."""
    data = graph(100, 3_000)
    sampler = NeighborSampler(data, [5, 5])
    first, again, other = (draw(sampler, range(20), seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert same(first, draw(pickle.loads(pickle.dumps(sampler)), range(20), 0))


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
    plain = Data(edge_index=torch.as_tensor(edges), num_nodes=30)
    check(plain, out, [4, 3], [5, 2, 8])


@pytest.mark.parametrize("seeds", [[0, 5], [-1, 2], [0.0], [[1], [2]]])
def test_bad_seeds(seeds: list[Any]) -> None:
    sampler = NeighborSampler(graph(5, 9), [2])
    with pytest.raises(ValueError, match=r"^node: got"):
        sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor(seeds)))
