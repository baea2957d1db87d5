"""The summary of a run over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.train.checks import check
from experiments.train.results import Spread, Summary, environment, spread
from gmoe.metrics import PER_EXPERT


def summarize(
    folder: Path, science: dict[str, Any], results: Sequence[Mapping[str, Any]]
) -> Summary:
    """Mean, sample standard deviation and n over the seeds of the run in a folder.

    With all that it takes to repeat the run: ``science`` is its ``config.json``.
    """
    first = results[0]
    spreads = ("val", "test", "best_epoch", "seconds")
    costs = ("parameters", "active_parameters", "matched", "hidden", "steps")
    routings = [result["routing"] for result in results]
    figures = [[sorted(layer) for layer in layers] for layers in routings]
    are_same = all(other == figures[0] for other in figures)
    got = "results of seeds with other MoE layers, or other figures of these"
    check(are_same, str(folder), got, "the same in each seed-N/result.json")
    summary: Any = {
        "metric": first["metric"],
        **{name: spread([result[name] for result in results]) for name in spreads},
        "peak_memory": max(result["peak_memory"] or 0 for result in results) or None,
        # Which differ where they follow from the routing
        "flops": round(statistics.fmean(result["flops"] for result in results)),
        "images": first.get("images"),
        **{name: first[name] for name in costs},
        "routing": [_spreads(layers) for layers in zip(*routings, strict=True)],
        "curve": {
            "epoch": first["curve"]["epoch"],
            **{name: [result["curve"][name] for result in results] for name in ("loss", "val")},
        },
        "config": science,
        "environment": environment(),
    }
    for name in ("top5", "images_per_second"):
        if all(name in result for result in results):
            summary[name] = spread([result[name] for result in results])
    return summary


def _spreads(layers: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """The figures of a MoE layer over its seeds.

    Of the loads of its experts, their number and how much the largest is above the mean.
    """
    loads = [layer["load"] for layer in layers]
    names = [name for name in layers[0] if name not in PER_EXPERT]
    return {
        "experts": spread([len(load) for load in loads]),
        **{name: spread([layer[name] for layer in layers]) for name in names},
        "max_over_mean_load": spread([round(max(load) * len(load), 4) for load in loads]),
    }
