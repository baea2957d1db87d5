"""Watch a router in training, and warn if it does not work. Shapes: E experts."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor

from gmoe.routing import Routing

STEPS = 50
"""Training steps between two looks, each of which is a host sync."""

COLLAPSED = 0.95
"""Share of the pairs that a quarter of the experts may get."""


class Watch:
    """Warn once if experts collapsed, and once if nobody trains on the losses of a :class:`Routing`."""

    def __init__(self) -> None:
        self.steps = 0
        self.collapsed: Any = 0  # a tensor on the device, from the first step on
        self.backwards = self.loss_backwards = 0
        self.said: set[str] = set()

    def step(self, name: str, routing: Routing) -> None:
        """Count a training step of the router of that name."""
        num_experts = routing.offsets.numel()
        few = math.ceil(num_experts / 4)
        if num_experts > 1:
            load_E = routing.offsets.diff(prepend=routing.offsets.new_zeros(1))
            self.collapsed = self.collapsed + (load_E.topk(few).values.sum() > COLLAPSED * load_E.sum())
        if routing.losses and routing.weight.requires_grad:
            routing.weight.register_hook(self._count_backward)
            for loss in routing.losses.values():
                if loss.value.requires_grad:
                    loss.value.register_hook(self._count_loss)
        self.steps += 1
        if self.steps % STEPS:
            return
        if int(self.collapsed) == STEPS:
            self._say(
                f"{name}: more than {COLLAPSED:.0%} of the tokens went to {few} of {num_experts} experts in each of "
                f"the last {STEPS} training steps, so that the others learn nothing; center the features "
                "(x - x.mean(dim=0)), or try router_kwargs={'balance': 'bias'} (token choice's default), "
                "router='expert_choice', or fewer experts"
            )
        if self.backwards >= STEPS and self.loss_backwards == 0:
            self._say(
                f"{name}: no backward pass reached the losses {sorted(routing.losses)} of its Routing, so that they "
                "train nothing; add gmoe.aux_loss(routings) to the task's loss, with routings from "
                "return_routing=True or gmoe.record_routing, or take balance='bias', which has none"
            )
        self.collapsed = self.backwards = self.loss_backwards = 0

    def _say(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            warnings.warn(text, stacklevel=5)

    def _count_backward(self, _: Tensor) -> None:
        self.backwards += 1

    def _count_loss(self, _: Tensor) -> None:
        self.loss_backwards += 1
