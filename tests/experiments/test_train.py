"""The command line, the run folder, resuming, and the protocol."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.config import IMAGES, ImageConfig
from experiments.data import load_tasks
from experiments.loop import Training, peak_memory, restart_peak_memory
from experiments.presets import PRESETS
from experiments.runs import run, spread
from experiments.train import main, parse
from tests.experiments.command import QUICK, quick
from tests.experiments.ogb_data import plant
from tests.experiments.pyg_data import Writer

BETTER_THAN_CHANCE = 0.4
"""Of ten classes, after three epochs."""


def test_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = quick(tmp_path / "run", "--router", "expert_choice", seeds="0 1")
    assert summary["metric"] == "accuracy"
    for split in ("val", "test"):
        values = summary[split]["values"]
        assert summary[split]["n"] == len(values) == 2
        assert summary[split]["mean"] == pytest.approx(sum(values) / 2)
        assert summary[split]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert {"commit", "versions", "cpu", "threads"} <= set(summary["environment"])
    assert summary["config"]["router"] == "expert_choice"
    (layer,) = summary["routing"]
    counted = {"coverage", "experts_per_token", "entropy", "dropped", "dead"}
    assert set(layer) == counted | {"ami_label", "ami_degree", "ami_homophily", "ami_shuffled"}
    for seed in (0, 1):
        with (tmp_path / "run" / f"seed-{seed}" / "metrics.csv").open() as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
        with (tmp_path / "run" / f"seed-{seed}" / "routing.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["epoch"], row["layer"]) for row in rows] == [("0", "0"), ("1", "0"), ("2", "0")]
        for row in rows:
            assert sum(float(row[f"load_{expert}"]) for expert in range(8)) == pytest.approx(1.0, abs=1e-3)
        assert load_file(tmp_path / "run" / f"seed-{seed}" / "checkpoint" / "best.safetensors")
        pairs = load_file(tmp_path / "run" / "routing" / f"seed-{seed}.safetensors")
        assert pairs["layer0.size"].tolist() == [1797, 8]
        assert pairs["layer0.token"].shape == pairs["layer0.expert"].shape == pairs["layer0.weight"].shape
    assert "test accuracy (%)" in capsys.readouterr().out


def test_std_is_null_for_one_seed(tmp_path: Path) -> None:
    assert quick(tmp_path / "run")["test"]["std"] is None
    assert spread([1.0])["std"] is None


def test_the_test_set_is_read_once_at_the_best_validation_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    evaluate = Training.evaluate

    def watch(training: Training, split: Any) -> Any:
        seen.append(split)
        return evaluate(training, split)

    monkeypatch.setattr(Training, "evaluate", watch)
    quick(tmp_path / "run")
    assert seen == ["val", "val", "val", "test"]
    with (tmp_path / "run" / "seed-0" / "metrics.csv").open() as file:
        val = [float(row["val"]) for row in csv.DictReader(file)]
    result = json.loads((tmp_path / "run" / "seed-0" / "result.json").read_text())
    assert result["best_epoch"] == val.index(max(val))
    assert result["val"] == max(val)


@pytest.mark.parametrize("router", ["dense", "token_choice", "random", "uniform"])
def test_same_seed_same_numbers(tmp_path: Path, router: str) -> None:
    first, second = (quick(tmp_path / name, "--router", router) for name in ("a", "b"))
    assert first["val"]["values"] == second["val"]["values"]
    assert first["test"]["values"] == second["test"]["values"]


def test_unknown_preset_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ogbn-arxivv"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "did you mean ogbn-arxiv?" in error
    assert all(name in error for name in PRESETS)


def test_missing_data_says_what_how_large_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cora", *QUICK, "--out", str(tmp_path / "run"), "--data-root", str(tmp_path / "none"), "--offline"])
    error = " ".join(capsys.readouterr().err.split())
    assert "ind.cora.x" in error
    assert "about 0.2 MB" in error
    assert str(tmp_path / "none" / "Cora" / "raw") in error.replace(" ", "") or "Cora/raw" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits-graph", "--router", "oracle"], "router: got 'oracle' for digits-graph"),
        (["mosaic", "--router", "oracle", "--experts", "4"], "experts: got 4, expected the 8 planted ones"),
        (
            ["digits-graph", "--router", "random", "--balance", "switch"],
            "balance: got 'switch', but the",
        ),
        (["digits-graph", "--router", "dense", "--weight", "score"], "options: got"),
        (["digits-graph", "--k", "9"], "k: got 9, expected at most num_experts=8"),
        (["digits-graph", "--equal", "flops"], "equal: got 'flops' with router='token_choice'"),
        (["digits-graph", "--kmeans-init"], "kmeans_init: got True"),
    ],
)
def test_bad_combinations(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*args, *QUICK, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("preset", ["digits", "digits-graph", "mosaic"])
@pytest.mark.parametrize("router", ["expert_choice", "attention_vote", "multi_centroid"])
def test_every_preset_that_ships_trains_with_every_router(tmp_path: Path, preset: str, router: str) -> None:
    args = ("--epochs", "1", "--scope", "neighbors") if router == "attention_vote" and preset != "digits" else ()
    summary = quick(tmp_path / "run", "--router", router, "--epochs", "1", *args, preset=preset)
    assert 0 <= summary["test"]["mean"] <= 1


def test_bf16_and_kmeans(tmp_path: Path) -> None:
    summary = quick(tmp_path / "a", "--precision", "bf16-mixed")
    assert summary["test"]["mean"] > BETTER_THAN_CHANCE
    summary = quick(
        tmp_path / "b", "--router", "multi_centroid", "--shared-router", "--kmeans-init", "--num-centroids", "1",
        preset="mosaic",
    )  # fmt: skip
    assert summary["routing"][0]["nmi"]["mean"] > 0.9  # the centroids are the regions before any training


def test_nan_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = replace(PRESETS["digits-graph"][1], epochs=1, progress=False, out=tmp_path / "run", seeds=(0,))
    task = load_tasks(config)(0)
    next(iter(task.loader("train", 1, None))).inputs[0][3, 4] = torch.nan
    monkeypatch.setattr("experiments.runs.load_tasks", lambda *_: lambda _: task)
    with pytest.raises(ValueError, match="values that are NaN or infinite"):
        run(config)


def test_configs_are_frozen() -> None:
    with pytest.raises(AttributeError):
        PRESETS["digits"][1].lr = 1.0  # type: ignore[misc]
    assert isinstance(PRESETS["digits"][1], ImageConfig)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", "0", "0"], "seeds: got (0, 0), expected at least one, each once"),
        (["--seeds", "-1"], "seeds: got (-1,), expected numbers from 0"),
        (["--dropout", "2"], "dropout: got 2.0, expected a number in [0, 1)"),
        (["--device", "tpu"], "device: got 'tpu', expected one that is there"),
        (["--epochs", "0"], "epochs: got 0, expected at least 1"),
        (["--batch-size", "-1"], "batch_size: got -1"),
    ],
)
def test_bad_numbers(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["digits-graph", "--out", str(tmp_path / "run"), *args])
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())


def test_a_baseline_of_a_moe_with_options(tmp_path: Path) -> None:
    args = ("--router", "dense", "--equal", "flops", "--equal-to", "expert_choice", "--capacity-factor", "2")
    summary = quick(tmp_path / "run", *args)
    assert summary["matched"] == pytest.approx(1, abs=0.05)
    assert quick(tmp_path / "own", "--router", "dense")["matched"] is None


def test_kmeans_before_the_first_cut_scores(tmp_path: Path) -> None:
    args = ("--router", "multi_centroid", "--choice", "experts", "--inference", "threshold", "--kmeans-init")
    assert quick(tmp_path / "run", *args)["test"]["mean"] > BETTER_THAN_CHANCE


@pytest.fixture(scope="module")
def ogb_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"digits", "digits-graph", "mosaic", "hetero", *IMAGES}))
def test_every_preset_of_a_graph_runs_on_tiny_files(preset: str, tmp_path: Path, ogb_root: Path) -> None:
    assert parse([preset, "--seeds", "3"]) == replace(PRESETS[preset][1], seeds=(3,))
    if preset == "graph":
        root = Writer(tmp_path).write("questions").folder / "questions.npz"
    elif preset.startswith("ogbn-"):
        root = ogb_root
    else:
        root = tmp_path / "data"
        Writer(root).write(preset)
    args = ("--data-root", str(root), "--epochs", "1", "--hidden", "8", "--experts", "2", "--offline")
    summary = quick(tmp_path / "run", *args, preset=preset)
    assert summary["config"]["dataset"] == PRESETS[preset][1].dataset
    assert 0 <= summary["test"]["mean"] <= 1
    assert summary["routing"]


@pytest.mark.parametrize(
    "args",
    [
        "--conv low_pass identity high_pass two_hop --experts 4",
        "--conv gcn mlp --router-input node neighbors degree --shared-expert False",
        "--conv gat --heads 2 --evaluation layerwise --batch-size 500",
        "--shared-router --router-input node degree --jk last",
        "--sampling neighbor --batch-size 400 --fanout -1 2 --evaluation layerwise",
        "--label-reuse 0.5 --self-loops --undirected",
        "--precision 64-true --conv sage --adjacency csr",
        "--precision 64-true --conv sage --evaluation layerwise --ema 0.5",
        "--precision bf16-mixed --conv gcn --evaluation layerwise",
    ],
)
def test_options_of_graphs(args: str, tmp_path: Path) -> None:
    summary = quick(tmp_path / "run", *args.split(), "--epochs", "1")
    assert 0 < summary["test"]["mean"] <= 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == summary["config"]
    assert config["self_loops"] == config["undirected"] == ("--self-loops" in args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--lr 1e30 --clip-norm 1 --router dense", "loss: got nan in epoch"),
        ("--lr 0", "lr: got 0.0"),
        ("--weight-decay -1", "weight_decay: got -1.0"),
        ("--conv cheb", "conv: got ChebConv, which cannot be built as conv("),
        ("--conv rgcn --router dense", "conv: got RGCNConv, which cannot be built as conv("),
        ("--conv agnn", "conv: got AGNNConv, which is built with"),
        ("--conv tag --evaluation layerwise", "expected one that can be evaluated layer by layer"),
        ("--conv two_hop --evaluation layerwise", "expected one that can be evaluated layer by layer"),
        ("--conv gat --heads 0", "heads: got 0"),
        ("--fanout 3 3", "fanout: got (3, 3) with sampling='full'"),
        ("--sampling neighbor --fanout -2", "fanout: got (-2,)"),
        ("--router expert_choice --inference threshold --ema 0.9", "ema: got an average with inference='threshold'"),
        ("--device nowhere", "device: got 'nowhere'"),
        pytest.param(
            "--device cuda",
            "device: got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:TAGConv", "ignore:FilterConv", "ignore:AGNNConv", "ignore:ChebConv")
def test_what_cannot_be_run_is_an_error_of_one_line(
    args: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        quick(tmp_path / "run", *args.split())
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert ("epoch" in message) or not (tmp_path / "run").exists()


@pytest.mark.parametrize("equal", ["flops", "parameters"])
def test_baselines_of_models_with_heads(equal: str, tmp_path: Path) -> None:
    args = ("--conv", "gat", "--heads", "4", "--hidden", "16", "--router", "dense", "--equal", equal)
    summary = quick(tmp_path / "run", *args, "--epochs", "1")
    assert summary["hidden"] % 4 == 0
    assert summary["hidden"] > 16
    assert summary["matched"] == pytest.approx(1, abs=0.2)  # a head more or less


def test_planted_experts_where_test_nodes_are_sampled(tmp_path: Path) -> None:
    args = ("--sampling", "neighbor", "--fanout", "3", "3", "--batch-size", "2000", "--evaluation", "sampled")
    summary = quick(tmp_path / "run", *args, "--epochs", "1", preset="mosaic")
    assert not any("nmi" in layer for layer in summary["routing"])  # which is of all nodes, routed at once


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a peak")
def test_the_peak_of_memory_is_a_seeds_own() -> None:
    device = torch.device("cpu")
    held = torch.ones(60 * 2**20, dtype=torch.uint8)
    restart_peak_memory(device)
    with_it = peak_memory(device)
    del held
    assert peak_memory(device) == pytest.approx(with_it, abs=5)
    restart_peak_memory(device)
    assert peak_memory(device) < with_it - 50
