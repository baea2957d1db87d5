"""Tables are generated from result files; the README's are up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.tables import ROOT, TablesConfig, headroom, main, percent, render, study_table


def arm(name: str, values: list[float], flops: int, nmi: list[float] | None = None) -> dict[str, Any]:
    mean = sum(values) / len(values)
    std = None if len(values) < 2 else (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    figures = {"mean": mean, "std": std, "n": len(values)}
    layers = [{"nmi": {"mean": value, "std": None, "n": 1}} for value in nmi or []]
    return {"arm": name, "label": name, "metric": "accuracy", "test": figures, "flops": flops, "parameters": 1234,
            "routing": layers}  # fmt: skip


STUDY = {
    "reference": "dense",
    "wide": "dense-4x",
    "arms": [
        arm("dense", [0.70, 0.72], 100),
        arm("dense-4x", [0.90, 0.92], 400),
        arm("moe", [0.80, 0.82], 150, [0.5, 0.25]),
        arm("bad", [0.61], 150),
    ],
}


def test_study_table() -> None:
    lines = study_table(STUDY).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| moe | 81.00 ± 1.41 | 2 | 1.50× | 1,234 | 50 % | 0.500, 0.250 |" in lines
    assert "| bad | 61.00 | 1 | 1.50× | 1,234 | -50 % | – |" in lines
    assert lines[2].startswith("| dense | 71.00 ± 1.41 | 2 | 1.00× | 1,234 | – |")


def test_no_headroom_is_said() -> None:
    narrow, wide, moe = arm("dense", [0.9], 1), arm("dense-4x", [0.9], 4), arm("moe", [0.95], 1)
    assert headroom(moe, narrow, wide) == "no headroom"
    assert headroom(moe, narrow, arm("noisy", [0.90, 0.95], 4)) == "no headroom"
    assert headroom(moe, moe, wide) == "–"
    assert percent(narrow["test"]) == "90.00"


def test_check_fails_on_an_old_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: digits-graph -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="out of date"):
        main(["--pages", str(page), "--check"])
    main(["--pages", str(page)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    main(["--pages", str(page), "--check"])


def test_a_table_of_some_arms_only() -> None:
    lines = study_table(STUDY, ["moe", "dense"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| moe", "| dense"]
    with pytest.raises(ValueError, match="only: got oracle, expected some of dense, dense-4x, moe, bad"):
        study_table(STUDY, ["moe", "oracle"])


@pytest.mark.parametrize("page", TablesConfig().pages, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert render(text, ROOT / "results") == text
