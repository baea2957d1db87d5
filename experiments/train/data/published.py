"""What ogb's own tables say of its data sets; ogb itself is not imported, which takes long."""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from typing import Any


def published(name: str) -> Any:
    """The column of a data set, ``ogbn-`` or ``ogbg-``, as text: version, tasks, metric, split."""
    import pandas as pd  # not before it is needed: half a second

    kind = {"ogbn": "nodeproppred", "ogbg": "graphproppred"}[name[:4]]
    table = distribution("ogb").locate_file(f"ogb/{kind}/master.csv")
    return pd.read_csv(str(table), index_col=0, dtype=str, keep_default_na=False)[name]


def without_update_check() -> None:
    """Let ``ogb`` be imported without the network, which it would ask for a newer ``ogb``."""
    sys.modules["outdated"] = None  # type: ignore[assignment]
