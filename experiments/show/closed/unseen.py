"""Graphs on which nothing was chosen: does the recipe for your own graph gain there?

``results/unseen/COLUMN/ARM.json`` holds a run. Arms, splits and rule were fixed before the first of
these results:

- **Columns.** chameleon, filtered, and tolokers (`Platonov et al., 2023
  <https://arxiv.org/abs/2302.11640>`_), the ten splits of each: no default of the library was
  chosen on them. They were not unknown: runs outside this repository, three splits of tolokers and
  eight of chameleon, were seen before, and are the reason to ask.
- **Recipe.** That of ``python -m experiments.train graph --data-root FILE.npz``, 16 wide and
  evaluated every fifth epoch; tolokers by ROC AUC, as its paper. Nothing is tuned for an arm or
  for a column.
- **Arms.** The dense model; dense of the experts' active FLOPs; a frozen random router in the shape
  of the experts; the experts of the default.
- **Rule.** Validation selects the epoch, and the test set is read once. A *gain*: the paired 95 %
  interval of experts minus dense lies wholly above 0, and its mean is at least :data:`LEAST`. A
  *loss*: the interval lies wholly below 0. Else the two are *not told apart*. A gain is earned by
  experts if the interval against dense of equal FLOPs lies above 0, too, and by the router if that
  against the random router does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.show.cells import differences
from experiments.show.tables import markdown
from experiments.train.scores import Difference, percent

LEAST = 0.3
"""Points: a smaller mean difference is no gain."""

ARMS = {
    "dense": "dense",
    "experts": "experts, the default",
    "random": "experts, frozen random router",
    "dense-flops": "dense, equal FLOPs",
}
"""Each arm's name in the table."""


def verdict(difference: Difference) -> str:
    """What the rule says of experts minus dense."""
    if difference.side == "below":
        return "loss"
    is_gain = difference.side == "above" and difference.mean >= LEAST
    return "gain" if is_gain else "not told apart"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: a line an arm, beside the dense model, and the experts beside it."""
    lines = []
    for column, known in results.items():
        for arm, label in ARMS.items():
            if arm not in known or "dense" not in known:
                continue
            summary = known[arm]
            line = {
                "graph": column,
                "arm": label,
                "metric": summary["metric"],
                "test (%)": percent(summary["test"]),
                "n": str(summary["test"]["n"]),
                "× FLOPs": f"{summary['flops'] / known['dense']['flops']:.2f}",
                **dict.fromkeys(("− dense", "better in", "− dense, validation"), "–"),
                "experts − this": "–",
                "verdict": "–",
            }
            if arm != "dense":
                values = differences(known[arm], known["dense"])
                above_dense = Difference.of(values)
                line["− dense"] = str(above_dense)
                line["better in"] = f"{sum(value > 0 for value in values)} of {len(values)}"
                in_validation = differences(known[arm], known["dense"], "val")
                line["− dense, validation"] = str(Difference.of(in_validation))
                if arm == "experts":
                    line["verdict"] = verdict(above_dense)
                elif "experts" in known:
                    beside = differences(known["experts"], known[arm])
                    line["experts − this"] = str(Difference.of(beside))
            lines.append(line)
    return markdown(lines, left=("arm", "metric", "verdict")) if lines else "no arm is finished yet"
