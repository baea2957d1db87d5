"""Tables are generated from result files; the README's are up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.tables import (
    ROOT,
    TablesConfig,
    benchmark_table,
    headroom,
    main,
    pair_table,
    percent,
    render,
    study_table,
)


def variant(name: str, values: list[float], flops: int, nmi: list[float] | None = None) -> dict[str, Any]:
    mean = sum(values) / len(values)
    std = None if len(values) < 2 else (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    figures = {"mean": mean, "std": std, "n": len(values)}
    layers = [{"nmi": {"mean": value, "std": None, "n": 1}} for value in nmi or []]
    return {"variant": name, "label": name, "metric": "accuracy", "test": figures, "flops": flops, "parameters": 1234,
            "routing": layers}  # fmt: skip


STUDY = {
    "reference": "dense",
    "wide": "dense-4x",
    "variants": [
        variant("dense", [0.70, 0.72], 100),
        variant("dense-4x", [0.90, 0.92], 400),
        variant("moe", [0.80, 0.82], 150, [0.5, 0.25]),
        variant("bad", [0.61], 150),
    ],
}


def test_study_table() -> None:
    lines = study_table(STUDY).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| moe | 81.00 ± 1.41 | 2 | 1.50× | 1,234 | 50 % | 0.500, 0.250 |" in lines
    assert "| bad | 61.00 | 1 | 1.50× | 1,234 | -50 % | – |" in lines
    assert lines[2].startswith("| dense | 71.00 ± 1.41 | 2 | 1.00× | 1,234 | – |")


def test_no_headroom_is_said() -> None:
    narrow, wide, moe = variant("dense", [0.9, 0.9], 1), variant("dense-4x", [0.9, 0.9], 4), variant("moe", [0.95], 1)
    assert headroom(moe, narrow, wide) == "no headroom"
    assert headroom(moe, narrow, variant("noisy", [0.90, 0.95], 4)) == "no headroom"
    assert headroom(moe, moe, wide) == "–"
    assert percent(moe["test"]) == "95.00"


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"error: .*page\.md: .*No such file"),
        ("<!-- table: nothing -->\n<!-- end -->", r"error: .*page\.md: .*No such file.*nothing\.json"),
        ("<!-- table: digits: nobody -->\n<!-- end -->", r"error: .*page\.md: only: got nobody"),
    ],
)
def test_what_a_page_asks_in_vain(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "page.md").write_text(text)
    with pytest.raises(SystemExit, match=message):
        main(["--pages", str(tmp_path / "page.md")])


def test_a_table_of_some_variants_only() -> None:
    lines = study_table(STUDY, ["moe", "dense"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| moe", "| dense"]
    with pytest.raises(ValueError, match="only: got oracle, expected some of dense, dense-4x, moe, bad"):
        study_table(STUDY, ["moe", "oracle"])


def test_pairs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    seeds = {"config": {"seeds": [0, 1, 2]}}
    one = variant("one", [0.5, 0.6, 0.7], 1) | seeds
    two = variant("two", [0.49, 0.62, 0.67], 1) | seeds
    for each, values in ((one, [0.5, 0.6, 0.7]), (two, [0.49, 0.62, 0.67])):
        each["test"]["values"] = values
    study = {
        "reference": "one",
        "wide": "two",
        "variants": [one, two, variant("other", [0.5], 1) | {"config": {"seeds": [7]}}],
    }
    lines = pair_table(study, ["one/two"]).splitlines()
    assert lines[2:] == ["| one | two | +0.67 ± 2.52 | 2 of 3 |"]
    for pair in ("one", "one/three", "one/two/one"):
        with pytest.raises(ValueError, match=f"pairs: got '{pair}', expected VARIANT/OTHER of one, two"):
            pair_table(study, [pair])
    with pytest.raises(ValueError, match="other seeds"):
        pair_table(study, ["one/other"])
    chosen = pair_table(study | {"chosen_on": [1]}, ["one/two"]).splitlines()
    assert chosen[0].endswith("| better in | without splits 1, which chose the variants |")
    assert chosen[2] == "| one | two | +0.67 ± 2.52 | 2 of 3 | +2.00 ± 1.41 |"
    (tmp_path / "s.json").write_text(json.dumps(study))
    page = render("<!-- pairs: s: one/two two/one -->\n<!-- end -->\n", tmp_path)
    assert "| two | one | -0.67 ± 2.52 | 1 of 3 |" in page


def test_what_routing_follows_is_shown() -> None:
    layers = [{f"ami_{name}": {"mean": value} for name, value in (("degree", 0.5), ("label", x))} for x in (0.1, 0.3)]
    study = {**STUDY, "variants": [STUDY["variants"][0], variant("moe", [0.8], 1) | {"routing": layers}]}
    lines = study_table(study).splitlines()
    assert lines[0].endswith("| AMI of expert and degree, label; mean of layers |")
    assert [line.rsplit(" | ", 1)[1] for line in lines[2:]] == ["– |", "0.50, 0.20 |"]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("page", TablesConfig().pages, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert render(text, ROOT / "results") == text


def test_headroom_needs_a_spread() -> None:
    one = {**STUDY, "variants": [variant("dense", [0.5], 1), variant("dense-4x", [0.9], 4), variant("moe", [0.8], 1)]}
    assert study_table(one).splitlines()[0].endswith("| n | active FLOPs | parameters |")  # an empty column is left out
    assert study_table(one).splitlines()[1] == "|---|---:|---:|---:|---:|"
    two = {
        **STUDY,
        "variants": [variant("dense", [0.5, 0.5], 1), variant("dense-4x", [0.9, 0.9], 4), variant("moe", [0.7], 1)],
    }
    assert [line.split(" | ")[-1] for line in study_table(two).splitlines()[2:]] == ["– |", "– |", "50 % |"]


def test_benchmark_table() -> None:
    figures = {"median": 0.5, "min": 0.25, "max": 1.0, "values": [0.25, 0.5, 1.0]}
    variant = {
        "wall": figures,
        "cpu": figures,
        "memory": 3 * 2**20,
        "ratio": {"wall": 1.5, "cpu": 2.0, "flops": None, "memory": 1},
    }
    where = {
        "versions": {"torch": "2", "torch-geometric": "3"}, "cpu": "C", "gpu": "G", "threads": 2, "commit": "0123456789"
    }  # fmt: skip
    lines = benchmark_table(
        {"variants": {"ours": variant}, "environment": where, "config": {"device": "cpu"}}
    ).splitlines()
    assert lines[2] == "| ours | 500.0 | 250.0 | 1,000.0 | 1.500 | 2.000 | – | 3 |"
    assert lines[-1] == "C, 2 threads; torch 2, torch-geometric 3; commit 0123456."
    found = {"variants": {"ours": variant}, "environment": where, "config": {"device": "cuda"}}
    assert benchmark_table(found).splitlines()[-1].startswith("G, ")


def test_benchmark_table_of_training() -> None:
    variant = {"batches": 2, "parts": {"data": 1.0, "rest": 3.0}, "share": {"data": 0.25, "rest": 0.75}}
    where = {
        "versions": {"torch": "2", "torch-geometric": "3"},
        "cpu": "C",
        "gpu": None,
        "threads": 1,
        "commit": "01234567",
    }
    lines = benchmark_table({"variants": {"digits": variant}, "environment": where, "config": {}}).splitlines()
    assert lines[0] == "| preset | batches | seconds | data (%) | rest (%) |"
    assert lines[2] == "| digits | 2 | 4.000 | 25.0 | 75.0 |"
