"""What a study costs before it is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gmoe
from experiments.show.cells import read_prices
from experiments.study import studies
from experiments.study.price import price, price_cells, routed_part
from experiments.study.sweep import main
from experiments.train.presets import DIGITS

SMALL = replace(DIGITS, hidden=16, layers=2, batch_size=300, epochs=2, every=1, progress=False)
SIZE = {
    "image_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 16,
}


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_routed_share_of_flops_by_hand(start: Any, every: int) -> None:
    """17 tokens through two layers of 8 x 16, and 8 x 4 of the router, each multiply-add two."""
    model = gmoe.ViTMoE(SIZE, 10, "token_choice", num_experts=4, start=start, every=every)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        whole, routed = routed_part(model, (images,), gmoe.count_flops)
        dense = gmoe.count_flops(gmoe.ViTMoE(SIZE, 10, router=None), images)
    experts = 3 * 17 * 2 * (2 * 8 * 16)
    router = 3 * 17 * 2 * 8 * 4
    layers = 2 // every
    assert whole - dense == pytest.approx(
        layers * (router + (experts if start == "shared" else 0)), rel=0.1
    )
    assert routed == pytest.approx(layers * (router + experts), rel=0.05)


def test_a_dense_model_routes_nothing_and_hours_follow_from_steps() -> None:
    one = price(replace(SMALL, router="dense", seeds=(0, 1, 2)))
    assert one["routed_flops"] == one["routed_seconds"] == 0
    assert one["runs"] == 3
    images = 898 * 2 * 3
    hours = images / one["per_second"] / 3600
    assert hours < one["hours"] < 3 * hours  # validation is a part of it
    routed = price(replace(SMALL, router="token_choice", start="copies", seeds=(0,)))
    assert 0 < routed["routed_seconds"] < 1
    assert 0.05 < routed["routed_flops"] < 0.9


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


def test_prices_of_other_cells_stay(tmp_path: Path) -> None:
    dense = replace(SMALL, router="dense")
    assert "routed" not in price_cells({"a": dense}, tmp_path)
    before = read_prices(tmp_path)["a"]
    price_cells({"b": replace(dense, seeds=(0,))}, tmp_path)
    after = read_prices(tmp_path)
    assert after["a"] == before
    assert after["b"]["runs"] == 1
