"""A user's own graph as CSV files: ids are text, numbers are numbers, and an error names the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.data.user_graph import user_graph
from tests.experiments.user_data import NODES, arrays, assert_holds, write_csv


def edit(path: Path, line: int, old: str, new: str) -> None:
    """Change one line, counted from 1, of a text file."""
    lines = path.read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:03}" for i in range(NODES)],  # 007 is not 7
        ["NA", "nan", "None", "null", *map(str, range(NODES - 4))],  # text and numbers, and what pandas takes for none
        [f"{i}.0" for i in range(NODES)],
        [f"{10**17 + i}" for i in range(NODES)],  # no float holds them
    ],
)
def test_ids_are_text(names: list[str], tmp_path: Path) -> None:
    assert_holds(user_graph(write_csv(tmp_path, ids=names)), arrays())


def test_ids_stay_text_where_edges_know_only_numbers(tmp_path: Path) -> None:
    given = arrays()
    given["edges"] = given["edges"][(given["edges"] > 0).all(axis=1)]
    assert_holds(user_graph(write_csv(tmp_path, given, ids=["first", *map(str, range(1, NODES))])), given)


def test_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    """A mark of the encoding, spaces, capitals, empty lines at the end, any order of columns."""
    folder = write_csv(tmp_path, ids=[f"n{i}" for i in range(NODES)])
    for name in ("nodes.csv", "edges.csv"):
        text = (folder / name).read_text().replace(",", " , ").replace("train", "Train").replace("val", "valid")
        header, _, rest = text.partition("\n")
        text = header.replace(" ", "") + "\n" + rest + "\n\n"
        (folder / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    graph = user_graph(folder)
    assert_holds(graph, arrays())
    assert graph.splits(0)["val"].tolist() == np.flatnonzero(arrays()["val_masks"]).tolist()


def test_weights_of_csv(tmp_path: Path) -> None:
    weight = np.linspace(0.5, 2, len(arrays()["edges"]))
    graph = user_graph(write_csv(tmp_path, weight=weight))
    torch.testing.assert_close(graph.data.edge_weight, torch.from_numpy(weight).float())


@pytest.mark.parametrize(
    ("file", "line", "old", "new", "message"),
    [
        ("edges.csv", 1, "target", "to", "edges.csv: no column target; got source, to"),
        ("nodes.csv", 1, "label", "class", "nodes.csv: no column label; got id, class, f0, f1, f2, split"),
        ("nodes.csv", 1, "split", "mask", "nodes.csv: no column split"),
        ("nodes.csv", 1, ",", ";", "nodes.csv: cannot be read as CSV"),
        ("edges.csv", 5, "n", "x", r"edges.csv: line 5 has source=x\d+, which is no node"),
        ("edges.csv", 9, ",n", ",", "edges.csv: line 9 has target=.*, which is no node"),
        ("edges.csv", 4, ",", "", r"edges.csv: line 4 has source=\w+, which is no node"),
        ("edges.csv", 6, "n", "n1,n", "edges.csv: cannot be read as CSV .*line 6"),
        ("edges.csv", 2, "n", "n1,n", "edges.csv: cannot be read as CSV"),
        ("nodes.csv", 4, "n2,", "n1,", "nodes.csv: line 4 has id n1, expected each node's own"),
        ("nodes.csv", 4, "n2,", ",", "nodes.csv: line 4 has id nan, expected each node's own"),
        ("nodes.csv", 7, ",", ",red", r"nodes.csv: line 7 has label=red\d, expected a number"),
        ("nodes.csv", 7, ",", ",0.5", r"nodes.csv: the labels hold 0.5\d, expected whole numbers|mine: the labels"),
        ("nodes.csv", 3, ".", "x", r"nodes.csv: line 3 has f0=-?\dx\d+, expected a number"),
        ("nodes.csv", 3, "0.", "nan", r"nodes.csv: line 3 has f0=-?nan\d+, expected a number"),
        ("nodes.csv", 3, ",train", ",trian", "nodes.csv: line 3 has split=trian, expected train, val, test or nothing"),
    ],
)
def test_a_wrong_csv(file: str, line: int, old: str, new: str, message: str, tmp_path: Path) -> None:
    given = arrays()
    given["train_masks"][1], given["val_masks"][1], given["test_masks"][1] = True, False, False
    folder = write_csv(tmp_path, given, ids=[f"n{i}" for i in range(NODES)])
    edit(folder / file, line, old, new)
    with pytest.raises(ValueError, match=message):
        user_graph(folder)


@pytest.mark.parametrize("cell", ["", "nan", "inf", "-Infinity", "1e999", "one", "1,5"])
def test_a_cell_that_is_no_number(cell: str, tmp_path: Path) -> None:
    folder = write_csv(tmp_path)
    edit(folder / "nodes.csv", 6, str(arrays()["node_features"][4, 1]), cell)
    with pytest.raises(ValueError, match=r"nodes\.csv: (line 6 has f1=.*, expected a number|cannot be read .*line 6)"):
        user_graph(folder)


def test_an_empty_line_between_nodes(tmp_path: Path) -> None:
    folder = write_csv(tmp_path)
    lines = (folder / "nodes.csv").read_text().split("\n")
    (folder / "nodes.csv").write_text("\n".join([*lines[:4], "", *lines[4:]]))
    with pytest.raises(ValueError, match=r"nodes\.csv: line 5 is empty"):
        user_graph(folder)


@pytest.mark.parametrize("weight", ["", "heavy", "inf"])
def test_a_weight_that_is_no_number(weight: str, tmp_path: Path) -> None:
    weights: list[Any] = [1.0] * len(arrays()["edges"])
    weights[2] = weight
    with pytest.raises(ValueError, match=r"edges\.csv: line 4 has weight=.*, expected a number"):
        user_graph(write_csv(tmp_path, weight=weights))


@pytest.mark.parametrize(("file", "content"), [("nodes.csv", "label,split\n"), ("nodes.csv", ""), ("edges.csv", "")])
def test_empty_csv(file: str, content: str, tmp_path: Path) -> None:
    folder = write_csv(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=file if not content else "mine: got features of shape|edges.csv: line 2"):
        user_graph(folder)


def test_no_features(tmp_path: Path) -> None:
    given = arrays()
    given["node_features"] = given["node_features"][:, :0]
    with pytest.raises(ValueError, match=r"mine: got features of shape \(40, 0\), expected \(nodes, at least one\)"):
        user_graph(write_csv(tmp_path, given))


@pytest.mark.parametrize("header", ["{},extra", ",{}", "{},f0"])
def test_columns_have_names_of_their_own(header: str, tmp_path: Path) -> None:
    """pandas writes its index as a column without a name: it would be a feature."""
    folder = write_csv(tmp_path)
    lines = (folder / "nodes.csv").read_text().splitlines()
    names = header.format(lines[0])
    rows = [f"{i},{line}" if header.startswith(",") else f"{line},{i}" for i, line in enumerate(lines[1:])]
    (folder / "nodes.csv").write_text("\n".join([names, *rows]) + "\n")
    if header.endswith("extra"):
        assert user_graph(folder).data.x.size(1) == arrays()["node_features"].shape[1] + 1
        return
    with pytest.raises(ValueError, match="line 1 has a column"):
        user_graph(folder)
