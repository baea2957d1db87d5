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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.config import GraphConfig, ImageConfig, RouterOptions, RunConfig
from experiments.files import read_json
from experiments.presets import CORA, DIGITS, DIGITS_GRAPH, GRAPH, MINESWEEPER, MOSAIC

SEEDS = (0, 1, 2)

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
    "quiet": {"options": RouterOptions(weight="straight_through", noise=False)},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "dense": {"router": "dense"},
    "dense-lr2": {"router": "dense"},  # at twice the learning rate of the column
    "dense-difference": {"start": "copies", "sharing": "difference", "experts": 1},
    "dense-flops": {"router": "dense", "equal": "flops", "equal_to": "token_choice"},
    "default": {"router": "token_choice"},
}


@dataclass(frozen=True)
class Arm:
    """A way to share, to decide, to see, and to choose: by a learned router with some noise, or by a random one."""

    sharing: str
    decided: str
    seen: str
    choice: str

    @property
    def name(self) -> str:
        """Of its result file."""
        return "-".join((self.sharing, self.decided, self.seen, self.choice))

    def applied(self, base: RunConfig) -> RunConfig:
        """The configuration of the arm on a column."""
        changes: dict[str, Any] = {
            "start": "copies",
            "sharing": SHARING[self.sharing],
            "options": RouterOptions(weight="straight_through"),
        }
        if self.choice == "random":
            changes["router"] = "random"
        else:
            changes |= {"router": "token_choice"} | NOISE[self.choice]
        if isinstance(base, GraphConfig):
            changes |= {"shared_router": DECIDED[self.decided], "router_input": SEEN[self.seen]}
        return replace(base, **changes)


ARMS = tuple(Arm(*parts) for parts in product(SHARING, DECIDED, SEEN, NOISE))
RANDOM = tuple(Arm(*parts, "random") for parts in product(SHARING, DECIDED, SEEN))


def arms_of(column: str) -> list[Arm]:
    """The arms and their random twins on a column; images have neither a shared router nor neighbors."""
    everything = [*ARMS, *RANDOM]
    if isinstance(COLUMNS[column], ImageConfig):
        return [arm for arm in everything if (arm.decided, arm.seen) == ("layer", "node")]
    return everything


def cells(columns: Sequence[str], root: Path) -> dict[str, RunConfig]:
    """The runs of some columns, all where none are named: ``COLUMN/ARM`` and configuration."""
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise ValueError(f"columns: got {', '.join(unknown)}, expected some of {', '.join(COLUMNS)}")
    found = {}
    for column in columns or COLUMNS:
        base = replace(COLUMNS[column], seeds=SEEDS, data_root=root / COLUMNS[column].data_root)
        for name, changes in CONTROLS.items():
            found[f"{column}/{name}"] = replace(base, **changes)
        found[f"{column}/dense-lr2"] = replace(base, router="dense", lr=2 * base.lr)
        for arm in arms_of(column):
            found[f"{column}/{arm.name}"] = arm.applied(base)
    return found


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What is finished: by column and arm, the summary."""
    return {
        column: {path.stem: read_json(path, dict[str, Any]) for path in sorted((folder / column).glob("*.json"))}
        for column in COLUMNS
        if (folder / column).is_dir()
    }


def gain(results: Mapping[str, Any], arm: str, part: str = "val") -> float:
    """Points above the dense model of one column, seed by seed, on average."""
    pairs = zip(results[arm][part]["values"], results["dense"][part]["values"], strict=True)
    return 100 * fmean(ours - dense for ours, dense in pairs)


def ranking(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, dict[str, float]]]:
    """Arms by their mean gain in validation over the columns that have all of them, best first."""
    complete = [
        column for column, of_column in results.items() if {arm.name for arm in arms_of(column)} <= set(of_column)
    ]
    ranked = []
    for arm in ARMS:
        gains = {}
        for column in complete:
            on_images = isinstance(COLUMNS[column], ImageConfig)
            there = replace(arm, decided="layer", seen="node") if on_images else arm
            gains[column] = gain(results[column], there.name)
        if gains:
            ranked.append((arm.name, fmean(gains.values()), gains))
    return sorted(ranked, key=lambda entry: -entry[1])


def lines(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line an arm, best first, and then the controls: gains in validation over the dense model, and FLOPs."""
    columns = [column for column in results if "dense" in results[column]]
    ranked = {name: mean for name, mean, _ in ranking(results)}
    names = [*ranked, *(arm.name for arm in ARMS if arm.name not in ranked)]
    names += [*CONTROLS, *(arm.name for arm in RANDOM)]
    found = []
    for name in names:
        line = {"validation − dense (points)": name, "mean": f"{ranked[name]:+.2f}" if name in ranked else "–"}
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
