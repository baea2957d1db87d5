"""Mini-batches: the contract of PyG's NeighborLoader, with and without pyg-lib."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch_geometric.typing
from torch_geometric.data import Data, HeteroData
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.sampler.base import SubgraphType

from gmoe.data.loader import SamplerBackend, link_neighbor_loader, neighbor_loader
from tests.helpers.sampled import each_backend, graph, hetero_graph

NODES, EDGES = 40, 300


def full_graph() -> Data:
    data = graph(NODES, EDGES)
    data.y, data.edge_attr = torch.arange(NODES), torch.arange(EDGES)[:, None]
    data.train_mask = torch.arange(NODES) % 3 == 0
    return data


@each_backend
@pytest.mark.parametrize(("num_workers", "replace"), [(0, False), (0, True), (1, False)])
def test_batches_are_parts_of_the_graph(
    backend: SamplerBackend, num_workers: int, replace: bool
) -> None:
    data = full_graph()
    kwargs: Any = {
        "shuffle": True,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
    }
    loader = neighbor_loader(data, [4, 3], data.train_mask, 5, replace, backend=backend, **kwargs)
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


@each_backend
def test_hetero_batches(backend: SamplerBackend) -> None:
    data = hetero_graph()
    batches = list(
        neighbor_loader(
            data, [3, 2], ("paper", torch.arange(10, 20)), batch_size=4, backend=backend
        )
    )
    assert [batch["paper"].batch_size for batch in batches] == [4, 4, 2]
    for batch, seeds in zip(batches, torch.arange(10, 20).split(4), strict=True):
        assert torch.equal(batch["paper"].n_id[: len(seeds)], seeds)
        assert torch.equal(batch["paper"].input_id + 10, seeds)
        for kind in data.node_types:
            assert torch.equal(batch[kind].x, data[kind].x[batch[kind].n_id])
        for kind in data.edge_types:
            ends = torch.stack(
                [batch[kind[end]].n_id[batch[kind].edge_index[end // 2]] for end in (0, 2)]
            )
            assert torch.equal(ends, data[kind].edge_index[:, batch[kind].e_id])
            assert torch.equal(batch[kind].edge_attr, batch[kind].e_id)


def test_input_nodes() -> None:
    cases: list[tuple[Any, list[int]]] = [
        *(
            (None, list(range(NODES))),
            ([7, 3, 3], [7, 3, 3]),
            (torch.tensor([5, 1], dtype=torch.int32), [5, 1]),
        ),
        *(([True, *[False] * (NODES - 2), True], [0, NODES - 1]), ([], [])),
    ]
    for input_nodes, seeds in cases:
        (batch,) = list(neighbor_loader(full_graph(), [2], input_nodes, NODES, backend="gmoe")) or (
            None,
        )
        assert seeds == ([] if batch is None else batch.n_id[: batch.batch_size].tolist())


def test_auto_takes_pyg_lib_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data = full_graph()
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", False)
    monkeypatch.setattr(torch_geometric.typing, "WITH_TORCH_SPARSE", True)
    ours = neighbor_loader(data, [4, 3], [1, 2], 2, replace=True)
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", True)
    theirs = neighbor_loader(data, [4, 3], [1, 2], 2, replace=True, disjoint=True)
    assert (type(ours), type(theirs), theirs.node_sampler.disjoint) == (
        NodeLoader,
        NeighborLoader,
        True,
    )
    data.time = torch.arange(NODES)
    times: Any = {"time_attr": "time", "input_time": torch.tensor([3, 4])}
    backends: list[SamplerBackend] = ["auto", "pyg"]
    for backend in backends:
        timed = neighbor_loader(data, [4], [1, 2], 2, backend=backend, **times)
        assert torch.equal(timed.node_sampler.node_time, data.time)
        assert timed.input_data.time.tolist() == [3, 4]
    for loader in (ours, theirs):
        assert (loader.batch_size, loader.input_data.node.tolist()) == (2, [1, 2])
        assert loader.node_sampler.replace
        assert loader.node_sampler.num_neighbors.values == [4, 3]
    assert type(neighbor_loader(data, [4], backend="gmoe")) is NodeLoader


ASKED: list[tuple[str, Any]] = [
    *(("subgraph_type", "induced"), ("subgraph_type", SubgraphType.bidirectional)),
    *(("directed", False), ("neighbor_sampler", object()), ("weight_attr", "edge_weight")),
]


@pytest.mark.parametrize(("name", "value"), ASKED)
@pytest.mark.parametrize("backend", ["auto", "gmoe"])
def test_what_only_pyg_does_is_refused(
    backend: SamplerBackend, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name of the argument, when the loader is made."""
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", False)
    for data in (full_graph(), hetero_graph()):
        seeds = None if isinstance(data, Data) else "paper"
        message = rf"^{name}: got .*, expected .*NeighborLoader with pyg-lib"
        with pytest.raises(ValueError, match=message):
            neighbor_loader(data, [3], seeds, backend=backend, is_sorted=True, **{name: value})
        links: Any = None if isinstance(data, Data) else ("author", "paper")
        with pytest.raises(ValueError, match=message):
            link_neighbor_loader(data, [3], links, backend=backend, is_sorted=True, **{name: value})


def test_pygs_defaults_ask_for_nothing() -> None:
    given = inspect.signature(NeighborLoader).parameters
    times = ("disjoint", "time_attr", "input_time", "temporal_strategy")
    defaults = {name: given[name].default for name in (*times, *(name for name, _ in ASKED))}
    torch.manual_seed(0)
    plain = next(iter(neighbor_loader(full_graph(), [3], batch_size=5, backend="gmoe")))
    for subgraph_type in ("directional", SubgraphType.directional):
        options = defaults | {"subgraph_type": subgraph_type}
        torch.manual_seed(0)
        loader = neighbor_loader(full_graph(), [3], batch_size=5, backend="gmoe", **options)
        assert torch.equal(next(iter(loader)).e_id, plain.e_id)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_generator_that_cannot_be_sent_to_workers_is_refused(method: str) -> None:
    data = Data(x=torch.ones(9, 1), edge_index=torch.zeros(2, 3, dtype=torch.long))
    links = partial(link_neighbor_loader, edge_label_index=torch.zeros(2, 3, dtype=torch.long))
    for make in (neighbor_loader, links):
        options: dict[str, Any] = {"generator": torch.Generator(), "num_workers": 1}
        for context in (method, multiprocessing.get_context(method)):
            with pytest.raises(ValueError, match=f"^generator: got one beside .* '{method}'"):
                make(data, [2], multiprocessing_context=context, **options)
        make(data, [2], multiprocessing_context="fork", **options)
        make(data, [2], generator=torch.Generator())


@pytest.mark.parametrize("default", ["fork", "spawn"])
def test_without_a_context_workers_start_as_python_starts_them(
    default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(x=torch.ones(9, 1), edge_index=torch.zeros(2, 3, dtype=torch.long))
    methods = [default, "forkserver"]
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: methods)
    monkeypatch.setattr(
        multiprocessing, "get_start_method", lambda allow_none: None if allow_none else "unset"
    )
    refused = pytest.raises(ValueError, match="workers that start by 'spawn'")
    with nullcontext() if default == "fork" else refused:
        neighbor_loader(data, [2], generator=torch.Generator(), num_workers=1)


def test_a_tensor_that_only_pyg_takes_is_named_by_its_shape() -> None:
    with pytest.raises(ValueError, match=r"^weight_attr: got shape \(3,\) of torch"):
        neighbor_loader(full_graph(), [3], backend="gmoe", weight_attr=torch.ones(3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": None}, "batch_size: got None, expected a whole number"),
        ({"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ({"replace": "no"}, "replace: got 'no', expected True or False"),
    ],
)
def test_batches_of_no_size_are_refused(options: dict[str, Any], said: str) -> None:
    data = Data(x=torch.ones(9, 1), edge_index=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=f"^{said}"):
        neighbor_loader(data, [1], **options)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend"):
        neighbor_loader(full_graph(), [3], backend="cugraph")  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [full_graph, hetero_graph])
def test_bad_input_nodes(make: Callable[[], Data | HeteroData]) -> None:
    ids: list[Any] = [[0, NODES], [-1], torch.ones(3, dtype=torch.bool), [0.5]]
    kinds = [None, torch.arange(3), "field", *(("place", nodes) for nodes in ids)]
    for input_nodes in ids if make is full_graph else kinds:
        with pytest.raises(ValueError, match="input_nodes"):
            neighbor_loader(make(), [3], input_nodes)
    with pytest.warns(UserWarning, match="num_nodes"), pytest.raises(ValueError, match="data"):
        neighbor_loader(Data(), [3])


@each_backend
@pytest.mark.parametrize("strategy", ["uniform", "last"])
def test_no_batch_sees_what_is_later_than_its_seeds(backend: SamplerBackend, strategy: Any) -> None:
    """In worker processes, too; ``batch`` says whose subgraph a node is in."""
    data, seeds = full_graph(), torch.tensor([7, 3, 7, 30])
    data.when, times = torch.arange(NODES) % 9, torch.tensor([8, 2, 5, 4])
    loader = neighbor_loader(
        data, [4, 3], seeds, 2, time_attr="when", input_time=times, temporal_strategy=strategy,
        backend=backend, num_workers=1,
    )  # fmt: skip
    for batch, seeds_of_batch, times_of_batch in zip(
        loader, seeds.split(2), times.split(2), strict=True
    ):
        assert batch.n_id[:2].tolist() == seeds_of_batch.tolist()
        assert batch.batch[:2].tolist() == [0, 1]
        assert torch.equal(batch.seed_time, times_of_batch)
        assert (batch.when <= times_of_batch[batch.batch])[2:].all()
        assert torch.equal(*batch.batch[batch.edge_index])
    loader._iterator = None


@each_backend
def test_disjoint_batches(backend: SamplerBackend) -> None:
    data = full_graph()
    batch = next(iter(neighbor_loader(data, [4], [7, 3, 7], 3, disjoint=True, backend=backend)))
    assert batch.batch.unique().tolist() == [0, 1, 2]
    assert torch.equal(*batch.batch[batch.edge_index])
    assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])


def test_bad_times() -> None:
    """They are named when the loader is made, not in a worker at the first batch."""
    data = full_graph()
    data.when, data.of_edges = torch.arange(NODES), torch.arange(EDGES)
    few, floats = torch.arange(NODES - 1), torch.arange(NODES) / 2
    cases: list[dict[str, Any]] = [
        {"input_time": data.when},
        {"input_time": few, "time_attr": "when"},
        {"input_time": floats, "time_attr": "when"},
        {"input_time": None, "time_attr": "of_edges"},
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"^input_time: got"):
            neighbor_loader(data, [3], backend="gmoe", **case)
    mask = torch.arange(NODES) < 4
    fitting = {"input_time": torch.arange(4), "time_attr": "when"}
    assert len(neighbor_loader(data, [3], mask, backend="gmoe", **fitting)) == 4  # type: ignore[arg-type]
