"""Which expert takes which patch of your images: ``python -m experiments.patches RUN --images PATH... --out DIR``.

    python -m experiments.patches runs/cifar10 --images cat.jpg holiday/ --out runs/patches

Writes a PNG an image: the image as the model sees it, and its patches tinted by their experts, one panel a MoE layer.
Needs the run folder only, not its data. A path may be a folder, whose images are taken.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from torchvision.datasets.folder import IMG_EXTENSIONS

from experiments.report import image_view
from experiments.report.page import file_name
from experiments.run_folder import image_task_of, load_model, read_config
from vision.patch_maps import patch_weights
from vision.sources import decode


@dataclass(frozen=True, kw_only=True)
class PatchesConfig:
    """Which run, and which images."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder of an image model with experts."""
    images: tuple[Path, ...]
    """Images, or folders of them."""
    out: Path = Path("runs/patches")
    """Folder of the pictures."""
    seed: int | None = None
    """The seed whose weights are used; by default the first."""


def patches(config: PatchesConfig) -> list[Path]:
    """Draw the maps.

    Returns:
        The pictures, one an image.

    Raises:
        ValueError: the run has no image model with experts or no such seed; or an image cannot be read, or there is
            none.
    """
    paths = _files(config.images)
    run = read_config(config.run, Path())
    if run.router == "dense":
        raise ValueError(f"run: got {config.run}, a dense model, expected one with experts")
    seed = run.seeds[0] if config.seed is None else config.seed
    if seed not in run.seeds:
        raise ValueError(f"seed: got {seed}, expected one of {', '.join(map(str, run.seeds))}")
    task = image_task_of(config.run)
    model = load_model(config.run, run, task, seed)
    written = []
    for path in paths:
        picture = decode(str(path), task.in_channels).float()[None] / 255
        if len(task.mean) == 1:
            picture = picture.mean(dim=1, keepdim=True)
        mean, std = (torch.tensor(value)[:, None, None] for value in (task.mean, task.std))
        logits, routings = image_view.route(model, (picture - mean) / std)
        seen = image_view.Seen(images=picture, labels=None, weights=[patch_weights(routing, 1) for routing in routings])
        figure = image_view.maps(seen, [0], [f"{path.name}\n{task.classes[int(logits.argmax())]}?"])
        config.out.mkdir(parents=True, exist_ok=True)
        place = config.out / f"{file_name(path.stem)}.png"
        for number in range(2, len(paths) + 1):  # images of one name from several folders
            if place not in written:
                break
            place = config.out / f"{file_name(path.stem)}-{number}.png"
        figure.savefig(place, dpi=160)
        written.append(place)
    return written


def _files(paths: Sequence[Path]) -> list[Path]:
    found = []
    for path in paths:
        inside = (
            sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")
            )
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise ValueError(
                f"images: got {path}, a folder without images, expected some of {', '.join(IMG_EXTENSIONS)}"
            )
        found += inside
    if not found:
        raise ValueError("images: got none, expected at least one")
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    config = tyro.cli(PatchesConfig, args=args, prog="python -m experiments.patches", description=__doc__)
    try:
        written = patches(config)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(2)
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
