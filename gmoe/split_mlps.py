"""MLPs whose layers a transformer's block holds itself, in more than one module.

Those of torch's ``TransformerEncoderLayer`` and ``TransformerDecoderLayer``, and those that Hugging
Face splits over ``intermediate`` and ``output``. :func:`joined` puts them into one module, so that
:func:`gmoe.moefy` finds an MLP; the block computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check
from gmoe._verify import moved_copy, rows_are_equal
from gmoe.mlps import is_first_half

PARTS = {
    "linear1": ("linear1", "activation", "dropout", "linear2"),
    "intermediate": ("intermediate", "output.dense"),
}
"""Where a block holds the parts of an MLP, by the place that the whole takes."""

OF_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Called(nn.Module):
    """A function as a module.

    Args:
        function: of a tensor.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))


class Joined(nn.Sequential):
    """An MLP in one module, whose parts a block held."""


def _same(x: Tensor) -> Tensor:
    return x


def place_of(block: Any) -> str | None:
    """Where :func:`joined` puts the MLP of a block; ``None`` if its layers are not the block's."""
    if type(block) in OF_TORCH and isinstance(block.linear1, nn.Linear):
        return "linear1"
    if not is_first_half(getattr(block, "intermediate", None)):
        return None
    has_second = isinstance(getattr(getattr(block, "output", None), "dense", None), nn.Linear)
    return "intermediate" if has_second else None


def with_place(model: nn.Module, name: str) -> str:
    """The name of a module, or of the MLP whose layers the module holds itself."""
    place = place_of(model.get_submodule(name))
    return name if place is None else f"{name}.{place}"


def _begins_with_dense(output: nn.Module) -> bool:
    """True if the second half of an MLP applies its linear layer before all else."""
    copied: Any = moved_copy(output)
    dense = copied.dense
    hidden = torch.randn(5, dense.in_features, dtype=torch.float64, device="cpu")
    residual = torch.randn(5, dense.out_features, dtype=torch.float64, device="cpu")
    for others in ((residual,), ()):  # most add the residual
        with suppress(Exception):  # it takes other arguments
            copied.dense = dense
            expected = copied(hidden, *others)
            copied.dense = nn.Identity()
            return rows_are_equal(copied(dense(hidden), *others), expected)
    return False


def refuse_parts(name: str, owner: nn.Module) -> None:
    """Refuse a linear layer that torch's fast paths and attention read, and do not call.

    Args:
        name: of the layer in its model.
        owner: what holds the layer.
    """
    key = name.rpartition(".")[2]
    of_layer = isinstance(owner, OF_TORCH[0]) and key in ("linear1", "linear2")
    expected = f"{name.rpartition('.')[0]}, whose MLP has them" if of_layer else "another layer"
    is_read = of_layer or (isinstance(owner, nn.MultiheadAttention) and key == "out_proj")
    got = f"{name}, whose weight {type(owner).__name__} reads without a call"
    check(not is_read, "targets", got, expected)


@contextmanager
def joined(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put MLPs that blocks hold in parts into one module each; an error inside takes them apart.

    Args:
        model: the model.
        names: where the MLPs are to be; other names are left alone.
    """
    blocks: list[Any] = []
    try:
        for name in names:
            path, _, key = name.rpartition(".")
            block: Any = model.get_submodule(path)
            if place_of(block) != key:
                continue
            if key == "intermediate":
                got = f"{path}.output, a {type(block.output).__name__}"
                begins = _begins_with_dense(block.output)
                check(begins, "model", got, "one whose `dense` acts first")
            parts = [attrgetter(place)(block) for place in PARTS[key]]
            mlp = Joined(*(part if isinstance(part, nn.Module) else Called(part) for part in parts))
            mlp.training = block.training  # its parts stay in their modes
            for place in PARTS[key]:
                # A copy of torch's decoder has a ReLU again where no function is the activation.
                _put(block, place, _same if place == "activation" else nn.Identity())
            setattr(block, key, mlp)
            blocks.append(block)
        yield
    except BaseException:
        take_apart(model)
        raise
    # Torch's fast paths would read the weights of layers in evaluation.
    for block in blocks:
        if isinstance(block, OF_TORCH[0]):
            block.activation_relu_or_gelu = 0
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and {*encoder.layers} & {*blocks}:
            encoder.use_nested_tensor = False


def take_apart(model: nn.Module) -> None:
    """Give blocks the parts back that :func:`joined` put into one module.

    They go on without the fast paths of torch's own encoders.
    """
    for block in [*model.modules()]:
        for key, places in PARTS.items():
            mlp = getattr(block, key, None)
            if not isinstance(mlp, Joined):
                continue
            for place, part in zip(places, [*mlp], strict=True):
                _put(block, place, part.function if isinstance(part, Called) else part)


def _put(block: nn.Module, place: str, value: Any) -> None:
    """Set an attribute of a block or of a part, also where a function follows a module."""
    path, _, key = place.rpartition(".")
    owner = block.get_submodule(path)
    if isinstance(getattr(owner, key), nn.Module) and not isinstance(value, nn.Module):
        delattr(owner, key)
    setattr(owner, key, value)
