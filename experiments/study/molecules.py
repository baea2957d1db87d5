"""Do experts pay on molecules? Every arm beside dense models of equal FLOPs and parameters.

``python -m experiments.sweep molecules`` writes ``results/molecules/COLUMN/ARM.json``. The recipe
is that of OGB's examples (GCN, 5 layers, dropout 0.5, batches of 32, Adam at 0.001) at width 64 and
20 epochs; nothing is tuned for any arm, and the arms were fixed before the first of them was run.
What was added after the others' results, to see why the default loses on molbace:
``molbace-100`` has the 100 epochs of OGB: on so small a set, 20 are 760 steps, and arms that learn
slowly are read before they have learned. ``quiet`` is the default without noise on the selection.
``molbace-100-fresh`` has five seeds more, for what the first five suggested.

``gmoe`` rebuilds GMoE (`Wang et al., 2023 <https://arxiv.org/abs/2304.02806>`_) from parts: experts
of one hop, which see the bonds, and of two, which are filters; noisy top-4 of 8 in each layer, the
losses of importance and load, no shared expert. Its controls are its own: a dense model of its
FLOPs, and the same experts behind a frozen random router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.show.tables import markdown
from experiments.train import scores
from experiments.train.checks import check_choice
from experiments.train.config import MoleculeConfig, RouterOptions
from experiments.train.presets import MOLECULES
from experiments.train.scores import form_of, mean_std, scored

FIVE, FRESH, THREE = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (0, 1, 2)


class Column(NamedTuple):
    """A data set, the seeds, and the epochs of each of its runs."""

    dataset: str
    seeds: tuple[int, ...]
    epochs: int = 20


COLUMNS = {
    "molbace": Column("ogbg-molbace", FIVE),
    "molbbbp": Column("ogbg-molbbbp", FIVE),
    "molesol": Column("ogbg-molesol", FIVE),
    "molhiv": Column("ogbg-molhiv", THREE),
    "molbace-100": Column("ogbg-molbace", FIVE, 100),
    "molbace-100-fresh": Column("ogbg-molbace", FRESH, 100),
}

BASE = replace(MOLECULES, hidden=64)

GMOE: dict[str, Any] = {
    "conv": ("gcn", "two_hop"),
    "k": 4,
    "start": "plain",
    "shared_router": False,
}
NOISY = RouterOptions(noise=True, balance="importance_load")

ARMS: dict[str, tuple[str, MoleculeConfig]] = {
    "dense": ("dense", replace(BASE, router="dense")),
    "dense-flops": ("dense, equal FLOPs", replace(BASE, router="dense", equal="flops")),
    "dense-parameters": (
        "dense, equal parameters",
        replace(BASE, router="dense", equal="parameters"),
    ),
    "default": ("experts, the default", BASE),
    "graph": ("experts, each molecule to one", replace(BASE, router_input=("graph",))),
    "random": ("experts, frozen random router", replace(BASE, router="random")),
    "quiet": ("the default, no noise", replace(BASE, options=RouterOptions(noise=False))),
    "gmoe": ("GMoE rebuilt", replace(BASE, options=NOISY, **GMOE)),
    "gmoe-flops": (
        "dense, equal FLOPs to GMoE",
        replace(BASE, router="dense", equal="flops", options=NOISY, **GMOE),
    ),
    "gmoe-random": ("GMoE, frozen random router", replace(BASE, router="random", **GMOE)),
}
"""Each arm's line in the table, and its run on molhiv."""

BESIDE = {
    "default": "dense-flops",
    "graph": "dense",
    "random": "dense-flops",
    "quiet": "dense-flops",
    "gmoe": "gmoe-flops",
    "gmoe-random": "gmoe-flops",
}
"""The dense model of equal FLOPs that an arm is compared with.

By atom, an atom is transformed by its own expert and its neighbors': FLOPs follow from the routing,
and are matched at the start. By molecule, all of these are one expert.
"""


def runs(columns: Sequence[str], root: Path) -> dict[str, MoleculeConfig]:
    """The runs of some columns, all where none are named: ``COLUMN/ARM`` and configuration."""
    for column in columns:
        check_choice("columns", column, COLUMNS)
    return {
        f"{column}/{arm}": replace(config, **COLUMNS[column]._asdict(), data_root=root)
        for column in columns or COLUMNS
        for arm, (_, config) in ARMS.items()
    }


def gains(known: Mapping[str, Any], arm: str) -> list[float]:
    """By seed, how much better an arm is than the dense model of its FLOPs."""
    ours, theirs = known[arm], known[BESIDE[arm]]
    return scores.gains(ours["metric"], ours["test"]["values"], theirs["test"]["values"])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: a line an arm, beside the dense model of its FLOPs."""
    lines = []
    for column, known in results.items():
        for arm, (label, _) in ARMS.items():
            if arm not in known:
                continue
            summary = known[arm]
            has_pair = BESIDE.get(arm) in known
            dense = known.get("dense")
            lines.append(
                {
                    "set": column,
                    "arm": label,
                    "metric": summary["metric"],
                    "n": str(summary["test"]["n"]),
                    "test": scored(summary["metric"], summary["test"]),
                    "better than equal FLOPs by": mean_std(
                        gains(known, arm), form_of(summary["metric"])
                    )
                    if has_pair
                    else "–",
                    "× FLOPs": f"{summary['flops'] / dense['flops']:.2f}" if dense else "–",
                    "parameters": f"{summary['parameters']:,}",
                }
            )
    return markdown(lines, left=("arm", "metric")) if lines else "no arm is finished yet"
