"""Graphs on which nothing was chosen: what is run, and what the rule says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.study.starts import read_results
from experiments.study.unseen import ARMS, COLUMNS, runs, table, verdict
from experiments.train.presets import GRAPH
from experiments.train.run_folder import differences_of

RESULTS = Path(__file__).parents[3] / "results"


def summary(flops: int, *scores: float) -> dict[str, Any]:
    std = 0.01
    part = {"mean": sum(scores) / len(scores), "std": std, "n": len(scores), "values": [*scores]}
    return {"metric": "accuracy", "flops": flops, "test": part, "val": part}


def test_every_arm_is_the_recipe_for_your_own_graph_on_all_ten_splits() -> None:
    found = runs((), Path("data"))
    assert {*found} == {f"{column}/{arm}" for column in COLUMNS for arm in ARMS}
    assert {config.seeds for config in found.values()} == {tuple(range(10))}
    file, ten = Path("data/chameleon_filtered.npz"), tuple(range(10))
    recipe = replace(GRAPH, hidden=16, eval_every=5, seeds=ten, data_root=file)
    assert found["chameleon/experts"] == recipe
    assert found["chameleon/dense"] == replace(recipe, router="dense")
    assert found["tolokers/dense-flops"].equal == "flops"
    assert found["tolokers/random"].metric == "roc_auc"
    with pytest.raises(ValueError, match=r"^columns: got 'sea', expected .*chameleon"):
        runs(["sea"], Path("data"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1.1, 0.9], "gain"),
        ([0.20, 0.21, 0.19], "not told apart"),  # surely above 0, but too small to be a gain
        ([5.0, -4.0, 2.0], "not told apart"),
        ([-0.10, -0.11, -0.09], "loss"),
        ([-5.0, 4.0, -2.0], "not told apart"),
    ],
)
def test_the_rule_names_a_gain_and_a_loss(values: list[float], expected: str) -> None:
    assert verdict(values) == expected


def test_the_table_has_a_line_an_arm_and_the_verdict_beside_the_experts() -> None:
    results = {
        "chameleon": {
            "dense": summary(100, 0.40, 0.42, 0.44),
            "experts": summary(110, 0.38, 0.40, 0.43),
            "random": summary(110, 0.40, 0.41, 0.43),
        },
        "tolokers": {"experts": summary(110, 0.38, 0.40)},  # its dense model is not finished
    }
    _, _, dense, experts, random = table(results).splitlines()
    assert dense == "| chameleon | dense | accuracy | 42.00 ± 1.00 | 3 | 1.00 | – | – | – | – | – |"
    beside = "-1.67 (-3.10 to -0.23)"
    assert experts == (
        "| chameleon | experts, the default | accuracy | 40.33 ± 1.00 | 3 | 1.10 | "
        f"{beside} | 0 of 3 | {beside} | – | loss |"
    )
    assert random.endswith("| 0 of 3 | -0.67 (-2.10 to +0.77) | -1.00 (-3.48 to +1.48) | – |")
    assert table({}) == "no arm is finished yet"


@pytest.mark.parametrize("column", COLUMNS)
def test_finished_runs_are_of_the_configurations_that_would_run_again(column: str) -> None:
    known = read_results(RESULTS / "unseen", tuple(COLUMNS)).get(column, {})
    for arm, summary in known.items():
        differences = differences_of(
            runs([column], Path("data"))[f"{column}/{arm}"], summary["config"]
        )
        assert set(differences) <= {"digest"}, arm  # of data that are not here
