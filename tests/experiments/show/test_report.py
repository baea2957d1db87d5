"""The report: it says what the data say, it opens in a browser, and broken runs are named."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from experiments.show import patches
from experiments.show.report import main
from experiments.show.report_page import (
    Page,
    data_of,
    dense_beside,
)
from experiments.train.command import main as train
from experiments.train.command import parse
from experiments.train.loop import run
from experiments.train.presets import DIGITS, DIGITS_GRAPH, PRESETS
from experiments.train.results import write_json
from experiments.train.run_folder import read_run
from experiments.train.user_code import _load_file, check_trusted, load_object
from tests.helpers import own_parts
from tests.helpers.command import refused
from tests.helpers.made_images import cut, write_photo
from tests.helpers.pages import words_of
from tests.helpers.pyg_data import platonov

GRAPH = replace(DIGITS_GRAPH, epochs=2, hidden=8, experts=3, progress=False, seeds=(0, 1))
IMAGES = replace(
    DIGITS, epochs=1, layers=2, hidden=8, experts=3, batch_size=300, progress=False, seeds=(0,)
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run(replace(GRAPH, router="expert_choice", out=root / "graph"))
    run(replace(GRAPH, router="dense", out=root / "graph-dense"))
    run(replace(IMAGES, router="token_choice", out=root / "images"))
    return root


def test_report_of_graphs_and_images(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    main([str(runs / name) for name in ("graph", "graph-dense", "images")] + ["--out", str(out)])
    page, words = (out / "index.html").read_text(), words_of(out / "index.html")
    assert str(out / "index.html") in capsys.readouterr().out
    assert list(out.iterdir()) == [out / "index.html"]
    assert not re.search("<(script|iframe|a)[ >]", page)
    assert page.count("src=") == page.count('src="data:') > 5
    summary = json.loads((runs / "graph" / "summary.json").read_text())
    assert f"{100 * summary['test']['mean']:.2f} ± {100 * summary['test']['std']:.2f}" in words
    lead = next(line for line in words.splitlines() if line.startswith("graph: "))
    measured = summary["routing"][0].items()
    largest = max(value["mean"] for name, value in measured if name.startswith("ami_"))
    assert f"{largest:.2f}" in lead
    assert "ami place" in words
    assert "digits-graph: learning curves" in words
    assert "digits: learning curves" not in words  # of one epoch
    assert "Not drawn" not in words
    tests = [
        json.loads((runs / name / "summary.json").read_text())["test"]["values"]
        for name in ("graph", "graph-dense")
    ]
    difference = np.array(tests[0]) - np.array(tests[1])
    shown = f"{100 * difference.mean():+.2f} ± {100 * difference.std(ddof=1):.2f}"
    row = page[page.index("test − dense run (points)") :]
    assert row[: row.index("</tr>")].count(f"<td>{shown}</td>") == 1
    assert "No dense run of the same data and seeds is beside images." in words


def test_a_broken_run_is_named_and_the_others_are_reported(
    runs: Path, tmp_path: Path, capsys: Any
) -> None:
    weights = "seed-0/checkpoint/best.safetensors"  # a report shows what it can without them
    ways: dict[str, Callable[[Path], object]] = {"cut": cut, "gone": Path.unlink}
    for number, part in enumerate(("summary.json", "config.json", "seed-0/routing.csv", weights)):
        name = "images" if part == weights else "graph"
        paths = []
        for way, break_it in ways.items():
            paths.append(shutil.copytree(runs / name, tmp_path / f"{way}-{number}") / part)
            break_it(paths[-1])
        folders = [tmp_path / f"{way}-{number}" for way in ways]
        with nullcontext() if part == weights else pytest.raises(SystemExit, match="1"):
            main([*map(str, folders), str(runs / "graph-dense"), "--out", str(tmp_path / "report")])
        words, said = words_of(tmp_path / "report" / "index.html"), capsys.readouterr().err
        assert words.count("Not drawn: ") == (2 if part == weights else 0)
        for path in paths:
            assert str(path) in words
            assert (str(path) in said) is (part != weights)
        assert "graph-dense" in words


def test_patches_of_ones_own_images(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = [
        write_photo(tmp_path / "one.jpg", (30, 20)),
        write_photo(tmp_path / "two.png", (9, 40), seed=1),
    ]
    half, out = cut(write_photo(tmp_path / "half.jpg", (60, 50))), tmp_path / "out"
    for name, image, message in (
        ("graph", photos[0], "expected an image model with experts"),
        ("nowhere", photos[0], "summary.json"),
        ("images", half, "half.jpg"),
        ("images", tmp_path / "none.jpg", "none.jpg"),
    ):
        assert message in refused(
            [str(runs / name), "--images", str(image), "--out", str(out)], capsys, patches.main
        )
    assert not out.exists()
    patches.main([str(runs / "images"), "--images", *map(str, photos), "--out", str(out)])
    assert capsys.readouterr().out.endswith(f"{out / 'maps.png'}\n")
    assert matplotlib.image.imread(out / "maps.png").std() > 0.05


def test_a_graph_of_ones_own_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    path = platonov(tmp_path / "own", "graph.npz").folder / "graph.npz"
    small = replace(
        PRESETS["graph"][1],
        data_root=path,
        epochs=1,
        hidden=4,
        experts=2,
        seeds=(0,),
        progress=False,
    )
    monkeypatch.chdir(tmp_path)
    run(
        replace(small, data_root=Path("own/graph.npz"), router="token_choice", out=tmp_path / "run")
    )
    for root in (path, path.parent):
        task = read_run(tmp_path / "run", root).load_task()
        assert task.graph is not None
        assert task.graph.num_nodes == len(np.load(path)["node_labels"])
    monkeypatch.chdir(tmp_path / "own")
    assert read_run(tmp_path / "run").load_task() is not None  # where it was trained
    with pytest.raises(ValueError, match="give another --data-root"):
        read_run(tmp_path / "run", tmp_path).load_task()
    path.unlink()
    with pytest.raises(ValueError, match="give another --data-root"):
        read_run(tmp_path / "run").load_task()


def test_many_images_are_drawn_on_pages(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """Of bounded height; each image is on one of them, and is drawn as it is alone."""
    photos = [write_photo(tmp_path / f"{number}.png", (8, 8), seed=number) for number in range(25)]
    run, out = str(runs / "images"), tmp_path / "out"
    patches.main([run, "--images", *map(str, photos), "--out", str(out)])
    files = [out / f"maps-{page}.png" for page in (1, 2, 3)]
    assert capsys.readouterr().out.splitlines()[-3:] == [str(file) for file in files]
    assert sorted(out.iterdir()) == files
    pages = [matplotlib.image.imread(file) for file in files]
    assert max(len(page) for page in pages) <= 3500
    patches.main([run, "--images", str(photos[-1]), "--out", str(tmp_path / "alone")])
    alone = matplotlib.image.imread(tmp_path / "alone" / "maps.png")
    np.testing.assert_array_equal(pages[-1], alone)


@pytest.fixture(scope="module")
def trained_foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose router is a file in it, which leaves a trace where it is imported."""
    root = tmp_path_factory.mktemp("foreign")
    folder = root / "runs" / "foreign"
    folder.mkdir(parents=True)
    code = f"from {own_parts.__name__} import FirstBits\nopen('trace', 'w')\n"
    (folder / "evil.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run(replace(IMAGES, router="runs/foreign/evil.py:FirstBits", out=folder, resume=True))
    return folder


@pytest.fixture
def foreign(trained_foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, below the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained_foreign, tmp_path / "runs" / "foreign")


def renamed(folder: Path, name: str) -> None:
    """Give the router of a run another name, of the same code."""
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"router": name})
    forget_code()


def forget_code() -> None:
    """What is named next is imported anew."""
    _load_file.cache_clear()
    for name in ("runs.foreign.evil", "runs.foreign", "runs"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


REFUSED = "code that runs/foreign/config.json names, expected --trust after you read that code"

NAMES = ("runs/foreign/evil.py:FirstBits", "runs.foreign.evil:FirstBits")


@pytest.mark.parametrize("name", NAMES)
def test_code_that_a_run_folder_names_is_refused_and_not_run(
    name: str, foreign: Path, capsys: Any
) -> None:
    """By every command that makes the model again."""
    renamed(foreign, name)
    commands: dict[str, tuple[Any, list[str]]] = {
        "report": (main, ["--out", "page"]),
        "patches": (patches.main, ["--images", "x.png"]),
    }
    for command, args in commands.values():
        error = refused(["runs/foreign", *args], capsys, command)
        assert f"router: got '{name}', {REFUSED}" in error
    again = ["--config", "runs/foreign/config.json", "--out", "again"]
    assert f"router: got '{name}', {REFUSED}" in refused(again, capsys)
    shutil.copy("runs/foreign/config.json", "settings.json")
    again = ["--config", "settings.json", "--out", "router"]  # a value, and no option
    assert "code that settings.json names" in refused(again, capsys)
    assert not Path("trace").exists()
    assert parse([*again, "--router", "random"]).router == "random"


@pytest.mark.parametrize("name", NAMES)
def test_code_that_the_command_line_names_is_run(
    name: str, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code, or with --trust."""
    monkeypatch.syspath_prepend(Path.cwd())
    renamed(foreign, name)
    for args in (["--router", name], [f"--router={name}"], ["--trust"]):
        config = parse(["--config", f"{foreign}/config.json", *args])
        assert load_object("router", config.router) is not None
        assert Path("trace").exists()
        Path("trace").unlink()
        forget_code()


@pytest.mark.parametrize("option", ["equal_to", "conv", "model", "data", "router"])
def test_every_option_that_names_code_is_looked_at(option: str, tmp_path: Path) -> None:
    name = str(tmp_path / "evil.py:Any")
    changes: dict[str, Any] = {option: (name,) if option == "conv" else name}
    config = replace(PRESETS["cora"][1], **changes)
    with pytest.raises(ValueError, match=f"{option}: got .* code that config.json names"):
        check_trusted(config, Path("config.json"))
    check_trusted(config, Path("config.json"), given=[option])


def test_trusted_code_is_run(foreign: Path) -> None:
    renamed(foreign, "runs/foreign/evil.py:FirstBits")
    main(["runs/foreign", "--out", "page", "--trust"])
    assert Path("trace").exists()
    assert "Not drawn" not in words_of(Path("page/index.html"))


def test_the_hint_behind_a_run_of_ones_own_code_is_a_command_that_works(
    foreign: Path, capsys: Any
) -> None:
    options = ["--router", "runs/foreign/evil.py:FirstBits", "--out", "mine", "--seeds", "0"]
    train(["digits-graph", "--epochs", "1", "--no-progress", *options])
    hint = "python -m experiments.report mine --trust"
    assert f"what experts follow: {hint}\n" in capsys.readouterr().out
    main([*hint.split()[3:], "--out", "page"])


def test_code_that_fails_leaves_a_note_on_the_page(foreign: Path) -> None:
    """A router that was edited since; the rest of the page is made."""
    renamed(foreign, "runs/mine.py:Edited")
    code = f"from {own_parts.__name__} import FirstBits\n\nclass Edited(FirstBits):\n"
    Path("runs/mine.py").write_text(code + "    def route(self, *_):\n        raise KeyError(3)\n")
    main(["runs/foreign", "--out", "page", "--trust"])
    words = words_of(Path("page/index.html"))
    assert "Not drawn: KeyError: 3 (" in words
    assert "mine.py, line 5)" in words


def test_runs_of_other_metrics_or_functions_are_not_compared(runs: Path, tmp_path: Path) -> None:
    both = [read_run(runs / name) for name in ("graph", "graph-dense")]
    run_, dense = both
    assert dense_beside(run_, both) is dense
    other = replace(dense, summary={**dense.summary, "metric": "roc_auc"})
    assert dense_beside(run_, [run_, other]) is None
    own = replace(dense, config=replace(dense.config, data="mine.py:load"))
    assert data_of(own) != data_of(dense)
    assert dense_beside(run_, [run_, own]) is None


def test_text_is_escaped(tmp_path: Path) -> None:
    page = Page()
    page.heading("a < b & c")
    page.text("<img src=x>")
    page.table([["<b>"], ["&"]])
    page.write(tmp_path / "page.html")
    assert not re.search("<(img|b)[ >]", (tmp_path / "page.html").read_text())
