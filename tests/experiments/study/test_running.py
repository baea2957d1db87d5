"""What a study holds is run again only where it is of another configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.study.running import affordable, refusal
from experiments.train.presets import PRESETS
from experiments.train.results import write_json
from experiments.train.run_folder import described


def test_results_are_finished_where_their_data_are_not_here(tmp_path: Path) -> None:
    """What is not here cannot differ; what is here may not."""
    config = replace(PRESETS["graph"][1], data_root=tmp_path / "mine.npz")
    held = described(config) | {"digest": "0123456789abcdef"}
    assert refusal("dense", config, held, tmp_path) == ""
    (tmp_path / "mine.npz").write_bytes(b"other data")
    assert "with digest='0123456789abcdef'" in refusal("dense", config, held, tmp_path)
    assert "with lr=" in refusal("dense", replace(config, lr=9.0), held, tmp_path)


def test_a_budget_takes_cells_in_turn_as_far_as_it_reaches(tmp_path: Path) -> None:
    """A finished cell costs nothing; one that was not timed is in no budget."""
    config = PRESETS["digits-graph"][1]
    cells = dict.fromkeys(["a/done", "a/long", "a/short", "a/unknown", "a/other"], config)
    hours = {"a/done": 9.0, "a/long": 3.0, "a/short": 1.5, "a/other": 1.0}
    write_json(tmp_path / "a" / "done.json", {"config": {}})
    assert list(affordable(cells, hours, 2.0, tmp_path)) == ["a/done", "a/short"]
    assert list(affordable(cells, hours, 2.5, tmp_path))[-1] == "a/other"
    assert affordable(cells, hours, None, tmp_path) == cells
