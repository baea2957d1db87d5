"""Experts as one ``nn.Linear`` each, which quantization finds.

Shapes: P pairs sorted by expert, I in and O out features, E experts.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gmoe._calls import with_modules
from gmoe._checks import change_of, check, check_module
from gmoe.experts import Experts, LinearExperts
from gmoe.mixed import MixedWeights

Model = TypeVar("Model", bound=nn.Module)


class UnstackedLinears(Experts):
    """One ``nn.Linear`` for each expert, run one after the other on the expert's rows.

    You may replace each of ``linears`` by any module that is called with rows.

    Args:
        experts: the stacked layers, whose values are copied.
    """

    can_shrink = False

    def __init__(self, experts: LinearExperts) -> None:
        super().__init__(experts.in_features, experts.out_features, num_experts=experts.num_experts)
        linears = []
        for expert in range(experts.num_experts):
            linear: Any = nn.Linear(self.in_features, self.out_features, device="meta")
            linear.bias = None
            for name in experts.names:
                with torch.enable_grad():  # with a base, it learns if either part does
                    value = getattr(experts, name)[expert]
                learns = value.requires_grad
                setattr(linear, name, nn.Parameter(value.detach().clone(), requires_grad=learns))
            linears.append(linear)
        self.linears = nn.ModuleList(linears)
        self.train(experts.training)

    def reset_parameters(self) -> None:
        """Refuse: what starts at zero, or as copies, is known of stacked experts alone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "model: got experts that are unstacked, expected stacked ones: unstack last"
        )

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        loads = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
        parts = zip(self.linears, x_PI.split(loads), strict=True)
        return torch.cat([linear(rows) for linear, rows in parts])


def unstack(model: Model) -> Model:
    """Give each expert ``nn.Linear`` layers of its own, in place.

    Stacked experts hold one tensor for all; ``torch.ao.quantization.quantize_dynamic`` and torchao
    look for ``nn.Linear`` and pass them over. After this they are found, under ``....up.linears.3``
    for expert 3 of an MLP. The outputs stay the same, up to rounding. Experts then run one after
    the other, and the loads are read on the host: slower for many experts. It is the last step:
    save, prune and adapt before (PEFT takes stacked experts as they are, by
    ``LoraConfig(target_parameters=...)``).

    Each ``nn.Linear`` holds all that its expert computes with, also where experts share a base.
    What attention convs do not call stays stacked: GAT's attention vectors, and the maps of edge
    features. Convs that run one by one hold PyG's ``Linear``, which those tools pass over.

    Parameters are new ones: make a new optimizer.

    Args:
        model: any model; parts that are not stacked are left as they are.

    Returns:
        The model; what replaces it, if the model itself is stacked linear layers.

    Raises:
        ValueError: stacked layers that were changed: parametrized, hooked; or whose weights are
            mixed.

    Example:
        >>> vit = gmoe.unstack(vit)
        >>> vit = torch.ao.quantization.quantize_dynamic(vit, {nn.Linear})
    """
    check_module("model", model)
    for name, part in model.named_modules():
        legal = "mix='outputs', or the dense model that gmoe.merge gives"
        check(not isinstance(part, MixedWeights), "model", f"{name} with mix='weights'", legal)
    for name, module in _stacked(model):  # before anything is changed
        change = change_of(module)
        if type(module) is not LinearExperts:
            change = change or f"a class of its own, {type(module).__name__}"
        check(change is None, "model", f"{name} with {change}", "plain stacked layers")
    return with_modules(model, {module: UnstackedLinears(module) for _, module in _stacked(model)})


def _stacked(model: nn.Module) -> list[tuple[str, LinearExperts]]:
    """The stacked layers that experts call, by name.

    What attention does to edge features is part of its products, and never called.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, LinearExperts) and name.rpartition(".")[2] != "lin_edge"
    ]
