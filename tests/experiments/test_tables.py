"""Tables are generated from result files; the pages' are up to date."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments.tables import ROOT, TablesConfig, benchmark_table, main, pair_table, render, study_table, swap_line

WHERE = {
    "versions": {"torch": "2", "torch-geometric": "3"},
    "cpu": "C",
    "gpu": "G",
    "threads": 2,
    "commit": "0123456789",
}


def variant(name: str, values: list[float], flops: int, nmi: tuple[float, ...] = (), **layer: float) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    test = {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}
    layers = [{"nmi": {"mean": value, "std": None}} for value in nmi]
    layers += [{name: {"mean": value} for name, value in layer.items()}] if layer else []
    config = {"seeds": list(range(len(values)))}
    return {"variant": name, "label": name, "metric": "accuracy", "test": test, "flops": flops, "parameters": 1234,
            "routing": layers, "config": config}  # fmt: skip


def study(*variants: dict[str, Any]) -> dict[str, Any]:
    return {"reference": "dense", "wide": "dense-4x", "variants": list(variants)}


DENSE, WIDE = variant("dense", [0.70, 0.72], 100), variant("dense-4x", [0.90, 0.92], 400)
STUDY = study(DENSE, WIDE, variant("moe", [0.80, 0.82], 150, (0.5, 0.25)), variant("bad", [0.61], 150))


def test_study_table() -> None:
    lines = study_table(STUDY).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[1] == "|---|---:|---:|---:|---:|---:|---|"
    assert "| moe | 81.00 ± 1.41 | 2 | 1.50× | 1,234 | 50 % | 0.500, 0.250 |" in lines
    assert "| bad | 61.00 | 1 | 1.50× | 1,234 | -50 % | – |" in lines
    assert lines[2].startswith("| dense | 71.00 ± 1.41 | 2 | 1.00× | 1,234 | – |")
    chosen = study_table(STUDY, ["moe", "dense"]).splitlines()
    assert [line.split(" | ")[0] for line in chosen[2:]] == ["| moe", "| dense"]
    with pytest.raises(ValueError, match="only: got oracle, expected some of dense, dense-4x, moe, bad"):
        study_table(STUDY, ["moe", "oracle"])


@pytest.mark.parametrize(
    ("dense", "wide", "recovered"),
    [
        ([0.9, 0.9], [0.9, 0.9], "no headroom"),
        ([0.9, 0.9], [0.90, 0.95], "no headroom"),
        ([0.5, 0.5], [0.9, 0.9], "110 %"),
    ],
)
def test_headroom(dense: list[float], wide: list[float], recovered: str) -> None:
    found = study_table(study(variant("dense", dense, 1), variant("dense-4x", wide, 4), variant("moe", [0.94], 1)))
    assert [line.split(" | ")[5] for line in found.splitlines()[2:]] == ["– |", "– |", f"{recovered} |"]


def test_a_column_of_which_nothing_is_known_is_left_out() -> None:
    one = study(variant("dense", [0.5], 1), variant("dense-4x", [0.9], 4), variant("moe", [0.8], 1))  # without a spread
    assert study_table(one).splitlines()[0].endswith("| n | active FLOPs | parameters |")


def test_what_routing_follows_is_shown() -> None:
    lines = study_table(study(DENSE, variant("moe", [0.8], 1, ami_degree=0.5, ami_label=0.2))).splitlines()
    assert lines[0].endswith("| AMI of expert and degree, label; mean of layers |")
    assert [line.rsplit(" | ", 1)[1] for line in lines[2:]] == ["– |", "0.50, 0.20 |"]


def test_check_fails_on_an_old_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: digits-graph -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="out of date"):
        main(["--pages", str(page), "--check"])
    main(["--pages", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- table")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    main(["--pages", str(page), "--check"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: nothing -->\n<!-- end -->", r"error: .*page\.md: .*No such file.*nothing\.json"),
        ("<!-- table: digits: nobody -->\n<!-- end -->", r"error: .*page\.md: only: got nobody"),
    ],
)
def test_what_a_page_asks_in_vain(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(SystemExit, match=message):
        main(["--pages", str(tmp_path / "page.md")])


def test_pairs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    one, two = variant("one", [0.5, 0.6, 0.7], 1), variant("two", [0.49, 0.62, 0.67], 1)
    pairs = study(one, two, variant("other", [0.5], 1))
    assert pair_table(pairs, ["one/two"]).splitlines()[2:] == ["| one | two | +0.67 ± 2.52 | 2 of 3 |"]
    for pair in ("one", "one/three", "one/two/one"):
        with pytest.raises(ValueError, match=f"pairs: got '{pair}', expected VARIANT/OTHER of one, two"):
            pair_table(pairs, [pair])
    with pytest.raises(ValueError, match="other seeds"):
        pair_table(pairs, ["one/other"])
    chosen = pair_table(pairs | {"chosen_on": [1]}, ["one/two"]).splitlines()
    assert chosen[0].endswith("| better in | without splits 1, which chose the variants |")
    assert chosen[2] == "| one | two | +0.67 ± 2.52 | 2 of 3 | +2.00 ± 1.41 |"
    (tmp_path / "s.json").write_text(json.dumps(pairs))
    page = render("<!-- pairs: s: one/two two/one -->\n<!-- end -->\n", tmp_path)
    assert "| two | one | -0.67 ± 2.52 | 1 of 3 |" in page


@pytest.mark.parametrize("page", TablesConfig().pages, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path) -> None:
    assert render(page.read_text(), ROOT / "results") == page.read_text()


def test_benchmark_tables() -> None:
    figures = {"median": 0.5, "min": 0.25, "max": 1.0}
    layer = {"wall": figures, "memory": 3 * 2**20, "ratio": {"wall": 1.5, "cpu": 2.0, "flops": None}}
    train = {"batches": 2, "parts": {"data": 1.0, "rest": 3.0}, "share": {"data": 0.25, "rest": 0.75}}
    for variants, head, line in (
        (
            {"ours": layer},
            "| variant | wall (ms) | from |",
            "| ours | 500.0 | 250.0 | 1,000.0 | 1.500 | 2.000 | – | 3 |",
        ),
        (
            {"digits": train},
            "| preset | batches | seconds | data (%) | rest (%) |",
            "| digits | 2 | 4.000 | 25.0 | 75.0 |",
        ),
    ):
        found = {"variants": variants, "environment": WHERE, "config": {"device": "cuda"}}
        lines = benchmark_table(found).splitlines()
        assert lines[0].startswith(head)
        assert lines[2] == line
        assert lines[-1] == "G, 2 threads; torch 2, torch-geometric 3; commit 0123456."


@pytest.mark.parametrize(
    ("dense", "moe", "ok"),
    [
        ([0.80, 0.82], [0.80, 0.80], "ok"),  # 81 - 1.41 is 79.59
        ([0.80, 0.82], [0.795, 0.795], "no"),
        ([0.80], [0.80], "ok"),
        ([0.80], [0.799], "no"),
    ],
)
def test_ok_is_within_a_standard_deviation(dense: list[float], moe: list[float], ok: str) -> None:
    runs: dict[str, Any] = {"dense": [{"seed": seed, "test": test} for seed, test in enumerate(dense)]}
    runs["moe"] = [{"seed": seed, "test": test, "off": 0.5, "share": [], "live": []} for seed, test in enumerate(moe)]
    assert swap_line({"runs": runs})["ok"] == ok


def test_a_swap_compares_the_seeds_that_both_have() -> None:
    dense = [{"seed": seed, "test": test} for seed, test in enumerate([0.8, 0.82, 0.1])]
    moe = [{"seed": seed, "test": 0.83, "off": 0.7, "share": [0.1, 0.3], "live": [8.0, 4.0]} for seed in (0, 1)]
    seconds = {"dense": 0.01, "moe": 0.03, "dense-flops": 0.02, "shared-transform": 0.015}
    time = {arm: {"wall": {"median": value}} for arm, value in seconds.items()} | {"layers": 2}
    line = swap_line({"runs": {"dense": dense, "moe": moe, "random": dense[:1], "oracle": dense[:2]}, "time": time})
    assert (line["n"], line["dense"], line["moe"]) == ("2", "81.00 ± 1.41", "83.00 ± 0.00")
    assert (line["moe − dense"], line["ok"], line["moe-off"]) == ("+2.00", "ok", "70.00 ± 0.00")
    assert (line["share"], line["live"], line["k-means"]) == ("0.10 0.30", "8 4", "–")
    assert (line["random"], line["oracle"]) == ("80.00 (1)", "81.00 ± 1.41")  # the one has fewer seeds
    assert (line["ms dense / moe / flops"], line["×"], line["+ms a layer"]) == ("10.0 / 30.0 / 20.0", "3.00", "10.0")
    assert line["× shared-transform"] == "1.50"
    assert set(swap_line({"runs": {}, "time": None}).values()) == {"–"}
