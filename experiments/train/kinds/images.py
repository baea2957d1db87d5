"""Images, in a ViT."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

import gmoe
from experiments.train.config import ImageConfig
from experiments.train.data.images import digits, image_task, own_images
from experiments.train.data.task import Task
from experiments.train.kinds.base import Kind
from experiments.train.soft_mlp import SoftMLP
from experiments.train.told_domain import DomainRouter, DomainViT
from experiments.train.user_code import load_object
from gmoe._checks import check
from gmoe.models.vit import SIZES, ViTSize
from vision import ImageData, load_images

FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar10", ""),
    "imagenette": ("imagenette2-160", ""),
    "pacs": ("PACS", "pacs-64", ""),
    "images": ("",),
}
"""Where files of images lie, which may be any; of other sets the published ones are read, or
refused."""


class Images(Kind[ImageConfig]):
    """Images, in a ``ViTMoE``."""

    has_slots = True

    def tasks(self) -> Callable[[int], Task]:
        config = self.config
        if config.data is not None:
            data = self.own(load_object("data", config.data)())
        elif config.dataset == "digits":
            data = digits(config.image_size)
        else:
            data = load_images(
                config.dataset,
                config.data_root,
                image_size=config.image_size,
                offline=config.offline,
            )
        task = image_task(data, config)
        return lambda _: task

    def own(self, made_by_user: Any) -> ImageData:
        """What a user's function returned, as a data set."""
        config = self.config
        name = config.data or config.dataset
        return own_images(made_by_user, config.dataset, name, config.image_size)

    def note_data(self, digest: Any) -> dict[str, Any]:
        """Names and sizes; beside the digest, what the files contain."""
        root = self.config.data_root
        if self.config.dataset not in FOLDERS:
            return {}
        folders = [root / part for part in FOLDERS[self.config.dataset]]
        base = next((folder for folder in folders if folder.is_dir()), root)
        files = map(Path, glob.glob("**/*", root_dir=base, recursive=True))
        there = list[tuple[Path, int, int]]()
        for file in sorted(files, key=lambda file: ("train" not in file.parts, file)):
            if (base / file).is_file():
                state = (base / file).stat()
                there.append((base / file, state.st_size, state.st_mtime_ns))
                digest.update(os.fsencode(f"{file.as_posix()} {state.st_size}\n"))
        return {"contents": contents_of(tuple(there))} if there else {}

    def model(self, task: Task) -> nn.Module:
        config = self.config
        options = self.model_options(task)
        size = self.vit_size(task.in_channels)
        model_class = DomainViT if config.router == "oracle" else gmoe.ViTMoE
        model: Any = model_class(size, task.num_classes, **options)
        for module in model.modules():
            if isinstance(module, gmoe.Router):
                module.check_finite = config.check_finite
        # The blocks that hold experts, or would
        blocks = model.encoder.layers[config.every - 1 :: config.every]
        if config.router == "soft_slots":
            for block in blocks:
                block.mlp = SoftMLP(block.mlp, size, config.experts, config.dropout)
        if config.mlp_scale != 1:
            for block in blocks:
                block.mlp.register_forward_hook(lambda *call: config.mlp_scale * call[-1])
        built: nn.Module = model
        return built

    def vit_size(self, image_size: int) -> ViTSize:
        """The sizes of the ViT: those of the image size's preset, but for what is given.

        Without a preset, all of them.
        """
        config = self.config
        given = {
            "patch_size": config.patch,
            "hidden_dim": config.dim,
            "num_heads": config.vit_heads,
        }
        sizes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        sizes |= {"mlp_dim": config.hidden, "num_layers": config.layers}
        if image_size in SIZES:
            return replace(SIZES[image_size], **sizes)
        legal = f"patch, dim and vit_heads with it, or one of {sorted(SIZES)}"
        check(None not in given.values(), "image_size", image_size, legal)
        return ViTSize(image_size=image_size, **sizes)

    def num_images(self, inputs: tuple[Any, ...]) -> int | None:
        return len(inputs[0])

    def oracle(self, task: Task) -> Callable[..., gmoe.Router]:
        """The router that is told the domain of each image."""
        if not task.domains:
            return super().oracle(task)
        number = len(task.domains)
        experts = self.config.experts
        legal = f"{number}, one for each of {', '.join(task.domains)}"
        check(experts == number, "experts", experts, legal)
        return DomainRouter


@lru_cache(maxsize=2)
def contents_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """A digest of what files contain, of which sizes and times of writing are given.

    A run asks for it several times, and reads them again only where one was written meanwhile.
    """
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]
