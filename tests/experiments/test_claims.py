"""Verdicts follow from the intervals, and the page and the figures from the result file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import ttest_ind

from experiments.claims import CLAIMS, FIGURES, claims, earliness, judge, main, training_flops, verdict_table
from experiments.studies import STUDIES

NEVER = [[0.3, 0.7, 0.8], [0.1, 0.2, 0.3]]


def variant(test: list[float], val: list[list[float]] | None = None) -> dict[str, Any]:
    val = [[0.1, 0.2, 0.3]] * len(test) if val is None else val
    curve = {"epoch": [1, 2, 3], "val": val, "loss": val}
    return {"label": "`x`", "test": {"values": test}, "curve": curve, "flops": 10, "parameters": 7, "steps": 4}


def verdict(letter: str, **variants: Any) -> Any:
    named = {name.replace("_", "-"): value for name, value in variants.items()}
    return judge(next(claim for claim in claims(named) if claim.letter == letter), named)


def test_the_interval_is_students() -> None:
    better, worse = [0.52, 0.55, 0.53], [0.50, 0.49, 0.515]
    found = verdict("a", expert_choice_k1=variant(better), token_choice_k1=variant(worse))
    interval = ttest_ind(better, worse).confidence_interval()
    assert found.difference - found.half == pytest.approx(100 * interval.low)
    assert found.difference + found.half == pytest.approx(100 * interval.high)


@pytest.mark.parametrize(
    ("letter", "mine", "other", "word"),
    [
        ("a", [0.60, 0.61], [0.50, 0.51], "holds"),
        ("a", [0.50, 0.51], [0.60, 0.61], "does not hold"),
        ("a", [0.50, 0.60], [0.49, 0.59], "cannot be told at this budget"),
        ("a", [0.60], [0.50], "cannot be told at this budget"),  # no spread is known
        ("d", [0.500, 0.501], [0.504, 0.505], "holds"),  # a little loss is let pass
        ("d", [0.470, 0.471], [0.504, 0.505], "does not hold"),
        ("c", [0.501, 0.502], [0.500, 0.503], "holds"),  # no difference is a claim of its own
        ("c", [0.480, 0.481], [0.500, 0.503], "does not hold"),
        ("c", [0.520, 0.521], [0.500, 0.503], "does not hold"),
        ("c", [0.49, 0.51], [0.500, 0.503], "cannot be told at this budget"),
    ],
)
def test_words(letter: str, mine: list[float], other: list[float], word: str) -> None:
    claim = next(claim for claim in CLAIMS if claim.letter == letter)
    named = dict(zip(claim.factors, (variant(mine), variant(other)), strict=True))
    assert judge(claim, named).word == word


def test_one_seed_borrows_the_spread_of_the_others() -> None:
    ones = {"multi_centroid_k1_four": variant([0.6]), "multi_centroid_k1_one": variant([0.5])}
    found = verdict("e", **ones, dense=variant([0.50, 0.51, 0.52]))
    assert found.word == "holds"
    assert found.half == pytest.approx(100 * 4.302653 * 0.01 * math.sqrt(2), rel=1e-5)


def test_variants_that_never_reach_the_target_say_nothing() -> None:
    assert earliness(variant([0.0] * 2, [[0.3, 0.7, 0.8], [0.5, 0.6, 0.6]])) == pytest.approx([-1.5, -1.0])
    dense, moe = variant([0.5, 0.5], [[0.1, 0.5, 0.6]] * 2), variant([0.5, 0.5], [[0.5, 0.6, 0.6]] * 2)
    found = verdict("b", dense=dense, expert_choice_k1=moe, random_k1=variant([0.1] * 2, NEVER))
    assert found.difference == pytest.approx(1.0)
    assert math.isinf(found.half)  # all seeds alike: no spread is known
    two = {"dense": variant([0.5, 0.5], NEVER), "expert-choice-k1": moe}
    assert "not every seed got to 50 %" in verdict_table(two)
    assert verdict("b", dense=two["dense"], expert_choice_k1=moe).word == "cannot be told at this budget"


def test_a_difference_of_differences() -> None:
    variants = {
        "expert-choice-k1": variant([0.64, 0.66]),
        "dense": variant([0.60, 0.60]),
        "expert-choice-k1-12": variant([0.61]),
        "dense-12": variant([0.60]),
    }
    found = judge(next(claim for claim in CLAIMS if claim.text.endswith("smaller than with 6")), variants)
    assert found.difference == pytest.approx(5.0 - 1.0)
    # variance 2 squares over 2 degrees of freedom; four means of 2, 2, 1 and 1 seeds
    assert found.half == pytest.approx(4.302653 * math.sqrt(2 / 2 * (0.5 + 0.5 + 1 + 1)), rel=1e-5)
    assert "| 2, 2, 1, 1 |  |  | cannot be told" in verdict_table(variants)


def test_flops_count_forward_and_backward() -> None:
    assert training_flops(variant([0.5])) == [120.0, 240.0, 360.0]


def test_the_studys_variants_are_those_of_the_claims() -> None:
    study = {one.name: one.config for one in STUDIES["cifar10-claims"].variants}
    assert {name for claim in CLAIMS for name in claim.factors} <= set(study)
    assert {name for _, names in FIGURES.values() for name in names.split()} <= set(study)
    for name, config in study.items():
        if config.router not in ("dense", "uniform"):  # all variants but one weigh by score
            assert config.options.weight == ("straight_through" if name.endswith("-straight") else "score")


def test_page_and_figures(tmp_path: Path) -> None:
    variants = {"expert-choice-k1": variant([0.6, 0.61]), "token-choice-k1": variant([0.5, 0.52])}
    results, page, figures = tmp_path / "cifar10-claims.json", tmp_path / "page.md", tmp_path / "figures"
    where = ["--results", str(results), "--page", str(page), "--figures", str(figures)]
    with pytest.raises(SystemExit, match="No such file"):
        main(where)
    results.write_text('{"study": "cora"}')
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="does not hold the study `cifar10-claims`"):
        main(where)
    study = {"study": "cifar10-claims", "variants": [{"variant": name, **value} for name, value in variants.items()]}
    results.write_text(json.dumps(study))
    with pytest.raises(SystemExit, match="has no place for the table"):
        main(where)
    page.write_text("before\n<!-- verdicts -->\nold\n<!-- end -->\nafter\n")
    main(where)
    assert page.read_text() == f"before\n<!-- verdicts -->\n{verdict_table(variants)}\n<!-- end -->\nafter\n"
    assert "| a | Expert choice beats token choice | +9.50 (± " in page.read_text()
    assert "| 2, 2 | 1.00× | 1.00× | holds |" in page.read_text()
    assert sorted(path.stem for path in figures.iterdir()) == [
        "claims-6-blocks",
        "claims-depth",
    ]  # the third has no variant
    assert Image.open(figures / "claims-depth.png").size[0] > 500
