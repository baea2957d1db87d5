"""A map of when experts pay, on planted graphs: ``python -m experiments.sweep map``.

Regimes and labels a regime, by how a regime shows; at each place a dense model, and six rows
beside it. ``results/regime-map-concept.json`` holds what is finished. Fixed before the first
result: the places, the rows, the recipe (mosaic's, 16 wide), seeds 0 to 2.

The graphs are ``concept-R-L-SHOWN``, whose edges say nothing of a class. An older map is in
``results/regime-map.json``: it is of ``regimes-R-L-SHOWN``, and withdrawn, since all in-neighbors
of a node have one class there.
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
from experiments.train.data.made import CONCEPT_SHOWN
from experiments.train.files import read_json
from experiments.train.presets import MOSAIC
from experiments.train.run_folder import differences_of
from experiments.train.scores import differences, mean_std

PLACES = ((4, 512), (8, 512), (4, 128))
"""Numbers of regimes, and training labels in each."""
WAYS = CONCEPT_SHOWN
BASE = replace(MOSAIC, eval_every=10, seeds=(0, 1, 2), check_finite=False)
MATCHED: dict[str, Any] = {"router": "dense", "equal": "flops"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"router": "dense"}),
    "dense-flops": ("dense, equal FLOPs", MATCHED),
    "reverse": ("dense, reverse edges", MATCHED | {"undirected": True}),
    "told": ("dense, told the regime", MATCHED),
    "experts": ("experts (default)", {}),
    "oracle": (
        "experts, told the regime",
        {"router": "oracle", "start": "copies", "shared_router": True},
    ),
}
"""The rows: what each is called, and changes. ``told`` has the regime as columns, and the default
experts are copies of one layer, routed once. A dense model of equal FLOPs is matched to the default
experts on its own data. The oracle's row was run at one place with a shared expert beside the
others, at 1.6 times their FLOPs, before it got their shape."""
AXES = ("regimes", "labels", "shown", "model")


def places() -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """Where each run is on the map, and its configuration."""
    for (regimes, labels), shown, model in product(PLACES, WAYS, MODELS):
        place = dict(zip(AXES, (regimes, labels, shown, model), strict=True))
        changes = MODELS[model][1] | ({"experts": regimes} if model == "oracle" else {})
        told = "-told" if model == "told" else ""
        name = f"concept-{regimes}-{labels}-{shown}{told}"
        yield place, replace(BASE, dataset=name, **changes)


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
        key: differences("accuracy", test, dense[key[:-1]])
        for key, test in tests.items()
        if key[:-1] in dense
    }


def map_table(found: dict[str, Any]) -> str:
    """One line a place that has results: the test score at equal FLOPs, and what models have above
    it, seed by seed."""
    known = gains(found)
    tests = {tuple(entry[axis] for axis in AXES): entry["test"] for entry in found["places"]}
    lines = list[Line]()
    for shown, (regimes, labels) in product(WAYS, PLACES):
        place = (regimes, labels, shown)
        scores = tests.get((*place, "dense-flops"))
        if scores is None:
            continue
        line = {
            "regime shows in": shown,
            "regimes": str(regimes),
            "labels a regime": str(labels),
            MODELS["dense-flops"][0]: f"{100 * statistics.fmean(scores):.1f}",
        }
        for model, (name, _) in MODELS.items():
            if model != "dense-flops":
                line[name] = mean_std(known.get((*place, model), []), "+.1f")
        lines.append(line)
    return markdown(lines) if lines else "no place is finished yet"
