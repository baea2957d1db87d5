"""Random relational layers and models equal their definition, or are refused in own words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmoe import Graph, Routing
from gmoe.conv import hetero
from gmoe.products import combine
from tests import compose_hetero
from tests.compose_hetero import COMPOSER
from tests.composer import CHUNK, Outcome


@pytest.mark.parametrize("first", range(0, 100, CHUNK))
def test_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 20_000, CHUNK))
def test_more_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.5)


def fails(number: int) -> bool:
    return compose_hetero.run(number).kind == "failed"


def test_a_mean_that_forgets_the_values_of_a_matrix_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = Graph.mean
    monkeypatch.setattr(Graph, "mean", lambda self, x, **_: mean(self, x))
    assert any(map(fails, range(40)))


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def combined(y: Tensor, routing: Routing) -> Tensor:
        return combine(y + (y - y.detach()) / 100, routing)

    monkeypatch.setattr(hetero, "combine", combined)
    assert any(map(fails, range(40)))


def test_a_raw_error_fails_and_a_refusal_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that the number cannot get is a failure, too."""
    copies = next(n for n in range(100) if compose_hetero.draw(n).options.get("start") == "copies")
    plain = next(n for n in range(100) if compose_hetero.draw(n).options.get("start") == "plain")
    refusal = ValueError("start: got 'copies' with a router, expected another")
    for error, number, kind in (
        (IndexError("3"), copies, "failed"),
        (refusal, copies, "refused"),
        (refusal, plain, "failed"),
    ):

        def raises(c: compose_hetero.Config, error: Exception = error) -> Outcome:
            raise error

        monkeypatch.setattr(compose_hetero, "compute", raises)
        assert compose_hetero.run(number).kind == kind
        assert COMPOSER.main(number, number + 1) == (kind == "failed")


def test_the_definition_is_by_hand() -> None:
    """One paper that two authors wrote, one of them twice as much: a mean by values."""
    writes = ("author", "writes", "paper")
    given = compose_hetero.Given(
        x_dict={},
        edge_index_dict={},
        batch_dict=None,
        n_id_dict=None,
        values={writes: torch.tensor([1.0, 2.0]).double()},
        ends={writes: torch.tensor([[0, 2], [1, 1]])},
        counts={"author": 3, "paper": 2},
    )
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 1.0]])
    torch.testing.assert_close(given.mean_matrix(writes).float(), expected)
