"""Steps of two checkouts take turns, each in a process of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from experiments.benchmark import before
from experiments.benchmark.before import HERE, ask, compared_with, process_of, serve
from experiments.benchmark.models import ROWS, SMALL, node_row
from experiments.train.results import commit

TINY = SMALL._replace(features=6, hidden=8, layers=2)


@contextmanager
def served() -> Iterator[Connection]:
    """What a process answers, by a thread."""
    here, there = Pipe()
    thread = threading.Thread(target=serve, args=(there, 1))
    thread.start()
    try:
        yield here
    finally:
        here.close()
        thread.join()


def test_a_process_runs_the_steps_that_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "tiny", partial(node_row, "gcn", TINY))
    with served() as process:
        assert ask(process, "commit") == commit()
        names = ask(process, "row tiny")
        assert names == ["PyG", "gmoe, edge_index", "PyG again", "gmoe, Graph"]
        forward, backward, optimizer, step = ask(process, "gmoe, Graph")
        assert forward + backward + optimizer == pytest.approx(step)
        assert min(forward, backward, optimizer) > 0


def test_models_are_compared_with_those_of_the_other_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its two processes the second is slower here by a quarter."""
    (tmp_path / "experiments/benchmark").mkdir(parents=True)
    (tmp_path / "experiments/benchmark/before.py").touch()
    started: list[tuple[Path, int]] = []

    @contextmanager
    def process_of(checkout: Path, threads: int) -> Iterator[int]:
        started.append((checkout, threads))
        yield len(started) - 1

    asked: list[tuple[int, str]] = []

    def answer(process: int, name: str) -> object:
        if name == "commit":
            return "4711"
        if name.startswith("row "):
            return ["new", "both"] if process == 0 else ["both", "old"]
        asked.append((process, name))
        return (1.0, 1.0, 1.0, (3.0, 2.0, 2.5)[process])

    monkeypatch.setattr(before, "process_of", process_of)
    monkeypatch.setattr(before, "ask", answer)
    with compared_with(tmp_path, 2, repeats=4, seconds=0) as compare:
        found = compare("tiny")
    assert started == [(HERE, 2), (tmp_path, 2), (tmp_path, 2)]
    assert found == {"both": {"ratio": 1.5, "noise": 1.25, "commit": "4711"}}
    turns = [process for process, name in asked]
    assert turns == [0, 0, 1, 1, 2, 2, *rotated(7)]  # two steps of each say how many are enough


def rotated(rounds: int) -> list[int]:
    """Turns of three processes: three rounds are not timed."""
    return [(first + at) % 3 for first in range(rounds) for at in range(3)]


def test_a_folder_without_the_benchmark_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^before: got .*, expected a checkout of this project"),
        compared_with(tmp_path, 1, repeats=1, seconds=0),
    ):
        pass


def test_a_process_that_has_ended_is_named() -> None:
    here, there = Pipe()
    there.close()
    with pytest.raises(ValueError, match=r"^before: got a checkout whose process ended at 'x'"):
        ask(here, "x")


@pytest.mark.slow
def test_a_process_imports_the_checkout_that_it_is_of(tmp_path: Path) -> None:
    """Not this one, though this one is on the path too."""
    (tmp_path / "gmoe").symlink_to(HERE / "gmoe")
    shutil.copytree(HERE / "experiments", tmp_path / "experiments")
    file = tmp_path / "experiments/benchmark/before.py"
    text = file.read_text()
    assert text.count("send(commit())") == 1
    file.write_text(text.replace("send(commit())", 'send("of another checkout")'))
    with process_of(tmp_path, 1) as process:
        assert ask(process, "commit") == "of another checkout"
        assert "gmoe, Graph" in ask(process, "row small-gcn")
        assert len(ask(process, "gmoe, Graph")) == 4
