"""Stacked experts. Shapes: E experts, P pairs sorted by expert, I in, H hidden, O out features."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check_choice, check_count, check_probability
from gmoe.dispatch import Backend, dispatch, grouped_linear, resolve_backend
from gmoe.routed_linear import routed_linear
from gmoe.routed_mlp import routed_mlp
from gmoe.routing import Routing

Activation: TypeAlias = str | Callable[[Tensor], Tensor]


def _gelu_tanh(u: Tensor) -> Tensor:
    return F.gelu(u, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "identity": torch.positive,
    "leaky_relu": F.leaky_relu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

PURE = frozenset(
    {nn.ELU, nn.GELU, nn.Hardswish, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU, nn.Tanh}
)
"""Modules that may be applied twice: no parameters, no chance."""


class Experts(nn.Module, ABC):
    """E functions of the same shape, run on pairs sorted by expert: ``experts(x (P, I), offsets (E,)) -> (P, O)``.

    Args:
        in_features: I.
        out_features: O.
        num_experts: E.
    """

    def __init__(self, in_features: int, out_features: int, num_experts: int) -> None:
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        check_count("num_experts", num_experts)
        self.in_features = in_features
        self.out_features = out_features
        self.num_experts = num_experts

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""

    @abstractmethod
    def forward(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        """Run expert ``e`` on the rows ``offsets[e - 1]:offsets[e]``."""

    def mix(self, x_TI: Tensor, routing: Routing) -> Tensor:
        r"""(T, O) the mixture :math:`y_t = \sum_e w_{te} f_e(x_t)`; subclasses may know a faster way."""
        return dispatch(x_TI, routing, self)

    def _is_plain(self, cls: type[Experts]) -> bool:
        """Whether nothing would notice that :meth:`forward` is passed over: it is that of ``cls``, and has no hooks."""
        if type(self).forward is not cls.forward:
            return False
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return not any(
            "forward" in module.__dict__ or any(getattr(module, name) for name in hooks) for module in self.modules()
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, num_experts={self.num_experts}"


class LinearExperts(Experts):
    """One linear layer per expert, initialised as E separate ``nn.Linear`` are.

    Args:
        in_features: I.
        out_features: O.
        num_experts: E.
        bias: learn a bias per expert (default ``True``).
        backend: see :func:`gmoe.dispatch.grouped_linear` (default ``"auto"``).

    Attributes:
        weight: (E, I, O).
        bias: (E, O) or ``None``.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, num_experts: int, *, bias: bool = True, backend: Backend = "auto"
    ) -> None:
        super().__init__(in_features, out_features, num_experts)
        check_choice("backend", backend, get_args(Backend))
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for expert in range(self.num_experts):  # a stacked tensor would have another fan-in
            linear = nn.Linear(
                self.in_features,
                self.out_features,
                bias=self.bias is not None,
                device=self.weight.device,
                dtype=self.weight.dtype,
            )
            self.weight[expert] = linear.weight.T
            if self.bias is not None:
                self.bias[expert] = linear.bias

    def forward(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        return grouped_linear(x_PI, self.weight, self.bias, offsets_E, self.backend)

    def mix(self, x_TI: Tensor, routing: Routing) -> Tensor:
        if not self._is_plain(LinearExperts):
            return super().mix(x_TI, routing)
        return routed_linear([x_TI], self.weight, self.bias, routing, self.backend)


class MLPExperts(Experts):
    r"""A two-layer perceptron per expert, :math:`f_e(x) = \phi(x W_e + b_e) V_e + c_e`.

    With ``glu`` the first layer is twice as wide and gates itself: :math:`\phi(g) \odot u` with
    :math:`[g, u] = x W_e + b_e` (Shazeer, 2020).

    Args:
        in_features: I.
        hidden_features: H.
        out_features: O.
        num_experts: E.
        activation: a name (``"gelu"`` is the default; also elu, gelu_tanh, identity, leaky_relu, relu, silu, tanh) or
            an elementwise function of a tensor. Of a module that works in place, a copy that does not is taken: what
            it would overwrite is needed for the gradient.
        glu: gate the hidden layer (default ``False``).
        dropout: probability of dropping a hidden unit, and an output; or the two of them (default 0).
        bias: learn biases (default ``True``).
        backend: see :func:`gmoe.dispatch.grouped_linear` (default ``"auto"``).

    Raises:
        ValueError: an unknown activation or backend; a size below 1; dropout outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        num_experts: int,
        *,
        activation: Activation = "gelu",
        glu: bool = False,
        dropout: float | tuple[float, float] = 0.0,
        bias: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(in_features, out_features, num_experts)
        check_count("hidden_features", hidden_features)
        if isinstance(activation, str):
            check_choice("activation", activation, ACTIVATIONS)
        of_hidden, of_output = dropout if isinstance(dropout, tuple) else (dropout, dropout)
        for probability in (of_hidden, of_output):
            check_probability("dropout", probability)
        self.hidden_features = hidden_features
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else _out_of_place(activation)
        self.glu = glu
        width = 2 * hidden_features if glu else hidden_features
        self.up = LinearExperts(in_features, width, num_experts, bias=bias, backend=backend)
        self.down = LinearExperts(hidden_features, out_features, num_experts, bias=bias, backend=backend)
        self.hidden_dropout = nn.Dropout(of_hidden)
        self.output_dropout = nn.Dropout(of_output)

    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        h_PH = self._activate(self.up(x_PI, offsets_E))
        return self.output_dropout(self.down(self.hidden_dropout(h_PH), offsets_E))

    def mix(self, x_TI: Tensor, routing: Routing) -> Tensor:
        loop = all(resolve_backend(part.backend, x_TI) == "loop" for part in (self.up, self.down))
        pure = self.activation in ACTIVATIONS.values() or type(self.activation) in PURE
        drops = self.training and max(self.hidden_dropout.p, self.output_dropout.p) > 0
        if not loop or not pure or drops or not self._is_plain(MLPExperts):
            return super().mix(x_TI, routing)
        up, down = self.up, self.down
        activation = self._activate if self.glu else self.activation
        return routed_mlp(x_TI, up.weight, up.bias, down.weight, down.bias, activation, routing)

    def _activate(self, u: Tensor) -> Tensor:
        if not self.glu:
            return self.activation(u)
        gate, u = u.chunk(2, dim=-1)
        return self.activation(gate) * u

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.hidden_features}, {self.out_features}, num_experts={self.num_experts}"


def _out_of_place(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation itself, or where it works in place a copy that does not."""

    def in_place(module: nn.Module) -> list[Any]:
        return [part for part in module.modules() if getattr(part, "inplace", False)]

    if not isinstance(activation, nn.Module) or not in_place(activation):
        return activation
    activation = copy.deepcopy(activation)
    for part in in_place(activation):
        part.inplace = False
    return activation
