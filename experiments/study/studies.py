"""Studies: lists of variants, fixed before the first of them is run.

`python -m experiments.sweep NAME` runs one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from experiments.train.checks import check, check_choice
from experiments.train.config import RouterName, RunConfig
from experiments.train.files import RESULTS, read_json
from experiments.train.presets import PRESETS
from experiments.train.saved import restore


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of a study's table."""

    name: str  # of its run folder
    label: str  # in the table
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    """Variants that are compared."""

    about: str  # what is asked, and what was tuned
    variants: tuple[Variant, ...]
    reference: str = "dense"  # the variant that costs and headroom are relative to
    wide: str = "dense-4x"  # the dense variant four times as wide
    # Seeds (splits) that an earlier study chose the variants on, by validation
    chosen_on: tuple[int, ...] = ()


RECORDED = {
    "mosaic": "Planted regions: does a learned router find them, and does it pay?",
    "digits": "All routers on handwritten digits as images.",
    "digits-graph": "All routers on the same digits as nodes of a graph.",
    "cora": "Cora, the published recipe.",
    "citeseer": "CiteSeer, the variants of Cora.",
    "facebook": "facebook.npz, width 8, splits 0 to 2.",
    "facebook-10splits": "The best of facebook by validation, on all ten splits.",
    "minesweeper": "minesweeper, 8 layers of 16, splits 0 to 2.",
    "minesweeper-10splits": "The best of minesweeper by validation, on all ten splits.",
    "minesweeper-depth": "minesweeper: four layers with experts beside eight dense ones.",
    "cifar10-scale": "CIFAR-10: weights by score, or straight-through?",
    "cifar10-ten-seeds": "CIFAR-10: what three seeds showed of expert choice, on seven more.",
    "cifar10-claims": "CIFAR-10: the five claims that the project began with.",
}
"""Finished studies with a line of help. Each configuration is in ``results/NAME.json``, from
which they run again."""


def recorded(name: str, data_root: Path) -> Study:
    """A study of :data:`RECORDED`, of which the results are committed."""
    found = read_json(RESULTS / f"{name}.json", dict[str, Any])
    runs = found["variants"]
    if name == "citeseer":  # whose own results are of the first four only
        runs = read_json(RESULTS / "cora.json", dict[str, Any])["variants"]
        runs = [run | {"config": run["config"] | {"dataset": name}} for run in runs]
    variants = []
    for run in runs:
        try:
            config = restore(run["config"], data_root)
        except ValueError as error:  # of a form of layers that is gone
            print(f"{name}: {run['variant']} cannot be run again ({error})", file=sys.stderr)
            continue
        variants.append(Variant(name=run["variant"], label=run["label"], config=config))
    return Study(
        about=found["about"],
        variants=tuple(variants),
        reference=found["reference"],
        wide=found["wide"],
        chosen_on=tuple(found.get("chosen_on", ())),
    )


def grid(
    preset: str,
    routers: Sequence[str],
    experts: Sequence[int],
    ks: Sequence[int],
    **changes: Any,
) -> Study:
    """Every router at every E and K that it has, beside the dense model and one four times as wide.

    ``changes`` are other options of all variants. An unknown preset or router is a ``ValueError``,
    or a K larger than every E; of an E the larger ones are left out.
    """
    check_choice("preset", preset, PRESETS)
    for router in routers:
        check_choice("routers", router, get_args(RouterName))
    fits = ks and max(ks) <= max(experts, default=0)
    check(fits, "ks", ks, f"at least one, and none larger than all of experts={experts}")
    base = replace(PRESETS[preset][1], **changes)
    dense = replace(base, router="dense")
    wide = replace(dense, hidden=4 * base.hidden)
    variants = {
        "dense": Variant(name="dense", label="dense", config=dense),
        "dense-4x": Variant(name="dense-4x", label="dense, four times as wide", config=wide),
    }
    for router, e, k in product(routers, experts, ks):
        fixed = router in ("uniform", "oracle", "soft_slots")
        if router != "dense" and (fixed or k <= e):
            name = f"{router.replace('_', '-')}-e{e}" + ("" if fixed else f"-k{k}")
            label = f"`{router}`, E={e}" + ("" if fixed else f", K={k}")
            config = replace(base, router=router, experts=e, k=base.k if fixed else k)
            variants[name] = Variant(name=name, label=label, config=config)
    return Study(
        about=f"A grid over {preset}; nothing was tuned for a variant.",
        variants=tuple(variants.values()),
    )
