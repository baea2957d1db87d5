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
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

import gmoe
from experiments.show.tables import markdown, short_commit
from experiments.study import routers
from experiments.train.checks import check
from experiments.train.config import GraphConfig, RouterOptions, RunConfig
from experiments.train.files import read_json, replacing
from experiments.train.scores import interval, percent
from experiments.train.user_code import file_of, load_conv, load_object
from gmoe.conv.kinds import factory_of

DENSE, DEFAULT, RANDOM = CONTROLS = ("dense-flops", "token-choice", "random")
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
    row, labels, suffix = DEFAULT, list[str](), ""
    if router is not None:
        legal = "FILE.py:Class or package.module:Class; routers of the table are --rows"
        check(all(router.rpartition(":")), "router", repr(router), legal)
        found = load_object("router", router)
        fits = isinstance(found, type) and issubclass(found, gmoe.Router)
        check(fits, "router", repr(router), "a subclass of gmoe.Router")
        kinds = inspect.signature(found).parameters.values()
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
        labels.insert(0, routers.ROWS[row][0])
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
    names = columns or [name for name in SHORT if name in routers.COLUMNS]
    if own.conv is not None and not columns:
        names = [name for name in names if isinstance(routers.COLUMNS[name], GraphConfig)]
    found = dict[str, dict[str, RunConfig]]()
    for cell, config in routers.cells(names, CONTROLS, root).items():
        column, _, row = cell.partition("/")
        if own.conv is not None:
            fits = isinstance(config, GraphConfig)
            check(fits, "conv", f"{own.conv!r} for {column}", "columns of graphs")
            config = replace(config, conv=(own.conv,))  # type: ignore[call-arg]  # of graphs
        if own.k is not None:
            config = replace(config, k=own.k)
        found.setdefault(own.column(column), {})[row] = config
    if own.router is not None:
        for rows in found.values():
            rows[own.row] = replace(rows[DEFAULT], router=own.router, options=RouterOptions())
            rows[own.matched] = replace(rows[DENSE], equal_to=own.router)
    return found


def read_row(own: Own, folder: Path) -> routers.Cells:
    """The finished cells of the row and its controls, by column, of columns that have the row."""
    found: routers.Cells = {}
    for column in map(own.column, routers.COLUMNS):
        paths = {row: folder / column / f"{row}.json" for row in (own.row, own.matched, *CONTROLS)}
        if paths[own.row].exists():
            found[column] = {
                row: read_json(path, dict[str, Any]) for row, path in paths.items() if path.exists()
            }
    return found


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
        return routers.ROWS[self.control][0]

    @property
    def mean(self) -> float:
        """Of the differences."""
        return fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Student's t."""
        return interval(self.differences)

    @property
    def better(self) -> int:
        """Seeds on which the row is above the control."""
        return sum(value > 0 for value in self.differences)

    def __str__(self) -> str:
        low, high = self.interval
        seeds = f"{self.better} of {len(self.differences)}"
        return f"{self.mean:+.2f} ({low:+.2f} to {high:+.2f}), {seeds}"


def compare(own: Own, cells: routers.Cells) -> tuple[list[Comparison], list[str]]:
    """All that can be compared, and in words what cannot."""
    found, missing = list[Comparison](), list[str]()
    for column, rows in cells.items():
        for control in CONTROLS:
            if control == own.row:
                continue
            taken = own.matched if control == DENSE and costs_other_flops(own, rows) else control
            mine, other = rows[own.row], rows.get(taken)
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
                    differences=routers.differences(mine, other),
                    row_test=mine["test"],
                    control_test=other["test"],
                    metric=mine["metric"],
                    flops=mine["flops"] / other["flops"],
                )
                found.append(one)
    return found, missing


def strangers(own: Own, cells: routers.Cells) -> list[str]:
    """Controls that another version of the code has trained, in words."""
    found = []
    for column, rows in cells.items():
        here = _version(rows[own.row])
        others = {row: _version(cell) for row, cell in rows.items()}
        names = [row for row, version in others.items() if version != here]
        if names:
            what = "; ".join(f"{row} of {others[row]}" for row in names)
            found.append(f"{column}: the row was trained by {here}, reused: {what}")
    return found


def _version(cell: Mapping[str, Any]) -> str:
    environment = cell["environment"]
    commit = short_commit(environment) if environment["commit"] else "an unknown commit"
    return f"{commit}, torch {environment['versions']['torch']}"


def row_table(own: Own, found: Sequence[Comparison]) -> str:
    """In Markdown: a line a column, the mean difference to each control, its interval, and on how
    many seeds it is above 0."""
    lines = []
    for column, of_column in _by_column(found).items():
        test = percent(next(iter(of_column.values())).row_test)
        line = {"data": column, f"{own.label}, test (%)": test}
        for control in CONTROLS:
            if control != own.row:
                one = of_column.get(control)
                line[f"− {routers.ROWS[control][0]} (points)"] = "–" if one is None else str(one)
        dense = of_column.get(DENSE)
        line["× its FLOPs"] = "–" if dense is None else f"{dense.flops:.2f}"
        lines.append(line)
    return markdown(lines) if lines else "No cell of the row is finished."


def _by_column(found: Sequence[Comparison]) -> dict[str, dict[str, Comparison]]:
    """By column and control."""
    columns = dict[str, dict[str, Comparison]]()
    for one in found:
        columns.setdefault(one.column, {})[one.control] = one
    return columns


def row_csv(found: Sequence[Comparison]) -> str:
    """A line a column and control; the last field has the differences by seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = "data,minus,mean,low,high,n,better,metric,test,control_test,flops_ratio,by_seed"
    writer.writerow(head.split(","))
    for one in found:
        figures = [one.mean, *one.interval]
        tests = [100 * test["mean"] for test in (one.row_test, one.control_test)]
        by_seed = " ".join(f"{value:.4f}" for value in one.differences)
        line = [one.column, one.label, *(f"{value:.4f}" for value in figures)]
        line += [str(len(one.differences)), str(one.better), one.metric]
        line += [*(f"{value:.4f}" for value in tests), f"{one.flops:.4f}", by_seed]
        writer.writerow(line)
    return text.getvalue()


def row_latex(own: Own, found: Sequence[Comparison]) -> str:
    """A ``tabular`` for ``booktabs``: points above each control, with 95 % intervals."""
    controls = [control for control in CONTROLS if control != own.row]
    head = " & ".join(f"$-$ {routers.ROWS[control][0]}" for control in controls)
    lines = [
        f"% {own.label}: points on the test set, mean over seeds [95 % interval, Student's t]",
        rf"\begin{{tabular}}{{l{'r' * len(controls)}}}",
        r"\toprule",
        rf"data & {head} \\",
        r"\midrule",
    ]
    for column, of_column in _by_column(found).items():
        seeds = len(next(iter(of_column.values())).differences)
        fields = [f"{column.replace('_', chr(92) + '_')} ($n = {seeds}$)"]
        for control in controls:
            fields.append("--")
            if one := of_column.get(control):
                low, high = one.interval
                fields[-1] = f"${one.mean:+.2f}$ $[{low:+.2f}, {high:+.2f}]$"
        lines.append(" & ".join(fields) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def row_figure(own: Own, found: Sequence[Comparison]) -> Figure:
    """A panel a column, a line a control: mean difference and 95 % interval."""
    columns = _by_column(found)
    controls = [control for control in CONTROLS if control != own.row]
    across = min(len(columns), 4)
    down = -(-len(columns) // across)
    figure = Figure(figsize=(2.2 + 2.4 * across, 0.9 + 1.5 * down), layout="constrained")
    panels = figure.subplots(down, across, sharey=True, squeeze=False).flat
    for axis, (column, of_column) in zip(panels, columns.items(), strict=False):
        axis.axvline(0, color="#6e7781", linewidth=1)
        for place, control in enumerate(controls):
            if one := of_column.get(control):
                low, high = one.interval
                error = [[one.mean - low], [high - one.mean]]
                axis.errorbar(one.mean, place, xerr=error, fmt="o", color="#0969da")
        seeds = len(next(iter(of_column.values())).differences)
        axis.set_title(f"{column}, n = {seeds}", fontsize=10)
        axis.set_yticks(range(len(controls)), [routers.ROWS[control][0] for control in controls])
        axis.set_ylim(len(controls) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(figure.axes)[len(columns) :]:
        axis.set_visible(False)
    figure.supxlabel("test, points above the control (95 % interval)", fontsize=10)
    figure.suptitle(own.label, fontsize=11)
    return figure


def write_row(own: Own, found: Sequence[Comparison], folder: Path) -> list[Path]:
    """Write table and figure in a folder: CSV, LaTeX, PNG and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"csv": row_csv(found), "tex": row_latex(own, found)}
    paths = [folder / f"{own.file}.{kind}" for kind in (*texts, "png", "svg")]
    figure = row_figure(own, found)
    for path in paths:
        kind = path.suffix[1:]
        with replacing(path) as fresh:
            if kind in texts:
                fresh.write_text(texts[kind], encoding="utf-8")
            else:
                figure.savefig(fresh, dpi=200, facecolor="white", format=kind)
    return paths
