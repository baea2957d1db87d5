"""Random configurations equal their definition, or are refused in the library's own words."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import gmoe
from tests import compose
from tests.compose import COMPOSER
from tests.composer import CHUNK, Outcome


@pytest.mark.parametrize("first", range(0, 300, CHUNK))
def test_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(300, 20_000, CHUNK))
def test_more_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.5)


def test_an_unequal_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "GAIN_SCALE", 0.123)
    found = [compose.run(number) for number in range(20)]
    assert any(outcome.kind == "failed" for outcome in found)


def test_a_raw_error_fails_and_a_refusal_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, kind in (
        (IndexError("3"), "failed"),
        (ValueError("k: got 9, expected at most 3"), "refused"),
    ):

        def raises(c: compose.Config, error: Exception = error) -> Outcome:
            raise error

        monkeypatch.setattr(compose, "compute", raises)
        assert compose.run(0).kind == kind
        assert COMPOSER.main(0, 2) == (kind == "failed")


def test_defaults_are_drawn_of_layers_and_of_models() -> None:
    """And leave what a number is: its start is the one that the default becomes."""
    drawn = [compose.draw(number) for number in range(300)]
    started = Counter(c.start for c in drawn if c.options["start"] is None)
    assert started.keys() == {"copies", "shared"}
    models = [c for c in drawn if c.way != "layer"]
    routers = Counter(c.start for c in models if c.options["shared_router"] is None)
    assert min(routers["copies"], routers["shared"]) > 0


def test_a_default_that_becomes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "default_start", lambda *_: "plain")
    found = [compose.run(number) for number in range(40)]
    assert any("start=None became {'shared'}" in outcome.message for outcome in found)


def test_the_page_names_code_that_exists() -> None:
    page = (Path(__file__).parent / "compose.md").read_text()
    where = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(where) > 20
    for cell in where:
        path, *names = re.findall(r"`([^`]+)`", cell)
        source = (Path(gmoe.__file__).parent / path).read_text()
        for name in re.findall(r"[A-Za-z_]\w+", " ".join(names)):
            assert name in source, (path, name)
