"""What routers do, as a torchmetrics metric. Shapes: L layers, E experts, T tokens, P pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gmoe._checks import check, check_count
from gmoe.routers import Router
from gmoe.routing import Routing

PER_EXPERT = ("load", "weight")
"""The figures that there is one of for each expert."""


class RoutingStats(Metric):
    """Load, coverage, entropy and weights of every MoE layer, over all tokens of all updates and, in DDP, all ranks.

    Cheap enough to be left on in training, and without a host sync where the routing has none.

    Args:
        num_experts: E, of one layer, or of each of several.
        kwargs: of :class:`torchmetrics.Metric`.

    Shapes:
        - ``update(routings)``: one :class:`gmoe.Routing` of T tokens, or a list of them, one a layer, as
          ``return_routing=True`` and :func:`gmoe.record_routing` give them.
        - ``compute()``: a list, one dictionary a layer:

          - ``load`` (E,): share of the pairs that are the expert's; 0 without pairs.
          - ``weight`` (E,): mean weight of the expert's pairs; 0 where it has none.
          - ``coverage``: share of the tokens that have an expert; 1 without tokens.
          - ``experts_per_token``: pairs over tokens.
          - ``entropy``: mean over tokens of the entropy of their scores, in nats; see :attr:`gmoe.Routing.entropy`.
          - ``dropped``: of the pairs that tokens chose, the share that experts had no capacity for.
          - ``dead``: number of experts that no token went to.

    Raises:
        ValueError: no layer, a number of experts below 1, or routings of another number of layers or experts.

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

    def __init__(self, num_experts: int | Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = (num_experts,) if isinstance(num_experts, int) else tuple(num_experts)
        check(self.num_experts, "num_experts", "no layers", "at least one")
        for number in self.num_experts:
            check_count("num_experts", number)
        layers, most = len(self.num_experts), max(self.num_experts)
        for name in ("load", "weight", "tokens", "covered", "entropy", "dropped"):
            shape = (layers, most) if name in PER_EXPERT else (layers,)
            dtype = torch.double if name in ("weight", "entropy") else torch.long
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """torchmetrics takes the dimension off tensors of one element, and so off the figures of one expert."""
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(wrapped)
        def shaped() -> list[dict[str, Tensor]]:
            return [layer | {name: layer[name].view(-1) for name in PER_EXPERT} for layer in wrapped()]

        return shaped

    @classmethod
    def of(cls, model: nn.Module, **kwargs: Any) -> RoutingStats:
        """For what :func:`gmoe.record_routing` gives of a model each of whose routers is called once in a forward pass.

        Raises:
            ValueError: the model has no router.
        """
        routers = [module.num_experts for module in model.modules() if isinstance(module, Router)]
        check(routers, "model", f"{type(model).__name__} without a router", "at least one")
        return cls(routers, **kwargs)

    @torch.no_grad()
    def update(self, routings: Routing | Sequence[Routing]) -> None:
        """Count the routings of one forward pass."""
        layers = [routings] if isinstance(routings, Routing) else list(routings)
        experts = tuple(routing.num_experts for routing in layers)
        check(experts == self.num_experts, "routings", f"layers of {experts} experts", self.num_experts)
        for layer, routing in enumerate(layers):
            load = routing.load
            self.load[layer, : len(load)] += load
            if routing.weight.numel():
                weight = routing.weight.detach().float()
                self.weight[layer, : len(load)] += torch.segment_reduce(weight, "sum", lengths=load, unsafe=True)
            covered = torch.zeros(routing.num_tokens, dtype=torch.bool, device=load.device)
            self.covered[layer] += covered.index_fill_(0, routing.token, True).sum()
            self.tokens[layer] += routing.num_tokens
            self.entropy[layer] += routing.entropy * routing.num_tokens
            self.dropped[layer] += routing.dropped

    def compute(self) -> list[dict[str, Tensor]]:
        """What was counted, layer by layer."""
        found = []
        for layer, experts in enumerate(self.num_experts):
            load, dropped = self.load[layer, :experts], self.dropped[layer]
            pairs, tokens = load.sum(), self.tokens[layer].clamp(min=1)
            figures = {
                "load": load / pairs.clamp(min=1),
                "weight": self.weight[layer, :experts] / load.clamp(min=1),
                "coverage": torch.where(self.tokens[layer] > 0, self.covered[layer] / tokens, 1.0),
                "experts_per_token": pairs / tokens,
                "entropy": self.entropy[layer] / tokens,
                "dropped": dropped / (dropped + pairs).clamp(min=1),
            }
            found.append({**{name: figure.float() for name, figure in figures.items()}, "dead": (load == 0).sum()})
        return found
