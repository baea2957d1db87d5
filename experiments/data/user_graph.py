"""A user's own graph: an ``.npz``, a PyG ``.pt``, a folder with ``nodes.csv`` and ``edges.csv``, or PyG's object."""

from __future__ import annotations

import csv
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage

from experiments.data.graph_data import (
    MASKS,
    GraphData,
    MetricName,
    check_graph,
    fixed_splits,
    make_metric,
    stratified_splits,
)

NEEDED = {"x": "node_features", "y": "node_labels", "edge_index": "edges"}
"""PyG's names, and those of Platonov et al. (2023), which an npz may have too."""
OPTIONAL = {**{mask: f"{mask}s" for mask in MASKS.values()}, "edge_weight": "edge_weight", "edge_attr": "edge_attr"}
TEXT = ("id", "split", "source", "target")
"""Columns of CSV files that are text, whatever they look like."""
MOST_CATEGORIES = 100
"""Names that a column of features may have: each becomes a feature."""
SAFE: list[Any] = [Data, DataEdgeAttr, DataTensorAttr, BaseStorage, GlobalStorage, NodeStorage, EdgeStorage]
"""What a ``Data`` is made of."""


def user_graph(path: Path, metric: MetricName | None = None, *, name: str | None = None, note: str = "") -> GraphData:
    """A graph of the user's own, its edges as they are given.

    Args:
        path: one of

            - ``FILE.npz`` with x (N, D), y (N,), edge_index (2, M), and perhaps train_mask, val_mask, test_mask, each
              (N,), or (N, S) for S splits, of which seed s takes ``s % S``; or by the names of Platonov et al. (2023),
              node_features, node_labels, edges (M, 2), and train_masks, val_masks, test_masks, (N,) or (S, N);
            - ``FILE.pt``, a PyG ``Data`` of the same names; other tensors, numbers and texts are left out;
            - a folder with ``nodes.csv`` (columns ``label``, perhaps ``split`` with train / val / test or nothing,
              perhaps ``id``, without which nodes are numbered from 0; all others are features, of which those without
              a number are categories) and ``edges.csv`` (columns ``source``, ``target``, perhaps ``weight``; all
              others are left out).

            The first two may have edge_weight (M,) and edge_attr (M, F). Labels are 0, 1, ..., in a CSV file names as
            well; a node outside the splits may have -1, or none in a CSV file. Without masks each seed draws a split.
        metric: ``"accuracy"`` (default) or, for two classes, ``"roc_auc"``.
        name: of the data set (default: that of the file).
        note: license and source (default: name of the file).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not hold what it should.
    """
    if not path.exists():
        raise FileNotFoundError(f"data_root: got {path}, which does not exist; expected FILE.npz, FILE.pt or a folder")
    readers = {".npz": _read_npz, ".pt": _read_pt}
    if not path.is_dir() and path.suffix not in readers:
        raise ValueError(f"data_root: got {path}, expected FILE.npz, FILE.pt, or a folder with nodes.csv and edges.csv")
    data = Data(**(_read_csv(path) if path.is_dir() else readers[path.suffix](path)))
    return graph_of(data, name or path.stem, metric, where=str(path), note=note or path.name)


def graph_of(
    data: Data | HeteroData, name: str, metric: MetricName | None = None, *, where: str, note: str = ""
) -> GraphData:
    """A PyG graph as a data set: its types those that models take, checked, and split where it has no masks.

    Args:
        data: a ``Data`` with x, edge_index and y, or a ``HeteroData`` of which one node type has y; with train_mask,
            val_mask and test_mask, or none of them.
        name: of the data set.
        metric: see :func:`user_graph`.
        where: begins the messages.
        note: license and source.

    Raises:
        ValueError: something is missing, or cannot be what it should.
    """
    target = None
    if isinstance(data, HeteroData):
        labeled = [kind for kind in data.node_types if "y" in data[kind]]
        if len(labeled) != 1:
            raise ValueError(f"{where}: got y of {', '.join(labeled) or 'no node type'}, expected one of one node type")
        target = labeled[0]
    given: Any = data if target is None else data[target]
    masks = [mask for mask in MASKS.values() if mask in given]
    missing = [key for key in NEEDED if key not in data] if target is None else []
    if masks:
        missing += [mask for mask in MASKS.values() if mask not in masks]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing, expected {', '.join(NEEDED)}, and all masks or none")
    data = _kept(data, where)
    store: Any = data if target is None else data[target]
    check_graph(where, data, target)
    classes = int(store.y.max()) + 1
    if not 2 <= classes <= len(store.y):
        raise ValueError(
            f"{where}: the largest label is {classes - 1}, expected 1 or more, and less than the number of nodes"
        )
    metric_name: MetricName = metric if metric is not None else "accuracy"
    make = make_metric(metric_name, classes)
    if masks and metric_name == "roc_auc":
        _check_both_classes(where, store)
    count = store.train_mask.view(len(store.y), -1).size(1) if masks else 0
    how = (
        f"{count} split{'s' * (count > 1)} by its masks" if masks else "no masks: each seed splits it 60/20/20 by class"
    )
    print(f"{name}: {data.num_nodes:,} nodes, {data.num_edges:,} edges, {classes} classes; {how}", flush=True)
    return GraphData(
        name=name,
        data=data,
        splits=fixed_splits(store) if masks else stratified_splits(store.y),
        metric=make,
        metric_name=metric_name,
        num_outputs=classes,
        note=note,
        target=target,
    )


def _kept(data: Data | HeteroData, where: str) -> Data | HeteroData:
    """What is used of a graph, as the types that models take; the rest is left out."""
    kept: Any = type(data)()
    plain = isinstance(data, Data)
    for part, store in [(None, data)] if plain else [*data.node_items(), *data.edge_items()]:
        given = {key: store[key] for key in (*NEEDED, *(OPTIONAL if plain else MASKS.values())) if key in store}
        if isinstance(part, tuple) and "edge_index" not in given:
            raise ValueError(f"{where}: {part} has no edge_index, expected one")
        for key, value in given.items():
            if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
                raise ValueError(f"{where}: {key} is a {type(value).__name__}, expected a dense tensor of real numbers")
            (kept if plain else kept[part])[key] = _converted(where, key, value, given)
        if isinstance(part, str):
            kept[part].num_nodes = store.num_nodes
    return kept


def _converted(where: str, key: str, value: Tensor, given: dict[str, Tensor]) -> Tensor:
    """One tensor of a graph, as models take it."""
    if key == "x":
        return value.float()
    if key == "edge_index":
        return _whole(where, "the edges", value).contiguous()
    if key == "y":
        y = _whole(where, "the labels", value)
        y = y.view(-1) if y.dim() == 2 and y.size(1) == 1 else y
        if y.dim() != 1:
            raise ValueError(f"{where}: the labels have shape {tuple(y.shape)}, expected one a node")
        return y
    if key in MASKS.values():
        if value.dtype != torch.bool and not ((value == 0) | (value == 1)).all():
            raise ValueError(f"{where}: {key} holds other values than 0 and 1, expected a mask")
        return value.bool().contiguous()
    return _of_edges(where, key, value, given["edge_index"].size(-1))


def _whole(where: str, name: str, values: Tensor) -> Tensor:
    if isinstance(values, EdgeIndex):
        values = values.as_tensor()
    if values.is_floating_point():
        odd = values[~values.isfinite() | (values != values.trunc())]
        if odd.numel():
            raise ValueError(f"{where}: {name} hold {float(odd[0])}, expected whole numbers")
    return values.long()


def _of_edges(where: str, name: str, values: Tensor, num_edges: int) -> Tensor:
    """(M,) weights, or (M, F) features."""
    if name == "edge_weight" and values.dim() == 2 and values.size(1) == 1:
        values = values.view(-1)
    if name == "edge_attr" and values.dim() == 1:
        values = values[:, None]
    if values.dim() != (1 if name == "edge_weight" else 2) or values.size(0) != num_edges:
        raise ValueError(
            f"{where}: {name} has shape {tuple(values.shape)}, expected one row for each of {num_edges} edges"
        )
    values = values.float().contiguous()
    if not values.isfinite().all():
        raise ValueError(f"{where}: {name} of edge {int((~values.isfinite()).nonzero()[0, 0])} is not finite")
    return values


def _check_both_classes(where: str, store: Any) -> None:
    """roc_auc is not defined where a part of a split has one class only."""
    for name in (MASKS["val"], MASKS["test"]):
        mask = store[name].view(len(store.y), -1)
        positive = (mask & (store.y[:, None] == 1)).sum(dim=0)
        if ((positive == 0) | (positive == mask.sum(dim=0))).any():
            raise ValueError(f"{where}: {name} has nodes of one class only, expected both for metric='roc_auc'")


def _read_npz(path: Path) -> dict[str, Tensor]:
    names = NEEDED | OPTIONAL
    try:
        file = np.load(path)
        if not isinstance(file, NpzFile):
            raise ValueError("one array, as numpy.save writes it")
        with file:
            arrays = {key: file[key] for key in {*names, *names.values()} if key in file}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole .npz file of plain arrays ({error})") from error
    found: dict[str, Tensor] = {}
    for name, other in names.items():
        keys = [key for key in {name, other} if key in arrays]
        if len(keys) > 1:
            raise ValueError(f"{path}: got both {name} and {other}, expected one of them")
        for key in keys:
            value = _tensor(path, key, arrays[key])
            if key == "edges" and (value.dim() != 2 or value.size(1) != 2):
                raise ValueError(f"{path}: edges has shape {tuple(value.shape)}, expected (edges, 2)")
            found[name] = value.T if key == "edges" or (key.endswith("_masks") and value.dim() == 2) else value
    missing = [f"{name} (or {NEEDED[name]})" for name in NEEDED if name not in found]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    return found


def _tensor(path: Path, key: str, array: NDArray[Any]) -> Tensor:
    """Numbers of any kind; torch lacks some of numpy's."""
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64 if array.dtype.itemsize > 4 else np.float32}
    if array.dtype.kind not in kinds:
        raise ValueError(f"{path}: {key} holds {array.dtype}, expected numbers")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kinds[array.dtype.kind]))


def _read_pt(path: Path) -> dict[str, Any]:
    """``torch.load`` of tensors and PyG's ``Data``; nothing else in the file is run."""
    known = torch.serialization.get_safe_globals()  # at its end, safe_globals forgets those of before too
    try:
        with torch.serialization.safe_globals([part for part in SAFE if part not in known]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # torch's text is on how to load it all the same
        why = (
            "not written by torch.save, or not of tensors alone" if isinstance(error, pickle.UnpicklingError) else error
        )
        raise ValueError(f"{path}: cannot be read as a PyG Data ({why})") from error
    if not isinstance(data, Data):
        raise ValueError(f"{path}: got a {type(data).__name__}, expected a PyG Data")
    return {name: data[name] for name in (*NEEDED, *OPTIONAL) if name in data}


def _read_csv(folder: Path) -> dict[str, Tensor]:
    path = folder / "nodes.csv"
    nodes, edges = _table(path, ("label",)), _table(folder / "edges.csv", ("source", "target"))
    ids = nodes["id"] if "id" in nodes else pd.Series(range(len(nodes)), index=nodes.index).astype(str)
    if (ids.isna() | ids.duplicated()).any():
        row = ids.index[ids.isna() | ids.duplicated()][0]
        raise ValueError(f"{path}: line {row + 2} has id {ids[row]}, expected each node's own")
    ends = []
    for column in ("source", "target"):
        end = pd.Index(ids).get_indexer(edges[column])
        if (end < 0).any():
            row = edges.index[end < 0][0]
            raise ValueError(
                f"{folder / 'edges.csv'}: line {row + 2} has {column}={edges[column][row]}, which is no node"
            )
        ends.append(torch.from_numpy(end.astype(np.int64)))
    found = {"edge_index": torch.stack(ends), **_features(folder, nodes)}
    label = nodes["label"]
    if _is_text(label):
        names = sorted(label.dropna().unique())
        found["y"] = torch.from_numpy(pd.Categorical(label, categories=names).codes.astype(np.int64))
        shown = ", ".join(f"{name} = {code}" for code, name in enumerate(names[:10])) + ", ..." * (len(names) > 10)
        print(f"{folder.stem}: labels are names: {shown}", flush=True)
    else:
        found["y"] = _numbers(path, label, missing=-1)
    if "split" in nodes:
        splits = nodes["split"].fillna("none").str.lower().replace({"valid": "val"})
        odd = nodes.index[~splits.isin([*MASKS, "none"])]
        if len(odd):
            raise ValueError(
                f"{path}: line {odd[0] + 2} has split={nodes['split'][odd[0]]}, expected train, val, test or nothing"
            )
        for part, mask in MASKS.items():
            found[mask] = torch.from_numpy((splits == part).to_numpy(copy=True))
    if "weight" in edges:
        found["edge_weight"] = _numbers(folder / "edges.csv", edges["weight"])
    return found


def _features(folder: Path, nodes: pd.DataFrame) -> dict[str, Tensor]:
    """``x``: columns of numbers as they are, and for a column of names one feature a name."""
    path, columns, encoded = folder / "nodes.csv", [], []
    for name in (column for column in nodes if column not in ("id", "label", "split")):
        column = nodes[name]
        if not _is_text(column):
            columns.append(_numbers(path, column)[:, None])
            continue
        if column.isna().any():
            raise ValueError(f"{path}: line {column.index[column.isna()][0] + 2} has no {name}, expected a name")
        if column.nunique() > MOST_CATEGORIES:
            raise ValueError(
                f"{path}: column {name} has {column.nunique()} names, expected at most {MOST_CATEGORIES}, or numbers"
            )
        columns.append(torch.from_numpy(pd.get_dummies(column, dtype=float).to_numpy(copy=True)))
        encoded.append(f"{name} ({column.nunique()})")
    if encoded:
        print(f"{folder.stem}: columns of names, one-hot: {', '.join(encoded)}", flush=True)
    return {"x": torch.cat(columns, dim=1).float() if columns else torch.empty(len(nodes), 0)}


def _is_text(column: pd.Series[Any]) -> bool:
    """Whether no cell is a number, and some are not empty: one that has both has a mistake."""
    return bool(column.notna().any() and pd.to_numeric(column, errors="coerce").isna().all())


def _table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """The file; the index is the line, from 0 below the header."""
    if not path.exists():
        raise FileNotFoundError(f"data_root: {path} is missing, expected nodes.csv and edges.csv")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # more fields than the header has
            table = pd.read_csv(
                path,
                dtype=dict.fromkeys(TEXT, str),  # 007 is not 7
                keep_default_na=False,  # NA is a name like any other
                na_values=[""],
                skipinitialspace=True,
                skip_blank_lines=False,
                index_col=False,
                encoding="utf-8-sig",
                low_memory=False,  # so that a column is of one type
            )
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from error
    with path.open(encoding="utf-8-sig", newline="") as file:  # pandas would rename them
        header = [name.strip() for name in next(csv.reader(file), [])]
    bad = [name for name in header if not name or header.count(name) > 1]
    if bad:
        raise ValueError(
            f"{path}: line 1 has a column {bad[0]!r}, expected a name of its own for each (pandas writes its index as "
            "a nameless one, unless index=False)"
        )
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; got {', '.join(map(str, table.columns))}")
    filled = table.notna().any(axis=1)
    table = table[filled[::-1].cummax()[::-1]]  # without empty lines at the end
    empty = table.index[~filled[table.index]]
    if len(empty):
        raise ValueError(f"{path}: line {empty[0] + 2} is empty")
    text = [column for column, kind in table.dtypes.items() if pd.api.types.is_object_dtype(kind) or kind == "str"]
    return table.assign(**{column: table[column].str.strip() for column in text})


def _numbers(path: Path, column: pd.Series[Any], missing: float | None = None) -> Tensor:
    """A column of finite numbers."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, copy=True)
    if missing is not None:
        values[column.isna()] = missing
    odd = column.index[~np.isfinite(values)]
    if len(odd):
        got = column[odd[0]]
        raise ValueError(f"{path}: line {odd[0] + 2} has {column.name}={got}, expected a number")
    return torch.from_numpy(values)
