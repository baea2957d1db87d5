"""What a study holds is run again only where it is of another configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.study.running import refusal
from experiments.train.presets import PRESETS
from experiments.train.run_folder import described


def test_results_are_finished_where_their_data_are_not_here(tmp_path: Path) -> None:
    """What is not here cannot differ; what is here may not."""
    config = replace(PRESETS["graph"][1], data_root=tmp_path / "mine.npz")
    held = described(config) | {"digest": "0123456789abcdef"}
    assert refusal("dense", config, held, tmp_path) == ""
    (tmp_path / "mine.npz").write_bytes(b"other data")
    assert "with digest='0123456789abcdef'" in refusal("dense", config, held, tmp_path)
    assert "with lr=" in refusal("dense", replace(config, lr=9.0), held, tmp_path)
