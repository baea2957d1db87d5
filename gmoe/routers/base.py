"""The abstract router. Shapes: T tokens, D width, E experts, K experts per token, P pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gmoe._checks import check_choice, check_count
from gmoe.routers.groups import segment_logsumexp
from gmoe.routing import Routing, in_backward

Weighting: TypeAlias = Literal["score", "normalized", "straight_through"]

MAX_WEIGHT = 10.0
"""Cap of a ``"score"`` weight; only gates that run along tokens reach it."""


class Router(nn.Module, ABC):
    """Decide which expert handles which token.

    Called as ``router(x, batch=None, edge_index=None)``. Scores are computed in float32 at least, also under autocast.
    A router of your own implements :meth:`route` and :meth:`reset_parameters`.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (on average, where experts choose). 1 <= K <= E.
        weight: how a pair's weight follows from its gate ``g`` (a probability or a vote):

            - ``"score"``: ``g`` itself. Where ``g`` runs along tokens, it is divided by the detached mean of the
              selected gates of the group and capped at 10, so that the scale does not depend on T.
            - ``"normalized"``: ``g`` divided by the sum over the token's experts, so that a token's weights sum to 1.
              Refused at K = 1, where it is constant and the router would get no gradient from the task.
            - ``"straight_through"``: ``g / g.detach()``: the value 1 with the gradient of ``log g``.
            - ``None`` (default): the router's own default.
        check_finite: raise on NaN or infinity in the tokens. Costs a host sync; default ``False``.

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups, without them all tokens are one group.
        - ``batch``: optional group ids (PyG's ``batch``), integers of shape ``x.shape[:-1]``, unsorted and with gaps
          allowed.
        - ``edge_index``: optional (2, number of edges), the graph of the tokens; only some routers look at it.

    Raises:
        ValueError: K, E or ``weight`` out of range; tokens, a batch vector or an edge index that do not fit;
            ``check_finite`` and a value that is not finite.
        RuntimeError: called inside a transform of ``torch.func``.
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
    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        """Route flat tokens, in float32 or float64 and with autocast off.

        Args:
            x_TD: (T, D) tokens.
            group: (T,) group ids, unsorted and with gaps allowed; or the number of tokens in each of the equal groups
                that lie one behind the other. Where tokens compete, ``Groups.of(group, T)`` reads either.
            edge_index: (2, number of edges), or ``None``.
        """

    def forward(self, x: Tensor, batch: Tensor | None = None, edge_index: Tensor | None = None) -> Routing:
        """Route ``x``; see the class."""
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError("torch.func transforms (grad, vmap, jvp, …) are not supported by gmoe's layers")
        if not isinstance(x, Tensor):
            raise ValueError(f"x: got {type(x).__name__}, expected a tensor (..., T, dim={self.dim}) of floats")
        if x.dim() < 2 or x.size(-1) != self.dim or not x.is_floating_point():
            raise ValueError(f"x: got shape {tuple(x.shape)} of {x.dtype}, expected (..., T, dim={self.dim}) of floats")
        group: Tensor | int = x.size(-2)
        if batch is not None:
            if not isinstance(batch, Tensor):
                raise ValueError(f"batch: got {type(batch).__name__}, expected a tensor of one integer a token")
            if batch.shape != x.shape[:-1] or batch.is_floating_point() or batch.is_complex():
                got, expected = f"{tuple(batch.shape)} of {batch.dtype}", tuple(x.shape[:-1])
                raise ValueError(f"batch: got shape {got}, expected one integer a token, shape {expected}")
            group = batch.reshape(-1)
        x_TD = x.reshape(-1, self.dim)
        # a finite sum has finite terms, and is cheaper to have; one that is not may have overflowed
        if self.check_finite and not bool(x_TD.detach().sum().isfinite()) and not bool(x_TD.isfinite().all()):
            raise ValueError(f"x: got {int((~x_TD.isfinite()).sum())} values that are NaN or infinite, expected none")
        if edge_index is not None:
            check_edge_index(edge_index, x_TD.size(0), x_TD.size(0))
        with torch.autocast(x.device.type, enabled=False):
            routing = self.route(x_TD.to(torch.promote_types(x.dtype, torch.float32)), group, edge_index)
        if routing.losses and self.training and not torch.is_grad_enabled():
            routing = replace(routing, detached=True)
        return routing

    def _top_k(self, ranked_TE: Tensor, log_gate_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) each token's best experts, best first, ties to the lowest index; and (T, K) their weights."""
        if self.k == 1:  # the first of equal maxima, unlike topk
            expert_TK = ranked_TE.detach().max(dim=-1, keepdim=True).indices
        else:
            expert_TK = ranked_TE.detach().argsort(dim=-1, descending=True, stable=True)[:, : self.k]
        log_gate_TK = log_gate_TE.gather(1, expert_TK)
        if self.weight == "normalized":
            log_gate_TK = log_gate_TK.log_softmax(dim=-1)
        elif self.weight == "straight_through":
            log_gate_TK = log_gate_TK - log_gate_TK.detach()
        return expert_TK, log_gate_TK.exp()

    def _pair_weights(self, log_gate_P: Tensor, token_P: Tensor, num_tokens: int) -> Tensor:
        """(P,) the weights of any pairs from the logarithms of their gates."""
        if self.weight == "score":
            return log_gate_P.exp().clamp(max=MAX_WEIGHT)
        if self.weight == "straight_through":
            return (log_gate_P - log_gate_P.detach()).exp()
        total_T = segment_logsumexp(log_gate_P[:, None], token_P, num_tokens)[:, 0]
        return (log_gate_P - total_T.index_select(0, token_P)).exp()

    def is_training_step(self) -> bool:
        """Whether this forward moves the counters: not in evaluation, not when a checkpoint recomputes it."""
        return self.training and not in_backward()

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

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, k={self.k}, weight={self.weight!r}"


def float_linear(x_TD: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(x)`` in the precision of ``x``, at least float32: a model in bfloat16 still scores in float32."""
    if not isinstance(linear.weight, Tensor):  # a quantized layer has a method of that name
        return linear(x_TD)
    return nn.functional.linear(x_TD, linear.weight.to(x_TD.dtype))


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
