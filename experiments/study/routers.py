"""One table of routers on images and graphs: ``python -m experiments.sweep routers``.

A cell is a router or a control (a row) on a data set (a column), in
``results/routers/COLUMN/ROW.json``: the summary of its run, what its routed experts add, and
the time of a step beside the dense model's. A cell that is there is skipped. All rows of a
column have its recipe, which was not tuned for any of them: E = 8, K = 1, a router in each
layer. All but ``copies`` have a shared expert beside the routed ones, in which every router
fits; two rows keep scale and shape apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.show.cells import Cells, differences, read_cells
from experiments.show.tables import Line, extremes, markdown, short_commit
from experiments.study.studies import Row, Study
from experiments.train.config import GraphConfig, RouterOptions, RunConfig
from experiments.train.presets import (
    ARXIV,
    DIGITS,
    DIGITS_GRAPH,
    GRAPH,
    MINESWEEPER,
    MOSAIC,
    PACS,
    SMALL_VIT,
    TEN,
)
from experiments.train.scores import form_of, mean_std, percent, shown

THREE = (0, 1, 2)
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
"""The rows. Dense models of equal cost are matched to token choice."""

COLUMNS: dict[str, RunConfig] = {
    "digits": replace(DIGITS, seeds=TEN),
    "cifar10": replace(SMALL_VIT, data_root=Path(), seeds=THREE),
    "imagenette": replace(
        SMALL_VIT,
        dataset="imagenette",
        data_root=Path(),
        image_size=64,
        patch=8,
        epochs=15,
        seeds=THREE,
    ),
    "pacs": replace(
        PACS,
        data_root=Path(),
        experts=4,
        dim=24,
        vit_heads=2,
        hidden=48,
        precision="32-true",
        seeds=THREE,
    ),
    "digits-graph": replace(DIGITS_GRAPH, seeds=TEN),
    "mosaic": replace(MOSAIC, seeds=TEN),
    "minesweeper": replace(
        MINESWEEPER, hidden=16, epochs=200, data_root=Path("heterophilous"), seeds=TEN
    ),
    "facebook": replace(GRAPH, hidden=16, eval_every=5, data_root=Path("facebook.npz"), seeds=TEN),
    "arxiv": replace(
        ARXIV,
        layers=2,
        hidden=64,
        sampling="neighbor",
        fanout=(10, 5),
        epochs=5,
        data_root=Path("planted"),
        seeds=THREE,
    ),
}
"""The configuration of each data set's cells; data roots are inside that of the command line.

Ten seeds or splits, three where a seed takes long. arxiv is planted:
``python -m experiments.planted ogbn-arxiv``. pacs has an expert a domain, and is a quarter as wide
as imagenette, so that its 18 runs take 45 core-minutes: at 96 wide a step took 0.5 s of one core.
"""
LONG = ("cifar10", "imagenette")
LEFT_OUT = ("dense-parameters", "k-means", "soft-slots", "uniform")
"""Rows that the long columns leave out."""
ONLY = {
    "pacs": ("dense", "dense-flops", "token-choice", "expert-choice", "oracle", "random"),
}
"""Columns that have some rows alone. No other column has the oracle."""


@dataclass(frozen=True, kw_only=True)
class RoutersTable(Study):
    """The same routers on images and graphs: what a column leaves out, or has in another form."""

    def has_cell(self, column: str, row: str) -> bool:
        """True if a column has a row."""
        if column in ONLY:
            return row in ONLY[column]
        if isinstance(self.columns[column], GraphConfig) and row == "soft-slots":
            return False
        return row != "oracle" and not (column in LONG and row in LEFT_OUT)

    def config(self, column: str, row: str) -> RunConfig | None:
        """The configuration of a cell; ``None`` where the column leaves out the row."""
        if not self.has_cell(column, row):
            return None
        base = self.columns[column]
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


def cells(columns: Sequence[str], rows: Sequence[str], root: Path) -> dict[str, RunConfig]:
    """The cells of some columns and rows, by default of all, with data inside a root folder."""
    return {
        cell: replace(config, data_root=root / config.data_root)
        for cell, config in TABLE.cells(columns, rows).items()
    }


def read_table(folder: Path) -> Cells:
    """The finished cells, in the order of columns and rows."""
    return read_cells(folder, TABLE.columns, TABLE.rows)


def cell_tables(cells: Cells, columns: Sequence[str] = ()) -> str:
    """One line a row: in each column the difference to the dense model of equal FLOPs, seed by
    seed; or the whole of the columns that are named."""
    if columns:
        return "\n\n".join(
            markdown([cell_line(row, cells[column]) for row in cells[column]]) for column in columns
        )
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


def domain_table(cells: Cells, columns: Sequence[str]) -> str:
    """One line a row of columns whose images are of several domains.

    The test score in each domain, and by MoE layer what the experts share with the domain.
    """
    lines = []
    for column in columns:
        for row, cell in cells[column].items():
            layers = [layer["ami_domain"] for layer in cell["routing"]]
            lines.append(
                {
                    "row": ROWS[row].label,
                    **{
                        f"{domain} (%)": percent(accuracy)
                        for domain, accuracy in cell["domains"]["accuracy"].items()
                    },
                    "AMI of expert and domain, layer by layer": ", ".join(
                        shown(layer) for layer in layers
                    )
                    or "–",
                }
            )
    return markdown(lines)


def cell_line(row: str, cells: dict[str, dict[str, Any]]) -> Line:
    """A cell in full.

    The number of live experts, their share of the output, and the test score without them.
    """
    cell = cells[row]
    dense = cells.get("dense", cell)
    routed = cell["routed"]
    time = {arm: values["wall"]["median"] for arm, values in cell["time"].items()}
    alive = [cell["config"]["experts"] - layer["dead"]["mean"] for layer in cell["routing"]]
    return {
        "row": ROWS[row].label,
        f"test {cell['metric']} (%)": percent(cell["test"]),
        "n": str(cell["test"]["n"]),
        "− equal FLOPs": "–"
        if row == "dense-flops"
        else difference(cell, cells.get("dense-flops")),
        "× FLOPs": f"{cell['flops'] / dense['flops']:.2f}",
        "parameters": f"{cell['parameters']:,}",
        "× step": f"{time['cell'] / time['dense']:.2f}",
        "× step of dense on CSR": f"{time['cell'] / time['dense-csr']:.2f}"
        if "dense-csr" in time
        else "–",
        "live experts": extremes(alive, ".3g") if alive else "–",
        "share": extremes([share["mean"] for share in routed["share"]], ".2f") if routed else "–",
        "off": percent(routed["off"]) if routed else "–",
        "commit": short_commit(cell["environment"]),
    }
