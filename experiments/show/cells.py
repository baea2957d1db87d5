"""The cells of a study: a file ``COLUMN/ROW.json`` each, in a folder of the study's name.

A column is a recipe on a data set, a row a model that is compared with others on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from experiments.show.tables import known, markdown
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


def differences(cell: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Seed by seed of those that both ran, a cell's score on the test set minus another's, in
    points.

    Of errors it is the difference as it is.
    """
    return scores.differences(cell["metric"], *scores.of_shared_seeds(cell, other))


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
    tables = [study_table(study, column) for column in only or columns]
    if not tables:
        tables = ["No cell is finished."]
    return "\n\n".join([*tables, *not_run(study, only)])


def study_table(study: Mapping[str, Any], column: str) -> str:
    """A line a row: the metric on the test set, what it costs, and it beside the controls.

    Costs are relative to the first control.
    """
    cells = study["cells"][column]
    first = cells.get([*study["controls"], "dense"][0])
    controls = [row for row in study["controls"] if row in cells]
    published = study.get("published", {})
    labels = {row: row for row in cells} | study.get("labels", {})
    labels |= {row: cell["label"] for row, cell in cells.items() if "label" in cell}
    lines = []
    for row, cell in cells.items():
        metric = cell["metric"]
        line = {
            column: labels[row],
            f"test {metric}{scores.unit(metric)}": scores.scored(metric, cell["test"]),
            "n": str(cell["test"]["n"]),
            "published": published.get(f"{column}/{row}", "–"),
            "active FLOPs": "–" if first is None else f"{cell['flops'] / first['flops']:.2f}×",
            "parameters": f"{cell['parameters']:,}",
            # of all seeds, one after the other
            "minutes": f"{sum(cell['seconds']['values']) / 60:.1f}" if study.get("prices") else "–",
        }
        lines.append(line | {f"− {labels[one]}": beside(cell, cells[one]) for one in controls})
    return markdown(known(lines))


def beside(cell: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """The mean difference to a control on the seeds that both ran, its interval, and on how many
    of these the cell is better."""
    metric = cell["metric"]
    tests = scores.of_shared_seeds(cell, control)
    if cell is control or not tests[0]:
        return "–"
    difference = scores.Difference.of(scores.differences(metric, *tests))
    return f"{difference.text(scores.form_of(metric))}, {scores.better_in(metric, *tests)}"


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
