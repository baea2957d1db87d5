"""A graph of your own: an ``.npz``, a PyG ``.pt``, a folder of CSV, or what a function returns.

Keys and columns are in :data:`experiments.train.presets.OWN_GRAPH`, which the help prints.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch_geometric.data import Data

from experiments.train.data.graphs import DATA, MASKS, check_graph, fixed_splits, stratified_splits
from experiments.train.data.task import GraphData, MetricName
from experiments.train.files import naming, read_csv, read_npz, read_tensors
from gmoe._checks import check

NEEDED = {"x": "node_features", "y": "node_labels", "edge_index": "edges"}
NAMES = {**NEEDED, **{mask: f"{mask}s" for mask in MASKS.values()}, "edge_weight": "edge_weight"}
"""PyG's names, and those of Platonov et al. (2023), which an npz may have too."""
TYPES = {"x": torch.float, "edge_weight": torch.float, "y": torch.long, "edge_index": torch.long}
"""What models take; masks are of bools."""
MOST_CATEGORIES = 100
"""Names that a column of features may have: each becomes a feature."""


def own_graph(path: Path, metric: MetricName | None = None, name: str | None = None) -> GraphData:
    """A graph in files, its edges as they are given; its name is by default that of the file.

    The metric is ``"accuracy"`` or, for two classes, ``"roc_auc"``.
    """
    readers = {"folder": _read_folder, ".npz": _read_npz, ".pt": _read_pt}
    kind = "folder" if (path / "nodes.csv").exists() else path.suffix
    check(kind in readers, "data_root", path, "FILE.npz, FILE.pt, or a folder with nodes.csv")
    return graph_of(readers[kind](path), name or path.stem, str(path), metric)


def graph_of(given: Any, name: str, where: str, metric: MetricName | None = None) -> GraphData:
    """A PyG graph as a data set: checked, as the types that models take, and split where it has
    no masks.

    ``where`` begins the messages.
    """
    check(isinstance(given, Data), where, f"a {type(given).__name__}", "a PyG Data")
    keys = [key for key in given.to_dict() if key != "num_nodes"]
    unknown = ", ".join(key for key in keys if key not in NAMES)
    check(not unknown, where, unknown, f"{', '.join(NAMES)} alone: models see nothing else")
    masks = [mask for mask in MASKS.values() if mask in keys]
    needed = [*NEEDED, *(MASKS.values() if masks else ())]
    missing = ", ".join(key for key in needed if key not in keys)
    check(not missing, where, f"no {missing}", f"{', '.join(NEEDED)}, and all masks or none")
    data = Data(**{key: _converted(f"{where}: {key}", key, given[key]) for key in keys})
    nodes = torch.as_tensor(given.to_dict().get("num_nodes", len(data.x))).flatten().tolist()
    check(nodes == [len(data.x)], where, f"num_nodes {nodes}", f"{len(data.x)}, the rows of x")
    check_graph(where, data)
    weights = data.num_edges if data.edge_weight is None else data.edge_weight.numel()
    check(weights == data.num_edges, where, f"{weights} of edge_weight", f"{data.num_edges}")
    labels = data.y.clamp(min=-1).unique()
    is_legal = data.y.dim() == 1 and (labels >= 0).sum() > 1 and labels.max() < len(data.y)
    got = f"shape {tuple(data.y.shape)} of {labels.tolist()[:10]}"
    legal = f"a class a node, from 0 to {len(data.y) - 1} (below 0 for none), two classes or more"
    check(is_legal, f"{where}: y", got, legal)
    classes = int(labels.max()) + 1
    how = f"{data.train_mask[0].numel()} split(s) by its masks" if masks else ""
    how = how or "each seed splits it 60/20/20 by class"
    single = (data.y[data.y >= 0].bincount() == 1).nonzero().flatten().tolist()
    if single:
        how += f"; one node each, so that no split trains on it and tests it: {single[:10]}"
    print(f"{name}: {data}, {classes} classes; {how}", flush=True)
    return GraphData(
        name=name,
        data=data,
        splits=partial(fixed_splits if masks else stratified_splits, data),
        num_outputs=classes,
        metric_name=metric or "accuracy",
    )


def _converted(where: str, key: str, given: Any) -> Tensor:
    """One tensor of a graph, as models take it."""
    is_dense = isinstance(given, Tensor) and given.layout == torch.strided
    got = f"{given.layout}, {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
    check(is_dense and not given.is_complex(), where, got, "a dense tensor of real numbers")
    given = given.detach().cpu().as_subclass(Tensor)
    value = given.to(TYPES.get(key, torch.bool)).contiguous()
    is_legal = value.isfinite() if value.is_floating_point() else value == given
    wrong = (~is_legal).nonzero()[:1].tolist()
    got = f"{given[tuple(wrong[0])]} at {wrong[0]}" if wrong else ""
    check(not wrong, where, got, f"finite numbers that {value.dtype} can hold")
    return value.flatten() if key in ("y", "edge_weight") and value.shape[1:] == (1,) else value


def _read_npz(path: Path) -> Data:
    data = Data()
    of_pyg = {other: name for name, other in NAMES.items()}
    for key, array in read_npz(path).items():
        name = of_pyg.get(key, key)
        check(name not in data, str(path), f"both {name} and {NAMES.get(name)}", "one of them")
        value = torch.from_numpy(array.astype("f8" if array.dtype.kind == "f" else "i8"))
        is_turned = value.dim() == 2 and (key == "edges" or key.endswith("_masks"))
        data[name] = value.T if is_turned else value
    return data


def _read_pt(path: Path) -> Any:
    return read_tensors(path, DATA)


def _read_folder(folder: Path) -> Data:
    nodes = _read_table(folder / "nodes.csv", {"label"})
    edges = _read_table(folder / "edges.csv", {"source", "target"})
    data = Data()
    with naming(folder / "nodes.csv"):
        marks = ", ".join({*MASKS.values()} & {*nodes.columns})
        check(not marks, "columns", marks, "one column split: train, val, test or none")
        ids = pd.Index(nodes["id"] if "id" in nodes else map(str, range(len(nodes))))
        check(ids.is_unique and not ids.hasnans, "id", "none, or one twice", "each node's own")
        features = [_numbers(nodes[name]) for name in nodes if name not in ("id", "label", "split")]
        data.x = torch.cat([torch.empty(len(nodes), 0), *features], dim=1)
        # Inf and nan may be names of classes
        if np.isfinite(pd.to_numeric(nodes["label"], errors="coerce")).any():
            data.y = _numbers(nodes["label"].fillna("-1"), most_names=0)
        else:
            labels = pd.Categorical(nodes["label"])
            data.y = torch.from_numpy(labels.codes.astype(np.int64))
            print(f"{folder.stem}: labels are {', '.join(labels.categories)}", flush=True)
        if "split" in nodes:
            splits = nodes["split"].fillna("none")
            check(
                splits.isin([*MASKS, "none"]).all(), "split", {*splits}, "train, val, test or none"
            )
            for part, mask in MASKS.items():
                data[mask] = torch.from_numpy((splits == part).to_numpy(copy=True))
    with naming(folder / "edges.csv"):
        unknown = ", ".join({*edges.columns} - {"source", "target", "weight"})
        check(not unknown, "columns", unknown, "source, target and perhaps weight alone")
        columns = [pd.Index(edges[end]) for end in ("source", "target")]
        ends = torch.from_numpy(np.stack([ids.get_indexer(column) for column in columns]))
        wrong = edges[(ends < 0).any(dim=0).numpy()].head(1).to_dict("index")
        check(not wrong, "row", wrong, "two ids of nodes.csv")
        data.edge_index = ends
        if "weight" in edges:
            data.edge_weight = _numbers(edges["weight"], most_names=0)
    return data


def _read_table(path: Path, needed: set[str]) -> pd.DataFrame:
    """A CSV file as text, in which ``NA`` is a name like any other."""
    how: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""]}
    table: pd.DataFrame = read_csv(path, skipinitialspace=True, encoding="utf-8-sig", **how)
    # What pandas calls a column without a name is an index that it wrote
    is_legal = needed <= {*table.columns} and not table.columns.str.startswith("Unnamed: ").any()
    legal = f"{', '.join(needed)} among them, and a name for each"
    check(is_legal, str(path), f"columns {', '.join(table.columns)}", legal)
    return table


def _numbers(column: pd.Series[Any], most_names: int = MOST_CATEGORIES) -> Tensor:
    """(rows, 1) of a column of numbers; one-hot of one that has none and few enough names."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, copy=True)
    has_names = np.isnan(numbers).all() and 0 < column.nunique() <= most_names
    if has_names and column.notna().all():
        return torch.from_numpy(pd.get_dummies(column, dtype=float).to_numpy(copy=True))
    # Of names alone, it is an empty cell that is wrong
    is_wrong = column.isna().to_numpy() if has_names else ~np.isfinite(numbers)
    got = column[is_wrong].head(1).to_dict()
    legal = "numbers alone" + (f", or at most {most_names} names alone" if most_names else "")
    check(not got, f"column {column.name}, row", got, legal)
    return torch.from_numpy(numbers)[:, None]
