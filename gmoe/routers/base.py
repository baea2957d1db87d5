"""The abstract router. Shapes: T tokens, D width, E experts, K experts per token, P pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmoe._autograd import in_transform
from gmoe._checks import check, check_choice, check_counts, must_be_called
from gmoe.distributed import world_sum
from gmoe.losses import square_sum
from gmoe.routing import INTEGERS, Routing, check_range, described

Weighting: TypeAlias = Literal["score", "normalized", "straight_through"]

MAX_WEIGHT = 10.0
"""Cap of a ``"score"`` weight; only gates that run along tokens reach it."""


class Router(nn.Module, ABC):
    """Decide which expert handles which token.

    Called as ``router(x, batch=None, edge_index=None)``. Scores are computed in float32 at least,
    also under autocast. A router of your own implements :meth:`route` and :meth:`reset_parameters`.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (on average, where experts choose). 1 <= K <= E.
        weight: how a pair's weight follows from its gate ``g`` (a probability or a vote):

            - ``"score"``: ``g`` itself. Where ``g`` runs along tokens, it is divided by the
              detached mean of the selected gates of the group and capped at 10, so that the scale
              does not depend on T.
            - ``"normalized"``: ``g`` divided by the sum over the token's experts, so that a token's
              weights sum to 1. Refused at K = 1, where it is constant and the router would get no
              gradient from the task.
            - ``"straight_through"``: ``g / g.detach()``: the value 1 with the gradient of
              ``log g``.
            - ``None`` (default): the router's own default; ``"score"`` where it has none.

    Attributes:
        check_finite: set to ``True`` to raise on NaN or infinity in the tokens; costs a host sync
            (default ``False``).
        experts_per_token: average number of experts per token; compute scales with it.
        process_group: under ``torch.distributed``, losses and counters are those of the tokens of
            all processes of this group, ``None`` (default) for all there are. One collective a
            forward in training with gradients (one more for a z-loss), so that every process has to
            call the router; not in the forward of a reentrant checkpoint, which has none. Where
            tokens compete (expert choice, votes, capacities), they do so inside a process. A router
            with a group of its own can be neither copied nor pickled.
        sums_to_one: each token's weights sum to 1 by construction, whatever the values, so that
            copies of one layer give what that layer gives (default ``False``).
        by_token: a token's experts follow from the token alone in evaluation, so that a graph on
            disk can be routed a part at a time (default ``False``).

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups, without them all tokens are one group.
        - ``batch``: optional group ids (PyG's ``batch``), integers of shape ``x.shape[:-1]``,
          unsorted and with gaps allowed.
        - ``edge_index``: optional (2, number of edges), the graph of the tokens; only some routers
          look at it. A ``MoEConv`` gives it where sources and destinations are the same nodes.

    Raises:
        ValueError: K, E or ``weight`` out of range; tokens, a batch vector or an edge index that do
            not fit; ``check_finite`` and a value that is not finite.
        RuntimeError: called inside a transform of ``torch.func``.
    """

    by_token = False
    sums_to_one = False

    def __init__(
        self, dim: int, num_experts: int, k: int = 1, *, weight: Weighting | None = None
    ) -> None:
        super().__init__()
        weight = weight or "score"
        check_counts(dim=dim, num_experts=num_experts, k=k)
        check(k <= num_experts, "k", k, f"at most num_experts={num_experts}")
        check_choice("weight", weight, Weighting)
        constant = weight == "normalized" and k == 1
        check(
            not constant,
            "weight",
            "'normalized' with k=1, the constant 1 without a gradient",
            "another, or k >= 2",
        )
        self.dim, self.num_experts, self.k = dim, num_experts, k
        self.weight = weight
        self.check_finite = False
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
            group: (T,) group ids, unsorted and with gaps allowed; or the number of tokens in each
                of the equal groups that lie one behind the other. Where tokens compete,
                ``Groups.of(group, T)`` reads either.
            edge_index: (2, number of edges), or ``None``.
        """

    def forward(
        self, x: Tensor, batch: Tensor | None = None, edge_index: Tensor | None = None
    ) -> Routing:
        """Route ``x``; see the class."""
        if not torch.compiler.is_compiling() and in_transform():
            raise RuntimeError(
                "torch.func transforms (grad, vmap, jvp, …) are not supported by gmoe's layers"
            )
        if (
            not isinstance(x, Tensor)
            or x.dim() < 2
            or x.size(-1) != self.dim
            or not x.is_floating_point()
        ):
            raise ValueError(
                f"x: got {described(x)}, expected (..., T, dim={self.dim}), a tensor of floats"
            )
        if batch is not None and (
            getattr(batch, "dtype", None) not in INTEGERS or batch.shape != x.shape[:-1]
        ):
            raise ValueError(
                f"batch: got {described(batch)}, expected integers, a tensor of {tuple(x.shape[:-1])}"
            )
        x_TD = x.reshape(-1, self.dim)
        if self.check_finite and not x_TD.isfinite().all():
            raise ValueError(
                f"x: got {int((~x_TD.isfinite()).sum())} values that are NaN or infinite, expected none"
            )
        group = x.size(-2) if batch is None else batch.reshape(-1)
        with torch.autocast(x.device.type, enabled=False):
            routing = self.route(
                x_TD.to(torch.promote_types(x.dtype, torch.float32)), group, edge_index
            )
        if not isinstance(routing, Routing) or routing.scores.shape != (
            len(x_TD),
            self.num_experts,
        ):
            got = repr(routing) if isinstance(routing, Routing) else described(routing)
            expected = f"a Routing of {len(x_TD)} tokens, {self.num_experts} experts"
            raise ValueError(f"route: got {got} from {type(self).__name__}, expected {expected}")
        if routing.losses and self.training and not torch.is_grad_enabled():
            routing = replace(routing, detached=True, checked=True)
        return routing

    @property
    def _picks_sum_to_one(self) -> bool:
        """True if the weights of K chosen experts sum to 1: normalized ones, and the 1 of a single
        expert.
        """
        return self.weight == "normalized" or (self.weight == "straight_through" and self.k == 1)

    def _top_k(self, ranked_TE: Tensor, log_gate_TE: Tensor) -> tuple[Tensor, Tensor]:
        """(T, K) each token's best experts, best first, ties to the lowest index; and (T, K) their
        weights.
        """
        if self.k == 1:  # the first of equal maxima, unlike topk
            expert_TK = ranked_TE.argmax(dim=-1, keepdim=True)
        else:
            expert_TK = ranked_TE.argsort(dim=-1, descending=True, stable=True)[:, : self.k]
        log_gate_TK = log_gate_TE.gather(1, expert_TK)
        if self.weight == "normalized":
            log_gate_TK = log_gate_TK.log_softmax(dim=-1)
        elif self.weight == "straight_through":
            return expert_TK, straight_through(log_gate_TK)
        return expert_TK, log_gate_TK.exp()

    def summed(self, *parts: Tensor) -> Sequence[Tensor]:
        """Sum over the processes what was summed over tokens: one collective, in training with
        gradients only.

        Every process has to come here, also one without tokens.
        """
        if not (
            self.training
            and torch.is_grad_enabled()
            and dist.is_available()
            and dist.is_initialized()
        ):
            return parts
        total = world_sum(torch.cat([part.view(-1) for part in parts]), self.process_group)
        sums = total.split([part.numel() for part in parts])
        return [one.view_as(part) for one, part in zip(sums, parts, strict=True)]

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """The router z-loss over the tokens of all processes."""
        squares, tokens = self.summed(square_sum(logits_TE), logits_TE.new_tensor(len(logits_TE)))
        return squares / tokens.clamp(min=1)

    def is_training_step(self) -> bool:
        """True if this forward moves the counters: not in evaluation, nor when a checkpoint
        recomputes it.
        """
        # what torch.utils.checkpoint itself asks; a compiled checkpoint recomputes without Python
        return self.training and (
            torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Keep counters and frozen projections in float32 at least: in bfloat16 a bias's steps
        would round away.
        """
        buffers = set(map(id, self.buffers()))

        def kept(old: Tensor) -> Tensor:
            new = fn(old)
            if id(old) not in buffers or not new.is_floating_point() or new.dtype.itemsize >= 4:
                return new
            return new.float() if old.is_meta else old.to(device=new.device, dtype=torch.float32)

        return super()._apply(kept, recurse)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, k={self.k}, weight={self.weight!r}"


def pair_weights(
    weighting: Weighting, log_gate_P: Tensor, token_P: Tensor, num_tokens: int
) -> Tensor:
    """(P,) the weights of any pairs from the logarithms of their gates."""
    if weighting == "score":
        return log_gate_P.exp().clamp(max=MAX_WEIGHT)
    if weighting == "straight_through":
        return straight_through(log_gate_P)
    best_T = log_gate_P.detach().new_zeros(num_tokens)
    best_T = best_T.scatter_reduce(0, token_P, log_gate_P.detach(), "amax", include_self=False)
    gate_P = (log_gate_P - best_T.index_select(0, token_P)).exp()
    return gate_P / gate_P.new_zeros(num_tokens).index_add(0, token_P, gate_P).index_select(
        0, token_P
    )


def straight_through(log_gate: Tensor) -> Tensor:
    """1, with the gradient of ``log_gate``."""
    return (log_gate - log_gate.detach()) + 1.0


def float_linear(x_TD: Tensor, linear: nn.Module) -> Tensor:
    """``linear(x)`` in the precision of ``x``, at least float32: a model in bfloat16 still scores
    in float32.
    """
    if type(linear) is nn.Linear and linear.bias is None and not must_be_called(linear):
        return nn.functional.linear(x_TD, linear.weight.to(x_TD.dtype))
    dtype = getattr(
        getattr(linear, "weight", None), "dtype", x_TD.dtype
    )  # a quantized one's weight is no tensor
    return linear(x_TD.to(dtype)).to(x_TD.dtype)


def reset_linear(linear: nn.Linear, scale: float) -> None:
    """Draw the weights as ``nn.Linear`` does, times ``scale``."""
    linear.reset_parameters()
    with torch.no_grad():
        linear.weight.mul_(scale)


def edges_among(edge_index: Tensor | None, num_tokens: int) -> Tensor:
    """The edges, if they join the tokens, which is looked up on the CPU only: elsewhere it would
    cost a host sync.
    """
    if (
        edge_index is None
        or edge_index.dtype not in INTEGERS
        or edge_index.dim() != 2
        or len(edge_index) != 2
    ):
        raise ValueError(
            f"edge_index: got {described(edge_index)}, expected integers (2, edges), of one set of nodes"
        )
    check_range("edge_index", edge_index, num_tokens)
    return edge_index
