"""Models that train side by side: the same work, the same data, and honest times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from experiments.benchmark import models
from experiments.benchmark.models import (
    ROWS,
    SMALL,
    Row,
    Training,
    Variant,
    build_row,
    enough_repeats,
    example_row,
    least,
    made_nodes,
    molecule_row,
    node_row,
    sampled_row,
    vit_row,
)
from gmoe import GNNMoE, Graph, MoE, MoEConv

CPU = torch.device("cpu")
TINY = SMALL._replace(features=6, hidden=8, layers=2, labeled=10, dropout=0.5)
MOLECULES = {"molecules": 3, "width": 8, "layers": 2}
TINY_ROWS: dict[str, Callable[[], Row]] = {
    **{f"nodes-{kind}": partial(node_row, kind, TINY) for kind in models.WHOLE_MODELS},
    "example": partial(example_row, TINY),
    **{f"molecules-{kind}": partial(molecule_row, kind, **MOLECULES) for kind in ("gine", "gcn")},
    "sampled": partial(
        sampled_row, nodes=(4, 6, 9), edges=(8, 12), features=5, hidden=8, classes=3
    ),
    "vit": partial(vit_row, "test_vit", 1),
}


@pytest.fixture(params=TINY_ROWS)
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Row:
    monkeypatch.setitem(ROWS, "tiny", TINY_ROWS[request.param])
    return build_row("tiny", CPU)


def test_each_model_learns_from_the_same_batch(row: Row) -> None:
    """All parameters: a part that a loss does not reach would cost its optimizer alone."""
    for name, variant in row.items():
        training = Training(variant, CPU)
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        training.forward().backward()
        for of, parameter in training.model.named_parameters():
            assert parameter.grad is not None, (name, of)
        training()
        after = training.model.parameters()
        assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert all(parameter.grad is None for parameter in training.model.parameters())


def test_the_first_model_has_no_experts_and_takes_part_twice(row: Row) -> None:
    own, *others = row
    again = f"{own} again"
    assert row[own].model is not row[again].model
    state = row[again].model.state_dict()
    for name, value in row[own].model.state_dict().items():
        assert torch.equal(value, state[name])
    for name in others:
        assert has_experts(row[name].model) == name.startswith("gmoe, ")
    assert not has_experts(row[own].model)


def test_the_own_model_is_never_behind_itself(row: Row) -> None:
    """Nor in the next round, in which others begin: the first is behind the last."""
    own, other, again, *others = row
    assert again == f"{own} again"
    assert other != again
    assert others


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(part, MoE | MoEConv | GNNMoE) for part in model.modules())


def test_models_of_a_row_are_drawn_anew_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "tiny", TINY_ROWS["nodes-gcn"])
    first, second = build_row("tiny", CPU), build_row("tiny", CPU)
    for name, variant in first.items():
        variant.model.eval()
        second[name].model.eval()
        assert torch.equal(variant.loss(variant.model), second[name].loss(second[name].model))


def test_experts_of_a_graph_and_of_an_edge_index_compute_the_same() -> None:
    for name in ("nodes-gat", "example", "molecules-gine", "sampled"):
        losses = []
        for form, variant in TINY_ROWS[name]().items():
            if form.startswith("gmoe"):
                variant.model.eval()
                losses.append(variant.loss(variant.model))
        assert len(losses) == 2
        torch.testing.assert_close(*losses)


def test_a_moefied_vit_begins_as_the_own_one() -> None:
    row = TINY_ROWS["vit"]()
    own, moefied = (row[name].loss(row[name].model.eval()) for name in ("timm", "gmoe, moefy"))
    torch.testing.assert_close(own, moefied)


def test_a_graph_knows_the_features_that_models_get() -> None:
    data = made_nodes(TINY)
    graph = data.adjacencies()["Graph"]
    assert isinstance(graph, Graph)
    assert graph.x is data.x


@pytest.mark.parametrize("name", ["molecules-gcn", "sampled"])
def test_a_batch_is_sorted_in_each_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loader's next batch would be: a graph that lives on would cost nothing."""
    row, made = TINY_ROWS[name](), list[int]()

    def note(*args: Any) -> Graph:
        made.append(1)
        return Graph(*args)

    monkeypatch.setattr(models, "Graph", note)
    variant = row["gmoe, Graph"]
    for _ in range(3):
        variant.loss(variant.model)
    assert len(made) == 3


class Clocked(nn.Module):
    """Moves a clock in its forward and backward pass."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.advance = advance

    def forward(self) -> Tensor:
        self.advance(2.0)
        y = self.weight * 3
        y.register_hook(lambda _: self.advance(5.0))
        return y


def test_parts_of_a_step_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("experiments.benchmark.models.time.process_time", lambda: now[0])
    training = Training(Variant(Clocked(advance), lambda model: model()), CPU)
    monkeypatch.setattr(training.optimizer, "step", lambda: advance(7.0))
    training()
    assert training.times == [(2.0, 5.0, 7.0, 14.0)]


class Noted:
    """Steps that take what is written down."""

    def __init__(self, *steps: float) -> None:
        self.steps = list(steps)
        self.times: list[models.Times] = []

    def __call__(self) -> None:
        seconds = self.steps.pop(0)
        self.times.append(models.Times(seconds, 10 - seconds, 1.0, seconds))


def test_the_least_is_that_of_each_part_after_the_warmup() -> None:
    training = Noted(0.5, 4.0, 3.0, 6.0)
    for _ in range(4):
        training()
    assert least(cast(Any, training), 3) == (3.0, 4.0, 1.0, 3.0)


@pytest.mark.parametrize(("repeats", "seconds", "enough"), [(5, 3.0, 5), (5, 60.0, 20), (1, 0, 1)])
def test_quick_models_are_repeated_for_some_seconds(
    repeats: int, seconds: float, enough: int
) -> None:
    """By their second steps, of 1 and 2 seconds."""
    trainings: list[Any] = [Noted(9.0, 1.0), Noted(9.0, 2.0)]
    assert enough_repeats(trainings, repeats, seconds) == enough
