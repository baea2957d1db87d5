"""Studies beside published figures.

    python -m experiments.sweep experiments.study.published:MOLECULES --budget 1
    python -m experiments.sweep experiments.study.published:CRITICAL_LOOK --rows sage-1
    python -m experiments.sweep experiments.study.published:CONTROLS

``MOLECULES`` has OGB's GCN and GIN on six of its molecule sets; ``CRITICAL_LOOK`` the models of
Platonov et al. (2023) on three graphs. In both, experts stand beside the dense models. ``CONTROLS``
has what else may do what experts do on the two real graphs on which they gained. What is asked,
the rule by which a gain counts, and where published figures come from are in
``docs/lab/published.md``. Data are in ``data``: OGB's folders, ``chameleon_filtered.npz``,
``facebook.npz``, and PyG's folders of the others in ``data/heterophilous``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.study.studies import Row, Study
from experiments.train.config import RunConfig
from experiments.train.presets import CRITICAL_LOOK as RECIPE
from experiments.train.presets import GRAPH, MINESWEEPER
from experiments.train.presets import MOLECULES as OGB_GCN

DATA = Path("data")
DEPTHS = (1, 2, 3, 4, 5)
FRESH = tuple(range(3, 13))
"""The seeds on which the study of starts confirmed what it had chosen."""
FIVE = tuple(range(5))
"""The seeds of experts and controls beside published models, which have ten."""


def expert_rows(name: str, label: str, **shape: Any) -> dict[str, Row]:
    """The dense model of a shape, the same with eight experts, and what these must be better than.

    Args:
        name: what the names of rows begin with.
        label: what their labels end with.
        **shape: options of the shape, which all rows have.
    """
    dense = {"router": "dense", **shape}
    routed = {"router": "token_choice", **shape}
    changes = {
        "dense": dense,
        "experts": routed,
        "frozen random router": {**shape, "router": "random"},
        "one expert": {**routed, "experts": 1},
        "dense, equal FLOPs": {**dense, "equal": "flops"},
        "dense, equal parameters": {**dense, "equal": "parameters"},
    }
    ends = ("", "-experts", "-random", "-one", "-flops", "-parameters")
    return {
        f"{name}{end}": Row(label=f"{kind}, {label}", changes=own)
        for end, (kind, own) in zip(ends, changes.items(), strict=True)
    }


def molecule_rows(conv: str) -> dict[str, Row]:
    """OGB's model with a conv: dense with ten seeds, and the rest with five of them."""
    fewer = {"conv": (conv,), "seeds": FIVE}
    label = conv.upper()
    return {
        conv: Row(label=f"dense, {label}", changes={"router": "dense", "conv": (conv,)}),
        f"{conv}-experts": Row(label=f"experts, {label}", changes=fewer),
        f"{conv}-random": Row(
            label=f"frozen random router, {label}", changes={**fewer, "router": "random"}
        ),
        f"{conv}-flops": Row(
            label=f"dense, equal FLOPs, {label}",
            changes={**fewer, "router": "dense", "equal": "flops"},
        ),
    }


MOLECULES = Study(
    name="published-molecules",
    about="OGB's GCN and GIN on its own split, in its own recipe; nothing was tuned for a row.",
    columns={
        name: replace(OGB_GCN, dataset=f"ogbg-{name}", data_root=DATA)
        for name in ("molfreesolv", "molesol", "molbbbp")
    },
    rows={**molecule_rows("gcn"), **molecule_rows("gin")},
    controls=("gcn", "gin"),
    published={
        "molfreesolv/gcn": "2.640 ± 0.239",
        "molesol/gcn": "1.114 ± 0.036",
        "molbbbp/gcn": "68.87 ± 1.51",
    },
)

AFFORDABLE = replace(RECIPE, precision="bf16-mixed", data_root=DATA)
"""The recipe with products in bfloat16: a third of the time of minesweeper's in float32."""

CRITICAL_LOOK = Study(
    name="published-graphs",
    about="The models of the critical look at heterophily in its own recipe, but for products in "
    "bfloat16; depth is chosen by validation, nothing else was tuned for a row.",
    columns={
        "chameleon": replace(AFFORDABLE, dataset="chameleon-filtered"),
        "minesweeper": replace(
            AFFORDABLE,
            dataset="minesweeper",
            data_root=DATA / "heterophilous",
            seeds=(0, 1),
        ),
        "tolokers": replace(
            AFFORDABLE, dataset="tolokers", data_root=DATA / "heterophilous", seeds=(0,)
        ),
    },
    rows={
        name: row
        for depth in DEPTHS
        for name, row in expert_rows(
            f"sage-{depth}",
            f"SAGE, {depth} {'block' if depth == 1 else 'blocks'}",
            layers=depth,
        ).items()
    },
    controls=("sage-1",),
    chosen={"SAGE, depth": tuple(f"sage-{depth}" for depth in DEPTHS)},
    published={
        "minesweeper/sage-5": "93.51 ± 0.57",
        "minesweeper/SAGE, depth": "93.51 ± 0.57",
        "tolokers/SAGE, depth": "82.43 ± 0.44",
        "chameleon/SAGE, depth": "37.77 ± 4.14",
    },
)


@dataclass(frozen=True, kw_only=True)
class ControlStudy(Study):
    """A study one of whose rows is a model of its own on each column."""

    def config(self, column: str, row: str) -> RunConfig | None:
        config = super().config(column, row)
        if config is None or row != "dense-input-again":
            return config
        return replace(config, model=f"experiments.study.input_again:{column}")


CONTROLS = ControlStudy(
    name="published-controls",
    about="What else does what experts do, on the seeds and in the recipe of the study of starts; "
    "nothing was tuned for a row.",
    columns={
        "facebook": replace(
            GRAPH, hidden=16, eval_every=5, data_root=DATA / "facebook.npz", seeds=FRESH
        ),
        "minesweeper": replace(
            MINESWEEPER, hidden=16, epochs=200, data_root=DATA / "heterophilous", seeds=FRESH
        ),
    },
    rows={
        "dense": Row(label="dense", changes={"router": "dense"}),
        "experts": Row(label="experts, the default"),
        "random": Row(label="frozen random router", changes={"router": "random"}),
        "one-expert": Row(label="one expert", changes={"experts": 1}),
        "dense-lr2": Row(
            label="dense, twice the learning rate", changes={"router": "dense", "lr": 0.02}
        ),
        "dense-input-again": Row(
            label="dense, layers see the input again", changes={"router": "dense"}
        ),
    },
    controls=("dense",),
)
