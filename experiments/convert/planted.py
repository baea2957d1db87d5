"""Planted graphs in OGB's layouts: ``python -m experiments.planted ogbn-arxiv``.

For where OGB's own cannot be had.

What is measured on one says nothing about the real data set; a file PLANTED.txt in its folder
says what it is. A node has a community, which most of its edges share, and a regime. Its
features tell the regime, its neighbors the community. The label is the community, renamed by
regime: what neighbors mean depends on the node, so that experts can matter.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import tyro
from numpy.typing import NDArray

from experiments.convert.building import building
from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.files import writing

Array: TypeAlias = NDArray[Any]

SIZES: dict[str, tuple[int, int, int, int, tuple[float, ...]]] = {
    "ogbn-arxiv": (169_343, 1_166_243, 40, 128, (0.54, 0.18, 0.28)),
    "ogbn-products": (20_000, 300_000, 47, 100, (0.08, 0.02, 0.90)),
    "ogbn-proteins": (2_000, 60_000, 16, 8, (0.65, 0.16, 0.19)),
    "ogbn-mag": (5_000, 36_000, 349, 128, (0.855, 0.088, 0.057)),
}
"""Nodes, edges and communities by default, features, and the shares of OGB's train, val and
test."""
REGIMES = (0.4, 0.2, 0.2, 0.2)
"""Shares of nodes in each regime."""
HOMOPHILY = 0.65
"""Share of edges inside a community."""
NOISE = 0.15
"""Share of nodes with a random label."""
PIECE = 1 << 20


def write_planted(
    name: Annotated[str, tyro.conf.Positional],
    root: Path = Path("data"),
    nodes: int | None = None,
    edges: int | None = None,
    classes: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a planted graph as ogb would have downloaded it, and return its folder.

    Args:
        name: of the data set that it stands for, ogbn-arxiv, -products, -proteins or -mag.
        root: as in ogb: the folder ogbn_arxiv is made inside.
        nodes: of ogbn-mag, papers. By default ogbn-arxiv's real number, a small one for the others.
        edges: as drawn (of ogbn-mag, citations); self-loops and repeated edges are left out.
        classes: at most as many as the real data set has; of ogbn-proteins, communities.
        seed: the same one writes the same graph.
    """
    check_choice("name", name, SIZES)
    most = SIZES[name][2]
    given = zip((nodes, edges, classes), SIZES[name][:3], strict=True)
    nodes, edges, classes = [usual if own is None else own for own, usual in given]
    check(seed >= 0, "seed", seed, "at least 0")
    check(2 <= classes <= most, "classes", classes, f"2 to {most}")
    least = max(100, classes, int(1 / min(SIZES[name][4])) + 1)  # no part is empty
    check(nodes >= least, "nodes", nodes, f"at least {least}")
    check(edges >= 1, "edges", edges, "at least 1")
    folder = root.expanduser() / name.replace("-", "_")
    text = (
        f"Not OGB's {name}, but a graph of experiments.planted: "
        f"{nodes=}, {edges=}, {classes=}, {seed=}"
    )
    with building(folder, "root") as made:  # half a graph never stands at its place
        _write(made / "PLANTED.txt", text)
        for file, content in _drawn(
            np.random.default_rng(seed), name, nodes, edges, classes
        ).items():
            _write(made / file, content)
    print(folder)
    return folder


def _drawn(rng: Any, name: str, nodes: int, edges: int, classes: int) -> dict[str, Any]:
    """The content of each file."""
    from experiments.train.data.ogb import files_of  # and so torch, which --help does without

    features, shares = SIZES[name][3:]
    part = np.searchsorted(np.cumsum(shares), (rng.permutation(nodes) + 0.5) / nodes)
    split = {
        of: np.flatnonzero(part == number) for number, of in enumerate(("train", "val", "test"))
    }
    popularity = np.arange(1, classes + 1) ** -0.5
    rest = rng.choice(classes, size=nodes - classes, p=popularity / popularity.sum())
    community = rng.permutation([*range(classes), *rest])
    regime = rng.choice(4, size=nodes, p=REGIMES)
    x = rng.standard_normal((nodes, features), dtype=np.float32)
    center = rng.standard_normal((classes, features), dtype=np.float32) * np.float32(
        3 / features**0.5
    )
    for begin in range(0, nodes, PIECE):
        x[begin : begin + PIECE] += center[community[begin : begin + PIECE]]
    x[np.arange(nodes), regime] += 3
    y = np.where(
        rng.random(nodes) < NOISE, rng.integers(classes, size=nodes), (community + regime) % classes
    )
    held: dict[Any, Any] = {"x": x, "y": y, "nodes": nodes, "release": "planted", **split}
    files = _mag(rng, held, community, edges) if name == "ogbn-mag" else {}
    if name != "ogbn-mag":
        held["", "edge"] = _simple(
            links(rng, community, community, edges), undirected=name != "ogbn-arxiv"
        )
    # The features are of edges; 112 labels, other functions in each regime
    if name == "ogbn-proteins":
        score = (
            np.tanh(x)
            @ rng.standard_normal((features, 112))
            * rng.choice([-1, 1], (4, 112))[regime]
        )
        score += rng.standard_normal(score.shape)
        held["y"] = np.array(
            [column > np.quantile(column, rng.uniform(0.6, 0.95)) for column in score.T], int
        ).T
        held["x"] = 1 / (1 + np.exp(-x[held["", "edge"]].mean(axis=1)))
    held |= {(of[0], "edges"): len(pairs) for of, pairs in held.items() if isinstance(of, tuple)}
    return files | {file: held[of] for of, file in files_of(name).items()}


def _mag(rng: Any, held: dict[Any, Any], venue: Array, citations: int) -> dict[str, Any]:
    """Put in authors, institutions and fields, in about the real proportions.

    Return what ogb alone reads.
    """
    from experiments.train.data.ogb import RELATIONS

    papers = len(venue)
    kinds = int(venue.max()) + 1
    count = {
        "author": papers * 3 // 2,
        "field_of_study": papers // 12,
        "institution": papers // 84 + 2,
    }
    of = {kind: rng.permutation(number) % kinds for kind, number in count.items()} | {
        "paper": venue
    }
    for relation, share in zip(RELATIONS, (0.19, 1.32, 1.0, 1.39), strict=True):
        pairs = links(rng, of[relation[0]], of[relation[2]], max(1, round(share * citations)))
        held[relation, "edge"] = (
            _simple(pairs) if relation[1] == "cites" else np.unique(pairs, axis=1).T
        )
    header = [*count, "paper"]
    held["nodes"] = [header, [*count.values(), papers]]
    names = ("raw/nodetype-has-feat", "raw/nodetype-has-label", "split/time/nodetype-has-split")
    files = {f"{name}.csv.gz": [header, ["False", "False", "False", "True"]] for name in names}
    return files | {"raw/triplet-type-list.csv.gz": RELATIONS}


def links(rng: Any, source: Array, destination: Array, edges: int) -> Array:
    """(2, edges) between nodes of these communities; a few destinations have most of them."""
    order = np.argsort(destination, kind="stable")
    size = np.bincount(destination)
    first = np.cumsum(size) - size
    edge_index = np.empty((2, edges), np.int64)
    for ends in np.split(edge_index, range(PIECE, edges, PIECE), axis=1):
        count = ends.shape[1]
        ends[0] = rng.integers(len(source), size=count)
        anyone = destination[rng.integers(len(destination), size=count)]
        community = np.where(rng.random(count) < HOMOPHILY, source[ends[0]] % len(size), anyone)
        ends[1] = order[
            first[community] + (rng.random(count) ** 3 * size[community]).astype(np.int64)
        ]
    return edge_index


def _simple(pairs: Array, undirected: bool = False) -> Array:
    """(M, 2) without self-loops, and each pair once."""
    pairs = np.sort(pairs, axis=0) if undirected else pairs
    return np.unique(pairs[:, pairs[0] != pairs[1]], axis=1).T


def _write(path: Path, content: Any) -> None:
    """Write a table of text, integers, or three decimals.

    Compressed if the name says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        table = np.atleast_1d(content)
        form = "%.3f" if table.dtype.kind == "f" else "%s"
        compressed = path.suffix == ".gz"
        with gzip.open(path, "wb", compresslevel=1) if compressed else path.open("wb") as file:
            np.savetxt(file, table, fmt=form, delimiter=",")


main = program("planted", write_planted, __doc__)
