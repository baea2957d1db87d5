"""A study: experts that begin as copies of one layer, at the FLOPs of the dense layer; ``sweep starts`` runs it.

Fixed before the first result:

- **Arms.** 36: copies {that share nothing, with pooled gradients, as a base and differences} x {a router in each layer,
  one decision for all layers} x {the router sees the node, the node and its neighbors} x {noise on the selection that
  is constant, that falls to zero over the first half of training, none}. K = 1 with weight 1 (straight-through), E = 8,
  the library's balance by a bias. On images there is a router in each layer and no neighbor, so 9 arms.
- **Controls.** The dense model; dense at twice the learning rate; dense as a base and a difference with one expert;
  dense of equal active FLOPs (those of the library's default, token choice beside a shared expert); that default; and
  for each way to share, to decide and to see, a frozen random router in place of the learned one.
- **Columns.** The recipes of the table of routers, of the presets for Cora and CiteSeer, and ``concept-8-512-features``
  by mosaic's recipe. Nothing is tuned for an arm.
- **Rule.** Arms are ranked by the mean over columns of the mean gain in *validation* over the dense model, seeds 0
  to 2. The best two and today's default are run on seeds 3 to 12, and their test scores read once: paired 95 %
  intervals against dense and against dense of equal FLOPs. The default changes if the interval against dense lies
  nowhere wholly below -0.3 points, and the mean over columns is above that of today's default. cifar10 and imagenette
  confirm the two arms with three seeds. If no arm passes, copies stay an option.

Added when digits-graph, mosaic, concept and a third of Cora were known, where every arm lost 6 to 16 points on Cora,
so that none can pass; fixed before the first result of it:

- **Variants** of the best two arms of the complete columns, ``copies-`` and ``difference-once-neighbors-constant``:
  four experts, top-2 normalized, no balance, Gumbel sampling in place of spread noise; of copies, ten times the pooled
  gradient, and copies that stay equal for the first quarter or half of training (sparse upcycling within a run); of
  differences, a gain of 0.1 that is learned, rank 4, weight decay.
- Copies **without balance** were the best of these: on Cora they leave one expert all nodes, which is then the dense
  layer, and on mosaic they use all eight. So the same without balance in the other three places, of copies and of
  differences; fixed before the first result of it. Differences were better than copies there, so that pooled gradients,
  which are simpler, are run without balance in all four places; fixed before the first result, too.
- The confirmation also runs what a single layer is without balance, of copies (``start="copies"`` in the library) and of
  differences, which is what a swap of one class would be if differences became the default: :data:`OFFERED`. That of
  differences was added when Cora, mosaic, concept, minesweeper and digits-graph were confirmed for the other arms, and
  before its own first result.
- cifar10 and imagenette confirm the arm of differences in :data:`OFFERED`, the only one of the best that images have,
  with seeds 0 to 2. The table of routers holds the dense models and the default of these seeds.
- They are ranked beside the arms on :data:`WEIGHED`, by the same mean gain in validation, and the rule goes on with the
  best two of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.config import GraphConfig, ImageConfig, RouterOptions, RunConfig
from experiments.files import read_json
from experiments.presets import CORA, DIGITS, DIGITS_GRAPH, GRAPH, MINESWEEPER, MOSAIC

SEEDS = (0, 1, 2)
"""Of the first stage, which ranks the arms by validation."""

CONFIRMED = tuple(range(3, 13))
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
"""The configuration of each column; data roots are inside that of the command line. Cheap columns come first."""

SHARING: dict[str, Any] = {"copies": None, "pooled": "pooled", "difference": "difference"}
DECIDED: dict[str, bool] = {"layer": False, "once": True}
SEEN: dict[str, tuple[str, ...]] = {"node": ("node",), "neighbors": ("node", "neighbors")}
NOISE: dict[str, dict[str, Any]] = {
    "constant": {},
    "annealed": {"anneal_noise": True},
    "quiet": {
        "options": RouterOptions(weight="straight_through", noise=False, balance="bias"),
    },
}


STRAIGHT = RouterOptions(weight="straight_through")
BALANCED = RouterOptions(weight="straight_through", balance="bias")
TOP_2 = RouterOptions(weight="normalized", balance="bias")
OF_ALL: dict[str, dict[str, Any]] = {
    "four": {"experts": 4},
    "top2": {"k": 2, "options": TOP_2},
    "unbalanced": {"options": RouterOptions()},  # the library's choice for copies since
    "gumbel": {"router": "experiments.sharing:GumbelChoice", "options": STRAIGHT},
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "copies": {
        "pooled10": {"sharing": "pooled-10"},
        "tied-quarter": {"sharing": "tied-quarter"},
        "tied-half": {"sharing": "tied-half"},
        **OF_ALL,
    },
    "difference": {
        "gain": {"sharing": "difference-gain"},
        "rank": {"sharing": "difference-rank"},
        "decay": {"sharing": "difference-decay"},
        **OF_ALL,
    },
    "pooled": {"unbalanced": OF_ALL["unbalanced"]},
}
"""What variants change, by what the arm that they vary shares."""

LONG = ("cifar10", "imagenette")
"""Columns of the table of routers on which one arm is confirmed, beside the table's own cells."""

WEIGHED = ("digits-graph", "cora", "mosaic", "concept", "minesweeper")
"""The columns on which variants are ranked."""


def controls(base: RunConfig) -> dict[str, RunConfig]:
    """What arms are compared with on a column."""
    dense = replace(base, router="dense")
    return {
        "dense": dense,
        "dense-lr2": replace(dense, lr=2 * base.lr),
        "dense-difference": replace(
            base, start="copies", sharing="difference", experts=1, options=BALANCED
        ),
        "dense-flops": replace(dense, equal="flops", equal_to="token_choice"),
        "default": replace(base, router="token_choice"),
    }


@dataclass(frozen=True)
class Arm:
    """A way to share, to decide, to see, and to choose: by a learned router with some noise, or by a random one."""

    sharing: str
    decided: str
    seen: str
    choice: str
    variant: str = ""

    @property
    def name(self) -> str:
        """Of its result file."""
        parts = (self.sharing, self.decided, self.seen, self.choice, self.variant)
        return "-".join(part for part in parts if part)

    def applied(self, base: RunConfig) -> RunConfig:
        """The configuration of the arm on a column."""
        changes: dict[str, Any] = {
            "start": "copies",
            "sharing": SHARING[self.sharing],
            "options": BALANCED,
        }
        if self.choice == "random":
            changes |= {"router": "random", "options": STRAIGHT}
        else:
            changes |= {"router": "token_choice"} | NOISE[self.choice]
        if isinstance(base, GraphConfig):
            changes |= {"shared_router": DECIDED[self.decided], "router_input": SEEN[self.seen]}
        if self.variant:
            changes |= VARIANTS[self.sharing][self.variant]
        return replace(base, **changes)


ARMS = tuple(Arm(*parts) for parts in product(SHARING, DECIDED, SEEN, NOISE))
RANDOM = tuple(Arm(*parts, "random") for parts in product(SHARING, DECIDED, SEEN))
SECOND = tuple(
    Arm(sharing, "once", "neighbors", "constant", variant)
    for sharing in ("copies", "difference")
    for variant in VARIANTS[sharing]
) + tuple(
    Arm(sharing, decided, seen, "constant", "unbalanced")
    for sharing, decided, seen in product(VARIANTS, DECIDED, SEEN)
    if (sharing, decided, seen)
    not in (
        ("copies", "once", "neighbors"),
        ("difference", "once", "neighbors"),
    )
)
"""The variants of the best two arms, and the best of these in other places."""

OFFERED = tuple(
    Arm(sharing, "layer", "node", "constant", "unbalanced") for sharing in ("copies", "difference")
)
"""What a swap of one class is, with nothing else changed: of copies, and of differences."""


def arms_of(column: str) -> list[Arm]:
    """The arms and their random twins on a column; images have neither a shared router nor neighbors."""
    everything = [*ARMS, *RANDOM]
    if isinstance(COLUMNS[column], ImageConfig):
        return [arm for arm in everything if (arm.decided, arm.seen) == ("layer", "node")]
    return everything


def cells(columns: Sequence[str], root: Path) -> dict[str, RunConfig]:
    """The runs of some columns, all where none are named: ``COLUMN/ARM`` and configuration."""
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(
            f"columns: got {', '.join(unknown)}, expected some of {', '.join(COLUMNS)}"
        )
    found = dict[str, RunConfig]()
    for column in columns or COLUMNS:
        base = replace(COLUMNS[column], seeds=SEEDS, data_root=root / COLUMNS[column].data_root)
        found |= {f"{column}/{name}": config for name, config in controls(base).items()}
        variants = SECOND if column in WEIGHED else ()
        for arm in (*variants, *arms_of(column)):
            found[f"{column}/{arm.name}"] = arm.applied(base)
    return found


IN_TABLE = {"dense": "dense", "dense-flops": "dense-flops", "default": "token-choice"}
"""Controls, and the cells that they are in the table of routers."""


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What is finished: by column and run, the summary. Long columns have controls in the table of routers."""
    found = {}
    for column in (*COLUMNS, *LONG):
        paths = {path.stem: path for path in sorted((folder / column).glob("*.json"))}
        if paths and column in LONG:
            table = folder.parent / "routers" / column
            paths |= {control: table / f"{cell}.json" for control, cell in IN_TABLE.items()}
        if paths:
            found[column] = {run: read_json(path, dict[str, Any]) for run, path in paths.items()}
    return found


def differences(known: Mapping[str, Any], arm: str, other: str, part: str) -> list[float]:
    """Points between two runs on one column, seed by seed."""
    pairs = zip(known[arm][part]["values"], known[other][part]["values"], strict=True)
    return [100 * (ours - theirs) for ours, theirs in pairs]


def gain(known: Mapping[str, Any], arm: str) -> float:
    """Points above the dense model of one column in validation, on average."""
    return fmean(differences(known, arm, "dense", "val"))


def on_column(arm: Arm, column: str) -> Arm:
    """What an arm is on a column: on images there is a router in each layer, which sees the node."""
    on_images = isinstance(COLUMNS[column], ImageConfig)
    return replace(arm, decided="layer", seen="node") if on_images else arm


def ranking(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Arms and variants by their mean gain in validation over the weighed columns, best first.

    One that some of these columns lack is left out.
    """
    known = [results.get(column, {}) for column in WEIGHED]
    means = [
        (arm.name, fmean(gain(column, arm.name) for column in known))
        for arm in (*ARMS, *SECOND)
        if all(arm.name in column for column in known)
    ]
    return sorted(means, key=lambda entry: -entry[1])


def best_two(screened: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """The two arms or variants of the highest mean gain in validation.

    Raises:
        ValueError: some weighed column lacks some variant.
    """
    variants = {arm.name for arm in SECOND}
    missing = [column for column in WEIGHED if not variants <= set(screened.get(column, {}))]
    if missing:
        names = ", ".join(missing)
        raise ValueError(
            f"columns: got not all variants of {names}, expected all before any is confirmed"
        )
    by_name = {arm.name: arm for arm in (*ARMS, *SECOND)}
    return [by_name[name] for name, _ in ranking(screened)[:2]]


def confirmed(
    columns: Sequence[str], root: Path, screened: Mapping[str, Mapping[str, Any]]
) -> dict[str, RunConfig]:
    """The runs of the second stage, on seeds that were not looked at: ``COLUMN/ARM`` and configuration.

    Raises:
        ValueError: some weighed column lacks some variant, so that no arm is chosen yet.
    """
    from experiments.routers import COLUMNS as TABLE

    chosen = best_two(screened)
    found = dict[str, RunConfig]()
    for column in columns or (*COLUMNS, *LONG):
        if column in LONG:
            base = replace(TABLE[column], data_root=root / TABLE[column].data_root)
            arm = OFFERED[-1]
            found[f"{column}/{arm.name}"] = arm.applied(base)
            continue
        base = replace(COLUMNS[column], seeds=CONFIRMED, data_root=root / COLUMNS[column].data_root)
        to_beat = {name: controls(base)[name] for name in ("dense", "dense-flops", "default")}
        arms = [on_column(arm, column) for arm in (*chosen, *OFFERED)]
        configs = to_beat | {arm.name: arm.applied(base) for arm in arms}
        found |= {f"{column}/{name}": config for name, config in configs.items()}
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def passes(known: Mapping[str, Any], arm: str) -> bool:
    """True if an arm is not surely worse than the dense model on a column: the rule's part on single columns."""
    return interval(differences(known, arm, "dense", "test"))[1] >= LEAST


def confirmed_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a column and run: test score, FLOPs, and paired intervals against the dense models."""
    from experiments.tables import markdown

    found = []
    for column, known in results.items():
        if not {"dense", "dense-flops", "default"} <= set(known):
            continue
        for name, summary in known.items():
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
    """A line an arm, best first, and then the controls: gains in validation over the dense model, and FLOPs."""
    columns = [column for column in results if "dense" in results[column]]
    ranked = dict(ranking(results))
    names = [*ranked, *(arm.name for arm in (*ARMS, *SECOND) if arm.name not in ranked)]
    names += [*controls(DIGITS_GRAPH), *(arm.name for arm in RANDOM)]
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
        if set(line.values()) - {name, "–"}:
            found.append(line)
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    from experiments.tables import markdown

    found = lines(results)
    return markdown(found) if found else "no arm is finished yet"
