"""Routing by a vector that the model is called with, through a small network.

Shapes: T tokens, G groups, E experts, D the width of the vector.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmoe._autograd import autocasts
from gmoe._checks import check, check_counts, check_one_device, described, readable
from gmoe._torch import forward_hooks
from gmoe.routers.base import at_least_float32
from gmoe.routers.from_call import Argument, FromCall, routers_of
from gmoe.routing import Routing

HIDDEN = 64
"""Width of the network."""


@dataclass(frozen=True)
class FromInput(FromCall):
    r"""A router for all layers of a model, which learns to mix experts by a vector of yours.

    .. math:: w_g = \mathrm{softmax}(W_2\,\mathrm{silu}(W_1 v_g))

    The vector is an argument of the model's ``forward``: an embedding of a molecule's source, its
    composition, or both. One network of two layers decides in each call of the model for all of its
    layers; it is a part of the model, ``model.router_of_ARGUMENT``. With ``mix="weights"`` this is
    the mixture of linear experts of `UMA <https://arxiv.org/abs/2506.23971>`_ (Wood et al., 2025),
    and a layer costs what one expert costs. To mix outputs costs E times one expert.

    Args:
        argument: the name of the argument, or ``"data.NAME"`` for an attribute of one; it holds a
            vector (G, D) for each group, or, without ``batch``, for each token or image.
        dim: D.
        batch: the name of the argument that holds the group of each token, PyG's ``batch``; if the
            model is called with ``None``, all tokens are one group.

    Raises:
        ValueError: no name; in a call, another shape, or NaN (CPU tensors).

    Example:
        >>> router = gmoe.routers.FromInput("system", dim=12, batch="batch")
        >>> model = gmoe.moefy(model, targets="*.lin*", router=router, mix="weights")
        >>> energy = model(z, pos, batch, system=system)
    """

    dim: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(dim=self.dim)

    def experts_of(self, *, num_experts: int | None, model: nn.Module | None = None) -> int:
        if model is None or not hasattr(model, self._name):
            return super().experts_of(num_experts=num_experts)
        self.arguments_in(model)  # or the network is another's
        network: Any = model.get_submodule(self._name)
        expected: int = network[-1].out_features
        legal = f"{expected}, as model.{self._name} has: it decides for all layers"
        check(num_experts in (None, expected), "num_experts", num_experts, legal)
        return expected

    def arguments_in(self, model: nn.Module) -> tuple[Argument, Argument | None]:
        before, _ = forward_hooks(model)
        is_ours = any(getattr(hook, "source", None) == self for hook in before.values())
        legal = f"an argument for which the model has no {self._name} yet"
        check(is_ours or not hasattr(model, self._name), "argument", repr(self.argument), legal)
        return super().arguments_in(model)

    def attach(self, model: nn.Module, *, takes_others: bool = False) -> None:
        self.arguments_in(model)  # or nothing changes
        numbers = {router.num_experts for router in routers_of(model, self)}
        check(len(numbers) == 1, "model", f"layers of {sorted(numbers)} experts", "one number")
        super().attach(model, takes_others=takes_others)
        if not hasattr(model, self._name):
            network = nn.Sequential(
                nn.Linear(self.dim, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, numbers.pop())
            )
            example = next(model.parameters())
            model.add_module(self._name, network.to(example.device, example.dtype))

    def leave(self, model: nn.Module) -> None:
        super().leave(model)
        delattr(model, self._name)

    @property
    def _name(self) -> str:
        """Of the network in the model."""
        return f"router_of_{self.argument.replace('.', '_')}"

    def decide(self, value: Any, batch_T: Any, takes_others: bool, model: nn.Module) -> Routing:
        is_fitting = isinstance(value, Tensor) and value.dim() == 2 and value.size(1) == self.dim
        if not is_fitting or not value.is_floating_point():
            rows = "token" if self.batch is None else "group"
            raise ValueError(
                f"{self.argument}: got {described(value)}, expected a vector of {self.dim} floats "
                f"for each {rows}"
            )
        if readable(value) and not value.isfinite().all():
            raise ValueError(f"{self.argument}: got NaN or infinity, expected finite numbers")
        network = model.get_submodule(self._name)
        parameter = next(network.parameters())
        check_one_device(f"{self.argument}, model", value, parameter)
        has_autocast = autocasts(value.device)
        with torch.autocast(value.device.type, enabled=False) if has_autocast else nullcontext():
            logits_GE = network(value.to(parameter.dtype))
            # In half precision the weights would not sum to 1.
            routing = Routing.to_all(torch.softmax(at_least_float32(logits_GE), dim=-1))
        group_T = self.group_of(batch_T, value)
        if self.batch is not None and group_T is None:
            got = f"{value.size(0)} vectors without a {self.batch}"
            check(value.size(0) == 1, self.argument, got, "one, for one group")
        return self.of_groups(routing, group_T)
