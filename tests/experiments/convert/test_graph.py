"""The converter writes the graph, whatever the memory.

What is wrong is named; a killed one leaves nothing.
"""

from __future__ import annotations

import gzip
import itertools
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch_geometric.utils import to_undirected

from experiments.convert.graph import CLASSES, building, convert, main, write_edges
from experiments.convert.planted import write_planted
from experiments.train.config import PAPERS
from gmoe import StoredGraph
from tests.helpers.command import refused
from tests.helpers.converted import NODES, run

EDGES = np.random.default_rng(0).integers(1, NODES - 1, size=(2, 700))
LABELED = 3_000
"""Nodes of a planted ogbn-papers100M, so that each part of its split has some."""


def in_edges(edges: NDArray[Any], undirected: bool, nodes: int = NODES) -> list[list[int]]:
    """The sources of each node, by the obvious Python."""
    pairs = Counter((int(d), int(s)) for s, d in edges.T)
    if undirected:
        pairs = Counter({pair: 1 for d, s in pairs for pair in ((d, s), (s, d))})
    found: list[list[int]] = [[] for _ in range(nodes)]
    for destination, source in sorted(pairs.elements()):
        found[destination].append(source)
    return found


def rows(folder: Path) -> list[list[int]]:
    """The sources of each node in a folder, all of which is checked."""
    graph = StoredGraph(folder)
    graph.verify()
    assert {path.name for path in folder.iterdir()} == {
        "graph.json",
        *(f"{name}.npy" for name in graph.info["arrays"]),
    }
    return [
        graph.source[begin:end].tolist() for begin, end in itertools.pairwise(graph.start.tolist())
    ]


def is_refused(message: str, folder: Path, edges: Any, name: str = "e.npy", **options: Any) -> None:
    """A conversion ends with this error, and leaves no folder."""
    with pytest.raises(ValueError, match=message) as caught:
        run(folder, edges, name, **options)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("out*"))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edges=arrays(np.int64, st.tuples(st.just(2), st.integers(0, 40)), elements=st.integers(0, 7)),
    directed=...,
)
def test_the_folder_is_the_graph(edges: NDArray[Any], directed: bool, tmp_path: Path) -> None:
    out = run(tmp_path, edges, nodes=8, directed=directed)
    assert rows(out) == in_edges(edges, not directed, nodes=8)
    assert StoredGraph(out).info["undirected"] == (not directed)
    shutil.rmtree(out)


def test_an_edge_at_the_end_of_a_piece_and_in_the_next_is_kept_once(tmp_path: Path) -> None:
    pieces = [np.array([1, 2]), np.array([2, 7, 8])]  # destination * 3 + source
    assert write_edges(iter(pieces), tmp_path, 3, directed=False) == 4
    assert np.load(tmp_path / "source.npy").tolist() == [1, 2, 1, 2]
    assert np.load(tmp_path / "start.npy").tolist() == [0, 2, 2, 4]


def test_undirected_is_what_pyg_makes_of_it_where_edges_spill(tmp_path: Path) -> None:
    edges, nodes = np.random.default_rng(0).integers(30_000, size=(2, 2_000_000)), 30_000
    graph = StoredGraph(run(tmp_path, edges, nodes=nodes, memory=0.1))
    # Ascends by source, then destination
    theirs = to_undirected(torch.from_numpy(edges), num_nodes=nodes)
    assert torch.equal(torch.stack(graph.in_edges(slice(None))).flip(0), theirs)  # symmetric


LINES = "".join(f"{source},{destination}\n" for source, destination in EDGES.T)
FORMS: dict[str, tuple[str, Any]] = {
    "(M, 2)": ("e.npy", np.ascontiguousarray(EDGES.T)),
    "uint8 by columns": ("e.npy", np.asfortranarray(EDGES.astype(np.uint8))),
    "int32": ("e.npy", EDGES.astype(np.int32)),
    "csv, CR LF": ("e.csv", LINES.replace("\n", "\r\n")),
    "csv with header, blanks and quotes": (
        "e.csv",
        'from,"to"\n' + LINES.replace(",", ', "').replace("\n", '"\n'),
    ),
    "csv, the destination first": (
        "e.csv",
        "Target, source\n" + "".join(f"{end},{start}\n" for start, end in EDGES.T),
    ),
    **{
        f"csv of {end} and {start}": (
            "e.csv",
            f"{end},{start}\n" + "".join(f"{b},{a}\n" for a, b in EDGES.T),
        )
        for end, start in (("dst", "source"), ("to", "src"), ("destination", "from"))
    },
    "parquet": ("e.parquet", None),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_edges_agree(form: str, tmp_path: Path) -> None:
    name, edges = FORMS[form]
    if edges is None:
        connection = duckdb.connect().register(
            "ends", {"s": EDGES[0], "d": EDGES[1].astype(np.int32)}
        )
        connection.execute(f"COPY (SELECT s, d FROM ends) TO '{tmp_path / name}'")
    x = np.random.default_rng(1).standard_normal((NODES, 3)).astype(np.float32)
    given: dict[str, Any] = {
        "x": x,
        "y": np.where(np.arange(NODES) % 5, np.arange(NODES) % 5 - 1, np.nan),
    }
    given |= {"train": np.array([1, 3, 2]), "test": np.array([[4]])}
    out = run(tmp_path, edges, name, half=True, directed=True, **given)
    assert rows(out) == in_edges(EDGES, undirected=False)
    found = {part: np.load(out / f"{part}.npy") for part in given}
    assert (found["x"].dtype, found["y"].dtype) == (np.float16, np.int8)
    assert np.array_equal(found["x"], x.astype(np.float16))
    assert found["y"].tolist() == [node % 5 - 1 for node in range(NODES)]
    assert (found["train"].tolist(), found["test"].tolist()) == ([1, 3, 2], [4])
    assert StoredGraph(out).info["num_classes"] == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", "0 1\n1 2\n2 x\n", "Found: 1"),  # DuckDB's guess: a header, and two lines
        ("e.csv", "0,1\n1,2,3\n3,4\n", "Line: 2 .*Found: 3"),  # skipped
        ("e.csv", "0,1\n1\n", "Line: 2 .*Found: 1"),  # skipped
        ("e.csv", "0,1\n" * 300_000 + "1,2,3\n", "Line: 300001"),
        ("e.csv", "1,2\n2.5,1\n", "got node 2.5, expected whole numbers from 0"),  # 3
        ("e.csv", "2.5,3.5\n1,2\n", "got node 2.5"),  # a header
        ("e.csv", "1,2\n-1,2\n", "got node -1"),  # taken
        ("e.csv", "1,2\n3,\n", "got node"),
        (
            "e.csv",
            f"1,2\n{NODES},3\n",
            rf"got edge \({NODES}, 3\), expected nodes 0 to {NODES - 1}",
        ),
        ("e.csv", f"1,2\n{10**30},3\n", "cast|convert"),
        ("e.csv", "", "edges: got no rows"),
        ("e.npy", "1,2\n", "e.npy: cannot be read"),
        ("e.txt", "1,2\n", "graph: got .*e.txt, expected"),
        (
            "e.npy",
            np.array([[0, 1], [1, NODES], [2, 3]]),
            rf"got edge \(1, {NODES}\), expected nodes 0 to",
        ),
        ("e.npy", np.zeros((3, 3), int), r"edges: got shape \(3, 3\)"),
        ("e.npy", np.zeros((2, 3)), "edges: got shape .* of <f8"),
        ("e.npy", np.zeros((2, 3), ">i8"), "expected .* native integers"),
    ],
)
def test_broken_edges_are_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    is_refused(message, tmp_path, content, name)


@pytest.mark.parametrize(
    "text", ["source,target\n", "1;2\n3;4\n", "1,2\n-1,3\n", "1,2\n3," + "9" * 2**20 + "\n"]
)
def test_broken_tables_are_named(text: str, tmp_path: Path) -> None:
    """In a line that shows no more of them than a terminal does."""
    with pytest.raises(
        ValueError, match=rf"^(edges: got no rows in )?{tmp_path / 'e.csv'}"
    ) as caught:
        run(tmp_path, text, "e.csv")
    assert len(str(caught.value)) < 2_000


def test_parquet_of_other_columns_and_one_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    for columns, message in (
        ("1, 2, 3", "got columns"),
        ("1.5, 2", "got node 1.5"),
        ("1, NULL", "got node"),
    ):
        duckdb.execute(f"COPY (SELECT {columns}) TO '{path}'")
        is_refused(message, tmp_path, None, path.name)
    path.write_bytes(path.read_bytes()[:-99])
    is_refused(path.name, tmp_path, None, path.name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": np.full((NODES, 2), 7e4)}, "70000 in row 0, expected .* up to 65504"),
        ({"x": np.where(np.arange(NODES) == 9, np.nan, 0.0)[:, None]}, "nan in row 9"),
        ({"y": np.zeros(NODES - 1)}, r"y\.npy: got shape \(149,\)"),
        ({"y": np.full(NODES, 0.5)}, r"y\.npy: got 0.5 to 0.5, expected whole numbers"),
        (
            {"y": np.arange(NODES) - 1, "val": np.array([3, 0])},
            r"y\.npy: got a node of val without a label",
        ),
        ({"val": np.array([NODES])}, r"val\.npy: got nodes 150 to 150, expected 0 to 149"),
        (
            {"train": np.array([2]), "val": np.array([1, 2])},
            r"val\.npy: got node 2 twice, or in an earlier part",
        ),
        ({"val": np.array([0.5])}, "expected a column of node numbers"),
        ({"val": np.repeat(np.arange(3), 200)}, r"val\.npy: got node 0 twice"),
        ({"val": np.repeat([1, 0], [22, 128])}, r"val\.npy: got node 0 twice"),  # a mask
    ],
)
def test_wrong_arrays_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    is_refused(message, tmp_path, EDGES, half=True, **given)


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
    monkeypatch.setattr(
        "experiments.convert.graph.sorted_keys", lambda *_, **__: pytest.fail("written")
    )
    is_refused("to: got 0.00 GB to write, expected at most", tmp_path, EDGES)


def test_folders_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(tmp_path / "e.npy"), "--x", "x.npy", "--to", str(tmp_path / "out")]
    for folder, error in (("out.new", "files of another program"), ("out", "is there already")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.tex").touch()
        assert error in refused(args, capsys, main)
        assert (tmp_path / folder / "thesis.tex").exists()
    with building(tmp_path / "two"):
        assert "another process is writing" in refused(
            [*args, "--to", str(tmp_path / "two")], capsys, main
        )


KILLED = """
import os, signal, sys
from experiments.convert import graph

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(graph.Path if sys.argv[1] == "rename" else graph, sys.argv.pop(1), die)
graph.main()
"""


@pytest.mark.parametrize("stage", ["sorted_keys", "write_features", "described", "rename"])
def test_a_killed_conversion_leaves_nothing_that_opens(stage: str, tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", EDGES)
    np.save(tmp_path / "x.npy", np.ones((NODES, 2)))
    args = [str(tmp_path / "e.npy"), "--to", str(tmp_path / "out"), "--x", str(tmp_path / "x.npy")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, stage, *args], timeout=60, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("out*")] == ["out.new"]
    assert rows(run(tmp_path, EDGES)) == in_edges(EDGES, undirected=True)
    assert not (tmp_path / "out.new").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_papers_is_what_the_release_says(compressed: bool, tmp_path: Path) -> None:
    """From numpy.savez and savez_compressed alike, under either name of the folder."""
    folder = write_planted(PAPERS, tmp_path, LABELED, 700, classes=7)
    data, label = (
        dict(np.load(folder / "raw" / "data.npz")),
        np.load(folder / "raw" / "node-label.npz")["node_label"],
    )
    if compressed:
        np.savez_compressed(folder / "raw" / "data.npz", **data)
        folder = folder.rename(tmp_path / "papers100M-bin")
    main([PAPERS, "--from", str(tmp_path), "--to", str(tmp_path / "out")])
    graph = StoredGraph(tmp_path / "out")
    assert rows(tmp_path / "out") == in_edges(data["edge_index"], undirected=True, nodes=LABELED)
    assert np.array_equal(graph.rows("x", slice(None)), data["node_feat"])
    assert np.array_equal(
        graph.rows("y", slice(None)), np.where(np.isnan(label), -1, label).ravel()
    )
    for part in ("train", "val", "test"):
        path = folder / "split" / "time" / f"{'valid' if part == 'val' else part}.csv.gz"
        assert getattr(graph, part).tolist() == np.loadtxt(path, dtype=int).tolist()
    assert (graph.info["num_classes"], graph.info["source"][:9]) == (CLASSES, "Not OGB's")


def test_broken_releases_are_refused(tmp_path: Path) -> None:
    def is_refused(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            convert(PAPERS, tmp_path / "out", tmp_path, **options)
        assert not list(tmp_path.glob("out*"))

    is_refused(r"from: got no .*data.npz, expected OGB's")
    data = write_planted(PAPERS, tmp_path, LABELED) / "raw" / "data.npz"
    is_refused("x: got arrays for ogbn-papers100M", x=data)
    whole = data.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:9_000] + b"x" + whole[9_001:]):
        data.write_bytes(broken)
        is_refused(f"{data}: cannot be read")
    np.savez(data, edge_index=np.zeros((2, 3), int))
    is_refused(r"data.npz: cannot be read .*node_feat")
    data.write_bytes(whole)
    for name, content in (
        ("split/time/valid.csv.gz", gzip.compress(b"1\n1\n")),
        ("PLANTED.txt", b"\xff"),
    ):
        (data.parents[1] / name).write_bytes(content)
        is_refused(rf"^{data.parents[1] / name}: ")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("name", "decoy"), [("e[1]", "e1"), ("e*", "ex"), ("e?", "ex"), ("year=2020/e", "e")]
)
def test_a_table_is_read_by_its_name_and_not_as_a_pattern(
    name: str, decoy: str, suffix: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((NODES, 1)))
    for stem, edge in ((decoy, (3, 4)), (name, (1, 2))):
        path = tmp_path / f"{stem}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".csv":
            path.write_text(f"{edge[0]},{edge[1]}\n")
        else:
            duckdb.execute(f"COPY (SELECT {edge[0]}, {edge[1]}) TO '{path}'")
    convert(str(path), tmp_path / "out", x=tmp_path / "x.npy", directed=True)
    expected = [[1] if node == 2 else [] for node in range(NODES)]
    assert rows(tmp_path / "out") == expected


def test_a_folder_that_duckdb_would_take_for_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^to: got .*a\\b, expected a path without a backslash"):
        convert("edges.csv", tmp_path / "a\\b")
    assert not list(tmp_path.iterdir())
