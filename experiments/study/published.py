"""OGB's molecules beside published figures.

    python -m experiments.sweep experiments.study.published:MOLECULES --budget 1

``MOLECULES`` has OGB's GCN and GIN on its molecule sets, and experts beside them. What is asked,
and where published figures come from, are in ``docs/lab/published.md``. Data are OGB's folders in
``data``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.study.studies import Row, Study
from experiments.train.presets import MOLECULES as OGB_GCN

DATA = Path("data")
FIVE = tuple(range(5))
"""The seeds of experts and controls beside published models, which have ten."""


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
