"""The cells of a study: a file ``COLUMN/ROW.json`` each, in a folder of the study's name.

A column is a recipe on a data set, a row a model that is compared with others on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from experiments.show.tables import study_table
from experiments.train import scores
from experiments.train.checks import check_choice
from experiments.train.files import read_json

Cells: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""By column and row, the summary of a run."""


def read_cells(folder: Path, columns: Iterable[str], rows: Iterable[str] | None = None) -> Cells:
    """The finished cells of some columns and rows, in this order; by default all rows, by file."""
    cells: Cells = {}
    for column in columns:
        names = rows
        if names is None:
            names = [path.stem for path in sorted((folder / column).glob("*.json"))]
        paths = {row: folder / column / f"{row}.json" for row in names}
        finished = {
            row: read_json(path, dict[str, Any]) for row, path in paths.items() if path.exists()
        }
        if finished:
            cells[column] = finished
    return cells


def differences(
    cell: Mapping[str, Any], other: Mapping[str, Any], part: str = "test"
) -> list[float]:
    """Seed by seed of those that both ran, a cell's score minus another's, in points.

    Of errors it is the difference as it is.
    """
    return scores.differences(cell["metric"], *scores.of_shared_seeds(cell, other, part))


def read_prices(folder: Path) -> dict[str, Any]:
    """What ``--price`` measured of a study's cells: by ``COLUMN/ROW``, ``hours`` and the like."""
    path = folder / "prices.json"
    return read_json(path, dict[str, Any]) if path.exists() else {}


def read_study(folder: Path) -> dict[str, Any]:
    """What ``study.json`` says of a study, its finished ``cells``, also of other rows, and
    ``prices``.
    """
    study = read_json(folder / "study.json", dict[str, Any])
    place = {row: number for number, row in enumerate(study["rows"])}
    cells = {
        column: dict(sorted(rows.items(), key=lambda row: place.get(row[0], len(place))))
        for column, rows in read_cells(folder, study["columns"]).items()
    }
    return study | {"cells": cells, "prices": read_prices(folder)}


def study_tables(study: Mapping[str, Any], only: Sequence[str] = ()) -> str:
    """A table a column, or one for each of ``only``: a line a row, beside the controls."""
    columns = study["cells"]
    for column in only:
        check_choice("columns", column, columns)
    controls = study["controls"]
    labels = study.get("labels", {})
    tables = []
    for column in only or columns:
        variants = [
            {"variant": row, "label": labels.get(row, row), **cell}
            for row, cell in columns[column].items()
        ]
        content = {
            "variants": variants,
            "reference": controls[0] if controls else "dense",
            "controls": controls,
            "column": column,
            "published": {
                cell.partition("/")[2]: figure
                for cell, figure in study.get("published", {}).items()
                if cell.startswith(f"{column}/")
            },
            "shows_minutes": bool(study.get("prices")),
        }
        tables.append(study_table(content))
    if not tables:
        tables = ["No cell is finished."]
    return "\n\n".join([*tables, *not_run(study, only)])


def not_run(study: Mapping[str, Any], only: Sequence[str]) -> list[str]:
    """The cells that have a price and no result, in a sentence; nothing if there is none."""
    labels = study.get("labels", {})
    missing = []
    for cell, price in study.get("prices", {}).items():
        column, _, row = cell.partition("/")
        is_shown = column in (only or study["columns"])
        if is_shown and row not in study["cells"].get(column, {}):
            figure = study["published"].get(cell)
            beside = "" if figure is None else f" (published: {figure})"
            hours = price["hours"]
            time = f"{hours:.2g} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
            missing.append(f"{column}: {labels[row]}{beside}, not run, {time}")
    return ["\n".join(f"- {line}" for line in missing)] if missing else []
