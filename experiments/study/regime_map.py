"""A map of when experts pay, on planted graphs: ``python -m experiments.sweep map``.

Regimes x labels a regime x width x how a regime shows; at each place a dense model, one of equal active FLOPs, the
library's default experts, and experts that are told the regime. ``results/regime-map.json`` holds what is finished.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from experiments.show.tables import Line, markdown
from experiments.train.config import RunConfig
from experiments.train.data.made import SHOWN
from experiments.train.files import read_json
from experiments.train.presets import MOSAIC
from experiments.train.run_folder import differences_of

REGIMES, LABELS, WIDTHS, WAYS = (1, 2, 4, 8, 16), (32, 128, 512), (16, 64), tuple(SHOWN)
BASE = replace(MOSAIC, eval_every=10, seeds=(0, 1, 2), check_finite=False, start="shared")
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"router": "dense"},
    "dense-flops": {"router": "dense", "equal": "flops"},
    "experts": {},
    "oracle": {"router": "oracle"},
}
AXES = ("regimes", "labels", "width", "shown", "model")


def places() -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Where each run is on the map, and its configuration; few regimes come first."""
    for values in product(REGIMES, LABELS, WIDTHS, WAYS, MODELS):
        place: dict[str, Any] = dict(zip(AXES, values, strict=True))
        name = "regimes-{regimes}-{labels}-{shown}".format(**place)
        changes = MODELS[place["model"]] | (
            {"experts": place["regimes"]} if place["model"] == "oracle" else {}
        )
        yield place, replace(BASE, dataset=name, hidden=place["width"], **changes)


def read_map(path: Path) -> Any:
    """What is finished; a ``ValueError`` where it is of another recipe."""
    found: Any = (
        read_json(path, dict[str, Any])
        if path.exists()
        else {"config": BASE.science(), "places": []}
    )
    if differences_of(BASE, found["config"]):
        raise ValueError(
            f"results: {path} is of another recipe; choose another folder by --results"
        )
    return found


def gains(found: Mapping[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    """By place and model: points above the dense model of equal FLOPs, seed by seed."""
    tests = {tuple(entry[axis] for axis in AXES): entry["test"] for entry in found["places"]}
    dense = {key[:-1]: test for key, test in tests.items() if key[-1] == "dense-flops"}
    return {
        key: [100 * (a - b) for a, b in zip(test, dense[key[:-1]], strict=True)]
        for key, test in tests.items()
        if key[:-1] in dense
    }


def map_table(found: dict[str, Any]) -> str:
    """One line a width, number of labels and way that regimes show: experts, and in brackets the oracle, above the
    dense model of equal FLOPs, by number of regimes."""
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
