"""Which expert takes which patch of your images.

    python -m experiments.patches runs/cifar10 --images cat.jpg holiday/*.jpg --out runs/patches

Writes ``maps.png``, a row an image: the image as the model sees it, and its patches tinted by their
experts, one panel a MoE layer; of more than twelve images ``maps-1.png``, ``maps-2.png``, ...
The model is that of the first seed of the run, whose data say how images are prepared.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from experiments.train.checks import check
from experiments.train.command_line import program
from experiments.train.files import check_finished, replacing

DPI = 160
"""Dots an inch: a page is at most 3,500 pixels high."""


def patches(
    run: tyro.conf.Positional[Path],
    images: tuple[Path, ...],
    out: Path = Path("runs/patches"),
    data_root: Path | None = None,
    trust: bool = False,
) -> None:
    """Draw the maps, and print the files that hold them.

    Args:
        run: run folder of an image model with experts.
        images: images.
        out: folder of the pictures.
        data_root: root folder of the run's data. By default where it was trained on them.
        trust: import the router, conv, model and data that the run's config.json names, where
            they are code. It can do whatever you can.
    """
    check(images, "images", "none", "at least one")
    check_finished(run)
    import torch  # and what needs it, which --help does without

    from experiments.train.config import ImageConfig
    from experiments.train.run_folder import read_run
    from vision.maps import pages, photos

    folder = read_run(run, data_root, trust)
    config = folder.config
    if not isinstance(config, ImageConfig) or not folder.history:
        raise ValueError(
            f"run: got {run}, a dense model or one of graphs, expected an image model with experts"
        )
    task = folder.load_task()
    model = folder.load_model(task)
    batch = photos(images, task.in_channels, config.recipe, task.mean, task.std)
    with torch.no_grad():
        guesses = model(batch).argmax(dim=1).tolist()
    titles = [
        f"{path.name}\n{task.classes[guess]}?" for path, guess in zip(images, guesses, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    drawn = list(pages(model, batch, titles, task.mean, task.std))
    for page, figure in enumerate(drawn, start=1):
        file = out / ("maps.png" if len(drawn) == 1 else f"maps-{page}.png")
        with replacing(file) as fresh:
            figure.savefig(fresh, dpi=DPI, format="png")
        print(file)


main = program("patches", patches, __doc__)
