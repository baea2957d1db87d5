"""The cells of a study: what is read, in which order, and the tables of its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.show.cells import differences, read_cells, read_study, study_tables
from tests.helpers.run_folders import variant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of two columns; ``later`` is a row of an earlier sweep."""
    study = {"columns": ["b", "a", "c"], "rows": ["moe", "dense"], "controls": ["dense"]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    cells = {
        "a": [variant("dense", [0.5, 0.6])],
        "b": [
            variant("dense", [0.5, 0.6], flops=10),
            variant("later", [0.9]),
            variant("moe", [0.6, 0.8], flops=20),
        ],
    }
    for column, rows in cells.items():
        (tmp_path / column).mkdir()
        for row in rows:
            (tmp_path / column / f"{row['variant']}.json").write_text(json.dumps(row))
    return tmp_path


def test_finished_cells_are_read_in_the_order_of_columns_and_rows(folder: Path) -> None:
    cells = read_cells(folder, ["b", "a", "c"], ["moe", "dense"])
    assert {column: list(rows) for column, rows in cells.items()} == {
        "b": ["moe", "dense"],
        "a": ["dense"],
    }
    assert list(read_cells(folder, ["b"])["b"]) == ["dense", "later", "moe"]
    assert differences(cells["b"]["moe"], cells["b"]["dense"]) == pytest.approx([10, 20])


def test_rows_that_the_study_does_not_name_come_last(folder: Path) -> None:
    assert list(read_study(folder)["cells"]["b"]) == ["moe", "dense", "later"]


def test_a_row_is_compared_with_the_control_of_its_seeds(folder: Path) -> None:
    tables = study_tables(read_study(folder))
    of_b, of_a = tables.split("\n\n")
    assert study_tables(read_study(folder), ["a"]) == of_a
    head, _, *lines = of_b.splitlines()
    moe, dense, later = (
        dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
        for line in lines
    )
    assert moe["− dense"].startswith("+15.00 (-48.53 to +78.53), 2 of 2")
    assert moe["active FLOPs"] == "2.00×"
    assert dense["− dense"] == "–"
    assert later["− dense"].endswith("of 1")  # the one seed that both ran
    with pytest.raises(ValueError, match=r"^columns: got 'sea', expected one of b, a"):
        study_tables(read_study(folder), ["sea"])


def test_a_study_without_a_cell_says_so() -> None:
    study: dict[str, Any] = {"columns": [], "rows": [], "controls": [], "cells": {}}
    assert study_tables(study) == "No cell is finished."


def test_prices_and_published_figures_stand_beside_a_cell(folder: Path) -> None:
    path = folder / "study.json"
    study = json.loads(path.read_text()) | {
        "labels": {"moe": "experts", "dense": "the dense model"},
        "published": {"b/dense": "51.0 ± 2.0", "a/moe": "70.0"},
    }
    path.write_text(json.dumps(study))
    prices = {"b/moe": 1.0, "a/moe": 0.25, "c/dense": 12.5}
    of_cells = {cell: {"hours": hours} for cell, hours in prices.items()}
    (folder / "prices.json").write_text(json.dumps(of_cells))
    for cell, val in {"b/moe": 0.6, "b/dense": 0.7, "b/later": 0.9, "a/dense": 0.7}.items():
        file = folder / f"{cell}.json"
        figures = {"val": {"mean": val}, "seconds": {"values": [60, 90]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | figures))
    *tables, missing = study_tables(read_study(folder)).split("\n\n")
    assert [table.count("published") for table in tables] == [1, 0]
    (dense,) = [line for line in tables[0].splitlines() if line.startswith("| dense")]
    assert "| 51.0 ± 2.0 |" in dense
    assert "| 2.5 |" in dense  # minutes of both seeds
    of_a = "- a: experts (published: 70.0), not run, 15.0 minutes"
    assert missing == f"{of_a}\n- c: the dense model, not run, 12 hours"
    assert study_tables(read_study(folder), ["a"]).endswith(f"\n\n{of_a}")
