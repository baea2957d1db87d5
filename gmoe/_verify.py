"""Compare what is built from somebody's module with the module itself.

Both are copied to float64 on the CPU. Their parameters and buffers are moved at random, so that
what starts as an identity (a scale of ones, a bias of zeros) shows. Inputs of several scales show
functions that differ only far from zero, such as clamps.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

SCALES = (1.0, 10.0, 100.0, 1000.0)
"""Scales of the inputs on which a module and what was built from it are compared."""

ROUNDING = 1e-9
"""Largest difference of two rows in float64, relative to the largest number in the row."""

KEPT_BY_MODULES = frozenset(vars(nn.Module()))
"""What every module holds: its mode, and tables of its parameters, buffers, parts and hooks."""


def probe_copy(module: nn.Module) -> Any:
    """A copy to be tried out: float64, on the CPU, in training mode and without dropout.

    On the meta device a module has no values: its copy gets random ones.
    """
    probe: Any = copy.deepcopy(module)
    if any(value.is_meta for value in (*probe.parameters(), *probe.buffers())):
        probe = probe.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for parameter in probe.parameters():
            nn.init.normal_(parameter, generator=generator)
        for buffer in probe.buffers():
            buffer.fill_(1)
    probe = probe.cpu().double().train()
    for part in probe.modules():
        rate = getattr(part, "dropout", None)  # PyG's layers: a number, or one for each layer
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(rate, float):
            part.dropout = 0.0
        elif isinstance(rate, list):
            part.dropout = [0.0] * len(rate)
    return probe


@torch.no_grad()
def move_(module: nn.Module) -> None:
    """Move all parameters and buffers of floating-point numbers at random, in place.

    Matrices move by the scale of their fan-in. Buffers grow, since some, such as a variance, must
    stay positive.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            scale = parameter.size(-1) ** -0.5 if parameter.dim() > 1 else 0.3
            step = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.add_(step.normal_(0.0, scale, generator=generator).to(parameter.device))
    for buffer in module.buffers():
        if buffer.is_floating_point():
            step = torch.empty(buffer.shape, dtype=torch.float32, device="cpu")
            buffer.add_(step.uniform_(0.25, 0.75, generator=generator).to(buffer.device))


def rows_are_equal(ours: Tensor, theirs: Tensor, rounding: float = ROUNDING) -> bool:
    """True for rows of equal numbers, up to ``rounding`` of the largest number in each row."""
    if ours.shape != theirs.shape:
        return False
    largest = theirs.abs().amax(dim=-1, keepdim=True)
    are_close = (ours - theirs).abs() <= rounding * largest
    # Infinity equals itself, and so does what is not a number: the module overflows as well.
    are_same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return bool((are_close | are_same).all())


# what modules have in common ----------------------------------------------------------------------


def is_option(key: str) -> bool:
    """True for an attribute that says what a module computes."""
    # Parameters, buffers and parts are compared one by one; hooks are PyG's own.
    is_table_of_hooks = key.startswith("_") and "_hooks" in key
    return not (key in KEPT_BY_MODULES or is_table_of_hooks or key == "inspector")


def comparable(value: object) -> Hashable:
    """Equal for values that surely mean the same; any other value equals only itself."""
    if isinstance(value, Tensor) and not value.is_meta:
        return Tensor, value.dtype, value.shape, tuple(value.detach().flatten().tolist())
    if type(value).__module__ == "numpy":
        array: Any = value
        return type(array), array.dtype.str, array.shape, array.tobytes()
    if isinstance(value, dict):
        items = tuple((comparable(key), comparable(item)) for key, item in value.items())
        return type(value), items
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(comparable, value))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(comparable, value))
    plain = bool | int | float | complex | str | bytes | torch.dtype | torch.device | None
    if isinstance(value, plain):
        return type(value), value
    return type(value), id(value)


def form_of(module: nn.Module) -> Hashable:
    """Equal for modules that differ in the values of parameters and buffers alone."""
    form: list[Hashable] = []
    for name, part in module.named_modules(remove_duplicate=False):
        form.append((name, type(part)))
        options = [(key, comparable(value)) for key, value in vars(part).items() if is_option(key)]
        form.append(frozenset(options))  # a set: a copy may list its attributes in another order
        for key, value in part.named_parameters(recurse=False, remove_duplicate=False):
            form.append((name, key, type(value), value.shape, value.dtype, value.requires_grad))
        for key, value in part.named_buffers(recurse=False, remove_duplicate=False):
            form.append((name, key, type(value), value.shape, value.dtype))
    return tuple(form)
