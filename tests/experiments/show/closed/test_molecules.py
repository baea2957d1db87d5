"""The study of molecules: what its table says."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.show.closed.molecules import gains, table


def summary(metric: str, *scores: float, flops: int = 10) -> dict[str, Any]:
    mean = sum(scores) / len(scores)
    test = {"values": scores, "mean": mean, "std": 0.01, "n": len(scores)}
    return {"metric": metric, "test": test, "flops": flops, "parameters": 1234}


def test_gains_are_points_or_the_decrease_of_an_error() -> None:
    scores = {
        "default": summary("roc_auc", 0.8, 0.7),
        "dense-flops": summary("roc_auc", 0.7, 0.75),
        "gmoe": summary("roc_auc", 0.5, 0.5),
        "gmoe-flops": summary("roc_auc", 0.4, 0.4),
    }
    assert gains(scores, "default") == pytest.approx([10, -5])
    assert gains(scores, "gmoe") == pytest.approx([10, 10])
    errors = {"default": summary("rmse", 0.8), "dense-flops": summary("rmse", 1.0)}
    assert gains(errors, "default") == pytest.approx([0.2])
    errors["dense"] = summary("rmse", 1.0, flops=5)
    _, _, dense, _, default = table({"molesol": errors}).splitlines()
    assert default == (
        "| molesol | experts, the default | rmse | 1 | 0.8000 ± 0.0100 | +0.2000 | 2.00 | 1,234 |"
    )
    assert dense.startswith("| molesol | dense | rmse | 1 | 1.0000 ± 0.0100 | – | 1.00 |")
    assert table({}) == "no arm is finished yet"
