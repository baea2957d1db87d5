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
    for name, values in {
        "REGIMES": (1, 2),
        "LABELS": (8,),
        "WIDTHS": (4,),
        "WAYS": ("features",),
    }.items():
        monkeypatch.setattr(regime_map, name, values)
    args = ["map", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path), "--no-progress"]
    main(args)
    path = tmp_path / "regime-map.json"
    found = json.loads(path.read_text())
    assert len(found["places"]) == 8
    assert {
        len(entry["nmi"]) for entry in found["places"] if entry["model"] in ("experts", "oracle")
    } == {2}
    del found["config"]["features"]  # of before this option
    path.write_text(json.dumps(found | {"places": found["places"][1:]}))
    main(args)
    again = json.loads(path.read_text())
    assert [*again["places"][-1:], *again["places"][:-1]] == found["places"]
    assert "| features | 4 | 8 |" in capsys.readouterr().out.replace("|  ", "| ")


@pytest.mark.parametrize(
    "name", ["regimes-0-8-features", "regimes-2-801-features", "regimes-2-8-colors", "regimes-2"]
)
def test_unknown_regimes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="dataset: got 'regimes-"):
        load_tasks(replace(MOSAIC, dataset=name))


def test_regimes_of_mosaic_are_mosaic() -> None:
    """8 regimes and 500 labels in each are as many nodes as mosaic has, which is drawn in the same way."""
    one: Any = load_tasks(replace(MOSAIC, dataset="regimes-8-500-features"))(0)
    other: Any = load_tasks(MOSAIC)(0)
    assert one.graph.x.equal(other.graph.x)
    assert len(one.split["train"]) == 4000
    assert one.planted.bincount().tolist() == [1000] * 8
