"""MoE: a router and its experts. Shapes: T tokens, D width, E experts, K experts per token, P
pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._checks import check, check_choice
from gmoe.experts import Experts
from gmoe.routers import Router, SoftRouting, SoftSlots
from gmoe.routing import Routing

Start: TypeAlias = Literal["copies", "shared", "plain"]
"""How a layer with experts starts.

- ``"copies"``: all experts are copies of one dense layer, and nothing runs beside them. The first
  forward is the dense layer's, since a token's weights sum to 1: other routers are refused.
- ``"shared"``: a shared expert, which is the dense layer, runs on every token; what the routed
  experts add starts at zero.
- ``"plain"``: independent experts, and nothing beside them.
"""

REMOVED = ("shared_expert", "dense_start")
"""Arguments that ``start`` has replaced."""


def check_start(start: Start | None) -> Start:
    """The start that is meant; ``None`` is a layer's default.

    Raises:
        ValueError: an unknown one.
    """
    if start is None:
        return "shared"
    check_choice("start", start, Start)
    return start


def check_copies(start: Start, router: Router) -> None:
    """Refuse copies under a router that would scale what they give.

    Raises:
        ValueError: copies, and a router whose weights of a token do not sum to 1 by construction.
    """
    if start == "copies" and not router.sums_to_one:
        got = f"'copies' with {type(router).__name__}(k={router.k}, weight={router.weight!r})"
        one = (
            "weight='straight_through' at k=1, 'normalized' above, no capacity, tokens that choose"
        )
        check(
            False,
            "start",
            got,
            f"a router whose weights of a token sum to 1 ({one}), or start='shared'",
        )


def refuse_removed(arguments: Iterable[str]) -> None:
    """Name the argument that stands for those that are gone.

    Raises:
        ValueError: one of these is given.
    """
    for name in arguments:
        legal = "start='shared' (a shared expert, a dense start), 'copies' or 'plain' (no shared expert) in its place"
        check(name not in REMOVED, name, "a removed argument", legal)


def refuse_unknown(caller: str, arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that a function collects only to name those which ``start`` has
    replaced.

    Raises:
        ValueError: one of these.
        TypeError: any other, as Python raises it.
    """
    refuse_removed(arguments)
    if arguments:
        raise TypeError(f"{caller}() got an unexpected keyword argument {next(iter(arguments))!r}")


@contextmanager
def drawn_apart(beside_dense: bool) -> Iterator[None]:
    """Beside dense layers, leave torch's generators as they are: these are then drawn as in a model
    without experts.
    """
    if not beside_dense:
        yield
        return
    device = torch.get_default_device()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = int(torch.randint(2**62, (), device="cpu"))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


class MoELayer(nn.Module, ABC):
    """The base of all layers with experts, for images and graphs.

    Args:
        num_experts: E.
        k: K, experts per token, until a router says more.

    Attributes:
        router: the layer's own, or ``None`` if each call passes a :class:`Routing`.
        experts_per_token: average number of experts per token.
    """

    router: Router | None

    def __init__(self, num_experts: int, k: int = 1) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.k = k
        self.experts_per_token = float(k)

    @abstractmethod
    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all E experts; a token uses ``experts_per_token / E`` of them."""


class _Mixture(MoELayer):
    """A layer that holds a router and experts that fit it."""

    def __init__(self, router: Router, experts: Experts) -> None:
        check(
            hasattr(router, "num_experts"),
            "router",
            repr(router),
            "an instance, which build_router makes of a name",
        )
        if router.num_experts != experts.num_experts or router.dim != experts.in_features:
            raise ValueError(
                f"experts: got num_experts={experts.num_experts}, in_features={experts.in_features}, expected those of "
                f"the router, num_experts={router.num_experts}, dim={router.dim}"
            )
        super().__init__(experts.num_experts, router.k)
        self.experts_per_token = router.experts_per_token
        self.router = router
        self.experts = experts

    def reset_parameters(self) -> None:
        """Draw router and experts anew."""
        for part in self.children():
            if reset := getattr(part, "reset_parameters", None):
                reset()

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()


class MoE(_Mixture):
    r"""Route tokens to experts: :math:`y_t = s(x_t) + \sum_e w_{te} f_e(x_t)`, with a shared expert
    s.

    A token without an expert gets zero from the routed experts; the surrounding model adds the
    residual. Experts that start at zero (``MLPExperts(zero_init=True)``) make the first forward the
    shared expert's.

    Args:
        router: assigns tokens to experts.
        experts: the stacked experts, as many as the router expects.
        shared_expert: a module that runs on every token with weight 1 and is added (default
            ``None``).

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups. ``batch`` and ``edge_index`` as in
          :class:`Router`.
        - returns (..., T, O), and the :class:`Routing` too with ``return_routing=True``. Losses are
          in the routing: ``loss = task + gmoe.aux_loss(routing)``.

    Raises:
        ValueError: E or D of router and experts differ.

    Example:
        >>> layer = MoE(ExpertChoice(128, 8, k=1), MLPExperts(128, 512, 128, num_experts=8))
        >>> y = layer(x)
    """

    router: Router

    def __init__(
        self, router: Router, experts: Experts, shared_expert: nn.Module | None = None
    ) -> None:
        check(
            not isinstance(router, SoftSlots),
            "router",
            "SoftSlots, whose slots mix tokens",
            "SoftMoE around it",
        )
        super().__init__(router, experts)
        self.shared_expert = shared_expert

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        edge_index: Tensor | None = None,
        *,
        return_routing: bool = False,
    ) -> Any:
        """Route and run; see the class."""
        routing: Routing = self.router(x, batch, edge_index)
        y = self.experts(x.reshape(-1, x.size(-1)), routing).unflatten(0, x.shape[:-1])
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        return (y, routing) if return_routing else y


class SoftMoE(_Mixture):
    r"""Run experts on slots that are mixtures of tokens (`Soft MoE
    <https://arxiv.org/abs/2308.00951>`_, Puigcerver et al., 2024): :math:`y = C f(D^\top X)`.

    Args:
        router: the slots.
        experts: the stacked experts, as many as the router expects.

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups, each with its own E * S slots.
          ``batch`` as in :class:`Router`.
        - returns (..., T, O), and the :class:`gmoe.routers.SoftRouting` too with
          ``return_routing=True``.

    Raises:
        ValueError: ``router`` is not a :class:`SoftSlots`, or E or D of router and experts differ.

    Example:
        >>> layer = SoftMoE(SoftSlots(128, 8, slots=4), MLPExperts(128, 512, 128, num_experts=8))
        >>> y = layer(torch.randn(2, 64, 128))
    """

    router: SoftSlots

    def __init__(self, router: SoftSlots, experts: Experts) -> None:
        check(isinstance(router, SoftSlots), "router", type(router).__name__, "SoftSlots")
        super().__init__(router, experts)

    def forward(
        self, x: Tensor, batch: Tensor | None = None, *, return_routing: bool = False
    ) -> Any:
        """Mix, run, and mix back; see the class."""
        routing: SoftRouting = self.router(x, batch)
        slots_RI = routing.dispatch(x.reshape(-1, x.size(-1)))
        y = routing.combine(self.experts(slots_RI, routing.slot_offsets)).unflatten(0, x.shape[:-1])
        return (y, routing) if return_routing else y
