"""Advice: what differences say, and that a command says it in three lines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import advise
from experiments.advise import judge, main
from experiments.presets import DIGITS, DIGITS_GRAPH, PRESETS


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([2.0, 2.1], "not told"),  # two are too few
        ([2.0, 2.1, 1.9], "yes"),
        ([2.0, 2.0, 2.0], "not told"),  # by chance the same
        ([0.1, 0.12, 0.11], "no"),  # above 0, and not worth having
        ([-2.0, -2.1, -1.9], "no"),
        ([2.0, -2.0, 1.0], "not told"),
        ([2.0, -2.0, 1.0] * 3 + [0.0], "no"),  # ten without a difference
        ([1.0, 0.8, 1.2, 0.4, 1.6, 1.0, 0.7, 1.3, 0.9, 1.1], "yes"),
    ],
)
def test_what_differences_say(differences: list[float], verdict: str) -> None:
    assert judge(differences).verdict == verdict


def test_the_interval_is_students() -> None:
    """Of ten at 95 %, of fewer at 99 %: the mean of 1 to n and its standard error, times the quantile of the tables."""
    for n, quantile in ((10, 2.262), (5, 4.604)):
        found = judge([float(value) for value in range(n)])
        half = quantile * (n * (n + 1) / 12) ** 0.5 / n**0.5
        assert found.interval == pytest.approx(((n - 1) / 2 - half, (n - 1) / 2 + half), abs=1e-3)


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small presets, and at most three splits."""
    small = {"digits-graph": replace(DIGITS_GRAPH, hidden=2, epochs=15), "digits": replace(DIGITS, hidden=8, epochs=1)}
    for name, config in small.items():
        monkeypatch.setitem(PRESETS, name, ("", config))
    monkeypatch.setattr(advise, "MOST", 2)


@pytest.mark.parametrize(
    ("name", "headroom"),
    [
        ("digits-graph", "yes"),
        ("digits-graph", "no"),
        ("digits-graph", "not told"),
        pytest.param("digits", "yes", marks=pytest.mark.slow),
    ],
)
def test_three_lines(
    name: str, headroom: advise.Verdict, presets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Experts are tried where there is headroom; the same command reads what is there."""
    judged = advise.judge

    def told(differences: list[float]) -> advise.Difference:
        return replace(judged(differences), verdict=headroom if len(differences) == 2 else "not told")

    monkeypatch.setattr(advise, "judge", told)
    monkeypatch.chdir(tmp_path)
    main([name, "--out", "out", "--data-root", "my data"])
    *_, first, second, third = capsys.readouterr().out.splitlines()
    found = json.loads(Path("out/advice.json").read_text())
    assert found["lines"] == [first, second, third]
    tried = sorted(path.name for path in Path("out").iterdir() if path.is_dir())
    if headroom == "yes":
        assert len(tried) == 5
        assert found["step"] > 0
        assert third.startswith(f"use them: python -m experiments.train {name} --data-root 'my data' --")
        assert found["setting"] in advise.arms_of(PRESETS[name][1])
    else:
        assert tried == ["dense", "dense-4x"]
        assert third.startswith("do not" if headroom == "no" else "not told")
    assert first in Path("out/index.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")}
    main([name, "--out", "out", "--data-root", "my data"])
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("result.json")} == before


def test_the_budget_ends_it(presets: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One turn is made, and the next that would not fit is not."""
    main(["digits-graph", "--out", str(tmp_path), "--budget", "0.001", "--width", "2"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("not told")
    assert len(list(tmp_path.rglob("result.json"))) == 2
