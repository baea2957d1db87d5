"""ogb, imported without its look into the network for a newer ogb: import ogb from here, and nowhere else."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.modules["outdated"] = None  # type: ignore[assignment]  # what ogb would look with; it does without
try:
    _ogb = import_module("ogb.nodeproppred")
finally:
    del sys.modules["outdated"]

Evaluator = _ogb.Evaluator
PygNodePropPredDataset = _ogb.PygNodePropPredDataset
MASTER = Path(str(_ogb.__file__)).with_name("master.csv")
"""ogb's table of its data sets."""
