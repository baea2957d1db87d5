"""Compare an MLP with the form that its class has.

Once for all MLPs of a model that differ in values alone: on a copy with other weights, so that what
starts as an identity (a scale of ones, a bias of zeros) shows.

Shapes: T tokens, I in and O out features of an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gmoe._checks import is_linear
from gmoe._torch import dtype_of
from gmoe._verify import ROUNDING, Sieve, form_of, moved_copy, rows_are_equal
from gmoe.mlps import LinearForm, MLPForm, form_of_class, is_norm

Form: TypeAlias = MLPForm | LinearForm

SHAPES = ((13, 5), (2, 4), (1, 1))
"""Of the tokens on which an MLP is compared with its form: 65, 8 and 1 of them."""

SCALES = (1.0, 10.0, 100.0, 1000.0, 0.1, 0.01, 0.001, 0.0)
"""Of these tokens, in turn: clamps show in large ones, an epsilon in small ones."""

FLOAT32_ROUNDING = 1e-5
"""Largest difference in float64 of an MLP with a norm that computes in float32."""

LEGAL = "linear, activation, linear, gated or not; tell your own class to gmoe.mlps.register"


def read_mlp(
    name: str, mlp: nn.Module, *, is_replaced: bool = False, checked: set[Hashable] | None = None
) -> Form:
    """Find the role of each part of an MLP by its class, and check it.

    Args:
        name: of the MLP in its model, for errors.
        mlp: the module, which is left as it is.
        is_replaced: experts replace the MLP (default ``False``), so that all it computes must be
            theirs: training mode, gradients, and all its parameters.
        checked: what the MLPs that were checked before have in common, to which this one is added
            (default ``None``): those that differ in values alone are checked once.

    Raises:
        ValueError: an MLP of an unknown class, or one that computes something else than its form.
    """
    checked = set() if checked is None else checked
    if is_linear(mlp) and not is_replaced:  # it goes on to run, whatever it does
        return LinearForm(mlp)
    key = form_of(mlp), is_replaced
    if key not in checked:
        _check_form(_described(name, mlp), mlp, is_replaced)
        checked.add(key)
    form = form_of_class(mlp)
    assert form is not None  # the copy's class is the same
    for got, expected in _lost(mlp, form) if is_replaced else ():
        raise ValueError(
            f"model: got {name}{got}, expected {expected}; keep it with start='shared'"
        )
    return form


def _check_form(got: str, mlp: nn.Module, is_replaced: bool) -> None:
    """Compare an MLP with its form, on a copy; see :func:`read_mlp`.

    Args:
        got: what the MLP is, for errors.
        mlp: the module.
        is_replaced: see :func:`read_mlp`.
    """
    # A user's module may raise anything.
    try:
        copied = moved_copy(mlp)
    except Exception as error:
        raise _refused(got, f", which cannot be copied to the CPU ({error})") from error
    form = form_of_class(copied)
    if form is None:
        raise _refused(got)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():  # a load has none
            difference = next(_differences(copied, form, is_replaced), None)
    except Exception as error:
        why = f", which fails on tokens alone ({type(error).__name__}: {error})"
        raise _refused(got, why) from error
    if difference is not None:
        raise _refused(got, f", which {difference}")
    if not _is_same_in_its_dtype(mlp):
        raise _refused(got, ", which computes something else in its own dtype than in float64")


def _is_same_in_its_dtype(mlp: nn.Module) -> bool:
    """Whether an MLP computes its form in its own precision, too, but for rounding."""
    dtype = dtype_of(mlp)
    if dtype is None:
        return True
    copied = moved_copy(mlp, dtype)
    form = form_of_class(copied)
    assert form is not None
    x_TI = _tokens(form.width)[:: len(SCALES)].to(dtype)  # of scale 1: float16 ends at 65,504
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = _run(copied, x_TI, (1, len(x_TI)))
            expected = form.output(x_TI)
    except RuntimeError:  # a CPU lacks some operators in half precision
        return True
    return rows_are_equal(expected.double(), found.double(), torch.finfo(dtype).eps ** 0.5)


def _differences(mlp: nn.Module, form: Form, is_replaced: bool) -> Iterator[str]:
    """Say what an MLP does otherwise than its form, one condition after the other.

    Args:
        mlp: a copy, see :func:`gmoe._verify.moved_copy`.
        form: of the copy.
        is_replaced: see :func:`read_mlp`.
    """
    rounding = ROUNDING
    if any(is_norm(part) and _is_of_float32(part) for part in mlp.modules()):
        rounding = FLOAT32_ROUNDING
    x_TI = _tokens(form.width)
    few = SHAPES[1]
    few_TI = x_TI[: math.prod(few)]

    activation = getattr(form, "activation", None)
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        yield "has an activation with parameters"

    # 1. Evaluation. An expert sees only its own rows: no number of tokens changes what one gets.
    with torch.no_grad():
        # First the MLP: hooks of torch's compute weights that the form reads.
        outputs = [_run(mlp, x_TI[: math.prod(shape)], shape) for shape in SHAPES]
        expected = form.output(x_TI)
        for found, shape in zip(outputs, SHAPES, strict=True):
            if not rows_are_equal(expected[: math.prod(shape)], found, rounding):
                yield "computes something else than its form"

        # 2. Dropouts, one at a time.
        for sieve in mlp.modules():
            if isinstance(sieve, Sieve) and sieve.p > 0.0:
                sieve.is_on = True
                if not rows_are_equal(form.output(few_TI), _run(mlp, few_TI, few), rounding):
                    yield "drops numbers in another place"
                sieve.is_on = False
    if not is_replaced:  # the MLP goes on to run
        return

    # 3. Training, without dropout.
    mlp.train()
    few_TI.requires_grad_()
    before = torch.get_rng_state()
    expected = form.output(few_TI)
    found = _run(mlp, few_TI, few)
    if not torch.equal(torch.get_rng_state(), before):  # a dropout that is a function
        yield "draws random numbers in training; or start='shared'"
    if not rows_are_equal(expected, found, rounding):
        yield "computes something else in training; or start='shared'"

    # 4. Gradients: of the tokens and of vectors. Those of matrices would take much memory.
    if _trained_by(found) != _trained_by(expected):
        yield "does not train all of its parameters; or start='shared'"
    small = [few_TI, *(value for value in mlp.parameters() if value.dim() < 2)]
    small = [value for value in small if value.requires_grad]
    ours, theirs = (
        torch.autograd.grad(y_TO.sum(), small, allow_unused=True, materialize_grads=True)
        for y_TO in (expected, found)
    )
    for mine, other in zip(ours, theirs, strict=True):
        if not rows_are_equal(mine.flatten(), other.flatten(), rounding):
            yield "has another gradient; or start='shared'"


def _trained_by(output: Tensor) -> set[int]:
    """The ids of the leaves that a loss of the output would train."""
    found: set[int] = set()
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf
            found.add(id(node.variable))
        nodes += [behind for behind, _ in node.next_functions]
    return found


def _run(mlp: nn.Module, x_TI: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(T, O) what an MLP gives for tokens of some shape, or else for rows."""
    try:
        output = mlp(x_TI.view(*shape, -1).clone())
    except Exception:  # some take rows only
        output = mlp(x_TI.clone())
    if not isinstance(output, Tensor):
        raise TypeError(f"it returns a {type(output).__name__}")
    return output.flatten(0, -2)


def _tokens(width: int) -> Tensor:
    """(T, I) random tokens of all scales."""
    num_tokens = math.prod(SHAPES[0])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.empty(num_tokens, width, dtype=torch.float64, device="cpu")
    tokens.normal_(generator=generator)
    scales = torch.tensor(SCALES, dtype=torch.float64, device="cpu")
    return tokens * scales[torch.arange(num_tokens, device="cpu") % len(scales), None]


def _is_of_float32(norm: Any) -> bool:
    """True for a norm that computes in float32."""
    output = norm(_tokens(norm.normalized_shape[0]))
    return torch.equal(output, output.float().double())


def _refused(got: str, why: str = "") -> ValueError:
    return ValueError(f"model: got {got}{why}, expected {LEGAL}")


def _described(name: str, mlp: nn.Module) -> str:
    """What an MLP is, for errors."""
    got = f"{name}, a {type(mlp).__name__}"
    parts = [part for part in mlp.modules() if next(part.children(), None) is None]
    return f"{got} of ({', '.join(type(part).__name__ for part in parts)})"


def _lost(mlp: nn.Module, form: Form) -> Iterator[tuple[str, str]]:
    """Yield what experts in an MLP's place would lose, as (got, expected) for an error."""
    read: set[int] = set()
    for part in form.layers:
        read |= {id(parameter) for parameter in part.parameters()}
    first_paths: dict[int, str] = {}
    for path, parameter in mlp.named_parameters(remove_duplicate=False):
        first = first_paths.setdefault(id(parameter), path)
        if id(parameter) not in read:
            yield f".{path}", "no parameters but of layers that experts have"
        if first != path:
            yield (
                f".{path}, which is {first} as well",
                "a parameter for each layer: experts would not share it",
            )
    if isinstance(form, MLPForm) and len({up.bias is None for up in form.ups}) > 1:
        yield (
            " with a gate or a value that has no bias",
            "a bias in both or in none: experts would train it",
        )
    frozen = [path for path, parameter in mlp.named_parameters() if not parameter.requires_grad]
    if 0 < len(frozen) < len(first_paths):
        yield f" with {frozen[0]} frozen", "all of its parameters to be frozen, or none"
    for path, _ in mlp.named_buffers():
        yield f" with the buffer {path}", "none, since experts would not have it"
