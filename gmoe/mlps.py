"""Forms of dense MLPs, and experts of such a form.

Shapes: T tokens, I in, H hidden features of an MLP, O out features of a linear layer, U columns of
the first layers (H, or 2 H if the MLP is gated).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check
from gmoe._torch import parameter_names
from gmoe.experts import MLPExperts
from gmoe.products import Backend
from gmoe.stack import become

Function: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class MLPForm:
    r"""The parts of an MLP by their roles: :math:`y = V\, n(\phi(W\, m(x) + b)) + c`.

    An MLP is gated if its first layers have twice as many columns as the last one takes. Then
    :math:`\phi(g) \odot u` is in the place of :math:`\phi`, where :math:`g` and :math:`u` are the
    two halves of the columns.

    Args:
        ups: the first linear layer, or two side by side.
        down: the last linear layer.
        activation: of the hidden layer, or of its gate.
        gate_is_second: the gate is the second half of the columns (default ``False``: the first).
        input_norm: on the features of a token, before the first layer (default ``None``).
        hidden_norm: the same before the last layer (default ``None``).
        hidden_dropouts: behind the activation (default none).
        output_dropouts: behind the last layer (default none).

    Raises:
        ValueError: no first layer, or more than two.
    """

    ups: Sequence[nn.Linear]
    down: nn.Linear
    activation: Function
    _: KW_ONLY
    gate_is_second: bool = False
    input_norm: nn.Module | None = None
    hidden_norm: nn.Module | None = None
    hidden_dropouts: Sequence[nn.Module] = ()
    output_dropouts: Sequence[nn.Module] = ()

    def __post_init__(self) -> None:
        count = len(self.ups)
        check(count in (1, 2), "ups", f"{count} layers", "one, or two side by side")

    @property
    def width(self) -> int:
        """I, the features of a token."""
        return self.ups[0].in_features

    @property
    def glu(self) -> bool:
        """True for a gated MLP."""
        columns = sum(up.out_features for up in self.ups)
        return columns == 2 * self.down.in_features

    @property
    def dropout(self) -> tuple[float, float]:
        """The probabilities of dropping a hidden unit, and an output."""
        return _rate(self.hidden_dropouts), _rate(self.output_dropouts)

    def first_layer(self) -> tuple[Tensor, Tensor]:
        """(U, I) weight and (U,) bias, the gate first, with the scale and shift of the norm."""
        weight, bias = _folded(self.ups, self.input_norm)
        if not self.gate_is_second:
            return weight, bias
        # The gate of an expert is the first half: swap the halves.
        half = len(weight) // 2
        weight = weight.roll(half, dims=0)
        bias = bias.roll(half, dims=0)
        return weight, bias

    def last_layer(self) -> tuple[Tensor, Tensor]:
        """(O, H) weight and (O,) bias, with the scale and shift of the norm."""
        return _folded([self.down], self.hidden_norm)

    def output(self, x: Tensor) -> Tensor:
        """(T, O) what an expert of this form gives for rows (T, I).

        It has the MLP's own dropouts, and the weights that an expert will have.
        """
        # As an expert sees only its own rows, no part of the MLP sees all of them.
        rows = _apart(_bare(self.input_norm), x)
        u_TU = F.linear(rows, *self.first_layer())
        if self.glu:
            gate_TH, value_TH = u_TU.chunk(2, dim=-1)
            h_TH = _apart(self.activation, gate_TH) * value_TH
        else:
            h_TH = _apart(self.activation, u_TU)
        h_TH = nn.Sequential(*self.hidden_dropouts)(h_TH)
        h_TH = _apart(_bare(self.hidden_norm), h_TH)
        y_TO = F.linear(h_TH, *self.last_layer())
        return nn.Sequential(*self.output_dropouts)(y_TO)

    @torch.no_grad()
    def experts(
        self, num_experts: int, upcycle: bool, zero_init: bool, backend: Backend
    ) -> MLPExperts:
        """Build experts of this form.

        Args:
            num_experts: E.
            upcycle: copy the MLP; ``False`` draws the experts anew.
            zero_init: start the last layer at zero.
            backend: see :func:`gmoe.grouped_linear`.
        """
        up_weight, up_bias = self.first_layer()
        down_weight, down_bias = self.last_layer()
        up_has_bias = _have_bias(*self.ups, self.input_norm)
        down_has_bias = _have_bias(self.down, self.hidden_norm)
        experts = MLPExperts(
            up_weight.size(1),
            down_weight.size(1),
            len(down_weight),
            num_experts=num_experts,
            activation=copy.deepcopy(self.activation),
            glu=self.glu,
            dropout=self.dropout,
            bias=(up_has_bias, down_has_bias),
            input_norm=_bare(self.input_norm),
            hidden_norm=_bare(self.hidden_norm),
            zero_init=zero_init,
            backend=backend,
        )
        # The dtype and the device of a parameter: a parametrization may compute in another one.
        parameter = next(self.ups[0].parameters())
        experts.to(parameter.detach())
        if upcycle:
            become(experts.up, {"weight": up_weight, "bias": up_bias})
            if not zero_init:
                become(experts.down, {"weight": down_weight, "bias": down_bias})
        return experts


Read: TypeAlias = Callable[[Any], MLPForm]
"""Gives the form of an MLP."""

READERS: dict[type[nn.Module], Read] = {}
"""How the MLPs of registered classes are read."""

MLP = TypeVar("MLP", bound=nn.Module)


def register(mlp_class: type[MLP], read: Callable[[MLP], MLPForm]) -> None:
    """Say how :func:`gmoe.moefy` reads the MLPs of a class, and of classes that inherit from it.

    The form is verified like any other: an MLP that computes something else is refused.

    Args:
        mlp_class: the class of the MLP.
        read: names the parts of such an MLP by their roles, its dropouts too.

    Raises:
        ValueError: no class of modules, or no function.

    Example:
        >>> from gmoe.mlps import MLPForm, register
        >>> register(SineMLP, lambda mlp: MLPForm([mlp.fc1], mlp.fc2, torch.sin))
    """
    is_class = isinstance(mlp_class, type) and issubclass(mlp_class, nn.Module)
    check(is_class, "mlp_class", repr(mlp_class), "a class of modules")
    check(callable(read), "read", repr(read), "a function that takes an MLP and gives its MLPForm")
    READERS[mlp_class] = read


def registered(mlp: nn.Module) -> Read | None:
    """Return the function that reads an MLP's class, or one of its bases, if there is one."""
    for mlp_class in type(mlp).__mro__:
        if mlp_class in READERS:
            return READERS[mlp_class]
    return None


def _apart(part: Function, rows: Tensor) -> Tensor:
    """What a part gives for the first three rows, and for the others, which do not see them."""
    # Trials have four tokens in a row: the cut is not where a dimension ends.
    first, others = rows.tensor_split([3])
    # Copies: a part may work in place.
    outputs = [part(first.clone()), part(others.clone())]
    return torch.cat(outputs)


def _have_bias(*parts: nn.Module | None) -> bool:
    """True if one of these layers and norms adds a bias."""
    return any(getattr(part, "bias", None) is not None for part in parts)


def _rate(dropouts: Sequence[Any]) -> float:
    """The probability that at least one of several dropouts in a row drops a number."""
    return 1.0 - math.prod(1.0 - dropout.p for dropout in dropouts)


def _folded(linears: Sequence[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(O, I) weight and (O,) bias of linear layers side by side, with the norm before them.

    The norm's scale and shift become part of the weight and the bias.
    """
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    for linear in linears:
        # Read once: a parametrized weight is computed at each access, and some change by it.
        weight = linear.weight
        no_bias = weight.new_zeros(len(weight))
        weights.append(weight)
        biases.append(no_bias if linear.bias is None else linear.bias)
    # One layer is not copied: it may be large.
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = torch.cat(biases)
    scale = getattr(norm, "weight", None)
    shift = getattr(norm, "bias", None)
    if shift is not None:  # before the weight is scaled
        bias = bias + weight @ shift
    if scale is not None:
        weight = weight * scale
    return weight, bias


def _bare(norm: nn.Module | None) -> nn.Module:
    """A copy of a norm without scale and shift, which are part of the layer that follows."""
    if norm is None:
        return nn.Identity()
    bare = copy.deepcopy(norm)
    for parameter in parameter_names(bare):
        bare.register_parameter(parameter, None)
    return bare
