"""Multi-centroid routing. Shapes: T tokens, D width, E experts, M centroids per expert."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check_at_least, check_choice, check_count, check_positive
from gmoe.routing.cosine import cosine
from gmoe.routing.expert_choice import expert_side_weights
from gmoe.routing.expert_side import ExpertSide, Inference, Normalize
from gmoe.routing.kmeans import kmeans
from gmoe.routing.losses import separation_loss
from gmoe.routing.pools import Pools
from gmoe.routing.router import Router, Weighting, gather_pairs
from gmoe.routing.routing import AuxLoss, Routing
from gmoe.routing.select import pairs_of_choices, top_experts

Choice: TypeAlias = Literal["tokens", "experts"]
Reduce: TypeAlias = Literal["max", "logsumexp"]


class MultiCentroid(Router):
    r"""Several centroids per expert: an expert is as good as its best centroid is near, by cosine similarity.

    .. math::
        l_{te} = \max_m \cos(x_t - \mu, c_{em}) / \tau, \qquad g_t = \mathrm{softmax}_e(l_t)

    The temperature :math:`\tau` is learned. The centre :math:`\mu` is zero until :meth:`init_from_data` sets it.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (on average, where experts choose; default 1).
        weight: see :class:`Router`; default ``"normalized"`` where tokens choose and K >= 2, else ``"score"``.
        num_centroids: M, centroids per expert (default 4).
        choice: ``"tokens"`` (default): tokens take their top-K experts, as in :class:`TokenChoice`. ``"experts"``:
            experts take their top-C tokens of a pool, as in :class:`ExpertChoice`.
        reduce: ``"max"`` (default), or the smooth ``"logsumexp"`` over an expert's centroids.
        temperature: initial tau (default 0.1).
        separation_coef: coefficient of the separation loss, the mean squared positive cosine between centroids within
            and across experts (default 0.01; 0 for no loss).
        capacity_factor, normalize, inference, momentum: for ``choice="experts"``, see :class:`ExpertChoice`.
        check_finite: see :class:`Router`.

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
        num_experts: int,
        k: int = 1,
        *,
        weight: Weighting | None = None,
        num_centroids: int = 4,
        choice: Choice = "tokens",
        reduce: Reduce = "max",
        temperature: float = 0.1,
        separation_coef: float = 0.01,
        capacity_factor: float = 1.0,
        normalize: Normalize = "experts",
        inference: Inference = "pool",
        momentum: float = 0.1,
        check_finite: bool = False,
    ) -> None:
        check_choice("choice", choice, get_args(Choice))
        if weight is None:
            weight = "normalized" if choice == "tokens" and k >= 2 else "score"
        super().__init__(dim, num_experts, k, weight=weight, check_finite=check_finite)
        check_count("num_centroids", num_centroids)
        check_choice("reduce", reduce, get_args(Reduce))
        check_positive("temperature", temperature)
        check_at_least("separation_coef", separation_coef, 0)
        self.num_centroids = num_centroids
        self.choice = choice
        self.reduce = reduce
        self.temperature = temperature
        self.separation_coef = separation_coef
        self.centroid = nn.Parameter(torch.empty(num_experts, num_centroids, dim))
        self.log_temperature = nn.Parameter(torch.empty(()))
        self.register_buffer("center_D", torch.zeros(dim))
        side = ExpertSide(num_experts, k, capacity_factor, normalize, inference, momentum)
        self.side = side if choice == "experts" else None
        self.reset_parameters()

    @property
    def experts_per_token(self) -> float:
        return super().experts_per_token if self.side is None else self.side.experts_per_token

    def reset_parameters(self) -> None:
        nn.init.normal_(self.centroid)
        nn.init.constant_(self.log_temperature, math.log(self.temperature))
        self.center_D.zero_()
        if self.side is not None:
            self.side.reset_parameters()

    @torch.no_grad()
    def init_from_data(self, x: Tensor, *, seed: int = 0) -> None:
        """Set the centroids by spherical k-means: E clusters of the centred data, and M clusters inside each.

        Args:
            x: (..., D) tokens, at least E of them; a sample is enough.
            seed: of the k-means++ starts (default 0).

        Raises:
            ValueError: a width that does not fit, fewer tokens than experts, or values that are not finite.
        """
        if x.size(-1) != self.dim or x.numel() < self.dim * self.num_experts:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (..., dim={self.dim}) with at least "
                f"num_experts={self.num_experts} tokens"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"x: got {int((~x.isfinite()).sum())} values that are NaN or infinite, expected none")
        dtype = torch.promote_types(self.centroid.dtype, torch.float32)
        x_TD = x.reshape(-1, self.dim).to(device=self.centroid.device, dtype=dtype)
        self.center_D.copy_(x_TD.mean(dim=0))
        unit_TD = F.normalize(x_TD - self.center_D, dim=-1)
        generator = torch.Generator(device=unit_TD.device).manual_seed(seed)
        center_ED, owner_T = kmeans(unit_TD, self.num_experts, generator)
        for expert in range(self.num_experts):
            mine_TD = unit_TD[owner_T == expert]
            if len(mine_TD) == 0:  # fewer distinct tokens than experts
                mine_TD = center_ED[expert : expert + 1]
            clusters = min(self.num_centroids, len(mine_TD))
            centroid_MD, _ = kmeans(mine_TD, clusters, generator)
            # an expert with fewer tokens than centroids repeats them
            self.centroid[expert] = centroid_MD[torch.arange(self.num_centroids) % clusters]

    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        logits_TE = self._logits(x_TD)
        if self.side is not None:
            # a cosine is rounded by where its row lies in the product: equal tokens come out equal up to that
            tolerance = 8 * torch.finfo(logits_TE.dtype).eps
            scale = self.log_temperature.detach().exp().clamp(max=1).to(logits_TE.dtype)
            token_P, offsets_E, log_gate_P, scores_TE = self.side(
                logits_TE, pools, self._counters_advance(), tolerance, scale
            )
            weight_P = expert_side_weights(self, self.side, log_gate_P, token_P, pools)
        else:
            log_scores_TE = logits_TE.log_softmax(dim=-1)
            scores_TE = log_scores_TE.exp()
            token_P, offsets_E = pairs_of_choices(top_experts(logits_TE.detach(), self.k), self.num_experts)
            weight_P = self._weights(gather_pairs(log_scores_TE, token_P, offsets_E), token_P, pools.num_tokens)
        losses = {}
        if self.separation_coef > 0:
            losses["separation"] = AuxLoss(separation_loss(self.centroid), self.separation_coef)
        return Routing(token_P, offsets_E, weight_P, scores_TE, pools.num_tokens, losses)

    def _logits(self, x_TD: Tensor) -> Tensor:
        centroid_ND = self.centroid.flatten(0, 1).to(torch.promote_types(self.centroid.dtype, torch.float32))
        cosine_TN = cosine(x_TD, self.center_D.to(x_TD.dtype), F.normalize(centroid_ND, dim=-1))
        cosine_TEM = cosine_TN.unflatten(-1, (self.num_experts, -1))
        factor = (-self.log_temperature.to(cosine_TN.dtype)).exp()
        if self.reduce == "max":
            return cosine_TEM.amax(dim=-1) * factor
        return (cosine_TEM * factor).logsumexp(dim=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_centroids={self.num_centroids}, choice={self.choice!r}"
