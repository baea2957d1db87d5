"""What a study costs before it is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.show.cells import read_prices
from experiments.study import studies
from experiments.study.price import price, price_cells
from experiments.study.sweep import main
from experiments.train.build import build_model, num_parameters
from experiments.train.kinds import kind_of
from experiments.train.presets import DIGITS, DIGITS_GRAPH

SMALL = replace(DIGITS, hidden=16, layers=2, batch_size=300, epochs=2, every=1, progress=False)


def test_hours_follow_from_steps() -> None:
    one = price(replace(SMALL, router="dense", seeds=(0, 1, 2)))
    assert one["runs"] == 3
    steps = 3 * 2 * 3  # an epoch of 898 images has three
    hours = steps * one["step"] / 3600
    assert hours < one["hours"] < 3 * hours  # validation is a part of it
    assert 0 < one["inference"] < one["step"]


def test_memory_is_that_of_weights_gradients_moments_and_activations() -> None:
    wide = replace(DIGITS_GRAPH, router="dense", hidden=300, progress=False)
    task = kind_of(wide).tasks()(0)
    weights = 4 * num_parameters(build_model(wide, task))
    activation = 4 * 1797 * 300
    beside_weights = price(wide)["memory"] - 4 * weights
    assert activation < beside_weights < 10 * activation


def test_a_study_is_priced_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dataclasses import replace\n"
        f"from {studies.__name__} import Row, Study\n"
        "from experiments.train.presets import DIGITS\n"
        "rows = {'dense': Row(label='dense', changes={'router': 'dense'})}\n"
        "rows['experts'] = Row(label='experts')\n"
        "columns = {'digits': replace(DIGITS, batch_size=300, layers=2)}\n"
        "STUDY = Study(name='mine', about='', columns=columns, rows=rows)\n"
    )
    main(["mine.py:STUDY", "--price"])
    table = capsys.readouterr().out
    assert "| `digits/dense` | 3 |" in table
    assert "core-hours in all" in table
    written = list(tmp_path.glob("**/*.json"))
    assert [path.relative_to(tmp_path) for path in written] == [Path("results/mine/prices.json")]


def test_a_cell_without_data_has_no_price_and_the_others_have(tmp_path: Path) -> None:
    lacking = replace(DIGITS_GRAPH, dataset="packages", data_root=tmp_path)
    wide = replace(DIGITS_GRAPH, router="dense", hidden=10**9)
    cells = {"a": lacking, "b": replace(SMALL, router="dense"), "c": wide}
    table, failed = price_cells(cells, tmp_path)
    assert [*read_prices(tmp_path)] == ["b"]
    assert "`b`" in table
    assert f"{tmp_path / 'packages.npz'} missing" in failed["a"]
    assert failed["c"].startswith("hidden: got 1000000000, with which training holds at least")


def test_prices_of_other_cells_stay(tmp_path: Path) -> None:
    dense = replace(SMALL, router="dense")
    price_cells({"a": dense}, tmp_path)
    before = read_prices(tmp_path)["a"]
    price_cells({"b": replace(dense, seeds=(0,))}, tmp_path)
    after = read_prices(tmp_path)
    assert after["a"] == before
    assert after["b"]["runs"] == 1
