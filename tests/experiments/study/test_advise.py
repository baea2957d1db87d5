"""Advice: two questions, a trial of their answers, and the command to paste."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.study import advise, front, question
from experiments.study.advise import (
    DEFAULT,
    DENSE,
    FIRST,
    FOUND,
    WIDE,
    arms_of,
    main,
    told,
    width_lines,
)
from experiments.study.question import Answer
from experiments.train.command import parse
from experiments.train.presets import DIGITS_GRAPH, MOSAIC, PRESETS
from experiments.train.scores import Difference
from tests.helpers.command import refused
from tests.helpers.user_data import write_npz

SURE = Difference(mean=5.0, low=4.0, high=6.0, n=5)
EXPERT = np.arange(1797) % 8
ANSWER = Answer(
    view="positions", differ=True, gains=dict.fromkeys(question.RIVALS, SURE), expert=EXPERT
)


UNSURE = Difference(mean=1.0, low=-1.0, high=3.0, n=3)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Small digits-graph, of which both questions are answered beforehand."""
    monkeypatch.setitem(PRESETS, "digits-graph", ("", replace(DIGITS_GRAPH, hidden=4, epochs=3)))
    monkeypatch.setattr(advise, "MOST", 3)
    monkeypatch.chdir(tmp_path)

    def answer(differ: bool, wider: Difference = UNSURE) -> None:
        monkeypatch.setattr(question, "ask", lambda *_: replace(ANSWER, differ=differ))
        monkeypatch.setattr(advise, "width_gain", lambda _: wider)

    return answer


def test_what_was_found_is_trained_beside_its_rivals(
    answered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The routing of the file, and a command that says the same; again, it is only read."""
    answered(differ=True)
    main(["digits-graph", "--out", "out"])
    printed, said = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0].startswith("no: a model 4 times as wide (16) is not surely better: +1.00 (")
    assert lines[1] == "yes: rules differ, by their place in the graph"
    assert "trial on 3 seeds, test accuracy:" in lines
    first, rest = (line for line in said.splitlines() if line.startswith("to train: "))
    assert first.startswith("to train: 2 models, 3 to 3 seeds, ")
    assert rest.startswith("to train: 4 models, 3 to 3 seeds, ")
    # To paste, beside the answer and at the end
    pasted, line = (line for line in lines if "--routing out/routing.npy" in line)
    assert pasted == f"{line} --compare"
    assert lines.index(pasted) < lines.index("trial on 3 seeds, test accuracy:")
    trained = parse(line.split("experiments.train ")[1].split())
    folder = json.loads(Path("out", FOUND, "config.json").read_text())
    assert folder["routing"] == trained.routing == "out/routing.npy"  # type: ignore[attr-defined]
    assert trained.router == folder["router"] == "oracle"
    assert np.load("out/routing.npy").tolist() == EXPERT.tolist()
    assert json.loads(Path("out/advice.json").read_text())["trial"] == lines[9:]
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")}
    assert len(before) == 6 * 3
    main(["digits-graph", "--out", "out", "--budget", "0.0001"])
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")} == before
    assert capsys.readouterr().out == printed


def test_after_two_noes_experts_are_not_tried(
    answered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answered(differ=False)
    Path("out").mkdir()
    Path("out/routing.npy").write_text("of an earlier answer")
    main(["digits-graph", "--out", "out"])
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.endswith("; so no experts for capacity")
    assert second == "no: rules do not surely differ"
    assert last.startswith(
        "so experts were not tried; the dense model: python -m experiments.train"
    )
    assert {path.name for path in Path("out").iterdir()} == {"advice.json", *FIRST}


def test_where_width_pays_experts_are_tried_without_a_routing(
    answered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answered(differ=False, wider=SURE)
    main(["digits-graph", "--out", "out"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("yes: a model 4 times as wide (16) is better: +5.00 (")
    assert any(line.startswith("  experts, the default over dense, four") for line in lines)
    assert not Path("out", FOUND).exists()
    tried = [line.split(": ")[0].strip() for line in lines if "times its FLOPs" in line]
    assert tried[-2:] == ["dense, four times as wide", "experts, the default"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (None, "what part of it experts have was measured on too few graphs"),
        (
            Difference(mean=0.5, low=0.25, high=0.75, n=7),
            "experts had 0.50 (0.25 to 0.75) of it on 7 graphs: here +1.25 to +3.75",
        ),
    ],
)
def test_what_experts_had_of_the_gain_elsewhere_is_said(
    part: Difference | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advise, "width_gain", lambda _: SURE)
    monkeypatch.setattr(front, "part_of_width", lambda _: part)
    _, line = width_lines({WIDE: {**HIGH, "hidden": 256}})
    assert line.strip() == said


def test_a_gain_that_is_not_a_number_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a training that diverged."""
    unknown = Difference.of([math.nan, 1.0, 2.0])
    monkeypatch.setattr(advise, "width_gain", lambda _: unknown)
    (line,) = width_lines({WIDE: {**HIGH, "hidden": 256}})
    assert line.startswith("no: a model 4 times as wide (256) is not surely better")


def test_edges_of_one_direction_are_asked_and_tried(
    answered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command that is printed, too."""
    answered(differ=False)
    both = replace(PRESETS["digits-graph"][1], undirected=True)  # type: ignore[call-arg]
    PRESETS["digits-graph"] = ("", both)
    main(["digits-graph", "--out", "out", "--no-undirected"])
    assert "--no-undirected" in capsys.readouterr().out.splitlines()[-1]


def test_a_budget_that_three_seeds_do_not_fit_into_is_refused(
    answered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answered(differ=True)
    said = refused(["digits-graph", "--out", "out", "--budget", "0.0001"], capsys, main)
    assert "budget: got 0.0001, expected at least" in said
    assert not list(Path("out").rglob("config.json"))


def test_the_price_is_said_and_nothing_is_asked(
    answered: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["digits-graph", "--out", "out", "--price"])
    assert capsys.readouterr().out.startswith("3 to 3 seeds, about 0.")
    assert not Path("out").exists()


def summary(*test: float, val: float = 0.5) -> dict[str, Any]:
    figures = {"mean": float(np.mean(test)), "std": 0.01, "n": len(test), "values": list(test)}
    return {"metric": "accuracy", "test": figures, "val": {"mean": val}, "flops": 1}


LOW = summary(0.50, 0.51, 0.52)
MIDDLE = summary(0.60, 0.612, 0.62)
HIGH = summary(0.70, 0.711, 0.722)


@pytest.mark.parametrize(
    ("again", "wide", "default", "found", "said", "trained"),
    [
        (LOW, HIGH, MIDDLE, {**HIGH, "val": {"mean": 0.9}}, "experts are surely", FOUND),
        (LOW, LOW, {**HIGH, "val": {"mean": 0.9}}, HIGH, "experts are surely", DEFAULT),
        (HIGH, LOW, MIDDLE, MIDDLE, "no experts are surely", "dense-input-again"),
        (HIGH, {**HIGH, "val": {"mean": 0.7}}, LOW, LOW, "no experts are surely", WIDE),
        (MIDDLE, LOW, LOW, summary(0.9, 0.4, 0.8), "no experts are surely", "dense-input-again"),
    ],
)
def test_experts_are_advised_above_all_dense_models_of_their_width_alone(
    again: Any, wide: Any, default: Any, found: Any, said: str, trained: str
) -> None:
    """Validation chooses among those that are; else among all dense models."""
    values = (LOW, LOW, {**again, "val": {"mean": 0.6}}, wide, default, found)
    summaries = dict(zip((*DENSE, WIDE, DEFAULT, FOUND), values, strict=True))
    lines = told(summaries, ANSWER, arms_of(MOSAIC, Path("routing.npy"), 8))
    (place,) = (number for number, line in enumerate(lines) if "surely above all dense" in line)
    assert lines[place].startswith(said)
    assert advise.label_of(trained, "positions") in lines[place]
    assert any("--routing routing.npy" in line for line in lines[place:])


def test_few_nodes_are_refused_before_anything_is_asked(tmp_path: Path, capsys: Any) -> None:
    args = ["graph", "--data-root", str(write_npz(tmp_path)), "--out", str(tmp_path / "out")]
    assert "got 24 nodes to train and validate, expected at least 100" in refused(
        args, capsys, main
    )
    assert not (tmp_path / "out").exists()


def test_a_split_that_the_metric_does_not_fit_is_refused_before_the_first_is_trained(
    tmp_path: Path, capsys: Any
) -> None:
    """Three nodes of a class are in validation with some seeds alone."""
    edges = np.stack([np.arange(200), np.roll(np.arange(200), 1)])
    arrays: dict[str, Any] = {"x": np.eye(200)[:, :4], "y": np.arange(200) < 3, "edge_index": edges}
    np.savez(tmp_path / "rare.npz", **arrays)
    root = ["--data-root", str(tmp_path / "rare.npz"), "--out", str(tmp_path / "out")]
    said = refused(["graph", *root, "--metric", "roc_auc"], capsys, main)
    assert "nodes of one class only in val of seed" in said
    assert not (tmp_path / "out").exists()


def test_offline_downloads_nothing_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def connected(*_: Any, **__: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("socket.socket.connect", connected)
    root = ["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    error = refused(["cora", *root, "--offline"], capsys, main)
    assert "offline" in error
    assert str(tmp_path / "data") in error
