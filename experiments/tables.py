"""Tables from result files: ``python -m experiments.tables`` rewrites the docs, ``--check`` only compares.

A table stands between ``<!-- table: STUDY -->`` and ``<!-- end -->``; it is generated from ``results/STUDY.json``. With
``<!-- table: STUDY: VARIANT VARIANT -->`` it has those variants only; ``<!-- pairs: STUDY: VARIANT/VARIANT ... -->``
compares variants seed by seed. ``<!-- benchmark: NAME -->`` and ``<!-- swap: NAME -->`` are what
``experiments.benchmark`` wrote, ``<!-- presets: NAME -->`` runs of ``experiments.train``, each beside its dense model.
``<!-- cells: routers -->`` is the table of ``experiments.sweep routers``,
``<!-- cells: routers: COLUMN -->`` a column of it, and ``<!-- gains: routers: COLUMN COLUMN -->``
what the default router gains in some columns. ``<!-- arms: starts -->`` is the table of ``experiments.sweep starts``,
``<!-- confirmed: starts-confirmed -->`` that of its second stage, ``<!-- curves: curves -->`` that of
``experiments.sweep curves``.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import tyro

from experiments.config import check
from experiments.files import read_json

ROOT = Path(__file__).parent.parent
MARKED = re.compile(
    r"(<!-- (?P<kind>table|pairs|presets|benchmark|swap|cells|gains|map|arms|confirmed|curves): (?P<study>[\w-]+)"
    r"(?:: (?P<variants>[\w/ -]+?))? -->\n).*?(<!-- end -->)",
    re.DOTALL,
)
Line: TypeAlias = dict[str, str]
"""A line of a table, by column."""


def render(page: str, results: Path = ROOT / "results") -> str:
    """The page with all its tables generated anew."""
    from experiments import curves, starts

    makers: dict[str, Callable[..., str]] = {
        "table": study_table,
        "pairs": pair_table,
        "presets": preset_table,
        "map": map_table,
        "cells": cell_tables,
        "gains": gain_table,
        "arms": starts.table,
        "confirmed": starts.confirmed_table,
        "curves": curves.table,
    }
    readers = {"cells": read_cells, "gains": read_cells}
    readers |= {"arms": starts.read_results, "curves": starts.read_results}
    readers["confirmed"] = starts.read_confirmed

    def table(match: re.Match[str]) -> str:
        read_folder = readers.get(match["kind"])
        path = results / match["study"] if read_folder else results / f"{match['study']}.json"
        only = [] if match["variants"] is None else [match["variants"].split()]
        try:
            content = read_folder(path) if read_folder else read_json(path, dict[str, Any])
            made = makers.get(match["kind"], benchmark_table)(content, *only)
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: lacks what the mark '{match['kind']}' shows ({error!r})"
            ) from error
        return f"{match[1]}{made}\n{match[5]}"

    return MARKED.sub(table, page)


def markdown(lines: Sequence[Line], left: Iterable[str] = ()) -> str:
    """A table of at least one line, aligned to the right but for the first column and those in ``left``."""
    columns = list(lines[0])
    dashes = ["---" if column in (columns[0], *left) else "---:" for column in columns]
    head, *body = (
        f"| {' | '.join(cells)} |" for cells in (columns, *(line.values() for line in lines))
    )
    return "\n".join([head, f"|{'|'.join(dashes)}|", *body])


def known(lines: Sequence[Line]) -> list[Line]:
    """The lines without the columns of which nothing is known."""
    names = [name for name in lines[0] if any(line[name] != "–" for line in lines)]
    return [{name: line[name] for name in names} for line in lines]


def study_table(study: dict[str, Any], only: Sequence[str] = ()) -> str:
    """One line a variant, or one of ``only``: the metric on the test set, what it costs, what the routing follows."""
    variants = {variant["variant"]: variant for variant in study["variants"]}
    missing = [name for name in only if name not in variants]
    check(not missing, "only", ", ".join(missing), f"some of {', '.join(variants)}")
    narrow, wide = variants.get(study["reference"]), variants.get(study["wide"])
    names = {
        name for variant in study["variants"] for layer in variant["routing"] for name in layer
    }
    followed = sorted(name for name in names if name.startswith("ami_"))
    routed = f"AMI of expert and {', '.join(name[4:] for name in followed)}; mean of layers"
    if "nmi" in names:
        routed = "NMI of expert and region, layer by layer"
    lines = []
    for variant in map(variants.__getitem__, only or variants):
        found = [spread(layer["nmi"], ".3f") for layer in variant["routing"] if "nmi" in layer]
        if "nmi" not in names:
            means = (
                [layer[name]["mean"] for layer in variant["routing"] if name in layer]
                for name in followed
            )
            found = [f"{statistics.fmean(values):.2f}" for values in means if values]
        lines.append(
            {
                "variant": variant["label"],
                f"test {variant['metric']} (%)": percent(variant["test"]),
                "n": str(variant["test"]["n"]),
                "active FLOPs": "–"
                if narrow is None
                else f"{variant['flops'] / narrow['flops']:.2f}×",
                "parameters": f"{variant['parameters']:,}",
                "headroom recovered": headroom(variant, narrow, wide),
                routed: ", ".join(found) or "–",
            }
        )
    return markdown(known(lines), left=[routed]) if lines else "No variant is finished."


def preset_table(found: dict[str, Any]) -> str:
    """One line a preset: its dense model, what it trains by default, and how many experts of a layer took a token."""
    runs = {variant["variant"]: variant for variant in found["variants"]}
    lines = []
    for name, moe in (
        (name.removesuffix("-moe"), run) for name, run in runs.items() if name.endswith("-moe")
    ):
        dense, experts = runs[f"{name}-dense"], moe["config"]["experts"]
        alive = [experts - layer["dead"]["mean"] for layer in moe["routing"]]
        lines.append(
            {
                "run": moe["label"],
                "metric": moe["metric"],
                "n": str(moe["test"]["n"]),
                "dense": percent(dense["test"]),
                "with experts": percent(moe["test"]),
                "difference": f"{100 * (moe['test']['mean'] - dense['test']['mean']):+.2f}",
                "experts alive, by layer": f"{extremes(alive, '.3g')} of {experts}",
                "× FLOPs": f"{moe['flops'] / dense['flops']:.2f}",
            }
        )
    return markdown(lines, left=("metric",))


def pair_table(study: dict[str, Any], pairs: Sequence[str]) -> str:
    """One line a pair ``"VARIANT/OTHER"``: the difference on the test set, seed by seed (or split by split).

    Where the variants were chosen on some of the seeds, also the difference on the others alone. The variants of a pair
    need the same seeds.
    """
    variants = {variant["variant"]: variant for variant in study["variants"]}
    chosen_on = set(study.get("chosen_on", ()))
    lines = []
    for pair in pairs:
        names = pair.split("/")
        fits = len(names) == 2 and set(names) <= set(variants)
        check(fits, "pairs", repr(pair), f"VARIANT/OTHER of {', '.join(variants)}")
        one, other = (variants[name] for name in names)
        seeds = one["config"]["seeds"]
        check(
            seeds == other["config"]["seeds"],
            "pairs",
            f"{pair!r}, whose variants have other seeds each",
            "the same",
        )
        found = [
            100 * (a - b)
            for a, b in zip(one["test"]["values"], other["test"]["values"], strict=True)
        ]
        line = {
            "variant": one["label"],
            "minus": other["label"],
            "mean difference ± std of differences": mean_std(found, "+.2f"),
            "better in": f"{sum(value > 0 for value in found)} of {len(found)}",
        }
        if chosen_on:
            without = (
                f"without seeds {', '.join(map(str, sorted(chosen_on)))}, which chose the variants"
            )
            rest = [
                value for value, seed in zip(found, seeds, strict=True) if seed not in chosen_on
            ]
            line[without] = mean_std(rest, "+.2f")
        lines.append(line)
    return markdown(lines, left=["minus"])


Cells: TypeAlias = dict[str, dict[str, dict[str, Any]]]
"""The content of the files of ``experiments.sweep routers``, by column and row."""


def read_cells(folder: Path) -> Cells:
    """All that there are, in the order of rows and columns."""
    from experiments.routers import COLUMNS, ROWS

    files = {column: {row: folder / column / f"{row}.json" for row in ROWS} for column in COLUMNS}
    found = {
        column: {
            row: read_json(path, dict[str, Any]) for row, path in rows.items() if path.exists()
        }
        for column, rows in files.items()
    }
    return {column: rows for column, rows in found.items() if rows}


def cell_tables(cells: Cells, columns: Sequence[str] = ()) -> str:
    """One line a row: in each column the difference to the dense model of equal FLOPs, seed by seed; or the whole of
    the columns that are named."""
    from experiments.routers import ROWS

    if columns:
        return "\n\n".join(
            markdown([cell_line(row, cells[column]) for row in cells[column]]) for column in columns
        )
    lines = []
    for row, (label, _) in ROWS.items():
        line = {"test − equal FLOPs (points)": label}
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
    return mean_std(differences(cell, other), "+.2f")


def differences(cell: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """By seed the difference on the test set, in points, of cells that have the same seeds."""
    pairs = zip(cell["test"]["values"], other["test"]["values"], strict=True)
    return [100 * (a - b) for a, b in pairs]


def gain_table(cells: Cells, columns: Sequence[str]) -> str:
    """One line a column: what token choice adds to a dense model of its FLOPs, and what a dense
    model of its parameters does."""
    from experiments.routers import ROWS

    base = "dense-flops"
    lines = []
    for column in columns:
        score = 100 * cells[column][base]["test"]["mean"]
        line = {"test (points)": column, ROWS[base][0]: f"{score:.2f}"}
        for row in ("token-choice", "dense-parameters"):
            line[ROWS[row][0]] = difference(cells[column][row], cells[column][base])
        lines.append(line)
    return markdown(lines)


def cell_line(row: str, cells: dict[str, dict[str, Any]]) -> Line:
    """A cell in full; of routed experts how many are alive, their share of the output, and the test without them."""
    from experiments.routers import ROWS

    cell, dense, routed = cells[row], cells.get("dense", cells[row]), cells[row]["routed"]
    time = {arm: values["wall"]["median"] for arm, values in cell["time"].items()}
    alive = [cell["config"]["experts"] - layer["dead"]["mean"] for layer in cell["routing"]]
    return {
        "row": ROWS[row][0],
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
        "commit": (cell["environment"]["commit"] or "–")[:7],
    }


def map_table(found: dict[str, Any]) -> str:
    """One line a width, number of labels and way that regimes show: experts, and in brackets the oracle, above the
    dense model of equal FLOPs, by number of regimes."""
    from experiments.regime_map import LABELS, REGIMES, WAYS, WIDTHS, gains

    known, lines = gains(found), list[Line]()
    for shown, width, labels in product(WAYS, WIDTHS, LABELS):
        line = {"regime shows in": shown, "width": str(width), "labels a regime": str(labels)}
        for count in REGIMES:
            pair = [
                known.get((count, labels, width, shown, model)) for model in ("experts", "oracle")
            ]
            means = [f"{statistics.fmean(values):+.1f}" if values else "–" for values in pair]
            line["1 regime" if count == 1 else f"{count} regimes"] = f"{means[0]} ({means[1]})"
        lines.append(line)
    return markdown(lines)


def benchmark_table(found: dict[str, Any]) -> str:
    """What a benchmark found, and where."""
    table = markdown(benchmark_lines(found["variants"]))
    return f"{table}\n\n{measured_on(found['environment'], found['config'].get('device', 'cpu'))}"


def benchmark_lines(variants: Mapping[str, Any]) -> list[Line]:
    """One line a variant: times, ratios to the reference, memory; of ``train``, shares; of ``swap``, accuracies."""
    if any("runs" in variant for variant in variants.values()):
        return known([{"": name} | swap_line(row) for name, row in variants.items()])
    if any("waits" in variant or "error" in variant for variant in variants.values()):
        return [gpu_line(name, variant) for name, variant in variants.items()]
    return [_time_line(name, variant) for name, variant in variants.items()]


def _time_line(name: str, variant: Mapping[str, Any]) -> Line:
    if parts := variant.get("parts"):
        line = {
            "preset": name,
            "batches": str(variant["batches"]),
            "seconds": f"{sum(parts.values()):.3f}",
        }
        return line | {
            f"{part} (%)": f"{100 * share:.1f}" for part, share in variant["share"].items()
        }
    wall, ratio = {key: 1000 * value for key, value in variant["wall"].items()}, variant["ratio"]
    return {
        "variant": name,
        "wall (ms)": f"{wall['median']:,.1f}",
        "from": f"{wall['min']:,.1f}",
        "to": f"{wall['max']:,.1f}",
        "× wall": f"{ratio['wall']:.3f}" if "wall" in ratio else "–",
        "× CPU": f"{ratio['cpu']:.3f}" if "cpu" in ratio else "–",
        "× FLOPs": "–" if ratio.get("flops") is None else f"{ratio['flops']:.2f}",
        "MiB": f"{variant['memory'] / 2**20:,.0f}" if "memory" in variant else "–",
    }


def gpu_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A layer on a GPU: times, waits of a step, whether results are the CPU's; or only why it failed."""
    columns = ("moe (ms)", "dense (ms)", "×", "waits", "float64", "float32", "error")
    line = {"variant": name} | dict.fromkeys(columns, "–")
    for dtype, of in variant.get("equal", {}).items():
        line[dtype] = "equal" if of["within"] else "NOT EQUAL"
    if "error" in variant:
        return line | {"error": variant["error"].partition("\n")[0]}
    moe, dense = (1000 * of["median"] for of in (variant["wall"], variant["dense"]["wall"]))
    times = {"moe (ms)": f"{moe:.2f}", "dense (ms)": f"{dense:.2f}", "×": f"{moe / dense:.2f}"}
    return line | times | {"waits": str(sum(variant["waits"].values()))}


def swap_line(row: Mapping[str, Any]) -> Line:
    """Dense and MoE of the seeds that both have, and the other arms, with their number of seeds if it is less; ok is a
    MoE whose mean is no less than a standard deviation below the dense one's."""
    runs: dict[str, dict[int, Any]] = {
        arm: {run["seed"]: run for run in of} for arm, of in row["runs"].items()
    }
    moes = runs.get("moe", {})
    both = sorted(set(runs.get("dense", {})) & set(moes))
    dense, moe = ([100 * runs[arm][seed]["test"] for seed in both] for arm in ("dense", "moe"))
    line = {
        "n": str(len(both) or "–"),
        "dense": mean_std(dense),
        "moe": mean_std(moe),
        "moe − dense": "–",
        "ok": "–",
    }
    if both:
        difference, std = (
            statistics.fmean(moe) - statistics.fmean(dense),
            statistics.stdev(dense) if both[1:] else 0.0,
        )
        line |= {"moe − dense": f"{difference:+.2f}", "ok": "ok" if difference >= -std else "no"}
    arms = ("copies", "shared", "dense-flops", "random", "oracle", "k-means", "shared-transform")
    for arm in arms:
        tests = [100 * run["test"] for run in runs.get(arm, {}).values()]
        line[arm] = mean_std(tests) + (f" ({len(tests)})" if 0 < len(tests) < len(both) else "")
    with_shared = runs.get("shared", moes)  # which is the default but for a GNN that routes once
    line["shared-off"] = mean_std(
        [100 * run["off"] for run in with_shared.values() if "off" in run]
    )
    for name, form, shown in (("share", ".2f", with_shared), ("live", ".3g", moes)):
        by_layer = zip(*(run[name] for run in shown.values() if name in run), strict=True)
        means = [statistics.fmean(layer) for layer in by_layer]
        line[name] = (
            extremes(means, form)
            if len(means) > 3
            else " ".join(f"{mean:{form}}" for mean in means) or "–"
        )
    line |= dict.fromkeys(("ms dense / moe / flops", "×", "× shared-transform", "+ms a layer"), "–")
    if times := row.get("time"):
        ms = {
            arm: 1000 * time["wall"]["median"]
            for arm, time in times.items()
            if isinstance(time, dict)
        }
        line["ms dense / moe / flops"] = " / ".join(
            f"{ms[arm]:.1f}" if arm in ms else "–" for arm in ("dense", "moe", "dense-flops")
        )
        for column, arm in (("×", "moe"), ("× shared-transform", "shared-transform")):
            line[column] = f"{ms[arm] / ms['dense']:.2f}" if arm in ms else "–"
        if "moe" in ms:
            line["+ms a layer"] = f"{(ms['moe'] - ms['dense']) / times['layers']:.1f}"
    return line


def extremes(values: Sequence[float], form: str) -> str:
    """The least and the largest value, or the only one."""
    return " to ".join(f"{value:{form}}" for value in dict.fromkeys([min(values), max(values)]))


def measured_on(where: dict[str, Any], device: str) -> str:
    """Hardware, versions and commit of :func:`experiments.run_folder.environment` in a line, for a run on a device."""
    versions = ", ".join(
        f"{name} {where['versions'][name]}" for name in ("torch", "torch-geometric")
    )
    place = where["cpu"] if device == "cpu" else where["gpu"]
    commit = "" if where["commit"] is None else f"; commit {where['commit'][:7]}"
    return f"{place}, {where['threads']} thread{'s' * (where['threads'] > 1)}; {versions}{commit}."


def mean_std(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation of values."""
    if not values:
        return "–"
    return spread(
        {"mean": statistics.fmean(values), "std": statistics.stdev(values) if values[1:] else None},
        form,
    )


def spread(figures: Mapping[str, Any], form: str = ".2f", factor: int = 1) -> str:
    """Mean ± sample standard deviation that are known."""
    mean = f"{factor * figures['mean']:{form}}"
    return (
        mean
        if figures["std"] is None
        else f"{mean} ± {factor * figures['std']:{form.removeprefix('+')}}"
    )


percent = partial(spread, factor=100)


def headroom(
    variant: dict[str, Any], narrow: dict[str, Any] | None, wide: dict[str, Any] | None
) -> str:
    """(variant - dense) / (dense four times as wide - dense), where this is known and more than twice the spread."""
    if narrow is None or wide is None or variant is narrow or variant is wide:
        return "–"
    low, high = narrow["test"], wide["test"]
    if low["std"] is None or high["std"] is None:
        return "–"
    room, gain = high["mean"] - low["mean"], variant["test"]["mean"] - low["mean"]
    return (
        "no headroom" if room <= 2 * max(low["std"], high["std"]) else f"{100 * gain / room:.0f} %"
    )


def update(pages: tuple[Path, ...] = (), check: bool = False) -> None:
    """Generate the tables of pages anew.

    Args:
        pages: the pages; by default the README and all of docs.
        check: only compare; exit 1 where one is out of date.
    """
    for page in pages or [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        try:
            new = render(old := page.read_text())
        except (OSError, ValueError) as error:
            sys.exit(f"error: {page}: {error}")
        if new != old:
            if check:
                sys.exit(f"{page} is out of date: run python -m experiments.tables")
            page.write_text(new)


if __name__ == "__main__":
    tyro.cli(update, prog="python -m experiments.tables", description=__doc__)
