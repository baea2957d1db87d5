r"""Experts that share a base: the weights of expert e are :math:`W_e = W_0 + \Delta_e`.

The tokens of all experts train the base :math:`W_0`; those of expert e alone train its difference
:math:`\Delta_e`, which starts at zero. Under plain gradient descent this is the same as independent
copies whose gradients are pooled; under Adam it is not, and it does better (page "Experts that
start as copies").

Shapes: E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import isfunction
from threading import RLock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gmoe._checks import check_module
from gmoe._torch import backward_hooks, forward_hooks, with_tensors
from gmoe.experts import Experts

Model = TypeVar("Model", bound=nn.Module)

ONE_THREAD = RLock()
"""Held while tensors stand in place of a module's parameters, which other threads would see."""


class FromBase(nn.Module):
    """Experts as a base and differences; see above.

    Each call adds the two, E times the weights of an expert: little beside the product, unless
    there are fewer tokens than columns. :func:`fold` spares it.

    The base and the differences are experts of the same form, so that each can be looked at,
    frozen, or given a weight decay of its own. Their buffers are not added: those of the
    differences are used. A base with ``requires_grad_(False)`` leaves differences alone to learn,
    as adapters do. The base is added, never called: hooks on it do not run.

    Args:
        base: one expert.
        differences: E experts. Their parameters are set to zero.
        **sizes: arguments of the class of experts that a subclass also is.
    """

    def __init__(self, base: Any, differences: Any, **sizes: int) -> None:
        super().__init__(**sizes)
        self.base = base
        self.differences = differences
        self._names = [name for name, _ in base.named_parameters()]
        self._zero_differences()
        self.register_load_state_dict_pre_hook(_read_independent)

    @torch.no_grad()
    def _zero_differences(self) -> None:
        for parameter in self.differences.parameters():
            parameter.zero_()

    def _pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, difference, base) of each parameter.

        Raises:
            ValueError: a part was replaced by one with other weights, such as LoRA's, or pruned; a
                weight of the base was parametrized, which nothing would compute.
        """
        differences = list(self.differences.named_parameters())
        names = [name for name, _ in self.base.named_parameters()]
        if names != self._names:
            raise ValueError(
                f"experts: got a base with parameters {', '.join(names)}, expected "
                f"{', '.join(self._names)}, since it is added, not called: gmoe.fold(model) before "
                "parts of experts are changed"
            )
        bases = list(self.base.parameters())
        # By the last part of a name alone: a part of the differences may have been wrapped. What is
        # parametrized or pruned has another, such as "original".
        are_pairs = len(differences) == len(bases) and all(
            difference.shape[1:] == base.shape[1:]
            and name.rpartition(".")[2] == own.rpartition(".")[2]
            for (name, difference), own, base in zip(differences, names, bases, strict=True)
        )
        if not are_pairs:
            got = ", ".join(name for name, _ in differences)
            raise ValueError(
                f"experts: got differences with parameters {got}, which are not those of the "
                "base, expected them as they were built: gmoe.fold(model) before parts of experts "
                "are changed"
            )
        return [(*named, base) for named, base in zip(differences, bases, strict=True)]

    def forward(self, *args: Any) -> Tensor:
        """Run the experts on what their class takes."""
        if torch.compiler.is_compiling():
            return self._run_in_place(args)
        if _may_see_itself(self.differences):
            with ONE_THREAD:
                return self._run_in_place(args)
        # Another thread may be running the module, which stays as it is.
        sums = {
            id(difference): _sum(name, base, difference) for name, difference, base in self._pairs()
        }
        return with_tensors(self.differences, sums)(*args)

    def _run_in_place(self, args: tuple[Any, ...]) -> Tensor:
        """Run the differences themselves, with the sums in place of their parameters meanwhile.

        The compiler traces that. What a user put on a module, or in place of a part of it, may hold
        the module or write to it: it would pass over a copy, or lose what it wrote.
        """
        sums = {name: _sum(name, base, difference) for name, difference, base in self._pairs()}
        return functional_call(self.differences, sums, args)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a token uses a share of: those of the differences."""
        return iter(self.differences.parameters())

    def reset_parameters(self) -> None:
        """Draw the base anew; the differences start again from zero."""
        self.base.reset_parameters()
        self._zero_differences()

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The differences themselves, with the base added to them: independent experts.

        What was trained of either stays trainable.
        """
        for _, difference, base in self._pairs():
            difference.add_(base)
            difference.requires_grad_(difference.requires_grad or base.requires_grad)
        return self.differences


class ExpertsFromBase(FromBase, Experts):
    """E functions of the same shape, such as MLPs, each a base and a difference.

    Args:
        base: one of them.
        differences: E of them.
    """

    def __init__(self, base: Experts, differences: Experts) -> None:
        super().__init__(
            base,
            differences,
            in_features=differences.in_features,
            out_features=differences.out_features,
            num_experts=differences.num_experts,
        )

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        return self(x_PI, offsets_E)


def _may_see_itself(module: nn.Module) -> bool:
    """True if users' code may read or write the module itself, or a part of it.

    That is a hook, a function of an object in place of a method of its class, or a part of a class
    of the user's own.
    """
    for part in module.modules():
        if type(part).__module__.partition(".")[0] not in ("gmoe", "torch", "torch_geometric"):
            return True
        if any((*forward_hooks(part), *backward_hooks(part))):
            return True
        for name, value in vars(part).items():
            if callable(value) and isfunction(getattr(type(part), name, None)):
                return True
    return False


def _sum(name: str, base: Tensor, difference: Tensor) -> Tensor:
    """The weights of all experts.

    Raises:
        ValueError: weights that ``fully_shard`` has not gathered, since their module is not called.
    """
    for part, weight in (("base", base), ("differences", difference)):
        if hasattr(weight, "placements"):  # a DTensor; gathered weights are tensors
            raise ValueError(
                f"experts: got {name} of the {part} in shards, expected fully_shard of the experts "
                "or of a module around them: the base and the differences are added, not called"
            )
    return base + difference


def fold(model: Model) -> Model:
    """Make the experts of a model independent: add each base to its differences, in place.

    The outputs stay the same. There is nothing left to add in a call, one expert's parameters less,
    and the parts of experts can be replaced (LoRA, quantization). What trains from here on are
    independent experts: right after the start, that is sparse upcycling (`Komatsuzaki et al., 2023
    <https://arxiv.org/abs/2212.05055>`_). The state of a folded model can be loaded into a model
    that is not folded.

    Args:
        model: any model; experts that share no base are left as they are.

    Returns:
        The model; what replaces it, if the model itself is such experts.
    """
    check_module("model", model)
    if isinstance(model, FromBase):
        return model.folded()  # type: ignore[return-value]
    folded: dict[FromBase, nn.Module] = {}  # two layers may share their experts
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FromBase):
            if module not in folded:
                folded[module] = module.folded()
            model.set_submodule(name, folded[module])
    return model


def _read_independent(
    experts: FromBase, state_dict: dict[str, Any], prefix: str, *_: object
) -> None:
    """Read the state of independent experts: as differences from a base of zeros."""
    names = [name for name in experts.differences.state_dict() if prefix + name in state_dict]
    if not names:
        return
    buffers = dict(experts.base.named_buffers())
    for name in names:
        value = state_dict.pop(prefix + name)
        state_dict[f"{prefix}differences.{name}"] = value
        # Of one expert; on the device and of the dtype that the state has.
        one = value[:1].clone()
        state_dict[f"{prefix}base.{name}"] = one if name in buffers else torch.zeros_like(one)
