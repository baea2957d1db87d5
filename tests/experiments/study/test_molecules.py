"""The study of molecules: what is run, whether it can be, and what the table says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gmoe
from experiments.study.molecules import ARMS, BESIDE, COLUMNS, Column, gains, runs, table
from experiments.study.sweep import main
from experiments.train.build import build_model, costs_of
from experiments.train.data.load import load_tasks
from tests.experiments.molecule_data import write_set


def test_every_arm_is_run_on_every_set_on_one_recipe() -> None:
    found = runs((), Path("data"))
    assert len(found) == len(ARMS) * len(COLUMNS) == 60
    for name, config in found.items():
        column, _, arm = name.partition("/")
        is_long = column.startswith("molbace-100")
        assert config.dataset == ("ogbg-molbace" if is_long else f"ogbg-{column}")
        assert config.seeds == COLUMNS[column].seeds
        recipe = (config.hidden, config.layers, config.epochs, config.lr, config.batch_size)
        assert recipe == (64, 5, 100 if is_long else 20, 0.001, 32), arm
    of_molbace = [COLUMNS[column].seeds for column in ("molbace-100", "molbace-100-fresh")]
    assert not set(of_molbace[0]) & set(of_molbace[1])
    with pytest.raises(ValueError, match="columns: got 'cora', expected one of molbace"):
        runs(["cora"], Path("data"))


def test_every_arm_can_be_built_and_costs_what_it_should(tmp_path: Path) -> None:
    write_set(tmp_path, "ogbg-molesol")
    costs, models = dict[str, Any](), dict[str, Any]()
    for name, config in runs(["molesol"], tmp_path).items():
        arm, small = name.partition("/")[2], replace(config, hidden=16, layers=2)
        task = load_tasks(small)(0)
        torch.manual_seed(0)
        models[arm] = build_model(small, task)
        costs[arm] = costs_of(models[arm], small, task)
    for arm in ("dense-flops", "dense-parameters", "gmoe-flops"):
        assert costs[arm]["matched"] == pytest.approx(1, abs=0.1)
    for arm in ("default", "graph", "gmoe", "quiet"):
        assert costs[arm]["flops"] == pytest.approx(costs[BESIDE[arm]]["flops"], rel=0.1)
    # A molecule's atoms share their expert, so that no atom is transformed twice.
    assert costs["graph"]["flops"] < 1.1 * costs["dense"]["flops"] < costs["default"]["flops"]
    first, *_ = (part for part in models["gmoe"].modules() if isinstance(part, gmoe.MoEConv))
    assert isinstance(first.router, gmoe.TokenChoice)
    assert (first.router.balance, first.router.k) == ("importance_load", 4)
    assert models["gmoe"].shared_router is None
    assert [type(first.expert(expert)).__name__ for expert in range(2)] == [
        "BondGCNConv",
        "FilterConv",
    ]


def summary(metric: str, *scores: float, flops: int = 10) -> dict[str, Any]:
    mean = sum(scores) / len(scores)
    test = {"values": scores, "mean": mean, "std": 0.01, "n": len(scores)}
    return {"metric": metric, "test": test, "flops": flops, "parameters": 1234}


def test_gains_are_points_or_the_decrease_of_an_error() -> None:
    scores = {
        "default": summary("roc_auc", 0.8, 0.7),
        "dense-flops": summary("roc_auc", 0.7, 0.75),
        "gmoe": summary("roc_auc", 0.5, 0.5),
        "gmoe-flops": summary("roc_auc", 0.4, 0.4),
    }
    assert gains(scores, "default") == pytest.approx([10, -5])
    assert gains(scores, "gmoe") == pytest.approx([10, 10])
    errors = {"default": summary("rmse", 0.8), "dense-flops": summary("rmse", 1.0)}
    assert gains(errors, "default") == pytest.approx([0.2])
    errors["dense"] = summary("rmse", 1.0, flops=5)
    _, _, dense, _, default = table({"molesol": errors}).splitlines()
    assert default == (
        "| molesol | experts, the default | rmse | 1 | 0.8000 ± 0.0100 | +0.2000 | 2.00 | 1,234 |"
    )
    assert dense.startswith("| molesol | dense | rmse | 1 | 1.0000 ± 0.0100 | – | 1.00 |")
    assert table({}) == "no arm is finished yet"


def test_the_sweep_runs_them_and_finds_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.study import molecules

    write_set(tmp_path / "data", "ogbg-molesol")
    tiny = {
        arm: (label, replace(config, hidden=8, layers=2, epochs=1))
        for arm, (label, config) in ARMS.items()
        if arm in ("dense", "graph")
    }
    monkeypatch.setattr(molecules, "ARMS", tiny)
    monkeypatch.setattr(molecules, "COLUMNS", {"molesol": Column("ogbg-molesol", (0,), 1)})
    args = ["molecules", "--data-root", str(tmp_path / "data"), "--results", str(tmp_path)]
    args += ["--runs", str(tmp_path / "runs"), "--no-progress"]
    for _ in range(2):
        main(args)
        out = capsys.readouterr().out
        assert "| molesol | experts, each molecule to one | rmse | 1 |" in out
    files = sorted(path.stem for path in (tmp_path / "molecules" / "molesol").iterdir())
    assert files == ["dense", "graph"]
