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


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"loss\n1\n", b'epoch,"loss\n1,2\n', b"epoch," * 50_000]
)
def test_what_is_no_log_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}: [^\n]+$"):
        Log(path, keep=1)
    assert path.read_bytes() == content


def test_a_log_in_a_folder_called_as_an_address_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("file:/log.csv")
    path.parent.mkdir()
    for keep in (0, 1):
        Log(path, keep=keep).write([{"epoch": keep, "loss": 0.5}])
    assert (tmp_path / path).read_text() == "epoch,loss\n0,0.5\n1,0.5\n"
