"""OGB's four node data sets: what ogb's own table says of them, and their files on disk."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from experiments.data.ogb_import import MASTER

OGBName: TypeAlias = Literal["ogbn-arxiv", "ogbn-products", "ogbn-proteins", "ogbn-mag"]

GIGABYTES: dict[OGBName, float] = {
    "ogbn-arxiv": 0.08,
    "ogbn-products": 1.38,
    "ogbn-proteins": 0.21,
    "ogbn-mag": 0.40,
}
"""Of the downloads, as published, in the unit of ogb's messages: 2**30 bytes."""

RELATIONS = (
    ("author", "affiliated_with", "institution"),
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "has_topic", "field_of_study"),
)
"""Of ogbn-mag: source, relation, destination."""

LABELED = "paper"
"""The one node type of ogbn-mag with features, labels and a split."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a data set lies and what belongs to it.

    Args:
        name: of the data set.
        root: what ogb calls root.
        folder: the data set's, inside ``root``.
        meta: its column in ogb's table, master.csv.
    """

    name: OGBName
    root: Path
    folder: Path
    meta: dict[str, str]

    @property
    def hetero(self) -> bool:
        """Several node types: ogbn-mag."""
        return self.meta["is hetero"] == "True"

    @property
    def directions(self) -> int:
        """How often ogb gives an edge that is stored once."""
        return 2 if self.meta["add_inverse_edge"] == "True" else 1

    @property
    def num_tasks(self) -> int:
        """Labels of a node."""
        return int(self.meta["num tasks"])

    @property
    def num_classes(self) -> int:
        """Classes of each label."""
        return int(self.meta["num classes"])

    @property
    def archive(self) -> Path:
        """The download."""
        return self.root / f"{self.meta['download_name']}.zip"

    @property
    def release(self) -> Path:
        """The file whose name says which version the folder is."""
        return self.folder / f"RELEASE_v{self.meta['version']}.txt"

    @property
    def planted(self) -> Path:
        """The file that says that the folder is not OGB's."""
        return self.folder / "PLANTED.txt"

    @property
    def processed(self) -> Path:
        """What ogb makes of the raw files."""
        return self.folder / "processed" / "geometric_data_processed.pt"

    def raw(self, file: str, of: str | tuple[str, str, str] | None = None) -> Path:
        """A raw file; of ogbn-mag, one of a node type or of a relation."""
        inside = f"{file}.csv.gz"
        if isinstance(of, tuple):
            inside = f"relations/{'___'.join(of)}/{inside}"
        elif of is not None:
            inside = f"{'node-label' if file == 'node-label' else 'node-feat'}/{of}/{inside}"
        return self.folder / "raw" / inside

    @property
    def split_folder(self) -> Path:
        """Of the official split."""
        return self.folder / "split" / self.meta["split"]

    @property
    def split_dict(self) -> Path:
        """A file that ogb reads in place of the three, where it is there."""
        return self.split_folder / "split_dict.pt"

    def split(self, part: str) -> Path:
        """The node indices of ``"train"``, ``"valid"`` or ``"test"``."""
        return self.split_folder / (LABELED if self.hetero else "") / f"{part}.csv.gz"

    @property
    def node_files(self) -> tuple[str, ...]:
        """Raw files with a row for each (labeled) node, but the labels."""
        additional = self.meta["additional node files"]
        features = ("node-feat",) if self.meta["has_node_attr"] == "True" else ()
        return (*features, *(() if additional == "None" else additional.split(",")))

    @property
    def edge_files(self) -> tuple[str, ...]:
        """Raw files with a row for each edge, but the edges."""
        return ("edge-feat",) if self.meta["has_edge_attr"] == "True" else ()

    @property
    def tables(self) -> tuple[Path, ...]:
        """The files of numbers, all of which must be there."""
        split = tuple(self.split(part) for part in ("train", "valid", "test"))
        if self.hetero:
            nodes = tuple(self.raw(file, LABELED) for file in (*self.node_files, "node-label"))
            return (*nodes, *(self.raw(file, r) for r in RELATIONS for file in ("edge", "num-edge-list")), *split)
        names = ("edge", *self.edge_files, *self.node_files, "node-label", "num-node-list", "num-edge-list")
        return (*map(self.raw, names), *split)

    @property
    def headed(self) -> tuple[Path, ...]:
        """The files of text, which must be there as well."""
        if not self.hetero:
            return ()
        raw = map(self.raw, ("num-node-dict", "triplet-type-list", "nodetype-has-label"))
        return (*raw, self.split_folder / "nodetype-has-split.csv.gz")

    @property
    def missing(self) -> list[str]:
        """The files that are not there, by their path in the folder."""
        wanted = (self.release, *self.headed, *self.tables)
        return [str(path.relative_to(self.folder)) for path in wanted if not path.is_file()]


def layout_of(name: str, root: Path) -> Layout:
    """The layout of a data set under ``root``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in get_args(OGBName):
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(get_args(OGBName))}")
    with MASTER.open(newline="") as file:
        meta = {row[""]: row[name] for row in csv.DictReader(file)}
    root = root.expanduser()
    folder = root / name.replace("-", "_")
    other = folder.with_name(f"{folder.name}_pyg")  # ogb prefers it
    return Layout(name=name, root=root, folder=other if other.exists() else folder, meta=meta)  # type: ignore[arg-type]
