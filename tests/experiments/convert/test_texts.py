"""Graphs of texts: nodes of large classes, edges between them, splits of whole groups."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from experiments.convert.definitions import definitions
from experiments.convert.packages import packages, read
from experiments.convert.synsets import synset_of
from experiments.convert.texts import LEAST, Node, TextGraph, words, write
from experiments.train.data.named import load_graph

SECTIONS = ("admin", "games")
MANY = LEAST + 20


def text_of(number: int) -> str:
    """Seven of 150 words, each in many texts."""
    return " ".join(f"word{(number * step) % 150}" for step in (1, 7, 11, 13, 17, 19, 23))


def block(number: int) -> str:
    """A package: each needs the one before it, and comes with its neighbor from one source."""
    return "\n".join(
        [
            f"Package: p{number}",
            f"Source: s{number // 2} (1.0)",
            f"Section: {SECTIONS[number % 2]}",
            f"Depends: p{number - 1} (>= 1.0) | nothing, p{number}:any",
            f"Description: P{number} has {text_of(number)}",
            " A longer description: which is left out",
        ]
    )


@pytest.fixture
def available(tmp_path: Path) -> Path:
    blocks = [block(number) for number in range(2 * MANY)]
    blocks += ["Package: small\nSection: few\nDepends: p0", "Package: other\nSection: contrib/x"]
    path = tmp_path / "available"
    path.write_text("\n\n".join(blocks))
    return path


def test_packages_are_read_with_their_first_lines(available: Path) -> None:
    found = read(available.read_text())
    assert len(found) == 2 * MANY + 1  # not that of contrib
    assert found["p3"]["Description"].startswith("P3 has word3 ")


def test_the_graph_of_packages_is_what_train_reads(
    available: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages(available, tmp_path / "packages.npz")
    said = capsys.readouterr().out
    assert f"{2 * MANY} nodes, {2 * MANY - 1} edges, 2 classes" in said
    graph = load_graph("packages", tmp_path)
    names = sorted(f"p{number}" for number in range(2 * MANY))
    assert graph.data.x.shape == (2 * MANY, 128)
    assert [SECTIONS[label] for label in graph.data.y] == [
        SECTIONS[int(name[1:]) % 2] for name in names
    ]
    for source, target in graph.data.edge_index.T.tolist():
        assert int(names[source][1:]) == int(names[target][1:]) + 1
    parts = graph.splits(3)
    groups = [{int(names[node][1:]) // 2 for node in nodes} for nodes in parts.values()]
    assert sum(map(len, groups)) == MANY  # no source is in two parts
    assert sum(map(len, parts.values())) == 2 * MANY


def test_the_source_of_a_graph_stands_beside_it(available: Path, tmp_path: Path) -> None:
    packages(available, tmp_path / "packages.npz")
    source = (tmp_path / "packages.source.txt").read_text()
    assert f"{2 * MANY + 1} packages" in source
    assert hashlib.sha256(available.read_bytes()).hexdigest() in source


def test_words_leave_out_those_of_the_name() -> None:
    assert words("Zlib: the C++ library zlib 2", without="zlib-2") == "the c++ library"


def test_a_synset_has_its_gloss_and_relations_but_those_of_the_hierarchy() -> None:
    line = (
        "00004475 03 n 02 organism 0 living_thing 0 003 @ 00004258 n 0000 + 02614181 v 0201 "
        "& 00005787 s 0000 | a living thing that can act; an organism"
    )
    found = synset_of(line, "n")
    assert found.name == "n00004475"
    assert found.node == Node("a that can act an", "03", "organism")
    assert found.related == ["v02614181", "a00005787"]


def wheel(folder: Path, name: str, used: str) -> None:
    """A package of as many functions as a class needs; each uses one of another package."""
    codes = [
        f'def {name}_{number}():\n    """Do {text_of(number)}."""\n    return {used}_{number}()\n'
        for number in range(MANY)
    ]
    hidden = "def bare():\n    return 1\n\nclass Broken\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for number, code in enumerate(codes):
            archive.writestr(f"{name}/code_{number}.py", code)
        archive.writestr(f"{name}/broken.py", hidden)
        archive.writestr(f"{name}/tests/test_code.py", codes[0])


def test_definitions_lead_from_use_to_definition(tmp_path: Path) -> None:
    wheel(tmp_path, "one", used="two")
    wheel(tmp_path, "two", used="one")
    definitions(tmp_path, tmp_path / "definitions.npz")
    data = load_graph("definitions", tmp_path).data
    assert data.num_nodes == 2 * MANY
    assert data.y.bincount().tolist() == [MANY, MANY]
    source, target = data.edge_index
    assert data.num_edges == 2 * MANY
    assert (data.y[source] != data.y[target]).all()


def made(count: int, labels: str = "xy", groups: int = 150) -> dict[str, Node]:
    """Nodes of the same two words."""
    return {
        str(n): Node("few words", labels[n % len(labels)], str(n % groups)) for n in range(count)
    }


@pytest.mark.parametrize(
    ("nodes", "edges", "named"),
    [
        (made(9), {("1", "2")}, "^nodes: got 9, expected more than 128"),
        (made(150), {("1", "2")}, "^words: got 2 that five texts have, expected more than 128"),
        (made(9), set(), "^edges: got none"),
        (made(9, labels="x"), {("1", "2")}, "^classes: got .'x'. of 100 nodes, expected two or"),
    ],
)
def test_what_makes_no_task_is_refused(
    nodes: dict[str, Node], edges: set[tuple[str, str]], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        write(TextGraph(nodes, edges, ""), tmp_path / "graph.npz")
    with pytest.raises(ValueError, match=r"^out: got .*graph, expected FILE.npz"):
        write(TextGraph(nodes, edges, ""), tmp_path / "graph")
    assert not [*tmp_path.iterdir()]


def test_groups_that_leave_a_part_of_a_split_empty_are_refused(
    available: Path, tmp_path: Path
) -> None:
    one = re.sub("Source: .*", "Source: all", available.read_text())
    available.write_text(one)
    with pytest.raises(ValueError, match=r"^groups: got so few that a part of a split is empty"):
        packages(available, tmp_path / "packages.npz")
    assert not (tmp_path / "packages.npz").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^folder: got no wheels in"):
        definitions(tmp_path)
