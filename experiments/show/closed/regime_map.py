"""A map of when experts pay, on planted graphs.

Regimes and labels a regime, by how a regime shows; at each place a dense model, and six rows
beside it. ``results/regime-map-concept.json`` holds the runs.

The graphs are ``concept-R-L-SHOWN``, whose edges say nothing of a class. An older map is in
``results/regime-map.json``: it is of ``regimes-R-L-SHOWN``, and withdrawn, since all in-neighbors
of a node have one class there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import product
from typing import Any

from experiments.show.tables import Line, markdown
from experiments.train.scores import differences, mean_std

PLACES = ((4, 512), (8, 512), (4, 128))
"""Numbers of regimes, and training labels in each."""
WAYS = ("features", "communities", "patches", "nothing")
"""How a regime shows."""
MODELS = {
    "dense": "dense",
    "dense-flops": "dense, equal FLOPs",
    "reverse": "dense, reverse edges",
    "told": "dense, told the regime",
    "experts": "experts (default)",
    "oracle": "experts, told the regime",
}
"""The rows, and what each is called. ``told`` has the regime as columns, and the default experts
are copies of one layer, routed once. A dense model of equal FLOPs is matched to the default experts
on its own data. The oracle's row was run at one place with a shared expert beside the others, at
1.6 times their FLOPs, before it got their shape."""
AXES = ("regimes", "labels", "shown", "model")


def _tests(results: Mapping[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    """By place and model, the test scores by seed."""
    return {tuple(entry[axis] for axis in AXES): entry["test"] for entry in results["places"]}


def gains(results: Mapping[str, Any]) -> dict[tuple[Any, ...], list[float]]:
    """By place and model: points above the dense model of equal FLOPs, seed by seed."""
    tests = _tests(results)
    dense = {key[:-1]: test for key, test in tests.items() if key[-1] == "dense-flops"}
    return {
        key: differences("accuracy", test, dense[key[:-1]])
        for key, test in tests.items()
        if key[:-1] in dense
    }


def map_table(results: Mapping[str, Any]) -> str:
    """One line a place that has results: the test score at equal FLOPs, and what models have above
    it, seed by seed."""
    known = gains(results)
    tests = _tests(results)
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
            MODELS["dense-flops"]: f"{100 * statistics.fmean(scores):.1f}",
        }
        for model, name in MODELS.items():
            if model != "dense-flops":
                line[name] = mean_std(known.get((*place, model), []), "+.1f")
        lines.append(line)
    return markdown(lines) if lines else "no place is finished yet"
