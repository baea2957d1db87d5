"""mosaic and digits: what is planted is there, draws are frozen, splits are stratified.

Images in folders.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch_geometric.utils import coalesce, contains_self_loops, is_undirected

from experiments.train.config import ImageConfig
from experiments.train.data.made import CLASSES, REGIONS
from experiments.train.data.task import Split
from experiments.train.kinds import kind_of
from experiments.train.presets import PRESETS
from tests.helpers.command import quick
from tests.helpers.made_images import write_images

MOSAIC_SUM, MOSAIC_EDGES = -33198.47108442287, 15371898316
"""Of the features, and of the sources times their position modulo 97: figures under results/
belong to this draw."""


def task_of(name: str) -> Any:
    config: Any = PRESETS[name][1]
    return kind_of(config).tasks()(0)


def test_mosaic_is_as_described() -> None:
    task = task_of("mosaic")
    (source, destination), region, y = task.graph.edge_index, task.planted, task.graph.y
    assert task.graph.x.shape == (8_000, 32)
    assert source.shape == (80_000,)
    assert torch.equal(region.bincount(), torch.full((REGIONS,), 1_000))
    assert torch.equal(region[source], region[destination])
    assert [len(rows) for rows in task.split.values()] == [4_000, 2_000, 2_000]
    assert torch.equal(torch.cat(list(task.split.values())).sort().values, torch.arange(8_000))
    same = y[source] == y[destination]
    assert same[region[destination] == 0].float().mean() == pytest.approx(
        0.85 + 0.15 / CLASSES, abs=0.02
    )
    assert same[region[destination] > 0].float().mean() < 0.2  # other permutations
    assert float(task.graph.x.double().sum()) == pytest.approx(MOSAIC_SUM, rel=1e-6)
    assert int((source * (torch.arange(80_000) % 97)).sum()) == MOSAIC_EDGES


def test_digits_graph() -> None:
    task = task_of("digits-graph")
    x, edge_index, y = task.graph.x, task.graph.edge_index, task.graph.y
    assert x.shape == (1_797, 64)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    assert edge_index.size(1) == coalesce(edge_index).size(1) == 24_680
    assert is_undirected(edge_index)
    assert not contains_self_loops(edge_index)
    assert int(edge_index[1].bincount(minlength=1_797).min()) >= 10
    for split in get_args(Split):
        share = y[task.split[split]].bincount(minlength=10) / len(task.split[split])
        torch.testing.assert_close(share, y.bincount() / len(y), atol=0.005, rtol=0)


@pytest.mark.slow
def test_digits_graph_is_the_same_with_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "from experiments.train.data.made import digits_graph; "
        "print(hash(str(digits_graph().data.edge_index.tolist())))"
    )
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    found = []
    for threads in "14":
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append(
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
        )
    assert found[0] == found[1]


def test_digits_images() -> None:
    task = kind_of(PRESETS["digits"][1]).tasks()(0)
    sizes = {
        split: sum(len(batch.target) for batch in task.loader(split, 64, None))
        for split in get_args(Split)
    }
    assert sizes == {"train": 898, "val": 449, "test": 450}
    assert task.steps(64) == 15
    images = torch.cat([batch.inputs[0] for batch in task.loader("train", 64, None)])
    assert images.shape == (898, 1, 8, 8)
    assert abs(float(images.mean())) < 1e-4
    assert float(images.std()) == pytest.approx(1, abs=1e-4)


SHAPE = "--layers 2 --patch 4 --dim 8 --vit-heads 2 --hidden 8 --experts 2"


def folder_task(root: Path, **changes: Any) -> Any:
    return kind_of(ImageConfig(dataset="images", data_root=root, **changes)).tasks()(0)


def rows(task: Any, part: Any, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    found = list(task.loader(part, 5, seed))
    return torch.cat([batch.inputs[0] for batch in found]), torch.cat(
        [batch.target for batch in found]
    )


def test_parts_do_not_overlap_and_only_training_is_augmented(tmp_path: Path) -> None:
    root = write_images(tmp_path)
    plain, changed = folder_task(root), folder_task(root, augment="standard", label_smoothing=0.3)
    seen = [
        {image.numpy().tobytes() for image in rows(plain, part)[0]}
        for part in ("train", "val", "test")
    ]
    assert [len(part) for part in seen] == [21, 3, 9]
    assert len(set.union(*seen)) == 33
    for part in ("val", "test"):
        assert all(
            torch.equal(one, two)
            for one, two in zip(rows(plain, part), rows(changed, part), strict=True)
        )
    images = rows(changed, "train", 1)[0]
    for other in (rows(plain, "train", 1)[0], rows(changed, "train", 2)[0]):
        assert not torch.equal(images, other)
    assert changed.steps(5) == len(list(changed.loader("train", 5, 0))) == 5
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    share = nn.functional.one_hot(target, 3) * 0.7 + 0.1
    torch.testing.assert_close(
        changed.loss(logits, target), -(share * logits.log_softmax(-1)).sum(dim=1).mean()
    )


def test_kmeans_sees_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders list class by class."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("experiments.train.loop.init_centroids", lambda *call: seen.extend(call[1]))
    root = write_images(tmp_path / "data", train=30)
    args = f"{SHAPE} --router multi_centroid --kmeans-init --batch-size 24 --data-root {root}"
    quick(tmp_path / "run", *args.split(), preset="images")
    # A class is bright in one channel
    assert len(seen[0].mean(dim=(2, 3)).argmax(dim=1).unique()) == 3
