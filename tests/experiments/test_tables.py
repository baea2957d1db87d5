"""Tables are generated from result files; those of the docs are up to date."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments.tables import gain_table, pair_table, render, study_table, swap_line, update


def variant(name: str, values: list[float], flops: int = 1, layers: Any = ()) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    test = {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}
    return {"variant": name, "label": name, "metric": "accuracy", "test": test, "flops": flops, "parameters": 1234,
            "routing": layers, "config": {"seeds": list(range(len(values)))}}  # fmt: skip


def study(*variants: dict[str, Any]) -> dict[str, Any]:
    return {"reference": "dense", "wide": "dense-4x", "variants": list(variants)}


DENSE, WIDE = variant("dense", [0.70, 0.72], 100), variant("dense-4x", [0.90, 0.92], 400)


def test_the_docs_are_up_to_date() -> None:
    update(check=True)


def test_check_fails_on_an_old_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: digits-graph -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match=r"page\.md is out of date"):
        update((page,), check=True)
    update((page,))
    before, _, rest = page.read_text().partition("\n| variant |")
    assert before == "before\n<!-- table: digits-graph -->"
    assert rest.endswith("\n<!-- end -->\nafter\n")


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ("table: nothing", r"No such file.*nothing\.json"),
        ("table: digits: nobody", "only: got nobody, expected"),
        ("swap: mosaic", r"results/mosaic\.json: lacks what the mark 'swap' shows .AttributeError"),
        ("pairs: benchmark-conv: a/b", r"results/benchmark-conv\.json: lacks .* .TypeError"),
        ("table: presets", r"results/presets\.json: lacks .* .KeyError.'reference'"),
        ("gains: routers: nowhere", r"results/routers: lacks .* 'gains' shows .KeyError.'nowhere'"),
    ],
)
def test_what_a_page_asks_in_vain(mark: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"<!-- {mark} -->\n<!-- end -->")
    with pytest.raises(SystemExit, match=rf"error: .*page\.md: .*{message}"):
        update((tmp_path / "page.md",))


def test_headroom() -> None:
    for dense, wide, recovered in (
        (0.9, 0.9, "no headroom"),
        (0.9, 0.95, "no headroom"),
        (0.5, 0.9, "110 %"),
    ):
        ends = variant("dense", [dense] * 2), variant("dense-4x", [min(0.9, wide), wide])
        found = study_table(study(*ends, variant("moe", [0.94])))
        assert [line.split(" | ")[5] for line in found.splitlines()[2:]] == [
            "– |",
            "– |",
            f"{recovered} |",
        ]


def test_pairs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    pairs = study(
        variant("one", [0.5, 0.6, 0.7]), variant("two", [0.49, 0.62, 0.67]), variant("other", [0.5])
    )
    assert pair_table(pairs, ["one/two"]).splitlines()[2:] == [
        "| one | two | +0.67 ± 2.52 | 2 of 3 |"
    ]
    for pair, message in (
        ("one", "expected VARIANT/OTHER of one"),
        ("one/x", "VARIANT"),
        ("one/other", "other seeds"),
    ):
        with pytest.raises(ValueError, match=f"pairs: got '{pair}', .*{message}"):
            pair_table(pairs, [pair])
    (tmp_path / "s.json").write_text(json.dumps(pairs | {"chosen_on": [1]}))
    chosen = render("<!-- pairs: s: two/one one/two -->\n<!-- end -->\n", tmp_path).splitlines()
    assert chosen[1].endswith("| better in | without seeds 1, which chose the variants |")
    assert chosen[4] == "| one | two | +0.67 ± 2.52 | 2 of 3 | +2.00 ± 1.41 |"


def test_a_gain_is_the_difference_to_equal_flops() -> None:
    cells = {
        "graph": {
            "dense-flops": variant("dense-flops", [0.90, 0.92]),
            "token-choice": variant("token-choice", [0.91, 0.95]),
            "dense-parameters": variant("dense-parameters", [0.89, 0.92]),
        }
    }
    head, _, line = gain_table(cells, ["graph"]).splitlines()
    labels = "dense, equal active FLOPs | token choice | dense, equal parameters"
    assert head == f"| test (points) | {labels} |"
    assert line == "| graph | 91.00 | +2.00 ± 1.41 | -0.50 ± 0.71 |"


def test_ok_is_within_a_standard_deviation() -> None:  # of 81 ± 1.41: from 79.59 on
    rest = {"off": 0.5, "share": [], "live": []}
    for moe, n, ok in ((0.8, 2, "ok"), (0.795, 2, "no"), (0.8, 1, "ok"), (0.799, 1, "no")):
        dense = [{"seed": seed, "test": test} for seed, test in enumerate([0.8, 0.82][:n])]
        assert (
            swap_line(
                {"runs": {"dense": dense, "moe": [run | rest | {"test": moe} for run in dense]}}
            )["ok"]
            == ok
        )


def test_a_swap_compares_the_seeds_that_both_have() -> None:
    dense = [{"seed": seed, "test": test} for seed, test in enumerate([0.8, 0.82, 0.1])]
    moe = [
        {"seed": seed, "test": 0.83, "off": 0.7, "share": [0.1, 0.3], "live": [8.0, 4.0]}
        for seed in (0, 1)
    ]
    line = swap_line({"runs": {"dense": dense, "moe": moe, "random": dense[:1]}})
    assert (line["n"], line["dense"], line["random"]) == ("2", "81.00 ± 1.41", "80.00 (1)")
