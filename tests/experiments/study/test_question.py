"""Whether rules differ, on small planted graphs of which the answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.study import question
from experiments.study.question import ask, features, neighbor_mean, positions
from experiments.train.data.task import Task
from experiments.train.kinds import kind_of
from experiments.train.presets import DIGITS_GRAPH, MOSAIC

COUNT = 500


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are enough to find what is planted."""
    monkeypatch.setattr(question, "STEPS", 40)


def task_of(x: np.ndarray, edges: np.ndarray, y: np.ndarray) -> Task:
    """Nodes of two classes, of which a fifth is tested."""
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split(len(x) // 5)
    given: Any = kind_of(DIGITS_GRAPH).tasks()(0)
    data = given.graph.__class__(
        x=torch.from_numpy(x).float(), edge_index=torch.from_numpy(edges), y=torch.from_numpy(y)
    )
    split = {"train": torch.cat(part[:3]), "val": part[3], "test": part[4]}
    return replace(given, name="made", graph=data, split=split, num_classes=10)


def two_communities(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, edges of which 19 in 20 stay in a community, and that community."""
    community = np.arange(COUNT) % 2
    source = draw.integers(COUNT, size=8 * COUNT)
    crosses = draw.random(len(source)) < 0.05
    target = 2 * draw.integers(COUNT // 2, size=len(source)) + (community[source] ^ crosses)
    return draw.standard_normal((COUNT, 6)), np.stack([source, target]), community


def test_rules_of_communities_differ_by_the_place_in_the_graph() -> None:
    """The sign of a feature says the class in one community, and the opposite in the other.

    Each rule has half of the nodes to learn from, however many experts there are.
    """
    x, edges, community = two_communities(np.random.default_rng(0))
    y = ((x[:, 0] > 0) ^ (community == 1)).astype(np.int64)
    answer = ask(task_of(x, edges, y), 8)
    assert answer.differ
    assert answer.groups == 2
    assert answer.view == "positions"
    assert answer.lines()[0] == "yes: rules differ, by their place in the graph"
    agrees = (answer.expert == community).mean()
    assert max(agrees, 1 - agrees) > 0.9
    assert answer.gains["one"].low > 10


def test_one_rule_for_all_is_a_no() -> None:
    """Communities that only shift the class are no rules of their own: one rule is told them."""
    draw = np.random.default_rng(1)
    x, edges, community = two_communities(draw)
    y = (x[:, 0] + 2 * community + 0.3 * draw.standard_normal(COUNT) > 1).astype(np.int64)
    answer = ask(task_of(x, edges, y), 2)
    assert not answer.differ
    assert answer.lines()[0] == "no: rules do not surely differ"


def test_labels_that_nothing_tells_are_a_no() -> None:
    draw = np.random.default_rng(2)
    x, edges, _ = two_communities(draw)
    assert not ask(task_of(x, edges, draw.integers(2, size=COUNT)), 4).differ


def test_test_nodes_are_not_read_and_labels_make_no_groups() -> None:
    x, edges, community = two_communities(np.random.default_rng(3))
    y = ((x[:, 0] > 0) ^ (community == 1)).astype(np.int64)
    task = task_of(x, edges, y)
    first = ask(task, 2)
    assert task.split is not None
    y[task.split["test"].numpy()] = 9
    assert ask(task_of(x, edges, y), 2).gains == first.gains
    assert (ask(task_of(x, edges, 1 - y.clip(0, 1)), 2).expert == first.expert).all()


def test_the_mean_is_that_of_sources() -> None:
    mean = neighbor_mean(np.array([[0, 1, 2], [2, 2, 0]]), 3)
    assert mean.toarray().tolist() == [[0, 0, 1], [0, 0, 0], [0.5, 0.5, 0]]


def test_nodes_of_small_components_have_no_place() -> None:
    ring = np.arange(300)
    edges = np.concatenate([np.stack([ring, (ring + 1) % 300]), np.array([[300], [301]])], axis=1)
    rows = positions(neighbor_mean(edges, 302))
    assert np.linalg.norm(rows[:300], axis=1) == pytest.approx(1, abs=1e-3)
    assert not rows[300:].any()
    assert rows[0] @ rows[1] > rows[0] @ rows[150]


def test_features_have_one_scale_and_constants_go() -> None:
    draw = np.random.default_rng(4)
    x = draw.standard_normal((500, 3)) * [1, 100, 0] + 5
    assert features(x).std(axis=0) == pytest.approx([1, 1], abs=1e-3)
    assert features(np.ones((500, 2))).shape == (500, 1)
    assert features(draw.standard_normal((500, 200))).shape == (500, question.WIDEST)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FEWEST", 10_000, "mosaic: got .* nodes to train and validate, expected at least 10000"),
        ("MOST_NODES", 100, "mosaic: got 8,000 nodes, expected 100"),
    ],
)
def test_graphs_that_the_question_does_not_fit(
    name: str, value: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(question, name, value)
    with pytest.raises(ValueError, match=message):
        ask(kind_of(MOSAIC).tasks()(0), 8)


def test_several_labels_a_node_are_refused() -> None:
    task: Any = kind_of(MOSAIC).tasks()(0)
    task.graph.y = task.graph.y[:, None].expand(-1, 3)
    with pytest.raises(ValueError, match="mosaic: got 3 labels a node, expected one class a node"):
        ask(task, 8)
