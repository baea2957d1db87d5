"""A disk that is full: the file is named, and what was there before stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.show.report_page import Page
from experiments.study.advise import keep_routing
from experiments.study.pages import update
from experiments.train.results import write_json
from tests.helpers.command import QUICK, full_disk, refused

LARGE = np.random.default_rng(0).standard_normal((1_000, 3))
REPLACED: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: write_json(path, LARGE.tolist()),
    "index.html": Page(["<p>"] * 1_000).write,
    "routing.npy": lambda path: keep_routing(path, np.arange(1_000)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_full_disk_leaves_the_file_that_was_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("of before")
    with full_disk(), pytest.raises(OSError, match=f"^{path}: cannot be written"):
        REPLACED[name](path)
    assert path.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [path]
    REPLACED[name](path)
    assert path.stat().st_size > 2_000


def test_an_array_whose_end_finds_no_room_is_named(tmp_path: Path) -> None:
    """Of less than 4 kB."""
    path = tmp_path / "routing.npy"
    with full_disk(), pytest.raises(OSError, match=f"^{path}: cannot be written"):
        keep_routing(path, np.arange(400))


def test_a_full_disk_leaves_the_page_of_the_docs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text := "By hand.\n<!-- presets: presets -->\n<!-- end -->\n" + "." * 2_000)
    with full_disk(), pytest.raises(SystemExit, match=rf"^error: {page}: .*cannot be written"):
        update((page,))
    assert page.read_text() == text


def test_a_run_on_a_full_disk_says_how_it_goes_on(tmp_path: Path, capsys: Any) -> None:
    command = ["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path / "run")]
    with full_disk(10_000):
        said = refused(command, capsys)
    assert "state.ckpt: cannot be written (" in said
    assert "; continue with: python -m experiments.train digits-graph" in said
