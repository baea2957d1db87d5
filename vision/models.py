"""The model of a run: gmoe's ViTs, and timm's with experts in the place of MLPs.

Needs timm for the latter. Shapes: S height and width of images.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.ops import stochastic_depth

from gmoe._checks import check
from gmoe.models.vit import SIZES


def vit_size(image_size: int, **given: int | None) -> dict[str, int]:
    """The sizes of a ViT: those of the image size's preset, but for what is given.

    Raises:
        ValueError: an image size without a preset, of which some are not given.
    """
    sizes = {name: value for name, value in given.items() if value is not None}
    if image_size in SIZES:
        return SIZES[image_size] | sizes
    legal = f"patch, dim and vit_heads with it, or one of {sorted(SIZES)}"
    check(len(sizes) == len(given), "image_size", image_size, legal)
    return {"image_size": image_size, **sizes}


def add_drop_path(model: VisionTransformer, rate: float) -> None:
    """Drop the branches of torchvision's blocks at random in training, as timm's ``drop_path``.

    Attention and MLP of an image each with its own draw; the last block's with the probability
    ``rate``, less before it, the first one's with 0 (Huang et al., 2016,
    https://arxiv.org/abs/1603.09382).
    """
    blocks: Any = model.encoder.layers
    for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks)), strict=True):
        drop = Dropped(float(probability))
        block.dropout.register_forward_hook(drop)  # what follows attention
        block.mlp.register_forward_hook(drop)


@dataclass(frozen=True)
class Dropped:
    """A hook that drops what a branch adds to an image, with a probability."""

    probability: float

    def __call__(self, module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return stochastic_depth(output, self.probability, "row", module.training)


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A model of timm, dense.

    Args:
        name: by which ``timm.create_model`` makes it.
        arguments: ``KEY=VALUE`` that it is made with, values as Python writes them.
        checkpoint: a file of weights of the same model (default: drawn anew). Nothing is
            downloaded.
    """

    name: str
    arguments: Sequence[str] = ()
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        import timm

        similar = ", ".join(get_close_matches(self.name, timm.list_models(), cutoff=0.4))
        legal = f"a model of timm{f', such as {similar}' if similar else ''}"
        check(timm.is_model(self.name), "model", f"timm/{self.name}", legal)

    def keywords(self) -> dict[str, Any]:
        """The arguments, read."""
        read = {}
        for argument in self.arguments:
            key, _, value = argument.partition("=")
            try:
                read[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                read[key] = value  # a word
        return read

    @property
    def pretrained(self) -> Any:
        """What timm says of the data that its own weights are for."""
        import timm

        return timm.get_pretrained_cfg(self.name)

    @property
    def image_size(self) -> int:
        """Height and width that it takes by default."""
        given = self.keywords().get("img_size", self.pretrained.input_size[-1])
        sides = set(given) if isinstance(given, list | tuple) else {given}
        is_square = len(sides) == 1 and all(isinstance(side, int) for side in sides)
        check(is_square, "model_kwargs", f"img_size={given!r}", "a number, height and width")
        return int(sides.pop())

    def made(self, image_size: int, channels: int, num_classes: int, drop_path: float) -> nn.Module:
        """The dense model.

        Args:
            image_size: S.
            channels: of the images.
            num_classes: width of the logits.
            drop_path: timm's ``drop_path_rate``.

        Raises:
            ValueError: arguments that it does not take, or a checkpoint that is not its own.
        """
        import timm

        options = {"num_classes": num_classes, "in_chans": channels, **self.keywords()}
        if self.pretrained.fixed_input_size:
            options["img_size"] = image_size
        if drop_path:
            options["drop_path_rate"] = drop_path
        try:
            model: nn.Module = timm.create_model(self.name, pretrained=False, **options)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            legal = f"arguments of {self.name} ({error})"
            check(False, "model_kwargs", " ".join(self.arguments) or "none", legal)
        if self.checkpoint is not None:
            load_weights(model, self.checkpoint)
        return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights into a dense model of timm; averaged weights, where it holds some.

    Weights of another image size are resampled, as timm does it. A head of another number of
    classes stays as it was drawn, which is printed.

    Raises:
        ValueError: names the file, and the key that is missing, unknown, or of another shape.
        FileNotFoundError: there is no such file.
    """
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: found no file {path}")
    # timm's own of each family: other names, other image sizes
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = load_state_dict(str(path))
        state = state if adapt is None else adapt(state, model)
    except Exception as error:  # whatever a broken file leads to
        legal = "a file of weights, .safetensors or .pth"
        raise ValueError(f"checkpoint: got {path} ({error}), expected {legal}") from error
    own = model.state_dict()
    config: Any = getattr(model, "pretrained_cfg", {})
    heads = config.get("classifier") or ()
    for head in (heads,) if isinstance(heads, str) else heads:
        parts = [f"{head}.{part}" for part in ("weight", "bias") if f"{head}.{part}" in own]
        if all(name in state for name in parts) and len(state[parts[0]]) != len(own[parts[0]]):
            print(f"{path}: {len(state[parts[0]])} classes, the head {head} is drawn anew")
            state.update({name: own[name] for name in parts})
    for name in sorted(state.keys() ^ own.keys()):
        where = "without" if name in own else "with"
        check(
            False, "checkpoint", f"{path} {where} {name}", f"the weights of {type(model).__name__}"
        )
    for name, value in state.items():
        shape, expected = tuple(value.shape), tuple(own[name].shape)
        check(shape == expected, "checkpoint", f"{path} with {name} of {shape}", expected)
    model.load_state_dict(state)
