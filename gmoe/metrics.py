"""Routing statistics as a torchmetrics metric.

Shapes: L layers, E experts, T tokens, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gmoe._checks import check_counts
from gmoe.routers import Router
from gmoe.routing import Routing, as_list

PER_EXPERT = ("load", "weight")
"""States and figures with one value per expert; the others have one per layer."""


class RoutingStats(Metric):
    """Track load, coverage, entropy and weights of every MoE layer.

    Figures are over all updates and, under DDP, all ranks. It is cheap enough to leave on in
    training, and adds no host sync.

    Args:
        num_experts: E, of one layer, or of each of several.
        kwargs: of :class:`torchmetrics.Metric`.

    Shapes:
        - ``update(routings)``: one :class:`gmoe.Routing` of T tokens, or a list with one per layer,
          as ``return_routing=True`` (a ``HeteroMoEConv`` by ``values()``) and
          :func:`gmoe.record_routing` give them.
        - ``compute()``: a list with one dictionary per layer:

          - ``load`` (E,): the expert's share of all pairs; 0 without pairs. For a single expert,
            torchmetrics makes a scalar of it.
          - ``weight`` (E,): mean weight of the expert's pairs; 0 if it has none.
          - ``coverage``: share of tokens with at least one expert; 1 without tokens.
          - ``experts_per_token``: pairs over tokens.
          - ``entropy``: mean over tokens of the entropy of their scores, in nats; see
            :attr:`gmoe.Routing.entropy`.
          - ``dropped``: share of the chosen pairs that exceeded an expert's capacity.
          - ``dead``: number of experts without a token.

    Raises:
        ValueError: no layer, a number of experts below 1, or routings with another number of layers
            or experts.

    Example:
        >>> stats = RoutingStats.of(model)
        >>> for images, labels in loader:
        ...     with gmoe.record_routing(model) as routings:
        ...         loss = F.cross_entropy(model(images), labels)
        ...     stats.update(routings)
        >>> [layer["load"] for layer in stats.compute()]
    """

    is_differentiable = False
    full_state_update = False

    load: Tensor
    weight: Tensor
    tokens: Tensor
    covered: Tensor
    entropy: Tensor
    dropped: Tensor

    def __init__(self, *, num_experts: int | Sequence[int], **kwargs: object) -> None:
        super().__init__(**kwargs)
        sizes: Any = num_experts
        self.num_experts: tuple[int, ...] = (
            tuple(sizes) if isinstance(sizes, Sequence) else (sizes,)
        )
        if not self.num_experts:
            raise ValueError("num_experts: got no layers, expected at least one")
        for number in self.num_experts:
            check_counts(num_experts=number)
        num_layers = len(self.num_experts)
        for name in ("load", "weight", "tokens", "covered", "entropy", "dropped"):
            # Layers with fewer experts leave the last columns at zero.
            shape = (num_layers, max(self.num_experts)) if name in PER_EXPERT else (num_layers,)
            dtype = torch.double if name in ("weight", "entropy") else torch.long
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @classmethod
    def of(cls, model: nn.Module, **kwargs: object) -> RoutingStats:
        """Build one that takes what :func:`gmoe.record_routing` records of a model.

        The model has to call each of its routers once per forward.

        Raises:
            ValueError: the model has no router.
        """
        sizes = [module.num_experts for module in model.modules() if isinstance(module, Router)]
        if not sizes:
            raise ValueError(
                f"model: got {type(model).__name__} without a router, expected at least one"
            )
        return cls(num_experts=sizes, **kwargs)

    @torch.no_grad()
    def update(self, routings: Routing | Sequence[Routing]) -> None:
        """Count the routings of one forward pass."""
        layers = as_list(routings)
        num_experts = tuple(routing.num_experts for routing in layers)
        if num_experts != self.num_experts:
            raise ValueError(
                f"routings: got layers of {num_experts} experts, expected {self.num_experts}"
            )
        for layer, routing in enumerate(layers):
            load = routing.load
            self.load[layer, : len(load)] += load
            if routing.weight.numel():
                # unsafe: do not check the lengths, which would cost a host sync.
                weight_E = torch.segment_reduce(
                    routing.weight.float(), "sum", lengths=load, unsafe=True
                )
                self.weight[layer, : len(load)] += weight_E
            is_covered_T = load.new_zeros(routing.num_tokens, dtype=torch.bool)
            self.covered[layer] += is_covered_T.index_fill_(0, routing.token, True).sum()
            self.tokens[layer] += routing.num_tokens
            self.entropy[layer] += routing.entropy * routing.num_tokens
            self.dropped[layer] += routing.dropped

    def compute(self) -> list[dict[str, Tensor]]:
        """Return the figures of each layer."""
        figures = []
        for layer, num_experts in enumerate(self.num_experts):
            load = self.load[layer, :num_experts]
            weight = self.weight[layer, :num_experts]
            dropped = self.dropped[layer]
            pairs = load.sum()
            tokens = self.tokens[layer].clamp(min=1)
            coverage = torch.where(self.tokens[layer] > 0, self.covered[layer] / tokens, 1.0)
            figures.append(
                {
                    "load": load / pairs.clamp(min=1),
                    "weight": (weight / load.clamp(min=1)).float(),
                    "coverage": coverage,
                    "experts_per_token": pairs / tokens,
                    "entropy": (self.entropy[layer] / tokens).float(),
                    "dropped": dropped / (dropped + pairs).clamp(min=1),
                    "dead": (load == 0).sum(),
                }
            )
        return figures
