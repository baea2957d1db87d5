"""Random MLPs that become experts equal their definition, or are refused in the library's words."""

from __future__ import annotations

from collections import Counter

import pytest

import gmoe
from tests import compose_moefy

CHUNK = 25


def check(first: int) -> None:
    """25 numbers, of which many compute."""
    kinds = Counter[str]()
    for number in range(first, first + CHUNK):
        kind, message = compose_moefy.run(number)
        kinds[kind] += 1
        assert kind != "failed", f"python -m tests.compose_moefy {number}: {message}"
    assert kinds["equal"] >= 0.3 * CHUNK


@pytest.mark.parametrize("first", range(0, 50, CHUNK))
def test_numbers(first: int) -> None:
    check(first)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(50, 5_000, CHUNK))
def test_more_numbers(first: int) -> None:
    check(first)


def test_another_definition_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose_moefy, "without_parameters", lambda _, x: x)
    outcomes = [compose_moefy.run(number) for number in range(20)]
    assert any("DifferentError" in message for kind, message in outcomes if kind == "failed")


def test_a_refusal_of_a_plain_mlp_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("model: got an MLP, expected another")

    monkeypatch.setattr(gmoe, "moefy", refuse)
    kinds = {compose_moefy.draw(number).change: compose_moefy.run(number) for number in range(40)}
    assert kinds["nothing"][0] == "failed"
    assert kinds["residual"][0] == "refused"
