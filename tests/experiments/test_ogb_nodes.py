"""OGB's sets through ogb: what comes out is what the files say, and a file that is broken is named."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from experiments.data.ogb_import import PygNodePropPredDataset
from experiments.data.ogb_layout import RELATIONS, OGBName, layout_of
from experiments.data.ogb_nodes import load_ogb
from experiments.planted_ogb import write_planted
from tests.experiments.ogb_data import (
    CLASSES,
    EDGES,
    FEATURES,
    NAMES,
    NODES,
    assert_same,
    numbers,
    plant,
    truncate,
    watch,
    write,
)

PLAIN = NAMES[:3]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.fixture
def root(templates: Path, tmp_path: Path) -> Path:
    """A data root of the test's own, with all four sets."""
    return Path(shutil.copytree(templates, tmp_path / "data"))


@pytest.fixture(autouse=True)
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return watch(monkeypatch)


def test_plain_sets_are_what_the_files_say(root: Path) -> None:
    for name in PLAIN:
        layout = layout_of(name, root)
        graph, split = load_ogb(name, root)
        edge = torch.from_numpy(numbers(layout.raw("edge"))).long().t()
        if name != "ogbn-arxiv":  # each edge is followed by its inverse
            edge = torch.stack([edge, edge.flip(0)], dim=-1).view(2, -1)
        assert torch.equal(graph.edge_index, edge)
        assert graph.edge_index.is_contiguous()
        label = torch.from_numpy(numbers(layout.raw("node-label")))
        assert torch.equal(graph.y, label.float() if name == "ogbn-proteins" else label.long().view(-1))
        if name != "ogbn-proteins":
            torch.testing.assert_close(graph.x, torch.from_numpy(numbers(layout.raw("node-feat"))).float())
        assert list(split) == ["train", "val", "test"]
        for part, file in (("train", "train"), ("val", "valid"), ("test", "test")):
            assert torch.equal(split[part], torch.from_numpy(numbers(layout.split(file))).long().view(-1))
        graph.validate(raise_on_error=True)


def test_arxiv_has_years_and_proteins_species(root: Path) -> None:
    arxiv, _ = load_ogb("ogbn-arxiv", root)
    assert arxiv.node_year.tolist() == numbers(layout_of("ogbn-arxiv", root).raw("node_year")).ravel().tolist()
    proteins, _ = load_ogb("ogbn-proteins", root)
    species = numbers(layout_of("ogbn-proteins", root).raw("node_species"))
    assert proteins.node_species.tolist() == species.ravel().tolist()


def test_proteins_features_are_the_mean_of_incident_edges(templates: Path, tmp_path: Path) -> None:
    write_planted("ogbn-proteins", tmp_path, 200, 60)  # some nodes have no edge
    layout = layout_of("ogbn-proteins", tmp_path)
    graph, _ = load_ogb("ogbn-proteins", tmp_path)
    edge, feature = numbers(layout.raw("edge")), numbers(layout.raw("edge-feat"))
    assert graph.edge_attr.shape == (120, 8)
    np.testing.assert_allclose(graph.edge_attr, feature.repeat(2, axis=0), rtol=1e-6)
    lonely = 0
    for node in range(200):
        incident = feature[(edge == node).any(axis=1)]
        lonely += len(incident) == 0
        np.testing.assert_allclose(graph.x[node], incident.mean(axis=0) if len(incident) else np.zeros(8), rtol=1e-5)
    assert lonely > 0


def test_mag_is_what_the_files_say(root: Path) -> None:
    layout = layout_of("ogbn-mag", root)
    graph, split = load_ogb("ogbn-mag", root)
    assert set(graph.node_types) == {"paper", "author", "institution", "field_of_study"}
    assert set(graph.edge_types) == set(RELATIONS)
    for relation in RELATIONS:
        edge = torch.from_numpy(numbers(layout.raw("edge", relation))).long().t()
        assert torch.equal(graph[relation].edge_index, edge)
    assert [kind for kind in graph.node_types if "x" in graph[kind]] == ["paper"]
    x = torch.from_numpy(numbers(layout.raw("node-feat", "paper"))).float()
    torch.testing.assert_close(graph["paper"].x, x)
    assert graph["paper"].y.tolist() == numbers(layout.raw("node-label", "paper")).ravel().tolist()
    assert graph["paper"].node_year.tolist() == numbers(layout.raw("node_year", "paper")).ravel().tolist()
    assert graph["author"].num_nodes == round(1.54 * NODES)
    assert torch.equal(torch.cat(list(split.values())).sort().values, torch.arange(NODES))
    assert torch.equal(split["val"], torch.from_numpy(numbers(layout.split("valid"))).long().view(-1))
    graph.validate(raise_on_error=True)


@pytest.mark.parametrize("name", NAMES)
def test_second_load_is_from_the_processed_file(root: Path, name: OGBName, loads: list[str]) -> None:
    first, split = load_ogb(name, root)
    processed = layout_of(name, root).processed
    stamp = processed.stat().st_mtime_ns
    second, again = load_ogb(name, root, offline=True)
    assert processed.stat().st_mtime_ns == stamp
    assert_same(first, second)
    assert_same(split, again)
    assert loads == [processed.name] * 2  # and PyG's pre_transform.pt, which it reads unsafely, never


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-mag"])
def test_what_plain_ogb_leaves_behind_can_be_loaded(root: Path, name: str) -> None:
    with suppress(pickle.UnpicklingError):  # ogb 1.3.6 cannot read what it has just written
        PygNodePropPredDataset(name, str(root))
    assert layout_of(name, root).processed.exists()
    graph, _ = load_ogb(name, root)
    assert (graph if isinstance(graph, Data) else graph["paper"]).y.shape == (NODES,)


def test_folder_of_the_old_name_is_found(root: Path) -> None:
    (root / "ogbn_arxiv").rename(root / "ogbn_arxiv_pyg")
    graph, _ = load_ogb("ogbn-arxiv", root, offline=True)
    assert graph.num_nodes == NODES


def test_old_name_of_the_species_file(root: Path) -> None:
    species = layout_of("ogbn-proteins", root).raw("node_species")
    species.rename(species.with_name("species.csv.gz"))
    graph, _ = load_ogb("ogbn-proteins", root, offline=True)
    assert graph.node_species.shape == (NODES,)


@pytest.mark.parametrize("as_array", [False, True])
def test_split_dict_is_loaded_safely(root: Path, as_array: bool, loads: list[str]) -> None:
    layout = layout_of("ogbn-arxiv", root)
    parts = {"train": [3, 1], "valid": [0], "test": [2, 9]}
    saved: dict[str, Any] = {p: np.array(v) if as_array else torch.tensor(v) for p, v in parts.items()}
    torch.save(saved, layout.split_dict)
    _, split = load_ogb("ogbn-arxiv", root)
    assert {part: index.tolist() for part, index in split.items()} == {"train": [3, 1], "val": [0], "test": [2, 9]}
    assert "split_dict.pt" in loads
    truncate(layout.split_dict)
    with pytest.raises(ValueError, match=r"split_dict\.pt: not ogb's .*; delete it and load again"):
        load_ogb("ogbn-arxiv", root)


def test_planted_graphs_say_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_ogb("ogbn-arxiv", root)
    assert "ogbn-arxiv: a planted graph, not OGB's" in capsys.readouterr().out


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: got 'ogbn-papers100M', expected one of ogbn-arxiv, ogbn-products"):
        load_ogb("ogbn-papers100M", tmp_path)


# broken files

Break = Callable[[Path], None]


def rows(keep: int) -> Break:
    return lambda path: write(path, numbers(path)[:keep])


def cell(value: float) -> Break:
    def change(path: Path) -> None:
        table = numbers(path)
        table[5, 0] = value
        write(path, table)

    return change


def text(path: Path) -> None:
    write(path, "not,a\nnumber,table\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "file", "damage", "problem"),
    [
        ("ogbn-arxiv", "raw/edge", truncate, "cannot be read .*end-of-stream"),
        ("ogbn-products", "raw/edge", truncate, "cannot be read"),
        ("ogbn-proteins", "raw/edge-feat", truncate, "cannot be read"),
        ("ogbn-mag", "raw/relations/paper___cites___paper/edge", truncate, "cannot be read"),
        ("ogbn-mag", "raw/triplet-type-list", truncate, "cannot be read"),
        ("ogbn-mag", "raw/num-node-dict", truncate, "cannot be read"),
        ("ogbn-arxiv", "raw/node-feat", truncate, "cannot be read"),
        ("ogbn-mag", "raw/node-feat/paper/node-feat", truncate, "cannot be read"),
        ("ogbn-arxiv", "raw/node-label", empty, "cannot be read"),
        ("ogbn-arxiv", "raw/num-node-list", truncate, "cannot be read"),
        ("ogbn-arxiv", "raw/num-edge-list", text, "cannot be read"),
        ("ogbn-arxiv", "raw/edge", text, "cannot be read"),
        ("ogbn-arxiv", "split/time/valid", truncate, "cannot be read"),
        ("ogbn-mag", "split/time/paper/test", truncate, "cannot be read"),
        ("ogbn-mag", "split/time/nodetype-has-split", truncate, "cannot be read"),
        ("ogbn-arxiv", "raw/edge", rows(9), "got 9 rows, expected 600"),
        ("ogbn-products", "raw/edge", rows(9), "got 18 rows, expected 1200"),
        ("ogbn-arxiv", "raw/node-feat", rows(150), "got 150 rows, expected 200"),
        ("ogbn-arxiv", "raw/node_year", rows(150), "got 150 rows, expected 200"),
        ("ogbn-proteins", "raw/node-label", rows(150), "got 150 rows, expected 200"),
        ("ogbn-mag", "raw/node-label/paper/node-label", rows(150), "got 150 rows, expected 200"),
        ("ogbn-mag", "raw/relations/author___writes___paper/edge", rows(9), "got 9 rows, expected 792"),
        ("ogbn-arxiv", "raw/edge", cell(NODES), "got 0 to 200, expected 0 to 199"),
        ("ogbn-arxiv", "raw/edge", cell(-1), "got -1 to 199, expected 0 to 199"),
        ("ogbn-mag", "raw/relations/author___writes___paper/edge", cell(400), "got 0 to 400, expected 0 to 307"),
        ("ogbn-arxiv", "raw/node-label", cell(40), "got 0 to 40, expected 0 to 39"),
        ("ogbn-proteins", "raw/node-label", cell(2), "got 0 to 2, expected 0 to 1"),
        ("ogbn-mag", "raw/node-label/paper/node-label", cell(349), "got 0 to 349, expected 0 to 348"),
        ("ogbn-arxiv", "raw/node-feat", cell(np.nan), "got NaN or infinity"),
        ("ogbn-arxiv", "split/time/test", cell(NODES), "got nodes .* to 200, expected 0 to 199"),
        ("ogbn-mag", "split/time/paper/train", cell(-1), "got nodes -1 to .*, expected 0 to 199"),
    ],
)
def test_broken_file_is_named(root: Path, name: OGBName, file: str, damage: Break, problem: str) -> None:
    layout = layout_of(name, root)
    path = layout.folder / f"{file}.csv.gz"
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(ValueError, match=rf"{path}: {problem}.*; delete {layout.folder} and load again"):
        load_ogb(name, root)
    assert layout.processed.exists() == file.startswith("split")
    path.write_bytes(whole)
    load_ogb(name, root)  # nothing of the failure is left


def test_overlapping_split_is_refused(root: Path) -> None:
    layout = layout_of("ogbn-products", root)
    node = int(numbers(layout.split("train"))[0, 0])
    cell(node)(layout.split("test"))
    with pytest.raises(ValueError, match=rf"{layout.split('test')}: got node {node} twice, or in an earlier part"):
        load_ogb("ogbn-products", root)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ogbn-arxiv", "raw/edge"),
        ("ogbn-arxiv", "split/time/valid"),
        ("ogbn-proteins", "raw/node_species"),
        ("ogbn-mag", "raw/relations/paper___cites___paper/num-edge-list"),
        ("ogbn-mag", "raw/node-feat/paper/node-feat"),
        ("ogbn-mag", "split/time/nodetype-has-split"),
    ],
)
def test_missing_file_is_named(root: Path, name: OGBName, file: str) -> None:
    folder = layout_of(name, root).folder
    (folder / f"{file}.csv.gz").unlink()
    for allowed in (False, True):
        with pytest.raises(FileNotFoundError, match=rf"{name}: {file}.csv.gz missing in {folder}; put .* or delete"):
            load_ogb(name, root, allow_large_downloads=allowed)


class Foreign:
    pass


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-mag"])
def test_broken_processed_file_is_named(root: Path, name: OGBName) -> None:
    processed = layout_of(name, root).processed
    first, _ = load_ogb(name, root)

    def data_of(other: str) -> None:
        load_ogb(other, root)
        shutil.copy(layout_of(other, root).processed, processed)

    damages: list[Callable[[], Any]] = [
        lambda: truncate(processed),
        lambda: processed.write_bytes(b""),
        lambda: processed.write_text("hello"),
        lambda: torch.save({"x": 1}, processed),
        lambda: torch.save((torch.zeros(3), None), processed),
        lambda: torch.save((Data(), None), processed),
        lambda: torch.save(Foreign(), processed),
        lambda: data_of("ogbn-products"),
    ]
    for damage in damages:
        damage()
        with pytest.raises(ValueError, match=rf"{processed}: .*; delete {processed.parent} and load again"):
            load_ogb(name, root)
        shutil.rmtree(processed.parent)
        assert_same(load_ogb(name, root)[0], first)


def test_processed_file_of_another_graph_is_refused(root: Path, tmp_path: Path) -> None:
    load_ogb("ogbn-arxiv", root)
    processed = layout_of("ogbn-arxiv", root).processed
    write_planted("ogbn-arxiv", tmp_path / "other", NODES, EDGES + 1, FEATURES, CLASSES)
    other = layout_of("ogbn-arxiv", tmp_path / "other")
    shutil.copytree(processed.parent, other.processed.parent)
    with pytest.raises(ValueError, match=r"does not fit edge\.csv\.gz: got 600 rows, expected 601; delete .*processed"):
        load_ogb("ogbn-arxiv", tmp_path / "other")


def test_interrupted_processing_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of("ogbn-arxiv", root)
    before = sorted(layout.folder.rglob("*"))

    def half(content: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            load_ogb("ogbn-arxiv", root)
    assert sorted(layout.folder.rglob("*")) == sorted([*before, layout.processed.parent])
    load_ogb("ogbn-arxiv", root)
    assert sorted(layout.processed.parent.iterdir()) == [layout.processed]


def test_a_failure_that_no_file_explains_is_passed_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: Any, path: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_ogb("ogbn-arxiv", root)
