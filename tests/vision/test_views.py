"""Views of an image, to a router or as a token."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch

import gmoe
from gmoe.plot import expert_maps, patch_weights
from vision.told_domain import tell_domains
from vision.views import ViewViT, view_of

SIZE = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 16,
}


def images_of(number: int = 6) -> Any:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(router: Any = "token_choice", **options: Any) -> Any:
    torch.manual_seed(0)
    model = ViewViT(SIZE, 5, router, **({"num_experts": 4, "every": 1} | options))
    torch.nn.init.normal_(model.heads.head.weight)
    return model


def test_a_view_is_colors_and_edges() -> None:
    images = images_of(2)
    for image, view in zip(images, view_of(images), strict=True):
        assert view[:3].allclose(image.flatten(1).mean(dim=1))
        edges = 0.0
        for channel, y, x in product(range(3), range(8), range(7)):
            edges += abs(float(image[channel, y, x + 1] - image[channel, y, x]))
            edges += abs(float(image[channel, x + 1, y] - image[channel, x, y]))
        assert float(view[3]) == pytest.approx(edges / 2 / 168, rel=1e-5)
    assert view_of(torch.ones(2, 1, 8, 8)).tolist() == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize("start", ["copies", "shared"])
def test_one_decision_by_the_view_for_all_tokens_of_all_blocks(start: Any) -> None:
    model = made(by_view=True, start=start, router_kwargs={"noise": False})
    images = images_of()
    # What the router sees are the standardized views, by hand
    view = view_of(images)
    seen = (view - view.mean(0)) / (view.var(0, unbiased=False) + 1e-5).sqrt()
    expected = copy.deepcopy(model.view_router)(seen, torch.arange(6)).to_dense()
    with gmoe.record_routing(model) as decided:
        logits, routings = model(images, return_routing=True)
    assert [routing.num_tokens for routing in decided] == [30]  # the one decision, of all tokens
    assert len(routings) == 2
    assert logits.shape == (6, 5)
    for routing in routings:
        weight_BTE = routing.to_dense().view(6, 5, 4)
        assert torch.equal(weight_BTE, weight_BTE[:, :1].expand(-1, 5, -1))
    assert torch.equal(routings[0].to_dense(), routings[1].to_dense())
    assert torch.equal(expected > 0, weight_BTE[:, 0] > 0)


@pytest.mark.parametrize(("start", "learns"), [("copies", True), ("plain", True)])
def test_the_router_by_view_learns_where_experts_differ(start: Any, learns: bool) -> None:
    model = made(by_view=True, start=start, k=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model(images_of()).square().sum().backward()
    grown = [p.grad is not None and bool(p.grad.any()) for p in model.view_router.parameters()]
    assert any(grown) is learns
    frozen = made("random", by_view=True)
    before = [p.clone() for p in frozen.view_router.state_dict().values()]
    frozen(images_of()).sum().backward()
    assert all(map(torch.equal, before, frozen.view_router.state_dict().values()))
    assert not any(p.requires_grad for p in frozen.view_router.parameters())


@pytest.mark.parametrize("extra", ["view", "domain"])
@pytest.mark.parametrize("router", [None, "token_choice"])
def test_a_token_is_one_more_of_the_encoder(extra: Any, router: Any) -> None:
    model = made(router, extra_input=extra, num_domains=3).eval()
    images, domain = images_of(), torch.tensor([0, 1, 2, 0, 1, 2])
    args = (images, domain) if extra == "domain" else (images,)
    patches = model._process_input(images)
    tokens = torch.cat([model.class_token.expand(6, -1, -1), patches], dim=1)
    tokens = tokens + model.encoder.pos_embedding
    more = model.embedding(domain if extra == "domain" else model.standardized(view_of(images)))
    tokens = torch.cat([tokens[:, :1], more[:, None], tokens[:, 1:]], dim=1)
    expected = model.heads(model.encoder.ln(model.encoder.layers(tokens))[:, 0])
    seen = list[torch.Tensor]()
    model.encoder.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(model(*args), expected)
    torch.testing.assert_close(seen[0], tokens)  # the patches are the last ones, as maps take them


def test_without_a_view_it_is_the_vit() -> None:
    model = made(None)
    torch.manual_seed(0)
    plain = gmoe.ViTMoE(SIZE, 5, None)
    plain.heads.head.weight.data.copy_(model.heads.head.weight.data)
    assert torch.equal(model(images_of()), plain(images_of()))


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_of_one_image_or_none_trains(number: int) -> None:
    """A single one is standardized by the averages; the last slice of a batch may be empty."""
    model = made(by_view=True, extra_input="view")
    model(images_of())
    mean = model.standardized.running_mean.clone()
    logits = model(images_of()[:number])
    assert logits.shape == (number, 5)
    logits.sum().backward()
    assert torch.equal(model.standardized.running_mean, mean)


@pytest.mark.parametrize("k", [2, 4])
def test_any_number_of_experts_decides_by_the_view(k: int) -> None:
    model = made(by_view=True, k=k)
    logits, routings = model(images_of(), return_routing=True)
    logits.sum().backward()
    weight_BTE = routings[0].to_dense().view(6, 5, 4)
    assert torch.equal(weight_BTE, weight_BTE[:, :1].expand(-1, 5, -1))


@pytest.mark.parametrize("router", ["expert_choice", "attention_vote"])
def test_images_do_not_compete_for_experts(router: str) -> None:
    with pytest.raises(
        ValueError, match=r"router_input: got 'view' with \w+, expected a router in"
    ):
        made(router, by_view=True)


@pytest.mark.parametrize(
    "options", [{"extra_input": "view"}, {"extra_input": "domain", "num_domains": 3}], ids=str
)
def test_maps_show_the_patches_behind_the_further_token(options: Any) -> None:
    model = made(**options, router_kwargs={"init_scale": 10.0}).eval()
    images = images_of()
    tell_domains(model, torch.tensor([0, 1, 2, 0, 1, 2]) if "num_domains" in options else None)
    _, routings = model(images, return_routing=True)
    for routing, weight_BhwE in zip(routings, patch_weights(model, images), strict=True):
        weight_BTE = routing.to_dense().view(6, 6, 4)
        torch.testing.assert_close(weight_BhwE.flatten(1, 2), weight_BTE[:, 2:])
        assert len(weight_BTE.argmax(dim=2).unique()) > 1


def test_a_view_decides_for_the_map_of_the_whole_image() -> None:
    model = made(by_view=True).eval()
    (weight_BhwE,) = patch_weights(model, images_of())
    weight_BTE = weight_BhwE.flatten(1, 2)
    assert torch.equal(weight_BTE, weight_BTE[:, :1].expand(-1, 4, -1))
    drawn = expert_maps(model, images_of()[:1], titles=["ILSVRC2012_val_00009111.JPEG\ndog?"])
    assert [axis.get_title() for axis in drawn.axes] == ["", "all MoE layers"]
    assert drawn.axes[0].get_ylabel() == "ILSVRC201…09111.JPEG\ndog?"


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="router: got None, expected one, to decide by the view"):
        made(None, by_view=True)
    with pytest.raises(ValueError, match="extra_input: got 'domain' without domains"):
        made(extra_input="domain")
    with pytest.raises(ValueError, match="domain_B: got no domain, expected the domain of each"):
        made(extra_input="domain", num_domains=2)(images_of())
    with pytest.raises(ValueError, match="domain_B: got domains, expected none"):
        made()(images_of(), torch.zeros(6, dtype=torch.int64))
