"""Sweeps skip what is finished, name what cannot be run, and show it beside its controls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.show.cells import read_study
from experiments.study.pages import render
from experiments.study.sweep import main
from experiments.train import loop, results
from experiments.train.data.named import PYG
from experiments.train.results import write_json
from tests.helpers.command import refused
from tests.helpers.user_data import write_npz

MINE = """
from dataclasses import replace
from pathlib import Path

from experiments.study.studies import Row, Study
from experiments.train.presets import DIGITS_GRAPH, GRAPH
from experiments.train.results import write_json

STUDY = Study(
    name="tiny",
    about="a test",
    columns={"digits-graph": replace(DIGITS_GRAPH, epochs=1, seeds=(3, 1), hidden=4)},
    rows={
        "moe": Row(label="experts"),
        "dense": Row(label="dense", changes={"router": "dense"}),
        "wide": Row(label="wide", changes={"router": "dense", "hidden": 16}),
    },
    controls=("dense",),
)
WRONG = replace(
    STUDY,
    rows={**STUDY.rows, "wrong": Row(label="?", changes={"router": "dense", "kmeans_init": True})},
)
DATA = Path("data")
NINE = replace(
    STUDY,
    columns={
        "cora": replace(GRAPH, dataset="cora", epochs=1, data_root=DATA),
        "own": replace(GRAPH, epochs=1, data_root=DATA / "mine.npz"),
    },
)
FASTER = replace(STUDY, columns={"digits-graph": replace(STUDY.columns["digits-graph"], lr=0.5)})
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command in a folder of its own, which holds mine.py."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)

    def run(study: str, *args: str) -> None:
        main([f"mine.py:{study}", "--no-progress", *args])

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained from here on, by row and seed."""
    ran = list[str]()
    train_seed = loop.train_seed

    def watch(fabric: Any, config: Any, *rest: Any) -> Any:
        ran.append(f"{config.folder().name} {rest[1]}")
        return train_seed(fabric, config, *rest)

    monkeypatch.setattr(loop, "train_seed", watch)
    return ran


def test_a_study_of_your_own_is_shown_beside_its_control(
    sweep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("STUDY")
    head, _, experts, dense, _ = capsys.readouterr().out.splitlines()
    columns = dict(
        zip(head.strip("| ").split(" | "), experts.strip("| ").split(" | "), strict=True)
    )
    assert columns["digits-graph"] == "experts"
    cells = read_study(Path("results", "tiny"))["cells"]["digits-graph"]
    ours, theirs = (cells[row]["test"]["values"] for row in ("moe", "dense"))
    points = [100 * (one - other) for one, other in zip(ours, theirs, strict=True)]
    assert columns["− dense"].startswith(f"{sum(points) / 2:+.2f} (")
    assert columns["− dense"].endswith(f"{sum(value > 0 for value in points)} of 2")
    assert dense.split(" | ")[-1] == "– |"
    assert [*cells] == ["moe", "dense", "wide"]


def test_a_page_shows_a_study_without_its_code(sweep: Callable[..., None]) -> None:
    sweep("STUDY", "--rows", "dense", "moe")
    Path("mine.py").unlink()
    whole = "<!-- study: tiny -->\n<!-- end -->"
    page = render(whole, Path("results"))
    of_column = render(whole.replace("tiny", "tiny: digits-graph"), Path("results"))
    assert of_column.partition("\n")[2] == page.partition("\n")[2]
    assert "| experts |" in page
    assert "| dense |" in page
    with pytest.raises(ValueError, match="columns: got 'sea', expected one of digits-graph"):
        render("<!-- study: tiny: sea -->\n<!-- end -->", Path("results"))


def test_finished_cells_are_skipped(
    sweep: Callable[..., None],
    trained: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep("STUDY", "--rows", "wide", "dense")
    trained.clear()
    sweep("STUDY")
    assert trained == ["moe 3", "moe 1"]
    sweep("STUDY", "--runs", "elsewhere")
    assert not Path("elsewhere").exists()
    with pytest.raises(SystemExit):
        sweep("FASTER", "--runs", "elsewhere")
    said = " ".join(capsys.readouterr().err.split())
    assert "holds digits-graph/moe with lr=0.01, expected 0.5" in said
    assert trained == ["moe 3", "moe 1"]


@pytest.mark.parametrize("says", ["study", "cell"])
def test_a_column_of_another_commit_is_mixed_where_it_is_asked_for_alone(
    says: str,
    sweep: Callable[..., None],
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is finished is shown all the same. Older studies do not hold who began a column."""
    monkeypatch.setattr(results, "commit", lambda: "1" * 40)
    sweep("STUDY", "--rows", "dense")
    study = Path("results/tiny/study.json")
    if says == "cell":
        write_json(study, {**json.loads(study.read_text()), "commits": {}})
    monkeypatch.setattr(results, "commit", lambda: "2" * 40 + "-dirty")
    trained.clear()
    sweep("STUDY", "--rows", "dense")
    assert "| dense |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sweep("STUDY")
    said = " ".join(capsys.readouterr().err.split())
    assert "got results/tiny/digits-graph, which commit 1111111111 began" in said
    assert "--mix-commits" in said
    assert trained == []
    sweep("STUDY", "--rows", "moe", "--mix-commits")
    assert trained == ["moe 3", "moe 1"]
    assert json.loads(study.read_text())["commits"] == {"digits-graph": "1" * 40}


def test_of_what_was_not_run_only_what_was_asked_for_is_named(
    sweep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep of some rows whose price is beyond the budget, beside rows that have a price."""
    prices = {f"digits-graph/{row}": {"hours": 2.0} for row in ("moe", "dense", "wide")}
    write_json(Path("results/tiny/prices.json"), prices)
    sweep("STUDY", "--rows", "moe", "dense", "--budget", "3")
    out = capsys.readouterr().out
    assert "digits-graph: dense, not run, 2 hours" in out
    assert "wide, not run" not in out
    sweep("STUDY", "--rows", "moe", "dense", "--budget", "1")
    assert "1 cells are beyond the budget, or have no price" in capsys.readouterr().err


def test_a_cell_that_cannot_be_run_is_named(
    sweep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep("WRONG")
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert "| experts |" in shown.out
    assert "digits-graph/wrong: kmeans_init: got True" in shown.err


@pytest.mark.parametrize("price", [[], ["--price"]])
def test_what_is_said_of_data_is_said_once_and_a_download_that_fails_is_tried_once(
    price: list[str],
    sweep: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = list[str]()

    def fails(*_: Any, **options: Any) -> None:
        tried.append("cora")
        raise OSError("no network")

    monkeypatch.setitem(PYG, "cora", replace(PYG["cora"], cls=fails))
    Path("data").mkdir()
    write_npz(Path("data"))
    with pytest.raises(SystemExit) as stopped:
        sweep("NINE", *price)
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert tried == ["cora"]
    assert shown.out.count("downloading") == 1
    assert shown.err.count("the download failed: no network") == 1
    assert "cora/moe, cora/dense, cora/wide: cora: ind.cora.x, " in shown.err
    assert shown.out.count("mine: Data(") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("mine.py:STUDY --columns sea", "columns: got sea, expected some of digits-graph"),
        ("mine.py:STUDY --rows five", "rows: got five, expected some of moe, dense, wide"),
        ("mine.py:Row", "study: got 'mine.py:Row', expected an experiments.study.studies.Study"),
        ("mine.py:NOTHING", "study: got 'mine.py:NOTHING', which cannot be imported"),
        ("mine.py:STUDY --budget -1", "budget: got -1.0 with price=False, expected core-hours"),
        ("mine.py:STUDY --budget nan", "budget: got nan with price=False, expected core-hours"),
        ("mine.py:STUDY --price --budget 1", "budget: got 1.0 with price=True, expected"),
        ("routers --columns sea", "columns: got sea, expected some of digits, digits-graph, "),
    ],
)
def test_what_is_no_study_is_refused_before_anything_is_trained(
    args: str, message: str, sweep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(args.split(), capsys, main)
    assert not Path("runs").exists()
