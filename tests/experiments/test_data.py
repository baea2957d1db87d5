"""mosaic and digits: what is planted is there, splits are fixed and stratified; the area under the ROC curve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor

from experiments.data import Split, Task, load_tasks
from experiments.data.graph_data import TwoClassAUROC
from experiments.data.mosaic import CLASSES, REGIONS
from experiments.presets import PRESETS

MOSAIC_SUM, MOSAIC_EDGES = -33198.47108442287, 15371898316
"""Of the features, and of the sources times their position modulo 97: figures under results/ belong to this draw."""


def task_of(name: str) -> Task:
    config: Any = PRESETS[name][1]
    return load_tasks(replace(config, adjacency="edge_index"))(0)


def rows(task: Task, split: Split) -> tuple[Tensor, Tensor]:
    (batch,) = task.loader(split, 1, None)
    assert isinstance(batch.rows, Tensor)
    return batch.rows, batch.target


def labels(task: Task) -> Tensor:
    parts = [rows(task, split) for split in get_args(Split)]
    y = torch.empty(sum(len(index) for index, _ in parts), dtype=torch.long)
    for index, target in parts:
        y[index] = target
    return y


def test_mosaic_is_as_described() -> None:
    task = task_of("mosaic")
    x, (source, destination) = next(iter(task.loader("train", 1, None))).inputs
    region, y = task.planted, labels(task)
    assert region is not None
    assert x.shape == (8_000, 32)
    assert source.shape == (80_000,)
    assert torch.equal(region.bincount(), torch.full((REGIONS,), 1_000))
    assert torch.equal(region[source], region[destination])
    assert [len(rows(task, split)[0]) for split in get_args(Split)] == [4_000, 2_000, 2_000]
    seen = torch.cat([rows(task, split)[0] for split in get_args(Split)])
    assert torch.equal(seen.sort().values, torch.arange(8_000))
    permutations = []
    for r in range(REGIONS):
        inside = region[destination] == r
        count = torch.zeros(CLASSES, CLASSES).index_put(
            (y[destination[inside]], y[source[inside]]), torch.ones(int(inside.sum())), accumulate=True
        )
        share = count / count.sum(dim=1, keepdim=True)
        assert share.max(dim=1).values.mean() == pytest.approx(0.85 + 0.15 / CLASSES, abs=0.02)
        permutations.append(share.argmax(dim=1))
        assert torch.equal(permutations[-1].sort().values, torch.arange(CLASSES))
    assert torch.equal(permutations[0], torch.arange(CLASSES))
    assert len({tuple(p.tolist()) for p in permutations}) == REGIONS


def test_mosaic_is_frozen() -> None:
    x, edge_index = next(iter(task_of("mosaic").loader("train", 1, None))).inputs
    again, edges_again = next(iter(task_of("mosaic").loader("train", 1, None))).inputs
    assert torch.equal(x, again)
    assert torch.equal(edge_index, edges_again)
    assert float(x.double().sum()) == pytest.approx(MOSAIC_SUM, rel=1e-6)
    assert int((edge_index[0] * (torch.arange(80_000) % 97)).sum()) == MOSAIC_EDGES


def test_digits_graph() -> None:
    task = task_of("digits-graph")
    x, edge_index = next(iter(task.loader("train", 1, None))).inputs
    assert x.shape == (1_797, 64)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    pairs = set(map(tuple, edge_index.T.tolist()))
    assert all((destination, source) in pairs for source, destination in pairs)
    assert int(edge_index[1].bincount(minlength=1_797).min()) >= 10
    assert all(source != destination for source, destination in pairs)
    y = labels(task)
    for split in get_args(Split):
        share = y[rows(task, split)[0]].bincount(minlength=10) / len(rows(task, split)[0])
        torch.testing.assert_close(share, y.bincount() / len(y), atol=0.005, rtol=0)


def test_digits_images() -> None:
    task = load_tasks(PRESETS["digits"][1])(0)
    sizes = {split: sum(len(batch.target) for batch in task.loader(split, 64, None)) for split in get_args(Split)}
    assert sizes == {"train": 898, "val": 449, "test": 450}
    first, second, other = (next(iter(task.loader("train", 64, seed))).inputs[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (64, 1, 8, 8)
    images = torch.cat([batch.inputs[0] for batch in task.loader("train", 64, None)])
    assert abs(float(images.mean())) < 1e-4
    assert float(images.std()) == pytest.approx(1, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.floats(-1e3, 1e3, width=32), st.sampled_from([-60.0, 0.0, 0.25, 50.0, 2e4])),
        min_size=4,
        max_size=40,
    ),
    st.integers(1, 39),
)
def test_roc_auc_is_exact(rows: list[tuple[int, float, float]], cut: int) -> None:
    target = torch.tensor([0, 1, *(label for label, _, _ in rows)])
    logits = torch.tensor([[0.0, 0.5], [0.5, 0.0], *([low, high] for _, low, high in rows)])
    metric = TwoClassAUROC()
    for part in (slice(0, cut), slice(cut, None)):
        if len(target[part]):
            metric.update(logits[part], target[part])
    score = logits.double()[:, 1] - logits.double()[:, 0]
    assert float(metric.compute()) == pytest.approx(roc_auc_score(target, score), abs=1e-6)


def test_roc_auc_where_probabilities_round_to_one() -> None:
    metric = TwoClassAUROC()
    metric.update(torch.tensor([[0.0, 100.0], [0.0, 101.0], [0.0, 102.0], [0.0, 103.0]]), torch.tensor([0, 1, 0, 1]))
    assert float(metric.compute()) == 0.75
    metric.reset()
    metric.update(torch.tensor([[0.0, 0.5], [0.0, torch.nan]]), torch.tensor([0, 1]))
    assert metric.compute().isnan()
