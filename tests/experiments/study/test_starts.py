"""The study of experts begun as copies: what is confirmed, ranks, and its planted graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.study.starts import (
    COLUMNS,
    CONFIRMED,
    CONTROLS,
    IN_TABLE,
    LAYER_NODE,
    TWINS,
    WEIGHED,
    confirmed,
    confirmed_table,
    is_arm,
    passes,
    ranking,
    read_confirmed,
    table,
)
from experiments.train.data.load import load_tasks
from experiments.train.presets import MOSAIC
from experiments.train.run_folder import differences_of
from experiments.train.scores import interval

RESULTS = Path(__file__).parents[3] / "results"


def test_the_best_two_and_the_arm_of_images_are_confirmed_on_seeds_that_were_not_looked_at() -> (
    None
):
    found = confirmed((), Path("data"))
    on_graphs = {name for name in found if not name.startswith("digits/")}
    of_nodes, of_patches = TWINS
    assert {name.partition("/")[2] for name in on_graphs} == {*CONTROLS, *CONFIRMED, of_nodes}
    assert len(found) == 7 * (3 + 3 + 1) + (3 + 1 + 1)
    assert {config.seeds for config in found.values()} == {tuple(range(3, 13))}
    once: Any = found["cora/difference-once-node-constant-unbalanced"]
    assert (once.start, once.shared_router, once.router) == ("copies", True, "token_choice")
    # Images have a router in each layer, and a patch has no neighbors.
    assert found[f"digits/{LAYER_NODE}"].start == "copies"
    assert found["digits/shared"].start == "shared"
    assert found["mosaic/dense-flops"].equal == "flops"
    with pytest.raises(ValueError, match=r"^columns: got sea, expected some of digits-graph, cora"):
        confirmed(["sea"], Path("data"))
    # A random twin differs from its arm in the router alone.
    for column, twin in (("cora", of_nodes), ("digits", of_patches)):
        arm = found[f"{column}/{TWINS[twin]}"]
        assert found[f"{column}/{twin}"] == replace(arm, router="random")


def test_arms_and_their_variants_are_ranked_and_controls_and_random_twins_are_not() -> None:
    assert is_arm("pooled-once-node-quiet")
    assert is_arm("difference-once-neighbors-constant-top2")
    for other in ("dense-difference", "dense-lr2", "shared", "copies-layer-node-random"):
        assert not is_arm(other)


def validated(value: float) -> dict[str, Any]:
    """The summary of two seeds of a score."""
    return {"metric": "accuracy", "val": {"values": [value, value], "mean": value}}


def test_arms_are_ranked_by_their_mean_gain_in_validation_over_the_weighed_columns() -> None:
    results = {
        column: {
            "copies-layer-node-quiet": validated(0.8),
            "dense": validated(0.4),
            "difference-once-node-quiet": validated(0.7),
            "pooled-layer-node-quiet": validated(0.5),
            "pooled-layer-node-random": validated(0.9),
        }
        for column in WEIGHED
    }
    results["mosaic"]["copies-layer-node-quiet"] = validated(0.9)
    # Is not weighed
    results["digits"] = {"dense": validated(0.4), "copies-layer-node-quiet": validated(0.0)}
    del results["cora"]["pooled-layer-node-quiet"]  # so that this arm is not ranked
    ranked = ranking(results)
    assert [name for name, _ in ranked] == ["copies-layer-node-quiet", "difference-once-node-quiet"]
    assert [mean for _, mean in ranked] == pytest.approx([42.0, 30.0])
    head, _, best, *_ = table(results).splitlines()
    assert head.startswith("| validation − dense (points) | mean | digits-graph | cora | mosaic |")
    assert best.startswith("| copies-layer-node-quiet | +42.00 | +40.00 | +40.00 | +50.00 |")
    assert "| dense | – | 40.00 | 40.00 | 40.00 |" in table(results)
    assert "| pooled-layer-node-quiet | – | +10.00 | – | +10.00 |" in table(results)
    assert table({}) == "no arm is finished yet"


def test_an_arm_passes_unless_it_is_surely_worse() -> None:
    def run(values: list[float]) -> dict[str, Any]:
        test = {"values": values, "mean": sum(values) / len(values)}
        return {"metric": "accuracy", "test": test, "flops": 100}

    dense = [0.80, 0.81, 0.82, 0.83]
    known = {
        "worse": run([value - 0.01 for value in dense]),
        "dense": run(dense),
        "dense-flops": run(dense),
        "shared": run([value - 0.002 for value in dense]),  # .2 points below, always
        "unsure": run(
            [
                value + change
                for value, change in zip(dense, (0.02, -0.05, 0.01, -0.04), strict=True)
            ]
        ),
    }
    assert [passes(known, name) for name in ("shared", "worse", "unsure")] == [True, False, True]
    # Mean 2, standard error 1 / sqrt(3), t of two degrees 4.3027
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    _, _, first, _, _, worse, _ = confirmed_table({"cora": known}).splitlines()
    assert first == "| cora | dense | 81.50 | 1.00 × | – | – | – |"
    assert worse.startswith("| cora | worse | 80.50 | 1.00 × | -1.00 (-1.00 to -1.00) |")


def test_long_columns_are_confirmed_by_the_table_of_routers(tmp_path: Path) -> None:
    table_of_routers = tmp_path / "routers" / "cifar10"
    table_of_routers.mkdir(parents=True)
    for cell in list(IN_TABLE.values())[:-1]:
        (table_of_routers / f"{cell}.json").write_text("{}")
    assert read_confirmed(tmp_path / "starts-confirmed") == {}
    (table_of_routers / "copies.json").write_text("{}")
    assert set(read_confirmed(tmp_path / "starts-confirmed")["cifar10"]) == set(IN_TABLE)


@pytest.mark.parametrize("column", COLUMNS)
def test_finished_runs_are_of_the_configurations_that_would_run_again(column: str) -> None:
    known = read_confirmed(RESULTS / "starts-confirmed").get(column, {})
    for name, config in confirmed([column], Path("data")).items():
        summary = known.get(name.partition("/")[2])
        if summary is not None:
            differences = differences_of(config, summary["config"])
            assert set(differences) <= {"digest"}, name  # of data that are not here


def test_edges_of_a_concept_graph_say_nothing_and_the_rule_of_the_regime_does() -> None:
    task = load_tasks(replace(MOSAIC, dataset="concept-8-512-features"))(0)
    data: Any = task.graph
    planted: Any = task.planted
    source, destination = data.edge_index
    assert data.x.shape == (8_000, 24)
    assert planted.bincount().tolist() == [1_000] * 8
    same_class = (data.y[source] == data.y[destination]).float().mean()
    chance = (data.y.bincount() / 8_000).square().sum()
    assert abs(same_class - chance) < 0.01
    same_regime = (planted[source] == planted[destination]).float().mean()
    assert abs(same_regime - 1 / 8) < 0.01
    plain: Any = load_tasks(replace(MOSAIC, dataset="concept-8-512-nothing"))(0).graph
    assert torch.equal(plain.x, data.x[:, :16])


@pytest.mark.parametrize(("shown", "agree"), [("communities", 0.03), ("patches", 0.12)])
def test_regimes_of_a_concept_graph_are_places_and_edges_say_little_of_the_class(
    shown: str, agree: float
) -> None:
    """Sources come from the node's regime more often than not, and nearly from any class.

    The last is so within a regime, since regimes differ in which classes are frequent. Not quite: a
    source's features are in its own label and in its target's, and neighbors in the plane hear
    mostly the same nodes.
    """
    task = load_tasks(replace(MOSAIC, dataset=f"concept-4-512-{shown}"))(0)
    data: Any = task.graph
    planted: Any = task.planted
    source, target = data.edge_index
    assert (planted[source] == planted[target]).float().mean() > 0.6
    for regime in range(4):
        inside = (planted[source] == regime) & (planted[target] == regime)
        pairs = torch.stack([data.y[source[inside]], data.y[target[inside]]])
        chance = sum(
            float((pairs[0] == one).float().mean() * (pairs[1] == one).float().mean())
            for one in range(8)
        )
        assert abs(float((pairs[0] == pairs[1]).float().mean()) - chance) < agree


def test_a_told_concept_graph_is_the_same_with_the_regime_as_columns() -> None:
    name = "concept-4-512-patches"
    one, told = (load_tasks(replace(MOSAIC, dataset=each))(0) for each in (name, f"{name}-told"))
    data: Any = one.graph
    more: Any = told.graph
    planted: Any = one.planted
    assert torch.equal(data.edge_index, more.edge_index)
    assert torch.equal(data.x, more.x[:, :16])
    assert torch.equal(more.x[:, 16:].argmax(1), planted)
    assert torch.equal(data.y, more.y)


@pytest.mark.parametrize(
    "name", ["concept-0-8-features", "concept-2-801-features", "concept-2-8-colors", "concept-2"]
)
def test_an_unknown_concept_graph_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^dataset: got 'concept-"):
        load_tasks(replace(MOSAIC, dataset=name))(0)
