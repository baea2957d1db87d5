"""The model of a run: gmoe's ViTs, and timm's with experts in the place of MLPs.

Shapes: S height and width of images.
"""

from __future__ import annotations

import sys
from ast import literal_eval
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
from timm.models import group_parameters, load_state_dict
from torch import nn

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


def layer_factors(model: Any, decay: float) -> dict[str, float]:
    r"""By what the learning rate of each parameter of a model of timm is multiplied, by name.

    With decay :math:`d`, parameters of layer :math:`l` of :math:`0 \ldots L` have :math:`d^{L - l}`
    (Bao et al., 2022, https://arxiv.org/abs/2106.08254), as timm numbers its layers: 0 are the
    embeddings, then come the blocks with their experts and routers, L is the head.
    """
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


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
        similar = ", ".join(get_close_matches(self.name, timm.list_models(), cutoff=0.4))
        legal = f"a model of timm{f', such as {similar}' if similar else ''}"
        check(timm.is_model(self.name), "model", f"timm/{self.name}", legal)

    def keywords(self) -> dict[str, Any]:
        """The arguments, read."""
        given = {}
        for argument in self.arguments:
            key, _, value = argument.partition("=")
            try:
                given[key] = literal_eval(value)
            except (ValueError, SyntaxError):
                given[key] = value  # a word
        return given

    @property
    def pretrained(self) -> Any:
        """What timm says of the data that its own weights are for."""
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
    classes stays as it was drawn, which is printed. Nothing of the file is run.

    Raises:
        ValueError: names the file, and the keys that are missing, unknown, or of another shape.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: found no file {path}")
    # timm's own of each family: other names, other image sizes
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    heads = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    try:
        # Without weights_only, timm 1.0.15 runs what is pickled
        state = load_state_dict(str(path), weights_only=True)
        state = state if adapt is None else adapt(state, model)
        for head in (heads,) if isinstance(heads, str) else heads:
            weight, bias = f"{head}.weight", f"{head}.bias"
            if weight in state and len(state[weight]) != len(own[weight]):
                print(f"{path}: {len(state[weight])} classes, the head {head} is drawn anew")
                state |= {name: own[name] for name in (weight, bias)}
        model.load_state_dict(state)
    except Exception as error:  # whatever a broken file leads to
        said = " ".join(str(error).split())
        legal = f"a file of weights of this {type(model).__name__}, .safetensors or .pth"
        raise ValueError(f"checkpoint: got {path} ({said}), expected {legal}") from error
