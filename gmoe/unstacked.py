"""Experts as one ``nn.Linear`` each, which other tools find: quantization, PEFT.

Shapes: P pairs sorted by expert, I in and O out features, E experts.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gmoe._checks import change_of, check_module
from gmoe.experts import Experts, LinearExperts
from gmoe.stack import Stack, fold

Model = TypeVar("Model", bound=nn.Module)


class UnstackedLinears(Experts, Stack):
    """One ``nn.Linear`` for each expert, run one after the other on the expert's rows.

    You may replace each of ``linears`` by any module that is called with rows.

    Args:
        experts: the stacked layers, whose values are copied.
    """

    def __init__(self, experts: LinearExperts) -> None:
        super().__init__(experts.in_features, experts.out_features, num_experts=experts.num_experts)
        self.backend = experts.backend
        self.zero_init = experts.zero_init
        self.names = list(experts.names)
        linears = []
        for expert in range(experts.num_experts):
            linear: Any = nn.Linear(self.in_features, self.out_features, device="meta")
            linear.bias = None
            for name in self.names:
                stored = experts.stored(name)
                value = stored[expert].detach().clone()
                setattr(linear, name, nn.Parameter(value, requires_grad=stored.requires_grad))
            linears.append(linear)
        self.linears = nn.ModuleList(linears)
        self.train(experts.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in self.linears:
            linear.reset_parameters()  # type: ignore[operator]
            for parameter in linear.parameters() if self.zero_init else ():
                parameter.zero_()

    def stored(self, name: str) -> Any:
        """There is no tensor of all experts.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "model: got experts that are unstacked, expected stacked ones: call gmoe.restack before"
        )

    def of(self, name: str, expert: int) -> Tensor:
        return self.place(name, expert)

    def place(self, name: str, expert: int) -> Tensor:
        """An expert's weight or bias.

        Raises:
            ValueError: a linear layer that is more or other than a plain ``nn.Linear``.
        """
        self._refuse_replaced("experts: got some", "only their weights can be read and drawn anew")
        return self.linears[expert].get_parameter(name)

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        loads = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
        parts = zip(self.linears, x_PI.split(loads), strict=True)
        return torch.cat([linear(rows) for linear, rows in parts])

    def replaced(self) -> str | None:
        """What some layer is, if it is more or other than a plain ``nn.Linear``."""
        for linear in self.linears:
            cls = type(linear)
            is_linear = isinstance(linear, nn.Linear)
            # Quantized layers of torch are called Linear, too.
            change = change_of(linear) if is_linear else f"a {cls.__module__}.{cls.__name__}"
            if change is not None:
                return change
        return None

    def _refuse_replaced(self, got: str, hint: str) -> None:
        """Raise a ``ValueError`` if some layer is more or other than a plain ``nn.Linear``."""
        change = self.replaced()
        if change is not None:
            raise ValueError(f"{got} with {change}, expected plain nn.Linears: {hint}")

    def restacked(self) -> LinearExperts:
        """The stacked layers again, with the values of now.

        Raises:
            ValueError: a linear layer that is more or other than a plain ``nn.Linear``.
        """
        hint = "merge adapters before (PEFT: merge_and_unload); quantized weights cannot be stacked"
        self._refuse_replaced("model: got experts", f"{hint} again")
        linears: list[Any] = list(self.linears)
        first = linears[0]
        with torch.device("meta"):
            experts = LinearExperts(
                self.in_features,
                self.out_features,
                num_experts=self.num_experts,
                bias=first.bias is not None,
                zero_init=self.zero_init,
                backend=self.backend,
            )
        for name in experts.names:
            parts = [getattr(linear, name) for linear in linears]
            values = torch.stack([part.detach() for part in parts])
            learns = any(part.requires_grad for part in parts)
            setattr(experts, name, nn.Parameter(values, requires_grad=learns))
        return experts.train(self.training)


def unstack(model: Model) -> Model:
    """Give each expert ``nn.Linear`` layers of its own, in place.

    Stacked experts hold one tensor for all; ``torch.ao.quantization.quantize_dynamic``, torchao
    and PEFT look for ``nn.Linear`` and pass them over. After this they are found, under
    ``....up.linears.3`` for expert 3 of an MLP. The outputs stay the same, up to rounding. Experts
    then run one after the other, and the loads are read on the host: slower for many experts.

    Experts that share a base are folded before: each ``nn.Linear`` holds all
    that its expert computes with. What attention convs do not call stays stacked: GAT's attention
    vectors, and the maps of edge features. Convs that run one by one hold PyG's ``Linear``, which
    those tools pass over.

    Parameters are new ones: make a new optimizer. :func:`restack` is the way back.

    Args:
        model: any model; parts that are not stacked are left as they are.

    Returns:
        The model; what replaces it, if the model itself is stacked linear layers.

    Raises:
        ValueError: stacked layers that were changed: parametrized, hooked.

    Example:
        >>> vit = gmoe.unstack(vit)
        >>> vit = torch.ao.quantization.quantize_dynamic(vit, {nn.Linear})
    """
    check_module("model", model)
    for name, module in _stacked(model):  # before anything is changed
        change = change_of(module)
        if change is not None or type(module) is not LinearExperts:
            got = change or f"a class of its own, {type(module).__name__}"
            raise ValueError(f"model: got {name} with {got}, expected plain stacked layers")
    model = fold(model)
    return _replaced(model, {module: UnstackedLinears(module) for _, module in _stacked(model)})


def _stacked(model: nn.Module) -> list[tuple[str, LinearExperts]]:
    """The stacked layers that experts call, by name.

    What attention does to edge features is part of its products, and never called.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LinearExperts) and name.rpartition(".")[2] != "lin_edge"
    ]


def restack(model: Model) -> Model:
    """Stack the ``nn.Linear`` layers of all experts again, in place; undoes :func:`unstack`.

    Args:
        model: any model; experts that are stacked are left as they are.

    Returns:
        The model; what replaces it, if the model itself is such experts.

    Raises:
        ValueError: linear layers that were replaced (quantized, LoRA), parametrized or hooked.
    """
    check_module("model", model)
    stacked = {
        module: module.restacked()
        for module in model.modules()
        if isinstance(module, UnstackedLinears)
    }
    return _replaced(model, stacked)


def _replaced(model: Any, new: Any) -> Any:
    """The model with some of its modules replaced, wherever they stand."""
    if model in new:
        return new[model]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])
    return model
