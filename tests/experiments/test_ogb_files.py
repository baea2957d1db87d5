"""Fetching OGB's files: nothing is asked, offline is offline, and what fails leaves nothing behind."""

from __future__ import annotations

import csv
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import pytest

from experiments.data import ogb_files, ogb_layout
from experiments.data.ogb_files import download_size, provide
from experiments.data.ogb_import import MASTER
from experiments.data.ogb_layout import OGBName, layout_of
from experiments.data.ogb_nodes import load_ogb
from tests.experiments.ogb_data import NAMES, NODES, assert_same, plant, truncate, watch


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.fixture
def root(templates: Path, tmp_path: Path) -> Path:
    """A data root of the test's own, with all four sets."""
    return Path(shutil.copytree(templates, tmp_path / "data"))


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_importing_ogb_asks_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "ogb" or name == "experiments.data.ogb_import":
            monkeypatch.delitem(sys.modules, name)
    outdated = ModuleType("outdated")
    outdated.check_outdated = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "outdated", outdated)
    import_module("experiments.data.ogb_import")
    assert sys.modules["ogb.version"].check_outdated is None  # what ogb would start in a thread


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
def served(templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server with OGB's zip of ogbn-arxiv, to which ogb's table points; gives the zip."""
    folder = tmp_path / "server"
    shutil.copytree(templates / "ogbn_arxiv", folder / "arxiv")
    archive = Path(shutil.make_archive(str(folder / "arxiv"), "zip", folder, "arxiv"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    with MASTER.open(newline="") as file:
        table = list(csv.reader(file))
    for row in table:
        if row[0] == "url":
            row[1:] = [f"http://127.0.0.1:{server.server_port}/arxiv.zip"] * len(row[1:])
    with (tmp_path / "master.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    monkeypatch.setattr(ogb_layout, "MASTER", tmp_path / "master.csv")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield archive
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.usefixtures("served")
def test_download(templates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "new" / "data"
    graph, split = load_ogb("ogbn-arxiv", root)
    assert f"ogbn-arxiv: a download of 0.00 GB to {root / 'ogbn_arxiv'}" in capsys.readouterr().out
    assert sorted(root.iterdir()) == [root / "ogbn_arxiv"]
    expected, expected_split = load_ogb("ogbn-arxiv", templates)
    assert_same(graph, expected)
    assert_same(split, expected_split)


@pytest.mark.usefixtures("served")
def test_folder_that_a_failed_download_of_ogb_leaves_is_no_version(tmp_path: Path) -> None:
    (tmp_path / "new" / "ogbn_arxiv" / "raw").mkdir(parents=True)
    graph, _ = load_ogb("ogbn-arxiv", tmp_path / "new")
    assert graph.num_nodes == NODES


@pytest.mark.usefixtures("served")
def test_another_version_needs_a_yes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of("ogbn-arxiv", root)
    layout.release.rename(layout.folder / "RELEASE_v0.txt")
    with pytest.raises(ValueError, match=r"ogbn_arxiv is of another version, since RELEASE_v1.txt is not there; pass"):
        load_ogb("ogbn-arxiv", root)
    with pytest.raises(FileNotFoundError, match=r"offline, and RELEASE_v1.txt missing"):
        load_ogb("ogbn-arxiv", root, offline=True, allow_large_downloads=True)
    with monkeypatch.context() as patch:
        patch.setattr(ogb_files, "urlopen", failing)
        with pytest.raises(FileNotFoundError, match="failed"):
            load_ogb("ogbn-arxiv", root, allow_large_downloads=True)
    assert (layout.folder / "RELEASE_v0.txt").exists()  # a failed download costs nothing
    load_ogb("ogbn-arxiv", root, allow_large_downloads=True)
    assert layout.release.exists()
    assert not (layout.folder / "RELEASE_v0.txt").exists()


def failing(*args: Any, **kwargs: Any) -> Any:
    raise URLError("Name or service not known")


@pytest.mark.parametrize(("name", "size"), [("ogbn-arxiv", "0.08"), ("ogbn-proteins", "0.21"), ("ogbn-mag", "0.40")])
def test_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: OGBName, size: str
) -> None:
    monkeypatch.setattr(ogb_files, "urlopen", failing)
    folder = layout_of(name, tmp_path).folder
    with pytest.raises(FileNotFoundError, match=rf"{name}: a download of {size} GB to {folder} failed \(.*not known"):
        load_ogb(name, tmp_path)
    assert f"a download of {size} GB" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("served")
def test_connection_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "extra", 50)
    root = tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=r"failed \(.*\); try again, or put OGB's arxiv.zip into"):
        load_ogb("ogbn-arxiv", root)
    assert list(root.iterdir()) == []


def test_size_is_asked_for_first(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = layout_of("ogbn-arxiv", tmp_path).meta["url"]
    assert download_size(url) == pytest.approx(served.stat().st_size / 2**30)
    assert download_size(url.replace("arxiv.zip", "nothing.zip")) is None

    asked: list[str] = []

    def large(url: str) -> float:
        asked.append(url)
        return 1.2

    monkeypatch.setattr(ogb_files, "download_size", large)
    with pytest.raises(
        ValueError, match=r"a download of 1.20 GB to .*, more than 1 GB; pass --allow-large-downloads to start it"
    ):
        load_ogb("ogbn-arxiv", tmp_path / "new")
    assert asked == [url]
    graph, _ = load_ogb("ogbn-arxiv", tmp_path / "new", allow_large_downloads=True)
    assert graph.num_nodes == NODES


def test_products_are_large_even_where_the_server_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ogb_files, "urlopen", failing)
    with pytest.raises(ValueError, match=r"ogbn-products: a download of 1.38 GB .* pass --allow-large-downloads"):
        load_ogb("ogbn-products", tmp_path)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", NAMES)
def test_offline(root: Path, tmp_path: Path, name: OGBName) -> None:
    load_ogb(name, root, offline=True)
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError) as caught:
        load_ogb(name, empty, offline=True, allow_large_downloads=True)
    layout = layout_of(name, empty)
    for path in (layout.release, *layout.tables, *layout.headed):
        assert str(path.relative_to(layout.folder)) in str(caught.value)
    assert f"missing in {layout.folder}; put them there, or OGB's {layout.archive.name} into {empty}" in str(
        caught.value
    )
    assert not empty.exists()


@pytest.mark.usefixtures("no_network")
def test_zip_that_the_user_brings(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "ogbn_mag", tmp_path / "zip" / "mag")
    archive = Path(shutil.make_archive(str(tmp_path / "new" / "mag"), "zip", tmp_path / "zip", "mag"))
    whole = archive.read_bytes()
    truncate(archive)
    with pytest.raises(ValueError, match=rf"{archive}: not a whole zip file \(.*\); delete it and load again"):
        load_ogb("ogbn-mag", tmp_path / "new", offline=True)
    archive.write_bytes(whole[:200] + bytes(200) + whole[400:])
    with pytest.raises(ValueError, match=rf"{archive}: not a whole zip file \(.*\); delete it and load again"):
        load_ogb("ogbn-mag", tmp_path / "new", offline=True)
    assert list(archive.parent.iterdir()) == [archive]
    archive.write_bytes(whole)
    graph, _ = load_ogb("ogbn-mag", tmp_path / "new", offline=True)
    assert_same(graph, load_ogb("ogbn-mag", root)[0])
    assert archive.exists()


@pytest.mark.usefixtures("no_network")
def test_zip_without_a_file(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "ogbn_arxiv", tmp_path / "zip" / "arxiv")
    (tmp_path / "zip" / "arxiv" / "split" / "time" / "valid.csv.gz").unlink()
    shutil.make_archive(str(tmp_path / "new" / "arxiv"), "zip", tmp_path / "zip", "arxiv")
    with pytest.raises(ValueError, match=r"arxiv.zip: holds no split/time/valid.csv.gz; delete it and load again"):
        provide(layout_of("ogbn-arxiv", tmp_path / "new"), offline=True)
