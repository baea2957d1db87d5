"""Runs on molecules: trained, resumed, scored, kept and matched as those on nodes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.convert.smiles import FILES
from experiments.show.report import main as report
from experiments.train.command import main, parse
from experiments.train.config import MoleculeConfig, dense_of
from experiments.train.presets import PRESETS
from experiments.train.training import is_better
from tests.helpers.command import QUICK, quick, refused, run_until
from tests.helpers.molecule_data import write_set
from tests.helpers.pages import words_of
from tests.helpers.run_folders import assert_same

SMALL = ("--hidden", "8", "--layers", "2", "--batch-size", "10", "--experts", "4")
NAMES = ("ogbg-molhiv", "ogbg-molmuv", "ogbg-molesol")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in NAMES:
        write_set(root, name)
    return root


def run(data: Path, out: Path, *args: str, name: str = NAMES[0], seeds: str = "0") -> Any:
    return quick(out, "--data-root", str(data), *SMALL, *args, preset=name, seeds=seeds)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_selects_by_ogbs_metric(name: str, data: Path, tmp_path: Path) -> None:
    found = run(data, tmp_path / "run", name=name)
    curve = found["curve"]["val"][0]
    best = min if found["metric"] == "rmse" else max
    assert found["val"]["values"] == [pytest.approx(best(curve), abs=1e-4)]
    (layer,) = found["routing"]  # all layers are routed once
    assert layer["coverage"]["mean"] == 1


def test_less_is_better_of_errors_and_more_of_scores() -> None:
    assert is_better("rmse", 0.5, 0.7)
    assert not is_better("rmse", 0.7, 0.5)
    assert is_better("roc_auc", 0.7, 0.5)
    assert not is_better("roc_auc", 0.5, 0.5)
    assert is_better("rmse", 3.0, float("nan"))


@pytest.mark.filterwarnings("ignore:GINEConv runs on the whole graph")
@pytest.mark.parametrize(
    "options",
    [
        "--conv gin",
        "--conv gcn --start shared",
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                "--conv gine sage --k 2 --balance switch",
                "--conv gine --router multi_centroid --kmeans-init",
                "--conv gat --router random --start plain",
            )
        ),
    ],
)
def test_a_stopped_run_equals_one_in_one_go(options: str, data: Path, tmp_path: Path) -> None:
    args = ["ogbg-molhiv", "--data-root", str(data), *SMALL, *QUICK, "--seeds", "0"]
    args += options.split()
    whole = [*args, "--out", str(tmp_path / "whole")]
    main(whole)
    stopped = [*args, "--out", str(tmp_path / "stopped")]
    run_until(2, stopped)  # inside the first epoch
    run_until(5, [*stopped, "--resume"])
    main([*stopped, "--resume"])
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_the_report_of_molecules_has_loads_and_no_drawing(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run")
    report([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    words = words_of(tmp_path / "report" / "index.html")
    assert "run: routing" in words
    assert "Load of each expert in each epoch's steps, seed 0." in words
    assert "on the test molecules." in words
    assert "Which atoms" not in words


def test_dense_models_are_matched_and_shown(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = run(data, tmp_path / "flops", "--router", "dense", "--equal", "flops")
    assert equal["matched"] == pytest.approx(1, abs=0.1)
    equal = run(data, tmp_path / "parameters", "--router", "dense", "--equal", "parameters")
    assert equal["matched"] == pytest.approx(1, abs=0.1)
    capsys.readouterr()
    found = run(data, tmp_path / "moe", name="ogbg-molesol")
    out = capsys.readouterr().out
    assert f"test rmse {found['test']['mean']:.4f}" in " ".join(out.split())
    assert "dense model, to compare: the same command with --compare" in out
    saved = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert saved["digest"] is not None


def test_other_files_are_another_run(data: Path, tmp_path: Path, capsys: Any) -> None:
    run(data, tmp_path / "run")
    other = write_set(tmp_path / "other")
    (other / "RELEASE_v1.txt").write_text("of another conversion\n")
    args = ["ogbg-molhiv", "--data-root", str(tmp_path / "other"), *SMALL, *QUICK]
    said = refused([*args, "--out", str(tmp_path / "run"), "--resume", "--seeds", "0"], capsys)
    assert "holds a run with digest=" in said


def test_there_is_a_preset_a_set_on_the_recipe_of_the_ogb_examples() -> None:
    found = {name for name in PRESETS if name.startswith("ogbg-")}
    assert found == set(FILES)
    for name in found:
        config: Any = PRESETS[name][1]
        assert isinstance(config, MoleculeConfig)
        assert config.dataset == name
        recipe = (config.hidden, config.layers, config.dropout, config.batch_size, config.lr)
        assert recipe == (300, 5, 0.5, 32, 0.001)
    config = parse(["ogbg-molhiv", "--conv", "gcn", "gine"])
    assert dense_of(config).conv == ("gcn",)  # type: ignore[attr-defined]


def test_what_does_not_fit_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["ogbg-molhiv", "--data-root", str(data), *SMALL, *QUICK, "--seeds", "0"]
    for args, problem in (
        (["--router", "oracle"], "router: got 'oracle' for ogbg-molhiv"),
        (["--data", "x:y"], "data: got 'x:y', expected none for ogbg-molhiv"),
        (["--conv", "gcn", "gine", "sage"], "experts: got 4, expected a multiple of the 3 kinds"),
    ):
        assert problem in refused([*root, *args], capsys)
