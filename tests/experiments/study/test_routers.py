"""The table of routers: its cells, what they measure, and that they go on when cut off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.show.cells import Cells
from experiments.study import routers
from experiments.study.measured import measured
from experiments.study.routers import TABLE, cell_tables, read_table
from experiments.study.sweep import main
from experiments.train.build import build_model
from experiments.train.config import ImageConfig
from experiments.train.data.load import load_tasks
from experiments.train.loop import run
from experiments.train.presets import DIGITS, DIGITS_GRAPH

SMALL = {
    "digits": replace(DIGITS, epochs=1, hidden=16, seeds=(0, 1)),
    "digits-graph": replace(DIGITS_GRAPH, epochs=3, hidden=8, seeds=(0, 1)),
}
ROWS = ("dense", "dense-flops", "token-choice")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run small cells."""
    monkeypatch.setattr(routers, "TABLE", replace(TABLE, columns=SMALL))

    def run(*args: str, rows: tuple[str, ...] = ROWS) -> None:
        folders = ("--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--no-progress")
        main(["routers", *folders, "--rows", *rows, *args])

    return run


@pytest.mark.slow
def test_cells_are_measured_once(sweep: Callable[..., None], tmp_path: Path, capsys: Any) -> None:
    """A cell holds the summary, the part of the routed experts and step times.

    What is there is not run again.
    """
    sweep("--columns", "digits-graph")
    assert "token choice" in capsys.readouterr().out
    cells = read_table(tmp_path / "routers")
    cell, dense = cells["digits-graph"]["token-choice"], cells["digits-graph"]["dense"]
    assert dense["routed"] is None
    assert dense["test"]["n"] == cell["routed"]["off"]["n"] == 2
    assert [0 < share < 1 for share in cell["routed"]["share"][0]["values"]] == [True, True]
    assert set(cell["time"]) == {"dense", "cell", "dense-csr"}
    assert line_of(cells, "token choice")["− equal FLOPs"].startswith(("+", "-"))
    path = tmp_path / "routers" / "digits-graph" / "token-choice.json"
    before = path.stat().st_mtime_ns
    (tmp_path / "routers" / "digits-graph" / "dense.json").unlink()
    sweep("--columns", "digits-graph")  # from its run folder
    assert path.stat().st_mtime_ns == before
    assert read_table(tmp_path / "routers")["digits-graph"]["dense"]["test"] == dense["test"]


def test_a_row_without_a_cell_is_left_out() -> None:
    cells: Any = {"digits": {"dense": {"config": {"seeds": [0]}, "test": {"values": [0.5]}}}}
    _, _, *lines = cell_tables(cells).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| dense"]


def line_of(cells: Cells, label: str) -> dict[str, str]:
    """A row of digits-graph, by column of its table."""
    head, _, *lines = cell_tables(cells, ["digits-graph"]).splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {label}"))
    return dict(zip(head.split(" | "), line.split(" | "), strict=True))


def test_another_recipe_is_refused(
    sweep: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sweep("--columns", "digits-graph", rows=("dense",))
    other = {"digits-graph": replace(SMALL["digits-graph"], hidden=9)}
    monkeypatch.setattr(routers, "TABLE", replace(TABLE, columns=other))
    with pytest.raises(SystemExit):
        sweep("--columns", "digits-graph", rows=("dense",))
    assert "hidden=8" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("row", ["token-choice", "soft-slots"])
def test_experts_that_were_not_trained_add_nothing(row: str, tmp_path: Path) -> None:
    """At a learning rate of 0 their share is 0, and the test set says the same without them."""
    (config,) = routers.cells(("digits",), (row,), tmp_path).values()
    config = replace(config, lr=0.0, epochs=1, seeds=(0,), out=tmp_path / "run", progress=False)
    summary, cell = run(config), measured(config)
    assert cell["routed"]["off"]["mean"] == summary["test"]["mean"]
    assert {share["mean"] for share in cell["routed"]["share"]} == {0.0}


def test_every_cell_can_be_built(tmp_path: Path) -> None:
    """Of the columns that need no file; one that is left out is no empty table."""
    with pytest.raises(ValueError, match="rows: got k-means, expected some that cifar10 has"):
        routers.cells(("cifar10",), ("k-means",), tmp_path)
    for cell, config in routers.cells(("digits", "digits-graph", "mosaic"), (), tmp_path).items():
        assert build_model(config, load_tasks(config)(0)) is not None, cell


def test_soft_slots_start_dense() -> None:
    """The first forward is the dense model's.

    Slots are as many as tokens, and graphs are refused.
    """
    task = load_tasks(DIGITS)(0)
    images = next(iter(task.loader("test", 8, None))).inputs[0]
    outputs = []
    for router in ("dense", "soft_slots"):
        torch.manual_seed(0)
        model: Any = build_model(replace(DIGITS, router=router), task).eval()
        outputs.append(model(images))
    assert torch.equal(*outputs)
    assert isinstance(DIGITS, ImageConfig)
    assert model.encoder.layers[1].mlp.soft.router.slots == 3  # 24 for 17 tokens
    with pytest.raises(ValueError, match="router: got 'soft_slots' for digits-graph"):
        build_model(replace(DIGITS_GRAPH, router="soft_slots"), load_tasks(DIGITS_GRAPH)(0))
