"""Studies: rows on columns, fixed before the first of them is run.

A column is a recipe on a data set, with its seeds. A row is a model on it: what it changes of the
recipe. Rows are compared seed by seed with those that are controls. A study of your own is a file
with a :class:`Study`, which ``python -m experiments.sweep FILE.py:NAME`` runs;
``docs/tutorials/command-line.md`` shows one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from experiments.train.checks import check, check_choice
from experiments.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model that is compared with others."""

    label: str
    """Its name in tables."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Options that differ from a column's recipe."""
    lr_factor: float = 1.0
    """By what the recipe's step size is multiplied."""


CONTROLS = {
    "dense": Row(label="dense", changes={"router": "dense"}),
    "dense-lr2": Row(label="dense, twice the step size", changes={"router": "dense"}, lr_factor=2),
    "dense-input-again": Row(
        label="dense, layers see the input again",
        changes={"router": "dense", "input_again": True},
    ),
    "one-expert": Row(label="one expert", changes={"experts": 1}),
    "random": Row(label="frozen random router", changes={"router": "random"}),
}
"""What else may do what experts do: rows for any study. ``input_again`` is of nodes of a graph."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows that are compared on columns."""

    name: str
    """Of its folder of results."""
    about: str
    """What is asked, and what was tuned."""
    columns: Mapping[str, RunConfig]
    """The recipe of each data set; its seeds are those of all rows."""
    rows: Mapping[str, Row]
    controls: tuple[str, ...] = ()
    """The rows that others are compared with. The first is what FLOPs are relative to."""
    published: Mapping[str, str] = field(default_factory=dict)
    """Figures of others by ``COLUMN/ROW``."""

    def __post_init__(self) -> None:
        for control in self.controls:
            check_choice("controls", control, self.rows)
        known = [f"{column}/{row}" for column in self.columns for row in self.rows]
        for cell in self.published:
            check_choice("published", cell, known)

    def config(self, column: str, row: str) -> RunConfig | None:
        """The configuration of a cell; ``None`` where the column leaves out the row.

        Raises:
            ValueError: options of the row that the column's recipe does not have, or of another
                type.
        """
        recipe, changes = self.columns[column], self.rows[row].changes
        recipe = replace(recipe, lr=self.rows[row].lr_factor * recipe.lr)
        known = [one.name for one in fields(recipe)]
        for option in changes:
            check_choice(f"rows: {row}", option, known)
        try:
            return replace(recipe, **changes)
        except TypeError as error:
            got = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            raise ValueError(
                f"rows: {row}: got {got}, expected values of the options' types ({error})"
            ) from error

    def cells(self, columns: Sequence[str] = (), rows: Sequence[str] = ()) -> dict[str, RunConfig]:
        """The cells of some columns and rows, by default of all: ``COLUMN/ROW`` and configuration.

        Raises:
            ValueError: a column or row that the study does not have, or none that columns have.
        """
        for kind, names, known in (("columns", columns, self.columns), ("rows", rows, self.rows)):
            unknown = [name for name in names if name not in known]
            check(not unknown, kind, ", ".join(unknown), f"some of {', '.join(known)}")
        cells = {}
        for column, row in product(columns or self.columns, rows or self.rows):
            config = self.config(column, row)
            if config is not None:
                cells[f"{column}/{row}"] = config
        check(cells, "rows", ", ".join(rows), f"some that {', '.join(columns)} has")
        return cells

    def described(self) -> dict[str, Any]:
        """What its tables need beside the cells, also when the study is gone."""
        return {
            "study": self.name,
            "about": self.about,
            "columns": list(self.columns),
            "rows": list(self.rows),
            "labels": {name: row.label for name, row in self.rows.items()},
            "controls": list(self.controls),
            "published": dict(self.published),
        }
