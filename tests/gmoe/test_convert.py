"""moefy on transformers, and on modules by name (on PyG's GNNs: see test_gnn)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers.mlp import GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv, SimpleConv
from torch_geometric.nn import Sequential as GraphSequential
from torchvision.models import SwinTransformer, VisionTransformer

from gmoe import MoE, MoEConv, TokenChoice, moefy, record_routing

STRAIGHT = {"weight": "straight_through", "balance": None}
"""Of token choice, so that copies of one MLP give what it gives, always the same."""


def plain(model: Any, **options: Any) -> Any:
    """moefied into a plain mixture, whose weights are 1 where one expert is chosen."""
    if options.get("router", "token_choice") == "token_choice":
        weight = STRAIGHT if options.get("k", 1) == 1 else {"balance": None}
        options["router_kwargs"] = weight | options.get("router_kwargs", {})
    return moefy(model, shared_expert=False, **options)


"""The plain mixture, in place of the MLP."""

ROUTERS = ["token_choice", "expert_choice", "attention_vote", "multi_centroid", "random", "uniform"]


def torchvision_vit(layers: int = 3, dropout: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(8, 4, layers, 2, 16, 24, num_classes=5, dropout=dropout)
    nn.init.normal_(vit.heads.head.weight)  # torchvision's starts at zero, under which all models are equal
    return vit.double().eval()


def timm_vit(layers: int = 3, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": layers, "num_heads": 2, "num_classes": 5}
    vit: Any = timm.models.VisionTransformer(**sizes, **kwargs)
    nn.init.normal_(vit.head.weight)
    return vit.double().eval()


VITS: dict[str, Any] = {"torchvision": torchvision_vit, "timm": timm_vit}
each_vit = pytest.mark.parametrize("name", VITS)


def mlps(vit: Any) -> list[Any]:
    blocks = vit.encoder.layers if isinstance(vit, VisionTransformer) else vit.blocks
    return [block.mlp for block in blocks]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(x)
        return out


class Odd(nn.Sequential):
    """Linear, activation, linear by its modules; something else by its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Functional(nn.Sequential):
    """With a dropout that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Grid(nn.Sequential):
    """Of maps, not of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, _, _ = x.shape
        out: Tensor = super().forward(x)
        return out


class Llama(nn.Module):
    """A gated MLP whose activation is a function."""

    def __init__(self, activation: Any = F.silu) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (
            nn.Linear(8, 12, bias=False),
            nn.Linear(12, 8, bias=False),
            nn.Linear(8, 12, bias=False),
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.activation(self.w1(x)) * self.w3(x))
        return out


class Mixed(nn.Module):
    """Not of one token alone: its activation sees them all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(8, 12), nn.Softmax(dim=-2), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.activation(self.up(x)))
        return out


def plain_mlp(cls: type[nn.Sequential] = nn.Sequential, **kwargs: Any) -> nn.Sequential:
    return cls(nn.Linear(8, 12, **kwargs), nn.GELU(), nn.Linear(12, 8, **kwargs))


def stack(*mlp: nn.Module) -> Any:
    """A model of one block an MLP."""
    return nn.Sequential(*map(Block, mlp))


# What comes out


@each_vit
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("upcycle", [True, False])
def test_the_first_forward_is_the_dense_one(name: str, router: str, upcycle: bool) -> None:
    """Whatever the router, in evaluation and in training; and the experts' last layers get a gradient."""
    dense = VITS[name]()
    model = moefy(copy.deepcopy(dense), every=1, router=router, num_experts=4, upcycle=upcycle)
    for training in (False, True):
        assert_same(model.train(training)(images()), dense.train(training)(images()), 0)
    model(images()).square().sum().backward()
    assert all(mlp.experts.down.weight.grad.any() and mlp.experts.up.weight.any() for mlp in mlps(model))
    copies = [torch.equal(*mlp.experts.up.weight[:2]) for mlp in mlps(model)]
    assert all(copies) if upcycle else not any(copies)
    for mlp in mlps(model):
        nn.init.normal_(mlp.experts.down.weight)
    assert (model(images()) - dense(images())).abs().max() > 1e-3


def test_the_mlp_itself_is_the_shared_expert() -> None:
    vit = timm_vit()
    before = mlps(vit)
    layer = mlps(moefy(vit, blocks=[1], num_experts=4))[1]
    assert layer.shared_expert is before[1]


@pytest.mark.parametrize("dense_start", [True, False])
def test_without_a_dense_start_experts_are_added_from_the_start(dense_start: bool) -> None:
    mlp = plain_mlp()
    x = torch.randn(2, 5, 8)
    straight: Any = {"router_kwargs": STRAIGHT, "dense_start": dense_start}
    layer = moefy(stack(mlp), every=1, num_experts=2, **straight)[0].mlp  # type: ignore[index]
    torch.testing.assert_close(layer(x), mlp(x) if dense_start else 2 * mlp(x))
    assert bool(layer.experts.down.weight.any()) != dense_start


@each_vit
@pytest.mark.parametrize(
    ("router", "k"),
    [("token_choice", 2), ("token_choice", 1), ("multi_centroid", 2), ("random", 2), ("random", 1), ("uniform", 1)],
)
def test_upcycled_equals_dense(name: str, router: str, k: int) -> None:
    dense = VITS[name]()
    expected = dense(images())
    assert_same(plain(copy.deepcopy(dense), every=1, k=k, router=router, num_experts=4)(images()), expected)
    fresh = plain(dense, every=1, k=k, router=router, num_experts=4, upcycle=False)
    assert (fresh(images()) - expected).abs().max() > 1e-3


@each_vit
@pytest.mark.parametrize(
    ("router", "weight"), [("expert_choice", None), ("attention_vote", None), ("expert_choice", "normalized")]
)
def test_upcycled_layer_scales_the_mlp_by_the_tokens_weights(name: str, router: str, weight: str | None) -> None:
    """What the docstring says of routers whose weights do not sum to 1; normalized, they do where a token is taken."""
    dense = mlps(VITS[name]())[1]
    layer = mlps(plain(VITS[name](), k=2, router=router, num_experts=4, router_kwargs={"weight": weight}))[1]
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    share = routing.to_dense().sum(dim=1)
    assert_same(y, share.view(3, 5, 1) * dense(x))
    if weight == "normalized":
        assert_same(share, (share != 0).double())


@pytest.mark.parametrize("activation", [nn.SiLU, partial(nn.ReLU, inplace=True)], ids=["SiLU", "in place"])
def test_activation_is_copied(activation: Any) -> None:
    vit = timm_vit(act_layer=activation)
    expected = vit(images())
    found = plain(vit, every=1, num_experts=4)(images())
    assert_same(found, expected)
    found.sum().backward()


# Gated MLPs, norms, activations that are functions

FORMS: dict[str, Callable[[], nn.Module]] = {
    "SwiGLU": partial(SwiGLU, 8, 12),
    "SwiGLU with a norm (EVA-02)": partial(SwiGLU, 8, 12, norm_layer=nn.LayerNorm, bias=False),
    "SwiGLU with an RMS norm": partial(SwiGLU, 8, 12, norm_layer=timm.layers.norm.RmsNorm, bias=False),
    "SwiGLUPacked": partial(SwiGLUPacked, 8, 24),
    "GluMlp": partial(GluMlp, 8, 24),
    "GluMlp with a norm": partial(GluMlp, 8, 24, norm_layer=nn.LayerNorm, drop=0.0),
    "GeGluMlp (ViTamin)": partial(GeGluMlp, 8, 12),
    "Mlp with a norm": partial(Mlp, 8, 12, norm_layer=nn.LayerNorm, bias=(False, True)),
    "Llama": Llama,
    "Llama, tanh-GELU": partial(Llama, partial(F.gelu, approximate="tanh")),
    "nn.GLU": lambda: nn.Sequential(nn.Linear(8, 24), nn.GLU(), nn.Linear(12, 8)),
    "a norm first (MaxViT)": lambda: nn.Sequential(nn.LayerNorm(8), *plain_mlp()),
    "narrower at the end": lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8, bias=False)),
}


@pytest.mark.parametrize("values", ["as built", "random", "down at zero"])
@pytest.mark.parametrize("form", FORMS)
def test_experts_are_copies_of_mlps_of_many_forms(form: str, values: str) -> None:
    torch.manual_seed(0)
    mlp: Any = FORMS[form]().double()
    mlp.init_weights() if hasattr(mlp, "init_weights") else None
    last = list(mlp.parameters())[-1] if values == "down at zero" else torch.empty(0)
    for parameter in mlp.parameters():
        if values == "random":
            nn.init.normal_(parameter)
    nn.init.zeros_(last)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    layer = plain(stack(copy.deepcopy(mlp)), every=1, num_experts=4)[0].mlp
    assert_same(layer(x), mlp(x))
    with torch.no_grad():  # also where the MLP's own values would not have told one half from the other
        nn.init.normal_(layer.experts.down.weight)
    layer(x).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert pickle.loads(pickle.dumps(layer))(x).shape == x.shape


def test_the_halves_of_a_gate_are_told_apart_where_their_weights_do_not() -> None:
    mlp = GluMlp(8, 24, act_layer=nn.SiLU, gate_last=True).double()
    nn.init.zeros_(mlp.fc2.weight)
    layer = plain(stack(mlp), every=1, num_experts=2)[0].mlp
    gate, value = layer.experts.up.weight[0].T.chunk(2)
    assert torch.equal(torch.cat([value, gate]), mlp.fc1.weight)


def test_experts_afresh_have_the_form_of_the_mlp() -> None:
    experts = moefy(stack(SwiGLU(8, 12, norm_layer=nn.LayerNorm)), every=1, num_experts=2, upcycle=False)[0].mlp.experts  # type: ignore[index]
    assert experts.glu
    assert isinstance(experts.hidden_norm, nn.LayerNorm)
    assert not torch.equal(experts.up.weight[0], experts.up.weight[1])


def eva(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.eva.Eva(**sizes, swiglu_mlp=True, **kwargs).double().eval()


@pytest.mark.parametrize("build", [eva, partial(eva, scale_mlp=True), partial(timm_vit, 2, mlp_layer=SwiGLUPacked)])
def test_models_with_gated_mlps(build: Any) -> None:
    dense = build()
    for convert in (moefy, plain):
        model = convert(copy.deepcopy(dense), every=1, num_experts=4)
        assert all(mlp.experts.glu for mlp in mlps(model))
        assert_same(model(images()), dense(images()))


# Grids of tokens


def torchvision_swin() -> Any:
    return SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5).double().eval()


def timm_swin(name: str = "swin_transformer.SwinTransformer") -> Any:
    module, _, cls = name.partition(".")
    build = getattr(getattr(timm.models, module), cls)
    kwargs: Any = {"patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 2}
    return build(img_size=16, num_classes=5, **kwargs).double().eval()


SWINS = [torchvision_swin, timm_swin, partial(timm_swin, "swin_transformer_v2.SwinTransformerV2")]


@pytest.mark.parametrize("build", SWINS, ids=["torchvision", "timm", "timm v2"])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_blocks_of_a_swin_are_numbered_through_its_stages(build: Any, router: str) -> None:
    torch.manual_seed(0)
    dense = build()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    model = moefy(copy.deepcopy(dense), blocks=[0, -1], router=router, num_experts=4)
    assert_same(model(x), dense(x))
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    assert [layer.experts.in_features for layer in layers] == [8, 16]
    with record_routing(model) as routings:
        model(x)
    sides = [routing.num_tokens // 3 for routing in routings]
    assert sides[0] == 4 * sides[1]  # all of an image
    if router == "expert_choice":  # each expert takes a quarter of each image's tokens
        for routing, tokens in zip(routings, sides, strict=True):
            taken = (routing.to_dense() != 0).view(3, tokens, 4).sum(dim=1)
            assert torch.equal(taken, torch.full((3, 4), tokens // 4))


@pytest.mark.parametrize("router", ["expert_choice", "attention_vote"])
@pytest.mark.parametrize("shape", [(2, 6), (6, 2), (1, 12), (12, 1), (2, 3, 2)], ids=str)
def test_all_tokens_of_a_grid_compete(shape: tuple[int, ...], router: str) -> None:
    """As in one row, whatever the height and the width: a row of a grid of one row or column would be no choice."""
    torch.manual_seed(0)
    layer: Any = plain(stack(plain_mlp()).double(), every=1, num_experts=4, router=router)[0].mlp
    x = torch.randn(3, 12, 8, dtype=torch.float64)
    row, routing = layer(x, return_routing=True)
    grid, found = layer(x.view(3, *shape, 8), return_routing=True)
    assert_same(grid.view_as(row), row, 0)
    assert torch.equal(found.to_dense(), routing.to_dense())
    assert layer(x.view(3, *shape, 8)).shape == (3, *shape, 8)


# Which blocks


@each_vit
@pytest.mark.parametrize(("every", "replaced"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_which_blocks_are_replaced(name: str, every: int, replaced: list[int]) -> None:
    dense = VITS[name](4)
    before = mlps(dense)
    vit = moefy(dense, every=every, num_experts=4)
    assert vit is dense
    assert [i for i, mlp in enumerate(mlps(vit)) if isinstance(mlp, MoE)] == replaced
    assert all(mlp is before[i] for i, mlp in enumerate(mlps(vit)) if i not in replaced)


@each_vit
@pytest.mark.parametrize("kind", [list, np.array])
def test_blocks_by_number(name: str, kind: Callable[[list[int]], Any]) -> None:
    for blocks in ([3, 0], [-4, -1], [0, -1]):
        vit = moefy(VITS[name](4), blocks=kind(blocks), num_experts=2)
        assert [isinstance(mlp, MoE) for mlp in mlps(vit)] == [True, False, False, True]


def test_several_stages_are_numbered_in_order() -> None:
    model = moefy(nn.Sequential(stack(plain_mlp(), plain_mlp()), stack(plain_mlp())), blocks=[2], num_experts=2)
    assert [name for name, part in model.named_modules() if isinstance(part, MoE)] == ["1.0.mlp"]


def test_an_mlp_that_is_used_twice_stays_one() -> None:
    mlp = plain_mlp()
    blocks: Any = moefy(stack(mlp, mlp), every=1, num_experts=2)
    first, second = blocks
    assert first.mlp is second.mlp
    assert first.mlp.shared_expert is mlp


# Targets


class Handmade(nn.Module):
    """A transformer's layers under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "ffn": Llama()}) for _ in range(3))
        self.head = plain_mlp()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["ffn"](layer["norm"](x))  # type: ignore[index]
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize(
    ("kwargs", "replaced"),
    [
        ({"targets": "layers.*.ffn"}, ["layers.0.ffn", "layers.1.ffn", "layers.2.ffn"]),
        ({"targets": ["head", "layers.2.ffn"]}, ["layers.2.ffn", "head"]),
        ({"targets": "layers.*.ffn*", "every": 2}, ["layers.1.ffn"]),
        ({"targets": "layers.*.ffn", "blocks": [-1]}, ["layers.2.ffn"]),
    ],
    ids=str,
)
def test_modules_by_name(kwargs: dict[str, Any], replaced: list[str]) -> None:
    torch.manual_seed(0)
    dense = Handmade().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    given = copy.deepcopy(dense)
    model = moefy(given, num_experts=4, router="expert_choice", **kwargs)
    assert model is given
    assert [name for name, part in model.named_modules() if isinstance(part, MoE)] == replaced
    assert_same(model(x), dense(x))
    assert_same(plain(copy.deepcopy(dense), num_experts=4, **kwargs)(x), dense(x))


@pytest.mark.parametrize("targets", ["blocks.*.mlp", "*mlp"])
def test_targets_of_a_vit(targets: str) -> None:
    vit = moefy(timm_vit(), targets=targets, num_experts=2)
    assert [isinstance(mlp, MoE) for mlp in mlps(vit)] == [True] * 3


class Net(nn.Module):
    """A GNN by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GCNConv(8, 6)
        self.conv2 = GATConv(6, 4, heads=2)
        self.conv3 = GINConv(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)))
        self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3):
            x = conv(x, edge_index).relu()
        out: Tensor = self.head(x)
        return out


def sequential() -> nn.Module:
    convs = [(SAGEConv(8, 6), "x, edge_index -> x"), nn.ReLU(), (GCNConv(6, 3), "x, edge_index -> x")]
    return GraphSequential("x, edge_index", convs)


GNNS: dict[str, tuple[Any, str | list[str], int]] = {
    "by hand": (Net, "conv*", 3),
    "by hand, one": (Net, ["conv2"], 1),
    "Sequential": (sequential, "module_[02]", 2),
}


@pytest.mark.parametrize("shared_expert", [True, False])
@pytest.mark.parametrize("name", GNNS)
def test_convs_by_name(name: str, shared_expert: bool) -> None:
    build, targets, count = GNNS[name]
    torch.manual_seed(0)
    dense = build().double()
    x, edge_index = torch.randn(9, 8, dtype=torch.float64), torch.randint(9, (2, 30))
    given = copy.deepcopy(dense)
    router = "expert_choice" if shared_expert else "token_choice"
    kwargs = {} if shared_expert else STRAIGHT
    model = moefy(
        given, targets=targets, num_experts=3, router=router, shared_expert=shared_expert, router_kwargs=kwargs
    )
    assert model is given
    assert sum(isinstance(module, MoEConv) for module in model.modules()) == count
    assert_same(model(x, edge_index), dense(x, edge_index))
    model(x, edge_index).sum().backward()
    fresh = moefy(dense, targets=targets, num_experts=3, upcycle=False, shared_expert=shared_expert)
    same = torch.allclose(fresh(x, edge_index), given(x, edge_index))
    assert same == shared_expert


def test_convs_and_mlps_of_a_frozen_gnn() -> None:
    net = Net().requires_grad_(False)
    before = {id(parameter) for parameter in net.head.parameters()}
    moefy(net, targets=["conv*", "head"], num_experts=3)
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert not any(".shared_expert." in name for name in trained)
    assert {id(p) for p in net.head.shared_expert.parameters()} == before  # type: ignore[union-attr]
    for name in ("conv1", "conv2", "conv3", "head"):
        layer: Any = net.get_submodule(name)
        assert all(p.requires_grad for p in (*layer.experts.parameters(), *layer.router.parameters()))
        assert name == "head" or layer.gain.requires_grad
    net(torch.randn(9, 8), torch.randint(9, (2, 30))).sum().backward()


@pytest.mark.parametrize(
    ("build", "targets", "message"),
    [
        (Net, "layer*", r"targets: got 'layer\*', expected a pattern of names that are there, such as conv1, .*head"),
        (Net, ["conv*", "lin*"], r"targets: got 'lin\*'"),
        (Net, [], r"targets: got \[\], expected a pattern"),
        (Handmade, "layers", r"targets: got 'layers'.* such as layers\.0\.ffn"),
        (Handmade, "layers.0.norm", r"model: got layers\.0\.norm, a LayerNorm of \(LayerNorm\)"),
        (Handmade, "layers.0.ffn.w1", r"model: got layers\.0\.ffn\.w1, a Linear of \(Linear 8 to 12\)"),
        (lambda: nn.Sequential(SimpleConv()), "0", "model: got 0, a SimpleConv of unknown widths"),
        (lambda: nn.Sequential(GCNConv(-1, 4)), "0", "model: got parameters on the meta device or of lazy layers"),
        (Net, "conv1.lin", r"model: got conv1\.lin, a Linear of \(Linear 8 to 6\)"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
def test_bad_targets_leave_the_model_alone(build: Any, targets: Any, message: str) -> None:
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        moefy(model, targets=targets, num_experts=2)
    assert dict(model.named_modules()) == before


def test_a_conv_that_is_frozen_in_part_is_refused() -> None:
    net = Net()
    net.conv1.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="model: got conv1 with some parameters frozen, expected all or none"):
        moefy(net, targets="conv1", num_experts=2)


# As a model


@pytest.mark.parametrize("training", [False, True])
def test_dtype_and_mode_are_kept(training: bool) -> None:
    layer = mlps(moefy(torchvision_vit().train(training), num_experts=4))[1]
    assert {module.training for module in layer.modules()} == {training}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize("convert", [moefy, plain], ids=["shared", "plain"])
@pytest.mark.parametrize("upcycle", [True, False])
def test_a_frozen_model_stays_frozen_but_for_what_is_new(upcycle: bool, convert: Any) -> None:
    vit = timm_vit().requires_grad_(False)
    own = {id(parameter) for parameter in vit.parameters()}
    model = convert(vit, every=1, num_experts=2, upcycle=upcycle)
    assert all(parameter.requires_grad == (id(parameter) not in own) for parameter in model.parameters())
    model.train()(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_shared_expert_keeps_its_modes_and_types() -> None:
    mlp = nn.Sequential(*plain_mlp().to(torch.bfloat16), nn.Dropout(0.5).eval()).train()
    mlp[3].eval()
    mlp.register_parameter("scale", nn.Parameter(torch.ones(1)))
    layer = moefy(stack(mlp), every=1, num_experts=2)[0].mlp  # type: ignore[index]
    assert [part.training for part in mlp] == [True, True, True, False]
    assert mlp.scale.dtype == torch.float32
    assert layer.training
    assert layer.experts.up.weight.dtype == layer.router.gate.weight.dtype == torch.bfloat16


def weight_norm(mlp: Any) -> Any:
    return parametrizations.weight_norm(mlp[2])


@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        lambda mlp: parametrizations.spectral_norm(mlp[2]),
        lambda mlp: nn.utils.spectral_norm(mlp[2]),
        lambda mlp: prune.l1_unstructured(mlp[2], name="weight", amount=0.3),
        lambda mlp: mlp[1].register_forward_hook(lambda _, __, y: 2 * y),
        lambda mlp: mlp.register_forward_pre_hook(lambda _, x: (x[0] + 1,)),
    ],
    ids=["weight_norm", "spectral_norm", "old spectral_norm", "prune", "hook", "pre-hook"],
)
def test_the_shared_expert_keeps_parametrizations_and_hooks(change: Any) -> None:
    torch.manual_seed(0)
    model = stack(plain_mlp()).double().eval()
    change(model[0].mlp)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = model(x)
    seen: list[nn.Module] = []
    model[0].mlp.register_forward_hook(lambda module, *_: seen.append(module))
    found = moefy(model, every=1, num_experts=2)
    assert seen == []  # not by trying out
    assert_same(found(x), expected)
    assert seen == [found[0].mlp.shared_expert]  # type: ignore[index]
    mlp = found[0].mlp.shared_expert  # type: ignore[index]
    model[0].mlp = mlp
    copies = moefy(model, every=1, num_experts=2, dense_start=False)[0].mlp.experts  # type: ignore[index]
    assert_same(copies.up.weight[1], mlp[0].weight.T.detach())
    assert_same(copies.down.weight[1], mlp[2].weight.T.detach())


@pytest.mark.parametrize("build", [torchvision_vit, timm_vit, eva, torchvision_swin], ids=lambda build: build.__name__)
def test_copies_and_state_dicts(build: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *([16, 16] if build is torchvision_swin else [8, 8]), dtype=torch.float64)
    model = moefy(build(), every=1, num_experts=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied(x), expected, 0)
    other = moefy(build(), every=1, num_experts=2)
    other.load_state_dict(model.state_dict())
    assert_same(other(x), expected, 0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("build", [timm_vit, eva, torchvision_swin], ids=["ViT", "EVA", "Swin"])
def test_compiles_in_one_graph(build: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *([16, 16] if build is torchvision_swin else [8, 8]), dtype=torch.float64)
    model = moefy(build(), every=1, num_experts=2)
    assert_same(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


# Dropout


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("output", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_what_is_dropped_stays_the_same(hidden: float, output: float, backend: Any) -> None:
    """Shares of zeros of a layer whose biases are zero: of hidden units, through a down projection of ones, none."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(hidden), nn.Linear(64, 8), nn.Dropout(output)).double()
    x = torch.randn(4, 200, 8, dtype=torch.float64)
    layer = plain(stack(mlp), every=1, num_experts=2, backend=backend)[0].mlp
    assert dropouts(layer) == (hidden, output)
    for module in (mlp, layer):
        y = module.train()(x)
        assert (y == 0).double().mean().item() == pytest.approx(output, abs=0.05)
        twice = module(x)
        assert torch.equal(y, twice) == (hidden == output == 0)
        kept = (y != 0) & (twice != 0)
        assert torch.equal(y[kept], twice[kept]) == (hidden == 0)


def dropouts(layer: Any) -> tuple[float, float]:
    return layer.experts.hidden_dropout.p, layer.experts.output_dropout.p


def test_dropout_of_transformers_and_of_one_module_used_twice() -> None:
    """What counts is what a forward calls."""
    drop = nn.Dropout(0.5)
    up, activation, down = plain_mlp()
    assert dropouts(moefy(stack(nn.Sequential(up, activation, drop, down, drop)), every=1)[0].mlp) == (0.5, 0.5)  # type: ignore[index]
    assert dropouts(mlps(moefy(torchvision_vit(dropout=0.25)))[1]) == (0.25, 0.25)
    assert dropouts(mlps(moefy(timm_vit(proj_drop_rate=0.3)))[1]) == (0.3, 0.3)


# What is refused


def changed(change: Callable[[Any], Any], part: int | None) -> Any:
    mlp = plain_mlp()
    change(mlp if part is None else mlp[part])
    return stack(mlp)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return torchvision_vit()


def parallel() -> nn.Module:
    return timm_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock)


REFUSED: list[tuple[Any, str]] = [
    (
        lambda: nn.Linear(8, 8),
        "model: got Linear, expected a transformer with blocks that hold an `mlp`.* or `targets`",
    ),
    (lambda: nn.Sequential(nn.Linear(8, 8)), "model: got Sequential, expected a transformer"),
    (parallel, "model: got VisionTransformer of ParallelScalingBlock, which has no `mlp` apart from its other layers"),
    (
        lambda: stack(plain_mlp(), plain_mlp(Odd)),
        r"got 1\.mlp, a Odd of \(Linear 8 to 12, GELU, Linear 12 to 8\), expected",
    ),
    (lambda: stack(plain_mlp(Functional)), r"got 0\.mlp, a Functional of .*, expected .* that computes just that"),
    (lambda: stack(Mixed()), r"got 0\.mlp, a Mixed of \(Linear 8 to 12, Softmax, Linear 12 to 8\)"),
    (
        lambda: stack(Llama(lambda x: x.relu().square())),
        r"a Llama of \(Linear 8 to 12, Linear 8 to 12, Linear 12 to 8\)",
    ),
    (lambda: stack(plain_mlp(Grid)), r"model: got 0\.mlp, a Grid that does not take tokens \(B, T, 8\)"),
    (lambda: stack(nn.Sequential(*plain_mlp(), nn.ReLU())), r"of \(Linear 8 to 12, GELU, Linear 12 to 8, ReLU\)"),
    (lambda: stack(nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8))), r"\(Linear 8 to 8, PReLU, Linear"),
    (
        lambda: stack(nn.Sequential(nn.Dropout(0.1), *plain_mlp(), nn.Dropout(0.2))),
        r"\(Dropout, Linear 8 to 12, .* dropout only after the activation and at the end",
    ),
    (
        lambda: stack(GlobalResponseNormMlp(8, 12)),
        r"a GlobalResponseNormMlp of \(Linear 8 to 12, GELU, Glob",
    ),
    (lambda: stack(Mlp(8, 12, use_conv=True)), r"a Mlp of \(Conv2d, GELU, .*Conv2d"),
    (lambda: stack(nn.Identity()), r"model: got 0\.mlp, a Identity of \(Identity\)"),
    (lambda: moefy(stack(plain_mlp()), every=1, num_experts=4), r"model: got 0\.mlp, a MoE already"),
    (on_meta, "model: got parameters on the meta device .*, expected ones with values"),
]

LOST: list[tuple[Any, str]] = [
    *(
        (
            partial(changed, change, 2),
            r"model: got 0\.mlp\.2 with a parametrized weight \(weight norm.* shared_expert=True",
        )
        for change in (
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            nn.utils.spectral_norm,
            partial(prune.l1_unstructured, name="weight", amount=0.3),
        )
    ),
    (partial(changed, lambda part: part.register_forward_hook(changed), None), r"got 0\.mlp with hooks \(changed\)"),
    (partial(changed, lambda part: part.register_forward_pre_hook(stack), 1), r"got 0\.mlp\.1 with hooks \(stack\)"),
    (partial(changed, lambda part: part.register_full_backward_hook(stack), 2), r"got 0\.mlp\.2 with hooks \(stack\)"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refuses_and_leaves_the_model_alone(build: Any, message: str) -> None:
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        moefy(model, every=1, num_experts=4)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(("build", "message"), LOST, ids=[message[:40] for _, message in LOST])
def test_refuses_to_lose_what_experts_would_not_run(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(build(), every=1, num_experts=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"every": 4}, "every: got 4, expected at most the number of blocks, 3"),
        ({"k": 5}, "k: got 5, expected at most num_experts=4"),
        ({"router": "nobody"}, "router: got 'nobody', expected one of 'token_choice'"),
        ({"router": TokenChoice(16, 4)}, "router: got an instance, expected a name or a factory"),
        ({"router_kwargs": {"foo": 1}}, r"router_kwargs: got \{'foo': 1\}, expected some of weight, noise, balance"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected one of"),
        ({"blocks": 3}, "blocks: got 3, expected a list"),
        *(
            ({"blocks": b}, r"blocks: got .* expected some of -3 to 2, each once")
            for b in ([], [0, 0], [0, -3], [3], [-4], [1.0])
        ),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_model_alone(kwargs: dict[str, Any], message: str) -> None:
    vit = torchvision_vit()
    with pytest.raises(ValueError, match=message):
        moefy(vit, **{"num_experts": 4, **kwargs})
    assert not any(isinstance(mlp, MoE) for mlp in mlps(vit))


@pytest.mark.slow
@pytest.mark.parametrize("build", [torchvision.models.vit_b_16, partial(timm.create_model, "vit_base_patch16_224")])
def test_a_full_size_vit_upcycles(build: Any) -> None:
    """ViT-B/16 in float64: the first forward is the dense one's."""
    torch.manual_seed(0)
    dense = build().double().eval()
    nn.init.normal_(list(dense.modules())[-1].weight, std=0.02)
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = dense(x)
        assert_same(moefy(dense, num_experts=2)(x), expected)
