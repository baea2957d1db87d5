"""What a seed in training has summed in an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmoe import Routing, RoutingStats
from gmoe.distributed import world_sum


class Epoch:
    """What the training steps of an epoch have summed so far in this process."""

    def __init__(self, lr: float) -> None:
        self.lr = lr  # at its start
        self.batches = self.count = 0
        # Tensors: a number would have to be waited for at every step
        self.sums: dict[str, Tensor] = {}
        self.stats: RoutingStats | None = None

    def add(self, values: dict[str, Tensor], routings: list[Routing], rows: int) -> None:
        """The losses of a step, or of a part of it, and what was routed."""
        if routings:
            if self.stats is None:
                self.stats = RoutingStats(
                    num_experts=[routing.num_experts for routing in routings]
                ).to(values["loss"].device)
            self.stats.update(routings)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach() * rows
        self.count += rows

    def means(self) -> dict[str, float]:
        """Means of the losses by name, over all processes.

        These are the task loss, the sum of auxiliary losses, and each of them.
        """
        sums = torch.tensor([self.count, *map(float, self.sums.values())], dtype=torch.float64)
        count, *totals = world_sum(sums).tolist()
        return {name: total / count for name, total in zip(self.sums, totals, strict=True)}

    def state(self) -> dict[str, Any]:
        """As tensors and numbers."""
        stats = (
            None
            if self.stats is None
            else (list(self.stats.num_experts), dict(self.stats.metric_state))
        )
        return vars(self) | {"stats": stats}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        vars(self).update(
            state,
            sums={name: value.to(device) for name, value in state["sums"].items()},
            stats=None,
        )
        if state["stats"] is not None:
            experts, values = state["stats"]
            self.stats = RoutingStats(num_experts=experts).to(device)
            for name, value in values.items():
                setattr(self.stats, name, value.to(device))
            # Torchmetrics would warn of a metric without updates
            self.stats._update_count = self.batches
