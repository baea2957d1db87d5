"""What the data want, on small planted graphs of which the answer is known."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.study import questions
from experiments.study.questions import Answer, Nodes, Survey, features, nodes_of, redrawn
from experiments.study.worth import Gain
from experiments.train.data.task import Splits
from experiments.train.presets import DIGITS_GRAPH

COUNT, WIDTH, CLASSES = 1_600, 6, 4


def nodes(x: np.ndarray, edges: np.ndarray, y: np.ndarray, seed: int, **options: Any) -> Nodes:
    """Half of the nodes train, and a quarter each validates and tests."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, val, test = order.split([len(x) // 2, len(x) // 4, len(x) // 4])
    label = torch.from_numpy(y).long()
    splits = redrawn([{"train": train, "val": val, "test": test}] * questions.SPLITS, label)
    return Nodes(x.astype(np.float32), edges, label, splits, int(label.max()) + 1, **options)


def mean_of_sources(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    total = np.zeros_like(x)
    np.add.at(total, edges[1], x[edges[0]])
    return total / np.maximum(np.bincount(edges[1], minlength=len(x)), 1)[:, None]


def several_rules(draw: np.random.Generator, inside: float) -> Nodes:
    """Two regimes, each with a rule that turns what neighbors say into a label.

    A share ``inside`` of the edges stays in a regime; where it is a half, nothing tells the regime.
    """
    regime = np.arange(COUNT) % 2
    target = draw.integers(COUNT, size=8 * COUNT)
    is_inside = draw.uniform(size=8 * COUNT) < inside
    own = np.where(is_inside, regime[target], 1 - regime[target])
    edges = np.stack([2 * draw.integers(COUNT // 2, size=8 * COUNT) + own, target])
    x = draw.standard_normal((COUNT, WIDTH))
    rules = draw.standard_normal((2, WIDTH, CLASSES))
    near = 3 * mean_of_sources(x, edges)
    y = np.einsum("nf,nfc->nc", near, rules[regime]).argmax(axis=1)
    return nodes(x, edges, y, seed=0)


def labels_of_small_groups(draw: np.random.Generator) -> Nodes:
    """A hundred groups of one class each; features say nothing."""
    group = np.arange(COUNT) % 100
    target = draw.integers(COUNT, size=6 * COUNT)
    source = 100 * draw.integers(COUNT // 100, size=6 * COUNT) + group[target]
    y = draw.integers(CLASSES, size=100)[group]
    both = np.hstack([np.stack([source, target]), np.stack([target, source])])
    return nodes(draw.standard_normal((COUNT, WIDTH)), both, y, seed=1)


def class_of_those_with_a_common_target(draw: np.random.Generator) -> Nodes:
    """Noisy features, and edges from nodes of one class to a random target."""
    y = draw.integers(CLASSES, size=COUNT)
    x = np.eye(CLASSES)[y] + draw.standard_normal((COUNT, CLASSES))
    target = draw.integers(COUNT, size=6 * COUNT)
    wanted = draw.integers(CLASSES, size=COUNT)[target]
    members = [np.flatnonzero(y == one) for one in range(CLASSES)]
    source = np.array([draw.choice(members[one]) for one in wanted])
    return nodes(x, np.stack([source, target]), y, seed=2)


def ancestors_of_three_steps(draw: np.random.Generator) -> Nodes:
    """Each node hears one other; its label is what was said three steps before."""
    source = draw.integers(COUNT, size=COUNT)
    x = draw.standard_normal((COUNT, CLASSES))
    y = x[source[source[source]]].argmax(axis=1)
    return nodes(x, np.stack([source, np.arange(COUNT)]), y, seed=3)


def bent_rule(draw: np.random.Generator, count: int = COUNT) -> Nodes:
    """The signs of two pairs of features agree, or not: one hidden unit cannot tell."""
    edges = draw.integers(count, size=(2, 4 * count))
    x = draw.standard_normal((count, 3))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    return nodes(x, edges, y, seed=4, hidden=1)


def bent_rule_among_columns(draw: np.random.Generator) -> Nodes:
    """The same among twelve features; eight straight rules come closer than a layer on all."""
    edges = draw.integers(4_000, size=(2, 8_000))
    x = draw.standard_normal((4_000, 12))
    return nodes(x, edges, (x[:, 0] * x[:, 1] > 0).astype(int), seed=5, hidden=64)


def of_degree(draw: np.random.Generator, is_bent: bool) -> Nodes:
    """How many neighbors a node has says it all: whether they are many, or neither many nor few."""
    share = draw.pareto(1.5, 4_000) + 0.3
    source, target = draw.choice(4_000, (2, 16_000), p=share / share.sum())
    pairs = np.stack([source, target])[:, source != target]
    edges = np.unique(np.hstack([pairs, pairs[::-1]]), axis=1)
    degree = np.bincount(edges[1], minlength=4_000)
    few, half, many = np.quantile(degree, [0.3, 0.5, 0.75])
    y = (few < degree) & (degree <= many) if is_bent else degree > half
    return nodes(draw.standard_normal((4_000, 12)), edges, y.astype(int), seed=6, hidden=16)


def of_many_neighbors(draw: np.random.Generator) -> Nodes:
    """A rule that is straight in the degree."""
    return of_degree(draw, is_bent=False)


def of_a_band_of_degrees(draw: np.random.Generator) -> Nodes:
    """One rule that is bent in the degree: experts by degree look like several."""
    return of_degree(draw, is_bent=True)


def in_places(draw: np.random.Generator) -> Nodes:
    """Regimes that are places: most edges stay inside."""
    return several_rules(draw, 0.95)


def hidden(draw: np.random.Generator) -> Nodes:
    """Regimes that show in nothing."""
    return several_rules(draw, 0.5)


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as tell what is plain."""
    monkeypatch.setattr(questions, "SPLITS", 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind", "choices"),
    [
        pytest.param(in_places, "rules", {"positions", "evidence"}, id="regimes"),
    ],
)
def test_what_is_plain_is_answered(
    make: Callable[[np.random.Generator], Nodes],
    kind: str,
    choices: set[str | None],
    few_splits: None,
) -> None:
    assert_answers(make, kind, choices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "kind", "choices"),
    [
        pytest.param(in_places, "rules", {"positions", "evidence"}, id="regimes"),
        pytest.param(hidden, "nothing", {None}, id="hidden-regimes"),
        pytest.param(labels_of_small_groups, "inputs", {"labels"}, id="labels"),
        pytest.param(
            class_of_those_with_a_common_target, "inputs", {"reverse"}, id="reverse-edges"
        ),
        pytest.param(ancestors_of_three_steps, "inputs", {"walked"}, id="walked"),
        pytest.param(bent_rule, "width", {None}, id="width"),
        pytest.param(bent_rule_among_columns, "width", {None}, id="bent"),
        pytest.param(of_many_neighbors, "inputs", {"degree"}, id="degree"),
        pytest.param(of_a_band_of_degrees, "inputs", {"degree"}, id="band-of-degrees"),
    ],
)
def test_the_answer_is_what_was_planted(
    make: Callable[[np.random.Generator], Nodes], kind: str, choices: set[str | None]
) -> None:
    assert_answers(make, kind, choices)


def assert_answers(
    make: Callable[[np.random.Generator], Nodes], kind: str, choices: set[str | None]
) -> None:
    answer = Survey(make(np.random.default_rng(7))).answer()
    assert answer.kind == kind, answer
    assert answer.choice in choices, answer
    assert (answer.expert is not None) == (kind == "rules")
    if answer.expert is not None:  # an expert is of one regime
        even, odd = (answer.expert[start::2].bincount(minlength=8) for start in (0, 1))
        assert torch.minimum(even, odd).sum() < 0.1 * COUNT


@pytest.mark.slow
def test_two_classes_are_judged_by_the_area_under_the_roc_curve(few_splits: None) -> None:
    given = bent_rule(np.random.default_rng(9), count=1_000)
    answer = Survey(replace(given, metric="roc_auc")).answer()
    assert answer.kind == "width"
    assert answer.figures[0].endswith("roc_auc")


@pytest.fixture(scope="module")
def no_edges() -> Answer:
    """Of a linear rule, on nodes without an edge."""
    draw = np.random.default_rng(10)
    x = draw.standard_normal((600, 5))
    none = np.zeros((2, 0), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "SPLITS", 3)
        given = nodes(x, none, (x @ draw.standard_normal((5, 3))).argmax(axis=1), 5)
        return Survey(given).answer()


def test_without_edges_only_features_are_asked_about(no_edges: Answer) -> None:
    assert no_edges.kind == "nothing"
    assert "there are no edges" in no_edges.figures[0]
    assert not any("given walked" in line for line in no_edges.figures)


@pytest.mark.slow
def test_nodes_with_the_same_features_can_be_told_their_place() -> None:
    given = labels_of_small_groups(np.random.default_rng(12))
    answer = Survey(replace(given, x=np.ones((COUNT, 2), np.float32))).answer()
    assert answer.choice == "labels"


def test_features_of_any_unit_are_the_same() -> None:
    """And a column that is constant up to rounding tells nothing."""
    x = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    constant = np.full((50, 1), 1e3, np.float32)
    constant[::2] += 1e-4
    expected = features(x)
    for unit in (1e-7, 1e7):
        np.testing.assert_allclose(
            features(np.hstack([x * np.float32(unit), constant])), expected, rtol=1e-3
        )


def test_words_keep_their_scale_and_no_column_counts_ten_times_the_others() -> None:
    draw = np.random.default_rng(13)
    words = (draw.uniform(size=(400, 300)) < 0.1).astype(np.float32)
    words[:, 0] *= 1e6
    found = questions.features(words)
    assert found.shape == (400, questions.WIDEST)
    assert found.std(axis=0).max() / np.median(found.std(axis=0)) < 11
    few = questions.features(words[:, :5])
    assert few.std(axis=0) == pytest.approx(np.ones(5), abs=1e-4)


NOTHING = Gain(mean=0.1, low=-0.4, high=0.6, n=5)


@pytest.mark.parametrize(
    ("worth", "choice", "said"),
    [
        ({"inputs": 4.0}, "walked", r"give the dense model walked: \+4.00"),
        ({"inputs": 4.0, "rules": 1.0}, "node", "rules differ"),
        ({"inputs": 4.0, "rules": 1.0, "degree": 3.0}, "node", "rules differ"),
        ({"inputs": 4.0, "rules": 1.0, "degree": 5.0}, "degree", "give the dense model its degree"),
        ({"inputs": 4.0, "one way": 9.0}, "one way", r"keep edges in one direction \(--no-undir"),
        ({"inputs": 4.0, "one way": 3.0}, "walked", "give the dense model walked"),
        ({"width": 2.0, "hidden": 9.0, "bent": 5.0}, None, r"width helps, .*: \+2.00"),
        ({"bent": 5.0, "hidden": 9.0}, None, "give the dense model a hidden layer on the node's"),
        ({"both ways": 2.0, "hidden": 9.0}, "reverse", "give the dense model reverse edges, as"),
        (
            {"hidden": 46.9},
            None,
            r"nothing beyond a hidden layer \(\+46.90 points ",
        ),
        ({}, None, "nothing: no input"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_the_largest_gain_is_the_answer(
    worth: dict[str, float], choice: str | None, said: str
) -> None:
    names = ("inputs", "rules", "width", "bent", "degree", "hidden", "both ways", "one way")
    gains = dict.fromkeys(names, NOTHING)
    gains |= {
        name: Gain(mean=mean, low=mean - 0.5, high=mean + 0.5, n=5) for name, mean in worth.items()
    }
    survey: Any = SimpleNamespace(input_name=lambda name: name)
    _, found, line = Survey.largest(survey, "walked", "node", gains, {"one": NOTHING})
    assert found == choice
    assert re.match(said, line), line


@pytest.mark.slow
def test_reverse_edges_that_the_preset_adds_are_said_to_be_there() -> None:
    given = class_of_those_with_a_common_target(np.random.default_rng(11))
    answer = Survey(replace(given, undirected=True)).answer()
    assert answer.kind == "inputs"
    assert answer.choice == "reverse"
    assert answer.gains["both ways"].is_worth


def test_a_split_that_comes_again_is_drawn_anew_and_keeps_its_test_nodes() -> None:
    y = torch.arange(100) % 2
    rows: Splits = {
        "train": torch.arange(20),
        "val": torch.arange(20, 60),
        "test": torch.arange(60, 100),
    }
    first, *others = redrawn([rows] * 4, y)
    assert first is rows
    assert len({tuple(sorted(split["train"].tolist())) for split in others}) == 3
    for split in others:
        assert split["test"].equal(rows["test"])
        assert y[split["train"]].bincount().tolist() == [10, 10]
        found = torch.cat([split["train"], split["val"]]).sort().values
        assert found.equal(torch.arange(60))


def test_graphs_that_no_question_fits_are_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "FEWEST", 10_000)
    assert str(nodes_of(DIGITS_GRAPH)).startswith("a part of a split has ")
    monkeypatch.setattr(questions, "MOST_NODES", 100)
    assert str(nodes_of(DIGITS_GRAPH)).startswith("the graph has more than 100 nodes")
