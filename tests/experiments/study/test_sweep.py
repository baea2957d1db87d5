"""Sweeps skip what is finished.

Their variants say all that they rely on, presets leave it to the library.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gmoe
from experiments.study import sweep as command
from experiments.study.studies import RECORDED, Study, Variant, grid, recorded
from experiments.study.sweep import GridConfig, SweepConfig, main, make_study, refusal
from experiments.train import loop
from experiments.train.config import (
    GraphConfig,
    HeteroConfig,
    ImageConfig,
    MoleculeConfig,
    RunConfig,
)
from experiments.train.presets import DIGITS, DIGITS_GRAPH, PRESETS
from experiments.train.run_folder import described

BASE = replace(DIGITS_GRAPH, epochs=1, seeds=(0,), hidden=4)
DENSE = Variant(name="dense", label="dense", config=replace(BASE, router="dense"))
WIDE = Variant(name="dense-4x", label="wide", config=replace(BASE, router="dense", hidden=16))
MOE = Variant(name="moe", label="MoE", config=replace(BASE, seeds=(3, 1)))
WRONG = replace(WIDE, config=replace(WIDE.config, kmeans_init=True))


@pytest.fixture
def run_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a study of some variants; its results."""
    monkeypatch.setitem(command.STUDIES, "tiny", ("", SweepConfig()))

    def run(
        *variants: Variant, to: Path = tmp_path, runs: str = "runs", args: tuple[str, ...] = ()
    ) -> Any:
        monkeypatch.setattr(
            command, "recorded", lambda *_: Study(about="a test", variants=variants)
        )
        main(["tiny", "--runs", str(to / runs), "--results", str(to), *args])
        return json.loads((to / "tiny.json").read_text())

    return run


def test_finished_variants_are_skipped(
    run_study: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_study(WIDE, DENSE)
    ran = list[str]()
    train_seed = loop.train_seed

    def watch(fabric: Any, config: Any, *rest: Any) -> Any:
        ran.append(f"{config.folder().name} {rest[1]}")
        return train_seed(fabric, config, *rest)

    monkeypatch.setattr(loop, "train_seed", watch)
    found = run_study(DENSE, WIDE, MOE)
    assert [variant["variant"] for variant in found["variants"]] == ["dense", "dense-4x", "moe"]
    assert "| MoE |" in capsys.readouterr().out
    assert run_study(MOE, DENSE, runs="elsewhere") == found
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(SystemExit):
        run_study(replace(DENSE, config=replace(DENSE.config, lr=0.5)), runs="elsewhere")
    assert "tiny.json holds dense with lr=0.01, expected 0.5" in " ".join(
        capsys.readouterr().err.split()
    )
    assert ran == ["moe 3", "moe 1"]


@pytest.mark.slow
def test_processes_give_what_one_gives(
    run_study: Callable[..., Any], tmp_path: Path, capsys: Any
) -> None:
    """A variant that cannot be run is named.

    Of the others all that is written is the same, but for the clock.
    """
    found = list[dict[str, Any]]()
    for jobs in ("1", "2"):
        root = tmp_path / jobs
        with pytest.raises(SystemExit) as stopped:
            run_study(DENSE, WRONG, MOE, to=root, args=("--jobs", jobs))
        assert stopped.value.code == 1
        shown = capsys.readouterr()
        assert "| MoE |" in shown.out
        why = (
            "kmeans_init"
            if jobs == "1"
            else "seed 0 ended with status 2: error: kmeans_init: got True"
        )
        assert f"dense-4x: {why}" in shown.err
        assert (jobs == "2") is ("4 of 4 seeds ended" in shown.err)
        found.append(
            {
                str(path.relative_to(root)): content_of(path)
                for path in root.rglob("*")
                if path.is_file()
            }
        )
    assert found[0] == found[1]
    assert len(found[0]) > 12


def content_of(path: Path) -> Any:
    """Of a file of a run, without the clock and the memory."""
    if path.suffix == ".json":
        return json.loads(
            path.read_text(), object_hook=lambda one: one | {"seconds": 0, "peak_memory": 0}
        )
    if path.suffix == ".csv":
        return [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    return path.read_bytes() if path.suffix == ".safetensors" else None


def test_a_grid_of_routers_experts_and_k() -> None:
    config = GridConfig(
        preset="digits",
        routers=("random", "uniform", "random"),
        experts=(1, 4),
        data_root=Path("a"),
    )
    name, study = make_study("grid", replace(config, seeds=(5,)))
    variants = {variant.name: variant for variant in study.variants}
    assert (name, variants["random-e4-k2"].label) == ("grid-digits", "`random`, E=4, K=2")
    routed = ["random-e1-k1", "random-e4-k1", "random-e4-k2", "uniform-e1", "uniform-e4"]
    assert list(variants) == ["dense", "dense-4x", *routed]
    own = {"experts": 4, "k": 2, "router": "random", "seeds": (5,), "data_root": Path("a")}
    assert variants["random-e4-k2"].config == replace(DIGITS, **own)  # type: ignore[arg-type]
    assert variants["dense-4x"].config.hidden == 4 * DIGITS.hidden


def test_a_router_that_takes_no_k_has_one_variant() -> None:
    study = grid("digits", ("soft_slots", "random"), (4,), (1, 2))
    names = [variant.name for variant in study.variants]
    assert names[2:] == ["soft-slots-e4", "random-e4-k1", "random-e4-k2"]


def test_results_are_finished_where_their_data_are_not_here(tmp_path: Path) -> None:
    """What is not here cannot differ; what is here may not."""
    config = replace(PRESETS["graph"][1], data_root=tmp_path / "mine.npz")
    held = described(config) | {"digest": "0123456789abcdef"}
    assert refusal("dense", config, held, tmp_path) == ""
    (tmp_path / "mine.npz").write_bytes(b"other data")
    assert "with digest='0123456789abcdef'" in refusal("dense", config, held, tmp_path)
    assert "with lr=" in refusal("dense", replace(config, lr=9.0), held, tmp_path)


STUDIED: dict[str, RunConfig] = {
    f"{name}/{variant.name}": variant.config
    for name in RECORDED
    for variant in recorded(name, Path()).variants
}


@pytest.mark.parametrize("name", STUDIED)
def test_studies_leave_nothing_to_the_library(name: str) -> None:
    config = STUDIED[name]
    # Of a matched model, what it is matched to
    router = config.router if config.equal is None else config.equal_to
    made = gmoe.OracleRouter if router == "oracle" else gmoe.ROUTERS.get(router)
    takes = (
        set() if made is None else {"weight", "balance"} & inspect.signature(made).parameters.keys()
    )
    assert takes <= config.options.given().keys()
    layers = {"start"} | ({"router_input"} if isinstance(config, GraphConfig) else set())
    assert config.layer_options().keys() == layers


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_routing_to_the_library(name: str) -> None:
    config = PRESETS[name][1]
    assert config.layer_options() == config.options.given() == {}
    models = {
        ImageConfig: gmoe.ViTMoE,
        HeteroConfig: gmoe.HeteroGNNMoE,
        GraphConfig: gmoe.GNNMoE,
        MoleculeConfig: gmoe.GNNMoE,
    }
    (model,) = (model for kind, model in models.items() if isinstance(config, kind))
    default = inspect.signature(model).parameters["router"].default
    assert (config.router, config.equal_to) == (default, default)


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ("curves", "columns: got nowhere, expected some of mosaic, minesweeper, facebook, digits"),
        ("starts", "columns: got nowhere, expected some of digits-graph, "),
        ("routers", "columns: got nowhere, expected some of digits, cifar10, "),
    ],
)
def test_each_study_by_columns_runs_its_own(
    study: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([study, "--columns", "nowhere", "--results", str(tmp_path)])
    assert expected in " ".join(capsys.readouterr().err.split())
