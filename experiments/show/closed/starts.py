"""Experts that begin as copies of one layer, at the FLOPs of the dense layer.

The study decided the default of convs. Arms, seeds and rule were fixed before the first results,
and variants before theirs:

- **Arms.** 36: copies {that share nothing, with pooled gradients, as a base and differences} x
  {a router in each layer, one decision for all layers} x {the router sees the node, the node
  and its neighbors} x {noise on the selection that is constant, that falls to zero over the
  first half of training, none}. K = 1 with weight 1 (straight-through), E = 8, balance by a
  bias. On images there is a router in each layer and no neighbor, so 9 arms.
- **Variants**, added when every balanced arm had lost 5 to 18 points on Cora: of the best two, four
  experts, top-2, no balance, Gumbel sampling, ten times the pooled gradient, copies tied for a
  part of training, differences by a gain, of rank 4, with weight decay; and no balance in all
  places, the best of these.
- **Controls.** The dense model; dense at twice the learning rate; dense as a base and a
  difference with one expert; dense of equal active FLOPs (those of token choice beside a shared
  expert); that shape, the default at the time, ``shared``; and a frozen random router for each
  way to share, to decide and to see.
- **Columns.** The recipes of the table of routers, of the presets for Cora and CiteSeer, and
  ``concept-8-512-features`` by mosaic's recipe. Nothing is tuned for an arm.
- **Rule.** Arms are ranked by the mean over columns of the mean gain in *validation* over the
  dense model, seeds 0 to 2. The best two and ``shared`` are run on seeds 3 to 12, and their
  test scores read once: paired 95 % intervals against dense and against dense of equal FLOPs.
  The default changes if the interval against dense lies nowhere wholly below -0.3 points, and
  the mean over columns is above that of ``shared``. cifar10 and imagenette confirm with the
  three seeds of their table of routers, in its row ``copies``.

The first stage, in ``results/starts``, ran what the library no longer has: commit 9cfff8c runs it
again. The second, in ``results/starts-confirmed``, confirmed the best two arms. There the arm with
a router in each layer that sees the node was added before its first result, when five columns were
confirmed for the other arms: images have no other. Frozen random routers in the shape of a
confirmed arm (``random``) say what learning to route is worth; they were added when the arms were
known, and before their own first result. Result files keep the names of the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.show.cells import Cells, differences, read_cells
from experiments.show.closed.results import read_results
from experiments.show.tables import Line, markdown
from experiments.train.scores import Difference

LEAST = -0.3
"""Points: an interval wholly below this says that an arm is worse than the dense model."""

WEIGHED = ("digits-graph", "cora", "mosaic", "concept", "minesweeper")
"""The columns on which arms and variants are ranked."""

CONTROLS = ("dense", "dense-flops", "shared")
"""What confirmed arms are compared with."""

IN_TABLE = {
    "dense": "dense",
    "dense-flops": "dense-flops",
    "shared": "token-choice",
    "difference-layer-node-constant-unbalanced": "copies",
}
"""Runs of the columns that the table of routers confirms, and their cells there."""


def read_confirmed(folder: Path) -> Cells:
    """What is confirmed: by column and run, the summary.

    cifar10 and imagenette are here if they have all runs in the table of routers.
    """
    confirmed = read_results(folder)
    of_routers = read_cells(folder.parent / "routers", ("cifar10", "imagenette"), IN_TABLE.values())
    for column, cells in of_routers.items():
        if len(cells) == len(IN_TABLE):
            confirmed[column] = {run: cells[cell] for run, cell in IN_TABLE.items()}
    return confirmed


def gain(known: Mapping[str, Any], arm: str) -> float:
    """Points above the dense model of one column in validation, on average."""
    return fmean(differences(known[arm], known["dense"], "val"))


def is_arm(name: str) -> bool:
    """True for an arm or a variant of the first stage; False for a control and a random twin."""
    parts = name.split("-")
    return parts[0] in ("copies", "pooled", "difference") and "random" not in parts


def ranking(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Arms and variants by their mean gain in validation over the weighed columns, best first.

    One that some of these columns lack is left out.
    """
    known = [results.get(column, {}) for column in WEIGHED]
    means = [
        (name, fmean(gain(column, name) for column in known))
        for name in known[0]
        if is_arm(name) and all(name in column for column in known)
    ]
    return sorted(means, key=lambda entry: -entry[1])


def passes(known: Mapping[str, Any], arm: str) -> bool:
    """True if an arm is not surely worse than the dense model on a column.

    This is the rule's part on single columns.
    """
    return Difference.of(differences(known[arm], known["dense"])).high >= LEAST


def confirmed_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a column and run: test score, FLOPs, and paired intervals against the dense models."""
    rows = []
    for column, known in results.items():
        if not set(CONTROLS) <= set(known):
            continue
        for name in (*CONTROLS, *(name for name in known if name not in CONTROLS)):
            summary = known[name]
            ratio = summary["flops"] / known["dense"]["flops"]
            line = {
                "column": column,
                "arm": name,
                "test": f"{100 * summary['test']['mean']:.2f}",
                "FLOPs": f"{ratio:.2f} ×",
            }
            for other in ("dense", "dense-flops"):
                line[f"− {other}"] = "–"
                if name not in ("dense", other):
                    line[f"− {other}"] = str(Difference.of(differences(known[name], known[other])))
            line["not surely worse"] = "–"
            if name not in ("dense", "dense-flops"):
                line["not surely worse"] = "yes" if passes(known, name) else "no"
            rows.append(line)
    return markdown(rows, left=("arm",)) if rows else "no arm is confirmed yet"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: gains in validation over the dense model.

    A line an arm, best first, then arms that are not ranked, controls and random twins.
    """
    columns = [column for column in results if "dense" in results[column]]
    ranked = dict(ranking(results))
    every = dict.fromkeys(name for column in columns for name in results[column])
    arms = [name for name in every if is_arm(name)]
    names = [*ranked, *(name for name in arms if name not in ranked)]
    names += [name for name in every if name not in names]
    lines = list[Line]()
    for name in names:
        line = {
            "validation − dense (points)": name,
            "mean": f"{ranked[name]:+.2f}" if name in ranked else "–",
        }
        for column in columns:
            known = results[column]
            line[column] = "–" if name not in known else f"{gain(known, name):+.2f}"
            if name == "dense" and name in known:
                line[column] = f"{100 * known[name]['val']['mean']:.2f}"
        lines.append(line)
    return markdown(lines) if lines else "no arm is finished yet"
