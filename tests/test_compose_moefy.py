"""Random MLPs that become experts equal their definition, or are refused in the library's words."""

from __future__ import annotations

import pytest

import gmoe
from tests import compose_moefy
from tests.compose_moefy import COMPOSER
from tests.composer import CHUNK


@pytest.mark.parametrize("first", range(0, 50, CHUNK))
def test_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(50, 5_000, CHUNK))
def test_more_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.2)


def test_another_definition_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose_moefy, "without_parameters", lambda _, x: x)
    outcomes = [compose_moefy.run(number) for number in range(20)]
    assert any("DifferentError" in one.message for one in outcomes if one.kind == "failed")


def test_a_refusal_of_a_plain_mlp_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("model: got an MLP, expected another")

    monkeypatch.setattr(gmoe, "moefy", refuse)
    kinds = {compose_moefy.draw(number).change: compose_moefy.run(number) for number in range(40)}
    assert kinds["nothing"].kind == "failed"
    assert kinds["residual"].kind == "refused"
