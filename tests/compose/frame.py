"""The frame of the random composer: what each target says, how a case runs, how it is judged.

A number is a case: a module, its input, and what both go through. A :class:`Target` draws it and
says how the library is called and what the module is by definition. The frame does the rest, once
for all targets:

1. Build the module. It has to start as the dense one that it replaces.
2. Draw all parameters anew, and let the module go through what comes before.
3. Compare outputs, routings and all gradients with the definition, in float64.
4. Compare with the same in low precision, and with other ways to the same output.
5. Let the module go through what comes after: its outputs have to stay.

In a fifth of the cases features are zeros, duplicates or constants. There no output, gradient or
second gradient may be NaN, also where that of the definition is.

Refusals in the library's own words are counted apart, if the case can get them. All else that is
not equal is a bug, of the library or of the composer.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from random import Random
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gmoe import Routing
from tests.compose.calls import Call, script_of
from tests.compose.drawing import REASONS, Reason, flip
from tests.compose.steps import (
    AFTER,
    BEFORE,
    CHANGES,
    COPIES,
    REBUILT,
    in_mode,
    zero_gradients,
)
from tests.helpers import masked as ref
from tests.helpers.flat import FLAT, gradients_of, require_finite, spread

OWN_WORDS = re.compile(r"[\w., ]+: got .*(expected|but)|inference: ", re.DOTALL)
"""How gmoe's refusals begin, and what they say."""

CHUNK = 25
"""How many numbers one test runs."""

LOW_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}

MISSING = ("is not implemented", "create_graph: got True with a sparse matrix")
"""What torch cannot differentiate twice, or gmoe refuses since torch would lose a part of it."""


class Outcome(NamedTuple):
    """``"equal"``, ``"refused"``, ``"tied"`` (rounding decides) or ``"failed"``, and why."""

    kind: str
    message: str = ""


class DifferentError(AssertionError):
    """Numbers that should be equal are not."""


def require_equal(
    what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float
) -> None:
    """Raise :class:`DifferentError` unless all tensors are equal; NaN is as far as can be.

    What an option leaves unused has no gradient in the definition, ``None``, and is not compared.
    Differences are relative where values exceed 1: in deep models gradients reach 1e6, and the
    definition itself moves by more than the tolerance if its input changes in the last digit.
    """
    assert ours.keys() == theirs.keys(), f"{what}: {sorted(ours)} and {sorted(theirs)}"
    for name, expected in theirs.items():
        # What an option leaves unused has no gradient in the definition.
        if expected is None:
            continue
        shapes = (tuple(ours[name].shape), tuple(expected.shape))
        if shapes[0] != shapes[1]:
            raise DifferentError(f"{what}, {name}: shapes {shapes[0]} and {shapes[1]}")
        if not expected.numel():
            continue
        scale = float(expected.abs().max().clamp(min=1))
        difference = float((ours[name] - expected).abs().max()) / scale
        # Not greater than: NaN is neither.
        if not difference <= tolerance:
            raise DifferentError(f"{what}, {name}: differs by {difference:.1e}")


@dataclass(kw_only=True, repr=False)
class Case:
    """What all targets draw; a subclass has what one target draws. Each part has a default."""

    seed: int
    """Of parameters, inputs and noise."""
    way: str = ""
    """Which module runs, or in which other way it gives its output."""
    options: dict[str, Any] = field(default_factory=dict)
    """As the library takes them."""
    training: bool = False
    before: tuple[str, ...] = ()
    """What module and input have been through before the call that counts."""
    after: str = "nothing"
    """What the module goes through after it."""
    low: str = ""
    """A low precision to compare with, if any."""
    flat: str = ""
    """What becomes of the features, if formulas are not smooth there."""

    def features(self, x: Tensor) -> Tensor:
        """Random features, or what becomes of them; as rows."""
        if not self.flat:
            return x
        return FLAT[self.flat](x.reshape(-1, x.size(-1))).view(x.shape)

    def __repr__(self) -> str:
        """The case as a call, without what is as by default."""
        # Values that hold tensors have no equality of their own.
        default = type(self)(seed=self.seed)
        drawn = {one.name: getattr(self, one.name) for one in fields(self)}
        is_drawn = [name for name in drawn if repr(drawn[name]) != repr(getattr(default, name))]
        shown = [f"{name}={drawn[name]!r}" for name in ["seed", *is_drawn]]
        return f"{type(self).__name__}({', '.join(shown)})"


class Output(NamedTuple):
    """What a call gives, and the convs that its definition is made of."""

    y: dict[str, Tensor]
    routings: list[Routing]
    convs: Any = None

    @property
    def detached(self) -> dict[str, Tensor]:
        return {name: y.detach() for name, y in self.y.items()}

    @property
    def bent(self) -> Tensor:
        """A number of which the outputs have second gradients."""
        return torch.stack([spread(y) + y.square().sum() for y in self.y.values()]).sum()

    def backward(self, retain_graph: bool = False) -> None:
        """Backpropagate a weighted sum of all outputs and all losses of routers."""
        terms = [(y * ref.features(*y.shape, seed=5)).sum() for y in self.y.values()]
        # Of routers, too: a gradient that only a loss has would go unseen.
        loss = torch.stack([*terms, *(routing.aux_loss for routing in self.routings)]).sum()
        if loss.requires_grad:
            loss.backward(retain_graph=retain_graph)


class Target:
    """What is composed; a subclass says what differs between targets.

    Attributes:
        name: as the command line calls it.
        own_before: what a module goes through before the call that counts, beside the steps of
            :mod:`tests.compose.steps`.
        own_after: what it goes through after it; each gives the module.
        other_ways: other ways to the same output, by ``way`` of the case.
        reasons: the refusals that a case can get.
        tolerance: how far from its definition a module may be.
        share: of a chunk's numbers, how many are equal at least; a few of hundreds of chunks have
            far fewer than the mean.
    """

    name: str
    tolerance: float = 1e-10
    share: float = 0.5
    reasons: Sequence[Reason] = ()
    other_ways: ClassVar[Mapping[str, Callable[[Any, Any, Any], dict[str, Tensor]]]] = {}
    own_before: ClassVar[Mapping[str, Callable[[Any, Any, Any], Any]]] = {}
    own_after: ClassVar[Mapping[str, Callable[[Any, Any, Any], Any]]] = {}

    def draw(self, random: Random) -> Any:
        """A case, a :class:`Case` of the target."""
        raise NotImplementedError

    def traits(self, case: Any) -> Iterable[str]:
        """What of a case is counted."""
        raise NotImplementedError

    def module_of(self, case: Any) -> Call:
        """How the library is called for the module."""
        raise NotImplementedError

    def given_of(self, case: Any, seed: int, dtype: torch.dtype = torch.float64) -> Any:
        """Fresh arguments of a call."""
        raise NotImplementedError

    def call(self, case: Any, module: Any, given: Any) -> Output:
        """Output and routings."""
        raise NotImplementedError

    def define(self, case: Any, module: Any, given: Any) -> Output:
        """The same by definition, from the module's own parts."""
        raise NotImplementedError

    def dense(self, case: Any) -> Any:
        """The dense module that a new one should start as, by the same seed; if there is one."""
        return None

    def change(self, given: Any) -> Any:
        """The arguments after their features changed in place."""
        raise NotImplementedError

    def with_routings(self, module: nn.Module, given: Any, weights: list[Tensor]) -> Any:
        """Arguments, or hooks on routers, that route a call by these weights of tokens."""
        raise NotImplementedError

    def gradients(self, module: nn.Module, convs: Any) -> dict[str, Any]:
        """The gradients of all parameters."""
        return {name: ref.gradient(value) for name, value in module.named_parameters()}

    def environment(self, case: Any) -> AbstractContextManager[Any]:
        """Where the module runs; its definition does not."""
        return nullcontext()

    def has_layers(self, case: Any) -> bool:
        """True if what one layer gives, rounded, is what the next one chooses by."""
        return False

    def may_be_flat(self, case: Any) -> bool:
        """False if the definition itself is none where formulas are not smooth."""
        return True

    def has_shared_graph(self, given: Any) -> bool:
        """True if two calls share a part of autograd's graph that is made once, by torch."""
        return False

    # What the frame does

    def draw_steps(self, random: Random, case: Any, left_out: Collection[str]) -> None:
        """What a case goes through: up to two steps before, and one after."""
        before = [step for step in (*BEFORE, *self.own_before) if step not in left_out]
        case.before = tuple(random.sample(before, random.choice((0, 1, 1, 2))))
        after = dict.fromkeys((*AFTER, *self.own_after))
        case.after = random.choice([step for step in after if step not in left_out])

    def build(self, case: Any) -> Any:
        """The module as it starts."""
        torch.manual_seed(case.seed)
        return self.module_of(case).made()

    def redraw(self, case: Any, module: nn.Module) -> None:
        """New values for parameters and counters: no option is left without effect.

        Experts that start as copies differ. The mean of a step is not what its only token leaves.
        """
        generator = torch.Generator().manual_seed(case.seed)
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            leaf = name.rpartition(".")[2]
            if leaf == "steps":
                nn.init.ones_(value)
            elif leaf == "gain":
                nn.init.constant_(value, Random(case.seed).choice((-1.0, 0.5, 2.0)))
            elif case.flat and case.seed % 2 and leaf in ("bias", "center_D"):
                nn.init.zeros_(value)  # so that rows of zeros are zeros for norms, too
            elif leaf == "running_var":
                nn.init.uniform_(value, 0.5, 2.0, generator=generator)
            elif value.is_floating_point() and not leaf.startswith("avg_deg"):  # of PNA's graphs
                of_experts = re.search(r"(^|\.)experts\.", name)
                # Experts differ most, so that a token in the wrong one is seen.
                std = 0.4 if of_experts else 0.3 if isinstance(value, nn.Parameter) else 0.2
                # Low thresholds: most tokens pass, and some do not.
                mean = -1.0 if leaf.endswith("threshold_E") else 0.0
                nn.init.normal_(value, mean, std, generator)

    def ready(self, case: Any) -> Any:
        """The module with new parameters, in the mode of the case."""
        module = self.build(case)
        self.redraw(case, module)
        return module.train(case.training)

    def twin(self, case: Any, module: Any) -> Any:
        """A second module, which has been through nothing."""
        return COPIES["deepcopy"](module)

    def seeded(self, run: Callable[[Any, Any, Any], Output], *args: Any) -> Output:
        """A call under the seed of the noise."""
        torch.manual_seed(args[0].seed)
        return run(*args)

    def found(self, case: Any, module: Any, given: Any, output: Output) -> dict[str, Any]:
        """Outputs, routings and all gradients."""
        output.backward(retain_graph=self.has_shared_graph(given))
        weights = [routing.to_dense().detach() for routing in output.routings]
        return {
            **output.detached,
            **{f"routing {index}": weight for index, weight in enumerate(weights)},
            **{name: ref.gradient(leaf) for name, leaf in given.leaves.items()},
            **self.gradients(module, output.convs),
        }

    def compute(self, case: Any) -> None:
        """Raise what is wrong with a case."""
        self.check_start(case)
        module = self.ready(case)
        given = self.given_of(case, case.seed)
        theirs = self.given_of(case, case.seed)
        # It takes the state alone: nothing that the other keeps later can reach it.
        twin = self.twin(case, module)
        with self.environment(case):
            for step in case.before:
                module, given = self.go_through(case, module, given, step)
            twin.load_state_dict(module.state_dict())
            ours = self.found(case, module, given, self.seeded(self.call, case, module, given))
        # The definition sees what the module sees: the features as they are now.
        if "x changed in place" in case.before:
            theirs = self.change(theirs)
        defined = self.seeded(self.define, case, twin, theirs)
        expected = self.found(case, twin, theirs, defined)
        require_equal("the definition", ours, expected, self.tolerance)
        if case.flat:
            self.check_finite(case)
        if case.low:
            self.check_low_precision(case, module, defined.routings)
        if case.way in self.other_ways or case.after != "nothing":
            with torch.no_grad():
                self.check_same_after(case, module.eval(), given)

    def check_start(self, case: Any) -> None:
        """Raise if a new module is not the dense one that it replaces."""
        start = case.options.get("start")
        torch.manual_seed(case.seed)
        dense = None if start == "plain" else self.dense(case)
        if dense is None:
            return
        module = self.build(case)
        given = self.given_of(case, case.seed)
        ours, theirs = (self.seeded(self.call, case, one, given) for one in (module, dense))
        if start == "copies" and any(one.dropped_T is not None for one in ours.routings):
            raise AssertionError("copies that drop tokens were not refused")
        require_equal("the start", ours.detached, theirs.detached, self.tolerance)

    def check_finite(self, case: Any) -> None:
        """Raise if an output, a gradient or a second gradient is NaN, whatever the definition's."""
        module = self.ready(case)
        given = self.given_of(case, case.seed)
        # torch's other kernels of attention have no second gradients.
        with self.environment(case), sdpa_kernel(SDPBackend.MATH):
            output = self.seeded(self.call, case, module, given)
            losses = [routing.aux_loss for routing in output.routings]
            leaves = {**given.leaves, **dict(module.named_parameters())}
            try:
                found = gradients_of(torch.stack([output.bent, *losses]).sum(), leaves)
            except RuntimeError as error:
                if any(reason in str(error) for reason in MISSING):
                    return
                raise
        require_finite(output.y | found)

    def check_same_after(self, case: Any, module: Any, given: Any) -> None:
        """Raise if another way gives another output, or if what comes after changes it."""
        last = self.seeded(self.call, case, module, given).y
        if case.way in self.other_ways:
            y = self.other_ways[case.way](case, module, given)
            require_equal(case.way, y, last, self.tolerance)
        # A file or a fresh build may come back in training mode.
        module = self.go_on(case, module, given).eval()
        y = self.seeded(self.call, case, module, given).y
        require_equal(f"after {case.after}", y, last, self.tolerance)

    def go_through(self, case: Any, module: Any, given: Any, step: str) -> tuple[Any, Any]:
        """What happens to module and arguments before the call that counts; both after it."""
        if step in self.own_before:
            self.own_before[step](case, module, given)
        elif step in CHANGES:
            self.change_module(case, module, given, step)
        else:
            other = self.given_of(case, case.seed + 1) if step == "other input" else given
            output = in_mode(step, lambda: self.seeded(self.call, case, module, other))
            if step == "step":
                output.backward(retain_graph=self.has_shared_graph(given))
        module = COPIES[step](module) if step in COPIES else module
        # After the copy: it has to follow, too.
        given = self.change(given) if step == "x changed in place" else given
        zero_gradients(module, given.leaves.values())
        return module, given

    def change_module(self, case: Any, module: Any, given: Any, step: str) -> None:
        """A call with other weights, frozen ones, or in another precision."""
        with CHANGES[step](module):
            dtype = torch.get_default_dtype()
            if dtype != torch.float64:
                given = self.given_of(case, case.seed + 1, dtype)
            self.seeded(self.call, case, module, given)

    def go_on(self, case: Any, module: Any, given: Any) -> Any:
        """What the module goes through at the end."""
        if case.after in self.own_after:
            return self.own_after[case.after](case, module, given)
        if case.after in REBUILT:
            return REBUILT[case.after](module, lambda: self.build(case))
        return COPIES[case.after](module)

    def check_low_precision(self, case: Any, module: Any, routings: list[Routing]) -> None:
        """Raise if float32, or bfloat16 under autocast, is too far, with the same routing.

        The gradients are those of a sum, whose own gradient is expanded.
        """
        found = []
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)  # of what PyG makes; :meth:`run` sets it back
            # A copy, since the module goes on in float64 afterwards.
            copied = COPIES["deepcopy"](module).to(dtype)
            weights = [routing.to_dense().detach().to(dtype) for routing in routings]
            given = self.given_of(case, case.seed, dtype)
            given = self.with_routings(copied, given, [w.requires_grad_() for w in weights])
            # Both run in the same routing: a choice between two experts may turn in low precision.
            is_half = case.low == "bfloat16" and dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                output = self.seeded(self.call, case, copied, given)
            values = output.detached
            if case.low == "float32":
                torch.stack([y.sum() for y in output.y.values()]).sum().backward()
                values |= {name: ref.gradient(leaf) for name, leaf in given.leaves.items()}
            found.append({name: value.double() for name, value in values.items()})
        require_equal(case.low, found[0], found[1], LOW_TOLERANCE[case.low])

    # Judging

    def may_refuse(self, case: Any, message: str) -> bool:
        """True if the message is one that the case can get."""
        reasons = (*REASONS, *self.reasons)
        return any(re.match(one.pattern, message) and one.fits(case) for one in reasons)

    def is_tied(self, case: Any) -> bool:
        """True if the module differs from itself by what rounding may do to equal rows.

        Of one layer, ties go by a rule. Behind another layer, rows that should be equal differ in
        their last bits, by which experts and maxima are chosen.
        """
        if not case.flat or not self.has_layers(case):
            return False
        found = []
        for nudge in (0.0, 1e-15):
            module, given = self.ready(case), self.given_of(case, case.seed)
            with torch.no_grad():
                for leaf in (*given.leaves.values(), *module.parameters()):
                    leaf.mul_(1 + nudge * ref.features(*leaf.shape))
            with self.environment(case):
                output = self.seeded(self.call, case, module, given)
                found.append(self.found(case, module, given, output))
        try:
            require_equal("itself", found[0], found[1], self.tolerance)
        except DifferentError:
            return True
        return False

    def run(self, case: Any) -> Outcome:
        """What a case comes to; an error is a refusal only in gmoe's own words."""
        with warnings.catch_warnings(), ref.default_float64():
            warnings.simplefilter("ignore")
            try:
                self.compute(case)
            except Exception as error:
                text = str(error)
                # A KeyError in the right words would still be an accident.
                is_own = isinstance(error, ValueError | RuntimeError | NotImplementedError)
                is_own &= OWN_WORDS.match(text) is not None
                kind = "refused" if is_own and self.may_refuse(case, text) else "failed"
                if isinstance(error, DifferentError) and self.is_tied(case):
                    kind = "tied"
                return Outcome(kind, f"{type(error).__name__}: {text}")
            return Outcome("equal")

    def of(self, number: int) -> Any:
        """The case of a number."""
        with ref.default_float64():
            random = Random(number)
            case = self.draw(random)
            # Drawn last: what else a number is does not depend on it.
            if flip(random, 0.3):
                case.before += (random.choice(tuple(CHANGES)),)
            if flip(random, 0.2) and self.may_be_flat(case):
                case.flat = random.choice(tuple(FLAT))
            return case

    def show(self, number: int) -> str:
        """What a number comes to, and a script that does the same."""
        case = self.of(number)
        outcome = self.run(case)
        script = script_of(self, case, self.module_of(case))
        return f"# {self.name} {number}: {outcome.kind} {outcome.message}\n{script}"

    def check(self, first: int) -> None:
        """For a test: no number of a chunk fails, and a share of them at least is equal."""
        kinds = Counter[str]()
        for number in range(first, first + CHUNK):
            kind = self.run(self.of(number)).kind
            kinds[kind] += 1
            assert kind != "failed", self.show(number)
        assert kinds["equal"] >= self.share * CHUNK
