"""Each option of a layer goes through each door: the same numbers, or a refusal in gmoe's words.

The options are those of the signatures: a new one has to have a value here, and then stands in all
columns.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.export import Dim
from torch_geometric.nn import GraphSAGE

import gmoe
from gmoe import GNNMoE, MoEConv, RoutingStats, ViTMoE
from tests.helpers.one_process import one_process
from tests.helpers.sources import BY_SOURCE, BY_VECTOR, DIM, SOURCES, ByPosition
from tests.torch_versions import COMPILES_GRAPHS

pytestmark = pytest.mark.filterwarnings("ignore")

D = 8

# The rows: a value of each option that is not its default, or several


def timm_vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=D, depth=2, num_heads=2, num_classes=3
    )


def sage() -> nn.Module:
    return GraphSAGE(D, D, 2, 3)


def moefied(dense: Callable[[], nn.Module], **options: Any) -> nn.Module:
    return gmoe.moefy(dense(), **{"num_experts": 4} | options)


ROUTED: dict[str, tuple[Any, ...]] = {
    "num_experts": (3,),
    "k": (2,),
    "router": (
        *("token_choice", "expert_choice", "attention_vote"),
        *("multi_centroid", "random", "uniform"),
    ),
    "start": ("copies", "shared", "plain"),
    "router_kwargs": (
        {"balance": "switch", "z_coef": 0.1},
        {"capacity_factor": 1.5},
        {"noise": False},
    ),
}
"""Options of all layers with experts."""

SEEN: dict[str, tuple[Any, ...]] = {"router_input": ("neighbors", ("node", "degree"))}

ROWS: dict[str, tuple[Callable[..., nn.Module], Any, dict[str, tuple[Any, ...]]]] = {
    "moefy": (
        partial(moefied, timm_vit),
        gmoe.moefy,
        {**ROUTED, "every": (1,), "targets": ("blocks.1.mlp", "blocks.*.attn.proj")},
    ),
    "moefy by call": (
        partial(
            moefied, ByPosition, num_experts=None, targets="lin*", router=BY_SOURCE, mix="weights"
        ),
        gmoe.moefy,
        {"router": (BY_VECTOR,), "mix": ("outputs",), "start": ROUTED["start"]},
    ),
    "moefy of a GNN": (partial(moefied, sage), gmoe.moefy, {**ROUTED, **SEEN}),
    "ViTMoE": (
        partial(ViTMoE, 8, router="token_choice"),
        ViTMoE,
        {
            **ROUTED,
            **{"num_classes": (3,), "every": (1,), "dropout": (0.5,)},
        },
    ),
    "MoEConv": (
        partial(MoEConv, "sage", D, D),
        MoEConv,
        {**ROUTED, **SEEN, "local": (True, False)},
    ),
    "GNNMoE": (
        partial(GNNMoE, D, D, 3, 3),
        GNNMoE,
        {
            **ROUTED,
            **SEEN,
            "conv": ("sage", "gcn", "gin", "gat"),
            "shared_router": (True, False),
            "every": (2,),
            "dropout": (0.5,),
            "input_dropout": (0.5,),
            "act": ("tanh", None),
            "norm": ("batch_norm", "layer_norm"),
            "jk": ("cat", "max", "last"),
            "residual": ("linear", "none"),
        },
    ),
}
"""How a model is built, whose signature says which options there are, and their values."""

ELSEWHERE = {
    *("model", "size", "in_channels", "out_channels", "hidden_channels", "num_layers"),
    *("conv", "conv_args", "conv_kwargs"),
}
"""What every row is given, or no option."""

CASES = [
    (name, option, number)
    for name, (_, _, options) in ROWS.items()
    for option, values in options.items()
    for number in range(len(values))
]


@pytest.mark.parametrize("name", ROWS)
def test_every_option_of_a_signature_has_a_row(name: str) -> None:
    owner = ROWS[name][1]
    known = {option for _, one, options in ROWS.values() if one is owner for option in options}
    assert {*inspect.signature(owner).parameters} - ELSEWHERE <= known


def call_of(name: str, seed: int = 0, size: int = 5) -> tuple[Tensor, ...]:
    """Images, or a graph."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("moefy", "ViTMoE"):
        return (torch.randn(size, 3, 8, 8, generator=generator),)
    nodes = 4 * size
    if name == "moefy by call":  # atoms, their molecules, and what is told of those
        source = torch.tensor(SOURCES).repeat(size)[:size]
        systems = torch.randn(size, DIM, generator=generator)
        return (
            torch.randn(nodes, 4, generator=generator),
            torch.arange(nodes) % size,
            source,
            systems,
        )
    x = torch.randn(nodes, D, generator=generator)
    return x, torch.randint(nodes, (2, 3 * nodes), generator=generator)


@lru_cache(maxsize=1)  # the doors of a case come one after the other
def built_once(name: str, option: str, number: int) -> nn.Module:
    build, _, options = ROWS[name]
    torch.manual_seed(0)
    model = build(**{option: options[option][number]})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


# The columns


def equal(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def called(model: Any, args: tuple[Tensor, ...]) -> Any:
    """What comes out of a door runs: a door refuses at once."""
    try:
        return model(*args)
    except (ValueError, RuntimeError) as error:
        raise AssertionError("refused behind the door") from error


def gradients(model: nn.Module, args: tuple[Tensor, ...], adds: bool) -> list[Tensor | None]:
    torch.manual_seed(1)
    with gmoe.record_routing(model) as routings:
        loss = model(*args).square().mean()
    (loss + gmoe.aux_loss(routings) if adds else loss).backward()
    return [parameter.grad for parameter in model.parameters()]


def attach(name: str, model: nn.Module) -> None:
    args = call_of(name)
    other = copy.deepcopy(model).train()
    gmoe.attach_aux_loss(other)
    found = gradients(other, args, adds=False)
    expected = gradients(model.train(), args, adds=True)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is not None or theirs is not None:
            equal(ours, theirs)


def export(name: str, model: nn.Module) -> None:
    args = call_of(name)
    shapes = tuple({1 if x.size(0) == 2 else 0: Dim.DYNAMIC} for x in args)
    run = torch.export.export(model, args, dynamic_shapes=shapes).module()
    for size in (5, 3, 8):
        args = call_of(name, size, size)
        equal(run(*args), model(*args))


def save(name: str, model: nn.Module) -> None:
    if name == "MoEConv":
        return  # it is saved by the model that holds it
    base = {"moefy": timm_vit, "moefy of a GNN": sage, "moefy by call": ByPosition}.get(name)
    args = call_of(name)
    with TemporaryDirectory() as folder:
        gmoe.save(model, folder)
        loaded = gmoe.load(folder, base=None if base is None else base())
    equal(called(loaded, args), model(*args))


def health(name: str, model: nn.Module) -> None:
    args = call_of(name)
    with torch.no_grad(), gmoe.record_routing(model) as routings:
        y = model(*args)
    for routing in routings:
        stats = RoutingStats(num_experts=routing.num_experts)
        stats.update(routing)
        assert stats.compute()
    equal(model(*args), y)


def compiled(name: str, model: nn.Module) -> None:
    torch.compiler.reset()
    args = call_of(name)
    equal(torch.compile(model, backend="eager")(*args), model(*args))


def replay(name: str, model: nn.Module) -> None:
    if name.startswith("moefy"):
        return  # other people's models take no routings
    args = call_of(name)
    y, decided = model(*args, return_routing=True)
    key = "routing" if isinstance(decided, gmoe.Routing) else "routings"
    equal(model(*args, **{key: decided}), y)


def prune(name: str, model: nn.Module) -> None:
    args = call_of(name)
    with torch.no_grad(), gmoe.record_routing(model) as routings:
        y = model(*args)
    gmoe.prune(model, routings)
    equal(called(model, args), y)


def unstack(name: str, model: nn.Module) -> None:
    args = call_of(name)
    equal(called(gmoe.unstack(copy.deepcopy(model)), args), model(*args))


def shard(name: str, model: nn.Module) -> None:
    args = call_of(name)
    sharded: Any = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)))
    equal(called(sharded, args), model(*args))


DOORS: dict[str, Callable[[str, nn.Module], None]] = {
    "attach": attach,
    "export": export,
    "save": save,
    "health": health,
    "compile": compiled,
    "replay": replay,
    "prune": prune,
    "unstack": unstack,
    "FSDP": shard,
}
SLOW = ("export", "compile")
"""Doors that take a second each: by default, other tests go through them."""


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process(tmp_path_factory.mktemp("gloo")):
        yield


def columns() -> Iterator[Any]:
    for door in DOORS:
        marks = [pytest.mark.slow] * (door in SLOW) + [COMPILES_GRAPHS] * (door == "compile")
        yield pytest.param(door, marks=marks)


@pytest.mark.parametrize("door", columns())
@pytest.mark.parametrize(("name", "option", "number"), CASES)
def test_an_option_goes_through_a_door_or_is_refused(
    name: str, option: str, number: int, door: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            DOORS[door](name, copy.deepcopy(built_once(name, option, number)))
        except (ValueError, RuntimeError) as error:
            if not re.search(r": got .*, expected|not supported by gmoe", str(error), re.DOTALL):
                raise
