"""Stacked experts: E functions whose parameters lie in one tensor each.

Shapes: E experts, T tokens, P pairs sorted by expert, I in, H hidden, O out features, U columns of
the first layer (H, or 2 H if it is gated), G groups of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import (
    check,
    check_can_shrink,
    check_counts,
    check_kept,
    fixed,
)
from gmoe.products import combine, dispatch, grouped_linear
from gmoe.routing import Routing
from gmoe.stack import Stack, become, check_stacked, fill, routed_parameters, stacks_in

Activation: TypeAlias = str | Callable[[Tensor], Tensor]


class Experts(nn.Module, ABC):
    """E functions of the same shape.

    ``experts(x (T, I), routing) -> (T, O)`` is the mixture :math:`y_t = \\sum_e w_{te} f_e(x_t)`;
    ``experts(x (P, I), offsets (E,)) -> (P, O)`` runs expert ``e`` on the rows
    ``offsets[e - 1]:offsets[e]``. A subclass implements :meth:`rows`.

    Args:
        in_features: I.
        out_features: O.
        num_experts: E.
    """

    can_shrink = True
    """Whether experts can be taken away."""

    num_experts: int = fixed("num_experts")

    def __init__(self, in_features: int, out_features: int, *, num_experts: int) -> None:
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features, num_experts=num_experts)
        self.in_features = in_features
        self.out_features = out_features
        self._num_experts = num_experts

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""

    @abstractmethod
    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        """(P, O) expert ``e`` on the rows ``offsets[e - 1]:offsets[e]``."""

    def forward(self, x: Tensor, routing: Routing | Tensor) -> Tensor:
        """The mixture over tokens, or each expert on its rows; see the class."""
        if isinstance(routing, Tensor):
            return self.rows(x, routing)
        # Gather each expert's rows, run the experts, scatter back by weight.
        x_PI = dispatch(x, routing)
        y_PO = self.rows(x_PI, routing.offsets)
        return combine(y_PO, routing)

    def check_kept(self, kept: Sequence[int]) -> None:
        """Refuse what :meth:`keep` cannot do, before anything changes."""
        check_can_shrink(self)
        check_kept(kept, self.num_experts)
        if type(self).keep is Experts.keep:
            check_stacked(self)

    def keep(self, kept: Sequence[int]) -> None:
        """Take all other experts away, in place; those that stay are numbered anew.

        ``layer.keep`` calls it. A class of your own needs one of its own to be pruned.

        Args:
            kept: the experts that stay, ascending.

        Raises:
            ValueError: a class that has none; parts that are parametrized, or were replaced.
        """
        self.check_kept(kept)
        for _, stack in stacks_in(self):
            Stack.keep(stack, kept)
        self._num_experts = len(kept)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of which a token uses those of its own experts: all but a base's."""
        return routed_parameters(self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}"


class LinearExperts(Experts, Stack):
    """One linear layer per expert, initialized as E separate ``nn.Linear`` layers are.

    Args:
        in_features: I.
        out_features: O.
        num_experts: E.
        bias: learn a bias per expert (default ``True``).
        zero_init: start at zero instead (default ``False``).

    Attributes:
        weight: (E, O, I).
        bias: (E, O) or ``None``.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int,
        bias: bool = True,
        zero_init: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, num_experts=num_experts)
        self.zero_init = zero_init
        self.add("weight", nn.Parameter(torch.empty(out_features, in_features)), num_experts)
        one_bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.add("bias", one_bias, num_experts)
        self.reset_parameters()

    @classmethod
    def like(cls, linear: Any, **options: Any) -> LinearExperts:
        """Experts of the sizes of one linear layer, drawn anew.

        Args:
            linear: torch's or PyG's.
            options: ``num_experts``, and as the class takes them.
        """
        out_features, in_features = linear.weight.shape
        return cls(in_features, out_features, bias=linear.bias is not None, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw each layer as ``nn.Linear`` does; of layers with a base, the base."""
        if next(self.parameters()).is_meta:  # there are no values
            return
        if self.zero_init:
            for parameter in self.parameters():
                parameter.zero_()
            return
        # One by one: nn.Linear's scale depends on the fan-in, which it would misread in a stacked
        # tensor.
        if self.names_with_base:
            become(self, self._drawn())
            return
        for expert in range(self.num_experts):
            fill(self, expert, self._drawn())

    def _drawn(self) -> dict[str, Tensor]:
        """The tensors of a new ``nn.Linear``."""
        like = next(self.parameters())
        return nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=like.device,
            dtype=like.dtype,
        ).state_dict()

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # with a base, a sum at each read
        if len(weight) == 1:  # all rows are this expert's
            # squeeze, not [0], whose backward pass would fill a whole weight with zeros.
            bias_O = None if bias is None else bias.squeeze(0)
            return F.linear(x_PI.to(weight.dtype), weight.squeeze(0), bias_O)
        if x_PI.dim() == 3:  # (E, P / E, I), as many rows of each: one product, torch's own
            x_PI = x_PI.to(weight.dtype)
            if bias is None:
                return torch.bmm(x_PI, weight.mT)
            return torch.baddbmm(bias[:, None], x_PI, weight.mT)
        return grouped_linear(x_PI, weight.mT, bias, offsets_E)


class MLPExperts(Experts):
    r"""A two-layer MLP per expert, :math:`f_e(x) = \phi(x W_e + b_e) V_e + c_e`.

    With ``glu`` the first layer is twice as wide and gates itself: :math:`\phi(g) \odot u` with
    :math:`[g, u] = x W_e + b_e` (`Shazeer, 2020 <https://arxiv.org/abs/2002.05202>`_).

    You may replace its parts: ``up`` and ``down`` by anything that is called with ``(rows (P, I),
    offsets (E,))``, such as LoRA or quantized layers; the dropouts and norms by any module.

    Args:
        in_features: I.
        hidden_features: H.
        out_features: O.
        num_experts: E.
        activation: an elementwise function or module, or the name of one in ``torch.nn.functional``
            (default ``"gelu"``).
        glu: gate the hidden layer (default ``False``).
        dropout: probability of dropping a hidden unit, and an output; or the two of them (default
            0).
        bias: learn biases (default ``True``); or of the first layer and of the second.
        input_norm: a module on the rows (P, I) before the first layer (default ``None``). All
            experts share it, so it should have no parameters: an expert's own scale and shift can
            be part of its next layer.
        hidden_norm: the same on the hidden rows (P, H), before the second layer.
        zero_init: start the second layer at zero, so that the experts add nothing to a shared
            expert at first (default ``False``). Only that layer gets a gradient in the first step;
            from the second step on all parameters do.

    Raises:
        ValueError: an unknown activation; a size below 1; dropout outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        num_experts: int,
        activation: Activation = "gelu",
        glu: bool = False,
        dropout: float | tuple[float, float] = 0.0,
        bias: bool | tuple[bool, bool] = True,
        input_norm: nn.Module | None = None,
        hidden_norm: nn.Module | None = None,
        zero_init: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, num_experts=num_experts)
        check_counts(hidden_features=hidden_features)
        function: Any = activation
        if isinstance(activation, str):
            function = getattr(F, activation, None)
        legal = "a function, or a name in torch.nn.functional"
        check(callable(function), "activation", repr(activation), legal)
        self.hidden_features = hidden_features
        self.activation: Callable[[Tensor], Tensor] = function
        self.glu = glu
        linear = partial(LinearExperts, num_experts=num_experts)
        of_up, of_down = bias if isinstance(bias, tuple) else (bias, bias)
        self.up = linear(in_features, 2 * hidden_features if glu else hidden_features, bias=of_up)
        self.down = linear(hidden_features, out_features, bias=of_down, zero_init=zero_init)
        hidden, output = dropout if isinstance(dropout, tuple) else (dropout, dropout)
        self.hidden_dropout = nn.Dropout(hidden)
        self.output_dropout = nn.Dropout(output)
        self.input_norm = input_norm or nn.Identity()
        self.hidden_norm = hidden_norm or nn.Identity()

    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        self.down.reset_parameters()

    def rows(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        u_PU = self.up(self.input_norm(x_PI), offsets_E)
        if self.glu:
            half = u_PU.size(-1) // 2
            # Slices, not chunks: an activation may overwrite its input.
            h_PH = self.activation(u_PU[..., :half]) * u_PU[..., half:]
        else:
            h_PH = self.activation(u_PU)
        h_PH = self.hidden_norm(self.hidden_dropout(h_PH))
        y_PO: Tensor = self.output_dropout(self.down(h_PH, offsets_E))
        return y_PO
