"""A graph on disk: what it checks when it is opened, what it hands out, and its batches beside those in memory."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.typing
from torch import Tensor, distributed
from torch_geometric.data import Data, EdgeAttr, TensorAttr
from torch_geometric.loader import NeighborLoader
from torch_geometric.sampler import NodeSamplerInput

import gmoe.data.stored
from gmoe import NeighborSampler, StoredGraph, neighbor_loader
from tests.gmoe.data.sampled import graph
from tests.gmoe.data.stored_files import store, write

NODES, EDGES = 60, 400


def made_graph(labels: Any = None) -> Data:
    """With parallel edges, self-loops, and nodes without in-edges or without any, in shuffled order."""
    data = graph(NODES, EDGES)
    data.edge_index = data.edge_index[:, (data.edge_index[1] > 4) & (data.edge_index != 9).all(dim=0)]
    data.edge_index = torch.cat([data.edge_index, data.edge_index[:, :40]], dim=1)
    data.y = torch.arange(NODES) % 5 - 1 if labels is None else labels
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = torch.arange(NODES)
    store(tmp_path, made_graph(), train=ids[::3], val=ids[1::3], test=ids[2::3])
    return tmp_path


# what it hands out


@pytest.mark.parametrize("half", [False, True])
def test_it_hands_out_what_was_stored(tmp_path: Path, half: bool) -> None:
    data = store(tmp_path, made_graph(), half, train=torch.tensor([5, 3]))
    stored = StoredGraph(tmp_path)
    assert (stored.num_nodes, stored.num_edges, stored.x_dim) == (NODES, data.num_edges, 4)
    assert stored.info["name"] == "test"
    assert stored.train is not None
    assert stored.train.tolist() == [5, 3]
    assert stored.val is None
    assert repr(stored) == f"StoredGraph('{tmp_path}': {NODES} nodes, {data.num_edges} edges, x 4)"
    index = torch.tensor([7, 0, 7, 59, 3])
    for name in ("x", "y"):
        want = data[name]
        for given in (index, index.int(), slice(3, 9), torch.arange(NODES) % 2 == 0, slice(None), None):
            found = stored.get_tensor(None, name, given)
            assert torch.equal(found, want if given is None else want[given])
            assert found.dtype == want.dtype
        assert torch.equal(stored.get_tensor(None, name, 5), want[5:6])
        assert stored.get_tensor_size(None, name) == tuple(want.shape)
    with pytest.raises(IndexError):
        stored.rows("x", torch.tensor([NODES]))
    row, start = stored.get_edge_index(None, "csc")
    assert torch.equal(row, data.edge_index[0])
    assert torch.equal(torch.arange(NODES).repeat_interleave(start.diff()), data.edge_index[1])
    for first, last in [(0, data.num_edges), (0, 0), (3, 50), (data.num_edges, data.num_edges), (17, 18)]:
        assert torch.equal(torch.stack(stored.edges_of(first, last)), data.edge_index[:, first:last])


def test_labels_of_several_tasks(tmp_path: Path) -> None:
    labels = torch.rand(NODES, 3).half()
    store(tmp_path, made_graph(labels))
    assert torch.equal(StoredGraph(tmp_path).rows("y", torch.tensor([4, 2])), labels[[4, 2]].float())


def test_it_is_read_only(folder: Path) -> None:
    stored = StoredGraph(folder)
    with pytest.raises(TypeError, match="StoredGraph is read-only"):
        stored.put_tensor(torch.zeros(NODES), TensorAttr(None, "z", None))
    with pytest.raises(TypeError, match="read-only"):
        stored.remove_edge_index(EdgeAttr(None, "csc"))
    with pytest.raises(KeyError):
        stored.get_edge_index(None, "coo")


def test_a_pickle_is_a_path(folder: Path) -> None:
    stored = StoredGraph(folder)
    sampler = NeighborSampler(stored, [3, 2])
    for thing in (stored, sampler):
        assert len(pickle.dumps(thing)) < 1024
    assert str(pickle.loads(pickle.dumps(stored))) == str(stored)
    seeds = NodeSamplerInput(None, torch.arange(10))
    outs = []
    for each in (sampler, pickle.loads(pickle.dumps(sampler))):
        torch.manual_seed(0)
        outs.append(each.sample_from_nodes(seeds))
    assert torch.equal(outs[0].edge, outs[1].edge)


# what it refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "graph.json: got format 2, expected 1"),
        ({"num_nodes": -1}, "graph.json: got num_nodes -1, expected a whole number"),
        ({"arrays": [1]}, r"graph.json: got arrays \[1\], expected an object"),
        ({"arrays": {"start": 1, "source": 2, "x": 3}}, "graph.json: got array 'start' 1, expected an object"),
        ({"arrays": {}}, r"graph.json: got arrays \[\], expected 'start' among them"),
        ({"num_nodes": NODES + 1}, rf"start.npy: got shape \({NODES + 1},\), expected \({NODES + 2}\)"),
        ({"num_edges": 3}, r"source.npy: got shape .*, expected \(3\)"),
    ],
)
def test_what_the_description_must_be(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "graph.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        StoredGraph(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("start", np.arange(NODES + 1, dtype=np.int32), "start.npy: got <i4, expected int64"),
        ("start", np.arange(NODES + 1), rf"start.npy: got ends \[0, {NODES}\], expected \[0, "),
        ("source", np.zeros(5), "source.npy: got <f8, expected int32"),
        ("x", np.zeros((NODES, 2)), "x.npy: got <f8, expected float16 or float32"),
        ("x", np.zeros(NODES, np.float32), r"x.npy: got shape \(60,\), expected \(60, any\)"),
        ("x", np.zeros((2, NODES), np.float32).T, r"x.npy: got shape \(60, 2\), expected \(60, any\) in C order"),
        ("y", np.zeros(3, np.int64), r"y.npy: got shape \(3,\), expected \(60\)"),
        ("train", np.zeros(3, np.int16), "train.npy: got <i2, expected int64"),
        ("year", np.zeros(NODES, np.int64), "graph.json: got array 'year', expected one of start, source, x, y"),
    ],
)
def test_what_the_arrays_must_be(folder: Path, name: str, value: np.ndarray, message: str) -> None:
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")} | {name: value}
    if name == "source":
        arrays["start"][:] = 0
        arrays["start"][-1] = len(value)
    write(folder, arrays)
    with pytest.raises(ValueError, match=message):
        StoredGraph(folder)


def test_files_that_are_cut_or_gone_or_others(folder: Path) -> None:
    path = folder / "x.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"x.npy: got .*, expected a whole .npy file"):
        StoredGraph(folder)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=rf"x.npy: got {len(whole) + 4} bytes, expected {len(whole)}"):
        StoredGraph(folder)
    np.save(path, np.zeros((NODES, 7), np.float16))
    with pytest.raises(ValueError, match=r"x.npy: got .*'float16'.*, expected .*'float32'.*, as graph.json says"):
        StoredGraph(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.npy"):
        StoredGraph(folder)
    with pytest.raises(FileNotFoundError, match=r"graph\.json"):
        StoredGraph(folder / "nowhere")


@pytest.mark.parametrize("block", [2**22, 7])
def test_verify_reads_everything(folder: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gmoe.data.stored, "BLOCK", block)
    StoredGraph(folder).verify()
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    start, node = arrays["start"], int(np.diff(arrays["start"]).argmax())
    for name, change, message in [
        ("source", (start[node] + 1, NODES), f"source.npy: got .*{NODES}, expected node ids in 0..{NODES - 1}"),
        ("source", (start[node], NODES - 1), f"source.npy, in-edges of node {node}: got falling sources"),
        ("start", (node, start[-1]), "start.npy: got falling values"),
        ("val", (1, -1), r"val.npy: got -1\.\..*, expected node ids"),
    ]:
        bad = arrays[name].copy()
        bad[change[0]] = change[1]
        write(folder, arrays | {name: bad})
        with pytest.raises(ValueError, match=message):
            StoredGraph(folder).verify()
    write(folder, arrays)
    with (folder / "x.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(ValueError, match=r"x.npy: got SHA-256 .*, expected "):
        StoredGraph(folder).verify()


# its batches


def batches_of(data: Data | StoredGraph, fanouts: list[int], seeds: Any, **kwargs: Any) -> list[Data]:
    torch.manual_seed(3)
    loader = neighbor_loader(data, fanouts, seeds, batch_size=7, backend="gmoe", is_sorted=True, **kwargs)
    batches = list(loader)
    loader._iterator = None
    return batches


def assert_same_batches(found: list[Data], expected: list[Data]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("x", "y", "edge_index", "n_id", "e_id", "input_id"):
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype
        for name in ("batch_size", "num_nodes", "num_sampled_nodes", "num_sampled_edges"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("fanouts", [[4, 3], [-1, 2], []], ids=str)
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_batches_are_those_in_memory(tmp_path: Path, half: bool, replace: bool, fanouts: list[int]) -> None:
    data = store(tmp_path, made_graph(), half)
    ids = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))
    for seeds in (ids, None, ids[:20] % 7, data.y > 1):
        kwargs: Any = {"replace": replace, "shuffle": True}
        found = batches_of(StoredGraph(tmp_path), fanouts, seeds, **kwargs)
        assert_same_batches(found, batches_of(data, fanouts, seeds, **kwargs))


@pytest.mark.parametrize(
    "context",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow), pytest.param("forkserver", marks=pytest.mark.slow)],
)
def test_batches_of_two_workers_are_those_in_memory(tmp_path: Path, context: str) -> None:
    data = store(tmp_path, made_graph(), half=True)
    kwargs: Any = {"shuffle": True, "num_workers": 2, "multiprocessing_context": context}
    found = batches_of(StoredGraph(tmp_path), [4, 3], None, **kwargs)
    assert_same_batches(found, batches_of(data, [4, 3], None, **kwargs))


def test_a_graph_without_edges(tmp_path: Path) -> None:
    data = Data(x=torch.rand(5, 2), edge_index=torch.empty(2, 0, dtype=torch.int64), y=torch.arange(5))
    data = store(tmp_path, data, train=torch.empty(0, dtype=torch.int64))
    stored = StoredGraph(tmp_path)
    stored.verify()
    assert stored.train is not None
    assert stored.train.tolist() == []
    assert_same_batches(batches_of(stored, [2, 2], None), batches_of(data, [2, 2], None))


def test_pyg_reads_it_where_pyg_can_sample(folder: Path) -> None:
    """PyG's own loader takes the stores, and then needs its extension as for any graph."""
    stored = StoredGraph(folder)
    loader = NeighborLoader((stored, stored), [3, 2], torch.arange(10), batch_size=5)
    sampler = loader.node_sampler
    assert sampler.num_nodes == NODES
    assert torch.equal(sampler.row, stored.source.long())
    assert torch.equal(sampler.colptr, stored.start)
    if not (torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE):
        with pytest.raises(ImportError, match="pyg-lib"):
            next(iter(loader))
        with pytest.raises(ImportError, match="backend: got 'pyg'"):
            neighbor_loader(stored, [3], backend="pyg")
        return
    batch = next(iter(loader))
    assert torch.equal(batch.x, stored.rows("x", batch.n_id))


# cuGraph


def test_cugraph_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cugraph_pyg", None)
    with pytest.raises(
        ImportError, match=r"'cugraph' without cugraph_pyg.* installed, expected pip install cugraph-pyg"
    ):
        neighbor_loader(StoredGraph(folder), [3], backend="cugraph")
    with pytest.raises(ValueError, match="data: got Data with backend='cugraph', expected a StoredGraph"):
        neighbor_loader(made_graph(), [3], backend="cugraph")


@pytest.fixture
def fake_cugraph(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules that record what they are called with."""
    calls: list[Any] = []

    class Store(dict):
        pass

    modules = {name: types.ModuleType(name) for name in ("cugraph_pyg", "cugraph_pyg.data", "cugraph_pyg.loader")}
    modules["cugraph_pyg.data"].FeatureStore = modules["cugraph_pyg.data"].GraphStore = Store  # type: ignore[attr-defined]
    modules["cugraph_pyg.loader"].NeighborLoader = lambda *args, **kwargs: calls.append((args, kwargs))  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("world", [1, 3, NODES + 1])
def test_each_process_gives_cugraph_its_slice(
    folder: Path, fake_cugraph: list[Any], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredGraph(folder)
    with pytest.raises(RuntimeError, match="backend: got 'cugraph' without a process group"):
        neighbor_loader(stored, [3, 2], backend="cugraph")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)
    edges = torch.stack(stored.edges_of(0, stored.num_edges))
    parts: list[tuple[Tensor, ...]] = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        neighbor_loader(stored, [3, 2], [4, 1], batch_size=2, replace=True, backend="cugraph", shuffle=True)
        ((features, graph), fanouts), kwargs = fake_cugraph[-1]
        assert fanouts == [3, 2]
        assert kwargs.pop("input_nodes").tolist() == [4, 1]
        assert kwargs == {"batch_size": 2, "replace": True, "shuffle": True}
        assert set(features) == {("node", "x", None), ("node", "y", None)}
        ((key, own),) = graph.items()
        assert key == (("node", "to", "node"), "coo", False, (NODES, NODES))
        parts.append((features["node", "x", None], features["node", "y", None], own))
    for whole, dim, column in (
        (stored.rows("x", slice(None)), 0, 0),
        (stored.rows("y", slice(None)), 0, 1),
        (edges, 1, 2),
    ):
        for found, expected in zip(parts, whole.tensor_split(world, dim), strict=True):
            assert torch.equal(found[column], expected)
