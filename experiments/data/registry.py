"""The graph data sets, one line each: loader, official split, metric, size of the download, license and source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch_geometric import datasets
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.transforms import NormalizeFeatures

from experiments.data.graph_data import GraphData, MetricName, Splits, fixed_splits, make_metric, per_class_splits
from experiments.data.guard import check_graph, load_guarded

PLANETOID = "Yang et al., 2016; kimiyoung/planetoid, MIT; public split, 20 nodes a class"
SHCHUR = "Shchur et al., 2018; shchur/gnn-benchmark, MIT; random split by seed, 20 a class train, 30 val, rest test"
PLATONOV = "Platonov et al., 2023; yandex-research/heterophilous-graphs, MIT; 10 fixed splits, 50/25/25"
GEOM = "Pei et al., 2020; graphdml-uiuc-jlu/geom-gcn; 10 fixed splits, 48/32/20"


@dataclass(frozen=True)
class PyGSet:
    """A data set of PyG.

    Args:
        cls: its class.
        kwargs: arguments of the class beside ``root``.
        split: ``"masks"`` of the data, or ``"per_class"`` draws.
        metric: by which the field compares.
        megabytes: size of the download.
        note: license, source, split.
    """

    cls: type[InMemoryDataset]
    kwargs: dict[str, Any]
    split: Literal["masks", "per_class"]
    metric: MetricName
    megabytes: float
    note: str

    def load(self, name: str, root: Path, offline: bool) -> GraphData:
        """The data set, its features those of the files (Planetoid's normalized to sum 1 a node, as is usual)."""
        dataset = load_guarded(self.cls, name, root, self.megabytes, offline, self.kwargs)
        data = dataset.get(0)
        assert isinstance(data, Data)
        check_graph(name, data)  # as in the files: a sum over a row spreads NaN
        data = data if dataset.transform is None else dataset.transform(data)
        data.x, data.y = data.x.float(), data.y.long()
        classes = int(data.y.max()) + 1
        return GraphData(
            name=name,
            data=data,
            splits=fixed_splits(data) if self.split == "masks" else per_class_splits(data.y),
            metric=make_metric(self.metric, classes),
            metric_name=self.metric,
            num_outputs=classes,
            note=self.note,
        )


def _planetoid(name: str, megabytes: float) -> PyGSet:
    kwargs = {"name": name, "transform": NormalizeFeatures()}
    return PyGSet(datasets.Planetoid, kwargs, "masks", "accuracy", megabytes, PLANETOID)


def _platonov(name: str, metric: MetricName, megabytes: float) -> PyGSet:
    return PyGSet(datasets.HeterophilousGraphDataset, {"name": name}, "masks", metric, megabytes, PLATONOV)


PYG: dict[str, PyGSet] = {
    "cora": _planetoid("Cora", 0.2),
    "citeseer": _planetoid("CiteSeer", 0.4),
    "pubmed": _planetoid("PubMed", 6),
    "amazon-computers": PyGSet(datasets.Amazon, {"name": "Computers"}, "per_class", "accuracy", 6, SHCHUR),
    "amazon-photo": PyGSet(datasets.Amazon, {"name": "Photo"}, "per_class", "accuracy", 3, SHCHUR),
    "coauthor-cs": PyGSet(datasets.Coauthor, {"name": "CS"}, "per_class", "accuracy", 6, SHCHUR),
    "coauthor-physics": PyGSet(datasets.Coauthor, {"name": "Physics"}, "per_class", "accuracy", 17, SHCHUR),
    "wikics": PyGSet(
        datasets.WikiCS,
        {"is_undirected": True},
        "masks",
        "accuracy",
        80,
        "Mernyei and Cangea, 2020; pmernyei/wiki-cs-dataset, MIT; 20 fixed splits of train and val, one test set",
    ),
    "roman-empire": _platonov("Roman-empire", "accuracy", 13),
    "amazon-ratings": _platonov("Amazon-ratings", "accuracy", 16),
    "minesweeper": _platonov("Minesweeper", "roc_auc", 0.2),
    "tolokers": _platonov("Tolokers", "roc_auc", 1),
    "questions": _platonov("Questions", "roc_auc", 3),
    "actor": PyGSet(datasets.Actor, {}, "masks", "accuracy", 1, GEOM),
    "chameleon": PyGSet(datasets.WikipediaNetwork, {"name": "chameleon"}, "masks", "accuracy", 3, GEOM),
    "squirrel": PyGSet(datasets.WikipediaNetwork, {"name": "squirrel"}, "masks", "accuracy", 9, GEOM),
}
"""PyG's data sets by the name of the command line; PyG's ``root`` is the data root."""

OGB: dict[str, tuple[int, str]] = {
    "ogbn-arxiv": (40, "Hu et al., 2020; ODC-BY; official split by year"),
    "ogbn-products": (47, "Hu et al., 2020; Amazon license; official split by sales rank"),
    "ogbn-proteins": (112, "Hu et al., 2020; CC0; official split by species"),
    "ogbn-mag": (349, "Hu et al., 2020; ODC-BY; official split by year"),
}
"""OGB's node tasks: number of outputs, and license; the metric is that of OGB's own Evaluator."""


def load_graph(name: str, root: Path, *, offline: bool = False, allow_large_downloads: bool = False) -> GraphData:
    """A graph data set of :data:`PYG` or :data:`OGB`.

    Args:
        name: of the data set.
        root: folder of the data, given to the loader as it is.
        offline: never download.
        allow_large_downloads: download also what is larger than 1 GB.

    Raises:
        ValueError: an unknown name, or a broken file.
        FileNotFoundError: files are missing and cannot be fetched.
    """
    if name in PYG:
        return PYG[name].load(name, root, offline)
    if name not in OGB:
        raise ValueError(f"dataset: got {name!r}, expected one of {', '.join([*PYG, *OGB])}")
    from experiments.data.ogb_metric import OGBMetric  # ogb takes seconds to import
    from experiments.data.ogb_nodes import load_ogb

    data, split = load_ogb(name, root, offline=offline, allow_large_downloads=allow_large_downloads)
    labeled = data if isinstance(data, Data) else data["paper"]
    binary = labeled.y.dim() == 2
    return GraphData(
        name=name,
        data=data,
        splits=_always(split),
        metric=partial(OGBMetric, name),
        metric_name="roc_auc" if binary else "accuracy",
        num_outputs=labeled.y.size(1) if binary else max(OGB[name][0], int(labeled.y.max()) + 1),
        note=OGB[name][1],
        target=None if isinstance(data, Data) else "paper",
    )


def _always(split: dict[str, Tensor]) -> Callable[[int], Splits]:
    def of(seed: int) -> Splits:
        return {"train": split["train"], "val": split["val"], "test": split["test"]}

    return of
