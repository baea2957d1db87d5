"""The graph data sets by name, a line each.

A line has PyG's class, files, split, metric, size of the download, and source.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch_geometric import datasets
from torch_geometric.transforms import NormalizeFeatures

from experiments.train.checks import check
from experiments.train.data.graphs import check_graph, fixed_splits, per_class_splits
from experiments.train.data.task import GraphData, MetricName, Splits
from experiments.train.files import naming, read_pickle

PLAIN = (".npz", ".json", ".txt", ".index")
"""Ends of raw files that PyG reads without pickle."""


@dataclass(frozen=True)
class PyGSet:
    """A data set of PyG, read from its raw files."""

    cls: Any
    kwargs: dict[str, Any]
    folder: str  # of the raw files, in the data root
    files: tuple[str, ...]
    megabytes: float  # of the download
    metric: MetricName = "accuracy"  # by which the field compares
    splits: Callable[[Any, int], Splits] = fixed_splits  # of the graph and a seed

    def load(self, name: str, root: Path, offline: bool) -> GraphData:
        """The data set, with the features of the files.

        Planetoid's are normalized to sum 1 a node, as is usual.
        """
        folder = root / self.folder
        missing = [file for file in self.files if not (folder / file).exists()]
        advice = (
            f"{name}: {', '.join(missing)} missing in {folder}. Put them there (about "
            f"{self.megabytes:g} MB, see the source in PyG's {self.cls.__name__}), or give another "
            "--data-root"
        )
        if missing and offline:
            raise FileNotFoundError(advice)
        # PyG writes what it made beside the raw files, which may be read-only
        with TemporaryDirectory() as scratch:
            raw = Path(scratch, self.folder)
            if missing:
                print(f"{name}: downloading about {self.megabytes:g} MB to {folder}", flush=True)
                try:
                    dataset = self.cls(scratch, **self.kwargs)
                    folder.mkdir(parents=True, exist_ok=True)
                    for file in missing:
                        shutil.move(raw / file, folder / file)
                except Exception as error:
                    raise FileNotFoundError(f"{advice} (the download failed: {error})") from error
            else:
                for file in self.files:
                    if not file.endswith(PLAIN):  # PyG would run what a pickle says
                        read_pickle(folder / file)
                raw.parent.mkdir(parents=True, exist_ok=True)
                raw.symlink_to(folder.resolve())
                with naming(folder):
                    dataset = self.cls(scratch, **self.kwargs)
        data = dataset.get(0)
        check_graph(str(folder), data)  # as in the files: a sum over a row spreads NaN
        data = data if dataset.transform is None else dataset.transform(data)
        data.x = data.x.float()
        data.y = data.y.long()
        classes = int(data.y.max()) + 1
        splits = partial(self.splits, data)
        with naming(folder):  # drawn splits need some nodes of each class
            splits(0)
        return GraphData(
            name=name, data=data, splits=splits, num_outputs=classes, metric_name=self.metric
        )


def _planetoid(name: str, megabytes: float) -> PyGSet:
    """Yang et al., 2016; kimiyoung/planetoid, MIT; public split, 20 nodes a class."""
    parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    files = tuple(f"ind.{name.lower()}.{part}" for part in parts)
    kwargs = {"name": name, "transform": NormalizeFeatures()}
    return PyGSet(datasets.Planetoid, kwargs, f"{name}/raw", files, megabytes)


def _shchur(cls: Any, name: str, file: str, megabytes: float) -> PyGSet:
    """Shchur et al., 2018.

    shchur/gnn-benchmark, MIT; 20 nodes a class train, 30 validate, at random by seed.
    """
    return PyGSet(
        cls, {"name": name}, f"{name}/raw", (f"{file}.npz",), megabytes, splits=per_class_splits
    )


def _platonov(name: str, metric: MetricName, megabytes: float) -> PyGSet:
    """Platonov et al., 2023.

    yandex-research/heterophilous-graphs, MIT; 10 fixed splits, 50/25/25.
    """
    cls = datasets.HeterophilousGraphDataset
    return PyGSet(cls, {"name": name}, f"{name}/raw", (f"{name}.npz",), megabytes, metric)


ACTOR = (
    "out1_node_feature_label.txt",
    "out1_graph_edges.txt",
    *(f"film_split_0.6_0.2_{split}.npz" for split in range(10)),
)
"""Pei et al., 2020; graphdml-uiuc-jlu/geom-gcn; 10 fixed splits, 48/32/20."""

PYG: dict[str, PyGSet] = {
    "cora": _planetoid("Cora", 0.2),
    "citeseer": _planetoid("CiteSeer", 0.4),
    "pubmed": _planetoid("PubMed", 6),
    "amazon-computers": _shchur(datasets.Amazon, "Computers", "amazon_electronics_computers", 6),
    "amazon-photo": _shchur(datasets.Amazon, "Photo", "amazon_electronics_photo", 3),
    "coauthor-cs": _shchur(datasets.Coauthor, "CS", "ms_academic_cs", 6),
    "coauthor-physics": _shchur(datasets.Coauthor, "Physics", "ms_academic_phy", 17),
    # Mernyei and Cangea, 2020; pmernyei/wiki-cs-dataset, MIT; 20 fixed splits of train and val,
    # one test set
    "wikics": PyGSet(datasets.WikiCS, {"is_undirected": True}, "raw", ("data.json",), 80),
    "roman-empire": _platonov("roman_empire", "accuracy", 13),
    "amazon-ratings": _platonov("amazon_ratings", "accuracy", 16),
    "minesweeper": _platonov("minesweeper", "roc_auc", 0.2),
    "tolokers": _platonov("tolokers", "roc_auc", 1),
    "questions": _platonov("questions", "roc_auc", 3),
    "actor": PyGSet(datasets.Actor, {}, "raw", ACTOR, 1),
}
"""PyG's data sets by the name of the command line; PyG's ``root`` is the data root."""

FILTERED = ("chameleon-filtered", "squirrel-filtered")
"""Without nodes that are both in training and, as a duplicate, in test (Platonov et al., 2023):
``chameleon_filtered.npz`` in the data root, of :data:`FILTERED_FROM`."""
FILTERED_FROM = "https://github.com/yandex-research/heterophilous-graphs"

TEXTS = ("packages", "synsets", "definitions")
"""Graphs of texts, ``NAME.npz`` in the data root, which ``python -m experiments.convert NAME``
writes."""


def load_graph(name: str, root: Path, *, offline: bool = False) -> GraphData:
    """A graph data set of :data:`PYG`, :data:`FILTERED`, :data:`TEXTS` or OGB, with files in the
    data root."""
    if name in PYG:
        return PYG[name].load(name, root, offline)
    if name in (*FILTERED, *TEXTS):
        from experiments.train.data.own_graph import own_graph

        path = root / f"{name.replace('-', '_')}.npz"
        if not path.exists():
            command = f"python -m experiments.convert {name}"
            source = command if name in TEXTS else FILTERED_FROM
            raise FileNotFoundError(f"{name}: {path} missing; it comes from {source}")
        return own_graph(path, name=name)
    legal = f"one of {', '.join([*PYG, *FILTERED, *TEXTS])}, or one of OGB's"
    check(name.startswith("ogbn-"), "dataset", repr(name), legal)
    from experiments.train.data.ogb import load_ogb

    return load_ogb(name, root)
