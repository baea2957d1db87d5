"""Logs that a run continues: what is kept of them, and which are no logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.train.logs import Log


def test_rows_behind_the_checkpoint_and_half_a_row_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n0,1\n1,2\n2,3\n1")
    Log(path, keep=2).write([{"epoch": 2, "loss": 4}])
    assert path.read_text() == "epoch,loss\n0,1\n1,2\n2,4\n"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"loss\n1\n", b'epoch,"loss\n1,2\n'])
def test_what_is_no_log_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: [^\n]+$"):
        Log(path, keep=1)
    assert path.read_bytes() == content
