"""moefy on transformers (on PyG's GNNs: see test_models)."""

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
from torchvision.models import VisionTransformer

from gmoe import ROUTERS, MLPExperts, MoE, TokenChoice, aux_loss, moefy, record


def torchvision_vit(layers: int = 3, dropout: float = 0.0) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(8, 4, layers, 2, 16, 24, num_classes=5, dropout=dropout)
    nn.init.normal_(vit.heads.head.weight)  # torchvision's starts at zero, under which all models are equal
    return vit.double().eval()


def timm_vit(layers: int = 3, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    vit: Any = timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=layers, num_heads=2, num_classes=5, **kwargs
    )
    nn.init.normal_(vit.head.weight)
    return vit.double().eval()


VITS: dict[str, Any] = {"torchvision": torchvision_vit, "timm": timm_vit}


def mlps(vit: Any) -> list[nn.Module]:
    blocks = vit.encoder.layers if isinstance(vit, VisionTransformer) else vit.blocks
    return [block.mlp for block in blocks]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(
    ("router", "k", "kwargs"),
    [
        ("token_choice", 2, None),
        ("token_choice", 1, None),
        ("multi_centroid", 2, None),
        ("random", 2, None),
        ("random", 1, None),
        ("uniform", 1, None),
    ],
)
def test_upcycled_equals_dense(name: str, router: str, k: int, kwargs: dict[str, Any] | None) -> None:
    dense = VITS[name]()
    expected = dense(images())
    moe = moefy(copy.deepcopy(dense), every=1, k=k, router=router, num_experts=4, router_kwargs=kwargs)
    torch.testing.assert_close(moe(images()), expected, rtol=0, atol=1e-10)
    fresh = moefy(dense, every=1, k=k, router=router, num_experts=4, router_kwargs=kwargs, upcycle=False)
    assert (fresh(images()) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("router", ["expert_choice", "attention_vote"])
def test_upcycled_layer_scales_the_mlp_by_the_tokens_weights(name: str, router: str) -> None:
    """What the docstring says of routers whose weights do not sum to 1."""
    dense = mlps(VITS[name]())[1]
    layer = mlps(moefy(VITS[name](), every=2, k=2, router=router, num_experts=4))[1]
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    share = routing.to_dense().sum(dim=1).view(3, 5, 1)
    torch.testing.assert_close(y, share * dense(x), rtol=0, atol=1e-10)


def test_expert_choice_normalized_equals_dense_where_taken() -> None:
    dense = mlps(torchvision_vit())[1]
    vit = moefy(torchvision_vit(), k=2, router="expert_choice", num_experts=4, router_kwargs={"weight": "normalized"})
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    y, routing = mlps(vit)[1](x, return_routing=True)
    taken = (routing.to_dense() != 0).any(dim=1).view(3, 5, 1)
    torch.testing.assert_close(y, taken * dense(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("every", "replaced"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_which_blocks_are_replaced(name: str, every: int, replaced: list[int]) -> None:
    dense = VITS[name](4)
    before = mlps(dense)
    vit = moefy(dense, every=every, num_experts=4)
    assert vit is dense
    assert [i for i, mlp in enumerate(mlps(vit)) if isinstance(mlp, MoE)] == replaced
    assert all(mlp is before[i] for i, mlp in enumerate(mlps(vit)) if i not in replaced)


@pytest.mark.parametrize("name", VITS)
def test_an_image_is_a_pool(name: str) -> None:
    vit = moefy(VITS[name](), every=1, num_experts=4, router="expert_choice")
    torch.testing.assert_close(vit(images(4))[1:2], vit(images(4)[1:2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("router", ROUTERS)
def test_trains(name: str, router: str) -> None:
    vit = moefy(VITS[name](), router=router, k=2, num_experts=4).train()
    with record(vit) as routings:
        logits = vit(images())
    assert len(routings) == 1
    (nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2])) + aux_loss(routings)).backward()
    assert all(p.grad is not None for p in vit.parameters())
    assert all(p.grad is not None and p.grad.any() for p in mlps(vit)[1].parameters())


@pytest.mark.parametrize("name", VITS)
def test_state_dict_round_trip(name: str) -> None:
    first, second = (moefy(VITS[name](), num_experts=4, upcycle=upcycle) for upcycle in (True, False))
    assert not torch.equal(first(images()), second(images()))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))


@pytest.mark.parametrize("name", VITS)
def test_autocast_scores_in_float32(name: str) -> None:
    vit = moefy(VITS[name](), num_experts=4).float()
    with torch.autocast("cpu", torch.bfloat16), record(vit) as routings:
        logits = vit(images().float())
    assert logits.isfinite().all()
    assert routings[0].scores.dtype == torch.float32


def test_compiled_equals_eager() -> None:
    torch.compiler.reset()
    vit = moefy(torchvision_vit(2), num_experts=4)
    torch.testing.assert_close(torch.compile(vit, backend="aot_eager")(images()), vit(images()))


def test_dtype_mode_and_dropout_are_kept() -> None:
    vit = moefy(torchvision_vit(dropout=0.25), num_experts=4)
    layer = mlps(vit)[1]
    assert isinstance(layer, MoE)
    assert isinstance(layer.experts, MLPExperts)
    assert layer.experts.hidden_dropout.p == layer.experts.output_dropout.p == 0.25
    assert not layer.training
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert moefy(torchvision_vit().train(), num_experts=4).training


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("output", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["loop", "padded"])
def test_what_is_dropped_stays_the_same(hidden: float, output: float, backend: str) -> None:
    """Shares of zeros of a layer whose biases are zero: of hidden units, through a down projection of ones, none."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(hidden), nn.Linear(64, 8), nn.Dropout(output)).double()
    x = torch.randn(4, 200, 8, dtype=torch.float64)
    model: Any = moefy(stack(Block(mlp)), every=1, num_experts=2, k=1, backend=backend)  # type: ignore[arg-type]
    layer = model[0].mlp
    assert (layer.experts.hidden_dropout.p, layer.experts.output_dropout.p) == (hidden, output)
    for module in (mlp, layer):
        y = module.train()(x)
        assert (y == 0).double().mean().item() == pytest.approx(output, abs=0.05)
        twice = module(x)
        assert torch.equal(y, twice) == (hidden == output == 0)
        kept = (y != 0) & (twice != 0)
        assert torch.equal(y[kept], twice[kept]) == (hidden == 0)


def test_one_dropout_module_used_twice() -> None:
    """As in timm's older MLPs: what counts is what a forward calls."""
    drop = nn.Dropout(0.5)
    model: Any = moefy(
        stack(Block(nn.Sequential(*plain_mlp()[:2], drop, nn.Linear(12, 8), drop))), every=1, num_experts=2
    )
    experts = model[0].mlp.experts
    assert experts.hidden_dropout.p == experts.output_dropout.p == 0.5


def test_timms_two_dropouts() -> None:
    vit: Any = moefy(timm_vit(proj_drop_rate=0.3), every=1, num_experts=4)
    assert vit.blocks[0].mlp.experts.output_dropout.p == 0.3


def test_activation_is_copied() -> None:
    vit = timm_vit(act_layer=nn.SiLU)
    expected = vit(images())
    torch.testing.assert_close(moefy(vit, every=1, num_experts=4)(images()), expected, rtol=0, atol=1e-10)


def test_an_activation_that_works_in_place() -> None:
    vit = timm_vit(act_layer=partial(nn.ReLU, inplace=True))
    expected = vit(images())
    found = moefy(vit, every=1, num_experts=4)(images())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found.sum().backward()


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        vit = torchvision_vit()
    with pytest.raises(ValueError, match="model: got parameters on the meta device, expected ones with values"):
        moefy(vit)


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

    def __init__(self) -> None:
        super().__init__(*plain_mlp())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Grid(nn.Sequential):
    """Of maps, not of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, _, _ = x.shape
        out: Tensor = super().forward(x)
        return out


def stack(*blocks: nn.Module) -> Any:
    return nn.Sequential(*blocks)


def plain_mlp(**kwargs: Any) -> list[nn.Module]:
    return [nn.Linear(8, 12, **kwargs), nn.GELU(), nn.Linear(12, 8, **kwargs)]


def test_any_model_of_such_blocks() -> None:
    model = stack(*(Block(nn.Sequential(*plain_mlp(bias=False))) for _ in range(2))).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(moefy(model, every=1, num_experts=4)(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(8, 8), "model: got Linear, expected a transformer with blocks that hold an `mlp`"),
        (lambda: stack(nn.Linear(8, 8)), "model: got Sequential, expected a transformer"),
        (
            lambda: stack(Block(Odd(*plain_mlp())), Block(Odd(*plain_mlp()))),
            r"mlp \(Odd\) that does not compute linear",
        ),
        (
            lambda: stack(Block(nn.Sequential(*plain_mlp(), nn.ReLU()))),
            r"mlp of \(Linear 8 to 12, GELU, Linear 12 to 8, ReLU\)",
        ),
        (
            lambda: stack(Block(nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8)))),
            r"\(Linear 8 to 8, PReLU, Linear 8 to 8\)",
        ),
        (
            lambda: stack(Block(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False)))),
            "both with or both without bias",
        ),
        (
            lambda: stack(Block(nn.Sequential(nn.Dropout(0.1), *plain_mlp(), nn.Dropout(0.2)))),
            r"\(Dropout, Linear 8 to 12, .* dropout only before and after the second",
        ),
        (lambda: stack(Block(Functional())), r"mlp \(Functional\) that does not compute linear"),
        (lambda: stack(Block(nn.Identity())), r"model: got an mlp of \(Identity\)"),
        (lambda: stack(Block(nn.Conv2d(3, 3, 1))), r"model: got an mlp of \(Conv2d\)"),
        (lambda: stack(Block(Grid(*plain_mlp()))), r"model: got an mlp \(Grid\) that does not take tokens \(B, T, 8\)"),
        (
            lambda: moefy(stack(Block(nn.Sequential(*plain_mlp()))), every=1, num_experts=4),
            "model: got a block whose mlp is a MoE already",
        ),
        (lambda: timm_vit(mlp_layer=timm.layers.mlp.SwiGLU), "model: got an mlp"),
        (
            lambda: timm_vit(mlp_layer=timm.layers.mlp.GluMlp),
            r"Linear 16 to 64, .*, Linear 32 to 16\).* gated MLPs are none",
        ),
    ],
)
def test_refuses_and_leaves_the_model_alone(build: Any, message: str) -> None:
    model = build()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        moefy(model, every=1, num_experts=4)
    assert dict(model.named_modules()) == before


def test_an_odd_block_late_in_the_model_leaves_the_early_ones_alone() -> None:
    model = stack(Block(nn.Sequential(*plain_mlp())), Block(Odd(*plain_mlp())))
    with pytest.raises(ValueError, match="Odd"):
        moefy(model, every=1, num_experts=4)
    assert not any(isinstance(module, MoE) for module in model.modules())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"every": 0}, "every: got 0, expected at least 1"),
        ({"every": 4}, "every: got 4, expected at most the number of blocks, 3"),
        ({"k": 5}, "k: got 5, expected at most num_experts=4"),
        ({"k": 0}, "k: got 0, expected at least 1"),
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"router": "nobody"}, "router: got 'nobody', expected one of 'token_choice'"),
        ({"router": TokenChoice(16, 4)}, "router: got an instance, expected a name or a factory"),
        ({"router": None}, "router: got None, expected a name, a factory or an instance"),
        ({"router_kwargs": {"foo": 1}}, r"router_kwargs: got \{'foo': 1\}, expected some of weight, noise, balance"),
        ({"router_kwargs": {"k": 1}}, r"router_kwargs: got \{'k': 1\}, expected some of weight, .*multiple values"),
        ({"backend": "cuda"}, "backend: got 'cuda', expected one of"),
        ({"k": 1, "router_kwargs": {"weight": "normalized"}}, "weight: got 'normalized' with k=1"),
    ],
)
def test_bad_arguments_leave_the_model_alone(kwargs: dict[str, Any], message: str) -> None:
    vit = torchvision_vit()
    with pytest.raises(ValueError, match=message):
        moefy(vit, **{"num_experts": 4, **kwargs})
    assert not any(isinstance(mlp, MoE) for mlp in mlps(vit))


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize("name", VITS)
def test_blocks_by_number(name: str, kind: Callable[[list[int]], Any]) -> None:
    vit = moefy(VITS[name](4), blocks=kind([3, 0]), num_experts=2)
    assert [isinstance(mlp, MoE) for mlp in mlps(vit)] == [True, False, False, True]


def test_blocks_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks: got 3, expected a list"):
        moefy(torchvision_vit(), blocks=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [[], [0, 0], [3], [-1], [1.0]])
def test_blocks_that_are_not_there_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"blocks: got .* expected some of 0 to 2, each once"):
        moefy(torchvision_vit(), blocks=blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_full_size_vit_upcycles(name: str) -> None:
    """ViT-B/16 in float64: the first forward is the dense one's; it trains; its state dict makes the round trip."""
    torch.manual_seed(0)
    if name == "torchvision":
        dense: Any = torchvision.models.vit_b_16()
        head = dense.heads.head
    else:
        dense = timm.create_model("vit_base_patch16_224", pretrained=False)
        head = dense.head
    nn.init.normal_(head.weight, std=0.02)
    dense = dense.double().eval()
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = dense(x)
        vit = moefy(dense, num_experts=2, upcycle=True).eval()
        torch.testing.assert_close(vit(x), expected, rtol=0, atol=1e-10)
    vit = vit.float().train()
    state = copy.deepcopy(vit.state_dict())
    optimizer = torch.optim.SGD(vit.parameters(), lr=1e-3)
    with record(vit) as routings, torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(vit(x.float()), torch.tensor([3]))
    (loss + aux_loss(routings)).backward()
    optimizer.step()
    changed = [key for key, value in vit.state_dict().items() if not torch.equal(value, state[key])]
    assert any("mlp.experts" in key for key in changed)
    vit.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
