"""The metrics of graph data sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from experiments.data.graph_data import TwoClassAUROC, make_metric


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
    assert np.isnan(float(metric.compute()))
    with pytest.raises(ValueError, match="metric: got 'roc_auc' for 3 classes"):
        make_metric("roc_auc", 3)
