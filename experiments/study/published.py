"""Studies beside published figures.

    python -m experiments.sweep experiments.study.published:MOLECULES --budget 1

``MOLECULES`` has OGB's GCN on six of its molecule sets. What is asked, the rule by which a gain
counts, and what was seen before are in ``docs/lab/published.md``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.study.studies import Row, Study
from experiments.train.presets import MOLECULES as OGB_GCN

DATA = Path("data")
"""Holds the molecules as OGB's folders."""

MOLECULES = Study(
    name="published-molecules",
    about="OGB's GCN on its own split, in its own recipe; nothing was tuned for a row.",
    columns={
        name: replace(OGB_GCN, dataset=f"ogbg-{name}", data_root=DATA)
        for name in ("molfreesolv", "molesol", "molbbbp", "molclintox", "molbace", "molsider")
    },
    rows={"gcn": Row(label="GCN, dense", changes={"router": "dense"})},
    controls=("gcn",),
    published={
        "molfreesolv/gcn": "2.640 ± 0.239",
        "molesol/gcn": "1.114 ± 0.036",
        "molbbbp/gcn": "68.87 ± 1.51",
    },
    seconds={
        "molfreesolv/gcn": 0.7,
        "molesol/gcn": 1.6,
        "molbbbp/gcn": 5.5,
        "molclintox/gcn": 4.2,
        "molbace/gcn": 6.2,
        "molsider/gcn": 7.4,
    },
)
