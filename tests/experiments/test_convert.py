"""The converter writes the graph, whatever the memory; what is wrong is named; a killed one leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from experiments.planted_papers import PapersPlanter
from experiments.stored import Input, building, convert
from experiments.streams import ArrayEdges, ArrayStream, edges_of
from numpy.typing import NDArray
from torch_geometric.utils import to_undirected

from experiments import stored
from experiments.convert import CLASSES, PAPERS, PapersFiles, main
from experiments.data.ogb import import_ogb
from gmoe import StoredGraph

NODES, EDGES = 60, 400
TINY = 2e-6
"""Gigabytes: room for 100 edges, more than a node has, less than the graph."""


def made(seed: int = 0) -> NDArray[np.int64]:
    """(2, M) edges with self-loops, parallel and mutual ones, and nodes without any: 0, 7 and the last."""
    rng = np.random.default_rng(seed)
    edges = rng.integers(NODES, size=(2, EDGES))
    edges[:, :40] = edges[::-1, 40:80]
    edges[:, 80:120] = edges[:, 120:160]
    edges[1, 160:170] = edges[0, 160:170]
    return edges[:, ~np.isin(edges, [0, 7, NODES - 1]).any(axis=0)]


def in_edges(edges: NDArray[Any], undirected: bool) -> list[list[int]]:
    """The sources of each node, by the obvious Python."""
    pairs = Counter((int(d), int(s)) for s, d in edges.T)
    if undirected:
        pairs = Counter({pair: 1 for d, s in pairs for pair in ((d, s), (s, d))})
    found: list[list[int]] = [[] for _ in range(NODES)]
    for destination, source in sorted(pairs.elements()):
        found[destination].append(source)
    return found


def read(folder: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The folder, with all that ``graph.json`` says of it checked."""
    StoredGraph(folder).verify()
    graph = json.loads((folder / "graph.json").read_text())
    arrays = {}
    for name, said in graph["arrays"].items():
        array = arrays[name] = np.load(folder / said["file"])
        assert (str(array.dtype), list(array.shape)) == (said["dtype"], said["shape"])
        assert hashlib.sha256((folder / said["file"]).read_bytes()).hexdigest() == said["sha256"]
    assert {path.name for path in folder.iterdir()} == {"graph.json", *(f"{name}.npy" for name in arrays)}
    assert graph["format"] == 1
    assert (graph["num_nodes"], graph["num_edges"]) == (len(arrays["x"]), len(arrays["source"]))
    return graph, arrays


def rows(arrays: dict[str, NDArray[Any]]) -> list[list[int]]:
    start, source = arrays["start"], arrays["source"]
    assert (str(start.dtype), str(source.dtype), start[0], start[-1]) == ("int64", "int32", 0, len(source))
    return [source[begin:end].tolist() for begin, end in itertools.pairwise(start)]


def save(folder: Path, **arrays: NDArray[Any]) -> list[str]:
    """Write arrays, and return the options that name them."""
    options = []
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        options += [f"--{name}", str(folder / f"{name}.npy")]
    return options


@pytest.fixture
def x(tmp_path: Path) -> NDArray[np.float32]:
    x = np.random.default_rng(1).standard_normal((NODES, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    return x


def given(folder: Path, edges: NDArray[Any], **more: Any) -> Input:
    np.save(folder / "edges.npy", edges)
    return Input(name="made", edges=edges_of(folder / "edges.npy"), x=ArrayStream(folder / "x.npy"), **more)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("memory", [TINY, 2.0])
def test_the_folder_is_the_graph(
    seed: int, directed: bool, memory: float, x: NDArray[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edges, bounds, buckets = made(seed), stored.Converter.bounds, list[Any]()

    def recorded(*args: Any) -> Any:
        buckets.append(bounds(*args))
        return buckets[-1]

    monkeypatch.setattr(stored.Converter, "bounds", recorded)
    graph = convert(given(tmp_path, edges), tmp_path / "out", directed=directed, memory=memory)
    found, arrays = read(tmp_path / "out")
    assert found == graph
    assert rows(arrays) == in_edges(edges, not directed)
    assert np.array_equal(arrays["x"], x)
    assert graph["undirected"] is not directed
    assert len(buckets[0]) > 4 if memory == TINY else len(buckets[0]) == 2
    assert not (tmp_path / "out.new").exists()


def test_undirected_is_what_pyg_makes_of_it(x: NDArray[Any], tmp_path: Path) -> None:
    edges = made()
    convert(given(tmp_path, edges), tmp_path / "out", memory=TINY)
    arrays = read(tmp_path / "out")[1]
    theirs = to_undirected(torch.from_numpy(edges), num_nodes=NODES)  # ascends by source, then destination
    ours = np.stack([np.repeat(np.arange(NODES), np.diff(arrays["start"])), arrays["source"]])  # symmetric
    assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("edges", [np.empty((2, 0), np.int64), np.zeros((2, 1), np.int64), np.full((2, 5), NODES - 1)])
def test_hardly_any_edges(edges: NDArray[Any], x: NDArray[Any], tmp_path: Path) -> None:
    convert(given(tmp_path, edges), tmp_path / "out", memory=TINY)
    assert rows(read(tmp_path / "out")[1]) == in_edges(edges, undirected=True)


def csv(header: str, line: str = "{},{}\n") -> Callable[[Path, NDArray[Any]], None]:
    def write(path: Path, edges: NDArray[Any]) -> None:
        text = header + "".join(line.format(s, d) for s, d in edges.T)
        (gzip.open if path.suffix == ".gz" else open)(path, "wt").write(text)

    return write


def parquet(path: Path, edges: NDArray[Any]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(dict(zip("sd", edges, strict=True))), path)


FORMS: dict[str, tuple[str, Callable[[Path, NDArray[Any]], Any]]] = {
    "(2, M)": ("e.npy", np.save),
    "(M, 2)": ("e.npy", lambda path, edges: np.save(path, np.ascontiguousarray(edges.T))),
    "(2, M) by columns": ("e.npy", lambda path, edges: np.save(path, np.asfortranarray(edges))),
    "(M, 2) by columns": ("e.npy", lambda path, edges: np.save(path, np.asfortranarray(edges.T))),
    "int32, big-endian": ("e.npy", lambda path, edges: np.save(path, edges.astype(">i4"))),
    "uint8": ("e.npy", lambda path, edges: np.save(path, edges.astype(np.uint8))),
    "csv": ("e.csv", csv("")),
    "csv with header": ("e.csv", csv("source,destination\n")),
    "csv in quotes": ("e.csv", csv("", '"{}","{}"\n')),
    "csv.gz": ("e.csv.gz", csv("")),
    "parquet": ("e.parquet", parquet),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_edges_agree(form: str, x: NDArray[Any], tmp_path: Path) -> None:
    edges = made()
    name, write = FORMS[form]
    write(tmp_path / name, edges)
    y = np.arange(NODES) % 5 - 1.0
    y[y < 0] = np.nan
    options = save(tmp_path, y=y, train=np.array([1, 3, 2]), test=np.array([[4]]))
    main([str(tmp_path / name), "--to", str(tmp_path / "out"), "--x", str(tmp_path / "x.npy"), *options, "--half",
          "--directed", "--memory", str(TINY)])  # fmt: skip
    graph, arrays = read(tmp_path / "out")
    assert rows(arrays) == in_edges(edges, undirected=False)
    assert (str(arrays["x"].dtype), str(arrays["y"].dtype)) == ("float16", "int8")
    assert np.array_equal(arrays["x"], x.astype(np.float16))
    assert arrays["y"].tolist() == [node % 5 - 1 for node in range(NODES)]
    assert (arrays["train"].tolist(), arrays["test"].tolist()) == ([1, 3, 2], [4])
    assert (graph["name"], graph["num_classes"], graph["undirected"]) == ("e", 4, False)
    assert graph["source"] == str(tmp_path / name)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow(tmp_path: Path) -> None:
    (tmp_path / "e.parquet").touch()
    with pytest.raises(ImportError, match="pip install pyarrow"):
        edges_of(tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"edges": np.array([[0, 1], [1, NODES], [2, 3]])}, rf"edge 1 is \(1, {NODES}\), expected nodes 0 to"),
        ({"edges": np.array([[0, -1], [1, 2], [2, 3]])}, r"edge 0 is \(0, -1\)"),
        ({"edges": np.zeros((3, 3), int)}, r"got shape \(3, 3\) of int64, expected \(2, M\) or \(M, 2\)"),
        ({"edges": np.zeros((2, 3))}, "of float64, expected"),
        ({"edges": np.array([["a", "b"]])}, "got <U1, expected integers or floats"),
        ({"edges": np.array([[None, None]])}, "got object, expected integers or floats"),
        ({"x": np.full((NODES, 2), 7e4)}, "row 0 holds 70000, expected at most 65504 for float16"),
        ({"x": np.where(np.arange(NODES) == 9, np.nan, 0.0)[:, None]}, "row 9 holds NaN or infinity"),
        ({"x": np.where(np.arange(NODES) == 59, -np.inf, 0.0)[:, None]}, "row 59 holds NaN or infinity"),
        ({"x": np.zeros(NODES)}, r"got shape \(60,\), expected \(nodes, features\)"),
        ({"x": np.asfortranarray(np.ones((NODES, 3)))}, "lies column by column"),
        ({"y": np.zeros(NODES - 1)}, r"got shape \(59,\), expected \(60,\)"),
        ({"y": np.full(NODES, 0.5)}, "got 0.5 to 0.5, expected whole numbers"),
        ({"y": np.full(NODES, np.inf)}, "got inf to inf, expected whole numbers"),
        ({"y": np.full(NODES, -2)}, "got -2 to -2, expected whole numbers"),
        ({"y": np.arange(NODES) - 1, "val": np.array([3, 0])}, "node 0 of val has no label"),
        ({"val": np.array([NODES])}, "val: got nodes 60 to 60, expected 0 to 59"),
        ({"val": np.array([2, 2])}, "val: got node 2 twice"),
        ({"train": np.array([2]), "val": np.array([1, 2])}, "val: got node 2 twice, or in an earlier part"),
        ({"val": np.array([0.5])}, "expected a column of node numbers"),
    ],
)
def test_wrong_data_are_refused(
    bad: dict[str, NDArray[Any]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "edges.npy", bad.pop("edges", made()))
    options = save(tmp_path, **{"x": np.zeros((NODES, 1)), **bad})
    refused([str(tmp_path / "edges.npy"), *options, "--half"], message, tmp_path, capsys)


def refused(args: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with this error, and leaves no folder."""
    with pytest.raises(SystemExit) as caught:
        main([*args, "--to", str(folder / "out")])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", "1,2\n3,x\n", "expected two of whole numbers"),
        ("e.csv", "1,2\n3,4.5\n", "expected two of whole numbers"),
        ("e.csv", "1,2\n3,\n", "expected two of whole numbers"),
        ("e.csv", "1,2,3\n3,4,5\n", "got 3 columns of int64"),
        ("e.csv", "1,2\n3,4,5\n", "Expected 2 fields"),
        ("e.csv", "a,b\n1,2,3\n", "got more columns than the header's a, b"),
        ("e.csv", "1,x\n1,2\n", "got 2 columns of object"),
        ("e.csv", "1;2\n3;4\n", "got 1 columns of"),
        ("e.csv", "0.5,1\n1,2\n", "got 2 columns of float64"),
        ("e.csv", "", "No columns"),
        ("e.csv.gz", "1,2\n", "Not a gzipped file"),
        ("e.npy", "1,2\n", "is no .npy array"),
        ("e.txt", "1,2\n", "expected edges as .npy"),
        ("e.csv", "1,2\n99,1\n", r"edge 1 is \(99, 1\)"),
    ],
)
def test_broken_edge_files_are_named(
    name: str, content: str, message: str, x: NDArray[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    refused([str(tmp_path / name), "--x", str(tmp_path / "x.npy")], message, tmp_path, capsys)


def test_a_file_that_is_cut_off(x: NDArray[Any], tmp_path: Path) -> None:
    np.save(tmp_path / "edges.npy", made())
    whole = (tmp_path / "edges.npy").read_bytes()
    for content in (whole[:-8], whole + b"12345678", whole[:20]):
        (tmp_path / "edges.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"edges\.npy"):
            edges_of(tmp_path / "edges.npy")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_wrong_byte_in_an_npz_is_found(compressed: bool, x: NDArray[Any], tmp_path: Path) -> None:
    """Also in the half that is read past: zipfile compares checksums at the end."""
    edges = np.random.default_rng(0).integers(NODES, size=(2, 20_000))
    (np.savez_compressed if compressed else np.savez)(tmp_path / "e.npz", e=edges)
    whole = bytearray((tmp_path / "e.npz").read_bytes())
    for place in (len(whole) // 4, len(whole) // 2 + 1000):
        broken = whole.copy()
        broken[place - place % 8 + 4] ^= 1  # of a number, not the lowest byte: it is still one below NODES for none
        (tmp_path / "b.npz").write_bytes(broken)
        edge_list = ArrayEdges(ArrayStream(tmp_path / "b.npz", "e"))
        source = Input(name="b", edges=edge_list, x=ArrayStream(tmp_path / "x.npy"))
        with pytest.raises(ValueError, match=r"b.npz: e: cannot be read|expected nodes 0 to"):
            convert(source, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_memory_for_the_largest_node(x: NDArray[Any], tmp_path: Path) -> None:
    star = np.stack([np.arange(1, NODES), np.full(NODES - 1, 5)])
    with pytest.raises(ValueError, match="memory: got 1e-06, expected at least 2e-06 GB, since node 5 has 59"):
        convert(given(tmp_path, star), tmp_path / "out", directed=True, memory=1e-6)
    convert(given(tmp_path, star), tmp_path / "out", directed=True, memory=2e-6)
    assert rows(read(tmp_path / "out")[1]) == in_edges(star, undirected=False)
    with pytest.raises(ValueError, match="memory: got 0"):
        convert(given(tmp_path, star), tmp_path / "other", memory=0)


def test_a_full_disk_is_found_before_anything_is_written(
    x: NDArray[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    monkeypatch.setattr(stored.Converter, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match=r"to: 0.00 GB may be needed in .*, expected no more than the 0.00 GB"):
        convert(given(tmp_path, made()), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_folders_that_are_there(x: NDArray[Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        convert(given(tmp_path, made()), tmp_path / "out")
    (tmp_path / "own.new").mkdir()
    (tmp_path / "own.new" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not of a conversion that was cut off"):
        convert(given(tmp_path, made()), tmp_path / "own")
    assert (tmp_path / "own.new" / "thesis.tex").exists()
    with building(tmp_path / "two"), pytest.raises(ValueError, match="another conversion is writing"):
        convert(given(tmp_path, made()), tmp_path / "two")


KILLED = """
import os, signal, sys
from experiments import convert, stored

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

name = sys.argv.pop(1)
if name == "rename":
    stored.Path.rename = die
elif name == "sort":
    remainder, stored.np.fromfile = stored.np.fromfile, lambda *a: die() if a[0].stem == "3" else remainder(*a)
else:
    setattr(stored.Converter, name, die)
convert.main()
"""


@pytest.mark.parametrize("stage", ["distribute", "sort", "features", "described", "rename"])
def test_a_killed_conversion_leaves_nothing_that_opens(stage: str, x: NDArray[Any], tmp_path: Path) -> None:
    edges = made()
    np.save(tmp_path / "edges.npy", edges)
    args = [str(tmp_path / "edges.npy"), "--to", str(tmp_path / "out"), "--x", str(tmp_path / "x.npy")]
    args += ["--memory", str(TINY)]
    killed = subprocess.run([sys.executable, "-c", KILLED, stage, *args], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("out*")] == ["out.new"]
    assert not (tmp_path / "out.new" / "graph.json").exists()
    main(args)
    assert rows(read(tmp_path / "out")[1]) == in_edges(edges, undirected=True)
    assert not (tmp_path / "out.new").exists()


def test_memory_is_bounded(tmp_path: Path) -> None:
    """By --memory, an array of 8 bytes a node, and little else; numpy tells tracemalloc of its arrays."""
    nodes, edges, memory = 20_000, 1_000_000, 8_000_000
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "e.npz", e=rng.integers(nodes, size=(2, edges)), x=np.ones((nodes, 50)))
    edge_list, x = ArrayEdges(ArrayStream(tmp_path / "e.npz", "e")), ArrayStream(tmp_path / "e.npz", "x")
    tracemalloc.start()
    convert(Input(name="large", edges=edge_list, x=x), tmp_path / "out", memory=memory / 1e9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.4 * memory < peak < memory + 8 * nodes + 8_000_000  # blocks and buffers


def test_options_that_do_not_belong_together(
    x: NDArray[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edges, path = str(tmp_path / "edges.npy"), str(tmp_path / "x.npy")
    np.save(edges, made())
    refused([edges], "x: got none", tmp_path, capsys)
    refused([edges, "--x", path, "--from", "data"], "from: got data", tmp_path, capsys)
    refused([PAPERS, "--x", path], f"x: got .* for {PAPERS}", tmp_path, capsys)
    refused([PAPERS, "--from", str(tmp_path)], "raw/data.npz, .*missing in .*unzip", tmp_path, capsys)
    refused([str(tmp_path / "no.npy")], "no such file", tmp_path, capsys)


RELEASE = PapersPlanter(
    nodes=NODES, edges=EDGES, features=4, classes=7, labeled=0.9, seed=0, homophily=0.6, label_noise=0.1
)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("unzipped", [False, True])
def test_papers_is_what_ogb_reads(compressed: bool, unzipped: bool, tmp_path: Path) -> None:
    """From numpy.savez and savez_compressed alike, under either name of the folder."""
    files = PapersFiles(tmp_path)
    RELEASE.write(tmp_path)
    (graph,) = import_ogb("ogb.io.read_graph_raw").read_binary_graph_raw(str(files.data.parent))
    label = np.load(files.label)["node_label"].ravel()
    split = {part: np.loadtxt(files.split(part), dtype=int).tolist() for part in ("train", "val", "test")}
    if compressed:
        np.savez_compressed(files.data, **np.load(files.data))
    if unzipped:
        files.folder.rename(tmp_path / "papers100M-bin")
    main([PAPERS, "--from", str(tmp_path), "--to", str(tmp_path / "out"), "--memory", str(1e-5)])
    said, arrays = read(tmp_path / "out")
    assert (said["name"], said["num_classes"]) == (PAPERS, CLASSES)
    assert "Not OGB's" in said["source"]
    assert rows(arrays) == in_edges(graph["edge_index"], undirected=True)
    assert np.array_equal(arrays["x"], graph["node_feat"])
    assert (str(arrays["x"].dtype), str(arrays["y"].dtype)) == ("float32", "int8")
    assert np.array_equal(arrays["y"], np.where(np.isnan(label), -1, label))
    assert {part: arrays[part].tolist() for part in split} == split


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("num_nodes_list", np.array([NODES + 1]), r"num_nodes_list is \[61\], expected \[60\]"),
        ("num_edges_list", np.array([3, 4]), r"num_edges_list is \[3, 4\], expected \[400\]"),
        ("node_feat", None, "node_feat: got only edge_index.npy"),
        ("edge_index", np.full((2, EDGES), NODES), r"edge 0 is \(60, 60\)"),
        ("node_label", np.full((NODES, 1), 172.0), "got label 172, expected 0 to 171"),
        ("node_label", np.full((NODES, 1), np.nan), "of train has no label"),
    ],
)
def test_broken_releases_are_refused(
    member: str, value: NDArray[Any] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RELEASE.write(tmp_path)
    path = PapersFiles(tmp_path).label if member == "node_label" else PapersFiles(tmp_path).data
    content = dict(np.load(path))
    content |= {member: value} if value is not None else {}
    np.savez(path, **{name: array for name, array in content.items() if name != member or value is not None})
    refused([PAPERS, "--from", str(tmp_path)], message, tmp_path, capsys)
