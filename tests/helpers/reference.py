"""The slow, obvious reference: loops over groups, tokens and experts, as the docs say.

Also the router cases that many tests share. Shapes: T tokens, D width, E experts, P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import (
    Experts,
    LinearExperts,
    MLPExperts,
    MoE,
    OracleRouter,
    RandomRouter,
    Router,
    UniformRouter,
)
from gmoe.routers import AttentionVote, ExpertChoice, MultiCentroid, TokenChoice
from gmoe.routers.expert_choice import ExpertSelection

Pair: TypeAlias = tuple[int, int]
"""(token, expert)."""

DTYPE = torch.float64


# The cases


@dataclass(frozen=True)
class Case:
    """A router with options, and what it needs beside tokens."""

    name: str
    router: type[Router]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_edges(self) -> bool:
        return self.options.get("scope") == "neighbors"

    @property
    def noisy(self) -> bool:
        """Whether training draws noise."""
        balance = self.options.get("balance", "bias" if self.router is TokenChoice else None)
        return self.options.get("noise", balance == "bias")

    @property
    def differs_at_evaluation(self) -> bool:
        options = self.options
        return (
            self.noisy
            or options.get("inference") == "threshold"
            or self.name == "token_choice-capacity"
        )

    def weights(self, k: int) -> list[str]:
        """The weightings that this router allows."""
        if self.router in (UniformRouter, OracleRouter):
            return ["default"]
        return ["score", "straight_through", *([] if k == 1 else ["normalized"])]

    def build(
        self, dim: int, num_experts: int, k: int, weight: str = "default", num_tokens: int = 0
    ) -> Router:
        """A float64 router whose options all matter: no parameter is left at zero."""
        options: dict[str, Any] = dict(self.options)
        if weight != "default":
            options["weight"] = weight
        if self.router not in (UniformRouter, OracleRouter):
            options["k"] = k
        if self.router is OracleRouter:
            options["assignment"] = torch.arange(num_tokens) * 3 % num_experts
        router = self.router(dim, num_experts=num_experts, **options).to(DTYPE)
        for name, value in [*router.named_parameters(), *router.named_buffers()]:
            bias = ("bias_E", "mean_D", "next_bias_E", "next_mean_D")
            if name in (
                *bias,
                "center_D",
                "selection.threshold_E",
            ):
                nn.init.normal_(value, std=0.2)
            if name == "selection.steps":
                value.fill_(1)
        if options.get("inference") == "threshold":
            router.get_buffer("selection.threshold_E").sub_(math.log(num_experts))
        return router


CASES = [
    Case("token_choice", TokenChoice, {"balance": None}),
    Case("token_choice-noise", TokenChoice, {"balance": None, "noise": True}),
    Case(
        "token_choice-switch-z",
        TokenChoice,
        {"balance": "switch", "balance_coef": 0.5, "z_coef": 0.1},
    ),
    Case("token_choice-bias", TokenChoice, {"bias_rate": 0.1}),
    Case("token_choice-capacity", TokenChoice, {"balance": None, "capacity_factor": 0.75}),
    Case("expert_choice", ExpertChoice, {"z_coef": 0.1}),
    Case("expert_choice-capacity", ExpertChoice, {"capacity_factor": 1.3}),
    Case("expert_choice-threshold", ExpertChoice, {"inference": "threshold"}),
    Case("attention_vote", AttentionVote, {"head_dim": 4}),
    Case("attention_vote-capacity", AttentionVote, {"head_dim": 4, "capacity_factor": 0.6}),
    Case("attention_vote-neighbors", AttentionVote, {"head_dim": 4, "scope": "neighbors"}),
    Case("multi_centroid", MultiCentroid, {"num_centroids": 3}),
    Case("multi_centroid-experts", MultiCentroid, {"choice": "experts", "num_centroids": 2}),
    Case("multi_centroid-of-one", MultiCentroid, {"choice": "experts", "num_centroids": 1}),
    Case(
        "multi_centroid-threshold", MultiCentroid, {"choice": "experts", "inference": "threshold"}
    ),
    Case("random", RandomRouter),
    Case("uniform", UniformRouter),
    Case("oracle", OracleRouter),
]


def graph_edges(groups: Sequence[Sequence[int]], seed: int = 0) -> Tensor:
    """(2, M) random edges inside groups, with self-loops and parallel ones.

    The last node of a group has none.
    """
    generator = torch.Generator().manual_seed(seed)
    edges = []
    for tokens in groups:
        some = tokens[:-1] or tokens
        ends = torch.randint(len(some), (2, 3 * len(some)), generator=generator)
        edges.append(torch.tensor(some)[ends])
    return torch.cat(edges, dim=1) if edges else torch.zeros(2, 0, dtype=torch.long)


# The reference


def group_lists(x: Tensor, batch: Tensor | None) -> list[list[int]]:
    """The tokens of each group, in token order."""
    num_tokens = x[..., 0].numel()
    if batch is None:
        size = x.size(-2)
        return [list(range(start, start + size)) for start in range(0, num_tokens, max(size, 1))]
    lists: dict[int, list[int]] = {}
    for token, segment in enumerate(batch.reshape(-1).tolist()):
        lists.setdefault(segment, []).append(token)
    return list(lists.values())


def capacity(k: int, num_tokens: int, num_experts: int, factor: float) -> int:
    """clamp(ceil(capacity_factor * K * T_group / E), 1, T_group), in exact arithmetic."""
    return min(max(math.ceil(Fraction(str(factor)) * k * num_tokens / num_experts), 1), num_tokens)


def softmax(values: Sequence[Tensor]) -> list[Tensor]:
    exps = [(value - max(v.item() for v in values)).exp() for value in values]
    return [e / sum(exps[1:], exps[0]) for e in exps]


def best_first(indices: Sequence[int], score: Callable[[int], float]) -> list[int]:
    """Highest score first, ties to the lowest index."""
    return sorted(indices, key=lambda i: (-score(i), i))


def choose_by_token(score_TE: Sequence[Sequence[float]], k: int) -> list[list[int]]:
    return [best_first(range(len(row)), lambda e, row=row: row[e])[:k] for row in score_TE]  # type: ignore[misc]


def choose_by_expert(
    score_TE: Sequence[Sequence[float]], groups: list[list[int]], k: int, factor: float
) -> list[Pair]:
    num_experts = len(score_TE[0]) if score_TE else 0
    pairs = []
    for tokens in groups:
        for e in range(num_experts):
            taken = best_first(tokens, lambda t, e=e: score_TE[t][e])  # type: ignore[misc]
            pairs += [(t, e) for t in taken[: capacity(k, len(tokens), num_experts, factor)]]
    return pairs


def drop(
    chosen: list[list[int]], prob_TE: list[list[Tensor]], groups: list[list[int]], factor: float
) -> list[Pair]:
    """V-MoE's priority: first choices before second ones, then the surest tokens first."""
    num_experts = len(prob_TE[0])
    pairs = []
    for tokens in groups:
        limit = capacity(len(chosen[0]), len(tokens), num_experts, factor)
        load = [0] * num_experts
        for rank in range(len(chosen[0])):
            for t in best_first(tokens, lambda t: prob_TE[t][chosen[t][0]].item()):
                e = chosen[t][rank]
                if load[e] < limit:
                    load[e] += 1
                    pairs.append((t, e))
    return pairs


def pair_weights(
    weight: str, gate: dict[Pair, Tensor], groups: list[list[int]], along_tokens: bool
) -> dict[Pair, Tensor]:
    """What ``weight=`` says, see :class:`gmoe.Router`."""
    if weight == "straight_through":
        return {pair: g / g.detach() for pair, g in gate.items()}
    if weight == "normalized":
        total: dict[int, Tensor] = {}
        for (t, _), g in gate.items():
            total[t] = total[t] + g if t in total else g
        return {(t, e): g / total[t] for (t, e), g in gate.items()}
    if not along_tokens:
        return gate
    result: dict[Pair, Tensor] = {}
    for tokens in groups:
        mine = {pair: g for pair, g in gate.items() if pair[0] in tokens}
        mean = sum(g.item() for g in mine.values()) / max(len(mine), 1)
        result.update({pair: (g / mean).clamp(max=10.0) for pair, g in mine.items()})
    return result


def naive_group_votes(q: list[Tensor], k: list[Tensor], groups: list[list[int]]) -> list[Tensor]:
    """Of one expert: votes_j = sum_i softmax_j(q_i . k_j / sqrt(d))."""
    votes = [torch.zeros((), dtype=DTYPE) for _ in k]
    for tokens in groups:
        for i in tokens:
            for j, vote in zip(
                tokens,
                softmax([q[i] @ k[j] / math.sqrt(k[j].numel()) for j in tokens]),
                strict=True,
            ):
                votes[j] = votes[j] + vote
    return votes


def naive_neighbor_votes(q: list[Tensor], k: list[Tensor], edges: list[Pair]) -> list[Tensor]:
    """The votes for one expert: each node votes for itself and its out-neighbors.

    It spreads a vote over itself, once, and over its out-neighbors, once for each edge.
    """
    votes = [torch.zeros((), dtype=DTYPE) for _ in k]
    for i in range(len(k)):
        targets = [dst for src, dst in edges if src == i and dst != i] + [i]
        for j, vote in zip(
            targets, softmax([q[i] @ k[j] / math.sqrt(k[j].numel()) for j in targets]), strict=True
        ):
            votes[j] = votes[j] + vote
    return votes


def naive_separation(centroid_EMD: Tensor) -> Tensor:
    num_experts, num_centroids, _ = centroid_EMD.shape
    within, across = [torch.zeros((), dtype=DTYPE)], [torch.zeros((), dtype=DTYPE)]
    owners = [(e, m) for e in range(num_experts) for m in range(num_centroids)]
    for a in owners:
        for b in owners:
            if a != b:
                cosine = F.cosine_similarity(centroid_EMD[a], centroid_EMD[b], dim=0)
                (within if a[0] == b[0] else across).append(cosine.clamp(min=0) ** 2)
    return torch.stack(within).sum() / max(len(within) - 1, 1) + torch.stack(across).sum() / max(
        len(across) - 1, 1
    )


Grid: TypeAlias = list[list[Tensor]]
"""A scalar a token and expert."""


def naive_votes(
    router: AttentionVote, x_TD: Tensor, groups: list[list[int]], edge_index: Tensor | None
) -> Grid:
    edges = [] if edge_index is None else [(int(s), int(d)) for s, d in edge_index.T]
    votes_ET = []
    for e in range(router.num_experts):
        rows = slice(e * router.head_dim, (e + 1) * router.head_dim)
        key = [router.key.weight[rows] @ x for x in x_TD]
        query = [router.query.weight[rows] @ x for x in x_TD]
        if router.scope == "group":
            votes_ET.append(naive_group_votes(query, key, groups))
        else:
            votes_ET.append(naive_neighbor_votes(query, key, edges))
    return [[votes[t] for votes in votes_ET] for t in range(len(x_TD))]


def naive_logits(router: Router, x_TD: Tensor) -> Grid:
    if isinstance(router, RandomRouter):
        return [[x @ column for column in router.projection_DE.T] for x in x_TD]
    if isinstance(router, TokenChoice | ExpertChoice):
        biased = isinstance(router, TokenChoice) and router.balance == "bias"
        mean_D = (
            (router.next_mean_D if router.training else router.mean_D)
            if biased
            else torch.zeros(())
        )
        return [[(x - mean_D) @ row for row in router.gate.weight] for x in x_TD]
    assert isinstance(router, MultiCentroid)
    grid = []
    for x in x_TD:
        cosines_EM = [
            [
                F.cosine_similarity(x - router.center_D, c, dim=0) / router.log_temperature[0].exp()
                for c in mine
            ]
            for mine in router.centroid
        ]
        grid.append([max(mine, key=lambda v: v.item()) for mine in cosines_EM])
    return grid


def naive_selection(
    router: Router, selection: ExpertSelection, probs: Grid, groups: list[list[int]]
) -> dict[Pair, Tensor]:
    """Experts choose, by rank or by threshold."""
    if selection.inference == "threshold" and not router.training:
        pairs = [
            (t, e)
            for t in range(len(probs))
            for e in range(router.num_experts)
            if probs[t][e].log().item() >= selection.threshold_E[e].item()
        ]
    else:
        pairs = choose_by_expert(values(probs), groups, router.k, selection.capacity_factor)
    return pair_weights(router.weight, {(t, e): probs[t][e] for t, e in pairs}, groups, False)


def values(grid: Grid) -> list[list[float]]:
    return [[value.item() for value in row] for row in grid]


def naive_z_loss(logits: Grid) -> Tensor:
    return torch.stack([torch.stack(row).exp().sum().log() ** 2 for row in logits]).mean()


def naive_switch_loss(probs: Grid, pairs: list[Pair]) -> Tensor:
    num_experts, total = len(probs[0]), torch.zeros((), dtype=DTYPE)
    for e in range(num_experts):
        share = sum(e == other for _, other in pairs) / len(pairs)
        total = total + share * torch.stack([row[e] for row in probs]).mean()
    return num_experts * total


def naive_route(
    router: Router, x_TD: Tensor, groups: list[list[int]], edge_index: Tensor | None
) -> tuple[dict[Pair, Tensor], Tensor]:
    """The weight of each pair that is chosen, and the auxiliary loss; seed 0 draws the noise."""
    one, aux = torch.ones((), dtype=DTYPE), torch.zeros((), dtype=DTYPE)
    tokens, experts = range(len(x_TD)), range(router.num_experts)
    if len(x_TD) == 0:
        return {}, aux
    if isinstance(router, OracleRouter):
        return {(t, int(router.assignment_T[t])): one for t in tokens}, aux
    if isinstance(router, UniformRouter):
        return {(t, e): one / router.num_experts for t in tokens for e in experts}, aux
    if isinstance(router, AttentionVote):
        votes = naive_votes(router, x_TD, groups, edge_index)
        pairs = choose_by_expert(values(votes), groups, router.k, router.capacity_factor)
        return pair_weights(
            router.weight, {(t, e): votes[t][e] for t, e in pairs}, groups, True
        ), aux

    logits = naive_logits(router, x_TD)
    if isinstance(router, TokenChoice) and router.noise and router.training:
        clean = logits
        centered = [
            [row[e] - sum(other[e] for other in clean) / len(clean) for e in experts]
            for row in clean
        ]
        squares = torch.stack([value.detach() ** 2 for row in centered for value in row])
        draw = torch.randn(
            len(x_TD), len(experts), dtype=DTYPE, generator=torch.Generator().manual_seed(0)
        )
        std = squares.mean().sqrt()
        logits = [[clean[t][e] + draw[t, e] * std for e in experts] for t in tokens]
    probs = [softmax(row) for row in logits]
    if getattr(router, "z_coef", 0):
        aux = aux + router.z_coef * naive_z_loss(logits)  # type: ignore[operator]
    if isinstance(router, MultiCentroid) and router.separation_coef:
        aux = aux + router.separation_coef * naive_separation(router.centroid)
    if isinstance(router, ExpertChoice | MultiCentroid) and router.selection is not None:
        return naive_selection(router, router.selection, probs, groups), aux

    balance = router.balance if isinstance(router, TokenChoice) else None
    bias = [0.0] * len(experts)
    if isinstance(router, TokenChoice) and balance == "bias":
        bias = (router.next_bias_E if router.training else router.bias_E).tolist()
    ranked = [[v + b for v, b in zip(row, bias, strict=True)] for row in values(logits)]
    chosen = choose_by_token(ranked, router.k)
    pairs = [(t, e) for t in tokens for e in chosen[t]]
    if isinstance(router, TokenChoice):
        if balance == "switch":
            aux = aux + router.balance_coef * naive_switch_loss(probs, pairs)
        if router.training and router.capacity_factor is not None:
            pairs = drop(chosen, probs, groups, router.capacity_factor)
    return pair_weights(router.weight, {(t, e): probs[t][e] for t, e in pairs}, groups, False), aux


def naive_linear(linear: LinearExperts, expert: int, x_I: Tensor) -> Tensor:
    y_O = x_I @ linear.weight[expert].T
    return y_O if linear.bias is None else y_O + linear.bias[expert]


def naive_expert(experts: Experts, expert: int, x_I: Tensor) -> Tensor:
    """What one expert does to one token."""
    if isinstance(experts, LinearExperts):
        return naive_linear(experts, expert, x_I)
    assert isinstance(experts, MLPExperts)
    h_H, *gated = naive_linear(experts.up, expert, x_I).split(experts.hidden_features)
    h_H = experts.activation(h_H)
    return naive_linear(experts.down, expert, h_H * gated[0] if experts.glu else h_H)


def naive_moe(
    layer: MoE, x: Tensor, batch: Tensor | None, edge_index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = sum_e w_te f_e(x_t), a token and an expert at a time.

    Also (T, E) the weights, and the auxiliary loss.
    """
    x_TD = x.reshape(-1, x.size(-1))
    weights, aux = naive_route(layer.router, x_TD, group_lists(x, batch), edge_index)
    y = [torch.zeros(layer.experts.out_features, dtype=x.dtype) for _ in x_TD]
    dense_TE = torch.zeros(len(x_TD), layer.num_experts, dtype=x.dtype)
    for (t, e), w in weights.items():
        y[t] = y[t] + w * naive_expert(layer.experts, e, x_TD[t])
        dense_TE[t, e] = w.detach()
    y_TO = torch.stack(y) if y else x_TD.new_zeros(0, layer.experts.out_features)
    return y_TO.reshape(*x.shape[:-1], -1), dense_TE, aux


def gradients(loss: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, with zeros where the loss does not depend on a tensor."""
    if not loss.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def assert_same_as_naive(
    layer: MoE, x: Tensor, batch: Tensor | None = None, edge_index: Tensor | None = None
) -> None:
    """Output, weights, loss and every gradient of ``layer`` equal those of the reference."""
    x = x.clone().requires_grad_()
    expected, dense_TE, aux = naive_moe(layer, x, batch, edge_index)
    torch.manual_seed(0)
    y, routing = layer(x, batch, edge_index, return_routing=True)

    def close(actual: Tensor, wanted: Tensor, what: str) -> None:
        assert actual.shape == wanted.shape, what
        assert actual.dtype == wanted.dtype, what
        difference = (actual - wanted).abs().max().item() if wanted.numel() else 0.0
        assert difference <= 1e-10, f"{what} differs by {difference}"

    close(routing.to_dense(), dense_TE, "weights")
    assert torch.equal(routing.to_dense() != 0, dense_TE != 0)
    close(y, expected, "output")
    close(routing.aux_loss, aux, "aux_loss")
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    wanted = gradients((expected * cotangent).sum() + aux, [x, *parameters])
    actual = gradients((y * cotangent).sum() + routing.aux_loss, [x, *parameters])
    for name, a, w in zip(["x", *names], actual, wanted, strict=True):
        close(a, w, f"gradient of {name}")


D = 5

INPUTS: dict[str, tuple[tuple[int, ...], list[int] | None]] = {
    "one_group": ((11, D), None),
    "leading": ((3, 4, D), None),
    "two_leading": ((2, 2, 3, D), None),
    "ragged": (
        (11, D),
        [5, 0, 5, 9, 0, 0, 5, 9, 9, 9, 2],
    ),  # unsorted, with gaps, and a group of one
    "ragged_sorted": ((9, D), [0, 0, 0, 0, 0, 1, 3, 3, 3]),
    "equal_unsorted": ((12, D), [7, 1, 4, 4, 1, 7, 7, 4, 1, 1, 4, 7]),
    "leading_and_batch": ((2, 5, D), [0, 1, 1, 0, 2, 2, 2, 1, 0, 0]),
    "one_token": ((1, D), None),
    "groups_of_one": ((4, 1, D), None),
}


def with_gate(router: TokenChoice, weight_ED: list[list[float]]) -> TokenChoice:
    """The router with this gate."""
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor(weight_ED))
    return router
