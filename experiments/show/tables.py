"""Tables in Markdown of what runs found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from experiments.train.scores import percent

Line: TypeAlias = dict[str, str]
"""A line of a table, by column."""


def markdown(lines: Sequence[Line], left: Iterable[str] = ()) -> str:
    """A table of at least one line.

    Columns are aligned to the right, but for the first and those in ``left``.
    """
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


def preset_table(presets: dict[str, Any]) -> str:
    """One line a preset: its dense model, and what it trains by default.

    Of experts also how many of a layer took a token.
    """
    runs = {variant["variant"]: variant for variant in presets["variants"]}
    lines = []
    for name, moe in (
        (name.removesuffix("-moe"), run) for name, run in runs.items() if name.endswith("-moe")
    ):
        dense = runs[f"{name}-dense"]
        experts = moe["config"]["experts"]
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


def extremes(values: Sequence[float], form: str) -> str:
    """The least and the largest value, or the only one."""
    return " to ".join(f"{value:{form}}" for value in dict.fromkeys([min(values), max(values)]))


def short_commit(where: Mapping[str, Any]) -> str:
    """The commit of a result's environment, with a ``+`` if files differed from it."""
    name = (where["commit"] or "–")[:7]
    return f"{name}+" if where.get("dirty") else name
