"""The benchmarks compute what they say, and compare it in turns."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.benchmark import gpu, measure
from experiments.benchmark.__main__ import main
from experiments.benchmark.models import ROWS as MODELS
from experiments.benchmark.step import StepBenchmark
from experiments.benchmark.tables import DTYPES, WAYS, benchmark_lines

CPU = torch.device("cpu")


def found_by(command: str, tmp_path: Path) -> dict[str, Any]:
    main([*command.split(), "--repeats", "2", "--json", str(tmp_path / "found.json")])
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())["variants"]
    return found


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns = [0.0], list[str]()
    monkeypatch.setattr("experiments.benchmark.measure.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("experiments.benchmark.measure.time.process_time", lambda: 2 * now[0])

    def variant(name: str, seconds: float) -> None:
        turns.append(name)
        now[0] += seconds

    steps = {
        "a": lambda: variant("a", 1.0),
        "b": lambda: variant("b", 3.0),
        "c": lambda: variant("c", 5.0),
    }
    found = measure.take_turns(steps, repeats=2, device=CPU)
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["b"]["wall"] == {"median": 3.0, "min": 3.0, "max": 3.0, "values": [3.0, 3.0]}
    assert found["c"]["cpu"]["median"] == 10.0


def test_peak_memory_is_that_of_what_lives_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def step() -> Tensor:
        a = torch.ones(256, 1024)
        b = a + 1  # two of 1 MiB
        del a
        return b * 2

    assert measure.peak_bytes(step, CPU) == pytest.approx(2 * 2**20, abs=100)
    assert measure.peak_bytes(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""  # what the profiler says of itself


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("step --threads -1", "threads: got -1, expected a number of at least 0"),
        ("step --repeats 0", "repeats: got 0, expected at least 1"),
        ("gpu --rows", "rows: got nothing, expected at least one"),
        ("step --rows cora", "rows: got 'cora', expected one of"),
        ("step --seconds -1", "seconds: got -1.0, expected a number of at least 0"),
        ("step --json .", "json: got ., expected a file, not a folder"),
    ],
)
def test_options_of_which_nothing_can_be_measured_are_refused(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(command.split())
    assert said in capsys.readouterr().err


# on a GPU, dry ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_for_gpus_finds_every_row_equal(tmp_path: Path) -> None:
    found = found_by("gpu --device cpu", tmp_path)
    models = [*found][len(gpu.ROWS) :]
    assert [*found][: len(gpu.ROWS)] == [*gpu.ROWS]
    assert {name.partition(", ")[0] for name in models} == set(StepBenchmark().rows)
    assert all(found[name]["ratio"]["step"] > 0 for name in models)
    for name in gpu.ROWS:
        figures = found[name]
        assert "error" not in figures, (name, figures)
        assert figures["waits"] == {"fp32": {}, "bf16": {}}  # of which a CPU has none
        compared = figures["equal"] | figures["ways"]
        assert set(compared) == {*DTYPES, *WAYS} - {"captured"}
        assert all(of["within"] for of in compared.values()), (name, compared)


def test_a_row_that_differs_from_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.run

    def wrong(*args: Any) -> list[Tensor]:
        values = right(*args)
        values[-1] += 1e-3 * next(errors) * max(float(value.abs().max()) for value in values[1:])
        return values

    errors = itertools.cycle([0, 1])  # the CPU's come first
    monkeypatch.setattr(gpu, "run", wrong)
    model = gpu.opened(gpu.ROWS["gcn"]().build()).eval()
    equal = gpu.compared(model, gpu.inputs_of(**gpu.SIZES).graph, CPU)
    assert equal["float64"] == pytest.approx(
        {"output": 0, "gradients": 1e-3, "within": False, "tolerance": 1e-9}
    )
    assert not equal["float32"]["within"]
    lines = benchmark_lines({"gcn, fp32": {"equal": equal, "error": "none"}})
    assert lines[0]["float64"] == "NOT EQUAL"


def test_a_row_that_fails_costs_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory\nsomewhere")

    monkeypatch.setattr(gpu, "WAYS", {})
    monkeypatch.setitem(gpu.ROWS, "gcn", lambda: gpu.Row("graph", fails))
    monkeypatch.setitem(MODELS, "small-sage", fails)
    rows = ["gcn", "sage", "small-sage", "small-gcn"]
    found = found_by(f"gpu --device cpu --rows {' '.join(rows)}", tmp_path)
    assert (
        found["gcn"] == found["small-sage"] == {"error": "RuntimeError: out of memory\nsomewhere"}
    )
    assert found["sage"]["equal"]["float64"]["within"]
    first, second, third, fourth, *_ = benchmark_lines(found)
    assert first["error"] == third["error"] == "RuntimeError: out of memory"
    assert (second["error"], second["waits, bf16"], second["step (ms)"]) == ("–", "0", "–")
    assert (fourth["error"], fourth["waits, bf16"], fourth["×"]) == ("–", "–", "1.00")


@pytest.mark.parametrize("way", ["bf16", "sharded", "twice"])
def test_a_way_to_run_a_layer_is_compared(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WAYS", {way: gpu.WAYS[way]} if way in gpu.WAYS else {})
    model = gpu.opened(gpu.ROWS["sage"]().build()).eval()
    inputs = gpu.inputs_of(nodes=30, tokens=1, images=1).graph
    found = gpu.compared_ways(model, inputs, CPU)
    assert found[way]["within"], found
    assert found[way]["tolerance"] <= 0.1


def test_a_way_that_differs_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(gpu.Autocast):
        def forward(self, *inputs: Tensor) -> Tensor:
            return 2 * super().forward(*inputs)

    def fails(_: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "WAYS", {"bf16": (Doubled, 0.1), "sharded": (fails, 1e-4)})
    model = gpu.opened(gpu.ROWS["sage"]().build()).eval()
    found = gpu.compared_ways(model, gpu.inputs_of(nodes=30, tokens=1, images=1).graph, CPU)
    assert found["sharded"] == {"error": "RuntimeError: no such kernel"}
    assert found["twice"]["within"]
    (line,) = benchmark_lines({"sage, fp32": {"ways": found, "error": "none"}})
    assert (line["bf16"], line["sharded"], line["twice"]) == ("NOT EQUAL", "fails", "equal")


def test_waits_are_counted_by_name_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "WAITS", {"aten::nonzero", "aten::unique_dim"})
    x = torch.randn(4, requires_grad=True)

    def look(_: Tensor) -> None:
        x.nonzero()

    def step() -> None:
        x.nonzero()
        y = x * 2
        y.register_hook(look)  # in the backward pass
        y.sum().backward()

    class Around(torch.profiler.record_function):
        """The profiler itself waits beside the step."""

        def __enter__(self) -> Any:
            x.nonzero()
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            x.nonzero()

    monkeypatch.setattr(gpu, "record_function", Around)
    assert gpu.waits_of(step, CPU) == {"aten::nonzero": 2}


def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["gpu", "--rows", "gcn"])
    assert (
        "device: got 'cuda' without such a device, expected a machine that has one"
        in capsys.readouterr().err
    )
