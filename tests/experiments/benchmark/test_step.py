"""Training steps of models: what is compared, what is written, and what the table says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.benchmark import step
from experiments.benchmark.__main__ import main
from experiments.benchmark.measure import kept_bytes
from experiments.benchmark.models import ROWS, SMALL, Row, Training, Variant, node_row
from experiments.benchmark.tables import benchmark_lines

CPU = torch.device("cpu")
TINY = SMALL._replace(features=6, hidden=8, layers=2)
NAMES = ["PyG", "gmoe, edge_index", "PyG again", "gmoe, Graph"]
MEBI = 2**20


@pytest.fixture(autouse=True)
def tiny_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ROWS, "tiny", partial(node_row, "gcn", TINY))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def written_by(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "found.json"
    command = ["step", "--rows", "tiny", "--repeats", "2", "--seconds", "0"]
    main([*command, *options, "--json", str(file)])
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def test_models_of_a_row_are_compared_with_the_first(tmp_path: Path) -> None:
    content = written_by(tmp_path)
    found = content["variants"]
    assert [*found] == [f"tiny, {name}" for name in NAMES]
    base = found["tiny, PyG"]
    for figures in found.values():
        assert figures["repeats"] == 2
        for part in ("forward", "backward", "optimizer", "step"):
            assert figures["least"][part] > 0
            ratio = figures["least"][part] / base["least"][part]
            assert figures["ratio"][part] == pytest.approx(ratio)
        assert figures["ratio"]["memory"] == figures["memory"] / base["memory"]
        assert 0 < figures["kept"] <= figures["memory"]
    assert found["tiny, PyG again"]["ratio"]["memory"] == 1
    assert found["tiny, gmoe, Graph"]["ratio"]["parameters"] > 4
    assert content["config"]["rows"] == ["tiny"]
    assert "before" not in content["config"]
    assert len(content["load"]) == 3


def test_each_model_is_compiled_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the caches of the one before forgotten, and without its training."""
    done: list[str] = []

    def note(model: nn.Module) -> nn.Module:
        done.append(type(model).__name__)
        return model

    monkeypatch.setattr(torch, "compile", note)
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("reset"))
    found = written_by(tmp_path, "--compiled")["variants"]
    others = [f"{name}, compiled" for name in NAMES if name != "PyG again"]
    assert [*found] == [f"tiny, {name}" for name in [*NAMES, *others]]
    assert done == ["reset", "GCN", "reset", "GNNMoE", "reset", "GNNMoE"]


@pytest.mark.slow
def test_compiled_models_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, but no code is made of them."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = written_by(tmp_path, "--compiled")["variants"]
    assert found["tiny, gmoe, Graph, compiled"]["ratio"]["step"] > 0


def test_a_compiled_model_stands_beside_the_first_of_its_own_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs: list[list[str]] = []

    def compare(trainings: dict[str, Training], **_: Any) -> dict[str, Any]:
        pairs.append([*trainings])
        return {name: {} for name in trainings}

    monkeypatch.setattr(step, "compare", compare)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    step.StepBenchmark(rows=("tiny",), compiled=True).of_row("tiny")
    assert pairs == [NAMES, *[["PyG", "compiled"]] * 3]


def test_the_table_has_no_empty_columns(tmp_path: Path) -> None:
    first, *_ = benchmark_lines(written_by(tmp_path)["variants"])
    costs = ["kept (MiB)", "peak (MiB)", "× peak"]
    assert [*first] == ["variant", "step (ms)", "×", "forward", "backward", "optimizer", *costs]
    assert first["×"] == first["× peak"] == "1.00"


def test_each_row_is_written_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Row:
        raise RuntimeError("in the second row")

    monkeypatch.setitem(ROWS, "failing", fails)
    with pytest.raises(RuntimeError, match="in the second row"):
        written_by(tmp_path, "--rows", "tiny", "failing")
    found = json.loads((tmp_path / "found.json").read_text())["variants"]
    assert [*found] == [f"tiny, {name}" for name in NAMES]


class Keeping(nn.Module):
    """Keeps its input for the backward pass; what is between input and result passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(MEBI // 4))

    def forward(self) -> Tensor:
        torch.ones(MEBI)  # 4 MiB
        return (torch.ones(MEBI // 4) * self.weight).sum()


def test_what_is_kept_is_what_the_backward_pass_needs() -> None:
    model = Keeping()
    assert kept_bytes(model, CPU) == pytest.approx(MEBI, abs=1000)
    with torch.no_grad():
        assert kept_bytes(model, CPU) < 1000


def test_the_peak_of_a_step_has_the_gradients_too() -> None:
    training = Training(Variant(Keeping(), lambda model: model()), CPU)
    training()  # Adam's moments are there from now on
    (figures,) = step.compare({"own": training}, repeats=1, seconds=0, device=CPU).values()
    assert figures["kept"] == pytest.approx(MEBI, abs=1000)
    assert 4 * MEBI <= figures["memory"] <= 5.1 * MEBI
