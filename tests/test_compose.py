"""Random cases equal their definition, or are refused in the library's own words, with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gmoe
from tests.compose import graphs, moefy, steps
from tests.compose.__main__ import TARGETS, main
from tests.compose.frame import CHUNK, DifferentError, Target, require_equal
from tests.compose.twice import twice

GRAPHS, MOEFY = TARGETS.values()
MORE = {"graphs": (150, 20_000), "moefy": (50, 5_000)}
"""By default all numbers before the first run; the slow tests run the rest."""


def failures(target: Target, numbers: int) -> Iterator[str]:
    """What is said of the numbers that fail."""
    outcomes = (target.run(target.of(number)) for number in range(numbers))
    return (outcome.message for outcome in outcomes if outcome.kind == "failed")


@pytest.mark.parametrize(
    ("name", "first"),
    [(name, first) for name, (last, _) in MORE.items() for first in range(0, last, CHUNK)],
)
def test_numbers(name: str, first: int) -> None:
    TARGETS[name].check(first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first"),
    [(name, first) for name, numbers in MORE.items() for first in range(*numbers, CHUNK)],
)
def test_more_numbers(name: str, first: int) -> None:
    TARGETS[name].check(first)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("number", range(0, 400, 4))
def test_second_gradients_are_those_of_the_definition(name: str, number: int) -> None:
    target = twice(TARGETS[name])
    outcomes = [target.run(target.of(one)) for one in range(number, number + 4)]
    assert [outcome.message for outcome in outcomes if outcome.kind == "failed"] == []


# The frame can fail


def test_equal_means_values_shapes_and_names() -> None:
    ones = torch.ones(2).double()
    require_equal("y", {"y": ones, "unused": ones}, {"y": ones + 1e-12, "unused": None}, 1e-10)
    for other in (ones + 1e-9, torch.ones(2, 1), torch.full((2,), torch.nan)):
        with pytest.raises(DifferentError, match="y, y: "):
            require_equal("y", {"y": ones}, {"y": other}, 1e-10)
    with pytest.raises(AssertionError, match="z"):
        require_equal("y", {"y": ones}, {"z": ones}, 1e-10)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_raw_error_fails_and_a_refusal_needs_a_reason(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal that the case cannot get is a failure, too."""
    starts = [target.of(number).options.get("start") for number in range(100)]
    refusal = ValueError("start: got 'copies' with a router, expected another")
    for error, number, kind in (
        (IndexError("3"), starts.index("copies"), "failed"),
        (refusal, starts.index("copies"), "refused"),
        (refusal, starts.index("plain"), "failed"),
    ):

        def raises(self: Target, case: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(type(target), "compute", raises)
        assert target.run(target.of(number)).kind == kind
        for numbers in ([number], [number, number + 1]):
            assert main([target.name, *map(str, numbers)]) == (kind == "failed")
        assert f"{target.name} {number}: {kind}" in capsys.readouterr().out


def test_a_graph_with_an_unequal_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "GAIN_SCALE", 0.123)
    assert any(failures(GRAPHS, 20))


def test_a_default_that_becomes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "default_start", lambda *_: "plain")
    found = failures(GRAPHS, 40)
    assert any("start=None became {'shared'}" in message for message in found)


def test_another_definition_of_an_mlp_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moefy, "without_parameters", lambda _, x: x)
    assert any("DifferentError: the definition" in one for one in failures(MOEFY, 20))


def test_a_refusal_of_a_plain_mlp_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def moefied(*_: object, **__: object) -> None:
        raise ValueError("model: got an MLP, expected another")

    monkeypatch.setattr(gmoe, "moefy", moefied)
    cases = {case.change: case for case in map(MOEFY.of, range(40))}
    assert MOEFY.run(cases["nothing"]).kind == "failed"
    assert MOEFY.run(cases["residual"]).kind == "refused"


@pytest.mark.parametrize("name", ["graphs", "moefy"])
def test_a_copy_that_changes_the_output_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the call that counts is compared."""

    def changed(module: torch.nn.Module) -> torch.nn.Module:
        for parameter in module.parameters():
            parameter.mul_(1.5)
        return module

    monkeypatch.setitem(steps.COPIES, "pickle", changed)
    target = TARGETS[name]
    cases = [case for case in map(target.of, range(100)) if case.after == "pickle"]
    assert any("after pickle, y" in target.run(case).message for case in cases)
