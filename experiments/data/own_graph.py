"""A graph of your own: PyG's object, an ``.npz``, a PyG ``.pt``, or a folder with ``nodes.csv`` and ``edges.csv``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage

from experiments.config import GraphConfig, HeteroConfig, RunConfig
from experiments.data import GraphData, MetricName
from experiments.data.graphs import MASKS, check_graph, fixed_splits, stratified_splits
from experiments.files import naming, read_csv, read_npz, read_tensors

NEEDED = {"x": "node_features", "y": "node_labels", "edge_index": "edges"}
NAMES = {**NEEDED, **{mask: f"{mask}s" for mask in MASKS.values()}, "edge_weight": "edge_weight"}
"""PyG's names, and those of Platonov et al. (2023), which an npz may have too."""
DATA: list[Any] = [Data, DataEdgeAttr, DataTensorAttr, BaseStorage, GlobalStorage, NodeStorage, EdgeStorage]
"""What a PyG ``Data`` is made of."""
MOST_CATEGORIES = 100
"""Names that a column of features may have: each becomes a feature."""


def configured(config: GraphConfig | HeteroConfig) -> GraphData:
    """The graph of a run, at its data root."""
    if isinstance(config, HeteroConfig):
        raise ValueError("data: got None for hetero, expected package.module:function that returns a PyG HeteroData")
    return own_graph(config.data_root, config.metric)


def own_object(found: Any, config: RunConfig) -> GraphData:
    """What a user's function made, as a data set."""
    kinds: dict[type, type] = {GraphConfig: Data, HeteroConfig: HeteroData}
    if not isinstance(found, kinds.get(type(config), ())):
        raise ValueError(
            f"data: got a {type(found).__name__} for {config.dataset}, expected a Data for the preset graph, a "
            "HeteroData for hetero, or pairs of images and labels for images"
        )
    name = config.data or config.dataset
    return graph_of(found.cpu(), name, name, getattr(config, "metric", None))


def own_graph(path: Path, metric: MetricName | None = None, name: str | None = None) -> GraphData:
    """A graph of the user's own, its edges as they are given.

    ``FILE.npz`` holds x (N, D), y (N,), edge_index (2, M), and perhaps edge_weight (M,) and train_mask, val_mask and
    test_mask, each (N,), or (N, S) for S splits, of which seed s takes ``s % S``; or the names of Platonov et al.
    (2023): node_features, node_labels, edges (M, 2), and train_masks, …, (N,) or (S, N). ``FILE.pt`` is a PyG ``Data``
    of the first names. A folder has ``nodes.csv`` (columns ``label``, perhaps ``split`` with train / val / test or
    nothing, perhaps ``id``, without which nodes are numbered from 0; all others are features, those without a number
    one-hot) and ``edges.csv`` (columns ``source``, ``target``, perhaps ``weight``).

    Labels are 0, 1, ..., in a CSV file names as well; a node outside the splits may have -1, in a CSV file none.
    Without masks each seed draws a split. Whatever else is there is left out.

    The metric is ``"accuracy"`` or, for two classes, ``"roc_auc"``; the name by default that of the file.
    """
    if not path.exists():
        raise FileNotFoundError(f"data_root: got {path}, which does not exist; expected FILE.npz, FILE.pt or a folder")
    readers = {".npz": _read_npz, ".pt": _read_pt}
    if not path.is_dir() and path.suffix not in readers:
        raise ValueError(f"data_root: got {path}, expected FILE.npz, FILE.pt, or a folder with nodes.csv and edges.csv")
    data = (_read_folder if path.is_dir() else readers[path.suffix])(path)
    return graph_of(data, name or path.stem, str(path), metric)


def graph_of(data: Data | HeteroData, name: str, where: str, metric: MetricName | None = None) -> GraphData:
    """A PyG graph as a data set: its types those that models take, checked, and split where it has no masks.

    It is a ``Data`` with x, edge_index and y, or a ``HeteroData`` of which one node type has y; with train_mask,
    val_mask and test_mask, or none of them. ``where`` begins the messages.
    """
    target = None
    if isinstance(data, HeteroData):
        labeled = [kind for kind in data.node_types if "y" in data[kind]]
        if len(labeled) != 1:
            raise ValueError(f"{where}: got y of {', '.join(labeled) or 'no node type'}, expected one of one node type")
        target = labeled[0]
    given: Any = data if target is None else data[target]
    masks = [mask for mask in MASKS.values() if mask in given]
    missing = [key for key in NEEDED if key not in given and target is None]
    missing += [mask for mask in MASKS.values() if masks and mask not in masks]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing, expected {', '.join(NEEDED)}, and all masks or none")
    data = _kept(data, where)
    check_graph(where, data, target)
    store: Any = data if target is None else data[target]
    classes = int(store.y.max()) + 1
    if not 2 <= classes <= len(store.y):
        raise ValueError(f"{where}: the largest label is {classes - 1}, expected 1 to {len(store.y) - 1}")
    how = f"{store.train_mask[0].numel()} split(s) by its masks" if masks else "each seed splits it 60/20/20 by class"
    print(f"{name}: {data.num_nodes:,} nodes, {data.num_edges:,} edges, {classes} classes; {how}", flush=True)
    return GraphData(
        name=name,
        data=data,
        splits=partial(fixed_splits if masks else stratified_splits, store),
        num_outputs=classes,
        metric_name=metric or "accuracy",
        target=target,
    )


def _kept(data: Any, where: str) -> Any:
    """What is used of a graph, as the types that models take."""
    kept = type(data)()
    for part, store in [(None, data)] if isinstance(data, Data) else [*data.node_items(), *data.edge_items()]:
        into = kept if part is None else kept[part]
        for key in NAMES if part is None else [key for key in NAMES if key != "edge_weight"]:
            if key in store:
                into[key] = _converted(f"{where}: {key}", key, store[key])
        if isinstance(part, str):
            into.num_nodes = store.num_nodes
    weight = kept.edge_weight if "edge_weight" in kept else None
    if weight is not None and (weight.shape != kept.edge_index.shape[-1:] or not weight.isfinite().all()):
        raise ValueError(f"{where}: edge_weight has shape {tuple(weight.shape)}, expected a finite number an edge")
    return kept


def _converted(where: str, key: str, value: Any) -> Tensor:
    """One tensor of a graph, as models take it."""
    if isinstance(value, EdgeIndex):
        value = value.as_tensor()
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
        raise ValueError(f"{where} is a {type(value).__name__}, expected a dense tensor of real numbers")
    if key == "y" and (value.dim() == 0 or value.numel() != len(value)):
        raise ValueError(f"{where} has shape {tuple(value.shape)}, expected a label a node")
    value = value.flatten() if key in ("y", "edge_weight") else value
    if key in ("x", "edge_weight"):
        return value.float().contiguous()
    if value.is_floating_point() and not (value == value.trunc()).all():  # NaN is not equal to itself
        raise ValueError(f"{where} holds other than whole numbers")
    if key in MASKS.values() and not ((value == 0) | (value == 1)).all():
        raise ValueError(f"{where} holds other values than 0 and 1, expected a mask")
    return (value.bool() if key in MASKS.values() else value.long()).contiguous()


def _read_npz(path: Path) -> Data:
    arrays = read_npz(path, {*NAMES, *NAMES.values()})
    data = Data()
    for name, other in NAMES.items():
        keys = [key for key in {name, other} if key in arrays]
        if len(keys) > 1:
            raise ValueError(f"{path}: got both {name} and {other}, expected one of them")
        for key in keys:
            kind = {"b": "bool", "f": "float64" if arrays[key].dtype.itemsize > 4 else "float32"}
            value = torch.from_numpy(arrays[key].astype(kind.get(arrays[key].dtype.kind, "int64")))
            data[name] = value.T if value.dim() == 2 and (key == "edges" or key.endswith("_masks")) else value
    return data


def _read_pt(path: Path) -> Data:
    data = read_tensors(path, DATA)
    if not isinstance(data, Data):
        raise ValueError(f"{path}: got a {type(data).__name__}, expected a PyG Data")
    for name, value in data.to_dict().items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if dense and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} claims more numbers than the file holds")
    return data


def _read_folder(folder: Path) -> Data:
    nodes = _read_table(folder / "nodes.csv", ("label",), text=("id", "split"))
    edges = _read_table(folder / "edges.csv", ("source", "target"), text=("source", "target"))
    with naming(folder / "nodes.csv"):
        ids = pd.Index(nodes["id"] if "id" in nodes else map(str, range(len(nodes))))
        if ids.hasnans or not ids.is_unique:
            raise ValueError("id is missing or given twice, expected each node's own")
        features = [_numbers(nodes[name]) for name in nodes if name not in ("id", "label", "split")]
        data = Data(x=torch.cat(features, dim=1) if features else torch.empty(len(nodes), 0))
        if pd.to_numeric(nodes["label"], errors="coerce").notna().any():
            data.y = _numbers(nodes["label"].fillna(-1))
        else:
            labels = pd.Categorical(nodes["label"])
            data.y = torch.from_numpy(labels.codes.astype(np.int64))
            print(f"{folder.stem}: labels are {', '.join(map(str, labels.categories[:10]))}, …", flush=True)
        if "split" in nodes:
            splits = nodes["split"].fillna("none").str.lower().replace({"valid": "val"})
            if not splits.isin([*MASKS, "none"]).all():
                raise ValueError(f"got splits {set(splits)}, expected train, val, test or nothing")
            for part, mask in MASKS.items():
                data[mask] = torch.from_numpy((splits == part).to_numpy(copy=True))
    with naming(folder / "edges.csv"):
        ends = np.stack([ids.get_indexer(edges[column]) for column in ("source", "target")])
        if (ends < 0).any():
            end, row = np.argwhere(ends < 0)[0]
            raise ValueError(f"edge {row} has {edges[('source', 'target')[end]][row]!r}, which is no node")
        data.edge_index = torch.from_numpy(ends.astype(np.int64))
        if "weight" in edges:
            data.edge_weight = _numbers(edges["weight"])
    return data


def _read_table(path: Path, needed: tuple[str, ...], text: tuple[str, ...]) -> pd.DataFrame:
    """A CSV file; ``NA`` is a name like any other, and ``007`` is not 7 in columns of text."""
    table: pd.DataFrame = read_csv(
        path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=[""], skipinitialspace=True,
        encoding="utf-8-sig",
    )  # fmt: skip
    if missing := [column for column in needed if column not in table]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; got {list(table.columns)}")
    if any(str(column).startswith("Unnamed: ") for column in table):
        raise ValueError(f"{path}: got a column without a name, expected none (pandas: to_csv(index=False))")
    return table


def _numbers(column: pd.Series[Any]) -> Tensor:
    """(rows, 1) of a column of numbers; of one that has none, one-hot."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    if np.isnan(numbers).all() and column.notna().all() and column.nunique() <= MOST_CATEGORIES:
        return torch.from_numpy(pd.get_dummies(column, dtype=float).to_numpy(copy=True))
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers)))
        raise ValueError(f"row {row} has {column.name!r}={column[row]!r}, expected a number")
    return torch.from_numpy(numbers.copy())[:, None]
