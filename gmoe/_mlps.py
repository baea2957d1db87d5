"""Read a dense MLP by what it computes: its linear layers, activation, norms and dropouts, in the
order of their calls.

Shapes: I in, H hidden features of an MLP, O out features of a linear layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check
from gmoe.dispatch import Backend
from gmoe.experts import MLPExperts

LEGAL = (
    "linear layers with one activation without parameters between them, gated or not, at most a norm before each, and "
    "dropouts behind the activation and at the end; there are no experts of convolutions: name MLPs by `targets`; "
    "wrap layers (LoRA, quantization) after moefy, not before"
)

FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(
        F.silu,
        F.gelu,
        partial(F.gelu, approximate="tanh"),
        F.relu,
        torch.sigmoid,
        torch.tanh,
        nn.Identity(),
    ),
)
"""Activations that an MLP may call by itself; the one that gives its numbers is taken."""


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
        ups: the first linear layer, or two side by side.
        down: the last linear layer.
        activation: of the hidden layer, or of its gate.
        glu: the activation gates the hidden layer.
        gate_is_second: of the two layers, or of the halves of a single one, the second is the gate.
        input_norm: before the first layer, or ``None``.
        hidden_norm: before the last layer, or ``None``.
        dropout: probabilities of dropping a hidden unit, and an output.
        like: a weight of the MLP, of which experts take the type and the device.
    """

    ups: Sequence[nn.Linear]
    down: nn.Linear
    activation: Callable[[Tensor], Tensor]
    glu: bool
    gate_is_second: bool
    input_norm: nn.Module | None
    hidden_norm: nn.Module | None
    dropout: tuple[float, float]
    like: Tensor

    @torch.no_grad()
    def experts(
        self, num_experts: int, upcycle: bool, zero_init: bool, backend: Backend
    ) -> MLPExperts:
        """Experts of this form, drawn afresh or as copies of the MLP; with ``zero_init`` but for
        the last layer.
        """
        up_weight, up_bias = _folded(self.ups, self.input_norm)
        down_weight, down_bias = _folded([self.down], self.hidden_norm)
        if self.gate_is_second:  # an expert's gate is the first half
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
        experts.to(self.like)
        if upcycle:
            experts.up.copy_(slice(None), up_weight.T, up_bias)
            if not zero_init:
                experts.down.copy_(slice(None), down_weight.T, down_bias)
        return experts


def read_mlp(name: str, mlp: nn.Module) -> DenseMLP:
    """Find out which part of an MLP plays which role, by running a copy of it once on random
    tokens.

    What counts is the order in which the parts are called, not the order in which they are
    registered; the activation that an MLP calls by itself, and the gate of a gated one, are found
    by the numbers.

    Args:
        name: of the MLP in its model, for errors.
        mlp: the module, which is left as it is.

    Raises:
        ValueError: a module that does not run on tokens alone, or that is not linear, activation,
            linear.
    """
    got = f"{name}, a {type(mlp).__name__} of ({', '.join(type(part).__name__ for part in _parts(mlp))})"
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    check(linears, "model", got, LEGAL)
    like = next(
        linears[0].parameters()
    ).detach()  # its weight may be computed, and its norms move at each look
    with torch.no_grad(), _to_be_tried(mlp) as tried:
        calls = _trial_calls(got, tried)
        return _roles(got, tried, calls, like)


def _roles(got: str, mlp: nn.Module, calls: Sequence[Call], like: Tensor) -> DenseMLP:
    """The roles of the parts that were called, in that order."""
    is_linear = [isinstance(call.part, nn.Linear) for call in calls]
    linears = [call for call in calls if isinstance(call.part, nn.Linear)]
    once_each = len({call.part for call in linears}) == len(linears)
    check(len(linears) in (2, 3) and once_each, "model", got, LEGAL)
    first, last = is_linear.index(True), len(calls) - 1 - is_linear[::-1].index(True)
    ups, down = linears[:-1], linears[-1]

    before, between, after = calls[:first], calls[first:last], calls[last + 1 :]
    behind_ups = [call for call in between if call not in ups]
    activations = [call for call in behind_ups if _is_activation(call.part)]
    input_norms = [call.part for call in before if _is_norm(call.part)]
    hidden_norms = [call.part for call in behind_ups if _is_norm(call.part)]
    conditions = (
        # Nothing but a norm comes first, and nothing but dropouts last.
        len(before) == len(input_norms) <= 1,
        all(isinstance(call.part, nn.Dropout) for call in after),
        # The activation comes right behind the linear layers: a norm or a dropout would change its
        # input.
        len(activations) <= 1 and behind_ups[: len(activations)] == activations,
        len(hidden_norms) <= 1,
    )
    check(all(conditions), "model", got, LEGAL)

    widths = {call.output.size(-1) for call in ups}
    hidden = down.input.size(-1)
    glu = sum(call.output.size(-1) for call in ups) == 2 * hidden
    check(len(widths) == 1 and (glu or (len(ups) == 1 and widths == {hidden})), "model", got, LEGAL)
    activation, gate_is_second = _activation(got, mlp, calls, ups, activations, glu)
    return DenseMLP(
        ups=[call.part for call in ups],
        down=down.part,
        activation=activation,
        glu=glu,
        gate_is_second=gate_is_second,
        input_norm=input_norms[0] if input_norms else None,
        hidden_norm=hidden_norms[0] if hidden_norms else None,
        dropout=(_dropped(behind_ups), _dropped(after)),
        like=like,
    )


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers, norms, dropouts and activations inside a module, at any depth."""
    for child in module.children():
        if isinstance(child, nn.Identity):
            continue
        has_parts = any(True for _ in child.children())
        has_weights = any(True for _ in child.parameters())
        is_container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if isinstance(child, nn.Linear | nn.Dropout) or _is_norm(child):
            yield child
        elif is_container or (has_parts and has_weights):
            yield from _parts(child)
        else:  # an activation, or what no expert has
            yield child


def _is_norm(part: nn.Module) -> bool:
    return hasattr(part, "normalized_shape")


def _is_activation(part: nn.Module) -> bool:
    return not isinstance(part, nn.Linear | nn.Dropout) and not _is_norm(part)


@contextmanager
def _to_be_tried(mlp: nn.Module) -> Iterator[nn.Module]:
    """A copy to be run, in evaluation and in float64 on the CPU, without hooks but torch's own
    (pruning, weight norm).

    Of a module that cannot be copied, as torch's old weight norm makes, it is the module itself,
    whose buffers and modes are put back.
    """
    try:
        tried = copy.deepcopy(mlp).cpu().double().eval()
    except Exception:  # whatever a user's module, or a tensor of an own class, raises
        modes = {part: part.training for part in mlp.modules()}
        buffers = {buffer: buffer.clone() for buffer in mlp.buffers()}
        try:
            yield mlp.eval()
        finally:
            for part, training in modes.items():
                part.training = training
            for buffer, value in buffers.items():
                buffer.copy_(value)
        return
    for part in tried.modules():
        for table in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(table.items()):
                if not str(getattr(type(hook), "__module__", "")).startswith("torch."):
                    del table[key]
    yield tried


def _trial_calls(got: str, mlp: nn.Module) -> list[Call]:
    """The parts in the order of their calls, when the MLP runs on a few random tokens."""
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    # By their shapes alone, of two linear layers I x H and H x I either could be the first: try the
    # width of each.
    shapes = [
        (*rows, width)
        for width in dict.fromkeys(part.in_features for part in linears)
        for rows in ((2, 3), (6,))
    ]
    failures = []
    for shape in shapes:
        tokens = torch.randn(shape, device="cpu", generator=torch.Generator().manual_seed(0)).to(
            linears[0].weight
        )
        calls: list[Call] = []
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                for part in dict.fromkeys(_parts(mlp)):
                    hook = part.register_forward_hook(_recorder(calls), with_kwargs=True)
                    stack.callback(hook.remove)
                mlp(tokens)
        except Exception as error:  # whatever a user's module raises
            failures.append(f"{type(error).__name__}: {error}")
            continue
        return calls
    raise ValueError(
        f"model: got {got}, which fails on tokens alone ({failures[0]}), expected {LEGAL}"
    )


def _recorder(calls: list[Call]) -> Callable[..., None]:
    """A forward hook that notes a call, with copies: an activation may work in place."""

    def record(
        part: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        given = inputs[0] if inputs else next(iter(named.values()))
        calls.append(Call(part, given.clone(), output.clone()))

    return record


def _activation(
    got: str,
    mlp: nn.Module,
    calls: Sequence[Call],
    ups: Sequence[Call],
    activations: Sequence[Call],
    glu: bool,
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The activation, and whether the second of a gated MLP's two hidden rows is the gate: what
    gives the numbers.
    """
    part = activations[0].part if activations else None
    if part is not None:
        check(not any(True for _ in part.parameters()), "model", got, LEGAL)
    last = max(calls.index(call) for call in (*ups, *activations))
    hidden = calls[last + 1].input  # what the part behind gets: a norm, a dropout or the last layer
    candidates = FUNCTIONS
    if isinstance(part, nn.GLU):
        candidates = (torch.sigmoid,)
        hidden = activations[0].output
    elif part is not None:
        candidates = (part,)
    else:
        held = [vars(mlp)[name] for name in ("act", "activation", "act_fn") if name in vars(mlp)]
        candidates = (*held, *FUNCTIONS)
    outputs = [call.output for call in ups]
    rows = outputs[0].chunk(2, dim=-1) if glu and len(outputs) == 1 else outputs
    for activation in candidates:
        for gate_is_second in (False, True) if glu else (False,):
            gate, *others = reversed(rows) if gate_is_second else rows
            ours = activation(gate.clone())
            for other in others:
                ours = ours * other
            if _is_close(ours, hidden):
                return activation, gate_is_second
    raise ValueError(f"model: got {got}, whose activation is none that is known, expected {LEGAL}")


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    """True for equal numbers, up to the rounding of an MLP in half precision that could not be
    copied.
    """
    if ours.shape != theirs.shape:
        return False
    rounding = 1e-9 if theirs.dtype == torch.float64 else 1e-2
    return bool((ours - theirs).abs().max() <= rounding * theirs.abs().max())


def _dropped(calls: Sequence[Call]) -> float:
    """The probability that one of several dropouts, one behind the other, drops a number."""
    return 1.0 - math.prod(1.0 - call.part.p for call in calls if isinstance(call.part, nn.Dropout))


def _folded(linears: Sequence[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(O, I) weight and (O,) bias of linear layers side by side, with the scale and shift of the
    norm before them.
    """
    weight = torch.cat([part.weight for part in linears])
    biases: list[Tensor] = [
        weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in linears
    ]
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
