"""Forms of dense MLPs by their class, and experts of such a form.

Shapes: T tokens, I in, H hidden features of an MLP, O out features of a linear layer, U columns of
the first layers (H, or 2 H if the MLP is gated).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check, is_linear
from gmoe._torch import parameter_names
from gmoe._verify import Sieve, is_dropout
from gmoe.experts import LinearExperts, MLPExperts
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
        activation: of the hidden layer, or of its gate, without parameters.
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
    def layers(self) -> list[nn.Module]:
        """The parts that experts have, of which they take the parameters."""
        norms = [norm for norm in (self.input_norm, self.hidden_norm) if norm is not None]
        return [*self.ups, self.down, *norms]

    @property
    def width(self) -> int:
        """I, the features of a token."""
        return _widths(self.ups[0])[0]

    @property
    def glu(self) -> bool:
        """True for a gated MLP."""
        columns = sum(_widths(up)[1] for up in self.ups)
        return columns == 2 * _widths(self.down)[0]

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

    def take(self, name: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the tensors of an expert that :meth:`experts` built, back into the layers.

        Args:
            name: of the MLP in its model, for errors.
            tensors: of each linear layer of the expert, by its path and their names.
        """
        half = self.down.weight.size(1) if self.gate_is_second else 0
        of_up = {key: value.roll(half, dims=0) for key, value in tensors["up"].items()}
        _unfold(name, self.ups, self.input_norm, of_up)
        _unfold(name, [self.down], self.hidden_norm, tensors["down"])

    def output(self, x: Tensor) -> Tensor:
        """(T, O) what an expert of this form gives for rows (T, I).

        It has the MLP's own dropouts, and the weights that an expert will have.
        """
        u_TU = F.linear(_bare(self.input_norm)(x), *self.first_layer())
        if self.glu:
            gate_TH, value_TH = u_TU.chunk(2, dim=-1)
            # A copy: an activation in place may not write to one of two views.
            h_TH = self.activation(gate_TH.clone()) * value_TH
        else:
            h_TH = self.activation(u_TU)
        h_TH = nn.Sequential(*self.hidden_dropouts)(h_TH)
        h_TH = _bare(self.hidden_norm)(h_TH)
        y_TO = F.linear(h_TH, *self.last_layer())
        return nn.Sequential(*self.output_dropouts)(y_TO)

    @torch.no_grad()
    def experts(self, num_experts: int, copied: bool, zero_init: bool) -> MLPExperts:
        """Build experts of this form.

        Args:
            num_experts: E.
            copied: copy the MLP; ``False`` draws the experts anew.
            zero_init: start the last layer at zero.
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
        )
        # The dtype and the device of a parameter: a parametrization may compute in another one.
        parameter = next(self.ups[0].parameters())
        experts.to(parameter.detach())
        if copied:
            become(experts.up, {"weight": up_weight, "bias": up_bias})
            if not zero_init:
                become(experts.down, {"weight": down_weight, "bias": down_bias})
        return experts


@dataclass(frozen=True, eq=False)
class LinearForm:
    """A single linear layer, as :class:`MLPForm` has those of MLPs.

    Args:
        linear: torch's or PyG's.
    """

    linear: Any

    @property
    def layers(self) -> list[nn.Module]:
        """The parts that experts have: see :attr:`MLPForm.layers`."""
        return [self.linear]

    @property
    def width(self) -> int:
        """I, the features of a token."""
        return int(self.linear.weight.size(1))

    def output(self, x: Tensor) -> Tensor:
        """(T, O) what an expert gives for rows (T, I)."""
        return F.linear(x, self.linear.weight, self.linear.bias)

    def take(self, name: str, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the tensors of an expert; see :meth:`MLPForm.take`."""
        _unfold(name, [self.linear], None, tensors[""])

    @torch.no_grad()
    def experts(self, num_experts: int, copied: bool, zero_init: bool) -> LinearExperts:
        """Build experts of this form; see :meth:`MLPForm.experts`."""
        weight = self.linear.weight.detach()
        experts = LinearExperts.like(self.linear, num_experts=num_experts, zero_init=zero_init).to(
            weight
        )
        if copied and not zero_init:
            become(experts, {"weight": weight, "bias": self.linear.bias})
        return experts


# forms by class -----------------------------------------------------------------------------------

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


def _in_turn(parts: Sequence[Any], gate_is_second: bool = False) -> MLPForm | None:
    """The form of parts that act one after the other, two first layers side by side.

    ``None`` if experts have no place for one of them.
    """
    parts = [part for part in parts if not _does_nothing(part)]
    num_linears = sum(map(is_linear, parts))
    linears: list[nn.Linear] = []
    activations: list[Function] = []
    norms: dict[bool, nn.Module] = {}
    dropouts: dict[bool, list[nn.Module]] = {False: [], True: []}
    for part in parts:
        is_last = bool(linears) and len(linears) == num_linears
        if is_linear(part):
            linears.append(part)
        elif is_norm(part) and not is_last and bool(linears) not in norms:
            norms[bool(linears)] = part
        elif linears and (isinstance(part, Sieve) or is_dropout(part)):
            dropouts[is_last].append(part)
        elif linears and not is_last:
            activations.append(part)
        else:
            return None
    if num_linears not in (2, 3) or len(activations) > 1:
        return None
    activation = activations[0] if activations else nn.Identity()
    if isinstance(activation, nn.GLU):  # a gated layer in itself
        activation, gate_is_second = torch.sigmoid, True
    *ups, down = linears
    return MLPForm(
        ups,
        down,
        activation,
        gate_is_second=gate_is_second,
        input_norm=norms.get(False),
        hidden_norm=norms.get(True),
        hidden_dropouts=dropouts[False],
        output_dropouts=dropouts[True],
    )


def _does_nothing(part: object) -> bool:
    """True for an identity, and for a dropout that drops nothing."""
    return isinstance(part, nn.Identity) or (isinstance(part, nn.Dropout | Sieve) and part.p == 0.0)


def is_norm(part: object) -> bool:
    """True for a norm of each token; one of more dimensions mixes them."""
    return len(getattr(part, "normalized_shape", ())) == 1


ACT = ("act", "act_fn", "activation", "activation_fn", "intermediate_act_fn")
"""Where MLPs keep their activation, a module or a function."""


def _named(words: str, function: Function | None = None) -> Callable[[Any], MLPForm | None]:
    """Read MLPs by the names of their parts, in the order in which they act.

    A part that an MLP lacks is left out; an MLP with another part is not read.

    Args:
        words: the names; ``act`` is any of :data:`ACT`.
        function: the activation of MLPs that call it as a function (default none).
    """

    def read(mlp: nn.Module) -> MLPForm | None:
        names: list[str] = []
        for word in words.split():
            names += ACT if word == "act" else [word]
        parts = [getattr(mlp, name) for name in names if callable(getattr(mlp, name, None))]
        if any(part not in parts for part in mlp.children() if not _does_nothing(part)):
            return None
        if function is not None:
            parts.insert(-1, function)
        return _in_turn(parts, getattr(mlp, "gate_last", False))

    return read


def _sequential(mlp: nn.Sequential) -> MLPForm | None:
    """Read what calls its parts in turn, at any depth."""
    return _in_turn([*_unpacked(mlp)])


def _unpacked(mlp: nn.Sequential) -> Iterator[Any]:
    for part in mlp:
        if type(part) is nn.Sequential:
            yield from _unpacked(part)
        elif is_first_half(part):
            names = ("dense", "intermediate_act_fn", "dropout")
            yield from (getattr(part, name) for name in names if hasattr(part, name))
        else:
            yield part


def is_first_half(part: Any) -> bool:
    """True for the half of a Hugging Face MLP that ends in the activation."""
    is_theirs = type(part).__module__.startswith("transformers.")
    return is_theirs and hasattr(part, "intermediate_act_fn") and is_linear(part.dense)


def _of_pyg(mlp: Any) -> MLPForm | None:
    """Read PyG's MLP of two layers, whose dropouts are numbers."""
    if len(mlp.lins) != 2 or not mlp.plain_last:
        return None
    act = mlp.act if mlp.act is not None else nn.Identity()
    between = [act, *mlp.norms] if mlp.act_first else [*mlp.norms, act]
    hidden, output = (nn.Dropout(rate).train(mlp.training) for rate in mlp.dropout)
    first, *others = mlp.lins
    return _in_turn([first, *between, hidden, *others, output])


OF_TRANSFORMERS = (
    "fc1 act fc2",
    "gate_proj up_proj gate_up_proj act dropout down_proj",
    "wi wi_0 wi_1 act dropout wo",
    "Wi act drop Wo",
    "dense_h_to_4h act dense_4h_to_h",
    "fc_in c_fc act fc_out c_proj dropout",
    "lin1 act lin2 dropout",
    "linear1 act linear2",
    "linear_fc1 act linear_fc2",
    "dense1 act dropout dense2 dropout",
    "intermediate_dense act intermediate_dropout output_dense output_dropout",
)
"""The parts of MLPs of Hugging Face's models, see :func:`_named`."""

TABLE: tuple[tuple[str, Callable[[Any], MLPForm | None]], ...] = (
    ("torch.nn.modules.container.Sequential", _sequential),  # torchvision's MLP inherits from it
    ("torch_geometric.nn.models.mlp.MLP", _of_pyg),
    ("timm.layers.mlp.*", _named("fc1 fc1_g fc1_x act drop1 norm fc2 drop2")),
    ("timm.models.vitamin.GeGluMlp", _named("norm w0 w1 act drop1 w2 drop2")),
    ("timm.models.tiny_vit.NormMlp", _named("norm fc1 act drop1 fc2 drop2")),
    ("*.Mlp", _named("fc1 act drop fc2 drop")),  # DINO's, MAE's, Swin's own code
    *(("transformers*", _named(words)) for words in OF_TRANSFORMERS),
    ("transformers*", _named("w1 w3 w2", F.silu)),
)
"""How MLPs are read, by the path of their class or of one that it inherits from."""


def form_of_class(mlp: nn.Module) -> MLPForm | LinearForm | None:
    """The form that an MLP has by its class: as registered, else as in the table."""
    if is_linear(mlp):
        return LinearForm(mlp)
    for mlp_class in type(mlp).__mro__:
        if mlp_class in READERS:
            form = READERS[mlp_class](mlp)
            got = f"{form!r} for a {type(mlp).__name__}"
            check(isinstance(form, MLPForm), "read", got, "an MLPForm")
            return form
        path = f"{mlp_class.__module__}.{mlp_class.__qualname__}"
        for pattern, read in TABLE:
            found = read(mlp) if fnmatchcase(path, pattern) else None
            if found is not None:
                return found
    return None


# the weights of a form ----------------------------------------------------------------------------


def _widths(linear: Any) -> tuple[int, int]:
    """The columns that a linear layer takes, and those that it gives; PyG's has other names."""
    is_torch = isinstance(linear, nn.Linear)
    names = ("in_features", "out_features") if is_torch else ("in_channels", "out_channels")
    return getattr(linear, names[0]), getattr(linear, names[1])


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


def _unfold(
    name: str, linears: Sequence[Any], norm: nn.Module | None, tensors: Mapping[str, Tensor]
) -> None:
    """Give linear layers side by side their rows of what :func:`_folded` made of them.

    The norm before them scales and shifts no more: that is a part of these tensors.
    """
    like = tensors["weight"]
    for key, value in tensors.items():
        for linear, rows in zip(linears, value.chunk(len(linears)), strict=True):
            got = f"{name}, a layer without a {key} behind a norm that shifts"
            legal = f"a {key} in the dense layer before moefy: its experts have learned one"
            check(getattr(linear, key) is not None, "model", got, legal)
            setattr(linear, key, nn.Parameter(rows.clone()))
    for key, value in (norm or nn.Identity()).named_parameters():
        filled = torch.full_like(value, key == "weight", dtype=like.dtype, device=like.device)
        setattr(norm, key, nn.Parameter(filled))


def _bare(norm: nn.Module | None) -> nn.Module:
    """A copy of a norm without scale and shift, which are part of the layer that follows."""
    if norm is None:
        return nn.Identity()
    bare = copy.deepcopy(norm)
    for parameter in parameter_names(bare):
        bare.register_parameter(parameter, None)
    return bare
