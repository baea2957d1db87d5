"""Tables from result files: ``python -m experiments.tables`` rewrites the pages, ``--check`` only compares.

A table stands between ``<!-- table: STUDY -->`` and ``<!-- end -->``; it is generated from ``results/STUDY.json``. With
``<!-- table: STUDY: VARIANT VARIANT -->`` it has those variants only; ``<!-- pairs: STUDY: VARIANT/VARIANT ... -->``
compares variants seed by seed. ``<!-- benchmark: NAME -->`` is what ``experiments.benchmark`` wrote,
``<!-- swap: NAME -->`` what ``experiments.benchmark swap`` wrote.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmark.swap_table import swap_lines

ROOT = Path(__file__).parent.parent
MARKED = re.compile(
    r"(<!-- (?P<kind>table|pairs|benchmark|swap): (?P<study>[\w-]+)(?:: (?P<variants>[\w/ -]+?))? -->\n)"
    r".*?(<!-- end -->)",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Which pages, from which results."""

    pages: tuple[Path, ...] = (
        ROOT / "README.md",
        *(
            ROOT / "docs" / f"{page}.md"
            for page in ("results", "when-moe-helps", "claims", "benchmarks", "see-the-routing", "which-settings-first")
        ),
    )
    """The pages to rewrite."""
    results: Path = ROOT / "results"
    """Folder of the result files."""
    check: bool = False
    """Only compare; exit 1 where the page is out of date."""


def render(page: str, results: Path) -> str:
    """The page with all its tables generated anew."""

    def table(match: re.Match[str]) -> str:
        study = json.loads((results / f"{match['study']}.json").read_text())
        only = None if match["variants"] is None else match["variants"].split()
        if match["kind"] == "benchmark":
            made = benchmark_table(study)
        elif match["kind"] == "swap":
            made = "\n".join([*swap_lines(study["variants"]), "", measured_on(study["environment"], "cpu")])
        else:
            made = study_table(study, only) if match["kind"] == "table" else pair_table(study, only or [])
        return f"{match[1]}{made}\n{match[5]}"

    return MARKED.sub(table, page)


def study_table(study: dict[str, Any], only: list[str] | None = None) -> str:
    """One line a variant: the metric on the test set, what it costs, and what the routing follows.

    Columns of which nothing is known are left out.

    Args:
        study: the content of a result file.
        only: names of the variants to show; all without it.

    Raises:
        ValueError: the study has no such variant.
    """
    variants = {variant["variant"]: variant for variant in study["variants"]}
    missing = [name for name in only or () if name not in variants]
    if missing:
        raise ValueError(f"only: got {', '.join(missing)}, expected some of {', '.join(variants)}")
    narrow, wide = variants.get(study["reference"]), variants.get(study["wide"])
    planted = any("nmi" in layer for variant in study["variants"] for layer in variant["routing"])
    metric = study["variants"][0]["metric"] if study["variants"] else "metric"
    columns = ["variant", f"test {metric} (%)", "n", "active FLOPs", "parameters", "headroom recovered"]
    followed = sorted(
        {name for variant in study["variants"] for layer in variant["routing"] for name in layer if "ami_" in name}
    )
    if planted:
        columns.append("NMI of expert and region, layer by layer")
    elif followed:
        columns.append(f"AMI of expert and {', '.join(name.removeprefix('ami_') for name in followed)}; mean of layers")
    rows = []
    for variant in study["variants"] if only is None else [variants[name] for name in only]:
        cells = [
            variant["label"],
            percent(variant["test"]),
            str(variant["test"]["n"]),
            "–" if narrow is None else f"{variant['flops'] / narrow['flops']:.2f}×",
            f"{variant['parameters']:,}",
            headroom(variant, narrow, wide),
        ]
        if planted:
            cells.append(", ".join(nmi(layer["nmi"]) for layer in variant["routing"] if "nmi" in layer) or "–")
        elif followed:
            means = [[layer[name]["mean"] for layer in variant["routing"] if name in layer] for name in followed]
            cells.append(", ".join(f"{sum(values) / len(values):.2f}" for values in means if values) or "–")
        rows.append(cells)
    said = [i for i in range(len(columns)) if not rows or any(cells[i] != "–" for cells in rows)]
    dashes = ["---", *["---:"] * 5, "---"]
    lines = [f"| {' | '.join(columns[i] for i in said)} |", f"|{'|'.join(dashes[i] for i in said)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells[i] for i in said)} |" for cells in rows)])


def pair_table(study: dict[str, Any], pairs: list[str]) -> str:
    """One line a pair of variants: the difference on the test set, seed by seed (or split by split).

    Where the variants were chosen on some of the seeds, also the difference on the others alone.

    Args:
        study: the content of a result file.
        pairs: ``"VARIANT/OTHER"`` each.

    Raises:
        ValueError: the study has no such variant, or the variants of a pair do not have the same seeds.
    """
    variants = {variant["variant"]: variant for variant in study["variants"]}
    lines = ["| variant | minus | mean difference ± std of differences | better in |", "|---|---|---:|---:|"]
    chosen_on = set(study.get("chosen_on", ()))
    if chosen_on:
        seeds = ", ".join(map(str, sorted(chosen_on)))
        lines = [f"{lines[0]} without splits {seeds}, which chose the variants |", f"{lines[1]}---:|"]
    for pair in pairs:
        names = pair.split("/")
        if len(names) != 2 or not set(names) <= set(variants):
            raise ValueError(f"pairs: got {pair!r}, expected VARIANT/OTHER of {', '.join(variants)}")
        one, other = (variants[name] for name in names)
        if one["config"]["seeds"] != other["config"]["seeds"]:
            raise ValueError(f"pairs: got {pair!r}, whose variants have other seeds each, expected the same")
        found = [100 * (a - b) for a, b in zip(one["test"]["values"], other["test"]["values"], strict=True)]
        won = f"{sum(value > 0 for value in found)} of {len(found)}"
        line = f"| {one['label']} | {other['label']} | {signed(found)} | {won} |"
        if chosen_on:
            rest = [value for value, seed in zip(found, one["config"]["seeds"], strict=True) if seed not in chosen_on]
            line += f" {signed(rest)} |"
        lines.append(line)
    return "\n".join(lines)


def benchmark_table(found: dict[str, Any]) -> str:
    """One line a variant: seconds, ratios to the reference variant, memory; of ``train``, where an epoch's time goes.

    Args:
        found: the content of a benchmark's file.
    """
    variants, where = found["variants"], found["environment"]
    if "parts" in next(iter(variants.values())):
        parts = list(next(iter(variants.values()))["parts"])
        lines = [f"| preset | batches | seconds | {' | '.join(f'{part} (%)' for part in parts)} |"]
        lines.append("|---|" + "---:|" * (len(parts) + 2))
        for name, variant in variants.items():
            shares = " | ".join(f"{100 * variant['share'][part]:.1f}" for part in parts)
            lines.append(f"| {name} | {variant['batches']} | {sum(variant['parts'].values()):.3f} | {shares} |")
    else:
        lines = ["| variant | wall (ms) | from | to | × wall | × CPU | × FLOPs | MiB |", "|---|" + "---:|" * 7]
        for name, variant in variants.items():
            wall, ratio = variant["wall"], variant["ratio"]
            cells = [f"{1000 * wall[key]:,.1f}" for key in ("median", "min", "max")]
            cells += [f"{ratio['wall']:.3f}", f"{ratio['cpu']:.3f}"]
            flops = ratio.get("flops")
            cells.append("–" if flops is None else f"{flops:.2f}")
            cells.append(f"{variant['memory'] / 2**20:,.0f}" if "memory" in variant else "–")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured_on(where, found["config"].get("device", "cpu"))])


def measured_on(where: dict[str, Any], device: str) -> str:
    """Hardware, versions and commit in a line.

    Args:
        where: what :func:`experiments.runs.environment` found.
        device: of the run.
    """
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "torch-geometric"))
    place = where["cpu"] if device == "cpu" else where["gpu"]
    commit = "" if where["commit"] is None else f"; commit {where['commit'][:7]}"
    return f"{place}, {where['threads']} threads; {versions}{commit}."


def signed(differences: list[float]) -> str:
    """Mean ± sample standard deviation with a sign."""
    std = f" ± {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
    return f"{statistics.fmean(differences):+.2f}{std}"


def percent(figures: dict[str, Any]) -> str:
    """Mean ± sample standard deviation in percent."""
    mean = f"{100 * figures['mean']:.2f}"
    return mean if figures["std"] is None else f"{mean} ± {100 * figures['std']:.2f}"


def nmi(figures: dict[str, Any]) -> str:
    """Mean ± sample standard deviation of a share."""
    return f"{figures['mean']:.3f}" if figures["std"] is None else f"{figures['mean']:.3f} ± {figures['std']:.3f}"


def headroom(variant: dict[str, Any], narrow: dict[str, Any] | None, wide: dict[str, Any] | None) -> str:
    """(variant - dense) / (dense four times as wide - dense); none where that room is within twice the spread, or no
    spread is known."""
    if narrow is None or wide is None or variant is narrow or variant is wide:
        return "–"
    if narrow["test"]["std"] is None or wide["test"]["std"] is None:
        return "–"
    base, room = narrow["test"]["mean"], wide["test"]["mean"] - narrow["test"]["mean"]
    spread = max(narrow["test"]["std"], wide["test"]["std"])
    return "no headroom" if room <= 2 * spread else f"{100 * (variant['test']['mean'] - base) / room:.0f} %"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(TablesConfig, args=args, prog="python -m experiments.tables", description=__doc__)
    stale = []
    for page in config.pages:
        try:
            old = page.read_text()
            new = render(old, config.results)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {page}: {error}")
        if new != old:
            stale.append(str(page))
            if not config.check:
                page.write_text(new)
    if config.check and stale:
        sys.exit(f"{', '.join(stale)} out of date: run python -m experiments.tables")


if __name__ == "__main__":
    main()
