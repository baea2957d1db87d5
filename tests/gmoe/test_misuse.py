"""Public callables called wrongly: the error names the argument, or suggests the right name.

Each call of the table is right; a misuse changes one thing in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GCN, GINConv, MessagePassing
from transformers import Trainer

import gmoe
import gmoe.plot
from gmoe.moe import MoELayer

WIDTH, EXPERTS = 4, 2
X = torch.randn(6, WIDTH)
EDGES = torch.randint(6, (2, 12))
GRAPH = Data(x=X, edge_index=EDGES)
ROUTING = gmoe.Routing.from_choices(
    torch.tensor([[0], [1], [0]]), torch.ones(3, 1), num_experts=EXPERTS
)


class Atoms(nn.Module):
    """A layer on atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, z: Tensor, batch: Tensor | None = None) -> Tensor:
        return self.lin(x)


def dense() -> GCN:
    return GCN(WIDTH, WIDTH, 2, 3)


def moefied() -> nn.Module:
    return gmoe.moefy(dense(), num_experts=EXPERTS)


def mixing() -> nn.Module:
    """A model that mixes weights, by one decision for the graph."""
    router = gmoe.routers.ByType("z", [1, 6], batch="batch")
    return gmoe.moefy(Atoms(), targets="lin", router=router, mix="weights", start="copies")


def routed() -> gmoe.MoE:
    """A layer by itself."""
    router = gmoe.TokenChoice(WIDTH, num_experts=EXPERTS)
    return gmoe.MoE(router, gmoe.LinearExperts(WIDTH, 3, num_experts=EXPERTS))


Call = tuple[tuple[Any, ...], dict[str, Any]]


def experts(**sizes: Any) -> Any:
    return {"num_experts": EXPERTS, **sizes}


CALLS: dict[str, Callable[[Path], Call]] = {
    "AttentionVote": lambda _: ((WIDTH,), experts()),
    "AuxLoss": lambda _: ((torch.ones(()), 0.1), {}),
    "ExpertChoice": lambda _: ((WIDTH,), experts()),
    "BlockGNN": lambda _: ((WIDTH, 8, 3), {"num_layers": 2, **experts()}),
    "GNNMoE": lambda _: ((WIDTH, 8, 3), {"num_layers": 2, **experts()}),
    "Graph": lambda _: ((EDGES, 6), {"flow": "source_to_target"}),
    "LightningHealth": lambda _: ((), {}),
    "LinearExperts": lambda _: ((WIDTH, 8), experts()),
    "MLPExperts": lambda _: ((WIDTH, 8, WIDTH), experts()),
    "MoE": lambda _: (
        (gmoe.TokenChoice(WIDTH, **experts()), gmoe.MLPExperts(WIDTH, 8, WIDTH, **experts())),
        {"shared_expert": None},
    ),
    "MoEConv": lambda _: (("gcn", WIDTH, 8), experts()),
    "MultiCentroid": lambda _: ((WIDTH,), experts()),
    "OracleRouter": lambda _: ((WIDTH,), experts(assignment=torch.zeros(6, dtype=torch.long))),
    "RandomRouter": lambda _: ((WIDTH,), experts()),
    "RoutingStats": lambda _: ((), experts()),
    "SoftMoE": lambda _: (
        (gmoe.SoftSlots(WIDTH, **experts()), gmoe.MLPExperts(WIDTH, 8, WIDTH, **experts())),
        {},
    ),
    "SoftSlots": lambda _: ((WIDTH,), experts()),
    "TokenChoice": lambda _: ((WIDTH,), experts()),
    "TrainerHealth": lambda _: ((object.__new__(Trainer),), {}),
    "TrainerSave": lambda _: ((), {}),
    "UniformRouter": lambda _: ((WIDTH,), experts()),
    "ViTMoE": lambda _: ((8, 10), experts()),
    "active_parameters": lambda _: ((moefied(),), {}),
    "attach_aux_loss": lambda _: ((moefied(),), {"scale": 0.5}),
    "aux_loss": lambda _: ((ROUTING,), {}),
    "combine": lambda _: ((torch.ones(3, WIDTH), ROUTING), {}),
    "count_flops": lambda _: ((moefied(), X, EDGES), {}),
    "dispatch": lambda _: ((torch.ones(3, WIDTH), ROUTING), {}),
    "expert_health": lambda _: (([ROUTING],), {"names": ["one"]}),
    "grouped_linear": lambda _: (
        (torch.ones(3, WIDTH), torch.ones(EXPERTS, WIDTH, 8), None, torch.tensor([2, 3])),
        {},
    ),
    "load": lambda folder: ((gmoe.save(moefied(), folder), dense()), {}),
    "merge": lambda _: ((mixing(), X, torch.ones(6, dtype=torch.long)), {}),
    "moefy": lambda _: ((dense(),), experts(every=1)),
    "neighbor_loader": lambda _: ((GRAPH, [2]), {"batch_size": 2}),
    "prune": lambda _: ((routed(), [ROUTING]), {}),
    "record_routing": lambda _: ((moefied(),), {}),
    "save": lambda folder: ((moefied(), folder), {}),
    "unstack": lambda _: ((moefied(),), {}),
    "plot.expert_load": lambda _: (([ROUTING],), {"xlabel": "step"}),
    "plot.palette": lambda _: ((), experts()),
    "plot.expert_maps": lambda _: (
        (gmoe.ViTMoE(8, **experts()), torch.rand(1, 3, 8, 8)),
        {"titles": ["one"]},
    ),
    "plot.patch_weights": lambda _: ((gmoe.ViTMoE(8, **experts()), torch.rand(1, 3, 8, 8)), {}),
}

ABSTRACT = {"Experts", "Router"}
OF_TENSORS = {
    "AuxLoss",
    "Routing",
    "combine",
    "dispatch",
    "grouped_linear",
}
"""Of these, torch itself reports what is no tensor."""
SUGGEST = {"BlockGNN", "GNNMoE", "MoEConv"}
"""What they do not know goes to their convs, so they suggest the right name themselves."""
TAKEN = {
    ("BlockGNN", "the first two swapped"),  # two widths
    ("GNNMoE", "the first two swapped"),
    ("LinearExperts", "the first two swapped"),
    ("MLPExperts", "the first two swapped"),
    ("MoE", "None for router"),  # whose calls are told their routing
    ("count_flops", "the class of model"),  # a class can be called
    ("save", "a word for folder"),
    ("load", "a word for folder"),
}
"""What is right, too, or fails for another reason than its type."""


def found(name: str) -> Callable[..., Any]:
    value: Any = gmoe
    for part in name.split("."):
        value = getattr(value, part)
    call: Callable[..., Any] = value
    return call


def error_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    try:
        result = found(name)(*args, **kwargs)
        if name == "record_routing":  # its checks run inside the block
            result.__enter__()
    except Exception as error:
        return error
    return None


def parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(found(name)).parameters.values())


def test_the_table_has_all_public_callables() -> None:
    public = {name for name in gmoe.__all__ if callable(getattr(gmoe, name))} - {"plot"}
    public |= {f"plot.{name}" for name in gmoe.plot.__all__}
    assert public - ABSTRACT - {"Routing"} == set(CALLS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_the_table_is_right(name: str, tmp_path: Path) -> None:
    assert error_of(name, *CALLS[name](tmp_path)) is None


@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_TENSORS))
def test_an_argument_of_another_type_is_named(name: str, tmp_path: Path) -> None:
    """A word, a class for its instance, nothing, anything; and two arguments in the wrong order."""
    args, kwargs = CALLS[name](tmp_path)
    names = [one.name for one in parameters(name)]
    misuses: dict[str, tuple[Any, ...]] = {}
    for place, value in enumerate(args[: 1 if name in ("count_flops", "merge") else None]):
        for what, other in (
            ("a word", "vit_tiny"),
            ("the class", type(value)),
            ("None", None),
            ("anything", object()),
        ):
            between = "of" if what == "the class" else "for"
            misuses[f"{what} {between} {names[place]}"] = (*args[:place], other, *args[place + 1 :])
    if len(args) > 1:
        misuses["the first two swapped"] = (args[1], args[0], *args[2:])
    for what, wrong in misuses.items():
        if (name, what) in TAKEN:
            continue
        error = error_of(name, wrong, kwargs)
        assert isinstance(error, ValueError), f"{what}: {error!r}"
        is_named = any(re.match(rf"{key}\b[^:]*: got", str(error)) for key in names)
        assert is_named or re.match(r"in_features\b.*: got", str(error)), f"{what}: {error!r}"


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"count_flops"}))
def test_a_misspelled_and_a_missing_argument_are_named(name: str, tmp_path: Path) -> None:
    args, kwargs = CALLS[name](tmp_path)
    for key, value in kwargs.items():
        others = {one: kwargs[one] for one in kwargs if one != key}
        error = error_of(name, args, {**others, key[:-1]: value})
        assert isinstance(error, ValueError | TypeError), repr(error)
        assert key[:-1] in str(error)
        assert name not in SUGGEST or f"did you mean {key!r}" in str(error), repr(error)
    in_order = [one for one in parameters(name) if one.kind is one.POSITIONAL_OR_KEYWORD]
    required = [one.name for one in in_order if one.default is one.empty]
    for place, key in enumerate(required):
        error = error_of(name, args[:place], kwargs)
        assert isinstance(error, ValueError | TypeError), repr(error)
        assert key in str(error), repr(error)


# What people tried --------------------------------------------------------------------------------


class OwnConv(MessagePassing):
    """A conv that keeps its widths to itself."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.lin = nn.Linear(2 * in_channels, out_channels)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        return self.propagate(edge_index, x=x)

    def message(self, x_i: torch.Tensor, x_j: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lin(torch.cat([x_i, x_j], dim=-1))
        return out


def mixer() -> nn.Module:
    return timm.models.MlpMixer(img_size=16, patch_size=8, num_blocks=1, embed_dim=8)


def convnext() -> nn.Module:
    return timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), conv_mlp=True)


NETWORK = nn.Linear(WIDTH, WIDTH)
TRIED: dict[str, tuple[Callable[[], Any], str]] = {
    "a network for GIN": (
        lambda: gmoe.MoEConv(GINConv, nn=NETWORK),
        r"in_channels: got nothing, .*nn; pass a factory",
    ),
    "num_layer of a dense model": (
        lambda: gmoe.GNNMoE(4, 8, 3, num_layer=3, router=None),
        r"num_layer: got 3, .*; did you mean 'num_layers'\?",
    ),
    "a name for a model": (
        lambda: gmoe.moefy("vit_tiny"),  # type: ignore[arg-type]
        r"model: got 'vit_tiny', expected a module",
    ),
    "a class for a model": (
        lambda: gmoe.moefy(GCN),
        r"model: got the class GCN, expected a module",
    ),
    "a Mixer": (
        lambda: gmoe.moefy(mixer()),
        r"model: got MlpMixer, .*`targets`",
    ),
    "a ConvNeXt": (
        lambda: gmoe.moefy(convnext()),
        r"model: got stages\.1\.blocks\.0\.mlp, a Mlp of \(Conv2d",
    ),
    "a ResNet": (
        lambda: gmoe.moefy(torchvision.models.resnet18()),
        r"model: got ResNet, in which not all blocks have MLPs",
    ),
    "a conv without widths": (
        lambda: gmoe.moefy(nn.ModuleDict({"c": OwnConv(4, 8)}), targets="c"),
        r"model: got c, a OwnConv .* attributes in_channels and out_channels",
    ),
    "a class of no conv": (lambda: gmoe.MoEConv(str, 4, 8), r"conv: got <class 'str'>"),
}


@pytest.mark.parametrize("name", TRIED)
def test_what_people_tried_says_what_to_do(name: str) -> None:
    call, message = TRIED[name]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()


def test_what_the_message_says_of_a_mixer_works() -> None:
    model = mixer().eval()
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    gmoe.moefy(model, targets="blocks.*.mlp_channels", num_experts=EXPERTS)
    torch.testing.assert_close(model(images), before)
    assert any(isinstance(part, MoELayer) for part in model.modules())
