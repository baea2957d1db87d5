"""The abstract router: the checks, weights and sums over processes that all routers share.

Shapes: T tokens, D width, A experts with those that were pruned, E without, K experts per token, P
(token, expert) pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmoe import portable
from gmoe._autograd import autocasts, outside_backward, refuse_transforms
from gmoe._checks import (
    INTEGERS,
    check,
    check_can_shrink,
    check_choice,
    check_counts,
    check_kept,
    described,
    fixed,
)
from gmoe._torch import copy_all, in_backward
from gmoe.choices import over_experts
from gmoe.distributed import world_sum
from gmoe.losses import LossWatch
from gmoe.portable import exported_as
from gmoe.routing import AuxLoss, Routing

Weighting: TypeAlias = Literal["score", "normalized", "straight_through"]

INIT_SCALE = 0.1
"""Of initial weights, as in Switch Transformer: a softmax that is sharp from the start hardly
learns, and large features make it sharp.
"""


class Router(nn.Module, ABC):
    """Decide which expert handles which token.

    Called as ``router(x, batch=None, edge_index=None)``. Scores are computed in float32 at least,
    also under autocast. Your own router implements :meth:`route` and :meth:`reset_parameters`.

    Args:
        dim: D, the width of the tokens.
        num_experts: E.
        k: K, experts per token (default 1; on average, where experts choose). 1 <= K <= E.
        weight: how a pair's weight follows from its gate ``g`` (a probability or a vote):

            - ``"score"``: ``g`` itself. If ``g`` is normalized over tokens, it is divided by the
              detached mean of the selected gates of the group and capped at 10, so that the scale
              does not depend on T.
            - ``"normalized"``: ``g`` divided by the sum over the token's experts, so that a token's
              weights sum to 1. Refused at K = 1, where the weight is constant and the task gives
              the router no gradient.
            - ``"straight_through"``: ``g / g.detach()``: the value 1 with the gradient of
              ``log g``.
            - ``None`` (default): the router's own default, ``"score"`` unless its class says
              otherwise.

    Attributes:
        experts_per_token: average number of experts per token; compute scales with it.
        process_group: under ``torch.distributed``, losses and counters cover the tokens of all
            processes in this group; ``None`` (default) is the group of all processes. In training
            with gradients, a forward runs one collective for a balance or a threshold, and one for
            each further loss, so every process has to call the router. The forward of a reentrant
            checkpoint has no gradients and runs none. Where tokens compete (expert choice, votes,
            capacities), they compete inside a process. A router with its own group can be neither
            copied nor pickled.
        sums_to_one: each token's weights sum to 1 by construction, whatever the values, so that
            copies of one layer give what that layer gives (default ``False``).
        num_scored: A, the experts that the router was built with and scores. :func:`gmoe.prune`
            leaves E of them to choose from; see :meth:`keep`.
        alive_E: the numbers of these among the scored ones; ``None`` if none was pruned.
        experts_choose: each expert takes so many tokens, whatever other experts take (default
            ``False``: each token takes so many experts).
        can_shrink: experts can be taken away (default ``True``); see :meth:`keep`.
        by_token: in evaluation, a token's experts follow from that token alone, so that a graph
            larger than memory can be routed a part at a time (default ``False``).

    Shapes:
        - ``x``: (..., T, D); leading dimensions are groups; in (T, D) all tokens are one group.
        - ``batch``: optional group ids (PyG's ``batch``), integers of shape ``x.shape[:-1]``,
          unsorted and with gaps allowed.
        - ``edge_index``: optional (2, number of edges), the graph of the tokens; only some routers
          use it. A ``MoEConv`` passes it if sources and destinations are the same nodes.
        - returns a :class:`gmoe.Routing`. If the tokens are graphs, :meth:`gmoe.Routing.expand`
          gives each node the decision of its graph.

    Raises:
        ValueError: K, E or ``weight`` out of range; tokens, a batch vector or an edge index that do
            not fit.
        RuntimeError: called inside a transform of ``torch.func``.
    """

    by_token = False
    sums_to_one = False
    experts_choose = False
    can_shrink = True
    num_experts: int = fixed("num_experts")
    k: int = fixed("k")
    alive_E: Tensor | None

    def __init__(
        self, dim: int, *, num_experts: int, k: int = 1, weight: Weighting | None = None
    ) -> None:
        super().__init__()
        weight = weight or "score"
        check_counts(dim=dim, num_experts=num_experts, k=k)
        check(k <= num_experts, "k", k, f"at most num_experts={num_experts}")
        check_choice("weight", weight, Weighting)
        got = "'normalized' with k=1, the constant 1 without a gradient"
        check(weight != "normalized" or k > 1, "weight", got, "another, or k >= 2")
        self.dim = dim
        self._num_experts = num_experts
        self.num_scored = num_experts
        self._k = k
        self.weight = weight
        self.experts_per_token = float(k)
        self.process_group: dist.ProcessGroup | None = None
        self.loss_watch = LossWatch()
        self.register_buffer("alive_E", None)
        self._kept: tuple[int, ...] = ()  # what alive_E loses on the meta device

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew and forget all counters."""

    def check_kept(self, kept: Sequence[int]) -> None:
        """Refuse what :meth:`keep` cannot do, before anything changes."""
        check_can_shrink(self)
        check_kept(kept, self.num_experts, self.k)

    def keep(self, kept: Sequence[int]) -> None:
        """Choose among some experts alone from now on, which are numbered anew.

        All experts are still scored: a softmax over all of them, and the weights that follow from
        it, stay as they were. What is kept for each expert that may be chosen, buffers whose names
        end in ``_E``, shrinks along.

        Args:
            kept: the experts that stay, ascending.

        Raises:
            ValueError: numbers of no experts, or fewer than K.
        """
        self.check_kept(kept)
        tensors = [*self.parameters(), *self.buffers()]
        device = tensors[0].device if tensors else None
        before = self._alive_numbers()
        self._kept = tuple(before[expert] for expert in kept)
        self.alive_E = torch.tensor(self._kept, device=device)
        for part in self.modules():
            for name, rows_E in list(part.named_buffers(recurse=False)):
                if name.endswith("_E") and name != "alive_E":
                    setattr(part, name, rows_E[list(kept)])
        # Where experts choose, each takes what it took; a token takes K of those that are left.
        if self.experts_choose:
            self.experts_per_token *= len(kept) / self.num_experts
        self.experts_per_token = min(self.experts_per_token, float(len(kept)))
        self._num_experts = len(kept)

    def _alive_numbers(self) -> Sequence[int]:
        """The numbers of the experts that may be chosen, among the scored ones."""
        if self.alive_E is None:
            return range(self.num_scored)
        if self.alive_E.is_meta:
            return self._kept
        numbers: list[int] = self.alive_E.tolist()
        return numbers

    def of_alive(self, value: Tensor, dim: int = -1) -> Tensor:
        """Select the columns of the experts that may be chosen from those of all scored ones.

        Choose among these: whatever the scores are, the choice cannot fall on an expert that is
        gone, as it could among equal ones of which some are masked.
        """
        return value if self.alive_E is None else value.index_select(dim, self.alive_E)

    @abstractmethod
    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        """Route flat tokens, in float32 or float64 and with autocast off.

        Args:
            x_TD: (T, D) tokens.
            group: (T,) group ids, unsorted and with gaps allowed; or one number, the size of groups
                that are equally large and contiguous. Where tokens compete,
                ``Groups.of(group, T)`` reads either.
            edge_index: (2, number of edges), or ``None``.
        """

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        edge_index: Tensor | None = None,
    ) -> Routing:
        """Route ``x``; see the class."""
        refuse_transforms(traces=False)
        self._check_input(x, batch)

        # Flatten the tokens. Without a batch vector, (..., T, D) holds equal groups of T tokens.
        x_TD = x.reshape(-1, self.dim)
        group = x.size(-2) if batch is None else batch.reshape(-1)

        # In half precision two close logits round to a tie, and probabilities underflow.
        x_TD = x_TD.to(torch.promote_types(x.dtype, torch.float32))
        has_autocast = autocasts(x.device)
        with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
            routing = self.route(x_TD, group, edge_index)

        sizes = (x_TD.size(0), self.num_experts)
        is_routing = isinstance(routing, Routing)
        if not is_routing or (routing.num_tokens, routing.num_experts) != sizes:
            got = repr(routing) if is_routing else described(routing)
            raise ValueError(
                f"route: got {got} from {type(self).__name__}, "
                f"expected a Routing of {x_TD.size(0)} tokens, {self.num_experts} experts"
            )
        # Losses that were computed without gradients train nothing: aux_loss warns about them.
        if routing.losses and self.training and not torch.is_grad_enabled():
            routing = replace(routing, detached=True, validate=False)
        if routing.losses and self.training and not torch.compiler.is_compiling():
            self.loss_watch.follow(routing)
        return routing

    def _check_input(self, x: Tensor, batch: Tensor | None) -> None:
        """Refuse tokens of another width, and a batch vector that does not fit them."""
        is_floats = isinstance(x, Tensor) and x.is_floating_point()
        if not is_floats or x.dim() < 2 or x.size(-1) != self.dim:
            raise ValueError(
                f"x: got {described(x)}, expected (..., T, dim={self.dim}), a tensor of floats"
            )
        if batch is None:
            return
        is_integers = getattr(batch, "dtype", None) in INTEGERS
        if not is_integers or batch.shape != x.shape[:-1]:
            raise ValueError(
                f"batch: got {described(batch)}, expected integers, "
                f"a tensor of {tuple(x.shape[:-1])}"
            )

    @property
    def _picks_sum_to_one(self) -> bool:
        """True if the weights of K chosen experts sum to 1.

        That holds for normalized weights, and for the constant 1 of a single expert.
        """
        return self.weight == "normalized" or (self.weight == "straight_through" and self.k == 1)

    def _route_to(
        self, expert_TK: Tensor, logits_TA: Tensor, losses: Mapping[str, AuxLoss] | None = None
    ) -> Routing:
        """Route each token to its K experts, by gates that are the softmax of logits.

        Args:
            expert_TK: (T, K) the experts of each token, distinct in a row.
            logits_TA: (T, A) the logits, also of experts that were pruned.
            losses: auxiliary losses by name.
        """
        logits_TE = self.of_alive(logits_TA)
        scores: dict[str, Tensor] = {"logits": logits_TE}
        if self.weight == "score" or self.alive_E is not None:
            scores = {"scores": self.of_alive(over_experts(torch.softmax, logits_TA))}

        if self.weight == "score":
            weight_TK = scores["scores"].gather(1, expert_TK)
        elif self.weight == "normalized":  # what they share, a sum over all experts, cancels
            weight_TK = over_experts(torch.softmax, logits_TE.gather(1, expert_TK))
        else:
            log_gate_TE = self.of_alive(over_experts(torch.log_softmax, logits_TA))
            weight_TK = straight_through(log_gate_TE.gather(1, expert_TK))
        return Routing.from_choices(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            losses=losses,
            validate=False,
            **scores,
        )

    def summed(self, *parts: Tensor) -> Sequence[Tensor]:
        """Sum over the processes what was summed over tokens, in one collective.

        Only in training with gradients; otherwise the parts are returned as they are. Every process
        has to call this, even one without tokens.
        """
        is_distributed = dist.is_available() and dist.is_initialized()
        if not (self.training and torch.is_grad_enabled() and is_distributed):
            return parts
        flat = torch.cat([part.view(-1) for part in parts])
        sums = world_sum(flat, self.process_group).split([part.numel() for part in parts])
        return [total.view_as(part) for total, part in zip(sums, parts, strict=True)]

    def means(self, *parts: Tensor) -> Sequence[Tensor]:
        """(C,) the means of (T, C) parts over the tokens of all processes; see :meth:`summed`."""
        number = parts[0].new_full((), len(parts[0]))  # new_tensor would copy from the host
        *sums, number = self.summed(*(part.sum(dim=0) for part in parts), number)
        return [part / number for part in sums]

    def z_loss(self, logits_TE: Tensor) -> Tensor:
        """Mean over the tokens of all processes of ``logsumexp_e(logit_te)^2``.

        It is the router z-loss of `ST-MoE <https://arxiv.org/abs/2202.08906>`_ (Zoph et al., 2022).
        """
        # Not by new_tensor, which would copy from the host.
        num_tokens = logits_TE.new_full((), logits_TE.size(0))
        square_sum = logits_TE.logsumexp(dim=-1).square().sum()
        square_sum, num_tokens = self.summed(square_sum, num_tokens)
        return square_sum / num_tokens.clamp(min=1)

    def is_training_step(self) -> bool:
        """True if this forward may move the counters, by :meth:`update_counters`.

        It may in training, but not when a checkpoint recomputes the forward in the backward pass.
        """
        return self.training and (torch.compiler.is_compiling() or not in_backward())

    def update_counters(self, counters: list[Tensor], values: list[Tensor]) -> None:
        """Write new values of counters, in a training step.

        One compiled forward runs in the step and, under checkpointing, again in the backward pass:
        there the counters stay.
        """
        if torch.compiler.is_compiling():
            is_step = outside_backward(counters[0])
            pairs = zip(counters, values, strict=True)
            values = [torch.where(is_step, value, counter) for counter, value in pairs]
        copy_all(counters, values)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Keep counters and frozen projections in float32 at least, whatever the default dtype."""
        super().register_buffer(
            name, None if tensor is None else at_least_float32(tensor), persistent
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Keep counters and frozen projections in float32 at least when the module is cast.

        In bfloat16 the small steps of a bias would round away.
        """
        buffer_ids = {id(buffer) for buffer in self.buffers()}

        def cast(old: Tensor) -> Tensor:
            new = fn(old)
            if old is self.alive_E and old.is_meta:  # its values are known
                return torch.tensor(self._kept, device=new.device)
            if id(old) not in buffer_ids or at_least_float32(new) is new:
                return new
            if old.is_meta:  # it has no values to keep
                return new.float()
            return old.to(device=new.device, dtype=torch.float32)

        return super()._apply(cast, recurse)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_experts}, k={self.k}, weight={self.weight!r}"


def at_least_float32(value: Tensor) -> Tensor:
    """The tensor itself, or one of half precision in float32."""
    is_half = value.is_floating_point() and value.dtype.itemsize < 4
    return value.float() if is_half else value


@exported_as(portable.top_k)
def best_experts(ranked_TE: Tensor, k: int) -> Tensor:
    """(T, K) the best experts of each token, best first and ties to the lowest index."""
    if k == 1:  # argmax takes the first of equal maxima, which topk does not promise
        return ranked_TE.argmax(dim=-1, keepdim=True)
    return ranked_TE.argsort(dim=-1, descending=True, stable=True)[:, :k]


def pair_weights(
    weighting: Weighting, log_gate_P: Tensor, token_P: Tensor, num_tokens: int
) -> Tensor:
    """(P,) the weights of pairs from the logarithms of their gates, K or not per token.

    Args:
        weighting: see :class:`Router`.
        log_gate_P: logarithm of each pair's gate.
        token_P: the token of each pair.
        num_tokens: T.
    """
    if weighting == "score":
        return log_gate_P.exp()
    if weighting == "straight_through":
        return straight_through(log_gate_P)
    # "normalized": a softmax over each token's pairs, relative to its best one so as not to
    # overflow.
    best_T = log_gate_P.detach().new_zeros(num_tokens)
    best_T = best_T.scatter_reduce(0, token_P, log_gate_P.detach(), "amax", include_self=False)
    gate_P = (log_gate_P - best_T.index_select(0, token_P)).exp()
    total_T = gate_P.new_zeros(num_tokens).index_add(0, token_P, gate_P)
    return gate_P / total_T.index_select(0, token_P)


def straight_through(log_gate: Tensor) -> Tensor:
    """The value 1, with the gradient of ``log_gate``."""
    return (log_gate - log_gate.detach()) + 1.0


class Gate(nn.Linear):
    """A linear layer of a router, without a bias; a model in bfloat16 still scores in float32."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_TD: Tensor, mean_D: Tensor | None = None) -> Tensor:
        """(T, A) the scores of tokens, or of what they are beyond their mean."""
        weight_AD = self.weight.to(x_TD.dtype)
        if mean_D is None:
            return nn.functional.linear(x_TD, weight_AD)
        return torch.addmm(weight_AD @ mean_D, x_TD, weight_AD.T, beta=-1)


def scores_of(gate: nn.Module, x_TD: Tensor, mean_D: Tensor | None = None) -> Tensor:
    """(T, A) what a gate, or what somebody put in its place, makes of tokens; see :class:`Gate`."""
    if isinstance(gate, Gate):
        scores_TA: Tensor = gate(x_TD, mean_D)
        return scores_TA
    # LoRA or a quantized layer, in its own dtype; a quantized weight is not a tensor.
    dtype = getattr(getattr(gate, "weight", None), "dtype", x_TD.dtype)
    scores_TA = gate(x_TD.to(dtype)).to(x_TD.dtype)
    if mean_D is None:
        return scores_TA
    return scores_TA - gate(mean_D[None].to(dtype)).to(x_TD.dtype)


def reset_linear(linear: nn.Linear) -> None:
    """Draw the weights as ``nn.Linear`` does, times :data:`INIT_SCALE`."""
    linear.reset_parameters()
    with torch.no_grad():
        linear.weight.mul_(INIT_SCALE)


def checked_edge_index(edge_index: Tensor | None) -> Tensor:
    """Return the edges; refuse what does not have the form of edges.

    That they join the tokens is checked where they are sorted.
    """
    is_integers = edge_index is not None and edge_index.dtype in INTEGERS
    if edge_index is None or not is_integers or edge_index.dim() != 2 or edge_index.size(0) != 2:
        raise ValueError(
            f"edge_index: got {described(edge_index)}, expected integers (2, edges), "
            "of one set of nodes"
        )
    return edge_index
