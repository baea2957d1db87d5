"""Read a dense MLP by what it computes, to build experts of the same form.

It is run once on random tokens. The order in which its parts are called tells which linear layer is
the first and which the last, and where norms and dropouts stand; numbers tell the activation and
the gate.

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

from gmoe._torch import forward_hooks, parameter_names
from gmoe.dispatch import Backend
from gmoe.experts import MLPExperts

LEGAL = (
    "linear layers with one activation without parameters between them, gated or not, at most a "
    "norm before each, and dropouts behind the activation and at the end; there are no experts of "
    "convolutions: name MLPs by `targets`; wrap layers (LoRA, quantization) after moefy, not before"
)

FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu,
    F.gelu,
    partial(F.gelu, approximate="tanh"),
    F.relu,
    torch.sigmoid,
    torch.tanh,
    nn.Identity(),
)
"""Activations that an MLP may call as functions; the one that reproduces its numbers is taken."""


def _refused(got: str) -> ValueError:
    """The error for an MLP of another form; ``got`` describes it."""
    return ValueError(f"model: got {got}, expected {LEGAL}")


@dataclass(frozen=True, eq=False)
class PartCall:
    """A call of a part of an MLP."""

    part: Any
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class DenseMLP:
    """The parts of an MLP by their roles.

    Args:
        ups: the first linear layer, or two side by side.
        down: the last linear layer.
        activation: of the hidden layer, or of its gate.
        glu: the hidden layer is gated: one half of it is multiplied by the activation of the other.
        gate_is_second: the gate is the second of the two first layers, or the second half of a
            single one.
        input_norm: before the first layer, or ``None``.
        hidden_norm: before the last layer, or ``None``.
        dropout: probabilities of dropping a hidden unit, and an output.
        like: a weight of the MLP, for the dtype and the device of the experts.
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
        """Build experts of this form.

        Args:
            num_experts: E.
            upcycle: copy the MLP; ``False`` draws the experts anew.
            zero_init: start the last layer at zero.
            backend: see :func:`gmoe.grouped_linear`.
        """
        up_weight, up_bias = _folded(self.ups, self.input_norm)
        down_weight, down_bias = _folded([self.down], self.hidden_norm)
        if self.gate_is_second:  # the gate of an expert is the first half: swap the halves
            up_weight = up_weight.roll(len(up_weight) // 2, dims=0)
            up_bias = up_bias.roll(len(up_bias) // 2, dims=0)
        with_bias = [*self.ups, self.down, self.input_norm, self.hidden_norm]
        has_bias = any(getattr(part, "bias", None) is not None for part in with_bias)
        experts = MLPExperts(
            up_weight.size(1),
            down_weight.size(1),
            len(down_weight),
            num_experts=num_experts,
            activation=copy.deepcopy(self.activation),
            glu=self.glu,
            dropout=self.dropout,
            bias=has_bias,
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
    """Find the role of each part of an MLP by running a copy of it once on random tokens.

    The order in which the parts are called counts, not the order in which they are registered. An
    activation that is called as a function, and the gate of a gated MLP, are found by the numbers.

    Args:
        name: of the MLP in its model, for errors.
        mlp: the module, which is left as it is.

    Raises:
        ValueError: a module that does not run on tokens alone, or that is not linear, activation,
            linear.
    """
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    if not linears:
        raise _refused(f"{name}, a {type(mlp).__name__} without linear layers")
    kinds = ", ".join(type(part).__name__ for part in _parts(mlp))
    got = f"{name}, a {type(mlp).__name__} of ({kinds})"
    # Read once: a parametrized weight is computed at each access, and spectral norm changes by it.
    like = next(linears[0].parameters()).detach()
    with torch.no_grad(), _copy_to_run(mlp) as copied:
        calls = _trial_calls(got, copied)
        return _roles(got, copied, calls, like)


def _roles(got: str, mlp: nn.Module, calls: Sequence[PartCall], like: Tensor) -> DenseMLP:
    """The roles of the parts.

    Args:
        got: what the MLP is, for errors.
        mlp: the MLP that was run.
        calls: of its parts, in order.
        like: see :class:`DenseMLP`.
    """
    # 1. The linear layers: the last one, and one or two (if gated) before it.
    linears = [call for call in calls if isinstance(call.part, nn.Linear)]
    is_used_once = len({call.part for call in linears}) == len(linears)
    if len(linears) not in (2, 3) or not is_used_once:
        raise _refused(got)
    *ups, down = linears

    # 2. What stands before the first, between them, and after the last.
    before = calls[: calls.index(ups[0])]
    between = calls[calls.index(ups[0]) : calls.index(down)]
    after = calls[calls.index(down) + 1 :]
    behind_ups = [call for call in between if call not in ups]
    activations = [call for call in behind_ups if _is_activation(call.part)]
    input_norms = [call.part for call in before if _is_norm(call.part)]
    hidden_norms = [call.part for call in behind_ups if _is_norm(call.part)]
    fits = (
        # Only a norm may come first, and only dropouts last.
        len(before) == len(input_norms) <= 1,
        all(isinstance(call.part, nn.Dropout) for call in after),
        # The activation follows the first layers directly: a norm or a dropout between them would
        # change its input.
        len(activations) <= 1 and behind_ups[: len(activations)] == activations,
        len(hidden_norms) <= 1,
    )
    if not all(fits):
        raise _refused(got)

    # 3. Gated or not: by the widths. A gated MLP has twice as many columns as hidden features.
    hidden = down.input.size(-1)
    widths = [call.output.size(-1) for call in ups]
    glu = sum(widths) == 2 * hidden
    if len(set(widths)) != 1 or not (glu or widths == [hidden]):
        raise _refused(got)
    activation, gate_is_second = _activation(got, mlp, calls, ups, activations, glu)
    return DenseMLP(
        ups=[call.part for call in ups],
        down=down.part,
        activation=activation,
        glu=glu,
        gate_is_second=gate_is_second,
        input_norm=input_norms[0] if input_norms else None,
        hidden_norm=hidden_norms[0] if hidden_norms else None,
        dropout=(_dropout(behind_ups), _dropout(after)),
        like=like,
    )


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers, norms, dropouts and activations inside a module, at any depth."""
    for child in module.children():
        if isinstance(child, nn.Identity):
            continue
        if isinstance(child, nn.Linear | nn.Dropout) or _is_norm(child):
            yield child
            continue
        is_container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        has_parts = any(True for _ in child.children())
        has_weights = any(True for _ in child.parameters())
        if is_container or (has_parts and has_weights):
            yield from _parts(child)
        else:  # an activation, or something that no expert has
            yield child


def _is_norm(part: nn.Module) -> bool:
    return hasattr(part, "normalized_shape")


def _is_activation(part: nn.Module) -> bool:
    return not isinstance(part, nn.Linear | nn.Dropout) and not _is_norm(part)


@contextmanager
def _copy_to_run(mlp: nn.Module) -> Iterator[nn.Module]:
    """A copy of the MLP in evaluation mode and in float64 on the CPU.

    It keeps torch's own hooks (pruning, weight norm) and drops all others. A module that cannot be
    copied, such as one with torch's old weight norm, is run itself; its buffers and modes are
    restored afterwards.
    """
    try:
        copied = copy.deepcopy(mlp).cpu().double().eval()
    except Exception:  # a user's module, or a tensor of a custom class, may raise anything
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
    for part in copied.modules():
        for table in forward_hooks(part):
            for key, hook in list(table.items()):
                if not str(getattr(type(hook), "__module__", "")).startswith("torch."):
                    del table[key]
    yield copied


def _trial_calls(got: str, mlp: nn.Module) -> list[PartCall]:
    """The calls of the parts, in order, when the MLP runs on a few random tokens."""
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    # The width is unknown: of two layers I x H and H x I either may be the first. Try both, and
    # tokens in two dimensions or one.
    widths = dict.fromkeys(part.in_features for part in linears)  # a set that keeps the order
    failures = []
    for width in widths:
        for rows in ((2, 3), (6,)):
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randn((*rows, width), device="cpu", generator=generator)
            tokens = tokens.to(linears[0].weight)
            calls: list[PartCall] = []
            try:
                with ExitStack() as stack:
                    stack.enter_context(torch.random.fork_rng(devices=[]))
                    for part in dict.fromkeys(_parts(mlp)):
                        hook = part.register_forward_hook(_recorder(calls), with_kwargs=True)
                        stack.callback(hook.remove)
                    mlp(tokens)
            except Exception as error:  # a user's module may raise anything
                failures.append(f"{type(error).__name__}: {error}")
                continue
            return calls
    raise _refused(f"{got}, which fails on tokens alone ({failures[0]})")


def _recorder(calls: list[PartCall]) -> Callable[..., None]:
    """A forward hook that notes calls, with copies: an activation may work in place."""

    def record(
        part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        tokens = args[0] if args else next(iter(kwargs.values()))
        calls.append(PartCall(part, tokens.clone(), output.clone()))

    return record


def _activation(
    got: str,
    mlp: nn.Module,
    calls: Sequence[PartCall],
    ups: Sequence[PartCall],
    activations: Sequence[PartCall],
    glu: bool,
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Find the activation and the gate: those that reproduce the hidden features.

    Args:
        got: what the MLP is, for errors.
        mlp: the MLP that was run.
        calls: of its parts, in order.
        ups: the calls of the first layers.
        activations: the call of an activation that is a module, if there is one.
        glu: the hidden layer is gated.

    Returns:
        The activation, and whether the second half of a gated layer is the gate.
    """
    module = activations[0].part if activations else None
    if module is not None and any(True for _ in module.parameters()):
        raise _refused(got)

    # 1. The hidden features are the input of the part that follows the activation: a norm, a
    # dropout or the last layer.
    last = max(calls.index(call) for call in (*ups, *activations))
    hidden = calls[last + 1].input

    # 2. What may have computed them: a module that was called, or a function.
    candidates: Sequence[Callable[[Tensor], Tensor]]
    if isinstance(module, nn.GLU):  # a gated layer in itself, by the sigmoid
        candidates = [torch.sigmoid]
        hidden = activations[0].output
    elif module is not None:
        candidates = [module]
    else:
        held = [vars(mlp)[name] for name in ("act", "activation", "act_fn") if name in vars(mlp)]
        candidates = [*held, *FUNCTIONS]

    # 3. Try them, with either half as the gate.
    halves = [call.output for call in ups]
    if glu and len(halves) == 1:
        halves = list(halves[0].chunk(2, dim=-1))
    for activation in candidates:
        for gate_is_second in (False, True) if glu else (False,):
            gate, *others = reversed(halves) if gate_is_second else halves
            ours = activation(gate.clone())
            for other in others:
                ours = ours * other
            if _is_close(ours, hidden):
                return activation, gate_is_second
    raise _refused(f"{got}, whose activation is not a known one")


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    """True for equal numbers, up to the rounding of an MLP that could not be copied to float64."""
    if ours.shape != theirs.shape:
        return False
    rounding = 1e-9 if theirs.dtype == torch.float64 else 1e-2
    return bool((ours - theirs).abs().max() <= rounding * theirs.abs().max())


def _dropout(calls: Sequence[PartCall]) -> float:
    """The probability that at least one of several dropouts in a row drops a number."""
    return 1.0 - math.prod(1.0 - call.part.p for call in calls if isinstance(call.part, nn.Dropout))


def _folded(linears: Sequence[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(O, I) weight and (O,) bias of linear layers side by side, with the norm before them.

    The norm's scale and shift become part of the weight and the bias.
    """
    weight = torch.cat([part.weight for part in linears])
    biases: list[Tensor] = []
    for part in linears:
        no_bias = weight.new_zeros(len(part.weight))
        biases.append(no_bias if part.bias is None else part.bias)
    bias = torch.cat(biases)
    scale = getattr(norm, "weight", None)
    shift = getattr(norm, "bias", None)
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
    for parameter in parameter_names(bare):
        bare.register_parameter(parameter, None)
    return bare
