"""The map of when experts pay: its graphs, and that it goes on where it was cut off."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.study import regime_map
from experiments.study.sweep import main
from experiments.train.data.load import load_tasks
from experiments.train.presets import MOSAIC


def test_the_map_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds a place once, is written after each."""
    monkeypatch.setattr(
        regime_map, "BASE", replace(regime_map.BASE, epochs=1, eval_every=1, seeds=(0,))
    )
    monkeypatch.setattr(regime_map, "PLACES", ((2, 8),))
    monkeypatch.setattr(regime_map, "WAYS", ("communities",))
    args = ["map", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--no-progress"]
    main(args)
    path = tmp_path / "regime-map-concept.json"
    found = json.loads(path.read_text())
    assert [entry["model"] for entry in found["places"]] == list(regime_map.MODELS)
    assert {
        len(entry["nmi"]) for entry in found["places"] if entry["model"] in ("experts", "oracle")
    } == {1}
    assert all(entry["flops"] > 0 and len(entry["test"]) == 1 for entry in found["places"])
    del found["config"]["features"]  # of before this option
    path.write_text(json.dumps(found | {"places": found["places"][1:]}))
    main(args)
    again = json.loads(path.read_text())
    assert [*again["places"][-1:], *again["places"][:-1]] == found["places"]
    assert "| communities | 2 | 8 |" in capsys.readouterr().out.replace("|  ", "| ")


def test_rows_differ_in_what_they_say() -> None:
    """Controls have the regime, or the reverse edges, and the FLOPs of the default experts."""
    of = {place["model"]: config for place, config in regime_map.places() if place["labels"] == 512}
    assert of["told"].dataset == f"{of['dense-flops'].dataset}-told"
    assert [name for name, config in of.items() if config.undirected] == ["reverse"]  # type: ignore[attr-defined]
    assert [name for name, config in of.items() if config.equal] == [
        "dense-flops",
        "reverse",
        "told",
    ]
    assert of["experts"].start is None
    assert of["oracle"].experts == 8
    assert of["oracle"].start == "copies"


@pytest.mark.parametrize(
    "name", ["regimes-0-8-features", "regimes-2-801-features", "regimes-2-8-colors", "regimes-2"]
)
def test_unknown_regimes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="dataset: got 'regimes-"):
        load_tasks(replace(MOSAIC, dataset=name))


def test_regimes_of_mosaic_are_mosaic() -> None:
    """8 regimes of 500 labels are as many nodes as mosaic has, which is drawn in the same way."""
    one: Any = load_tasks(replace(MOSAIC, dataset="regimes-8-500-features"))(0)
    other: Any = load_tasks(MOSAIC)(0)
    assert one.graph.x.equal(other.graph.x)
    assert len(one.split["train"]) == 4000
    assert one.planted.bincount().tolist() == [1000] * 8
