"""Cora and CiteSeer (Yang et al., 2016; MIT) through PyG's own loader, public split."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from torch import Tensor
from torch_geometric.datasets import Planetoid
from torch_geometric.transforms import NormalizeFeatures

from experiments.data.task import Split, Task, graph_task

MEGABYTES = {"Cora": 0.2, "CiteSeer": 0.4}
FILES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")


def planetoid(name: str, root: Path, offline: bool) -> Task:
    """One of the Planetoid graphs, features normalised to sum 1 a node.

    Raises:
        FileNotFoundError: the files are not there and cannot be fetched; says which, how large, and where they go.
    """
    raw = root / name / "raw"
    missing = [file for file in (f"ind.{name.lower()}.{part}" for part in FILES) if not (raw / file).exists()]
    advice = (
        f"{name}: {', '.join(missing)} missing. Download them (about {MEGABYTES[name]} MB in all) from the `data` "
        f"folder of the repository kimiyoung/planetoid and put them into {raw}, or give another --data-root"
    )
    if missing and offline:
        raise FileNotFoundError(advice)
    try:
        data = Planetoid(str(root), name, transform=NormalizeFeatures())[0]
    except Exception as error:
        if missing:
            raise FileNotFoundError(advice) from error
        raise
    split: dict[Split, Tensor] = {part: data[f"{part}_mask"].nonzero().view(-1) for part in get_args(Split)}
    return graph_task(name.lower(), data.x, data.edge_index, data.y, split)
