"""Multi-centroid routing: an expert has several centroids, and the nearest one counts.

Shapes: T tokens, D width, A experts with those that were pruned, E without, M centroids per expert,
N centroids of all experts, or clusters of k-means.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._autograd import row_norms
from gmoe._checks import check, check_at_least, check_choice, check_counts, described
from gmoe.losses import separation_loss
from gmoe.routers.base import Router, Weighting, best_experts
from gmoe.routers.expert_choice import ExpertSelection, Inference
from gmoe.routing import AuxLoss, Routing

Choice: TypeAlias = Literal["tokens", "experts"]

TEMPERATURE = 0.1
"""What the temperature starts with."""

RESTARTS = 8
"""Runs of k-means, of which the best counts."""

STEPS = 50
"""Most steps of a run of k-means."""


class MultiCentroid(Router):
    r"""Score an expert by the cosine similarity of its nearest centroid; each expert has several.

    The most similar published router is `X-MoE <https://arxiv.org/abs/2204.09179>`_ (Chi et al.,
    2022): one centroid per expert.

    .. math::
        l_{te} = \max_m \cos(x_t - \mu, c_{em}) / \tau, \qquad g_t = \mathrm{softmax}_e(l_t)

    The temperature :math:`\tau` is learned. The center :math:`\mu` is zero until
    :meth:`init_from_data` sets it.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (on average, where experts choose; default 1).
        weight: see :class:`Router`; default ``"normalized"`` where tokens choose and K >= 2, else
            ``"score"``; in a layer of copies ``"straight_through"`` at K = 1.
        num_centroids: M, centroids per expert (default 4).
        choice: ``"tokens"`` (default): tokens take their top-K experts, as in :class:`TokenChoice`.
            ``"experts"``: experts take their top-C tokens of a group, as in :class:`ExpertChoice`.
        separation_coef: coefficient of the separation loss, the mean squared positive cosine
            between centroids within and across experts (default 0.01; 0 for no loss).
        capacity_factor, inference: for ``choice="experts"``, see :class:`ExpertChoice`.

    Shapes:
        See :class:`Router`.

    Raises:
        ValueError: an argument out of range.
        RuntimeError: threshold inference before the first training step.
    """

    center_D: Tensor

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        k: int = 1,
        weight: Weighting | None = None,
        num_centroids: int = 4,
        choice: Choice = "tokens",
        separation_coef: float = 0.01,
        capacity_factor: float = 1.0,
        inference: Inference = "group",
    ) -> None:
        weight = weight or ("normalized" if choice == "tokens" and k >= 2 else "score")
        super().__init__(dim, num_experts=num_experts, k=k, weight=weight)
        check_choice("choice", choice, Choice)
        check_counts(num_centroids=num_centroids)
        check_at_least(0, separation_coef=separation_coef)
        if choice == "tokens":
            legal = "the default beside choice='tokens'"
            check(capacity_factor == 1.0, "capacity_factor", capacity_factor, legal)
            check(inference == "group", "inference", repr(inference), legal)
        self.choice = choice
        self.num_centroids = num_centroids
        self.separation_coef = separation_coef
        self.centroid = nn.Parameter(torch.empty(num_experts, num_centroids, dim))
        self.log_temperature = nn.Parameter(torch.empty(1))  # FSDP2 refuses scalars
        self.register_buffer("center_D", torch.zeros(dim))
        selection = ExpertSelection(num_experts, capacity_factor, inference)
        self.selection = selection if choice == "experts" else None
        self.experts_choose = choice == "experts"
        self.by_token = choice == "tokens" or inference == "threshold"
        self.sums_to_one = choice == "tokens" and self._picks_sum_to_one
        if choice == "experts":
            self.experts_per_token = min(k * capacity_factor, float(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.centroid)
        nn.init.constant_(self.log_temperature, math.log(TEMPERATURE))
        self.center_D.zero_()
        if self.selection is not None:
            self.selection.reset_parameters()

    @torch.no_grad()
    def init_from_data(self, x: Tensor, *, seed: int = 0) -> None:
        """Set the centroids by spherical k-means.

        E clusters of the centered data give the experts, and M clusters inside each the centroids.

        Args:
            x: (..., D) tokens, at least E of them; a sample is enough.
            seed: of the k-means++ starts (default 0).

        Raises:
            ValueError: a width that does not fit, fewer tokens than experts, or values that are not
                finite.
        """
        is_enough = x.size(-1) == self.dim and x.numel() >= self.dim * self.num_experts
        legal = f"at least {self.num_experts} tokens of width {self.dim}"
        check(is_enough, "x", described(x), legal)
        check(x.isfinite().all(), "x", "values that are NaN or infinite", "none")
        dtype = torch.promote_types(self.centroid.dtype, torch.float32)
        x_TD = x.reshape(-1, self.dim).to(self.centroid.device, dtype)
        self.center_D.copy_(x_TD.mean(dim=0))
        centered_TD = x_TD - self.center_D
        unit_TD = centered_TD / row_norms(centered_TD)

        # A cluster for each expert, and inside it a cluster for each centroid.
        generator = torch.Generator(unit_TD.device).manual_seed(seed)
        center_ED, owner_T = kmeans(unit_TD, self.num_experts, generator)
        for expert, row in enumerate(self._alive_numbers()):
            mine_TD = unit_TD[owner_T == expert]
            if mine_TD.size(0) == 0:  # fewer distinct tokens than experts
                mine_TD = center_ED[expert][None]
            num_clusters = min(self.num_centroids, mine_TD.size(0))
            center_ND, _ = kmeans(mine_TD, num_clusters, generator)
            # An expert with fewer tokens than centroids repeats its centers.
            repeated_M = torch.arange(self.num_centroids) % num_clusters
            self.centroid[row] = center_ND[repeated_M]

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        # 1. Cosines of tokens and centroids. The product is divided by the norms of the tokens, so
        # that no (T, D) unit vectors are held.
        centroid_ND = self.centroid.flatten(0, 1).to(x_TD.dtype)
        unit_ND = centroid_ND / row_norms(centroid_ND)
        centered_TD = x_TD - self.center_D.to(x_TD.dtype)
        cosine_TN = (centered_TD @ unit_ND.T) / row_norms(centered_TD)

        # 2. The nearest centroid of each expert, over the temperature.
        cosine_TAM = cosine_TN.unflatten(-1, (self.num_scored, -1))
        inverse_temperature = (-self.log_temperature.to(cosine_TN.dtype)).exp()
        logits_TA = cosine_TAM.amax(dim=-1) * inverse_temperature

        # 3. Experts or tokens choose.
        losses = {}
        if self.separation_coef > 0:
            unit_EMD = self.of_alive(unit_ND.view_as(self.centroid), dim=0)
            losses["separation"] = AuxLoss(separation_loss(unit_EMD), self.separation_coef)
        if self.selection is not None:
            return self.selection(self, logits_TA, group, losses)
        return self._route_to(best_experts(self.of_alive(logits_TA), self.k), logits_TA, losses)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_centroids={self.num_centroids}, choice={self.choice!r}"


def kmeans(x_TD: Tensor, num_clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Run k-means several times, and return the best run.

    It is Lloyd's algorithm with k-means++ starts (Arthur & Vassilvitskii, 2007).

    Args:
        x_TD: the tokens.
        num_clusters: N.
        generator: for the starts.

    Returns:
        Centers (N, D) and the cluster of each token (T,). A cluster may be empty if there are
        fewer than N distinct tokens.
    """
    runs = []
    for _ in range(RESTARTS):
        center_ND = _plus_plus(x_TD, num_clusters, generator)
        for _ in range(STEPS):
            before_ND = center_ND
            owner_T = torch.cdist(x_TD, center_ND).argmin(dim=1)
            count_N1 = owner_T.bincount(minlength=num_clusters)[:, None]
            total_ND = torch.zeros_like(center_ND).index_add_(0, owner_T, x_TD)
            # A cluster that lost all tokens keeps its center.
            center_ND = torch.where(count_N1 > 0, total_ND / count_N1.clamp(min=1), center_ND)
            if torch.equal(center_ND, before_ND):
                break
        distance_T, owner_T = torch.cdist(x_TD, center_ND).min(dim=1)
        error = float(distance_T.square().sum())
        runs.append((error, center_ND, owner_T))
    _, center_ND, owner_T = min(runs, key=lambda run: run[0])
    return center_ND, owner_T


def _plus_plus(x_TD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """(N, D) tokens that lie far apart, for a run of k-means to start from.

    The next token is drawn with a probability proportional to its squared distance from those that
    are drawn already.
    """
    device = x_TD.device
    starts = [torch.randint(x_TD.size(0), (1,), generator=generator, device=device)]
    square_T = x_TD.new_full((x_TD.size(0),), torch.inf)  # squared distance from the nearest start
    for _ in range(num_clusters - 1):
        square_T = square_T.minimum((x_TD - x_TD[starts[-1]]).square().sum(dim=1))
        cumulative_T = square_T.double().cumsum(0)
        uniform = torch.rand(1, generator=generator, device=device, dtype=torch.float64)
        draw = uniform * cumulative_T[-1]
        drawn = torch.searchsorted(cumulative_T, draw, right=True)
        # Behind the last token if all equal a start; any of them is then as good.
        starts.append(drawn.clamp(max=x_TD.size(0) - 1))
    return x_TD[torch.cat(starts)]
