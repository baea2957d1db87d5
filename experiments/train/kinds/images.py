"""Images, in a ViT; what they are and how models see them is in ``vision``."""

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
from experiments.train.data.images import digits, image_task
from experiments.train.data.task import Task
from experiments.train.kinds.base import Kind
from vision.data import FOLDERS, ImageData, folder_of, load_images
from vision.models import TimmModel, vit_size
from vision.soft_mlp import SoftMLP


class Images(Kind[ImageConfig]):
    """Images, in a ``ViTMoE`` or in a model of timm."""

    has_slots = True

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        self.timm = None
        if config.timm_model is not None:
            self.timm = TimmModel(
                name=config.timm_model,
                arguments=config.model_kwargs,
                checkpoint=None if config.checkpoint is None else Path(config.checkpoint),
            )

    def tasks(self) -> Callable[[int], Task]:
        task = image_task(self.data(), self.config)
        return lambda _: task

    def data(self) -> ImageData:
        """The data set, of the size that the model sees."""
        config = self.config
        image_size = config.image_size
        if image_size is None and self.timm is not None:
            image_size = self.timm.image_size
        if config.dataset == "digits":
            data = digits(image_size)
        else:
            data = load_images(
                config.dataset,
                config.data_root,
                image_size=image_size,
                offline=config.offline,
            )
        if self.timm is not None and len(data.mean) == 3:
            known = self.timm.pretrained
            data = replace(data, mean=known.mean, std=known.std)
        return data

    def note_data(self, digest: Any) -> dict[str, Any]:
        """Names and sizes; beside the digest, what the files contain, and the weights to start
        from."""
        config = self.config
        there = list[tuple[Path, int, int]]()
        if config.dataset in FOLDERS:
            base = folder_of(config.dataset, config.data_root)
            files = map(Path, glob.glob("**/*", root_dir=base, recursive=True))
            for file in sorted(files, key=lambda file: ("train" not in file.parts, file)):
                if (base / file).is_file():
                    there.append(state_of(base / file))
                    digest.update(os.fsencode(f"{file.as_posix()} {there[-1][1]}\n"))
        noted = {"contents": contents_of(tuple(there))} if there else {}
        if config.checkpoint is not None and Path(config.checkpoint).is_file():
            noted["weights"] = contents_of((state_of(Path(config.checkpoint)),))
        return noted

    def model(self, task: Task) -> nn.Module:
        if self.timm is not None:
            return self.of_timm(self.timm, task)
        config = self.config
        options = self.model_options(task)
        size = vit_size(
            task.in_channels,
            patch_size=config.patch,
            hidden_dim=config.dim,
            num_heads=config.vit_heads,
            mlp_dim=config.hidden,
            num_layers=config.layers,
        )
        model: Any = gmoe.ViTMoE(size, task.num_classes, **options)
        # The blocks that hold experts, or would
        blocks = model.encoder.layers[config.every - 1 :: config.every]
        if config.router == "soft_slots":
            for block in blocks:
                block.mlp = SoftMLP(block.mlp, size, config.experts, config.dropout)
        built: nn.Module = model
        return built

    def of_timm(self, timm: TimmModel, task: Task) -> nn.Module:
        """A model of timm, with experts in the place of MLPs unless it is to be dense."""
        config = self.config
        router, router_kwargs = self.router(task)
        drop_path = config.recipe.drop_path
        model = timm.made(task.in_channels, len(task.mean), task.num_classes, drop_path)
        if router is None:
            return model
        return gmoe.moefy(
            model,
            every=None if config.targets else config.every,
            targets=config.targets or None,
            router=router,
            router_kwargs=router_kwargs,
            num_experts=config.experts,
            k=config.k,
            start=config.start,
        )

    def num_images(self, inputs: tuple[Any, ...]) -> int | None:
        return len(inputs[0])


def state_of(file: Path) -> tuple[Path, int, int]:
    """A file, its size, and when it was written."""
    state = file.stat()
    return file, state.st_size, state.st_mtime_ns


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
