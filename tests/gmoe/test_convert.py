"""moefy on transformers, and on modules by name (on PyG's GNNs: see test_gnn)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch_geometric.nn import GCN, GATConv, GCNConv, GINConv, Linear, MessagePassing, SimpleConv
from torch_geometric.nn import Sequential as GraphSequential
from torchvision.models import SwinTransformer, VisionTransformer

from gmoe import LinearExperts, MoE, MoEConv, TokenChoice, moefy, record_routing
from tests.helpers.equal import assert_same
from tests.helpers.mlps import Dropping, Llama, plain_mlp
from tests.helpers.vits import images, timm_vit, torchvision_vit

STRAIGHT = {"weight": "straight_through", "balance": None}
"""Of token choice, so that copies of one MLP give what it gives, always the same."""


def plain(model: Any, **options: Any) -> Any:
    """The model, moefied into copies; into plain experts if experts choose.

    Copies need weights that are 1 where one expert is chosen.
    """
    if options.get("router", "token_choice") != "token_choice":
        return moefy(model, start="plain", **options)
    weight = STRAIGHT if options.get("k", 1) == 1 else {"balance": None}
    options["router_kwargs"] = weight | options.get("router_kwargs", {})
    return moefy(model, start="copies", **options)


def mlps(vit: Any) -> list[Any]:
    blocks = vit.encoder.layers if isinstance(vit, VisionTransformer) else vit.blocks
    return [block.mlp for block in blocks]


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(x)
        return out


def stack(*mlp: nn.Module) -> Any:
    """A model of one block an MLP."""
    return nn.Sequential(*map(Block, mlp))


# What comes out


@pytest.mark.parametrize("build", [torchvision_vit, timm_vit])
def test_the_first_forward_is_the_dense_one(build: Callable[[], Any]) -> None:
    """In evaluation and in training; and the experts' last layers get a gradient."""
    dense = build()
    model = moefy(copy.deepcopy(dense), every=1, num_experts=4)
    for training in (False, True):
        assert_same(model.train(training)(images()), dense.train(training)(images()), 0)
    model(images()).square().sum().backward()
    assert all(mlp.experts.down.weight.grad.any() for mlp in mlps(model))
    assert all(torch.equal(*mlp.experts.up.weight[:2]) for mlp in mlps(model))


def test_more_arguments_than_tokens_are_refused() -> None:
    layer = moefy(stack(plain_mlp()), every=1, num_experts=2)[0].mlp  # type: ignore[index]
    with pytest.raises(TypeError, match=r"takes 2 positional arguments but 4 were given"):
        layer(torch.randn(2, 5, 8), None, 2.0)


# Grids of tokens


def test_blocks_of_a_swin_are_numbered_through_its_stages() -> None:
    torch.manual_seed(0)
    dense = SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5).double().eval()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    model = moefy(copy.deepcopy(dense), every=2, router="expert_choice", num_experts=4)
    with record_routing(model) as routings:
        assert_same(model(x), dense(x))
    assert [
        module.experts.in_features for module in model.modules() if isinstance(module, MoE)
    ] == [8, 16]
    for routing in routings:  # each expert takes a quarter of each image's tokens
        tokens = routing.num_tokens // 3
        taken = (routing.to_dense() != 0).view(3, tokens, 4).sum(dim=1)
        assert torch.equal(taken, torch.full((3, 4), tokens // 4))


@pytest.mark.parametrize("shape", [(2, 6), (1, 12)], ids=str)
def test_all_tokens_of_a_grid_compete(shape: tuple[int, ...]) -> None:
    """The tokens of a grid are one group, as if they were in one row.

    If each row of the grid were a group, a row of a single token would leave no choice.
    """
    layer: Any = plain(stack(plain_mlp()).double(), every=1, num_experts=4, router="expert_choice")[
        0
    ].mlp
    x = torch.randn(3, 12, 8, dtype=torch.float64)
    assert_same(layer(x.view(3, *shape, 8)).view(3, 12, 8), layer(x), 0)


# Which modules


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({}, [1, 3]),
        ({"every": 3}, [2]),
        ({"targets": ["2.mlp", "0.*"]}, [0, 2]),
        ({"targets": "*.mlp", "every": 4}, [3]),
        ({"targets": "*.mlp*", "every": 2}, [1, 3]),
    ],
    ids=str,
)
def test_which_mlps_are_replaced(options: dict[str, Any], replaced: list[int]) -> None:
    dense = stack(Llama(), plain_mlp(), Llama(), plain_mlp())
    before = [block.mlp for block in dense]
    moe: Any = moefy(dense, num_experts=4, **options)
    assert moe is dense
    assert [i for i, block in enumerate(moe) if isinstance(block.mlp, MoE)] == replaced
    assert [i for i, block in enumerate(moe) if block.mlp is not before[i]] == replaced


def test_an_mlp_that_is_used_twice_stays_one() -> None:
    mlp = plain_mlp()
    blocks: Any = moefy(stack(mlp, mlp), every=1, num_experts=2)
    assert blocks[0].mlp is blocks[1].mlp
    assert blocks[0].mlp.shared_expert is mlp


def gnn() -> nn.Module:
    mlp = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    convs = [
        (conv, "x, edge_index -> x")
        for conv in (GCNConv(-1, 6), GATConv((-1, -1), 4, heads=2), GINConv(mlp))
    ]
    net = GraphSequential("x, edge_index", [*convs, plain_mlp()])
    net(torch.ones(2, 8), torch.tensor([[0], [1]]))  # fills in what is open
    return net


CONVS, HEAD = "module_[0-2]", "module_3"


@pytest.mark.parametrize("start", ["shared", "copies", None])
def test_convs_by_name(start: str | None) -> None:
    torch.manual_seed(0)
    dense = gnn().double()
    x, edge_index = torch.randn(9, 8, dtype=torch.float64), torch.randint(9, (2, 30))
    options: dict[str, Any] = {"targets": CONVS, "num_experts": 3, "start": start}
    model = moefy(copy.deepcopy(dense), router_kwargs=STRAIGHT, **options)
    assert sum(isinstance(module, MoEConv) for module in model.modules()) == 3
    assert_same(model(x, edge_index), dense(x, edge_index))
    fresh = moefy(copy.deepcopy(dense), **options | {"start": "plain"})
    assert not torch.allclose(fresh(x, edge_index), dense(x, edge_index))


def test_a_pattern_may_match_the_list_that_holds_the_convs() -> None:
    model = moefy(GCN(8, 8, 2), targets="convs*", num_experts=2)
    assert [type(conv) for conv in model.convs] == [MoEConv, MoEConv]  # type: ignore[union-attr]


# As a model


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (timm_vit, {"every": 1}),
        (timm_vit, {"every": 1, "start": "copies", "k": 2}),
        (gnn, {"targets": [CONVS, HEAD]}),
        (gnn, {"targets": [CONVS, HEAD], "start": "shared"}),
        (gnn, {"targets": [CONVS], "start": "copies"}),
    ],
)
def test_a_frozen_model_stays_frozen_but_for_what_is_new(
    build: Any, options: dict[str, Any]
) -> None:
    model = moefy(build().requires_grad_(False), num_experts=2, **options)
    layers = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, MoE | MoEConv)
    )
    for name, parameter in model.named_parameters():
        is_of_dense = ".shared_expert." in name or name.endswith("_base")
        assert parameter.requires_grad == (name.startswith(layers) and not is_of_dense), name


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
def test_a_conv_with_some_frozen_parts_keeps_them_frozen() -> None:
    """As under LoRA, whose base is frozen: such convs run one by one."""
    dense: Any = GraphSequential("x, edge_index", [(GCNConv(8, 4), "x, edge_index -> x")])
    dense.module_0.lin.weight.requires_grad_(False)
    x, edge_index = torch.randn(9, 8), torch.randint(9, (2, 30))
    for start in ("copies", None):
        model: Any = moefy(copy.deepcopy(dense), targets="module_0", num_experts=3, start=start)
        torch.testing.assert_close(model(x, edge_index), dense(x, edge_index))
        for name, parameter in model.module_0.experts.named_parameters():
            assert parameter.requires_grad != name.endswith("lin.weight")


def test_the_shared_expert_keeps_its_modes_and_types() -> None:
    mlp = nn.Sequential(*plain_mlp().to(torch.bfloat16), nn.Dropout(0.5).eval()).train()
    mlp[3].eval()
    mlp.register_parameter("scale", nn.Parameter(torch.ones(1)))
    layer = moefy(stack(mlp), every=1, num_experts=2)[0].mlp  # type: ignore[index]
    assert [part.training for part in mlp] == [True, True, True, False]
    assert mlp.scale.dtype == torch.float32
    assert layer.training
    assert layer.experts.up.weight.dtype == layer.router.gate.weight.dtype == torch.bfloat16


# What is refused


class OwnLinear(nn.Linear):
    """A linear layer with more than its weights, such as LoRA's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def patched(mlp: Any) -> Any:
    mlp[0].forward = partial(nn.Linear.forward, mlp[0])
    return mlp


PLAIN: dict[str, Any] = {"every": 1, "start": "copies", "k": 2}

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (lambda: nn.Sequential(plain_mlp()), {}, "model"),
    (
        lambda: stack(nn.Sequential(OwnLinear(8, 12), nn.ReLU(), nn.Linear(12, 8))),
        PLAIN,
        "model: got 0.mlp.0 with a",
    ),
    (lambda: stack(patched(plain_mlp())), PLAIN, "model: got 0.mlp.0 with a forward of its own"),
    (lambda: stack(plain_mlp(), Mlp(8, 12, use_conv=True)), {"every": 1}, "model: got 1.mlp"),
    (lambda: moefy(stack(plain_mlp()), every=1), {"every": 1}, "model"),
    (lambda: stack(plain_mlp().to("meta")), {"every": 1}, "model"),
    (gnn, {"targets": [CONVS, "lin*"]}, "targets: got 'lin"),
    (gnn, {"targets": []}, "targets"),
    (lambda: nn.Sequential(SimpleConv()), {"targets": "0"}, "model"),
    (lambda: nn.Sequential(GCNConv(-1, 4)), {"targets": "0"}, "model"),
    *((timm_vit, {"every": every}, "every") for every in (0, 4)),
    (timm_vit, {"router": TokenChoice(16, num_experts=8)}, "router"),
]


@pytest.mark.parametrize(("build", "options", "message"), REFUSED)
def test_refuses_and_leaves_the_model_alone(
    build: Any, options: dict[str, Any], message: str
) -> None:
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"^{message}"):
        moefy(model, **options)
    assert dict(model.named_modules()) == before


class Weightless(MessagePassing):
    """A conv with widths, and nothing to learn."""

    in_channels = out_channels = 4

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)


def test_a_conv_without_parameters_is_refused_by_its_name() -> None:
    model = nn.ModuleDict({"conv": Weightless()})
    with pytest.raises(ValueError, match=r"^model: got conv, a Weightless without parameters"):
        moefy(model, num_experts=2, targets="conv")


# What is more than it was read as


def tied_mlp() -> Any:
    mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    mlp[2].weight = mlp[0].weight
    return mlp


def partly_frozen_mlp() -> Any:
    mlp = plain_mlp()
    mlp[0].weight.requires_grad_(False)
    return mlp


def with_buffer() -> Any:
    mlp = plain_mlp()
    mlp.register_buffer("seen", torch.zeros(1))
    return mlp


LOST: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a buffer that nothing reads": (with_buffer, "with the buffer seen"),
    "tied weights": (tied_mlp, "2.weight, which is 0.weight as well"),
    "a frozen layer": (partly_frozen_mlp, "with 0.weight frozen"),
    "a dropout of one in a hundred": (
        partial(Dropping, 0.01),
        "which draws random numbers in training",
    ),
    "a norm over tokens": (
        lambda: nn.Sequential(*plain_mlp()[:2], nn.LayerNorm((4, 12)), plain_mlp()[2]),
        "a Sequential of",
    ),
}


@pytest.mark.parametrize("form", LOST)
def test_experts_do_not_replace_an_mlp_that_is_more_than_they_are(form: str) -> None:
    """``test_check_mlp.py`` has those that compute something else."""
    build, message = LOST[form]
    with pytest.raises(ValueError, match=rf"^model: got 0\.mlp.*{message}"):
        moefy(stack(build().double()), every=1, num_experts=2, start="copies")


class Network(nn.Module):
    """A module that has its MLP under two names, and calls it by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = plain_mlp().double()
        self.filter = nn.ModuleDict({"network": self.mlp})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.filter["network"](x)
        return out


def test_all_names_of_a_module_are_replaced() -> None:
    model: Any = moefy(Network(), targets="mlp", num_experts=2)
    with record_routing(model) as routings:
        model(torch.randn(3, 8, dtype=torch.float64))
    assert model.mlp is model.filter["network"]
    assert len(routings) == 1


class Listed(nn.Module):
    """A model that also keeps its MLP in a plain list, or a method of it."""

    def __init__(self, keep: Callable[[Any], object]) -> None:
        super().__init__()
        self.mlp = plain_mlp()
        self.kept = keep(self.mlp)


@pytest.mark.parametrize(
    "keep",
    [
        lambda mlp: [mlp],
        lambda mlp: {"first": mlp},
        lambda mlp: mlp.forward,
        lambda mlp: [(nn.Identity(), mlp)],
    ],
)
def test_a_module_that_is_also_kept_outside_of_the_modules_is_refused(keep: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^model: got mlp, which the model also keeps as its kept"
    ):
        moefy(Listed(keep), targets="mlp", num_experts=2)


def test_weights_that_are_tied_to_another_layer_are_refused_where_they_would_be_copied() -> None:
    model: Any = stack(plain_mlp(), plain_mlp())
    model[1].mlp[0].weight = model[0].mlp[0].weight
    with pytest.raises(ValueError, match=r"^model: got 0\.mlp\.0\.weight, which is 1\.mlp\.0"):
        moefy(model, every=1, num_experts=2, start="copies")
    moefy(model, every=1, num_experts=2)  # the shared experts are the layers themselves
    assert model[1].mlp.shared_expert[0].weight is model[0].mlp.shared_expert[0].weight


def test_convs_tied_to_each_other_are_refused() -> None:
    model = GCN(4, 4, 3, 4)
    model.convs[1].lin.weight = model.convs[0].lin.weight
    with pytest.raises(ValueError, match=r"^model: got convs\.0\.lin\.weight, which is convs\.1"):
        moefy(model, num_experts=2)


def test_convs_in_float64_are_not_rounded() -> None:
    torch.manual_seed(0)
    model = GCN(4, 4, 2, 4).double()
    weight = model.convs[0].lin.weight.clone()
    moe: Any = moefy(model, num_experts=2)
    layer = moe.convs[0]
    assert torch.equal(layer.expert(0).lin.weight, weight)


def test_an_activation_may_be_shared_by_layers() -> None:
    model = GCN(4, 4, 3, 4)  # all layers have the model's own activation
    model.convs[0].act = model.act
    moefy(model, num_experts=2)
    assert isinstance(model.convs[0], MoEConv)


def test_a_part_of_a_layer_that_another_module_has_too_is_refused() -> None:
    model: Any = nn.ModuleDict({"mlp": plain_mlp()})
    model["first"] = model["mlp"][0]
    with pytest.raises(ValueError, match=r"^model: got mlp\.0\.weight, which is first\.weight"):
        moefy(model, targets="mlp", num_experts=2, start="copies")


@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
@pytest.mark.parametrize("linear", [nn.Linear(8, 6), nn.Linear(8, 6, bias=False), Linear(8, 6)])
def test_a_single_linear_layer_becomes_experts_of_one_layer(linear: Any, start: Any) -> None:
    dense = nn.Sequential(nn.Tanh(), copy.deepcopy(linear)).double()
    moe: Any = moefy(copy.deepcopy(dense), targets="1", start=start, num_experts=4)
    x = torch.randn(5, 8, dtype=torch.double)
    if start == "plain":
        weight = moe[1].experts.weight
        assert not torch.equal(weight[0], weight[1])
    else:
        torch.testing.assert_close(moe(x), dense(x))
    assert isinstance(moe[1].experts, LinearExperts)
    assert (moe[1].experts.bias is None) == (linear.bias is None)
    moe(x).square().sum().backward()
    assert any(bool(p.grad.any()) for p in moe[1].experts.parameters() if p.grad is not None)


def test_a_single_linear_layer_that_is_more_than_its_weights_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"^model: got 0 with hooks"):
        moefy(model, targets="0", start="copies")
