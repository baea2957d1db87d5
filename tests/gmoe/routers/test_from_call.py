"""Decisions for groups, from what the model is called with: a type each, or a learned mixture."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Batch, Data

import gmoe
from gmoe.routers import ByType, FromInput
from gmoe.routers.from_call import part_of
from tests.helpers.sources import (
    BATCH,
    BY_SOURCE,
    BY_VECTOR,
    DIM,
    SOURCE,
    SOURCES,
    ByPosition,
    Net,
    atoms,
    equal_with_gradients,
    naive,
    net,
    one_hot,
    systems,
)


@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_a_type_for_each_molecule_chooses_its_experts_weights(mix: str) -> None:
    model, x = net(BY_SOURCE, mix), atoms()
    out = model(x, BATCH, SOURCE)
    equal_with_gradients(model, out, naive(model, x, one_hot()), x)


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR])
def test_one_molecule_needs_no_batch(router: Any) -> None:
    model, x = net(router), atoms()
    told = {"source": SOURCE[1:2], "system": systems()[1:2]}
    batch = torch.zeros(len(x), dtype=torch.int64)
    torch.testing.assert_close(model(x, **told), model(x, batch, **told), rtol=0, atol=1e-14)


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR])
def test_second_gradients_are_those_of_the_definition(router: Any) -> None:
    model, x = net(router), atoms()
    if router is BY_SOURCE:
        weight_GE = one_hot()
    else:
        weight_GE = torch.softmax(model.router_of_system(systems()), dim=1)
    found = []
    for out in (model(x, BATCH, SOURCE, system=systems()), naive(model, x, weight_GE)):
        (force,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        leaves = [x, *model.parameters()]
        found.append(torch.autograd.grad(force.square().sum(), leaves, allow_unused=True))
    for one, other in zip(*found, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR])
def test_copies_pickles_and_files_decide_the_same(router: Any, tmp_path: Path) -> None:
    model, x = net(router), atoms()
    told = {"source": SOURCE, "system": systems()}
    expected = model.eval()(x, BATCH, **told)
    gmoe.save(model, tmp_path)
    loaded = gmoe.load(tmp_path, Net().double())
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(other(x, BATCH, **told), expected, rtol=0, atol=0)


ONE = torch.tensor([7])
BY_ATOM = ByType("source", SOURCES)


class OnData(nn.Module):
    """A model that is called with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(4, 4)

    def forward(self, data: Any) -> Tensor:
        out: Tensor = self.lin1(data["x"])
        return out


def test_an_attribute_of_a_graph_is_read() -> None:
    router = ByType("data.source", SOURCES, batch="data.batch")
    model = net(router, model=OnData())
    graphs = [
        Data(x=torch.randn(n, 4).double(), source=torch.tensor([source]))
        for n, source in ((2, 7), (1, 0), (3, 3), (1, 7))
    ]
    batch = Batch.from_data_list(graphs)
    out = model(batch)
    torch.testing.assert_close(out, torch.cat([model(graph) for graph in graphs]))
    vector = FromInput("data.system", dim=DIM, batch="data.batch")
    learned = net(vector, model=OnData())
    for graph, system in zip(graphs, systems(), strict=True):
        graph.system = system[None]
    out = learned(Batch.from_data_list(graphs))
    torch.testing.assert_close(out, torch.cat([learned(graph) for graph in graphs]))
    as_dict = Batch.from_data_list(graphs).to_dict()
    torch.testing.assert_close(learned(as_dict), out)
    with pytest.raises(ValueError, match=r"^data\.system: got dict without system"):
        learned({"x": as_dict["x"], "batch": as_dict["batch"]})


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (ByType("data.sorce", SOURCES, batch="data.batch"), "data.sorce: got .* without sorce"),
        (ByType("data.source", SOURCES, batch="data.bach"), "data.bach: got .* without bach"),
        (ByType("data.z", SOURCES, batch="data.bach"), "data.bach: got .* without bach"),
        (FromInput("data.sytem", dim=DIM, batch="data.batch"), "data.sytem: got .* without sytem"),
        (FromInput("data.system", dim=DIM, batch="data.a.batch"), "data.a.batch: got .* without a"),
    ],
)
def test_an_attribute_that_a_graph_lacks_is_named(router: Any, message: str) -> None:
    """Not taken for one group, which all atoms of a batch would make up in silence."""
    graph = Data(x=torch.randn(2, 4).double(), source=ONE, z=ONE.repeat(2), system=systems()[:1])
    with pytest.raises(ValueError, match=rf"^{message}"):
        net(router, model=OnData())(Batch.from_data_list([graph, graph]))


def test_an_unknown_source_shares_the_base_by_choice_alone() -> None:
    unknown = torch.tensor([7, 0, 5, 7])
    with pytest.raises(ValueError, match=r"^source: got types \[5\] without an expert"):
        net(BY_SOURCE)(atoms(), BATCH, unknown)
    model, x = net(BY_SOURCE, "outputs", start="shared"), atoms()
    outputs: list[Tensor] = []
    model.lin1.register_forward_hook(lambda _, __, y: outputs.append(y))
    model(x, BATCH, unknown)
    is_unknown = BATCH == 2
    torch.testing.assert_close(outputs[0][is_unknown], model.lin1.shared_expert(x)[is_unknown])


@pytest.mark.parametrize(
    ("router", "told", "message"),
    [
        (BY_SOURCE, {}, "source: got NoneType, expected a tensor of integers"),
        (BY_SOURCE, {"source": ["uff"] * 4}, "source: got list, expected a tensor of int"),
        (BY_SOURCE, {"source": SOURCE.double()}, "source: got .*, expected a tensor of integers"),
        (BY_SOURCE, {"source": 7, "batch": None}, "source: got int, expected a tensor of integers"),
        (BY_ATOM, {"source": SOURCE}, "source: got 4 tokens, expected 7, .*, name .* by batch="),
        (
            BY_SOURCE,
            {"source": SOURCE[:2]},
            "batch: got groups 0 to 3 of 7 tokens, expected 0 to 1: source has 2",
        ),
        (
            BY_SOURCE,
            {"source": SOURCE.repeat(2)},
            "batch: got groups 0 to 3 of 7 tokens, expected 0 to",
        ),
        (
            BY_SOURCE,
            {"source": SOURCE, "batch": BATCH + 1},
            "batch: got groups 1 to 4 of 7 tokens, expected 0 to",
        ),
        (
            BY_SOURCE,
            {"source": SOURCE, "batch": BATCH - 1},
            "batch: got groups -1 to 2 of 7 tokens, expected 0 to",
        ),
        (
            BY_SOURCE,
            {"source": SOURCE, "batch": BATCH[1:]},
            "source, batch: got 6 tokens, expected 7",
        ),
        (BY_SOURCE, {"source": SOURCE, "batch": None}, "source, batch: got 4 tokens, expected 7"),
        (BY_VECTOR, {}, "system: got NoneType, expected a vector of 3 floats for each group"),
        (BY_VECTOR, {"system": torch.ones(4, 2)}, r"system: got .*\(4, 2\).*, expected a vector"),
        (BY_VECTOR, {"system": torch.ones(4, 3).long()}, "system: got .*, expected a vector of 3"),
        (BY_VECTOR, {"system": torch.full((4, 3), torch.nan)}, "system: got NaN or infinity"),
        (
            BY_VECTOR,
            {"system": torch.ones(2, 3)},
            "batch: got groups 0 to 3 of 7 tokens, expected 0 to",
        ),
        (
            BY_VECTOR,
            {"system": torch.ones(7, 3)},
            "batch: got .*, expected 0 to 6: system has 7 rows, one for",
        ),
    ],
)
def test_what_tells_no_decision_is_refused(router: Any, told: Any, message: str) -> None:
    """Also as many rows as atoms, of which the first would decide for all."""
    model = net(router, "outputs" if router is BY_ATOM else "weights")
    with pytest.raises(ValueError, match=rf"^{message}"):
        model(atoms(), **{"batch": BATCH, **told})


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR, ByType("source", SOURCES)])
@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_rows_of_an_atom_have_its_decision(router: Any, mix: str) -> None:
    """As the vectors of an equivariant model: (A, 3, D)."""
    if router.batch is None and mix == "weights":
        return
    model, x = net(router, mix), atoms()
    told = {"source": SOURCE[BATCH] if router.batch is None else SOURCE, "system": systems()}
    out = model(torch.stack([x, 2 * x, -x], dim=1), BATCH, **told)
    each = [model(scale * x, BATCH, **told) for scale in (1, 2, -1)]
    torch.testing.assert_close(out, torch.stack(each, dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("router", "num_experts", "message"),
    [
        (ByType("sorce", SOURCES), None, "argument: got 'sorce', expected an argument of Net.f"),
        (ByType("source", SOURCES, batch="b"), None, "batch: got 'b', expected an argument of"),
        (FromInput("system", dim=4, batch="batch"), None, "argument: got 'system', expected an"),
        (FromInput("system", dim=DIM), None, "argument: got 'system', expected an argument for"),
        (BY_VECTOR, 8, "num_experts: got 8, expected 5, as model.router_of_system has"),
    ],
)
def test_a_model_that_has_no_place_for_it_stays_as_it_was(
    router: Any, num_experts: int | None, message: str
) -> None:
    """Nor for a second network of the same argument, which would be the first one in silence."""
    options: Any = {"start": "copies", "num_experts": num_experts}
    model = gmoe.moefy(Net(), targets="lin2", router=BY_VECTOR, start="copies", num_experts=5)
    with pytest.raises(ValueError, match=rf"^{message}"):
        gmoe.moefy(model, targets="lin1", router=router, **options)
    assert type(model.lin1) is nn.Linear


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BY_VECTOR, BY_VECTOR),
        (BY_SOURCE, BY_SOURCE),
        (BY_SOURCE, ByType("source", [9, 7, 3, 0], batch="batch")),  # more, in another order
        (BY_VECTOR, BY_SOURCE),
    ],
)
def test_layers_that_get_experts_later_take_part(first: Any, second: Any, tmp_path: Path) -> None:
    """A network that is there decides how many experts there are."""
    number = 5 if first is BY_VECTOR else None
    options: Any = {"mix": "weights", "start": "plain"}
    model: Any = Net().double()
    gmoe.moefy(model, targets="lin1", router=first, num_experts=number, **options)
    gmoe.moefy(model, targets="lin2", router=second, **options)
    told = {"source": SOURCE, "system": systems()}
    x = atoms()
    out = model.eval()(x, BATCH, **told)
    for group in range(len(SOURCE)):
        own = {name: value[group : group + 1] for name, value in told.items()}
        read = {name: own[name] for name in {first.argument, second.argument}}
        atoms_of = x[group == BATCH]
        merged = gmoe.merge(model, **read)
        torch.testing.assert_close(merged(atoms_of), out[group == BATCH], rtol=0, atol=1e-10)
    gmoe.save(model, tmp_path)
    loaded = gmoe.load(tmp_path, Net().double())
    torch.testing.assert_close(loaded(x, BATCH, **told), out, rtol=0, atol=0)


class Pair(nn.Module):
    """Two models, of which the second is told something else than the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Net()
        self.b = Net()

    def forward(
        self, x: Tensor, batch: Tensor | None, source: Tensor, system: Tensor | None
    ) -> Tensor:
        first: Tensor = self.a(x, batch, source, system=system)
        other = None if system is None else -system
        second: Tensor = self.b(x, batch, 7 * (source == 0), system=other)
        return first + second


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR])
@pytest.mark.parametrize(
    ("calls", "parts"),
    [
        ([("b", "lin*")], ["b", "b"]),
        ([("a", "lin*"), ("b", "lin*")], ["a", "a", "b", "b"]),
        ([("a", "lin1"), ("", ["*.lin2", "b.lin1"])], ["a", "", "", ""]),
        ([("", ["a.lin2", "b.lin1"]), ("b", "lin2")], ["", "b", "b"]),
    ],
)
def test_parts_that_got_experts_alone_decide_by_their_own_calls(
    calls: Any, parts: list[str], router: Any, tmp_path: Path
) -> None:
    """Also once they are saved; layers that got theirs by the whole decide by its calls."""
    model, x = Pair().double(), atoms()
    for part, targets in calls:
        options: Any = {"targets": targets, "mix": "weights", "start": "plain"}
        gmoe.moefy(model.get_submodule(part), router=router, **options)
    model.eval()
    out = model(x, BATCH, SOURCE, systems())
    for group in range(len(SOURCE)):
        told = SOURCE[group : group + 1], systems()[group : group + 1]
        alone = model(x[group == BATCH], None, *told)
        torch.testing.assert_close(alone, out[group == BATCH], rtol=0, atol=1e-12)
    layers = [layer.router for layer in model.modules() if isinstance(layer, gmoe.MoE)]
    assert [part_of(model, layer) for layer in layers] == parts
    gmoe.save(model, tmp_path)
    for other in (deepcopy(model), gmoe.load(tmp_path, Pair().double())):
        torch.testing.assert_close(other(x, BATCH, SOURCE, systems()), out, rtol=0, atol=0)


def test_types_of_as_many_groups_as_tokens_are_told_apart_or_refused() -> None:
    in_order, one_empty = torch.arange(3), torch.tensor([0, 0, 2])
    types = torch.tensor([7, 0, 3])
    found = BY_SOURCE.decide(types, in_order, False, nn.Module())
    torch.testing.assert_close(found.to_dense().double(), one_hot(types))
    with pytest.raises(ValueError, match=r"^source: got 3 types for 3 tokens in as many groups"):
        BY_SOURCE.decide(types, one_empty, False, nn.Module())


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR, BY_ATOM])
def test_transforms_of_torch_func_are_refused_by_name(router: Any) -> None:
    model = net(router, "outputs" if router is BY_ATOM else "weights")
    told = {"source": SOURCE if router.batch else SOURCE[BATCH], "system": systems()}
    for transform in (torch.func.grad, torch.func.vmap, torch.func.hessian):
        with pytest.raises(
            RuntimeError, match=r"torch\.func transforms \(grad, .* not supported by gmoe"
        ):
            transform(lambda x: model(x, BATCH, **told).sum())(atoms()[None])


@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR])
def test_compiled_and_exported_they_decide_the_same(router: Any) -> None:
    """Export refuses to mix weights, by name; it takes the outputs."""
    told = {"source": SOURCE, "system": systems()}
    model, x = net(router).eval(), atoms().detach()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x, BATCH, **told), model(x, BATCH, **told))
    with pytest.raises(ValueError, match=r"^torch\.export: got mix='weights', expected mix='out"):
        torch.export.export(model, (x, BATCH), told, strict=False)
    of_outputs = net(router, "outputs").eval()
    exported = torch.export.export(of_outputs, (x, BATCH), told, strict=False).module()
    torch.testing.assert_close(exported(x, BATCH, **told), of_outputs(x, BATCH, **told))


class InCheckpoints(Net):
    """Its layers run in checkpoints, the first one on atoms without gradients."""

    use_reentrant = False

    def forward(
        self, x: Tensor, batch: Any = None, source: Any = None, *, system: Any = None
    ) -> Tensor:
        h = checkpoint(self.lin1, x, use_reentrant=self.use_reentrant)
        return checkpoint(self.lin2, h.tanh(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mix", ["weights", "outputs"])
@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR])
def test_checkpoints_of_two_calls_have_each_its_decision_or_are_refused(
    router: Any, mix: str, use_reentrant: bool
) -> None:
    """Reentrant ones are where it is learned: torch would say that a graph was freed."""
    plain, saving = net(router, mix), net(router, mix, model=InCheckpoints())
    saving.use_reentrant = use_reentrant
    saving.load_state_dict(plain.state_dict())
    found = []
    for model in (plain, saving):
        x = atoms()
        told = [
            {"source": SOURCE, "system": systems()},
            {"source": SOURCE.flip(0), "system": -systems()},
        ]
        loss = sum(model(x, BATCH, **one).square().sum() for one in told)
        model(x, BATCH, **told[0])  # is dropped
        if use_reentrant and model is saving and router is BY_VECTOR:
            with pytest.raises(ValueError, match=r"^system: got a learned .*, expected .*=False"):
                loss.backward()
            return
        loss.backward()
        found.append([x.grad, *[one.grad for one in model.parameters()]])
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


BY_COMPOSITION = ByType("source", [*SOURCES, 9], batch="batch")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("mix", ["weights", "outputs"])
@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR, BY_COMPOSITION, BY_ATOM])
def test_a_traced_model_decides_for_molecules_of_other_sizes(router: Any, mix: str) -> None:
    if router is BY_ATOM and mix == "weights":
        return
    model = net(router, mix, model=ByPosition()).eval()

    def call(*sizes: int) -> tuple[Tensor, ...]:
        batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        is_by_atom = router in (BY_ATOM, BY_COMPOSITION)
        source = torch.tensor([7, 0, 3]).repeat(len(batch))
        source = source[: len(batch) if is_by_atom else len(sizes)]
        return torch.randn(len(batch), 4).double(), batch, source, systems()[: len(sizes)]

    traced = torch.jit.trace(model, call(2, 3, 2), check_trace=False)
    for sizes in ((2, 3, 2), (1, 1, 9), (6, 5, 4)):
        args = call(*sizes)
        torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mix", ["weights", "outputs"])
@pytest.mark.parametrize("moved", ["told", "batch", "both"])
@pytest.mark.parametrize("router", [BY_SOURCE, BY_VECTOR, BY_COMPOSITION, BY_ATOM])
def test_what_lies_on_another_device_is_named(router: Any, moved: str, mix: str) -> None:
    """In one sentence, before torch says it of an operator."""
    if router is BY_ATOM and (mix == "weights" or moved == "batch"):
        return  # it has no batch
    if router is BY_COMPOSITION and moved == "both":
        return  # meta tensors have no torch.unique
    is_by_atom = router in (BY_ATOM, BY_COMPOSITION)
    told = {"source": SOURCE[BATCH] if is_by_atom else SOURCE, "system": systems(), "batch": BATCH}
    for name in told:
        if moved == "both" or (name == "batch") == (moved == "batch"):
            told[name] = told[name].to("meta")
    names = f"{router.argument}, batch" if router.batch else router.argument
    with pytest.raises(ValueError, match=rf"^({names}|{router.argument}, model): got values on "):
        net(router, mix)(atoms(), **told)


@pytest.mark.parametrize(
    ("router", "k"),
    [
        (BY_ATOM, 1),
        (BY_COMPOSITION, 4),
        (BY_VECTOR, 8),
        (FromInput("system", dim=DIM), 8),  # it counted as one
    ],
)
@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_a_layer_counts_the_experts_that_run(router: Any, k: int, mix: str) -> None:
    model = net(router, mix)
    assert model.lin1.k == k
    assert model.lin1.experts_per_token == (k if mix == "outputs" else 1)
    if mix == "outputs" and k > 1:
        everything = sum(parameter.numel() for parameter in model.parameters())
        assert gmoe.active_parameters(model) == everything


class OfForces(Net):
    """It differentiates itself, as PyG's ``ViSNet(derivative=True)`` does."""

    def forward(
        self, x: Tensor, batch: Any = None, source: Any = None, *, system: Any = None
    ) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        energy = super().forward(x).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("as_call", [False, True])
@pytest.mark.parametrize("mix", ["weights", "outputs"])
@pytest.mark.parametrize("shape", [(4, 5, 4), (4, 2, 3, 4)])
@pytest.mark.parametrize("router", [ByType("source", SOURCES), FromInput("system", dim=DIM)])
def test_images_need_no_number_each(router: Any, shape: Any, mix: str, as_call: bool) -> None:
    """Their tokens have the decision of the image, also in a model that merge has to call."""
    model = net(router, mix, model=OfForces()).eval()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = model(x, source=SOURCE, system=systems())
    for image, own in enumerate(x):
        told = {"source": SOURCE[image : image + 1], "system": systems()[image : image + 1]}
        one = {router.argument: told[router.argument]}
        if mix == "outputs" and isinstance(router, FromInput):
            torch.testing.assert_close(model(own[None], **told)[0], out[image])
            continue
        with torch.no_grad():
            merged = gmoe.merge(model, own[None], **one) if as_call else gmoe.merge(model, **one)
        torch.testing.assert_close(merged(own[None])[0], out[image], rtol=0, atol=1e-10)
