"""The memory of a process, beside what its tensors hold."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.benchmark.__main__ import main
from experiments.benchmark.measure import Step
from experiments.benchmark.memory import (
    KINDS,
    check_memory_is_known,
    conv_step,
    conversion_step,
    inference_step,
    measure,
    serve,
    vit_step,
)
from gmoe import ROUTERS

MEBI = 2**20
SIZES = (60, 150, 8)


def holding(mebibytes: int) -> Step:
    """Twice as much at once, and nothing of it in the end."""

    def step() -> None:
        first = torch.ones(mebibytes * MEBI // 4)
        (first + 1).sum()

    return step


@pytest.mark.parametrize("mebibytes", [64, 128])
def test_the_peak_is_that_of_the_step(mebibytes: int) -> None:
    """Of the process it may be less, where memory was there, or more by what the allocator takes;
    what an earlier step had does not count."""
    found = measure(partial(holding, mebibytes), threads=1)
    assert found["alive"] == pytest.approx(2 * mebibytes * MEBI, rel=0.01)
    assert found["resident"] == pytest.approx(2 * mebibytes * MEBI, rel=0.2)


def test_steps_run() -> None:
    for kind in KINDS:
        for form in ("dense", "experts"):
            conv_step(*SIZES, kind, form)()
    for router in ROUTERS:
        conv_step(*SIZES, "gcn", router)()
    for from_disk in (False, True):
        inference_step(*SIZES, from_disk)()
    conversion_step(*SIZES)()


@pytest.mark.slow
@pytest.mark.parametrize("router", [None, *ROUTERS])
def test_images_train(router: str | None) -> None:
    vit_step(router)()


@pytest.mark.slow
def test_each_variant_has_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--nodes 2000 --edges 8000 --rows inference conversion"
    main(["memory", *sizes.split(), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["variants"]
    assert list(found) == ["layer by layer", "layer by layer, from disk", "a graph to disk"]
    assert 0 < found["layer by layer"]["alive"] < 2 * found["layer by layer"]["resident"]
    assert found["a graph to disk"]["alive"] == 0  # DuckDB's and NumPy's
    assert "process (MiB)" in capsys.readouterr().out


def test_what_threads_hold_is_noted_while_they_serve() -> None:
    calls, held = serve("gcn", 8, clients=3, seconds=0.3, threads=1)
    assert calls >= 3
    assert 5 < len(held) <= 20
    assert min(held) > 50 * MEBI


@pytest.mark.slow
def test_serving_is_measured_in_a_new_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    main(["serve", "--minutes", "0.05", "--kinds", "sage", "--json", str(path)])
    found = json.loads(path.read_text())["variants"]["sage model"]
    assert found["calls"] > 8
    assert abs(found["grown"]) < 100 * MEBI
    assert "grown (MiB)" in capsys.readouterr().out


def test_a_system_that_does_not_tell_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.benchmark.memory.STATUS", tmp_path / "status")
    with pytest.raises(ValueError, match=r"device: got a system without .*, expected Linux"):
        check_memory_is_known()
