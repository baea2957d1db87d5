"""moefy on transformers (on PyG's GNNs: see test_gnn)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import VisionTransformer

from gmoe import MoE, TokenChoice, moefy


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


def plain_mlp(cls: type[nn.Sequential] = nn.Sequential, **kwargs: Any) -> nn.Sequential:
    return cls(nn.Linear(8, 12, **kwargs), nn.GELU(), nn.Linear(12, 8, **kwargs))


def stack(*mlp: nn.Module) -> Any:
    """A model of one block an MLP."""
    return nn.Sequential(*map(Block, mlp))


# What comes out


@each_vit
@pytest.mark.parametrize(
    ("router", "k"),
    [("token_choice", 2), ("token_choice", 1), ("multi_centroid", 2), ("random", 2), ("random", 1), ("uniform", 1)],
)
def test_upcycled_equals_dense(name: str, router: str, k: int) -> None:
    dense = VITS[name]()
    expected = dense(images())
    assert_same(moefy(copy.deepcopy(dense), every=1, k=k, router=router, num_experts=4)(images()), expected)
    fresh = moefy(dense, every=1, k=k, router=router, num_experts=4, upcycle=False)
    assert (fresh(images()) - expected).abs().max() > 1e-3


@each_vit
@pytest.mark.parametrize(
    ("router", "weight"), [("expert_choice", None), ("attention_vote", None), ("expert_choice", "normalized")]
)
def test_upcycled_layer_scales_the_mlp_by_the_tokens_weights(name: str, router: str, weight: str | None) -> None:
    """What the docstring says of routers whose weights do not sum to 1; normalized, they do where a token is taken."""
    dense = mlps(VITS[name]())[1]
    layer = mlps(moefy(VITS[name](), k=2, router=router, num_experts=4, router_kwargs={"weight": weight}))[1]
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
    found = moefy(vit, every=1, num_experts=4)(images())
    assert_same(found, expected)
    found.sum().backward()


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
    vit = moefy(VITS[name](4), blocks=kind([3, 0]), num_experts=2)
    assert [isinstance(mlp, MoE) for mlp in mlps(vit)] == [True, False, False, True]


# As a model


@pytest.mark.parametrize("training", [False, True])
def test_dtype_and_mode_are_kept(training: bool) -> None:
    layer = mlps(moefy(torchvision_vit().train(training), num_experts=4))[1]
    assert {module.training for module in layer.modules()} == {training}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize("upcycle", [True, False])
@pytest.mark.parametrize("frozen", [["0.weight"], ["0.bias", "2.weight", "2.bias"], []], ids=str)
def test_frozen_parameters_stay_frozen_in_their_copies(frozen: list[str], upcycle: bool) -> None:
    mlp = plain_mlp()
    for name in frozen:
        mlp.get_parameter(name).requires_grad_(False)
    layer = moefy(stack(mlp), every=1, num_experts=2, upcycle=upcycle)[0].mlp  # type: ignore[index]
    found = {name for name, p in layer.named_parameters() if not p.requires_grad}
    parts = {"0": "up", "2": "down"}
    assert found == {f"experts.{parts[name[0]]}{name[1:]}" for name in frozen if upcycle}


# Dropout


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("output", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_what_is_dropped_stays_the_same(hidden: float, output: float, backend: Any) -> None:
    """Shares of zeros of a layer whose biases are zero: of hidden units, through a down projection of ones, none."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(hidden), nn.Linear(64, 8), nn.Dropout(output)).double()
    x = torch.randn(4, 200, 8, dtype=torch.float64)
    layer = moefy(stack(mlp), every=1, num_experts=2, k=1, backend=backend)[0].mlp  # type: ignore[index]
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


REFUSED: list[tuple[Any, str]] = [
    (lambda: nn.Linear(8, 8), "model: got Linear, expected a transformer with blocks that hold an `mlp`"),
    (lambda: nn.Sequential(nn.Linear(8, 8)), "model: got Sequential, expected a transformer"),
    (lambda: nn.Sequential(stack(plain_mlp()), stack(plain_mlp())), "Sequential, whose blocks lie in several stages"),
    (lambda: stack(plain_mlp(), plain_mlp(Odd)), r"mlp \(Odd\) that does not compute linear"),
    (lambda: stack(plain_mlp(Functional)), r"mlp \(Functional\) that does not compute linear"),
    (lambda: stack(plain_mlp(Grid)), r"model: got an mlp \(Grid\) that does not take tokens \(B, T, 8\)"),
    (lambda: stack(nn.Sequential(*plain_mlp(), nn.ReLU())), r"mlp of \(Linear 8 to 12, GELU, Linear 12 to 8, ReLU\)"),
    (lambda: stack(nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8))), r"\(Linear 8 to 8, PReLU, Linear"),
    (
        lambda: stack(nn.Sequential(*list(plain_mlp())[:2], nn.Linear(12, 8, bias=False))),
        "both with or both without bias",
    ),
    (
        lambda: stack(nn.Sequential(nn.Dropout(0.1), *plain_mlp(), nn.Dropout(0.2))),
        r"\(Dropout, Linear 8 to 12, .* dropout only before and after the second",
    ),
    (lambda: stack(nn.Identity()), r"model: got an mlp of \(Identity\)"),
    (lambda: stack(nn.Conv2d(3, 3, 1)), r"model: got an mlp of \(Conv2d\)"),
    (lambda: moefy(stack(plain_mlp()), every=1, num_experts=4), "model: got a block whose mlp is a MoE already"),
    (lambda: timm_vit(mlp_layer=timm.layers.mlp.SwiGLU), "model: got an mlp"),
    (lambda: timm_vit(mlp_layer=timm.layers.mlp.GluMlp), r"Linear 16 to 64, .*, Linear 32 to 16\).* gated MLPs are"),
    (on_meta, "model: got parameters on the meta device, expected ones with values"),
    *(
        (partial(changed, change, 2), r"model: got mlp\.2 with a parametrized weight \(weight norm")
        for change in (
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            nn.utils.spectral_norm,
            partial(prune.l1_unstructured, name="weight", amount=0.3),
        )
    ),
    (partial(changed, lambda part: part.register_forward_hook(changed), None), r"got mlp with hooks \(changed\)"),
    (partial(changed, lambda part: part.register_forward_pre_hook(stack), 1), r"got mlp\.1 with hooks \(stack\)"),
    (partial(changed, lambda part: part.register_full_backward_hook(stack), 2), r"got mlp\.2 with hooks \(stack\)"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refuses_and_leaves_the_model_alone(build: Any, message: str) -> None:
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        moefy(model, every=1, num_experts=4)
    assert dict(model.named_modules()) == before


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
            ({"blocks": b}, r"blocks: got .* expected some of 0 to 2, each once")
            for b in ([], [0, 0], [3], [-1], [1.0])
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
