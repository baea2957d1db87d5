"""Read a dense MLP as one of a few forms, each tried and verified.

The sizes of the linear layers leave a handful of candidates. Each is tried on a copy of the MLP,
and the first that gives what the copy gives is taken. The copy has other weights, so that what
starts as an identity (a scale of ones, a bias of zeros) shows; tokens of several scales show
functions that differ only far from zero, such as clamps.

Shapes: T tokens, O out features.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe._checks import check
from gmoe._verify import ROUNDING, SCALES, Sieve, form_of, moved_copy, rows_are_equal
from gmoe.mlps import Function, MLPForm, Read, registered

LEGAL = (
    "linear layers with one activation without parameters between them, gated or not, at most a "
    "norm before each, and dropouts behind the activation and at the end; wrap layers "
    "(LoRA, quantization) after moefy, not before; for other classes, see gmoe.mlps.register"
)

FUNCTIONS: tuple[Function, ...] = (
    F.silu,
    F.gelu,
    partial(F.gelu, approximate="tanh"),
    F.relu,
    torch.sigmoid,
    torch.tanh,
    nn.Identity(),
)
"""Activations that an MLP may call as functions."""

ATTRIBUTES = ("act", "activation", "act_fn")
"""Where MLPs keep such a function. Functions under other names may do anything: none is tried."""

FLOAT32_ROUNDING = 1e-5
"""Largest difference in float64 of an MLP with a norm that computes in float32."""

Readers: TypeAlias = dict[Hashable, Read]
"""How MLPs are read, by what they have in common and by whether experts replace them."""


def read_mlp(
    name: str, mlp: nn.Module, *, is_replaced: bool = False, readers: Readers | None = None
) -> MLPForm:
    """Find the role of each part of an MLP: as its class is registered, else by trial.

    Args:
        name: of the MLP in its model, for errors.
        mlp: the module, which is left as it is.
        is_replaced: experts replace the MLP (default ``False``), so that all it computes must be
            theirs: what follows the last linear layer, training mode, and all its parameters.
        readers: of the MLPs that were read before, to which this one is added (default ``None``):
            MLPs that differ in values alone are tried once.

    Raises:
        ValueError: a module that does not run on tokens alone, or that is not linear, activation,
            linear.
    """
    readers = {} if readers is None else readers
    key = form_of(mlp), is_replaced
    if key not in readers:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            readers[key] = _reader(_described(name, mlp), mlp, is_replaced)
    form = readers[key](mlp)
    lost = next(_lost(mlp, form), None)
    if is_replaced and lost is not None:
        got, expected = lost
        raise ValueError(
            f"model: got {name}{got}, expected {expected}; keep it with start='shared'"
        )
    return form


def _reader(got: str, mlp: nn.Module, is_replaced: bool) -> Read:
    """How MLPs are read that differ from this one in values alone.

    Args:
        got: what the MLP is, for errors.
        mlp: the module.
        is_replaced: see :func:`read_mlp`.
    """
    trial = Trial(got, mlp)
    read = registered(mlp)
    if read is None:
        forms = list(_candidates(trial.mlp))
    else:
        forms = [read(trial.mlp)]
        check(isinstance(forms[0], MLPForm), "read", f"{forms[0]!r} for {got}", "an MLPForm")
    if not forms:
        raise trial.refused("")

    # 1. All but the dropouts. A shared expert is the MLP itself: what follows its last layer is
    # left to it.
    is_whole = True
    form = trial.first(forms, is_whole)
    if form is None and not is_replaced:
        is_whole = False
        form = trial.first(forms, is_whole)
    if form is None:
        hint = "; or start='shared' for one with more behind its last layer" if is_replaced else ""
        raise trial.refused(
            ", which computes something else than its parts suggest, or whose activation is not a "
            f"known one{hint}"
        )

    # 2. The dropouts, one at a time; a registered form names them.
    for sieve in trial.sieves:
        places = _with_dropout(form, sieve) if read is None else [form]
        sieve.is_on = True
        placed = trial.first(places, is_whole)
        sieve.is_on = False
        if placed is None:
            raise trial.refused(", which drops numbers in another place")
        form = placed

    # 3. Training.
    if is_replaced:
        trial.mlp.train()
        before = torch.get_rng_state()
        is_same = trial.first([form], is_whole) is not None
        if not torch.equal(torch.get_rng_state(), before):  # a dropout that is a function
            raise trial.refused(", which draws random numbers in training; or start='shared'")
        if not is_same:
            raise trial.refused(", which computes something else in training; or start='shared'")
    return read or partial(_in_other, form, trial.mlp)


def _in_other(form: MLPForm, mlp: nn.Module, other: nn.Module) -> MLPForm:
    """The form of an MLP with the parts of another one, which differs in values alone."""
    parts = zip(mlp.modules(), other.modules(), strict=True)
    return copy.deepcopy(form, {id(here): there for here, there in parts})


# candidates ---------------------------------------------------------------------------------------


def _candidates(mlp: nn.Module) -> Iterator[MLPForm]:
    """The forms that an MLP may have by its parts and their sizes, the usual ones first.

    Args:
        mlp: a copy, whose dropouts are sieves.
    """
    linears: list[nn.Linear] = []
    norms: list[nn.Module] = []
    others: list[nn.Module] = []
    for part in dict.fromkeys(_parts(mlp)):
        if isinstance(part, nn.Linear):
            linears.append(part)
        elif _is_norm(part):
            norms.append(part)
        elif not isinstance(part, Sieve):
            others.append(part)
    # The other part is the activation.
    has_weights = any(True for part in others for _ in part.parameters())
    if len(linears) not in (2, 3) or len(others) > 1 or has_weights:
        return
    # Every norm has a place, or two.
    pairs = product([None, *norms], repeat=2)
    norm_places = [pair for pair in pairs if {*norms} <= {*pair}]
    for *ups, down in permutations(linears):
        form = MLPForm(ups, down, nn.Identity())
        sizes = {(up.in_features, up.out_features) for up in ups}
        is_plain = len(ups) == 1 and ups[0].out_features == down.in_features
        is_packed = len(ups) == 1 and form.glu
        if len(sizes) > 1 or not (is_plain or form.glu):
            continue
        # Of two first layers, the order tells the gate.
        activations = list(_activations(mlp, others, is_packed))
        for norm_place, (activation, gate_is_second) in product(norm_places, activations):
            input_norm, hidden_norm = norm_place
            yield replace(
                form,
                activation=activation,
                gate_is_second=gate_is_second,
                input_norm=input_norm,
                hidden_norm=hidden_norm,
            )


def _activations(
    mlp: nn.Module, others: Sequence[nn.Module], is_packed: bool
) -> Iterator[tuple[Function, bool]]:
    """What may be the activation, and whether it may act on the second half.

    Args:
        mlp: may keep a function.
        others: the part that is neither a linear layer nor a norm or dropout, if there is one.
        is_packed: a single first layer holds the gate.
    """
    if others and isinstance(others[0], nn.GLU):  # a gated layer in itself, by the sigmoid
        yield torch.sigmoid, True
        return
    functions: Sequence[Function] = others
    if not others:
        kept = [vars(mlp).get(name) for name in ATTRIBUTES]
        functions = [*(function for function in kept if callable(function)), *FUNCTIONS]
    yield from product(functions, (False, True) if is_packed else (False,))


def _with_dropout(form: MLPForm, dropout: nn.Module) -> Iterator[MLPForm]:
    """The form with a dropout in one place, in both, or in none."""
    here: list[nn.Module] = [dropout]
    nowhere: list[nn.Module] = []
    places = ((here, nowhere), (nowhere, here), (here, here), (nowhere, nowhere))
    for hidden, output in places:
        yield replace(
            form,
            hidden_dropouts=[*form.hidden_dropouts, *hidden],
            output_dropouts=[*form.output_dropouts, *output],
        )


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The linear layers, norms, dropouts and activations inside a module, at any depth."""
    for child in module.children():
        is_container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        has_parts = any(True for _ in child.children())
        has_weights = any(True for _ in child.parameters())
        has_role = isinstance(child, nn.Linear) or _is_norm(child)
        if is_container or (has_parts and has_weights and not has_role):
            yield from _parts(child)
        elif not isinstance(child, nn.Identity):  # a role, or something that no expert has
            yield child


def _is_norm(part: nn.Module) -> bool:
    """True for a norm of each token; one of more dimensions mixes them."""
    return len(getattr(part, "normalized_shape", ())) == 1


def _described(name: str, mlp: nn.Module) -> str:
    """What an MLP is, for errors."""
    parts = list(_parts(mlp))
    got = f"{name}, a {type(mlp).__name__}"
    if any(isinstance(part, nn.Linear) for part in parts):
        return f"{got} of ({', '.join(type(part).__name__ for part in parts)})"
    if any(isinstance(part, nn.Conv1d | nn.Conv2d) for part in parts):
        return (
            f"{got} of convolutions, of which there are no experts (no `targets` help, but timm's "
            "ConvNeXt has linear layers with conv_mlp=False)"
        )
    return f"{got} without linear layers"


# trials -------------------------------------------------------------------------------------------


class Trial:
    """A copy of an MLP on which forms are tried.

    Args:
        got: what the MLP is, for errors.
        mlp: the MLP, which is left as it is.

    Attributes:
        mlp: the copy.
        sieves: what it has in the place of dropouts that drop something.

    Raises:
        ValueError: an MLP that cannot be copied.
    """

    def __init__(self, got: str, mlp: nn.Module) -> None:
        self.got = got
        self.failure = ""
        self.sieves: list[Sieve] = []
        self.rounding = ROUNDING
        try:
            self.mlp = moved_copy(mlp)
            for part in self.mlp.modules():
                if isinstance(part, Sieve) and part.p > 0.0:
                    self.sieves.append(part)
                elif _is_norm(part) and _is_of_float32(part):
                    self.rounding = FLOAT32_ROUNDING
        except Exception as error:  # a user's module may raise anything
            raise self.refused(f", which cannot be copied to the CPU ({error})") from error

    def refused(self, why: str) -> ValueError:
        """The error for an MLP of another form."""
        return ValueError(f"model: got {self.got}{why}, expected {LEGAL}")

    def first(self, forms: Iterable[MLPForm], is_whole: bool) -> MLPForm | None:
        """The first form that fits the copy as it is now; ``None`` if none does.

        Args:
            forms: are tried in turn.
            is_whole: a form has to give what the copy gives; ``False``: what its last layer gives.

        Raises:
            ValueError: an MLP that fails on tokens of every width.
        """
        outputs: dict[int, Tensor | None] = {}
        for form in forms:
            if form.width not in outputs:
                outputs[form.width] = self._run(self.mlp, form.width)
            expected = outputs[form.width]
            if expected is not None and self._fits(form, expected, is_whole):
                return form
        if all(expected is None for expected in outputs.values()):
            raise self.refused(f", which fails on tokens alone ({self.failure})")
        return None

    def _fits(self, form: MLPForm, expected: Tensor, is_whole: bool) -> bool:
        """True for a form of the copy, which gives ``expected`` (T, O)."""
        try:
            output = form.output(_tokens(form.width).flatten(0, 1))
        except Exception:  # a part of a user's module may raise anything on rows
            return False
        if is_whole:
            return rows_are_equal(output, expected, self.rounding)
        # With the form's output in the place of its last layer, the copy gives the same; with zeros
        # it gives something else.
        for rows, is_same in ((output, True), (torch.zeros_like(output), False)):
            # The output has passed the sieves.
            parts: dict[int, Any] = {id(sieve): nn.Identity() for sieve in self.sieves}
            parts[id(form.down)] = Given(rows)
            changed = copy.deepcopy(self.mlp, parts)
            found = self._run(changed, form.width)
            if found is None or rows_are_equal(found, expected, self.rounding) != is_same:
                return False
        return True

    def _run(self, mlp: nn.Module, width: int) -> Tensor | None:
        """(T, O) what an MLP gives for the tokens; ``None`` if it fails."""
        tokens = _tokens(width)
        for shape in (tokens.shape, (-1, width)):  # some take rows only
            try:
                output = mlp(tokens.clone().view(shape))
            except Exception as error:  # a user's module may raise anything
                failure = f"{type(error).__name__}: {error}"
            else:
                if isinstance(output, Tensor) and output.dim() > 1:
                    return output.flatten(0, -2)
                failure = f"it returns a {type(output).__name__}"
            self.failure = self.failure or failure
        return None


class Given(nn.Module):
    """Stands for a layer, and gives what is known before.

    Args:
        rows: (T, O).
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear has)
        """The rows in the shape of the tokens."""
        return self.rows.view(*input.shape[:-1], -1)


def _tokens(width: int) -> Tensor:
    """Random tokens, two of each scale."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor(SCALES, dtype=torch.float64, device="cpu")
    tokens = torch.empty(2, len(scales), width, dtype=scales.dtype, device="cpu")
    tokens.normal_(generator=generator)
    return tokens * scales[:, None]


def _is_of_float32(norm: Any) -> bool:
    """True for a norm that computes in float32."""
    output = norm(_tokens(norm.normalized_shape[0]))
    return torch.equal(output, output.float().double())


# parameters ---------------------------------------------------------------------------------------


def _lost(mlp: nn.Module, form: MLPForm) -> Iterator[tuple[str, str]]:
    """Yield what experts in an MLP's place would lose, as (got, expected) for an error."""
    read: set[int] = set()
    for part in (*form.ups, form.down, form.input_norm, form.hidden_norm):
        if part is not None:
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
    if len({up.bias is None for up in form.ups}) > 1:
        yield (
            " with a gate or a value that has no bias",
            "a bias in both or in none: experts would train it",
        )
    frozen = [path for path, parameter in mlp.named_parameters() if not parameter.requires_grad]
    if 0 < len(frozen) < len(first_paths):
        yield f" with {frozen[0]} frozen", "all of its parameters to be frozen, or none"
    for path, _ in mlp.named_buffers():
        yield f" with the buffer {path}", "none, since experts would not have it"
