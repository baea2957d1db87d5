"""The graph data sets, one line each: loader, official split, metric, size of the download, license and source."""

from __future__ import annotations

import json
import pickletools
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch_geometric import datasets
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.transforms import NormalizeFeatures

from experiments.data.graph_data import (
    GraphData,
    MetricName,
    check_graph,
    fixed_splits,
    make_metric,
    per_class_splits,
)
from experiments.data.ogb import OGB, load_ogb
from experiments.data.user_graph import user_graph

PLANETOID = "Yang et al., 2016; kimiyoung/planetoid, MIT; public split, 20 nodes a class"
SHCHUR = "Shchur et al., 2018; shchur/gnn-benchmark, MIT; random split by seed, 20 a class train, 30 val, rest test"
PLATONOV = "Platonov et al., 2023; yandex-research/heterophilous-graphs, MIT; 10 fixed splits, 50/25/25"
GEOM = "Pei et al., 2020; graphdml-uiuc-jlu/geom-gcn; 10 fixed splits, 48/32/20"


class Guarded(InMemoryDataset):
    """Put before a PyG data set among the bases: downloads are announced and whole, and a broken file is named.

    Only raw files are read. PyG would keep what it made of them, and read that by an unsafe ``torch.load``.

    Args:
        root: folder of the data.
        called: how the user calls it.
        megabytes: size of the download.
        offline: never download.
        **kwargs: the data set's.

    Raises:
        FileNotFoundError: files are missing and may not or cannot be fetched; says which, how large, and where they go.
        ValueError: a file is broken; says which.
    """

    def __init__(self, root: Path, called: str, megabytes: float, offline: bool, **kwargs: Any) -> None:
        self.called, self.megabytes, self.offline = called, megabytes, offline
        self._scratch: str | None = None
        super().__init__(str(root), **kwargs)

    @property
    def raw_dir(self) -> str:
        """Where ``download`` writes, and ``process`` reads."""
        return self._scratch or super().raw_dir

    def save(self, data_list: list[Data], path: str) -> None:
        """Keep what ``process`` makes in memory."""
        self._made = data_list

    def load(self, path: str, data_cls: type[Data] = Data) -> None:
        """Take what :meth:`save` keeps."""
        self.data, self.slices = self.collate(self._made)

    def _download(self) -> None:
        missing = [Path(path) for path in self.raw_paths if not Path(path).exists()]
        if not missing:
            return
        folder, names = Path(self.raw_dir), ", ".join(path.name for path in missing)
        advice = (
            f"{self.called}: {names} missing in {folder}. Put the file{'s' if len(missing) > 1 else ''} there (about "
            f"{self.megabytes:g} MB, see the source in PyG's {type(self).__name__}), or give another --data-root"
        )
        if self.offline:
            raise FileNotFoundError(advice)
        print(f"{self.called}: downloading about {self.megabytes:g} MB to {folder}", flush=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix="download-") as self._scratch:
                self.download()
                for path in missing:
                    (Path(self._scratch) / path.name).replace(path)
        except Exception as error:
            raise FileNotFoundError(f"{advice} (the download failed: {error})") from error
        self._scratch = None

    def _process(self) -> None:
        broken, why = [path for path in self.raw_paths if not readable(Path(path))], "not whole"
        if not broken:
            try:
                return self.process()
            except (MemoryError, OSError):
                raise
            except Exception as error:
                broken, why = self.raw_paths, f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{self.called}: cannot read {' or '.join(broken)} ({why}); a download that was cut off may have left it. "
            "Delete it, and start again"
        )


class Planetoid(Guarded, datasets.Planetoid): ...


class Amazon(Guarded, datasets.Amazon): ...


class Coauthor(Guarded, datasets.Coauthor): ...


class WikiCS(Guarded, datasets.WikiCS): ...


class HeterophilousGraphDataset(Guarded, datasets.HeterophilousGraphDataset): ...


class Actor(Guarded, datasets.Actor): ...


class WikipediaNetwork(Guarded, datasets.WikipediaNetwork): ...


def readable(path: Path) -> bool:
    """Whether the file is whole, by what its name says it is; text is where it ends with a line. Runs nothing of it."""
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as file:
                return file.testzip() is None
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
            return True
        if path.name.startswith("ind.") and path.suffix != ".index":
            return all(True for _ in pickletools.genops(content))
        return content.decode().endswith("\n")
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


@dataclass(frozen=True)
class PyGSet:
    """A data set of PyG.

    Args:
        cls: its class.
        split: ``"masks"`` of the data, or ``"per_class"`` draws.
        metric: by which the field compares.
        megabytes: size of the download.
        note: license, source, split.
        kwargs: arguments of the class.
        warning: what users should know before they compare figures.
    """

    cls: type[Guarded]
    split: Literal["masks", "per_class"]
    metric: MetricName
    megabytes: float
    note: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    warning: str = ""

    def load(self, name: str, root: Path, offline: bool) -> GraphData:
        """The data set, its features those of the files (Planetoid's normalized to sum 1 a node, as is usual)."""
        dataset = self.cls(root, name, self.megabytes, offline, **self.kwargs)
        data = dataset.get(0)
        check_graph(name, data)  # as in the files: a sum over a row spreads NaN
        data = data if dataset.transform is None else dataset.transform(data)
        data.x, data.y = data.x.float(), data.y.long()
        classes = int(data.y.max()) + 1
        if self.warning:
            print(f"{name}: {self.warning}", flush=True)
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
    return PyGSet(Planetoid, "masks", "accuracy", megabytes, PLANETOID, kwargs)


def _platonov(name: str, metric: MetricName, megabytes: float) -> PyGSet:
    return PyGSet(HeterophilousGraphDataset, "masks", metric, megabytes, PLATONOV, {"name": name})


def _wikipedia(name: str, megabytes: float) -> PyGSet:
    warning = (
        "many of its nodes are duplicates, with one of them in training and another in test (Platonov et al., 2023); "
        f"compare models on {name}-filtered"
    )
    return PyGSet(WikipediaNetwork, "masks", "accuracy", megabytes, GEOM, {"name": name}, warning)


PYG: dict[str, PyGSet] = {
    "cora": _planetoid("Cora", 0.2),
    "citeseer": _planetoid("CiteSeer", 0.4),
    "pubmed": _planetoid("PubMed", 6),
    "amazon-computers": PyGSet(Amazon, "per_class", "accuracy", 6, SHCHUR, {"name": "Computers"}),
    "amazon-photo": PyGSet(Amazon, "per_class", "accuracy", 3, SHCHUR, {"name": "Photo"}),
    "coauthor-cs": PyGSet(Coauthor, "per_class", "accuracy", 6, SHCHUR, {"name": "CS"}),
    "coauthor-physics": PyGSet(Coauthor, "per_class", "accuracy", 17, SHCHUR, {"name": "Physics"}),
    "wikics": PyGSet(
        WikiCS,
        "masks",
        "accuracy",
        80,
        "Mernyei and Cangea, 2020; pmernyei/wiki-cs-dataset, MIT; 20 fixed splits of train and val, one test set",
        {"is_undirected": True},
    ),
    "roman-empire": _platonov("Roman-empire", "accuracy", 13),
    "amazon-ratings": _platonov("Amazon-ratings", "accuracy", 16),
    "minesweeper": _platonov("Minesweeper", "roc_auc", 0.2),
    "tolokers": _platonov("Tolokers", "roc_auc", 1),
    "questions": _platonov("Questions", "roc_auc", 3),
    "actor": PyGSet(Actor, "masks", "accuracy", 1, GEOM),
    "chameleon": _wikipedia("chameleon", 3),
    "squirrel": _wikipedia("squirrel", 9),
}
"""PyG's data sets by the name of the command line; PyG's ``root`` is the data root."""

FILTERED = {"chameleon-filtered": "chameleon_filtered.npz", "squirrel-filtered": "squirrel_filtered.npz"}
"""Without duplicate nodes (Platonov et al., 2023): files in the data root itself, which PyG does not know."""


def load_graph(name: str, root: Path, *, offline: bool = False, allow_large_downloads: bool = False) -> GraphData:
    """A graph data set of :data:`PYG`, :data:`FILTERED` or OGB.

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
    if name in FILTERED:
        path = root / FILTERED[name]
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: {path} is missing. Put it there, from the folder data of "
                "https://github.com/yandex-research/heterophilous-graphs, or give another --data-root"
            )
        return user_graph(path, name=name, note="Platonov et al., 2023; yandex-research/heterophilous-graphs, MIT")
    if name not in OGB:
        raise ValueError(f"dataset: got {name!r}, expected one of {', '.join([*PYG, *FILTERED, *OGB])}")
    return load_ogb(name, root, offline=offline, allow_large_downloads=allow_large_downloads)
