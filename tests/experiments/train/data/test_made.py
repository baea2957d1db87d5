"""Planted graphs: what shows a regime, and what edges say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from experiments.train.data.load import load_tasks
from experiments.train.presets import MOSAIC


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


@pytest.mark.parametrize(
    "name", ["regimes-0-8-features", "regimes-2-801-features", "regimes-2-8-colors", "regimes-2"]
)
def test_unknown_regimes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="dataset: got 'regimes-"):
        load_tasks(replace(MOSAIC, dataset=name))


def test_regimes_of_mosaic_are_mosaic() -> None:
    """8 regimes of 500 labels are as many nodes as mosaic has, which is drawn in the same way."""
    one: Any = load_tasks(replace(MOSAIC, dataset="regimes-8-500-features"))(0)
    other: Any = load_tasks(MOSAIC)(0)
    assert one.graph.x.equal(other.graph.x)
    assert len(one.split["train"]) == 4000
    assert one.planted.bincount().tolist() == [1000] * 8
