"""OGB's sets: fetched whole or not at all, equal to what ogb makes of the files, broken files named; OGB's metric."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from experiments.planted_ogb import write_planted
from sklearn.metrics import roc_auc_score
from torch import Tensor

from experiments.data import ogb
from experiments.data.ogb import OGBMetric, OGBName, Published, import_ogb, layout_of, load_ogb, provide
from tests.experiments.ogb_data import CLASSES, EDGES, FEATURES, NAMES, NODES, numbers, plant, truncate, write
from tests.experiments.user_data import Evil

READ = import_ogb("ogb.io.read_graph_pyg")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.fixture
def root(templates: Path, tmp_path: Path) -> Path:
    """A data root of the test's own, with all four sets."""
    return Path(shutil.copytree(templates, tmp_path / "data"))


def tensors(name: str, root: Path) -> dict[str, Any]:
    graph = load_ogb(name, root, offline=True)
    return {"graph": graph.data.to_dict(), "split": graph.splits(0)}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES[:3])
def test_plain_sets_are_what_ogb_reads(name: OGBName, root: Path) -> None:
    layout = layout_of(name, root)
    graph = load_ogb(name, root)
    (theirs,) = READ.read_graph_pyg(
        str(layout.folder / "raw"), add_inverse_edge=layout.published.both_ways, additional_node_files=[]
    )
    assert torch.equal(graph.data.edge_index, theirs.edge_index)
    assert torch.equal(
        graph.data.y, torch.from_numpy(numbers(layout.raw("node-label"))).to(graph.data.y).view_as(graph.data.y)
    )
    if name != "ogbn-proteins":
        assert torch.equal(graph.data.x, theirs.x)
        return
    assert torch.equal(graph.data.edge_attr, theirs.edge_attr)
    for node in range(0, NODES, 20):
        near = theirs.edge_attr[theirs.edge_index[1] == node]
        torch.testing.assert_close(graph.data.x[node], near.mean(dim=0) if len(near) else torch.zeros(FEATURES))


def test_mag_is_what_ogb_reads(root: Path) -> None:
    layout = layout_of("ogbn-mag", root)
    graph = load_ogb("ogbn-mag", root)
    (theirs,) = READ.read_heterograph_pyg(
        str(layout.folder / "raw"), additional_node_files=[], additional_edge_files=[]
    )
    assert graph.target == "paper"
    assert graph.data.node_types == list(theirs.num_nodes_dict)  # models are drawn in this order
    assert graph.data.edge_types == list(theirs.edge_index_dict)
    assert graph.data.num_nodes_dict == theirs.num_nodes_dict
    assert_same(graph.data.edge_index_dict, dict(theirs.edge_index_dict))
    assert_same(graph.data.x_dict, dict(theirs.x_dict))
    assert graph.data["paper"].y.tolist() == numbers(layout.raw("node-label")).ravel().tolist()
    graph.data.validate()


@pytest.mark.parametrize("name", NAMES)
def test_splits_outputs_and_metric(name: OGBName, root: Path) -> None:
    graph, by_rank = load_ogb(name, root), name == "ogbn-proteins"
    for part, index in graph.splits(3).items():
        assert index.tolist() == numbers(layout_of(name, root).split(part)).ravel().tolist()
    assert graph.num_outputs == {"ogbn-arxiv": 40, "ogbn-products": 47, "ogbn-proteins": 112, "ogbn-mag": 349}[name]
    assert graph.metric_name == ("roc_auc" if by_rank else "accuracy")
    assert isinstance(graph.metric(), OGBMetric)


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-mag"])
def test_the_second_load_reads_tensors_and_runs_nothing(
    name: OGBName, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, processed = tensors(name, root), layout_of(name, root).processed
    with monkeypatch.context() as patch:
        patch.setattr(ogb, "_csv", lambda *_: pytest.fail("read again"))
        assert_same(tensors(name, root), first)
    whole = processed.read_bytes()
    for damage in (
        lambda: processed.write_bytes(whole[:1000]),
        lambda: torch.save({"x": 1}, processed),
        lambda: torch.save(Evil(root / "evil"), processed),
    ):
        damage()
        with pytest.raises(ValueError, match=rf"{processed}: cannot be read .*delete it"):
            tensors(name, root)
    assert not (root / "evil").exists()
    processed.unlink()
    assert_same(tensors(name, root), first)


def test_tensors_of_other_files_are_not_taken(root: Path, tmp_path: Path) -> None:
    load_ogb("ogbn-arxiv", root)
    write_planted("ogbn-arxiv", tmp_path / "other", NODES, EDGES + 1, FEATURES, CLASSES)
    other = layout_of("ogbn-arxiv", tmp_path / "other")
    shutil.copytree(layout_of("ogbn-arxiv", root).processed.parent, other.processed.parent)
    assert load_ogb("ogbn-arxiv", tmp_path / "other").data.num_edges == EDGES + 1


def test_saving_that_is_cut_off_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        load_ogb("ogbn-arxiv", root)
    assert list(layout_of("ogbn-arxiv", root).processed.parent.iterdir()) == []


def test_folder_of_the_old_name_is_found(root: Path) -> None:
    (root / "ogbn_arxiv").rename(root / "ogbn_arxiv_pyg")
    assert load_ogb("ogbn-arxiv", root, offline=True).data.num_nodes == NODES


def test_planted_graphs_say_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_ogb("ogbn-arxiv", root)
    assert "ogbn-arxiv: a planted graph, not OGB's" in capsys.readouterr().out


Break = Callable[[Path], None]


def cell(value: float) -> Break:
    def change(path: Path) -> None:
        table = numbers(path)
        table[5, 0] = value
        write(path, table)

    return change


def short(path: Path) -> None:
    write(path, numbers(path)[:9])


def text(path: Path) -> None:
    write(path, "not,a\nnumber,table\n")


@pytest.mark.parametrize(
    ("name", "file", "damage", "problem"),
    [
        ("ogbn-arxiv", "raw/edge", truncate, "cannot be read"),
        ("ogbn-arxiv", "raw/node-label", lambda path: path.write_bytes(b""), "cannot be read"),
        ("ogbn-arxiv", "raw/num-edge-list", text, "got 2 rows"),
        ("ogbn-arxiv", "raw/edge", text, "got 2 rows"),
        ("ogbn-arxiv", "raw/edge", short, "got 9 rows, expected 600"),
        ("ogbn-arxiv", "raw/edge", cell(NODES), "got 0 to 200, expected whole numbers from 0 to 199"),
        ("ogbn-arxiv", "raw/edge", cell(-1), "got -1 to 199"),
        ("ogbn-arxiv", "raw/edge", cell(0.5), "expected whole numbers"),
        ("ogbn-arxiv", "raw/node-label", cell(40), "got 0 to 40"),
        ("ogbn-arxiv", "raw/node-feat", cell(np.nan), "got NaN"),
        ("ogbn-arxiv", "split/time/test", cell(NODES), "to 200, expected whole numbers from 0 to 199"),
        ("ogbn-arxiv", "split/time/valid", truncate, "cannot be read"),
        ("ogbn-products", "raw/edge", short, "got 9 rows, expected 600"),
        ("ogbn-proteins", "raw/edge-feat", truncate, "cannot be read"),
        ("ogbn-proteins", "raw/node-label", cell(2), "got 0 to 2"),
        ("ogbn-mag", "raw/num-node-dict", truncate, "cannot be read"),
        ("ogbn-mag", "raw/relations/author___writes___paper/edge", cell(400), "got 0 to 400"),
        ("ogbn-mag", "raw/node-feat/paper/node-feat", short, "got 9 rows, expected 200"),
        ("ogbn-mag", "split/time/paper/train", cell(-1), "got -1 to"),
    ],
)
def test_a_broken_file_is_named(root: Path, name: OGBName, file: str, damage: Break, problem: str) -> None:
    layout = layout_of(name, root)
    path = layout.folder / f"{file}.csv.gz"
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(ValueError, match=rf"{path}: .*{problem}.*; delete {layout.folder} and load again"):
        load_ogb(name, root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: {file}.csv.gz missing in {layout.folder}"):
        load_ogb(name, root, allow_large_downloads=True)
    path.write_bytes(whole)
    load_ogb(name, root)  # nothing of the failure is left


def test_an_overlapping_split_is_refused(root: Path) -> None:
    layout = layout_of("ogbn-products", root)
    node = int(numbers(layout.split("train"))[0, 0])
    cell(node)(layout.split("test"))
    with pytest.raises(ValueError, match=rf"{layout.split('test')}: got node {node} twice"):
        load_ogb("ogbn-products", root)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: got 'ogbn-pubmed', expected one of ogbn-arxiv"):
        load_ogb("ogbn-pubmed", tmp_path)
    with pytest.raises(ValueError, match=r"name: got 'ogbn-papers100M', .*stays on disk, see experiments\.convert"):
        load_ogb("ogbn-papers100M", tmp_path)


class Server(SimpleHTTPRequestHandler):
    """Serves a folder; claims ``extra`` bytes more than it sends."""

    extra = 0

    def send_header(self, keyword: str, value: str) -> None:
        if keyword.lower() == "content-length":
            value = str(int(value) + self.extra)
        super().send_header(keyword, value)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server with OGB's zips, in the place of OGB's."""
    folder = tmp_path / "server"
    for name in ("arxiv", "products"):
        shutil.copytree(templates / f"ogbn_{name}", folder / name)
        shutil.make_archive(str(folder / name), "zip", folder, name)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(Published, "url", property(lambda self: f"{url}/{self.archive}.zip"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("served")
def test_a_download_is_announced_and_leaves_one_folder(
    templates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "data"
    (root / "ogbn_arxiv" / "raw").mkdir(parents=True)  # what a download of ogb that failed leaves
    load_ogb("ogbn-arxiv", root)
    assert f"ogbn-arxiv: a download of 0.08 GB to {root / 'ogbn_arxiv'}" in capsys.readouterr().out
    assert sorted(root.iterdir()) == [root / "ogbn_arxiv"]
    assert_same(tensors("ogbn-arxiv", root), tensors("ogbn-arxiv", templates))


@pytest.mark.usefixtures("served")
def test_large_downloads_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a download of 1.38 GB .* pass --allow-large-downloads"):
        load_ogb("ogbn-products", tmp_path / "new")
    assert load_ogb("ogbn-products", tmp_path / "new", allow_large_downloads=True).data.num_nodes == NODES


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("how", ["no network", "cut off"])
def test_a_failed_download_costs_nothing(how: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise URLError("Name or service not known")

    layout = layout_of("ogbn-arxiv", root)
    layout.release.rename(layout.folder / "RELEASE_v0.txt")
    before = sorted(root.rglob("*"))
    with pytest.raises(ValueError, match=r"is of another version, .*pass --allow-large-downloads"):
        load_ogb("ogbn-arxiv", root)
    with monkeypatch.context() as patch:
        if how == "cut off":
            patch.setattr(Server, "extra", 50)
        else:
            patch.setattr(ogb, "urlopen", unreachable)
        with pytest.raises(FileNotFoundError, match=r"failed \(.*\); try again, or put OGB's arxiv.zip into"):
            load_ogb("ogbn-arxiv", root, allow_large_downloads=True)
    assert sorted(root.rglob("*")) == before
    load_ogb("ogbn-arxiv", root, allow_large_downloads=True)
    assert layout.release.exists()


@pytest.mark.parametrize("name", NAMES)
def test_offline_names_all_that_is_missing(name: OGBName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ogb, "urlopen", lambda *_, **__: pytest.fail("a download"))
    layout = layout_of(name, tmp_path / "empty")
    with pytest.raises(FileNotFoundError) as caught:
        load_ogb(name, tmp_path / "empty", offline=True, allow_large_downloads=True)
    for path in (layout.release, *layout.files):
        assert str(path.relative_to(layout.folder)) in str(caught.value)
    assert f"OGB's {layout.archive.name} into {layout.root}" in str(caught.value)
    assert not layout.root.exists()


def test_a_zip_that_the_user_brings(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "ogbn_mag", tmp_path / "zip" / "mag")
    archive = Path(shutil.make_archive(str(tmp_path / "new" / "mag"), "zip", tmp_path / "zip", "mag"))
    whole = archive.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:]):
        archive.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{archive}: not a whole zip file .*; delete it and load again"):
            load_ogb("ogbn-mag", tmp_path / "new", offline=True)
        assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(whole)
    assert_same(tensors("ogbn-mag", tmp_path / "new"), tensors("ogbn-mag", root))
    shutil.rmtree(tmp_path / "new" / "ogbn_mag")
    (tmp_path / "zip" / "mag" / "split" / "time" / "paper" / "valid.csv.gz").unlink()
    shutil.make_archive(str(tmp_path / "new" / "mag"), "zip", tmp_path / "zip", "mag")
    with pytest.raises(ValueError, match=r"mag.zip: holds no split/time/paper/valid.csv.gz; delete it"):
        provide(layout_of("ogbn-mag", tmp_path / "new"), offline=True)


def test_importing_ogb_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "ogb":
            monkeypatch.delitem(sys.modules, name)
    outdated = ModuleType("outdated")
    outdated.check_outdated = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outdated", outdated)
    import_ogb("ogb.nodeproppred")
    assert sys.modules["ogb.version"].check_outdated is None  # what ogb would start in a thread


def test_accuracy_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 9.0], [1.0, 3.0, 2.0], [5.0, 4.0, 4.0]])
    metric = OGBMetric("ogbn-arxiv")
    metric.update(logits, torch.tensor([0, 2, 2, 1]))
    assert float(metric.compute()) == 0.5
    metric.update(logits[:1], torch.tensor([[0]]))
    assert float(metric.compute()) == pytest.approx(3 / 5)
    metric.reset()
    metric.update(logits[:2], torch.tensor([0, 2]))
    assert float(metric.compute()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_roc_auc_over_batches_and_processes(dtype: torch.dtype) -> None:
    """Two processes with unequal shares, whose gathering is played; the mean over tasks with both classes."""
    torch.manual_seed(0)
    target = (torch.rand(90, 112) < 0.3).float()
    target[:, 7] = 0  # ogb leaves this task out
    logits = (torch.randn(90, 112) + target).to(dtype)
    there = OGBMetric("ogbn-proteins")
    there.update(logits[50:], target[50:])
    states: list[Tensor] = [*there.prediction, *there.target]
    here = OGBMetric(
        "ogbn-proteins",
        dist_sync_fn=lambda tensor, group: [tensor, states.pop(0)],  # noqa: ARG005
        distributed_available_fn=lambda: True,
    )
    for rows in torch.arange(50).split(17):
        here.update(logits[rows], target[rows])
    tasks = [task for task in range(112) if task != 7]
    expected = roc_auc_score(target[:, tasks], logits[:, tasks].double(), average="macro")
    assert float(here.compute()) == pytest.approx(expected, abs=1e-6)
    assert float(there.compute()) != pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "logits", "target"),
    [
        ("ogbn-arxiv", (5, 40), (4,)),
        ("ogbn-arxiv", (5,), (5,)),
        ("ogbn-proteins", (5, 40), (5, 40)),
        ("ogbn-proteins", (5, 112), (5,)),
    ],
)
def test_shapes_that_do_not_fit(name: str, logits: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^logits: got \(5"):
        OGBMetric(name).update(torch.zeros(logits), torch.zeros(target))
