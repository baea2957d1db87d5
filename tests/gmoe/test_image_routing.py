"""``router_input="image"``: all tokens of an image go to the experts of their mean."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import gmoe
from gmoe import ExpertChoice, MLPExperts, MoE, TokenChoice, ViTMoE, aux_loss, record_routing
from tests.helpers.vits import images, timm_vit, torchvision_vit

E, D = 4, 6
TINY = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 4,
    "num_heads": 2,
    "hidden_dim": 16,
    "mlp_dim": 24,
}


def moe(**options: Any) -> MoE:
    torch.manual_seed(0)
    router = TokenChoice(D, num_experts=E, init_scale=3.0, **options)
    return MoE(router, MLPExperts(D, 5, 3, num_experts=E), router_input="image").double()


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64, requires_grad=True)


def huggingface_vit() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": 16}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    sizes["num_labels"] = 5
    return ViTForImageClassification(ViTConfig(**sizes)).double().eval()


MODELS: dict[str, Any] = {
    "torchvision": torchvision_vit,
    "timm": timm_vit,
    "timm with registers": lambda: timm_vit(class_token=True, reg_tokens=2),
    "timm without a class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "transformers": huggingface_vit,
}


def logits(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("k", [1, 2, E])
def test_an_image_is_routed_by_its_mean(k: int) -> None:
    layer = moe(k=k, balance=None, weight="score")
    x = tokens(3, 5)
    out, routing = layer(x, return_routing=True)
    weight_BE = layer.router(x.mean(dim=1)).to_dense()
    weight_TE = weight_BE.repeat_interleave(5, dim=0)
    torch.testing.assert_close(routing.to_dense(), weight_TE)
    assert routing.by_group is not None
    torch.testing.assert_close(routing.by_group.weight_GE, weight_BE)
    told = MoE(layer.router, layer.experts)
    every = torch.arange(E).expand(15, -1)
    given = gmoe.Routing.from_choices(every, weight_TE, num_experts=E)
    expected = told(x, routing=given)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    values = [x, *layer.parameters()]
    found = torch.autograd.grad(out.square().sum(), values)
    wanted = torch.autograd.grad(expected.square().sum(), values)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("balance", ["bias", "switch"])
def test_balance_and_losses_count_images(balance: Any) -> None:
    layer = moe(balance=balance, capacity_factor=1.0, z_coef=0.1)
    twin: Any = copy.deepcopy(layer.router)
    x = tokens(7, 5)
    torch.manual_seed(2)
    _, routing = layer(x, return_routing=True)
    torch.manual_seed(2)
    of_images = twin(x.mean(dim=1), torch.arange(7))
    torch.testing.assert_close(aux_loss(routing), aux_loss(of_images))
    assert routing.losses.keys() == of_images.losses.keys()
    assert int(routing.dropped) == 0
    torch.testing.assert_close(dict(layer.router.named_buffers()), dict(twin.named_buffers()))


def test_images_do_not_see_each_other_and_padding_is_part_of_one() -> None:
    layer = moe(balance=None)
    x = tokens(3, 5)
    torch.testing.assert_close(layer(x[1:2]), layer(x)[1:2])
    padded = nn.functional.pad(x, (0, 0, 0, 5))
    _, routing = layer(padded, return_routing=True)
    mean = layer.router(x.mean(dim=1) / 2)
    assert torch.equal(routing.top_expert.view(3, 10)[:, 0], mean.top_expert)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", ["shared", "copies"])
def test_all_tokens_of_an_image_go_to_the_same_experts(name: str, start: Any) -> None:
    dense = MODELS[name]()
    x = images(6)
    expected = logits(dense, x)
    model = gmoe.moefy(dense, every=1, num_experts=E, start=start, router_input="image")
    with record_routing(model) as routings:
        torch.testing.assert_close(logits(model, x), expected, rtol=0, atol=1e-10)
    assert len(routings) == 3
    for routing in routings:
        expert_BT = routing.top_expert.view(6, -1)
        assert torch.equal(expert_BT, expert_BT[:, :1].expand_as(expert_BT))


@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_a_model_is_saved_loaded_and_compiled(mix: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"router": "token_choice", "start": "plain", "router_input": "image"}
    torch.manual_seed(0)
    model = ViTMoE(TINY, 5, num_experts=E, mix=mix, **options).eval()
    nn.init.normal_(model.heads.head.weight)
    x = images().float()
    expected, routings = model(x, return_routing=True)
    gmoe.save(model, tmp_path / "vit")
    loaded: Any = gmoe.load(tmp_path / "vit")
    torch.testing.assert_close(loaded.eval()(x), expected)
    torch.testing.assert_close(model(x, routings=routings), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)

    moefied = gmoe.moefy(timm_vit(), num_experts=E, mix=mix, start="copies", router_input="image")
    gmoe.save(moefied, tmp_path / "timm")
    again = gmoe.load(tmp_path / "timm", base=timm_vit())
    torch.testing.assert_close(again(images()), moefied(images()))


def test_a_decision_may_come_from_features_of_the_users() -> None:
    """A view of the images, such as their mean color, and one decision for all blocks."""
    torch.manual_seed(0)
    model = ViTMoE(TINY, 5, "token_choice", num_experts=E, start="plain")
    nn.init.normal_(model.heads.head.weight)
    router = TokenChoice(3, num_experts=E, balance=None)
    x = images().float()
    image_T = torch.arange(len(x)).repeat_interleave(5)
    routing = router(x.mean(dim=(2, 3)), torch.arange(len(x)), members=image_T)
    out, used = model(x, routings=[routing, routing], return_routing=True)
    assert used[0] is used[1] is routing
    out.square().sum().backward()
    assert router.gate.weight.grad is not None
    assert router.gate.weight.grad.any()


def test_an_image_level_layer_is_exported() -> None:
    layer = moe(k=2).eval()
    x = tokens(3, 5).detach()
    run = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(run(x), layer(x))


def test_what_does_not_fit_is_refused() -> None:
    experts = MLPExperts(D, 5, 3, num_experts=E)
    with pytest.raises(ValueError, match=r"router_input: got 'image' with ExpertChoice, .* images"):
        MoE(ExpertChoice(D, num_experts=E), experts, router_input="image")
    with pytest.raises(ValueError, match="router_input: got 'graph', expected one of"):
        MoE(TokenChoice(D, num_experts=E), experts, router_input="graph")  # type: ignore[arg-type]
    model: Any = gmoe.moefy(timm_vit(), num_experts=E, router_input="image")
    with pytest.raises(ValueError, match=r"x: got \(3, 16\), rows of nobody knows which images"):
        model.blocks[1].mlp(torch.zeros(3, 16, dtype=torch.float64))


def shared(**options: Any) -> ViTMoE:
    torch.manual_seed(0)
    options = {"router": "token_choice", "start": "plain", "router_input": "image"} | options
    model = ViTMoE(TINY, 5, num_experts=E, shared_router=True, **options)
    nn.init.normal_(model.heads.head.weight)
    return model.double().eval()


@pytest.mark.parametrize("router_input", ["image", "token"])
@pytest.mark.parametrize("mix", ["outputs", "weights"])
def test_one_router_decides_for_all_layers(router_input: Any, mix: Any) -> None:
    if (router_input, mix) == ("token", "weights"):
        pytest.skip("a token by itself has no weights of its own")
    model = shared(router_input=router_input, mix=mix)
    x = images()
    out, routings = model(x, return_routing=True)
    assert len(routings) == 1
    # By hand: the tokens that enter the first block, and the decision given to both layers.
    patches = model.conv_proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.class_token.expand(3, -1, -1), patches], dim=1)
    tokens = tokens + model.encoder.pos_embedding
    router: Any = model.shared_router
    weight_TE = router(tokens).to_dense()
    if router_input == "image":
        weight_TE = router(tokens.mean(dim=1)).to_dense().repeat_interleave(5, dim=0)
    torch.testing.assert_close(routings[0].to_dense(), weight_TE)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    found: list[gmoe.Routing] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, kwargs, ___: found.append(kwargs["routing"]), with_kwargs=True
        )
    torch.testing.assert_close(model(x, routings=routings), out)
    assert found == [routings[0], routings[0]]
    out.square().sum().backward()
    assert router.gate.weight.grad.any()
    with pytest.raises(ValueError, match="routings: got 2, expected a list of 1 Routings, one a"):
        model(x, routings=routings * 2)
    with pytest.raises(ValueError, match=r"routing: got None, expected a Routing"):
        layers[0](tokens)


@pytest.mark.parametrize("start", ["copies", "shared"])
def test_with_a_shared_router_a_new_model_is_the_dense_one(start: Any) -> None:
    model = shared(start=start)
    torch.manual_seed(0)
    dense = ViTMoE(TINY, 5, None)
    nn.init.normal_(dense.heads.head.weight)
    x = images()
    torch.testing.assert_close(model(x), dense.double().eval()(x), rtol=0, atol=1e-10)


def test_a_shared_router_is_saved_pruned_merged_and_compiled(tmp_path: Any) -> None:
    model = shared()
    x = images()
    expected = model(x)
    gmoe.save(model, tmp_path)
    loaded: Any = gmoe.load(tmp_path)
    assert not any(layer.router for layer in loaded.modules() if isinstance(layer, MoE))
    torch.testing.assert_close(loaded.double().eval()(x), expected)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x + 1), model(x + 1))
    pruned = gmoe.prune(loaded, x)
    assert len(pruned.layers) == 1
    assert len(pruned.layers[0].names) == 2
    torch.testing.assert_close(pruned.model(x), expected)
    mixed = shared(mix="weights")
    dense: Any = gmoe.merge(mixed, x[:1])
    assert dense.shared_router is None
    torch.testing.assert_close(dense(x[:1]), mixed(x[:1]), rtol=0, atol=1e-11)
