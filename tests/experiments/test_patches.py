"""Maps of a user's own images."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest

from experiments.loop import run
from experiments.patches import main
from experiments.presets import DIGITS
from experiments.run_folder import image_task_of
from tests.experiments.command import refused
from tests.vision.made_images import cut, write_photo

IMAGES = replace(DIGITS, epochs=1, layers=2, hidden=8, experts=3, batch_size=300, progress=False, seeds=(3,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image run with experts."""
    root = tmp_path_factory.mktemp("runs")
    run(replace(IMAGES, router="token_choice", out=root / "moe"))
    return root / "moe"


def test_a_picture_an_image(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photo(tmp_path / "photos" / "one.jpg", (30, 20))
    write_photo(tmp_path / "photos" / "two.png", (9, 40), seed=1)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    again = write_photo(tmp_path / "elsewhere" / "one.jpg", (8, 8), seed=2)
    out = tmp_path / "out"
    main([str(folder), "--images", str(tmp_path / "photos"), str(again), "--out", str(out)])
    assert capsys.readouterr().out.split() == [str(out / name) for name in ("one.png", "two.png", "one-2.png")]
    for path in out.iterdir():
        assert matplotlib.image.imread(path).std() > 0.05


def test_the_task_comes_from_the_run_alone(folder: Path) -> None:
    task = image_task_of(folder)
    assert (task.in_channels, task.num_classes, len(task.classes), len(task.mean)) == (8, 10, 10, 1)
    assert not list(task.loader("val", 1, None))


def test_bad_runs_and_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = write_photo(tmp_path / "photo.jpg", (30, 20))
    (tmp_path / "empty").mkdir()
    half = cut(write_photo(tmp_path / "half.jpg", (60, 50)))
    dense, graph, broken = (shutil.copytree(folder, tmp_path / name) for name in ("dense", "graph", "broken"))
    config = dense / "config.json"
    config.write_text(config.read_text().replace('"token_choice"', '"dense"'))
    (graph / "images.json").unlink()
    (broken / "images.json").write_text("{}")
    for run_folder, image, message in (
        (dense, photo, "a dense model, expected one with experts"),
        (graph, photo, "images.json: is missing"),
        (tmp_path / "nowhere", photo, "config.json: is missing"),
        (broken, photo, "images.json: cannot be read"),
        (folder, half, "half.jpg"),
        (folder, tmp_path / "none.jpg", "none.jpg"),
        (folder, tmp_path / "empty", "a folder without images"),
    ):
        args = [str(run_folder), "--images", str(image), "--out", str(tmp_path / "out")]
        assert message in refused(args, capsys, main)
    assert not (tmp_path / "out").exists()
