"""Maps of a user's own images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest

from experiments.loop import run
from experiments.patches import main
from experiments.presets import DIGITS
from tests.experiments.command import refused
from tests.vision.made_images import cut, write_photo

IMAGES = replace(DIGITS, epochs=1, layers=2, hidden=8, experts=3, batch_size=300, progress=False, seeds=(3,))


def test_a_row_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe, dense, out = tmp_path / "moe", tmp_path / "dense", tmp_path / "out"
    run(replace(IMAGES, router="token_choice", out=moe))
    run(replace(IMAGES, router="dense", out=dense))
    photos = [write_photo(tmp_path / "one.jpg", (30, 20)), write_photo(tmp_path / "two.png", (9, 40), seed=1)]
    half = cut(write_photo(tmp_path / "half.jpg", (60, 50)))
    for folder, image, message in (
        (dense, photos[0], "expected an image model with experts"),
        (tmp_path / "nowhere", photos[0], "summary.json"),
        (moe, half, "half.jpg"),
        (moe, tmp_path / "none.jpg", "none.jpg"),
    ):
        assert message in refused([str(folder), "--images", str(image), "--out", str(out)], capsys, main)
    assert not out.exists()
    main([str(moe), "--images", *map(str, photos), "--out", str(out)])
    assert capsys.readouterr().out.endswith(f"{out / 'maps.png'}\n")
    assert matplotlib.image.imread(out / "maps.png").std() > 0.05
