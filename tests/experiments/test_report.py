"""The report: its figures are right, it opens in a browser, and broken runs are named."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from experiments.presets import DIGITS, DIGITS_GRAPH
from experiments.presets import GRAPH as GRAPH_PRESET
from experiments.report import curves, graph_view, image_view, similarity
from experiments.report.__main__ import _by_data, main
from experiments.report.page import Page, file_name
from experiments.routing_stats import load_routings, primary_expert, save_routings
from experiments.run_folder import RunFolder, load_model, read_run
from experiments.runs import run
from gmoe import OracleRouter, Routing, build_router

GRAPH = replace(DIGITS_GRAPH, epochs=2, hidden=8, experts=3, progress=False, seeds=(0, 1))
IMAGES = replace(DIGITS, epochs=2, layers=2, hidden=8, experts=3, batch_size=300, progress=False, seeds=(0,))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run(replace(GRAPH, router="expert_choice", out=root / "graph"))
    run(replace(GRAPH, router="dense", out=root / "graph-dense"))
    run(replace(IMAGES, router="token_choice", out=root / "images"))
    return root


class Contents(HTMLParser):
    """What a page has: tags with their attributes, and all text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_report_of_graphs_and_images(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    main([str(runs / name) for name in ("graph", "graph-dense", "images")] + ["--out", str(out)])
    page = Contents(out / "index.html")
    assert str(out / "index.html") in capsys.readouterr().out
    images = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(images) >= 12
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    links = [attrs.get("href") or "" for tag, attrs in page.tags if tag in ("a", "link")]
    assert all(link.startswith(("#", "data:")) for link in links)
    anchors = {attrs.get("id") for _, attrs in page.tags}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert len(list((out / "figures").glob("*.png"))) == len(images)
    summary = json.loads((runs / "graph" / "summary.json").read_text())
    assert f"{100 * summary['test']['mean']:.2f} ± {100 * summary['test']['std']:.2f}" in page.words
    assert "Not drawn" not in page.words
    assert {file.name for file in (out / "csv").iterdir()} == {"graph-seed-0.csv", "graph-seed-1.csv"}


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    for part in ("a", "b"):
        shutil.copytree(runs / "images", tmp_path / part / "run")
    folders = [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run"), str(tmp_path / "a" / "run")]
    main([*folders, "--out", str(tmp_path / "report")])
    page = Contents(tmp_path / "report" / "index.html")
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(list((tmp_path / "report" / "figures").glob("*.png"))) == len(images)
    assert {folder in page.words for folder in folders} == {True}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_report_opens_in_a_browser_without_a_complaint(runs: Path, tmp_path: Path) -> None:
    main([str(runs / "graph"), str(runs / "images"), "--out", str(tmp_path / "report")])
    shot = tmp_path / "shot.png"
    page = (tmp_path / "report" / "index.html").as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--window-size=1200,3000"]  # fmt: skip
    assert CHROMIUM is not None
    found = subprocess.run(
        [CHROMIUM, *options, f"--screenshot={shot}", page], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in found.stderr
    assert shot.stat().st_size > 20_000


def test_a_console_error_would_be_seen(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('seen'); missing();</script>")
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", f"--screenshot={tmp_path / 'x.png'}",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" in found.stderr


@pytest.mark.parametrize(
    "what", ["summary.json", "config.json", "seed-1/metrics.csv", "seed-0/routing.csv", "routing/seed-0.safetensors"]
)
@pytest.mark.parametrize("how", ["missing", "half"])
def test_a_broken_run_is_named_and_the_others_are_reported(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, how: str
) -> None:
    shutil.copytree(runs / "graph", tmp_path / "bad")
    path = tmp_path / "bad" / what
    if how == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "bad"), str(runs / "graph-dense"), "--out", str(tmp_path / "report")])
    assert stopped.value.code == 1
    complaint = " ".join(capsys.readouterr().err.split())
    assert str(path) in complaint.replace(" ", "") or str(path) in complaint
    page = Contents(tmp_path / "report" / "index.html")
    assert str(path) in page.words
    assert "graph-dense" in page.words


@pytest.mark.parametrize("form", ["graph.npz", "folder"])
def test_a_graph_of_ones_own_is_found(tmp_path: Path, form: str) -> None:
    path = tmp_path / "own" / form
    if form == "graph.npz":
        path.parent.mkdir()
        part = np.arange(60) % 3
        np.savez(
            path,
            node_features=np.eye(60, dtype=np.float32),
            node_labels=np.arange(60) % 2,
            edges=np.stack([np.arange(60), np.roll(np.arange(60), 1)], axis=1),
            train_masks=part == 0,
            val_masks=part == 1,
            test_masks=part == 2,
        )
    else:
        path.mkdir(parents=True)
        rows = [f"{node % 5},{node % 2},{('train', 'val', 'test')[node % 3]}" for node in range(60)]
        (path / "nodes.csv").write_text("\n".join(["x0,label,split", *rows]) + "\n")
        (path / "edges.csv").write_text("\n".join(["source,target", *(f"{i},{i + 1}" for i in range(59))]) + "\n")
    small = replace(GRAPH_PRESET, data_root=path, epochs=1, hidden=4, experts=2, seeds=(0,), progress=False)
    run(replace(small, router="token_choice", out=tmp_path / "run"))
    for root in (path, path.parent):
        task = read_run(tmp_path / "run", root).load_task(0)
        assert task.graph is not None
        assert task.graph.num_nodes == 60
    with pytest.raises(FileNotFoundError, match="give --data-root"):
        read_run(tmp_path / "run", tmp_path).load_task(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "got a list, expected an object"),
        ('{"metric": "accuracy"}', "has no val, test"),
        ("nothing", "is no JSON"),
    ],
)
def test_a_summary_that_is_none(runs: Path, tmp_path: Path, content: str, message: str) -> None:
    shutil.copytree(runs / "graph", tmp_path / "bad")
    (tmp_path / "bad" / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "bad", Path("data"))


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "report")])
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_weights_that_are_broken_are_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "images", tmp_path / "bad")
    weights = tmp_path / "bad" / "seed-0" / "checkpoint" / "best.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    found = read_run(tmp_path / "bad", Path("data"))
    with pytest.raises(ValueError, match=r"best\.safetensors: cannot be read"):
        load_model(found.folder, found.config, found.load_task(0), 0)


def test_routings_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [build_router(name, 4, 3, 2)(torch.randn(7, 4)) for name in ("token_choice", "expert_choice")]
    other = [build_router(name, 4, 3, 2)(torch.randn(5, 4)) for name in ("token_choice", "expert_choice")]
    save_routings([layers, other], tmp_path / "x.safetensors")
    for found, one, two in zip(load_routings(tmp_path / "x.safetensors"), layers, other, strict=True):
        assert (found.num_tokens, found.num_experts) == (12, 3)
        torch.testing.assert_close(found.to_dense(), torch.cat([one.to_dense(), two.to_dense()]))


def test_names_of_files() -> None:
    assert file_name("a b/c: d.png") == "a-b-c-d.png"


def test_text_is_escaped(tmp_path: Path) -> None:
    page = Page("<script>", tmp_path)
    page.heading("a < b & c")
    page.text("<img src=x>")
    page.table(["<b>"], [["&"]])
    assert not {"script", "img", "b"} & {tag for tag, _ in Contents(page.write()).tags}


def test_own_graphs_are_not_mixed(runs: Path) -> None:
    one = read_run(runs / "graph", Path("data"))
    own = [replace(one, science={**one.science, "file": "g.npz", "digest": digest}) for digest in ("a", "b", "a")]
    assert {name: len(mine) for name, mine in _by_data([one, *own]).items()} == {
        "digits-graph": 1,
        "g.npz (a)": 2,
        "g.npz (b)": 1,
    }


# Curves


def test_loads_over_epochs() -> None:
    rows: Any = [
        {"epoch": float(epoch), "layer": float(layer), "load_0": 0.1 * epoch, "load_1": 1 - 0.1 * epoch, "load_2": None}
        for epoch in range(3)
        for layer in range(2)
    ]
    epochs, loads = curves.experts_over_epochs(rows, 1, "load")
    assert epochs.tolist() == [1, 2, 3]
    np.testing.assert_allclose(loads, [[0.0, 1.0], [0.1, 0.9], [0.2, 0.8]])


# Similarity


def of_assignment(assignment: list[int], experts: int) -> Routing:
    router = OracleRouter(4, experts, assignment=torch.tensor(assignment))
    found: Routing = router(torch.randn(len(assignment), 4))
    return found


def test_renumbered_experts_are_the_same(runs: Path) -> None:
    torch.manual_seed(0)
    first = torch.randint(3, (60,))
    renumbered = torch.tensor([2, 0, 1])[first]
    other = torch.randint(3, (60,))
    known = read_run(runs / "graph", Path("data"))

    def with_routing(name: str, *assignments: torch.Tensor) -> RunFolder:
        seeds = {
            seed: replace(known.seeds[0], routings=[of_assignment(assignment.tolist(), 3)])
            for seed, assignment in enumerate(assignments)
        }
        return replace(known, folder=Path(name), name=name, seeds=seeds)

    found = similarity.similarity([with_routing("a", first, renumbered), with_routing("b", other)])
    assert found is not None
    assert found.names == ["a, seed 0", "a, seed 1", "b, seed 0"]
    assert found.within("a") == pytest.approx(1.0)
    assert found.within("b") is None
    between = found.between("a", "b")
    assert between is not None
    assert abs(between) < 0.1
    assert abs(found.shuffled) < 0.1
    assert similarity.similarity([with_routing("b", other)]) is None
    deeper = with_routing("deeper", other)
    deeper = replace(deeper, seeds={0: replace(deeper.seeds[0], routings=2 * deeper.seeds[0].routings)})
    mixed = similarity.similarity([deeper, with_routing("a", first, renumbered)])
    assert mixed is not None
    assert mixed.names == ["a, seed 0", "a, seed 1"]
    assert mixed.others == ["deeper"]
    one = torch.zeros(60, dtype=torch.long)
    collapsed = similarity.similarity([with_routing("a", one, one)])
    assert collapsed is not None
    assert collapsed.within("a") == 0.0  # of one expert each, which says nothing


# Graphs


def ring(size: int) -> Data:
    place = torch.arange(size)
    edges = torch.stack([place, (place + 1) % size])
    return Data(x=torch.zeros(size, 4), edge_index=torch.cat([edges, edges.flip(0)], dim=1), y=place * 2 // size)


def test_edges_within_an_expert() -> None:
    graph = ring(40)
    halves = of_assignment([0] * 20 + [1] * 20, 2)
    within, chance = graph_view.edges_within(graph, halves, repeats=200)
    assert within == pytest.approx(38 / 40)
    assert chance == pytest.approx(19 / 39, abs=0.02)  # of two distinct nodes
    alternating = of_assignment([0, 1] * 20, 2)
    assert graph_view.edges_within(graph, alternating)[0] == 0.0
    empty = Data(x=torch.zeros(3, 4), edge_index=torch.zeros(2, 0, dtype=torch.long))
    assert all(np.isnan(value) for value in graph_view.edges_within(empty, of_assignment([0, 0, 1], 2)))


def test_contingency_by_hand() -> None:
    found = graph_view.contingency(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 1, 0, 1]), 4)
    np.testing.assert_array_equal(found, [[0, 2], [0, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize(("size", "most", "expected"), [(40, 40, 40), (40, 39, 39), (40, 6, 6), (500, 250, 250)])
def test_drawn_nodes_are_few_and_connected(size: int, most: int, expected: int) -> None:
    nodes = graph_view.drawn_nodes(ring(size), torch.zeros(size, dtype=torch.long), most)
    assert len(nodes.unique()) == len(nodes) == expected
    breaks = ((nodes.roll(-1) - nodes) % size != 1).sum()
    assert breaks <= 2  # an arc of the ring, but for one that is cut off the last hop


def test_every_expert_is_drawn() -> None:
    expert = torch.arange(400) // 100
    nodes = graph_view.drawn_nodes(ring(400), expert, 40)
    assert expert[nodes].bincount().tolist() == [10, 10, 10, 10]


def test_drawn_nodes_of_small_components() -> None:
    lonely = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=300)
    expert = torch.tensor([0, 0, *[1] * 298])
    assert len(graph_view.drawn_nodes(lonely, expert, 50)) == 3


def test_figures_of_graphs_without_classes_and_with_idle_nodes(tmp_path: Path) -> None:
    graph = ring(12)
    routing = build_router("expert_choice", 4, 3, 1)(torch.randn(12, 4))
    half = replace(routing, token=routing.token[:2], weight=routing.weight[:2], offsets=routing.offsets.clamp(max=2))
    del graph.y
    planted = torch.arange(12) // 6
    for found in (graph_view.heat_maps(graph, half, planted=planted), graph_view.drawing(graph, half)):
        found.savefig(tmp_path / "x.png")


def test_csv_has_every_pair(tmp_path: Path) -> None:
    torch.manual_seed(0)
    routings = [build_router("token_choice", 4, 3, 2)(torch.randn(6, 4)) for _ in range(2)]
    graph_view.write_csv(routings, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for layer, routing in enumerate(routings):
        dense = torch.zeros(6, 3)
        for row in rows:
            if int(row["layer"]) == layer:
                dense[int(row["node"]), int(row["expert"])] = float(row["weight"])
        torch.testing.assert_close(dense, routing.to_dense().detach(), atol=1e-5, rtol=1e-5)
    assert [int(row["node"]) for row in rows] == [node for _ in range(2) for node in range(6) for _ in range(2)]


# Images


def test_first_of_each_class() -> None:
    assert image_view.of_each_class(torch.tensor([1, 1, 0, 2, 0, 1]), 5) == [2, 0, 3, 4, 1]


def test_class_shares_by_hand() -> None:
    weight = torch.zeros(3, 1, 2, 2)
    weight[0, 0, 0, 0], weight[0, 0, 1, 1], weight[1, 0, 0, 0] = 0.2, 0.1, 0.3
    found = image_view.class_shares(weight, torch.tensor([1, 1, 0]), 3)
    np.testing.assert_allclose(found, np.array([[0, 0], [5 / 6, 1 / 6], [0, 0]]), atol=1e-6)


def test_the_gallery_shows_the_heaviest_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(3, 1, 4, 4)
    images[1, 0, 2:, :2] = 1.0  # patch 2
    weight = torch.zeros(3, 2, 2, 1)
    weight[:, 0, 0, 0] = torch.tensor([0.1, 0.2, 0.0])
    weight[1, 1, 0, 0] = 0.9
    seen = image_view.Seen(images=images, labels=torch.tensor([0, 1, 0]), weights=[weight])
    figure = image_view.gallery(seen, 0, ["first", "second"], per_expert=4)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["second", "first", "", ""]
    (shown,) = figure.axes[0].images
    assert np.asarray(shown.get_array()).min() == 1.0
    assert not figure.axes[2].images  # an image whose weight is 0 is none of its


def test_digits_look_as_they_are(runs: Path) -> None:
    found = read_run(runs / "images", Path("data"))
    task = found.load_task(0)
    seen = image_view.look(load_model(found.folder, found.config, task, 0), task, most=50)
    assert seen.images.shape == (50, 1, 8, 8)
    assert seen.images.min() == 0.0
    assert seen.images.max() == pytest.approx(1.0)
    assert seen.labels is not None
    assert len(seen.labels.unique()) == 10
    (weight,) = seen.weights
    assert weight.shape == (50, 4, 4, 3)
    assert primary_expert(found.seeds[0].routings[0]).max() < 3
