"""A graph of your own.

PyG's object, an ``.npz``, a PyG ``.pt``, or a folder with ``nodes.csv`` and ``edges.csv``.
"""

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

from experiments.train.data.graphs import DATA, MASKS, check_graph, fixed_splits, stratified_splits
from experiments.train.data.task import GraphData, MetricName
from experiments.train.files import naming, read_csv, read_npz, read_tensors
from gmoe._checks import check

NEEDED = {"x": "node_features", "y": "node_labels", "edge_index": "edges"}
NAMES = {**NEEDED, **{mask: f"{mask}s" for mask in MASKS.values()}, "edge_weight": "edge_weight"}
"""PyG's names, and those of Platonov et al. (2023), which an npz may have too."""
MOST_CATEGORIES = 100
"""Names that a column of features may have: each becomes a feature."""


def graph_from(
    made: Any, legal_class: type, preset: str, name: str, metric: MetricName | None = None
) -> GraphData:
    """What a user's function made for a preset, as a data set; ``name`` is the function's."""
    legal = (
        "a Data for the preset graph, a HeteroData for hetero, or pairs of images and labels for "
        "images"
    )
    is_graph = isinstance(made, legal_class)
    check(is_graph, "data", f"a {type(made).__name__} for {preset}", legal)
    return graph_of(made.cpu(), name, name, metric)


def own_graph(path: Path, metric: MetricName | None = None, name: str | None = None) -> GraphData:
    """A graph of the user's own, its edges as they are given.

    ``FILE.npz`` holds x (N, D), y (N,), edge_index (2, M), and perhaps edge_weight (M,) and
    train_mask, val_mask and test_mask, each (N,), or (N, S) for S splits, of which seed s takes
    ``s % S``; or the names of Platonov et al. (2023): node_features, node_labels, edges (M, 2),
    and train_masks, …, (N,) or (S, N). ``FILE.pt`` is a PyG ``Data`` of the first names. A
    folder has ``nodes.csv`` (columns ``label``, perhaps ``split`` with train / val / test or
    nothing, perhaps ``id``, without which nodes are numbered from 0; all others are features,
    those without a number one-hot) and ``edges.csv`` (columns ``source``, ``target``, perhaps
    ``weight``).

    Labels are 0, 1, ..., in a CSV file names as well; a node outside the splits may have -1, in
    a CSV file none. Without masks each seed draws a split. Whatever else is there is left out.

    The metric is ``"accuracy"`` or, for two classes, ``"roc_auc"``; the name by default that of
    the file.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"data_root: got {path}, which does not exist; expected FILE.npz, FILE.pt or a folder"
        )
    readers = {"folder": _read_folder, ".npz": _read_npz, ".pt": _read_pt}
    kind = "folder" if (path / "nodes.csv").is_file() else path.suffix
    legal = "FILE.npz, FILE.pt, or a folder with nodes.csv and edges.csv"
    check(kind in readers, "data_root", path, legal)
    return graph_of(readers[kind](path), name or path.stem, str(path), metric)


def graph_of(
    data: Data | HeteroData, name: str, where: str, metric: MetricName | None = None
) -> GraphData:
    """A PyG graph as a data set: its types those that models take, checked, and split where it has
    no masks.

    It is a ``Data`` with x, edge_index and y, or a ``HeteroData`` of which one node type has y;
    with train_mask, val_mask and test_mask, or none of them. ``where`` begins the messages.
    """
    target = None
    if isinstance(data, HeteroData):
        labeled = [kind for kind in data.node_types if "y" in data[kind]]
        got = f"y of {', '.join(labeled) or 'no node type'}"
        check(len(labeled) == 1, where, got, "one of one node type")
        target = labeled[0]
    given: Any = data if target is None else data[target]
    masks = [mask for mask in MASKS.values() if mask in given]
    missing = [key for key in NEEDED if key not in given and target is None]
    missing += [mask for mask in MASKS.values() if masks and mask not in masks]
    legal = f"{', '.join(NEEDED)}, and all masks or none"
    check(not missing, where, f"no {', '.join(missing)}", legal)
    data = _kept(data, where)
    check_graph(where, data, target)
    store = data if target is None else data[target]
    classes = int(store.y.max()) + 1
    got = f"{classes - 1} as the largest label"
    check(2 <= classes <= len(store.y), where, got, f"1 to {len(store.y) - 1}")
    labels = store.y[store.y >= 0].unique().tolist()
    got = f"no label but {labels} (those below 0 are none)"
    check(len(labels) > 1, where, got, "two classes or more")
    how = "each seed splits it 60/20/20 by class"
    if masks:
        how = f"{store.train_mask[0].numel()} split(s) by its masks"
    size = (
        f"{data.num_nodes:,} nodes, {data.num_edges:,} edges, {store.num_features:,} features, "
        f"{classes} classes"
    )
    print(f"{name}: {size}; {how}", flush=True)
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
    parts: list[tuple[Any, Any]] = [(None, data)]
    names = list(NAMES)
    if isinstance(data, HeteroData):
        parts = [*data.node_items(), *data.edge_items()]
        names.remove("edge_weight")
    for part, store in parts:
        into = kept if part is None else kept[part]
        for key in names:
            if key in store:
                into[key] = _converted(f"{where}: {key}", key, store[key])
        if isinstance(part, str):
            into.num_nodes = store.num_nodes
    if "edge_weight" in kept:
        weight = kept.edge_weight
        is_an_edge = weight.shape == kept.edge_index.shape[-1:]
        got = f"edge_weight of shape {tuple(weight.shape)}"
        check(is_an_edge and weight.isfinite().all(), where, got, "a finite number an edge")
    return kept


def _converted(where: str, key: str, value: Any) -> Tensor:
    """One tensor of a graph, as models take it."""
    if isinstance(value, EdgeIndex):
        value = value.as_tensor()
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided
    got = f"a {type(value).__name__}"
    check(is_dense and not value.is_complex(), where, got, "a dense tensor of real numbers")
    is_a_column = value.dim() > 0 and value.numel() == len(value)
    check(key != "y" or is_a_column, where, f"shape {tuple(value.shape)}", "a label a node")
    if key in ("y", "edge_weight"):
        value = value.flatten()
    if key in ("x", "edge_weight"):
        return value.float().contiguous()
    # NaN is not equal to itself
    are_whole = not value.is_floating_point() or (value == value.trunc()).all()
    check(are_whole, where, "other numbers", "whole numbers")
    if key not in MASKS.values():
        return value.long().contiguous()
    is_mask = ((value == 0) | (value == 1)).all()
    check(is_mask, where, "other values than 0 and 1", "a mask")
    return value.bool().contiguous()


def _read_npz(path: Path) -> Data:
    arrays = read_npz(path, {*NAMES, *NAMES.values()})
    data = Data()
    for name, other in NAMES.items():
        keys = [key for key in {name, other} if key in arrays]
        check(len(keys) < 2, str(path), f"both {name} and {other}", "one of them")
        for key in keys:
            kind = {"b": "bool", "f": "float64" if arrays[key].dtype.itemsize > 4 else "float32"}
            value = torch.from_numpy(arrays[key].astype(kind.get(arrays[key].dtype.kind, "int64")))
            is_turned = value.dim() == 2 and (key == "edges" or key.endswith("_masks"))
            data[name] = value.T if is_turned else value
    return data


def _read_pt(path: Path) -> Data:
    with naming(path):
        saved = read_tensors(path, DATA)
        check(isinstance(saved, Data), str(path), f"a {type(saved).__name__}", "a PyG Data")
        data = Data.from_dict({name: saved[name] for name in NAMES if name in saved})
        for name, value in data.to_dict().items():
            if isinstance(value, Tensor) and value.layout == torch.strided:
                size = value.numel() * value.element_size()
                got = f"{value.numel()} numbers as {name}"
                is_held = size <= value.untyped_storage().nbytes()
                check(is_held, str(path), got, "as many as the file holds")
    return data


def _read_folder(folder: Path) -> Data:
    nodes = _read_table(folder / "nodes.csv", ("label",), text=("id", "split"))
    edges = _read_table(folder / "edges.csv", ("source", "target"), text=("source", "target"))
    with naming(folder / "nodes.csv"):
        ids = pd.Index(nodes["id"] if "id" in nodes else map(str, range(len(nodes))))
        check(ids.is_unique and not ids.hasnans, "id", "none, or one twice", "each node's own")
        features = [_numbers(nodes[name]) for name in nodes if name not in ("id", "label", "split")]
        data = Data(x=torch.cat(features, dim=1) if features else torch.empty(len(nodes), 0))
        # Inf and nan may be names of classes.
        if np.isfinite(pd.to_numeric(nodes["label"], errors="coerce")).any():
            data.y = _numbers(nodes["label"].fillna(-1))
        else:
            labels = pd.Categorical(nodes["label"])
            data.y = torch.from_numpy(labels.codes.astype(np.int64))
            shown = [*map(str, labels.categories[:10]), *["…"] * (len(labels.categories) > 10)]
            print(f"{folder.stem}: labels are {', '.join(shown)}", flush=True)
        if "split" in nodes:
            splits = nodes["split"].fillna("none").str.lower().replace({"valid": "val"})
            legal = "train, val, test or nothing"
            check(splits.isin([*MASKS, "none"]).all(), "split", set(splits), legal)
            for part, mask in MASKS.items():
                data[mask] = torch.from_numpy((splits == part).to_numpy(copy=True))
    with naming(folder / "edges.csv"):
        ends = np.stack(
            [ids.get_indexer(pd.Index(edges[column])) for column in ("source", "target")]
        )
        if (ends < 0).any():
            end, row = np.argwhere(ends < 0)[0]
            raise ValueError(
                f"edge {row} has {edges[('source', 'target')[end]][row]!r}, which is no node"
            )
        data.edge_index = torch.from_numpy(ends.astype(np.int64))
        if "weight" in edges:
            data.edge_weight = _numbers(edges["weight"], most_names=0)
    return data


def _read_table(path: Path, needed: tuple[str, ...], text: tuple[str, ...]) -> pd.DataFrame:
    """A CSV file; ``NA`` is a name like any other, and ``007`` is not 7 in columns of text."""
    table: pd.DataFrame = read_csv(
        path,
        dtype=dict.fromkeys(text, str),
        keep_default_na=False,
        na_values=[""],
        skipinitialspace=True,
        encoding="utf-8-sig",
    )
    columns = [str(column) for column in table]
    got = f"columns {', '.join(columns)}"
    check({*needed} <= {*columns}, str(path), got, f"{', '.join(needed)} among them")
    is_named = not any(column.startswith("Unnamed: ") for column in columns)
    check(is_named, str(path), "a column without a name", "none (pandas: to_csv(index=False))")
    return table


def _numbers(column: pd.Series[Any], most_names: int = MOST_CATEGORIES) -> Tensor:
    """(rows, 1) of a column of numbers; one-hot of one that has none and few enough names."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    has_names = bool(np.isnan(numbers).all()) and 0 < column.nunique() <= most_names
    if has_names and column.notna().all():
        return torch.from_numpy(pd.get_dummies(column, dtype=float).to_numpy(copy=True))
    if not np.isfinite(numbers).all():
        # Of names alone, it is an empty cell that is wrong.
        is_wrong = column.isna().to_numpy() if has_names else ~np.isfinite(numbers)
        row = int(np.argmax(is_wrong))
        or_names = f", or at most {most_names} names alone" if most_names else ""
        raise ValueError(
            f"row {row} has {column.name!r}={str(column[row])!r}, expected numbers alone{or_names}"
        )
    return torch.from_numpy(numbers.copy())[:, None]
