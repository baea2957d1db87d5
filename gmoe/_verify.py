"""Compare what is built from somebody's module with the module itself.

Both are built from a copy in float64 on the CPU with other parameters and buffers, so that what
starts as an identity (a scale of ones, a bias of zeros) shows. Inputs of several scales show
functions that differ only far from zero, such as clamps.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gmoe._torch import forward_hooks

SCALES = (1.0, 10.0, 100.0, 1000.0)
"""Scales of the inputs on which a module and what was built from it are compared."""

ROUNDING = 1e-9
"""Largest difference of two rows in float64, relative to the largest number in the row."""

SHIFT = 7
"""Between the rows of a matrix of random numbers that takes the memory of a few rows."""

KEPT_BY_MODULES = frozenset(vars(nn.Module()))
"""What every module holds: its mode, and tables of its parameters, buffers, parts and hooks."""


class Sieve(nn.Module):
    """Stands for a dropout: if it is on, it drops the same features in each call, else none.

    Args:
        p: the probability that the dropout drops a number.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.is_on = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Dropout has)
        """Drop every second feature, and double the others."""
        if not self.is_on:
            return input
        return input * (2 * (torch.arange(input.size(-1), device="cpu") % 2))


def moved_copy(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in ``dtype`` on the CPU, in evaluation, with other numbers in little memory.

    It has sieves in the place of dropouts, and no forward hooks but torch's own, which compute
    weights (pruning, weight norm).
    """
    generator = torch.Generator().manual_seed(0)
    # What deepcopy finds here by its id counts as copied.
    copied: dict[int, Any] = {}
    for part in module.modules():
        if is_dropout(part):
            copied[id(part)] = Sieve(part.p)
        for table in forward_hooks(part):
            own = [(key, hook) for key, hook in table.items() if _is_of_torch(hook)]
            copied[id(table)] = OrderedDict(own)
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                # A hook computed it. Torch refuses to copy it, and the hook computes it anew.
                copied[id(value)] = value.detach().clone()
    for parameter in module.parameters():
        moved = _moved(parameter, generator, dtype)
        copied[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        grown = _grown(buffer, generator)
        copied[id(buffer)] = grown.to(dtype) if grown.is_floating_point() else grown
    return copy.deepcopy(module, copied).eval()


def probe_copy(module: nn.Module) -> Any:
    """A moved copy in training mode, without the dropout that PyG's layers have as a number."""
    probe = moved_copy(module).train()
    part: Any
    for part in probe.modules():
        rate = getattr(part, "dropout", None)
        if isinstance(rate, float):
            part.dropout = 0.0
        elif isinstance(rate, list):  # a number for each layer
            part.dropout = [0.0] * len(rate)
    return probe


def _moved(parameter: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Other numbers for a parameter, in ``dtype`` on the CPU: vectors move, matrices are new.

    A matrix takes the memory of a few rows: each row begins :data:`SHIFT` numbers after the one
    before. In full, those of an MLP in float64 would take twice its memory.
    """
    value = _value_of(parameter)
    if not value.is_floating_point():
        return value.clone()
    if value.dim() < 2 or value.numel() == 0:
        return (value.double() + 0.3 * _normal(value.shape, generator)).to(dtype)
    columns = value.size(-1)
    rows = value.numel() // columns
    # By the fan-in, so that outputs are as large as inputs.
    numbers = columns**-0.5 * _normal((SHIFT * (rows - 1) + columns,), generator)
    return numbers.to(dtype).as_strided((rows, columns), (SHIFT, 1)).view(value.shape)


def _grown(buffer: Tensor, generator: torch.Generator) -> Tensor:
    """Larger numbers for a buffer: some, such as a variance, must stay positive."""
    value = _value_of(buffer)
    if not value.is_floating_point():
        return value.clone()
    step = torch.empty(value.shape, dtype=torch.float64, device="cpu")
    return value.double() + step.uniform_(0.25, 0.75, generator=generator)


def _value_of(tensor: Tensor) -> Tensor:
    """The values on the CPU; zeros for those on the meta device, where there are none."""
    return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().cpu()


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)


def is_dropout(part: object) -> TypeGuard[nn.Dropout]:
    """True for a dropout that does nothing else."""
    if not isinstance(part, nn.Dropout):
        return False
    return type(part).forward is nn.Dropout.forward and "forward" not in vars(part)


def _is_of_torch(hook: object) -> bool:
    """True for a hook of torch's own (pruning, weight norm)."""
    return type(hook).__module__.startswith("torch.")


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
