"""Advice: what differences say, and that a command says it in one line, or three."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.study import advise
from experiments.study.advise import judge, main
from experiments.train.config import RunConfig
from experiments.train.presets import DIGITS, DIGITS_GRAPH, PRESETS
from tests.helpers.command import quick, refused


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([2.0, 2.1], "inconclusive"),  # two are too few
        ([2.0, 2.1, 1.9], "yes"),
        ([2.0, 2.0, 2.0], "inconclusive"),  # by chance the same
        ([0.1, 0.12, 0.11], "no"),  # above 0, and not worth having
        ([-2.0, -2.1, -1.9], "no"),
        ([2.0, -2.0, 1.0], "inconclusive"),
        ([2.0, -2.0, 1.0] * 3 + [0.0], "no"),  # ten without a difference
        ([1.0, 0.8, 1.2, 0.4, 1.6, 1.0, 0.7, 1.3, 0.9, 1.1], "yes"),
    ],
)
def test_what_differences_say(differences: list[float], verdict: str) -> None:
    assert judge(differences).verdict == verdict


def test_the_interval_is_students() -> None:
    """Of ten at 95 %, of fewer at 99 %.

    The mean of 1 to n and its standard error, times the quantile of the tables.
    """
    for n, quantile in ((10, 2.262), (5, 4.604)):
        found = judge([float(value) for value in range(n)])
        half = quantile * (n * (n + 1) / 12) ** 0.5 / n**0.5
        assert found.interval == pytest.approx(((n - 1) / 2 - half, (n - 1) / 2 + half), abs=1e-3)


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small presets, and at most three splits."""
    small = {
        "digits-graph": replace(DIGITS_GRAPH, hidden=2, epochs=15),
        "digits": replace(DIGITS, hidden=8, epochs=1),
    }
    for name, config in small.items():
        monkeypatch.setitem(PRESETS, name, ("", config))
    monkeypatch.setattr(advise, "MOST", 2)


@pytest.mark.parametrize(
    ("name", "headroom"),
    [
        pytest.param("digits-graph", "yes", marks=pytest.mark.slow),
        ("digits-graph", "no"),
        ("digits-graph", "inconclusive"),
        pytest.param("digits", "yes", marks=pytest.mark.slow),
    ],
)
# Fmt: skip
def test_three_lines(
    name: str,
    headroom: advise.Verdict,
    presets: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Experts are tried where there is headroom; the same command reads what is there."""
    judged = advise.judge

    def told(differences: list[float]) -> advise.Judged:
        verdict: advise.Verdict = headroom if len(differences) == 2 else "inconclusive"
        return replace(judged(differences), verdict=verdict)

    monkeypatch.setattr(advise, "judge", told)
    monkeypatch.chdir(tmp_path)
    main([name, "--out", "out", "--data-root", "my data", "--compare"])
    *_, first, second, third = capsys.readouterr().out.splitlines()
    found = json.loads(Path("out/advice.json").read_text())
    assert found["lines"] == [first, second, third]
    tried = sorted(path.name for path in Path("out").iterdir() if path.is_dir())
    if headroom == "yes":
        assert len(tried) == 5
        assert found["step"] > 0
        assert third.startswith(
            f"use them: python -m experiments.train {name} --data-root 'my data'"
        )
        assert found["setting"] in advise.arms_of(PRESETS[name][1])
    else:
        assert tried == ["dense", "dense-4x"]
        expected = {"no": "do not use experts", "inconclusive": "inconclusive: the time is up"}
        assert third.startswith(expected[headroom])
    assert first in Path("out/index.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")}
    main([name, "--out", "out", "--data-root", "my data", "--compare"])
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")} == before


@pytest.mark.parametrize("name", ["digits-graph", "digits"])
def test_the_length_of_the_first_turn_is_said_before_it_begins(
    name: str, presets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """In the second line at once, where a pipe gets no other progress."""
    begun = list[list[str]]()

    def run(config: RunConfig) -> None:
        begun.append(capsys.readouterr().err.splitlines())
        raise ValueError("it is enough")

    monkeypatch.setattr("experiments.train.loop.run", run)
    assert "it is enough" in refused([name, "--out", str(tmp_path), "--compare"], capsys, main)
    ((first, *_, second),) = begun
    assert first.startswith("comparing a dense model with one four times as wide")
    epochs = PRESETS[name][1].epochs
    turn = f"the first turn (dense and dense-4x, {epochs} epochs on one split) takes about "
    assert re.fullmatch(re.escape(turn) + r"\d+ seconds", second)


def test_the_length_is_that_of_all_epochs(presets: None, tmp_path: Path) -> None:
    def seconds(epochs: int) -> float:
        base = replace(PRESETS["digits-graph"][1], epochs=epochs)
        return advise.Comparison(base, tmp_path, 60).seconds_of(("dense", "dense-4x"))

    assert seconds(10_000) > 50 * seconds(10)


def test_the_budget_ends_it(
    presets: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One turn is made, and the next that would not fit is not."""
    main(["digits-graph", "--out", str(tmp_path), "--budget", "0.001", "--width", "2", "--compare"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("inconclusive: the time is up")
    assert len(list(tmp_path.rglob("result.json"))) == 2


def test_questions_come_first_and_point_to_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One answer, its figures, and a command; nothing is trained."""
    monkeypatch.setattr("experiments.study.questions.SPLITS", 3)
    main(["digits-graph", "--out", str(tmp_path), "--width", "8"])
    answer, *figures, more = capsys.readouterr().out.splitlines()
    assert answer.startswith("nothing: ")
    assert figures[0].startswith("one linear model on x, Ax, A²x: 9")
    assert figures[-3].startswith("a dense model 32 wide over 8 wide: test ")
    assert figures[-1].startswith("  given the degree, over itself: test ")
    assert more.endswith(
        f"advise digits-graph --out {tmp_path} --data-root data --compare --width 8"
    )
    found = json.loads((tmp_path / "questions.json").read_text())
    assert found["line"] == answer
    assert found["figures"] == figures
    assert [path.name for path in tmp_path.iterdir()] == ["questions.json"]


def test_where_rules_differ_the_expert_of_each_node_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments.study.questions import Answer, Survey

    expert = torch.tensor([1, 0, 2])
    said = Answer(
        kind="rules", choice="positions", line="rules differ", figures=[], gains={}, expert=expert
    )
    monkeypatch.setattr(Survey, "answer", lambda _: said)
    main(["concept-4-32-communities", "--out", str(tmp_path)])
    assert np.load(tmp_path / "regimes.npy").tolist() == [1, 0, 2]
    assert capsys.readouterr().out.splitlines()[0] == "rules differ"
    nothing = replace(said, kind="nothing", expert=None)
    monkeypatch.setattr(Survey, "answer", lambda _: nothing)
    main(["concept-4-32-communities", "--out", str(tmp_path)])
    assert not (tmp_path / "regimes.npy").exists()  # it would be an earlier answer's


@pytest.mark.parametrize(
    ("rules_differ", "verdicts", "lines"),
    [
        (False, "no", ["experts: not tried, since they need headroom", "do not use experts"]),
        (False, "yes", ["experts: not tried, since no time is left", "inconclusive: the time is"]),
        (False, "inconclusive", ["experts: not tried, since headroom is not sure", "inconclusive"]),
        (True, "no", ["experts: not tried, since no time is left", "inconclusive: the time is"]),
        (True, "no no", ["experts (route-once): ", "do not use these two settings: rules differ"]),
        (True, "no yes", ["experts (route-once): ", "use them: python -m experiments.train"]),
        (False, "yes no", ["experts (route-once): ", "do not use experts"]),
    ],
)
def test_no_headroom_says_nothing_of_experts_where_rules_differ(
    rules_differ: bool, verdicts: str, lines: list[str], tmp_path: Path
) -> None:
    """Verdicts of the dense models and, if there is time, of experts."""
    data = advise.data_of(DIGITS_GRAPH)
    answer = {"kind": "rules" if rules_differ else "nothing", "data": data}
    (tmp_path / "questions.json").write_text(json.dumps(answer))
    found: Any = [
        advise.Judged(mean=1.0, interval=None, n=10, verdict=verdict)  # type: ignore[arg-type]
        for verdict in verdicts.split()
    ]

    class Told(advise.Comparison):
        def foretell(self, names: Any) -> None: ...

        def told(self, *_: Any) -> Any:
            return found.pop(0) if found else None

        def difference(self, *_: Any) -> Any:
            return advise.Judged(mean=1.0, interval=None, n=10, verdict="yes")

        def step_ratio(self, arm: str) -> float:
            return 2.0

        def better(self) -> str:
            return "route-once"

    (_, *said), _ = advise.advice(Told(DIGITS_GRAPH, tmp_path, 60))
    assert all(map(str.startswith, said, lines)), said


def test_answers_about_other_data_are_not_read(tmp_path: Path, capsys: Any) -> None:
    answer = {"kind": "rules", "data": advise.data_of(DIGITS_GRAPH)}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(answer))
    wider = replace(DIGITS_GRAPH, hidden=64)
    assert advise.answer_of(wider, tmp_path) == answer
    assert advise.answer_of(replace(DIGITS_GRAPH, dataset="mosaic"), tmp_path) == {}
    assert f"{path} is of other data, and not read" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["--no-undirected"]])
def test_edges_in_one_direction_are_what_is_compared_then(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from experiments.study.questions import Answer, Survey

    choice = None if args else "one way"
    said = Answer(kind="inputs", choice=choice, line="one", figures=[], gains={}, expert=None)
    monkeypatch.setattr(Survey, "answer", lambda _: said)
    main(["concept-4-32-communities", "--out", str(tmp_path), *args])
    printed = capsys.readouterr().out.splitlines()[-1].partition("experiments.advise ")[2]
    assert printed.endswith("--compare --no-undirected")
    bases: list[Any] = []
    monkeypatch.setattr(advise, "compare_with_experts", lambda base, *_: bases.append(base))
    main(printed.split())
    assert [base.undirected for base in bases] == [False]
    message = "undirected: got False for digits, expected a preset of nodes"
    assert message in refused(["digits", "--out", str(tmp_path), "--no-undirected"], capsys, main)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--width 0", "width: got 0, expected at least 1"),
        ("--budget 0", "budget: got 0.0, expected minutes above 0"),
        ("--out file", "out: got file, expected a folder that can be written to"),
    ],
)
def test_what_cannot_be_asked_is_refused_at_once(
    args: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert message in refused(["digits-graph", "--out", "new", *args.split()], capsys, main)


def test_what_no_question_fits_is_compared_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.study.questions.MOST_NODES", 100)
    monkeypatch.setattr(advise, "compare_with_experts", lambda *_: print("compared"))
    main(["digits-graph", "--out", str(tmp_path)])
    why, compared = capsys.readouterr().out.splitlines()
    assert why.startswith("no questions asked: the graph has more than 100 nodes")
    assert compared == "compared"


@pytest.mark.parametrize("args", [["cora"], ["cora", "--compare"], ["cifar10"]])
def test_offline_downloads_nothing_and_says_what_is_missing(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def connected(*_: Any, **__: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("socket.socket.connect", connected)
    root = ["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    error = refused([*args, *root, "--offline"], capsys, main)
    assert "offline" in error
    assert str(tmp_path / "data") in error


@pytest.mark.slow
def test_commands_that_are_printed_stay_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Of advise, and of a run that names its dense model."""
    monkeypatch.setattr("experiments.study.questions.SPLITS", 2)
    main(["digits-graph", "--out", str(tmp_path / "advice"), "--width", "8", "--offline"])
    *_, last = capsys.readouterr().out.splitlines()
    assert "--offline" in last.split()
    quick(tmp_path / "run", "--offline")
    lines = [line for line in capsys.readouterr().out.splitlines() if "to compare: " in line]
    assert [line.split()[-1] for line in lines] == ["--offline"]
