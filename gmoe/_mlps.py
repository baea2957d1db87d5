"""Read a dense MLP by what it computes: its linear layers, activation, norms and dropouts, in the order of their calls.

Shapes: I in, H hidden features of an MLP, O out features of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check
from gmoe.dispatch import Backend
from gmoe.experts import MLPExperts

LEGAL = (
    "linear layers with one activation without parameters between them, gated or not, at most a norm before each, and "
    "dropouts behind the activation and at the end; there are no experts of convolutions: name MLPs by `targets`"
)


@dataclass(frozen=True, eq=False)
class Call:
    """A part of an MLP that was called, with what it got and gave."""

    part: Any
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class DenseMLP:
    """The parts of an MLP by the roles that they play.

    Args:
        ups: the first linear layer; or two side by side, the gate first.
        down: the last linear layer.
        activation: of the hidden layer, or of its gate.
        glu: the activation gates the hidden layer.
        gate_is_second_half: of a single first layer that is twice as wide, the second half is the gate.
        input_norm: before the first layer, or ``None``.
        hidden_norm: before the last layer, or ``None``.
        dropout: probabilities of dropping a hidden unit, and an output.
    """

    ups: Sequence[nn.Linear]
    down: nn.Linear
    activation: Callable[[Tensor], Tensor]
    glu: bool
    gate_is_second_half: bool
    input_norm: nn.Module | None
    hidden_norm: nn.Module | None
    dropout: tuple[float, float]

    @torch.no_grad()
    def experts(self, num_experts: int, upcycle: bool, zero_init: bool, backend: Backend) -> MLPExperts:
        """Experts of this form, drawn afresh or as copies of the MLP; with ``zero_init`` but for the last layer."""
        up_weight, up_bias = _folded(self.ups, self.input_norm)
        down_weight, down_bias = _folded([self.down], self.hidden_norm)
        if self.gate_is_second_half:  # an expert's gate is the first half
            up_weight = up_weight.roll(len(up_weight) // 2, dims=0)
            up_bias = up_bias.roll(len(up_bias) // 2, dims=0)
        with_bias = [*self.ups, self.down, self.input_norm, self.hidden_norm]
        experts = MLPExperts(
            up_weight.size(1),
            down_weight.size(1),
            len(down_weight),
            num_experts,
            activation=copy.deepcopy(self.activation),
            glu=self.glu,
            dropout=self.dropout,
            bias=any(getattr(part, "bias", None) is not None for part in with_bias),
            input_norm=_without_parameters(self.input_norm),
            hidden_norm=_without_parameters(self.hidden_norm),
            zero_init=zero_init,
            backend=backend,
        )
        experts.to(down_weight)
        if upcycle:
            experts.up.copy_(slice(None), up_weight.T, up_bias)
            if not zero_init:
                experts.down.copy_(slice(None), down_weight.T, down_bias)
        return experts


def read_mlp(name: str, mlp: nn.Module) -> DenseMLP:
    """Find out which part of an MLP plays which role, by running it once on random tokens.

    What counts is the order in which the parts are called, not the order in which they are registered; of a gated MLP
    the gate is found by the numbers. Hooks that somebody put on the MLP see these tokens.

    Args:
        name: of the MLP in its model, for errors.
        mlp: the module, which is left as it is.

    Raises:
        ValueError: a module that does not run on tokens alone, or that is not linear, activation, linear.
    """
    got = f"{name}, a {type(mlp).__name__} of ({', '.join(type(part).__name__ for part in _parts(mlp))})"
    calls = _trial_calls(got, mlp)
    is_linear = [isinstance(call.part, nn.Linear) for call in calls]
    linears = [call for call in calls if isinstance(call.part, nn.Linear)]
    check(len(linears) in (2, 3), "model", got, LEGAL)
    first, last = is_linear.index(True), len(calls) - 1 - is_linear[::-1].index(True)
    ups, down = linears[:-1], linears[-1]

    before, between, after = calls[:first], calls[first + 1 : last], calls[last + 1 :]
    input_norms = [call.part for call in before if _is_norm(call.part)]
    hidden_norms = [call.part for call in between if _is_norm(call.part)]
    hidden_dropouts = [call.part.p for call in between if isinstance(call.part, nn.Dropout)]
    output_dropouts = [call.part.p for call in after if isinstance(call.part, nn.Dropout)]
    activations = [call for call in between if _is_activation(call.part)]

    # Nothing may be left over, such as a second activation, a norm at the end or a dropout of the input.
    is_whole = len(before) == len(input_norms) <= 1 and len(after) == len(output_dropouts)
    is_whole = is_whole and len(hidden_norms) <= 1 and len(activations) <= 1
    behind_ups = [call for call in between if call not in ups]
    is_whole = is_whole and behind_ups[: len(activations)] == activations
    check(is_whole, "model", got, LEGAL)
    widths = {call.output.size(-1) for call in ups}
    hidden = down.input.size(-1)
    glu = sum(call.output.size(-1) for call in ups) == 2 * hidden
    fits = glu or (len(ups) == 1 and widths == {hidden})
    are_once = len({call.part for call in linears}) == len(linears)
    check(fits and are_once and len(widths) == 1, "model", got, LEGAL)

    activation = _activation(got, mlp, activations, glu)
    gate_is_second = glu and _gate_is_second(calls, ups, activations, activation)
    ordered = [call.part for call in (reversed(ups) if gate_is_second else ups)]
    return DenseMLP(
        ups=ordered,
        down=down.part,
        activation=activation,
        glu=glu,
        gate_is_second_half=gate_is_second and len(ups) == 1,
        input_norm=input_norms[0] if input_norms else None,
        hidden_norm=hidden_norms[0] if hidden_norms else None,
        dropout=(sum(hidden_dropouts), sum(output_dropouts)),
    )


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers, norms, dropouts and activations inside a module, at any depth."""
    for child in module.children():
        is_known = isinstance(child, nn.Linear | nn.Dropout) or _is_norm(child)
        is_container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        opens = is_container or (any(True for _ in child.children()) and any(True for _ in child.parameters()))
        if isinstance(child, nn.Identity):
            continue
        if opens and not is_known:
            yield from _parts(child)
        else:
            yield child


def _is_norm(part: nn.Module) -> bool:
    return hasattr(part, "normalized_shape")


def _is_activation(part: nn.Module) -> bool:
    return not isinstance(part, nn.Linear | nn.Dropout) and not _is_norm(part)


@torch.no_grad()
def _trial_calls(got: str, mlp: nn.Module) -> list[Call]:
    """The parts in the order of their calls, when the MLP runs on a few random tokens."""
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    check(linears, "model", got, LEGAL)
    failures = []
    # By their shapes alone, of two linear layers I x H and H x I either could be the first: try the width of each.
    for width in dict.fromkeys(linear.in_features for linear in linears):
        weight = linears[0].weight
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(2, 3, width, generator=generator).to(weight)
        calls: list[Call] = []
        try:
            with ExitStack() as stack:
                devices = [weight.device] if weight.is_cuda else []
                stack.enter_context(torch.random.fork_rng(devices=devices))
                for part in dict.fromkeys(_parts(mlp)):
                    stack.callback(part.register_forward_hook(_recorder(calls)).remove)
                mlp(tokens)
        except Exception as error:  # whatever a user's module raises
            failures.append(f"{type(error).__name__}: {error}")
            continue
        return calls
    raise ValueError(f"model: got {got}, which fails on tokens alone ({failures[0]}), expected {LEGAL}")


def _recorder(calls: list[Call]) -> Callable[..., None]:
    """A forward hook that notes a call, with copies: an activation may work in place."""

    def record(part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls.append(Call(part, inputs[0].clone(), output.clone()))

    return record


def _activation(got: str, mlp: nn.Module, called: Sequence[Call], glu: bool) -> Callable[[Tensor], Tensor]:
    """The activation: a part that was called, a function that the MLP holds, or a gated one's SiLU."""
    if called:
        part = called[0].part
        check(not any(True for _ in part.parameters()), "model", got, LEGAL)
        return torch.sigmoid if isinstance(part, nn.GLU) else part
    functions = [vars(mlp)[name] for name in ("act", "activation", "act_fn") if name in vars(mlp)]
    if not functions and glu:
        return F.silu  # Llama's MLP calls it by itself
    check(len(functions) == 1, "model", got, LEGAL)
    return functions[0]


def _gate_is_second(
    calls: Sequence[Call], ups: Sequence[Call], activations: Sequence[Call], activation: Callable[[Tensor], Tensor]
) -> bool:
    """True if the second of a gated MLP's two hidden rows is the gate: tried on the numbers of the trial."""
    last = max(calls.index(call) for call in (*ups, *activations))
    product = calls[last + 1].input  # what the part after the gate gets: a norm, a dropout or the last layer
    if isinstance(activations[0].part if activations else None, nn.GLU):
        product = activations[0].output
    outputs = [call.output for call in ups]
    rows = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)

    def is_gate(gate: Tensor, other: Tensor) -> bool:
        gated = activation(gate.clone()) * other
        return gated.shape == product.shape and torch.allclose(gated, product, rtol=1e-2, atol=1e-3)

    # The first is the gate where neither fits: without a shared expert such an MLP is refused, since it is tried whole.
    return is_gate(rows[1], rows[0]) and not is_gate(rows[0], rows[1])


def _folded(linears: Sequence[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(O, I) weight and (O,) bias of linear layers side by side, with the scale and shift of the norm before them."""
    weight = torch.cat([part.weight for part in linears])
    biases: list[Tensor] = [weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in linears]
    bias = torch.cat(biases)
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if shift is not None:
        bias = bias + weight @ shift
    if scale is not None:
        weight = weight * scale
    return weight, bias


def _without_parameters(norm: nn.Module | None) -> nn.Module | None:
    """A copy of a norm without scale and shift, which are folded into the layer that follows."""
    if norm is None:
        return None
    bare = copy.deepcopy(norm)
    for parameter in list(bare._parameters):
        bare.register_parameter(parameter, None)
    return bare
