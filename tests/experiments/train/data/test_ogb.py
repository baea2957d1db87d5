"""OGB's sets, and OGB's metric.

Fetched whole or not at all, equal to what ogb makes of the files, broken files named.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.datasets import utils

from experiments.train.data import ogb
from experiments.train.data.ogb import OGBMetric, files_of, load_ogb
from tests.helpers.ogb_data import NAMES, NODES, numbers, plant, write
from tests.helpers.user_data import Evil

sys.modules["outdated"] = None  # type: ignore[assignment]  # or ogb asks the network for a newer ogb
Evaluator = pytest.importorskip("ogb.nodeproppred").Evaluator
read_graph_pyg = pytest.importorskip("ogb.io.read_graph_pyg")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.fixture
def root(templates: Path, tmp_path: Path) -> Path:
    """A data root of the test's own, with all four sets."""
    return Path(shutil.copytree(templates, tmp_path / "data"))


def file(name: str, root: Path, of: Any) -> Path:
    return root / name.replace("-", "_") / files_of(name)[of]


def tensors(name: str, root: Path) -> dict[str, Any]:
    graph = load_ogb(name, root, offline=True)
    return {"graph": graph.data.to_dict(), "split": graph.splits(0)}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES[:3])
def test_plain_sets_are_what_ogb_reads(name: str, root: Path) -> None:
    graph, raw = load_ogb(name, root), str(file(name, root, "y").parent)
    data = graph.data
    for part, index in graph.splits(3).items():
        assert index.tolist() == numbers(file(name, root, part)).ravel().tolist()
    assert graph.num_outputs == {"ogbn-arxiv": 40, "ogbn-products": 47, "ogbn-proteins": 112}[name]
    (theirs,) = read_graph_pyg.read_graph_pyg(
        raw, add_inverse_edge=name != "ogbn-arxiv", additional_node_files=[]
    )
    assert torch.equal(data.edge_index, theirs.edge_index)
    assert torch.equal(
        data.y, torch.from_numpy(numbers(file(name, root, "y"))).to(data.y).view_as(data.y)
    )
    if name != "ogbn-proteins":
        assert torch.equal(data.x, theirs.x)
        return
    assert torch.equal(data.edge_attr, theirs.edge_attr)
    for node in range(0, NODES, 20):
        near = theirs.edge_attr[theirs.edge_index[1] == node]
        torch.testing.assert_close(data.x[node], near.mean(dim=0) if len(near) else torch.zeros(8))


def test_mag_is_what_ogb_reads(root: Path) -> None:
    graph, raw = load_ogb("ogbn-mag", root), str(root / "ogbn_mag" / "raw")
    (theirs,) = read_graph_pyg.read_heterograph_pyg(
        raw, additional_node_files=[], additional_edge_files=[]
    )
    assert graph.target == "paper"
    assert graph.data.node_types == sorted(theirs.num_nodes_dict)  # models are drawn in this order
    assert graph.data.edge_types == list(theirs.edge_index_dict)
    assert graph.data.num_nodes_dict == theirs.num_nodes_dict
    assert_same(graph.data.edge_index_dict, dict(theirs.edge_index_dict))
    assert_same(graph.data.x_dict, dict(theirs.x_dict))
    assert graph.data["paper"].y.tolist() == numbers(file("ogbn-mag", root, "y")).ravel().tolist()
    assert files_of("ogbn-mag")["val"] == "split/time/paper/valid.csv.gz"


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-mag"])
def test_the_second_load_reads_tensors_and_runs_nothing(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, processed = (
        tensors(name, root),
        root / name.replace("-", "_") / "processed" / "tensors.pt",
    )
    with monkeypatch.context() as patch:
        patch.setattr(ogb, "read_csv", lambda *_, **__: pytest.fail("read again"))
        assert_same(tensors(name, root), first)
    torch.save(Evil(root / "evil"), processed)
    with pytest.raises(ValueError, match=rf"{processed}: cannot be read"):
        tensors(name, root)
    assert not (root / "evil").exists()
    for other in ({"x": 1}, torch.ones(2)):  # of another program
        torch.save(other, processed)
        assert_same(tensors(name, root), first)
    write(file(name, root, "train"), numbers(file(name, root, "train"))[:3])  # of other files
    assert len(tensors(name, root)["split"]["train"]) == 3


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # the latter is torch's, of a full disk
def test_a_folder_that_cannot_be_written_is_read(
    kind: type[Exception], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise kind("Read-only file system")

    monkeypatch.setattr(torch, "save", full)
    for _ in range(2):
        assert load_ogb("ogbn-arxiv", root, offline=True).data.num_nodes == NODES
        assert "cannot be kept (Read-only file system)" in capsys.readouterr().out
    assert list((root / "ogbn_arxiv" / "processed").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "of", "cell", "problem"),
    [
        ("ogbn-arxiv", ("", "edge"), NODES, "to 200, expected .* whole numbers from 0 to 199"),
        ("ogbn-arxiv", ("", "edge"), 0.5, "whole numbers"),
        ("ogbn-arxiv", "y", 40, "to 40, expected"),
        ("ogbn-arxiv", "x", np.nan, "nan, expected 200 rows of finite numbers"),
        ("ogbn-proteins", "y", 2, "to 2, expected"),
        ("ogbn-mag", (("author", "writes", "paper"), "edge"), 400, "to 400, expected"),
        ("ogbn-mag", "train", -1, "from -1 to"),
    ],
)
def test_a_broken_file_is_named(root: Path, name: str, of: Any, cell: float, problem: str) -> None:
    path = file(name, root, of)
    table, whole = numbers(path), path.read_bytes()
    if of != "train":
        write(path, table[:9])
        with pytest.raises(ValueError, match=rf"{path}: got 9 rows .*, expected"):
            load_ogb(name, root)
    table[5, 0] = cell
    write(path, table)
    with pytest.raises(ValueError, match=rf"{path}: .*{problem}"):
        load_ogb(name, root)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{path}: cannot be read"):
        load_ogb(name, root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: {files_of(name)[of]} missing in "):
        load_ogb(name, root, allow_large_downloads=True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("author,institution,field_of_study\n1,2,3\n", "got columns author, institution, field"),
        ("author,field_of_study,institution,paper\n1,2,3," + "7" * 5_000 + "\n", "got 1, 2, 3, 77"),
        (
            "author,field_of_study,institution,paper\n1,2,3,0.5\n",
            "got 1, 2, 3, 0.5, expected whole",
        ),
        ("author,field_of_study,institution,paper\n1,2,3,-4\n", "got 1, 2, 3, -4, expected whole"),
    ],
)
def test_broken_numbers_of_nodes_are_named(root: Path, text: str, problem: str) -> None:
    path = file("ogbn-mag", root, "nodes")
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(ValueError, match=rf"^{path}: {problem}") as caught:
        load_ogb("ogbn-mag", root)
    assert len(str(caught.value)) < 1_000


def test_an_overlapping_split_is_refused(root: Path) -> None:
    both = numbers(file("ogbn-products", root, "train"))[:3]
    write(file("ogbn-products", root, "test"), both)
    with pytest.raises(ValueError, match=f"sales_ranking: got node {int(both.min())} twice"):
        load_ogb("ogbn-products", root)
    with pytest.raises(ValueError, match="name: got 'ogbn-pubmed', expected one of ogbn-arxiv"):
        load_ogb("ogbn-pubmed", root)


def test_a_zip_is_fetched_or_brought(
    templates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("arxiv", "products"):
        shutil.copytree(templates / f"ogbn_{name}", tmp_path / "server" / name)
        shutil.make_archive(str(tmp_path / "server" / name), "zip", tmp_path / "server", name)
    monkeypatch.setattr(
        utils, "download_url", lambda _, to, name, __: shutil.copy(tmp_path / "server" / name, to)
    )
    root = tmp_path / "new" / "data"
    (root / "ogbn_arxiv" / "raw").mkdir(parents=True)  # what a download of ogb that failed leaves
    load_ogb("ogbn-arxiv", root)
    assert f"ogbn-arxiv: downloading 80 MB to {root}" in capsys.readouterr().out
    assert sorted(root.iterdir()) == [root / "ogbn_arxiv"]
    assert_same(tensors("ogbn-arxiv", root), tensors("ogbn-arxiv", templates))
    with pytest.raises(ValueError, match=r"products.zip \(1380 MB\) .*or --allow-large-downloads"):
        load_ogb("ogbn-products", root)
    assert load_ogb("ogbn-products", root, allow_large_downloads=True).data.num_nodes == NODES
    (tmp_path / "brought").mkdir()
    archive = Path(shutil.copy(tmp_path / "server" / "arxiv.zip", tmp_path / "brought"))
    assert_same(tensors("ogbn-arxiv", tmp_path / "brought"), tensors("ogbn-arxiv", templates))
    assert archive.exists()
    with pytest.raises(FileNotFoundError, match=r"ogbn-mag: found neither .* nor .*mag.zip"):
        load_ogb("ogbn-mag", root, offline=True)


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


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-products", "ogbn-proteins", "ogbn-mag"])
def test_metrics_are_ogbs_to_the_last_digit(name: str) -> None:
    """In batches, of 1,000 random nodes."""
    generator = torch.Generator().manual_seed(0)
    tasks = 112 if name == "ogbn-proteins" else 1
    logits = torch.randn(1000, tasks if tasks > 1 else 40, generator=generator)
    y = torch.randint(2 if tasks > 1 else 40, (1000, tasks), generator=generator)
    metric, evaluator = OGBMetric(name), Evaluator(name)
    for rows in torch.arange(1000).split(300):
        metric.update(logits[rows], y[rows].float() if tasks > 1 else y[rows].view(-1))
    predicted = logits if tasks > 1 else logits.argmax(dim=1, keepdim=True)
    assert (
        metric.compute().item()
        == evaluator.eval({"y_true": y, "y_pred": predicted})[evaluator.eval_metric]
    )
