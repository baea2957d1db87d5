"""The table of ``benchmark swap``, of what it wrote."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def is_ok(dense: Sequence[float], moe: Sequence[float]) -> bool:
    """Whether the mean with experts is no less than a standard deviation below the dense one's."""
    spread = statistics.stdev(dense) if len(dense) > 1 else 0.0
    return statistics.fmean(moe) >= statistics.fmean(dense) - spread


def summary(row: Mapping[str, Any]) -> dict[str, str]:
    """A line of the table, by column; dense and MoE of the seeds that both have."""
    runs: dict[str, dict[int, Any]] = {arm: {run["seed"]: run for run in of} for arm, of in row["runs"].items()}
    both = sorted(set(runs.get("dense", {})) & set(runs.get("moe", {})))
    dense, moe = ([100 * runs[arm][seed]["test"] for seed in both] for arm in ("dense", "moe"))
    line = dict.fromkeys(("n", "dense", "moe", "moe − dense", "ok"), "–")
    if both:
        line = {"n": str(len(both)), "dense": _mean(dense), "moe": _mean(moe)}
        line["moe − dense"] = f"{statistics.fmean(moe) - statistics.fmean(dense):+.2f}"
        line["ok"] = "ok" if is_ok(dense, moe) else "no"
    line["moe-off"] = _mean([100 * run["off"] for run in runs.get("moe", {}).values()])
    line |= {
        arm: _mean([100 * run["test"] for run in runs.get(arm, {}).values()])
        for arm in ("dense-flops", "random", "oracle", "k-means", "shared-transform")
    }
    line["share"], line["live"] = (
        _by_layer(runs.get("moe", {}), *what) for what in (("share", ".2f"), ("live", ".3g"))
    )
    times = row.get("time")
    if times:
        ms = {arm: 1000 * times[arm]["wall"]["median"] for arm in ("dense", "moe", "dense-flops")}
        line["ms dense / moe / flops"] = f"{ms['dense']:.1f} / {ms['moe']:.1f} / {ms['dense-flops']:.1f}"
        line["×"] = f"{ms['moe'] / ms['dense']:.2f}"
        narrowed = times.get("shared-transform")
        line["× shared-transform"] = f"{1000 * narrowed['wall']['median'] / ms['dense']:.2f}" if narrowed else "–"
        line["+ms a layer"] = f"{(ms['moe'] - ms['dense']) / times['layers']:.1f}"
    else:
        line |= dict.fromkeys(("ms dense / moe / flops", "×", "× shared-transform", "+ms a layer"), "–")
    return line


def swap_table(found: Mapping[str, Any]) -> Table:
    """One line a row; columns of which nothing is known are left out."""
    lines = {name: summary(row) for name, row in found.items()}
    table = Table(
        title="test metric (%), mean ± standard deviation over seeds; medians of a step", title_justify="left"
    )
    columns = known(lines)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, line in lines.items():
        table.add_row(name, *(line[column] for column in columns))
    return table


def swap_lines(found: Mapping[str, Any]) -> list[str]:
    """The same in Markdown."""
    lines = {name: summary(row) for name, row in found.items()}
    columns = known(lines)
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[name, *(line[column] for column in columns)] for name, line in lines.items()]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def known(lines: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The columns of which anything is known."""
    names = next(iter(lines.values()), {})
    return [name for name in names if any(line[name] != "–" for line in lines.values())]


def _mean(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation."""
    if not values:
        return "–"
    std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{std}"


def _by_layer(runs: Mapping[int, Mapping[str, Any]], name: str, form: str) -> str:
    """The mean over seeds, layer by layer; of many layers the least and the largest."""
    means = [statistics.fmean(values) for values in zip(*(run[name] for run in runs.values()), strict=True)]
    if len(means) > 3:
        return f"{min(means):{form}} to {max(means):{form}}"
    return " ".join(f"{mean:{form}}" for mean in means) or "–"
