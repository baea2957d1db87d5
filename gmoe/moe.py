"""MoE: a router and its experts; and what all layers with experts share.

Shapes: T tokens, D in features, O out features, E experts, K experts per token, R slot rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from gmoe._checks import check, check_counts, check_kept, described, fixed, shown
from gmoe.experts import Experts
from gmoe.mixed import MixedWeights
from gmoe.recorded import AsBuilt, Recorded
from gmoe.routers import Router, SoftRouting, SoftSlots
from gmoe.routing import Routing, checked_routing
from gmoe.start import Start


class MoELayer(nn.Module, ABC):
    """The base of all layers with experts, for images and graphs.

    Args:
        num_experts: E.
        k: K, experts per token, until the layer has a router, which may say otherwise.

    Attributes:
        router: the layer's own, or ``None`` if each call passes a :class:`Routing`.
        experts_per_token: average number of experts per token.
        start: how the layer started, see :func:`gmoe.moefy`; ``"plain"`` for a :class:`MoE` that
            you built, of which nobody else knows.
        kept: the numbers that the experts had before others were pruned; ``None`` for all of them.
        moefied: the arguments of :func:`gmoe.moefy` that made the layer, for :func:`gmoe.save`;
            ``None`` for a layer that you built.
        as_built: what :func:`gmoe.moefy` made the layer of, to refuse to save another.
        replaced: a tuple of the dense module that the layer replaced, which is no part of it and
            has no values (on the meta device), for :func:`gmoe.merge`; empty for a layer that you
            built, and for convs.
    """

    router: Router | None
    experts: Any
    start: Start = "plain"
    num_experts: int = fixed("num_experts")
    k: int = fixed("k")
    experts_per_token: float = fixed("experts_per_token")
    kept: tuple[int, ...] | None = None
    moefied: Recorded | None = None
    as_built: AsBuilt | None = None
    replaced: tuple[nn.Module, ...] = ()

    def __init__(self, *, num_experts: int, k: int = 1) -> None:
        super().__init__()
        self._num_experts = num_experts
        self._k = k
        self._experts_per_token = float(k)

    def take_costs(self, router: Router) -> None:
        """Take K and cost from the router; mixed weights cost one expert."""
        self._k = router.k
        is_mixed = isinstance(self.experts, MixedWeights)
        self._experts_per_token = 1.0 if is_mixed else router.experts_per_token

    def keep(self, kept: Sequence[int]) -> None:
        """Take all other experts away, in place; those that stay are numbered anew, in their order.

        The layer's ``kept`` has their numbers before. The router scores all experts as before, and
        chooses among those that stay; see :meth:`gmoe.Router.keep`. Tokens of the others go to
        their next best ones.

        A layer without a router of its own loses experts alone: call ``keep`` of the router that
        serves it, too, such as ``model.shared_router``. Parameters of experts are new ones: make a
        new optimizer.

        Args:
            kept: the experts that stay, ascending, at least K.

        Raises:
            ValueError: numbers of no experts, or fewer than K; a router or experts of which none
                can be taken away. The layer stays as it is then.

        Example:
            >>> layer.keep([0, 2, 3])
        """
        keep_experts([self], self.router, kept)

    def renumber(self, kept: Sequence[int]) -> None:
        """Note which experts stay, before the others go."""
        before = self.kept or range(self.num_experts)
        self.kept = tuple(before[expert] for expert in kept)
        self._num_experts = len(kept)
        self._k = min(self.k, len(kept))
        self._experts_per_token = min(self.experts_per_token, float(len(kept)))

    @abstractmethod
    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all E experts; a token uses ``experts_per_token / E`` of them."""


def check_built(name: str, layer: MoELayer) -> None:
    """Refuse a layer, called ``name`` in the error, that has no experts yet."""
    got = f"{name}, whose widths are open"
    check(layer.experts is not None, "model", got, "a layer that was called once")


def check_can_keep(layers: Iterable[MoELayer], router: Router | None, kept: Sequence[int]) -> None:
    """Refuse what :func:`keep_experts` cannot do, before anything changes."""
    for layer in layers:
        check_kept(kept, layer.num_experts)
        check_built("a layer", layer)
        if router is not None:
            legal = f"the layer's {layer.num_experts}; gmoe.prune prunes all layers of a router"
            is_fitting = router.num_experts == layer.num_experts
            check(is_fitting, "router", f"one of {router.num_experts} experts", legal)
        layer.experts.check_kept(kept)
    if router is not None:
        router.check_kept(kept)


def keep_experts(layers: Iterable[MoELayer], router: Router | None, kept: Sequence[int]) -> None:
    """Take all other experts away from layers that one router serves, and from the router.

    Raises:
        ValueError: see :meth:`MoELayer.keep`.
    """
    check_can_keep(layers, router, kept)
    for layer in layers:
        layer.renumber(kept)
    for experts in {layer.experts: None for layer in layers}:  # which layers may share
        experts.keep(kept)
    if router is not None:
        router.keep(kept)
    for layer in layers:
        if router is not None:
            layer.take_costs(router)
        if layer.as_built is not None:
            layer.as_built = AsBuilt.of(layer)


class _Mixture(MoELayer):
    """A layer that holds experts, and a router of their number and width, or none."""

    def __init__(self, router: Router | None, experts: Experts) -> None:
        check(isinstance(router, Router | None), "router", shown(router), "an instance of Router")
        legal = "gmoe.Experts: MLPExperts, LinearExperts or your own"
        has_experts = isinstance(experts, nn.Module) and hasattr(experts, "num_experts")
        check(has_experts, "experts", type(experts).__name__, legal)
        super().__init__(num_experts=experts.num_experts)
        self.router = router
        self.experts = experts
        if router is not None:
            is_fitting = experts.num_experts == router.num_experts
            is_fitting = is_fitting and experts.in_features == router.dim
            got = f"num_experts={experts.num_experts}, in_features={experts.in_features}"
            legal = f"those of the router, num_experts={router.num_experts}, dim={router.dim}"
            check(is_fitting, "experts", got, legal)
            self.take_costs(router)

    def reset_parameters(self) -> None:
        """Draw router and experts anew."""
        for part in self.children():
            _reset(part)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.routed_parameters()


class MoE(_Mixture):
    r"""Route tokens to experts and add a shared expert.

    .. math::
        y_t = s(x_t) + \sum_e w_{te} f_e(x_t)

    A token without an expert gets zero from the routed experts; the surrounding model adds the
    residual. With experts that start at zero (``MLPExperts(zero_init=True)``), the first forward
    is that of the shared expert s.

    Args:
        router: assigns tokens to experts; ``None`` if every call passes ``routing=``.
        experts: the stacked experts, as many as the router expects.
        shared_expert: a module that runs on every token with weight 1 and is added (default
            ``None``).

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups. ``batch`` and ``edge_index`` as in
          :class:`Router`.
        - returns (..., T, O), and the :class:`Routing` too with ``return_routing=True``. Losses are
          in the routing: ``loss = task + gmoe.aux_loss(routing)``.
        - ``routing``: a decision made elsewhere, such as an earlier call's, or one for each image
          (:meth:`gmoe.Routing.expand`); no router is asked.

    Raises:
        ValueError: E or D of router and experts differ; a routing of other tokens or experts.

    Example:
        >>> experts = MLPExperts(128, 512, 128, num_experts=8)
        >>> layer = MoE(ExpertChoice(128, num_experts=8, k=1), experts)
        >>> y = layer(x)
    """

    router: Any  # a Router, or None

    def __init__(
        self,
        router: Router | None,
        experts: Experts,
        shared_expert: nn.Module | None = None,
    ) -> None:
        legal = "a router of tokens; SoftMoE is for slots, which mix them"
        check(not isinstance(router, SoftSlots), "router", "SoftSlots", legal)
        super().__init__(router, experts)
        self.shared_expert = shared_expert

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        edge_index: Tensor | None = None,
        *,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Route and run; see the class."""
        # Experts see flat tokens (T, D): groups matter to the router only.
        x_TD = x.reshape(-1, x.size(-1))
        if routing is not None or self.router is None:
            routing = checked_routing(routing, x_TD.size(0), self.num_experts)
        else:
            routing = self.router(x, batch, edge_index)
        y = self.experts(x_TD, routing).unflatten(0, x.shape[:-1])
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return (y, routing) if return_routing else y


class SoftMoE(_Mixture):
    r"""Run experts on slots that are mixtures of tokens.

    .. math::
        y = C f(D^\top X)

    This is `Soft MoE <https://arxiv.org/abs/2308.00951>`_ (Puigcerver et al., 2024).

    Args:
        router: the slots, and how they mix tokens.
        experts: the stacked experts, as many as the router expects.

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups, each with its own E * S slots.
          ``batch`` as in :class:`Router`.
        - returns (..., T, O), and the :class:`gmoe.routers.SoftRouting` too with
          ``return_routing=True``.

    Raises:
        ValueError: ``router`` is not a :class:`SoftSlots`, or E or D of router and experts differ.

    Example:
        >>> experts = MLPExperts(128, 512, 128, num_experts=8)
        >>> layer = SoftMoE(SoftSlots(128, num_experts=8, slots=4), experts)
        >>> y = layer(torch.randn(2, 64, 128))
    """

    router: SoftSlots

    def __init__(self, router: SoftSlots, experts: Experts) -> None:
        check(isinstance(router, SoftSlots), "router", type(router).__name__, "SoftSlots")
        super().__init__(router, experts)

    def forward(
        self, x: Tensor, batch: Tensor | None = None, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, SoftRouting]:
        """Mix tokens into slots, run the experts, and mix their outputs back; see the class."""
        routing: SoftRouting = self.router(x, batch)
        slots_RD = routing.dispatch(x.reshape(-1, x.size(-1)))
        out_RO = self.experts(slots_RD, routing.slot_offsets)
        y = routing.combine(out_RO).unflatten(0, x.shape[:-1])
        return (y, routing) if return_routing else y


def _reset(module: nn.Module) -> None:
    """Draw a module anew: by its own ``reset_parameters``, or part by part, as of an MLP."""
    if reset := getattr(module, "reset_parameters", None):
        reset()
        return
    for part in module.children():
        _reset(part)


def checked_routings(routings: Any, number: int, owner: str) -> list[Routing]:
    """The decisions of an earlier call of a model, one for each ``owner``.

    Raises:
        ValueError: something else than a list of so many.
    """
    is_list = isinstance(routings, Sequence) and all(isinstance(one, Routing) for one in routings)
    given: list[Routing] = [*routings] if is_list else []
    got = len(given) if is_list else described(routings)
    legal = f"a list of {number} Routings, one a {owner}"
    check(is_list and len(given) == number, "routings", got, legal)
    return given


def choose_blocks(count: int, every: int) -> list[int]:
    """Return the numbers of the blocks or layers that become MoE, in order.

    Args:
        count: how many blocks there are.
        every: n; block ``i`` is chosen if ``i % n == n - 1``.

    Raises:
        ValueError: no block.
    """
    check_counts(every=every)
    legal = f"at most {count}, the number of blocks or hidden layers (with jk, all)"
    check(every <= count, "every", every, legal)
    return list(range(every - 1, count, every))
