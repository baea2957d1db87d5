"""Sweeps skip what is finished, and their variants are what they say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import experiments.loop
from experiments.build import build_model, flops, matched_width, num_parameters
from experiments.data import load_tasks
from experiments.jobs import Processes
from experiments.presets import DIGITS, DIGITS_GRAPH, MOSAIC
from experiments.studies import STUDIES, Study, Variant
from experiments.sweep import SweepConfig, main, sweep
from tests.experiments.user_data import write_npz

CLOCK = ("seconds", "peak_memory")
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    base = replace(DIGITS_GRAPH, epochs=1, seeds=(0,), hidden=4)
    study = Study(
        about="a test",
        variants=(
            Variant(name="dense", label="dense", config=replace(base, router="dense")),
            Variant(name="dense-4x", label="wide", config=replace(base, router="dense", hidden=16)),
            Variant(name="moe", label="MoE", config=base),
        ),
    )
    monkeypatch.setitem(STUDIES, "tiny", study)


@pytest.mark.usefixtures("tiny")
def test_finished_variants_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tiny", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--no-progress"]
    main([*args, "--only", "dense"])
    assert [a["variant"] for a in json.loads((tmp_path / "results" / "tiny.json").read_text())["variants"]] == [
        "dense",
        "dense-4x",
    ]
    ran: list[str] = []
    run = experiments.loop.run

    def watch(config: Any, progress: Any) -> Any:
        finished = (config.folder() / "summary.json").exists()
        ran.extend([] if finished else [config.folder().name])
        return run(config, progress)

    monkeypatch.setattr(experiments.loop, "run", watch)
    main(args)
    assert ran == ["moe"]
    assert "| MoE |" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_variant_of_the_result_file_is_finished_only_with_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["tiny", "--results", str(tmp_path / "results"), "--no-progress"]
    main([*args, "--runs", str(tmp_path / "runs")])
    path = tmp_path / "results" / "tiny.json"
    before = json.loads(path.read_text())
    main([*args, "--runs", str(tmp_path / "elsewhere")])
    assert json.loads(path.read_text()) == before
    assert not (tmp_path / "elsewhere").exists()
    moe = STUDIES["tiny"].variants[2]
    changed = replace(
        STUDIES["tiny"], variants=(*STUDIES["tiny"].variants[:2], replace(moe, config=replace(moe.config, k=2)))
    )
    monkeypatch.setitem(STUDIES, "tiny", changed)
    main([*args, "--runs", str(tmp_path / "elsewhere")])
    assert [folder.name for folder in (tmp_path / "elsewhere").iterdir()] == ["moe"]
    after = json.loads(path.read_text())
    assert after["variants"][:2] == before["variants"][:2]
    assert after["variants"][2]["config"]["k"] == 2


def test_a_grid_of_routers_experts_and_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "grid",
        "--preset",
        "digits-graph",
        "--routers",
        "random",
        "uniform",
        "--experts",
        "1",
        "4",
        "--ks",
        "1",
        "2",
    ]
    more = ["--seeds", "0", "1", "--epochs", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    main([*args, *more, "--no-progress"])
    path = tmp_path / "grid-digits-graph-seeds-0-1-epochs-1.json"
    study = json.loads(path.read_text())
    names = ["dense", "dense-4x", "random-e1-k1", "random-e4-k1", "random-e4-k2", "uniform-e1", "uniform-e4"]
    assert [variant["variant"] for variant in study["variants"]] == names
    assert all(variant["test"]["n"] == 2 for variant in study["variants"])
    assert "| `random`, E=4, K=2 |" in capsys.readouterr().out
    main(
        ["grid", "--preset", "digits-graph", "--routers", "token_choice", "--experts", "4", "4", *more, "--no-progress"]
    )
    added = ["dense", "dense-4x", "token-choice-e4-k1", "token-choice-e4-k2"]
    assert [variant["variant"] for variant in json.loads(path.read_text())["variants"]] == [*added, *names[2:]]


def test_a_grid_over_your_own_graph(tmp_path: Path) -> None:
    file = write_npz(tmp_path)
    args = ["grid", "--preset", "graph", "--routers", "random", "--experts", "2", "--ks", "1", "--seeds", "0"]
    more = ["--epochs", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--no-progress"]
    main([*args, *more, "--data-root", str(file)])
    study = json.loads((tmp_path / "grid-graph-seeds-0-epochs-1.json").read_text())
    assert {variant["config"]["file"] for variant in study["variants"]} == {"mine.npz"}


@pytest.mark.usefixtures("tiny")
def test_a_variant_that_cannot_be_run_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, wide, moe = STUDIES["tiny"].variants
    wrong = replace(wide, config=replace(wide.config, kmeans_init=True))
    monkeypatch.setitem(STUDIES, "tiny", replace(STUDIES["tiny"], variants=(dense, wrong, moe)))
    with pytest.raises(SystemExit) as stopped:
        main(["tiny", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--no-progress"])
    assert stopped.value.code == 1
    assert [variant["variant"] for variant in json.loads((tmp_path / "tiny.json").read_text())["variants"]] == [
        "dense",
        "moe",
    ]
    shown = capsys.readouterr()
    assert "| MoE |" in shown.out
    assert "dense-4x:" in shown.err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("workers", [[], pytest.param(["--ray", "local"], marks=NEEDS_RAY)], ids=["processes", "ray"])
def test_processes_give_what_one_gives(
    workers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variant that cannot be run is named; of the others all that is written is the same, but for the clock."""
    dense, wide, moe = STUDIES["tiny"].variants
    wrong = replace(wide, config=replace(wide.config, kmeans_init=True))
    several = replace(moe, config=replace(moe.config, seeds=(3, 1)))
    monkeypatch.setitem(STUDIES, "tiny", replace(STUDIES["tiny"], variants=(dense, wrong, several)))
    found: list[dict[str, Any]] = []
    for jobs in ("1", "2"):
        root = tmp_path / jobs
        args = ["tiny", "--runs", str(root / "runs"), "--results", str(root), "--threads", "1", "--jobs", jobs]
        args += workers if jobs == "2" else []
        with pytest.raises(SystemExit) as stopped:
            main(args)
        assert stopped.value.code == 1
        shown = capsys.readouterr()
        assert ("dense-4x: kmeans_init" if jobs == "1" else "dense-4x: seed 0: kmeans_init") in shown.err
        assert (jobs == "2") is ("of 4 seeds done: epoch" in shown.err)
        found.append({str(path.relative_to(root)): content_of(path) for path in root.rglob("*") if path.is_file()})
    assert found[0] == found[1]
    assert len(found[0]) > 12


def content_of(path: Path) -> Any:
    """Of a file of a run, without the clock and the memory."""
    if path.suffix == ".json":
        return json.loads(path.read_text(), object_hook=lambda one: {key: one[key] for key in one if key not in CLOCK})
    if path.suffix == ".csv":
        return [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    return path.read_bytes() if path.suffix == ".safetensors" else None


def test_a_process_that_is_killed_is_named() -> None:
    workers = Processes(1)
    job = workers.start(DIGITS, 0)
    job.kill()
    assert workers.ended([job], 60) == [job]
    assert workers.why(job) == "its process ended with status -9"


def test_ray_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stopped:
        main(["mosaic", "--ray", "auto"])
    assert stopped.value.code == 2
    assert "ray: got 'auto' without Ray, expected pip install 'gmoe[ray]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], pytest.param(["--ray", "local"], marks=NEEDS_RAY)], ids=["processes", "ray"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_processes_and_the_same_command_goes_on(
    number: int, workers: list[str], tmp_path: Path
) -> None:
    args = ["grid", "--preset", "digits", "--routers", "token_choice", "--experts", "4", "--ks", "1", "--seeds", "0"]
    args += ["--epochs", "6", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--jobs", "2", *workers]
    command = [sys.executable, "-m", "experiments.sweep", *args]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True, stderr=subprocess.PIPE)
    logs = [tmp_path / "runs" / variant / "seed-0" / "metrics.csv" for variant in ("dense", "dense-4x")]
    give_up = time.monotonic() + 200
    while not all(log.exists() for log in logs) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"stopped; the same command continues" in error
    before = [log.read_text() for log in logs]
    time.sleep(1)
    assert [log.read_text() for log in logs] == before  # nobody goes on
    assert all((log.parent / "checkpoint" / "state.ckpt").exists() for log in logs)
    main([*args, "--no-progress"])
    assert all(log.read_text().startswith(rows) for log, rows in zip(logs, before, strict=True))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tiny", "--jobs", "0"], "jobs: got 0, expected at least 1"),
        (["tiny", "--epochs", "5", "--seeds", "0"], "seeds: got (0,) with tiny, expected none: only grid takes it"),
        (["tiny", "--epochs", "5"], "epochs: got 5 with tiny, expected none: only grid takes it"),
        (["tiny", "--preset", "cora"], "preset: got 'cora' with tiny, expected none: only grid takes it"),
        (["tiny", "--routers", "random"], "routers: got ('random',) with tiny, expected none: only grid takes it"),
        (["tiny", "--experts", "8"], "experts: got (8,) with tiny, expected none: only grid takes it"),
        (["tiny", "--ks", "1", "2"], "ks: got (1, 2) with tiny, expected none: only grid takes it"),
        (["grid"], "preset: got none"),
        (["grid", "--preset", "corra"], "preset: got 'corra', expected one of digits"),
        (["grid", "--preset", "digits", "--routers", "random", "--ks", "9"], "ks: got (9,)"),
        (["grid", "--preset", "digits", "--experts", "2", "--ks", "1", "3"], "ks: got (1, 3), expected none larger"),
    ],
)
def test_bad_grids(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_unknown_study() -> None:
    with pytest.raises(ValueError, match="study: got 'cifar', expected one of mosaic, digits"):
        sweep(SweepConfig(study="cifar"))


@pytest.mark.parametrize("name", ["mosaic", "digits", "digits-graph"])
def test_variants_have_baselines_and_build(name: str) -> None:
    study = STUDIES[name]
    variants = {variant.name: variant.config for variant in study.variants}
    assert len(variants) == len(study.variants)
    assert {"dense", "dense-4x", "dense-flops-k1", "dense-parameters", "uniform"} <= set(variants)
    assert any(config.router == "random" for config in variants.values())
    assert len({(config.epochs, config.lr, config.seeds) for config in variants.values()}) == 1  # equal effort
    task = load_tasks(variants["dense"])(0)
    for config in variants.values():
        if config.equal is None:
            build_model(config, task)


@pytest.mark.parametrize("config", [MOSAIC, DIGITS, DIGITS_GRAPH], ids=lambda config: config.dataset)
def test_dense_baselines_cost_what_the_moe_costs(config: Any) -> None:
    task = load_tasks(config)(0)
    inputs = next(iter(task.loader("train", config.batch_size, None))).inputs
    moe = build_model(config, task)
    for equal, cost in (("flops", lambda model: flops(model, inputs)), ("parameters", num_parameters)):
        dense = replace(config, router="dense", equal=equal)
        width = matched_width(dense, task)
        costs = [cost(build_model(replace(dense, equal=None, hidden=w), task)) for w in (width - 1, width, width + 1)]
        target = cost(moe)
        assert abs(costs[1] - target) == min(abs(c - target) for c in costs)
        assert costs[1] == pytest.approx(target, rel=0.05)
