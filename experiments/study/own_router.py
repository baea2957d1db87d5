"""A row of your own in the table of routers: ``python -m experiments.sweep routers --router ...``.

The row is your router's, your conv's in place of the column's, or both; its recipe is the
column's, as for every row of :mod:`experiments.study.routers`. It is compared seed by seed with
three controls of the same recipe: the dense model of equal active FLOPs, token choice, and a frozen
random router. Controls that ``results/routers`` holds are not run again.

Files are named after your class and a digest of its file, so that they never are another row's,
and an edited file is a new row. With your conv, or another K, controls are others too: then all
cells lie in a folder of their own beside the column's.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import gmoe
from experiments.show.cells import Cells, differences, read_cells
from experiments.show.tables import markdown, short_commit
from experiments.study import routers
from experiments.train.checks import check
from experiments.train.config import GraphConfig, RouterOptions, RunConfig
from experiments.train.files import replacing
from experiments.train.scores import Difference, percent
from experiments.train.user_code import file_of, load_conv, load_object
from gmoe.conv.kinds import factory_of

DENSE = "dense-flops"
DEFAULT = "token-choice"
CONTROLS = (DENSE, DEFAULT, "random")
"""What a row is compared with, by the names of their rows."""
SHORT = ("digits", "digits-graph", "mosaic")
"""The columns that need no files, which are taken where none are named."""
TOLERANCE = 0.02
"""Beyond this share, a router costs other FLOPs than token choice: its dense model is another."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """What a user brings, and how its files are called."""

    router: str | None
    conv: str | None
    k: int | None
    row: str  # name of the row's files, a shipped one's where the router is not the user's
    suffix: str  # of columns, whose conv or K is another
    label: str

    @property
    def matched(self) -> str:
        """The row of the dense model of the router's own FLOPs, where these are not token
        choice's."""
        return f"{self.row}-dense-flops"

    @property
    def file(self) -> str:
        """Name of the table's files."""
        return (self.row if self.router else "own") + self.suffix

    def column(self, name: str) -> str:
        """The folder of a column's cells."""
        return name + self.suffix


def own_row(router: str | None, conv: str | None, k: int | None) -> Own:
    """Import what the user named.

    Raises:
        ValueError: it cannot be imported, raises, or is no router or conv.
    """
    row = DEFAULT
    labels = list[str]()
    suffix = ""
    if router is not None:
        legal = "FILE.py:Class or package.module:Class; routers of the table are --rows"
        check(all(router.rpartition(":")), "router", repr(router), legal)
        made = load_object("router", router)
        is_router = isinstance(made, type) and issubclass(made, gmoe.Router)
        check(is_router, "router", repr(router), "a subclass of gmoe.Router")
        kinds = inspect.signature(made).parameters.values()
        takes_k = any(each.name == "k" or each.kind is each.VAR_KEYWORD for each in kinds)
        check(takes_k or k in (None, 1), "k", k, f"1: {router} has no argument k")
        row = f"own-{_called(router)}"
        labels.append(router.rpartition(":")[2])
    if conv is not None:
        factory_of(load_conv(conv))
        suffix += f"+{_called(conv) if ':' in conv else conv}"
        labels.append(f"conv {conv.rpartition(':')[2]}")
    if k not in (None, 1):  # of which the table's cells are
        suffix += f"+k{k}"
        labels.append(f"K = {k}")
    if router is None:
        labels.insert(0, routers.TABLE.rows[row].label)
    return Own(router=router, conv=conv, k=k, row=row, suffix=suffix, label=", ".join(labels))


def _called(name: str) -> str:
    """The class of ``FILE.py:Class`` and a digest of its file."""
    digest = hashlib.sha256(Path(file_of(name)).read_bytes()).hexdigest()
    return f"{name.rpartition(':')[2]}-{digest[:8]}"


def own_cells(own: Own, columns: Sequence[str], root: Path) -> dict[str, dict[str, RunConfig]]:
    """By column, the configurations of the row and of its controls.

    Raises:
        ValueError: an unknown column, or a conv for images.
    """
    known = routers.TABLE.columns
    names = columns or [name for name in SHORT if name in known]
    if own.conv is not None and not columns:
        names = [name for name in names if isinstance(known[name], GraphConfig)]
    by_column = dict[str, dict[str, RunConfig]]()
    for cell, config in routers.cells(names, CONTROLS, root).items():
        column, _, row = cell.partition("/")
        if own.conv is not None:
            is_graph = isinstance(config, GraphConfig)
            check(is_graph, "conv", f"{own.conv!r} for {column}", "columns of graphs")
            config = replace(config, conv=(own.conv,))  # type: ignore[call-arg]  # of graphs
        if own.k is not None:
            config = replace(config, k=own.k)
        by_column.setdefault(own.column(column), {})[row] = config
    if own.router is not None:
        for rows in by_column.values():
            rows[own.row] = replace(rows[DEFAULT], router=own.router, options=RouterOptions())
            rows[own.matched] = replace(rows[DENSE], equal_to=own.router)
    return by_column


def read_row(own: Own, folder: Path) -> Cells:
    """The finished cells of the row and its controls, by column, of columns that have the row."""
    columns = [own.column(name) for name in routers.TABLE.columns]
    cells = read_cells(folder, columns, (own.row, own.matched, *CONTROLS))
    return {column: rows for column, rows in cells.items() if own.row in rows}


def costs_other_flops(own: Own, cells: Mapping[str, Mapping[str, Any]]) -> bool:
    """True if the dense model of the table has other FLOPs than the row's."""
    if own.row not in cells or DEFAULT not in cells:
        return False
    return abs(cells[own.row]["flops"] / cells[DEFAULT]["flops"] - 1) > TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A row beside a control on one column: points on the test set, seed by seed."""

    column: str
    control: str
    """The name of the control's row in the table."""
    differences: list[float]
    row_test: dict[str, Any]
    control_test: dict[str, Any]
    metric: str
    flops: float
    """Active FLOPs of the row, as a multiple of the control's."""

    @property
    def label(self) -> str:
        """What the control is called."""
        return label_of(self.control)

    @property
    def difference(self) -> Difference:
        """Their mean and its 95 % interval."""
        return Difference.of(self.differences)

    @property
    def better(self) -> int:
        """Seeds on which the row is above the control."""
        return sum(value > 0 for value in self.differences)

    def __str__(self) -> str:
        return f"{self.difference}, {self.better} of {len(self.differences)}"


def label_of(control: str) -> str:
    """What a control is called."""
    return routers.TABLE.rows[control].label


def compare(own: Own, cells: Cells) -> tuple[list[Comparison], list[str]]:
    """All that can be compared, and in words what cannot."""
    compared = list[Comparison]()
    missing = list[str]()
    for column, rows in cells.items():
        for control in CONTROLS:
            if control == own.row:
                continue
            taken = own.matched if control == DENSE and costs_other_flops(own, rows) else control
            mine = rows[own.row]
            other = rows.get(taken)
            seeds = mine["config"]["seeds"]
            if other is None:
                missing.append(f"{column}: not compared with {taken}, which is not there")
            elif other["config"]["seeds"] != seeds:
                theirs = other["config"]["seeds"]
                missing.append(
                    f"{column}: not compared with {taken}, whose seeds are {theirs}, not {seeds}"
                )
            else:
                one = Comparison(
                    column=column,
                    control=control,
                    differences=differences(mine, other),
                    row_test=mine["test"],
                    control_test=other["test"],
                    metric=mine["metric"],
                    flops=mine["flops"] / other["flops"],
                )
                compared.append(one)
    return compared, missing


def strangers(own: Own, cells: Cells) -> list[str]:
    """Controls that another version of the code has trained, in words."""
    said = []
    for column, rows in cells.items():
        here = _version(rows[own.row])
        others = {row: _version(cell) for row, cell in rows.items()}
        names = [row for row, version in others.items() if version != here]
        if names:
            what = "; ".join(f"{row} of {others[row]}" for row in names)
            said.append(f"{column}: the row was trained by {here}, reused: {what}")
    return said


def _version(cell: Mapping[str, Any]) -> str:
    environment = cell["environment"]
    commit = short_commit(environment) if environment["commit"] else "an unknown commit"
    return f"{commit}, torch {environment['versions']['torch']}"


def row_table(own: Own, compared: Sequence[Comparison]) -> str:
    """In Markdown: a line a column, the mean difference to each control, its interval, and on how
    many seeds it is above 0."""
    lines = []
    for column, of_column in _by_column(compared).items():
        test = percent(next(iter(of_column.values())).row_test)
        line = {"data": column, f"{own.label}, test (%)": test}
        for control in CONTROLS:
            if control != own.row:
                one = of_column.get(control)
                line[f"− {label_of(control)} (points)"] = "–" if one is None else str(one)
        dense = of_column.get(DENSE)
        line["× its FLOPs"] = "–" if dense is None else f"{dense.flops:.2f}"
        lines.append(line)
    return markdown(lines) if lines else "No cell of the row is finished."


def _by_column(compared: Sequence[Comparison]) -> dict[str, dict[str, Comparison]]:
    """By column and control."""
    columns = dict[str, dict[str, Comparison]]()
    for one in compared:
        columns.setdefault(one.column, {})[one.control] = one
    return columns


def row_csv(compared: Sequence[Comparison]) -> str:
    """A line a column and control; the last field has the differences by seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = "data,minus,mean,low,high,n,better,metric,test,control_test,flops_ratio,by_seed"
    writer.writerow(head.split(","))
    for one in compared:
        difference = one.difference
        figures = [difference.mean, difference.low, difference.high]
        tests = [100 * test["mean"] for test in (one.row_test, one.control_test)]
        by_seed = " ".join(f"{value:.4f}" for value in one.differences)
        line = [one.column, one.label, *(f"{value:.4f}" for value in figures)]
        line += [str(len(one.differences)), str(one.better), one.metric]
        line += [*(f"{value:.4f}" for value in tests), f"{one.flops:.4f}", by_seed]
        writer.writerow(line)
    return text.getvalue()


def row_latex(own: Own, compared: Sequence[Comparison]) -> str:
    """A ``tabular`` for ``booktabs``: points above each control, with 95 % intervals."""
    controls = [control for control in CONTROLS if control != own.row]
    head = " & ".join(f"$-$ {label_of(control)}" for control in controls)
    lines = [
        f"% {own.label}: points on the test set, mean over seeds [95 % interval, Student's t]",
        rf"\begin{{tabular}}{{l{'r' * len(controls)}}}",
        r"\toprule",
        rf"data & {head} \\",
        r"\midrule",
    ]
    for column, of_column in _by_column(compared).items():
        seeds = len(next(iter(of_column.values())).differences)
        fields = [f"{column.replace('_', chr(92) + '_')} ($n = {seeds}$)"]
        for control in controls:
            fields.append("--")
            if one := of_column.get(control):
                difference = one.difference
                interval = f"[{difference.low:+.2f}, {difference.high:+.2f}]"
                fields[-1] = f"${difference.mean:+.2f}$ ${interval}$"
        lines.append(" & ".join(fields) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def row_figure(own: Own, compared: Sequence[Comparison]) -> Figure:
    """A panel a column, a line a control: mean difference and 95 % interval."""
    columns = _by_column(compared)
    controls = [control for control in CONTROLS if control != own.row]
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(2.2 + 2.4 * across, 0.9 + 1.5 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for axis, (column, of_column) in zip(panels, columns.items(), strict=False):
        axis.axvline(0, color="#6e7781", linewidth=1)
        for place, control in enumerate(controls):
            if one := of_column.get(control):
                mean = one.difference.mean
                error = [[mean - one.difference.low], [one.difference.high - mean]]
                axis.errorbar(mean, place, xerr=error, fmt="o", color="#0969da")
        seeds = len(next(iter(of_column.values())).differences)
        axis.set_title(f"{column}, n = {seeds}", fontsize=10)
        axis.set_yticks(range(len(controls)), [label_of(control) for control in controls])
        axis.set_ylim(len(controls) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(figure.axes)[len(columns) :]:
        axis.set_visible(False)
    figure.supxlabel("test, points above the control (95 % interval)", fontsize=10)
    figure.suptitle(own.label, fontsize=11)
    return figure


def write_row(own: Own, compared: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write table and figure in a folder: CSV, LaTeX, PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"csv": row_csv(compared), "tex": row_latex(own, compared)}
    paths = [folder / f"{own.file}.{kind}" for kind in (*texts, "png", "svg")]
    figure = row_figure(own, compared)
    for path in paths:
        kind = path.suffix[1:]
        with replacing(path) as fresh:
            if kind in texts:
                fresh.write_text(texts[kind], encoding="utf-8")
            else:
                figure.savefig(fresh, dpi=200, facecolor="white", format=kind)
    return paths
