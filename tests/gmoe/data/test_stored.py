"""A graph on disk: what it checks when it is opened, and what it hands out.

Its batches are compared with those of the graph in memory.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.typing
from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader, NodeLoader
from torch_geometric.sampler import NodeSamplerInput

import gmoe.data.stored
from gmoe import GNNMoE, NeighborSampler, StoredGraph, neighbor_loader
from tests.helpers.sampled import draw, graph
from tests.helpers.stored_files import store, write

NODES, EDGES, LARGE, WIDTH = 60, 400, 500_000, 128


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")


def made_graph(labels: Any = None) -> Data:
    """With parallel edges, self-loops, and nodes without edges, in shuffled order."""
    data = graph(NODES, EDGES)
    data.edge_index = data.edge_index[
        :, (data.edge_index[1] > 4) & (data.edge_index != 9).all(dim=0)
    ]
    data.edge_index = torch.cat([data.edge_index, data.edge_index[:, :40]], dim=1)
    data.y = torch.arange(NODES) % 5 - 1 if labels is None else labels
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = torch.arange(NODES)
    store(tmp_path, made_graph(), train=ids[::3], val=ids[1::3], test=ids[2::3])
    return tmp_path


@pytest.mark.parametrize("half", [False, True])
def test_it_hands_out_what_was_stored(tmp_path: Path, half: bool) -> None:
    data = made_graph(torch.rand(NODES, 3) if half else None)  # labels of several tasks
    data = store(tmp_path, data, half, train=torch.tensor([5, 3]))
    stored = StoredGraph(tmp_path)
    assert (stored.num_nodes, stored.num_edges, stored.x_dim) == (NODES, data.num_edges, 4)
    assert (stored.info["name"], stored.val) == ("test", None)
    assert stored.train is not None
    assert stored.train.tolist() == [5, 3]
    assert repr(stored) == f"StoredGraph('{tmp_path}': {NODES} nodes, {data.num_edges} edges, x 4)"
    index = torch.tensor([7, 0, 7, 59, 3])
    for name in ("x", "y"):
        want = data[name]
        for given in (
            index,
            index.int(),
            slice(3, 9),
            torch.arange(NODES) % 2 == 0,
            slice(None),
            None,
        ):
            found = stored.get_tensor(None, name, given)
            assert torch.equal(found, want if given is None else want[given])
            assert found.dtype == want.dtype
        assert torch.equal(stored.get_tensor(None, name, 5), want[5:6])
        assert stored.get_tensor_size(None, name) == tuple(want.shape)
    row, start = stored.get_edge_index(None, "csc")
    assert torch.equal(row, data.edge_index[0])
    assert torch.equal(torch.arange(NODES).repeat_interleave(start.diff()), data.edge_index[1])
    for nodes in (
        slice(None),
        slice(0, 0),
        slice(3, 20),
        slice(NODES, NODES),
        slice(9, 10),
        slice(7, 5),
    ):
        into = torch.isin(data.edge_index[1], torch.arange(NODES)[nodes])
        assert torch.equal(torch.stack(stored.in_edges(nodes)), data.edge_index[:, into])
    with pytest.raises(ValueError, match=r"^nodes: got slice\(0, 4, 2\), expected a slice of step"):
        stored.in_edges(slice(0, 4, 2))


def test_a_pickle_is_a_path(folder: Path) -> None:
    stored = StoredGraph(folder)
    sampler = NeighborSampler(stored, [3, 2])
    sampler.sample_from_nodes(NodeSamplerInput(None, torch.arange(10)))
    for thing in (stored, sampler):
        assert len(pickle.dumps(thing)) < 1024
    assert str(pickle.loads(pickle.dumps(stored))) == str(stored)
    edges: list[Any] = [
        draw(each, range(10), 0).edge for each in (sampler, pickle.loads(pickle.dumps(sampler)))
    ]
    assert torch.equal(*edges)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"format": 2}, "graph"),
        ({"arrays": {}}, "graph"),
        ({"num_edges": 0.5}, "graph"),
        ({"num_nodes": NODES + 1}, "start"),
        ({"num_edges": 3}, "source"),
    ],
    ids=str,
)
def test_what_the_description_must_be(folder: Path, change: dict[str, Any], name: str) -> None:
    path = folder / "graph.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"/{name}\.\w+: got"):
        StoredGraph(folder)


DEEP = b"[" * 50_000 + b"]" * 50_000


@pytest.mark.parametrize(
    "content",
    [
        *(DEEP, b'{"format": 1, "arrays": %b}' % DEEP, b"[]", b"", b"{", b"\xff\xfe{"),
        b'{"format": "%b", "num_nodes": 1, "num_edges": 1, "arrays": {}}' % (b"x" * 2**20),
        b'{"format": 1, "num_nodes": 1, "num_edges": 1, "arrays": "%b"}' % (b"x" * 2**20),
    ],
    ids=["deep", "deep inside", "a list", "empty", "cut", "no text", "long format", "long arrays"],
)
def test_a_description_that_is_damaged_is_named(folder: Path, content: bytes) -> None:
    (folder / "graph.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"/graph\.json: got") as caught:
        StoredGraph(folder)
    assert len(str(caught.value)) < 1_000


def describe(folder: Path, array: str, **said: Any) -> None:
    """Change what graph.json says of an array."""
    path = folder / "graph.json"
    info = json.loads(path.read_text())
    info["arrays"][array] |= said
    path.write_text(json.dumps(info))


def test_files_outside_the_folder_are_refused(folder: Path) -> None:
    """Also by a link in the folder, whose parent is elsewhere."""
    (folder.parent / "elsewhere" / "below").mkdir(parents=True)
    (folder / "link").symlink_to(folder.parent / "elsewhere" / "below")
    outside = folder.parent / "elsewhere" / "x.npy"
    (folder / "x.npy").rename(outside)
    for file in (f"../elsewhere/{outside.name}", str(outside), "link/../x.npy", "..", None, 3):
        describe(folder, "x", file=file)
        with pytest.raises(ValueError, match=r"/graph\.json: got file .* of array 'x'"):
            StoredGraph(folder)
    (folder / "arrays").mkdir()
    outside.rename(folder / "arrays" / "x.npy")
    describe(folder, "x", file="arrays/x.npy")
    StoredGraph(folder).verify()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start", np.arange(NODES + 1)),  # ends before the last edge
        ("source", np.zeros(3, np.int64)),
        ("x", np.zeros((NODES, 2), "f8")),
        ("x", np.zeros((2, NODES), np.float32).T),
        ("y", np.zeros(3, np.int64)),
        ("train", np.zeros(3, np.int16)),
    ],
    ids=str,
)
def test_what_the_arrays_must_be(folder: Path, name: str, value: Any) -> None:
    write(folder, {path.stem: np.load(path) for path in folder.glob("*.npy")} | {name: value})
    with pytest.raises(ValueError, match=rf"/{name}\.npy: got"):
        StoredGraph(folder)


def test_a_file_that_was_cut_or_is_missing_is_named(folder: Path) -> None:
    path, whole = folder / "x.npy", (folder / "x.npy").read_bytes()
    for cut in (whole[:-4], b""):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match=r"x\.npy: got"):
            StoredGraph(folder)
    for name in ("x.npy", "graph.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            StoredGraph(folder)


@pytest.mark.parametrize(("name", "index"), [("z", [0]), ("x", [NODES]), ("y", [-1])])
def test_rows_that_are_not_there(folder: Path, name: str, index: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^(name|index): got"):
        StoredGraph(folder).rows(name, index)


@pytest.mark.parametrize(
    "index",
    [
        *(torch.ones(size, dtype=torch.bool) for size in (NODES - 1, NODES + 1, (NODES, 1))),
        *([True, False], True, np.ones((1, NODES), bool)),
        *([0.0, 1.0], torch.zeros(3), np.zeros(3, np.float16), 0.5, torch.tensor(0.5)),
        *([[0, 1], [2, 3]], [[0], [1, 2]], torch.zeros(2, 2, dtype=torch.long), [[]]),
        *(None, "x", ["x"], {0: 1}),
    ],
    ids=lambda index: type(index).__name__,
)
def test_rows_refuse_what_is_neither_ids_nor_a_mask(folder: Path, index: Any) -> None:
    with pytest.raises(ValueError, match=r"^index: got .*, expected"):
        StoredGraph(folder).rows("x", index)


def test_rows_are_no_views_of_the_file(folder: Path) -> None:
    stored = StoredGraph(folder)
    for index in (slice(0, 2), torch.tensor([0, 1])):
        rows = stored.rows("x", index)
        expected = rows.clone()
        rows.zero_()
        assert torch.equal(stored.rows("x", index), expected)


def test_a_worker_shares_no_more_memory_than_the_rows_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredGraph(folder)
    expected = stored.rows("x", torch.tensor([3, 1]))
    monkeypatch.setattr("gmoe.data.stored.get_worker_info", object)
    shared = stored.rows("x", torch.tensor([3, 1]))
    assert shared.is_shared()
    assert torch.equal(shared, expected)
    assert shared.untyped_storage().nbytes() == 2 * 4 * 4  # rows, columns, bytes


def test_rows_take_ids_of_any_integer_type(folder: Path) -> None:
    stored = StoredGraph(folder)
    expected = stored.rows("x", torch.tensor([3, 1]))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(stored.rows("x", torch.tensor([3, 1], dtype=dtype)), expected)
    for index in ([3, 1], (3, 1), np.array([3, 1])):
        assert torch.equal(stored.rows("x", index), expected)
    for one in (3, np.int64(3), torch.tensor(3)):
        assert torch.equal(stored.rows("x", one), expected[:1])
    nothing: list[Any] = [[], torch.empty(0, dtype=torch.long), torch.zeros(NODES).bool()]
    for none in nothing:
        assert stored.rows("x", none).shape == (0, 4)


@pytest.mark.parametrize("block", [2**22, 1])
def test_verify_reads_everything(folder: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gmoe.data.stored, "BLOCK", block)
    StoredGraph(folder).verify()
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    start, node = arrays["start"], int(np.diff(arrays["start"]).argmax())
    for name, place, value, message in [
        ("source", start[node] + 1, NODES, "node ids"),
        ("source", start[node], NODES - 1, "falling sources"),
        ("start", node, start[-1], "falling values"),
        ("val", 1, -1, "node ids"),
    ]:
        bad = arrays[name].copy()
        bad[place] = value
        write(folder, arrays | {name: bad})
        with pytest.raises(ValueError, match=rf"{name}\.npy: got .*{message}"):
            StoredGraph(folder).verify()
    write(folder, arrays)
    with (folder / "x.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(ValueError, match=r"x\.npy: got SHA-256"):
        StoredGraph(folder).verify()


def assert_same_batches(
    folder: Path, data: Data, fanouts: list[int], seeds: Any, **kwargs: Any
) -> None:
    """The loaders of the stored graph and of the one in memory agree."""
    found = []
    for given in (StoredGraph(folder), data):
        torch.manual_seed(3)
        loader = neighbor_loader(
            given, fanouts, seeds, 7, backend="gmoe", shuffle=True, is_sorted=True, **kwargs
        )
        found.append(list(loader))
        loader._iterator = None
    assert len(found[0]) > 0
    for ours, theirs in zip(*found, strict=True):
        for name in ("x", "y", "edge_index", "n_id", "e_id", "input_id"):
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype
        for name in ("batch_size", "num_nodes", "num_sampled_nodes", "num_sampled_edges"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("fanouts", "replace", "half"), [([4, 3], False, True), ([-1, 2], True, False)], ids=str
)
def test_batches_are_those_in_memory(
    tmp_path: Path, half: bool, replace: bool, fanouts: list[int]
) -> None:
    data = store(tmp_path, made_graph(), half)
    for seeds in (None, torch.arange(20) % 7, data.y > 1):
        assert_same_batches(tmp_path, data, fanouts, seeds, replace=replace)


@pytest.mark.parametrize(
    "way", ["fork", *(pytest.param(w, marks=pytest.mark.slow) for w in ("spawn", "forkserver"))]
)
def test_batches_of_two_workers_are_those_in_memory(tmp_path: Path, way: str) -> None:
    data = store(tmp_path, made_graph(), half=True)
    assert_same_batches(tmp_path, data, [4, 3], None, num_workers=2, multiprocessing_context=way)


def test_a_graph_without_edges(tmp_path: Path) -> None:
    data = Data(
        x=torch.rand(5, 2), edge_index=torch.empty(2, 0, dtype=torch.int64), y=torch.arange(5)
    )
    data = store(tmp_path, data, train=torch.empty(0, dtype=torch.int64))
    StoredGraph(tmp_path).verify()
    assert_same_batches(tmp_path, data, [2, 2], None)


def test_pyg_reads_it_where_pyg_can_sample(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyG's own loader takes the stores, and needs its extension. Ours is the default."""
    stored = StoredGraph(folder)
    with monkeypatch.context() as patch:
        patch.setattr(torch_geometric.typing, "WITH_PYG_LIB", True)
        assert type(neighbor_loader(stored, [3])) is NodeLoader
    loader = NeighborLoader((stored, stored), [3, 2], torch.arange(10), batch_size=5)
    sampler = loader.node_sampler
    assert torch.equal(sampler.row, stored.source.long())
    assert torch.equal(sampler.colptr, stored.start)
    if torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE:
        batch = next(iter(loader))
        assert torch.equal(batch.x, stored.rows("x", batch.n_id))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 M edges, in-degrees from 0 to thousands; files of 160 MB."""
    generator = np.random.default_rng(0)
    degree = np.minimum(generator.pareto(1.5, LARGE) * 8, 5_000).astype(np.int64)
    node = np.repeat(np.arange(LARGE), degree)
    source = generator.integers(LARGE, size=len(node))
    source = source[np.lexsort((source, node))].astype(np.int32)
    x = generator.standard_normal((LARGE, WIDTH), dtype=np.float32).astype(np.float16)
    start = np.concatenate([[0], degree.cumsum()])
    path = tmp_path_factory.mktemp("large")
    write(path, {"start": start, "source": source, "x": x, "y": np.arange(LARGE) % 10})
    return path


def anonymous() -> float:
    """MB of memory that is not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


@needs_proc
@pytest.mark.slow
def test_memory_is_flat_while_sampling(large: Path) -> None:
    before = anonymous()
    graph = StoredGraph(large)
    opened, used = anonymous(), list[float]()
    for batch, _ in zip(
        neighbor_loader(graph, [10, 5], batch_size=256, shuffle=True), range(400), strict=False
    ):
        assert batch.x.dtype == torch.float32
        used.append(anonymous())
    assert opened - before < 1
    assert max(used[100:]) - max(used[:100]) < 8
    assert max(used) - before < 40


@needs_proc
@pytest.mark.slow
def test_memory_of_inference_is_that_of_a_block(large: Path, tmp_path: Path) -> None:
    model = GNNMoE(WIDTH, 64, 10, num_experts=4, shared_router=False).eval()
    peaks = list[float]()
    assert model.convs[0].router is not None
    for module in (*model.convs, model.convs[0].router):
        module.register_forward_hook(lambda *_: peaks.append(anonymous()))
    before = anonymous()
    assert model.inference(StoredGraph(large), batch_size=2_048, folder=tmp_path).shape == (
        LARGE,
        10,
    )
    assert max(peaks) - before < 80
