"""Mini-batches of links: the contract of PyG's LinkNeighborLoader, with and without pyg-lib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.typing
from torch_geometric.data import Data
from torch_geometric.loader import LinkLoader, LinkNeighborLoader
from torch_geometric.sampler import NegativeSampling

from gmoe import StoredGraph, link_neighbor_loader
from gmoe.data.loader import SamplerBackend
from tests.helpers.sampled import draw, each_backend, graph, hetero_graph
from tests.helpers.stored_files import store

NODES, EDGES = 40, 300
WRITES = ("author", "writes", "paper")


def homogeneous() -> Data:
    data = graph(NODES, EDGES)
    data.y = torch.arange(NODES)
    return data


@each_backend
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_links_and_their_neighborhoods(
    backend: SamplerBackend, num_workers: int
) -> None:
    """Each link comes once an epoch, with what its ends' own sample is, here all in-edges."""
    data, links = homogeneous(), torch.randint(NODES, (2, 11))
    label = torch.arange(11)
    loader = link_neighbor_loader(
        data, [-1, -1], links, label, 4, shuffle=True, backend=backend, num_workers=num_workers
    )
    found = []
    for batch in loader:
        ends = batch.n_id[batch.edge_label_index]
        assert torch.equal(ends, links[:, batch.input_id])
        assert torch.equal(batch.edge_label, batch.input_id)
        assert torch.equal(batch.x, data.x[batch.n_id])
        assert torch.equal(batch.n_id[batch.edge_index], data.edge_index[:, batch.e_id])
        alone = draw(loader_sampler(data), ends.unique())
        assert alone.edge is not None
        assert batch.n_id.tolist() == alone.node.tolist()
        assert batch.e_id.sort().values.tolist() == alone.edge.sort().values.tolist()
        found.append(batch.input_id)
    assert torch.cat(found).sort().values.tolist() == list(range(11))


def loader_sampler(data: Data) -> Any:
    return link_neighbor_loader(data, [-1, -1], backend="gmoe").link_sampler


@each_backend
@pytest.mark.parametrize("links", [WRITES, ("author", "paper"), (WRITES, None), "some"])
def test_links_of_a_type(backend: SamplerBackend, links: Any) -> None:
    data = hetero_graph()
    given = (WRITES, data[WRITES].edge_index[:, :7]) if links == "some" else links
    batches = list(link_neighbor_loader(data, [3, 2], given, batch_size=50, backend=backend))
    batch = batches[0][WRITES]
    assert len(batches) == (1 if links == "some" else 2)
    ends = [
        batches[0][kind].n_id[end]
        for kind, end in zip(("author", "paper"), batch.edge_label_index, strict=True)
    ]
    assert torch.equal(torch.stack(ends), data[WRITES].edge_index[:, batch.input_id])


@each_backend
@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize("make", [homogeneous, hetero_graph])
def test_negative_links_are_drawn_by_pyg(
    make: Any, disjoint: bool, backend: SamplerBackend
) -> None:
    """As its ``NegativeSampling`` says: here all negative destinations are node 3."""
    data = make()
    weight = torch.zeros(data.num_nodes if make is homogeneous else 30)
    weight[3] = 1
    negatives: Any = NegativeSampling("binary", 2, dst_weight=weight)
    links = data.edge_index if make is homogeneous else data[WRITES].edge_index
    loader = link_neighbor_loader(
        data, [2], None if make is homogeneous else WRITES, None, 5, neg_sampling=negatives,
        disjoint=disjoint, backend=backend,
    )  # fmt: skip
    batch = next(iter(loader))
    store = batch if make is homogeneous else batch[WRITES]
    source, destination = (
        (batch, batch) if make is homogeneous else (batch["author"], batch["paper"])
    )
    src, dst = store.edge_label_index
    assert store.edge_label.tolist() == [1.0] * 5 + [0.0] * 10
    assert destination.n_id[dst][5:].tolist() == [3] * 10
    assert torch.equal(torch.stack([source.n_id[src], destination.n_id[dst]])[:, :5], links[:, :5])
    if disjoint:
        assert source.batch[src].tolist() == [*range(5)] * 3
        assert destination.batch[dst].tolist() == [*range(5)] * 3


@each_backend
@pytest.mark.parametrize(
    ("labels", "given"),
    [([0, 2, 5], [1, 3, 6]), ([1, 2, 5], [1, 2, 5]), (None, [1, 1, 1])],
)
def test_labels_beside_negative_links(labels: Any, given: Any, backend: SamplerBackend) -> None:
    """Label 0 is theirs: labels that begin at 0 are raised by 1."""
    labels = None if labels is None else torch.tensor(labels)
    links = torch.arange(6).view(2, 3)
    data = Data(edge_index=links, num_nodes=6)
    loader = link_neighbor_loader(
        data, [2], links, labels, 3, neg_sampling="binary", backend=backend
    )
    (batch,) = loader
    assert batch.edge_label.tolist() == [*given, 0, 0, 0]


def test_labels_of_no_links_and_below_0_beside_negative_links() -> None:
    links = torch.arange(6).view(2, 3)
    data = Data(edge_index=links, num_nodes=6)
    none, no_labels = links[:, :0], torch.empty(0, dtype=torch.int64)
    options: Any = {"neg_sampling": "binary", "backend": "gmoe"}
    assert not list(link_neighbor_loader(data, [2], none, no_labels, **options))
    with pytest.raises(ValueError, match=r"^edge_label: got -1, expected labels of at least 0"):
        link_neighbor_loader(data, [2], links, torch.tensor([-1, 0, 2]), **options)


@each_backend
def test_triplets(backend: SamplerBackend) -> None:
    data = homogeneous()
    loader = link_neighbor_loader(data, [2], neg_sampling="triplet", batch_size=5, backend=backend)
    batch = next(iter(loader))
    pair = torch.stack([batch.n_id[batch.src_index], batch.n_id[batch.dst_pos_index]])
    assert torch.equal(pair, data.edge_index[:, :5])
    assert batch.dst_neg_index.shape == (5,)


@each_backend
@pytest.mark.parametrize("strategy", ["uniform", "last"])
def test_links_see_what_was_there(backend: SamplerBackend, strategy: Any) -> None:
    """Edges have times: none is later than the link in whose subgraph it is."""
    data, links, times = homogeneous(), torch.randint(NODES, (2, 9)), torch.arange(9)
    data.edge_time = torch.randint(9, (EDGES,))
    loader = link_neighbor_loader(
        data, [5, 5], links, None, 9, time_attr="edge_time", edge_label_time=times,
        neg_sampling="binary", temporal_strategy=strategy, backend=backend,
    )  # fmt: skip
    (batch,) = loader
    assert torch.equal(*batch.batch[batch.edge_index])
    assert (batch.edge_time <= times[batch.batch[batch.edge_index[0]]]).all()
    assert batch.num_edges > 0
    assert torch.equal(batch.edge_label_time[:9], times)


def test_batches_of_a_stored_graph_are_those_in_memory(tmp_path: Path) -> None:
    data = store(tmp_path, homogeneous())
    links = data.edge_index[:, ::20]
    found: list[list[Any]] = []
    for given, workers in ((StoredGraph(tmp_path), 0), (StoredGraph(tmp_path), 1), (data, 0)):
        torch.manual_seed(3)
        loader = link_neighbor_loader(
            given, [4, 3], links, None, 6, neg_sampling="binary", disjoint=True, backend="gmoe",
            num_workers=workers,
        )  # fmt: skip
        found.append(list(loader))
    assert len(found[0]) == 3
    for ours, theirs in zip(found[0], found[2], strict=True):
        for name in ("x", "y", "edge_index", "n_id", "e_id", "batch", "edge_label_index"):
            assert torch.equal(ours[name], theirs[name]), name
    assert all(torch.equal(batch.x, data.x[batch.n_id]) for batch in found[1])


def test_auto_takes_pyg_lib_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = store(tmp_path, homogeneous())
    data.when, times = torch.arange(NODES), torch.arange(data.num_edges)
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", False)
    ours = link_neighbor_loader(data, [4], batch_size=2)
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", True)
    theirs = link_neighbor_loader(
        data, [4, 3], None, None, 2, replace=True, time_attr="when", edge_label_time=times,
        temporal_strategy="last",
    )  # fmt: skip
    stored = link_neighbor_loader(StoredGraph(tmp_path), [4], data.edge_index)
    assert [type(loader) for loader in (ours, theirs, stored)] == [
        LinkLoader,
        LinkNeighborLoader,
        LinkLoader,
    ]
    sampler: Any = theirs.link_sampler
    assert (sampler.replace, sampler.temporal_strategy) == (True, "last")
    assert (theirs.batch_size, sampler.num_neighbors.values) == (2, [4, 3])
    assert torch.equal(theirs.input_data.time, times)


def test_links_that_do_not_fit(tmp_path: Path) -> None:
    data, hetero = homogeneous(), hetero_graph()
    store(tmp_path, data)
    ids: list[Any] = [
        torch.tensor([[0], [NODES]]),
        torch.tensor([[-1], [0]]),
        torch.zeros(2, 3),
        torch.zeros(3, 2, dtype=torch.long),
        torch.zeros(2, dtype=torch.long),
        [[0], [1]],
    ]
    cases: list[tuple[Any, Any]] = [
        *((data, links) for links in ids),
        *((hetero, (WRITES, links)) for links in ids),
        *((hetero, links) for links in (None, "author", ("author", "cites"), ids[0])),
        (StoredGraph(tmp_path), None),
    ]
    for given, links in cases:
        with pytest.raises(ValueError, match=r"^edge_label_index: got"):
            link_neighbor_loader(given, [3], links)


def test_labels_and_times_that_do_not_fit(tmp_path: Path) -> None:
    """They are named when the loader is made, not in a worker at the first batch."""
    data = homogeneous()
    store(tmp_path, data)
    data.when, few, all_ = torch.arange(NODES), torch.arange(3), torch.arange(EDGES)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("edge_label", {"edge_label": few}),
        ("edge_label", {"edge_label": all_.tolist()}),
        ("edge_label_time", {"edge_label_time": few, "time_attr": "when"}),
        ("edge_label_time", {"edge_label_time": all_ / 2, "time_attr": "when"}),
        ("edge_label_time", {"edge_label_time": all_}),
        ("edge_label_time", {"time_attr": "when"}),
        ("backend", {"backend": "cugraph"}),
    ]
    for name, case in cases:
        with pytest.raises(ValueError, match=rf"^{name}: got"):
            link_neighbor_loader(data, [3], **{"backend": "gmoe", **case})
    with pytest.raises(ValueError, match=r"^time_attr: got .* StoredGraph"):
        link_neighbor_loader(
            StoredGraph(tmp_path), [3], data.edge_index, time_attr="when", edge_label_time=all_
        )


@pytest.mark.parametrize("strategy", ["uniform", "last"])
@pytest.mark.parametrize("time_attr", ["when", "edge_time", None])
def test_batches_are_those_of_pyg_lib(time_attr: str | None, strategy: Any) -> None:
    """All in-edges, or the latest: to the order of nodes and edges."""
    pytest.importorskip("pyg_lib")
    generator = torch.Generator().manual_seed(0)
    times = torch.randint(9, (EDGES,), generator=generator)
    data = homogeneous()
    data.when, data.edge_time = times[:NODES], times
    links = torch.randint(NODES, (2, 9), generator=generator)
    options: dict[str, Any] = {"disjoint": True}
    if time_attr is not None:
        options = {"time_attr": time_attr, "edge_label_time": torch.arange(9)}
        options["temporal_strategy"] = strategy
    fanouts = [2, 2] if time_attr and strategy == "last" else [-1, -1]
    batches: list[Any] = []
    for backend in ("gmoe", "pyg"):
        which: Any = backend
        batches += link_neighbor_loader(data, fanouts, links, None, 9, backend=which, **options)
    for name in ("n_id", "e_id", "edge_index", "batch", "edge_label_index"):
        assert torch.equal(*(batch[name] for batch in batches)), name
