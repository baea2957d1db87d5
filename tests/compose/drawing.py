"""What targets draw in common: options, routers, and how layers of experts start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gmoe import Router, Routing
from tests.helpers import masked as ref

EXPERTS = 3
SPARSE = ("coo", "csr")
STARTS = ("shared", "plain", "copies")


def flip(random: Random, probability: float = 0.5) -> bool:
    return random.random() < probability


def some(random: Random, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Some of the options, each with one of its values."""
    return {name: random.choice(values) for name, values in choices.items() if flip(random)}


def without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def in_form(form: str, edges: Tensor, size: tuple[int, int], value: Tensor | None = None) -> Any:
    """Edges as a call may get them; the values are those of a sparse matrix."""
    make: Any = (lambda edges, _: edges) if form == "plain" else ref.FORMS[form]
    return make(edges, size, value) if form in SPARSE else make(edges, size)


def groups_of(num_nodes: int) -> Tensor:
    """A ``batch`` of three graphs in no order, whose numbers leave some out."""
    return torch.arange(num_nodes) * 7 % 3 * 2


class Sigmoids(Router):
    """A router of somebody else's."""

    def __init__(self, dim: int, *, num_experts: int, k: int = 1) -> None:
        super().__init__(dim, num_experts=num_experts, k=k)
        self.lin = nn.Linear(dim, num_experts)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        weight_TK, expert_TK = self.lin(x_TD).sigmoid().topk(self.k, dim=-1)
        return Routing.from_choices(expert_TK, weight_TK, num_experts=self.num_experts)


BY_EXPERTS = {
    "capacity_factor": (0.6, 1.3, 2.0),
    "inference": ("threshold",),
}
ROUTERS: dict[Any, Mapping[str, Sequence[Any]]] = {
    "token_choice": {
        "balance": ("bias", "switch", None),
        "noise": (True, False),
        "z_coef": (0.1,),
        "capacity_factor": (0.75, 1.5),
    },
    "expert_choice": {**BY_EXPERTS, "z_coef": (0.1,)},
    "attention_vote": {
        "capacity_factor": (0.6,),
        "scope": ("neighbors",),
    },
    "multi_centroid": {"num_centroids": (1, 2), "choice": ("experts",), **BY_EXPERTS},
    "random": {},
    "uniform": {},
    Sigmoids: {},
}
OF_TOKENS = ("token_choice", "token_choice", "multi_centroid", "random", "uniform")
"""Routers whose weights of a token can sum to 1, as copies need, and that decide token by token."""

DROPS = ("capacity_factor", "choice", "inference")
"""Options by which a token may have no expert."""


def draw_router(
    random: Random,
    names: Sequence[Any],
    start: str | None,
    most: int = EXPERTS,
    left_out: Collection[str] = (),
    misfits: float = 0.1,
) -> dict[str, Any]:
    """The options of a layer that say how it routes: K, the router and its options.

    Args:
        random: what is drawn from.
        names: the routers, the frequent ones several times.
        start: copies need a router whose weights of a token sum to 1.
        most: of K, experts per token.
        left_out: options that mean nothing here.
        misfits: how many are drawn that gmoe should refuse.
    """
    k = random.randint(1, most)
    may_misfit = flip(random, misfits)
    as_copies = start == "copies" and not may_misfit
    if as_copies:
        names = [name for name in OF_TOKENS if name in names] + [None] * (None in names)
    router = random.choice(names)
    options = without(some(random, ROUTERS.get(router, {})), *left_out)
    if router == "multi_centroid" and options.get("choice") != "experts":
        # Tokens choose, and these are refused.
        options = without(options, *BY_EXPERTS)
    # These have one rule for weights.
    has_weight = router not in ("uniform", Sigmoids, None)
    if has_weight and flip(random):
        fits = k > 1 or may_misfit
        options["weight"] = random.choice(
            ("score", "straight_through", *(["normalized"] if fits else []))
        )
    if as_copies:
        options = without(options, *DROPS)
        if has_weight:
            options["weight"] = "normalized" if k > 1 else "straight_through"
    return {
        "k": k,
        "router": router,
        "router_kwargs": options,
    }


class Reason(NamedTuple):
    """A refusal that a case can get: how its message begins, and of which cases."""

    pattern: str
    fits: Callable[[Any], bool]


REASONS = (
    Reason("start: got 'copies' with", lambda case: case.options["start"] == "copies"),
    Reason("weight: got 'normalized' with k=1", lambda case: case.options["k"] == 1),
)
"""Why a case of any target may be refused; a refusal for another reason is a failure."""
