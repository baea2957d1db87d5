"""The table of routers: its cells, and a router of one's own beside some of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.study import routers
from experiments.study.routers import TABLE, cell_tables
from experiments.study.sweep import main
from experiments.train.build import build_model
from experiments.train.config import ImageConfig
from experiments.train.files import read_json
from experiments.train.kinds import kind_of
from experiments.train.presets import DIGITS, DIGITS_GRAPH

SMALL = {
    "digits": replace(DIGITS, epochs=1, hidden=16, seeds=(0, 1)),
    "digits-graph": replace(DIGITS_GRAPH, epochs=1, hidden=8, seeds=(0, 1)),
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


def test_a_row_without_a_cell_is_left_out() -> None:
    cells: Any = {"digits": {"dense": {"config": {"seeds": [0]}, "test": {"values": [0.5]}}}}
    _, _, *lines = cell_tables(cells).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| dense"]


def test_every_cell_can_be_built() -> None:
    """Of the columns that need no file; one that is left out is no empty table."""
    with pytest.raises(ValueError, match="rows: got soft-slots, expected some that mosaic has"):
        TABLE.cells(("mosaic",), ("soft-slots",))
    for column in ("digits", "digits-graph", "mosaic"):
        task = kind_of(TABLE.columns[column]).tasks()(0)  # rows differ in their models alone
        for cell, config in TABLE.cells((column,)).items():
            assert build_model(config, task) is not None, cell


MINE = """
import torch

import gmoe


class Half(gmoe.Router):
    def __init__(self, dim, *, num_experts, k=1):
        super().__init__(dim, num_experts=num_experts, k=k, weight="score")

    def reset_parameters(self):
        pass

    def route(self, x_TD, group, edge_index):
        expert_TK = (torch.arange(len(x_TD))[:, None] + torch.arange(self.k)) % self.num_experts
        weight_TK = torch.full(expert_TK.shape, 0.5)
        return gmoe.Routing.from_choices(expert_TK, weight_TK, num_experts=self.num_experts)
"""


@pytest.fixture
def own(sweep: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)


def test_a_router_of_ones_own_is_a_row_beside_its_controls(
    own: None, sweep: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """On digits-graph, where nothing is named; its price comes first, its table behind each row."""
    sweep("--router", "mine.py:Half", "--k", "2", rows=())
    shown = capsys.readouterr()
    first, *_ = (line for line in shown.err.splitlines() if "cells to run" in line)
    assert re.fullmatch(r"4 cells to run, about [\d.]+ minutes of a core", first)
    assert shown.err.count("| `Half`, your own |") == 3
    head, _, mine, *controls, _ = [*shown.out.splitlines(), ""]
    columns = dict(zip(head.strip("| ").split(" | "), mine.strip("| ").split(" | "), strict=True))
    names = ("dense, equal active FLOPs", "token choice", "frozen random")
    for name in names:
        assert re.match(r"[+-][\d.]+ \(.* to .*\), \d of 2", columns[f"− {name}"])
    assert [line.split(" | ")[0] for line in controls] == [f"| {name}" for name in names]
    (cell,) = Path("routers-own-k2", "digits-graph").glob("own-Half-*.json")
    assert read_json(cell, dict[str, Any])["config"]["k"] == 2


def test_an_edited_router_is_a_new_row(own: None) -> None:
    before = list(routers.table(Path(), "mine.py:Half").rows)
    Path("mine.py").write_text(MINE.replace("0.5", "0.25"))
    after = list(routers.table(Path(), "mine.py:Half").rows)
    assert before[0] != after[0]
    assert before[1:] == after[1:] == list(routers.BESIDE)


@pytest.mark.parametrize(
    ("router", "k", "message"),
    [
        ("random", 1, "router: got 'random', expected FILE.py:Class"),
        ("mine.py:gmoe", 1, "router: got 'mine.py:gmoe', expected a subclass of gmoe.Router"),
        ("nowhere.py:Half", 1, "router: got 'nowhere.py:Half', which cannot be imported"),
        (None, 2, "k: got 2 without --router, expected 1"),
    ],
)
def test_what_is_no_router_is_refused(router: str | None, k: int, message: str, own: None) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        routers.table(Path(), router, k)


def test_soft_slots_start_dense() -> None:
    """The first forward is the dense model's.

    Slots are as many as tokens, and graphs are refused.
    """
    task = kind_of(DIGITS).tasks()(0)
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
        build_model(replace(DIGITS_GRAPH, router="soft_slots"), kind_of(DIGITS_GRAPH).tasks()(0))
