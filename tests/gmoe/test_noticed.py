"""Whatever is changed in a layer after it was built is noticed: each change, at each part of each.

Kernels read the weights of stacked layers instead of calling them, as long as nothing would be
missed: a change halves or doubles something, so that a layer which misses it gives what it gave.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch_geometric.nn import GATConv, GCNConv, GINConv

import gmoe
from gmoe import LinearExperts, MLPExperts, MoE, MoEConv, SoftMoE, SoftSlots, TokenChoice
from gmoe.routers import ByType
from gmoe.routers.base import Gate
from gmoe.stack import Stack
from tests.contract import Halved

WIDTH, NODES = 6, 15


class Half(nn.Module):
    """A parametrization that halves a tensor."""

    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def first_tensor(module: nn.Module) -> str:
    """The name of a module's own first parameter."""
    return next(name for name, _ in module.named_parameters(recurse=False))


def halves_outputs(_: nn.Module, __: Any, out: Any) -> Any:
    return out / 2


def halves_inputs(_: nn.Module, args: tuple[Any, ...]) -> Any:
    first, *others = args
    if isinstance(first, Tensor):
        return first / 2, *others
    halves = {"x_src": first.x_src / 2, "x_dst": first.x_dst / 2}
    if first.aggregate is not None:
        halves["aggregate"] = first.aggregate / 2
    return first._replace(**halves), *others


def halves_gradients(_: nn.Module, grads: tuple[Any, ...], *__: Any) -> Any:
    return tuple(
        grad / 2 if grad is not None and grad.is_floating_point() else grad for grad in grads
    )


def patched(_: nn.Module, module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args: forward(*args) / 2


def wrapped(layer: nn.Module, module: nn.Module, by: str) -> None:
    """In place of the part stands another module, which shows what it wraps."""
    parent, leaf = next(
        (parent, leaf)
        for parent in layer.modules()
        for leaf, part in parent.named_children()
        if part is module
    )
    if by == "setattr":
        setattr(parent, leaf, Halved(module))
    else:
        parent.register_module(leaf, Halved(module))


def pruned(_: nn.Module, module: nn.Module) -> None:
    prune.random_unstructured(module, first_tensor(module), amount=0.5)


def parametrized(_: nn.Module, module: nn.Module) -> None:
    parametrize.register_parametrization(module, first_tensor(module), Half())


CHANGES: dict[str, Callable[[nn.Module, Any], object]] = {
    "a hook": lambda _, module: module.register_forward_hook(halves_outputs),
    "a hook before": lambda _, module: module.register_forward_pre_hook(halves_inputs),
    "a hook on gradients": lambda _, module: module.register_full_backward_hook(
        lambda module, grads, _: halves_gradients(module, grads)
    ),
    "a hook on gradients, before": lambda _, module: module.register_full_backward_pre_hook(
        halves_gradients
    ),
    "a patched forward": patched,
    "another module": partial(wrapped, by="setattr"),
    "another module, registered": partial(wrapped, by="register_module"),
    "parametrized": parametrized,
    "pruned": pruned,
}
NEEDS_A_PARAMETER = ("parametrized", "pruned")
NEEDS_TENSORS = ("a hook on gradients", "another module", "another module, registered")
"""Experts of a graph get a call, not tensors, and are more than their forward."""


def applies(change: str, path: str, part: nn.Module) -> bool:
    """Whether a change can be made to a part."""
    if change in NEEDS_A_PARAMETER:
        return any(True for _ in part.parameters(recurse=False))
    return change not in NEEDS_TENSORS or path not in ("experts", "shared_expert")


def undo_hook(_: nn.Module, module: nn.Module) -> None:
    module.register_forward_hook(halves_outputs).remove()


def undo_patch(layer: nn.Module, module: Any) -> None:
    patched(layer, module)
    del module.forward


def undo_parametrization(_: nn.Module, module: nn.Module) -> None:
    name = first_tensor(module)
    parametrize.register_parametrization(module, name, Half())
    value = module.parametrizations[name].original.detach().clone()  # type: ignore[union-attr,index]
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    assert torch.equal(getattr(module, name), value)


UNDONE = {"a hook": undo_hook, "a patch": undo_patch, "parametrized": undo_parametrization}


def conv(name: str, start: Any) -> nn.Module:
    kwargs = {"balance": "bias", "noise": True}
    return MoEConv(name, WIDTH, WIDTH, num_experts=3, start=start, router_kwargs=kwargs)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{name}, {start}": partial(conv, name, start)
        for name in ("gcn", "sage", "gin", "gat", "gatv2", "transformer")
        for start in ("shared", "copies")
    },
    "MoE": lambda: MoE(
        TokenChoice(WIDTH, num_experts=3), MLPExperts(WIDTH, 8, WIDTH, num_experts=3)
    ),
}


def made(name: str) -> nn.Module:
    """A layer in evaluation, all of whose parameters count."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def results(layer: nn.Module) -> list[Tensor]:
    """The output, and the gradients of the features and of all parameters."""
    torch.manual_seed(1)
    x = torch.randn(NODES, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = (x, torch.randint(NODES, (2, 60))) if isinstance(layer, MoEConv) else (x,)
    y = layer(*inputs)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
    return [y, *grads]


def places(layer: nn.Module) -> list[str]:
    """The parts whose weights a kernel may read."""
    return [path for path, part in layer.named_modules() if isinstance(part, (Stack, Gate))]


class OfSource(nn.Module):
    """A layer that is told the source of each node."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, source: Tensor, *edges: Tensor) -> Tensor:
        out: Tensor = self.layer(x, *edges)
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.SiLU(), nn.Dropout(0.1), nn.Linear(8, WIDTH))


DENSE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "MLP": mlp,
    "GCN": lambda: GCNConv(WIDTH, WIDTH),
    "GIN": lambda: GINConv(mlp()),
    "GAT": lambda: GATConv(WIDTH, WIDTH),
}


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "pruned"])
@pytest.mark.parametrize("mix", ["outputs", "weights"])
@pytest.mark.parametrize("name", DENSE)
def test_a_merged_model_has_a_change_or_it_is_refused(name: str, mix: Any, change: str) -> None:
    is_conv = name.isupper() and name != "MLP"
    if is_conv and mix == "weights":
        return
    torch.manual_seed(0)
    router = ByType("source", range(3), batch="source")
    options: dict[str, Any] = {"targets": "layer", "router": router, "start": "copies"}
    model: Any = gmoe.moefy(OfSource(DENSE[name]()), mix=mix, **options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, source = torch.randn(5, WIDTH, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    edges = [torch.randint(5, (2, 9))] * is_conv
    for path, part in model.layer.named_modules():
        if change in NEEDS_A_PARAMETER and next(part.parameters(recurse=False), None) is None:
            continue
        changed = copy.deepcopy(model)
        CHANGES[change](changed, changed.layer.get_submodule(path))
        try:
            merged = gmoe.merge(changed, source=source[:1])
        except ValueError as error:
            assert str(error).startswith("model: got "), path  # noqa: PT017
            continue
        expected, found = (one(x, source, *edges) for one in (changed, merged))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=path)


def test_the_tables_have_parts_of_all_kinds() -> None:
    assert places(made("sage, shared")) == [
        "experts",
        "experts.lin_l",
        "experts.lin_r",
        "router.gate",
        "shared_expert",
        "shared_expert.lin_l",
        "shared_expert.lin_r",
    ]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_change_is_noticed(name: str, change: str) -> None:
    layer = made(name)
    before = results(layer)
    for path in places(layer):
        changed = copy.deepcopy(layer)
        part = changed.get_submodule(path)
        if not applies(change, path, part):
            continue
        CHANGES[change](changed, part)
        is_read = isinstance(part, Stack) and path.count(".") <= 1  # a network's layers are called
        if is_read and isinstance(layer, MoEConv):
            assert changed.get_submodule(path.partition(".")[0]).changes, path
        try:
            after = results(changed)
        except ValueError as error:  # refused by name
            assert "got a changed layer" in str(error)  # noqa: PT017
            continue
        kept = len(before) if change not in NEEDS_A_PARAMETER else 2  # others have another form
        pairs = zip(before[:kept], after[:kept], strict=True)
        assert not all(torch.allclose(one, other) for one, other in pairs), path


@pytest.mark.parametrize("change", UNDONE)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_undone_leaves_the_layer_as_it_was(name: str, change: str) -> None:
    layer = made(name)
    before = results(layer)
    for path in places(layer):
        part = layer.get_submodule(path)
        if not applies(change, path, part):
            continue
        UNDONE[change](layer, part)
        assert not getattr(part, "changes", None), path
    after = results(layer)
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", LAYERS)
def test_a_frozen_part_learns_nothing_and_the_others_what_they_did(name: str) -> None:
    layer = made(name)
    frozen = copy.deepcopy(layer)
    part = frozen.get_submodule(places(layer)[-1])
    before = dict(zip(["y", "x", *dict(layer.named_parameters())], results(layer), strict=True))
    part.requires_grad_(False)
    torch.manual_seed(1)
    x = torch.randn(NODES, WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = (x, torch.randint(NODES, (2, 60))) if isinstance(layer, MoEConv) else (x,)
    frozen(*inputs).sin().sum().backward()
    for path, parameter in frozen.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, before[path], check_dtype=True)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "MoE"])
@pytest.mark.parametrize("cast", ["the layer", "its parts"])
def test_another_dtype_is_noticed(name: str, cast: str) -> None:
    layer = made(name)
    x, edge_index = torch.randn(NODES, WIDTH), torch.randint(NODES, (2, 60))
    with pytest.raises(ValueError, match=r"^x: got torch.float32, expected torch.float64"):
        layer(x, edge_index)
    for part in [layer] if cast == "the layer" else layer.children():
        part.float()
    assert layer(x, edge_index).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^x: got torch.float64, expected torch.float32"):
        layer(x.double(), edge_index)


def test_a_replaced_gate_scores() -> None:
    """In its own dtype, and centered as the router's own is."""
    torch.manual_seed(0)
    router = TokenChoice(WIDTH, num_experts=3, noise=False)
    x = torch.randn(20, WIDTH) + 3
    twin = copy.deepcopy(router)
    twin.gate = nn.Linear(WIDTH, 3, bias=False)  # type: ignore[assignment]
    twin.gate.load_state_dict(router.gate.state_dict())
    for _ in range(3):
        torch.testing.assert_close(twin(x).scores, router(x).scores)


MODULES: dict[str, Callable[[], Any]] = {
    "MoEConv": lambda: MoEConv(GCNConv, WIDTH, WIDTH, num_experts=3),
    "MoEConv that is open": lambda: MoEConv(GCNConv, -1, WIDTH, num_experts=3),
    "MoEConv without a router": lambda: MoEConv(GCNConv, WIDTH, WIDTH, router=None),
    "MoE": lambda: MoE(TokenChoice(WIDTH, num_experts=3), LinearExperts(WIDTH, 4, num_experts=3)),
    "MoE of moefy": lambda: next(
        gmoe.moefy(nn.Sequential(nn.Linear(WIDTH, 4)), targets="0").children()
    ),
    "SoftMoE": lambda: SoftMoE(
        SoftSlots(WIDTH, num_experts=3), LinearExperts(WIDTH, WIDTH, num_experts=3)
    ),
    "LinearExperts": lambda: LinearExperts(WIDTH, 4, num_experts=3),
    "MLPExperts": lambda: MLPExperts(WIDTH, 8, 4, num_experts=3),
    "stacked convs": lambda: MoEConv(GCNConv, WIDTH, WIDTH, num_experts=3).experts,
    **{name: partial(make, WIDTH, num_experts=3) for name, make in gmoe.ROUTERS.items()},
}


@pytest.mark.parametrize("attribute", ["k", "num_experts", "experts_per_token"])
@pytest.mark.parametrize("name", MODULES)
def test_a_number_that_a_module_was_built_with_stays(name: str, attribute: str) -> None:
    module = MODULES[name]()
    is_told_cost = isinstance(module, gmoe.Router) and attribute == "experts_per_token"
    if is_told_cost or not hasattr(module, attribute):
        return  # a router of your own says its cost; experts know no K
    before = getattr(module, attribute)
    with pytest.raises(AttributeError, match=rf"^{attribute}: got 2, expected .* as it is: build"):
        setattr(module, attribute, 2)
    assert getattr(copy.deepcopy(module), attribute) == before
