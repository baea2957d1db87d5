"""Planted graphs in OGB's layout, for where OGB's own cannot be had: ``python -m experiments.planted_ogb NAME``.

    python -m experiments.planted_ogb ogbn-arxiv --root data

``ogb`` reads the folder as if it had downloaded it. What is measured on it says nothing about the real data set; a file
PLANTED.txt in the folder says what it is. By default ogbn-arxiv has its real size, the others are small.
ogbn-papers100M is written in bounded memory, as the binary release that experiments.convert reads.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from experiments.convert import PAPERS
from experiments.data.ogb import Layout, OGBName, layout_of
from experiments.planted_papers import PapersPlanter

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
PlantedName: TypeAlias = Literal[OGBName, "ogbn-papers100M"]
Files: TypeAlias = dict[str, "str | NDArray[Any]"]
"""What goes into a data set's folder, by path."""


class Size(NamedTuple):
    """Of a planted graph; for ogbn-mag the papers, their citations and their features."""

    nodes: int
    edges: int
    features: int
    classes: int


SIZES: dict[PlantedName, Size] = {
    "ogbn-arxiv": Size(169_343, 1_166_243, 128, 40),
    "ogbn-products": Size(20_000, 300_000, 100, 47),
    "ogbn-proteins": Size(2_000, 60_000, 8, 112),
    "ogbn-mag": Size(5_000, 36_000, 128, 349),
    "ogbn-papers100M": Size(200_000, 3_000_000, 128, 172),
}
"""The default sizes: ogbn-arxiv's own, small ones of the others."""

SHARES = {
    "ogbn-arxiv": (0.54, 0.18, 0.28),
    "ogbn-products": (0.08, 0.02, 0.90),
    "ogbn-proteins": (0.65, 0.16, 0.19),
    "ogbn-mag": (0.855, 0.088, 0.057),
}
"""Training, validation and test nodes of OGB's own splits."""

SPECIES = np.array([3702, 4932, 6239, 7227, 7955, 9606, 10090, 511145])
"""Taxa of ogbn-proteins; the split is by species: here six, one and one of them."""
MODULES = 16
"""Communities of the planted proteins, across species."""
SEPARATION = 4.5
"""Distance of two class centers, in standard deviations of the noise: own features tell some of the classes."""
LEAST_NODES = 100
"""So that no part of a split is empty."""
ROUNDS = 30
"""Draws of edges before they are found to be too many."""


def write_planted(
    name: OGBName,
    root: Path,
    nodes: int | None = None,
    edges: int | None = None,
    features: int | None = None,
    classes: int | None = None,
    seed: int = 0,
    *,
    homophily: float = 0.65,
    label_noise: float = 0.15,
) -> Path:
    """Write a planted graph as ``ogb`` would have downloaded it, and return its folder.

    Every node belongs to a community. An edge stays inside its community with probability ``homophily``, and both ends
    are drawn by Pareto weights, so that few nodes have most edges. No edge is there twice, none is a self-loop.

    - ogbn-arxiv: the class is the community, features are the class center plus N(0, 1); papers cite older papers.
    - ogbn-products: the same, undirected: each edge is stored once, and ``ogb`` adds the other direction.
    - ogbn-proteins: no node features. An edge's features, in [0, 1], are the mean of its ends' communities' plus noise;
      the 112 labels are noisy linear functions of the mean over a node's edges, cut at a rate each. Edges stay in a
      species.
    - ogbn-mag: papers as in ogbn-arxiv, with the venue as class; authors, institutions and fields of study, in the
      real proportions, link to their own community with the same probability.

    Args:
        name: of the data set that it stands for.
        root: as in ``ogb``: the folder ``ogbn_arxiv`` is made inside.
        nodes, edges: how many (edges as stored; of mag the papers and their citations). ``None`` (default): ``SIZES``.
        features: of a node; of proteins, of an edge.
        classes: at most as many as the real data set has; of proteins the 112 tasks.
        seed: the same one writes the same graph.
        homophily: see above (default 0.65).
        label_noise: share of nodes with a random class, which bounds the accuracy (default 0.15); not of proteins.

    Raises:
        ValueError: an argument out of range, more edges than the nodes can hold, or the folder is there already.
    """
    layout = layout_of(name, root)
    size = _size(name, (nodes, edges, features, classes))
    _check(layout, size, homophily=homophily, label_noise=label_noise)
    planter = Planter(name, size, np.random.default_rng(seed), homophily, label_noise)
    planted = {"ogbn-proteins": planter.proteins, "ogbn-mag": planter.mag}.get(name, planter.plain)()
    layout.root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=layout.root, prefix="planted-") as scratch:  # half a graph never stands at its place
        folder = Path(scratch) / layout.folder.name
        for file, content in planted.items():
            _write(folder / file, content)
        (folder / layout.release.name).write_text("planted\n")
        (folder / layout.planted.name).write_text(
            f"Not OGB's {name}, but a graph that experiments.planted_ogb wrote:\n"
            f"{size}, {seed=}, {homophily=}, {label_noise=}\n"
        )
        folder.rename(layout.folder)
    return layout.folder


def _size(name: PlantedName, given: Sequence[int | None]) -> Size:
    """The default size, but for what is given."""
    return Size(*(default if own is None else own for default, own in zip(SIZES[name], given, strict=True)))


def _check(layout: Layout, size: Size, **shares: float) -> None:
    """Refuse what cannot be planted, and to write over what is there."""
    binary = layout.published.tasks > 1
    most = layout.published.tasks if binary else layout.published.classes
    fewest = most if binary else 2
    if not fewest <= size.classes <= most:
        raise ValueError(f"classes: got {size.classes}, expected {most if binary else f'{fewest} to {most}'}")
    least = {"nodes": LEAST_NODES if binary else max(LEAST_NODES, size.classes), "edges": 1, "features": 1}
    for name, limit in least.items():
        if getattr(size, name) < limit:
            raise ValueError(f"{name}: got {getattr(size, name)}, expected at least {limit}")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share}, expected between 0 and 1")
    if layout.folder.exists():
        raise ValueError(f"root: {layout.folder} is there already; delete it, or give another root")


def _write(path: Path, content: str | NDArray[Any]) -> None:
    """One compressed file: text, integers, or numbers with three decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        if isinstance(content, str):
            file.write(content.encode())
        else:
            np.savetxt(file, content, fmt="%d" if content.dtype.kind in "iub" else "%.3f", delimiter=",")


@dataclass(frozen=True)
class Planter:
    """Draws the graphs. The arguments are :func:`write_planted`'s."""

    name: OGBName
    size: Size
    rng: np.random.Generator
    homophily: float
    label_noise: float

    def plain(self) -> Files:
        """ogbn-arxiv and ogbn-products: one kind of node, features, one label."""
        nodes, edges, _, _ = self.size
        community, x, y = self._labeled()
        part = self._parts()
        if self.name == "ogbn-arxiv":
            year = self._years(part, first=1971)
            pairs = self._links(edges, community, community, orient=_newest_first(year))
            extra: Files = {"raw/node_year.csv.gz": year}
        else:
            pairs = self._links(edges, community, community, orient=_lowest_first)
            extra = {}
        return {
            "raw/edge.csv.gz": pairs,
            "raw/num-node-list.csv.gz": np.array([nodes]),
            "raw/num-edge-list.csv.gz": np.array([edges]),
            "raw/node-feat.csv.gz": x,
            "raw/node-label.csv.gz": y,
            **extra,
            **self._split("time" if self.name == "ogbn-arxiv" else "sales_ranking", part),
        }

    def proteins(self) -> Files:
        """ogbn-proteins: edge features, from which the labels follow."""
        nodes, edges, features, tasks = self.size
        part = self._parts()
        which = np.where(
            part == 0, self.rng.integers(6, size=nodes), part + 5
        )  # six species train, one each for the rest
        module = self.rng.integers(MODULES, size=nodes)
        inner = which * MODULES + module
        pairs = self._links(edges, inner, inner, outer=which, orient=_lowest_first)
        center = self.rng.random((MODULES, features))
        edge_x = center[module[pairs]].mean(axis=1) + 0.15 * self.rng.standard_normal((edges, features))
        edge_x = edge_x.clip(0.001, 0.999).round(3)

        ends = pairs.T.reshape(-1)
        degree = np.bincount(ends, minlength=nodes).clip(min=1)
        sums = [np.bincount(ends, weights=np.tile(column, 2), minlength=nodes) for column in edge_x.T]
        mean = np.stack(sums, axis=1) / degree[:, None]
        mean = (mean - mean.mean(axis=0)) / (mean.std(axis=0) + 1e-9)
        logits = mean @ self.rng.standard_normal((features, tasks)) / np.sqrt(features)
        logits += 0.5 * self.rng.standard_normal(logits.shape)
        rate = self.rng.uniform(0.05, 0.4, size=tasks)
        y = np.stack([column > np.quantile(column, 1 - r) for column, r in zip(logits.T, rate, strict=True)], axis=1)
        return {
            "raw/edge.csv.gz": pairs,
            "raw/num-node-list.csv.gz": np.array([nodes]),
            "raw/num-edge-list.csv.gz": np.array([edges]),
            "raw/edge-feat.csv.gz": edge_x,
            "raw/node_species.csv.gz": SPECIES[which],
            "raw/node-label.csv.gz": y,
            **self._split("species", part),
        }

    def mag(self) -> Files:
        """ogbn-mag: papers with features and venues, and who wrote them, where, and on what."""
        papers, citations, _, venues = self.size
        part = self._parts()
        venue, x, y = self._labeled()
        year = self._years(part, first=2010)
        count = {
            "author": round(1.54 * papers),
            "field_of_study": max(papers // 12, 2),
            "institution": max(papers // 84, 2),
            "paper": papers,
        }
        home = self.rng.integers(venues, size=count["author"])
        field = np.arange(count["field_of_study"]) % venues  # with fewer fields than venues, some venues share one
        institution = np.arange(count["institution"]) % venues
        links = {
            ("author", "affiliated_with", "institution"): self._links(
                round(0.19 * citations), home % (institution.max() + 1), institution
            ),
            ("author", "writes", "paper"): self._links(round(1.32 * citations), home, venue),
            ("paper", "cites", "paper"): self._links(citations, venue, venue, orient=_newest_first(year)),
            ("paper", "has_topic", "field_of_study"): self._links(
                round(1.39 * citations), venue % (field.max() + 1), field
            ),
        }
        only_paper = _table({kind: kind == "paper" for kind in count})
        files: Files = {
            "raw/num-node-dict.csv.gz": _table(count),
            "raw/nodetype-has-feat.csv.gz": only_paper,
            "raw/nodetype-has-label.csv.gz": only_paper,
            "raw/triplet-type-list.csv.gz": "".join(",".join(triplet) + "\n" for triplet in links),
            "raw/node-feat/paper/node-feat.csv.gz": x,
            "raw/node-feat/paper/node_year.csv.gz": year,
            "raw/node-label/paper/node-label.csv.gz": y,
            "split/time/nodetype-has-split.csv.gz": only_paper,
            **self._split("time/paper", part),
        }
        for number, (triplet, pairs) in enumerate(links.items()):
            folder = f"raw/relations/{'___'.join(triplet)}"
            files[f"{folder}/edge.csv.gz"] = pairs
            files[f"{folder}/num-edge-list.csv.gz"] = np.array([len(pairs)])
            files[f"{folder}/edge_reltype.csv.gz"] = np.full(len(pairs), number)
        return files

    def _labeled(self) -> tuple[Ints, Floats, Ints]:
        """Community, features and label of each node; every class has a node, later ones fewer."""
        nodes, _, features, classes = self.size
        popularity = np.arange(1, classes + 1) ** -0.5
        rest = self.rng.choice(classes, size=nodes - classes, p=popularity / popularity.sum())
        community = self.rng.permutation(np.concatenate([np.arange(classes), rest]))
        center = self.rng.standard_normal((classes, features)) * SEPARATION / np.sqrt(2 * features)
        x = center[community] + self.rng.standard_normal((nodes, features))
        noisy = self.rng.random(nodes) < self.label_noise
        return community, x, np.where(noisy, self.rng.integers(classes, size=nodes), community)

    def _parts(self) -> Ints:
        """0, 1 or 2 for each node: training, validation, test, by the real shares."""
        nodes = self.size.nodes
        cuts = np.cumsum(SHARES[self.name])[:2] * nodes
        return np.searchsorted(cuts.round(), self.rng.permutation(nodes), side="right")

    def _years(self, part: Ints, first: int) -> Ints:
        """Training papers up to 2017, most of them late; validation 2018, test 2019."""
        age = self.rng.geometric(0.2, size=len(part)) - 1
        return np.where(part == 0, np.maximum(2017 - age, first), 2017 + part)

    def _split(self, split: str, part: Ints) -> Files:
        return {
            f"split/{split}/{file}.csv.gz": np.flatnonzero(part == i)
            for i, file in enumerate(("train", "valid", "test"))
        }

    def _links(
        self,
        count: int,
        source_group: Ints,
        destination_group: Ints,
        outer: Ints | None = None,
        orient: Callable[[Ints], Ints] | None = None,
    ) -> Ints:
        """``(count, 2)`` different pairs (source, destination), most of them inside a group.

        Args:
            count: of pairs.
            source_group, destination_group: the group of each node; no source's group lacks destinations.
            outer: the larger group that a pair never leaves. ``None``: all nodes.
            orient: turns pairs among one kind of node; self-loops are then left out.
        """
        sources, destinations = len(source_group), len(destination_group)
        source_weight = self.rng.pareto(2, size=sources) + 1
        weight = source_weight if orient is not None else self.rng.pareto(2, size=destinations) + 1
        source_outer = np.zeros(sources, np.int64) if outer is None else outer
        destination_outer = np.zeros(destinations, np.int64) if outer is None else outer

        pairs = np.empty((0, 2), np.int64)
        for _ in range(ROUNDS):
            wanted = int(1.2 * (count - len(pairs))) + 16
            source = self.rng.choice(sources, size=wanted, p=source_weight / source_weight.sum())
            near = self._pick(source_group[source], destination_group, weight)
            far = self._pick(source_outer[source], destination_outer, weight)
            new = np.stack([source, np.where(self.rng.random(wanted) < self.homophily, near, far)], axis=1)
            if orient is not None:
                new = orient(new[new[:, 0] != new[:, 1]])
            keys = np.unique(np.concatenate([pairs, new]) @ np.array([destinations, 1]))
            pairs = np.stack(np.divmod(keys, destinations), axis=1)
            if len(pairs) >= count:
                return self.rng.permutation(pairs)[:count]
        raise ValueError(
            f"edges: got {count} between {sources} and {destinations} nodes, expected fewer: only {len(pairs)} found"
        )

    def _pick(self, wanted: Ints, group: Ints, weight: Floats) -> Ints:
        """A node of each wanted group, with probability proportional to its weight."""
        order = np.argsort(group, kind="stable")
        start = np.searchsorted(group[order], wanted)
        end = np.searchsorted(group[order], wanted, side="right")
        total = np.concatenate([[0.0], np.cumsum(weight[order])])
        point = total[start] + self.rng.random(len(wanted)) * (total[end] - total[start])
        return order[(np.searchsorted(total, point, side="right") - 1).clip(start, end - 1)]


def _lowest_first(pairs: Ints) -> Ints:
    """An undirected pair has one form."""
    return np.sort(pairs, axis=1)


def _newest_first(year: Ints) -> Callable[[Ints], Ints]:
    """Papers cite what is older, or of the same year."""
    return lambda pairs: np.where((year[pairs[:, 0]] < year[pairs[:, 1]])[:, None], pairs[:, ::-1], pairs)


def _table(row: Mapping[str, object]) -> str:
    """A header and one row."""
    return f"{','.join(row)}\n{','.join(map(str, row.values()))}\n"


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """A planted graph and where it goes."""

    name: Annotated[PlantedName, tyro.conf.Positional]
    """The data set that it stands for."""
    root: Path = Path("data")
    """Root folder of the data, as in ogb: the folder ogbn_arxiv is made inside."""
    nodes: int | None = None
    """Nodes; of ogbn-mag, papers. By default ogbn-arxiv's real number, a small one for the others."""
    edges: int | None = None
    """Edges as stored; of ogbn-mag, citations."""
    features: int | None = None
    """Features of a node; of ogbn-proteins, of an edge."""
    classes: int | None = None
    """Classes, at most as many as the real data set has."""
    seed: int = 0
    """Seed."""
    homophily: float = 0.65
    """Share of edges inside a community."""
    label_noise: float = 0.15
    """Share of nodes with a random class."""
    labeled: float | None = None
    """Of ogbn-papers100M: share of nodes with a label (default 0.014, as in OGB's)."""

    def write(self) -> Path:
        """Write the graph, and return its folder."""
        size = (self.nodes, self.edges, self.features, self.classes)
        if self.name == PAPERS:
            return PapersPlanter(
                **_size(PAPERS, size)._asdict(),
                labeled=0.014 if self.labeled is None else self.labeled,
                seed=self.seed,
                homophily=self.homophily,
                label_noise=self.label_noise,
            ).write(self.root)
        if self.labeled is not None:
            raise ValueError(f"labeled: got {self.labeled} for {self.name}, expected none; all its nodes have labels")
        return write_planted(
            self.name, self.root, *size, self.seed, homophily=self.homophily, label_noise=self.label_noise
        )


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(PlantedConfig, args=args, prog="python -m experiments.planted_ogb", description=__doc__)
    try:
        folder = config.write()
    except ValueError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    print(folder)


if __name__ == "__main__":
    main()
