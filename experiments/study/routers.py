"""One table of routers on images and graphs: ``python -m experiments.sweep routers``.

A cell is a router or a control (a row) on a data set (a column), in
``results/routers/COLUMN/ROW.json``: the summary of its run. A cell that is there is skipped. All
rows of a column have its recipe, which was not tuned for any of them: E = 8, K = 1, a router in
each layer. All but ``copies`` have a shared expert beside the routed ones, in which every router
fits; two rows keep scale and shape apart.

A router of your own is a row more, ``--router FILE.py:Class``, beside token choice, a frozen random
router and the dense model of equal FLOPs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.show.cells import Cells, differences, read_cells
from experiments.show.tables import markdown
from experiments.study.studies import Row, Study
from experiments.train.checks import check
from experiments.train.config import GraphConfig, RouterOptions, RunConfig
from experiments.train.presets import (
    DIGITS,
    DIGITS_GRAPH,
    MINESWEEPER,
    MOSAIC,
    TEN,
)
from experiments.train.scores import form_of, mean_std, percent
from experiments.train.user_code import file_of, load_object

ROWS: dict[str, Row] = {
    "dense": Row(label="dense", changes={"router": "dense"}),
    "dense-flops": Row(
        label="dense, equal active FLOPs",
        changes={"router": "dense", "equal": "flops", "equal_to": "token_choice"},
    ),
    "dense-parameters": Row(
        label="dense, equal parameters",
        changes={"router": "dense", "equal": "parameters", "equal_to": "token_choice"},
    ),
    "token-choice": Row(label="token choice", changes={"router": "token_choice"}),
    "weight-1": Row(
        label="token choice, weights of 1",
        changes={"router": "token_choice", "options": RouterOptions(weight="straight_through")},
    ),
    "copies": Row(
        label="token choice, copies", changes={"router": "token_choice", "start": "copies"}
    ),
    "expert-choice": Row(label="expert choice", changes={"router": "expert_choice"}),
    "attention-vote": Row(label="attention votes", changes={"router": "attention_vote"}),
    "multi-centroid": Row(label="multi-centroid, learned", changes={"router": "multi_centroid"}),
    "k-means": Row(
        label="multi-centroid, k-means", changes={"router": "multi_centroid", "kmeans_init": True}
    ),
    "soft-slots": Row(label="soft slots", changes={"router": "soft_slots"}),
    "oracle": Row(label="told the domain", changes={"router": "oracle"}),
    "random": Row(label="frozen random", changes={"router": "random"}),
    "uniform": Row(label="uniform average", changes={"router": "uniform"}),
}
"""The rows. Dense models of equal cost are matched to token choice; no column is told a domain."""

COLUMNS: dict[str, RunConfig] = {
    "digits": replace(DIGITS, seeds=TEN),
    "digits-graph": replace(DIGITS_GRAPH, seeds=TEN),
    "mosaic": replace(MOSAIC, seeds=TEN),
    "minesweeper": replace(
        MINESWEEPER, hidden=16, epochs=200, data_root=Path("heterophilous"), seeds=TEN
    ),
}
"""The configuration of each data set's cells; data roots are inside that of the command line.

Ten seeds or splits.
"""
SHOWN = (
    "digits",
    "cifar10",
    "imagenette",
    "pacs",
    "digits-graph",
    "mosaic",
    "minesweeper",
    "facebook",
    "arxiv",
)
"""Columns of the page; commit 2adfe9fb has the recipes of those that are no columns here."""


@dataclass(frozen=True, kw_only=True)
class RoutersTable(Study):
    """The same routers on images and graphs, and what graphs have in another form."""

    def config(self, column: str, row: str) -> RunConfig | None:
        """The configuration of a cell; ``None`` where the column leaves out the row."""
        base = self.columns[column]
        if row == "oracle" or (row == "soft-slots" and isinstance(base, GraphConfig)):
            return None
        changes = dict(self.rows[row].changes)
        if changes["router"] != "dense" or "equal" in changes:  # a dense one equals that shape
            changes.setdefault("start", "shared")
        if isinstance(base, GraphConfig):
            if row == "copies":
                changes["shared_router"] = False
            if row == "attention-vote":  # votes of all nodes for all would be N x N
                changes["options"] = RouterOptions(scope="neighbors")
        return replace(base, **changes)


TABLE = RoutersTable(
    name="routers",
    about="The same routers and controls on images and graphs; nothing was tuned for a row.",
    columns=COLUMNS,
    rows=ROWS,
    controls=("dense-flops",),
)
BESIDE = ("dense-flops", "token-choice", "random")
"""The rows that a router of one's own is compared with."""


def table(root: Path, router: str | None = None, k: int = 1) -> RoutersTable:
    """The table, with data inside a root folder; or that of a router of one's own, at K = ``k``.

    The name of that row ends with a digest of the file, so that an edited file is a new row. Its
    cells are in a folder of their own.
    """
    columns = {
        name: replace(config, data_root=root / config.data_root, k=k)
        for name, config in TABLE.columns.items()
    }
    if router is None:
        legal = "1: the cells of the table have one expert a token"
        check(k == 1, "k", f"{k} without --router", legal)
        return replace(TABLE, columns=columns)
    import gmoe  # and so torch, which --help does without

    is_named = all(router.rpartition(":"))
    check(is_named, "router", repr(router), "FILE.py:Class; routers of the table are --rows")
    made = load_object("router", router)
    is_router = isinstance(made, type) and issubclass(made, gmoe.Router)
    check(is_router, "router", repr(router), "a subclass of gmoe.Router")
    digest = hashlib.sha256(Path(file_of(router)).read_bytes()).hexdigest()
    own = Row(label=f"`{made.__name__}`, your own", changes={"router": router})
    return replace(
        TABLE,
        name="routers-own" if k == 1 else f"routers-own-k{k}",
        columns=columns,
        rows={f"own-{made.__name__}-{digest[:8]}": own} | {row: ROWS[row] for row in BESIDE},
        controls=BESIDE,
    )


def read_table(folder: Path) -> Cells:
    """The finished cells, in the order of columns and rows."""
    return read_cells(folder, SHOWN, ROWS)


def cell_tables(cells: Cells) -> str:
    """One line a row: in each column the difference to the dense model of equal FLOPs, seed by
    seed."""
    lines = []
    for row, own in ROWS.items():
        if not any(row in rows for rows in cells.values()):
            continue
        line = {"test − equal FLOPs (points)": own.label}
        for column, rows in cells.items():
            line[column] = (
                "–" if row not in rows else difference(rows[row], rows.get("dense-flops"))
            )
            if row == "dense-flops":
                line[column] = percent(rows[row]["test"]) if row in rows else "–"
        lines.append(line)
    return markdown(lines) if cells else "No cell is finished."


def difference(cell: dict[str, Any], other: dict[str, Any] | None) -> str:
    """The mean ± std of the difference on the test set, seed by seed."""
    if other is None or cell["config"]["seeds"] != other["config"]["seeds"]:
        return "–"
    return mean_std(differences(cell, other), form_of(cell["metric"]))
