"""Damaged files are read, or refused in one clear line; and what is wrong is found."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from tests import fuzz
from tests.damage import Around, damaged
from tests.file_kinds import KINDS, Kind

QUICK = ("npz", "csv", "pt", "stored graph", "hub, GNN", "moefied", "images", "predictions")


def check(numbers: range, kinds: tuple[str, ...]) -> set[str]:
    """No input fails; what became of them."""
    found = set()
    for number, name, what, outcome in fuzz.run(numbers, kinds):
        said = f"python -m tests.fuzz {number}: {name}: {what}: {outcome.message}"
        assert outcome.kind != "failed", said
        found.add(outcome.kind)
    return found


def test_numbers() -> None:
    assert check(range(80), QUICK) == {"read", "refused"}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 1_000))
def test_more_numbers(first: int) -> None:
    check(range(first, first + 1_000), tuple(KINDS))


def outcome_of(read: Callable[[Path], object], monkeypatch: Any) -> fuzz.Outcome:
    """What becomes of damaged text that ``read`` reads; as a whole it is ``"1,2"``."""

    def write(folder: Path) -> None:
        (folder / "a.csv").write_text("1,2")

    def read_damaged(folder: Path) -> None:
        path = folder / "a.csv"
        if path.is_symlink() or path.read_bytes() != b"1,2":
            read(path)

    monkeypatch.setitem(KINDS, "made", Kind(write, read_damaged))
    ((*_, found),) = fuzz.run([1], ("made",))
    return found


def raises(error: BaseException) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        raise error

    return read


def refuses(path: Path) -> None:
    raise ValueError(f"{path}: got text, expected numbers")


def hangs(path: Path) -> None:
    while True:
        pass


def dies(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def writes_outside(path: Path) -> None:
    (path.parent / "../outside/new").touch()


def allocates(path: Path) -> None:
    try:
        np.zeros(2**33)
    except MemoryError as error:
        raise ValueError(f"{path}: cannot be read") from error


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bare traceback": (raises(KeyError("x")), "undeclared, names no file: KeyError"),
    "no file": (raises(ValueError("got text")), "names no file: ValueError"),
    "a hang": (hangs, "took more than"),
    "a crash": (dies, "died of SIGSEGV"),
    "a file outside": (writes_outside, "wrote .*outside/new"),
    "memory that is not there": (allocates, r"asked for more than there is \(MemoryError\)"),
}


@pytest.mark.parametrize(("read", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_found(
    read: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    found = outcome_of(read, monkeypatch)
    assert found.kind == "failed"
    assert re.match(message, found.message), found.message


def test_a_refusal_and_a_reader_that_takes_anything_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_of(refuses, monkeypatch).kind == "refused"
    assert outcome_of(lambda _: None, monkeypatch).kind == "read"


def test_a_number_draws_the_same_damage_each_time(tmp_path: Path) -> None:
    around = Around(tmp_path, (b"other",))
    raw = json.dumps(list(range(100))).encode()
    twice = [[damaged(Random(n), "a.json", raw, around) for n in range(30)] for _ in range(2)]
    assert twice[0] == twice[1]
    assert len({how for how, _ in twice[0]}) > 8
