"""OGB's sets of nodes: read by ogb where all is there, never asked for, and OGB's metric."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.train.data.ogb import KEPT, OGBMetric, files_of, load_ogb
from experiments.train.data.published import published, without_update_check
from tests.helpers.evil import Evil
from tests.helpers.ogb_data import NAMES, NODES, numbers, plant, write

without_update_check()
from ogb.graphproppred import Evaluator as OfGraphs  # noqa: E402
from ogb.nodeproppred import Evaluator as OfNodes  # noqa: E402


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.fixture
def root(templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of the test's own, with all four sets; a question fails the test."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    return Path(shutil.copytree(templates, tmp_path / "data"))


def file(name: str, root: Path, end: str) -> Path:
    """The file that is needed of a set whose name ends so."""
    (found,) = [file for file in files_of(name) if file.endswith(end)]
    return root / name.replace("-", "_") / found


@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_the_files_labels_split_and_edges(name: str, root: Path) -> None:
    graph = load_ogb(name, root)
    data = graph.data if graph.target is None else graph.data[graph.target]
    y = numbers(file(name, root, "node-label.csv.gz"))
    assert torch.equal(data.y, torch.from_numpy(y).to(data.y).view_as(data.y))
    for part, index in graph.splits(3).items():
        rows = numbers(file(name, root, f"{part.replace('val', 'valid')}.csv.gz"))
        assert index.tolist() == rows.ravel().tolist()
    outputs = {"ogbn-arxiv": 40, "ogbn-products": 47, "ogbn-proteins": 112, "ogbn-mag": 349}
    assert graph.num_outputs == outputs[name]
    if name == "ogbn-mag":
        assert graph.data.node_types == ["author", "field_of_study", "institution", "paper"]
        return
    edges = torch.from_numpy(numbers(file(name, root, "edge.csv.gz"))).long().t()
    if name == "ogbn-arxiv":
        assert torch.equal(data.edge_index, edges)
    else:  # each is followed by its reverse
        assert torch.equal(data.edge_index[:, ::2], edges)
        assert torch.equal(data.edge_index[:, 1::2], edges.flip(0))
    if name == "ogbn-proteins":
        for node in range(0, NODES, 20):
            near = data.edge_attr[data.edge_index[1] == node]
            expected = near.mean(dim=0) if len(near) else torch.zeros(8)
            torch.testing.assert_close(data.x[node], expected)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-mag"])
def test_what_ogb_kept_is_read_and_nothing_in_it_is_run(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = root / name.replace("-", "_") / KEPT
    first = load_ogb(name, root)
    assert "Saving..." in capsys.readouterr().out
    torch.save(Evil(root / "evil"), kept.with_name("pre_transform.pt"))  # which PyG unpickles
    second = load_ogb(name, root)
    assert "Saving..." not in capsys.readouterr().out
    torch.testing.assert_close(first.data.to_dict(), second.data.to_dict(), rtol=0, atol=0)
    torch.save(Evil(root / "evil"), kept)
    with pytest.raises(ValueError, match=rf"{kept}: cannot be read"):
        load_ogb(name, root)
    split = file(name, root, "train.csv.gz").with_name("split_dict.pt")
    kept.unlink()
    if name == "ogbn-arxiv":  # where ogb takes it in place of the tables
        torch.save(Evil(root / "evil"), split)
        with pytest.raises(ValueError, match="cannot be read"):
            load_ogb(name, root)
        split.unlink()
    assert not (root / "evil").exists()
    train = file(name, root, "train.csv.gz")
    write(train, numbers(train)[:3])  # other files
    assert len(load_ogb(name, root).splits(0)["train"]) == 3


def test_files_that_are_newer_than_what_ogb_kept_are_read(root: Path) -> None:
    assert load_ogb("ogbn-arxiv", root).data.y.max() < 7
    path = file("ogbn-arxiv", root, "node-label.csv.gz")
    write(path, np.full((NODES, 1), 9))
    assert load_ogb("ogbn-arxiv", root).data.y.min() == 9


def test_a_folder_that_cannot_be_written_is_read(root: Path) -> None:
    (root / "ogbn_arxiv" / "processed").write_text("no folder")
    for _ in range(2):
        assert load_ogb("ogbn-arxiv", root).data.num_nodes == NODES


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_one_sentence_with_the_address(name: str, root: Path) -> None:
    folder = root / name.replace("-", "_")
    number = len(list(folder.rglob("*")))
    for needed in files_of(name):
        (folder / needed).rename(root / "away")
        said = rf"^{name}: {Path(needed).name} missing in {folder}; unpack http://snap.*\.zip, and"
        with pytest.raises(FileNotFoundError, match=said):
            load_ogb(name, root)
        (root / "away").rename(folder / needed)
    assert len(list(folder.rglob("*"))) == number
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=rf"^{name}: RELEASE_v\d.txt, .* missing in"):
        load_ogb(name, root)
    assert not folder.exists()
    with pytest.raises(ValueError, match="name: got 'ogbn-pubmed', expected one of ogbn-arxiv"):
        load_ogb("ogbn-pubmed", root)


@pytest.mark.parametrize(
    ("name", "of", "cell", "problem"),
    [
        ("ogbn-arxiv", "/edge", NODES, "edge_index"),
        ("ogbn-arxiv", "node-label", 40, "got labels from 0 to 40, expected 0 to 39"),
        ("ogbn-arxiv", "node-feat", np.nan, "expected finite numbers"),
        ("ogbn-proteins", "node-label", 2, "got labels from 0 to 2"),
    ],
)
def test_broken_files_are_named(root: Path, name: str, of: str, cell: float, problem: str) -> None:
    path = file(name, root, f"{of}.csv.gz")
    table, whole = numbers(path), path.read_bytes()
    table[5, 0] = cell
    write(path, table)
    folder = root / name.replace("-", "_")
    with pytest.raises(ValueError, match=rf"^{folder}: .*{problem}"):
        load_ogb(name, root)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"^{folder}: cannot be read"):
        load_ogb(name, root)


def test_processes_are_evaluated_at_once() -> None:
    """Two with unequal shares, whose gathering is played."""
    torch.manual_seed(0)
    target, logits = (torch.rand(90, 112) < 0.3).float(), torch.randn(90, 112).bfloat16()
    whole, there = OGBMetric("ogbn-proteins"), OGBMetric("ogbn-proteins")
    whole.update(logits, target)
    there.update(logits[50:], target[50:])
    states: list[Tensor] = [*there.prediction, *there.target]
    gathering: dict[str, Any] = {"dist_sync_fn": lambda tensor, group: [tensor, states.pop(0)]}  # noqa: ARG005
    here = OGBMetric("ogbn-proteins", distributed_available_fn=lambda: True, **gathering)
    for rows in torch.arange(50).split(17):
        here.update(logits[rows], target[rows])
    assert here.compute() == whole.compute() != there.compute()


METRICS = (*NAMES, "ogbg-molhiv", "ogbg-moltox21", "ogbg-molmuv", "ogbg-molesol")


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_ogbs_to_the_last_digit(name: str) -> None:
    """In batches, of 1,000 random nodes or molecules, whose labels may be missing."""
    generator = torch.Generator().manual_seed(0)
    said = published(name)
    tasks = int(said["num tasks"])
    by_class = said["eval metric"] == "acc"
    logits = torch.randn(1000, 40 if by_class else tasks, generator=generator)
    y = torch.randint(40 if by_class else 2, (1000, tasks), generator=generator).float()
    if name.startswith("ogbg-") and tasks > 1:
        y[torch.rand(1000, tasks, generator=generator) < 0.3] = torch.nan
    metric, judge = OGBMetric(name), (OfGraphs if name.startswith("ogbg-") else OfNodes)(name)
    for rows in torch.arange(1000).split(300):
        metric.update(logits[rows], y[rows].view(-1).long() if by_class else y[rows])
    predicted = logits.argmax(dim=1, keepdim=True) if by_class else logits
    found = judge.eval({"y_true": y, "y_pred": predicted})[judge.eval_metric]
    assert metric.compute().item() == found
