"""OGB's metric: equal to one worked by hand, batch by batch and over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.data.ogb_import import Evaluator
from experiments.data.ogb_metric import OGBMetric

TASKS = 112


def roc_auc(score: Tensor, target: Tensor) -> float:
    """The share of (positive, negative) pairs in the right order; ties count half. Mean over the tasks with both."""
    values = []
    for s, t in zip(score.double().T, target.T, strict=True):
        positive, negative = s[t == 1], s[t == 0]
        if len(positive) and len(negative):
            difference = positive[:, None] - negative[None, :]
            values.append(float(((difference > 0).double() + 0.5 * (difference == 0)).mean()))
    return sum(values) / len(values)


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 9.0], [1.0, 3.0, 2.0], [5.0, 4.0, 4.0]])
    metric = OGBMetric("ogbn-arxiv")
    metric.update(logits, torch.tensor([0, 2, 2, 1]))
    assert float(metric.compute()) == 0.5
    metric.update(logits[:1], torch.tensor([[0]]))
    assert float(metric.compute()) == pytest.approx(3 / 5)
    metric.reset()
    metric.update(logits[:2], torch.tensor([0, 2]))
    assert float(metric.compute()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_roc_auc_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    target = (torch.rand(60, TASKS) < 0.3).float()
    target[:, 7] = 0  # ogb leaves this task out
    logits = (torch.randn(60, TASKS) + target).to(dtype)
    metric = OGBMetric("ogbn-proteins")
    for rows in torch.arange(60).split(17):
        metric.update(logits[rows], target[rows])
    assert float(metric.compute()) == pytest.approx(roc_auc(logits, target), abs=1e-6)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-products", "ogbn-mag"])
def test_equals_ogb(name: str) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(500, 30), torch.randint(30, (500,))
    metric = OGBMetric(name)
    metric.update(logits, target)
    expected = Evaluator(name).eval({"y_true": target[:, None], "y_pred": logits.argmax(dim=1, keepdim=True)})["acc"]
    assert 0 < expected < 0.1
    assert float(metric.compute()) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-proteins"])
def test_over_processes(name: str) -> None:
    """Two processes with unequal shares, whose gathering is played; the ROC-AUC is not the mean of the two."""
    torch.manual_seed(0)
    logits, target = torch.randn(90, TASKS), (torch.rand(90, TASKS) < 0.3).float()
    target = target if name == "ogbn-proteins" else torch.randint(TASKS, (90,))
    whole, there = OGBMetric(name), OGBMetric(name)
    whole.update(logits, target)
    there.update(logits[50:], target[50:])
    states: list[Tensor] = [*there.prediction, *there.target]

    def gather(tensor: Tensor, group: Any = None) -> Sequence[Tensor]:
        return [tensor, states.pop(0)]

    here = OGBMetric(name, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    here.update(logits[:30], target[:30])
    here.update(logits[30:50], target[30:50])
    assert float(here.compute()) == float(whole.compute())
    assert states == []
    there_alone = float(there.compute())
    assert there_alone != float(whole.compute())


def test_declarations() -> None:
    assert OGBMetric("ogbn-arxiv").higher_is_better
    assert OGBMetric("ogbn-arxiv").metric_name == "acc"
    assert OGBMetric("ogbn-proteins").metric_name == "rocauc"


@pytest.mark.parametrize(
    ("name", "logits", "target", "message"),
    [
        ("ogbn-arxiv", (5, 40), (4,), r"logits: got \(5, 40\) for a target of \(4, 1\), expected \(n, classes\)"),
        ("ogbn-arxiv", (5,), (5,), r"logits: got \(5,\) for a target"),
        ("ogbn-proteins", (5, 40), (5, 40), r"expected \(n, 112\)"),
        ("ogbn-proteins", (5, 112), (5,), r"for a target of \(5,\), expected \(n, 112\)"),
    ],
)
def test_shapes_that_do_not_fit(name: str, logits: tuple[int, ...], target: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OGBMetric(name).update(torch.zeros(logits), torch.zeros(target))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="Invalid dataset name ogbn-pubmed"):
        OGBMetric("ogbn-pubmed")
