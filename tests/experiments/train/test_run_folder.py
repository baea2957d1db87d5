"""What a run folder knows of the data that the run was trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments.train.command import main
from experiments.train.config import RunConfig
from experiments.train.presets import PRESETS
from experiments.train.run_folder import described, differences_of
from tests.helpers.command import quick, refused
from tests.helpers.made_images import write_imagenette, write_images
from tests.helpers.user_data import FORMS


def own(form: str, folder: Path) -> RunConfig:
    return replace(PRESETS["graph"][1], data_root=FORMS[form](folder))


def images(preset: str, write: Callable[[Path], object], folder: Path) -> RunConfig:
    write(folder)
    return replace(PRESETS[preset][1], data_root=folder)


DATA: dict[str, Callable[[Path], RunConfig]] = {
    **{form: partial(own, form) for form in FORMS},
    "images": partial(images, "images", write_images),
    "cifar10": partial(images, "cifar10", lambda folder: write_images(folder / "cifar10")),
    "imagenette": partial(images, "imagenette", write_imagenette),
}
"""Data that may be other ones under the same name, and a run on them."""


@pytest.mark.parametrize("write", DATA.values(), ids=DATA)
def test_every_file_of_other_content_and_the_same_size_is_seen(
    write: Callable[[Path], RunConfig], tmp_path: Path
) -> None:
    config = write(tmp_path)
    before = described(config)
    assert described(config) == before
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for path in (*files[:3], *files[-3:]):
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        assert differences_of(config, before).keys() & {"digest", "contents"}, path
        path.write_bytes(raw)
    assert differences_of(config, before) == {}


def test_a_run_does_not_go_on_with_other_images_of_the_same_size(
    tmp_path: Path, capsys: Any
) -> None:
    write_images(tmp_path / "data")
    (one, other) = sorted((tmp_path / "data" / "train" / "a").iterdir())[:2]
    for path in (one, other):  # a PNG takes anything behind its end
        path.write_bytes(path.read_bytes().ljust(2_000, b"\0"))
    args = ["--data-root", str(tmp_path / "data"), "--hidden", "4", "--experts", "2"]
    quick(tmp_path / "run", *args, preset="images")
    swapped = one.read_bytes(), other.read_bytes()
    for path, raw in zip((other, one), swapped, strict=True):
        path.write_bytes(raw)
    again = ["images", "--epochs", "3", "--no-progress", "--seeds", "0", "1", "--resume", *args]
    error = refused([*again, "--out", str(tmp_path / "run")], capsys, main)
    assert "holds a run with contents=" in error


def test_a_run_from_before_contents_were_noted_goes_on(tmp_path: Path) -> None:
    write_images(tmp_path)
    config = replace(PRESETS["images"][1], data_root=tmp_path)
    before = described(config)
    assert before.pop("contents")
    assert differences_of(config, before) == {}
