"""Four of OGB's node data sets (Hu et al., 2020): fetched whole, read from OGB's own files, OGB's
own metric.

The fifth, ogbn-papers100M, is larger than memory, and not supported. The files are read here, not
by ``ogb``'s loader, which asks questions by ``input()`` and unpickles what it finds.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import scatter
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from experiments.train.data.published import published, without_update_check
from experiments.train.data.task import GraphData, Split, Splits
from experiments.train.files import naming, read_csv, read_tensors
from gmoe._checks import check

RELATIONS = (
    ("author", "affiliated_with", "institution"),
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "has_topic", "field_of_study"),
)
"""Of ogbn-mag: source, relation, destination. Papers alone have features, labels and a split."""

MEGABYTES = {"ogbn-arxiv": 80, "ogbn-products": 1_380, "ogbn-proteins": 210, "ogbn-mag": 400}
"""The data sets, and the sizes of their zip files."""


def files_of(name: str) -> dict[Any, str]:
    """The files that are read, by what they hold.

    Relations have two, and proteins the features of edges.
    """
    said = published(name)
    mag = name == "ogbn-mag"
    raw = "raw/{0}/paper/{0}.csv.gz" if mag else "raw/{0}.csv.gz"
    split = f"split/{said['split']}/paper" if mag else f"split/{said['split']}"
    files: dict[Any, str] = {
        "release": f"RELEASE_v{said['version']}.txt",
        "x": raw.format("edge-feat" if name == "ogbn-proteins" else "node-feat"),
        "y": raw.format("node-label"),
        "nodes": f"raw/num-node-{'dict' if mag else 'list'}.csv.gz",
    }
    files |= {part: f"{split}/{part.replace('val', 'valid')}.csv.gz" for part in get_args(Split)}
    for relation in RELATIONS if mag else ("",):
        folder = f"raw/relations/{'___'.join(relation)}" if relation else "raw"
        files[relation, "edge"] = f"{folder}/edge.csv.gz"
        files[relation, "edges"] = f"{folder}/num-edge-list.csv.gz"
    return files


def load_ogb(
    name: str, root: Path, *, offline: bool = False, allow_large_downloads: bool = False
) -> GraphData:
    """One of OGB's node data sets, with its official split and metric; ``root`` holds ogb's
    folder, ``ogbn_arxiv``.

    Edges are as in the files (of products and proteins in both directions); proteins' ``x`` is
    the mean of ``edge_attr`` over the edges of a node. ogbn-mag is a ``HeteroData`` whose
    papers alone have ``x`` and ``y``. Missing files that may not or cannot be downloaded are a
    ``FileNotFoundError``, broken ones a ``ValueError``.
    """
    legal = f"one of {', '.join(MEGABYTES)}"
    check(name in MEGABYTES, "name", repr(name), legal)
    files = files_of(name)
    root = root.expanduser()
    folder = provide(name, root, files, MEGABYTES[name], offline, allow_large_downloads)
    hetero = name == "ogbn-mag"
    tasks = int(published(name)["num tasks"])
    if (folder / "PLANTED.txt").exists():
        print(f"{name}: a planted graph, not OGB's ({folder / 'PLANTED.txt'})", flush=True)
    tensors = kept_tensors(name, folder, files, _read)
    split = tensors["split"]
    with naming(folder):  # kept tensors are not read as strictly as OGB's files
        data = HeteroData(tensors["graph"]) if hetero else Data.from_dict(tensors["graph"])
        data.validate()
        # Refuses nodes that are not there
        (data["paper"] if hetero else data).y[torch.cat([*split.values()])]
    return GraphData(
        name=name,
        data=data,
        splits=lambda _: split,
        metric=partial(OGBMetric, name),
        metric_name="accuracy" if tasks == 1 else "roc_auc",
        num_outputs=int(published(name)["num classes"]) if tasks == 1 else tasks,
        target="paper" if hetero else None,
    )


def provide(
    name: str,
    root: Path,
    files: Mapping[Any, str],
    megabytes: int,
    offline: bool,
    allow_large_downloads: bool,
) -> Path:
    """The data set's folder, with all its files.

    A zip file that lies in ``root`` is taken in place of a download.
    """
    folder = root / name.replace("-", "_")
    said = published(name)
    if not any(path.is_file() for path in folder.rglob("*")):
        from experiments.train.data.archives import unpacked

        archive = Path(said["url"]).name
        # As ogb
        is_small = allow_large_downloads or megabytes <= 1_000
        legal = f"OGB's {archive} ({megabytes} MB) in {root}, or --allow-large-downloads"
        has_archive = (root / archive).exists()
        check(offline or is_small or has_archive, name, f"no {folder}", legal)
        # Without a file in it, as ogb leaves it where a download failed
        shutil.rmtree(folder, ignore_errors=True)
        unpacked(
            name,
            root,
            offline,
            folder.name,
            said["url"],
            None,
            megabytes,
            inside=said["download_name"],
        )
    if missing := [file for file in files.values() if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{name}: {', '.join(missing)} missing in {folder}; put them there, or move it away"
        )
    return folder


def kept_tensors(
    name: str,
    folder: Path,
    names: Mapping[Any, str],
    read: Callable[[str, dict[Any, Path]], dict[str, Any]],
) -> dict[str, Any]:
    """What ``read`` makes of the files.

    What the last run kept of it is taken where the files have the same sizes.
    """
    files = {of: folder / file for of, file in names.items()}
    path = folder / "processed" / "tensors.pt"
    sizes = [file.stat().st_size for file in files.values()]
    known = read_tensors(path) if path.exists() else None
    if isinstance(known, dict) and known.get("sizes") == sizes:
        return known
    print(f"{name}: reading the files in {folder}", flush=True)
    tensors = {"sizes": sizes, **read(name, files)}
    try:
        path.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as scratch:
            torch.save(tensors, Path(scratch) / path.name)
            (Path(scratch) / path.name).replace(path)
    except (OSError, RuntimeError) as error:  # the latter is torch's, of a full disk
        print(
            f"{name}: the next run reads them again, since they cannot be kept ({error})",
            flush=True,
        )
    return tensors


def _read(name: str, files: dict[Any, Path]) -> dict[str, Any]:
    """``graph``, of ogbn-mag by node type and relation, and ``split``.

    Each (labeled) node is in one part at most.
    """
    classes, tasks, both_ways = published(name)[["num classes", "num tasks", "add_inverse_edge"]]
    graph: dict[Any, Any] = {}
    if name == "ogbn-mag":
        graph = _counts(files["nodes"])
    nodes = graph["paper"]["num_nodes"] if graph else int(table(files["nodes"], 1, [sys.maxsize]))
    for relation in RELATIONS if graph else ("",):
        ends = (
            [graph[kind]["num_nodes"] for kind in (relation[0], relation[2])]
            if relation
            else [nodes, nodes]
        )
        number = int(table(files[relation, "edges"], 1, [sys.maxsize]))
        graph[relation] = {
            "edge_index": table(files[relation, "edge"], number, ends).t().contiguous()
        }
    x = table(files["x"], number if name == "ogbn-proteins" else nodes)
    y = table(files["y"], nodes, [int(classes)] * int(tasks))
    y = y.view(-1) if tasks == "1" else y.float()
    if name == "ogbn-mag":
        graph["paper"] |= {"x": x, "y": y}
    else:
        graph = {"y": y, **graph[""], "x": x}
    if both_ways == "True":  # each edge is followed by its reverse, as ogb has it
        graph["edge_index"] = torch.stack(
            [graph["edge_index"], graph["edge_index"].flip(0)], dim=-1
        ).view(2, -1)
    if name == "ogbn-proteins":
        graph["edge_attr"] = x.repeat_interleave(2, dim=0)
        graph["x"] = scatter(
            graph["edge_attr"], graph["edge_index"][1], dim_size=nodes, reduce="mean"
        )
    split: Splits = {part: table(files[part], None, [nodes]).view(-1) for part in get_args(Split)}
    twice = torch.cat([*split.values()]).bincount()
    check(
        twice.max() < 2,
        str(files["train"].parent),
        f"node {int(twice.argmax())} twice",
        "each at most once",
    )
    return {"graph": graph, "split": split}


def _counts(path: Path) -> dict[Any, Any]:
    """The number of nodes of each type of ogbn-mag."""
    counts = read_csv(path)
    kinds = sorted({kind for source, _, target in RELATIONS for kind in (source, target)})
    got = f"columns {', '.join(map(str, counts)):.200}"
    check(kinds == sorted(map(str, counts)), str(path), got, ", ".join(kinds))
    first = {kind: counts[kind][0] for kind in kinds}
    are_counts = all(counts[kind].dtype.kind == "i" and 0 < first[kind] < 2**31 for kind in kinds)
    got = f"{', '.join(map(str, first.values())):.200}"
    check(are_counts, str(path), got, "whole numbers of nodes, from 1 to 2**31 - 1")
    return {kind: {"num_nodes": int(count)} for kind, count in first.items()}


def table(path: Path, rows: int | None, below: Sequence[int] | None = None) -> Tensor:
    """(rows, columns) float32; or int64 from 0 to what each column stays ``below``."""
    values = read_csv(path, header=None, dtype=np.float64).to_numpy()
    low = values.min(axis=0)  # NaN where there is one
    high = values.max(axis=0)
    is_wanted = rows in (None, len(values)) and bool(np.isfinite([low, high]).all())
    wanted = "finite numbers"
    if below is not None:
        wanted = f"{len(below)} whole numbers from 0 to {max(below) - 1}"
        is_wanted = is_wanted and len(low) == len(below)
        is_wanted = is_wanted and bool(((low >= 0) & (high < below)).all())
        is_wanted = is_wanted and bool((values % 1 == 0).all())
    got = f"{len(values)} rows of {len(low)} numbers from {low.min():g} to {high.max():g}"
    check(is_wanted, str(path), got, f"{'any' if rows is None else rows} rows of {wanted}")
    return torch.from_numpy(values.astype(np.float32 if below is None else np.int64))


class OGBMetric(Metric):
    """What ogb's ``Evaluator`` of nodes or of graphs says.

    Accuracy of the argmax; or the mean over tasks of ROC-AUC, average precision or RMSE, in which
    labels that are NaN do not count.

    All predictions are kept, and evaluated at once over all processes: the ROC-AUC does not
    follow from its parts.
    """

    full_state_update = False
    prediction: list[Tensor]
    target: list[Tensor]

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        without_update_check()
        kind = "ogb.graphproppred" if name.startswith("ogbg-") else "ogb.nodeproppred"
        self._evaluator = importlib.import_module(kind).Evaluator(name)
        self.add_state("prediction", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in the logits of some nodes or graphs."""
        logits = logits.detach()
        if self._evaluator.eval_metric == "acc":
            self.prediction.append(logits.argmax(dim=1, keepdim=True))
            self.target.append(target.view(-1, 1))
        else:
            self.prediction.append(logits.float())
            self.target.append(target)

    def compute(self) -> Tensor:
        """The metric over everything since the last reset."""
        result = self._evaluator.eval(
            {"y_true": dim_zero_cat(self.target), "y_pred": dim_zero_cat(self.prediction)}
        )
        return torch.tensor(result[self._evaluator.eval_metric], dtype=torch.float64)
