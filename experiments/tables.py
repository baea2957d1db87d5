"""Tables from result files: ``python -m experiments.tables`` rewrites the pages, ``--check`` only compares.

A table stands between ``<!-- table: STUDY -->`` and ``<!-- end -->``; it is generated from ``results/STUDY.json``. With
``<!-- table: STUDY: VARIANT VARIANT -->`` it has those variants only; ``<!-- pairs: STUDY: VARIANT/VARIANT ... -->``
compares variants seed by seed. ``<!-- benchmark: NAME -->`` and ``<!-- swap: NAME -->`` are what
``experiments.benchmark`` wrote, ``<!-- presets: NAME -->`` runs of ``experiments.train``, each beside its dense model.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tyro

ROOT = Path(__file__).parent.parent
PAGES = ("lab/swap", "lab/graphs", "lab/claims", "lab/studies", "lab/benchmarks", "tutorials/command-line")
MARKED = re.compile(
    r"(<!-- (?P<kind>table|pairs|presets|benchmark|swap): (?P<study>[\w-]+)(?:: (?P<variants>[\w/ -]+?))? -->\n)"
    r".*?(<!-- end -->)",
    re.DOTALL,
)
Line: TypeAlias = dict[str, str]
"""A line of a table, by column."""


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """Which pages, from which results."""

    pages: tuple[Path, ...] = tuple(ROOT / "docs" / f"{page}.md" for page in PAGES)
    """The pages to rewrite."""
    results: Path = ROOT / "results"
    """Folder of the result files."""
    check: bool = False
    """Only compare; exit 1 where the page is out of date."""


def render(page: str, results: Path) -> str:
    """The page with all its tables generated anew."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((results / f"{match['study']}.json").read_text())
        only = (match["variants"] or "").split()
        if match["kind"] == "presets":
            made = preset_table(content)
        elif match["kind"] == "table":
            made = study_table(content, only)
        else:
            made = pair_table(content, only) if match["kind"] == "pairs" else benchmark_table(content)
        return f"{match[1]}{made}\n{match[5]}"

    return MARKED.sub(table, page)


def markdown(lines: Sequence[Line], left: Iterable[str] = (), gap: str = "") -> str:
    """A table of at least one line.

    Args:
        lines: the lines.
        left: columns of text beside the first; numbers are aligned to the right.
        gap: around the dashes.
    """
    columns = list(lines[0])
    dashes = [f"{gap}{'---' if column in (columns[0], *left) else '---:'}{gap}" for column in columns]
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *(line.values() for line in lines)))
    return "\n".join([head, f"|{'|'.join(dashes)}|", *body])


def known(lines: Sequence[Line]) -> list[Line]:
    """The lines without the columns of which nothing is known."""
    names = [name for name in lines[0] if any(line[name] != "–" for line in lines)]
    return [{name: line[name] for name in names} for line in lines]


def study_table(study: dict[str, Any], only: Sequence[str] = ()) -> str:
    """One line a variant: the metric on the test set, what it costs, and what the routing follows.

    Columns of which nothing is known are left out.

    Args:
        study: the content of a result file.
        only: names of the variants to show; all without it.

    Raises:
        ValueError: the study has no such variant.
    """
    variants = {variant["variant"]: variant for variant in study["variants"]}
    missing = [name for name in only if name not in variants]
    if missing:
        raise ValueError(f"only: got {', '.join(missing)}, expected some of {', '.join(variants)}")
    narrow, wide = variants.get(study["reference"]), variants.get(study["wide"])
    names = {name for variant in study["variants"] for layer in variant["routing"] for name in layer}
    followed = sorted(name.removeprefix("ami_") for name in names if "ami_" in name)
    routed = f"AMI of expert and {', '.join(followed)}; mean of layers"
    if "nmi" in names:
        routed = "NMI of expert and region, layer by layer"
    lines = []
    for variant in map(variants.__getitem__, only or variants):
        layers = variant["routing"]
        if "nmi" in names:
            found = [spread(layer["nmi"], ".3f") for layer in layers if "nmi" in layer]
        else:
            means = [[layer[f"ami_{name}"]["mean"] for layer in layers if f"ami_{name}" in layer] for name in followed]
            found = [f"{statistics.fmean(values):.2f}" for values in means if values]
        lines.append(
            {
                "variant": variant["label"],
                f"test {variant['metric']} (%)": percent(variant["test"]),
                "n": str(variant["test"]["n"]),
                "active FLOPs": "–" if narrow is None else f"{variant['flops'] / narrow['flops']:.2f}×",
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
    for name, moe in ((name.removesuffix("-moe"), run) for name, run in runs.items() if name.endswith("-moe")):
        dense = runs[f"{name}-dense"]
        alive = [moe["config"]["experts"] - layer["dead"]["mean"] for layer in moe["routing"]]
        shown = [min(alive), max(alive)] if min(alive) < max(alive) else alive[:1]
        line = {
            "run": moe["label"],
            "metric": moe["metric"],
            "n": str(moe["test"]["n"]),
            "dense": percent(dense["test"]),
        }
        line |= {"with experts": percent(moe["test"])}
        line["difference"] = f"{100 * (moe['test']['mean'] - dense['test']['mean']):+.2f}"
        line["experts alive, by layer"] = (
            f"{' to '.join(f'{count:.3g}' for count in shown)} of {moe['config']['experts']}"
        )
        lines.append(line | {"× FLOPs": f"{moe['flops'] / dense['flops']:.2f}"})
    return markdown(lines, left=("metric",))


def pair_table(study: dict[str, Any], pairs: Sequence[str]) -> str:
    """One line a pair of variants: the difference on the test set, seed by seed (or split by split).

    Where the variants were chosen on some of the seeds, also the difference on the others alone.

    Args:
        study: the content of a result file.
        pairs: ``"VARIANT/OTHER"`` each.

    Raises:
        ValueError: the study has no such variant, or the variants of a pair do not have the same seeds.
    """
    variants = {variant["variant"]: variant for variant in study["variants"]}
    chosen_on = set(study.get("chosen_on", ()))
    lines = []
    for pair in pairs:
        names = pair.split("/")
        if len(names) != 2 or not set(names) <= set(variants):
            raise ValueError(f"pairs: got {pair!r}, expected VARIANT/OTHER of {', '.join(variants)}")
        one, other = (variants[name] for name in names)
        seeds = one["config"]["seeds"]
        if seeds != other["config"]["seeds"]:
            raise ValueError(f"pairs: got {pair!r}, whose variants have other seeds each, expected the same")
        found = [100 * (a - b) for a, b in zip(one["test"]["values"], other["test"]["values"], strict=True)]
        line = {"variant": one["label"], "minus": other["label"]}
        line["mean difference ± std of differences"] = mean_std(found, "+.2f")
        line["better in"] = f"{sum(value > 0 for value in found)} of {len(found)}"
        if chosen_on:
            without = f"without splits {', '.join(map(str, sorted(chosen_on)))}, which chose the variants"
            rest = [value for value, seed in zip(found, seeds, strict=True) if seed not in chosen_on]
            line[without] = mean_std(rest, "+.2f")
        lines.append(line)
    return markdown(lines, left=["minus"])


def benchmark_table(found: dict[str, Any]) -> str:
    """What a benchmark found, and where.

    Args:
        found: the content of its file.
    """
    gap = " " if _is_swap(found["variants"]) else ""
    table = markdown(benchmark_lines(found["variants"]), gap=gap)
    return f"{table}\n\n{measured_on(found['environment'], found['config'].get('device', 'cpu'))}"


def benchmark_lines(variants: Mapping[str, Any]) -> list[Line]:
    """One line a variant: seconds, ratios to the reference variant, memory; of ``train``, where an epoch's time goes;
    of ``swap``, accuracies and times by arm."""
    if _is_swap(variants):
        return known([{"": name} | swap_line(row) for name, row in variants.items()])
    return [_train_line(name, of) if "parts" in of else _layer_line(name, of) for name, of in variants.items()]


def _is_swap(variants: Mapping[str, Any]) -> bool:
    return any("runs" in variant for variant in variants.values() if isinstance(variant, dict))


def _train_line(name: str, variant: Mapping[str, Any]) -> Line:
    line = {"preset": name, "batches": str(variant["batches"]), "seconds": f"{sum(variant['parts'].values()):.3f}"}
    return line | {f"{part} (%)": f"{100 * share:.1f}" for part, share in variant["share"].items()}


CLOCKS = (("wall", "wall"), ("CPU", "cpu"))


def _layer_line(name: str, variant: Mapping[str, Any]) -> Line:
    wall, ratio = variant["wall"], variant["ratio"]
    line = {"variant": name}
    line |= {
        column: f"{1000 * wall[key]:,.1f}" for column, key in (("wall (ms)", "median"), ("from", "min"), ("to", "max"))
    }
    line |= {f"× {label}": f"{ratio[clock]:.3f}" if clock in ratio else "–" for label, clock in CLOCKS}
    line["× FLOPs"] = "–" if ratio.get("flops") is None else f"{ratio['flops']:.2f}"
    line["MiB"] = f"{variant['memory'] / 2**20:,.0f}" if "memory" in variant else "–"
    return line


def swap_line(row: Mapping[str, Any]) -> Line:
    """Dense and MoE of the seeds that both have, and the other arms, with their number of seeds if it is less; ok is a
    MoE whose mean is no less than a standard deviation below the dense one's."""
    runs: dict[str, dict[int, Any]] = {arm: {run["seed"]: run for run in of} for arm, of in row["runs"].items()}
    both = sorted(set(runs.get("dense", {})) & set(runs.get("moe", {})))
    line = dict.fromkeys(("n", "dense", "moe", "moe − dense", "ok"), "–")
    if both:
        dense, moe = ([100 * runs[arm][seed]["test"] for seed in both] for arm in ("dense", "moe"))
        difference, std = statistics.fmean(moe) - statistics.fmean(dense), statistics.stdev(dense) if both[1:] else 0.0
        line = {"n": str(len(both)), "dense": mean_std(dense), "moe": mean_std(moe)}
        line |= {"moe − dense": f"{difference:+.2f}", "ok": "ok" if difference >= -std else "no"}
    line["moe-off"] = mean_std([100 * run["off"] for run in runs.get("moe", {}).values()])
    for arm in ("dense-flops", "random", "oracle", "k-means", "shared-transform"):
        tests = [100 * run["test"] for run in runs.get(arm, {}).values()]
        line[arm] = mean_std(tests) + (f" ({len(tests)})" if 0 < len(tests) < len(both) else "")
    for name, form in (("share", ".2f"), ("live", ".3g")):
        by_layer = zip(*(run[name] for run in runs.get("moe", {}).values()), strict=True)
        means = [statistics.fmean(values) for values in by_layer]
        shown = means if len(means) <= 3 else [min(means), max(means)]
        line[name] = (" " if shown == means else " to ").join(f"{mean:{form}}" for mean in shown) or "–"
    line |= dict.fromkeys(("ms dense / moe / flops", "×", "× shared-transform", "+ms a layer"), "–")
    if times := row.get("time"):
        ms = {arm: 1000 * time["wall"]["median"] for arm, time in times.items() if isinstance(time, dict)}
        line["ms dense / moe / flops"] = f"{ms['dense']:.1f} / {ms['moe']:.1f} / {ms['dense-flops']:.1f}"
        line["×"] = f"{ms['moe'] / ms['dense']:.2f}"
        if "shared-transform" in ms:
            line["× shared-transform"] = f"{ms['shared-transform'] / ms['dense']:.2f}"
        line["+ms a layer"] = f"{(ms['moe'] - ms['dense']) / times['layers']:.1f}"
    return line


def measured_on(where: dict[str, Any], device: str) -> str:
    """Hardware, versions and commit in a line.

    Args:
        where: what :func:`experiments.run_folder.environment` found.
        device: of the run.
    """
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "torch-geometric"))
    place = where["cpu"] if device == "cpu" else where["gpu"]
    commit = "" if where["commit"] is None else f"; commit {where['commit'][:7]}"
    return f"{place}, {where['threads']} threads; {versions}{commit}."


def mean_std(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± sample standard deviation of values."""
    if not values:
        return "–"
    std = statistics.stdev(values) if len(values) > 1 else None
    return spread({"mean": statistics.fmean(values), "std": std}, form)


def spread(figures: Mapping[str, Any], form: str) -> str:
    """Mean ± sample standard deviation that are known."""
    mean = f"{figures['mean']:{form}}"
    return mean if figures["std"] is None else f"{mean} ± {figures['std']:{form.removeprefix('+')}}"


def percent(figures: Mapping[str, Any]) -> str:
    """The same in percent."""
    return spread({name: figures[name] and 100 * figures[name] for name in ("mean", "std")}, ".2f")


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
