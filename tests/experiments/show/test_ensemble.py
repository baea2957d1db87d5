"""Competing on OGB.

Features of one's own, correction and smoothing, predictions of every node, ensembles.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ogb.nodeproppred import Evaluator
from safetensors.torch import load_file, save_file
from torch_geometric.nn import LabelPropagation

from experiments.convert.planted import write_planted
from experiments.show import ensemble
from experiments.train.data.ogb import OGBMetric, load_ogb
from experiments.train.predictions import mean_of
from tests.helpers.command import quick, refused


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Planted sets of 400 nodes, and features of one's own."""
    root = tmp_path_factory.mktemp("data")
    for name, classes in (("ogbn-arxiv", 4), ("ogbn-proteins", 4)):
        write_planted(name, root, nodes=400, edges=3000, classes=classes)
    np.save(root / "x.npy", np.random.default_rng(0).standard_normal((400, 7)).astype(np.float16))
    return root


SAMPLED = ("--sampling", "neighbor", "--fanout", "2", "2", "2", "--evaluation", "sampled")
OWN = "tests.helpers.own_parts"


def run(data: Path, out: Path, *args: str, name: str = "ogbn-arxiv") -> dict[str, Any]:
    """The summary of a short run of two seeds."""
    width = () if "--model" in args else ("--hidden", "8")
    return quick(out, "--data-root", str(data), *width, *args, preset=name, seeds="0 1")


def predicted(run: Path, seed: int) -> torch.Tensor:
    """(N, classes) probabilities that a seed of a run has kept."""
    return load_file(run / f"seed-{seed}" / "predictions.safetensors")["probability"]


@pytest.mark.parametrize(
    "name", ["ogbn-arxiv", pytest.param("ogbn-proteins", marks=pytest.mark.slow)]
)
def test_an_ensemble_is_what_ogb_says_of_the_mean(
    name: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    """Of two runs with two seeds each; and of one seed alone, what its run says."""
    one = run(data, tmp_path / "one", name=name)
    run(data, tmp_path / "other", "--router", "dense", name=name)
    parts = [predicted(tmp_path / folder, seed) for folder in ("one", "other") for seed in (0, 1)]
    graph = load_ogb(name, data)
    rows, evaluator = graph.splits(0)["test"], Evaluator(name)

    def says(value: torch.Tensor) -> float:
        y = graph.data.y.view(400, -1)[rows]
        y_pred = value[rows] if name == "ogbn-proteins" else value[rows].argmax(dim=1, keepdim=True)
        return float(evaluator.eval({"y_true": y, "y_pred": y_pred})[evaluator.eval_metric])

    assert [says(part) for part in parts[:2]] == pytest.approx(one["test"]["values"], abs=1e-4)
    capsys.readouterr()
    ensemble.main([str(tmp_path / "one"), str(tmp_path / "other")])
    first, second, last = [line for line in capsys.readouterr().out.splitlines() if "test " in line]
    assert first.startswith(f"{tmp_path / 'one'}: test {100 * one['test']['mean']:.2f} ± ")
    assert f"{one['parameters']:,} parameters" in first
    assert "other: test" in second
    assert last.startswith(
        f"ensemble of 4: test {100 * says(sum(parts[1:], parts[0]) / 4):.2f}, validation "
    )


def test_correct_and_smooth_is_the_papers(data: Path, tmp_path: Path) -> None:
    """Errors of the training nodes scaled to their mean size, then their labels.

    By label propagation.
    """
    plain, smoothed = (
        run(data, tmp_path / "plain"),
        run(data, tmp_path / "smooth", "--correct-and-smooth"),
    )
    assert plain["flops"] == smoothed["flops"]
    before, after = predicted(tmp_path / "plain", 1), predicted(tmp_path / "smooth", 1)
    graph = load_ogb("ogbn-arxiv", data)
    edges = torch.cat([graph.data.edge_index, graph.data.edge_index.flip(0)], dim=1).unique(dim=1)
    rows, labels = graph.splits(0)["train"], torch.nn.functional.one_hot(graph.data.y, 40).float()
    error = torch.zeros_like(before).index_copy(0, rows, labels[rows] - before[rows])
    spread = LabelPropagation(50, 1.0)(error, edges, post_step=lambda value: value.clamp(-1, 1))
    scale = error[rows].abs().sum() / len(rows) / spread.abs().sum(dim=1, keepdim=True)
    scale[scale.isinf() | (scale > 1000)] = 1
    expected = LabelPropagation(50, 0.8)(
        (before + scale * spread).index_copy(0, rows, labels[rows]), edges
    )
    shares = expected / expected.sum(dim=1, keepdim=True)  # so that an ensemble weighs runs alike
    torch.testing.assert_close(after, shares, atol=1e-4, rtol=1e-4)
    test = graph.splits(0)["test"]
    accuracy = (after[test].argmax(dim=1) == graph.data.y[test]).double().mean().item()
    assert accuracy == pytest.approx(smoothed["test"]["values"][1])


def test_a_leaderboard_gets_two_lines(data: Path, tmp_path: Path, capsys: Any) -> None:
    """Without and with correcting and smoothing, in the results, on the terminal, by ensemble."""
    plain = run(data, tmp_path / "plain")
    smoothed = run(data, tmp_path / "smooth", "--correct-and-smooth")
    said = capsys.readouterr().out
    assert "uncorrected" not in plain
    for part in ("val", "test"):
        assert smoothed["uncorrected"][part] == plain[part]
        by_seed = [
            json.loads((tmp_path / "smooth" / f"seed-{seed}" / "result.json").read_text())
            for seed in (0, 1)
        ]
        assert [one["uncorrected"][part] for one in by_seed] == plain[part]["values"]
        assert [one[part] for one in by_seed] == smoothed[part]["values"]
        assert f"{part} accuracy (%), without C&S" in said
    assert smoothed["test"] != plain["test"]
    ensemble.main([str(tmp_path / "smooth")])
    first, second = [line for line in capsys.readouterr().out.splitlines() if "2 seeds" in line]
    assert first.startswith(f"{tmp_path / 'smooth'}: test {100 * smoothed['test']['mean']:.2f} ± ")
    start = f"{tmp_path / 'smooth'}, without C&S: test {100 * plain['test']['mean']:.2f} ± "
    assert second.startswith(start)
    # And where a run goes on that an older version began.
    path = tmp_path / "smooth" / "seed-0" / "result.json"
    older = json.loads(path.read_text())
    del older["uncorrected"]
    path.write_text(json.dumps(older))
    (tmp_path / "smooth" / "summary.json").unlink()
    assert "uncorrected" not in run(data, tmp_path / "smooth", "--correct-and-smooth", "--resume")


def test_features_of_ones_own(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They replace the set's, belong to the run, and are refused where they do not fit."""
    plain, own = (
        run(data, tmp_path / "plain"),
        run(data, tmp_path / "own", "--features", str(data / "x.npy")),
    )
    assert own["parameters"] < plain["parameters"]
    assert own["test"] != plain["test"]
    copied = tmp_path / "x.npy"
    np.save(copied, np.load(data / "x.npy"))
    again = run(data, tmp_path / "again", "--features", str(copied))
    np.save(copied, np.load(copied) + 1)
    args = ("--features", str(copied), "--resume")
    with pytest.raises(SystemExit):
        run(data, tmp_path / "again", *args)
    assert f"digest={again['config']['digest']!r}" in capsys.readouterr().err
    for wrong in (np.zeros((399, 7)), np.zeros(400), np.zeros((400, 0)), np.full((400, 7), np.nan)):
        np.save(copied, wrong)
        command = ["ogbn-arxiv", "--data-root", str(data), "--features", str(copied)]
        assert f"{copied}: got float64 of shape {wrong.shape}" in refused(command, capsys)
    assert "nowhere.npy" in refused([*command, "--features", "nowhere.npy"], capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ogbn-proteins"], "correct_and_smooth: got True for ogbn-proteins"),
        (["ogbn-arxiv", *SAMPLED, "--model", f"{OWN}:sage"], "evaluation='full'"),
    ],
)
def test_what_cannot_be_smoothed(
    args: list[str], message: str, data: Path, tmp_path: Path, capsys: Any
) -> None:
    command = [
        *args,
        "--correct-and-smooth",
        "--data-root",
        str(data),
        "--out",
        str(tmp_path / "out"),
    ]
    assert message in refused(command, capsys)


def test_models_without_layer_wise_inference_keep_them_of_whole_graphs(
    data: Path, tmp_path: Path
) -> None:
    own, far = ("--model", f"{OWN}:sage"), ("--conv", "tag", "--router", "dense")
    for name, args in {"full": own, "sampled": (*own, *SAMPLED), "far": (*far, *SAMPLED)}.items():
        run(data, tmp_path / name, *args)
        assert (tmp_path / name / "seed-0" / "predictions.safetensors").exists() == (name == "full")


def test_a_run_that_is_given_twice_is_named(tmp_path: Path, capsys: Any) -> None:
    """By whatever path: its seeds would count double."""
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")
    runs = [str(tmp_path / name) for name in ("one", "other", "link")]
    expected = f"runs: got {runs[0]} and {runs[2]}, one folder, expected each run once"
    assert expected in refused(runs, capsys, ensemble.main)


def test_an_ensemble_takes_runs_with_predictions(data: Path, tmp_path: Path, capsys: Any) -> None:
    run(data, tmp_path / "run")
    quick(tmp_path / "digits")
    for runs, message in {
        ("digits",): "runs: got those of digits-graph, expected runs of one of OGB's data sets",
        ("run", "digits"): "runs: got those of digits-graph, ogbn-arxiv, expected",
        (): "runs: got none",
    }.items():
        assert message in refused([str(tmp_path / name) for name in runs], capsys, ensemble.main)
    file = tmp_path / "run" / "seed-1" / "predictions.safetensors"
    save_file({"other": torch.zeros(1)}, file)
    assert str(file) in refused([str(tmp_path / "run")], capsys, ensemble.main)
    ogbs = shutil.copytree(data, tmp_path / "data")
    (ogbs / "ogbn_arxiv" / "PLANTED.txt").unlink()  # as if it were OGB's
    run(ogbs, tmp_path / "other")
    both = [str(tmp_path / "run"), str(tmp_path / "other")]
    assert "has not the data that" in refused(
        [*both, "--data-root", str(ogbs)], capsys, ensemble.main
    )
    assert "digest=" in refused(
        ["ogbn-arxiv", "--data-root", str(ogbs), "--resume", "--out", both[0]], capsys
    )
    file.unlink()  # which a submission does without
    with pytest.raises(SystemExit):
        ensemble.main(both[:1])
    assert ": test " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ogbn-arxiv", "ogbn-products", "ogbn-proteins", "ogbn-mag"])
def test_metrics_are_ogbs_to_the_last_digit(name: str) -> None:
    """In batches, of 1,000 random nodes."""
    generator = torch.Generator().manual_seed(0)
    tasks = 112 if name == "ogbn-proteins" else 1
    logits = torch.randn(1000, tasks if tasks > 1 else 40, generator=generator)
    y = torch.randint(2 if tasks > 1 else 40, (1000, tasks), generator=generator)
    metric, evaluator = OGBMetric(name), Evaluator(name)
    for rows in torch.arange(1000).split(300):
        metric.update(logits[rows], y[rows].float() if tasks > 1 else y[rows].view(-1))
    predicted = logits if tasks > 1 else logits.argmax(dim=1, keepdim=True)
    assert (
        metric.compute().item()
        == evaluator.eval({"y_true": y, "y_pred": predicted})[evaluator.eval_metric]
    )


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (torch.zeros(5, 1), r"probability: got shape \(5, 1\), expected \(5, 3\), as in the first"),
        (torch.full((5, 3), torch.nan), "probability: got NaN or infinity, expected numbers"),
    ],
)
def test_predictions_that_do_not_fit_each_other_are_named(
    other: torch.Tensor, said: str, tmp_path: Path
) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for file, probability in zip(files, (torch.ones(5, 3), other), strict=True):
        save_file({"probability": probability}, file)
    with pytest.raises(ValueError, match=rf"^{files[1]}: cannot be read \({said}"):
        mean_of(files)
    assert torch.equal(mean_of(files[:1] * 2), torch.ones(5, 3))
