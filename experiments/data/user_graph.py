"""A user's own graph: an ``.npz``, a PyG ``.pt``, or a folder with ``nodes.csv`` and ``edges.csv``."""

from __future__ import annotations

import csv
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
from torch_geometric.data import Data

from experiments.data.graph_data import GraphData, MetricName, fixed_splits, make_metric
from experiments.data.guard import MASKS, check_graph, load_tensors

NPZ_KEYS = ("node_features", "node_labels", "edges", "train_masks", "val_masks", "test_masks")
PARTS = ("train", "val", "test")
TEXT = ("id", "split", "source", "target")
"""Columns of CSV files that are text, whatever they look like."""


def user_graph(path: Path, metric: MetricName | None = None) -> GraphData:
    """A graph of the user's own, its edges as they are given.

    Args:
        path: one of

            - ``FILE.npz`` with node_features (N, D), node_labels (N,), edges (M, 2), and train_masks, val_masks,
              test_masks, each (N,), or (S, N) for S splits, of which seed s takes ``s % S``;
            - ``FILE.pt``, a PyG ``Data`` with x, edge_index, y, train_mask, val_mask, test_mask ((N,) or (N, S)), and
              perhaps edge_weight or edge_attr; other tensors, numbers and texts are left out;
            - a folder with ``nodes.csv`` (columns ``label``, ``split`` with train / val / test or nothing, perhaps
              ``id``, without which nodes are numbered from 0; all others are features) and ``edges.csv`` (columns
              ``source``, ``target``, perhaps ``weight``; all others are left out).

            Labels are 0, 1, ...; a node outside the splits may have -1, or none in a CSV file.
        metric: ``"accuracy"`` (default) or, for two classes, ``"roc_auc"``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or does not hold what it should.
    """
    if not path.exists():
        raise FileNotFoundError(f"data_root: got {path}, which does not exist; expected FILE.npz, FILE.pt or a folder")
    if path.is_dir():
        given = _read_csv(path)
    elif path.suffix == ".npz":
        given = _read_npz(path)
    elif path.suffix == ".pt":
        given = _read_pt(path)
    else:
        raise ValueError(f"data_root: got {path}, expected FILE.npz, FILE.pt, or a folder with nodes.csv and edges.csv")
    data = _graph(path, given)
    classes = int(data.y.max()) + 1
    if not 2 <= classes <= data.x.size(0):
        raise ValueError(
            f"{path}: the largest label is {classes - 1}, expected 1 or more, and less than the number of nodes"
        )
    name: MetricName = metric if metric is not None else "accuracy"
    make = make_metric(name, classes)
    if name == "roc_auc":
        _check_both_classes(path, data)
    return GraphData(
        name=path.stem,
        data=data,
        splits=fixed_splits(data),
        metric=make,
        metric_name=name,
        num_outputs=classes,
        note=path.name,
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        file = np.load(path)
        if not isinstance(file, NpzFile):
            raise ValueError("one array, as numpy.save writes it")
        with file:
            missing = [key for key in NPZ_KEYS if key not in file.files]
            arrays = {key: file[key] for key in NPZ_KEYS if key not in missing}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole .npz file of plain arrays ({error})") from error
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing, expected the keys {', '.join(NPZ_KEYS)}")
    x, y, edges, *masks = (_tensor(path, key, array) for key, array in arrays.items())
    if edges.dim() != 2 or edges.size(1) != 2:
        raise ValueError(f"{path}: edges has shape {tuple(edges.shape)}, expected (edges, 2)")
    parts = {name: mask.T if mask.dim() == 2 else mask for name, mask in zip(MASKS, masks, strict=True)}
    return {"x": x, "y": y, "edge_index": edges.T, **parts}


def _tensor(path: Path, key: str, array: NDArray[Any]) -> Tensor:
    """Numbers of any kind; torch lacks some of numpy's."""
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64 if array.dtype.itemsize > 4 else np.float32}
    if array.dtype.kind not in kinds:
        raise ValueError(f"{path}: {key} holds {array.dtype}, expected numbers")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=kinds[array.dtype.kind]))


def _read_pt(path: Path) -> dict[str, Tensor]:
    try:
        data = load_tensors(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as a PyG Data ({error})") from error
    if not isinstance(data, Data):
        raise ValueError(f"{path}: got a {type(data).__name__}, expected a PyG Data")
    needed = ("x", "edge_index", "y", *MASKS)
    missing = [name for name in needed if name not in data]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing, expected {', '.join(needed)}")
    found = {name: data[name] for name in (*needed, "edge_weight", "edge_attr") if name in data}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, expected a dense tensor of numbers")
    return {name: value.as_tensor() if isinstance(value, EdgeIndex) else value for name, value in found.items()}


def _read_csv(folder: Path) -> dict[str, Tensor]:
    nodes, edges = _table(folder / "nodes.csv", ("label", "split")), _table(folder / "edges.csv", ("source", "target"))
    ids = nodes["id"] if "id" in nodes else pd.Series(range(len(nodes)), index=nodes.index).astype(str)
    if (ids.isna() | ids.duplicated()).any():
        row = ids.index[ids.isna() | ids.duplicated()][0]
        raise ValueError(f"{folder / 'nodes.csv'}: line {row + 2} has id {ids[row]}, expected each node's own")
    ends = []
    for column in ("source", "target"):
        end = pd.Index(ids).get_indexer(edges[column])
        if (end < 0).any():
            row = edges.index[end < 0][0]
            raise ValueError(
                f"{folder / 'edges.csv'}: line {row + 2} has {column}={edges[column][row]}, which is no node"
            )
        ends.append(torch.from_numpy(end.astype(np.int64)))
    splits = nodes["split"].fillna("none").str.lower().replace({"valid": "val"})
    odd = nodes.index[~splits.isin([*PARTS, "none"])]
    if len(odd):
        raise ValueError(
            f"{folder / 'nodes.csv'}: line {odd[0] + 2} has split={nodes['split'][odd[0]]}, expected train, val, test "
            "or nothing"
        )
    features = [column for column in nodes if column not in ("id", "label", "split")]
    columns = [_numbers(folder / "nodes.csv", nodes[column]).float() for column in features]
    found = {
        "x": torch.stack(columns, dim=1) if columns else torch.empty(len(nodes), 0),
        "y": _numbers(folder / "nodes.csv", nodes["label"], missing=-1),
        "edge_index": torch.stack(ends),
        **{
            name: torch.from_numpy((splits == part).to_numpy(copy=True))
            for name, part in zip(MASKS, PARTS, strict=True)
        },
    }
    if "weight" in edges:
        found["edge_weight"] = _numbers(folder / "edges.csv", edges["weight"])
    return found


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
    return table.assign(**{column: table[column].str.strip() for column in TEXT if column in table})


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


def _graph(path: Path, given: dict[str, Tensor]) -> Data:
    """What a file holds as the types that models take, checked."""
    data = Data(x=given["x"].float(), y=_whole(path, "the labels", given["y"]))
    if data.y.dim() == 2 and data.y.size(1) == 1:
        data.y = data.y.view(-1)
    if data.y.dim() != 1:
        raise ValueError(f"{path}: the labels have shape {tuple(data.y.shape)}, expected one a node")
    data.edge_index = _whole(path, "the edges", given["edge_index"]).contiguous()
    for name in MASKS:
        mask = given[name]
        if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{path}: {name} holds other values than 0 and 1, expected a mask")
        data[name] = mask.bool().contiguous()
    check_graph(str(path), data)
    for name in ("edge_weight", "edge_attr"):
        if name in given:
            data[name] = _of_edges(path, name, given[name], data.edge_index.size(1))
    return data


def _whole(path: Path, name: str, values: Tensor) -> Tensor:
    if values.is_floating_point():
        odd = values[~values.isfinite() | (values != values.trunc())]
        if odd.numel():
            raise ValueError(f"{path}: {name} hold {float(odd[0])}, expected whole numbers")
    return values.long()


def _of_edges(path: Path, name: str, values: Tensor, num_edges: int) -> Tensor:
    """(M,) weights, or (M, F) features."""
    if name == "edge_weight" and values.dim() == 2 and values.size(1) == 1:
        values = values.view(-1)
    if name == "edge_attr" and values.dim() == 1:
        values = values[:, None]
    if values.dim() != (1 if name == "edge_weight" else 2) or values.size(0) != num_edges:
        raise ValueError(
            f"{path}: {name} has shape {tuple(values.shape)}, expected one row for each of {num_edges} edges"
        )
    values = values.float().contiguous()
    if not values.isfinite().all():
        raise ValueError(f"{path}: {name} of edge {int((~values.isfinite()).nonzero()[0, 0])} is not finite")
    return values


def _check_both_classes(path: Path, data: Data) -> None:
    """roc_auc is not defined where a part of a split has one class only."""
    for name in MASKS[1:]:
        mask = data[name].view(data.num_nodes, -1)
        positive = (mask & (data.y[:, None] == 1)).sum(dim=0)
        if ((positive == 0) | (positive == mask.sum(dim=0))).any():
            raise ValueError(f"{path}: {name} has nodes of one class only, expected both for metric='roc_auc'")
