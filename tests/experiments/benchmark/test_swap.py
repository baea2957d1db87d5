"""The swap benchmark: dense and MoE start alike, and runs are kept and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch_geometric.nn import GCNConv

import gmoe
from experiments.benchmark import swap
from experiments.benchmark.__main__ import main
from experiments.benchmark.swap import ROWS, Arm, Preset, Problem
from experiments.study.pages import render
from experiments.train.config import ImageConfig
from experiments.train.data.images import digits
from experiments.train.presets import SMALL_VIT
from experiments.train.routing_stats import switched_off
from tests.experiments.pyg_data import write_raw


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("cora", "citeseer"):
        write_raw(name, folder / "planetoid")
    platonov = write_raw("minesweeper", folder / "heterophilous")
    (folder / "facebook.npz").write_bytes((platonov.folder / "minesweeper.npz").read_bytes())
    return folder


def problem_of(name: str, root: Path, epochs: int = 2) -> Problem:
    problem, config, _ = ROWS[name]
    return problem(
        replace(config, data_root=root / config.data_root, epochs=epochs, offline=True), 0
    )


@pytest.mark.parametrize("name", [name for name in ROWS if name != "cifar10-vit"])
def test_dense_and_moe_start_alike(name: str, root: Path) -> None:
    problem = problem_of(name, root)
    arms: tuple[Arm, ...] = (
        "dense",
        "moe",
        *(arm for arm in ROWS[name][2] if arm != "dense-flops"),
    )
    models = (problem.drawn(arm, problem.config.hidden) for arm in arms)
    first, *others = (swap.evaluated(problem.forward, model) for model in models)
    for other in others:
        torch.testing.assert_close(other, first)


def test_a_vit_starts_alike_too_and_resumes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(
        SMALL_VIT, layers=2, dim=6, hidden=8, image_size=8, patch=4, precision="32-true", epochs=1
    )
    task = digits(ImageConfig(dataset="digits"))
    monkeypatch.setattr(swap, "load", lambda _: lambda _: task)
    problem = Preset(config, 0)
    dense, moe = (problem.drawn(arm, 8) for arm in ("dense", "moe"))
    torch.testing.assert_close(*(swap.evaluated(problem.forward, model) for model in (dense, moe)))
    result = swap.train_arm(problem, "shared", 8, tmp_path / "run")
    assert len(result["share"]) == len(result["live"]) == 1
    assert (tmp_path / "run" / "checkpoint").exists()
    assert swap.train_arm(problem, "shared", 8, tmp_path / "run")["test"] == result["test"]


@pytest.mark.parametrize("arm", ["moe", "shared"])
@pytest.mark.parametrize("name", ["cora-gat", "cora-linkpred", "cora-infomax", "minesweeper"])
def test_a_run_gives_all_figures(name: str, arm: swap.Arm, root: Path, tmp_path: Path) -> None:
    result = swap.train_arm(problem_of(name, root), arm, 4, tmp_path)
    assert 0 <= result["off"] <= 1
    assert all(0 < share < 1 for share in result["share"])
    assert all(1 <= live <= 8 for live in result["live"])
    assert (result["val"] is None) == (name == "cora-infomax")


def test_the_share_is_that_of_what_started_at_zero() -> None:
    x, edges = torch.randn(9, 5), torch.randint(9, (2, 30))
    torch.manual_seed(0)
    dense = GCNConv(5, 4)
    torch.manual_seed(0)
    layer: Any = gmoe.MoEConv("gcn", 5, 4, num_experts=3, start="shared").eval()
    with torch.no_grad():
        layer.gain.fill_(7.0)
        off, y = dense(x, edges), layer(x, edges)
    found = swap.routed_share(layer, lambda model: model(x, edges))
    assert found == [pytest.approx(float((y - off).norm() / y.norm()), rel=1e-4)]
    torch.testing.assert_close(switched_off(layer)(x, edges), off)
    torch.testing.assert_close(layer(x, edges), y)


def test_the_selected_epoch_is_tested(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vals, weights, problem = (
        iter([0.3, 0.6, 0.6, 0.1]),
        list[torch.Tensor](),
        problem_of("cora-gcn", root, epochs=4),
    )

    def score(model: Any, part: str) -> float:
        weights.append(model[1].lin.weight.detach().clone())
        return next(vals)

    monkeypatch.setattr(problem, "score", score)
    model: Any = problem.drawn("dense", 4)
    assert problem.train(model, tmp_path) == (0.6, 2)
    torch.testing.assert_close(model[1].lin.weight.detach(), weights[1])


def test_finished_runs_are_kept_and_others_added(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, trained = tmp_path / "swap.json", list[tuple[str, int]]()
    train_arm, (problem, config, arms) = swap.train_arm, ROWS["cora-gcn"]
    monkeypatch.setitem(ROWS, "cora-gcn", (problem, replace(config, epochs=2), arms))

    def counted(problem: Problem, arm: Arm, *rest: Any) -> dict[str, Any]:
        if len(trained) == 3:
            trained.clear()
            raise KeyboardInterrupt
        trained.append((arm, problem.seed))
        return train_arm(problem, arm, *rest)

    def run(*options: str) -> dict[str, Any]:
        trained.clear()
        command = f"swap --rows cora-gcn --repeats 1 --offline --data-root {root} --json {path}"
        main([*command.split(), *options])
        return dict(json.loads(path.read_text())["variants"]["cora-gcn"])

    monkeypatch.setattr(swap, "train_arm", counted)
    with pytest.raises(SystemExit, match="130"):
        run("--seeds", "1")
    kept = json.loads(path.read_text())["variants"]["cora-gcn"]["runs"]
    row = run("--seeds", "1")
    assert trained == [("dense-flops", 0), ("random", 0), ("shared-transform", 0)]
    assert row["runs"] | kept == row["runs"]
    assert {"dense", "moe", "dense-flops", "shared-transform"} < set(row["time"])
    assert run("--seeds", "2", "--arms", "random")["time"] == row["time"]
    assert trained == [("dense", 1), ("moe", 1), ("random", 1)]
    run("--seeds", "1")  # shows what is there, the second seed too
    assert trained == []
    assert not list((tmp_path / "swap").glob("*"))
    assert "| cora-gcn | 2 | " in render("<!-- swap: swap -->\n<!-- end -->\n", tmp_path)
    with FileLock(tmp_path / "swap.lock"), pytest.raises(SystemExit):  # of another process
        run("--seeds", "3")
    assert trained == []

    # Figures keep what they were measured with.
    assert run("--repeats", "2", "--seeds", "1")["time"] != row["time"]
    found = json.loads(path.read_text())
    assert found["config"] == {"device": "cpu", "threads": 1}
    found["variants"]["cora-gcn"]["runs"]["dense"][0]["commit"] = "deadbeef00"
    path.write_text(json.dumps(found))
    capsys.readouterr()
    run("--repeats", "0", "--seeds", "1")
    assert capsys.readouterr().out.strip().endswith("Some runs are of deadbee.")
    with pytest.raises(SystemExit):
        run("--threads", "2")
    message = f"threads: got 2, expected 1, as in {path}, or another --json"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        {"config": {"device": "cpu", "threads": 1, "tokens": 64}, "variants": {"naive": {}}},
        {"config": {"names": []}, "variants": {}},
        {"variants": {}},
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(
    content: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(["swap", "--json", str(path)])
    assert f"json: got {path}, of something else" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--repeats -1", "repeats: got -1"),
        ("--threads -1", "threads: got -1"),
        ("--rows", "rows: got nothing, expected at least one"),
        ("--seeds 0", "seeds: got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    options: str, message: str, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        main(["swap", "--json", str(tmp_path / "swap.json"), *options.split()])
    assert message in capsys.readouterr().err


def test_the_matched_model_has_the_flops(root: Path) -> None:
    problem = problem_of("mosaic", root)
    models = (
        problem.drawn("dense", swap.width_of("dense-flops", "mosaic", problem.config)),
        problem.drawn("shared", 16),
    )
    dense, moe = (gmoe.count_flops(swap.evaluated, problem.forward, model) for model in models)
    assert dense == pytest.approx(moe, rel=0.1)
