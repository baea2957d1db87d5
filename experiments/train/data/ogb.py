"""OGB's sets of nodes and of molecules (Hu et al., 2020): ogb's own classes, splits and metrics.

Where files are missing ``ogb`` asks by ``input()``, downloads, or exits, and PyG unpickles
``processed/pre_transform.pt``. So both see a scratch folder, with links to what is to be read.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import scatter
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from experiments.train.data.graphs import DATA, check_graph
from experiments.train.data.published import published, without_update_check
from experiments.train.data.task import GraphData, Split
from experiments.train.files import allowing, naming, read_tensors, replacing
from gmoe._checks import check

NODES = ("ogbn-arxiv", "ogbn-products", "ogbn-proteins", "ogbn-mag")
"""The sets of nodes."""
KEPT = "processed/geometric_data_processed.pt"
"""What ogb makes of the files, in its folder."""


def files_of(name: str) -> list[str]:
    """The files without which ``ogb`` would ask, download, or read less than there should be."""
    said = published(name)
    is_typed = said.get("is hetero") == "True"
    names = ["num-node-dict", "triplet-type-list", "nodetype-has-label"]
    names += [f"{file}/paper/{file}" for file in ("node-feat", "node-label")]
    if not is_typed:
        names = ["edge", "num-node-list", "num-edge-list"]
        names += ["node-feat"] if said["has_node_attr"] == "True" else []
        names += ["edge-feat"] if said["has_edge_attr"] == "True" else []
        names += ["graph-label" if name.startswith("ogbg-") else "node-label"]
    split = f"split/{said['split']}/paper" if is_typed else f"split/{said['split']}"
    files = [f"RELEASE_v{said['version']}.txt", *(f"raw/{file}.csv.gz" for file in names)]
    return [*files, *(f"{split}/{part}.csv.gz" for part in ("train", "valid", "test"))]


def folder_of(name: str, root: Path) -> Path:
    """The folder of a set in the data root, named as ``ogb`` names it."""
    return root.expanduser() / name.replace("-", "_")


def read_ogb(name: str, root: Path) -> tuple[Any, dict[Split, Any]]:
    """``ogb``'s data set, and its split (of a typed graph by node type).

    Raises:
        FileNotFoundError: something is missing; says where it is published.
        ValueError: something is broken.
    """
    said = published(name)
    folder = folder_of(name, root)
    files = [folder / file for file in files_of(name)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(
            f"{name}: {', '.join(missing)} missing in {folder}; unpack {said['url']}, and rename "
            f"its folder {said['download_name']}"
        )
    kept = folder / KEPT
    with naming(folder), TemporaryDirectory() as made, allowing(DATA), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        scratch = Path(made)
        for part in (files[0].name, "raw", "split"):
            (scratch / part).symlink_to((folder / part).resolve())
        (scratch / KEPT).parent.mkdir()
        written = max(file.stat().st_mtime for file in files)
        is_kept = kept.exists() and kept.stat().st_mtime >= written
        if is_kept:
            read_tensors(kept, DATA)  # looks at checksums, as ogb does not
            (scratch / KEPT).symlink_to(kept.resolve())
        try:
            dataset = class_of(name)(name, meta_dict={**said, "dir_path": made})
            rows = dataset.get_idx_split()
        except FileNotFoundError as error:  # of what ogb reads and models do without
            raise FileNotFoundError(f"{folder}: {Path(error.filename).name} is missing") from error
        if not is_kept:
            with suppress(OSError):  # then the next run reads the files again
                kept.parent.mkdir(exist_ok=True)
                with replacing(kept) as fresh:
                    copyfile(scratch / KEPT, fresh)
    return dataset, {part: rows[part.replace("val", "valid")] for part in get_args(Split)}


def class_of(name: str) -> Any:
    """``ogb``'s class of sets of nodes, or of graphs."""
    without_update_check()
    if name.startswith("ogbg-"):
        return importlib.import_module("ogb.graphproppred").PygGraphPropPredDataset
    return importlib.import_module("ogb.nodeproppred").PygNodePropPredDataset


def load_ogb(name: str, root: Path) -> GraphData:
    """One of OGB's node data sets, with its official split and metric; ``root`` holds ogb's
    folder, ``ogbn_arxiv``.

    Edges are as ``ogb`` gives them (of products and proteins in both directions); proteins'
    ``x`` is the mean of ``edge_attr`` over the edges of a node. ogbn-mag is a ``HeteroData``
    whose papers alone have ``x`` and ``y``.
    """
    check(name in NODES, "name", repr(name), f"one of {', '.join(NODES)}")
    dataset, split = read_ogb(name, root)
    given = dataset[0]
    target = "paper" if name == "ogbn-mag" else None
    if target is not None:
        data: Any = typed(given)
        split = {part: rows[target] for part, rows in split.items()}
        y = data[target].y
    else:
        y = given.y.view(-1) if dataset.num_tasks == 1 else given.y.float()
        data = Data(y=y, edge_index=given.edge_index, x=given.x)
    if name == "ogbn-proteins":
        data.edge_attr = given.edge_attr
        ends = given.edge_index[1]
        data.x = scatter(given.edge_attr, ends, dim_size=given.num_nodes, reduce="mean")
    where = str(folder_of(name, root))
    check_graph(where, data, target)
    classes = int(dataset.num_classes)
    got = f"labels from {y.min():g} to {y.max():g}"
    check(0 <= y.min() <= y.max() < classes, where, got, f"0 to {classes - 1}")
    return GraphData(
        name=name,
        data=data,
        splits=lambda _: split,
        metric=partial(OGBMetric, name),
        metric_name="accuracy" if dataset.num_tasks == 1 else "roc_auc",
        num_outputs=classes if dataset.num_tasks == 1 else dataset.num_tasks,
        target=target,
    )


def typed(given: Any) -> HeteroData:
    """ogbn-mag as a ``HeteroData``; models are drawn in this order."""
    data = HeteroData()
    for kind in sorted(given.num_nodes_dict):
        data[kind].num_nodes = given.num_nodes_dict[kind]
    data["paper"].x = given.x_dict["paper"]
    data["paper"].y = given.y_dict["paper"].view(-1)
    for relation, edge_index in given.edge_index_dict.items():
        data[relation].edge_index = edge_index
    return data


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
