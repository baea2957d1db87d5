"""The command line, the run folder, and the protocol."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from experiments.config import IMAGES
from experiments.loop import Training, peak_memory, restart_peak_memory
from experiments.presets import PRESETS
from experiments.train import parse
from tests.experiments.command import QUICK, quick, refused, rows
from tests.experiments.ogb_data import plant
from tests.experiments.pyg_data import write_raw


def test_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = quick(tmp_path / "run", "--router", "expert_choice", seeds="0 1")
    assert summary["metric"] == "accuracy"
    for split in ("val", "test"):
        first, second = summary[split]["values"]
        assert summary[split]["mean"] == pytest.approx((first + second) / 2)
        assert summary[split]["std"] == pytest.approx(abs(first - second) / 2**0.5)
    assert {"commit", "versions", "cpu", "threads"} <= set(summary["environment"])
    assert summary["config"] == json.loads((tmp_path / "run" / "config.json").read_text())
    (layer,) = summary["routing"]
    counted = {"coverage", "experts_per_token", "entropy", "dropped", "dead"}
    assert set(layer) == counted | {"ami_label", "ami_degree", "ami_homophily", "ami_shuffled"}
    for seed in (0, 1):
        part = tmp_path / "run" / f"seed-{seed}"
        assert [row["epoch"] for row in rows(tmp_path / "run", seed=seed)] == ["0", "1", "2"]
        routing = rows(tmp_path / "run", "routing.csv", seed)
        assert [(row["epoch"], row["layer"]) for row in routing] == [("0", "0"), ("1", "0"), ("2", "0")]
        for row in routing:
            assert sum(float(row[f"load_{expert}"]) for expert in range(8)) == pytest.approx(1.0, abs=1e-3)
        assert load_file(part / "checkpoint" / "best.safetensors")
        pairs = load_file(tmp_path / "run" / "routing" / f"seed-{seed}.safetensors")
        assert pairs["layer0.size"].tolist() == [1797, 8]
    assert "test accuracy (%)" in capsys.readouterr().out


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
    val = [float(row["val"]) for row in rows(tmp_path / "run")]
    result = json.loads((tmp_path / "run" / "seed-0" / "result.json").read_text())
    assert (result["best_epoch"], result["val"]) == (val.index(max(val)), max(val))


@pytest.mark.parametrize("router", ["dense", "expert_choice", "attention_vote", "multi_centroid"])
def test_a_run_is_the_same_twice(tmp_path: Path, router: str) -> None:
    first, second = (quick(tmp_path / n, "--router", router, "--epochs", "1", preset="digits") for n in "ab")
    assert (first["val"], first["test"]) == (second["val"], second["test"])


def test_kmeans_finds_the_regions_before_any_training(tmp_path: Path) -> None:
    args = ("--router", "multi_centroid", "--shared-router", "--kmeans-init", "--num-centroids", "1")
    assert quick(tmp_path, *args, preset="mosaic")["routing"][0]["nmi"]["mean"] > 0.9


@pytest.fixture(scope="module")
def ogb_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"digits", "digits-graph", "mosaic", "hetero", *IMAGES}))
def test_every_preset_of_a_graph_runs_on_tiny_files(preset: str, tmp_path: Path, ogb_root: Path) -> None:
    assert parse([preset, "--seeds", "3"]) == replace(PRESETS[preset][1], seeds=(3,))
    root = ogb_root
    if preset == "graph":
        root = write_raw("questions", tmp_path).folder / "questions.npz"
    elif not preset.startswith("ogbn-"):
        root = tmp_path / "data"
        write_raw(preset, root)
    args = ("--data-root", str(root), "--epochs", "1", "--hidden", "8", "--experts", "2", "--offline")
    summary = quick(tmp_path / "run", *args, preset=preset)
    assert summary["config"]["dataset"] == PRESETS[preset][1].dataset
    assert summary["routing"]


@pytest.mark.parametrize(
    "args",
    [
        "--conv low_pass identity high_pass two_hop --experts 4 --no-undirected",
        "--conv gcn mlp --router-input node neighbors degree --shared-expert False --jk last --clip-norm 1",
        "--sampling neighbor --batch-size 400 --fanout -1 2 --evaluation layerwise",
        "--precision 64-true --conv sage --evaluation layerwise",
        "--precision bf16-mixed --router attention_vote --scope neighbors",
    ],
)
def test_options_of_graphs(args: str, tmp_path: Path) -> None:
    assert 0 < quick(tmp_path / "run", *args.split(), "--epochs", "1")["test"]["mean"] <= 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("digits-graph --lr 1e30 --clip-norm 1 --router dense", "loss: got nan in epoch"),
        ("digits-graph --lr -1", "lr: got -1.0, expected at least 0"),
        ("digits-graph --dropout 1", "dropout: got 1.0, expected less than 1"),
        ("digits-graph --epochs 0", "epochs: got 0, expected at least 1"),
        ("digits-graph --seeds 0 0", "seeds: got (0, 0), expected one number or more from 0 to 2**32 - 1, each once"),
        ("digits-graph --seeds -1", "seeds: got (-1,), expected one number or more"),
        ("digits-graph --conv cheb", "conv: got ChebConv, which cannot be built as conv("),
        ("digits-graph --fanout 3 3", "fanout: got (3, 3) with sampling='full'"),
        ("digits-graph --device nowhere", "device: got 'nowhere', expected one that is there"),
        ("digits-graph --router oracle", "router: got 'oracle' for digits-graph"),
        ("mosaic --router oracle --experts 4", "experts: got 4, expected the 8 planted ones"),
        ("digits-graph --router random --balance switch", "balance: got 'switch', but the"),
        ("digits-graph --router dense --weight score", "options: got"),
        ("digits-graph --k 9", "k: got 9, expected at most num_experts=8"),
        ("digits-graph --equal flops", "equal: got 'flops' with router='token_choice'"),
        ("digits-graph --kmeans-init", "kmeans_init: got True"),
        ("ogbn-mag --router-input node", "router_input: got ('node',) for ogbn-mag"),
        ("digits --patch 3", "image_size: got 8, expected a multiple of patch_size=3"),
        ("cora --offline --data-root none", "ind.cora.x"),
    ],
)
@pytest.mark.filterwarnings("ignore:ChebConv")
def test_what_cannot_be_run_is_an_error_of_one_line(args: str, message: str, tmp_path: Path, capsys: Any) -> None:
    preset, *options = args.split()
    assert message in refused([preset, *QUICK, *options, "--out", str(tmp_path / "run")], capsys)
    assert ("epoch" in message) or not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("equal", ["flops", "parameters"])
def test_dense_models_of_equal_cost(equal: str, tmp_path: Path) -> None:
    args = ("--router", "dense", "--equal", equal, "--equal-to", "expert_choice", "--epochs", "1")
    assert quick(tmp_path / "run", *args)["matched"] == pytest.approx(1, abs=0.05)
    assert quick(tmp_path / "own", "--router", "dense", "--epochs", "1")["matched"] is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux forgets a peak")
def test_the_peak_of_memory_is_a_seeds_own() -> None:
    device, held = torch.device("cpu"), torch.ones(60 * 2**20, dtype=torch.uint8)
    restart_peak_memory(device)
    with_it = peak_memory(device)
    del held
    restart_peak_memory(device)
    assert peak_memory(device) < with_it - 50
