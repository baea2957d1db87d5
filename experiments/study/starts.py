"""A study: experts that begin as copies of one layer, at the FLOPs of the dense layer.

It decided the default of convs. Arms, seeds and rule were fixed before the first results, and
variants before theirs:

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

The first stage is closed: what lost is no longer in the code, and commit 9cfff8c runs it again.
The second, which ``python -m experiments.sweep starts`` runs, confirms what the library has,
:data:`CONFIRMED`. There the arm with a router in each layer that sees the node,
:data:`LAYER_NODE`, was added before its first result, when five columns were confirmed for the
other arms: images have no other. Result files keep the names of the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.show.tables import markdown
from experiments.train import scores
from experiments.train.config import GraphConfig, ImageConfig, RunConfig
from experiments.train.files import read_json
from experiments.train.presets import CORA, DIGITS, DIGITS_GRAPH, GRAPH, MINESWEEPER, MOSAIC
from experiments.train.scores import interval

SEEDS = tuple(range(3, 13))
"""Of the second stage, whose test scores are read once."""

LEAST = -0.3
"""Points: an interval wholly below this says that an arm is worse than the dense model."""

COLUMNS: dict[str, RunConfig] = {
    "digits-graph": DIGITS_GRAPH,
    "cora": replace(CORA, data_root=Path("planetoid")),
    "citeseer": replace(CORA, dataset="citeseer", data_root=Path("planetoid")),
    "mosaic": MOSAIC,
    "concept": replace(MOSAIC, dataset="concept-8-512-features"),
    "minesweeper": replace(MINESWEEPER, hidden=16, epochs=200, data_root=Path("heterophilous")),
    "facebook": replace(GRAPH, hidden=16, eval_every=5, data_root=Path("facebook.npz")),
    "digits": DIGITS,
}
"""The configuration of each column; data roots are inside that of the command line. Cheap
columns come first."""

WEIGHED = ("digits-graph", "cora", "mosaic", "concept", "minesweeper")
"""The columns on which arms and variants are ranked."""

CONTROLS: dict[str, dict[str, Any]] = {
    "dense": {"router": "dense"},
    "dense-flops": {
        "router": "dense",
        "equal": "flops",
        "equal_to": "token_choice",
        "start": "shared",  # of the experts that it equals
    },
    "shared": {"router": "token_choice", "start": "shared"},
}
"""What arms are compared with, by what it changes."""

LAYER_NODE = "difference-layer-node-constant-unbalanced"
"""The arm that images have: a router in each layer, which sees the patch or the node."""

CONFIRMED: dict[str, dict[str, Any]] = {
    "difference-once-node-constant-unbalanced": {"shared_router": True, "router_input": ("node",)},
    "difference-layer-neighbors-constant-unbalanced": {
        "shared_router": False,
        "router_input": ("node", "neighbors"),
    },
    LAYER_NODE: {"shared_router": False, "router_input": ("node",)},
}
"""The best two arms of the first stage, and that of images; all are ``start="copies"``."""

TWINS = {
    "difference-once-node-random": "difference-once-node-constant-unbalanced",
    "difference-layer-node-random": LAYER_NODE,
}
"""Frozen random routers in the shape of a confirmed arm: what learning to route is worth there.

The first is for graphs, the second for images; both were added when the arms were known, and
before their own first result.
"""

LONG = ("cifar10", "imagenette")
"""Columns that are confirmed by the table of routers."""

IN_TABLE = {
    "dense": "dense",
    "dense-flops": "dense-flops",
    "shared": "token-choice",
    LAYER_NODE: "copies",
}
"""Runs of a long column, and the cells that they are in that table."""


def model(name: str, base: RunConfig) -> RunConfig:
    """The configuration of a control, of a confirmed arm or of its twin on a column."""
    if name in CONTROLS:
        return replace(base, **CONTROLS[name])
    arm = TWINS.get(name, name)
    router = "random" if name in TWINS else "token_choice"
    changes = CONFIRMED[arm] if isinstance(base, GraphConfig) else {}
    return replace(base, router=router, start="copies", **changes)


def confirmed(columns: Sequence[str], root: Path) -> dict[str, RunConfig]:
    """The runs of some columns, all where none are named: ``COLUMN/RUN`` and configuration."""
    if unknown := [name for name in columns if name not in COLUMNS]:
        expected = ", ".join(COLUMNS)
        raise ValueError(f"columns: got {', '.join(unknown)}, expected some of {expected}")
    found = dict[str, RunConfig]()
    for column in columns or COLUMNS:
        base = replace(COLUMNS[column], seeds=SEEDS, data_root=root / COLUMNS[column].data_root)
        of_nodes, of_patches = TWINS
        arms = [*CONFIRMED, of_nodes]
        if isinstance(base, ImageConfig):
            arms = [LAYER_NODE, of_patches]
        for name in (*CONTROLS, *arms):
            found[f"{column}/{name}"] = model(name, base)
    return found


def read_results(folder: Path, columns: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """What is finished: by column (of this study, unless others are named) and run, the summary."""
    found = {}
    for column in COLUMNS if columns is None else columns:
        paths = sorted((folder / column).glob("*.json"))
        if paths:
            found[column] = {path.stem: read_json(path, dict[str, Any]) for path in paths}
    return found


def read_confirmed(folder: Path) -> dict[str, dict[str, Any]]:
    """What is confirmed: by column and run, the summary.

    Long columns are here if they have all runs in the table of routers.
    """
    found = read_results(folder)
    for column in LONG:
        cells = folder.parent / "routers" / column
        paths = {run: cells / f"{cell}.json" for run, cell in IN_TABLE.items()}
        if all(path.exists() for path in paths.values()):
            found[column] = {run: read_json(path, dict[str, Any]) for run, path in paths.items()}
    return found


def differences(known: Mapping[str, Any], arm: str, other: str, part: str) -> list[float]:
    """Points between two runs on one column, seed by seed."""
    ours, theirs = known[arm], known[other]
    return scores.differences(ours["metric"], ours[part]["values"], theirs[part]["values"])


def gain(known: Mapping[str, Any], arm: str) -> float:
    """Points above the dense model of one column in validation, on average."""
    return fmean(differences(known, arm, "dense", "val"))


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
    return interval(differences(known, arm, "dense", "test"))[1] >= LEAST


def confirmed_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a column and run: test score, FLOPs, and paired intervals against the dense models."""
    found = []
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
                    values = differences(known, name, other, "test")
                    low, high = interval(values)
                    line[f"− {other}"] = f"{fmean(values):+.2f} ({low:+.2f} to {high:+.2f})"
            line["not surely worse"] = "–"
            if name not in ("dense", "dense-flops"):
                line["not surely worse"] = "yes" if passes(known, name) else "no"
            found.append(line)
    return markdown(found, left=("arm",)) if found else "no arm is confirmed yet"


def lines(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line an arm, best first, then arms that are not ranked, controls and random twins: gains
    in validation over the dense model."""
    columns = [column for column in results if "dense" in results[column]]
    ranked = dict(ranking(results))
    every = dict.fromkeys(name for column in columns for name in results[column])
    arms = [name for name in every if is_arm(name)]
    names = [*ranked, *(name for name in arms if name not in ranked)]
    names += [name for name in every if name not in names]
    found = []
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
        found.append(line)
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    found = lines(results)
    return markdown(found) if found else "no arm is finished yet"
