"""Routing by a type that the model is called with."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import HeteroConv

import gmoe
from gmoe.routers import ByType

ELEMENTS = [1, 6, 8]
WIDTH, ATOMS = 4, 9


class Atomwise(nn.Module):
    """Two layers on atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 5)
        self.second = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 5))

    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = scale * self.second(self.first(x).tanh())
        return out


def model_of(start: Any = "copies") -> Any:
    torch.manual_seed(0)
    targets, by_element = ["first", "second"], ByType("z", ELEMENTS)
    return gmoe.moefy(Atomwise(), targets=targets, router=by_element, start=start).double()


def trained(model: Any) -> Any:
    """With experts that differ."""
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def atoms(seed: int = 0, others: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    types = torch.tensor([*ELEMENTS, 35] if others else ELEMENTS)
    z = types[torch.randint(len(types), (ATOMS,), generator=generator)]
    return torch.randn(ATOMS, WIDTH, dtype=torch.double, generator=generator), z


def naive(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """Each atom by itself, through the weights of its element."""
    rows: list[Tensor] = []
    for row, element in zip(x, z.tolist(), strict=True):
        expert = ELEMENTS.index(element)
        experts = model.first.experts
        h = torch.tanh(experts.weight[expert] @ row + experts.bias[expert])
        up, down = model.second.experts.up, model.second.experts.down
        h = nn.functional.silu(up.weight[expert] @ h + up.bias[expert])
        rows.append(down.weight[expert] @ h + down.bias[expert])
    return torch.stack(rows)


def test_each_token_goes_to_the_expert_of_its_type() -> None:
    model, (x, z) = trained(model_of()), atoms()
    x.requires_grad_()
    leaves = [x, *model.parameters()]
    found, expected = model(x, z), naive(model, x, z)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(model(x=x, z=z, scale=2.0), 2 * expected)


@pytest.mark.parametrize("start", ["copies", "shared"])
def test_a_model_starts_as_the_dense_one(start: str) -> None:
    torch.manual_seed(0)
    dense = Atomwise().double()
    x, z = atoms()
    torch.testing.assert_close(model_of(start)(x, z), dense(x, z))


def test_all_layers_share_one_decision() -> None:
    model, (x, z) = model_of(), atoms()
    with gmoe.record_routing(model) as routings:
        model(x, z)
    assert len(routings) == 2
    assert routings[0] is routings[1]
    assert routings[0].load.tolist() == [int((z == element).sum()) for element in ELEMENTS]


def test_other_types_are_left_to_a_shared_expert() -> None:
    model, (x, z) = trained(model_of("shared")), atoms(others=True)
    others = z == 35
    assert others.any()
    y = model(x, z)
    h = model.first.shared_expert(x[others]).tanh()
    torch.testing.assert_close(y[others], model.second.shared_expert(h))
    assert not torch.allclose(
        y[~others], model.second.shared_expert(model.first.shared_expert(x[~others]).tanh())
    )


def test_other_types_are_refused_without_a_shared_expert() -> None:
    x, z = atoms(others=True)
    with pytest.raises(ValueError, match=r"^z: got types \[35\] without an expert, expected some"):
        model_of()(x, z)
    x, z = atoms()
    model = model_of()
    model(x, z)  # the call that failed left nothing behind
    with pytest.raises(RuntimeError, match="z: got a call of a layer alone"):
        model.first(x)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.ones(ATOMS), r"z: got shape \(9,\) of torch.float32, expected a tensor of integers"),
        (torch.ones(3, dtype=torch.long), "z: got 3 tokens, expected 9, those of the layer"),
        (None, "z: got NoneType, expected a tensor"),
    ],
)
def test_types_that_do_not_fit_are_refused(z: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of()(atoms()[0], z)


def test_a_nested_call_has_a_decision_of_its_own() -> None:
    inner = trained(model_of())
    (x, z), (other_x, other_z) = atoms(), atoms(1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = copy.deepcopy(inner.first), inner

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            before = self.inner(other_x, other_z)
            return torch.cat([before, self.first(x)])

    outer = Outer()
    ByType("z", ELEMENTS).attach(outer)
    found = outer(x, z)
    torch.testing.assert_close(found[:ATOMS], inner(other_x, other_z))
    experts = inner.first.experts
    expert = torch.tensor([ELEMENTS.index(element) for element in z.tolist()])
    expected = torch.einsum("ti,toi->to", x, experts.weight[expert]) + experts.bias[expert]
    torch.testing.assert_close(found[ATOMS:], expected)


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    for value, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value.grad, expected.grad)


def slopes(model: Any, x: Tensor, z: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x, z).sum(), x, create_graph=True)
    return slope


class InCheckpoints(Atomwise):
    """Its parts run in checkpoints, as somebody wrote them."""

    way = "second"

    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        run = partial(checkpoint, use_reentrant=self.way == "reentrant")
        if self.way == "inputs":  # do not require gradients
            return run(lambda x: self.second(self.first(x).tanh()), x)
        if self.way == "nested":
            return run(lambda x: run(self.second, run(self.first, x).tanh()), x)
        h = self.first(x).tanh()
        if self.way == "closure":
            return run(lambda: self.second(h)).square()
        h = run(self.second, h)
        if self.way == "forces":
            (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
            return slope + h.sum()
        return h


WAYS = ("second", "reentrant", "inputs", "nested", "closure")


def plain_and_saving(way: str) -> tuple[Any, Any]:
    """Two models of the same weights, of which the second one computes parts again."""
    plain, saving = trained(model_of()), trained(model_of())
    saving.load_state_dict(plain.state_dict())
    saving.__class__ = InCheckpoints
    saving.way = way
    return plain, saving


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_of_several_forwards_have_each_its_types(way: str) -> None:
    """Of the same features, too; and forwards that nobody differentiates change nothing."""
    plain, saving = plain_and_saving(way)
    (x, z), (_, other_z) = atoms(0), atoms(1)
    calls = [(x, z), (x, other_z), atoms(2)]
    losses: dict[Any, list[Tensor]] = {plain: [], saving: []}
    for model, found in losses.items():
        for call in calls:
            y = model(*call) ** (2 if model is plain and way == "closure" else 1)
            found.append(y.square().sum())
            model(*atoms(3))  # is dropped
        with torch.no_grad():
            model.eval()(*atoms(4))
        kept = model.train()(*atoms(5))
        (found[0] + found[2]).backward()
        found[1].backward()
        del kept
    assert_same_gradients(saving, plain)


@pytest.mark.parametrize("way", ["second", "inputs", "nested"])
def test_forces_under_checkpoints_train_as_without(way: str) -> None:
    plain, saving = plain_and_saving(way)
    for model in (plain, saving):
        first, second = (slopes(model, *atoms(seed)).square().sum() for seed in range(2))
        model(*atoms(2))
        (first + second).backward()
        slopes(model, *atoms(3)).square().sum().backward()
    assert_same_gradients(saving, plain)


def test_a_model_may_differentiate_its_checkpoints_itself() -> None:
    plain, saving = plain_and_saving("forces")
    for seed in range(2):
        x, z = atoms(seed)
        saving(x.requires_grad_(), z).square().sum().backward()
        y = slopes(plain, x, z) + plain(x, z).sum()
        y.square().sum().backward()
    assert_same_gradients(saving, plain)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_whole_model_runs_in_a_checkpoint(use_reentrant: bool) -> None:
    """Whose parts run in checkpoints, too."""
    plain, saving = plain_and_saving("second")
    for model in (plain, saving):
        losses = []
        for seed in range(2):
            x, z = atoms(seed)
            x.requires_grad_()
            y = model(x, z)
            if model is saving:
                y = checkpoint(model, x, z, use_reentrant=use_reentrant)
            losses.append(y.square().sum())
        sum(losses).backward()
    assert_same_gradients(saving, plain)


def test_a_checkpoint_of_a_layer_alone_is_refused() -> None:
    model, (x, z) = model_of(), atoms()
    model(x, z).sum().backward()
    with pytest.raises(RuntimeError, match="z: got a call of a layer alone"):
        checkpoint(model.first, x, use_reentrant=False)


def test_hooks_around_a_call_go_on_to_see_what_is_saved() -> None:
    """As those that keep it on the CPU."""
    model, (x, z) = model_of(), atoms()
    counted: list[str] = []

    def count(word: str, value: Tensor) -> Tensor:
        counted.append(word)
        return value

    with saved_tensors_hooks(partial(count, "packed"), partial(count, "unpacked")):
        y = model(x, z).sum()
        number = counted.count("packed")
        assert number > 4
        with pytest.raises(ValueError, match="z: got NoneType"):
            model(x, None)
        (x.requires_grad_() ** 2).sum()  # the hooks are those of before
        assert counted.count("packed") == number + 1
    y.backward()
    assert counted.count("unpacked") == number


def test_what_is_changed_in_place_before_the_backward_pass_is_an_error() -> None:
    """Torch does not look where there are hooks on what is saved."""
    model = model_of("shared")
    y = model(*atoms()).sum()
    with torch.no_grad():
        model.second.shared_expert[2].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="needed for the backward pass was changed in place"):
        y.backward()


def test_types_may_be_given_by_name_alone_have_a_default_and_be_narrow() -> None:
    usual = atoms()[1]

    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor, *others: Tensor, z: Tensor = usual) -> Tensor:
            return self.first(x)

    model: Any = trained(gmoe.moefy(ByName(), targets="first", router=ByType("z", ELEMENTS)))
    x, z = atoms()
    expected = model.double()(x, z=z)
    torch.testing.assert_close(model(x, atoms(1)[1]), expected)
    torch.testing.assert_close(model(x, z=z.to(torch.uint8)), expected)
    with pytest.raises(ValueError, match=r"z: got types \[255\] without an expert"):
        ByType("z", [-1, 1]).decide(
            torch.tensor([255, 1], dtype=torch.uint8), None, False, nn.Module()
        )
    with pytest.raises(ValueError, match=r"values: got .* expected distinct integers"):
        ByType("z", [2**70])


def test_threads_inside_one_model_are_refused() -> None:
    """Here the first one goes on inside of the second one's call, which then goes on."""
    model = trained(model_of()).eval()
    inside, release = threading.Event(), threading.Event()

    def meet(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            release.set()
            first.exception(timeout=20)
        else:
            inside.set()
            release.wait(timeout=20)

    handle = model.second.register_forward_pre_hook(meet)
    message = "^z: got calls of one model in several threads, expected one at a time"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(model, *atoms(0))
        assert inside.wait(timeout=20)
        with pytest.raises(ValueError, match=message):
            model(*atoms(1))
    assert re.match(message, str(first.exception()))
    handle.remove()
    torch.testing.assert_close(model(*atoms(2)), naive(model, *atoms(2)))


def test_compiled_models_route_by_type() -> None:
    torch._dynamo.reset()
    model = trained(model_of())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        call = atoms(seed)
        found, expected = compiled(*call), model(*call)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_nothing_is_left_of_calls_that_the_compiler_gave_up_on() -> None:
    torch._dynamo.reset()
    model = model_of("shared").float()
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for number in range(3, 9):
            compiled(torch.randn(number, WIDTH), torch.ones(number, dtype=torch.long))
    with pytest.raises(RuntimeError, match="z: got a call of a layer alone"):
        model.first(torch.randn(8, WIDTH))


def test_copies_pickles_and_files_route_by_type(tmp_path: Path) -> None:
    model, call = trained(model_of()), atoms()
    expected = model(*call)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(*call), expected)
    gmoe.save(model, tmp_path / "saved")
    loaded: Any = gmoe.load(tmp_path / "saved", base=Atomwise().double())
    torch.testing.assert_close(loaded(*call), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByType("2z", ELEMENTS), "argument: got '2z', expected the name of an argument"),
        (lambda: ByType("z", []), r"values: got \[\], expected distinct integers"),
        (lambda: ByType("z", 4), "values: got 4, expected distinct integers"),  # type: ignore[arg-type]
        (lambda: ByType("z", [1, 1]), r"values: got \[1, 1\], expected distinct integers"),
        (lambda: ByType("z", [1.5]), r"values: got \[1.5\], expected distinct integers"),  # type: ignore[list-item]
        (
            lambda: gmoe.moefy(Atomwise(), targets="first", router=ByType("element", [1])),
            r"argument: got 'element', expected an argument of Atomwise.forward: x, z, scale",
        ),
        (
            lambda: gmoe.moefy(Atomwise(), targets="first", num_experts=4, router=ByType("z", [1])),
            "num_experts: got 4, expected 1, one for each value of the router",
        ),
        (
            lambda: model_of().first.keep((0,)),
            "model: got CallRouter, of which no expert can be taken away",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Along a path ----------------------------------------------------------------------------------


def test_types_by_node_type_are_refused_in_a_hetero_conv() -> None:
    """Its relations have weights of their own; a decision is one for all tokens of a call."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = gmoe.MoEConv("sage", WIDTH, 5, num_experts=3, router=ByType("z", ELEMENTS))
            self.conv = HeteroConv({("a", "to", "a"): conv})

        def forward(self, x_dict: Any, edge_index_dict: Any, z: Any) -> Any:
            return self.conv(x_dict, edge_index_dict)

    net = Net().double()
    ByType("z", ELEMENTS).attach(net)
    x, z = atoms()
    with pytest.raises(ValueError, match=r"^z: got dict, expected a tensor .* HeteroConv"):
        net({"a": x}, {("a", "to", "a"): torch.tensor([[0, 1], [1, 2]])}, {"a": z})
