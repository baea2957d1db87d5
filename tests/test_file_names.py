"""Files of odd names are read, not what other programs would find under them."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests import file_names
from tests.file_names import SUBJECTS, Subject, decoys, make_code

QUICK = ("edges .csv", "edges .parquet", "train of edges", "npz", "csv", "hub, GNN", "code")


def check(numbers: Iterable[int], subjects: Iterable[str]) -> None:
    """All is read, but for what no checkpoint can be written to."""
    for number, case, found in file_names.run(numbers, subjects):
        is_chain = case.subject == "run, trained" and "::" in f"{case.folder}{case.name}"
        is_refused = "expected a path without '::', which fsspec takes" in found
        assert is_refused if is_chain else found == "read", f"{number}: {case}: {found}"


def test_names() -> None:
    check(range(50), QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 3_000, 500))
def test_more_names(first: int) -> None:
    check(range(first, first + 500), tuple(SUBJECTS))


WRONG: dict[str, Callable[[Path], object]] = {
    "a pattern": lambda path: glob.glob(str(path))[-1:] or path,
    "an address": lambda path: unquote(str(path)),
    "a home": lambda path: os.path.expanduser(path),
    "a variable": lambda path: os.path.expandvars(path),
    "blanks": lambda path: str(path).strip(),
    "letters": lambda path: str(path).lower(),
}


@pytest.mark.parametrize("other", WRONG.values(), ids=WRONG)
def test_a_reader_that_goes_elsewhere_is_found(
    other: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> str:
        found: Any = other(path)
        (gone,) = found if isinstance(found, list) else (found,)
        return Path(gone).read_text()

    monkeypatch.setitem(SUBJECTS, "made", Subject(make_code, read))
    cases = file_names.run(range(300), ["made"])
    assert any(found == "failed: read something else" for *_, found in cases)


def test_a_reader_that_opens_what_it_is_given_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUBJECTS, "made", Subject(make_code, Path.read_text))
    assert {found for *_, found in file_names.run(range(60), ["made"])} == {"read"}


def test_decoys_are_what_others_make_of_a_name() -> None:
    assert {"edges1", "EDGES[1]"} <= {*decoys("edges[1]")}
    assert "é" in decoys("e\N{COMBINING ACUTE ACCENT}")
    assert {"e", "ex"} <= {*decoys("e*")}
    assert "e 1" in decoys("e%201")
