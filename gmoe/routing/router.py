"""The abstract router. Shapes: T tokens, D width, E experts, K experts a token, P pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gmoe._checks import check_choice, check_count
from gmoe.routing.pools import Pools, segment_logsumexp
from gmoe.routing.routing import Routing

Weighting: TypeAlias = Literal["score", "normalized", "straight_through"]

MAX_WEIGHT = 10.0
"""Cap of a weight that was taken along tokens and divided by the mean of its pool."""


class Router(nn.Module, ABC):
    """Decides which expert handles which token.

    Called as ``router(x, pool=None, edge_index=None)``. Scores are computed in float32 at least, also under autocast.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (on average, where experts choose). 1 <= K <= E.
        weight: how a pair's weight follows from its gate ``g`` (a probability or a vote):

            - ``"score"``: ``g`` itself. Where ``g`` runs along tokens, it is divided by the detached mean of the
              selected gates of the pool and capped at 10, so that the scale does not depend on T.
            - ``"normalized"``: ``g`` divided by the sum over the token's experts, so that a token's weights sum to 1.
              Refused at K = 1, where it is constant and the router would get no gradient from the task.
            - ``"straight_through"``: ``g / g.detach()``: the value 1 with the gradient of ``log g``.
            - ``None`` (default): the router's own default.
        check_finite: raise on NaN or infinity in the tokens. Costs a host sync; default ``False``.

    Shapes:
        - ``x``: (..., T, D); leading dimensions are pools, without them all tokens are one pool.
        - ``pool``: optional segment ids (PyG's ``batch``), integers of shape ``x.shape[:-1]``, unsorted and with gaps
          allowed.
        - ``edge_index``: optional (2, number of edges), the graph of the tokens; only some routers look at it.

    Raises:
        ValueError: K, E or ``weight`` out of range; a token width, pool vector or edge index that does not fit;
            ``check_finite`` and a value that is not finite.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        weight: Weighting | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("num_experts", num_experts)
        check_count("k", k)
        if k > num_experts:
            raise ValueError(f"k: got {k}, expected at most num_experts={num_experts}")
        if weight is None:
            weight = self.default_weight(k)
        check_choice("weight", weight, get_args(Weighting))
        if weight == "normalized" and k == 1:
            raise ValueError(
                "weight: got 'normalized' with k=1, where a token's only weight is the constant 1 and the router gets "
                "no gradient from the task; expected 'score' or 'straight_through', or k >= 2"
            )
        self.dim = dim
        self.num_experts = num_experts
        self.k = k
        self.weight = weight
        self.check_finite = check_finite

    @staticmethod
    def default_weight(k: int) -> Weighting:
        """The weighting where none is asked for."""
        return "score"

    @property
    def experts_per_token(self) -> float:
        """Average number of experts of a token, by construction: what the cost of a layer follows."""
        return float(self.k)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew and forget all counters."""

    @abstractmethod
    def route(self, x_TD: Tensor, pools: Pools, edge_index: Tensor | None) -> Routing:
        """Route flat tokens, in float32 or float64 and with autocast off."""

    def forward(self, x: Tensor, pool: Tensor | None = None, edge_index: Tensor | None = None) -> Routing:
        """Route ``x``; see the class."""
        pools = self._pools(x, pool)
        x_TD = x.reshape(-1, self.dim)
        # a finite sum has finite terms, and is cheaper to have; one that is not may have overflowed
        if self.check_finite and not bool(x_TD.detach().sum().isfinite()) and not bool(x_TD.isfinite().all()):
            raise ValueError(f"x: got {int((~x_TD.isfinite()).sum())} values that are NaN or infinite, expected none")
        if edge_index is not None:
            check_edge_index(edge_index, pools.num_tokens, pools.num_tokens)
        with torch.autocast(x.device.type, enabled=False):
            return self.route(x_TD.to(torch.promote_types(x.dtype, torch.float32)), pools, edge_index)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Keep counters and frozen projections in float32 at least: in bfloat16 a bias's steps would round away."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.is_floating_point() and new.dtype.itemsize < 4:
                parent, _, leaf = name.rpartition(".")
                kept = new.float() if old.is_meta else old.to(device=new.device, dtype=torch.float32)
                self.get_submodule(parent)._buffers[leaf] = kept
        return self

    def _pools(self, x: Tensor, pool: Tensor | None) -> Pools:
        if x.dim() < 2 or x.size(-1) != self.dim or not x.is_floating_point():
            raise ValueError(f"x: got shape {tuple(x.shape)} of {x.dtype}, expected (..., T, dim={self.dim}) of floats")
        if pool is None:
            return Pools.equal(x.shape[:-2].numel(), x.size(-2))
        if pool.shape != x.shape[:-1] or pool.is_floating_point() or pool.is_complex():
            raise ValueError(
                f"pool: got shape {tuple(pool.shape)} of {pool.dtype}, expected one integer a token, "
                f"shape {tuple(x.shape[:-1])}"
            )
        return Pools.from_segments(pool.reshape(-1))

    def _weights(self, log_gate_P: Tensor, token_P: Tensor, num_tokens: int) -> Tensor:
        """(P,) the pairs' weights from the logarithms of their gates."""
        if self.weight == "score":
            return log_gate_P.exp()
        if self.weight == "straight_through":
            return (log_gate_P - log_gate_P.detach()).exp()
        total_T = segment_logsumexp(log_gate_P[:, None], token_P, num_tokens)[:, 0]
        return (log_gate_P - total_T.index_select(0, token_P)).exp()

    def _weights_along_tokens(self, log_gate_P: Tensor, token_P: Tensor, pools: Pools) -> Tensor:
        """:meth:`_weights` for gates that run along tokens: scaled by the mean of the pool's selected gates."""
        if self.weight != "score":
            return self._weights(log_gate_P, token_P, pools.num_tokens)
        gate_P = log_gate_P.exp()
        mean_P = pools.mean_of_pairs(gate_P.detach(), token_P).clamp(min=torch.finfo(gate_P.dtype).tiny)
        return (gate_P / mean_P).clamp(max=MAX_WEIGHT)

    def _counters_advance(self) -> bool:
        """Whether this forward counts as a training step: not in evaluation, not when a checkpoint recomputes it."""
        return self.training and not in_backward()

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, k={self.k}, weight={self.weight!r}"


@torch.compiler.disable
def in_backward() -> bool:
    """Whether autograd is running a backward pass, as when activation checkpointing recomputes a forward."""
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks


def gather_pairs(value_TE: Tensor, token_P: Tensor, offsets_E: Tensor) -> Tensor:
    """(P,) the entries of ``value`` at the pairs. One flat ``index_select``, whose backward is an ``index_add``."""
    num_experts = value_TE.size(1)
    load_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()
    expert_P = torch.arange(num_experts, device=token_P.device).repeat_interleave(load_E, output_size=token_P.numel())
    return value_TE.reshape(-1).index_select(0, token_P * num_experts + expert_P)


def float_linear(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(x)`` with the parameters in float32 at least: a model in bfloat16 still scores in float32."""
    weight = linear.weight.to(torch.promote_types(linear.weight.dtype, torch.float32))
    return nn.functional.linear(x_TD, weight)


def check_edge_index(edge_index: Tensor, num_src: int, num_dst: int) -> None:
    """Refuse edges that point outside the nodes. CPU tensors only: elsewhere it would cost a host sync."""
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(f"edge_index: got shape {tuple(edge_index.shape)}, expected (2, number of edges)")
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
        raise ValueError(f"edge_index: got {edge_index.dtype}, expected integers")
    if edge_index.device.type != "cpu" or edge_index.size(1) == 0:
        return
    for row, name, bound in ((0, "source", num_src), (1, "destination", num_dst)):
        low, high = (int(v) for v in torch.as_tensor(edge_index[row]).aminmax())
        if low < 0 or high >= bound:
            bad = low if low < 0 else high
            raise ValueError(f"edge_index: got {name} node {bad}, expected values in 0..{bound - 1}")
