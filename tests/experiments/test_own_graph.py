"""A graph of one's own, as strangers bring it, at each door: taken, or refused in a sentence.

Each sentence names the file, what is wrong in it, and what is legal; nothing is trained before it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from experiments.study.advise import main as advise
from experiments.study.sweep import main as sweep
from experiments.train.command import main as train
from tests.helpers.user_data import NODES, arrays, write_csv, write_npz, write_pt

STUDY = """
from dataclasses import replace
from pathlib import Path

from experiments.study.studies import Row, Study
from experiments.train.presets import GRAPH

recipe = replace(GRAPH, data_root=Path({path!r}), hidden=4, epochs=1, seeds=(0,))
rows = {{"dense": Row(label="dense", changes={{"router": "dense"}})}}
STUDY = Study(name="mine", about="", columns={{"graph": recipe}}, rows=rows)
"""


def _train(path: Path) -> None:
    train(["graph", "--data-root", str(path), "--epochs", "1", "--seeds", "0", "--no-progress"])


def _sweep(path: Path, *args: str) -> None:
    Path("mine.py").write_text(STUDY.format(path=str(path)))
    sweep(["mine.py:STUDY", "--no-progress", *args])


def _advise(path: Path, *args: str) -> None:
    advise(["graph", "--data-root", str(path), "--out", "runs", *args])


DOORS: dict[str, Callable[[Path], None]] = {
    "train": _train,
    "sweep": _sweep,
    "sweep --price": lambda path: _sweep(path, "--price"),
    "advise": _advise,
    "advise --price": lambda path: _advise(path, "--price"),
}


def npz(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: write_npz(folder, **changes)


def csv(**columns: Any) -> Callable[[Path], Path]:
    return lambda folder: write_csv(folder, **columns)


def unknown_end(folder: Path) -> Path:
    """An edge to a node that is not there."""
    path = write_csv(folder, ids=[f"n{node}" for node in range(NODES)])
    lines = (path / "edges.csv").read_text().splitlines()
    lines[2] = "n3,n99"
    (path / "edges.csv").write_text("\n".join(lines))
    return path


LABELS = arrays()["node_labels"]
OTHER = np.arange(NODES) == 7
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no label": (npz(node_labels=np.full(NODES, -1)), "negative label in a split, expected 0 or"),
    "one class": (npz(node_labels=np.zeros(NODES, int)), "two classes or more"),
    "classes of a code": (npz(node_labels=LABELS + 500), "from 0 to 39 (below 0 for none)"),
    "a label unknown": (
        npz(node_labels=np.where(OTHER, np.nan, LABELS)),
        "mine.npz: y: got nan at [7], expected finite numbers that torch.int64 can hold",
    ),
    "labels as names": (npz(node_labels=LABELS.astype(str)), "(node_labels: got <U"),
    "names beside": (npz(names=np.array(["a", None])), "(names: Object arrays"),
    "a feature unknown": (
        npz(node_features=np.where(OTHER[:, None], np.inf, arrays()["node_features"])),
        "mine.npz: x: got inf at [7, 0], expected finite numbers that torch.float32 can hold",
    ),
    "masks that overlap": (
        npz(val_masks=arrays()["train_masks"]),
        "got a node in two parts of a split, expected each in one",
    ),
    "sparse features": (
        lambda folder: write_pt(folder, x=torch.eye(NODES).to_sparse()),
        "x: got torch.sparse_coo, torch.float32, expected a dense tensor of real numbers",
    ),
    "nodes without features": (
        lambda folder: write_pt(folder, num_nodes=NODES + 5),
        "got num_nodes [45], expected 40, the rows of x",
    ),
    "csv: an edge to nowhere": (
        unknown_end,
        "row: got {1: {'source': 'n3', 'target': 'n99'}}, expected two ids of nodes.csv",
    ),
    "csv: masks as columns": (
        csv(test_mask=OTHER.tolist()),
        "columns: got test_mask, expected one column split: train, val, test or none",
    ),
    "csv: labels of two kinds": (
        csv(label=["x", *LABELS[1:]]),
        "column label, row: got {0: 'x'}, expected numbers alone)",
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_graph_is_refused(
    form: str, door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[form]
    path = make(tmp_path)
    with pytest.raises(SystemExit) as stop:
        DOORS[door](path)
    shown = capsys.readouterr()
    assert stop.value.code == (1 if door.startswith("sweep") else 2)
    assert message in shown.err
    assert str(path) in shown.err
    assert not [*tmp_path.rglob("checkpoint"), *tmp_path.rglob("prices.json")]


TAKEN: dict[str, Callable[[Path], Path]] = {
    "features that have a gradient": lambda folder: write_pt(
        folder, large(), x=nn.Parameter(torch.randn(5 * NODES, 3))
    ),
    "no edges": lambda folder: write_npz(folder, large(), edges=np.zeros((0, 2), int)),
    "constant features": lambda folder: write_npz(
        folder, large(), node_features=np.ones((5 * NODES, 1))
    ),
    "loops, and edges twice": lambda folder: write_npz(
        folder, large(), edges=np.tile(np.arange(NODES), (2, 2)).T
    ),
    "a class of one node": lambda folder: write_npz(
        folder, large(), node_labels=np.where(np.arange(5 * NODES) == 7, 3, large()["node_labels"])
    ),
}


def large() -> dict[str, Any]:
    """Enough nodes to ask: five copies of the small graph."""
    given = arrays()
    ends = given.pop("edges")
    edges = np.concatenate([ends + copy * NODES for copy in range(5)])
    return {key: np.concatenate([value] * 5) for key, value in given.items()} | {"edges": edges}


@pytest.mark.parametrize("door", ["train", "sweep --price", "advise --price"])
@pytest.mark.parametrize("form", TAKEN)
def test_what_is_a_graph_is_taken(
    form: str, door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    DOORS[door](TAKEN[form](tmp_path))
