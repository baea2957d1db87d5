"""Small models begin as a linear one, and their differences come with an honest interval."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from experiments.study.probes import Dense, Linear, Mixture, clustered, fit, gain, score
from experiments.train.data.task import Splits


def drawn(nodes: int = 400, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, Splits]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(nodes, width, generator=draw)
    y = (x @ torch.randn(width, 3, generator=draw)).argmax(1)
    train, val, test = torch.randperm(nodes, generator=draw).split(
        [nodes // 2, nodes // 4, nodes - nodes // 2 - nodes // 4]
    )
    return x, y, {"train": train, "val": val, "test": test}


def test_all_models_begin_as_the_linear_one() -> None:
    x, y, rows = drawn()
    base = Linear(5, 3)
    fit(base, [x], y, rows, rate=0.03, decay=1e-3)
    wide, view = torch.cat([x, torch.randn(400, 2)], dim=1), torch.randn(400, 4)
    with torch.no_grad():
        expected = base(x)
        assert Linear(7, 3, base)(wide).allclose(expected, atol=1e-6)
        assert Dense(base, x.size(1), 8)(x).allclose(expected, atol=1e-6)
        mixture = Mixture(base, 5, clustered(view, 3))
        assert mixture(x, x, view).allclose(expected, atol=1e-6)
        assert mixture(x, x, view).exp().sum(1).allclose(torch.ones(400))


def test_what_does_not_help_changes_nothing() -> None:
    """Validation takes the first step where all others are worse."""
    x, y, rows = drawn()
    rows["val"], y = rows["train"][:50], y.clone()
    y[rows["train"][50:]] = (y[rows["train"][50:]] + 1) % 3  # what is learned is wrong
    base = Linear(5, 3)
    base.layer.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y[rows["val"]] = base(x[rows["val"]]).argmax(1)
    model = Linear(5, 3, base)
    rows["train"] = rows["train"][50:]
    fit(model, [x], y, rows, rate=0.03, decay=0.0)
    assert model.layer.weight.equal(base.layer.weight)


def test_a_gate_begins_as_clusters_of_the_view() -> None:
    view = torch.randn(300, 2) * 0.1 + torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]]).repeat(
        100, 1
    )
    with torch.no_grad():
        gate = clustered(view, 3)(view).softmax(1)
    assert gate.max(dim=1).values.min() > 0.99
    assert len({tuple(row.argmax(1).tolist()) for row in gate.view(100, 3, 3)}) == 1


def test_the_area_is_torchmetrics_and_influences_sum_to_zero() -> None:
    logits = torch.randint(6, (200, 2)).float()  # with ties
    y = (torch.rand(200) < 0.3).long()
    area, influence = score("roc_auc", logits, y)
    expected = binary_auroc((logits[:, 1] - logits[:, 0]).sigmoid(), y)
    assert area == pytest.approx(100 * float(expected), abs=1e-3)
    assert float(influence.sum()) == pytest.approx(0, abs=1e-9)
    right, shares = score("accuracy", logits, y)
    assert right == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))
    assert float(shares.sum()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", ["accuracy", "roc_auc"])
def test_the_interval_covers_a_difference_that_is_not_there(metric: str) -> None:
    """Two models of the same quality, the same test nodes in all splits: 95 of 100, or more."""
    covered = 0
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        y = (torch.rand(300, generator=draw) < 0.5).long()
        splits: list[Splits] = [{"test": torch.arange(300)}] * 5
        signal = torch.stack([-y.float(), y.float()], dim=1)
        ours, theirs = (signal + 2 * torch.randn(300, 2, generator=draw) for _ in range(2))
        found = gain(metric, [ours] * 5, [theirs] * 5, y, splits, "test")
        covered += found.low <= 0 <= found.high
    assert covered >= 93
