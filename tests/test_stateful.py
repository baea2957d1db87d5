"""Histories: whatever befell a model, it computes what a new one does that has its state.

Hypothesis draws a model and what befalls it, in any order: training steps, evaluation, calls
without gradients, copies, pickles, saving and loading, frozen parts, other precision, experts that
are pruned, folded and unstacked, another graph, and features, weights or edges that change in
place. The reference remembers nothing: a model that is built for one call, from the arguments, the
numbers of the experts that are left and the ``state_dict``, on copies of the inputs and plain
edges. Outputs, gradients and what is counted have to be equal.
So what a model or its graph keeps from call to call has to follow from what is there now.

Both machines fail where a repair of ``tests/compose.md`` is taken out: see
:func:`test_what_is_kept_too_long_is_found`.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import gmoe
from gmoe import GNNMoE, Graph, ViTMoE
from gmoe.pruning import groups_of
from gmoe.routers.balance import BalancedRouter
from gmoe.stack import fold

EXPERTS, WIDTH, CLASSES = 4, 4, 3
SEEDS = st.integers(0, 999)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
ROUTERS = ("token_choice", "expert_choice", "attention_vote", "multi_centroid", "random")
CONVS = ("gcn", "sage", "graph", "gin", "gat", ["gcn", "graph", "gcn", "sage"])
WEIGHTED = ("gcn", "graph")
KEEPS = st.sampled_from(["nothing", "edges", "x", "weight"])
FIRST = st.sampled_from([None, torch.no_grad, torch.inference_mode])


@contextmanager
def quietly() -> Iterator[None]:
    """Float64 by default, and no warnings of sparse tensors."""
    before = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class History(RuleBasedStateMachine):
    """A model and what may befall it, whatever its inputs are."""

    model: Any
    x: Tensor
    looks_away = 0
    """Rules until the next comparison."""
    is_pruned = False
    is_unstacked = False
    is_folded = False
    is_rebuilt = False
    """Its parameters are no longer those of a model of the same arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = quietly()
        self.stack.__enter__()

    def teardown(self) -> None:
        """Compare at the end, whatever was left out."""
        try:
            if hasattr(self, "model"):
                self.looks_away = 0
                self.equals_a_new_model()
        finally:
            self.stack.__exit__(None, None, None)

    def build(self) -> Any:
        """A new model of the same arguments."""
        return type(self.model)(**self.model.config)

    def inputs(self, fresh: bool) -> tuple[Any, ...]:
        """What the model is called with; ``fresh`` copies if asked for."""
        raise NotImplementedError

    def call(self, model: Any, inputs: tuple[Any, ...]) -> Tensor:
        """How the model runs that is compared."""
        found: Tensor = model(*inputs)
        return found

    def leaves(self) -> list[Tensor]:
        """The inputs that may have gradients."""
        return [self.x]

    # What befalls it

    @rule(seed=SEEDS, steps=st.integers(1, 3))
    def train(self, seed: int, steps: int) -> None:
        """Some steps of SGD in training mode."""
        self.model.train()
        torch.manual_seed(seed)
        for _ in range(steps):
            trained = [value for value in self.model.parameters() if value.requires_grad]
            y = self.model(*self.inputs(fresh=False))
            if y.requires_grad and trained:
                (y - 1).square().mean().backward()
                torch.optim.SGD(trained, lr=0.05).step()
            self.clear()

    @rule(trains=st.booleans())
    def change_mode(self, trains: bool) -> None:
        """Training or evaluation."""
        self.model.train(trains)

    @rule(how=st.sampled_from([torch.no_grad, torch.inference_mode]))
    def call_without_gradients(self, how: Callable[[], Any]) -> None:
        """In evaluation, as a service does."""
        trained = self.model.training
        self.model.eval()
        with how():
            self.model(*self.inputs(fresh=False))
        self.model.train(trained)

    @rule()
    def copy_it(self) -> None:
        """Go on with a deep copy."""
        self.model = copy.deepcopy(self.model)

    @rule()
    def pickle_it(self) -> None:
        """Go on with what another process would unpickle."""
        self.model = pickle.loads(pickle.dumps(self.model))

    @rule(in_place=st.booleans())
    @precondition(lambda self: not self.is_rebuilt)
    def load_the_state(self, in_place: bool) -> None:
        """Of a file, into the model itself or a new one."""
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        if not in_place:
            self.model = self.like_it(self.build())
        self.model.load_state_dict(state)

    @rule(seed=SEEDS)
    @precondition(lambda self: not self.is_rebuilt)
    def load_other_weights(self, seed: int) -> None:
        """Of a model that was drawn anew."""
        torch.manual_seed(seed)
        other = self.like_it(self.build())
        move(other)
        self.model.load_state_dict(other.state_dict())

    @rule()
    @precondition(lambda self: not self.is_unstacked and not self.is_folded)
    def save_and_load_by_the_hub(self) -> None:
        """As ``save_pretrained`` and ``from_pretrained`` do, whatever was done to it before."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded = type(self.model).from_pretrained(folder)
        self.model = self.like_it(loaded)

    @rule()
    @precondition(lambda self: not self.is_unstacked and not self.is_folded)
    def save_and_load(self) -> None:
        """As ``gmoe.save`` and ``gmoe.load`` do, experts that are gone included."""
        with tempfile.TemporaryDirectory() as folder:
            gmoe.save(self.model, folder)
            self.model = self.like_it(gmoe.load(folder, base=self.build()))

    @rule(part=st.integers(0, 50), trains=st.booleans())
    def freeze(self, part: int, trains: bool) -> None:
        """Some module of it, or let it train again."""
        modules = list(self.model.modules())
        modules[part % len(modules)].requires_grad_(trains)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def change_precision(self, dtype: torch.dtype) -> None:
        """Of the model and its inputs."""
        self.model.to(dtype)
        self.x = self.x.detach().to(dtype).requires_grad_(self.x.requires_grad)

    @rule(seed=SEEDS)
    @precondition(lambda self: not self.is_pruned and not self.is_unstacked)
    def prune(self, seed: int) -> None:
        """Take some experts away, once."""
        kept = sorted(Random(seed).sample(range(EXPERTS), 3))
        for group in groups_of(self.model):
            group.keep(kept)
        self.is_pruned = self.is_rebuilt = True

    @rule()
    def fold(self) -> None:
        """Make experts independent that share a base."""
        with self.same_outputs():
            self.model = fold(self.model)
        self.is_folded = self.is_rebuilt = True

    @rule()
    def unstack(self) -> None:
        """Give each expert linear layers of its own."""
        with self.same_outputs():
            self.model = gmoe.unstack(self.model)
        self.is_unstacked = self.is_folded = self.is_rebuilt = True

    @rule(seed=SEEDS)
    def change_features(self, seed: int) -> None:
        """In place."""
        with torch.no_grad():
            self.x[seed % len(self.x)] += 1
        self.tell_the_graph()

    def tell_the_graph(self) -> None:
        """Of inputs that changed in place, if there is one."""

    @rule(needs=st.booleans())
    def ask_for_gradients_of_features(self, needs: bool) -> None:
        """Or no longer."""
        self.x.requires_grad_(needs)

    @rule(seed=SEEDS)
    def change_weights(self, seed: int) -> None:
        """In place, and without the optimizer."""
        torch.manual_seed(seed)
        move(self.model)

    @rule(rules=st.integers(1, 3))
    def look_away(self, rules: int) -> None:
        """Compare later: a comparison is a call, too."""
        self.looks_away = rules

    # That nothing of it is left

    def like_it(self, other: Any) -> Any:
        """Another model in the mode, the precision and with the frozen parts of this one."""
        other.train(self.model.training).to(self.x.dtype)
        trains = {name: value.requires_grad for name, value in self.model.named_parameters()}
        for name, value in other.named_parameters():
            value.requires_grad_(trains[name])
        return other

    def changed_alike(self) -> Any:
        """A new model to which is done what was done to this one."""
        other = self.build()
        for mine, group in zip(groups_of(self.model), groups_of(other), strict=True):
            kept = next(iter(mine.layers.values())).kept
            if kept is not None:
                group.keep(kept)
        if self.is_folded:
            other = fold(other)
        return gmoe.unstack(other) if self.is_unstacked else other

    def new(self) -> Any:
        """A new model of the same state."""
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        other = self.like_it(self.changed_alike())
        other.load_state_dict(state)
        return other

    @contextmanager
    def same_outputs(self) -> Iterator[None]:
        """What is done inside leaves the outputs in evaluation as they were."""
        before = self.evaluated()
        yield
        difference = (self.evaluated() - before).abs().max().item()
        assert difference <= TOLERANCE[before.dtype] * (1 + before.abs().max().item())

    def evaluated(self) -> Tensor:
        """The outputs in evaluation, of a copy: nothing is kept of the call."""
        with torch.no_grad():
            outputs: Tensor = copy.deepcopy(self.model).eval()(*self.inputs(fresh=True))
        return outputs

    def clear(self) -> None:
        """Forget gradients."""
        self.model.zero_grad()
        for leaf in self.leaves():
            leaf.grad = None

    @invariant()
    def equals_a_new_model(self) -> None:
        """Outputs, gradients, and what is counted."""
        if not hasattr(self, "model"):
            return
        if self.looks_away:
            self.looks_away -= 1
            return
        new, found, expected = self.new(), dict[str, Any](), dict[str, Any]()
        fresh = self.inputs(fresh=True)
        leaves = [value for value in fresh if isinstance(value, Tensor)]
        own = [leaf for leaf in self.leaves() if leaf.requires_grad]
        theirs = [value for value in leaves if value.requires_grad]
        for model, inputs, of, into in (
            (self.model, self.inputs(fresh=False), own, found),
            (new, fresh, theirs, expected),
        ):
            torch.manual_seed(0)
            y = self.call(model, inputs) if model is self.model else model(*inputs)
            if y.requires_grad:
                (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            into |= {"y": y.detach(), **dict(model.state_dict())}
            into |= {f"grad of {name}": value.grad for name, value in model.named_parameters()}
            into |= {f"grad of input {place}": leaf.grad for place, leaf in enumerate(of)}
        tolerance = TOLERANCE[self.x.dtype]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if value is None:
                assert found[name] is None, f"{name}: got a gradient, a new model has none"
            else:
                assert found[name] is not None, f"{name}: got no gradient, a new model has one"
                difference = (found[name] - value).abs().max().item() if value.numel() else 0.0
                size = 1 + value.abs().max().item() if value.numel() else 1.0
                assert difference <= tolerance * size, f"{name}: differs by {difference:.1e}"
        self.clear()


class GraphHistory(History):
    """A GNN on a graph that is kept from call to call, or on plain edges."""

    graph: Graph | None = None
    weight: Tensor | None = None

    @initialize(
        conv=st.sampled_from(CONVS),
        router=st.sampled_from(ROUTERS),
        k=st.sampled_from([1, 2]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "shared_router": st.booleans(),
                "router_input": st.sampled_from(["node", "neighbors", ("node", "degree")]),
                "start": st.sampled_from(["plain", "shared", "copies"]),
                "dropout": st.just(0.3),
                "norm": st.just("batch_norm"),
                "jk": st.sampled_from(["cat", "last"]),
            },
        ),
        seed=SEEDS,
        keeps=KEEPS,
        first=FIRST,
    )
    def draw(
        self,
        conv: Any,
        router: str,
        k: int,
        options: dict[str, Any],
        seed: int,
        keeps: str,
        first: Any,
    ) -> None:
        """A model, without the options that are refused together."""
        torch.manual_seed(seed)
        sizes = (WIDTH, WIDTH, CLASSES)
        arguments: dict[str, Any] = {"conv": conv, "router": router, "num_experts": EXPERTS, "k": k}
        build: Any = GNNMoE
        try:
            self.model = build(*sizes, **arguments, **options)
        except ValueError:
            options.pop("start", None)
            self.model = build(*sizes, **arguments, **options)
        move(self.model)
        self.takes_weight = conv in WEIGHTED
        self.other_graph(seed, 12, keeps, first)

    @rule(
        seed=SEEDS,
        nodes=st.integers(5, 14),
        keeps=KEEPS,
        first=FIRST,
    )
    def other_graph(self, seed: int, nodes: int, keeps: str, first: Any) -> None:
        """Other features and edges; as a ``Graph``, with or without features and weights, or
        plain. The first call, whose results a ``Graph`` keeps, may be one without gradients."""
        torch.manual_seed(seed)
        dtype = next(self.model.parameters()).dtype
        self.x = torch.randn(nodes, WIDTH, dtype=dtype)
        self.edge_index = torch.randint(nodes, (2, 3 * nodes))
        self.weight = None
        if self.takes_weight and keeps in ("nothing", "weight"):
            self.weight = torch.rand(3 * nodes, dtype=dtype) + 0.5
        self.graph = None
        if keeps != "nothing":
            x = self.x if keeps == "x" else None
            self.graph = Graph(self.edge_index, nodes, x, edge_weight=self.weight)
        if first is not None:
            self.call_without_gradients(first)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def change_precision(self, dtype: torch.dtype) -> None:
        """The edges stay, the weights go."""
        super().change_precision(dtype)
        if self.weight is not None:
            self.weight, self.graph = None, None

    @rule(seed=SEEDS)
    @precondition(lambda self: self.graph is None)
    def change_edges(self, seed: int) -> None:
        """In place; of a ``Graph`` nobody may."""
        self.edge_index[:, seed % self.edge_index.size(1)] = seed % len(self.x)

    @rule(seed=SEEDS)
    @precondition(lambda self: self.weight is not None)
    def change_edge_weights(self, seed: int) -> None:
        """In place."""
        with torch.no_grad():
            self.weight[seed % len(self.weight)] += 1  # type: ignore[index, arg-type]
        self.tell_the_graph()

    def tell_the_graph(self) -> None:
        """It is frozen: others are made of it."""
        if self.graph is not None:
            self.graph = self.graph.with_x(self.graph.x).with_weights(self.weight)

    @rule(needs=st.booleans())
    @precondition(lambda self: self.weight is not None)
    def ask_for_gradients_of_edge_weights(self, needs: bool) -> None:
        """Or no longer."""
        self.weight.requires_grad_(needs)  # type: ignore[union-attr]

    @rule()
    @precondition(lambda self: self.graph is not None)
    def copy_the_graph(self) -> None:
        """With what it keeps; its features and weights are others then."""
        memo: dict[int, Any] = {}
        self.graph = copy.deepcopy(self.graph, memo)
        self.x = memo.get(id(self.x), self.x)
        self.weight = self.graph.edge_weight  # type: ignore[union-attr]

    @rule(seed=SEEDS)
    @precondition(lambda self: self.graph is not None and self.takes_weight)
    def call_with_other_edge_weights(self, seed: int) -> None:
        """Of this call alone."""
        torch.manual_seed(seed)
        weight = torch.rand(self.edge_index.size(1), dtype=self.x.dtype)
        self.model(self.x, self.graph, weight)
        # What a call in training counts is in the state

    def leaves(self) -> list[Tensor]:
        return [self.x] if self.weight is None else [self.x, self.weight]

    def inputs(self, fresh: bool) -> tuple[Any, ...]:
        if fresh:
            weight = None if self.weight is None else like(self.weight)
            return like(self.x), self.edge_index.clone(), weight
        if self.graph is not None:
            return self.x, self.graph
        return self.x, self.edge_index, self.weight


class ImageHistory(History):
    """A ViT; its inputs are images."""

    @initialize(
        router=st.sampled_from(ROUTERS),
        k=st.sampled_from([1, 2]),
        options=st.fixed_dictionaries(
            {},
            optional={
                "start": st.sampled_from(["plain", "shared", "copies"]),
                "dropout": st.just(0.3),
            },
        ),
        seed=SEEDS,
    )
    def draw(self, router: str, k: int, options: dict[str, Any], seed: int) -> None:
        """A model, without the options that are refused together."""
        torch.manual_seed(seed)
        size = {
            "image_size": 4,
            "patch_size": 2,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 4,
            "mlp_dim": 6,
        }
        arguments: dict[str, Any] = {"router": router, "num_experts": EXPERTS, "k": k}
        try:
            self.model = ViTMoE(size, CLASSES, **arguments, **options)
        except ValueError:
            options.pop("start", None)
            self.model = ViTMoE(size, CLASSES, **arguments, **options)
        move(self.model)
        self.other_images(seed, 3)

    @rule(seed=SEEDS, number=st.integers(1, 4))
    def other_images(self, seed: int, number: int) -> None:
        """Other ones, of another number."""
        torch.manual_seed(seed)
        self.x = torch.randn(number, 3, 4, 4, dtype=next(self.model.parameters()).dtype)

    def inputs(self, fresh: bool) -> tuple[Any, ...]:
        return (like(self.x),) if fresh else (self.x,)


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Add noise to all weights: a model that starts as a dense one has zeros in many places."""
    for value in model.parameters():
        value.add_(0.3 * torch.randn_like(value))


class CompiledGraphHistory(GraphHistory):
    """The same, and comparisons run compiled code, which was compiled for what was there then."""

    def call(self, model: Any, inputs: tuple[Any, ...]) -> Tensor:
        model.compile(backend="aot_eager")
        found: Tensor = model(*inputs)
        model._compiled_call_impl = None  # which copies and pickles would take along
        return found


def like(value: Tensor) -> Tensor:
    """A copy that needs a gradient where ``value`` does."""
    return value.detach().clone().requires_grad_(value.requires_grad)


MACHINES = {"graph": GraphHistory, "images": ImageHistory}


def check(machine: type[History], examples: int, steps: int, **options: Any) -> None:
    """Draw histories of so many steps."""
    drawn = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **options,
    )
    run_state_machine_as_test(machine, settings=drawn)


@pytest.mark.parametrize("name", MACHINES)
def test_histories(name: str) -> None:
    check(MACHINES[name], examples=3, steps=10, derandomize=True)


def keep_the_sums(patch: pytest.MonkeyPatch) -> None:
    """A graph of other features has what was computed for those before."""
    with_x = Graph.with_x

    def keeping(graph: Graph, x: Tensor | None) -> Graph:
        other = with_x(graph, x)
        other.kept.update(graph.kept)
        return other

    patch.setattr(Graph, "with_x", keeping)


def forget_the_balance(patch: pytest.MonkeyPatch) -> None:
    """The bias and the mean that balance experts are no longer part of the state."""
    build = BalancedRouter.__init__

    def forgetful(router: Any, *args: Any, **kwargs: Any) -> None:
        build(router, *args, **kwargs)
        router._non_persistent_buffers_set.update(router._buffers)

    patch.setattr(BalancedRouter, "__init__", forgetful)


BREAKS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "sums of features that changed": ("graph", keep_the_sums),
    "a balance that is not saved": ("images", forget_the_balance),
}
"""Silent errors by what they keep: the machine that finds each, and what breaks the code."""


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
def test_what_is_kept_too_long_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, break_it = BREAKS[what]
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(MACHINES[name], 50, 12, derandomize=True, phases=[Phase.generate])


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_long_histories(name: str) -> None:
    check(MACHINES[name], examples=300, steps=60)


@pytest.mark.slow
def test_histories_of_compiled_models() -> None:
    check(CompiledGraphHistory, examples=20, steps=12)
