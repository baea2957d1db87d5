"""The command line, the run folder, and the protocol."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.datasets import CIFAR10, CIFAR100

from experiments.show.report import main as report
from experiments.train.build import build_model, build_twin, costs_of, flops, match_width
from experiments.train.command import main, parse
from experiments.train.kinds import kind_of
from experiments.train.presets import PRESETS, command
from experiments.train.scores import Difference
from experiments.train.training import Training
from experiments.train.user_code import load_object
from tests.helpers import own_parts
from tests.helpers.command import QUICK, quick, rows
from tests.helpers.made_images import write_cifar, write_imagenette, write_images
from tests.helpers.molecule_data import write_set
from tests.helpers.ogb_data import plant
from tests.helpers.pyg_data import write_raw


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
    counted |= {"experts", "max_over_mean_load"}
    assert set(layer) == counted | {"ami_label", "ami_degree", "ami_homophily", "ami_shuffled"}
    for seed in (0, 1):
        assert [row["epoch"] for row in rows(tmp_path / "run", seed=seed)] == ["0", "1", "2"]
        routing = rows(tmp_path / "run", "routing.csv", seed)
        assert [(row["epoch"], row["layer"]) for row in routing] == [
            ("0", "0"),
            ("1", "0"),
            ("2", "0"),
        ]
        for row in routing:
            assert sum(float(row[f"load_{expert}"]) for expert in range(8)) == pytest.approx(
                1.0, abs=1e-3
            )
        assert load_file(tmp_path / "run" / f"seed-{seed}" / "checkpoint" / "best.safetensors")
    assert "test accuracy (%)" in capsys.readouterr().out


def test_the_terminal_says_first_what_a_reader_wants(tmp_path: Path, capsys: Any) -> None:
    """Scores; how to get the dense model; the routing in words, and only then in figures."""
    summary = quick(tmp_path / "run", "--router", "token_choice", "--k", "2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    dense = "dense model, to compare: the same command with --compare"
    report = f"what experts follow: python -m experiments.report {tmp_path / 'run'}"
    begun = ["val accuracy (%)", "test accuracy (%)", dense, "routing: ", report]
    begun += ["routing, by MoE layer"]
    assert [line[: len(start)] for line, start in zip(lines[1:], begun, strict=False)] == begun
    (figures,) = summary["routing"]
    used = 8 - figures["dead"]["values"][0]
    assert lines[4].startswith(f"routing: {used} of 8 experts used, ")
    result = json.loads((tmp_path / "run" / "seed-0" / "result.json").read_text())
    loads = result["routing"][0]["load"]
    assert figures["max_over_mean_load"]["values"] == [pytest.approx(8 * max(loads), abs=1e-3)]


def test_compare_trains_the_dense_model_of_the_same_seeds(tmp_path: Path, capsys: Any) -> None:
    """And says the difference seed by seed; what is finished is only read."""
    summary = quick(tmp_path / "run", "--compare", "--experts", "4", seeds="0 1 2")
    said = capsys.readouterr().out
    dense = json.loads((tmp_path / "run-dense" / "summary.json").read_text())
    assert (dense["config"]["router"], dense["config"]["seeds"]) == ("dense", [0, 1, 2])
    ours, theirs = (found["test"]["values"] for found in (summary, dense))
    points = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    found = Difference.of(points)
    line = f"experts − dense: {fmean(points):+.2f} points (95 % interval "
    line += f"{found.low:+.2f} to {found.high:+.2f})"
    assert line in said
    assert f"n = 3, better on {sum(value > 0 for value in points)} of 3 seeds" in said
    assert "dense model, to compare" not in said
    before = (tmp_path / "run-dense" / "seed-0" / "result.json").stat().st_mtime_ns
    quick(tmp_path / "run", "--compare", "--experts", "4", "--resume", seeds="0 1 2")
    assert line in capsys.readouterr().out
    assert (tmp_path / "run-dense" / "seed-0" / "result.json").stat().st_mtime_ns == before


def test_compare_refuses_the_folder_of_another_run_before_it_trains(
    tmp_path: Path, capsys: Any
) -> None:
    quick(tmp_path / "run-dense", "--router", "random")
    with pytest.raises(SystemExit):
        quick(tmp_path / "run", "--compare")
    assert "run-dense holds a run with router='random', expected 'dense'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args",
    [
        "digits-graph --epochs 3 --seeds 0 4 --router expert_choice --k 2",
        "digits --balance switch --start plain --clip-norm 2",
        "ogbn-products --norm layer_norm --fanout -1 -1 --layers 2",
        "ogbn-arxiv --conv gcn sage --kmeans-init --router multi_centroid",
        "graph --data-root 'a b/x.npz' --metric roc_auc --router-input node degree --lr 1e-5",
        "cora --router x.py:Router --no-undirected --shared-router True",
        "ogbn-mag --hidden 3",
        "images --scale 0.3 1 --reprob 0.5 --aa rand-m9 --mixup 0.4 --grad-accum-steps 2",
        "images --scale None --augment standard --interpolation bicubic --precision bf16-mixed",
        "images --model timm/vit_tiny_patch16_224 --model-kwargs patch_size=4 depth=2",
    ],
)
def test_a_command_gives_the_configuration_that_it_was_made_of(args: str) -> None:
    config = parse(shlex.split(args))
    made = shlex.split(command(config))
    assert made[:4] == ["python", "-m", "experiments.train", args.split()[0]]
    assert parse(made[3:]) == config


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


def test_kmeans_finds_the_regions_before_any_training(tmp_path: Path) -> None:
    args = "--router multi_centroid --shared-router True --kmeans-init"
    assert quick(tmp_path, *args.split(), preset="mosaic")["routing"][0]["nmi"]["mean"] > 0.9


@pytest.fixture(scope="module")
def ogb_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("ogb"))


CIFAR: dict[str, tuple[Any, int]] = {"cifar10": (CIFAR10, 10), "cifar100": (CIFAR100, 100)}


@pytest.mark.parametrize(
    "preset",
    [
        # ToxCast has 617 labels, of which ogb judges one after the other
        pytest.param(preset, marks=[pytest.mark.slow] * (preset == "ogbg-moltoxcast"))
        for preset in sorted(set(PRESETS) - {"digits", "digits-graph", "mosaic"})
    ],
)
def test_every_preset_runs_on_tiny_files(
    preset: str, tmp_path: Path, ogb_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse([preset, "--seeds", "3"]) == replace(PRESETS[preset][1], seeds=(3,))
    root = ogb_root if preset.startswith("ogbn-") else tmp_path / "data"
    if preset == "graph":
        root = write_raw("questions", tmp_path).folder / "questions.npz"
    elif preset == "imagenette":
        write_imagenette(root, count=3)
    elif preset == "images":
        write_images(root, size=32)
    elif preset in CIFAR:
        write_cifar(root, *CIFAR[preset], monkeypatch)
    elif preset.startswith("ogbg-"):
        write_set(root, preset)
    elif root != ogb_root:
        write_raw(PRESETS[preset][1].dataset, root)
    args = f"--data-root {root} --epochs 1 --hidden 8 --experts 2 --offline"
    summary = quick(tmp_path / "run", *args.split(), preset=preset)
    assert summary["config"]["dataset"] == PRESETS[preset][1].dataset
    assert summary["routing"]


@pytest.mark.parametrize("equal", ["flops", "parameters"])
def test_dense_models_of_equal_cost(equal: str, tmp_path: Path) -> None:
    args = ("--router", "dense", "--equal", equal, "--equal-to", "expert_choice", "--epochs", "1")
    assert quick(tmp_path / "run", *args)["matched"] == pytest.approx(1, abs=0.05)
    assert quick(tmp_path / "own", "--router", "dense", "--epochs", "1")["matched"] is None


@pytest.mark.filterwarnings("ignore:.* runs on the whole graph for every expert")
def test_a_matched_model_is_as_wide_however_often_it_is_built() -> None:
    """GAT's FLOPs follow from the routing, which each draw of its MoE has another of."""
    args = "digits-graph --router dense --equal flops --conv gat --hidden 8 --experts 4"
    config = parse(args.split())
    task = kind_of(config).tasks()(0)
    widths, costs, twins = set(), list[Any](), set()
    for seed in range(5):
        torch.manual_seed(seed)
        twins.add(flops(build_twin(config, task), kind_of(config).example(task)))
        torch.manual_seed(seed)
        model: Any = build_model(config, task)
        before = torch.get_rng_state()
        costs.append(costs_of(model, config, task))
        assert torch.equal(torch.get_rng_state(), before)
        widths |= {model.hidden_channels, build_model(config, task).hidden_channels}
    assert (len(twins), len(widths)) == (5, 1)
    assert costs == costs[:1] * 5
    assert costs[0]["flops"] == pytest.approx(sum(twins) / 5, rel=0.05)
    assert costs[0]["matched"] == pytest.approx(5 * costs[0]["flops"] / sum(twins))


MINE = own_parts.__name__


@pytest.mark.parametrize("preset", ["digits-graph", "digits"])
def test_a_router_of_ones_own(preset: str, tmp_path: Path) -> None:
    args = ("--router", f"{MINE}:FirstBits", "--experts", "4", "--layers", "2", "--hidden", "16")
    summary = quick(tmp_path / "run", *args, preset=preset)
    assert summary["config"]["router"] == f"{MINE}:FirstBits"
    assert all(layer["dead"]["mean"] == 2 for layer in summary["routing"])
    assert all(layer["experts_per_token"]["mean"] == 1 for layer in summary["routing"])


def test_a_router_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another folder than the working directory, and with a name that a module has."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(own_parts.__file__, folder / "json.py")
    monkeypatch.chdir(tmp_path)
    main(["digits-graph", "--router", "elsewhere/json.py:FirstBits", *QUICK, "--seeds", "0"])
    assert (tmp_path / "runs" / "digits-graph-json.FirstBits" / "summary.json").exists()
    assert load_object("model", f"{folder}/json.py:sage") is load_object(
        "model", "elsewhere/json.py:sage"
    )


@pytest.mark.filterwarnings("ignore:Mean runs on the whole graph for every expert")
def test_a_conv_of_ones_own(tmp_path: Path) -> None:
    summary = quick(tmp_path / "run", "--conv", f"{MINE}:Mean", "--experts", "2")
    assert summary["config"]["conv"] == [f"{MINE}:Mean"]
    assert len(summary["routing"]) == 1


def test_a_dense_model_of_the_flops_of_a_router_of_ones_own(tmp_path: Path) -> None:
    args = ("--router", "dense", "--equal", "flops", "--equal-to", f"{MINE}:FirstBits")
    assert quick(tmp_path / "run", *args)["matched"] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("preset", "name", "layers"),
    [("digits-graph", "sage", 0), ("digits-graph", "moe", 1), ("digits", "flat", 0)],
)
def test_a_model_of_ones_own(preset: str, name: str, layers: int, tmp_path: Path) -> None:
    more = ("--sampling", "neighbor", "--fanout", "2", "2") if name == "moe" else ()
    summary = quick(tmp_path / "run", "--model", f"{MINE}:{name}", *more, preset=preset)
    assert len(summary["routing"]) == layers
    assert summary["test"]["mean"] > 0.05


def test_options_of_the_built_model_are_refused_beside_ones_own() -> None:
    own = ["digits-graph", "--model", f"{MINE}:sage"]
    assert parse([*own, "--lr", "0.1", "--weight-decay", "0.1"]).lr == 0.1
    options = ["--hidden=64", "--router_input", "node", "--no-kmeans-init"]
    message = r"^model: got .*:sage and --hidden, --no-kmeans-init, --router-input, expected none"
    with pytest.raises(ValueError, match=message):
        parse([*own, *options])


@pytest.mark.parametrize(
    ("name", "given"),
    [("pairs", "tuple"), ("wide", r"shape \(1797, 11\)"), ("FirstHalf", r"shape \(898, 10\)")],
)
def test_a_model_that_gives_no_logits_is_named(
    name: str, given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quick(tmp_path / "run", "--model", f"{MINE}:{name}")
    message = rf"^error: model: got {MINE}:{name}, which gives {given}.*expected logits, 10 columns"
    assert re.search(message, capsys.readouterr().err, re.MULTILINE)


def test_tensorboard_gets_figures_and_routing(tmp_path: Path) -> None:
    quick(
        tmp_path / "run", "--logger", "tensorboard", "--router", "expert_choice", "--hidden", "16"
    )
    events = EventAccumulator(str(tmp_path / "run" / "seed-0" / "tensorboard")).Reload()
    assert {"loss", "val", "lr", "layer_0/load_0", "layer_0/entropy"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("val")] == [0, 1, 2]


def test_flops_of_images_are_those_of_one_image(tmp_path: Path, capsys: Any) -> None:
    """However many are in a batch; of graphs, they are those of a forward pass."""
    write_images(tmp_path / "data", train=20)
    options = ["--data-root", str(tmp_path / "data"), "--hidden", "4", "--experts", "2"]
    seen = []
    for size in (4, 8):
        folder = tmp_path / f"run-{size}"
        summary = quick(folder, *options, "--batch-size", str(size), preset="images")
        assert summary["images"] == size
        (found,) = re.findall(r"([\d,]+) FLOPs active per image;", capsys.readouterr().out)
        seen.append(int(found.replace(",", "")))
        assert seen[-1] == round(summary["flops"] / size)
    report([str(folder), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"{seen[-1] / 1e6:,.1f} per image" in page
    assert seen[0] == pytest.approx(seen[1], rel=0.02)
    assert quick(tmp_path / "graph")["images"] is None
    assert "FLOPs active per forward pass;" in capsys.readouterr().out


def test_the_nearest_width_is_found() -> None:
    assert match_width(lambda width: width**2, 10_000) == 100
    assert match_width(lambda width: width**2, 10_080) == 100  # not the first above
    assert match_width(lambda width: width, 65_536) == 65_536
    assert match_width(lambda width: 10 * width, 1) == 1
