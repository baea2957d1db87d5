"""Verdicts follow from the intervals, and the page and the figures from the result file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import ttest_ind

from experiments.claims import FIGURES, accuracy, claims, earliness, judge, main, training_flops, verdict_table
from experiments.studies import STUDIES


def variant(test: list[float], val: list[list[float]] | None = None, flops: int = 10) -> dict[str, Any]:
    val = [[0.1, 0.2, 0.3]] * len(test) if val is None else val
    epochs = list(range(1, len(val[0]) + 1))
    return {
        "label": "`x`",
        "test": {"values": test},
        "curve": {"epoch": epochs, "val": val, "loss": val},
        "flops": flops,
        "parameters": 7,
        "steps": 4,
    }


def verdict(letter: str, **variants: Any) -> Any:
    named = {name.replace("_", "-"): value for name, value in variants.items()}
    claim, *_ = (claim for claim in claims(named) if claim.letter == letter)
    return judge(claim, named)


def test_the_interval_is_students() -> None:
    better, worse = [0.52, 0.55, 0.53], [0.50, 0.49, 0.515]
    found = verdict("a", expert_choice_k1=variant(better), token_choice_k1=variant(worse))
    interval = ttest_ind(better, worse).confidence_interval()
    assert found.difference - found.half == pytest.approx(100 * interval.low)
    assert found.difference + found.half == pytest.approx(100 * interval.high)
    assert found.word == ("holds" if interval.low > 0 else "cannot be told at this budget")


@pytest.mark.parametrize(
    ("mine", "other", "word"),
    [
        ([0.60, 0.61], [0.50, 0.51], "holds"),
        ([0.50, 0.51], [0.60, 0.61], "does not hold"),
        ([0.50, 0.60], [0.49, 0.59], "cannot be told at this budget"),
        ([0.60], [0.50], "cannot be told at this budget"),  # no spread is known
    ],
)
def test_words(mine: list[float], other: list[float], word: str) -> None:
    assert verdict("a", expert_choice_k1=variant(mine), token_choice_k1=variant(other)).word == word


def test_one_seed_borrows_the_spread_of_the_others() -> None:
    found = verdict(
        "e",
        multi_centroid_k1_four=variant([0.6]),
        multi_centroid_k1_one=variant([0.5]),
        dense=variant([0.50, 0.51, 0.52]),
    )
    assert found.word == "holds"
    assert found.half == pytest.approx(100 * 4.302653 * 0.01 * math.sqrt(2), rel=1e-5)


def test_a_margin_lets_a_little_loss_pass() -> None:
    close = {"attention_vote_k1": variant([0.500, 0.501]), "expert_choice_k1": variant([0.504, 0.505])}
    assert verdict("d", **close).word == "holds"
    far = {"attention_vote_k1": variant([0.470, 0.471]), "expert_choice_k1": variant([0.504, 0.505])}
    assert verdict("d", **far).word == "does not hold"


@pytest.mark.parametrize(
    ("mine", "word"),
    [
        ([0.501, 0.502], "holds"),
        ([0.480, 0.481], "does not hold"),
        ([0.520, 0.521], "does not hold"),
        ([0.49, 0.51], "cannot be told at this budget"),
    ],
)
def test_no_difference_is_a_claim_of_its_own(mine: list[float], word: str) -> None:
    assert verdict("c", expert_choice_k1_12=variant(mine), dense_12=variant([0.500, 0.503])).word == word


def test_epochs_to_reach_the_target() -> None:
    assert earliness(variant([0.0] * 2, [[0.3, 0.7, 0.8], [0.5, 0.6, 0.6]])) == pytest.approx([-1.5, -1.0])
    assert earliness(variant([0.0] * 2, [[0.3, 0.7, 0.8], [0.1, 0.2, 0.3]])) is None
    dense, moe = variant([0.5, 0.5], [[0.1, 0.5, 0.6]] * 2), variant([0.5, 0.5], [[0.5, 0.6, 0.6]] * 2)
    found = verdict("b", dense=dense, expert_choice_k1=moe)
    assert found.difference == pytest.approx(1.0)
    assert math.isinf(found.half)  # all seeds alike: no spread is known
    assert found.word == "cannot be told at this budget"


def test_variants_that_never_reach_the_target_say_nothing() -> None:
    dense, moe = variant([0.5, 0.5], [[0.4, 0.5], [0.3, 0.6]]), variant([0.5, 0.5], [[0.5, 0.6], [0.4, 0.8]])
    never = variant([0.1] * 3, [[0.1, 0.2]] * 3)
    two = {"dense": dense, "expert_choice_k1": moe}
    assert verdict("b", **two, random_k1=never) == verdict("b", **two)
    found = verdict("b", dense=never, expert_choice_k1=moe)
    assert found.word == "cannot be told at this budget"
    named = {"dense": never, "expert-choice-k1": moe}
    assert "not every seed got to 50 %" in verdict_table(named)


def test_a_difference_of_differences() -> None:
    variants = {
        "expert-choice-k1": variant([0.64, 0.66]),
        "dense": variant([0.60, 0.60]),
        "expert-choice-k1-12": variant([0.61]),
        "dense-12": variant([0.60]),
    }
    claim = next(claim for claim in claims(variants) if claim.text.endswith("smaller than with 6"))
    found = judge(claim, variants)
    assert found.difference == pytest.approx(5.0 - 1.0)
    # variance 2 squares over 2 degrees of freedom; four means of 2, 2, 1 and 1 seeds
    assert found.half == pytest.approx(4.302653 * math.sqrt(2 / 2 * (0.5 + 0.5 + 1 + 1)), rel=1e-5)
    assert "| 2, 2, 1, 1 |  |  | cannot be told" in verdict_table(variants)


def test_flops_count_forward_and_backward() -> None:
    assert training_flops(variant([0.5], flops=10)) == [120.0, 240.0, 360.0]
    assert accuracy(variant([0.5])) == [50.0]


def test_the_studys_variants_are_those_of_the_claims() -> None:
    variants = {one.name: variant([0.5]) for one in STUDIES["cifar10-claims"].variants}
    assert "".join(claim.letter for claim in claims(variants)) == "aabbbbbbbbccddde"
    drawn = {name for _, names in FIGURES.values() for name in names}
    assert drawn <= set(variants)


def test_all_variants_but_one_weigh_by_score() -> None:
    for one in STUDIES["cifar10-claims"].variants:
        if one.config.router not in ("dense", "uniform"):
            weight = "straight_through" if one.name.endswith("-straight") else "score"
            assert one.config.router_options()["weight"] == weight, one.name


def test_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = {"expert-choice-k1": variant([0.6, 0.61]), "token-choice-k1": variant([0.5, 0.52])}
    (tmp_path / "cifar10-claims.json").write_text(
        json.dumps(
            {"study": "cifar10-claims", "variants": [{"variant": name, **value} for name, value in variants.items()]}
        )
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- verdicts -->\nold\n<!-- end -->\nafter\n")
    where = [
        "--results",
        str(tmp_path / "cifar10-claims.json"),
        "--page",
        str(page),
        "--figures",
        str(tmp_path / "figures"),
    ]
    main(where)
    text = page.read_text()
    assert text == f"before\n<!-- verdicts -->\n{verdict_table(variants)}\n<!-- end -->\nafter\n"
    assert "| a | Expert choice beats token choice | +9.50 (± " in text
    assert "| 2, 2 | 1.00× | 1.00× | holds |" in text
    assert "\nold\n" not in text
    assert "holds" in capsys.readouterr().out
    drawn = ["claims-6-blocks", "claims-depth"]  # of the third, no variant is there
    assert sorted(path.stem for path in (tmp_path / "figures").iterdir()) == drawn
    for name in drawn:
        assert Image.open(tmp_path / "figures" / f"{name}.png").size[0] > 500
    before = [(tmp_path / "figures" / f"{name}.png").read_bytes() for name in drawn]
    main(where)
    assert before == [(tmp_path / "figures" / f"{name}.png").read_bytes() for name in drawn]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    where = ["--results", str(tmp_path / "none.json"), "--page", str(tmp_path / "page.md")]
    with pytest.raises(SystemExit, match=r"none\.json is missing"):
        main(where)
    (tmp_path / "page.md").write_text("no marks")
    (tmp_path / "none.json").write_text("{")
    with pytest.raises(SystemExit, match=r"none\.json is no JSON"):
        main(where)
    (tmp_path / "none.json").write_text('{"study": "cora", "variants": []}')
    with pytest.raises(SystemExit, match="does not hold the study `cifar10-claims`"):
        main(where)
    (tmp_path / "none.json").write_text('{"study": "cifar10-claims"}')
    with pytest.raises(SystemExit, match="does not hold the study `cifar10-claims`"):
        main(where)
    (tmp_path / "none.json").write_text(
        '{"study": "cifar10-claims", "variants": [{"variant": "dense", "label": "dense"}]}'
    )
    with pytest.raises(SystemExit, match="has variants without figures: dense"):
        main(where)
    (tmp_path / "none.json").write_text('{"study": "cifar10-claims", "variants": []}')
    with pytest.raises(SystemExit, match="has no place for the table"):
        main(where)
