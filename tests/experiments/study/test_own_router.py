"""A row of the user's own in the table of routers, beside its controls."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.study import measured, routers
from experiments.study.own_router import own_row
from experiments.study.sweep import main
from experiments.train import loop
from experiments.train.build import build_model, costs_of
from experiments.train.data.load import load_tasks
from experiments.train.presets import DIGITS, DIGITS_GRAPH
from tests.helpers import own_parts
from tests.helpers.command import refused

SMALL = {
    "digits": replace(DIGITS, epochs=1, batch_size=256, dim=16, hidden=16, layers=2, seeds=(0, 1)),
    "digits-graph": replace(DIGITS_GRAPH, epochs=3, hidden=8, seeds=(0, 1)),
}
MINE = '''
import torch
from torch import nn
from torch_geometric.nn import MessagePassing

import gmoe


class Half(gmoe.Router):
    """Even tokens to the first expert, odd ones to the second, each with a weight of one half."""

    def __init__(self, dim, *, num_experts, k=1):
        super().__init__(dim, num_experts=num_experts, k=k, weight="score")

    def reset_parameters(self):
        pass

    def route(self, x_TD, group, edge_index):
        expert_TK = (torch.arange(len(x_TD))[:, None] + torch.arange(self.k)) % self.num_experts
        weight_TK = torch.full(expert_TK.shape, 0.5)
        return gmoe.Routing.from_choices(expert_TK, weight_TK, num_experts=self.num_experts)


class Greedy(Half):
    """Tokens compete: each expert takes the two that it scores highest, the others have none."""

    def __init__(self, dim, *, num_experts, k=1):
        super().__init__(dim, num_experts=num_experts, k=k)
        self.gate = nn.Linear(dim, num_experts)

    def route(self, x_TD, group, edge_index):
        scores_TE = self.gate(x_TD).softmax(dim=1)
        best = scores_TE.topk(2, dim=0)
        token, order = best.indices.sort(dim=0)
        weight = best.values.gather(0, order).T.flatten()
        offsets = 2 * torch.arange(1, self.num_experts + 1, dtype=torch.int32)
        return gmoe.Routing(token.T.flatten(), offsets, weight, scores_TE, len(x_TD))


class Costly(Half):
    """Half, after a product that costs as much as a layer."""

    def __init__(self, dim, *, num_experts, k=1):
        super().__init__(dim, num_experts=num_experts, k=k)
        self.slow = nn.Linear(dim, 64)

    def route(self, x_TD, group, edge_index):
        self.slow(x_TD)
        return super().route(x_TD, group, edge_index)


class Broken(Half):
    def route(self, x_TD, group, edge_index):
        return nn.Linear(3, 2)(torch.zeros(4))  # which torch refuses


class Mean(MessagePassing):
    """A linear map of the mean over in-neighbors."""

    def __init__(self, in_channels, out_channels):
        super().__init__(aggr="mean")
        self.lin = nn.Linear(in_channels, out_channels)

    def reset_parameters(self):
        self.lin.reset_parameters()

    def forward(self, x, edge_index):
        return self.lin(self.propagate(edge_index, x=x))
'''


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command in a folder of its own, which holds mine.py, on small columns.

    No step is timed, which the tests of the table do.
    """
    monkeypatch.setattr(routers, "TABLE", replace(routers.TABLE, columns=SMALL))
    monkeypatch.setattr(measured, "step_times", lambda *_: {})
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)

    def run(*args: str, columns: tuple[str, ...] = ("digits-graph",)) -> None:
        main(["routers", "--no-progress", "--columns", *columns, *args])

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained from here on, by row and seed."""
    ran = list[str]()
    train_seed = loop.train_seed

    def watch(fabric: Any, config: Any, *rest: Any) -> Any:
        folder = config.folder()
        ran.append(f"{re.sub('-[0-9a-f]{8}', '', folder.name)} {rest[1]}")
        return train_seed(fabric, config, *rest)

    monkeypatch.setattr(loop, "train_seed", watch)
    return ran


def cell(row: str, column: str = "digits-graph") -> dict[str, Any]:
    """A finished cell, by the beginning of its file's name."""
    (path,) = Path("results", "routers", column).glob(f"{row}.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def table(name: str) -> list[dict[str, str]]:
    """The lines of the CSV file that begins with a name."""
    (path,) = Path("results", "routers").glob(f"{name}*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_row_is_compared_with_its_controls_seed_by_seed(
    sweep: Callable[..., None], capsys: Any
) -> None:
    """The router's weights sum to a half, on a graph and on images."""
    sweep("--router", "mine.py:Half", columns=("digits-graph", "digits"))
    lines = table("own-Half-")
    labels = ["dense, equal active FLOPs", "token choice", "frozen random"]
    assert [(line["data"], line["minus"]) for line in lines] == [
        (column, label) for column in ("digits", "digits-graph") for label in labels
    ]
    mine, other = cell("own-Half-????????"), cell("own-Half-????????-dense-flops")
    pairs = zip(mine["test"]["values"], other["test"]["values"], strict=True)
    expected = [f"{100 * (a - b):.4f}" for a, b in pairs]
    assert lines[3]["by_seed"].split() == expected
    assert float(lines[3]["low"]) < float(lines[3]["mean"]) < float(lines[3]["high"])
    shown = capsys.readouterr().out
    assert "| data | Half, test (%) | − dense, equal active FLOPs (points) |" in shown
    written = sorted(path.suffix for path in Path("results", "routers").glob("own-Half-*"))
    assert written == [".csv", ".png", ".svg", ".tex"]
    (latex,) = Path("results", "routers").glob("own-Half-*.tex")
    assert r"digits-graph ($n = 2$) & $" in latex.read_text()


def test_what_is_there_is_not_trained_again(
    sweep: Callable[..., None], trained: list[str], capsys: Any
) -> None:
    """Of a router whose tokens compete."""
    sweep("--rows", "dense-flops", "token-choice")
    trained.clear()
    sweep("--router", "mine.py:Greedy")
    assert cell("own-Greedy-????????")["routing"][0]["coverage"]["mean"] < 0.1
    assert len(table("own-Greedy-")) == 3
    rows = ("own-Greedy", "random", "own-Greedy-dense-flops")
    assert trained == [f"{row} {seed}" for row in rows for seed in (0, 1)]
    trained.clear()
    sweep("--router", "./mine.py:Greedy")
    assert trained == []
    Path("mine.py").write_text(MINE.replace("topk(2,", "topk(3,"))
    # A file is imported once a process, which the command is.
    from experiments.train import user_code

    user_code._load_file.cache_clear()
    with pytest.raises(SystemExit):  # for it takes three, and says two
        sweep("--router", "mine.py:Greedy")
    assert trained == ["own-Greedy 0"]  # edited code is a row of its own


@pytest.mark.slow
def test_a_control_of_another_recipe_is_named_and_not_compared(
    sweep: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sweep("--rows", "random")
    other = {"digits-graph": replace(SMALL["digits-graph"], epochs=1)}
    monkeypatch.setattr(routers, "TABLE", replace(routers.TABLE, columns=other))
    with pytest.raises(SystemExit) as stop:
        sweep("--router", "mine.py:Half")
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert "digits-graph/random: results: " in shown.err
    assert "with epochs=3, expected 1" in shown.err
    assert "digits-graph: not compared with random, which is not there" in shown.out
    assert [line["minus"] for line in table("own-")] == [
        "dense, equal active FLOPs",
        "token choice",
    ]


@pytest.mark.slow
def test_a_router_of_other_flops_has_a_dense_model_of_its_own(sweep: Callable[..., None]) -> None:
    sweep("--router", "mine.py:Costly")
    mine, usual = cell("own-Costly-????????"), cell("dense-flops")
    matched = cell("own-Costly-????????-dense-flops")
    assert mine["flops"] > 1.02 * usual["flops"]
    assert matched["config"]["equal_to"] == "mine.py:Costly"
    assert abs(matched["matched"] - 1) < abs(usual["flops"] / mine["flops"] - 1)
    ratio = mine["flops"] / matched["flops"]
    assert float(table("own-Costly-")[0]["flops_ratio"]) == pytest.approx(ratio, abs=1e-4)


@pytest.mark.filterwarnings("ignore:Mean runs on the whole graph for every expert")
@pytest.mark.slow
def test_your_conv_takes_the_place_of_the_columns(sweep: Callable[..., None]) -> None:
    """By itself it is compared under token choice; its controls lie beside the column's."""
    sweep("--conv", "mine.py:Mean", "--k", "2")
    column = next(Path("results", "routers").glob("digits-graph*")).name
    assert column.startswith("digits-graph+Mean-")
    assert column.endswith("+k2")
    found = {row: cell(row, column)["config"] for row in ("dense-flops", "token-choice", "random")}
    assert {tuple(config["conv"]) for config in found.values()} == {("mine.py:Mean",)}
    assert {config["k"] for config in found.values()} == {2}
    assert [line["minus"] for line in table("own+Mean-")] == [
        "dense, equal active FLOPs",
        "frozen random",
    ]
    sweep("--router", "mine.py:Half", "--conv", "mine.py:Mean", "--k", "2")
    assert len(table("own-Half-")) == 3


def test_a_router_that_raises_is_named_and_other_columns_go_on(
    sweep: Callable[..., None], trained: list[str], capsys: Any
) -> None:
    with pytest.raises(SystemExit) as stop:
        sweep("--router", "mine.py:Broken", columns=("digits-graph", "digits"))
    assert stop.value.code == 1
    shown = capsys.readouterr()
    for column in SMALL:
        assert f"{column}/own-Broken-" in shown.err
    line = 1 + MINE.splitlines().index(
        "        return nn.Linear(3, 2)(torch.zeros(4))  # which torch refuses"
    )
    assert shown.err.count("RuntimeError: ") == shown.err.count(f"mine.py, line {line})") == 2
    assert "No cell of the row is finished." in shown.out
    assert set(trained) == {"own-Broken 0"}  # no control


def test_a_row_is_called_after_the_class_and_what_its_file_holds() -> None:
    """Whether it is named as a file or as a module."""
    by_module = own_row(f"{own_parts.__name__}:FirstBits", None, None)
    by_file = own_row(f"{own_parts.__file__}:FirstBits", None, None)
    assert by_module.row == by_file.row
    assert re.fullmatch("own-FirstBits-[0-9a-f]{8}", by_module.row)
    assert by_module.label == "FirstBits"


ONE = """
import gmoe

class One(gmoe.RandomRouter):
    def __init__(self, dim, *, num_experts):
        super().__init__(dim, num_experts=num_experts)
"""


def test_one_expert_a_token_is_what_the_tables_cells_have() -> None:
    name = f"{own_parts.__name__}:FirstBits"
    assert own_row(name, None, 1) == replace(own_row(name, None, None), k=1)
    assert own_row(name, None, 2).suffix == "+k2"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--router raises.py:Half", "which raised ZeroDivisionError: division by zero ("),
        ("--router raises.py:Half", "raises.py, line 2)"),
        ("--router mine.py:Nothing", "mine.py:Nothing', which cannot be imported"),
        ("--router nowhere.py:Half", "nowhere.py:Half', which cannot be imported"),
        ("--router mine.py:Mean", "expected a subclass of gmoe.Router"),
        ("--router expert_choice", "routers of the table are --rows"),
        ("--conv mine.py:Nothing", "conv: got 'mine.py:Nothing', which cannot be imported"),
        ("--conv nothing", "conv: got 'nothing'"),
        ("--conv mine.py:Mean --columns digits", "conv: got 'mine.py:Mean' for digits"),
        ("--router mine.py:Half --rows dense", "rows: got dense, expected none with --router"),
        ("--router mine.py:Half --columns corra", "columns: got corra, expected some of"),
        ("--k 2", "k: got 2, expected none without --router or --conv"),
        ("--router fixed.py:One --k 2", "k: got 2, expected 1: fixed.py:One has no argument k"),
    ],
)
def test_what_cannot_be_a_row_is_refused_before_anything_is_trained(
    args: str, message: str, sweep: Callable[..., None], capsys: Any
) -> None:
    Path("raises.py").write_text("\n1 / 0\n")
    Path("fixed.py").write_text(ONE)
    assert message in refused(["routers", *args.split()], capsys, main)
    assert not Path("runs").exists()


def test_the_dense_model_of_equal_flops_is_that_of_the_tables_shape(tmp_path: Path) -> None:
    """By default experts are copies on a graph, which cost less than beside a shared expert."""
    rows = routers.cells(("mosaic",), ("dense-flops", "token-choice"), tmp_path)
    task = load_tasks(rows["mosaic/token-choice"])(0)
    flops = [costs_of(build_model(own, task), own, task)["flops"] for own in rows.values()]
    assert flops[0] == pytest.approx(flops[1], rel=0.03)
