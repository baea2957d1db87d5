"""OGB's molecule sets: read as ``ogb`` reads them, in whole molecules, with OGB's metrics."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.train.config import MoleculeConfig, config_class
from experiments.train.data.molecules import (
    MoleculeBatches,
    load_molecules,
    loss_of_known,
)
from experiments.train.data.published import without_update_check
from experiments.train.kinds import kind_of
from tests.helpers.molecule_data import write_set

without_update_check()
from ogb.io.read_graph_pyg import read_graph_pyg  # noqa: E402

NAMES = ("ogbg-molhiv", "ogbg-molmuv", "ogbg-molesol")
"""One of each metric; MUV has 17 labels a molecule, with gaps."""


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_what_ogb_reads(name: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, name)
    found = load_molecules(name, tmp_path)
    theirs = read_graph_pyg(str(folder / "raw"), add_inverse_edge=True)
    assert len(found.graphs) == len(theirs) == 60
    for graph, their in zip(found.graphs, theirs, strict=True):
        for part in ("x", "edge_index", "edge_attr"):
            assert torch.equal(graph[part], their[part])
    y = np.loadtxt(folder / "raw" / "graph-label.csv.gz", delimiter=",", ndmin=2)
    np.testing.assert_array_equal(found.y.numpy(), y.astype(np.float32))
    for part, file in {"train": "train", "val": "valid", "test": "test"}.items():
        rows = np.loadtxt(folder / "split" / "scaffold" / f"{file}.csv.gz", dtype=int)
        assert found.split[part].tolist() == rows.tolist()  # type: ignore[index]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    (folder / "raw" / "edge.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"edge.csv.gz missing in {folder}; unpack http"):
        load_molecules("ogbg-molhiv", tmp_path)


def test_batches_hold_whole_molecules_each_once(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = load_molecules("ogbg-molhiv", tmp_path)
    batches = MoleculeBatches(data)
    assert batches.steps(7) == 6  # 36 molecules train
    found = list(batches("train", 7, 3))
    assert [batch.inputs[-1] for batch in found] == [6] * 6  # no last batch of one
    position = 0
    order = torch.cat([batch.target for batch in found])
    for batch in found:
        x, edge_index, edge_attr, group, graphs = batch.inputs
        assert torch.equal(group[edge_index[0]], group[edge_index[1]])
        assert group.unique().tolist() == list(range(graphs))
        assert (len(x), len(edge_attr)) == (len(group), edge_index.size(1))
        position += graphs
    assert position == len(data.split["train"])
    assert torch.equal(torch.cat([b.target for b in batches("train", 7, 3)]), order)
    assert not torch.equal(torch.cat([b.target for b in batches("train", 7, 4)]), order)
    whole = list(batches("val", 5, None))
    assert torch.equal(torch.cat([b.target for b in whole]), data.y[data.split["val"]])
    for rank in (0, 1):  # of two processes
        own = next(iter(batches("train", 8, 3, (rank, 2))))
        alone = next(iter(batches("train", 8, 3)))
        assert torch.equal(own.target, alone.target.tensor_split(2)[rank])


def test_missing_labels_count_neither_in_the_loss_nor_in_its_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([[1, 0, torch.nan], [torch.nan] * 3, [0, torch.nan, 1], [1, 1, 0]])
    known = ~target.isnan()
    for is_binary, loss in (
        (True, torch.nn.BCEWithLogitsLoss()),
        (False, torch.nn.MSELoss()),
    ):
        found = loss_of_known(is_binary, logits, target)
        torch.testing.assert_close(found, loss(logits[known], target[known]))
        (grad,) = torch.autograd.grad(found, logits)
        assert torch.equal(grad != 0, known)
        assert float(loss_of_known(is_binary, logits.detach(), target * torch.nan)) == 0


def test_the_task_says_what_ogb_says(tmp_path: Path) -> None:
    for name, metric, tasks in (
        ("ogbg-molhiv", "roc_auc", 1),
        ("ogbg-molmuv", "ap", 17),
        ("ogbg-molesol", "rmse", 1),
    ):
        write_set(tmp_path, name)
        assert config_class(name) is MoleculeConfig
        task = kind_of(MoleculeConfig(dataset=name, data_root=tmp_path)).tasks()(0)
        assert (task.metric_name, task.num_classes, task.kind) == (metric, tasks, "molecule")


def test_labels_of_a_single_column_may_be_missing(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    path: Any = folder / "raw" / "graph-label.csv.gz"
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(["nan", *lines[1:]]).encode()))
    found = load_molecules("ogbg-molhiv", tmp_path)
    assert found.y[0].isnan().all()
    assert len(found.y) == 60
