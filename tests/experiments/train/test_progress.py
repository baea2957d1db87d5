"""Progress in words."""

from __future__ import annotations

import pytest

from experiments.train.progress import Progress


def test_progress_in_a_file_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(6)
    progress.skip(1)
    progress.show("a seed 0", 2, 3, "loss 1")  # soon after the start
    progress.show("a seed 0", 3, 3, "loss 1")
    progress.finish(3)
    progress.show("a seed 1", 3, 3, "loss 2")
    progress.finish(3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        f"a seed {n}: epoch 3 of 3, loss {n + 1}" for n in (0, 1)
    ]
