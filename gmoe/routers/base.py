"""The abstract router. Shapes: T tokens, D width, E experts, K experts per token, P pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from gmoe._checks import check_at_least, check_choice, check_count, check_positive
from gmoe.distributed import world_sums
from gmoe.routing import Routing, in_backward

Weighting: TypeAlias = Literal["score", "normalized", "straight_through"]
Option = TypeVar("Option")

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
            - ``None`` (default): the router's own default; ``"score"`` where it has none.
        check_finite: raise on NaN or infinity in the tokens. Costs a host sync; default ``False``.

    Attributes:
        experts_per_token: average number of experts per token; compute scales with it.
        process_group: under ``torch.distributed``, losses and counters are those of the tokens of all processes of this
            group, ``None`` (default) for all there are. One collective a forward in training with gradients, so that
            every process has to call the router; not in the forward of a reentrant checkpoint, which has none. Where
            tokens compete (expert choice, votes, capacities), they do so inside a process. A router with a group of
            its own can be neither copied nor pickled.

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
        self, dim: int, num_experts: int, k: int = 1, *, weight: Weighting | None = None, check_finite: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.num_experts, self.k = legal("dim", dim), legal("num_experts", num_experts), legal("k", k)
        if k > num_experts:
            raise ValueError(f"k: got {k}, expected at most num_experts={num_experts}")
        self.weight: Weighting = legal("weight", weight or "score", Weighting)
        if weight == "normalized" and k == 1:
            raise ValueError(
                "weight: got 'normalized' with k=1, where a token's only weight is the constant 1 and the router gets "
                "no gradient from the task; expected 'score' or 'straight_through', or k >= 2"
            )
        self.check_finite = check_finite
        self.experts_per_token = float(k)
        self.process_group: Any = None

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
        if not isinstance(x, Tensor) or x.dim() < 2 or x.size(-1) != self.dim or not x.is_floating_point():
            raise ValueError(f"x: got {described(x)}, expected (..., T, dim={self.dim}), a tensor of floats")
        group: Tensor | int = x.size(-2)
        if batch is not None:
            shape = x.shape[:-1]
            if not isinstance(batch, Tensor) or batch.shape != shape or batch.is_floating_point() or batch.is_complex():
                got = described(batch)
                raise ValueError(f"batch: got {got}, expected one integer a token, a tensor of {tuple(shape)}")
            group = batch.reshape(-1)
        x_TD = x.reshape(-1, self.dim)
        # a finite sum has finite terms, and is cheaper to have; one that is not may have overflowed
        if self.check_finite and not bool(x_TD.detach().sum().isfinite()) and not bool(x_TD.isfinite().all()):
            raise ValueError(f"x: got {int((~x_TD.isfinite()).sum())} values that are NaN or infinite, expected none")
        if edge_index is not None:
            check_edge_index(edge_index, x_TD.size(0), x_TD.size(0))
        with torch.autocast(x.device.type, enabled=False):
            routing = self.route(x_TD.to(torch.promote_types(x.dtype, torch.float32)), group, edge_index)
        if not isinstance(routing, Routing):
            raise ValueError(f"route: got {described(routing)}, expected a Routing from {type(self).__name__}.route")
        if routing.num_tokens != x_TD.size(0) or routing.offsets.numel() != self.num_experts:
            got = f"{routing.num_tokens} tokens and {routing.offsets.numel()} experts"
            legal = f"{x_TD.size(0)} and {self.num_experts}"
            raise ValueError(f"route: got a Routing of {got} from {type(self).__name__}, expected {legal}")
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

    def summed(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over tokens, over the tokens of all processes: one collective, in training with gradients only.

        Every process has to come here, also one without tokens.
        """
        if not parts or not self.training or not torch.is_grad_enabled():
            return parts
        return dict(zip(parts, world_sums(list(parts.values()), self.process_group), strict=True))

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


def legal(name: str, value: Option, choices: Any = None) -> Option:
    """``value``, if the option of that name may have it: one of a ``Literal``, or a number in range."""
    number: Any = value
    if choices is not None:
        check_choice(name, value, get_args(choices))
    elif name in ("dim", "num_experts", "k", "num_centroids", "head_dim", "slots"):
        check_count(name, number)
    elif name in ("capacity_factor", "init_scale", "temperature"):
        check_positive(name, number)
    else:
        check_at_least(name, number, 0)
    return value


def described(value: object) -> str:
    """What a caller gave, for an error."""
    return f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def pair_weights(weighting: Weighting, log_gate_P: Tensor, token_P: Tensor, num_tokens: int) -> Tensor:
    """(P,) the weights of any pairs from the logarithms of their gates."""
    if weighting == "score":
        return log_gate_P.exp().clamp(max=MAX_WEIGHT)
    if weighting == "straight_through":
        return (log_gate_P - log_gate_P.detach()).exp()
    best_T = log_gate_P.detach().new_zeros(num_tokens)
    best_T = best_T.scatter_reduce(0, token_P, log_gate_P.detach(), "amax", include_self=False)
    gate_P = (log_gate_P - best_T.index_select(0, token_P)).exp()
    return gate_P / gate_P.new_zeros(num_tokens).index_add(0, token_P, gate_P).index_select(0, token_P)


def float_linear(x_TD: Tensor, linear: nn.Module) -> Tensor:
    """``linear(x)`` in the precision of ``x``, at least float32: a model in bfloat16 still scores in float32."""
    if type(linear) is not nn.Linear:  # somebody's own, or a quantized one, whose weight is no tensor
        weight: Any = getattr(linear, "weight", None)
        own = linear(x_TD.to(weight.dtype) if isinstance(weight, Tensor) else x_TD)
        return torch.as_tensor(own).to(x_TD.dtype)
    return nn.functional.linear(x_TD, linear.weight.to(x_TD.dtype))


def check_edge_index(edge_index: Tensor, num_src: int, num_dst: int) -> None:
    """Refuse edges that point outside the nodes. CPU tensors only: elsewhere it would cost a host sync."""
    no_index = edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or no_index:
        raise ValueError(f"edge_index: got {described(edge_index)}, expected (2, number of edges), integers")
    if edge_index.device.type != "cpu" or edge_index.size(1) == 0:
        return
    for row_M, name, bound in zip(edge_index, ("source", "destination"), (num_src, num_dst), strict=True):
        low, high = (int(value) for value in torch.as_tensor(row_M).aminmax())
        if low < 0 or high >= bound:
            bad = low if low < 0 else high
            raise ValueError(f"edge_index: got {name} node {bad}, expected values in 0..{bound - 1}")
