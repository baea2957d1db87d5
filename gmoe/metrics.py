"""Routing statistics as a torchmetrics metric, and the health of experts that follows from them.

Shapes: L layers, E experts, T tokens, P (token, expert) pairs.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gmoe._checks import check, check_counts
from gmoe._torch import in_backward, untraced
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
          as ``return_routing=True`` and :func:`gmoe.record_routing` give them.
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
        check(sizes, "model", f"{type(model).__name__} without a router", "at least one")
        return cls(num_experts=sizes, **kwargs)

    @torch.no_grad()
    def update(self, routings: Routing | Sequence[Routing]) -> None:
        """Count the routings of one forward pass."""
        layers = as_list(routings)
        num_experts = tuple(routing.num_experts for routing in layers)
        is_same = num_experts == self.num_experts
        check(is_same, "routings", f"layers of {num_experts} experts", self.num_experts)
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


# health -------------------------------------------------------------------------------------------

COLLAPSED = 0.9
"""Experts have collapsed if a quarter of them, or K if that is more, has this share of the load."""


@dataclass(frozen=True)
class LayerHealth:
    """How evenly the experts of one layer are used.

    Args:
        name: of the layer.
        load: of each expert, its load over the even share: 1 is even, E is all of it.
        dead: number of experts without a token.
        entropy: mean entropy of the tokens' scores, in nats.
        experts_per_token: K on average.
    """

    name: str
    load: tuple[float, ...]
    dead: int
    entropy: float
    experts_per_token: float

    @property
    def busiest(self) -> tuple[int, float]:
        """The least number of experts that have nearly all of the load; and their share of it."""
        shares = sorted((load / len(self.load) for load in self.load), reverse=True)
        number = next((n for n in range(1, len(shares)) if sum(shares[:n]) >= COLLAPSED), None)
        return (len(shares), 1.0) if number is None else (number, sum(shares[:number]))

    @property
    def has_collapsed(self) -> bool:
        """True if a few experts have nearly all of the load."""
        few = max(len(self.load) // 4, math.ceil(self.experts_per_token - 1e-6), 1)
        return self.busiest[0] <= few and self.busiest[0] < len(self.load)


@dataclass(frozen=True)
class ExpertHealth:
    """How evenly the experts of a model are used; see :func:`gmoe.expert_health`.

    Args:
        layers: one for each layer.
    """

    layers: tuple[LayerHealth, ...]

    def figures(self) -> dict[str, float]:
        """Numbers to log, by names such as ``experts/blocks.1.mlp/max_load``.

        They are ``max_load`` and ``min_load``, of the busiest and of the idlest expert over the
        even share; ``dead`` and ``entropy``.
        """
        found: dict[str, float] = {}
        for layer in self.layers:
            found |= {
                f"experts/{layer.name}/max_load": max(layer.load),
                f"experts/{layer.name}/min_load": min(layer.load),
                f"experts/{layer.name}/dead": float(layer.dead),
                f"experts/{layer.name}/entropy": layer.entropy,
            }
        return found

    @property
    def advice(self) -> str | None:
        """What to do if experts collapsed, in one sentence; ``None`` if they did not."""
        collapsed = [layer for layer in self.layers if layer.has_collapsed]
        if not collapsed:
            return None
        worst = min(collapsed, key=lambda layer: layer.busiest[0])
        number, share = worst.busiest
        also = len(collapsed) - 1
        return (
            f"{number} of {len(worst.load)} experts {'has' if number == 1 else 'have'} {share:.0%} "
            f"of the load in {worst.name}{f', and {also} more layers are alike' if also else ''}: "
            "balance them with router_kwargs={'balance': 'bias'} (the default) and a higher "
            "'bias_rate', let experts choose tokens with router='expert_choice', or take fewer."
        )

    def __str__(self) -> str:
        lines = [
            f"{layer.name}: load {min(layer.load):.2f} to {max(layer.load):.2f} of the even share, "
            f"{layer.dead} of {len(layer.load)} experts dead, entropy {layer.entropy:.2f} nats"
            for layer in self.layers
        ]
        return "\n".join(lines if self.advice is None else [*lines, self.advice])


def expert_health(
    routings: Routing | Sequence[Routing] | RoutingStats, names: Sequence[str] | None = None
) -> ExpertHealth:
    """How evenly experts are used: load, dead experts and entropy by layer, and what to do.

    Trainers have callbacks for it: :class:`gmoe.TrainerHealth`, :class:`gmoe.LightningHealth`.

    Args:
        routings: of one forward pass, as :class:`RoutingStats` takes them; or one that counted
            several.
        names: of the layers (default: their numbers).

    Returns:
        ``str(health)`` is a line for each layer and the advice. ``health.layers`` has, for each,
        ``load`` over the even share (1 for all experts if they are balanced), ``dead`` experts, and
        ``entropy``, the mean of the tokens' scores in nats; ``health.figures()`` the same as
        numbers by name, for a logger; ``health.advice`` a sentence if a few experts have nearly all
        of the load.

    Raises:
        ValueError: no routing, or names for another number of layers.

    Example:
        >>> with gmoe.record_routing(model) as routings:
        ...     loss = F.cross_entropy(model(images), labels)
        >>> health = gmoe.expert_health(routings)
        >>> print(health)
        >>> wandb.log(health.figures())
    """
    stats = routings
    if not isinstance(stats, RoutingStats):
        layers = as_list(stats)
        check(layers, "routings", "none", "at least one")
        stats = RoutingStats(num_experts=[layer.num_experts for layer in layers])
        stats.to(layers[0].token.device).update(layers)
    found = stats.compute()
    names = [str(number) for number in range(len(found))] if names is None else names
    check(len(names) == len(found), "names", f"{len(names)}", f"{len(found)}, one for each layer")
    return ExpertHealth(
        tuple(
            LayerHealth(
                name,
                tuple((layer["load"].reshape(-1) * layer["load"].numel()).tolist()),
                int(layer["dead"]),
                float(layer["entropy"]),
                float(layer["experts_per_token"]),
            )
            for name, layer in zip(names, found, strict=True)
        )
    )


class HealthMonitor:
    """Counts what the routers of a model decide in training, for callbacks of trainers.

    It counts in the thread that began to, and not what checkpointing runs again. Each router may be
    called any number of times.
    """

    def __init__(self) -> None:
        self.stats: dict[str, RoutingStats] = {}
        self.handles: list[Any] = []
        self.has_advised = False

    def watch(self, model: nn.Module) -> None:
        """Begin to count in a model, and no more in another one, of a training that was cut off.

        Raises:
            ValueError: it holds no routers.
        """
        self.remove()
        for path, module in model.named_modules():
            if isinstance(module, Router):
                name = path.removesuffix(".router") if path != "router" else "model"
                self.stats[name] = RoutingStats(num_experts=module.num_experts)
                hook = self._counter(self.stats[name])
                self.handles.append(module.register_forward_hook(hook))
        check(self.stats, "model", f"{type(model).__name__} without a router", "at least one")

    @staticmethod
    def _counter(stats: RoutingStats) -> Callable[..., None]:
        """A hook that counts the routings of one router."""
        thread = threading.get_ident()

        @untraced
        def count(router: nn.Module, _: Any, routing: Routing) -> None:
            if router.training and not in_backward() and threading.get_ident() == thread:
                stats.to(routing.token.device).update(routing)

        return count

    def collect(self, advises: bool) -> ExpertHealth:
        """The health since the last call, over all processes, each of which has to call this.

        Args:
            advises: warn of experts that collapsed, once.
        """
        layers: list[LayerHealth] = []
        for name, stats in self.stats.items():
            layers += expert_health(stats, [name]).layers
            stats.reset()
        health = ExpertHealth(tuple(layers))
        if advises and health.advice is not None and not self.has_advised:
            self.has_advised = True
            warnings.warn(health.advice, stacklevel=3)
        return health

    def remove(self) -> None:
        """Count no more."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.stats = {}
