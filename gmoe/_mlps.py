"""Read a dense MLP by what it computes, to build experts of the same form.

A copy with other weights is run once on random tokens. The order in which its parts are called
tells which linear layer is the first and which the last, and where norms and dropouts stand;
numbers tell the activation and the gate. An expert of that form is then compared with the copy.

Shapes: I in, H hidden features of an MLP, O out features of a linear layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._torch import forward_hooks, parameter_names
from gmoe._verify import ROUNDING, SCALES, form_of, move_, rows_are_equal
from gmoe.experts import MLPExperts
from gmoe.products import Backend
from gmoe.stack import become

LEGAL = (
    "linear layers with one activation without parameters between them, gated or not, at most a "
    "norm before each, and dropouts behind the activation and at the end; wrap layers "
    "(LoRA, quantization) after moefy, not before"
)

FLOAT32_ROUNDING = 1e-5
"""Of an MLP in float64 with a norm that computes in float32."""

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
    """

    ups: Sequence[nn.Linear]
    down: nn.Linear
    activation: Callable[[Tensor], Tensor]
    glu: bool
    gate_is_second: bool
    input_norm: nn.Module | None
    hidden_norm: nn.Module | None
    dropout: tuple[float, float]

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
        experts = MLPExperts(
            up_weight.size(1),
            down_weight.size(1),
            len(down_weight),
            num_experts=num_experts,
            activation=copy.deepcopy(self.activation),
            glu=self.glu,
            dropout=self.dropout,
            bias=(_have_bias(*self.ups, self.input_norm), _have_bias(self.down, self.hidden_norm)),
            input_norm=_without_parameters(self.input_norm),
            hidden_norm=_without_parameters(self.hidden_norm),
            zero_init=zero_init,
            backend=backend,
        )
        # Read once: a parametrized weight is computed at each access, and some change by it.
        experts.to(next(self.ups[0].parameters()).detach())
        if upcycle:
            become(experts.up, {"weight": up_weight, "bias": up_bias})
            if not zero_init:
                become(experts.down, {"weight": down_weight, "bias": down_bias})
        return experts

    def among(self, mlp: nn.Module, other: nn.Module) -> DenseMLP:
        """The same roles in another MLP of the same form: its parts of the same names.

        Args:
            mlp: holds these parts.
            other: may be a copy of it.
        """
        parts = dict(zip(mlp.modules(), other.modules(), strict=True))

        def part(here: Any) -> Any:
            # A function is no part, and neither is an identity that stands for no activation.
            return parts.get(here, here) if isinstance(here, nn.Module) else here

        return replace(
            self,
            ups=[part(up) for up in self.ups],
            down=part(self.down),
            activation=part(self.activation),
            input_norm=part(self.input_norm),
            hidden_norm=part(self.hidden_norm),
        )


Forms: TypeAlias = dict[Hashable, tuple[nn.Module, DenseMLP]]
"""An MLP and its roles, by the form of the MLP and by whether experts replace it."""


@dataclass(frozen=True)
class Trial:
    """A run of an MLP: its tokens (..., D), its output, and the calls of its parts in order."""

    tokens: Tensor
    output: Tensor
    calls: list[PartCall]


def read_mlp(
    name: str, mlp: nn.Module, *, is_replaced: bool = False, forms: Forms | None = None
) -> DenseMLP:
    """Find the role of each part of an MLP by running a copy of it once on random tokens.

    The order in which the parts are called counts, not the order in which they are registered. An
    activation that is called as a function, and the gate of a gated MLP, are found by the numbers.
    An expert with these roles must then give the same numbers.

    Args:
        name: of the MLP in its model, for errors.
        mlp: the module, which is left as it is.
        is_replaced: experts replace the MLP (default ``False``), so that all it computes must be
            theirs: what follows the last linear layer, training mode, and all its parameters.
        forms: the MLPs that were read before, to which this one is added (default ``None``). An MLP
            of a known form has its roles.

    Raises:
        ValueError: a module that does not run on tokens alone, or that is not linear, activation,
            linear.
    """
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    if any(isinstance(part, nn.Conv1d | nn.Conv2d) for part in _parts(mlp)) and not linears:
        raise ValueError(
            f"model: got {name}, a {type(mlp).__name__} of convolutions, of which there are no "
            "experts, expected linear layers (of timm's ConvNeXt, conv_mlp=False); no `targets` "
            "help"
        )
    if not linears:
        raise _refused(f"{name}, a {type(mlp).__name__} without linear layers")
    kinds = ", ".join(type(part).__name__ for part in _parts(mlp))
    got = f"{name}, a {type(mlp).__name__} of ({kinds})"
    form = form_of(mlp), is_replaced
    forms = {} if forms is None else forms
    if form not in forms:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _copy_to_run(mlp) as copied:
            trial = _run_once(got, copied)
            roles = _roles(got, copied, trial.calls)
            _check_expert(got, copied, roles, trial, is_replaced)
            forms[form] = mlp, roles.among(copied, mlp)
    known, roles = forms[form]
    dense = roles.among(known, mlp)
    if is_replaced:
        _check_parameters(name, mlp, dense)
    return dense


def _roles(got: str, mlp: nn.Module, calls: Sequence[PartCall]) -> DenseMLP:
    """The roles of the parts.

    Args:
        got: what the MLP is, for errors.
        mlp: the MLP that was run.
        calls: of its parts, in order.
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
    )


# the expert beside the MLP ------------------------------------------------------------------------


def _check_expert(
    got: str, mlp: nn.Module, roles: DenseMLP, trial: Trial, is_replaced: bool
) -> None:
    """Refuse an MLP if an expert with these roles gives other numbers.

    Args:
        got: what the MLP is, for errors.
        mlp: the copy that was run.
        roles: its parts.
        trial: the run.
        is_replaced: see :func:`read_mlp`.
    """
    expert = roles.experts(1, upcycle=True, zero_init=False, backend="loop").eval()
    rounding = _rounding(trial.output)
    if any(_is_of_float32(call) for call in trial.calls if _is_norm(call.part)):
        rounding = FLOAT32_ROUNDING
    # Beside a shared expert, which the MLP stays, what follows the last linear layer is left to it.
    [down] = [call for call in trial.calls if call.part is roles.down]
    expected = trial.output if is_replaced else down.output
    if not _are_equal(got, expert, trial.tokens, expected, rounding):
        hint = "; or start='shared' for one with more behind its last layer" if is_replaced else ""
        raise _refused(f"{got}, which computes something else than its parts suggest{hint}")
    if not is_replaced:
        return
    # In training mode, without dropouts: experts have them as well.
    for part in (*mlp.modules(), *expert.modules()):
        part.train()
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    before = torch.get_rng_state()
    output = mlp(trial.tokens.clone())
    if not torch.equal(torch.get_rng_state(), before):  # a dropout that is a function
        raise _refused(f"{got}, which draws random numbers in training; or start='shared'")
    if not _are_equal(got, expert, trial.tokens, output, rounding):
        raise _refused(f"{got}, which computes something else in training; or start='shared'")


def _are_equal(
    got: str, expert: MLPExperts, tokens: Tensor, expected: Tensor, rounding: float
) -> bool:
    """True if an expert gives what an MLP gave.

    Args:
        got: what the MLP is, for errors.
        expert: one expert.
        tokens: (..., I).
        expected: (..., O) what the MLP gave for them.
        rounding: see :func:`rows_are_equal`.
    """
    # In two halves: an expert does not see the tokens of the others.
    halves = tokens.flatten(0, -2).chunk(2)
    try:
        actual = torch.cat([expert(half, torch.tensor([len(half)])) for half in halves])
    except Exception as error:  # a part of the MLP, on rows, may raise anything
        raise _refused(f"{got}, whose parts fail on rows of tokens ({error})") from error
    if actual.numel() == expected.numel():  # an MLP may fold dimensions
        actual = actual.view_as(expected)
    return rows_are_equal(actual, expected, rounding)


def _is_of_float32(call: PartCall) -> bool:
    """True for a norm that computes in float32, which small changes of its input do not reach."""
    step = torch.linspace(0.0, 1e-11, call.input.size(-1), dtype=call.input.dtype, device="cpu")
    return torch.equal(call.part(call.input * (1 + step)), call.output)


def _check_parameters(name: str, mlp: nn.Module, dense: DenseMLP) -> None:
    """Refuse an MLP that experts cannot replace, since their parameters are not all that it has.

    Raises:
        ValueError: parameters that no role has, under two names, or frozen in part; buffers.
    """
    parts = [*dense.ups, dense.down, dense.input_norm, dense.hidden_norm]
    read = {id(p) for part in parts if part is not None for p in part.parameters()}
    named = list(mlp.named_parameters(remove_duplicate=False))
    ids = [id(parameter) for _, parameter in named]
    kept = "keep it with start='shared'"
    for place, (path, parameter) in enumerate(named):
        if id(parameter) not in read:
            raise ValueError(
                f"model: got {name}.{path}, expected no parameters but of layers that "
                f"experts have; {kept}"
            )
        if id(parameter) in ids[:place]:
            first = named[ids.index(id(parameter))][0]
            raise ValueError(
                f"model: got {name}.{path}, which is {first} as well, expected a "
                f"parameter for each layer: experts would not share it; {kept}"
            )
    if len({up.bias is None for up in dense.ups}) > 1:
        raise ValueError(
            f"model: got {name} with a gate or a value that has no bias, expected a "
            f"bias in both or in none: experts would train it; {kept}"
        )
    if len({parameter.requires_grad for _, parameter in named}) > 1:
        frozen = [path for path, parameter in named if not parameter.requires_grad]
        raise ValueError(
            f"model: got {name} with {frozen[0]} frozen, expected all of its "
            f"parameters to be frozen, or none; {kept}"
        )
    buffers = [path for path, _ in mlp.named_buffers()]
    if buffers:
        raise ValueError(
            f"model: got {name} with the buffer {buffers[0]}, expected none, since "
            f"experts would not have it; {kept}"
        )


# how an MLP is run --------------------------------------------------------------------------------


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
    """True for a norm of each token; one of more dimensions mixes them."""
    return len(getattr(part, "normalized_shape", ())) == 1


def _is_activation(part: nn.Module) -> bool:
    return not isinstance(part, nn.Linear | nn.Dropout) and not _is_norm(part)


@contextmanager
def _copy_to_run(mlp: nn.Module) -> Iterator[nn.Module]:
    """A copy of the MLP in evaluation mode and in float64 on the CPU, with other weights.

    It keeps torch's own hooks (pruning, weight norm) and drops all others. A module that cannot be
    copied, such as one with torch's old weight norm, is run itself with its own weights; its
    buffers and modes are restored afterwards.
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
    move_(copied)
    yield copied


def _run_once(got: str, mlp: nn.Module) -> Trial:
    """Run an MLP on a few random tokens of several scales, and note the calls of its parts."""
    linears = [part for part in _parts(mlp) if isinstance(part, nn.Linear)]
    # The width is unknown: of two layers I x H and H x I either may be the first. Try both, and
    # tokens in two dimensions or one.
    widths = dict.fromkeys(part.in_features for part in linears)  # a set that keeps the order
    scales = torch.tensor(SCALES, device="cpu")[:, None]
    failures = []
    for width in widths:
        for shape in ((2, len(SCALES)), (2 * len(SCALES),)):
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randn(2, len(SCALES), width, device="cpu", generator=generator)
            tokens = (tokens * scales).view(*shape, width).to(linears[0].weight)
            calls: list[PartCall] = []
            try:
                with ExitStack() as stack:
                    for part in dict.fromkeys(_parts(mlp)):
                        hook = part.register_forward_hook(_recorder(calls), with_kwargs=True)
                        stack.callback(hook.remove)
                    output = mlp(tokens.clone())
            except Exception as error:  # a user's module may raise anything
                failures.append(f"{type(error).__name__}: {error}")
                continue
            if isinstance(output, Tensor):
                return Trial(tokens, output, calls)
            failures.append(f"it returns a {type(output).__name__}")
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
            if ours.shape != gate.shape:
                continue
            for other in others:
                ours = ours * other
            if rows_are_equal(ours, hidden, _rounding(hidden)):
                return activation, gate_is_second
    raise _refused(f"{got}, whose activation is not a known one")


def _rounding(values: Tensor) -> float:
    """The rounding of an MLP's numbers: more where it could not be copied to float64."""
    return ROUNDING if values.dtype == torch.float64 else 1e-2


def _have_bias(*parts: nn.Module | None) -> bool:
    """True if one of these layers and norms adds a bias."""
    return any(getattr(part, "bias", None) is not None for part in parts)


def _dropout(calls: Sequence[PartCall]) -> float:
    """The probability that at least one of several dropouts in a row drops a number."""
    return 1.0 - math.prod(1.0 - call.part.p for call in calls if isinstance(call.part, nn.Dropout))


def _folded(linears: Sequence[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(O, I) weight and (O,) bias of linear layers side by side, with the norm before them.

    The norm's scale and shift become part of the weight and the bias.
    """
    weight = linears[0].weight if len(linears) == 1 else torch.cat([p.weight for p in linears])
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
