r"""Stacks: modules that hold the tensors of E experts, under the names that one expert gives them.

The ``weight`` of E stacked linear layers is (E, O, I); row e is the ``weight`` of expert e as
``nn.Linear`` has it. A stack may have a base: :math:`W_e = W_0 + \Delta_e`. The tokens of all
experts train the base :math:`W_0`; those of expert e alone train its difference :math:`\Delta_e`,
which starts at zero. Under plain gradient descent this is the same as independent copies whose
gradients are pooled; under Adam it is not, and it does better (page "Experts that start as
copies").

What is done to experts is done here, for all stacks of a module at once. Tensors go by their paths
in the module, which are those in one expert: ``state_dict()`` has an expert's keys, with E in front
of each shape.

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._checks import check, fixed
from gmoe._torch import NotesChanges

BASE = "_base"
"""What follows a tensor's name in that of its base."""

DIFFERENCE = "_difference"
"""What follows it in that of the differences from the base."""


class Stack(NotesChanges):
    """A module whose own tensors are those of E experts, each of shape (E, ...).

    A subclass registers them by :meth:`add`, and reads each as an attribute of its name. With a
    base (:func:`share_base`), the parameters are ``NAME_base`` (...) and ``NAME_difference``
    (E, ...), and ``NAME`` is their sum: added at each read, never kept, and not to be written to.

    Attributes:
        num_experts: E.
        names: of all tensors.
        names_with_base: of those that have a base.
    """

    num_experts: int = fixed("num_experts")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.names_with_base: list[str] = []

    def add(self, name: str, like: Tensor | None, num_experts: int) -> None:
        """Register room for tensors of a form: a parameter or a buffer, as ``like`` is.

        ``None`` stays, for what the options of an expert leave out.
        """
        if like is None:
            self.register_parameter(name, None)
            return
        values = torch.empty(num_experts, *like.shape, dtype=like.dtype)
        if isinstance(like, nn.Parameter):
            self.register_parameter(name, nn.Parameter(values))
        else:
            self.register_buffer(name, values)
        self.names.append(name)

    def __getattr__(self, name: str) -> Any:
        # Python asks here for what is no plain attribute: parameters, too.
        if name in self.__dict__.get("names_with_base", ()):
            return getattr(self, name + BASE) + getattr(self, name + DIFFERENCE)
        return super().__getattr__(name)

    def stored(self, name: str) -> Any:
        """(E, ...) the parameter or buffer of a name; with a base, the differences.

        Raises:
            ValueError: a tensor that is not stored, but computed from others.
        """
        place = name + DIFFERENCE if name in self.names_with_base else name
        own = dict(self.named_parameters(recurse=False)) | dict(self.named_buffers(recurse=False))
        got = f"{type(self).__name__} with a parametrized {name}"
        check(place in own, "model", got, "a plain one: remove the parametrization before")
        return own[place]

    def share_base(self) -> None:
        """Make the first expert's parameters the base of all; see :func:`share_base`."""
        for name in self.names:
            stored = self.stored(name)
            if isinstance(stored, nn.Parameter) and name not in self.names_with_base:
                base = nn.Parameter(stored[0].clone(), requires_grad=stored.requires_grad)
                stored.sub_(base)
                delattr(self, name)
                self.register_parameter(name + BASE, base)
                self.register_parameter(name + DIFFERENCE, stored)
                self.names_with_base.append(name)

    def keep(self, kept: Sequence[int]) -> None:
        """Take all other experts away; those that stay are numbered anew.

        Raises:
            ValueError: a parametrized tensor.
        """
        for name in self.names:
            stored = self.stored(name)
            rows = stored.detach().index_select(0, torch.tensor(kept, device=stored.device))
            if isinstance(stored, nn.Parameter):
                rows = nn.Parameter(rows, requires_grad=stored.requires_grad)
            setattr(self, name + DIFFERENCE if name in self.names_with_base else name, rows)
        self._num_experts = len(kept)


# all stacks of a module ---------------------------------------------------------------------------


def stacks_in(module: nn.Module) -> Iterator[tuple[str, Stack]]:
    """The stacks among a module and its parts, by their paths."""
    for path, part in module.named_modules():
        if isinstance(part, Stack):
            yield path, part


def _tensors_in(module: nn.Module) -> Iterator[tuple[str, Stack, str]]:
    """(path, stack, name) of each stacked tensor."""
    for prefix, stack in stacks_in(module):
        for name in stack.names:
            yield f"{prefix}.{name}" if prefix else name, stack, name


def paths_in(module: nn.Module) -> list[str]:
    """The paths of all stacked tensors: those of one expert's tensors."""
    return [path for path, _, _ in _tensors_in(module)]


@torch.no_grad()
def tensors_of(experts: nn.Module, expert: int) -> dict[str, Tensor]:
    """The tensors of one expert, by path."""
    return {path: getattr(stack, name)[expert] for path, stack, name in _tensors_in(experts)}


@torch.no_grad()
def fill(experts: nn.Module, expert: int, values: Mapping[str, Tensor]) -> None:
    """Copy the tensors of one expert."""
    for path, stack, name in _tensors_in(experts):
        value = values[path]
        if name in stack.names_with_base:
            value = value - getattr(stack, name + BASE)
        stack.stored(name)[expert].copy_(value)


@torch.no_grad()
def become(experts: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Make all experts copies of one: with a base, its tensors are the base, and nothing is added.

    Args:
        experts: all of them.
        values: the tensors of one, by path.
    """
    for path, stack, name in _tensors_in(experts):
        value = values[path]
        if name in stack.names_with_base:
            getattr(stack, name + BASE).copy_(value)
            value = torch.zeros_like(value)
        for expert in range(stack.num_experts):
            stack.stored(name)[expert].copy_(value)


@torch.no_grad()
def share_base(experts: nn.Module) -> None:
    """Give experts a base, the first of them; the difference of each is that expert minus it."""
    for _, stack in stacks_in(experts):
        stack.share_base()


def check_stacked(experts: nn.Module) -> None:
    """Refuse experts of which some tensors are not in a stack, or not as it was built."""
    for part in experts.modules():
        check_part(part)


def check_part(part: nn.Module) -> None:
    """Refuse a part of experts that holds other parameters than a stack as it was built."""
    if isinstance(part, Stack):
        for name in part.names:
            part.stored(name)
    elif next(part.parameters(recurse=False), None) is not None:
        raise ValueError(
            f"model: got experts with a {type(part).__name__} in place of a part, expected stacked "
            "layers as they were built"
        )


def has_base(module: nn.Module) -> bool:
    """True if some experts of a module share a base."""
    return any(stack.names_with_base for _, stack in stacks_in(module))


def base_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The bases of a module's experts, which the tokens of all of them train.

    Frozen, they leave the differences alone to learn, as adapters do.
    """
    for _, stack in stacks_in(module):
        for name in stack.names_with_base:
            yield getattr(stack, name + BASE)


def routed_parameters(experts: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of which a token uses those of its own experts: all but the bases."""
    bases = set(base_parameters(experts))
    return (parameter for parameter in experts.parameters() if parameter not in bases)
