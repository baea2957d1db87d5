"""Which expert takes which patch of your images: ``python -m experiments.patches RUN --images PATH... --out DIR``.

    python -m experiments.patches runs/cifar10 --images cat.jpg holiday/ --out runs/patches

Writes a PNG an image: the image as the model sees it, and its patches tinted by their experts, one panel a MoE layer.
Needs the run folder only, not its data: the weights of its first seed. A path may be a folder of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.config import fail


def patches(run: tyro.conf.Positional[Path], images: tuple[Path, ...], out: Path = Path("runs/patches")) -> None:
    """Draw the maps, and print where they are: ``NAME.png``, or ``NAME-2.png`` of a second image of that name.

    Args:
        run: run folder of an image model with experts.
        images: images, or folders of them.
        out: folder of the pictures.
    """
    import torch  # and what needs it, which --help does without

    from experiments.run_folder import image_task_of, load_model, read_config
    from gmoe.plot import expert_maps
    from vision.sources import decode

    paths = [path for given in images for path in _images(given)]
    if not paths:
        raise ValueError("images: got none, expected at least one")
    config = read_config(run, Path())
    if config.router == "dense":
        raise ValueError(f"run: got {run}, a dense model, expected one with experts")
    task = image_task_of(run)
    model = load_model(run, config, task, config.seeds[0])
    mean, std = (torch.tensor(value)[:, None, None] for value in (task.mean, task.std))
    for number, path in enumerate(paths):
        picture = decode(str(path), task.in_channels).float() / 255
        image = ((picture.mean(dim=0, keepdim=True) if len(mean) == 1 else picture) - mean) / std
        with torch.no_grad():
            guess = task.classes[int(model(image[None]).argmax())]
        figure = expert_maps(model, image, mean=task.mean, std=task.std, titles=[f"{path.name}\n{guess}?"])
        before = sum(other.stem == path.stem for other in paths[:number])
        out.mkdir(parents=True, exist_ok=True)
        written = out / f"{path.stem}{f'-{before + 1}' if before else ''}.png"
        figure.savefig(written, dpi=160)
        print(written)


def _images(path: Path) -> list[Path]:
    """The image, or the images in the folder."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not path.is_dir():
        return [path]
    files = (file for file in path.iterdir() if not file.name.startswith("."))
    found = sorted(file for file in files if file.suffix.lower() in IMG_EXTENSIONS)
    if not found:
        raise ValueError(f"images: got {path}, a folder without images, expected some of {', '.join(IMG_EXTENSIONS)}")
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        tyro.cli(patches, args=args, prog="python -m experiments.patches", description=__doc__)
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)


if __name__ == "__main__":
    main()
