"""The swap benchmark: dense and MoE start alike, runs are kept and resumed, and the table says what was found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.nn import GCNConv

import gmoe
from experiments.benchmark import swap, swap_models
from experiments.benchmark.__main__ import main
from experiments.benchmark.swap_models import ROWS, Arm, Problem, Progress, Where
from experiments.benchmark.swap_table import is_ok, summary
from experiments.data.digits import digits
from experiments.studies import SMALL_VIT
from experiments.tables import render
from tests.experiments.pyg_data import Writer

NAMES = [name for name in ROWS if name.startswith(("cora", "citeseer")) or name in ("minesweeper", "mosaic")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("cora", "citeseer"):
        Writer(folder / "planetoid").write(name)
    platonov = Writer(folder / "heterophilous").write("minesweeper")
    (folder / "facebook.npz").write_bytes((platonov.folder / "minesweeper.npz").read_bytes())
    return folder


def where_in(root: Path, epochs: int | None = 2) -> Where:
    return Where(data_root=root, offline=True, device=torch.device("cpu"), epochs=epochs)


def arguments(root: Path, path: Path, *more: str) -> list[str]:
    where = ["--data-root", str(root), "--offline", "--json", str(path)]
    return ["swap", "--rows", "cora-gcn", "--epochs", "2", "--repeats", "1", *where, *more]


@pytest.mark.parametrize("name", [*NAMES, "facebook-sage"])
def test_dense_and_moe_start_alike(name: str, root: Path) -> None:
    where = where_in(root)
    problem = ROWS[name].load(where)(0)
    arms: tuple[Arm, ...] = (
        "dense",
        "moe",
        "random",
        *(arm for arm in ROWS[name].arms if arm in ("oracle", "k-means", "shared-transform")),
    )
    first, *others = (
        swap_models.evaluated(problem.forward, swap.drawn(problem, arm, problem.width, 3, where)) for arm in arms
    )
    for other in others:
        torch.testing.assert_close(other, first)


def test_a_vit_starts_alike_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = replace(SMALL_VIT, layers=2, dim=6, hidden=8, image_size=8, patch=4, epochs=1, precision="32-true")
    task = digits(0.0)
    monkeypatch.setattr(swap_models, "load_tasks", lambda _: lambda _: task)
    where = where_in(tmp_path, 1)
    problem = swap_models.images(config, where)(0)
    dense, moe = (swap.drawn(problem, arm, problem.width, 0, where) for arm in ("dense", "moe"))
    torch.testing.assert_close(*(swap_models.evaluated(problem.forward, model) for model in (dense, moe)))
    result = swap.train_arm(problem, "moe", 8, 0, tmp_path / "run", lambda _: None, where)
    assert len(result["share"]) == len(result["live"]) == 1
    assert (tmp_path / "run" / "checkpoint").exists()
    assert swap.train_arm(problem, "moe", 8, 0, tmp_path / "run", lambda _: None, where)["test"] == result["test"]


@pytest.mark.parametrize("name", ["cora-gat", "cora-linkpred", "cora-infomax", "minesweeper"])
def test_a_run_gives_all_figures(name: str, root: Path, tmp_path: Path) -> None:
    where = where_in(root)
    problem = ROWS[name].load(where)(0)
    result = swap.train_arm(problem, "moe", 4, 0, tmp_path, lambda _: None, where)
    assert 0 <= result["off"] <= 1
    assert len(result["share"]) == len(result["gain"]) > 0
    assert all(0 < share < 1 for share in result["share"])
    assert all(1 <= live <= 8 for live in result["live"])
    assert (result["val"] is None) == (name == "cora-infomax")
    assert "off" not in swap.train_arm(problem, "dense", 4, 0, tmp_path, lambda _: None, where)


def test_the_share_is_that_of_the_gain() -> None:
    x, edges = torch.randn(9, 5), torch.randint(9, (2, 30))
    torch.manual_seed(0)
    dense = GCNConv(5, 4)
    torch.manual_seed(0)
    layer = gmoe.MoEConv("gcn", 5, 4, num_experts=3).eval()
    assert layer.gain is not None
    with torch.no_grad():
        layer.gain.fill_(7.0)
        off, y = dense(x, edges), layer(x, edges)
    found = swap.routed_part(layer, lambda model: model(x, edges))
    assert found["share"] == [pytest.approx(float((y - off).norm() / y.norm()), rel=1e-4)]
    assert found["gain"] == [7.0]
    with swap.switched_off(layer):
        torch.testing.assert_close(layer(x, edges), off)
    torch.testing.assert_close(layer(x, edges), y)


def test_the_selected_epoch_is_tested(root: Path) -> None:
    vals = iter([0.3, 0.6, 0.6, 0.1])
    weights: list[torch.Tensor] = []
    problem = ROWS["cora-gcn"].load(where_in(root, 4))(0)

    def score(model: Any, part: str) -> float:
        weights.append(model.conv1.lin.weight.detach().clone())
        return next(vals)

    watched = replace(problem, score=score)
    model = swap.drawn(watched, "dense", 4, 0, where_in(root))
    assert swap.train(watched, model, lambda _: None) == (0.6, 2)
    torch.testing.assert_close(model.conv1.lin.weight, weights[1])  # type: ignore[union-attr]


def test_finished_runs_are_kept_and_missing_ones_added(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, trained = tmp_path / "swap.json", list[tuple[str, int]]()
    train_arm = swap.train_arm

    def counted(problem: Problem, arm: Arm, width: int, seed: int, *rest: Any) -> dict[str, Any]:
        if len(trained) == 3:
            trained.clear()
            raise KeyboardInterrupt
        trained.append((arm, seed))
        return train_arm(problem, arm, width, seed, *rest)

    monkeypatch.setattr(swap, "train_arm", counted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(root, path, "--seeds", "1"))
    kept = json.loads(path.read_text())["variants"]["cora-gcn"]
    assert list(kept["runs"]) == ["dense", "moe", "dense-flops"]
    main(arguments(root, path, "--seeds", "1"))
    assert trained == [("random", 0), ("shared-transform", 0)]
    found = json.loads(path.read_text())
    assert found["variants"]["cora-gcn"]["runs"]["moe"] == kept["runs"]["moe"]
    assert found["environment"]["threads"] == 1
    assert found["config"]["epochs"] == 2
    times = found["variants"]["cora-gcn"]["time"]
    assert {"dense", "moe", "dense-flops", "shared-transform"} < set(times)
    trained.clear()
    main(arguments(root, path, "--seeds", "2", "--arms", "random"))
    assert trained == [("dense", 1), ("moe", 1), ("random", 1)]
    assert json.loads(path.read_text())["variants"]["cora-gcn"]["time"] == times
    trained.clear()
    capsys.readouterr()
    main(arguments(root, path, "--seeds", "1"))  # shows what is there, the second seed too
    assert trained == []
    line = next(line for line in capsys.readouterr().out.splitlines() if "cora-gcn" in line)
    assert "│ 2 │" in line
    assert not list((tmp_path / "swap").glob("*"))
    assert "| cora-gcn | 2 | " in render("<!-- swap: swap -->\n<!-- end -->\n", tmp_path)


def test_other_epochs_are_another_run(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "swap.json"
    main(arguments(root, path, "--seeds", "1", "--arms", "random"))
    main([*arguments(root, path, "--seeds", "1", "--arms", "random"), "--epochs", "1"])
    runs = json.loads(path.read_text())["variants"]["cora-gcn"]["runs"]
    assert {arm: [run["epochs"] for run in of] for arm, of in runs.items()} == {"dense": [1], "moe": [1], "random": [1]}


def test_the_matched_model_has_the_flops(root: Path) -> None:
    where = where_in(root)
    found = swap.match(ROWS["mosaic"].load(where)(0), where, lambda _: None)
    assert found["hidden"] > 16
    assert found["flops"]["dense-flops"] == pytest.approx(found["flops"]["moe"], rel=0.1)


@pytest.mark.parametrize(
    ("dense", "moe", "ok"),
    [
        ([80.0, 82.0], [80.0, 80.0], True),  # 81 - 1.41 is 79.59
        ([80.0, 82.0], [79.5, 79.5], False),
        ([80.0], [80.0], True),
        ([80.0], [79.9], False),
    ],
)
def test_ok_is_within_a_standard_deviation(dense: list[float], moe: list[float], ok: bool) -> None:
    assert is_ok(dense, moe) == ok


def test_the_table_compares_the_seeds_that_both_have() -> None:
    moe = {"off": 0.7, "share": [0.1, 0.3], "live": [8.0, 4.0]}
    row = {
        "runs": {
            "dense": [{"seed": seed, "test": test} for seed, test in enumerate([0.8, 0.82, 0.1])],
            "moe": [{"seed": seed, "test": 0.83, **moe} for seed in (0, 1)],
        },
        "time": {arm: {"wall": {"median": s}} for arm, s in (("dense", 0.01), ("moe", 0.03), ("dense-flops", 0.02))}
        | {"layers": 2, "shared-transform": {"wall": {"median": 0.015}}},
    }
    line = summary(row)
    assert (line["n"], line["dense"], line["moe"]) == ("2", "81.00 ± 1.41", "83.00 ± 0.00")
    assert (line["moe − dense"], line["ok"], line["moe-off"]) == ("+2.00", "ok", "70.00 ± 0.00")
    assert (line["share"], line["live"], line["random"]) == ("0.10 0.30", "8 4", "–")
    assert (line["ms dense / moe / flops"], line["×"], line["+ms a layer"]) == ("10.0 / 30.0 / 20.0", "3.00", "10.0")
    assert line["× shared-transform"] == "1.50"
    assert summary({"runs": {}, "time": None})["ok"] == "–"


def test_progress_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("experiments.benchmark.swap_models.time.monotonic", lambda: now[0])
    say = Progress("row")
    for now[0] in range(12):
        say(f"{now[0]}")
    assert capsys.readouterr().out == "row: 5\nrow: 10\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rows", "nothing"], "rows: got nothing, expected some of cora-gcn"),
        (["--seeds", "0"], "seeds: got 0, expected at least 1"),
        (["--epochs", "0"], "epochs: got 0, expected at least 1"),
        (["--rows", "facebook-sage"], "facebook.npz, which does not exist"),
    ],
)
def test_bad_options(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["swap", "--offline", "--data-root", str(tmp_path), *args])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
